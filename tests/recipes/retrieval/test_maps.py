"""Where on a page a question is found: similarity maps of late interaction, and boxes that a model writes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("sentence_transformers", reason="needs the retrieval extra")

from recipes import retrieve
from recipes.answers.reader import Reader, per_thousand
from recipes.retrieval.answers.heat import OPACITY, heat, heated
from recipes.retrieval.answers.highlight import Box
from recipes.retrieval.answers.library import Library, LibrarySettings
from recipes.retrieval.answers.page_view import pages_html
from recipes.retrieval.answers.told_boxes import marks_of, told_boxes
from recipes.retrieval.command_line import _box_frame
from recipes.retrieval.encoders.base import EncoderSettings, PageLoader
from recipes.retrieval.encoders.sentence import LateEncoder
from recipes.retrieval.pages.store import PageStore
from recipes.retrieval.search.found import FoundPage
from recipes.retrieval.search.sync import update_index
from tests.material.retrieval import QUIET, coloured_store, write_image
from tests.material.retrieval_models import save_late

SIZES = ["--min-pixels", "784", "--max-pixels", "12544", "--device", "cpu"]


@pytest.fixture(scope="module")
def late(tiny_model_path: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_late(tiny_model_path, tmp_path_factory.mktemp("late") / "model")


@pytest.fixture(scope="module")
def encoder(late: str) -> LateEncoder:
    return LateEncoder(EncoderSettings(late, kind="late", min_pixels=784, max_pixels=12544, device="cpu"))


def picture(folder: Path, width: int, height: int) -> Any:
    """Return a page of noise, no two patches of which are alike."""
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "noise.png")
    return SimpleNamespace(page_id="p", document="d", image=str(folder / "noise.png"), text="")


# Maps


def test_a_map_has_the_patches_in_their_places(encoder, tmp_path, monkeypatch):
    page = picture(tmp_path, 112, 84)  # 4 x 3 patches of 28 pixels
    (page_VD,) = encoder.encode_pages([page])
    assert len(page_VD) > 12  # the chat template has vectors, too
    by_hand_VD = np.zeros_like(page_VD)
    is_patch_V = encoder._patches(encoder.identity.loader(page))
    patches = np.flatnonzero(is_patch_V)
    assert len(patches) == 12
    by_hand_VD[patches[6]] = 1 / np.sqrt(page_VD.shape[1])  # the second row's third patch
    question_TD = np.full((2, page_VD.shape[1]), 1 / np.sqrt(page_VD.shape[1]), np.float32)
    monkeypatch.setattr(encoder, "encode_queries", lambda queries: [question_TD])
    found = encoder.similarity_map("7", page, by_hand_VD)
    np.testing.assert_allclose(found, [[0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]], atol=1e-6)
    for row, column in ((0, 3), (2, 1)):  # a question that is exactly what one patch says
        wanted_TD = np.stack([page_VD[patches[4 * row + column]]] * 2)
        monkeypatch.setattr(encoder, "encode_queries", lambda queries, wanted_TD=wanted_TD: [wanted_TD])
        found = encoder.similarity_map("7", page, page_VD)
        assert np.unravel_index(found.argmax(), found.shape) == (row, column)
        assert found.max() == pytest.approx(1, abs=1e-4)


def test_a_map_is_the_mean_over_the_words_of_the_question_alone(encoder, tmp_path):
    page = picture(tmp_path, 56, 56)
    (page_VD,) = encoder.encode_pages([page])
    (query_TD,) = encoder.encode_queries(["amount 7"])
    (empty_TD,) = encoder.encode_queries(["amount"])
    num_words = len(encoder.model.tokenizer("amount 7", add_special_tokens=False)["input_ids"])
    assert len(query_TD) > len(empty_TD) > 0
    patches = np.flatnonzero(encoder._patches(encoder.identity.loader(page)))
    starts = [(page_VD[patches] @ query_TD[start : start + num_words].T).mean(axis=1) for start in range(len(query_TD))]
    found = encoder.similarity_map("amount 7", page, page_VD).ravel()
    assert any(np.allclose(found, mean, atol=1e-5) for mean in starts)
    assert not np.allclose(found, (page_VD[patches] @ query_TD.T).mean(axis=1), atol=1e-4)  # nor the template's


def test_there_is_no_map_where_vectors_have_no_places(encoder, tmp_path, monkeypatch):
    page = picture(tmp_path, 56, 56)
    (page_VD,) = encoder.encode_pages([page])
    assert encoder.similarity_map("7", page, page_VD[:-1]) is None  # vectors that were pooled
    monkeypatch.setattr(encoder, "identity", replace(encoder.identity, loader=PageLoader(as_text=True)))
    assert encoder.similarity_map("7", page, page_VD) is None  # a model that reads text


def test_a_map_is_drawn_over_its_page(tmp_path):
    similarities = np.array([[0.1, 0.3], [0.1, 0.1]])
    assert np.asarray(heat(similarities))[0, :, 3].tolist() == [0, OPACITY]
    assert not np.asarray(heat(np.ones((2, 2))))[..., 3].any()
    over = np.asarray(heated(Image.new("RGB", (100, 100), "white"), similarities))
    assert (over[:50, 50:] != 255).any(axis=2).all()  # the upper right quarter
    assert (over[50:] == 255).all()


def test_search_and_the_page_show_where_the_question_is(encoder, late, tmp_path, capsys):
    store = coloured_store(tmp_path, "red", "lime")
    search = ["search", str(store), "amount 7", "-k", "2", *SIZES, "--similarity-maps", str(tmp_path / "maps")]
    assert retrieve.main(["index", str(store), "--model", late, "--kind", "late", *SIZES]) == 0
    capsys.readouterr()
    assert retrieve.main(search) == 0
    assert capsys.readouterr().err.count("2 x 2 patches") == 2
    files = sorted((tmp_path / "maps").iterdir())
    assert [file.name.split("-")[1] for file in files] == ["1", "2"]
    with Image.open(files[0]) as drawn:
        assert drawn.size == (56, 56)
    assert retrieve.main([*search, "--by", "words"]) == 2
    assert "--similarity-maps needs a late-interaction index" in capsys.readouterr().err

    library = Library(store, store / "index", encoder, None, LibrarySettings(), QUIET)
    (progress,) = library.ask("amount 7", 2, "multi_image")
    assert {page_id: found.shape for page_id, found in progress.maps.items()} == {
        page.page_id: (2, 2) for page in progress.pages
    }
    assert pages_html(progress, str).count('<img class="heat"') == 2
    trace = json.loads(json.dumps(library.trace(progress)))
    assert np.shape(trace["pages"][0]["similarity_map"]) == (2, 2)


def test_a_reranker_of_late_interaction_has_maps_too(encoder, tmp_path):
    from recipes.retrieval.search.retriever import Retriever, SearchSettings

    store = coloured_store(tmp_path, "red", "lime")
    update_index(PageStore.open(store), tmp_path / "late", encoder, QUIET)
    search = SearchSettings(by="words", reranker=(encoder, tmp_path / "late"))
    retriever = Retriever(store, store / "index", None, search)
    page_ids = retriever.store.page_ids()
    assert set(retriever.similarity_maps("7", [*page_ids, "unknown"])) == set(page_ids)
    assert not Retriever(store, store / "index", None, SearchSettings(by="words")).has_late


# Boxes


@pytest.mark.parametrize(
    "text",
    [
        'seven {"bbox_2d": [100, 200, 300, 400], "label": "7"}',
        "<box>[[100, 200, 300, 400]]</box> seven",
        "<|begin_of_box|>[[100,200,300,400]]<|end_of_box|>",
        "<|box_start|>(100,200),(300,400)<|box_end|>",
        "bbox: [100.0, 200.0, 300.0, 400.0]",
    ],
)
def test_boxes_are_read_in_the_forms_of_several_models(text):
    assert told_boxes(text, (1000, 1000)) == (Box(0.1, 0.2, 0.3, 0.4),)
    assert told_boxes(text, (300, 800)) == (Box(100 / 300, 0.25, 1.0, 0.5),)
    assert told_boxes(text, (200, 1000)) == ()  # not on the page


def test_numbers_alone_are_no_box():
    for text in ("sales [1, 2, 3, 4] of (5, 6)", "bbox_2d: [300, 200, 100, 400]", "bbox_2d: [1, 2, 3]", ""):
        assert told_boxes(text, (1000, 1000)) == ()


def test_pixels_are_those_of_the_page_as_the_model_sees_it(tiny_model_path, tmp_path):
    assert json.loads((Path(tiny_model_path) / "config.json").read_text())["model_type"] == "qwen2_5_vl"
    frame = _box_frame(tiny_model_path, 784, 784 * 12)
    assert frame(1000, 750) == (112, 84)
    assert _box_frame("name-at-an-endpoint", 784, 784 * 12) is per_thousand
    write_image(tmp_path / "a.png", "red", 1000, 750)
    page = FoundPage(1, 1.0, "p", "a.png", 1, str(tmp_path / "a.png"), "", width=1000, height=750)
    nobody: Any = None
    marks = marks_of(page, 'red {"bbox_2d": [28, 21, 56, 42]}', [], Reader(nobody, "", box_frame=frame))
    assert marks == (Box(0.25, 0.25, 0.5, 0.5),)
