"""An index says which encoder made it, so that later commands need not; and one search for command line and page."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("sentence_transformers", reason="needs the retrieval extra")

from recipes import app, retrieve
from recipes.retrieval.answers.library import Library
from recipes.retrieval.command_line import open_library
from recipes.retrieval.encoders.base import EncoderSettings
from recipes.retrieval.search.index import VectorIndex
from recipes.retrieval.search.origin import recall, remember
from rsgrpo.errors import InputError
from tests.material.retrieval import QUIET, write_image, write_pdf
from tests.material.retrieval_models import save_late

SMALL = ["--max-pixels", "3136", "--device", "cpu"]


def test_what_the_command_line_says_goes_before_what_the_index_remembers(tmp_path):
    made = EncoderSettings("org/model", pooling="mean", max_pixels=5_000, batch_size=2, trust_remote_code=True)
    remember(tmp_path, made)
    asked = EncoderSettings("", dtype="bfloat16", device="cpu", batch_size=4)
    assert recall(tmp_path, asked) == EncoderSettings(  # consent is asked for each time
        "org/model", pooling="mean", max_pixels=5_000, dtype="bfloat16", device="cpu", batch_size=4
    )


def test_a_folder_is_remembered_wherever_it_is_named_from(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "index").mkdir()
    monkeypatch.chdir(tmp_path)
    remember(Path("index"), EncoderSettings("model"))
    assert recall(Path("index"), EncoderSettings("")).model == str(tmp_path / "model")
    (tmp_path / "model").rmdir()
    with pytest.raises(InputError, match=r"index was made with .*/model, which is gone; name the retriever"):
        recall(Path("index"), EncoderSettings(""))
    (tmp_path / "index" / "encoder.json").write_text("{")
    with pytest.raises(InputError, match=r"encoder\.json cannot be read: .*; name the retriever with --model"):
        recall(Path("index"), EncoderSettings(""))
    with pytest.raises(InputError, match=r"no page store nowhere; .*retrieve ingest FOLDER --out nowhere"):
        recall(Path("nowhere/index"), EncoderSettings(""))


def test_a_model_that_has_changed_since_is_refused_by_name(tiny_model_path, tmp_path, capsys):
    (tmp_path / "docs").mkdir()
    write_image(tmp_path / "docs" / "red.png", "red", 56, 56)
    store, model = str(tmp_path / "store"), tmp_path / "model"
    shutil.copytree(tiny_model_path, model)
    assert retrieve.main(["ingest", str(tmp_path / "docs"), "--out", store, "--workers", "1"]) == 0
    assert retrieve.main(["search", store, "red?"]) == 2
    assert "index yet; create it with `python -m recipes.retrieve index STORE --model MODEL`" in capsys.readouterr().err
    assert retrieve.main(["index", store, "--model", str(model), *SMALL]) == 0
    capsys.readouterr()
    assert retrieve.main(["search", store, "red?", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pages"][0]["document"] == "red.png"
    assert retrieve.main(["search", store, "red?", "--pooling", "mean"]) == 2
    assert "(pooling 'own or weighted_mean' -> 'mean')" in capsys.readouterr().err
    (model / "more.json").write_text("{}")
    assert retrieve.main(["search", store, "red?"]) == 2
    error = capsys.readouterr().err
    assert f"without --model, {model} is opened, but" in error
    assert "was made by another encoder (model" in error


def opened(store: Path, *options: str) -> Library:
    return open_library(app.parser().parse_args([str(store), *options]), QUIET)


def test_what_is_added_on_the_page_is_found_through_faiss_and_the_reranker(tiny_model_path, tmp_path):
    pytest.importorskip("faiss", reason="needs the retrieval extra")
    late = save_late(tiny_model_path, tmp_path / "late")
    how = ["--backend", "ivf", "--rerank-index", str(tmp_path / "late-index"), "--workers", "1", *SMALL]
    write_image(tmp_path / "red.png", "red", 56, 56)
    write_pdf(tmp_path / "two.pdf", ["one", "two"])
    library = opened(tmp_path / "store", "--model", tiny_model_path, "--rerank", late, *how)
    library.add([tmp_path / "red.png"])
    library.add([tmp_path / "two.pdf"])
    (asking,) = library.ask("page 1", 5, "multi_image")  # nobody answers: pages, and no more
    assert (len(asking.pages), asking.answered) == (3, None)
    assert len(VectorIndex.open(tmp_path / "late-index")) == 3
    assert asking.pages[0].score > 1  # a MaxSim over the query's tokens, no cosine
    trace = library.trace(asking)
    assert (trace["backend"], trace["result"], len(trace["pages"])) == ("ivf", None, 3)
    assert trace["reranker"] == json.loads((tmp_path / "late-index" / "manifest.json").read_text())["fingerprint"]

    remember(tmp_path / "late-index", EncoderSettings(late, kind="late", max_pixels=3_136))
    (again,) = opened(tmp_path / "store", *how[:4], "--device", "cpu").ask("page 1", 5, "multi_image")  # no model named
    assert again.pages == asking.pages
