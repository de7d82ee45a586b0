"""Bytes, FLOPs and warnings of a plan, against numbers worked out by hand and against transformers' own model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rsgrpo import cli
from rsgrpo.config import TrainConfig
from rsgrpo.errors import ConfigError
from rsgrpo.plan import (
    GIB,
    PlanConfig,
    devices_memory,
    engine_memory,
    learner_memory,
    main,
    num_devices,
    phases,
    trainable_params,
    warnings,
)
from rsgrpo.shapes import KNOWN, Shapes, shapes_of

# h 8, L 2, 2 heads, 1 kv head (width 4), inner 16, vocabulary 10.
SMALL = Shapes(8, 2, 2, 1, 16, 10, False)


def planned(*overrides: str) -> PlanConfig:
    return cli.compose(PlanConfig, "config", overrides)


def gib_warnings(config: PlanConfig) -> list[str]:
    return warnings(config, shapes_of(config.model.path)[0])


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


def test_parameters_of_the_known_sizes_are_those_of_transformers():
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    for size, total in (("3b", 3_754_622_976), ("7b", 8_292_166_656)):
        shapes = KNOWN[size]
        text = {
            "hidden_size": shapes.hidden_size,
            "num_hidden_layers": shapes.num_layers,
            "num_attention_heads": shapes.num_heads,
            "num_key_value_heads": shapes.num_kv_heads,
            "intermediate_size": shapes.intermediate_size,
            "vocab_size": shapes.vocab_size,
            "tie_word_embeddings": shapes.tied_embeddings,
        }
        vision = {
            "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
            "out_hidden_size": shapes.hidden_size,
        }  # fmt: skip
        config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=shapes.tied_embeddings)
        with torch.device("meta"):
            model = Qwen2_5_VLForConditionalGeneration(config)
        assert sum(parameter.numel() for parameter in model.parameters()) == total
        assert shapes.language_params + shapes.vision_params == total


def test_sizes_are_read_from_the_models_own_folder(tiny_model_path):
    from safetensors import safe_open

    shapes, source = shapes_of(tiny_model_path)
    with safe_open(Path(tiny_model_path) / "model.safetensors", framework="pt") as weights:
        total = sum(weights.get_tensor(name).numel() for name in weights.keys())  # noqa: SIM118
    assert shapes.language_params + shapes.vision_params == total
    assert source.endswith("config.json")


def test_the_hubs_flat_config_is_read_too(tmp_path):
    flat = {
        "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "intermediate_size": 16, "vocab_size": 10, "tie_word_embeddings": False,
        "vision_config": {
            "hidden_size": 1280, "depth": 32, "intermediate_size": 3420, "fullatt_block_indexes": [7, 15, 23, 31],
            "patch_size": 14, "window_size": 112,
        },
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(flat))
    assert shapes_of(str(tmp_path))[0] == SMALL


def test_an_unknown_model_is_refused_with_what_a_plan_needs():
    with pytest.raises(ConfigError, match=r"needs its config.json, or 3B, 7B, 32B or 72B in its name"):
        shapes_of("runs/mystery/export")


def test_flops_of_a_prompt_and_of_a_group_by_hand():
    body = SMALL.body_params
    # P 3 alone: 2N*3 + 2*L*d*9 = 6N + 288
    assert SMALL.group_flops(3, 0, 1) == 6 * body + 288
    # with G 2 responses of R 5: 2N*10 more, attention 2*(4*16*5*3 + 2*16*25) more, head 2*8*10*2*5 more
    assert SMALL.group_flops(3, 5, 2) == 6 * body + 288 + 20 * body + 2 * (960 + 800) + 1600


def test_sharing_the_prompt_saves_what_the_closed_form_says():
    shapes, prompt, response, group = KNOWN["7b"], 11_000, 700, 8
    shared = shapes.group_flops(prompt, response, group)
    one_by_one = group * shapes.group_flops(prompt, response, 1)
    assert 5.0 < one_by_one / shared < 6.0
    assert shapes.group_flops(prompt, response, 1) == pytest.approx(
        shapes.group_flops(prompt + response, 0, 1), rel=0.02
    )


def test_memory_of_a_full_learner_by_hand():
    config = planned("recipe=evisrag_7b")
    memory = learner_memory(config, KNOWN["7b"])
    assert memory.static["weights (float32)"] == pytest.approx(7_615_616_512 * 4 / 8 / GIB)
    assert memory.static["optimiser"] == pytest.approx(2 * memory.static["weights (float32)"])
    assert memory.static["frozen vision tower"] == pytest.approx(676_550_144 * 2 / GIB)
    assert memory.learning["gradients"] == pytest.approx(memory.static["weights (float32)"])
    assert memory.learning["logits"] == pytest.approx(2048 * 152_064 * 12 / GIB)


def test_more_ranks_divide_the_state_and_offload_removes_it():
    eight = learner_memory(planned("recipe=evisrag_7b"), KNOWN["7b"])
    sixteen = learner_memory(planned("recipe=evisrag_7b", "learner.num_ranks=16"), KNOWN["7b"])
    away = learner_memory(planned("recipe=evisrag_7b", "learner.offload=true"), KNOWN["7b"])
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
    assert sum(engine_memory(asleep, KNOWN["7b"]).sampling.values()) == pytest.approx(taken)
    assert sum(engine_memory(awake, KNOWN["7b"]).static.values()) == pytest.approx(taken)
    peaks = [devices_memory(config, KNOWN["7b"])["learner and engine"].peak for config in (asleep, awake)]
    assert peaks[0] < peaks[1]


def test_what_does_not_fit_is_said_with_the_arithmetic():
    (warning,) = gib_warnings(planned("recipe=evisrag_7b", "learner.num_ranks=1", "rollout.num_workers=1"))
    assert "> 0.94 x 80 GiB = 75.2" in warning
    assert "learner.num_ranks" in warning


def test_a_cache_too_small_for_one_response_is_said():
    (warning,) = gib_warnings(planned("recipe=evisrag_7b", "rollout.vllm.kv_cache_gib=0.5"))
    # 16,536 tokens x 57,344 bytes
    assert "0.50 GiB does not hold one response of full length (0.88 GiB)" in warning


def test_devices_are_counted_against_the_cluster():
    two_nodes = [
        "recipe=evisrag_7b", "cluster.nodes=2", "cluster.gpus_per_node=8", "cluster.placement=disaggregated",
        "rollout.num_workers=4", "rollout.vllm.tensor_parallel_size=2",
    ]  # fmt: skip
    assert num_devices(planned(*two_nodes)) == 16
    assert gib_warnings(planned(*two_nodes)) == []
    (idle,) = gib_warnings(planned(*two_nodes, "rollout.num_workers=2"))
    assert "the workers take 12 of 2 x 8 = 16 GPUs: 4 stay idle" in idle
    (short,) = gib_warnings(planned(*two_nodes, "rollout.num_workers=8"))
    assert "take 24 GPUs, the cluster has 2 x 8 = 16" in short


def test_passes_are_planned_only_where_they_are_run():
    def names(*overrides: str) -> list[str]:
        return [phase.name for phase in phases(planned("recipe=evisrag_7b", *overrides), KNOWN["7b"])]

    plain = ["sample: prefill", "sample: decode", "learn", "weight sync"]
    assert names() == plain
    assert names("algorithm.kl_coef=0.01") == [*plain[:2], "reference", *plain[2:]]
    assert names("algorithm.updates_per_step=4") == [*plain[:2], "old log-probabilities", *plain[2:]]
    assert names("rollout=fake") == plain[2:]


def test_learning_takes_four_forwards_with_recomputation_and_three_without():
    def learn_flops(*overrides: str) -> float:
        config = planned("recipe=evisrag_7b", *overrides)
        return next(phase.flops for phase in phases(config, KNOWN["7b"]) if phase.name == "learn")

    config = planned("recipe=evisrag_7b")
    forward = 32 * KNOWN["7b"].group_flops(0.73 * 15_000, 0.46 * 1_536, 8)
    vision = 32 * 5 * KNOWN["7b"].image_flops(0.73 * config.inputs.max_pixels)
    assert learn_flops() == pytest.approx(4 * forward + vision)
    assert learn_flops("learner.gradient_checkpointing=false") == pytest.approx(3 * forward + vision)
    assert learn_flops("model.lora.rank=8") == pytest.approx(3 * forward + vision)


def test_an_unknown_gpu_is_refused():
    with pytest.raises(ConfigError, match=r"plan.gpu must be one of h100, .*'h1000'; did you mean h100"):
        planned("recipe=evisrag_7b", "plan.gpu=h1000")
