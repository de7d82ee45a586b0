"""Make the pictures of the page over a store in docs/images: `python tools/app_pictures.py` (needs Chromium).

The documents are made here. So that the pictures need no trained model, the answerer says what is written on the page
that it is asked about, and the encoder compares colours: a page has a vector for each of its patches, their mean
colour, and a question one for each colour that it names. The page itself, its search, marks and maps are those of
`recipes.app`.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from playwright.sync_api import Page as Tab
from playwright.sync_api import sync_playwright

from recipes import app
from recipes.answers.reader import Reader
from recipes.answers.types import Answer
from recipes.retrieval.answers.library import Library, LibrarySettings
from recipes.retrieval.answers.page_view import CSS
from recipes.retrieval.encoders.base import EncoderIdentity
from recipes.retrieval.pages.store import Page
from rollout.types import Prompt
from rsgrpo.records.console import Console

PICTURES = Path(__file__).parent.parent / "docs" / "images"
COLOURS = {
    "red": (0.84, 0.16, 0.16),
    "blue": (0.16, 0.35, 0.84),
    "green": (0.18, 0.55, 0.24),
    "orange": (0.95, 0.55, 0.1),
}
SALES = {
    "north": ("red", (3.1, 4.2, 5.0)),
    "south": ("blue", (2.2, 2.0, 2.9)),
    "east": ("green", (4.0, 3.6, 3.8)),
    "west": ("orange", (1.2, 1.9, 3.3)),
}
PATCH = 28
QUESTION = "How did sales in the red north develop?"
ANSWER = (
    "<observe>Bar charts of sales.</observe>\n<evidence>\n[1]: Sales in the north rose from 3.1 to 5.0 million euros\n"
    "[2]: no relevant information\n[3]: no relevant information\n[4]: no relevant information\n</evidence>\n"
    "<think>The first page is about the north.</think>\n<answer>They rose from 3.1 to 5.0 million euros.</answer>"
)


def write_chart(path: Path, region: str) -> None:
    """Write a PDF of one page: a title, a bar for each year, and a sentence."""
    colour, values = SALES[region]
    drawn = [f"BT /F1 26 Tf 60 760 Td (Sales in the {region}) Tj ET"]
    for column, (year, value) in enumerate(zip((2023, 2024, 2025), values, strict=True)):
        left = 90 + 150 * column
        drawn.append(f"{' '.join(map(str, COLOURS[colour]))} rg {left} 330 100 {value * 70:.0f} re f 0 g")
        drawn.append(f"BT /F1 15 Tf {left + 30} 305 Td ({year}) Tj ET")
        drawn.append(f"BT /F1 15 Tf {left + 36} {340 + value * 70:.0f} Td ({value}) Tj ET")
    verb = "rose" if values[2] > values[0] else "fell"
    said = f"Sales in the {region} {verb} from {values[0]} to {values[2]} million euros in three years."
    drawn.append(f"BT /F1 15 Tf 60 240 Td ({said}) Tj ET")
    stream = "\n".join(drawn)
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        "<< /Type /Pages /Kids [4 0 R] /Count 1 >>",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
        "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 595 842] /Contents 5 0 R "
        "/Resources << /Font << /F1 3 0 R >> >> >>",
        f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream",
    ]
    body = "".join(f"{number} 0 obj\n{text}\nendobj\n" for number, text in enumerate(objects, start=1))
    path.write_text(f"%PDF-1.4\n{body}trailer\n<< /Size {len(objects) + 1} /Root 1 0 R >>\n%%EOF\n", encoding="ascii")


class Colours:
    """Late interaction over colours; see the module."""

    def __init__(self) -> None:
        self.identity = EncoderIdentity(description={"name": "colours"}, multi_vector=True)

    def encode_pages(self, pages: Sequence[Page]) -> list[np.ndarray]:
        """Return (patches, 3) per page."""
        return [_unit(_patches(page.image).reshape(-1, 3)) for page in pages]

    def encode_queries(self, queries: Sequence[str]) -> list[np.ndarray]:
        """Return (colours, 3) per query."""
        named = [[COLOURS[word] for word in query.lower().split() if word in COLOURS] for query in queries]
        return [_unit(np.array(colours or [(1.0, 1.0, 1.0)])) for colours in named]

    def similarity_map(self, query: str, page: Page, page_VD: np.ndarray) -> np.ndarray:
        """Return (rows, columns) mean similarity with the colours of a query."""
        (query_TD,) = self.encode_queries([query])
        return (page_VD @ query_TD.T).mean(axis=1).reshape(_patches(page.image).shape[:2]).astype(np.float32)


def _patches(image: str) -> np.ndarray:
    """Return (rows, columns, 3): how far each patch's mean colour is from white, so that paper is like nothing."""
    with Image.open(image) as opened:
        size = (max(1, opened.width // PATCH), max(1, opened.height // PATCH))
        small = np.asarray(opened.convert("RGB").resize(size, Image.Resampling.BOX), np.float32) / 255
    return small - small.min(axis=2, keepdims=True) + 1e-3


def _unit(vectors_VD: np.ndarray) -> np.ndarray:
    return (vectors_VD / np.linalg.norm(vectors_VD, axis=1, keepdims=True)).astype(np.float32)


class Scripted:
    """Writes ANSWER in pieces."""

    name, is_concurrent = "scripted", True

    def start(self) -> None:
        """Do nothing."""

    def stream(self, prompt: Prompt) -> Generator[str | Answer]:
        """Yield the answer in pieces."""
        yield from (ANSWER[start : start + 40] for start in range(0, len(ANSWER), 40))
        yield Answer(prompt, ANSWER, "stop")

    def answer(self, prompts: Sequence[Prompt]) -> Iterator[Answer]:
        """Yield it for every prompt."""
        yield from (Answer(prompt, ANSWER, "stop") for prompt in prompts)

    def close(self) -> None:
        """Do nothing."""


def take(tab: Tab, url: str, files: Sequence[Path], out: Path) -> None:
    """Add documents, ask, and take the pictures."""
    tab.goto(url)
    tab.locator("#files input[type=file]").set_input_files([str(file) for file in files])
    tab.locator(f"#files [aria-label='{files[-1].name}']").wait_for()
    tab.get_by_role("button", name="Add", exact=True).click()
    tab.get_by_text("added or changed").wait_for()
    tab.locator("#documents button").first.click()
    tab.locator("#documents td", has_text=files[0].name).wait_for()
    tab.locator("#remove").scroll_into_view_if_needed()
    tab.screenshot(path=out / "app_documents.png")
    tab.locator("#documents button").first.click()
    tab.evaluate("window.scrollTo(0, 0)")
    tab.locator("#question textarea").fill(QUESTION)
    tab.get_by_role("button", name="Ask", exact=True).click()
    tab.wait_for_selector("#answer .cards button")
    tab.wait_for_function("[...document.querySelectorAll('#found figure > button img')].every(i => i.naturalWidth > 0)")
    tab.screenshot(path=out / "app.png")
    tab.locator("#answer .cards button").first.click()
    sheet = tab.locator("#page-1")
    sheet.get_by_text("like the question").click()
    tab.wait_for_timeout(500)
    sheet.screenshot(path=out / "app_evidence.png")
    sheet.get_by_text("like the question").click()
    tab.wait_for_timeout(500)
    sheet.screenshot(path=out / "app_map.png")


def main() -> None:
    """Make all pictures."""
    top = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    top.add_argument("--out", type=Path, default=PICTURES)
    out = top.parse_args().out
    browser = next(found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name)))
    with tempfile.TemporaryDirectory(prefix="rsgrpo-pictures-") as scratch, sync_playwright() as driver:
        folder, encoder = Path(scratch), Colours()
        store, files = folder / "sales", [folder / f"{region}.pdf" for region in SALES]
        for file in files:
            write_chart(file, file.stem)
        (folder / "broken.pdf").write_bytes(b"%PDF-1.4 cut off")
        files.append(folder / "broken.pdf")
        reader = Reader(Scripted(), "{images}\n{question}", "", "")
        anyone: Any = encoder
        library = Library(store, store / "index", anyone, reader, LibrarySettings(workers=1), Console(live=False))
        options = app.parser().parse_args([str(store), "-k", "4"])
        page = app.build_page(library, options, folder)
        _, url, _ = page.launch(
            server_name="127.0.0.1", ssr_mode=False, quiet=True, prevent_thread_lock=True, css=CSS,
            allowed_paths=page.allowed_paths, footer_links=[],
        )  # fmt: skip
        opened = driver.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        tab = opened.new_context(viewport={"width": 1400, "height": 900}).new_page()
        tab.set_default_timeout(120_000)
        try:
            take(tab, url, files, out)
        finally:
            opened.close()
            page.close(verbose=False)


if __name__ == "__main__":
    main()
