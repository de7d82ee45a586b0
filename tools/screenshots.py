"""Take the pictures of docs/howto/desk.md: the page with a model at the desk, and a trajectory in a run's report.

    python tools/screenshots.py --model desk/model --run runs/desk_demo [--out docs/images]

after `make desk-demo`. The answer on the page is scripted, so that the picture needs no large model; MODEL is only its
tokenizer. A Chromium is needed (--browser), and playwright, which the `dev` extra brings.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rsgrpo.report.page import write_report

PAGES = (
    ("Annual report 2023", "Offices in Lisbon, Porto and Faro.", "Staff: 412, of whom 57 joined in 2023."),
    ("Taxes", "The tax rate of the year was 16 percent.", "Deferred taxes fell to 3.1 million.", "See note 12."),
    ("Harbours", "Traffic in Sines rose by 4 percent.", "Tax on harbour fees: none since 2019."),
    ("Outlook", "We expect a tax rate of 18 percent in 2024.", "No further offices are planned."),
    ("Energy", "Wind gave 41 percent of the power used.", "A second site opens in Sines."),
    ("People", "Half of the staff work on the coast.", "Training took 9,120 hours."),
    ("Auditors", "We have examined the accounts.", "In our opinion they are complete."),
)
QUESTION = "What was the tax rate in 2023?"
TURNS = (
    "<think>I look for pages about taxes first.</think>\n<search>tax rate</search>",
    "<think>Page [1] is about taxes, the others only mention them.</think>\n<open>1</open>",
    "<think>The print is small: a closer look.</think>\n<zoom>1 0 220 1000 470</zoom>",
    "<evidence>\n[1]: The tax rate of the year was 16 percent.\n</evidence>\n<answer>16 percent</answer>",
)
PIXELS = "200704"
REPORT_HEIGHT = 1320
VIEW: Any = {"width": 1250, "height": 860}


def write_pdf(path: Path, pages: Sequence[Sequence[str]]) -> None:
    """Write a PDF with a text layer: a title and lines on each page."""
    bodies = ["<< /Type /Catalog /Pages 2 0 R >>", "", "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"]
    kids = []
    for title, *lines in pages:
        shown = [f"BT /F1 20 Tf 30 240 Td ({title}) Tj ET"]
        shown += [f"BT /F1 11 Tf 30 {200 - 22 * row} Td ({line}) Tj ET" for row, line in enumerate(lines)]
        stream = "\n".join(shown)
        bodies.append(f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream")
        fonts = "/Resources << /Font << /F1 3 0 R >> >>"
        page = f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 300 280] /Contents {len(bodies)} 0 R {fonts} >>"
        bodies.append(page)
        kids.append(f"{len(bodies)} 0 R")
    bodies[1] = f"<< /Type /Pages /Kids [{' '.join(kids)}] /Count {len(kids)} >>"
    out, offsets = b"%PDF-1.4\n", []
    for number, body in enumerate(bodies, start=1):
        offsets.append(len(out))
        out += f"{number} 0 obj\n{body}\nendobj\n".encode("latin-1")
    table = "".join(f"{offset:010d} 00000 n \n" for offset in offsets)
    head = f"xref\n0 {len(bodies) + 1}\n0000000000 65535 f \n{table}"
    tail = f"trailer\n<< /Size {len(bodies) + 1} /Root 1 0 R >>\nstartxref\n{len(out)}\n%%EOF\n"
    path.write_bytes(out + (head + tail).encode())


@contextmanager
def app(folder: Path, model: str) -> Iterator[str]:
    """Run the page over a store of PAGES whose model writes TURNS; the value is its address."""
    write_pdf(folder / "report.pdf", PAGES)
    (folder / "script.jsonl").write_text(json.dumps({"id": "question", "responses": [TURNS]}) + "\n")
    python, store = [sys.executable, "-m"], str(folder / "store")
    subprocess.run([*python, "recipes.retrieve", "ingest", str(folder / "report.pdf"), "--out", store], check=True)
    answers = ["--engine", "fake", "--script", str(folder / "script.jsonl"), "--answer-model", model]
    options = ["--by", "words", "--desk", *answers, "--answer-max-pixels", PIXELS, "--prompt", "desk", "--port", "0"]
    with subprocess.Popen([*python, "recipes.app", store, *options], stdout=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline() if process.stdout else ""
            if "http://" not in line:
                sys.exit("the page did not start")
            yield line.split()[1]
        finally:
            process.terminate()


def picture_of_app(page: Any, url: str, out: Path) -> None:
    """Ask QUESTION and take a picture of the whole answer."""
    page.goto(url)
    page.locator("#question textarea").fill(QUESTION)
    page.get_by_role("button", name="Ask", exact=True).click()
    page.locator("#answer .answer").wait_for()
    page.wait_for_function("[...document.querySelectorAll('#found figure > button img')].every(i => i.naturalWidth)")
    page.screenshot(path=out)


def picture_of_report(page: Any, report: Path, out: Path) -> None:
    """Take a picture of the first rollouts of the report's first training step."""
    page.set_viewport_size(VIEW | {"height": REPORT_HEIGHT})  # the tools stay on top of what is scrolled
    page.goto(f"file://{report}")
    page.locator("#rollouts .tokens").first.wait_for()
    page.locator("#rollouts .tool", has_text="taught by").locator("button").last.click()  # all rewards together
    page.locator("#rollouts").evaluate("section => section.scrollIntoView()")
    page.screenshot(path=out)


def main() -> None:
    """Take both pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="desk/model", help="folder with a tokenizer")
    parser.add_argument("--run", default="runs/desk_demo", help="run whose report is shown")
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    parser.add_argument("--browser", default=shutil.which("chromium") or shutil.which("google-chrome"))
    options = parser.parse_args()
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=options.browser, args=["--no-sandbox"])
        page = browser.new_page(viewport=VIEW)
        with app(Path(scratch), options.model) as url:
            picture_of_app(page, url, options.out / "desk_app.png")
        report = write_report(options.run, Path(scratch) / "report.html")
        picture_of_report(page, report.absolute(), options.out / "desk_report.png")
        browser.close()


if __name__ == "__main__":
    main()
