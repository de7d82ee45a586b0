"""Prefill once per group, then decode all siblings together: the embedded engine's loop over a transformers decoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import AttentionInterface
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

ATTENTION_NAME = "rsgrpo_grouped_decode"
SPARE_POSITIONS = 64
KEEP_FINISHED_BELOW = 0.25
"""Finished rows stay in the batch up to this share of it: taking rows out copies the whole cache."""


@dataclass(frozen=True, slots=True)
class Prefilled:
    """Prompts after their forward pass.

    cache: keys and values, (P, heads, T, dim) per layer, prompts left-padded to T; of a layer with a recurrent state
        that state and the last inputs of its convolution.
    is_token_PT: (P, T) bool, False on padding.
    logits_PV: (P, V) of the last position.
    next_positions_P: (P,) position of the first response token, the same in all three M-RoPE axes.
    """

    cache: Cache
    is_token_PT: torch.Tensor
    logits_PV: torch.Tensor
    next_positions_P: torch.Tensor


class SpareRoomLayer(DynamicLayer):  # type: ignore[no-untyped-call,unused-ignore]
    """Keys and values of one layer in a buffer with room to grow: a step writes one column and copies nothing."""

    keys: torch.Tensor
    values: torch.Tensor

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append key and value states, (B, heads, new, dim) each; return all of them so far as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._key_buffer, self._value_buffer = key_states[:, :, :0], value_states[:, :, :0]
            self.keys, self.values = self._key_buffer, self._value_buffer
        start = self.keys.shape[2]
        end = start + key_states.shape[2]
        if end > self._key_buffer.shape[2]:
            room = end - start + (SPARE_POSITIONS if start else 0)
            self._key_buffer = pad(self.keys, (0, 0, 0, room))
            self._value_buffer = pad(self.values, (0, 0, 0, room))
        self._key_buffer[:, :, start:end] = key_states
        self._value_buffer[:, :, start:end] = value_states
        self.keys, self.values = self._key_buffer[:, :, :end], self._value_buffer[:, :, :end]
        return self.keys, self.values

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times."""
        self._take(self.keys.repeat_interleave(repeats, dim=0), self.values.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows."""
        self._take(self.keys[indices], self.values[indices])

    def part(self, indices: torch.Tensor) -> SpareRoomLayer:
        """Return a copy of these rows."""
        new_layer: Any = SpareRoomLayer
        layer: SpareRoomLayer = new_layer()
        layer.update(self.keys[indices], self.values[indices])
        return layer

    def release(self) -> None:
        """Give up all rows."""
        self._take(self.keys[:0, :0], self.values[:0, :0])

    def _take(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self._key_buffer = self.keys = keys
        self._value_buffer = self.values = values


class StateLayer(LinearAttentionLayer):  # type: ignore[no-untyped-call,unused-ignore]
    """The recurrent and the convolution state of one layer, which siblings fork from their prompt."""

    conv_states: dict[int, Any]
    recurrent_states: dict[int, Any]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times."""
        self._take(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows."""
        self._take(lambda state: state[indices])

    def _take(self, rows_of: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for states in (self.conv_states, self.recurrent_states):
            states[0] = rows_of(states[0])

    def part(self, indices: torch.Tensor) -> StateLayer:
        """Return a copy of these rows."""
        return self._of(self.conv_states[0][indices], self.recurrent_states[0][indices])

    def put(self, indices: torch.Tensor, part: StateLayer) -> None:
        """Set these rows to what `part` returned of them."""
        self.conv_states[0][indices] = part.conv_states[0]
        self.recurrent_states[0][indices] = part.recurrent_states[0]

    @classmethod
    def of(cls, parts: Sequence[StateLayer]) -> StateLayer:
        """Return several batches side by side."""
        conv_states = torch.cat([part.conv_states[0] for part in parts])
        return cls._of(conv_states, torch.cat([part.recurrent_states[0] for part in parts]))

    @classmethod
    def _of(cls, conv_states: torch.Tensor, recurrent_states: torch.Tensor) -> StateLayer:
        layer = cls()
        layer.update_conv_state(conv_states)
        layer.update_recurrent_state(recurrent_states)
        return layer


def grouped_decode_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as SDPA does; for one query per row, without repeating keys for the heads that share them.

    query: (B, heads, T, dim); key, value: (B, kv_heads, S, dim); attention_mask: (B, 1, 1, S) bool, True attends.
    """
    if query.shape[2] > 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    batch, heads, _, dim = query.shape
    grouped = query.reshape(batch, key.shape[1], -1, dim) * (dim**-0.5 if scaling is None else scaling)
    scores = torch.matmul(grouped, key.transpose(2, 3)).float()
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, float("-inf"))
    context = torch.matmul(scores.softmax(dim=-1).to(value.dtype), value)
    return context.reshape(batch, 1, heads, dim), None


AttentionInterface.register(ATTENTION_NAME, grouped_decode_attention)


def prefill(
    decoder: Any,
    head: Callable[[torch.Tensor], torch.Tensor],
    decoder_inputs: dict[str, Any],
    is_token_PT: torch.Tensor,
    positions_3PT: torch.Tensor,
) -> Prefilled:
    """Run left-padded prompts through the decoder. Padding leaves a recurrent state at zero.

    decoder_inputs: `inputs_embeds` (P, T, H), `position_ids` and what else the model family's decoder takes.
    """
    kinds = getattr(decoder.config, "layer_types", None) or ["full_attention"] * decoder.config.num_hidden_layers
    layer_types: dict[str, Any] = {"linear_attention": StateLayer, "full_attention": SpareRoomLayer}
    cache = Cache([layer_types[kind]() for kind in kinds])
    attention_mask: Any = None
    if not is_token_PT.all():
        num_positions = is_token_PT.shape[1]
        causal = torch.ones(num_positions, num_positions, dtype=torch.bool, device=is_token_PT.device).tril()
        # A padding position attends to itself: a row without any key would be 0/0.
        itself = torch.eye(num_positions, dtype=torch.bool, device=is_token_PT.device)
        attention_mask = (causal & is_token_PT[:, None, None, :]) | itself
        if "linear_attention" in kinds:
            attention_mask = {"full_attention": attention_mask, "linear_attention": is_token_PT}
    hidden = decoder(
        **decoder_inputs,
        attention_mask=attention_mask,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    return Prefilled(cache, is_token_PT, head(hidden[:, -1]), positions_3PT.amax(dim=(0, 2)) + 1)


def join(parts: Sequence[Prefilled]) -> Prefilled:
    """Put several prefilled batches side by side, padded on the left to the longest prompt.

    Consumes their caches, layer by layer: keys and values are in memory once.
    """
    if len(parts) == 1:
        return parts[0]
    longest = max(part.is_token_PT.shape[1] for part in parts)
    missing = [longest - part.is_token_PT.shape[1] for part in parts]
    layers: list[Any] = []
    for same_layer in zip(*(part.cache.layers for part in parts), strict=True):
        if isinstance(same_layer[0], StateLayer):
            layers.append(StateLayer.of(same_layer))
            continue
        new_layer: Any = SpareRoomLayer
        layers.append(new_layer())
        padded = [
            (pad(layer.keys, (0, 0, left, 0)), pad(layer.values, (0, 0, left, 0)))
            for layer, left in zip(same_layer, missing, strict=True)
        ]
        layers[-1].update(*(torch.cat(tensors) for tensors in zip(*padded, strict=True)))
        for layer in same_layer:
            layer.release()
    return Prefilled(
        Cache(layers),
        torch.cat([pad(part.is_token_PT, (left, 0)) for part, left in zip(parts, missing, strict=True)]),
        torch.cat([part.logits_PV for part in parts]),
        torch.cat([part.next_positions_P for part in parts]),
    )


def rows_of(batch: Prefilled, indices: torch.Tensor) -> Prefilled:
    """Return a copy of some rows of a batch, as a batch of their own."""
    layers: list[Any] = list(batch.cache.layers)
    return Prefilled(
        Cache([layer.part(indices) for layer in layers]),
        batch.is_token_PT[indices],
        batch.logits_PV[indices],
        batch.next_positions_P[indices],
    )


def decode(
    prompts: Prefilled,
    num_siblings: int,
    forward: Callable[..., torch.Tensor],
    choose: Callable[[torch.Tensor, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]],
    *,
    max_tokens: int,
    eos_token_id: int,
) -> list[tuple[list[int], list[float]]]:
    """Sample `num_siblings` responses to each prompt.

    Consumes the prompts' cache.

    Args:
        forward: (tokens_B1, positions_3B1, attention_mask, cache) -> logits (B, V) of one more position.
        choose: (logits_BV, rows_B, step) -> (tokens_B, logprobs_B); row = prompt * num_siblings + sibling.

    Returns:
        (token ids, logprobs) per row, end-of-text included where it was sampled.
    """
    cache, logits = prompts.cache, prompts.logits_PV.repeat_interleave(num_siblings, dim=0)
    cache.batch_repeat_interleave(num_siblings)
    num_rows, device = logits.shape[0], logits.device
    is_padded = not prompts.is_token_PT.all()
    can_attend = pad(prompts.is_token_PT, (0, max_tokens), value=True).repeat_interleave(num_siblings, dim=0)
    positions = prompts.next_positions_P.repeat_interleave(num_siblings)
    rows = torch.arange(num_rows, device=device)
    is_done = torch.zeros(num_rows, dtype=torch.bool, device=device)
    tokens_RT = torch.zeros(num_rows, max_tokens, dtype=torch.long, device=device)
    logprobs_RT = torch.zeros(num_rows, max_tokens, dtype=torch.float32, device=device)
    lengths = torch.full((num_rows,), max_tokens, device=device)
    for step in range(max_tokens):
        tokens, logprobs = choose(logits, rows, step)
        tokens_RT[rows, step], logprobs_RT[rows, step] = tokens, logprobs
        ends_now = (tokens == eos_token_id) & ~is_done
        lengths[rows[ends_now]] = step + 1
        is_done |= ends_now
        num_done = int(is_done.sum())
        if num_done == len(rows) or step + 1 == max_tokens:
            break
        if num_done > KEEP_FINISHED_BELOW * len(rows):
            kept = (~is_done).nonzero()[:, 0]
            cache.batch_select_indices(kept)
            rows, tokens, positions = rows[kept], tokens[kept], positions[kept]
            can_attend, is_done = can_attend[kept], is_done[kept]
        mask = can_attend[:, None, None, : prompts.is_token_PT.shape[1] + step + 1] if is_padded else None
        logits = forward(tokens[:, None], (positions + step).expand(3, -1)[:, :, None], mask, cache)
    ends, all_tokens, all_logprobs = lengths.tolist(), tokens_RT.tolist(), logprobs_RT.tolist()
    return [(all_tokens[row][:end], all_logprobs[row][:end]) for row, end in enumerate(ends)]
