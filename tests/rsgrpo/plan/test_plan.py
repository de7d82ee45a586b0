"""Bytes, FLOPs and warnings of a plan, against numbers worked out by hand and against transformers' own model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5DecoderLayer

from rsgrpo import cli
from rsgrpo.config.train import LoraConfig, TrainConfig
from rsgrpo.errors import ConfigError, InputError
from rsgrpo.plan.__main__ import main, render
from rsgrpo.plan.config import PlanConfig
from rsgrpo.plan.fitting import fitting_overrides, idle, shortages, with_overrides
from rsgrpo.plan.memory import GIB, devices_memory, engine_memory, learner_memory, learner_moments, trainable_params
from rsgrpo.plan.model_sizes import count_sizes, sizes_of
from rsgrpo.plan.times import disk_bytes, num_devices, phases
from tests.material.learner import make_groups, make_learner
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
TWO_NODES = ("recipe=evisrag_7b", "cluster.nodes=2", "cluster.gpus_per_node=8", "cluster.placement=disaggregated")
SEVEN_B = sizes_of("Qwen/Qwen2.5-VL-7B-Instruct")[0]


def planned(*overrides: str) -> PlanConfig:
    return cli.compose(PlanConfig, "config", overrides)


def gib_warnings(config: PlanConfig) -> list[str]:
    sizes = sizes_of(config.model.path)[0]
    return [*shortages(config, sizes), *idle(config)]


@pytest.mark.parametrize("recipe", cli.groups(TrainConfig)["recipe"])
def test_every_recipe_is_planned_offline_and_fits_its_gpu(recipe, capsys):
    gpu = "rtx4090" if recipe == "evisrag_3b_lora" else "h100"
    main(planned(f"recipe={recipe}", f"plan.gpu={gpu}"))
    printed = capsys.readouterr().out
    assert "peak" in printed
    assert "Assumed:" in printed
    assert "WARNING" not in printed


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
    ],
)
def test_known_models_have_the_parameters_of_their_checkpoints(size, total):
    sizes, source = sizes_of(f"Qwen/Qwen{size}-Instruct")
    assert sizes.language_params + sizes.vision_params == total
    assert source == f"Qwen{size} (by its name)"


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
    lora = LoraConfig(rank=2)
    learner = make_learner(folder, lora=lora)
    trained = sum(parameter.numel() for parameter in learner.policy.trainable().values())
    config = planned("recipe=demo", f"model.path={folder}", "model.lora.rank=2")
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
    weights = {parameter.untyped_storage()._cdata for parameter in layer.parameters()}
    kept: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage()._cdata not in weights:
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    rotation = torch.ones(1, 512, 32, dtype=dtype)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(torch.randn(1, 512, 64, dtype=dtype, requires_grad=True), position_embeddings=(rotation, rotation))
    counted = sum(storage.nbytes() for storage in kept.values()) / 512
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


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_sizes_of_other_families_are_read_too(family, tiny_model_path, tmp_path):
    sizes, _ = sizes_of(save_family(family, tiny_model_path, tmp_path / family))
    assert sizes.language_params + sizes.vision_params == num_stored(str(tmp_path / family))
    assert sizes.vision_full_layers == sizes.vision_depth == 2  # these towers have no windows
    assert (sizes.vision_hidden_size, sizes.vision_kept_width) == (64, 2 * 128)
    assert sizes.image_tokens((10 * sizes.patch_size) ** 2) == 25


def test_the_hubs_flat_config_is_read_too(tmp_path):
    values = dict(SMALL_CONFIG)
    (tmp_path / "config.json").write_text(json.dumps(values | values.pop("text_config")))
    assert sizes_of(str(tmp_path))[0] == SMALL


def test_other_families_and_unknown_models_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"}))
    with pytest.raises(InputError, match=r"is a 'llava' model; supported families are"):
        sizes_of(str(tmp_path))
    for path in ("runs/mystery/export", "Qwen/Qwen3-VL-32B-Instruct"):
        with pytest.raises(ConfigError, match=r"needs its config.json, or 3B, 7B, 32B or 72B in its name"):
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


# ---- the closed forms against transformers' own model ----------------------------------------------------------------


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


def test_state_of_a_learner_is_what_it_holds(tiny_model_path, page_images):
    learner = make_learner(tiny_model_path, freeze_vision=False, world_size=1)
    groups = make_groups(page_images, [1, 2])
    learner.update(groups, [1.0, 1.0])
    sizes, _ = sizes_of(tiny_model_path)
    total = sizes.language_params + sizes.vision_params
    parameters = list(learner.policy.trainable().values())
    assert sum(parameter.nbytes for parameter in parameters) == 4 * total
    state = learner._trainer().adamw.state_dict()
    moments = [
        leaf for leaf in tree_leaves(state) if isinstance(leaf, torch.Tensor) and leaf.dim()
    ]  # step counts are scalars
    assert sum(tensor.nbytes for tensor in moments) == 8 * total


def test_the_7b_recipe_is_planned_for_one_node_and_for_two():
    one = planned("recipe=evisrag_7b")
    assert (num_devices(one), one.rollout.vllm.tensor_parallel_size, one.cluster.placement) == (8, 2, "colocated")
    assert gib_warnings(one) == []
    two = planned(*TWO_NODES)
    assert num_devices(two) == 16
    assert gib_warnings(two) == []
    assert set(devices_memory(two, SEVEN_B)) == {"learner", "engine"}
    parts = devices_memory(one, SEVEN_B)["learner and engine"]
    # Tensor parallel: half of 8.29 B bfloat16 parameters on each of the two.
    assert parts.sampling["engine weights"] == pytest.approx(8_292_166_656 * 2 / 2 / GIB)
    # An image has 8,000 patches; a block keeps 2 x (13.25 x 1280 + 4 x 3420) bytes of each. Features: 5 x 2,000 tokens.
    assert parts.sampling["engine vision"] == pytest.approx(5 * 8000 * 2 * (13.25 * 1280 + 4 * 3420) / GIB)
    assert parts.learning["vision"] == pytest.approx((5 * 2000 * 3584 * 2 + 8000 * 2 * (13.25 * 1280 + 13680)) / GIB)


def test_memory_of_a_full_learner_by_hand():
    config = planned("recipe=evisrag_7b")
    memory = learner_memory(config, SEVEN_B)
    assert memory.static["weights (float32)"] == pytest.approx(7_615_616_512 * 4 / 8 / GIB)
    assert memory.static["optimiser"] == pytest.approx(2 * memory.static["weights (float32)"])
    assert memory.static["frozen vision tower"] == pytest.approx(676_550_144 * 2 / GIB)
    assert memory.learning["gradients"] == pytest.approx(memory.static["weights (float32)"])
    assert learner_moments(config, SEVEN_B)["head"]["logits"] == pytest.approx(512 * 152_064 * 20 / GIB)


def test_more_ranks_divide_the_state_and_offload_removes_it():
    eight = learner_memory(planned("recipe=evisrag_7b"), SEVEN_B)
    sixteen = learner_memory(planned("recipe=evisrag_7b", "learner.num_ranks=16"), SEVEN_B)
    two_copies = learner_memory(planned("recipe=evisrag_7b", "learner.num_ranks=16", "learner.replicas=2"), SEVEN_B)
    assert two_copies == eight
    away = learner_memory(planned("recipe=evisrag_7b", "learner.offload=true"), SEVEN_B)
    assert sixteen.static["optimiser"] == pytest.approx(eight.static["optimiser"] / 2)
    assert away.static["weights (float32)"] == away.static["optimiser"] == away.learning["gradients"] == 0


def test_adapters_are_counted_by_hand():
    config = planned("recipe=evisrag_7b_lora", "model.lora.rank=2", "model.lora.targets=[q_proj,up_proj]")
    # per layer and rank: q 8+8, up 8+16
    assert trainable_params(config, SMALL) == 2 * 2 * (16 + 24)


def test_the_engine_gives_its_memory_back_only_when_it_sleeps():
    asleep = planned("recipe=evisrag_7b", "rollout.vllm.sleep_level=1")
    awake = planned("recipe=evisrag_7b", "rollout.vllm.sleep_level=0")
    taken = 0.4 * 80 - 2.0
    assert sum(engine_memory(asleep, SEVEN_B).sampling.values()) == pytest.approx(taken)
    kept = engine_memory(awake, SEVEN_B)
    assert sum(kept.static.values()) == pytest.approx(taken - kept.sampling["engine vision"])
    peaks = [devices_memory(config, SEVEN_B)["learner and engine"].peak for config in (asleep, awake)]
    assert peaks[0] < peaks[1]


@pytest.mark.parametrize(
    ("overrides", "arithmetic", "fix"),
    [
        (["learner.num_ranks=1", "rollout.num_workers=1"], "> 0.94 x 80 GiB = 75.2", "learner.num_ranks"),
        # 16,536 tokens x 57,344 bytes; 0.4 GiB on each of two GPUs
        (["rollout.vllm.kv_cache_gib=0.4"], "0.80 GiB does not hold one response of full length (0.88 GiB)", "Raise"),
    ],
)
def test_what_does_not_fit_is_said_with_the_arithmetic(overrides, arithmetic, fix):
    (warning,) = gib_warnings(planned("recipe=evisrag_7b", *overrides))
    assert arithmetic in warning
    assert fix in warning


def test_devices_are_counted_against_the_cluster():
    (idle,) = gib_warnings(planned(*TWO_NODES, "rollout.num_workers=2"))
    assert "the workers take 12 of 2 x 8 = 16 GPUs: 4 stay idle" in idle
    (short,) = gib_warnings(planned(*TWO_NODES, "rollout.num_workers=8"))
    assert "take 24 GPUs, the cluster has 2 x 8 = 16" in short


def test_passes_are_planned_only_where_they_are_run():
    def names(*overrides: str) -> list[str]:
        return [phase.name for phase in phases(planned("recipe=evisrag_7b", *overrides), SEVEN_B)]

    sampling = ["sample: prefill", "sample: decode", "sample: longest responses"]
    learning = ["learn", "weight sync", "checkpoint (its share)"]
    assert names() == [*sampling, *learning]
    assert names("algorithm.kl_coef=0.01") == [*sampling, "reference", *learning]
    assert names("algorithm.updates_per_step=4") == [*sampling, "old log-probabilities", *learning]
    assert names("rollout=fake") == learning


def test_the_filters_refills_and_checkpoints_take_their_time():
    def seconds(name: str, *overrides: str) -> float:
        config = planned("recipe=evisrag_7b", *overrides)
        return next(phase.seconds for phase in phases(config, SEVEN_B) if phase.name == name)

    unfiltered = "algorithm.filter.enabled=false"
    assert seconds("sample: prefill") == pytest.approx(seconds("sample: prefill", unfiltered) / 0.6)
    assert seconds("sample: decode") > seconds("sample: decode", unfiltered)
    trained = 7_615_616_512
    assert seconds("checkpoint (its share)") == pytest.approx(12 * trained / 10 / 2e9)
    # two recent ones, one best, one being written, and the export
    expected = 4 * 12 * trained + 4 * 8_292_166_656
    assert disk_bytes(planned("recipe=evisrag_7b"), SEVEN_B) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("overrides", "keys"),
    [
        (["plan.gpu=a100_40", "cluster.gpus_per_node=4"], {"learner.num_ranks", "rollout.num_workers"}),
        (["plan.gpu=h100", "cluster.gpus_per_node=2"], {"learner.num_ranks", "rollout.num_workers"}),
        (["plan.gpu=rtx4090", "cluster.gpus_per_node=8"], set()),
        (["plan.gpu_memory_gib=32"], set()),
    ],
)
def test_what_does_not_fit_is_given_overrides_with_which_it_fits(overrides, keys):
    config = planned("recipe=evisrag_7b", *overrides)
    assert shortages(config, SEVEN_B)
    found = fitting_overrides(config, SEVEN_B)
    assert found
    assert keys <= set(found)
    given = [f"{key}={str(value).lower()}" for key, value in found.items()]
    assert shortages(planned("recipe=evisrag_7b", *overrides, *given), SEVEN_B) == []  # as a user would plan again
    for key in found.keys() - keys:  # none of them is needless
        kept = {name: value for name, value in found.items() if name != key}
        assert shortages(with_overrides(config, kept), SEVEN_B)
    text = render(config, SEVEN_B, "7B")
    assert "It fits with: " + " ".join(given) in text
    assert "One step" not in text


def test_hints_name_only_what_is_not_set_already():
    config = planned("recipe=evisrag_7b_lora", "plan.gpu_memory_gib=12", "learner.offload=true")
    (warning,) = [text for text in shortages(config, SEVEN_B) if "Try" in text]
    assert "max_tokens_per_micro_batch" in warning
    for already in ("learner.offload", "model.lora.rank", "sleep_level", "gradient_checkpointing"):
        assert already not in warning
    assert "It fits with none" in render(planned("recipe=evisrag_7b", "plan.gpu_memory_gib=4"), SEVEN_B, "7B")


def test_the_memory_of_a_node_is_checked_where_it_is_given():
    assert gib_warnings(planned("recipe=evisrag_7b", "plan.host_memory_gib=512")) == []
    (short,) = gib_warnings(planned("recipe=evisrag_7b", "plan.host_memory_gib=100", "learner.offload=true"))
    assert "of CPU memory needed > 100" in short


def test_learning_takes_four_forwards_with_recomputation_and_three_without():
    def learn_flops(*overrides: str) -> float:
        config = planned("recipe=evisrag_7b", *overrides)
        return next(phase.flops for phase in phases(config, SEVEN_B) if phase.name == "learn")

    config = planned("recipe=evisrag_7b")
    forward = 32 * SEVEN_B.group_flops(0.73 * 15_000, 0.46 * 1_536, 8)
    vision = 32 * 5 * SEVEN_B.image_flops(0.73 * config.inputs.max_pixels)
    assert learn_flops() == pytest.approx(4 * forward + vision)
    assert learn_flops("learner.gradient_checkpointing=none") == pytest.approx(3 * forward + vision)
    assert learn_flops("learner.gradient_checkpointing=every_n:2") == pytest.approx(3.5 * forward + vision)
    assert learn_flops("model.lora.rank=8") == pytest.approx(3 * forward + vision)


def test_an_unknown_gpu_is_refused():
    with pytest.raises(ConfigError, match=r"plan.gpu must be one of h100, .*'h1000'; did you mean h100"):
        planned("recipe=evisrag_7b", "plan.gpu=h1000")
