"""A model's sizes and what follows from them: parameters, FLOPs of a group, bytes of a cached token.

Sizes are read from transformers' own model, built on the meta device without memory, so they exist for every family.
L layers that attend, d attention width, P prompt tokens, R response tokens, G rollouts.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from rsgrpo.config.checks import how_to_get
from rsgrpo.errors import ConfigError

if TYPE_CHECKING:
    from rollout.families import Family

KNOWN_MODELS = ("model", "known.json")
"""File of `conf`: models whose sizes are known from their name, before they are on disk."""


@dataclass(frozen=True, slots=True)
class RecurrentSizes:
    """The gated delta rule of a model's recurrent layers.

    kernel_size: inputs that its convolution sees. conv_width: their width.
    """

    num_layers: int
    num_key_heads: int
    num_heads: int
    key_dim: int
    value_dim: int
    kernel_size: int
    conv_width: int

    @property
    def state_bytes(self) -> int:
        """What all layers carry for one sequence: a float32 matrix per head, and bfloat16 inputs of the convolution."""
        matrices = 4 * self.num_heads * self.key_dim * self.value_dim
        return self.num_layers * (matrices + 2 * self.conv_width * self.kernel_size)

    @property
    def flops_per_token(self) -> float:
        """Forward FLOPs of the rule in chunks of 64 tokens, in all layers; its projections are counted elsewhere."""
        within = 64 * (5 * self.key_dim + 3 * self.value_dim)
        return self.num_layers * self.num_heads * (within + 6 * self.key_dim * self.value_dim)

    def activation_bytes(self, value_bytes: int) -> float:
        """Bytes per token that one layer's rule keeps for its backward pass, counted on transformers' torch kernel.

        flash-linear-attention's kernel keeps less.
        """
        widths = self.num_heads * (self.key_dim + self.value_dim)
        if value_bytes == 4:
            return 46 * widths + 24 * self.num_key_heads * self.key_dim + 1000 * self.num_heads
        return 35 * widths + 8 * self.num_key_heads * self.key_dim + 1250 * self.num_heads


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Widths and numbers of parameters; `vision_` ones are the tower's, its merger included.

    layer_params: of the largest decoder layer. body_params: of all layers and the last norm.
    idle_params: of the experts that a token does not pass; body_params - idle_params is N in the formulas.
    experts_per_token: experts of a layer that a token passes, of a mixture; 0 where every token passes everything.
    intermediate_size: inner width of the MLP, in a mixture over all experts that a token passes.
    merger_params: of what makes vision tokens of patches, `patches_per_token` each.
    language_params: decoder, embeddings and head.
    adapted_params: of the linear layers that a LoRA target adapts, over all decoder layers.
    adapter_widths: inputs plus outputs of the linear layers that a LoRA target adapts, over all decoder layers.
    recurrent: of layers that carry a state instead of attending; None where all attend.
    vision_kept_width: values that the MLP of a tower's block keeps for its backward pass.
    extra_patches: of an image beside those that cut it up: a thumbnail's.
    vision_full_layers: blocks in which patches attend to the whole image; in the others, to `window_patches`.
    """

    hidden_size: int
    num_layers: int
    attention_width: int
    kv_width: int
    intermediate_size: int
    vocab_size: int
    layer_params: int
    body_params: int
    language_params: int
    adapted_params: Mapping[str, int]
    adapter_widths: Mapping[str, int]
    vision_hidden_size: int
    vision_depth: int
    vision_kept_width: int
    vision_full_layers: int
    vision_params: int
    merger_params: int
    patch_size: int
    patches_per_token: int
    window_patches: int
    extra_patches: int = 0
    idle_params: int = 0
    experts_per_token: int = 0
    recurrent: RecurrentSizes | None = None

    @property
    def num_attention_layers(self) -> int:
        """Decoder layers that attend."""
        return self.num_layers - (self.recurrent.num_layers if self.recurrent else 0)

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token in bfloat16."""
        return 2 * 2 * self.num_attention_layers * self.kv_width

    def group_flops(
        self, prompt_tokens: float, response_tokens: float, group_size: int, observation_tokens: float = 0.0
    ) -> float:
        """Forward FLOPs of the decoder and head for one prompt, computed once, with G responses.

        2N(P + GR) + 2LdP^2 + G(4LdRP + 2LdR^2) + 2hV GR, and per token what the recurrent layers' rule takes. What a
        response reads between its turns counts in R, but for the head.
        """
        prompt, response, group = prompt_tokens, response_tokens + observation_tokens, group_size
        width = self.num_attention_layers * self.attention_width
        per_token = 2 * (self.body_params - self.idle_params) + (
            self.recurrent.flops_per_token if self.recurrent else 0.0
        )
        attention = 2 * width * prompt**2 + group * (4 * width * response * prompt + 2 * width * response**2)
        head = 2 * self.hidden_size * self.vocab_size * group * response_tokens
        return per_token * (prompt + group * response) + attention + head

    def image_flops(self, image_pixels: float) -> float:
        """Forward FLOPs of the tower for one image: windows attend to themselves, some layers to everything."""
        patches = self.image_patches(image_pixels)
        full = self.vision_full_layers * patches
        windowed = (self.vision_depth - self.vision_full_layers) * min(self.window_patches, patches)
        per_patch = self.vision_params - self.merger_params + self.merger_params / self.patches_per_token
        return patches * (2 * per_patch + 4 * self.vision_hidden_size * (full + windowed))

    def image_tokens(self, image_pixels: float) -> float:
        """Vision tokens of one image."""
        return self.image_patches(image_pixels) / self.patches_per_token

    def image_patches(self, image_pixels: float) -> float:
        """Patches of one image that go through the tower."""
        return image_pixels / self.patch_size**2 + self.extra_patches

    def layer_activation_bytes(self, value_bytes: int) -> float:
        """Bytes per token that the largest decoder layer keeps for its backward pass.

        value_bytes: 4 float32, 2 bfloat16.
        Counted on transformers' Qwen2.5-VL layer with SDPA; in bfloat16 the norms keep float32 copies. Each expert of
        a mixture keeps what it is given and what it returns.
        """
        kept = (8.5 + 2 * self.experts_per_token) * self.hidden_size + 2 * self.kv_width + 4 * self.intermediate_size
        rule = self.recurrent.activation_bytes(value_bytes) if self.recurrent else 0.0
        return value_bytes * kept + (4 * self.hidden_size if value_bytes == 2 else 0) + rule

    def layer_gradient_bytes(self, value_bytes: int) -> float:
        """Bytes per token of gradients in a decoder layer's backward pass: two of the MLP's inner width at once."""
        return value_bytes * 2 * self.intermediate_size

    def vision_activation_bytes(self, value_bytes: int) -> float:
        """Bytes per patch that a block of the tower keeps for its backward pass; counted likewise."""
        return value_bytes * (13.25 * self.vision_hidden_size + self.vision_kept_width)


def sizes_of(path: str) -> tuple[ModelSizes, str]:
    """Return a model's sizes and where they come from: its own `config.json`, else a known model of that name.

    Raises:
        ConfigError: there is neither.
        InputError: the model is of a family that is not supported.
    """
    file = Path(path) / "config.json"
    if file.is_file():
        return count_sizes(json.loads(file.read_text(encoding="utf-8"))), str(file)
    known = json.loads(resources.files("conf").joinpath(*KNOWN_MODELS).read_text(encoding="utf-8"))
    for model in known:
        if re.search(model["pattern"], path.lower()):
            return count_sizes(model["config"]), model["name"]
    raise ConfigError(
        f"{how_to_get('model.path', path)}. A plan needs its config.json, or a name that it knows, such as "
        "Qwen2.5-VL-7B (conf/model/known.json)"
    )


def count_sizes(config: Mapping[str, Any]) -> ModelSizes:
    """Return the sizes of the model that the values of a `config.json` describe.

    Raises:
        InputError: it is of a family that is not supported.
    """
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from rollout.families import family_of

    values = dict(config)
    family = family_of(values.pop("model_type", "qwen2_5_vl"))
    settings = AutoConfig.for_model(family.model_type, **values)
    build: Any = AutoModelForImageTextToText.from_config
    with torch.device("meta"):
        model = build(settings)
    text, tower, shape = settings.get_text_config(), family.vision_tower(model), family.tower_shape(model)
    layers: list[Any] = list(family.decoder_layers(model))
    blocks = family.vision_blocks(model)
    routers: list[Any] = list(family.routers(model).values())
    attention = next(layer.self_attn for layer in layers if hasattr(layer, "self_attn"))
    vision_mlp = [layer for name, layer in _linear_layers(blocks[0]) if name.split(".")[0] == "mlp"]
    vision_params = _count(tower.parameters())
    layer_params = [_count(layer.parameters()) for layer in layers]
    return ModelSizes(
        hidden_size=text.hidden_size,
        num_layers=len(layers),
        attention_width=attention.o_proj.in_features,
        kv_width=attention.k_proj.out_features,
        intermediate_size=_inner_width(layers[-1].mlp),
        vocab_size=text.vocab_size,
        layer_params=max(layer_params),
        body_params=sum(layer_params) + text.hidden_size,
        language_params=_count(model.parameters()) - vision_params,
        adapted_params=_of_targets(family, layers, lambda linear: linear.in_features * linear.out_features),
        adapter_widths=_of_targets(family, layers, lambda linear: linear.in_features + linear.out_features),
        vision_hidden_size=shape.hidden_size,
        vision_depth=len(blocks),
        # a gated MLP of three layers keeps four values of its inner width, a plain one of two layers two
        vision_kept_width=2 * (len(vision_mlp) - 1) * vision_mlp[0].out_features,
        vision_full_layers=shape.full_layers,
        vision_params=vision_params,
        merger_params=_count(
            value for name, value in tower.named_parameters() if any(part in name for part in shape.merger)
        ),
        patch_size=shape.patch_size,
        patches_per_token=shape.patches_per_token,
        window_patches=shape.window_patches,
        extra_patches=shape.extra_patches,
        idle_params=sum(_idle(layer) for layer in layers),
        experts_per_token=max((router.top_k for router in routers), default=0),
        recurrent=_recurrent_sizes(family, model),
    )


def _idle(layer: Any) -> int:
    """Return the parameters of the experts that a token does not pass in a decoder layer."""
    if not hasattr(layer.mlp, "experts"):
        return 0
    router = layer.mlp.gate
    return int(_count(layer.mlp.experts.parameters()) * (router.num_experts - router.top_k) // router.num_experts)


def _inner_width(mlp: Any) -> int:
    """Return the inner width of an MLP, over all experts that a token passes."""
    if hasattr(mlp, "experts"):
        shared = _inner_width(mlp.shared_expert) if hasattr(mlp, "shared_expert") else 0
        return int(mlp.gate.top_k * mlp.experts.intermediate_dim) + shared
    return int(mlp.down_proj.in_features)


def _of_targets(family: Family, layers: Sequence[nn.Module], size_of: Callable[[nn.Linear], int]) -> dict[str, int]:
    """Return LoRA target -> the sum of `size_of` over the linear layers that it adapts."""
    sums: Counter[str] = Counter()
    for name, linear in (pair for layer in layers for pair in _linear_layers(layer)):
        sums[name.rpartition(".")[2]] += size_of(linear)
    return {target: sum(sums[name] for name in family.adapted_names([target])) for target in sums}


def _recurrent_sizes(family: Family, model: Any) -> RecurrentSizes | None:
    layers: list[Any] = list(family.recurrent_layers(model))
    if not layers:
        return None
    first = layers[0]
    return RecurrentSizes(
        num_layers=len(layers),
        num_key_heads=first.num_k_heads,
        num_heads=first.num_v_heads,
        key_dim=first.head_k_dim,
        value_dim=first.head_v_dim,
        kernel_size=first.conv_kernel_size,
        conv_width=first.conv_dim,
    )


def _linear_layers(module: nn.Module) -> Iterable[tuple[str, nn.Linear]]:
    return ((name, layer) for name, layer in module.named_modules() if isinstance(layer, nn.Linear))


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)
