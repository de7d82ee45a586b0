"""The errors that a user can fix; defined in `rollout.errors`, the room that every other one may import."""

from __future__ import annotations

from rollout.errors import INTERRUPTED as INTERRUPTED
from rollout.errors import RUN_ERROR as RUN_ERROR
from rollout.errors import USER_ERROR as USER_ERROR
from rollout.errors import ConfigError as ConfigError
from rollout.errors import InputError as InputError
from rollout.errors import RsgrpoError as RsgrpoError
from rollout.errors import SourceBroke as SourceBroke
from rollout.errors import WorkerError as WorkerError
from rollout.errors import listed as listed
from rollout.errors import run_program as run_program
