"""The embedded engine: a transformers model in this process, grouped sampling in batches, weights copied in place.

It decodes with `rollout.hf.decoding` instead of `model.generate`: a group's prompt is computed once instead of G times,
each rollout's random draws do not depend on its batch, and the log-probability of every sampled token is kept under
exactly the distribution that it was sampled from.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from transformers import AutoModelForImageTextToText
from transformers.cache_utils import Cache

from rollout.config import ConfigError, InputsConfig, RolloutConfig
from rollout.engine import Backend, EngineError, EngineOptions, check_sampling
from rollout.families import Family, family_of
from rollout.families.features import FeatureCache
from rollout.hf.decoding import ATTENTION_NAME, Prefilled, decode, join, prefill
from rollout.hf.experts import ExpertRecorder
from rollout.hf.sampling import rollout_uniforms, sample_tokens
from rollout.hf.turns import Block, Conversations
from rollout.inputs.images import PromptError
from rollout.inputs.processor import InputProcessor, PromptInputs, preparing
from rollout.turns.environment import load_environment
from rollout.turns.episode import Episode, begin_episodes
from rollout.types import Observation, Prompt, Rollout, RolloutGroup, SamplingParams

Item = TypeVar("Item")


FEATURE_CACHE_BYTES = 512 << 20
PREFILL_TOKENS = 16_384
"""Prompt tokens, padding included, of one prefill pass; a longer prompt has a pass of its own."""

Listener = Callable[[torch.Tensor | Observation], None]
"""Receives the tokens of each step, (B,), and every observation."""


@dataclass(frozen=True, slots=True)
class _Ready:
    """A prompt that can be sampled. episodes: one per rollout; none without an environment."""

    prompt: Prompt
    inputs: PromptInputs
    episodes: tuple[Episode, ...]

    @property
    def num_tokens(self) -> int:
        return len(self.inputs.token_ids_T)


class _Closed(BaseException):
    """Nobody wants the rest of what is being sampled."""


class HFEngine:
    """Samples with a transformers model of one of the families in `rollout.families`."""

    backend: Backend = "load"

    def __init__(self, model_path: str, rollout: RolloutConfig, inputs: InputsConfig, **options: Any) -> None:
        """Load tokenizer, image processor and weights.

        Args:
            options: fields of `EngineOptions`.

        Raises:
            InputError: no family adapter for this model, or layers that this engine cannot compute.
            ConfigError: a setting that the model does not allow.
        """
        chosen = EngineOptions(**options)
        if chosen.num_threads or rollout.num_threads:
            torch.set_num_threads(chosen.num_threads or rollout.num_threads)
        automatic = "cuda" if torch.cuda.is_available() else "cpu"
        self.processor = InputProcessor(model_path, inputs, **chosen.source)
        self.device = torch.device(automatic if chosen.device == "auto" else chosen.device)
        self.weights_version = 0
        self._max_batch_sequences, self._max_batch_bytes = rollout.max_batch_sequences, rollout.max_batch_gib * 2**30
        self._family = family_of(self.processor.model_type)  # refused before weights load
        load_model: Callable[..., Any] = AutoModelForImageTextToText.from_pretrained
        self._model = load_model(
            model_path, dtype=getattr(torch, rollout.dtype), attn_implementation="sdpa", **chosen.source
        )
        self._model.eval().requires_grad_(False).to(self.device)
        self._decoder = self._family.attend_by(self._model, ATTENTION_NAME)
        self._embed, self._head = self._model.get_input_embeddings(), self._model.get_output_embeddings()
        self._banned = torch.tensor(self.processor.banned_token_ids, device=self.device)
        self._tensors, self._names_of = _tensors_by_name(self._model, self._family)
        self._vision = {name for name in self._tensors if name.startswith(self._family.vision_prefixes)}
        self._missing: set[str] | None = None
        self._features = FeatureCache(FEATURE_CACHE_BYTES)
        routers = self._family.routers(self._model)
        if rollout.routing_replay and not routers:
            raise ConfigError(f"rollout.routing_replay: {self._family.model_type} has no experts. Set it to false.")
        num_layers = len(self._family.decoder_layers(self._model))
        self._experts = ExpertRecorder(routers if rollout.routing_replay else {}, num_layers)
        self._rollout, self._make_environment = rollout, load_environment(rollout.turns)

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingParams, *, stop: Callable[[], bool] | None = None
    ) -> Iterator[RolloutGroup]:
        """Yield one group per prompt; prompts of similar length are sampled together, the longest first.

        The same arguments and weights give the same groups, bit for bit, on the same machine and thread count.
        stop: asked at every token.
        """

        def listen(_: torch.Tensor | Observation) -> None:
            if stop is not None and stop():
                raise _Closed

        with contextlib.suppress(_Closed):
            yield from self._generate(prompts, sampling, listen)

    def _generate(
        self, prompts: Sequence[Prompt], sampling: SamplingParams, listen: Listener | None = None
    ) -> Iterator[RolloutGroup]:
        check_sampling(sampling)
        if self._missing is not None:
            raise EngineError(
                "weights were loaded but finish_weights was not called: they may be half new, half old. Call it first."
            )
        ready: list[_Ready] = []
        for prompt in prompts:
            try:
                with preparing(prompt):
                    ready.append(self._prepare(prompt, sampling.group_size, listen))
            except PromptError as error:
                yield RolloutGroup(prompt, (), error=str(error))
        ready.sort(key=lambda one: -one.num_tokens)
        siblings = range(sampling.group_size)
        most_added = sampling.max_tokens + self._rollout.max_observation_tokens
        while ready:
            at_once = self._num_sequences(ready[0].num_tokens + most_added)
            num_prompts = max(1, at_once // sampling.group_size)
            batch, ready = ready[:num_prompts], ready[num_prompts:]
            rollouts_P: list[list[Rollout]] = [[] for _ in batch]
            for some in _chunks(siblings, at_once):
                for rollouts, more in zip(rollouts_P, self._sample(batch, some, sampling, listen), strict=True):
                    rollouts += more
            for one, rollouts, experts in zip(batch, rollouts_P, self._experts.prompts(len(batch)), strict=True):
                yield RolloutGroup(one.prompt, tuple(rollouts), one.num_tokens, prompt_experts_TLk=experts)

    def _prepare(self, prompt: Prompt, group_size: int, listen: Listener | None) -> _Ready:
        inputs, limits = self.processor.encode(prompt), self._rollout.turns
        episodes = begin_episodes(self._make_environment, prompt, group_size, self.processor, limits, listen)
        return _Ready(prompt, inputs, episodes)

    def stream(self, prompt: Prompt, sampling: SamplingParams) -> Generator[str | Observation | RolloutGroup]:
        """Yield one response's text in pieces as its tokens are chosen, then its group, which is `generate`'s.

        Observations come between the turns. Closing the iterator stops the sampling.
        """
        updates: queue.SimpleQueue[list[int] | Observation | RolloutGroup | BaseException] = queue.SimpleQueue()
        token_ids_T: list[int] = []
        is_closed = threading.Event()

        def listen(heard: torch.Tensor | Observation) -> None:
            if is_closed.is_set():
                raise _Closed
            if isinstance(heard, Observation):
                token_ids_T.clear()
                updates.put(heard)
            else:
                token_ids_T.append(int(heard[0]))
                updates.put(list(token_ids_T))

        def work() -> None:
            try:
                updates.put(next(self._generate([prompt], replace(sampling, group_size=1), listen)))
            except BaseException as error:
                updates.put(error)

        def received() -> Iterator[list[int] | Observation | RolloutGroup]:
            while True:
                update = updates.get()
                if isinstance(update, BaseException):
                    raise update
                yield update

        thread = threading.Thread(target=work, name="stream", daemon=True)
        thread.start()
        try:
            yield from self.processor.pieces(received())
        finally:
            is_closed.set()
            thread.join()

    def load_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy tensors over the model's, by their name in the model or in the hub's checkpoints of its family.

        Their layout is that of these checkpoints (`Family.published`).

        Image features survive as long as no weight of the vision tower changes.

        Raises:
            EngineError: an unknown name or a wrong shape.
        """
        if self._missing is None:
            self._missing = set(self._tensors)
        for given_name, tensor in named_tensors:
            name = self._names_of.get(given_name)
            if name is None:
                raise EngineError(f"the model has no weight {given_name!r}; its names look like {min(self._tensors)!r}")
            mine, tensor = self._tensors[name], self._family.published(name, tensor)
            if mine.shape != tensor.shape:
                raise EngineError(f"weight {given_name} has shape {tuple(tensor.shape)}, not {tuple(mine.shape)}")
            new = tensor.detach().to(self.device, mine.dtype)
            if self._features and name in self._vision and not torch.equal(mine, new):
                self._features.clear()
            mine.copy_(new)
            self._missing.discard(name)

    def finish_weights(self, version: int) -> None:
        """Sample with `version` from now on.

        Raises:
            EngineError: some weights did not arrive; only the whole vision tower may be left out (when it is frozen).
        """
        missing = set(self._tensors) if self._missing is None else self._missing
        required = missing - self._vision if self._vision <= missing else missing
        if required:
            raise EngineError(
                f"weights version {version}: {len(required)} of {len(self._tensors)} weights did not arrive, such as "
                f"{', '.join(sorted(required)[:3])}"
            )
        self._missing = None
        self.weights_version = version

    def count_vision(self, prompts: Sequence[Prompt]) -> list[tuple[int, int, int]]:
        return [self.processor.count_vision(prompt) for prompt in prompts]

    def stats(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        self._features.clear()  # the model is freed with the engine

    @torch.inference_mode()
    def _sample(
        self,
        batch: Sequence[_Ready],
        siblings: Sequence[int],
        sampling: SamplingParams,
        listen: Listener | None = None,
    ) -> list[list[Rollout]]:
        """Sample these siblings of each prompt: one list of rollouts per prompt."""
        self._experts.begin()
        prompts = join([self._prefill([one.inputs for one in part]) for part in _by_tokens(batch)])
        draws = [
            rollout_uniforms(sampling.seed, one.prompt.id, sibling, sampling.max_tokens)
            for one in batch
            for sibling in siblings
        ]
        uniforms_RT = torch.from_numpy(np.stack(draws)).to(self.device)

        def choose(
            logits_BV: torch.Tensor, rows_B: torch.Tensor, draws: int | torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            tokens_B, logprobs_B = sample_tokens(
                logits_BV.float().index_fill(-1, self._banned, float("-inf")),
                uniforms_RT[rows_B, draws],
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
            )
            self._experts.belongs_to(rows_B)
            if listen is not None:
                listen(tokens_B)
            return tokens_B, logprobs_B

        limits = {"max_tokens": sampling.max_tokens, "eos_token_id": self.processor.eos_token_id}
        if self._make_environment is None:
            responses = decode(prompts, len(siblings), self._next_logits, choose, **limits)
            rollouts = [self.processor.rollout(*response, self.weights_version) for response in responses]
        else:
            episodes = [one.episodes[sibling] for one in batch for sibling in siblings]
            patience_s = self._rollout.turns.patience_s
            Conversations(
                prompts, episodes, self._next_logits, choose, self._read, patience_s=patience_s, **limits
            ).run()
            rollouts = [episode.rollout(self.weights_version) for episode in episodes]
        return [list(group) for group in _chunks(self._experts.attached(rollouts), len(siblings))]

    def _num_sequences(self, num_positions: int) -> int:
        """Return how many sequences of this length, padding included, are sampled at once."""
        text = self._model.config.get_text_config()
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        position_bytes = 2 * text.num_hidden_layers * text.num_key_value_heads * width * self._model.dtype.itemsize
        return max(1, min(self._max_batch_sequences, int(self._max_batch_bytes // (position_bytes * num_positions))))

    def _next_logits(
        self, tokens_B1: torch.Tensor, positions_3B1: torch.Tensor, attention_mask: torch.Tensor | None, cache: Cache
    ) -> torch.Tensor:
        hidden = self._decoder(
            inputs_embeds=self._embed(tokens_B1),
            attention_mask=attention_mask,
            position_ids=self._family.decoder_positions(positions_3B1),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        everywhere = torch.ones_like(tokens_B1, dtype=torch.bool)
        self._experts.decoded(everywhere if attention_mask is None else attention_mask[:, 0, 0, -1:])
        logits: torch.Tensor = self._head(hidden[:, -1])
        return logits

    def _read(self, block: Block, mask: torch.Tensor, cache: Cache) -> tuple[torch.Tensor, torch.Tensor]:
        """Run what rows read between two turns through the decoder."""
        positions_3BL, decoder_inputs = self._embedded(block.token_ids_BL, block.is_token_BL, block.observations)
        positions_3BL = positions_3BL.to(self.device) + block.starts_B[None, :, None]
        masks = {"full_attention": mask, "linear_attention": None}
        hidden = self._decoder(
            **decoder_inputs,
            attention_mask=masks if self._family.recurrent_layers(self._model) else mask,
            position_ids=self._family.decoder_positions(positions_3BL),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        self._experts.decoded(block.is_token_BL)
        return self._head(hidden[:, -1]), positions_3BL.amax(dim=(0, 2)) + 1

    def _embedded(
        self, token_ids_BT: torch.Tensor, is_token_BT: torch.Tensor, inputs: Sequence[PromptInputs]
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Return the (3, B, T) positions of rows, from 0, and the decoder's other inputs."""
        grids = [each.image_grid_thw for each in inputs if each.image_grid_thw is not None]
        steps = [step for each in inputs for step in each.video_steps]
        positions_3BT = self._family.position_ids(
            self._model, token_ids_BT, torch.cat(grids) if grids else None, is_token_BT, steps
        )
        features = [feature for each in inputs for feature in self._image_features(each)]
        decoder_inputs = self._family.language_inputs(
            self._model, token_ids_BT.to(self.device), torch.cat(features) if features else None
        )
        return positions_3BT, decoder_inputs

    def _prefill(self, prompts: Sequence[PromptInputs]) -> Prefilled:
        """Run prompts through the decoder, left-padded to the longest."""
        longest = max(len(prompt.token_ids_T) for prompt in prompts)
        padded = [[self.processor.pad_token_id] * (longest - len(p.token_ids_T)) + p.token_ids_T for p in prompts]
        lengths = torch.tensor([len(prompt.token_ids_T) for prompt in prompts])
        token_ids_PT = torch.tensor(padded)
        is_token_PT = torch.arange(longest) >= longest - lengths[:, None]
        positions_3PT, decoder_inputs = self._embedded(token_ids_PT, is_token_PT, prompts)
        positions_3PT = positions_3PT.to(self.device)
        decoder_inputs["position_ids"] = self._family.decoder_positions(positions_3PT)
        prefilled = prefill(self._decoder, self._head, decoder_inputs, is_token_PT.to(self.device), positions_3PT)
        self._experts.prefilled(is_token_PT)
        return prefilled

    def _image_features(self, prompt: PromptInputs) -> list[torch.Tensor]:
        """Look up or compute the features of a prompt's images.

        The tower sees one image at a time, so that features depend on nothing but the image and the weights: a run with
        a warm cache and one resumed with a cold cache agree to the last bit.
        """
        if prompt.pixel_values is None or prompt.image_grid_thw is None:
            return []
        features = []
        pixels = torch.split(prompt.pixel_values, prompt.image_grid_thw.prod(-1).tolist())
        for key, patches, grid in zip(prompt.image_hashes, pixels, prompt.image_grid_thw, strict=True):
            found = self._features.get(key)
            if found is None:
                found = self._family.image_features(self._model, patches.to(self.device), grid[None].to(self.device))
                self._features.put(key, found)
            features.append(found)
        return features


def _tensors_by_name(model: torch.nn.Module, family: Family) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the model's distinct weights by name, and accepted name -> that name (tied and published names too)."""
    tensors: dict[str, torch.Tensor] = {}
    names_of: dict[str, str] = {}
    first_name: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        own = first_name.setdefault(id(tensor), name)
        tensors[own] = tensor
        names_of[name] = names_of[family.checkpoint_name(name)] = own
    return tensors, names_of


def _by_tokens(batch: Sequence[_Ready]) -> Iterator[list[_Ready]]:
    """Split a batch, longest prompt first, into parts of at most PREFILL_TOKENS padded tokens."""
    longest = batch[0].num_tokens
    part: list[_Ready] = []
    for one in batch:
        if part and longest * (len(part) + 1) > PREFILL_TOKENS:
            yield part
            part, longest = [], one.num_tokens
        part.append(one)
    yield part


def _chunks(items: Sequence[Item], num_items: int) -> Iterator[Sequence[Item]]:
    for start in range(0, len(items), num_items):
        yield items[start : start + num_items]
