"""A found page: its place among the results and everything that is shown of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from recipes.retrieval.pages.store import Page, PageStore, place_of
from recipes.retrieval.search.exact import Hit


@dataclass(frozen=True, slots=True)
class FoundPage:
    """One page of an answer to a query.

    rank: from 1. number: of the page in its document. image: absolute path. root, copies, label: as in `Page`.
    near: places of pages that were left out because they say the same. width, height: of the image, in pixels.
    """

    rank: int
    score: float
    page_id: str
    document: str
    number: int
    image: str
    text: str
    root: str = ""
    copies: tuple[str, ...] = ()
    label: str = ""
    near: tuple[str, ...] = ()
    width: int = 0
    height: int = 0

    @property
    def place(self) -> str:
        """Return where the page is, in words."""
        return place_of(self.document, self.number, self.label)


def shown_score(score: float, decimals: int) -> str:
    """Return a score with this many decimals; "" if they would all be 0, which says nothing of the page.

    Words on half of a store's pages or more weigh next to nothing in BM25.
    """
    text = f"{score:.{decimals}f}"
    return text if float(text) else ""


NO_PAGES = "there are no pages yet: add documents first"


def why_nothing(store: PageStore) -> str:
    """Return why no page of a store can be found by searches that are all empty, with the remedy."""
    num_pages = len(store.page_ids())
    if not num_pages:
        return NO_PAGES
    if not store.page_ids(with_text=True):
        return (
            f"none of the {num_pages:,} pages has text, so no words can be found: ingest into a new store with --ocr, "
            "or search the images by an index (`recipes.retrieve index`, --by vectors)"
        )
    return f"none of the {num_pages:,} pages is in the index yet: run `recipes.retrieve sync {store.folder}`"


def why_no_words(store: PageStore) -> str:
    """Return why a search by words alone has found nothing, although pages have text."""
    num_pages, num_texts = len(store.page_ids()), len(store.page_ids(with_text=True))
    num_blank = num_pages - num_texts
    blank = f"; pages without text: {num_blank:,} (ingest --ocr reads scans)" if num_blank else ""
    return f"none of the {num_texts:,} pages with text has any of these words{blank}"


def found_pages(hits: Sequence[Hit], pages: Mapping[str, Page]) -> list[FoundPage]:
    """Return hits with their pages; those of pages that are gone are left out."""
    present = [hit for hit in hits if hit.page_id in pages]
    return [_found(rank, hit, pages[hit.page_id]) for rank, hit in enumerate(present, start=1)]


def _found(rank: int, hit: Hit, page: Page) -> FoundPage:
    same = {field.name: getattr(page, field.name) for field in fields(Page)}
    return FoundPage(rank=rank, score=hit.score, **same)
