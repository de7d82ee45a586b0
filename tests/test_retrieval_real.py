"""Real documents and a real text model: `python tools/fetch_test_documents.py` fetches them; skipped until then."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from recipes import retrieve
from recipes.retrieval.documents import RenderSettings
from recipes.retrieval.ingest import ingest
from recipes.retrieval.store import PageStore
from rsgrpo.console import Console
from tools.fetch_test_documents import MANUAL, MODEL

ROOT = Path(__file__).parent.parent

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not MANUAL.exists() or not MODEL.exists(), reason="run tools/fetch_test_documents.py"),
]


def outline(file: Path) -> list[tuple[str, int]]:
    """Return title and page number of every entry that is the only one of its title."""
    import pypdfium2

    with pypdfium2.PdfDocument(file) as document:
        entries = [(mark.get_title(), mark.get_dest()) for mark in document.get_toc()]
        found = [(title, dest.get_index() + 1) for title, dest in entries if dest is not None]
    titles = [title for title, _ in found]
    return [(title, page) for title, page in found if titles.count(title) == 1 and len(title.split()) >= 2]


def test_outline_titles_find_their_pages_and_killed_commands_go_on(tmp_path, capsys):
    for package in ("pypdfium2", "sentence_transformers", "pytrec_eval"):
        pytest.importorskip(package, reason="needs the retrieval extra")
    store = tmp_path / "store"
    quiet = Console(io.StringIO())
    report = ingest([MANUAL.parent], store, RenderSettings(dpi=50), num_workers=2, page_timeout_s=60, console=quiet)
    assert report.num_pages > 300
    options = ["--kind", "text", "--model", str(MODEL), "--device", "cpu", "--shard-pages", "16"]
    command = [sys.executable, "-m", "recipes.retrieve", "index", str(store), *options]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    shards = store / "index" / "shards"
    deadline = time.monotonic() + 240
    while len(list(shards.glob("*.npy")) if shards.exists() else ()) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert retrieve.main(["index", str(store), *options]) == 0
    shown = capsys.readouterr().out
    added = int(next(line.split()[1] for line in shown.splitlines() if line.split()[:1] == ["added"]))
    assert 0 < added < report.num_pages  # the shards of the killed command were kept
    index_pages = [page for file in shards.glob("*.ids") for page in file.read_text().splitlines()]
    assert sorted(index_pages) == sorted(PageStore.open(store).page_ids())  # nothing lost, nothing twice

    titles = outline(MANUAL)
    queries = "".join(json.dumps({"_id": f"q{row}", "text": title}) + "\n" for row, (title, _) in enumerate(titles))
    (tmp_path / "queries.jsonl").write_text(queries)
    judged = "".join(f"q{row}\tgnuplot.pdf#{page}\t1\n" for row, (_, page) in enumerate(titles))
    (tmp_path / "qrels.tsv").write_text(judged)
    run = str(tmp_path / "minilm.run")
    search = ["run", str(store), *options[:-2], "--queries", str(tmp_path / "queries.jsonl"), "--out", run, "-k", "10"]
    assert retrieve.main(search) == 0
    assert retrieve.main(["evaluate", run, "--qrels", str(tmp_path / "qrels.tsv"), "--store", str(store)]) == 0
    scores = json.loads((tmp_path / "minilm.scores.json").read_text())
    print(scores["num_queries"], scores["mean"])
    assert scores["num_queries"] > 100
    assert scores["mean"]["recall@10"] > 0.5  # chance: 10 of 311 pages = 0.03
