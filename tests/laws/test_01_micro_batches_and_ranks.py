"""Law 1: the update depends neither on how its work is cut into micro-batches nor on the number of ranks."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import socket
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rsgrpo.config.train import AlgorithmConfig, LoraConfig
from rsgrpo.learning.learner import Learner, init_distributed
from tests.material.learner import learnt, make_conversations, make_groups, make_learner, with_experts
from tests.material.tiny_families import save_family

WEIGHTS = [1.0, 2.0]
CASES: dict[str, dict[str, Any]] = {
    "frozen tower, parts of groups": {"counts": [2, 0, 5, 1], "max_tokens_per_micro_batch": 76},
    "trained tower": {"counts": [2, 0, 0], "freeze_vision": False},
    "fewer groups than ranks, trained tower": {"counts": [1], "freeze_vision": False},
    "prefetched": {"counts": [2, 0, 5, 1], "prefetch": True, "vision_cache_mb": 0},
    "conversations": {"counts": [1, 0], "conversations": True, "max_tokens_per_micro_batch": 200},
    "conversations, trained tower": {"counts": [0], "conversations": True, "freeze_vision": False},
    "tied head": {"counts": [1, 2, 0], "tied": True},
    "LoRA": {"counts": [1, 2, 0], "lora": LoraConfig(rank=2)},
    "mixture of experts, balanced, replayed": {
        "counts": [1, 2, 0],
        "family": "qwen3_vl_moe",
        "balance_coef": 0.5,
        "replayed": True,
    },
    # The other rank computes two tokens, and most experts get none there.
    "mixture of experts, a rank without work": {"counts": [0], "family": "qwen3_5_moe"},
    "GSPO, two updates": {
        "counts": [1, 2, 3],
        "algorithm": AlgorithmConfig(ratio="gspo", updates_per_step=2, entropy_coef=0.01),
    },
}


def run_case(case: dict[str, Any], path: str, images: list[str], folder: Path, rank: int, world_size: int) -> Any:
    """Return what a learner of this case reports and ends with, its state saved after the first update."""
    options = dict(case)
    counts, converse = options.pop("counts"), options.pop("conversations", False)
    path = tied_folder(path, folder.parent) if options.pop("tied", False) else path
    path = str(folder.parent / options.pop("family")) if "family" in options else path
    prefetch, replayed = options.pop("prefetch", False), options.pop("replayed", False)
    learner = make_learner(path, rank=rank, world_size=world_size, num_ranks=world_size, **options)
    groups = make_conversations(learner.encoder, images, counts) if converse else make_groups(images, counts)
    groups = with_experts(learner.encoder, groups) if replayed else groups
    before = weights_of(learner)
    if prefetch:
        learner.prefetch([group.prompt for group in groups])
    first = learner.update(groups, WEIGHTS)
    learner.begin_save(folder)  # what is learned while it is written is not in it
    second = learner.update(groups, WEIGHTS)
    while not learner.is_saved():
        time.sleep(0.01)
    logprobs = learner.logprobs(groups)
    after = weights_of(learner)
    return {"before": before, "after": after, "metrics": [first, second], "logprobs": logprobs}


def tied_folder(path: str, parent: Path) -> str:
    """Return a copy of the model folder whose head is its embedding, made once."""
    folder = parent / "tied"
    if not folder.exists():
        shutil.copytree(path, folder)
        config = json.loads((folder / "config.json").read_text())
        config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
        (folder / "config.json").write_text(json.dumps(config))
        tensors = load_file(folder / "model.safetensors")
        del tensors["lm_head.weight"]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def rank_main(rank: int, world_size: int, port: int, path: str, images: list[str], folder: Path) -> None:
    try:
        torch.set_num_threads(1)
        init_distributed(rank, world_size, "127.0.0.1", port, "cpu")
        results = {name: run_case(case, path, images, folder / name, rank, world_size) for name, case in CASES.items()}
        learner = make_learner(path, rank=rank, world_size=world_size)
        learner.load(folder / "of one rank")
        groups = make_groups(images, [1, 2])
        results["resumed"] = {"metrics": learner.update(groups, WEIGHTS)}
        learner.export(folder / "export")
        torch.save(results, folder / f"results_{rank}.pt")
    except BaseException:
        (folder / f"error_{rank}.txt").write_text(traceback.format_exc())
        raise


@pytest.fixture(scope="module")
def outcome(tiny_model_path, page_images, tmp_path_factory) -> tuple[Path, list[dict[str, Any]], dict[str, Any]]:
    """Run every case on two ranks and then on one; return the folder, each rank's results, and the one's."""
    folder = tmp_path_factory.mktemp("ranks")
    tied_folder(tiny_model_path, folder)
    for case in CASES.values():
        if "family" in case:
            save_family(case["family"], tiny_model_path, folder / case["family"])
    one = make_learner(tiny_model_path)
    one.update(make_groups(page_images, [1, 2]), WEIGHTS)
    one.save(folder / "of one rank")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    ranks = [
        context.Process(target=rank_main, args=(rank, 2, port, tiny_model_path, page_images, folder))
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(300)
    errors = [path.read_text() for path in sorted(folder.glob("error_*.txt"))]
    assert [process.exitcode for process in ranks] == [0, 0], "\n".join(errors)
    two = [torch.load(folder / f"results_{rank}.pt", weights_only=False) for rank in range(2)]
    alone = {
        name: run_case(case, tiny_model_path, page_images, folder / f"{name} alone", 0, 1)
        for name, case in CASES.items()
    }
    alone["resumed"] = {"metrics": one.update(make_groups(page_images, [1, 2]), WEIGHTS)}
    return folder, two, alone


def weights_of(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in learner.gather_weights()}


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], start: dict[str, torch.Tensor]) -> float:
    """Return the largest relative difference between two updates of the same start."""
    assert one.keys() == other.keys()
    return max(float((one[n] - other[n]).norm() / ((one[n] - start[n]).norm() + 1e-9)) for n in one)


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens_per_micro_batch": 76},  # parts of groups
        {"max_tokens_per_micro_batch": 120},
        {"logits_chunk_tokens": 5, "gradient_checkpointing": "none"},
        {"vision_cache_mb": 0},
    ],
    ids=str,
)
@pytest.mark.parametrize("algorithm", [AlgorithmConfig(), AlgorithmConfig(ratio="gspo", on_policy_shortcut=False)])
def test_the_update_does_not_depend_on_how_the_work_is_cut(options, algorithm, tiny_model_path, page_images):
    groups = make_groups(page_images, [2, 0, 5, 1])
    whole = make_learner(tiny_model_path, algorithm=algorithm, max_tokens_per_micro_batch=100_000)
    start = weights_of(whole)
    metrics = whole.update(groups, WEIGHTS)
    cut = make_learner(tiny_model_path, algorithm=algorithm, **options)
    cut_metrics = cut.update(groups, WEIGHTS)
    assert difference(weights_of(whole), weights_of(cut), start) < 1e-5
    assert learnt(cut_metrics) == pytest.approx(learnt(metrics), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_make_the_update_of_one(name, outcome):
    _, (first, second), alone = outcome
    assert second[name]["after"] == {}  # only rank 0 is given tensors
    assert first[name]["metrics"] == second[name]["metrics"]
    for mine, theirs in zip(first[name]["metrics"], alone[name]["metrics"], strict=True):
        of_micro_batch = {key: value for key, value in mine.items() if key == "actor/expert_load_max"}
        assert learnt(mine) == pytest.approx(learnt(theirs) | of_micro_batch, rel=1e-5, abs=1e-6)
    assert first[name]["after"].keys() == alone[name]["after"].keys()
    for parameter, start in alone[name]["before"].items():
        step = (alone[name]["after"][parameter] - start).norm()
        gap = (alone[name]["after"][parameter] - first[name]["after"][parameter]).norm()
        assert gap <= 1e-5 * step + 1e-8, parameter


@pytest.mark.parametrize("name", CASES)
def test_both_ranks_are_given_all_logprobs(name, outcome):
    _, (first, second), alone = outcome
    for ranks in (first, second):
        for group, expected in zip(ranks[name]["logprobs"], alone[name]["logprobs"], strict=True):
            for logprobs_T, expected_T in zip(group, expected, strict=True):
                np.testing.assert_allclose(logprobs_T, expected_T, atol=1e-5)


def test_ranks_share_the_decoding_of_prompts_and_the_tower(outcome):
    _, (first, _), alone = outcome
    for num_ranks, ranks in ((2, first), (1, alone)):
        metrics = ranks["prefetched"]["metrics"][0]
        assert metrics["perf/prompts_encoded"] == 4
        assert metrics["perf/images_encoded"] == 8 + num_ranks  # nothing is cached; each rank's self-check ran one page


def test_state_of_two_ranks_goes_on_with_one(tiny_model_path, page_images, outcome):
    folder, (first, _), _ = outcome
    name = "frozen tower, parts of groups"
    learner = make_learner(tiny_model_path, max_tokens_per_micro_batch=76)
    learner.load(folder / name)
    assert learner.weights_version == 1
    metrics = learner.update(make_groups(page_images, CASES[name]["counts"]), WEIGHTS)
    assert learnt(metrics) == pytest.approx(learnt(first[name]["metrics"][1]), rel=1e-5, abs=1e-6)


def test_state_of_one_rank_goes_on_with_two(outcome):
    _, (first, _), alone = outcome
    assert learnt(first["resumed"]["metrics"]) == pytest.approx(learnt(alone["resumed"]["metrics"]), rel=1e-5, abs=1e-6)


def test_two_ranks_export_one_folder(outcome):
    folder, _, _ = outcome
    learner = make_learner(str(folder / "export"))
    assert sum(1 for _ in learner.gather_weights()) == 27
