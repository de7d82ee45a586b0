"""From one document file to page images in a folder. It runs in worker processes.

It imports nothing heavy, so that a worker starts in a fraction of a second. pypdfium2 is not thread-safe: one document
belongs to one process.
"""

from __future__ import annotations

import codecs
import csv
import logging
import os
import re
import resource
import shutil
import signal
import subprocess
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image, UnidentifiedImageError

from rollout.inputs.images import MAX_ASPECT_RATIO, PromptError, decode, to_rgb
from rsgrpo.errors import InputError, RsgrpoError

OFFICE = frozenset(
    ".doc .docx .ppt .pptx .xls .xlsx .odt .odp .ods .odg .rtf .txt .md .csv .html .htm".split()  # noqa: SIM905
)
IMAGES = frozenset(".png .jpg .jpeg .tif .tiff .webp .bmp .gif .jp2 .ppm .pgm".split())  # noqa: SIM905
KNOWN = frozenset({".pdf"}) | OFFICE | IMAGES
IMAGE_FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "GIF", "BMP", "JPEG2000", "PPM")  # Pillow reads more: EPS runs programs
POINTS_PER_INCH = 72
_TEXT_SAMPLE_BYTES = 1 << 16
_CSV_UTF8, _CSV_LATIN1 = 76, 1  # LibreOffice's numbers
_CSV_QUOTE = ord('"')
MEMORY_LIMIT_BYTES = 8 << 30  # address space of one worker


class DocumentError(RsgrpoError):
    """This one document cannot be turned into pages; others are not affected."""


@dataclass(frozen=True, slots=True)
class RenderSettings:
    """What decides the pixels of a page, and which documents are too large.

    dpi: of PDF and office pages. max_page_pixels: a larger PDF page is rendered at a lower resolution, a larger image
        is scaled down. max_pages, max_file_mb, max_unpacked_mb: a larger document is refused.
    ocr: Tesseract's languages for pages without a text layer; "" leaves them without text.
    """

    dpi: int = 150
    image_format: Literal["png", "jpeg"] = "png"
    max_page_pixels: int = 16_000_000
    max_pages: int = 10_000
    max_file_mb: int = 2_048
    max_unpacked_mb: int = 4_096
    office_timeout_s: int = 300
    ocr: str = ""

    def __post_init__(self) -> None:
        if not 10 <= self.dpi <= 1200:
            raise InputError(f"--dpi must be in [10, 1200], got {self.dpi}")
        for name in ("max_page_pixels", "max_pages", "max_file_mb", "max_unpacked_mb", "office_timeout_s"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} must be >= 1, got {getattr(self, name)}")

    def pixels(self) -> dict[str, Any]:
        """Return the settings that change the pixels or the text of an accepted page."""
        kept = asdict(self)
        names = ("dpi", "image_format", "max_page_pixels", *(("ocr",) if self.ocr else ()))
        return {name: kept[name] for name in names}


@dataclass(frozen=True, slots=True)
class RenderedPage:
    """One page on disk. number: from 1. image: file name in the folder. text: the PDF's text layer, or OCR."""

    number: int
    image: str
    width: int
    height: int
    text: str


def is_candidate(path: Path) -> bool:
    """Say whether a file may be a document: by its extension, else by its first bytes."""
    if path.suffix.lower() in KNOWN:
        return True
    return _kind(path) in ("pdf", "image")


def render(
    path: Path, folder: Path, settings: RenderSettings, on_page: Callable[[], None] = lambda: None
) -> tuple[list[RenderedPage], str]:
    """Write every page of a document into `folder`.

    Args:
        path: the document. Its bytes decide its kind before its extension does.
        folder: exists and is empty.
        on_page: called after each page.

    Returns:
        The pages, and what went wrong with single pages ("" if nothing did).

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
    if kind == "pdf":
        return _write(_pdf_pages(path, settings), folder, settings, on_page)
    if kind == "image":
        return _write(_image_pages(path, settings), folder, settings, on_page)
    if path.suffix.lower() not in OFFICE:
        raise DocumentError(f"the content is neither a PDF nor an image, despite the extension {path.suffix!r}")
    with tempfile.TemporaryDirectory(prefix="rsgrpo-office-") as scratch:
        return _write(_pdf_pages(office_to_pdf(path, Path(scratch), settings), settings), folder, settings, on_page)


def limit_memory() -> None:
    """Limit this process's address space, so that a bomb ends in MemoryError here and spares the machine."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = MEMORY_LIMIT_BYTES if hard == resource.RLIM_INFINITY else min(MEMORY_LIMIT_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def office_to_pdf(path: Path, scratch: Path, settings: RenderSettings) -> Path:
    """Convert one office, text or HTML file by headless LibreOffice into `scratch` and return the PDF.

    Raises:
        DocumentError: LibreOffice is not installed, fails or takes too long, or the archive unpacks to too much.
    """
    program = shutil.which("soffice") or shutil.which("libreoffice")
    if program is None:
        raise DocumentError(
            f"{path.suffix} files need LibreOffice, but neither `soffice` nor `libreoffice` is on PATH; install it and "
            "run the same command again, or convert the file to PDF"
        )
    _refuse_zip_bomb(path, settings)
    source = scratch / f"document{path.suffix.lower()}"  # hides odd names from LibreOffice
    shutil.copyfile(path, source)
    command = [program, f"-env:UserInstallation={(scratch / 'profile').as_uri()}", "--headless", "--norestore"]
    command += [*_import_filter(source), "--convert-to", "pdf", "--outdir", str(scratch), str(source)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
        preexec_fn=_unlimited_memory, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            out, err = process.communicate(timeout=settings.office_timeout_s)
        except subprocess.TimeoutExpired as error:
            os.killpg(process.pid, signal.SIGKILL)  # `soffice` is a script: the program itself is its child
            raise DocumentError(f"LibreOffice took over {settings.office_timeout_s} s (--office-timeout-s)") from error
    produced = source.with_suffix(".pdf")
    if process.returncode or not produced.exists():
        said = (err or out).strip().splitlines()
        raise DocumentError(f"LibreOffice cannot convert it: {said[-1] if said else f'exit code {process.returncode}'}")
    return produced


def _import_filter(source: Path) -> list[str]:
    """Return the options for files that LibreOffice would read wrongly by itself.

    HTML for the screen loses headings when it is paged; a CSV file is read as Latin-1 with commas; text is taken for
    another format because of its words, and garbled if it is Latin-1.
    """
    if source.suffix in (".html", ".htm"):
        return ["--infilter=HTML (StarWriter)"]
    if source.suffix not in (".csv", ".txt", ".md"):
        return []
    with open(source, "rb") as file:
        content = file.read(_TEXT_SAMPLE_BYTES)
    try:  # the sample may end within a character
        text, charset = codecs.getincrementaldecoder("utf-8-sig")().decode(content), _CSV_UTF8
    except UnicodeDecodeError:
        text, charset = content.decode("latin-1"), _CSV_LATIN1
    if source.suffix != ".csv":
        marked = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))  # LibreOffice trusts the mark first
        return [f"--infilter=Text (encoded):{'UTF8' if marked or charset == _CSV_UTF8 else 'ISO_8859_1'},LF,,,"]
    try:
        separator = csv.Sniffer().sniff(text, delimiters=",;\t|").delimiter
    except csv.Error:
        separator = ","
    return [f"--infilter=CSV:{ord(separator)},{_CSV_QUOTE},{charset}"]


def _unlimited_memory() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


def _refuse_zip_bomb(path: Path, settings: RenderSettings) -> None:
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        num_bytes = sum(entry.file_size for entry in archive.infolist())
    if num_bytes > settings.max_unpacked_mb << 20:
        size = f"it unpacks to {num_bytes >> 20:,} MiB"
        raise DocumentError(f"{size}, more than --max-unpacked-mb {settings.max_unpacked_mb}; raise it")


def _kind(path: Path) -> Literal["pdf", "image", "other"]:
    """Say what the bytes are. Only in a file with the extension of a PDF may other bytes precede the PDF."""
    try:
        with open(path, "rb") as file:
            start = file.read(1024)
        if start.startswith(b"%PDF-") or (b"%PDF-" in start and path.suffix.lower() == ".pdf"):
            return "pdf"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # size limits are checked where the pixels are decoded
            with Image.open(path, formats=IMAGE_FORMATS):
                return "image"
    except Image.DecompressionBombError:
        return "image"
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError):
        return "other"


def _pdf_pages(path: Path, settings: RenderSettings) -> Iterator[tuple[Image.Image, str] | str]:
    """Yield each page's pixels and text, or what is wrong with it."""
    import pypdfium2

    logging.getLogger("pypdfium2").setLevel(logging.ERROR)  # it warns that of every XFA form only the AcroForm is drawn
    try:
        document = pypdfium2.PdfDocument(path)
    except pypdfium2.PdfiumError as error:
        # pdfium keeps an old error code when it finds no page, so the code alone is not enough
        if error.err_code == pypdfium2.raw.FPDF_ERR_PASSWORD and b"/Encrypt" in path.read_bytes():
            raise DocumentError("the PDF is encrypted; remove its password (qpdf --decrypt)") from error
        raise DocumentError("the PDF is broken or has no pages") from error
    with document:
        if len(document) == 0:
            raise DocumentError("the PDF has no pages")
        document.init_forms()  # otherwise form fields and their values are not drawn
        _refuse_pages(len(document), settings)
        for index in range(len(document)):
            try:
                page = document[index]
                width_points, height_points = page.get_size()
                scale = _pdf_scale(width_points, height_points, settings)
                text = page.get_textpage().get_text_bounded()
                image = page.render(scale=scale).to_pil().convert("RGB")
            except (pypdfium2.PdfiumError, DocumentError, ValueError) as error:
                yield str(error)
                continue
            except MemoryError:
                yield "it needs more memory than a page may use"
                continue
            yield image, clean_text(text)


def _pdf_scale(width_points: float, height_points: float, settings: RenderSettings) -> float:
    """Return pixels per point: for the requested dpi, or lower to keep the page within max_page_pixels."""
    if min(width_points, height_points) < 1:
        raise DocumentError(f"a page of {width_points:g} x {height_points:g} points has no area")
    scale = settings.dpi / POINTS_PER_INCH
    pixels = width_points * height_points * scale**2
    return scale if pixels <= settings.max_page_pixels else scale * (settings.max_page_pixels / pixels) ** 0.5


def _image_pages(path: Path, settings: RenderSettings) -> Iterator[tuple[Image.Image, str] | str]:
    """Yield an image's pixels; every frame of a TIFF, the first frame of anything else."""
    limit = Image.MAX_IMAGE_PIXELS or 0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(path, formats=IMAGE_FORMATS)
        with opened:
            num_frames = getattr(opened, "n_frames", 1) if opened.format == "TIFF" else 1
            _refuse_pages(num_frames, settings)
            if num_frames == 1:
                yield _fit(decode(os.fspath(path)), settings), ""
                return
            for index in range(num_frames):
                try:
                    opened.seek(index)
                    if opened.width * opened.height > limit:
                        yield f"{opened.width} x {opened.height} pixels, more than the safe limit of {limit:,}"
                        continue
                    opened.load()
                    frame = to_rgb(opened.copy())
                except (OSError, EOFError, ValueError, SyntaxError, PromptError) as error:
                    yield f"{type(error).__name__}: {error}"
                    continue
                yield _fit(frame, settings), ""
    except PromptError as error:  # its text names the path, which the catalogue shows already
        raise DocumentError(str(error).replace(os.fspath(path), "").replace("image  ", "the image ")) from error
    except Image.DecompressionBombError as error:
        raise DocumentError(f"the image is too large to decode safely: {error}; scale it down") from error


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
    pages: Iterator[tuple[Image.Image, str] | str],
    folder: Path,
    settings: RenderSettings,
    on_page: Callable[[], None],
) -> tuple[list[RenderedPage], str]:
    written, faults = [], []
    for number, page in enumerate(pages, start=1):
        if isinstance(page, str):
            faults.append(f"page {number}: {page}")
        elif max(page[0].size) > MAX_ASPECT_RATIO * min(page[0].size):
            sides = f"{page[0].width} x {page[0].height} pixels"
            faults.append(f"page {number}: {sides}, one side is more than {MAX_ASPECT_RATIO} times the other")
        else:
            image, text = page
            if settings.ocr and not text:
                text, fault = _read(image, settings.ocr)
                faults += [f"page {number}: {fault}"] if fault else []
            name = f"{number:05d}.{'png' if settings.image_format == 'png' else 'jpg'}"
            options: dict[str, Any] = {"compress_level": 1} if settings.image_format == "png" else {"quality": 92}
            image.save(folder / name, **options)
            written.append(RenderedPage(number, name, image.width, image.height, text))
        on_page()
    if not written:
        raise DocumentError("; ".join(faults[:3]))
    return written, "; ".join(faults)


def _read(image: Image.Image, language: str) -> tuple[str, str]:
    """Return the text in a page's image, and what went wrong."""
    from recipes.retrieval.pages.ocr import OcrError, read_text

    try:
        return clean_text(read_text(image, language)), ""
    except OcrError as error:
        return "", str(error)


def clean_text(text: str) -> str:
    """Return a text layer as valid Unicode with plain line ends."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    return re.sub(r"[\x00-\x08\x0b-\x1f\ufffe\uffff]", "", text.replace("\r\n", "\n").replace("\r", "\n")).strip()
