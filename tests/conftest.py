"""Shared test material: a small random Qwen2.5-VL and a few page images, made once per session."""

from __future__ import annotations

import os
import secrets

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # else Ray writes one into the home folder
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "PYTEST_XDIST_WORKER" in os.environ:  # the cores are shared with other processes of tests
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import shutil
from pathlib import Path

import numpy as np
import pytest

CORPUS = [
    "<observe>page 1 shows a code 4 and an amount 7</observe>\n<evidence>\n[1]: code 4 amount 7\n"
    "[2]: no relevant information\n</evidence>\n<think>The amount is on page 1</think>\n<answer>7</answer>",
    "[1][2][3] what amount is on page 2? insufficient to answer 0 1 2 3 4 5 6 7 8 9",
] * 20

TESTS = Path(__file__).parent
LONGEST_FIRST = ("runs/test_train.py", "runs", "rsgrpo/cluster", "rollout", "laws", "recipes", "rsgrpo")
"""Files and folders that `make test` shares out first, so that no process of tests ends long after the others."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put long files first; tests keep their order otherwise."""

    def rank(item: pytest.Item) -> int:
        path = item.path.relative_to(TESTS)
        ranks = (n for n, first in enumerate(LONGEST_FIRST) if path.is_relative_to(first))
        return next(ranks, len(LONGEST_FIRST))

    items.sort(key=rank)


@pytest.fixture(scope="session")
def tiny_model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a random two-layer Qwen2.5-VL (hidden 64, 400 tokens)."""
    from recipes.demo.model import build_model, save_model_folder, train_tokenizer

    folder = tmp_path_factory.mktemp("tiny-model")
    tokenizer = train_tokenizer(CORPUS, vocab_size=400)
    model = build_model(tokenizer, hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=1, vision_hidden_size=64)
    save_model_folder(model, tokenizer, folder)
    return str(folder)


@pytest.fixture(scope="session")
def attentive_model_path(tiny_model_path: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny model that attends strongly to strong image features: a random model hardly looks at them otherwise."""
    import torch
    from transformers import AutoModelForImageTextToText

    folder = tmp_path_factory.mktemp("attentive-model") / "model"
    shutil.copytree(tiny_model_path, folder)
    model = AutoModelForImageTextToText.from_pretrained(tiny_model_path, dtype=torch.float32)
    with torch.no_grad():
        model.model.visual.merger.mlp[2].weight *= 30
        for layer in model.model.language_model.layers:
            layer.self_attn.v_proj.weight *= 10
            layer.self_attn.o_proj.weight *= 10
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def page_images(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Paths of five noise pages of different shapes."""
    from PIL import Image

    folder: Path = tmp_path_factory.mktemp("pages")
    rng = np.random.default_rng(0)
    paths = []
    for index, (height, width) in enumerate([(56, 84), (112, 56), (84, 84), (28, 56), (60, 100)]):
        path = folder / f"page{index}.png"
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(path)
        paths.append(str(path))
    return paths
