"""From a pile of documents to the pages that answer: `python -m recipes.retrieve --help`.

This is the command line; the work is done in `recipes.retrieval`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path

from PIL import Image

from recipes.answers.options import Parser, add_options, chosen
from recipes.answers.reader import Reader
from recipes.retrieval.answers.evidence import cited_pages, faults_of
from recipes.retrieval.answers.generation import Answered, AskedQuestion, answer_all
from recipes.retrieval.answers.heat import heated
from recipes.retrieval.answers.highlight import highlighted
from recipes.retrieval.answers.told_boxes import marks_of
from recipes.retrieval.command_line import (
    EXTRAS,
    KEPT,
    add_answerer,
    add_encoder,
    add_search_options,
    add_sync,
    encoder_settings,
    index_folder,
    open_encoder,
    open_reader,
    open_retriever,
)
from recipes.retrieval.encoders.base import EncoderIdentity, identify
from recipes.retrieval.evaluation.commands import add_evaluation
from recipes.retrieval.pages.catalogue import add_catalogue
from recipes.retrieval.pages.ingest import ingest
from recipes.retrieval.pages.ocr import require_ocr
from recipes.retrieval.pages.settings import RenderSettings
from recipes.retrieval.pages.store import PageStore
from recipes.retrieval.search.found import FoundPage
from recipes.retrieval.search.index import DTYPES, VectorIndex
from recipes.retrieval.search.retriever import Retriever
from recipes.retrieval.search.update import EncodeStream, encode_here, fill_index
from recipes.retrieval.sync_command import add_sync_command
from recipes.serve.documents_command import add_serve_command
from rollout.errors import printable
from rsgrpo.errors import InputError, RsgrpoError, run_program
from rsgrpo.records.console import Console


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; return the exit code: 2 for wrong input, 1 for a failure, 130 after Ctrl-C."""
    options = parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname).1s %(name)s: %(message)s")
    return run_program(lambda: options.run(options), kept=KEPT, extras=EXTRAS)


def parser() -> argparse.ArgumentParser:
    """Return the command line's grammar."""
    top = Parser(prog="python -m recipes.retrieve", description="Visual retrieval: ingest, index, search, ask.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    _add_ingest(commands.add_parser("ingest", help="render documents into a store of page images"))
    add_catalogue(commands)
    _add_index(commands.add_parser("index", help="encode a store's pages; run again after an ingest"))
    add_sync_command(commands.add_parser("sync", help="ingest what has changed and bring the indexes in line"))
    _add_search(commands.add_parser("search", help="find the pages for a question"))
    _add_ask(commands.add_parser("ask", help="find the pages and answer from them"))
    add_serve_command(commands.add_parser("serve", help="search, ask and keep documents over HTTP"))
    add_evaluation(commands)
    return top


def _add_ingest(command: argparse.ArgumentParser) -> None:
    command.description = "Render documents into a store. Run it again to add, update and remove what has changed."
    command.add_argument("documents", nargs="+", type=Path, metavar="DOCS", help="folders (recursively) or files")
    command.add_argument("--out", type=Path, required=True, metavar="STORE", help="folder of the pages")
    add_options(command, RenderSettings)
    command.add_argument("--page-timeout-s", type=float, default=120.0, help="a document without progress is abandoned")
    command.add_argument("--document-timeout-s", type=float, default=3600.0, help="limit of a document as a whole")
    command.add_argument("--checksum", action="store_true", help="read files whose size and time have not changed, too")
    command.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    command.add_argument("--prune", action="store_true", help="remove even all or most documents of a folder")
    command.set_defaults(run=_ingest)


def _ingest(options: argparse.Namespace) -> None:
    settings = chosen(RenderSettings, options)
    if options.ocr:
        require_ocr(options.ocr)
    with Console() as console:
        report = ingest(
            options.documents, options.out, settings, num_workers=options.workers,
            page_timeout_s=options.page_timeout_s, console=console, prune=options.prune,
            document_timeout_s=options.document_timeout_s, checksum=options.checksum,
        )  # fmt: skip
        rows: list[tuple[str, int | str]] = [
            ("documents rendered", report.num_rendered),
            ("unchanged", report.num_unchanged),
            ("removed", report.num_removed),
            ("not read", f"{report.num_skipped} (list --skipped)" if report.num_skipped else 0),
            ("with hidden parts", f"{report.num_noted} (list --notes)" if report.num_noted else 0),
            ("errors", f"{len(report.errors)} (list --errors)" if report.errors else 0),
            ("pages in the store", report.num_pages),
        ]
        console.summary(f"store {options.out}", [(what, str(count)) for what, count in rows])


def _add_index(command: argparse.ArgumentParser) -> None:
    command.description = "Encode the pages that the index lacks, and delete those that are no longer in the store."
    add_encoder(command)
    command.add_argument(
        "--shard-pages",
        type=int,
        default=2_048,
        help="pages per shard, and the most encoded again after a crash",
    )
    command.add_argument("--index-dtype", choices=DTYPES, default="float16", help="precision of the vectors on disk")
    command.add_argument(
        "--workers", type=int, default=0, help="models in parallel on Ray; 0: one model, in this process"
    )
    command.add_argument("--gpus-per-worker", type=float, help="GPUs per model; default: 1 if Ray has GPUs")
    command.add_argument("--ray-address", default="", help="auto joins a running Ray; default: start one")
    command.add_argument("--faiss", choices=("flat", "ivf"), help="also build a FAISS file for search --backend")
    command.set_defaults(run=_index)


def _index(options: argparse.Namespace) -> None:
    store = PageStore.open(options.store)
    with Console() as console:
        identity, stream = (_stream_on_ray if options.workers else _stream_here)(options)
        index = VectorIndex.create(index_folder(options), identity, options.index_dtype)
        report = fill_index(store, index, stream, shard_pages=options.shard_pages, console=console)
        if options.faiss:
            console.info(f"wrote {index.build_faiss(options.faiss)}")
        if identity.settings is not None and identity.settings.kind == "text":
            num_blank = len(store.page_ids()) - len(store.page_ids(with_text=True))
            if num_blank:
                remedy = "ingest to a new store with --ocr to read them"
                console.warning(f"{num_blank} pages have no text and are left out; {remedy}")
        rows = [("added", report.num_added), ("deleted", report.num_deleted), ("pages", report.num_pages)]
        console.summary(f"index {index.folder}", [(what, str(count)) for what, count in rows])


def _stream_here(options: argparse.Namespace) -> tuple[EncoderIdentity, EncodeStream]:
    encoder = open_encoder(options)
    return encoder.identity, partial(encode_here, encoder, batch_pages=8 * options.batch_size)


def _stream_on_ray(options: argparse.Namespace) -> tuple[EncoderIdentity, EncodeStream]:
    from recipes.retrieval.encoders.on_ray import RaySettings, encode_on_ray

    settings = encoder_settings(options)
    if settings.kind == "imported":
        raise InputError("--workers is for models, but --kind imported only copies vectors; omit it")
    identity, ray = identify(settings), RaySettings(options.workers, options.gpus_per_worker, options.ray_address)
    return identity, partial(encode_on_ray, identity, ray)


def _add_search(command: argparse.ArgumentParser) -> None:
    command.description = "Find the pages for a question: a table, or JSON lines."
    add_encoder(command)
    command.add_argument("queries", nargs="+", metavar="QUERY", help="a question")
    add_search_options(command)
    add_sync(command)
    command.add_argument("--json", action="store_true", help="one JSON line per query")
    _add_maps(command)
    command.set_defaults(run=_search)


def _add_maps(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--similarity-maps", type=Path, metavar="FOLDER",
        help="write the found pages with the places that are like the question (needs a late-interaction index)",
    )  # fmt: skip


def _search(options: argparse.Namespace) -> None:
    retriever = open_retriever(options)
    for query, found in zip(options.queries, retriever.search(options.queries, options.k), strict=True):
        _write_maps(options, retriever, query, found)
        if options.json:
            pages = [asdict(page) | {"text": page.text[:500]} for page in found]
            reason = {} if found else {"why": retriever.why_none}
            print(json.dumps({"query": query, "pages": pages} | reason, ensure_ascii=False))
        else:
            why = f": {retriever.why_none}" if retriever.why_none else ""
            print(printable("\n".join([query, *(table_lines(found) if found else [f"  (no pages{why})"])])))


def _add_ask(command: argparse.ArgumentParser) -> None:
    command.description = "Answer a question from the pages that it finds, and cite document and page."
    add_encoder(command)
    command.add_argument("question", metavar="QUESTION", help="about any pages of the store")
    add_search_options(command)
    add_sync(command)
    add_answerer(command)
    command.add_argument("--json", action="store_true", help="one JSON line")
    _add_maps(command)
    command.add_argument(
        "--evidence-images", type=Path, metavar="FOLDER", help="write the cited pages with their evidence highlighted"
    )
    command.set_defaults(run=_ask)


def _ask(options: argparse.Namespace) -> int:
    retriever = open_retriever(options)
    (pages,) = retriever.search([options.question], options.k, distinct=True)
    _write_maps(options, retriever, options.question, pages)
    if not pages and retriever.why_none:
        raise InputError(f"no page was found: {retriever.why_none}")
    reader = open_reader(options, options.k)
    with closing(reader.answerer):
        asked = AskedQuestion("question", options.question, tuple(pages))
        (answered,) = answer_all([asked], options.setting, reader)
    failed = answered.line["finish_reason"] == "error"
    if options.evidence_images is not None:
        _write_evidence(options, answered, reader)
    if options.json:
        found = {"pages": [asdict(page) | {"text": page.text[:500]} for page in pages]}
        cited = {"cited": [{"document": page.document, "page": page.number} for page in answered.cited]}
        weights = {"weights": list(answered.weights)} if answered.weights else {}
        print(json.dumps(answered.line | cited | weights | found, ensure_ascii=False))
        return int(failed)
    if failed:
        raise RsgrpoError(answered.line["errors"][0])
    note = " (the pages are insufficient)" if answered.line["insufficient"] else ""
    print(printable(f"answer: {answered.line['answer'] or answered.line['raw'] or '(none)'}{note}"))
    for source in cited_pages(answered):
        print(printable(f"  [{source.number}] {source.page.place}: {source.text}".rstrip(": ")))
    for fault in faults_of(answered.line):
        print(printable(f"fault: {fault}"))
    print(printable("\n".join(["pages:", *table_lines(pages)])))
    return 0


def _write_evidence(options: argparse.Namespace, answered: Answered, reader: Reader) -> None:
    """Write the cited pages with boxes around their evidence; of pages without boxes, the plain image."""
    options.evidence_images.mkdir(parents=True, exist_ok=True)
    documents = PageStore.open(options.store).documents()
    for source in cited_pages(answered):
        boxes = () if answered.pasted else marks_of(source.page, source.text, documents, reader)
        file = options.evidence_images / f"{source.number}-{source.page.page_id}.png"
        highlighted(source.page, boxes).save(file)
        print(f"{file}: {len(boxes)} marks", file=sys.stderr)


def _write_maps(options: argparse.Namespace, retriever: Retriever, query: str, found: Sequence[FoundPage]) -> None:
    """Write found pages with their similarity maps, if asked to.

    Raises:
        InputError: no index of the search has them.
    """
    folder = options.similarity_maps
    if folder is None:
        return
    if not retriever.has_late:
        raise InputError(
            "--similarity-maps needs a late-interaction index; make one with `index --kind late`, and name it with "
            "--index, --with-index or --rerank-index"
        )
    maps = retriever.similarity_maps(query, [page.page_id for page in found])
    folder.mkdir(parents=True, exist_ok=True)
    for page in found:
        if page.page_id not in maps:
            print(f"{printable(page.place)}: the model's vectors have no places on the page", file=sys.stderr)
            continue
        file = folder / f"{hashlib.sha256(query.encode()).hexdigest()[:8]}-{page.rank}-{page.page_id}.png"
        with Image.open(page.image, formats=("PNG", "JPEG")) as image:
            heated(image, maps[page.page_id]).save(file)
        rows, columns = maps[page.page_id].shape
        print(f"{file}: {rows} x {columns} patches", file=sys.stderr)


def table_lines(found: Sequence[FoundPage]) -> list[str]:
    """Return the lines of a table of found pages; below a page its other names and its near-duplicates."""
    rows = [("rank", "score", "page", "document", "image")]
    for page in found:
        number = f"{page.number} ({page.label})" if page.label else str(page.number)
        rows.append((str(page.rank), f"{page.score:.4f}", number, page.document, page.image))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)) for row in rows]
    roots = {page.root for page in found}
    shown = [lines[0]]
    for page, line in zip(found, lines[1:], strict=True):
        shown.append(line)
        also = ([f"in {page.root}"] if len(roots) > 1 else []) + [f"also {name}" for name in (*page.copies, *page.near)]
        if also:
            shown.append(f"  {'':{widths[0]}}  {'; '.join(also)}")
    return shown


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # paths need not be valid text
    sys.exit(main())
