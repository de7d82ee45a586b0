"""One large PDF on several cores: the pool that shares its pages, and a store that equals that of one worker."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pypdfium2", reason="needs the retrieval extra")

from recipes.retrieval.pages.documents import finished_pages
from recipes.retrieval.pages.settings import DocumentError, RenderSettings
from recipes.retrieval.pages.store import PageStore
from recipes.retrieval.pages.tasks import PartTask, RenderTask, render_document, render_part, split_of
from recipes.retrieval.pages.workers import Split, TaskResult, run_tasks
from tests.material.retrieval import ingested, stop_python, write_pdf


def contents(store: Path) -> dict[str, bytes]:
    """Return every file of the store's pages, by its path in the store."""
    return {str(file.relative_to(store)): file.read_bytes() for file in store.glob("pages/*/*/*")}


def pages_of(store: Path) -> list[tuple[str, int, str]]:
    return [(page.page_id, page.number, page.text) for page in PageStore.open(store).pages()]


# The pool


def split(task: Any, value: Any) -> Split | None:
    """Split where a worker asks for it."""
    if value == "nonsense":
        raise ValueError(value)
    return Split(tuple(value["parts"]), value["then"]) if isinstance(value, dict) else None


def meet(task: Any, alive: Callable[[], None]) -> Any:
    """Split a folder into two parts, each of which ends only when the other has begun."""
    if isinstance(task, str):
        return {"parts": [[task, 1], [task, 2]], "then": ["then", task]}
    folder, part = Path(task[0]), task[1]
    if task[0] == "then":
        return sorted(file.name for file in Path(part).iterdir())
    (folder / f"{part}-{os.getpid()}").touch()
    while len(list(folder.iterdir())) < 2:
        alive()
        time.sleep(0.01)
    return None


def pooled(work: Any, tasks: Sequence[Any], workers: int = 2) -> list[TaskResult]:
    return list(
        run_tasks(
            work, tasks, num_workers=workers, timeout_s=lambda _: 30, on_alive=lambda: None, total_s=60, split=split
        )
    )


def test_parts_of_a_task_are_done_side_by_side_and_give_one_result(tmp_path):
    (result,) = pooled(meet, [str(tmp_path)])
    (first, second) = result.value
    assert (first[0], second[0]) == ("1", "2")
    assert first.partition("-")[2] != second.partition("-")[2]  # two processes


def split_or_fail(task: Any, alive: Callable[[], None]) -> Any:
    if task == "dies":
        return {"parts": ["crash", "well", "late"], "then": "never done"}
    if task == "fails":
        return {"parts": ["error", "well"], "then": "never done either"}
    if task == "crash":
        os._exit(7)
    if task == "error":
        raise DocumentError("it is too large")
    return task if task == "nonsense" else task.upper()


def test_a_part_that_fails_costs_its_task_only():
    results = pooled(split_or_fail, ["dies", "fine", "fails", "nonsense"], workers=1)
    assert [result.task for result in results] == ["never done", "fine", "never done either", "nonsense"]
    assert results[0].died == "the process that worked on it died (exit code 7)"
    assert results[1].value == "FINE"
    assert results[2].error == "it is too large"
    assert "answered nonsense" in results[3].died


@pytest.mark.parametrize(
    "value", [{}, {"content": "../../x", "num_pages": 40}, {"content": "0" * 64, "num_pages": 10**9}]
)
def test_a_worker_that_was_taken_over_names_no_folder(value, tmp_path):
    task = RenderTask(b"a.pdf", str(tmp_path), RenderSettings(), num_workers=2)
    with pytest.raises(ValueError, match=r"a hash|a number of pages"):
        split_of(task, value)
    assert split_of(task, ["0" * 64, 40, "", ""]) is None
    assert list(tmp_path.iterdir()) == []


# PDFs


def test_several_workers_make_the_store_that_one_makes(tmp_path):
    large = tmp_path / "docs" / "large.pdf"
    large.parent.mkdir()
    write_pdf(large, [f"page {number}" for number in range(1, 71)])
    pages = large.read_bytes().split(b"[0 0 200 100]")
    large.write_bytes(b"[0 0 200 100]".join(pages[:40]) + b"[0 0 200 0.1]" + b"[0 0 200 100]".join(pages[40:]))
    write_pdf(large.with_name("small.pdf"), ["small"])
    reports = [ingested(tmp_path / f"store{workers}", large.parent, workers=workers) for workers in (1, 3)]
    assert reports[0] == reports[1]
    (row,) = reports[1].errors
    assert (row.document, row.num_pages) == ("large.pdf", 69)
    assert row.error.startswith("page 40: a page of 200 x 0.1 points has no area")
    assert contents(tmp_path / "store1") == contents(tmp_path / "store3")
    assert pages_of(tmp_path / "store1") == pages_of(tmp_path / "store3")
    assert not [name for name in contents(tmp_path / "store3") if "finished" in name]


def test_pages_are_shared_only_where_there_are_enough_of_them(tmp_path):
    PageStore.create(tmp_path / "store", RenderSettings().pixels())
    write_pdf(tmp_path / "a.pdf", ["text"] * 33)
    task = RenderTask(bytes(tmp_path / "a.pdf"), str(tmp_path / "store"), RenderSettings(), num_workers=2)
    whole = split_of(task, render_document(task, lambda: None))
    assert whole is not None
    assert [(part.first, part.last) for part in whole.parts] == [(1, 16), (17, 32), (33, 33)]
    write_pdf(tmp_path / "a.pdf", ["text"] * 16)
    assert list(render_document(task, lambda: None))[1:] == [16, "", ""]  # done at once


@pytest.mark.parametrize("workers", [1, 2])
def test_a_large_document_that_was_interrupted_continues_after_its_finished_pages(tmp_path, workers):
    write_pdf(tmp_path / "large.pdf", [f"page {number}" for number in range(48)], width=1_000, height=1_000)
    store = tmp_path / "store"
    command = ["-m", "recipes.retrieve", "ingest", tmp_path / "large.pdf", "--out", store, "--workers", str(workers)]

    def begun() -> list[Path]:
        """Return the files of finished pages, once every worker has finished some."""
        files = [file for file in store.glob("pages/*/.*/finished-*") if file.read_bytes().count(b"\n") >= 3]
        return files if len(files) == workers else []

    stop_python(command, lambda: bool(begun()))
    (left,) = {file.parent for file in begun()}
    with begun()[0].open("a") as file:
        file.write('{"number": 6')  # a line that was cut off
    finished = finished_pages(left)
    assert len(finished) >= 3 * workers
    before = {page.image: (left / page.image).stat().st_mtime_ns for page in finished.values()}
    ingested(store, tmp_path / "large.pdf", workers=workers)
    (content,) = store.glob("pages/*/*")
    assert {name: (content / name).stat().st_mtime_ns for name in before} == before  # not rendered again
    ingested(tmp_path / "other", tmp_path / "large.pdf")
    assert contents(store) == contents(tmp_path / "other")


def test_the_limit_of_a_document_counts_the_pages_of_all_parts(tmp_path):
    write_pdf(tmp_path / "large.pdf", ["x"] * 60, width=1_000, height=1_000)
    (row,) = ingested(tmp_path / "store", tmp_path / "large.pdf", workers=2, max_rendered_mb=1).errors
    assert "pages take 1 MiB, more than --max-rendered-mb 1" in row.error
    assert contents(tmp_path / "store") == {}


def test_a_part_leaves_finished_pages_alone(tmp_path):
    write_pdf(tmp_path / "a.pdf", ["one", "two", "three"])
    (tmp_path / "out").mkdir()
    part = PartTask(bytes(tmp_path / "a.pdf"), str(tmp_path / "out"), RenderSettings(), 2, 3)
    render_part(part, lambda: None)
    before = {number: page.text for number, page in finished_pages(tmp_path / "out").items()}
    assert before == {2: "two", 3: "three"}
    reports: list[None] = []
    render_part(part, lambda: reports.append(None))
    assert reports == []


def test_a_file_that_changes_between_its_parts_leaves_no_pages_under_the_old_name(tmp_path):
    store = PageStore.create(tmp_path / "store", RenderSettings().pixels())
    write_pdf(tmp_path / "a.pdf", ["text"] * 40)
    task = RenderTask(bytes(tmp_path / "a.pdf"), str(store.folder), RenderSettings(), num_workers=2)
    whole = split_of(task, render_document(task, lambda: None))
    assert whole is not None
    for part in whole.parts:
        render_part(part, lambda: None)
    write_pdf(tmp_path / "a.pdf", ["other"] * 40)
    with pytest.raises(DocumentError, match="the file changed while it was read"):
        render_document(whole.then, lambda: None)
    assert not list(store.folder.glob("pages/*/[!.]*"))
