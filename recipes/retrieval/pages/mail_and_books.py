"""E-mails (.eml) and e-books (.epub) as one HTML file, which LibreOffice then turns into pages."""

from __future__ import annotations

import email
import email.policy
import posixpath
import re
import zipfile
from collections.abc import Iterator
from email.message import EmailMessage
from html import escape
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

READ_HERE = frozenset({".eml", ".epub"})
HEADERS = ("From", "To", "Cc", "Date", "Subject")
MAX_BOOK_BYTES = 256 << 20  # of all chapters and pictures
_BODY = re.compile(r"<body[^>]*>(.*)</body\s*>", re.IGNORECASE | re.DOTALL)
_SOURCE = re.compile(r"""(\b(?:src|xlink:href)\s*=\s*)(["'])([^"']*)\2""", re.IGNORECASE)
_PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp")


class UnreadableError(ValueError):
    """The file is not an e-mail or an e-book that can be read; the text says why."""


def to_html(path: Path, folder: Path) -> tuple[Path, str]:
    """Write an e-mail or e-book as `folder`/document.html, pictures of a book beside it.

    Returns:
        The HTML file, and what is not in it ("" for nothing).

    Raises:
        UnreadableError: the file is damaged, or protected.
    """
    html, note = _mail(path) if path.suffix.lower() == ".eml" else (_book(path, folder), "")
    target = folder / "document.html"
    target.write_text(f'<html><head><meta charset="utf-8"></head><body>{html}</body></html>', encoding="utf-8")
    return target, note


def _mail(path: Path) -> tuple[str, str]:
    with open(path, "rb") as file:
        message = email.message_from_binary_file(file, policy=email.policy.default)
    if not isinstance(message, EmailMessage) or not any(message[name] for name in HEADERS):
        raise UnreadableError("it has none of the headers of an e-mail (From, To, Date, Subject)")
    heads = "".join(
        f"<p><b>{name}:</b> {escape(str(message[name]))}</p>" for name in HEADERS if message[name] is not None
    )
    part = message.get_body(("plain", "html"))
    text = ""
    if part is not None:
        try:
            content = str(part.get_content())
        except (LookupError, ValueError):  # an unknown character set
            content = (part.get_payload(decode=True) or b"").decode("latin-1")  # type: ignore[union-attr]
        is_html = part.get_content_type() == "text/html"
        text = (
            _SOURCE.sub(r'\1""', _body(content))
            if is_html
            else "".join(f"<p>{escape(line)}</p>" for line in content.splitlines())
        )
    names = [part.get_filename() or part.get_content_type() for part in message.iter_attachments()]
    note = f"{len(names)} attachment{'s' * (len(names) > 1)} not read ({', '.join(names[:5])})" if names else ""
    return f"{heads}<hr>{text}", note


def _body(html: str) -> str:
    found = _BODY.search(html)
    return found[1] if found else html


def _book(path: Path, folder: Path) -> str:
    """Return the chapters in reading order."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = set(archive.namelist())
            if "META-INF/encryption.xml" in names and b"EncryptedData" in archive.read("META-INF/encryption.xml"):
                raise UnreadableError("the book is protected (DRM); remove the protection")
            if sum(entry.file_size for entry in archive.infolist()) > MAX_BOOK_BYTES:
                raise UnreadableError(f"it unpacks to more than {MAX_BOOK_BYTES >> 20} MiB")
            chapters = [
                _with_pictures(_body(archive.read(name).decode("utf-8", "replace")), name, archive, names, folder)
                for name in _spine(archive)
                if name in names
            ]
    except (zipfile.BadZipFile, ElementTree.ParseError, KeyError, RuntimeError, StopIteration) as error:
        raise UnreadableError(f"the e-book is damaged ({type(error).__name__}: {error})") from error
    if not chapters:
        raise UnreadableError("the e-book has no chapter")
    return '<p style="page-break-before: always"></p>'.join(chapters)


def _spine(archive: zipfile.ZipFile) -> Iterator[str]:
    """Yield the names of the chapters in reading order."""
    container = ElementTree.fromstring(archive.read("META-INF/container.xml"))
    package = next(row.get("full-path", "") for row in container.iter() if row.tag.endswith("}rootfile"))
    root = ElementTree.fromstring(archive.read(package))
    files = {row.get("id"): row.get("href", "") for row in root.iter() if row.tag.endswith("}item")}
    for row in root.iter():
        if row.tag.endswith("}itemref") and row.get("idref") in files:
            yield _inside(package, files[row.get("idref")])


def _inside(origin: str, reference: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(origin), unquote(reference.partition("#")[0])))


def _with_pictures(html: str, name: str, archive: zipfile.ZipFile, names: set[str], folder: Path) -> str:
    """Unpack the pictures of a chapter and point its markup at them; everything else that it refers to is dropped."""

    def moved(found: re.Match[str]) -> str:
        source = _inside(name, found[3])
        suffix = posixpath.splitext(source)[1].lower()
        if source not in names or suffix not in _PICTURES:
            return f'{found[1]}""'
        target = folder / f"picture-{archive.getinfo(source).header_offset}{suffix}"
        if not target.exists():
            target.write_bytes(archive.read(source))
        return f'{found[1]}"{target.name}"'

    return _SOURCE.sub(moved, html)
