"""What a model family makes of a video: tokens from the times of its frames, and patches from their pixels."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from transformers import AutoVideoProcessor

from rollout.config import InputsConfig
from rollout.errors import InputError, one_line
from rollout.families import FAMILIES, Family
from rollout.inputs.images import PromptError
from rollout.inputs.videos import step_of
from rollout.types import Prompt


class VideoReader:
    """Reads the videos of one model folder; its video processor is loaded when it is first needed.

    Args:
        options: of `from_pretrained`. encode: text -> tokens. marks: the tokens around an image's or a frame's.

    Attributes:
        token_id: placeholder of one merged vision token of a video; None where the family reads none.
    """

    def __init__(
        self,
        model_path: str,
        options: Mapping[str, Any],
        family: Family,
        token_id: int | None,
        encode: Callable[[str], list[int]],
        marks: tuple[int, int],
    ) -> None:
        self.token_id = token_id if family.reads_videos else None
        self._model_path, self._options, self._family = model_path, options, family
        self._encode, self._marks = encode, marks
        self._loaded: Any = None

    def require(self, prompt: Prompt, inputs: InputsConfig, model_type: str) -> None:
        """Raise PromptError for a prompt whose videos are too many, too long, or of a family that reads none."""
        if prompt.videos and self.token_id is None:
            able = ", ".join(name for name, family in FAMILIES.items() if family.reads_videos)
            raise PromptError(
                f"the prompt has a video, but {model_type} models read none here; {able} do. Give frames as images."
            )
        if len(prompt.videos) > inputs.max_videos:
            raise PromptError(
                f"the prompt has {len(prompt.videos)} videos, but inputs.max_videos is {inputs.max_videos}. Raise it "
                "or leave videos out."
            )
        if (most := max(map(len, prompt.videos), default=0)) > inputs.max_frames:
            raise PromptError(f"a video has {most} frames, but inputs.max_frames is {inputs.max_frames}. Raise it.")
        for times in prompt.videos:
            if any(later <= earlier for earlier, later in itertools.pairwise(times)):
                raise PromptError(f"the times of a video's frames must increase, got {times} s")

    @property
    def temporal_patch(self) -> int:
        """Frames that one temporal patch holds."""
        return int(self.processor.temporal_patch_size)

    def tokens(self, per_frame: int, times: Sequence[float]) -> list[int]:
        """Return what replaces a video and the marks around it.

        per_frame: merged vision tokens of a temporal patch.
        """
        size, (start, end) = self.temporal_patch, self._marks
        patches = [times[first : first + size] for first in range(0, len(times), size)]
        seen = [self.token_id or 0] * per_frame
        if not self._family.stamps_frames:
            return [start, *seen * len(patches), end]
        tokens: list[int] = []
        for some in patches:  # of the last, the frame that is missing equals the one before it
            seconds = (some[0] + some[-1]) / 2
            tokens += [*self._encode(f"<{seconds:.1f} seconds>"), start, *seen, end]
        return tokens

    def unmarked(self, ids: Sequence[int]) -> list[int]:
        """Return a rendered prompt without the marks around its videos, if its family writes them around each patch."""
        if not self._family.stamps_frames:
            return list(ids)
        around = {
            at for index, token_id in enumerate(ids) if token_id == self.token_id for at in (index - 1, index + 1)
        }
        return [token_id for index, token_id in enumerate(ids) if index not in around]

    def require_marks(self, ids: Sequence[int]) -> None:
        """Raise InputError unless each video's placeholder in a rendered prompt stands between its marks."""
        start, end = self._marks
        for index, token_id in enumerate(ids):
            if token_id == self.token_id and (*ids[index - 1 : index], *ids[index + 1 : index + 2]) != (start, end):
                raise InputError("the chat template writes a video without the marks around it. Fix it.")

    def pixels(self, frames: Sequence[Image.Image], times: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Return a video's patches, its (1, 3) grid, and the seconds that its temporal patches lie apart.

        Raises:
            PromptError: the resized frames differ in size.
        """
        require_one_size(frames)
        pixels, grid = self._family.video_pixels(self.processor, frames)
        return pixels, grid, self.temporal_patch * step_of(times)

    @property
    def processor(self) -> Any:
        """The folder's video processor.

        Raises:
            InputError: the folder has none.
        """
        if self._loaded is None:
            load: Callable[..., Any] = AutoVideoProcessor.from_pretrained
            try:
                self._loaded = load(self._model_path, **self._options)
            except (OSError, ValueError) as error:
                raise InputError(
                    f"model folder {self._model_path} has no video processor that can be read: {one_line(error)}. Add "
                    "video_preprocessor_config.json from the model's page, or leave videos out."
                ) from error
            if getattr(self._loaded, "cap_pixels_per_frame", 0) is None:
                self._loaded.cap_pixels_per_frame = False  # of a resize that is not done there
        return self._loaded


def require_one_size(frames: Sequence[Image.Image]) -> None:
    """Raise PromptError if the resized frames of a video differ in size."""
    sizes = sorted({f"{frame.width} x {frame.height}" for frame in frames})
    if len(sizes) > 1:
        raise PromptError(f"the frames of a video must have one size after the resize, got {', '.join(sizes)} pixels")
