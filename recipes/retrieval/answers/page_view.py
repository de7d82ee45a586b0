"""Found pages, the answer and its evidence cards as HTML.

Everything that comes from documents and models is escaped. Full pages open as popovers, without script.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

from recipes.retrieval.answers.evidence import cited_pages, faults_of
from recipes.retrieval.answers.library import Added, AnswerProgress
from recipes.retrieval.search.found import FoundPage

CSS = """
.pages { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: .8rem; }
.pages figure { margin: 0; padding: .4rem; border: 3px solid transparent; border-radius: .5rem; }
.pages figure.cited { border-color: #2e7d32; background: #2e7d3214; }
.pages button { display: block; width: 100%; padding: 0; border: 0; background: none; cursor: zoom-in; }
.pages img { width: 100%; max-height: 15rem; object-fit: contain; object-position: top; background: #8882; }
.pages figcaption { font-size: .85rem; overflow-wrap: anywhere; }
.pages .rank { font-weight: 700; }
.pages .badge { background: #2e7d32; color: white; border-radius: .3rem; padding: 0 .35rem; }
[popover].full { position: fixed; inset: 0; margin: auto !important; padding: 1rem; }
[popover].full { width: fit-content; height: fit-content; }
[popover].full img { min-width: min(36rem, 80vw); max-width: 90vw; max-height: 82vh; object-fit: contain; }
[popover].full::backdrop { background: #000a; }
.answer { font-size: 1.3rem; font-weight: 600; overflow-wrap: anywhere; white-space: pre-wrap; }
.cards { display: grid; gap: .5rem; margin-top: .6rem; }
.cards button { text-align: left; padding: .6rem; border: 1px solid #2e7d32; border-radius: .5rem; font: inherit; }
.cards .place { font-weight: 700; display: block; }
.faults { color: #b3261e; overflow-wrap: anywhere; }
"""
NO_ANSWERER = "There is no answer model, so pages are found but not read. Start with --answer-model or --endpoint."


def pages_html(progress: AnswerProgress, address: Callable[[str], str]) -> str:
    """Return the retrieved pages with rank and score; those that the answer cites are framed.

    Args:
        address: turns an image's path into its URL.
    """
    cited = {page.page_id for page in progress.answered.cited} if progress.answered else set()
    figures = [_figure(page, address(page.image), is_cited=page.page_id in cited) for page in progress.pages]
    return f'<div class="pages">{"".join(figures)}</div>'


def answer_html(progress: AnswerProgress) -> str:
    """Return the answer, a card for each cited page, and its faults; "" while it is being written."""
    if progress.answered is None:
        return ""
    line = progress.answered.line
    parts = []
    if line["finish_reason"] != "error":
        note = " <small>(the pages are insufficient)</small>" if line["insufficient"] else ""
        parts.append(f'<div class="answer">{escape(line["answer"] or line["raw"])}{note}</div>')
    cards = [_card(cited.number, cited.page, cited.text) for cited in cited_pages(progress.answered)]
    if cards:
        parts.append(f'<div class="cards">{"".join(cards)}</div>')
    return "".join(parts) + faults_html(faults_of(line))


def faults_html(faults: Sequence[str]) -> str:
    """Return faults, one per line."""
    return "".join(f'<div class="faults">{escape(fault)}</div>' for fault in faults)


def added_html(added: Added, num_pages: int) -> str:
    """Return the result of adding documents."""
    counts = f"{added.num_added} added or changed; {num_pages:,} pages in all"
    return f"<div>{counts}</div>" + faults_html([f"{name}: {reason}" for name, reason in added.faults])


def _figure(page: FoundPage, url: str, *, is_cited: bool) -> str:
    name, source = f"page-{page.rank}", escape(url)
    place = escape(f"{page.document}, page {page.number}")
    badge = ' <span class="badge">cited</span>' if is_cited else ""
    return (
        f'<figure class="{"cited" if is_cited else "found"}" data-rank="{page.rank}">'
        f'<button popovertarget="{name}"><img src="{source}" alt="{place}" loading="lazy"></button>'
        f'<figcaption><span class="rank">[{page.rank}]</span> {page.score:.4f}{badge}<br>{place}</figcaption>'
        f'<div popover class="full" id="{name}"><b>[{page.rank}] {place}</b><br>'
        f'<img src="{source}" alt="{place}" loading="lazy"></div></figure>'
    )


def _card(number: int, page: FoundPage, text: str) -> str:
    place = escape(f"[{number}] {page.document}, page {page.number}")
    return f'<button popovertarget="page-{page.rank}"><span class="place">{place}</span>{escape(text)}</button>'
