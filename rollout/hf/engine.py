"""The embedded engine: a transformers model in this process, grouped sampling in batches, weights copied in place.

Owns the model, the image features and the weights' version. Knows nothing of rewards, learning or other processes.

The decoding loop is ours (`rollout.hf.decoding`) and not `model.generate`: a group's prompt is computed once and not G
times, each rollout has random draws of its own that do not depend on the batch it sits in, and the log-probability of
every sampled token is kept under exactly the distribution that it was sampled from.
"""

from __future__ import annotations

import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from transformers import AutoModelForImageTextToText

from rollout.config import InputsConfig, RolloutConfig
from rollout.engine import EngineError, check_sampling
from rollout.hf.decoding import ATTENTION_NAME, Prefilled, decode, join, prefill
from rollout.hf.sampling import rollout_uniforms, sample_tokens
from rollout.inputs.images import PromptError
from rollout.inputs.offsets import fresh_text
from rollout.inputs.processor import InputProcessor, PromptInputs
from rollout.types import FinishReason, Prompt, Rollout, RolloutGroup, SamplingParams

Item = TypeVar("Item")

FEATURE_CACHE_BYTES = 512 << 20
PREFILL_TOKENS = 16_384
"""Prompt tokens, padding included, that one prefill pass computes at once; a longer prompt has a pass of its own."""


@dataclass(frozen=True, slots=True, eq=False)
class ImageFeatures:
    """What the vision tower gives to the decoder for one image.

    tokens: (merged tokens, hidden). deepstack: the same shape for each early layer that adds some (Qwen3-VL), or empty.
    """

    tokens: torch.Tensor
    deepstack: tuple[torch.Tensor, ...]

    @property
    def num_bytes(self) -> int:
        """Size of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.tokens, *self.deepstack))


class _StoppedError(Exception):
    """Nobody listens any more."""


class HFEngine:
    """Samples with a transformers vision-language model of the Qwen2.5-VL or Qwen3-VL kind."""

    backend = "load"

    def __init__(
        self,
        model_path: str,
        rollout: RolloutConfig,
        inputs: InputsConfig,
        *,
        num_threads: int = 0,
        device: str = "auto",
        revision: str = "",
        trust_remote_code: bool = False,
    ) -> None:
        """Load tokenizer, image processor and weights.

        Raises:
            EngineError: the model has no decoder that this engine can drive.
        """
        if num_threads or rollout.num_threads:
            torch.set_num_threads(num_threads or rollout.num_threads)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.processor = InputProcessor(model_path, inputs, revision=revision, trust_remote_code=trust_remote_code)
        self.device = torch.device(device)
        self.weights_version = 0
        self._max_batch_sequences = rollout.max_batch_sequences
        options: dict[str, Any] = {"revision": revision} if revision else {}
        self._model = AutoModelForImageTextToText.from_pretrained(
            model_path,
            dtype=getattr(torch, rollout.dtype),
            attn_implementation="sdpa",
            trust_remote_code=trust_remote_code,
            **options,
        )
        self._model.eval().requires_grad_(False).to(self.device)
        self._decoder = _decoder_of(self._model, model_path)
        self._banned = torch.tensor(self.processor.banned_token_ids, device=self.device)
        self._tensors, self._names_of = _tensors_by_name(self._model)
        self._missing: set[str] | None = None
        self._features: OrderedDict[str, ImageFeatures] = OrderedDict()
        self._hear: Callable[[torch.Tensor], None] | None = None  # is told the tokens of each step

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> Iterator[RolloutGroup]:
        """Yield one group per prompt; prompts of similar length are sampled together, the longest first.

        The same arguments and weights give the same groups, bit for bit, on the same machine and thread count.
        """
        check_sampling(sampling)
        if self._missing is not None:
            raise EngineError("weights were loaded but finish_weights was not called: they may be half new, half old")
        encoded: list[tuple[Prompt, PromptInputs]] = []
        for prompt in prompts:
            try:
                encoded.append((prompt, self.processor.encode(prompt)))
            except PromptError as error:
                yield RolloutGroup(prompt, (), error=str(error))
        encoded.sort(key=lambda pair: -len(pair[1].token_ids_T))
        siblings = range(sampling.group_size)
        for batch in _chunks(encoded, max(1, self._max_batch_sequences // sampling.group_size)):
            rollouts_P: list[list[Rollout]] = [[] for _ in batch]
            for some in _chunks(siblings, self._max_batch_sequences):
                for rollouts, more in zip(rollouts_P, self._sample(batch, some, sampling), strict=True):
                    rollouts += more
            for (prompt, prompt_inputs), rollouts in zip(batch, rollouts_P, strict=True):
                yield RolloutGroup(prompt, tuple(rollouts), num_prompt_tokens=len(prompt_inputs.token_ids_T))

    def stream(self, prompt: Prompt, sampling: SamplingParams) -> Generator[str | RolloutGroup]:
        """Yield one response's text in pieces as its tokens are chosen, then its group, which is `generate`'s.

        Closing the iterator stops the sampling.
        """
        heard: queue.SimpleQueue[int | RolloutGroup | BaseException] = queue.SimpleQueue()
        stop = threading.Event()

        def hear(tokens_B: torch.Tensor) -> None:
            if stop.is_set():
                raise _StoppedError
            heard.put(int(tokens_B[0]))

        def work() -> None:
            self._hear = hear
            try:
                heard.put(next(self.generate([prompt], replace(sampling, group_size=1))))
            except BaseException as error:
                heard.put(error)
            finally:
                self._hear = None

        thread = threading.Thread(target=work, name="stream", daemon=True)
        thread.start()
        token_ids_T: list[int] = []
        told = ""
        try:
            while isinstance(item := heard.get(), int):
                token_ids_T.append(item)
                text, _ = self.processor.decode(token_ids_T)
                if piece := fresh_text(told, text):
                    yield piece
                    told = text
            if isinstance(item, BaseException):
                raise item
            if item.rollouts and (piece := fresh_text(told, item.rollouts[0].text, is_whole=True)):
                yield piece
            yield item
        finally:
            stop.set()
            thread.join()

    def load_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy tensors over the model's, by their name in the model or in the hub's checkpoints of its family.

        Image features survive as long as no weight of the vision tower changes.

        Raises:
            EngineError: an unknown name or a wrong shape.
        """
        if self._missing is None:
            self._missing = set(self._tensors)
        for given_name, tensor in named_tensors:
            name = self._names_of.get(given_name)
            if name is None:
                raise EngineError(f"the model has no weight {given_name!r}; its names are like {min(self._tensors)!r}")
            mine = self._tensors[name]
            if mine.shape != tensor.shape:
                raise EngineError(f"weight {given_name} has shape {tuple(tensor.shape)}, not {tuple(mine.shape)}")
            new = tensor.detach().to(self.device, mine.dtype)
            if self._features and _is_vision(name) and not torch.equal(mine, new):
                self._features.clear()
            mine.copy_(new)
            self._missing.discard(name)

    def finish_weights(self, version: int) -> None:
        """Sample with `version` from here on.

        Raises:
            EngineError: some weights did not arrive; only the whole vision tower may be left out (when it is frozen).
        """
        missing = set(self._tensors) if self._missing is None else self._missing
        vision = {name for name in self._tensors if _is_vision(name)}
        required = missing - vision if vision <= missing else missing
        if required:
            raise EngineError(
                f"weights version {version}: {len(required)} of {len(self._tensors)} weights did not arrive, such as "
                f"{', '.join(sorted(required)[:3])}"
            )
        self._missing = None
        self.weights_version = version

    def count_vision(self, prompts: Sequence[Prompt]) -> list[tuple[int, int, int]]:
        """Return (tokens, image tokens, image features) of each prompt."""
        return [self.processor.count_vision(prompt) for prompt in prompts]

    def stats(self) -> dict[str, float]:
        """Nothing is counted here."""
        return {}

    def close(self) -> None:
        """Drop the image features; the model goes with the object."""
        self._features.clear()

    @torch.inference_mode()
    def _sample(
        self, batch: Sequence[tuple[Prompt, PromptInputs]], siblings: Sequence[int], sampling: SamplingParams
    ) -> list[list[Rollout]]:
        """Sample these siblings of each prompt: one list of rollouts per prompt."""
        parts = [self._prefill([prompt_inputs for _, prompt_inputs in part]) for part in _by_tokens(batch)]
        uniforms_RT = torch.from_numpy(
            np.stack(
                [
                    rollout_uniforms(sampling.seed, prompt.id, sibling, sampling.max_tokens)
                    for prompt, _ in batch
                    for sibling in siblings
                ]
            )
        ).to(self.device)

        def choose(logits_BV: torch.Tensor, rows_B: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
            tokens_B, logprobs_B = sample_tokens(
                logits_BV.float().index_fill(-1, self._banned, float("-inf")),
                uniforms_RT[rows_B, step],
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
            )
            if self._hear:
                self._hear(tokens_B)
            return tokens_B, logprobs_B

        responses = decode(
            join(parts),
            len(siblings),
            self._next_logits,
            choose,
            max_tokens=sampling.max_tokens,
            eos_token_id=self.processor.eos_token_id,
        )
        rollouts = [self._rollout(token_ids_T, logprobs_T) for token_ids_T, logprobs_T in responses]
        return [list(group) for group in _chunks(rollouts, len(siblings))]

    def _rollout(self, token_ids_T: list[int], logprobs_T: list[float]) -> Rollout:
        text, spans_T = self.processor.decode(token_ids_T)
        finish: FinishReason = "stop" if token_ids_T[-1] == self.processor.eos_token_id else "length"
        return Rollout(token_ids_T, logprobs_T, text, spans_T, finish, self.weights_version)

    def _next_logits(
        self, tokens_B1: torch.Tensor, positions_3B1: torch.Tensor, attention_mask: torch.Tensor | None, cache: Any
    ) -> torch.Tensor:
        hidden = self._decoder(
            inputs_embeds=self._model.get_input_embeddings()(tokens_B1),
            attention_mask=attention_mask,
            position_ids=positions_3B1,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        return self._model.get_output_embeddings()(hidden[:, -1])

    def _prefill(self, prompts: Sequence[PromptInputs]) -> Prefilled:
        """Run prompts through the decoder, left-padded to the longest."""
        longest = max(len(prompt.token_ids_T) for prompt in prompts)
        padded = [[self.processor.pad_token_id] * (longest - len(p.token_ids_T)) + p.token_ids_T for p in prompts]
        lengths = torch.tensor([len(prompt.token_ids_T) for prompt in prompts])
        token_ids_PT = torch.tensor(padded)
        is_token_PT = torch.arange(longest) >= longest - lengths[:, None]
        is_image_PT = token_ids_PT == self.processor.image_token_id
        grids = [prompt.image_grid_thw for prompt in prompts if prompt.image_grid_thw is not None]
        positions_3PT, _ = self._model.model.get_rope_index(
            token_ids_PT,
            mm_token_type_ids=is_image_PT.int(),
            image_grid_thw=torch.cat(grids) if grids else None,
            attention_mask=is_token_PT.long(),
        )
        is_image_PT = is_image_PT.to(self.device)
        embeds_PTH = self._model.get_input_embeddings()(token_ids_PT.to(self.device))
        decoder_inputs: dict[str, Any] = {"inputs_embeds": embeds_PTH}
        features = [feature for prompt in prompts for feature in self._image_features(prompt)]
        if features:
            embeds_PTH[is_image_PT] = torch.cat([feature.tokens for feature in features]).to(embeds_PTH.dtype)
            deepstack = [torch.cat(level) for level in zip(*(f.deepstack for f in features), strict=True)]
            if deepstack:
                decoder_inputs |= {"visual_pos_masks": is_image_PT, "deepstack_visual_embeds": deepstack}
        return prefill(
            self._decoder,
            self._model.get_output_embeddings(),
            decoder_inputs,
            is_token_PT.to(self.device),
            positions_3PT.to(self.device),
        )

    def _image_features(self, prompt: PromptInputs) -> list[ImageFeatures]:
        """Look up or compute the features of a prompt's images.

        The tower sees one image at a time: features then depend on nothing but the image and the weights, so that a
        run with a warm cache and one that was resumed with a cold one agree to the last bit.
        """
        if prompt.pixel_values is None or prompt.image_grid_thw is None:
            return []
        features = []
        pixels = prompt.pixel_values.split(prompt.image_grid_thw.prod(-1).tolist())
        for key, patches, grid in zip(prompt.image_hashes, pixels, prompt.image_grid_thw, strict=True):
            if key not in self._features:
                output = self._model.model.get_image_features(patches.to(self.device), grid[None].to(self.device))
                deepstack = getattr(output, "deepstack_features", None) or ()
                self._features[key] = ImageFeatures(output.pooler_output[0], tuple(level[0] for level in deepstack))
            self._features.move_to_end(key)
            features.append(self._features[key])
        while sum(feature.num_bytes for feature in self._features.values()) > FEATURE_CACHE_BYTES:
            self._features.popitem(last=False)
        return features


def _decoder_of(model: Any, model_path: str) -> Any:
    """Return the model's decoder, told to attend through `rollout.hf.decoding`.

    Raises:
        EngineError: not of the Qwen-VL layout, or with sliding windows, which the decoding loop does not mask.
    """
    decoder = getattr(model.model, "language_model", None)
    if decoder is None or not hasattr(model.model, "get_rope_index"):
        raise EngineError(
            f"{type(model).__name__} in {model_path} has no `model.language_model` with M-RoPE positions, which "
            "rollout.engine=hf drives; use rollout=vllm"
        )
    if "sliding_attention" in (getattr(decoder.config, "layer_types", None) or ()):
        raise EngineError(
            f"{model_path} uses sliding-window attention, which rollout.engine=hf does not; use rollout=vllm"
        )
    decoder.config._attn_implementation = ATTENTION_NAME
    return decoder


def _tensors_by_name(model: torch.nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the model's distinct weights by name, and every accepted name -> that name (tied and hub names too)."""
    tensors: dict[str, torch.Tensor] = {}
    names_of: dict[str, str] = {}
    first_name: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        own = first_name.setdefault(id(tensor), name)
        tensors[own] = tensor
        names_of[name] = names_of[_hub_name(name)] = own
    return tensors, names_of


def _hub_name(name: str) -> str:
    """Return the name in Qwen2.5-VL's published checkpoints: "model.layers.0...", "visual.blocks.0..."."""
    if name.startswith("model.visual."):
        return name.removeprefix("model.")
    return name.replace("model.language_model.", "model.", 1)


def _is_vision(name: str) -> bool:
    return name.startswith("model.visual.")


def _by_tokens(batch: Sequence[tuple[Prompt, PromptInputs]]) -> Iterator[list[tuple[Prompt, PromptInputs]]]:
    """Split a batch, longest prompt first, into parts of at most PREFILL_TOKENS padded tokens."""
    longest = len(batch[0][1].token_ids_T)
    part: list[tuple[Prompt, PromptInputs]] = []
    for pair in batch:
        if part and longest * (len(part) + 1) > PREFILL_TOKENS:
            yield part
            part, longest = [], len(pair[1].token_ids_T)
        part.append(pair)
    yield part


def _chunks(items: Sequence[Item], num_items: int) -> Iterator[Sequence[Item]]:
    for start in range(0, len(items), num_items):
        yield items[start : start + num_items]
