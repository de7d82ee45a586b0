"""Prepare a step's prompts for the policy: count them, encode them ahead in threads, and reuse image features.

So are responses with observations, whose images come from an environment.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Protocol

import torch

from rollout.families.features import FeatureCache
from rollout.inputs.images import PromptError
from rollout.inputs.processor import PromptInputs
from rollout.types import ImageSource, Prompt
from rsgrpo.learning.context import ALONE, PromptCut, Team, cut_prompt
from rsgrpo.learning.feature_cache import FeatureFolder
from rsgrpo.learning.packing import EncodedPrompt
from rsgrpo.learning.response_rows import ResponseRow
from rsgrpo.types import RsgrpoError

Prepared = tuple[PromptInputs, torch.Tensor, list[torch.Tensor | None]]
"""What a thread makes of a prompt: its inputs, (3, T) positions, and the features of each image found on disk."""

Item = Prompt | ResponseRow
Key = tuple[str, str | bytes, str, tuple[ImageSource, ...], tuple[tuple[float, ...], ...]]


class PromptEncoder(Protocol):
    """The part of `rollout.inputs.processor.InputProcessor` that the learner uses; benchmarks pass a synthetic one."""

    eos_token_id: int
    banned_token_ids: list[int]
    image_processor: Any

    def encode(self, prompt: Prompt) -> PromptInputs:
        """Return tokens and pixels."""
        ...

    def encode_images(self, images: Sequence[ImageSource]) -> PromptInputs:
        """Return the pixels of images, and no tokens."""
        ...

    def count_tokens(self, prompt: Prompt) -> int:
        """Return the number of tokens from image headers alone."""
        ...


class PromptStore:
    """Encodes each prompt of a step once, ahead of its use, and keeps it for the next pass that needs it.

    Args:
        encoder: renders and decodes.
        position_ids: (token_ids_T, image_grid_thw, video_steps) -> (3, T).
        count_features: (token_ids_T, image_grid_thw) -> (image tokens among them, features that the images become).
        encode_images: (pixel_values, image_grid_thw) of one image -> (merged tokens, F); None with a trained tower.
        team: ranks that share rows: this one is given its share of each prompt.
        is_vision: (token_ids_T) -> (T,) bool, which tokens stand for features of images; read by a team alone.
        features, folder: of a frozen tower, across steps in memory and across runs on disk.
        ahead: prompts whose pixels may wait in memory.
    """

    def __init__(
        self,
        encoder: PromptEncoder,
        position_ids: Callable[[torch.Tensor, torch.Tensor | None, Sequence[float]], torch.Tensor],
        count_features: Callable[[torch.Tensor, torch.Tensor | None], tuple[int, int]],
        encode_images: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None,
        features: FeatureCache,
        folder: FeatureFolder | None = None,
        *,
        ahead: int,
        team: Team = ALONE,
        is_vision: Callable[[torch.Tensor], torch.Tensor] = torch.zeros_like,
    ) -> None:
        self._encoder, self._position_ids, self._encode_images = encoder, position_ids, encode_images
        self._count_features, self._team, self._is_vision = count_features, team, is_vision
        self._features, self._folder, self._ahead = features, folder, ahead
        self._wait_s = 0.0
        self._num_prompts = self._num_images = self._num_read = 0
        self._pool = ThreadPoolExecutor(min(ahead, os.cpu_count() or 1), thread_name_prefix="encode")
        self._begun: dict[Key, Future[Prepared]] = {}  # oldest first
        self._most_begun = ahead
        self._waiting: dict[Key, Item] = {}  # in the order of need
        self._encoded: dict[Key, EncodedPrompt] = {}
        self._lock = threading.RLock()  # a thread that samples ahead prefetches while a pass runs
        self._images: dict[ImageSource, Future[PromptInputs]] = {}  # of observations, the latest last

    def count_tokens(self, prompts: Sequence[Prompt], *, unreadable: int | None = None) -> list[int]:
        """Return the token count of each prompt: as counted when its row was checked, else from image headers alone.

        unreadable: the count of a prompt that cannot be read; None raises.
        """
        counts = {i: self._pool.submit(self._count, p, unreadable) for i, p in enumerate(prompts) if not p.num_tokens}
        return [counts[i].result() if i in counts else prompt.num_tokens for i, prompt in enumerate(prompts)]

    def prefetch(self, prompts: Sequence[Prompt]) -> None:
        """Start to encode the first `ahead` of the prompts that a later pass will need, and return at once."""
        with self._lock:
            for prompt in prompts[: self._ahead]:
                future = self._begun.pop(_key(prompt), None)
                self._begun[_key(prompt)] = future or self._submit(prompt)
            self._cancel_unneeded(())

    def start(self, items: Sequence[Item]) -> None:
        """Start a pass: encode prompts and responses in this order, which is that of their use.

        What the last pass encoded is kept for those that recur (reference logprobs, then the update).
        """
        needed = {_key(item): item for item in items}
        self._encoded = {key: done for key, done in self._encoded.items() if key in needed}
        with self._lock:
            self._images.clear()
            self._cancel_unneeded(needed)
            self._most_begun = self._ahead + sum(key not in needed for key in self._begun)
            self._waiting = {key: item for key, item in needed.items() if key not in self._encoded}
            self._fill()

    def get(self, item: Item) -> EncodedPrompt:
        """Return a prompt or a response of the pass, waiting until it is encoded."""
        key = _key(item)
        if key not in self._encoded:
            with self._lock:
                self._waiting.pop(key, None)
                future = self._begun.pop(key, None) or self._submit(item)
            since = time.perf_counter()
            prepared = future.result()
            self._wait_s += time.perf_counter() - since
            with self._lock:
                self._fill()
            self._encoded[key] = self._finish(*prepared, cut=self._cut(item, prepared[0]))
        return self._encoded[key]

    def encode(self, item: Item, *, whole: bool = False) -> EncodedPrompt:
        """Encode one prompt or response at once, outside any pass. whole: not this rank's share alone."""
        prepared = self._prepare(item)
        return self._finish(*prepared, cut=None if whole else self._cut(item, prepared[0]))

    def counts(self) -> dict[str, float]:
        """Return totals so far, under their metric names."""
        counts = {
            "time/encode_wait": self._wait_s,
            "perf/prompts_encoded": float(self._num_prompts),
            "perf/images_encoded": float(self._num_images),
            "perf/features_reused": float(self._features.hits),
        }
        if self._folder is not None:
            counts |= {
                "perf/features_read": float(self._num_read),
                "perf/features_evicted": float(self._folder.evicted),
                "perf/features_failed": float(self._folder.failures),
            }
        return counts

    def _cancel_unneeded(self, needed: Collection[Key]) -> None:
        """Keep the latest `ahead` encodings that no pass has asked for: the group filter may have dropped the rest."""
        unneeded = [key for key in self._begun if key not in needed]
        for key in unneeded[: max(0, len(unneeded) - self._ahead)]:
            self._begun.pop(key).cancel()

    def _fill(self) -> None:
        while self._waiting and len(self._begun) < self._most_begun:
            key = next(iter(self._waiting))
            item = self._waiting.pop(key)
            if key not in self._begun:
                self._begun[key] = self._submit(item)

    def _submit(self, item: Item) -> Future[Prepared]:
        self._num_prompts += isinstance(item, Prompt)
        return self._pool.submit(self._prepare, item)

    def _count(self, prompt: Prompt, unreadable: int | None) -> int:
        try:
            return self._encoder.count_tokens(prompt)
        except PromptError as error:
            if unreadable is not None:
                return unreadable
            raise RsgrpoError(f"prompt {prompt.id}: {error}") from error

    def _prepare(self, item: Item) -> Prepared:
        name = f"prompt {item.id}" if isinstance(item, Prompt) else item.name
        try:
            inputs = self._encoder.encode(item) if isinstance(item, Prompt) else self._row_inputs(item)
        except PromptError as error:
            raise RsgrpoError(f"{name}: {error}") from error
        tokens_T = torch.tensor(inputs.token_ids_T)
        positions_3T = self._position_ids(tokens_T, inputs.image_grid_thw, inputs.video_steps)
        folder = self._folder
        on_disk = [
            None if folder is None or image_hash in self._features else folder.get(image_hash)
            for image_hash in inputs.image_hashes
        ]
        return inputs, positions_3T, on_disk

    def _row_inputs(self, row: ResponseRow) -> PromptInputs:
        """Return a response's tokens with the pixels of its observations' images."""
        read = [self._read_image(image) for image in row.images]
        grids = iter([grid for image in read if (grid := image.image_grid_thw) is not None])
        for observation in row.observations:
            own = [next(grids) for _ in observation.images]
            grid = torch.cat(own) if own else None
            num_tokens, num_features = self._count_features(torch.tensor(observation.token_ids_S), grid)
            if num_tokens != num_features:
                raise RsgrpoError(
                    f"{row.name}: the observation behind token {observation.at} has {num_tokens} image tokens, but its "
                    f"{len(own)} images become {num_features} features here. The engine must read images as the "
                    "learner does: give both the same inputs.* settings, and leave the image files as they were"
                )
        return PromptInputs(
            row.token_ids_R.tolist(),
            torch.cat([image.pixel_values for image in read if image.pixel_values is not None]) if read else None,
            torch.cat([image.image_grid_thw for image in read if image.image_grid_thw is not None]) if read else None,
            tuple(image_hash for image in read for image_hash in image.image_hashes),
        )

    def _read_image(self, source: ImageSource) -> PromptInputs:
        """Return one image's pixels; responses side by side that read the same page decode it once."""
        with self._lock:
            is_new = source not in self._images
            future: Future[PromptInputs] = Future() if is_new else self._images.pop(source)
            self._images[source] = future
            while len(self._images) > 2 * self._ahead:
                self._images.pop(next(iter(self._images)))
        if is_new:  # decoded here and not in the pool, whose threads may all be waiting for it
            try:
                future.set_result(self._encoder.encode_images([source]))
            except BaseException as error:
                future.set_exception(error)
        return future.result()

    def _cut(self, item: Item, inputs: PromptInputs) -> PromptCut | None:
        """Return what this rank takes of an item: all of a response. None where it shares no rows."""
        if self._team.size == 1:
            return None
        tokens_T, grid = torch.tensor(inputs.token_ids_T), inputs.image_grid_thw
        per_image = [] if grid is None else [self._count_features(tokens_T, each[None])[1] for each in grid]
        if isinstance(item, Prompt):
            return cut_prompt(self._is_vision(tokens_T), per_image, self._team)
        taken_F = torch.ones(sum(per_image), dtype=torch.bool)
        return PromptCut(torch.arange(len(tokens_T)), list(range(len(per_image))), taken_F)

    def _finish(
        self,
        inputs: PromptInputs,
        positions_3T: torch.Tensor,
        on_disk: Sequence[torch.Tensor | None],
        *,
        cut: PromptCut | None,
    ) -> EncodedPrompt:
        tokens_T, pixels, grid = torch.tensor(inputs.token_ids_T), inputs.pixel_values, inputs.image_grid_thw
        encoded = EncodedPrompt(tokens_T, positions_3T)
        images = list(range(len(inputs.image_hashes)))
        if cut is not None:
            images = cut.images
            whole = len(tokens_T), encoded.next_position
            encoded = EncodedPrompt(
                tokens_T[cut.index_L], positions_3T[:, cut.index_L], whole=whole, index_L=cut.index_L
            )
        if pixels is None or grid is None or not images:
            return encoded
        patches = torch.split(pixels, grid.prod(1).tolist())
        if self._encode_images is None:
            if cut is not None:
                pixels, grid = torch.cat([patches[image] for image in images]), grid[images]
            taken_F = None if cut is None else cut.taken_F
            return replace(encoded, pixel_values=pixels, image_grid_thw=grid, taken_F=taken_F)
        # One image at a time: its features then do not depend on what it happened to be batched with.
        pieces = [self._image_features(inputs.image_hashes[i], patches[i], grid[i], on_disk[i]) for i in images]
        return replace(encoded, features=tuple(pieces) if cut is None else (torch.cat(pieces)[cut.taken_F],))

    def _image_features(
        self, image_hash: str, patches: torch.Tensor, image_grid: torch.Tensor, found: torch.Tensor | None
    ) -> torch.Tensor:
        """Return one image's features: from memory, as found on disk, or from the tower."""
        assert self._encode_images is not None
        features = self._features.get(image_hash)
        if features is None:
            features = found
            self._num_read += found is not None
            if features is None:
                features = self._encode_images(patches, image_grid[None]).cpu()
                self._num_images += 1
                if self._folder is not None:
                    self._pool.submit(self._folder.put, image_hash, features)
            self._features.put(image_hash, features)
        return features


def _key(item: Item) -> Key:
    """Return what an encoding depends on, and a prompt's id or a response's name."""
    if isinstance(item, ResponseRow):
        return item.name, item.token_ids_R.tobytes(), "", item.images, ()
    return item.id, item.system, item.text, tuple(item.images), item.videos
