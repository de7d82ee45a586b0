"""Found pages, the answer, its evidence cards, earlier questions and the documents of a store as HTML.

Everything that comes from documents and models is escaped. Pages open as popovers, without script.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path

from recipes.retrieval.answers.evidence import cited_pages, faults_of
from recipes.retrieval.answers.heat import heat_uri
from recipes.retrieval.answers.highlight import Box
from recipes.retrieval.answers.library import Added
from recipes.retrieval.answers.progress import AnswerProgress
from recipes.retrieval.pages.store import DocumentRow
from recipes.retrieval.search.found import FoundPage, shown_score

CSS = """
.pages { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: .8rem; }
.pages figure { margin: 0; padding: .4rem; border: 3px solid transparent; border-radius: .5rem; }
.pages figure.cited { border-color: #2e7d32; background: #2e7d3214; }
.pages figure > button { display: block; width: 100%; padding: 0; border: 0; background: none; cursor: zoom-in; }
.pages figure > button img { width: 100%; max-height: 15rem; object-fit: contain; object-position: top; }
.pages img { background: #8882; }
.pages figcaption { font-size: .85rem; overflow-wrap: anywhere; }
.pages .rank { font-weight: 700; }
.pages .badge { background: #2e7d32; color: white; border-radius: .3rem; padding: 0 .35rem; }
.pages .also { opacity: .75; }
[popover].full { position: fixed; inset: 0; margin: auto !important; padding: 1rem; border-radius: .5rem; }
[popover].full { width: fit-content; height: fit-content; max-height: 98vh; overflow: auto; }
[popover].full { color: var(--body-text-color); background: var(--body-background-fill); }
[popover].full .sheet { position: relative; margin-top: .5rem; }
[popover].full .sheet { width: min(90vw, 82vh * var(--ratio)); aspect-ratio: var(--ratio); }
[popover].full:has(.larger:checked) .sheet { width: calc(2.5 * min(90vw, 82vh * var(--ratio))); }
[popover].full img { width: 100%; height: 100%; object-fit: contain; }
[popover].full .heat { position: absolute; inset: 0; object-fit: fill; background: none; image-rendering: pixelated; }
[popover].full:not(:has(.similar:checked)) .heat { display: none; }
[popover].full label { margin-right: .6rem; }
[popover].full button { border: 1px solid #8888; border-radius: .3rem; padding: .1rem .6rem; margin-right: .3rem; }
[popover].full a { text-decoration: underline; margin-right: .6rem; }
[popover].full::backdrop { background: #000a; }
.mark { position: absolute; background: #ffd60066; outline: 2px solid #ffb300; pointer-events: none; }
.mark.zoom { background: #1f5fa81f; outline-color: #1f5fa8; }
.desk figure.opened { border-color: #1f5fa8; }
.desk figure.cited { border-color: #2e7d32; }
.desk figure > button { text-align: center; }
.desk figure .sheet { position: relative; display: inline-block; max-width: 100%; }
.desk figure .sheet img { width: auto; min-width: min(8rem, 100%); max-width: 100%; max-height: 15rem; height: auto; }
.steps { margin: .6rem 0 0 1.2rem; display: grid; gap: .35rem; list-style: decimal; }
.steps .said { white-space: pre-wrap; overflow-wrap: anywhere; opacity: .75; font-size: .9rem; }
.steps button { border: 1px solid #8888; border-radius: .3rem; padding: 0 .35rem; margin-right: .2rem; font: inherit; }
.answer { font-size: 1.3rem; font-weight: 600; overflow-wrap: anywhere; white-space: pre-wrap; }
.writing { white-space: pre-wrap; overflow-wrap: anywhere; opacity: .8; }
.cards { display: grid; gap: .5rem; margin-top: .6rem; }
.cards button { text-align: left; padding: .6rem; border: 1px solid #2e7d32; border-radius: .5rem; font: inherit; }
.cards .place { font-weight: 700; display: block; }
.faults { color: #b3261e; overflow-wrap: anywhere; }
.dark .faults { color: #ff8a80; }
.notes { color: #8a5a00; }
.dark .notes { color: #ffcf6b; }
.documents { max-height: 22rem; overflow: auto; overflow-wrap: anywhere; }
.documents td { padding: .1rem .5rem; vertical-align: top; }
"""
NO_ANSWERER = "No answer model: pages are found but not read. Start with --answer-model or --endpoint."
NEIGHBOURS = 2  # pages before and after a found one that can be leafed through
MAX_LISTED = 500  # documents
MAX_WRITING = 600  # last characters of an answer that is being written


def pages_html(
    progress: AnswerProgress, address: Callable[[str], str], source: Callable[[FoundPage], str] = lambda page: ""
) -> str:
    """Return the retrieved pages with rank and score; those that the answer cites are framed, their evidence marked.

    At the page desk, what the model opened is framed too, and the parts that it zoomed in on are marked.

    Args:
        address: turns an image's path into its URL. source: returns the URL of a page's document, "" without one.
    """
    figures = [_figure(page, address, source(page), progress) for page in progress.pages]
    kind = "pages" if progress.steps is None else "pages desk"
    return f'{notes_html(progress.notes)}<div class="{kind}">{"".join(figures)}</div>'


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


def writing_html(text: str) -> str:
    """Return the text of an answer while it is being written."""
    return f'<div class="writing">{escape(text[-MAX_WRITING:])}</div>' if text else "<div>reading the pages</div>"


def faults_html(faults: Sequence[str]) -> str:
    """Return faults, one per line."""
    return "".join(f'<div class="faults">{escape(fault)}</div>' for fault in faults)


def notes_html(notes: Sequence[str]) -> str:
    """Return what the user should know, one per line."""
    return "".join(f'<div class="notes">{escape(note)}</div>' for note in notes)


def added_html(added: Added, num_pages: int) -> str:
    """Return the result of adding documents."""
    counts = f"{added.num_added} added or changed; {num_pages:,} pages in all"
    return f"<div>{counts}</div>" + faults_html([f"{name}: {reason}" for name, reason in added.faults])


def history_html(history: Sequence[tuple[str, str]]) -> str:
    """Return earlier questions with their answers, the last one first."""
    rows = [f"<dt><b>{escape(question)}</b></dt><dd>{escape(answer)}</dd>" for question, answer in reversed(history)]
    return f"<dl>{''.join(rows)}</dl>" if rows else "<p>None yet.</p>"


def documents_html(rows: Sequence[DocumentRow]) -> str:
    """Return the documents with their pages, and what is to be said of them."""
    lines = []
    for row in rows[:MAX_LISTED]:
        said = "; ".join(remark for remark in (row.error, row.note) if remark)
        place = escape(f"{row.root}/{row.document}")
        cells = f'<td>{row.num_pages}</td><td title="{place}">{escape(row.document)}</td><td>{escape(said)}</td>'
        lines.append(f"<tr>{cells}</tr>")
    more = f"<p>and {len(rows) - MAX_LISTED:,} more</p>" if len(rows) > MAX_LISTED else ""
    head = "<tr><th>pages</th><th>document</th><th></th></tr>"
    return f'<div class="documents"><table>{head}{"".join(lines)}</table>{more}</div>'


def _figure(page: FoundPage, address: Callable[[str], str], source: str, progress: AnswerProgress) -> str:
    name, url = f"page-{page.rank}", escape(address(page.image))
    place = escape(page.place)
    is_cited = progress.answered is not None and page in progress.answered.cited
    is_opened = page.rank in progress.opened
    kind = "cited" if is_cited else "opened" if is_opened else "found"
    badges = ("opened",) * is_opened + ("cited",) * is_cited
    badge = "".join(f' <span class="badge">{said}</span>' for said in badges)
    others = [f"also {copy}" for copy in page.copies] + [f"like {near}" for near in page.near]
    also = f'<br><span class="also">{escape("; ".join(others))}</span>' if others else ""
    zooms = "".join(_mark(box, "mark zoom") for box in progress.zooms.get(page.rank, ()))
    marks = "".join(map(_mark, progress.boxes.get(page.page_id, ()))) + zooms
    has_map = page.page_id in progress.maps
    if has_map:
        marks += f'<img class="heat" alt="" src="{heat_uri(progress.maps[page.page_id])}">'
    image = f'<img src="{url}" alt="{place}" loading="lazy">'
    if progress.steps is not None:
        image = f'<span class="sheet">{image}{zooms}</span>'
    rank = f'<span class="rank">[{page.rank}]</span> {shown_score(page.score, 4)}'
    return (
        f'<figure class="{kind}" data-rank="{page.rank}"><button popovertarget="{name}">{image}</button>'
        f"<figcaption>{rank}{badge}<br>{place}{also}</figcaption>"
        f"{_popovers(page, address, source, marks, has_map=has_map)}</figure>"
    )


def _popovers(page: FoundPage, address: Callable[[str], str], source: str, marks: str, *, has_map: bool) -> str:
    """Return a popover for a found page and one for each page near it, which open one another.

    Check boxes enlarge the page and show where it is like the question; they need no script.
    """
    numbers, ratio = {}, page.width / page.height if page.height else 0.75
    for number in range(page.number - NEIGHBOURS, page.number + NEIGHBOURS + 1):
        image = page.image if number == page.number else _neighbour(page.image, number)
        if image:
            numbers[number] = (f"page-{page.rank}" + (f"-{number}" if number != page.number else ""), image)
    link = f'<a href="{escape(source)}" target="_blank" rel="noopener">document</a>' if source else ""
    parts = []
    for number, (name, image) in numbers.items():
        turns = [(numbers[number - 1][0], "previous page")] if number - 1 in numbers else []
        turns += [(numbers[number + 1][0], "next page")] if number + 1 in numbers else []
        buttons = "".join(f'<button popovertarget="{target}">{said}</button>' for target, said in turns)
        buttons += f'<button popovertarget="{name}" popovertargetaction="hide">close</button>'
        url, is_found = escape(address(image)), number == page.number
        place = escape(page.place if is_found else f"{page.document}, page {number}")
        switches = _switch("larger", "larger")
        if is_found and has_map:
            switches += _switch("similar", "like the question", "checked")
        whole = f'<a href="{url}" target="_blank" rel="noopener">full size</a>'
        parts.append(
            f'<div popover class="full" id="{name}" style="--ratio:{ratio:.4f}"><b>[{page.rank}] {place}</b><br>'
            f'{buttons}{switches}{whole}{link}<div class="sheet"><img src="{url}" alt="{place}" loading="lazy">'
            f"{marks if is_found else ''}</div></div>"
        )
    return "".join(parts)


def _switch(name: str, said: str, state: str = "") -> str:
    return f'<label><input type="checkbox" class="{name}" {state}> {said}</label>'


def _neighbour(image: str, number: int) -> str:
    """Return the image of another page of the same document, "" if there is none."""
    path = Path(image)
    other = path.with_name(f"{number:05d}{path.suffix}") if number > 0 else None
    return str(other) if other is not None and other.exists() else ""


def _mark(box: Box, kind: str = "mark") -> str:
    sides: Mapping[str, float] = {
        "left": box.left, "top": box.top, "width": box.right - box.left, "height": box.bottom - box.top
    }  # fmt: skip
    style = ";".join(f"{side}:{100 * share:.2f}%" for side, share in sides.items())
    return f'<span class="{kind}" style="{style}"></span>'


def _card(number: int, page: FoundPage, text: str) -> str:
    place = escape(f"[{number}] {page.place}")
    return f'<button popovertarget="page-{page.rank}"><span class="place">{place}</span>{escape(text)}</button>'
