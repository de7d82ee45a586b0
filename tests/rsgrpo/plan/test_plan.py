"""Bytes, FLOPs and warnings of a plan, against numbers worked out by hand and against transformers' own model."""

from __future__ import annotations

import pytest
import torch
from torch.utils._pytree import tree_leaves

from rsgrpo import cli
from rsgrpo.config.train import TrainConfig
from rsgrpo.errors import ConfigError
from rsgrpo.plan.__main__ import main, render
from rsgrpo.plan.config import PlanConfig
from rsgrpo.plan.fitting import fitting_overrides, idle, shortages, with_overrides
from rsgrpo.plan.memory import GIB, devices_memory, engine_memory, learner_memory, learner_moments, trainable_params
from rsgrpo.plan.model_sizes import sizes_of
from rsgrpo.plan.times import disk_bytes, num_devices, phases
from tests.material.learner import make_groups, make_learner
from tests.rsgrpo.plan.test_model_sizes import (
    SEVEN_B,
    SMALL,
)

TWO_NODES = ("recipe=evisrag_7b", "cluster.nodes=2", "cluster.gpus_per_node=8", "cluster.placement=disaggregated")


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


def test_turns_take_memory_and_time_by_hand():
    plain = planned("recipe=evisrag_7b", "learner.max_tokens_per_micro_batch=60000")
    turns = [
        "rollout.turns.environment=mine:Desk",
        "rollout.turns.max_observation_tokens=8000",
        "rollout.turns.max_images=4",
    ]
    desk = planned("recipe=evisrag_7b", "learner.max_tokens_per_micro_batch=60000", *turns)
    group = plain.rollout.group_size
    before, after = learner_memory(plain, SEVEN_B), learner_memory(desk, SEVEN_B)
    # One group of 11,000 + G x 9,536 tokens is over the budget: its parts have room for 60,000 / 2,000 images of turns.
    assert min(group * 4, 30) == 30
    assert after.learning["vision"] - before.learning["vision"] == pytest.approx((30 - 5 * 1) * 2000 * 3584 * 2 / GIB)
    seen = (
        engine_memory(desk, SEVEN_B).sampling["engine vision"] / engine_memory(plain, SEVEN_B).sampling["engine vision"]
    )
    assert seen == pytest.approx((5 + 4) / 5)
    work = {phase.name: phase.flops for phase in phases(plain, SEVEN_B)}
    more = {phase.name: phase.flops for phase in phases(desk, SEVEN_B)}
    assert more["sample: decode"] == work["sample: decode"]  # what is read is not decoded
    observed = 0.5 * 8000
    prompt, response = (fill * limit for fill, limit in ((0.73, plain.inputs.max_prompt_tokens), (0.46, 1536)))
    width = SEVEN_B.num_attention_layers * SEVEN_B.attention_width
    attention = 4 * width * observed * prompt + 2 * width * ((response + observed) ** 2 - response**2)
    images = 0.5 * 4 * SEVEN_B.image_flops(0.73 * plain.inputs.max_pixels)
    each = 2 * SEVEN_B.body_params * observed + attention + images
    sampled = plain.algorithm.prompts_per_step * group / 0.6  # the filter keeps six of ten groups
    assert more["sample: prefill"] - work["sample: prefill"] == pytest.approx(sampled * each, rel=1e-6)


# ---- the closed forms against transformers' own model ----------------------------------------------------------------


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


FIFTY_PAGES = (
    "recipe=evisrag_7b",
    "inputs.max_images=50",
    "inputs.max_prompt_tokens=102000",
    "learner.max_tokens_per_micro_batch=114288",
    "cluster.gpus_per_node=8",
    "rollout.num_workers=2",
    "rollout.vllm.tensor_parallel_size=4",  # for the cache and the images of one such prompt
)


def test_prompts_of_fifty_pages_are_given_teams_of_ranks_that_share_their_rows():
    config = planned(*FIFTY_PAGES)
    assert shortages(config, SEVEN_B)
    found = fitting_overrides(config, SEVEN_B)
    assert found == {"learner.context_parallel": 2}
    team = planned(*FIFTY_PAGES, "learner.context_parallel=2")
    assert shortages(team, SEVEN_B) == []
    one, two = (learner_moments(each, SEVEN_B)["layer"] for each in (config, team))
    assert two["activations"] / one["activations"] == pytest.approx((114_288 + 1_536) / 2 / 114_288)
    # Four responses of a rank, its slices and the last token; a sum and what was gathered: of 2 x 512 values a token.
    assert two["keys of other ranks"] == pytest.approx((4 + 2 + 2) * 2 * 2 * 512 * 102_000 / GIB)
    assert one["keys of other ranks"] == 0
    # 28 layers of 2 KiB a token, forward, recomputed and backward, half of it from the other rank, at 100 GB/s.
    [exchange] = [phase for phase in phases(team, SEVEN_B) if phase.name == "learn: keys of other ranks"]
    assert exchange.seconds == pytest.approx(32 * 2 / 8 * 3 / 2 * 0.73 * 102_000 * 28 * 2048 / 100e9)


def test_teams_are_refused_where_layers_carry_a_state():
    sizes = sizes_of(planned("recipe=qwen3_5_9b").model.path)[0]
    assert shortages(planned("recipe=qwen3_5_9b"), sizes) == []
    [refused] = shortages(planned("recipe=qwen3_5_9b", "learner.context_parallel=2"), sizes)
    assert "layers of this model carry a recurrent state" in refused


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
    with pytest.raises(ConfigError, match=r"'a6000'; did you mean \S+\? For another GPU, .* set plan.gpu_memory_gib"):
        planned("recipe=evisrag_7b", "plan.gpu=a6000")
