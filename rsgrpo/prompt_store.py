"""A step's prompts on their way into the policy: counted, encoded in background threads, tower features cached.

Owns the order of work and the cache; the encoding itself is rollout.inputs', the tower is the policy's.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch

from rollout.images import PromptError
from rollout.inputs import PromptInputs
from rollout.types import Prompt
from rsgrpo.packing import EncodedPrompt
from rsgrpo.types import RsgrpoError

_AHEAD = 4


class Encoder(Protocol):
    """What the learner needs of `rollout.inputs.InputProcessor`; benchmarks hand in a synthetic one."""

    eos_token_id: int
    banned_token_ids: list[int]

    def encode(self, prompt: Prompt) -> PromptInputs:
        """Return tokens and pixels."""
        ...

    def count_tokens(self, prompt: Prompt) -> int:
        """Return the number of tokens from image headers alone."""
        ...


class FeatureCache:
    """Features of images under a frozen tower, by content hash; least recently used ones go when it is full.

    The weights never change, so an entry is right for the whole run. Entries live in CPU memory.

    Attributes:
        hits, misses: look-ups so far.
    """

    def __init__(self, max_bytes: int) -> None:
        self.hits = self.misses = 0
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._features: OrderedDict[str, torch.Tensor] = OrderedDict()

    def get(self, image_hash: str) -> torch.Tensor | None:
        """Return (merged tokens, F), or None where it must be computed."""
        features = self._features.get(image_hash)
        if features is None:
            self.misses += 1
            return None
        self.hits += 1
        self._features.move_to_end(image_hash)
        return features

    def put(self, image_hash: str, features: torch.Tensor) -> None:
        """Keep features; an image larger than the whole cache is not kept."""
        num_bytes = features.numel() * features.element_size()
        if num_bytes > self._max_bytes or image_hash in self._features:
            return
        self._features[image_hash] = features
        self._num_bytes += num_bytes
        while self._num_bytes > self._max_bytes:
            _, oldest = self._features.popitem(last=False)
            self._num_bytes -= oldest.numel() * oldest.element_size()


class PromptStore:
    """Encodes a step's prompts once each, ahead of use, and keeps them until others come.

    Args:
        encoder: renders and decodes.
        position_ids: (token_ids_T, image_grid_thw) -> (3, T).
        encode_images: (pixel_values, image_grid_thw) of one image -> (merged tokens, F); None with a trained tower.
        cache: features across steps; used with a frozen tower.
    """

    def __init__(
        self,
        encoder: Encoder,
        position_ids: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor],
        encode_images: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None,
        cache: FeatureCache,
    ) -> None:
        self._encoder = encoder
        self._position_ids = position_ids
        self._encode_images = encode_images
        self._cache = cache
        self._pool = ThreadPoolExecutor(min(_AHEAD, os.cpu_count() or 1), thread_name_prefix="encode")
        self._prompts: Sequence[Prompt] = ()
        self._waiting: list[int] = []
        self._inputs: dict[int, Future[tuple[PromptInputs, torch.Tensor]]] = {}
        self._encoded: dict[int, EncodedPrompt] = {}

    def count_tokens(self, prompts: Sequence[Prompt]) -> list[int]:
        """Return the token count of each prompt, from image headers alone."""
        return list(self._pool.map(self._count, prompts))

    def start(self, prompts: Sequence[Prompt], order: Sequence[int]) -> None:
        """Begin a pass: encode `prompts` in the order in which they will be needed.

        What the last pass encoded is kept where the prompt comes again (reference logprobs, then the update).
        """
        for future in self._inputs.values():
            future.cancel()
        before = {self._prompts[index].id: (self._prompts[index], done) for index, done in self._encoded.items()}
        self._prompts = prompts
        self._inputs, self._encoded = {}, {}
        for index in order:
            prompt, done = before.get(prompts[index].id, (None, None))
            if done is not None and prompt == prompts[index]:
                self._encoded[index] = done
        self._waiting = [index for index in dict.fromkeys(order) if index not in self._encoded]
        self._submit()

    def get(self, index: int) -> EncodedPrompt:
        """Return prompt `index` of the step, waiting for its encoding where it is not done yet."""
        if index not in self._encoded:
            if index not in self._inputs:
                self._waiting.remove(index)
                self._inputs[index] = self._pool.submit(self._prepare, self._prompts[index])
            inputs, positions_3T = self._inputs.pop(index).result()
            self._submit()
            self._encoded[index] = self._finish(inputs, positions_3T)
        return self._encoded[index]

    def encode(self, prompt: Prompt) -> EncodedPrompt:
        """Encode one prompt at once, outside any step."""
        return self._finish(*self._prepare(prompt))

    def _submit(self) -> None:
        while self._waiting and len(self._inputs) < _AHEAD:
            index = self._waiting.pop(0)
            self._inputs[index] = self._pool.submit(self._prepare, self._prompts[index])

    def _count(self, prompt: Prompt) -> int:
        try:
            return self._encoder.count_tokens(prompt)
        except PromptError as error:
            raise RsgrpoError(f"prompt {prompt.id}: {error}") from error

    def _prepare(self, prompt: Prompt) -> tuple[PromptInputs, torch.Tensor]:
        try:
            inputs = self._encoder.encode(prompt)
        except PromptError as error:
            raise RsgrpoError(f"prompt {prompt.id}: {error}") from error
        return inputs, self._position_ids(torch.tensor(inputs.token_ids_T), inputs.image_grid_thw)

    def _finish(self, inputs: PromptInputs, positions_3T: torch.Tensor) -> EncodedPrompt:
        tokens_T = torch.tensor(inputs.token_ids_T)
        if inputs.pixel_values is None or inputs.image_grid_thw is None:
            return EncodedPrompt(tokens_T, positions_3T)
        if self._encode_images is None:
            return EncodedPrompt(
                tokens_T, positions_3T, pixel_values=inputs.pixel_values, image_grid_thw=inputs.image_grid_thw
            )
        patches = inputs.pixel_values.split(inputs.image_grid_thw.prod(1).tolist())
        pieces = []
        # One image at a time: its features then do not depend on what it happened to be batched with.
        for image_hash, pixels, grid in zip(inputs.image_hashes, patches, inputs.image_grid_thw, strict=True):
            features = self._cache.get(image_hash)
            if features is None:
                features = self._encode_images(pixels, grid[None]).cpu()
                self._cache.put(image_hash, features)
            pieces.append(features)
        return EncodedPrompt(tokens_T, positions_3T, features=torch.cat(pieces))
