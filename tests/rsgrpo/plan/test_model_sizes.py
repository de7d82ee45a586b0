"""Sizes of models against their checkpoints, and FLOPs and activations against what torch counts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5DecoderLayer

from rsgrpo import cli
from rsgrpo.config.train import LoraConfig
from rsgrpo.errors import ConfigError, InputError
from rsgrpo.plan.config import PlanConfig
from rsgrpo.plan.memory import trainable_params
from rsgrpo.plan.model_sizes import count_sizes, sizes_of
from tests.material.learner import make_learner
from tests.material.tiny_families import save_family


def config_of(
    hidden: int, layers: int, heads: int, kv_heads: int, inner: int, vocab: int, **vision: Any
) -> dict[str, Any]:
    """The values of a small Qwen2.5-VL's config.json. vision: of its tower, by default a small one."""
    pairs = hidden // heads // 2
    height = 3 * pairs // 8
    text = {
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "intermediate_size": inner, "vocab_size": vocab,
        "bos_token_id": None, "eos_token_id": None,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e6, "mrope_section": [pairs - 2 * height, height, height],
        },
    }  # fmt: skip
    tower = {"depth": 1, "hidden_size": 32, "intermediate_size": 96, "num_heads": 4, "fullatt_block_indexes": [0]}
    return {
        "model_type": "qwen2_5_vl",
        "tie_word_embeddings": False,
        "text_config": text,
        "vision_config": {**tower, "out_hidden_size": hidden, "window_size": 112, **vision},
    }


SMALL_CONFIG = config_of(8, 2, 2, 1, 16, 10)  # key width 4
SMALL = count_sizes(SMALL_CONFIG)
SEVEN_B = sizes_of("Qwen/Qwen2.5-VL-7B-Instruct")[0]


def test_parameters_of_a_layer_by_hand():
    # q 8*8+8, k and v 2*(8*4+4), o 8*8, mlp 3*8*16, norms 2*8
    assert SMALL.layer_params == 72 + 72 + 64 + 384 + 16
    assert SMALL.language_params == 2 * 608 + 8 + 2 * 10 * 8


@pytest.mark.parametrize(
    ("size", "total"),  # of the checkpoints on the hub
    [
        ("2.5-VL-3B", 3_754_622_976),
        ("2.5-VL-7B", 8_292_166_656),
        ("2.5-VL-32B", 33_452_718_336),
        ("2.5-VL-72B", 73_410_777_344),
        ("3-VL-4B", 4_437_815_808),
        ("3-VL-8B", 8_767_123_696),
        ("3-VL-30B-A3B", 31_070_754_032),
    ],
)
def test_known_models_have_the_parameters_of_their_checkpoints(size, total):
    sizes, source = sizes_of(f"Qwen/Qwen{size}-Instruct")
    assert sizes.language_params + sizes.vision_params == total
    assert source == f"Qwen{size} (by its name)"


@pytest.mark.parametrize("path", ["openbmb/EVisRAG-7B", "org/my-qwen2.5-vl-7b-tuned", "runs/page_desk_7b_sft/export"])
def test_what_was_made_from_a_known_model_is_known_by_its_size(path):
    assert sizes_of(path)[1] == "Qwen2.5-VL-7B (by its name)"


def test_models_of_other_vendors_are_known_by_name():
    sizes, source = sizes_of("OpenGVLab/InternVL3-8B-hf")
    assert source == "InternVL3-8B (by its name)"
    assert sizes.language_params + sizes.vision_params == 7_944_373_760  # of its checkpoint
    assert sizes.image_tokens(7 * 448**2) == 8 * 256  # seven tiles and the thumbnail
    sizes, source = sizes_of("zai-org/GLM-4.1V-9B-Thinking")
    assert source == "GLM-4.1V-9B (by its name)"
    assert sizes.language_params + sizes.vision_params == pytest.approx(10.29e9, rel=1e-3)


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "qwen3_5_moe"])
def test_a_token_passes_only_its_experts(family, tiny_model_path, tmp_path):
    folder = save_family(family, tiny_model_path, tmp_path / family)
    sizes, _ = sizes_of(folder)
    assert sizes.language_params + sizes.vision_params == num_stored(folder)
    # Each of 8 experts: gate and up 96 x 64, down 64 x 48; six of eight are idle. A shared one is 40 wide.
    expert, layers = 96 * 64 + 64 * 48, sizes.num_layers
    assert sizes.idle_params == layers * 6 * expert
    assert (sizes.experts_per_token, sizes.intermediate_size) == (2, 2 * 48 + (40 if family == "qwen3_5_moe" else 0))
    one = sizes.group_flops(1, 0, 1) - 2 * sizes.num_attention_layers * sizes.attention_width
    rule = sizes.recurrent.flops_per_token if sizes.recurrent else 0.0
    assert one == pytest.approx(2 * (sizes.body_params - sizes.idle_params) + rule)
    learner = make_learner(folder, lora=LoraConfig(rank=2))
    trained = sum(parameter.numel() for parameter in learner.policy.trainable().values())
    config = cli.compose(PlanConfig, "config", ["recipe=demo", f"model.path={folder}", "model.lora.rank=2"])
    assert trainable_params(config, sizes) == trained


def test_flops_of_experts_are_those_that_torch_counts(tiny_model_path, tmp_path):
    from transformers import AutoModelForImageTextToText

    folder = save_family("qwen3_vl_moe", tiny_model_path, tmp_path / "mixture")
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, experts_implementation="eager")
    model.model.language_model.config._attn_implementation = "eager"
    sizes, length = sizes_of(folder)[0], 200
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.model.language_model(input_ids=torch.zeros(1, length, dtype=torch.long), use_cache=False)
    hidden_half = 2 * sizes.num_layers * sizes.attention_width * length**2
    assert counter.get_total_flops() == pytest.approx(sizes.group_flops(length, 0, 1) + hidden_half, rel=0.01)


def test_recurrent_layers_are_counted_apart_from_those_that_attend(tiny_model_path, tmp_path):
    folder = save_family("qwen3_5", tiny_model_path, tmp_path / "hybrid")
    sizes, _ = sizes_of(folder)
    assert (sizes.num_layers, sizes.num_attention_layers) == (4, 1)
    assert sizes.kv_bytes_per_token == 2 * 2 * 1 * 32  # one layer of one head
    assert sizes.recurrent is not None
    # 3 layers: 2 heads of 128 x 128 in float32, and 4 inputs of the convolution, 2 x 128 + 2 x 128 wide, in bfloat16
    assert sizes.recurrent.state_bytes == 3 * (4 * 2 * 128 * 128 + 2 * 4 * 512)
    long, short = sizes.group_flops(2000, 0, 1), sizes.group_flops(1000, 0, 1)
    assert long - 2 * short == pytest.approx(
        4 * sizes.attention_width * 1000**2
    )  # only the attending layer is quadratic
    learner = make_learner(folder, lora=LoraConfig(rank=2))
    trained = sum(parameter.numel() for parameter in learner.policy.trainable().values())
    config = cli.compose(PlanConfig, "config", ["recipe=demo", f"model.path={folder}", "model.lora.rank=2"])
    assert trainable_params(config, sizes) == trained


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_of_a_recurrent_layer_are_those_that_it_keeps(dtype):
    values: Any = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 100, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 64, "linear_value_head_dim": 32,
    }  # fmt: skip
    sizes = count_sizes({"model_type": "qwen3_5", "text_config": values, "vision_config": {"depth": 1}})
    text_config: Any = Qwen3_5TextConfig(**values)
    layer = Qwen3_5DecoderLayer(text_config, 0).to(dtype)
    hidden, rotation = torch.randn(1, 512, 64, dtype=dtype, requires_grad=True), torch.ones(1, 512, 32, dtype=dtype)
    counted = saved_bytes(lambda: layer(hidden, position_embeddings=(rotation, rotation)), layer) / 512
    assert sizes.layer_activation_bytes(dtype.itemsize) == pytest.approx(counted, rel=0.15)


def num_stored(folder: str) -> int:
    """Parameters in a model's folder."""
    from safetensors import safe_open

    with safe_open(Path(folder) / "model.safetensors", framework="pt") as weights:
        return sum(weights.get_tensor(name).numel() for name in weights.keys())  # noqa: SIM118


def test_sizes_are_read_from_the_models_own_folder(tiny_model_path):
    sizes, source = sizes_of(tiny_model_path)
    assert sizes.language_params + sizes.vision_params == num_stored(tiny_model_path)
    assert source.endswith("config.json")


@pytest.mark.parametrize(
    ("family", "full_layers", "kept_width", "num_tokens"),
    [
        ("qwen2_vl", 2, 2 * 128, 25),
        ("qwen3_vl", 2, 2 * 128, 25),
        ("glm4v", 2, 4 * 64, 25),  # a gated MLP, as wide as its output
        ("internvl", 0, 2 * 128, 25 + 4),  # patches attend within a tile; a thumbnail of four tokens
    ],
)
def test_sizes_of_other_families_are_read_too(family, full_layers, kept_width, num_tokens, tiny_model_path, tmp_path):
    sizes, _ = sizes_of(save_family(family, tiny_model_path, tmp_path / family))
    assert sizes.language_params + sizes.vision_params == num_stored(str(tmp_path / family))
    assert (sizes.vision_full_layers, sizes.vision_depth) == (full_layers, 2)
    assert (sizes.vision_hidden_size, sizes.vision_kept_width) == (64, kept_width)
    assert sizes.image_tokens((10 * sizes.patch_size) ** 2) == num_tokens


def test_the_hubs_flat_config_is_read_too(tmp_path):
    values = dict(SMALL_CONFIG)
    (tmp_path / "config.json").write_text(json.dumps(values | values.pop("text_config")))
    assert sizes_of(str(tmp_path))[0] == SMALL


def test_other_families_and_unknown_models_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"}))
    with pytest.raises(InputError, match=r"is a 'llava' model; supported families are"):
        sizes_of(str(tmp_path))
    for path in ("runs/mystery/export", "Qwen/Qwen3-VL-32B-Instruct", "mistralai/Mistral-7B-v0.1", "org/llava-1.5-7b"):
        with pytest.raises(ConfigError, match=r"needs its config.json, or a name that it knows, such as Qwen2.5-VL-7B"):
            sizes_of(path)


def test_flops_of_a_prompt_and_of_a_group_by_hand():
    body = SMALL.body_params
    # P 3 alone: 2N*3 + 2*L*d*9 = 6N + 288
    assert SMALL.group_flops(3, 0, 1) == 6 * body + 288
    # with G 2 responses of R 5: 2N*10 more, attention 2*(4*16*5*3 + 2*16*25) more, head 2*8*10*2*5 more
    assert SMALL.group_flops(3, 5, 2) == 6 * body + 288 + 20 * body + 2 * (960 + 800) + 1600


def test_sharing_the_prompt_saves_what_the_closed_form_says():
    sizes, prompt, response, group = SEVEN_B, 11_000, 700, 8
    shared = sizes.group_flops(prompt, response, group)
    one_by_one = group * sizes.group_flops(prompt, response, 1)
    assert 5.0 < one_by_one / shared < 6.0
    assert sizes.group_flops(prompt, response, 1) == pytest.approx(sizes.group_flops(prompt + response, 0, 1), rel=0.02)


def small_model(config: dict[str, Any], attention: str) -> Any:
    """Transformers' model of a config.json's values, random."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration._from_config(Qwen2_5_VLConfig(**config), attn_implementation=attention)


COUNTED_CONFIG = config_of(64, 3, 4, 2, 160, 512, depth=4)
COUNTED = count_sizes(COUNTED_CONFIG)


def test_flops_of_the_decoder_are_those_that_torch_counts():
    model, length = small_model(COUNTED_CONFIG, "eager"), 300
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.model.language_model(input_ids=torch.zeros(1, length, dtype=torch.long), use_cache=False)
    # The eager attention also computes the half that the causal mask then hides: 2 L d P^2 more.
    hidden_half = 2 * COUNTED.num_layers * COUNTED.hidden_size * length**2
    assert counter.get_total_flops() == pytest.approx(COUNTED.group_flops(length, 0, 1) + hidden_half, rel=0.005)


def test_flops_of_the_tower_are_those_that_torch_counts():
    model = small_model(COUNTED_CONFIG, "eager")
    pixels = torch.randn(32 * 32, 3 * 2 * 14 * 14)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.model.visual(pixels, grid_thw=torch.tensor([[1, 32, 32]]))
    # The last window of each row holds fewer patches than the closed form gives it.
    assert counter.get_total_flops() == pytest.approx(COUNTED.image_flops(448 * 448), rel=0.02)


def test_a_backward_pass_takes_two_forward_passes():
    model = small_model(COUNTED_CONFIG, "eager")
    ids = torch.zeros(1, 200, dtype=torch.long)
    with FlopCounterMode(display=False) as forward:
        out = model.model.language_model(input_ids=ids, use_cache=False).last_hidden_state
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert backward.get_total_flops() == pytest.approx(2 * forward.get_total_flops(), rel=0.005)


def saved_bytes(work: Callable[[], Any], model: torch.nn.Module) -> int:
    """Bytes that `work` keeps for its backward pass, parameters left out."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = work()
    del out
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("hidden", "heads", "inner"), [(64, 2, 160), (128, 2, 160), (64, 4, 160), (64, 2, 320)])
def test_activations_of_a_layer_and_of_a_vision_block_are_those_that_torch_keeps(dtype, hidden, heads, inner):
    config = config_of(hidden, 1, 4, heads, inner, 64, hidden_size=hidden // 2, intermediate_size=inner // 2)
    sizes = count_sizes(config)
    model, length = small_model(config, "sdpa").to(dtype).train(), 128
    language, visual = model.model.language_model, model.model.visual
    x = torch.randn(1, length, hidden, dtype=dtype, requires_grad=True)
    angles = tuple(t.to(dtype) for t in language.rotary_emb(x, torch.arange(length).expand(3, 1, -1)))
    kept = saved_bytes(lambda: language.layers[0](x, attention_mask=None, position_embeddings=angles), model)
    assert kept / length == pytest.approx(sizes.layer_activation_bytes(dtype.itemsize), rel=0.02)

    x = torch.randn(length, hidden // 2, dtype=dtype, requires_grad=True)
    angles = (torch.randn(length, hidden // 8),) * 2
    whole = torch.tensor([0, length], dtype=torch.int32)
    kept = saved_bytes(lambda: visual.blocks[0](x, cu_seqlens=whole, position_embeddings=angles), model)
    limit = 0.02 if dtype == torch.float32 else 0.2  # in bfloat16 the block turns its heads in float32
    assert kept / length == pytest.approx(sizes.vision_activation_bytes(dtype.itemsize), rel=limit)
