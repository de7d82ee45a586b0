"""The policy: transformers' own model, run on rows of groups, giving log-probabilities of response tokens only.

It covers loading, the shared-prefix forward, the chunked head, and which activations the backward pass recomputes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

from rollout.families import Family, family_of
from rsgrpo.config.learner import LearnerConfig, LoraConfig, ModelConfig, parse_checkpointing
from rsgrpo.errors import InputError
from rsgrpo.learning.attention import PrefixRow
from rsgrpo.learning.context import ALONE, Team, TeamRow, refuse_recurrent
from rsgrpo.learning.layers.forked_state import fork_states
from rsgrpo.learning.layers.routing import Routing
from rsgrpo.types import MicroBatch, PrefixLayout, RsgrpoError, TokenScores

_AS_LOADED: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "sdpa"}


def hub_options(config: ModelConfig) -> dict[str, Any]:
    """Return the options with which transformers loads anything from `model.path`."""
    options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    return options | ({"revision": config.revision} if config.revision else {})


def load_model(config: ModelConfig) -> Any:
    """Return the model of `model.path` in float32 on CPU, with its generation configuration."""
    if not config.path:
        raise InputError("model.path is empty. Set it to a Hugging Face folder or hub id")
    family_of(AutoConfig.from_pretrained(config.path, **hub_options(config)).model_type)  # refused before weights load
    return AutoModelForImageTextToText.from_pretrained(config.path, **_AS_LOADED, **hub_options(config))


def frozen_model(config: ModelConfig) -> ModelConfig:
    """Return the frozen model of a run: the teacher where there is one, else what the policy starts from."""
    return replace(config, path=config.teacher, revision="", lora=LoraConfig()) if config.teacher else config


def refuse_trained_tower(model: ModelConfig, learner: LearnerConfig, *, frozen_tower: bool) -> None:
    """Raise RsgrpoError for what a trained tower rules out: adapters, and features kept on disk."""
    if frozen_tower:
        return
    if model.lora.rank:
        raise RsgrpoError(
            f"model.lora.rank={model.lora.rank} trains adapters on the language model only. "
            "Set model.freeze_vision=true, or model.lora.rank=0 to train the tower too"
        )
    if learner.feature_cache:
        raise RsgrpoError(
            f"learner.feature_cache={learner.feature_cache} keeps features of a frozen tower, and "
            "model.freeze_vision=false trains it. Set learner.feature_cache='' or model.freeze_vision=true"
        )


def require_same_tokens(teacher: str, student: str) -> None:
    """Check that every token of one model folder has the same number in another, and ends a response there too.

    Raises:
        InputError: a token differs.
    """
    taught, own = (AutoTokenizer.from_pretrained(folder) for folder in (teacher, student))
    known = taught.get_vocab()
    differing = [token for token, number in own.get_vocab().items() if known.get(token) != number]
    if differing or taught.eos_token != own.eos_token:
        what = f"{len(differing):,} tokens differ, such as {min(differing)!r}" if differing else "they end differently"
        raise InputError(
            f"model.teacher={teacher} cannot judge the responses of {student} token by token: {what}. Take a teacher "
            "of the same tokenizer."
        )


def empty_model(config: ModelConfig) -> Any:
    """Return the model of `model.path` without storage: shapes only, to be sharded and then filled."""
    hf_config = AutoConfig.from_pretrained(config.path, **hub_options(config))
    with torch.device("meta"):
        from_config: Any = AutoModelForImageTextToText.from_config
        return from_config(hf_config, **_AS_LOADED, trust_remote_code=config.trust_remote_code)


def add_lora(model: Any, config: LoraConfig, *, seed: int) -> None:
    """Put adapters on the language model's linear layers, in place, and freeze everything else."""
    from peft import LoraConfig as PeftLoraConfig
    from peft import inject_adapter_in_model

    torch.manual_seed(seed)
    peft_config = PeftLoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=family_of(model.config.model_type).adapted_layers(config.targets),
    )
    inject_adapter_in_model(peft_config, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)


@dataclass(frozen=True, slots=True, eq=False)
class PlainRow:
    """One prompt with one response, as transformers' own forward takes it.

    token_ids_T: (T,) int64. scored_N: (N,) int64, where in it the tokens lie that are scored.
    pixel_values, image_grid_thw: None without images. video_steps: as in `PromptInputs`.
    """

    token_ids_T: torch.Tensor
    scored_N: torch.Tensor
    pixel_values: torch.Tensor | None
    image_grid_thw: torch.Tensor | None
    video_steps: tuple[float, ...] = ()


class Policy(nn.Module):
    """A model with its family's adapter. All forwards go through `forward`, so that sharding can wrap this module.

    Args:
        model: transformers' model.
        banned_token_ids: tokens that are never sampled; they get no probability.
        attention: registered name of the shared-prefix attention.
        logits_chunk_tokens: response tokens whose logits are in memory at once.
        frozen_tower: rows come with features instead of pixels.
        compute_dtype: dtype in which the layers compute.
        team: the ranks that share rows with this one.

    Attributes:
        routing: what the routers of a mixture of experts did in the last forward of a micro-batch.
    """

    banned_V: torch.Tensor

    def __init__(
        self,
        model: Any,
        *,
        banned_token_ids: Sequence[int],
        attention: str,
        logits_chunk_tokens: int,
        frozen_tower: bool,
        compute_dtype: torch.dtype,
        team: Team = ALONE,
    ) -> None:
        super().__init__()
        self.hf = model
        self.family: Family = family_of(model.config.model_type)
        self.attention = attention
        self.logits_chunk_tokens = logits_chunk_tokens
        self.frozen_tower = frozen_tower
        self.compute_dtype, self.team = compute_dtype, team
        self.is_empty = next(model.parameters()).is_meta
        banned_V = torch.zeros(model.lm_head.out_features, dtype=torch.bool)
        banned_V[list(banned_token_ids)] = True
        self.register_buffer("banned_V", banned_V, persistent=False)
        self.family.attend_by(model, attention)
        refuse_recurrent(team, len(self.family.recurrent_layers(model)))
        fork_states(self.family.recurrent_layers(model))
        self.routing = Routing(self.family.routers(model))
        if frozen_tower:
            self.family.vision_tower(model).requires_grad_(False)

    def forward(self, batch: MicroBatch | PlainRow, temperature: float, entropy_gradient: bool) -> TokenScores:
        """Score the response tokens under log_softmax((logits + ban) / temperature).

        The log-probabilities have a gradient, the entropy only with `entropy_gradient`. A PlainRow takes transformers'
        own forward, for comparison.
        """
        self.routing.replay(None if isinstance(batch, PlainRow) else batch.experts_TLk)
        if isinstance(batch, PlainRow):
            return self._plain(batch, temperature, entropy_gradient)
        model, family = self.hf, self.family
        inputs = family.language_inputs(model, batch.token_ids_T[None], self._features(batch))
        embeds = inputs["inputs_embeds"]
        with self.routing.heard():
            hidden_TH = family.language_model(model)(
                **inputs,
                **family.no_mask,
                position_ids=family.decoder_positions(batch.position_ids_3T[:, None]),
                use_cache=False,
                prefix_row=self._row(batch.layout, embeds),
            ).last_hidden_state[0]
        return self._head(hidden_TH[batch.head_index_N], batch.targets_N, temperature, entropy_gradient)

    def _row(self, layout: PrefixLayout, embeds: torch.Tensor) -> PrefixRow:
        if layout.whole_lengths:
            return TeamRow(layout, self.team, embeds.device, embeds.dtype)
        return PrefixRow(layout, embeds.device, embeds.dtype)

    def _plain(self, row: PlainRow, temperature: float, entropy_gradient: bool) -> TokenScores:
        """Run transformers' forward, vision tower and all, with its own attention."""
        parts: list[Any] = [self.family.language_model(self.hf), self.family.vision_tower(self.hf)]
        configs = [part.config for part in parts]
        chosen = [config._attn_implementation for config in configs]
        for config in configs:
            config._attn_implementation = "sdpa"
        try:
            output = self.hf.model(
                **self.family.whole_inputs(
                    self.hf, row.token_ids_T[None], row.pixel_values, row.image_grid_thw, row.video_steps
                ),
                use_cache=False,
            )
        finally:
            for config, attention in zip(configs, chosen, strict=True):
                config._attn_implementation = attention
        hidden_NH = output.last_hidden_state[0, row.scored_N - 1]
        return self._head(hidden_NH, row.token_ids_T[row.scored_N], temperature, entropy_gradient)

    def _features(self, batch: MicroBatch) -> torch.Tensor | None:
        """Return the features of the row's image tokens; a trained tower runs in every row, with or without images.

        Ranks must run the tower equally often, so a row without images runs it on one blank patch and uses none of it.
        """
        if self.frozen_tower:
            return batch.features
        if batch.pixel_values is not None and batch.image_grid_thw is not None:
            features = self.family.image_features(self.hf, batch.pixel_values, batch.image_grid_thw)
            return features if batch.taken_F is None else features[batch.taken_F]
        pixels, grid = self.family.blank_image(self.hf, batch.token_ids_T.device)
        return self.family.image_features(self.hf, pixels, grid)[:0]

    def _head(
        self, hidden_NH: torch.Tensor, targets_N: torch.Tensor, temperature: float, entropy_gradient: bool
    ) -> TokenScores:
        """Run the head chunk by chunk; with several chunks, backward recomputes each one's logits."""
        chunk = self.logits_chunk_tokens
        if len(targets_N) <= chunk:
            return self._head_chunk(hidden_NH, targets_N, temperature, entropy_gradient)
        pieces = [
            checkpoint(self._head_chunk, hidden, targets, temperature, entropy_gradient, use_reentrant=False)
            for hidden, targets in zip(torch.split(hidden_NH, chunk), torch.split(targets_N, chunk), strict=True)
        ]
        return TokenScores(*(torch.cat(parts) for parts in zip(*pieces, strict=True)))

    def _head_chunk(
        self, hidden_NH: torch.Tensor, targets_N: torch.Tensor, temperature: float, entropy_gradient: bool
    ) -> TokenScores:
        logits_NV = self.hf.lm_head(hidden_NH).float().masked_fill(self.banned_V, float("-inf"))
        logprobs_NV = torch.log_softmax(logits_NV if temperature == 1.0 else logits_NV / temperature, -1)
        logprobs_N = logprobs_NV.gather(-1, targets_N[:, None]).sum(-1)  # one element; FSDP wants no view
        top_logprobs_N, top_N = logprobs_NV.detach().max(-1)
        if not entropy_gradient:
            logprobs_NV = logprobs_NV.detach()
        with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
            entropy_N = -(logprobs_NV.exp() * logprobs_NV.masked_fill(self.banned_V, 0.0)).sum(-1)
        return TokenScores(logprobs_N, entropy_N, top_logprobs_N.exp(), top_N == targets_N)

    @torch.no_grad()
    def encode_images(self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor) -> torch.Tensor:
        """Return a frozen tower's (merged tokens, F), on the tower's device."""
        device = next(self.family.vision_tower(self.hf).parameters()).device
        return self.family.image_features(self.hf, pixel_values.to(device), image_grid_thw.to(device))

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the parameters that are trained, by the model's own names."""
        return {name: parameter for name, parameter in self.hf.named_parameters() if parameter.requires_grad}


def frozen_parts(policy: Policy, model: Any) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the frozen parameters of a model's tower, and those of the rest: a LoRA run's base, or a reference."""
    tower = {id(parameter) for parameter in policy.family.vision_tower(model).parameters()}
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    return [p for p in frozen if id(p) in tower], [p for p in frozen if id(p) not in tower]


def shrink_frozen(policy: Policy, source: Any) -> None:
    """Keep frozen weights in the compute dtype where that loses nothing, before they are sharded. Collective.

    Weights published in bfloat16 lose nothing; others stay float32, so that an export returns them unchanged.

    source: the loaded model on rank 0, None on ranks whose policy is empty.
    """
    dtype = policy.compute_dtype
    exact = [False, False]
    if source is not None:
        exact = [
            all(torch.equal(weight, weight.to(dtype).to(weight.dtype)) for weight in part)
            for part in frozen_parts(policy, source)
        ]
    dist.broadcast_object_list(exact, 0)
    for model in [policy.hf] if source is None or source is policy.hf else [policy.hf, source]:
        shrink(policy, model, exact)


def shrink(policy: Policy, model: Any, parts: Sequence[bool]) -> None:
    """Put the chosen `frozen_parts` of a model into the compute dtype, in place."""
    for part, chosen in zip(frozen_parts(policy, model), parts, strict=True):
        for weight in part if chosen else ():
            weight.data = weight.data.to(policy.compute_dtype)


@contextmanager
def scale_adapters(model: nn.Module, scale: float) -> Iterator[None]:
    """Multiply what LoRA adapters add by `scale` inside the block; a model without adapters is unchanged."""
    adapters: list[Any] = [
        module for module in model.modules() if hasattr(module, "lora_A") and hasattr(module, "set_scale")
    ]
    for adapter in adapters:
        adapter.set_scale("default", scale)
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.set_scale("default", 1.0)


def recompute(policy: Policy, how: str) -> None:
    """Set up gradient checkpointing of the policy's layers, as `learner.gradient_checkpointing` says.

    "none" keeps all activations, "full" recomputes every layer from its input and "every_n:K" every K-th layer;
    "attention" recomputes every layer but keeps what its attention kernel returned.
    """
    every = parse_checkpointing(how)
    if not every:
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if how == "attention":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _keep_attention)
    policy.hf.gradient_checkpointing_enable(options)
    layers: list[Any] = list(policy.family.decoder_layers(policy.hf))
    for index, layer in enumerate(layers):
        layer.gradient_checkpointing = index % every == 0


def _keep_attention(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep what the kernels of torch (`aten::_scaled_dot_product_...`) and of flash-attn return."""
    name = str(operator)
    is_attention = "scaled_dot_product" in name or "flash_attn" in name
    return CheckpointPolicy.MUST_SAVE if is_attention else CheckpointPolicy.PREFER_RECOMPUTE
