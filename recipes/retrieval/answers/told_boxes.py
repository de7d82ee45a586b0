"""Boxes that a model writes beside its evidence, to say where on a page it is.

Read are `"bbox_2d": [left, top, right, bottom]`, the same in `<box>` or `<|begin_of_box|>`, and
`(left,top),(right,bottom)`. Most models count from 0 to 1000; `Reader.box_frame` knows the others.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from recipes.answers.reader import Reader
from recipes.retrieval.answers.highlight import Box, evidence_boxes
from recipes.retrieval.pages.store import DocumentRow
from recipes.retrieval.search.found import FoundPage

_N = r"\s*(\d+(?:\.\d+)?)\s*"
_FOUR = ",".join([_N] * 4)
_BOX = re.compile(
    rf"(?:bbox(?:_2d)?[\"']?\s*[:=]\s*|<(?:box|\|begin_of_box\|)>\s*)\[+{_FOUR}\]|\({_N},{_N}\)\s*,\s*\({_N},{_N}\)"
)


def told_boxes(text: str, frame: tuple[float, float]) -> tuple[Box, ...]:
    """Return the boxes of a text; those that are empty or not on the page are left out.

    Args:
        frame: width and height of the page in the coordinates of the boxes.

    >>> told_boxes('7 apples {"bbox_2d": [0, 500, 250, 1000]}', (1000, 1000))
    (Box(left=0.0, top=0.5, right=0.25, bottom=1.0),)
    """
    boxes = []
    for found in _BOX.finditer(text):
        left, top, right, bottom = (float(number) for number in found.groups() if number is not None)
        if left < right <= frame[0] and top < bottom <= frame[1]:
            boxes.append(Box(left / frame[0], top / frame[1], right / frame[0], bottom / frame[1]))
    return tuple(boxes)


def marks_of(page: FoundPage, evidence: str, documents: Sequence[DocumentRow], reader: Reader) -> tuple[Box, ...]:
    """Return where the evidence of a page is: its words in the text layer, and the boxes that the model wrote."""
    told = told_boxes(evidence, reader.box_frame(page.width, page.height))
    return (*evidence_boxes(page, _BOX.sub(" ", evidence), documents), *told)
