"""What differs between model families: one small file each, chosen by the configuration's `model_type`."""

from __future__ import annotations

from rollout.errors import InputError
from rollout.families.base import Family as Family
from rollout.families.qwen3_vl import Qwen3VL
from rollout.families.qwen25_vl import Qwen25VL

_FAMILIES: dict[str, type[Family]] = {"qwen2_5_vl": Qwen25VL, "qwen3_vl": Qwen3VL}


def family_of(model_type: str) -> Family:
    """Return the adapter of a configuration's `model_type`.

    Raises:
        InputError: a family without an adapter.
    """
    if model_type not in _FAMILIES:
        raise InputError(
            f"model.path holds a {model_type!r} model; the learner knows {sorted(_FAMILIES)}: "
            "add an adapter beside rollout/families/qwen25_vl.py and a parity test"
        )
    return _FAMILIES[model_type]()
