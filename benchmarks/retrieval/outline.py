"""Outline titles of a real manual as queries, MiniLM on its text layer: `python -m benchmarks.retrieval.outline`.

`python tools/fetch_test_documents.py` fetches the manual and the model; another PDF with an outline serves as well.
Runs the commands that a user would: ingest, index, run, evaluate.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from recipes import retrieve
from recipes.retrieval.pages.store import PageStore
from tools.fetch_test_documents import MANUAL, MODEL


def outline(file: Path) -> list[tuple[str, int]]:
    """Return title and page number of every entry of several words that is the only one of its title."""
    import pypdfium2

    with pypdfium2.PdfDocument(file) as document:
        entries = [(mark.get_title(), mark.get_dest()) for mark in document.get_toc()]
        found = [(title, dest.get_index() + 1) for title, dest in entries if dest is not None]
    titles = [title for title, _ in found]
    return [(title, page) for title, page in found if titles.count(title) == 1 and len(title.split()) >= 2]


def write_judgments(titles: Sequence[tuple[str, str]], out: Path) -> None:
    """Write OUT/queries.jsonl and OUT/qrels.tsv from titles and what judgments call their pages."""
    queries = [json.dumps({"_id": f"q{row}", "text": title}) for row, (title, _) in enumerate(titles)]
    (out / "queries.jsonl").write_text("".join(f"{line}\n" for line in queries))
    (out / "qrels.tsv").write_text("".join(f"q{row}\t{page}\t1\n" for row, (_, page) in enumerate(titles)))


def main() -> int:
    """Print the scores, and what chance would give."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pdf", type=Path, default=MANUAL)
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--kind", default="text")
    parser.add_argument("--dpi", default="60", help="the text layer is the same at any")
    parser.add_argument("--out", type=Path, default=Path("outline"))
    options = parser.parse_args()
    out, store = options.out, str(options.out / "store")
    encoder = ["--model", options.model, "--kind", options.kind]
    out.mkdir(parents=True, exist_ok=True)
    titles = outline(options.pdf)
    write_judgments([(title, f"{options.pdf.name}#{page}") for title, page in titles], out)
    run = str(out / "outline.run")
    for command in (
        ["ingest", str(options.pdf), "--out", store, "--dpi", options.dpi],
        ["index", store, *encoder],
        ["run", store, *encoder, "--queries", str(out / "queries.jsonl"), "--out", run, "-k", "10"],
        ["evaluate", run, "--qrels", str(out / "qrels.tsv"), "--store", store],
    ):
        code = retrieve.main(command)
        if code:
            return code
    num_pages = len(PageStore.open(Path(store)).page_ids())
    print(f"chance: recall@1 {1 / num_pages:.4f}, recall@10 {min(1.0, 10 / num_pages):.4f} ({num_pages} pages)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
