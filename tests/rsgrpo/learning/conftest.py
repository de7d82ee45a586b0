"""Groups that all tests of the learner share."""

from __future__ import annotations

import pytest

from rsgrpo.types import TrainGroup
from tests.material.learner import make_groups


@pytest.fixture(scope="session")
def groups(page_images) -> list[TrainGroup]:
    return make_groups(page_images, [2, 0, 5, 1])
