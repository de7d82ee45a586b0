"""What one document may take, and what an unmounted folder may not do."""

from __future__ import annotations

import errno
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from PIL import Image

from recipes.retrieval.pages.confined import alone, leave_network
from recipes.retrieval.pages.documents import render
from recipes.retrieval.pages.libreoffice import _refuse_bomb
from recipes.retrieval.pages.settings import DocumentError, RenderSettings
from recipes.retrieval.pages.store import PageStore, StoreError
from recipes.retrieval.pages.workers import run_tasks
from rsgrpo.errors import InputError
from tests.material.retrieval import QUIET, ingested


def pages(folder: Path, count: int) -> None:
    folder.mkdir(exist_ok=True)
    for number in range(count):
        Image.new("RGB", (20, 20), (number * 9, 0, 0)).save(folder / f"{number}.png")


def test_an_emptied_folder_empties_the_store_only_on_request(tmp_path):
    from recipes.retrieval.pages.ingest import ingest

    docs, store = tmp_path / "docs", tmp_path / "store"
    pages(docs, 3)
    assert ingested(store, docs).num_pages == 3
    for file in docs.iterdir():
        file.unlink()
    with pytest.raises(InputError, match=r"3 of the 3 documents .* are gone\. Mount the disk, or add --prune"):
        ingested(store, docs)
    assert len(PageStore.open(store).page_ids()) == 3
    report = ingest([docs], store, RenderSettings(), num_workers=1, page_timeout_s=60, console=QUIET, prune=True)
    assert (report.num_removed, report.num_pages) == (3, 0)


def test_a_document_that_fills_the_disk_is_refused(tmp_path):
    source, out = tmp_path / "a.tif", tmp_path / "out"
    out.mkdir()
    noise = [Image.effect_noise((700, 700), 90) for _ in range(4)]
    noise[0].save(source, save_all=True, append_images=noise[1:])
    with pytest.raises(DocumentError, match=r"its first 2 pages take 1 MiB, more than --max-rendered-mb 1; raise it"):
        render(source, out, RenderSettings(max_rendered_mb=1))


def lying_archive(path: Path) -> Path:
    """Write 3 MiB under a declared size of 10 bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("content.xml", bytes(3 << 20))
    content = path.read_bytes()
    path.write_bytes(content.replace(struct.pack("<I", 3 << 20), struct.pack("<I", 10)))
    return path


def test_an_archive_is_measured_by_what_it_holds(tmp_path):
    with pytest.raises(DocumentError, match="its archive is damaged: "):
        _refuse_bomb(lying_archive(tmp_path / "lies.odt"), RenderSettings(max_unpacked_mb=1))
    with zipfile.ZipFile(tmp_path / "large.odt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("content.xml", bytes(2 << 20))
    with pytest.raises(DocumentError, match="unpacks to more than --max-unpacked-mb 1"):
        _refuse_bomb(tmp_path / "large.odt", RenderSettings(max_unpacked_mb=1))
    _refuse_bomb(tmp_path / "large.odt", RenderSettings(max_unpacked_mb=2))


def test_a_foreign_store_names_no_file_outside_of_it(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    docs, store = tmp_path / "docs", tmp_path / "store"
    pages(docs, 1)
    ingested(store, docs)
    table = pq.read_table(store / "pages.parquet")
    for name in ("../secret.png", "/etc/passwd", "pages/../../secret.png"):
        pq.write_table(
            table.set_column(table.schema.get_field_index("image"), "image", pa.array([name])), store / "pages.parquet"
        )
        with pytest.raises(StoreError, match="which is not a page of the store"):
            list(PageStore.open(store).pages())


def test_files_of_other_programs_in_a_store_are_left_alone(tmp_path):
    docs, store = tmp_path / "docs", tmp_path / "store"
    pages(docs, 2)
    ingested(store, docs)
    shelf = next((store / "pages").iterdir())
    (shelf / ".DS_Store").write_text("x")
    (shelf / ".snapshot").mkdir()
    assert ingested(store, docs).num_pages == 2
    assert (shelf / ".DS_Store").exists()
    assert (shelf / ".snapshot").exists()


def connects(port: int, alive: object) -> str:
    with socket.socket() as ours:
        try:
            ours.connect(("127.0.0.1", port))
        except OSError as error:
            return errno.errorcode[error.errno or 0]
    return "connected"


def test_a_document_that_takes_over_its_worker_reaches_no_network():
    if not in_a_fork(leave_network):
        pytest.skip("this machine allows no namespaces")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        (result,) = run_tasks(connects, [port], num_workers=1, timeout_s=lambda _: 60, on_alive=lambda: None)
    assert result.value == "ENETUNREACH", result


def in_a_fork(work: Callable[[], bool]) -> bool:
    child = os.fork()
    if child == 0:
        os._exit(not work())
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_whoever_leaves_the_network_reads_and_writes_files_as_before(tmp_path):
    (tmp_path / "private").write_text("mine")
    (tmp_path / "private").chmod(0o600)

    def work() -> bool:
        leave_network()
        (tmp_path / "made").write_text((tmp_path / "private").read_text())
        return (tmp_path / "made").stat().st_uid == os.geteuid() == (tmp_path / "private").stat().st_uid

    assert in_a_fork(work)


def answers(message: bytes, alive: object) -> None:
    """Write to the parent what a worker would never write."""
    (ours,) = (fd for fd in os.listdir("/proc/self/fd") if is_socket(fd))
    with Connection(int(ours)) as connection:
        connection.send_bytes(message)
        time.sleep(60)


def is_socket(fd: str) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{fd}").startswith("socket:")
    except OSError:
        return False


class RunsCode:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (os.environ["TESTS_RAN"],)


def test_a_worker_that_was_taken_over_runs_no_code_in_its_parent(tmp_path, monkeypatch):
    monkeypatch.setenv("TESTS_RAN", str(tmp_path / "ran"))
    told = [pickle.dumps(RunsCode()), b"[1", b"{}", b"[1, 2, 3]", b"[1]"]
    results = run_tasks(answers, told, num_workers=1, timeout_s=lambda _: 60, on_alive=lambda: None)
    assert ["answered nonsense" in result.died for result in results] == [True] * 5
    assert not (tmp_path / "ran").exists()


OFFICE = """#!/bin/sh
echo $$ >> {pids}
sh -c 'echo $$ >> {pids}; sleep 600' &
wait
"""
INGEST = """
from pathlib import Path
from tests.material.retrieval import ingested
ingested(Path({store!r}), Path({docs!r}))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_libreoffice_ends_with_its_parent_and_leaves_no_folder(tmp_path, monkeypatch, number):
    if not alone():
        pytest.skip("this machine allows no namespaces")
    docs, store, pids = tmp_path / "docs", tmp_path / "store", tmp_path / "pids"
    pages(docs, 1)
    (docs / "a.odt").write_bytes(b"text")
    office = tmp_path / "soffice"
    office.write_text(OFFICE.format(pids=pids))
    office.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    program = INGEST.format(store=str(store), docs=str(docs))
    with subprocess.Popen([sys.executable, "-c", program], env=environment) as process:
        while not (pids.exists() and len(pids.read_text().split()) == 2):
            time.sleep(0.05)
        process.send_signal(number)
    while running := [line for line in ps() if str(office) in line or "sleep 600" in line]:
        assert running
        time.sleep(0.05)
    (docs / "a.odt").unlink()
    assert ingested(store, docs).num_pages == 1
    assert not list(store.glob(".rsgrpo-office-*"))


def ps() -> list[str]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(entry.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue
    return found
