"""What differs between model families: one small file each, selected by the model configuration's `model_type`."""

from __future__ import annotations

from rollout.errors import InputError
from rollout.families.base import Family as Family
from rollout.families.glm4v import Glm4V
from rollout.families.internvl import InternVL
from rollout.families.qwen2_vl import Qwen2VL, Qwen25VL
from rollout.families.qwen3_5 import Qwen35, Qwen35Moe
from rollout.families.qwen3_vl import Qwen3VL, Qwen3VLMoe

FAMILIES: dict[str, type[Family]] = {
    family.model_type: family for family in (Qwen2VL, Qwen25VL, Qwen3VL, Qwen3VLMoe, Qwen35, Qwen35Moe, InternVL, Glm4V)
}


def family_of(model_type: str) -> Family:
    """Return the adapter of a configuration's `model_type`.

    Raises:
        InputError: there is none.
    """
    if model_type not in FAMILIES:
        raise InputError(
            f"model.path is a {model_type!r} model; supported families are {', '.join(FAMILIES)}. Set model.path to a "
            "model of one of them; the documentation has a page on how to add a model family."
        )
    return FAMILIES[model_type]()
