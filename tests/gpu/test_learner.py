"""What of the learner needs CUDA: flash kernels, bfloat16 against plain rows, offload, several steps."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn
from torch.utils._python_dispatch import TorchDispatchMode

from rsgrpo.learning.attention import PrefixRow, prefix_sdpa, prefix_varlen
from rsgrpo.learning.fsdp import init_distributed
from rsgrpo.types import PrefixLayout
from tests.material.learner import make_groups, make_learner
from tests.material.tiny_families import save_family

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


@pytest.fixture(scope="module", autouse=True)
def process_group() -> None:
    """Both back ends: learners on CUDA and on CPU share the process."""
    if not dist.is_initialized():
        init_distributed(0, 1, "", 0, "cuda")


LAYOUT = PrefixLayout((300, 17), ((70, 5, 64), (33,)))


class AttentionOps(TorchDispatchMode):
    """Notes the names of attention kernels that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "attention" in str(func):
            self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def states(dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    num_tokens = sum(LAYOUT.prompt_lengths) + sum(sum(lengths) for lengths in LAYOUT.response_lengths)
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, heads, num_tokens, 64, generator=generator).to(device, dtype).requires_grad_()
        for heads in (8, 2, 2)
    ]


def run(attention: Any, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    query, key, value = states(dtype, device)
    row = PrefixRow(LAYOUT, torch.device(device), dtype)
    output = attention(query, key, value, row)
    output.float().square().sum().backward()
    return output.detach().float().cpu(), [state.grad.float().cpu() for state in (query, key, value)]  # type: ignore[union-attr]


def test_every_segment_runs_on_a_kernel_without_a_dense_mask():
    with AttentionOps() as ops:
        run(prefix_sdpa, torch.bfloat16, "cuda")
    assert any("flash" in name or "cudnn" in name for name in ops.names)
    assert not any("math" in name or "efficient" in name for name in ops.names), ops.names


@pytest.mark.parametrize("attention", [prefix_sdpa, prefix_varlen])
def test_the_back_ends_agree_with_the_processor(attention):
    if attention is prefix_varlen:
        pytest.importorskip("flash_attn")
    expected, expected_gradients = run(prefix_sdpa, torch.float32, "cpu")
    output, gradients = run(attention, torch.bfloat16, "cuda")
    torch.testing.assert_close(output, expected, atol=2e-2, rtol=2e-2)
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        assert (found - wanted).norm() < 2e-2 * wanted.norm()


@pytest.mark.parametrize("options", [{"precision": "float32"}, {"precision": "bfloat16"}, {"offload": True}], ids=str)
def test_updates_follow_those_of_the_processor(options, tiny_model_path, page_images):
    groups = make_groups(page_images, [2, 0, 5])
    expected = make_learner(tiny_model_path)
    found = make_learner(tiny_model_path, device="cuda", **options)
    for _ in range(2):
        wanted, got = expected.update(groups, [1.0, 2.0]), found.update(groups, [1.0, 2.0])
        tolerance = 1e-3 if options == {"precision": "float32"} or "offload" in options else 0.1
        assert got["actor/grad_norm"] == pytest.approx(wanted["actor/grad_norm"], rel=tolerance)
        assert got["actor/entropy"] == pytest.approx(wanted["actor/entropy"], rel=tolerance)


def test_forked_states_agree_with_the_processor(tiny_model_path, page_images, tmp_path):
    """By flash-linear-attention's kernels where they are installed; on the processor by transformers' own."""
    path = save_family("qwen3_5", tiny_model_path, tmp_path)
    groups = make_groups(page_images, [2, 0, 3])
    expected, found = make_learner(path), make_learner(path, device="cuda")
    for _ in range(2):
        wanted, got = expected.update(groups, [1.0, 2.0]), found.update(groups, [1.0, 2.0])
        assert got["actor/grad_norm"] == pytest.approx(wanted["actor/grad_norm"], rel=1e-2)
    for mine, theirs in zip(found.logprobs(groups), expected.logprobs(groups), strict=True):
        assert all(abs(a - b).max() < 2e-2 for a, b in zip(mine, theirs, strict=True))


def team_main(rank: int, port: int, path: str, images: list[str], folder: Path) -> None:
    torch.cuda.set_device(rank)
    init_distributed(rank, 2, "127.0.0.1", port, "cuda")
    options: dict[str, Any] = {"device": "cuda", "precision": "bfloat16", "num_ranks": 2, "context_parallel": 2}
    made = make_learner(path, rank=rank, world_size=2, **options)
    groups = make_groups(images, [2, 0, 5, 1])
    metrics = made.update(groups, [1.0, 2.0])
    torch.save((metrics["actor/grad_norm"], made.logprobs(groups)), folder / f"{rank}.pt")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_share_a_row(tiny_model_path, page_images, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn(team_main, (port, tiny_model_path, page_images, tmp_path), nprocs=2)
    one = make_learner(tiny_model_path, device="cuda", precision="bfloat16")
    groups = make_groups(page_images, [2, 0, 5, 1])
    norm = one.update(groups, [1.0, 2.0])["actor/grad_norm"]
    expected = one.logprobs(groups)
    for rank in range(2):
        found, logprobs = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert found == pytest.approx(norm, rel=0.02)
        for mine, theirs in zip(logprobs, expected, strict=True):
            assert all(abs(a - b).mean() < 0.05 for a, b in zip(mine, theirs, strict=True))
