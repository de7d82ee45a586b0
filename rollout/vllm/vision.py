"""How images and videos reach vLLM: resized and chosen here, so that it neither resizes nor samples again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from rollout.inputs.processor import InputProcessor, pixel_hash
from rollout.inputs.video_reader import require_one_size
from rollout.inputs.videos import shown, step_of
from rollout.types import Prompt

NORMALISATION = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
"""What turns bytes into a tower's inputs, as attributes of a processor."""


def vision_arguments(processor: InputProcessor, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `vllm.AsyncEngineArgs` about images and videos, given the others.

    The sizes tell vLLM how many tokens they may have when it profiles memory.

    Raises:
        InputError: videos are allowed, and the model folder has no video processor.
    """
    family, inputs, image_processor = processor.family, processor.inputs, processor.image_processor
    limits = family.limits(image_processor, inputs.min_pixels, inputs.max_pixels)
    processing: dict[str, Any] = {"do_resize": False, **limits}
    found: dict[str, Any] = {"mm_processor_kwargs": processing}
    if not (inputs.max_videos and family.reads_videos):
        return found
    # Of the two frames of a patch in time; where a limit is that of one frame, the images' holds as well.
    size = {"shortest_edge": inputs.min_pixels, "longest_edge": 2 * inputs.max_pixels}
    processing["videos_kwargs"] = {"do_resize": False, "do_sample_frames": False, "size": size}
    if hasattr(processor.video_processor, "cap_pixels_per_frame"):  # of a resize; unset, transformers warns
        processing["videos_kwargs"]["cap_pixels_per_frame"] = False
    if normalisation(image_processor) != normalisation(processor.video_processor):
        found["mm_device_do_normalize"] = False  # vLLM would normalise videos on the device as if they were images
    found["limit_mm_per_prompt"] = {**arguments["limit_mm_per_prompt"], "video": inputs.max_videos}
    # What vLLM encodes in a step must have room for a whole video.
    patch_tokens = inputs.max_pixels // family.resize_unit(image_processor) ** 2
    video_tokens = min(-(-inputs.max_frames // 2) * patch_tokens, inputs.max_prompt_tokens)
    return found | {"max_num_batched_tokens": max(arguments.get("max_num_batched_tokens") or 0, video_tokens)}


def normalisation(processor: Any) -> list[Any]:
    """Return how an image or video processor turns bytes into a tower's inputs, for a comparison."""
    values = [getattr(processor, name, None) for name in NORMALISATION]
    return [tuple(value) if isinstance(value, list | tuple) else value for value in values]


def media(prompt: Prompt, images: Sequence[Image.Image]) -> dict[str, Any]:
    """Return a request's images and videos, each kind in the order of the text.

    Keyed by content, a page is preprocessed and encoded once, even if several prompts contain it.

    images: of the prompt and of its videos, resized.

    Raises:
        PromptError: the frames of a video differ in size.
    """
    data: dict[str, list[Any]] = {"image": [], "video": []}
    keys: dict[str, list[str]] = {"image": [], "video": []}
    for where, times in shown(prompt):
        hashes = [pixel_hash(image) for image in images[where]]
        if times:
            require_one_size(images[where])
            data["video"].append((np.stack([np.asarray(frame) for frame in images[where]]), when(times)))
            keys["video"].append(hashlib.sha256(repr((hashes, times)).encode()).hexdigest())
        else:
            data["image"] += images[where]
            keys["image"] += hashes
    kinds = [kind for kind, items in data.items() if items]
    return {
        "multi_modal_data": {kind: data[kind] for kind in kinds},
        "multi_modal_uuids": {kind: keys[kind] for kind in kinds},
    }


def when(times: Sequence[float]) -> dict[str, Any]:
    """Return a video's metadata, from which vLLM gets exactly these times, in seconds, and their mean distance.

    It divides indices by `fps`, and takes the distance for `total_num_frames` / `fps` / the number of frames.
    """
    length = len(times) * step_of(times)
    return {"fps": 1.0, "frames_indices": list(times), "total_num_frames": length, "do_sample_frames": False}
