"""Every kind of encoder, with a small real model of its own: nothing but the item itself decides its vector."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from tests.material import ROOT

pytest.importorskip("sentence_transformers", reason="needs the retrieval extra")

from recipes import retrieve
from recipes.retrieval.encoders.base import EncoderSettings, PageEncoder, identify
from recipes.retrieval.encoders.choice import load_encoder
from recipes.retrieval.encoders.imported import ImportedEncoder
from recipes.retrieval.pages.store import Page, PageStore
from tests.material.retrieval import coloured_store
from tests.material.retrieval_models import save_bert, save_clip, save_late
from tests.material.tiny_families import save_family

QUERIES = ["what amount is on page 2?", "7", "insufficient to answer"]
KINDS = {"qwen2.5": "image", "qwen3": "image", "clip": "image", "bert": "text", "late": "late"}


@pytest.fixture(scope="module")
def folders(tiny_model_path: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("kinds")
    return {
        "qwen2.5": tiny_model_path,
        "qwen3": save_family("qwen3_vl", tiny_model_path, folder / "qwen3"),
        "clip": save_clip(tiny_model_path, folder),
        "bert": save_bert(tiny_model_path, folder),
        "late": save_late(tiny_model_path, folder / "late"),
    }


@pytest.fixture(scope="module")
def pages(page_images: list[str]) -> list[Page]:
    texts = ["page 1", "code 4 amount 7 on page 2", "", "insufficient", "0 1 2 3"]
    return [
        Page(f"p{row}", "d", row + 1, path, 1, 1, text or "none")
        for row, (path, text) in enumerate(zip(page_images, texts, strict=True))
    ]


@cache
def load(folder: str, kind: Any, batch_size: int, pooling: Any = "") -> Any:
    sizes: dict[str, Any] = {"min_pixels": 32 * 32, "max_pixels": 16 * 32 * 32, "batch_size": batch_size}
    return load_encoder(EncoderSettings(folder, kind, pooling=pooling, device="cpu", **sizes))


def vectors(encoder: PageEncoder, pages: list[Page]) -> list[np.ndarray]:
    return encoder.encode_pages(pages) + encoder.encode_queries(QUERIES)


@pytest.mark.parametrize("name", KINDS)
def test_neither_batch_size_nor_padding_side_changes_a_vector(name, folders, pages, tmp_path):
    alone = load(folders[name], KINDS[name], 1)
    together = load(folders[name], KINDS[name], 8)
    again = identify(together.identity.settings)
    assert together.identity.fingerprint == alone.identity.fingerprint == again.fingerprint
    shutil.copytree(folders[name], tmp_path / "left")
    file = tmp_path / "left" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"padding_side": "left"}))
    left = load(str(tmp_path / "left"), KINDS[name], 8)
    side = left.model[0].tokenizer.padding_side
    assert side == ("right" if name in ("clip", "bert") else "left")  # where positions are absolute, left would harm
    wanted = vectors(alone, pages)
    for found in (vectors(together, pages), vectors(left, pages)):
        for one, other in zip(wanted, found, strict=True):
            np.testing.assert_allclose(other, one, atol=2e-6)


@pytest.mark.parametrize("name", KINDS)
def test_vectors_have_length_one_and_tell_items_apart(name, folders, pages):
    encoder = load(folders[name], KINDS[name], 4)
    found = vectors(encoder, pages)
    for vector in found:
        assert vector.dtype == np.float32
        assert (vector.ndim == 2) is encoder.identity.multi_vector
        np.testing.assert_allclose(np.linalg.norm(np.atleast_2d(vector), axis=1), 1, atol=1e-5)
    assert len({vector.tobytes() for vector in found}) == len(found)


def direct_pooling(hidden_TD: torch.Tensor, pooling: str) -> torch.Tensor:
    """The formulas, written out over one unpadded sequence."""
    weights = torch.arange(1, len(hidden_TD) + 1, dtype=torch.float32)
    pooled = {
        "weighted_mean": (weights[:, None] * hidden_TD).sum(0) / weights.sum(),
        "mean": hidden_TD.mean(0),
        "last": hidden_TD[-1],
        "cls": hidden_TD[0],
    }[pooling]
    return pooled / pooled.norm()


@pytest.mark.parametrize(
    ("name", "pooling"),
    [("qwen3", ""), ("qwen2.5", ""), ("qwen2.5", "mean"), ("qwen2.5", "last"), ("qwen2.5", "cls")],
)
def test_each_pooling_is_its_formula_over_the_models_hidden_states(folders, pages, name, pooling):
    encoder = load(folders[name], "image", 4, pooling)
    for page, vector in zip(pages, encoder.encode_pages(pages), strict=True):
        features = encoder.model.preprocess([encoder.identity.loader(page)])
        with torch.no_grad():
            hidden_TD = encoder.model[0](features)["token_embeddings"][0]
        np.testing.assert_allclose(vector, direct_pooling(hidden_TD, pooling or "weighted_mean").numpy(), atol=1e-6)


def test_a_page_is_cut_to_the_patches_of_its_family(folders):
    sizes = {name: identify(EncoderSettings(folders[name])).loader.factor for name in ("qwen2.5", "qwen3", "clip")}
    assert sizes == {"qwen2.5": 28, "qwen3": 32, "clip": 0}
    assert load(folders["qwen3"], "image", 1).identity.loader.resize(Image.new("RGB", (100, 150))).size == (96, 160)


REMOTE_CODE = """
from types import SimpleNamespace
import numpy as np, torch
from transformers import PretrainedConfig, PreTrainedModel
PREFIX = "Represent this query for retrieving relevant documents: "
COLOURS = {"red": (1, 0, 0), "lime": (0, 1, 0), "blue": (0, 0, 1)}
class ToyConfig(PretrainedConfig):
    model_type = "toy_retriever"
class Toy(PreTrainedModel):
    config_class = ToyConfig
    def __init__(self, config):
        super().__init__(config)
        self.scale = torch.nn.Parameter(torch.ones(1))
        self.post_init()
    def forward(self, text, image, tokenizer):
        rows = []
        for words, picture in zip(text, image):
            assert words.startswith(PREFIX) if picture is None else words == ""
            last = COLOURS[words[len(PREFIX):]] if picture is None else np.asarray(picture).mean((0, 1)) / 255
            rows.append([[9.0, 9.0, 9.0], [0.1, 0.1, 0.1], list(last)])
        states = torch.tensor(np.array(rows)).to(self.scale) * self.scale
        return SimpleNamespace(last_hidden_state=states, attention_mask=torch.tensor([[0, 1, 1]] * len(rows)))
"""


@pytest.fixture
def coloured(tmp_path: Path) -> Path:
    return coloured_store(tmp_path)


def test_a_model_of_remote_code_runs_out_of_process_by_consent_and_is_imported(
    coloured, tiny_model_path, tmp_path, capsys
):
    remote, out = tmp_path / "remote", tmp_path / "vectors"
    AutoTokenizer.from_pretrained(tiny_model_path).save_pretrained(remote)
    (remote / "toy.py").write_text(REMOTE_CODE)
    code = {"AutoConfig": "toy.ToyConfig", "AutoModel": "toy.Toy"}
    (remote / "config.json").write_text(json.dumps({"model_type": "toy_retriever", "auto_map": code}))
    torch.save({"scale": torch.ones(1)}, remote / "pytorch_model.bin")
    (tmp_path / "queries.jsonl").write_text("".join(json.dumps({"_id": c, "text": c}) + "\n" for c in ("blue", "red")))
    command = [sys.executable, str(ROOT / "recipes/retrieval/encoders/visrag_ret.py"), "--store", str(coloured)]
    command += ["--out", str(out), "--model", str(remote), "--queries", str(tmp_path / "queries.jsonl")]
    command += ["--batch-size", "2", "--part-pages", "2"]
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_MODULES_CACHE": str(tmp_path / "hf" / "modules")}

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *more], capture_output=True, text=True, env=environment, check=False)

    refused = run()
    assert refused.returncode == 2
    assert "add --trust-remote-code to allow it" in refused.stderr
    assert not out.exists()
    done = run("--trust-remote-code")
    assert done.returncode == 0, done.stderr
    assert not list(out.glob("part-*"))
    encoder = ImportedEncoder(EncoderSettings(str(out), "imported"))
    page = next(page for page in PageStore.open(coloured).pages() if page.document == "blue.png")
    wanted = np.array([0.1, 0.1, 2.1])  # weights 1 and 2 over (.1, .1, .1) and (0, 0, 1); the padding in front is out
    np.testing.assert_allclose(encoder.encode_pages([page])[0], wanted / np.linalg.norm(wanted), atol=3e-3)
    imported = ["--kind", "imported", "--model", str(out)]
    assert retrieve.main(["index", str(coloured), *imported]) == 0
    capsys.readouterr()
    assert retrieve.main(["search", str(coloured), *imported, "-k", "1", "--json", "blue", "red"]) == 0
    found = [json.loads(line)["pages"][0]["document"] for line in capsys.readouterr().out.splitlines()]
    assert found == ["blue.png", "red.png"]
    assert retrieve.main(["search", str(coloured), *imported, "lime"]) == 2
    assert "has no vector for 1 of 1 query keys, such as 'lime'" in capsys.readouterr().err
    assert retrieve.main(["index", str(coloured), *imported, "--workers", "2"]) == 2
    assert "--workers is for models" in capsys.readouterr().err


def test_candidates_are_reordered_by_late_interaction(coloured, folders, tmp_path, capsys):
    sizes = ["--min-pixels", "1024", "--max-pixels", "4096", "--device", "cpu"]
    late = ["--model", folders["late"], "--kind", "late", "--index", str(tmp_path / "late"), *sizes]
    first = ["--model", folders["clip"], *sizes]
    rerank = ["--rerank", folders["late"], "--rerank-index", str(tmp_path / "late"), "--candidates", "3"]
    for command in (late, first):
        assert retrieve.main(["index", str(coloured), *command]) == 0

    def search(*options: str) -> list[tuple[str, float]]:
        capsys.readouterr()
        assert retrieve.main(["search", str(coloured), *options, "-k", "3", "--json", "amount 7"]) == 0
        pages = json.loads(capsys.readouterr().out)["pages"]
        return [(page["document"], page["score"]) for page in pages]

    assert search(*first, *rerank) == search(*late)  # all pages are candidates, so MaxSim alone decides
    assert [score for _, score in search(*first)] != [score for _, score in search(*late)]
    assert len(search(*first, *rerank[:-1], "2")) == 3  # k wins over fewer candidates
    assert retrieve.main(["search", str(coloured), *first, "--rerank", folders["late"], "amount"]) == 2
    assert "--rerank needs --rerank-index" in capsys.readouterr().err
