"""Sizes of a Qwen2.5-VL and what follows from them: parameters, FLOPs of a group, bytes of a cached token.

Pure arithmetic; loads no model. L layers, d attention width, P prompt tokens, R response tokens, G rollouts.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsgrpo.config.checks import how_to_get
from rsgrpo.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Shapes:
    """Sizes as `config.json` has them; `vision_` ones are the tower's."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    vocab_size: int
    tied_embeddings: bool
    vision_hidden_size: int = 1280
    vision_depth: int = 32
    vision_intermediate_size: int = 3420
    vision_full_layers: int = 4
    patch_size: int = 14
    window_patches: int = 64

    @property
    def kv_width(self) -> int:
        """Width of the keys of one token in one layer."""
        return self.hidden_size // self.num_heads * self.num_kv_heads

    @property
    def layer_params(self) -> int:
        """Parameters of one decoder layer, biases of q, k and v and both norms included."""
        attention = (
            2 * self.hidden_size**2 + 2 * self.hidden_size * self.kv_width + self.hidden_size + 2 * self.kv_width
        )
        return attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size

    @property
    def body_params(self) -> int:
        """Parameters that every token passes: the decoder layers. N in the formulas."""
        return self.num_layers * self.layer_params + self.hidden_size

    @property
    def language_params(self) -> int:
        """Decoder, embeddings and head."""
        tables = 1 if self.tied_embeddings else 2
        return self.body_params + tables * self.vocab_size * self.hidden_size

    @property
    def merger_params(self) -> int:
        """What makes one vision token of four patches."""
        width, merged = self.vision_hidden_size, 4 * self.vision_hidden_size
        return width + merged**2 + merged + merged * self.hidden_size + self.hidden_size

    @property
    def vision_params(self) -> int:
        """Vision tower with its merger."""
        width = self.vision_hidden_size
        block = 4 * width**2 + 4 * width + 3 * width * self.vision_intermediate_size + 2 * self.vision_intermediate_size
        patches = 3 * 2 * self.patch_size**2 * width
        return self.vision_depth * (block + 3 * width) + patches + self.merger_params

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token in bfloat16."""
        return 2 * 2 * self.num_layers * self.kv_width

    def group_flops(self, prompt_tokens: float, response_tokens: float, group_size: int) -> float:
        """Forward FLOPs of the decoder and head for one prompt, computed once, with G responses.

        2N(P + GR) + 2LdP^2 + G(4LdRP + 2LdR^2) + 2hV GR
        """
        prompt, response, group = prompt_tokens, response_tokens, group_size
        width = self.num_layers * self.hidden_size
        attention = 2 * width * prompt**2 + group * (4 * width * response * prompt + 2 * width * response**2)
        head = 2 * self.hidden_size * self.vocab_size * group * response
        return 2 * self.body_params * (prompt + group * response) + attention + head

    def image_flops(self, image_pixels: float) -> float:
        """Forward FLOPs of the tower for one image: windows attend to themselves, a few layers to everything."""
        patches = image_pixels / self.patch_size**2
        full = self.vision_full_layers * patches
        windowed = (self.vision_depth - self.vision_full_layers) * min(self.window_patches, patches)
        per_patch = self.vision_params - self.merger_params + self.merger_params / 4
        return patches * (2 * per_patch + 4 * self.vision_hidden_size * (full + windowed))

    def image_tokens(self, image_pixels: float) -> float:
        """Vision tokens of one image: four patches each."""
        return image_pixels / self.patch_size**2 / 4

    def layer_activation_bytes(self, value_bytes: int) -> float:
        """Bytes per token that a decoder layer keeps for its backward pass; value_bytes: 4 float32, 2 bfloat16.

        Counted on transformers' own layer with SDPA; in bfloat16 the norms keep float32 copies.
        """
        kept = 8.5 * self.hidden_size + 2 * self.kv_width + 4 * self.intermediate_size
        return value_bytes * kept + (4 * self.hidden_size if value_bytes == 2 else 0)

    def vision_activation_bytes(self, value_bytes: int) -> float:
        """Bytes per patch that a block of the tower keeps for its backward pass; counted likewise."""
        return value_bytes * (13.25 * self.vision_hidden_size + 4 * self.vision_intermediate_size)


KNOWN = {
    "3b": Shapes(2048, 36, 16, 2, 11008, 151_936, True),
    "7b": Shapes(3584, 28, 28, 4, 18944, 152_064, False),
    "32b": Shapes(5120, 64, 40, 8, 27648, 152_064, False, vision_intermediate_size=3456),
    "72b": Shapes(8192, 80, 64, 8, 29568, 152_064, False, vision_intermediate_size=3456),
    # The demo's model, before it is made.
    "demo": Shapes(128, 4, 4, 2, 384, 512, False, 128, 2, 256, 1),
}


def shapes_of(path: str) -> tuple[Shapes, str]:
    """Return a model's sizes and where they were found: its own `config.json`, else the size in its name.

    Raises:
        ConfigError: neither is there.
    """
    file = Path(path) / "config.json"
    if file.is_file():
        config = json.loads(file.read_text())
        if config.get("model_type", "qwen2_5_vl") != "qwen2_5_vl":
            raise ConfigError(
                f"a plan knows the shapes of qwen2_5_vl, {file} is a {config['model_type']!r}: "
                "it can be trained, but not planned"
            )
        return _from_config(config), str(file)
    match = re.search(r"(?<![0-9.])(72b|32b|7b|3b)(?![a-z0-9])", path.lower()) or re.match("(demo)/", path)
    if not match:
        raise ConfigError(
            f"{how_to_get('model.path', path)}; a plan needs its config.json, or 3B, 7B, 32B or 72B in its name"
        )
    return KNOWN[match[1]], f"Qwen2.5-VL-{match[1].upper()} (by its name)" if match[1] != "demo" else "the demo's model"


def _from_config(config: dict[str, Any]) -> Shapes:
    text, vision = config.get("text_config", config), config["vision_config"]
    return Shapes(
        hidden_size=text["hidden_size"],
        num_layers=text["num_hidden_layers"],
        num_heads=text["num_attention_heads"],
        num_kv_heads=text["num_key_value_heads"],
        intermediate_size=text["intermediate_size"],
        vocab_size=text["vocab_size"],
        tied_embeddings=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        vision_hidden_size=vision["hidden_size"],
        vision_depth=vision["depth"],
        vision_intermediate_size=vision["intermediate_size"],
        vision_full_layers=len(vision["fullatt_block_indexes"]),
        patch_size=vision["patch_size"],
        window_patches=(vision["window_size"] // vision["patch_size"]) ** 2,
    )
