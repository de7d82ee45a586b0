"""Law 7: blank images change the log-probabilities; a model that trains without seeing them is caught at the start."""

from __future__ import annotations

import pytest
import torch

from rsgrpo.types import RsgrpoError
from tests.material.learner import make_groups, make_learner


def test_the_self_check_finds_a_model_that_does_not_see_its_images(tiny_model_path, page_images):
    learner = make_learner(tiny_model_path)
    with torch.no_grad():
        for parameter in learner.policy.hf.model.visual.merger.parameters():
            parameter.zero_()
    with pytest.raises(RsgrpoError, match="does not see its images"):
        learner.update(make_groups(page_images, [2, 0, 5, 1]), [1.0, 2.0])
