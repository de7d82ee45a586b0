"""A step's prompts on their way into the policy: counted, encoded in background threads, their features reused.

Owns the order of work; the encoding itself is rollout.inputs.processor', the tower is the policy's.
"""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch

from rollout.inputs.images import PromptError
from rollout.inputs.processor import PromptInputs
from rollout.types import Prompt
from rsgrpo.learning.feature_cache import FeatureCache
from rsgrpo.learning.packing import EncodedPrompt
from rsgrpo.types import RsgrpoError

Prepared = tuple[PromptInputs, torch.Tensor, list[torch.Tensor | None]]
"""What threads make of a prompt: its inputs, (3, T) positions, and features that were found on disk."""


class Encoder(Protocol):
    """What the learner needs of `rollout.inputs.processor.InputProcessor`; benchmarks hand in a synthetic one."""

    eos_token_id: int
    banned_token_ids: list[int]
    image_processor: Any

    def encode(self, prompt: Prompt) -> PromptInputs:
        """Return tokens and pixels."""
        ...

    def count_tokens(self, prompt: Prompt) -> int:
        """Return the number of tokens from image headers alone."""
        ...


class PromptStore:
    """Encodes a step's prompts once each, ahead of use, and keeps them until others come.

    Args:
        encoder: renders and decodes.
        position_ids: (token_ids_T, image_grid_thw) -> (3, T).
        encode_images: (pixel_values, image_grid_thw) of one image -> (merged tokens, F); None with a trained tower.
        cache: features across steps; used with a frozen tower.
        ahead: prompts whose pixels may wait in memory.

    Attributes:
        wait_s: seconds that `get` has waited for encodings. num_encoded: prompts encoded.
    """

    def __init__(
        self,
        encoder: Encoder,
        position_ids: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor],
        encode_images: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None,
        cache: FeatureCache,
        *,
        ahead: int,
    ) -> None:
        self.cache = cache
        self.wait_s, self.num_encoded = 0.0, 0
        self._encoder = encoder
        self._position_ids = position_ids
        self._encode_images = encode_images
        self._ahead = ahead
        self._pool = ThreadPoolExecutor(min(ahead, os.cpu_count() or 1), thread_name_prefix="encode")
        self._prompts: Sequence[Prompt] = ()
        self._same: dict[int, int] = {}
        self._waiting: list[int] = []
        self._early: OrderedDict[str, tuple[Prompt, Future[Prepared]]] = OrderedDict()
        self._inputs: dict[int, Future[Prepared]] = {}
        self._encoded: dict[int, EncodedPrompt] = {}

    def count_tokens(self, prompts: Sequence[Prompt], *, unreadable: int | None = None) -> list[int]:
        """Return the token count of each prompt, from image headers alone.

        unreadable: what stands for a prompt that cannot be read; None raises.
        """
        return list(self._pool.map(lambda prompt: self._count(prompt, unreadable), prompts))

    def prefetch(self, prompts: Sequence[Prompt]) -> None:
        """Begin to encode prompts that a later pass will want, the first `ahead` of them; returns at once."""
        for prompt in prompts[: self._ahead]:
            known, future = self._early.pop(prompt.id, (None, None))
            if future is None or known != prompt:
                future = self._submit(prompt)
            self._early[prompt.id] = (prompt, future)
        while len(self._early) > self._ahead:  # never asked for: the group filter dropped them
            self._early.popitem(last=False)[1][1].cancel()

    def start(self, prompts: Sequence[Prompt], order: Sequence[int]) -> None:
        """Begin a pass: encode `prompts` in the order in which they will be needed.

        What the last pass encoded is kept where the prompt comes again (reference logprobs, then the update).
        """
        for future in self._inputs.values():
            future.cancel()
        before = {self._prompts[index].id: (self._prompts[index], done) for index, done in self._encoded.items()}
        self._prompts = prompts
        self._same, self._inputs, self._encoded = {}, {}, {}
        first: dict[str, int] = {}
        for index in order:
            prompt = prompts[index]
            same = first.setdefault(prompt.id, index)
            self._same[index] = same if prompts[same] == prompt else index
            known, done = before.get(prompt.id, (None, None))
            if done is not None and known == prompt:
                self._encoded[self._same[index]] = done
        needed = dict.fromkeys(self._same[index] for index in order)
        self._waiting = [index for index in needed if index not in self._encoded]
        for index in list(self._waiting):
            if prompts[index].id in self._early:
                self._begin(index)
        self._fill()

    def get(self, index: int) -> EncodedPrompt:
        """Return prompt `index` of the step, waiting for its encoding where it is not done yet."""
        index = self._same[index]
        if index not in self._encoded:
            if index not in self._inputs:
                self._begin(index)
            since = time.perf_counter()
            prepared = self._inputs.pop(index).result()
            self.wait_s += time.perf_counter() - since
            self._fill()
            self._encoded[index] = self._finish(*prepared)
        return self._encoded[index]

    def encode(self, prompt: Prompt) -> EncodedPrompt:
        """Encode one prompt at once, outside any step."""
        return self._finish(*self._prepare(prompt))

    def _fill(self) -> None:
        while self._waiting and len(self._inputs) < self._ahead:
            self._begin(self._waiting[0])

    def _begin(self, index: int) -> None:
        self._waiting.remove(index)
        prompt = self._prompts[index]
        known, future = self._early.pop(prompt.id, (None, None))
        self._inputs[index] = future if future is not None and known == prompt else self._submit(prompt)

    def _submit(self, prompt: Prompt) -> Future[Prepared]:
        self.num_encoded += 1
        return self._pool.submit(self._prepare, prompt)

    def _count(self, prompt: Prompt, unreadable: int | None) -> int:
        try:
            return self._encoder.count_tokens(prompt)
        except PromptError as error:
            if unreadable is not None:
                return unreadable
            raise RsgrpoError(f"prompt {prompt.id}: {error}") from error

    def _prepare(self, prompt: Prompt) -> Prepared:
        try:
            inputs = self._encoder.encode(prompt)
        except PromptError as error:
            raise RsgrpoError(f"prompt {prompt.id}: {error}") from error
        positions_3T = self._position_ids(torch.tensor(inputs.token_ids_T), inputs.image_grid_thw)
        return inputs, positions_3T, [self.cache.stored(image_hash) for image_hash in inputs.image_hashes]

    def _finish(
        self, inputs: PromptInputs, positions_3T: torch.Tensor, stored: Sequence[torch.Tensor | None]
    ) -> EncodedPrompt:
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
        for image_hash, pixels, grid, found in zip(
            inputs.image_hashes, patches, inputs.image_grid_thw, stored, strict=True
        ):
            features = self.cache.get(image_hash, found)
            if features is None:
                features = self._encode_images(pixels, grid[None]).cpu()
                self.cache.put(image_hash, features)
                if self.cache.folder is not None:
                    self._pool.submit(self.cache.folder.put, image_hash, features)
            pieces.append(features)
        return EncodedPrompt(tokens_T, positions_3T, features=torch.cat(pieces))
