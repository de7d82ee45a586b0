"""A run folder that is another one on another node is found when the run starts."""

from __future__ import annotations

import pytest

from rsgrpo.cluster.shared_folder import require_token, token_in
from rsgrpo.errors import ConfigError


def test_every_rank_must_find_what_the_driver_wrote(tmp_path):
    ours, theirs = tmp_path / "runs" / "mine", tmp_path / "elsewhere" / "runs" / "mine"
    theirs.mkdir(parents=True)
    with token_in(ours) as token:
        require_token(str(ours), token)
        with pytest.raises(ConfigError, match=r"node \S+ does not see .*elsewhere/runs/mine: the folder is not shared"):
            require_token(str(theirs), token, wait_s=0)
        with pytest.raises(ConfigError, match="is not shared"):
            require_token(str(tmp_path / "nowhere"), token, wait_s=0)
    assert list(tmp_path.iterdir()) == [tmp_path / "elsewhere"], "a start that fails leaves no run folder"


def test_a_run_folder_stays_as_it_was(tmp_path):
    (tmp_path / "config.yaml").touch()
    with token_in(tmp_path):
        assert len(list(tmp_path.iterdir())) == 2
    assert list(tmp_path.iterdir()) == [tmp_path / "config.yaml"]
