"""Turn prompts into tokens and pixels: the single path that engines, learner, SFT and inference share."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

from rollout.config import InputsConfig
from rollout.engine import EngineOptions
from rollout.errors import RsgrpoError, one_line
from rollout.families import FAMILIES, Family
from rollout.inputs.growing import pieces
from rollout.inputs.hub_model import require_reachable
from rollout.inputs.images import PromptError, decode, name_of, read_size, smart_resize
from rollout.inputs.offsets import token_spans
from rollout.inputs.template import ChatTemplate, InputsError
from rollout.inputs.video_reader import VideoReader
from rollout.inputs.videos import IMAGE_MARK as IMAGE_MARK
from rollout.inputs.videos import shown
from rollout.types import FinishReason, ImageSource, Observation, Prompt, Rollout, RolloutGroup

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class PromptInputs:
    """One prompt as a model takes it.

    token_ids_T: each image placeholder expanded to one per merged vision token.
    pixel_values: (patches of all images and videos, patch_dim) float32, normalised, in the order of the text; None
        without images.
    image_grid_thw: (images and videos, 3) int64, patches in time, height, width; None without images.
    image_hashes: sha256 of each image's resized pixels, for caches; of a video, of all its frames'.
    video_steps: the seconds that each video's temporal patches lie apart.
    """

    token_ids_T: list[int]
    pixel_values: torch.Tensor | None
    image_grid_thw: torch.Tensor | None
    image_hashes: tuple[str, ...]
    video_steps: tuple[float, ...] = ()


class InputProcessor:
    """Renders prompts and decodes responses for one model folder. Create one per process; it is thread-safe.

    Attributes:
        tokenizer, image_processor, family, model_type: of the model folder. template: its chat template.
        eos_token_id: end-of-text of a response. pad_token_id: the same if the folder names none.
        image_token_id: placeholder of one merged vision token. video_token_id: the same of a video; None: none is read.
        banned_token_ids: vision tokens, which must never be sampled.
    """

    def __init__(
        self, model_path: str, inputs: InputsConfig, *, revision: str = "", trust_remote_code: bool = False
    ) -> None:
        options: dict[str, Any] = EngineOptions(revision=revision, trust_remote_code=trust_remote_code).source
        self.inputs = inputs
        require_reachable(model_path, revision)
        self.tokenizer = AutoTokenizer.from_pretrained(model_path, **options)
        load_image_processor: Callable[..., Any] = AutoImageProcessor.from_pretrained
        self.image_processor = load_image_processor(model_path, **options)
        config = AutoConfig.from_pretrained(model_path, **options)
        if not self.tokenizer.chat_template:
            raise InputsError(f"model folder {model_path} has no chat template. Add chat_template.jinja.")
        if self.tokenizer.eos_token_id is None:
            raise InputsError(f"the tokenizer in {model_path} names no eos_token. Set it in tokenizer_config.json.")
        image_token_id = getattr(config, "image_token_id", None)
        if image_token_id is None:
            raise InputsError(
                f"the config in {model_path} ({config.model_type}) has no image_token_id: it is not a supported "
                f"vision-language model. Set model.path to one of a supported family: {', '.join(FAMILIES)}."
            )
        self.image_token_id: int = image_token_id
        self.model_type: str = config.model_type
        self.family = FAMILIES.get(config.model_type, Family)()  # vLLM also samples families that cannot be trained
        vocabulary = self.tokenizer.get_vocab()
        start, end, *_ = (vocabulary.get(token, -1) for token in self.family.vision_tokens)
        video_token_id = getattr(config, "video_token_id", None)
        self._videos = VideoReader(model_path, options, self.family, video_token_id, self.token_ids, (start, end))
        self.video_token_id = self._videos.token_id
        ends_by = self.family.end_token
        end_token = ends_by if ends_by in vocabulary else str(self.tokenizer.eos_token)
        self.eos_token_id: int = vocabulary[end_token]
        pad = self.tokenizer.pad_token_id
        self.pad_token_id: int = self.eos_token_id if pad is None else pad
        self._factor = self.family.resize_unit(self.image_processor)
        if inputs.max_pixels < self._factor**2:
            raise InputsError(
                f"inputs.max_pixels must be >= {self._factor**2} (a square of {self._factor} x {self._factor}), "
                f"got {inputs.max_pixels}"
            )
        self._wrapper = [vocabulary[token] for token in self.family.wrapper]
        image_token = str(self.tokenizer.convert_ids_to_tokens(image_token_id))
        vision_tokens = [t for t in dict.fromkeys([image_token, *self.family.vision_tokens]) if t in vocabulary]
        self.banned_token_ids: list[int] = sorted(vocabulary[token] for token in vision_tokens)
        self.template = ChatTemplate(self.tokenizer, self.family, end_token, vision_tokens)
        self.token_ids("fix the tokenizer's padding state, which threads must not change")

    def encode(self, prompt: Prompt) -> PromptInputs:
        """Return tokens and pixels of a prompt; if possible it is refused before any pixel is decoded.

        Raises:
            PromptError: as `template.prompt`; too many images, an unreadable one, or more tokens than the limit.
        """
        token_ids_T = self._expanded_ids(prompt)
        self.check_length(len(token_ids_T))
        if prompt.videos:
            return self._with_videos(token_ids_T, prompt)
        return self._with_pixels(token_ids_T, self.load_images(prompt))

    def encode_observation(self, text: str, images: Sequence[ImageSource], *, has_ended: bool) -> PromptInputs:
        """Return tokens and pixels of `template.observation`.

        Raises:
            PromptError: as `template.observation`; an image that cannot be read.
        """
        token_ids_T = self.observation_ids(text, images, has_ended=has_ended)
        return self._with_pixels(token_ids_T, self.resized_images(images))

    def observation_ids(self, text: str, images: Sequence[ImageSource], *, has_ended: bool) -> list[int]:
        """Return the tokens of `encode_observation`, from image headers alone; raises as it does."""
        ids = self.token_ids(self.template.observation(text, len(images), has_ended=has_ended))
        return self._expanded(ids, images)

    def encode_images(self, images: Sequence[ImageSource]) -> PromptInputs:
        """Return the pixels of images, and no tokens.

        Raises:
            PromptError: one cannot be read.
        """
        return self._with_pixels([], self.resized_images(images))

    def _with_pixels(self, token_ids_T: list[int], images: Sequence[Image.Image]) -> PromptInputs:
        if not images:
            return PromptInputs(token_ids_T, None, None, ())
        limits = self.inputs.min_pixels, self.inputs.max_pixels
        pixel_values, grid = self.family.pixels(self.image_processor, images, *limits)
        return PromptInputs(
            token_ids_T=token_ids_T,
            pixel_values=pixel_values,
            image_grid_thw=grid,
            image_hashes=tuple(pixel_hash(image) for image in images),
        )

    def _with_videos(self, token_ids_T: list[int], prompt: Prompt) -> PromptInputs:
        """Return the pixels of images and videos, each prepared alone, in the order of the text."""
        images = self.load_images(prompt)
        pixels, grids, hashes, steps = [], [], [], []
        for where, times in shown(prompt):
            if times:
                patches, grid, step = self._videos.pixels(images[where], times)
                steps.append(step)
            else:
                patches, grid = self.family.pixels(
                    self.image_processor, images[where], self.inputs.min_pixels, self.inputs.max_pixels
                )
            pixels.append(patches)
            grids.append(grid)
            hashes.append("+".join(map(pixel_hash, images[where])) + "+" * bool(times))
        return PromptInputs(token_ids_T, torch.cat(pixels), torch.cat(grids), tuple(map(_short, hashes)), tuple(steps))

    @property
    def video_processor(self) -> Any:
        """The folder's video processor; raises InputError where it has none."""
        return self._videos.processor

    def count_vision(self, prompt: Prompt) -> tuple[int, int, int]:
        """Return (tokens of the prompt, image tokens among them, features made from its pixels)."""
        encoded = self.encode(prompt)
        num_features = self.family.num_features(self.image_processor, encoded.image_grid_thw)
        vision_ids = (self.image_token_id, self.video_token_id)
        num_vision = len([token for token in encoded.token_ids_T if token in vision_ids])
        return len(encoded.token_ids_T), num_vision, num_features

    def count_tokens(self, prompt: Prompt) -> int:
        """Return the length of `encode(prompt).token_ids_T`, from image headers alone.

        Raises:
            PromptError: as `encode`, except for pixels that do not decode and for the token limit.
        """
        return len(self._expanded_ids(prompt))

    def page_tokens(self, prompt: Prompt) -> list[int]:
        """Return the vision tokens of each image, from their headers; raises as `count_tokens`.

        Those of a temporal patch are the first of its frames'.
        """
        tokens = [self._num_vision_tokens(source) for source in prompt.images]
        for where, times in shown(prompt):
            for index in range(len(times)):
                if index % self._videos.temporal_patch:
                    tokens[where.start + index] = 0
        return tokens

    def load_images(self, prompt: Prompt) -> list[Image.Image]:
        """Return the prompt's images decoded, in RGB and resized: exactly the pixels that `encode` normalises.

        Raises:
            PromptError: too many images, or an unreadable one.
        """
        self._refuse_too_many_images(prompt)
        return self.resized_images(prompt.images)

    def resized_images(self, sources: Sequence[ImageSource]) -> list[Image.Image]:
        """Return images decoded, in RGB and resized; raises PromptError for an unreadable one."""
        images = []
        for source in sources:
            image = decode(source)
            height, width = self._resized(image.height, image.width, name_of(source))
            images.append(image.resize((width, height), Image.Resampling.BICUBIC))
        return images

    def decode(self, token_ids_T: Sequence[int]) -> tuple[str, tuple[tuple[int, int], ...]]:
        """Return a response's text without special tokens, and the (start, end) characters of each token."""
        return token_spans(self.tokenizer, token_ids_T)

    def pieces(
        self, updates: Iterable[Sequence[int] | Observation | RolloutGroup]
    ) -> Generator[str | Observation | RolloutGroup]:
        """Turn a growing response into the pieces of text that a listener has not heard yet; see `growing.pieces`."""
        return pieces(updates, lambda token_ids_T: self.decode(token_ids_T)[0])

    def rollout(self, token_ids_T: Sequence[int], logprobs_T: Sequence[float], weights_version: int) -> Rollout:
        """Return a sampled response with its text; it was cut at the limit unless end-of-text is its last token."""
        text, spans_T = self.decode(token_ids_T)
        finish: FinishReason = "stop" if token_ids_T[-1] == self.eos_token_id else "length"
        return Rollout(token_ids_T, logprobs_T, text, spans_T, finish, weights_version)

    def encode_response(self, text: str) -> list[int]:
        """Return the tokens of a response to learn, end-of-text appended.

        Raises:
            PromptError: the text contains a control token.
        """
        self.template.refuse_control_tokens(text, "the response")
        return [*self.token_ids(text), self.eos_token_id]

    def placeholder_ids(self, prompt: Prompt) -> list[int]:
        """Return the tokens of a prompt with one placeholder for each image and each video, as vLLM takes them.

        Raises:
            PromptError: as `count_tokens`.
        """
        return self._videos.unmarked(self._rendered_ids(prompt))

    def _expanded_ids(self, prompt: Prompt) -> list[int]:
        """Tokenise the rendered prompt and repeat each placeholder once per merged vision token of its image."""
        ids = self._rendered_ids(prompt)
        return self._expanded_videos(ids, prompt) if prompt.videos else self._expanded(ids, prompt.images)

    def _rendered_ids(self, prompt: Prompt) -> list[int]:
        """Tokenise the rendered prompt, which has one placeholder for each image and each video."""
        self._refuse_too_many_images(prompt)
        self._videos.require(prompt, self.inputs, self.model_type)
        ids = self.token_ids(self.template.prompt(prompt))
        if ids.count(self.image_token_id) != prompt.num_pages:
            raise InputsError(
                f"the chat template made {ids.count(self.image_token_id)} image placeholders (token "
                f"{self.image_token_id}) for {prompt.num_pages} images. Fix it to make one per image."
            )
        if not prompt.videos:
            return ids
        if self.video_token_id is None or ids.count(self.video_token_id) != len(prompt.videos):
            raise InputsError(
                f"the chat template made {ids.count(self.video_token_id or -1)} video placeholders (token "
                f"{self.video_token_id}) for {len(prompt.videos)} videos. Take a model whose template reads videos."
            )
        self._videos.require_marks(ids)
        return ids

    def _expanded_videos(self, ids: Sequence[int], prompt: Prompt) -> list[int]:
        """Repeat the placeholders of images and videos, in the order of the text."""
        placeholders = iter(shown(prompt))
        expanded: list[int] = []
        is_behind_video = False
        for token_id in ids:
            if is_behind_video:  # its closing mark, which `tokens` has written
                is_behind_video = False
            elif token_id in (self.image_token_id, self.video_token_id):
                where, times = next(placeholders)
                count = self._num_vision_tokens(prompt.images[where.start])
                if times:
                    expanded[-1:] = self._videos.tokens(count, times)
                    is_behind_video = True
                else:
                    expanded += [token_id] * count
            else:
                expanded.append(token_id)
        return expanded

    def _expanded(self, ids: Sequence[int], images: Sequence[ImageSource]) -> list[int]:
        """Repeat each placeholder once per merged vision token of its image, between the family's wrapper."""
        lengths = iter([self._num_vision_tokens(source) for source in images])
        expanded: list[int] = []
        for token_id in ids:
            if token_id != self.image_token_id:
                expanded.append(token_id)
                continue
            expanded += [*self._wrapper[:1], *[token_id] * next(lengths), *self._wrapper[1:]]
        return expanded

    def collapsed(self, inputs: PromptInputs) -> list[int]:
        """Return the tokens with one placeholder per image: before `encode` repeated it."""
        if inputs.image_grid_thw is None:
            return list(inputs.token_ids_T)
        lengths = iter([self.family.num_features(self.image_processor, grid[None]) for grid in inputs.image_grid_thw])
        ids: list[int] = []
        skipped = 0
        for token_id in inputs.token_ids_T:
            if skipped:
                skipped -= 1
            elif token_id not in self._wrapper:  # in no text, because it is refused there
                ids.append(token_id)
                skipped = next(lengths) - 1 if token_id == self.image_token_id else 0
        return ids

    def _num_vision_tokens(self, source: ImageSource) -> int:
        height, width = self._resized(*read_size(source), name_of(source))
        return self.family.image_tokens(self.image_processor, height, width)

    def _resized(self, height: int, width: int, name: str) -> tuple[int, int]:
        limits = self.inputs.min_pixels, self.inputs.max_pixels
        canvas = self.family.canvas(self.image_processor, height, width, *limits)
        if canvas is not None:
            return canvas
        try:
            return smart_resize(height, width, self._factor, *limits)
        except PromptError as error:
            raise PromptError(f"image {name}: {error}") from error

    def token_ids(self, text: str) -> list[int]:
        """Return the tokens of a text, without special tokens around it."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False, verbose=False)
        return ids

    def _refuse_too_many_images(self, prompt: Prompt) -> None:
        if prompt.num_pages > self.inputs.max_images:
            raise PromptError(
                f"the prompt has {prompt.num_pages} images, but inputs.max_images is {self.inputs.max_images}. "
                "Raise it or leave pages out."
            )

    def check_length(self, num_tokens: int) -> None:
        """Raise PromptError if a rendered prompt has more tokens than the limit."""
        if num_tokens > self.inputs.max_prompt_tokens:
            raise PromptError(
                f"the prompt has {num_tokens:,} tokens, but inputs.max_prompt_tokens is "
                f"{self.inputs.max_prompt_tokens:,}. Raise it, lower inputs.max_pixels or leave pages out."
            )


def pixel_hash(image: Image.Image) -> str:
    """Return the sha256 of an image's size and pixels."""
    return hashlib.sha256(f"{image.width}x{image.height}:".encode() + image.tobytes()).hexdigest()


def _short(hashes: str) -> str:
    """Return one hash for those of a video's frames."""
    return hashlib.sha256(hashes.encode()).hexdigest() if "+" in hashes else hashes


@contextmanager
def preparing(prompt: Prompt) -> Iterator[None]:
    """Turn a surprise while one prompt is prepared into its own PromptError, so that all others are sampled."""
    try:
        yield
    except RsgrpoError:
        raise
    except Exception as error:
        log.exception("prompt %s cannot be prepared", prompt.id)
        raise PromptError(f"the prompt cannot be prepared: {type(error).__name__}: {one_line(error)}") from error
