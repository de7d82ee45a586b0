"""Boxes around cited evidence: on the words, whatever the page's rotation and crop, and nowhere else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("pypdfium2", reason="needs the retrieval extra")

from recipes.retrieval.answers.highlight import Box, evidence_boxes, found_spans, highlighted
from recipes.retrieval.pages.store import PageStore
from recipes.retrieval.search.exact import Hit
from recipes.retrieval.search.found import FoundPage, found_pages
from tests.material.retrieval import ingested, write_image, write_pdf


def passages(text: str, evidence: str) -> list[str]:
    return [text[start:end] for start, end in found_spans(text, evidence)]


def test_passages_are_runs_of_the_same_words():
    text = "In 2019 sales were 12.5 million; in 2020 they fell to 9 million euros."
    assert passages(text, "Sales were: 12.5 MILLION") == ["sales were 12.5 million"]
    assert passages(text, "sales were 12.5 million and then fell to 9 million euros") == [
        "sales were 12.5 million", "fell to 9 million euros"
    ]  # fmt: skip
    assert passages(text, "fell") == ["fell"]
    assert passages(text, "profit was about 9 in 2021") == ["9"]  # at least the number
    assert passages(text, "nothing like it at all") == []
    assert passages("", "x") == passages(text, "") == []


def found(store: Path, number: int) -> FoundPage:
    pages = {page.page_id: page for page in PageStore.open(store).pages()}
    wanted = next(page_id for page_id, page in pages.items() if page.number == number)
    return found_pages([Hit(wanted, 1.0)], pages)[0]


@pytest.mark.parametrize("extra", ["", "/Rotate 90", "/Rotate 180", "/CropBox [0 20 200 100]"])
def test_boxes_are_where_the_words_are_printed(tmp_path, extra):
    write_pdf(tmp_path / "a.pdf", ["nothing", "before seven red apples after"])
    content = (tmp_path / "a.pdf").read_bytes()
    (tmp_path / "a.pdf").write_bytes(content.replace(b"/Type /Page /", f"/Type /Page {extra} /".encode()))
    ingested(tmp_path / "store", tmp_path / "a.pdf", dpi=144)
    page, documents = found(tmp_path / "store", 2), PageStore.open(tmp_path / "store").documents()
    (box,) = evidence_boxes(page, "seven red apples", documents)
    (whole,) = evidence_boxes(page, "before seven red apples after", documents)
    with Image.open(page.image) as image:
        ink = np.asarray(image.convert("L")) < 128
        width, height = image.size

    def share(box: Box) -> float:
        """Return how much of the ink is in a box, a pixel of its edge included."""
        rows = slice(max(0, int(box.top * height) - 1), int(box.bottom * height) + 2)
        columns = slice(max(0, int(box.left * width) - 1), int(box.right * width) + 2)
        return float(ink[rows, columns].sum() / ink.sum())

    assert share(whole) > 0.9
    assert 0.4 < share(box) < 0.8  # 14 of its 25 letters
    marked = np.asarray(highlighted(page, [box]))
    assert (marked != np.asarray(Image.open(page.image).convert("RGB"))).any(axis=2).mean() > 0.01


def test_nothing_is_marked_where_the_file_has_changed_or_is_no_pdf(tmp_path):
    write_pdf(tmp_path / "a.pdf", ["seven red apples"])
    ingested(tmp_path / "store", tmp_path / "a.pdf")
    page, documents = found(tmp_path / "store", 1), PageStore.open(tmp_path / "store").documents()
    assert evidence_boxes(page, "seven red apples", documents)
    assert evidence_boxes(page, " ", documents) == ()
    write_pdf(tmp_path / "a.pdf", ["another text altogether"])
    assert evidence_boxes(page, "seven red apples", documents) == ()
    write_image(tmp_path / "b.png")
    ingested(tmp_path / "other", tmp_path / "b.png")
    documents = PageStore.open(tmp_path / "other").documents()
    assert evidence_boxes(found(tmp_path / "other", 1), "red", documents) == ()
