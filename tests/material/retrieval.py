"""Documents for the retrieval tests, made without any library but Pillow, and a store of some."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from recipes.retrieval.pages.documents import RenderedPage, render
from recipes.retrieval.pages.ingest import IngestReport, ingest
from recipes.retrieval.pages.settings import RenderSettings
from rsgrpo.records.console import Console
from tests.material import ROOT

QUIET = Console(io.StringIO())


def write_pdf(path: Path, texts: Sequence[str], *, width: int = 200, height: int = 100, seed: str = "") -> None:
    """Write a PDF with one page per text, in Helvetica; `seed` changes its bytes and nothing else."""
    objects = ["<< /Type /Catalog /Pages 2 0 R >>", "", "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"]
    kids = []
    for text in texts:
        escaped = text.replace("\\", "\\\\").replace("(", "\\(").replace(")", "\\)")
        stream = f"BT /F1 12 Tf 10 {height // 2} Td ({escaped}) Tj ET"
        objects.append(f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream")
        objects.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 {width} {height}] /Contents {len(objects)} 0 R "
            "/Resources << /Font << /F1 3 0 R >> >> >>"
        )
        kids.append(f"{len(objects)} 0 R")
    objects[1] = f"<< /Type /Pages /Kids [{' '.join(kids)}] /Count {len(kids)} >>"
    path.write_bytes(_file_of(objects, seed))


def write_form(path: Path, value: str) -> None:
    """Write a PDF whose only page is one text field, with a value and no picture of it."""
    field = f"/FT /Tx /T (name) /V ({value}) /F 4 /Rect [20 20 180 60] /P 3 0 R /DA (/F1 12 Tf 0 g)"
    fonts = "/DA (/F1 12 Tf 0 g) /DR << /Font << /F1 5 0 R >> >>"
    objects = [
        f"<< /Type /Catalog /Pages 2 0 R /AcroForm << /Fields [4 0 R] {fonts} >> >>",
        "<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 200 100] /Annots [4 0 R] >>",
        f"<< /Type /Annot /Subtype /Widget {field} >>",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    path.write_bytes(_file_of(objects))


def _file_of(objects: Sequence[str], seed: str = "") -> bytes:
    """Return the PDF of some numbered objects, the catalogue first."""
    out = io.BytesIO()
    out.write(f"%PDF-1.4\n%{seed}\n".encode())
    offsets = []
    for number, body in enumerate(objects, start=1):
        offsets.append(out.tell())
        out.write(f"{number} 0 obj\n{body}\nendobj\n".encode("latin-1"))
    start = out.tell()
    out.write(f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n".encode())
    out.write("".join(f"{offset:010d} 00000 n \n" for offset in offsets).encode())
    out.write(f"trailer\n<< /Size {len(objects) + 1} /Root 1 0 R >>\nstartxref\n{start}\n%%EOF\n".encode())
    return out.getvalue()


def write_encrypted_pdf(path: Path) -> None:
    """Write a PDF whose security handler asks for a password that is not the empty one."""
    write_pdf(path, ["secret"])
    content = path.read_bytes()
    encrypt = (
        b"/Encrypt << /Filter /Standard /V 1 /R 2 /P -4 /O <" + b"41" * 32 + b"> /U <" + b"42" * 32 + b"> >> "
        b"/ID [<00><00>] "
    )
    path.write_bytes(content.replace(b"/Root 1 0 R", encrypt + b"/Root 1 0 R"))


def write_image(path: Path, colour: str = "red", width: int = 40, height: int = 30) -> None:
    """Write a plain image in the format that the extension says."""
    Image.new("RGB", (width, height), colour).save(path)


def ingested(store: Path, *roots: Path, checksum: bool = False, workers: int = 1, **settings: Any) -> IngestReport:
    """Ingest roots into a store without a word. settings: fields of RenderSettings."""
    chosen = RenderSettings(**settings)
    return ingest(roots, store, chosen, num_workers=workers, page_timeout_s=60, console=QUIET, checksum=checksum)


def rendered(file: Path, **settings: Any) -> tuple[list[RenderedPage], str]:
    """Render a document into the folder `pages` beside it; return its pages and faults."""
    (file.parent / "pages").mkdir(exist_ok=True)
    pages, fault, _ = render(file, file.parent / "pages", RenderSettings(**settings))
    return pages, fault


def coloured_store(folder: Path, *colours: str) -> Path:
    """Ingest FOLDER/docs, a page of each colour (red, lime and blue), and return the store."""
    (folder / "docs").mkdir()
    for colour in colours or ("red", "lime", "blue"):
        write_image(folder / "docs" / f"{colour}.png", colour, 56, 56)
    ingested(folder / "store", folder / "docs")
    return folder / "store"


def write_vectors(folder: Path, page_ids: Sequence[str], pages: Any, queries: Mapping[str, Sequence[float]]) -> Path:
    """Write vectors as another program would, for --kind imported; return their folder."""
    folder.mkdir(exist_ok=True)
    (folder / "encoder.json").write_text('"by hand"')
    np.save(folder / "pages.npy", np.asarray(pages))
    (folder / "page_ids.txt").write_text("".join(f"{page_id}\n" for page_id in page_ids))
    np.save(folder / "queries.npy", np.array(list(queries.values())))
    (folder / "queries.jsonl").write_text("".join(json.dumps(query) + "\n" for query in queries))
    return folder


def stop_python(
    arguments: Sequence[str | Path], is_time: Callable[[], bool], number: signal.Signals = signal.SIGKILL
) -> tuple[int, bytes]:
    """Start `python ARGUMENTS`, send a signal to all its processes once it is time; return exit code and stderr."""
    process = subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + 240
    while not is_time():
        assert process.poll() is None, "it ended before it could be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(process.pid, number)
    _, said = process.communicate()
    return process.returncode, said
