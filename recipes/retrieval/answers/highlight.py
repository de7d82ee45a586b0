"""Where the cited evidence is on its page: boxes around the words of the text layer, read from the document's own PDF.

Nothing is found on scans, on office documents (their PDF is not kept), and where the file has changed since it was
ingested. pypdfium2 is not thread-safe, so one call works at a time.
"""

from __future__ import annotations

import ctypes
import os
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from recipes.retrieval.pages.store import ID_CHARACTERS, DocumentRow
from recipes.retrieval.search.found import FoundPage

MIN_WORDS = 3  # of a run of words that counts as found; fewer if the evidence has fewer
MAX_WORDS = 3_000  # of a page or of its evidence; the time grows with their product
SCALE = 10_000  # whole numbers per side, in which pdfium converts coordinates
COLOUR = (255, 214, 0, 96)
_WORD = re.compile(r"\w+(?:[.,]\d+)*")
_ALONE = threading.Lock()


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle on a page as shown: fractions of its width and height, from the upper left corner."""

    left: float
    top: float
    right: float
    bottom: float


def evidence_boxes(page: FoundPage, evidence: str, documents: Sequence[DocumentRow]) -> tuple[Box, ...]:
    """Return boxes around the words of a page that its evidence repeats; none where they cannot be found.

    Args:
        documents: the store's catalogue, which says where the page's file is.
    """
    file = _source(page, documents)
    if file is None or not evidence.strip():
        return ()
    import pypdfium2

    with _ALONE:
        try:
            with pypdfium2.PdfDocument(file) as document:
                shown = document[page.number - 1]
                layer = shown.get_textpage()
                text = _characters(layer)
                return tuple(
                    box
                    for start, end in found_spans(text, evidence)
                    for box in _boxes(shown, layer, start, end - start)
                )
        except (pypdfium2.PdfiumError, IndexError, OSError):
            return ()


def found_spans(text: str, evidence: str) -> list[tuple[int, int]]:
    """Return (start, end) of the passages of a text that an evidence repeats: runs of the same words in the same order.

    >>> found_spans("Sales in 2019 were 12.5 million euros.", "sales in 2019 were: 12.5 million")
    [(0, 31)]
    """
    words = list(_WORD.finditer(text))[:MAX_WORDS]
    wanted = [word.casefold() for word in _WORD.findall(evidence)][:MAX_WORDS]
    matcher = SequenceMatcher(None, [word[0].casefold() for word in words], wanted, autojunk=False)
    needed = max(1, min(MIN_WORDS, len(wanted)))
    blocks = [block for block in matcher.get_matching_blocks() if block.size >= needed]
    if blocks:
        return [(words[block.a].start(), words[block.a + block.size - 1].end()) for block in blocks]
    numbers = {word for word in wanted if re.search(r"\d", word)}  # at least these
    return [word.span() for word in words if word[0].casefold() in numbers]


def highlighted(page: FoundPage, boxes: Sequence[Box]) -> Image.Image:
    """Return a page's image with its boxes marked."""
    with Image.open(page.image, formats=("PNG", "JPEG")) as opened:
        image = opened.convert("RGBA")
    marks = Image.new("RGBA", image.size)
    draw = ImageDraw.Draw(marks)
    for box in boxes:
        left, right = (round(side * image.width) for side in (box.left, box.right))
        top, bottom = (round(side * image.height) for side in (box.top, box.bottom))
        draw.rectangle((left - 2, top - 2, right + 2, bottom + 2), fill=COLOUR)
    return Image.alpha_composite(image, marks).convert("RGB")


def _source(page: FoundPage, documents: Sequence[DocumentRow]) -> Path | None:
    """Return a PDF that has this page and is as it was ingested; None if there is none."""
    for row in documents:
        path = Path(os.fsdecode(row.path))
        if row.content[:ID_CHARACTERS] == page.page_id[:ID_CHARACTERS] and path.suffix.lower() == ".pdf":
            try:
                status = path.stat()
            except OSError:
                continue
            if (status.st_size, status.st_mtime_ns) == (row.num_bytes, row.modified_ns):
                return path
    return None


def _characters(layer: Any) -> str:
    """Return the text whose n-th character is pdfium's n-th."""
    import pypdfium2.raw as pdfium

    codes = (pdfium.FPDFText_GetUnicode(layer.raw, number) for number in range(layer.count_chars()))
    return "".join(chr(code) if 31 < code < 0xD800 or 0xDFFF < code < 0x110000 else " " for code in codes)


def _boxes(page: Any, layer: Any, start: int, count: int) -> Iterator[Box]:
    import pypdfium2.raw as pdfium

    def on_page(x: float, y: float) -> tuple[float, float]:
        across, down = ctypes.c_int(), ctypes.c_int()
        pdfium.FPDF_PageToDevice(page.raw, 0, 0, SCALE, SCALE, 0, x, y, ctypes.byref(across), ctypes.byref(down))
        return across.value / SCALE, down.value / SCALE

    for number in range(layer.count_rects(start, count)):
        left, bottom, right, top = layer.get_rect(number)
        xs, ys = zip(on_page(left, bottom), on_page(right, top), strict=True)
        yield Box(min(xs), min(ys), max(xs), max(ys))
