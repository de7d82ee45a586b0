"""From a pile of documents to the pages that answer: `python -m recipes.retrieve --help`.

Owns the command line only; the parts are in `recipes.retrieval`.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rsgrpo.console import Console
from rsgrpo.errors import RsgrpoError

USER_ERROR = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand and return the exit code."""
    options = parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname).1s %(name)s: %(message)s")
    try:
        return options.run(options)
    except RsgrpoError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except ModuleNotFoundError as error:
        if error.name not in ("pypdfium2", "faiss", "sentence_transformers", "pytrec_eval"):
            raise
        print(f'error: {error.name} is not installed; pip install "rsgrpo[retrieval]"', file=sys.stderr)
        return USER_ERROR


def parser() -> argparse.ArgumentParser:
    """Return the command line's grammar."""
    top = argparse.ArgumentParser(prog="python -m recipes.retrieve", description=__doc__)
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    _add_ingest(commands.add_parser("ingest", help="render documents into a store of page images"))
    return top


def _add_ingest(command: argparse.ArgumentParser) -> None:
    command.description = "Render documents into a store. Run it again to add, update and take out what has changed."
    command.add_argument("documents", nargs="+", type=Path, metavar="DOCS", help="folders (recursively) or files")
    command.add_argument("--out", type=Path, required=True, metavar="STORE")
    command.add_argument("--dpi", type=int, default=150)
    command.add_argument("--image-format", choices=("png", "jpeg"), default="png")
    command.add_argument("--max-page-pixels", type=int, default=16_000_000, help="larger pages are scaled down")
    command.add_argument("--max-pages", type=int, default=10_000, help="documents with more are refused")
    command.add_argument("--max-file-mb", type=int, default=2_048, help="larger files are refused")
    command.add_argument("--max-unpacked-mb", type=int, default=4_096, help="office archives beyond are refused")
    command.add_argument("--office-timeout-s", type=int, default=300)
    command.add_argument("--page-timeout-s", type=float, default=120.0, help="a document without progress is given up")
    command.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    command.set_defaults(run=_ingest)


def _ingest(options: argparse.Namespace) -> int:
    from recipes.retrieval.documents import RenderSettings
    from recipes.retrieval.ingest import ingest

    settings = RenderSettings(
        dpi=options.dpi,
        image_format=options.image_format,
        max_page_pixels=options.max_page_pixels,
        max_pages=options.max_pages,
        max_file_mb=options.max_file_mb,
        max_unpacked_mb=options.max_unpacked_mb,
        office_timeout_s=options.office_timeout_s,
    )
    with Console() as console:
        report = ingest(
            options.documents,
            options.out,
            settings,
            num_workers=options.workers,
            page_timeout_s=options.page_timeout_s,
            console=console,
        )
        rows = [
            ("documents rendered", str(report.num_rendered)),
            ("unchanged", str(report.num_unchanged)),
            ("taken out", str(report.num_removed)),
            ("files of other kinds", str(report.num_skipped)),
            ("errors", f"{len(report.errors)}" + (" (in documents.parquet)" if report.errors else "")),
            ("pages in the store", str(report.num_pages)),
        ]
        console.summary(f"store {options.out}", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
