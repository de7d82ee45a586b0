"""The commands of `recipes.retrieve` for what is in a store: list and remove."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from recipes.retrieval.pages.store import DocumentRow, PageStore, shown, single_writer
from rsgrpo.errors import InputError

UPLOADS = "uploads"  # folder in the store for copies of documents that were added by hand


@dataclass(frozen=True, slots=True)
class Removal:
    """What was removed. still_there: files outside of the store, which the next ingest of their root adds again."""

    rows: tuple[DocumentRow, ...]
    num_pages: int
    still_there: tuple[DocumentRow, ...]


def remove_documents(store: PageStore, names: Sequence[str]) -> Removal:
    """Take documents out of a store: by name, by path, or all of a folder or root, whether it still exists or not.

    Copies that were uploaded into the store are deleted; other files are left alone. Indexes follow when they are
    brought in line.

    Raises:
        InputError: a name matches nothing; nothing is removed then.
    """
    with single_writer(store.folder):
        rows = store.documents()
        doomed: dict[bytes, DocumentRow] = {}
        for name in names:
            found = [row for row in rows if _is_named(row, name)]
            if not found:
                roots = ", ".join(sorted({row.root for row in rows})) or "none"
                raise InputError(
                    f"nothing in {store.folder} is called {name}; name a document, a folder or a root ({roots})"
                )
            doomed |= {row.path: row for row in found}
        pages_before = len(store.page_ids())
        for row in doomed.values():
            file = Path(os.fsdecode(row.path))
            if file.parent == (store.folder / UPLOADS).resolve():
                file.unlink(missing_ok=True)
        store.commit(row for row in rows if row.path not in doomed)
        store.collect_garbage()
        still_there = [row for row in doomed.values() if not row.skipped and os.path.exists(row.path)]
        return Removal(tuple(doomed.values()), pages_before - len(store.page_ids()), tuple(still_there))


def _is_named(row: DocumentRow, name: str) -> bool:
    """Whether a name means this file: its document name, its path, or a folder or root above it."""
    whole, path = f"{row.root}/{row.document}", shown(os.path.abspath(name))
    folder = name.rstrip("/")
    return (
        name in (row.document, row.root)
        or path == row.root
        or row.document.startswith(f"{folder}/")
        or any(whole == place or whole.startswith(f"{place}/") for place in (folder, path))
    )


def add_catalogue(commands: Any) -> None:
    """Add the commands."""
    listing = commands.add_parser("list", help="list the documents of a store, and the files that were not taken")
    listing.description = "List the documents of a store with their pages, roots, notes and errors."
    listing.add_argument("store", type=Path, metavar="STORE", help="folder that ingest made")
    which = listing.add_mutually_exclusive_group()
    which.add_argument("--skipped", action="store_true", help="files that are not read, and why")
    which.add_argument("--errors", action="store_true", help="documents without pages, or without some of them")
    which.add_argument("--notes", action="store_true", help="documents with hidden slides or sheets, attachments, ...")
    listing.add_argument("--json", action="store_true", help="one JSON line per file")
    listing.set_defaults(run=_list)
    remove = commands.add_parser("remove", help="take documents, folders or roots out of a store")
    remove.description = "Take documents out of a store; the files themselves are left alone, except uploaded copies."
    remove.add_argument("store", type=Path, metavar="STORE", help="folder that ingest made")
    remove.add_argument("names", nargs="+", metavar="NAME", help="a document, a folder or a root, even if it is gone")
    remove.set_defaults(run=_remove)


def _list(options: argparse.Namespace) -> None:
    rows = PageStore.open(options.store).documents()
    chosen = [row for row in rows if _is_chosen(row, options)]
    if options.json:
        for row in chosen:
            print(json.dumps(asdict(row) | {"path": shown(row.path)}, ensure_ascii=False))
        return
    for root in sorted({row.root for row in chosen}):
        print(root)
        for line in _lines(row for row in chosen if row.root == root):
            print(f"  {line}")
    skipped = sum(bool(row.skipped) for row in rows)
    errors = sum(bool(row.error) for row in rows)
    pages = sum(row.num_pages for row in rows)
    print(f"{len(rows) - skipped} documents, {pages} pages; {errors} with errors; {skipped} files not read")


def _is_chosen(row: DocumentRow, options: argparse.Namespace) -> bool:
    if options.skipped or options.errors or options.notes:
        return bool(row.skipped if options.skipped else row.error if options.errors else row.note)
    return not row.skipped


def _lines(rows: Iterable[DocumentRow]) -> list[str]:
    """Return a line for each row: pages, name, and what is to be said of it."""
    return [
        f"{'-' if row.skipped else row.num_pages:>5}  {row.document}" + "".join(f"  {said}" for said in _remarks(row))
        for row in rows
    ]


def _remarks(row: DocumentRow) -> list[str]:
    kinds = (("not read", row.skipped), ("error", row.error), ("note", row.note))
    return [f"[{kind}: {said}]" for kind, said in kinds if said]


def _remove(options: argparse.Namespace) -> None:
    store = PageStore.open(options.store)
    removal = remove_documents(store, options.names)
    print(f"removed {len(removal.rows)} files with {removal.num_pages} pages from {store.folder}")
    if removal.still_there:
        first = shown(removal.still_there[0].path)
        print(f"{len(removal.still_there)} of them still exist ({first}, ...): the next ingest of their root adds them")
