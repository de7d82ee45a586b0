"""Encoders: VisRAG's pooling against its formula, batches and padding that change nothing, late interaction."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("sentence_transformers", reason="needs the retrieval extra")

from sentence_transformers import MultiVectorEncoder

from recipes import retrieve
from recipes.retrieval.encoders.base import VISRAG_QUERY_PREFIX, EncoderError, EncoderSettings, identify
from recipes.retrieval.encoders.choice import load_encoder
from recipes.retrieval.encoders.digest import edges_digest, folder_digest
from recipes.retrieval.encoders.sentence import LateEncoder, SentenceEncoder
from recipes.retrieval.pages.store import Page, PageStore
from recipes.retrieval.search.index import VectorIndex
from recipes.retrieval.search.retriever import Retriever
from recipes.retrieval.search.update import UpdateReport, encode_here, fill_index
from rsgrpo.errors import RsgrpoError
from tests.material.retrieval import QUIET, coloured_store, ingested, stop_python, write_image, write_pdf

PIXELS = {"min_pixels": 784, "max_pixels": 784 * 16}


def settings(path: str, **changes: Any) -> EncoderSettings:
    return EncoderSettings(path, **(PIXELS | {"device": "cpu"} | changes))


def updated(store: Path, encoder: SentenceEncoder, index: VectorIndex, size: int) -> UpdateReport:
    """Bring an index in line with a store, with batches and shards of `size` pages."""
    stream = partial(encode_here, encoder, batch_pages=size)
    return fill_index(PageStore.open(store), index, stream, shard_pages=size, console=QUIET)


@pytest.fixture(scope="module")
def pages(page_images: list[str]) -> list[Page]:
    return [Page(f"p{row}", "d", row + 1, path, 1, 1, "") for row, path in enumerate(page_images)]


@pytest.fixture(scope="module")
def encoder(tiny_model_path: str) -> SentenceEncoder:
    return SentenceEncoder(settings(tiny_model_path))


def test_a_query_has_the_prefix_of_visrag(tiny_model_path, encoder):
    bare = SentenceEncoder(settings(tiny_model_path, query_prefix=""))
    np.testing.assert_allclose(
        encoder.encode_queries(["amount"])[0], bare.encode_queries([VISRAG_QUERY_PREFIX + "amount"])[0], atol=1e-6
    )
    assert bare.identity.fingerprint != encoder.identity.fingerprint


def test_a_page_is_resized_once_and_by_our_rule(encoder, pages):
    features = encoder.model.preprocess([encoder.identity.loader.resize(Image.new("RGB", (100, 150)))])
    # 112 x 140 is over 12,544 pixels: shrink by sqrt(15000/12544) = 1.0935 to 91.4 x 137.2, down to 84 x 112
    assert features["image_grid_thw"].tolist() == [[1, 8, 6]]


def test_the_fingerprint_changes_with_weights_and_settings(tiny_model_path, encoder, tmp_path):
    def fingerprint(path: str, **changes: Any) -> str:
        return identify(settings(path, **changes)).fingerprint

    own, folder = encoder.identity.fingerprint, tmp_path / "model"
    assert fingerprint(tiny_model_path, batch_size=1, device="") == own
    assert own not in (fingerprint(tiny_model_path, pooling="mean"), fingerprint(tiny_model_path, max_pixels=784))
    shutil.copytree(tiny_model_path, folder)
    assert fingerprint(str(folder)) == own
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-3] ^= 1
    (folder / "model.safetensors").write_bytes(bytes(weights))
    assert fingerprint(str(folder)) != own


def test_every_byte_of_a_large_file_of_weights_counts(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "model").mkdir()
    weights, content = tmp_path / "model" / "model.safetensors", bytearray(3 << 20)
    weights.write_bytes(content)
    first = folder_digest(tmp_path / "model")
    assert folder_digest(tmp_path / "model") == first  # from the cache
    content[len(content) // 2] = 1
    weights.write_bytes(content)
    os.utime(weights, ns=(0, 0))
    assert folder_digest(tmp_path / "model") != first


def test_an_index_of_an_earlier_release_is_still_opened(tiny_model_path, encoder, caplog):
    identity = identify(settings(tiny_model_path))
    before = replace(identity, description=dict(identity.description) | {"model": edges_digest(Path(tiny_model_path))})
    assert identity.is_known_as(before.fingerprint)
    assert "did not compare all weights" in caplog.text
    other = replace(identity, description=dict(identity.description) | {"model": "another"})
    assert not identity.is_known_as(other.fingerprint)


def test_a_model_that_cannot_do_what_is_asked_is_refused(tmp_path, encoder, pages):
    with pytest.raises(EncoderError, match="not a model folder"):
        load_encoder(settings(str(tmp_path)))
    with pytest.raises(EncoderError, match="not a folder and cannot be downloaded"):
        load_encoder(settings("someone/nothing"))
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(EncoderError, match=r"page x of d: .*; delete .* and ingest again"):
        encoder.encode_pages([Page("x", "d", 1, str(tmp_path / "bad.png"), 1, 1, "")])
    encoder.model.save(str(tmp_path / "saved"))
    with pytest.raises(EncoderError, match="which fixes the pooling"):
        load_encoder(settings(str(tmp_path / "saved"), pooling="mean"))
    saved = load_encoder(settings(str(tmp_path / "saved"), query_prefix=VISRAG_QUERY_PREFIX))
    np.testing.assert_allclose(np.stack(saved.encode_pages(pages)), np.stack(encoder.encode_pages(pages)), atol=1e-6)


def test_a_damaged_model_or_a_device_that_is_not_there_is_one_line(tmp_path, tiny_model_path, encoder):
    encoder.model.save(str(tmp_path / "whole"))
    for name, size, fault in (
        ("model.safetensors", 1000, "cannot be loaded: SafetensorError"),
        ("config.json", 1, "cannot be loaded: OSError"),
        ("modules.json", 0, "cannot be loaded: ValueError"),
    ):  # fmt: skip
        shutil.copytree(tmp_path / "whole", tmp_path / name)
        file = tmp_path / name / name
        file.write_bytes(file.read_bytes()[:size] if size else b"{}")
        with pytest.raises(EncoderError, match=fault):
            load_encoder(settings(str(tmp_path / name)))
    (tmp_path / "whole" / "retriever.json").write_text("{")
    with pytest.raises(EncoderError, match=r"retriever\.json cannot be read: .*; export the retriever again"):
        load_encoder(settings(str(tmp_path / "whole")))
    with pytest.raises(EncoderError, match="cannot be loaded: RuntimeError: Expected one of cpu, cuda"):
        load_encoder(settings(tiny_model_path, device="abacus"))


def test_a_query_that_is_empty_or_is_not_text_is_refused(store, encoder, tmp_path):
    VectorIndex.create(tmp_path / "index", encoder.identity)
    retriever = Retriever(store, tmp_path / "index", encoder)
    with pytest.raises(RsgrpoError, match="a query is empty"):
        retriever.search(["7", " \n"], 1)
    with pytest.raises(RsgrpoError, match=r"the query 'caf\\udce9' is not valid UTF-8"):
        retriever.search(["caf\udce9"], 1)


def test_late_interaction_gives_one_unit_vector_a_token(tiny_model_path, encoder, pages, tmp_path):
    with pytest.raises(EncoderError, match="no trained projection"):
        LateEncoder(settings(tiny_model_path, kind="late"))
    encoder.model.save(str(tmp_path / "single"))
    with pytest.raises(EncoderError, match="a random one would be used"):  # each process its own: nothing compares
        LateEncoder(settings(str(tmp_path / "single"), kind="late"))
    MultiVectorEncoder(tiny_model_path, device="cpu").save(str(tmp_path / "late"))
    late = LateEncoder(settings(str(tmp_path / "late"), kind="late"))
    first, second = late.encode_pages(pages[:2])
    assert first.ndim == 2
    assert len(first) != len(second)
    np.testing.assert_allclose(np.linalg.norm(first, axis=1), 1, atol=1e-5)
    alone = late.encode_pages(pages[:1])[0]
    np.testing.assert_allclose(first, alone, atol=1e-5)
    assert late.encode_queries(["what amount"])[0].ndim == 2


def test_a_damaged_page_of_the_store_is_rendered_again_as_its_error_says(store, encoder, tmp_path):
    page = next(iter(PageStore.open(store).pages()))
    Path(page.image).write_bytes(b"damaged")
    index = VectorIndex.create(tmp_path / "index", encoder.identity)
    with pytest.raises(EncoderError, match=r"; delete .* and ingest again"):
        updated(store, encoder, index, 1)
    shutil.rmtree(Path(page.image).parent)
    ingested(store, tmp_path / "docs")
    report = updated(store, encoder, index, 1)
    assert report.num_pages == 3


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return coloured_store(tmp_path)


def test_an_update_encodes_only_what_is_new_and_deletes_what_is_gone(store, encoder, tmp_path):
    index = VectorIndex.create(tmp_path / "index", encoder.identity)

    def update() -> tuple[int, int, int]:
        report = updated(store, encoder, index, 2)
        return report.num_added, report.num_deleted, report.num_pages

    assert update() == (3, 0, 3)
    assert update() == (0, 0, 3)
    docs = tmp_path / "docs"
    (docs / "red.png").unlink()
    write_image(docs / "white.png", "white", 56, 56)
    retriever = Retriever(store, tmp_path / "index", encoder)
    assert len(retriever.search(["7"], 10)[0]) == 3
    ingested(store, docs)
    left = retriever.search(["7"], 10)[0]  # what is gone is skipped, what is new is not yet known
    assert sorted(page.document for page in left) == ["blue.png", "lime.png"]
    assert update() == (1, 1, 3)
    found = Retriever(store, tmp_path / "index", encoder).search(["7"], 10)[0]
    assert sorted(page.document for page in found) == ["blue.png", "lime.png", "white.png"]
    assert [page.rank for page in found] == [1, 2, 3]


@pytest.mark.slow
def test_encoding_killed_in_the_middle_resumes_without_loss_or_repetition(tiny_model_path, encoder, tmp_path):
    pytest.importorskip("pypdfium2", reason="needs the retrieval extra")
    write_pdf(tmp_path / "a.pdf", [f"page {row} amount {row * row}" for row in range(120)])
    store = tmp_path / "store"
    ingested(store, tmp_path / "a.pdf")
    command = ["index", str(store), "--model", tiny_model_path, "--max-pixels", "12544", "--device", "cpu"]
    command += ["--min-pixels", "784", "--shard-pages", "2", "--batch-size", "1"]
    shards = store / "index" / "shards"
    stop_python(["-m", "recipes.retrieve", *command], lambda: len(list(shards.glob("*.ids"))) >= 3)
    kept = len(VectorIndex.open(store / "index"))
    assert 4 <= kept < 120
    index = VectorIndex.create(store / "index", encoder.identity)
    pages = PageStore.open(store)
    report = updated(store, encoder, index, 8)
    assert (report.num_added, report.num_deleted, report.num_pages) == (120 - kept, 0, 120)
    ids = list(VectorIndex.open(store / "index").page_ids())
    assert len(set(ids)) == len(ids)
    assert sorted(ids) == sorted(pages.page_ids())
    some = list(pages.pages())[::17]
    for page, vector in zip(some, encoder.encode_pages(some), strict=True):
        np.testing.assert_allclose(index.vectors([page.page_id])[page.page_id][0], vector, atol=1e-3)  # fp16


def test_an_empty_index_finds_nothing(store, encoder, tmp_path):
    VectorIndex.create(tmp_path / "index", encoder.identity)
    assert Retriever(store, tmp_path / "index", encoder).search(["7"], 10) == [[]]


def test_index_and_search_from_the_command_line(store, tiny_model_path, capsys):
    model = ["--model", tiny_model_path, "--max-pixels", "12544", "--device", "cpu"]
    assert retrieve.main(["index", str(store), *model]) == 0
    assert "pages    3" in capsys.readouterr().out
    assert retrieve.main(["search", str(store), *model, "-k", "2", "--json", "what amount"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [page["rank"] for page in answer["pages"]] == [1, 2]
    assert Path(answer["pages"][0]["image"]).exists()
    assert retrieve.main(["search", str(store), *model, "what amount"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["rank", "score", "page", "document", "image"]
    assert retrieve.main(["search", str(store), *model, "--pooling", "mean", "what amount"]) == 2
    assert "another encoder (pooling 'own or weighted_mean' -> 'mean')" in capsys.readouterr().err
