"""What an office file does not show when it is printed: hidden slides, sheets, rows and columns.

LibreOffice leaves them out without a word, and the page that follows a hidden slide is no longer of the slide's number.
Standard library only; it reads the XML of OOXML and ODF files, not the older binary formats.
"""

from __future__ import annotations

import posixpath
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

MAX_PART_BYTES = 64 << 20  # of one XML file in the archive; larger ones are not examined
OLE = bytes.fromhex("d0cf11e0a1b11ae1")
_FAULTS = (zipfile.BadZipFile, ElementTree.ParseError, OSError, ValueError, KeyError, RuntimeError, NotImplementedError)


@dataclass(frozen=True, slots=True)
class HiddenParts:
    """What is hidden.

    note: in words, "" for nothing. slides: the numbers of the slides that are shown, in order; empty if the file is not
    a presentation with hidden slides.
    """

    note: str = ""
    slides: tuple[int, ...] = ()


def hidden_parts(path: Path) -> HiddenParts:
    """Return what a presentation or workbook hides; nothing for other files and for those that cannot be examined."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = set(archive.namelist())
            if "ppt/presentation.xml" in names:
                return _of_slides(list(_pptx_slides(archive)))
            if "xl/workbook.xml" in names:
                return _of_sheets(archive, _xlsx_sheets(archive))
            if "content.xml" in names and "mimetype" in names:
                kind = archive.read("mimetype").decode("ascii", "replace")
                if kind.endswith("presentation"):
                    return _of_slides(list(_odp_slides(archive)))
                if kind.endswith("spreadsheet"):
                    return _ods_hidden(archive)
    except _FAULTS:
        return HiddenParts()
    return HiddenParts()


def is_locked(path: Path) -> bool:
    """Whether an office file is protected by a password (OOXML and ODF)."""
    try:
        with open(path, "rb") as file:
            start = file.read(1 << 20)
        if start.startswith(OLE):
            return "EncryptedPackage".encode("utf-16-le") in start
        with zipfile.ZipFile(path) as archive:
            return b"encryption-data" in archive.read("META-INF/manifest.xml")
    except _FAULTS:
        return False


def _of_slides(shown: list[bool]) -> HiddenParts:
    hidden = [number for number, is_shown in enumerate(shown, 1) if not is_shown]
    if not hidden:
        return HiddenParts()
    listed = ", ".join(map(str, hidden[:10])) + (", ..." if len(hidden) > 10 else "")
    slides = tuple(number for number, is_shown in enumerate(shown, 1) if is_shown)
    return HiddenParts(f"{len(hidden)} hidden slide{'s' * (len(hidden) > 1)} ({listed})", slides)


def _of_sheets(archive: zipfile.ZipFile, sheets: list[tuple[str, bool, str]]) -> HiddenParts:
    names = [name for name, is_hidden, _ in sheets if is_hidden]
    rows = columns = 0
    for _, is_hidden, part in sheets:
        if not is_hidden and part:
            more_rows, more_columns = _xlsx_hidden(archive, part)
            rows, columns = rows + more_rows, columns + more_columns
    return HiddenParts(_said(names, rows, columns))


def _said(sheets: list[str], rows: int, columns: int) -> str:
    parts = []
    if sheets:
        listed = ", ".join(sheets[:10]) + (", ..." if len(sheets) > 10 else "")
        parts.append(f"{len(sheets)} hidden sheet{'s' * (len(sheets) > 1)} ({listed})")
    parts += [
        f"{count} hidden {what}{'s' * (count > 1)}" for count, what in ((rows, "row"), (columns, "column")) if count
    ]
    return ", ".join(parts)


def _part(archive: zipfile.ZipFile, name: str) -> ElementTree.Element:
    if archive.getinfo(name).file_size > MAX_PART_BYTES:
        raise ValueError(f"{name} is too large")
    return ElementTree.fromstring(archive.read(name))


def _relations(archive: zipfile.ZipFile, part: str) -> dict[str, str]:
    """Return id -> name of the part that an OOXML part refers to."""
    folder, name = posixpath.split(part)
    rows = _part(archive, f"{folder}/_rels/{name}.rels")
    joined = {row.get("Id", ""): posixpath.join(folder, row.get("Target", "")) for row in rows}
    return {key: posixpath.normpath(target.removeprefix("/")) for key, target in joined.items()}


def _local(tag: str) -> str:
    return tag.rpartition("}")[2]


def _get(element: ElementTree.Element, name: str) -> str:
    """Return an attribute by its local name, "" without it."""
    return next((value for key, value in element.items() if _local(key) == name), "")


def _pptx_slides(archive: zipfile.ZipFile) -> Iterator[bool]:
    """Yield whether each slide is shown, in order."""
    targets = _relations(archive, "ppt/presentation.xml")
    for element in _part(archive, "ppt/presentation.xml").iter():
        if _local(element.tag) == "sldId":
            relation = next(value for key, value in element.items() if key.endswith("}id"))
            with archive.open(targets[relation]) as slide:
                _, root = next(ElementTree.iterparse(slide, events=("start",)))
            yield root.get("show", "1") not in ("0", "false")


def _xlsx_sheets(archive: zipfile.ZipFile) -> list[tuple[str, bool, str]]:
    """Return name, whether it is hidden, and part of each sheet."""
    targets = _relations(archive, "xl/workbook.xml")
    return [
        (_get(sheet, "name"), _get(sheet, "state") in ("hidden", "veryHidden"), targets.get(_get(sheet, "id"), ""))
        for sheet in _part(archive, "xl/workbook.xml").iter()
        if _local(sheet.tag) == "sheet"
    ]


def _xlsx_hidden(archive: zipfile.ZipFile, part: str) -> tuple[int, int]:
    """Return how many rows and columns of a sheet are hidden."""
    if archive.getinfo(part).file_size > MAX_PART_BYTES:
        return 0, 0
    rows = columns = 0
    with archive.open(part) as sheet:
        for _, element in ElementTree.iterparse(sheet, events=("end",)):
            name, is_hidden = _local(element.tag), element.get("hidden") in ("1", "true")
            if name == "row":
                rows += is_hidden
                element.clear()
            elif name == "col" and is_hidden:
                columns += min(int(element.get("max", "1")) - int(element.get("min", "1")) + 1, 16_384)
    return rows, columns


def _odf_styles(content: ElementTree.Element, attribute: str, value: str) -> set[str]:
    """Return the names of the styles one of whose properties has a value."""
    return {
        _get(style, "name")
        for style in content.iter()
        if _local(style.tag) == "style" and any(_get(properties, attribute) == value for properties in style)
    }


def _odp_slides(archive: zipfile.ZipFile) -> Iterator[bool]:
    content = _part(archive, "content.xml")
    hidden = _odf_styles(content, "visibility", "hidden")
    for element in content.iter():
        if element.tag.endswith("drawing:1.0}page"):
            yield _get(element, "style-name") not in hidden


def _ods_hidden(archive: zipfile.ZipFile) -> HiddenParts:
    content = _part(archive, "content.xml")
    styles = _odf_styles(content, "display", "false")
    sheets, counts = [], {"table-row": 0, "table-column": 0}
    for element in content.iter():
        name = _local(element.tag)
        if name == "table" and _get(element, "style-name") in styles:
            sheets.append(_get(element, "name"))
        elif name in counts and re.fullmatch("collapse|filter", _get(element, "visibility")):
            repeated = _get(element, f"number-{name.removeprefix('table-')}s-repeated")
            counts[name] += min(int(repeated or 1), 1_048_576)
    return HiddenParts(_said(sheets, counts["table-row"], counts["table-column"]))
