"""Convert office, text, HTML, mail and e-book files to PDF by a headless LibreOffice, bounded and without a network."""

from __future__ import annotations

import codecs
import csv
import functools
import os
import shutil
import signal
import subprocess
import zipfile
from pathlib import Path

from recipes.retrieval.pages.confined import alone, bound
from recipes.retrieval.pages.mail_and_books import READ_HERE, UnreadableError, to_html
from recipes.retrieval.pages.office_parts import HiddenParts, hidden_parts, is_locked
from recipes.retrieval.pages.settings import DocumentError, RenderSettings
from rollout.errors import one_line

_TEXT_SAMPLE_BYTES = 1 << 16
_CSV_UTF8, _CSV_LATIN1 = 76, 1  # LibreOffice's numbers
_CSV_QUOTE = ord('"')
OFFICE_MEMORY_BYTES = 16 << 30  # address space of each of LibreOffice's processes


def office_to_pdf(path: Path, scratch: Path, settings: RenderSettings) -> tuple[Path, HiddenParts]:
    """Convert one office, text, HTML, mail or e-book file by headless LibreOffice into `scratch`.

    Returns:
        The PDF, and what of the file is not in it.

    Raises:
        DocumentError: LibreOffice is not installed, fails or takes too long, or the archive unpacks to too much.
    """
    program = shutil.which("soffice") or shutil.which("libreoffice")
    if program is None:
        raise DocumentError(
            f"{path.suffix} files need LibreOffice, but neither `soffice` nor `libreoffice` is on PATH; install it and "
            "run the same command again, or convert the file to PDF"
        )
    if zipfile.is_zipfile(path):
        _refuse_bomb(path, settings)
    if is_locked(path):
        raise DocumentError("the file is protected by a password; save it without one")
    hidden = hidden_parts(path)
    suffix = ".html" if path.suffix.lower() == ".doc" and _starts_as_html(path) else path.suffix.lower()
    source = scratch / f"document{suffix}"  # hides odd names from LibreOffice
    if suffix in READ_HERE:
        try:
            source, note = to_html(path, scratch)
        except UnreadableError as error:
            raise DocumentError(str(error)) from error
        hidden = HiddenParts(note)
    else:
        shutil.copyfile(path, source)
    command = [
        *alone(),
        program,
        f"-env:UserInstallation={(scratch / 'profile').as_uri()}",
        "--headless",
        "--norestore",
    ]
    command += [*_import_filter(source), "--convert-to", "pdf", "--outdir", str(scratch), str(source)]
    limits = functools.partial(
        bound, memory_bytes=OFFICE_MEMORY_BYTES, cpu_s=settings.office_timeout_s * 2,
        file_bytes=settings.max_unpacked_mb << 20,
    )  # fmt: skip
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace", preexec_fn=limits,
        process_group=0,
    ) as process:  # fmt: skip
        try:
            out, err = process.communicate(timeout=settings.office_timeout_s)
        except subprocess.TimeoutExpired as error:
            os.killpg(process.pid, signal.SIGKILL)  # `soffice` is a script: the program itself is its child
            slow = f"LibreOffice took more than {settings.office_timeout_s} s"
            raise DocumentError(f"{slow}; raise --office-timeout-s") from error
    produced = source.with_suffix(".pdf")
    if process.returncode or not produced.exists():
        said = (err or out).strip().splitlines()
        reason = said[-1] if said else f"exit code {process.returncode}"
        if "could not be loaded" in reason:
            reason += " (it is damaged, protected by a password, or not what its extension says)"
        raise DocumentError(f"LibreOffice cannot convert it: {reason}")
    return produced, hidden


def _starts_as_html(path: Path) -> bool:
    with open(path, "rb") as file:
        start = file.read(1024).removeprefix(codecs.BOM_UTF8).lstrip().lower()
    return start.startswith((b"<!doctype html", b"<html"))


def _refuse_bomb(path: Path, settings: RenderSettings) -> None:
    """Unpack an archive and drop the content: its directory may say less than there is.

    Raises:
        DocumentError: it unpacks to too much, or its directory and its content differ.
    """
    limit = settings.max_unpacked_mb << 20
    num_bytes = 0
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                with archive.open(entry) as content:
                    while chunk := content.read(1 << 20):
                        num_bytes += len(chunk)
                        if num_bytes > limit:
                            break
                if num_bytes > limit:
                    break
    except Exception as error:  # damaged archives raise nearly everything
        raise DocumentError(f"its archive is damaged: {one_line(error)}") from error
    if num_bytes > limit:
        raise DocumentError(f"it unpacks to more than --max-unpacked-mb {settings.max_unpacked_mb}; raise it")


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
