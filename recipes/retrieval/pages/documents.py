"""From one document file to page images in a folder. It runs in worker processes.

It imports nothing heavy, so that a worker starts in a fraction of a second. pypdfium2 is not thread-safe: one document
belongs to one process.
"""

from __future__ import annotations

import json
import logging
import os
import re
import resource
import tempfile
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from PIL import Image

from recipes.retrieval.pages.djvu import SUFFIXES as DJVU
from recipes.retrieval.pages.djvu import DjvuDocument, is_djvu
from recipes.retrieval.pages.libreoffice import office_to_pdf
from recipes.retrieval.pages.ocr import read_text
from recipes.retrieval.pages.office_parts import HiddenParts
from recipes.retrieval.pages.settings import DocumentError, RenderSettings
from rollout.inputs.images import (
    MAX_ASPECT_RATIO,
    PromptError,
    decode,
    decode_frame,
    has_known_format,
    num_frames,
    opened,
)

OFFICE = frozenset(
    (  # noqa: SIM905
        ".doc .docx .docm .ppt .pptx .pptm .pps .ppsx .xls .xlsx .xlsm .xlsb .odt .odp .ods .odg .rtf .txt .md .csv "
        ".html .htm .eml .epub"
    ).split()
)
IMAGES = frozenset(".png .jpg .jpeg .tif .tiff .webp .bmp .gif .jp2 .ppm .pgm".split())  # noqa: SIM905
KNOWN = frozenset({".pdf"}) | OFFICE | IMAGES | DJVU
POINTS_PER_INCH = 72
FINISHED = "finished-{first:05d}.jsonl"  # pages so far, in the folder of a document that is rendered; of each part
MEMORY_LIMIT_BYTES = 8 << 30  # address space of one worker
SCRATCH_PREFIX = ".rsgrpo-office-"
_SAVED_AS: dict[str, tuple[str, dict[str, Any]]] = {
    "png": (".png", {"compress_level": 1}),
    "jpeg": (".jpg", {"quality": 92}),
}


@dataclass(frozen=True, slots=True)
class RenderedPage:
    """One page on disk.

    number: from 1. image: file name in the folder. text: the PDF's text layer, or OCR. label: what the document calls
    the page, "" if that is its number.
    """

    number: int
    image: str
    width: int
    height: int
    text: str
    label: str = ""


def why_skipped(path: Path) -> str:
    """Return why a file is not a document that can be read; "" if it may be one."""
    if path.suffix.lower() in KNOWN or _kind(path) != "other":
        return ""
    named = f"{path.suffix.lower()} files are not read" if path.suffix else "a file without an extension is not read"
    return f"{named}, and its content is neither a PDF, an image nor DjVu"


def is_office(path: Path) -> bool:
    """Say whether LibreOffice reads this file."""
    return path.suffix.lower() in OFFICE and _kind(path) == "other"


def render(
    path: Path, folder: Path, settings: RenderSettings, on_page: Callable[[], None] = lambda: None
) -> tuple[list[RenderedPage], str, str]:
    """Write every page of a document into a folder. Its bytes decide its kind before its extension does.

    The folder is empty, or has pages of the same PDF from a process that died, which are not rendered again.

    Args:
        on_page: called after each page.

    Returns:
        The pages, what went wrong with single pages, and what of the document is on no page ("" for nothing).

    Raises:
        DocumentError: the document has no page that can be rendered.
        OSError: `folder` cannot be written.
    """
    num_bytes = path.stat().st_size
    if num_bytes == 0:
        raise DocumentError("the file is empty (0 bytes)")
    if num_bytes > settings.max_file_mb << 20:
        size = f"the file has {num_bytes >> 20:,} MiB"
        raise DocumentError(f"{size}, more than --max-file-mb {settings.max_file_mb}; raise it")
    kind = _kind(path)
    if kind == "other" and path.suffix.lower() not in OFFICE:
        raise DocumentError(f"the content is neither a PDF, an image nor DjVu, despite the extension {path.suffix!r}")
    with tempfile.TemporaryDirectory(prefix=SCRATCH_PREFIX, dir=folder.parent) as scratch:
        if kind == "image":
            pages, faults = _write(_image_pages(path, settings), folder, settings, on_page)
            return _whole(pages, faults, folder), "; ".join(faults), ""
        if kind == "djvu":
            djvu, finished = DjvuDocument(path, Path(scratch)), finished_pages(folder)
            pages, faults = _write(_djvu_pages(djvu, settings, finished), folder, settings, on_page, finished)
            return _labelled(_whole(pages, faults, folder), djvu.labels), "; ".join(faults), ""
        if kind == "pdf":
            source, hidden = path, HiddenParts()
        else:
            source, hidden = office_to_pdf(path, Path(scratch), settings)
        labels = labels_of(source, hidden)
        finished = finished_pages(folder) if kind == "pdf" else {}
        pages, faults = _write(_pdf_pages(source, settings, finished), folder, settings, on_page, finished)
        return _labelled(_whole(pages, faults, folder), labels), "; ".join(faults), hidden.note


def render_some(
    path: Path, folder: Path, settings: RenderSettings, numbers: range, on_page: Callable[[], None]
) -> None:
    """Write some pages of a PDF into a folder, where `render` finds those without faults; raises as `render`.

    Args:
        numbers: of the pages, from 1. Those that are finished are left alone.
    """
    finished = finished_pages(folder)
    _write(_pdf_pages(path, settings, finished, numbers), folder, settings, on_page, finished, numbers.start)


def num_pdf_pages(path: Path, settings: RenderSettings) -> int:
    """Return how many pages a document has if it is a PDF that can be rendered, else 0."""
    import pypdfium2

    if path.stat().st_size > settings.max_file_mb << 20 or _kind(path) != "pdf":
        return 0
    try:
        with pypdfium2.PdfDocument(path) as document:
            return len(document) if len(document) <= settings.max_pages else 0
    except pypdfium2.PdfiumError:
        return 0


def _whole(pages: list[RenderedPage], faults: Sequence[str], folder: Path) -> list[RenderedPage]:
    """Return a document's pages, whose folder is then complete; DocumentError if there are none."""
    if not pages:
        raise DocumentError("; ".join(faults[:3]))
    for file in _finished_files(folder):
        file.unlink()
    return pages


def _labelled(pages: Iterable[RenderedPage], labels: Mapping[int, str]) -> list[RenderedPage]:
    return [replace(page, label=labels.get(page.number, "")) for page in pages]


def labels_of(pdf: Path, hidden: HiddenParts) -> dict[int, str]:
    """Return page number -> what the document calls that page, where that differs from its number.

    A PDF may name its pages; a page of a presentation with hidden slides is a slide of a later number.
    """
    import pypdfium2

    if hidden.slides:
        return {page: f"slide {slide}" for page, slide in enumerate(hidden.slides, 1) if slide != page}
    try:
        with pypdfium2.PdfDocument(pdf) as document:
            labels = {number: clean_text(document.get_page_label(number - 1)) for number in range(1, len(document) + 1)}
    except pypdfium2.PdfiumError:
        return {}
    return {number: f"printed {label}" for number, label in labels.items() if label and label != str(number)}


def limit_memory() -> None:
    """Limit this process's address space, so that a bomb ends in MemoryError here and spares the machine."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = MEMORY_LIMIT_BYTES if hard == resource.RLIM_INFINITY else min(MEMORY_LIMIT_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def _kind(path: Path) -> Literal["pdf", "image", "djvu", "other"]:
    """Say what the bytes are. Only in a file with the extension of a PDF may other bytes precede the PDF."""
    try:
        with open(path, "rb") as file:
            start = file.read(1024)
        if start.startswith(b"%PDF-") or (b"%PDF-" in start and path.suffix.lower() == ".pdf"):
            return "pdf"
        if is_djvu(start):
            return "djvu"
    except OSError:
        return "other"
    return "image" if has_known_format(os.fspath(path)) else "other"


def finished_pages(folder: Path) -> dict[int, RenderedPage]:
    """Return the pages that are finished in this folder, by this ingest or by one that was interrupted."""
    pages = {}
    for file in _finished_files(folder):
        for line in file.read_text().splitlines():
            with suppress(ValueError, TypeError):  # a line may be cut off
                page = RenderedPage(**json.loads(line))
                pages[page.number] = page
    return pages


def _finished_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("finished*.jsonl"))


def _pdf_pages(
    path: Path, settings: RenderSettings, finished: Container[int], numbers: range | None = None
) -> Iterator[tuple[Image.Image, str] | str | None]:
    """Yield the pixels and text of each page, or of some, or what is wrong with it; None for one that is finished."""
    import pypdfium2

    logging.getLogger("pypdfium2").setLevel(logging.ERROR)  # it warns that of every XFA form only the AcroForm is drawn
    try:
        document = pypdfium2.PdfDocument(path)
    except pypdfium2.PdfiumError as error:
        # pdfium keeps an old error code when it finds no page, so the code alone is not enough
        if error.err_code == pypdfium2.raw.FPDF_ERR_PASSWORD and b"/Encrypt" in path.read_bytes():
            raise DocumentError("the PDF is encrypted; remove its password (qpdf --decrypt)") from error
        raise DocumentError("the PDF is broken or has no pages") from error
    result: tuple[Image.Image, str] | str
    with document:
        if len(document) == 0:
            raise DocumentError("the PDF has no pages")
        document.init_forms()  # otherwise form fields and their values are not drawn
        _refuse_pages(len(document), settings)
        for number in numbers or range(1, len(document) + 1):
            if number in finished:
                yield None
                continue
            try:
                page = document[number - 1]
                width_points, height_points = page.get_size()
                scale = _pdf_scale(width_points, height_points, settings)
                text = page.get_textpage().get_text_bounded()
                result = page.render(scale=scale).to_pil().convert("RGB"), text
            except (pypdfium2.PdfiumError, DocumentError, ValueError) as error:
                result = str(error)
            except MemoryError:
                result = "it needs more memory than a page may use"
            yield result


def _djvu_pages(
    document: DjvuDocument, settings: RenderSettings, finished: Container[int]
) -> Iterator[tuple[Image.Image, str] | str | None]:
    """Yield the pixels and text of each page, or what is wrong with it; None for one that is finished."""
    _refuse_pages(document.num_pages, settings)
    for number in range(1, document.num_pages + 1):
        if number in finished:
            yield None
            continue
        try:
            width_points, height_points = document.size(number)
            scale = _pdf_scale(width_points, height_points, settings)
            image = document.draw(number, max(1, round(width_points * scale)), max(1, round(height_points * scale)))
            yield image, document.text(number)
        except DocumentError as error:
            yield str(error)


def _pdf_scale(width_points: float, height_points: float, settings: RenderSettings) -> float:
    """Return pixels per point: for the requested dpi, or lower to keep the page within max_page_pixels."""
    if min(width_points, height_points) < 1:
        raise DocumentError(f"a page of {width_points:g} x {height_points:g} points has no area")
    scale = settings.dpi / POINTS_PER_INCH
    pixels = width_points * height_points * scale**2
    return scale if pixels <= settings.max_page_pixels else scale * (settings.max_page_pixels / pixels) ** 0.5


def _image_pages(path: Path, settings: RenderSettings) -> Iterator[tuple[Image.Image, str] | str]:
    """Yield an image's pixels; every frame of a TIFF, the first frame of anything else."""
    try:
        with opened(os.fspath(path)) as image:
            count = num_frames(image)
            _refuse_pages(count, settings)
            if count == 1:
                yield _fit(decode(os.fspath(path)), settings), ""
                return
            for index in range(count):
                try:
                    page = _fit(decode_frame(image, os.fspath(path), index), settings)
                except PromptError as error:
                    yield _without_path(error, path)
                else:
                    yield page, ""
    except PromptError as error:
        raise DocumentError(_without_path(error, path)) from error


def _without_path(error: PromptError, path: Path) -> str:
    """Return what is wrong with an image without its path, which the catalogue shows already."""
    return str(error).replace(f"image {path}", "the image")


def _refuse_pages(num_pages: int, settings: RenderSettings) -> None:
    if num_pages > settings.max_pages:
        raise DocumentError(f"it has {num_pages:,} pages, more than --max-pages {settings.max_pages}; raise it")


def _fit(image: Image.Image, settings: RenderSettings) -> Image.Image:
    pixels = image.width * image.height
    if pixels <= settings.max_page_pixels:
        return image
    ratio = (settings.max_page_pixels / pixels) ** 0.5
    return image.resize((max(1, int(image.width * ratio)), max(1, int(image.height * ratio))), Image.Resampling.BOX)


def _write(
    pages: Iterable[tuple[Image.Image, str] | str | None],
    folder: Path,
    settings: RenderSettings,
    on_page: Callable[[], None],
    finished: Mapping[int, RenderedPage] = MappingProxyType({}),
    first: int = 1,
) -> tuple[list[RenderedPage], list[str]]:
    """Write pages, numbered from `first`; return those that are there, and what is wrong with others.

    Raises:
        DocumentError: the folder's images take more room than they may.
    """
    suffix, options = _SAVED_AS[settings.image_format]
    written, faults = [], []
    num_images, num_bytes = len(finished), sum((folder / page.image).stat().st_size for page in finished.values())
    for number, page in enumerate(pages, start=first):
        if page is None:
            written.append(finished[number])
            continue
        if isinstance(page, str):
            fault = page
        elif max(page[0].size) > MAX_ASPECT_RATIO * min(page[0].size):
            sides = f"{page[0].width} x {page[0].height} pixels"
            fault = f"{sides}, one side is more than {MAX_ASPECT_RATIO} times the other"
        else:
            image, text, fault = page[0], clean_text(page[1]), ""
            if settings.ocr and not text:
                text, fault = read_text(image, settings.ocr)
                text = clean_text(text)
            name = f"{number:05d}{suffix}"
            image.save(folder / name, **options)
            num_bytes, num_images = num_bytes + (folder / name).stat().st_size, num_images + 1
            if num_bytes > settings.max_rendered_mb << 20:
                which = f"its first {number:,}" if number == num_images else f"{num_images:,} of its"
                raise DocumentError(
                    f"{which} pages take {num_bytes >> 20:,} MiB, more than --max-rendered-mb "
                    f"{settings.max_rendered_mb}; raise it"
                )
            written.append(RenderedPage(number, name, image.width, image.height, text))
            if not fault:
                with open(folder / FINISHED.format(first=first), "a", encoding="ascii") as file:
                    file.write(json.dumps(asdict(written[-1])) + "\n")
        if fault:
            faults.append(f"page {number}: {fault}")
        on_page()
    return written, faults


def clean_text(text: str) -> str:
    """Return a text layer as valid Unicode with plain line ends."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    return re.sub(r"[\x00-\x08\x0b-\x1f\ufffe\uffff]", "", text.replace("\r\n", "\n").replace("\r", "\n")).strip()
