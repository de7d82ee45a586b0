"""Vectors on disk and the pages they find: exactness, ties, deletes, other encoders, a process killed on the way."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recipes.retrieval.encoders.base import EncoderError, EncoderIdentity, EncoderSettings
from recipes.retrieval.encoders.imported import ImportedEncoder
from recipes.retrieval.pages.store import Page, StoreError
from recipes.retrieval.search.exact import Hit, max_sim, rank
from recipes.retrieval.search.index import IndexFault, VectorIndex
from rsgrpo.errors import RsgrpoError
from tests.material.retrieval import stop_python, write_vectors

SCRIPTED = EncoderIdentity(description={"name": "scripted"})


def make(folder: Path, vectors: dict[str, np.ndarray], shard: int = 3, multi: bool = False) -> VectorIndex:
    index = VectorIndex.create(folder, replace(SCRIPTED, multi_vector=multi), "float32")
    ids = list(vectors)
    for start in range(0, len(ids), shard):
        part = ids[start : start + shard]
        index.add(part, [vectors[page_id] for page_id in part])
    return VectorIndex.open(folder)


def unit(*values: float) -> np.ndarray:
    vector = np.array(values, dtype=np.float32)
    return vector / np.linalg.norm(vector)


def random_vectors(count: int, dim: int = 16, seed: int = 0) -> dict[str, np.ndarray]:
    rows = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return {f"p{row:04d}": rows[row] for row in range(count)}


def test_scores_of_a_small_index_are_those_worked_out_by_hand(tmp_path):
    index = make(tmp_path, {"a": unit(1, 0), "b": unit(0, 1), "c": unit(3, 4)})
    (hits,) = index.search([unit(1, 0)], 2)
    assert hits == [Hit("a", 1.0), Hit("c", 0.6)]


def test_ties_go_by_page_id_and_k_may_exceed_the_pages(tmp_path):
    same = unit(1, 1)
    index = make(tmp_path, {"d": same, "b": same, "c": same, "a": same, "z": unit(1, 0)})
    assert [hit.page_id for hit in index.search([same], 2)[0]] == ["a", "b"]
    assert [hit.page_id for hit in index.search([same], 99)[0]] == ["a", "b", "c", "d", "z"]
    assert rank([], np.zeros(0), 3) == []


def test_an_exact_search_equals_one_scan_whatever_the_shards(tmp_path, monkeypatch):
    vectors = random_vectors(200)
    queries = list(random_vectors(5, seed=1).values())
    table = np.stack(list(vectors.values())).astype(np.float64)
    wanted = [rank(list(vectors), table @ query.astype(np.float64), 7) for query in queries]
    monkeypatch.setattr("recipes.retrieval.search.shards.BLOCK_VECTORS", 10)
    for shard in (1, 64, 200):
        index = make(tmp_path / str(shard), vectors, shard)
        assert index.search(queries, 7) == wanted


def test_max_sim_is_the_sum_over_query_vectors_of_the_best_page_vector(tmp_path):
    # page a: rows (1,0), (0,.5): 1 + .5; page b: one row (.6,.8): .6 + .8
    pages = np.array([[1.0, 0.0], [0.0, 0.5], [0.6, 0.8]])
    np.testing.assert_allclose(max_sim(np.eye(2), pages, np.array([0, 2])), [1.5, 1.4])
    index = make(tmp_path, {"a": pages[:2], "b": pages[2:], "c": np.array([[0.1, 0.1]])}, shard=2, multi=True)
    (hits,) = index.search([np.eye(2, dtype=np.float32)], 5)
    assert hits == [Hit("a", 1.5), Hit("b", 1.4), Hit("c", 0.2)]
    index.remove(["a"])
    assert [hit.page_id for hit in index.search([np.eye(2)], 5)[0]] == ["b", "c"]


def test_rerank_scores_candidates_and_drops_unknown_ones(tmp_path):
    index = make(tmp_path, {"a": np.eye(2), "b": np.array([[0.6, 0.8]])}, multi=True)
    (hits,) = index.rerank([np.eye(2)], [["b", "unknown", "a", "b"]], 5)
    assert hits == [Hit("a", 2.0), Hit("b", 1.4)]


def test_deleted_pages_are_not_found_and_may_come_back(tmp_path):
    vectors = random_vectors(10)
    index = make(tmp_path, vectors, shard=5)
    assert index.remove(["p0003", "p0004", "unknown"]) == 2
    assert len(VectorIndex.open(tmp_path)) == 8
    (hits,) = VectorIndex.open(tmp_path).search([vectors["p0003"]], 10)
    assert "p0003" not in {hit.page_id for hit in hits}
    assert index.missing_pages(vectors) == ({"p0003", "p0004"}, set())
    index.add(["p0003"], [vectors["p0004"]])  # with other content: the new vector counts
    (hits,) = VectorIndex.open(tmp_path).search([vectors["p0004"]], 1)
    assert hits[0].page_id == "p0003"
    assert sorted(index.page_ids()) == sorted(set(vectors) - {"p0004"})


def test_a_mostly_deleted_shard_is_rewritten_without_them(tmp_path):
    vectors = random_vectors(10)
    index = make(tmp_path, vectors, shard=10)
    index.remove([f"p{row:04d}" for row in range(8)])
    (shard,) = VectorIndex.open(tmp_path).shards
    assert shard.ids_P.tolist() == [b"p0008", b"p0009"]
    assert len(list((tmp_path / "shards").glob("*.npy"))) == 1
    index.remove(["p0008", "p0009"])
    assert index.search([vectors["p0000"]], 3) == [[]]


def test_another_encoder_is_refused_by_name_of_what_differs(tmp_path):
    make(tmp_path, random_vectors(3))
    fault = r"another encoder \(name 'scripted' -> 'other'\); use that encoder, or create"
    with pytest.raises(IndexFault, match=fault):
        VectorIndex.create(tmp_path, EncoderIdentity(description={"name": "other"}))


def test_bad_use_of_an_index_is_an_error_and_changes_nothing(tmp_path):
    vectors = random_vectors(4)
    index = make(tmp_path / "index", vectors)
    with pytest.raises(IndexFault, match=r"page p0001 would be in .* twice"):
        index.add(["p0001"], [vectors["p0001"]])
    with pytest.raises(IndexFault, match="length 3 do not fit"):
        index.add(["new"], [unit(1, 2, 3)])
    with pytest.raises(IndexFault, match="length 3, but those of"):
        index.search([unit(1, 2, 3)], 1)
    with pytest.raises(RsgrpoError, match="k must be >= 1, got 0"):
        index.search([vectors["p0000"]], 0)
    assert sorted(VectorIndex.open(tmp_path / "index").page_ids()) == sorted(vectors)
    with pytest.raises(IndexFault, match="is not an index"):
        VectorIndex.open(tmp_path)
    next((tmp_path / "index" / "shards").glob("*.npy")).write_bytes(b"x")
    with pytest.raises(IndexFault, match="damaged"):
        VectorIndex.open(tmp_path / "index").search([vectors["p0000"]], 1)


def test_a_full_disk_leaves_the_index_as_it_was(tmp_path, monkeypatch):
    vectors = random_vectors(6)
    index = make(tmp_path, dict(list(vectors.items())[:3]))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StoreError, match="No space left"):
            index.add(["p0005"], [vectors["p0005"]])
    index = VectorIndex.open(tmp_path)
    assert list(index.page_ids()) == ["p0000", "p0001", "p0002"]
    with index.locked():
        index.add(["p0005"], [vectors["p0005"]])
    assert len(VectorIndex.open(tmp_path)) == 4


def test_indexing_killed_in_the_middle_resumes_without_loss_or_repetition(tmp_path):
    program = f"""
from pathlib import Path
from tests.recipes.retrieval.search.test_index import SCRIPTED, random_vectors
from recipes.retrieval.search.index import VectorIndex
index = VectorIndex.create(Path({str(tmp_path / "index")!r}), SCRIPTED, "float32")
vectors = random_vectors(4000)
with index.locked():
    for page_id, vector in vectors.items():
        index.add([page_id], [vector])
"""
    shards = tmp_path / "index" / "shards"
    stop_python(["-c", program], lambda: shards.exists() and len(list(shards.glob("*.npy"))) >= 5)
    vectors = random_vectors(4000)
    index = VectorIndex.create(tmp_path / "index", SCRIPTED, "float32")
    with index.locked():
        have = list(index.page_ids())
        assert 4 <= len(have) < 4000
        missing, surplus = index.missing_pages(list(vectors)[:300] + have)
        assert not surplus
        rest = sorted(missing)
        index.add(rest, [vectors[page_id] for page_id in rest])
    ids = list(VectorIndex.open(tmp_path / "index").page_ids())
    assert len(ids) == len(set(ids)) == max(300, len(have))
    assert index.search([vectors["p0007"]], 1)[0][0].page_id == "p0007"


def page(page_id: str, image: str = "", text: str = "") -> Page:
    return Page(page_id, "doc.pdf", 1, image, 10, 10, text)


def test_imported_vectors_are_looked_up_and_normalised(tmp_path):
    pages = np.array([[3.0, 4.0], [0.0, 2.0]], dtype=np.float16)
    write_vectors(tmp_path, ["a", "b"], pages, {"two\nlines": [2.0, 0.0]})
    encoder = ImportedEncoder(EncoderSettings(str(tmp_path), "imported"))
    found = np.stack(encoder.encode_pages([page("b"), page("a")]))
    np.testing.assert_allclose(found, [[0.0, 1.0], [0.6, 0.8]], atol=1e-6)
    np.testing.assert_allclose(np.stack(encoder.encode_queries(["two\nlines"])), [[1, 0]])
    with pytest.raises(EncoderError, match=r"no vector for 1 of 2 page keys, such as 'c'"):
        encoder.encode_pages([page("a"), page("c")])
    with pytest.raises(EncoderError, match="no vector for 1 of 1"):
        encoder.encode_queries(["unknown"])
    (tmp_path / "page_ids.txt").write_text("a\n")
    with pytest.raises(EncoderError, match=r"pages.npy has shape \(2, 2\), but there are 1 keys"):
        ImportedEncoder(EncoderSettings(str(tmp_path), "imported"))


def test_a_vector_that_is_zero_or_not_finite_is_refused(tmp_path):
    write_vectors(tmp_path, ["a", "b"], [[0.0, 0.0], [np.nan, 1.0]], {})
    encoder = ImportedEncoder(EncoderSettings(str(tmp_path), "imported"))
    for name in ("a", "b"):
        with pytest.raises(EncoderError, match=f"a vector of length .* for '{name}'"):
            encoder.encode_pages([page(name)])


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"pooling": "max"}, "--pooling must be one of weighted_mean, mean, last, cls; got 'max'"),
        ({"batch_size": 0}, "--batch-size must be >= 1, got 0"),
        ({"min_pixels": 9000, "max_pixels": 8000}, "--min-pixels 9000 must be <= --max-pixels 8000"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, fault):
    with pytest.raises(RsgrpoError, match=fault):
        EncoderSettings("m", **settings)


def test_visrag_ret_pools_by_place_and_ignores_padding_on_either_side():
    import torch

    from recipes.retrieval.encoders.visrag_ret import encode, weighted_mean

    hidden = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    # (1 * (1, 0) + 2 * (0, 1)) / 3, of length 1
    expected = np.array([[1, 2]]) / np.sqrt(5)
    pad = torch.full((1, 1, 2), 9.0)
    for states, mask in (
        (hidden, [[1, 1]]),
        (torch.cat([pad, hidden], 1), [[0, 1, 1]]),
        (torch.cat([hidden, pad], 1), [[1, 1, 0]]),
    ):
        np.testing.assert_allclose(weighted_mean(states, torch.tensor(mask)).numpy(), expected, atol=1e-6)

    class Model:
        def __call__(self, text: list[str], image: list[Any], tokenizer: Any) -> Any:
            states = torch.tensor([[[float(len(one)), 1.0]] for one in text])
            return type("Out", (), {"last_hidden_state": states, "attention_mask": torch.ones(len(text), 1)})()

    vectors = encode(Model(), None, ["a", "bb", "ccc"], 2)
    np.testing.assert_allclose(vectors[1], np.array([2, 1]) / np.sqrt(5), atol=1e-3)
