"""Office documents for the retrieval tests, written as the zips that they are."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from email.message import EmailMessage
from pathlib import Path
from xml.sax.saxutils import escape

from PIL import Image

HIDDEN = ' hidden="1"'


def _write_zip(path: Path, parts: dict[str, str]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)


def _content_types(*overrides: tuple[str, str]) -> str:
    base = "application/vnd.openxmlformats-officedocument."
    parts = "".join(f'<Override PartName="{part}" ContentType="{base}{kind}+xml"/>' for part, kind in overrides)
    return (
        '<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types">'
        '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
        f'<Default Extension="xml" ContentType="application/xml"/>{parts}</Types>'
    )


def _relations(*targets: tuple[str, str]) -> str:
    base = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
    rows = "".join(
        f'<Relationship Id="rId{number}" Type="{base}/{kind}" Target="{target}"/>'
        for number, (kind, target) in enumerate(targets, start=1)
    )
    return f'<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships">{rows}</Relationships>'


def write_docx(path: Path, pages: Sequence[str]) -> None:
    """Write a Word document, a paragraph on each page."""
    space = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
    break_ = '<w:p><w:r><w:br w:type="page"/></w:r></w:p>'
    body = break_.join(f"<w:p><w:r><w:t>{escape(text)}</w:t></w:r></w:p>" for text in pages)
    _write_zip(
        path,
        {
            "[Content_Types].xml": _content_types(("/word/document.xml", "wordprocessingml.document.main")),
            "_rels/.rels": _relations(("officeDocument", "word/document.xml")),
            "word/document.xml": f'<w:document xmlns:w="{space}"><w:body>{body}</w:body></w:document>',
        },
    )


def write_xlsx(path: Path, rows: Sequence[Sequence[str]], *, hidden_sheet: str = "", hidden_rows: int = 0) -> None:
    """Write a workbook with one sheet of texts, whose last `hidden_rows` are hidden, and perhaps a hidden sheet."""
    space = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
    links = 'xmlns:r="http://schemas.openxmlformats.org/officeDocument/2006/relationships"'
    cells = "".join(
        f"<row{HIDDEN * (number >= len(rows) - hidden_rows)}>"
        + "".join(f'<c t="inlineStr"><is><t>{escape(text)}</t></is></c>' for text in row)
        + "</row>"
        for number, row in enumerate(rows)
    )
    sheet = f'<worksheet xmlns="{space}"><sheetData>{cells}</sheetData></worksheet>'
    second = f'<sheet name="{hidden_sheet}" sheetId="2" state="hidden" r:id="rId2"/>' if hidden_sheet else ""
    _write_zip(
        path,
        {
            "[Content_Types].xml": _content_types(
                ("/xl/workbook.xml", "spreadsheetml.sheet.main"),
                ("/xl/worksheets/sheet1.xml", "spreadsheetml.worksheet"),
                ("/xl/worksheets/sheet2.xml", "spreadsheetml.worksheet"),
            ),
            "_rels/.rels": _relations(("officeDocument", "xl/workbook.xml")),
            "xl/_rels/workbook.xml.rels": _relations(
                ("worksheet", "worksheets/sheet1.xml"), ("worksheet", "worksheets/sheet2.xml")
            ),
            "xl/workbook.xml": f'<workbook xmlns="{space}" {links}><sheets><sheet name="One" sheetId="1" r:id="rId1"/>'
            f"{second}</sheets></workbook>",
            "xl/worksheets/sheet1.xml": sheet,
            "xl/worksheets/sheet2.xml": f'<worksheet xmlns="{space}"><sheetData/></worksheet>',
        },
    )


def write_pptx(path: Path, slides: Sequence[str], *, hidden: Sequence[int] = ()) -> None:
    """Write a presentation with a text box on each slide. hidden: numbers of slides that are not shown."""
    spaces = (
        'xmlns:a="http://schemas.openxmlformats.org/drawingml/2006/main" '
        'xmlns:p="http://schemas.openxmlformats.org/presentationml/2006/main" '
        'xmlns:r="http://schemas.openxmlformats.org/officeDocument/2006/relationships"'
    )
    names = [f"slides/slide{number}.xml" for number in range(1, len(slides) + 1)]
    ids = "".join(f'<p:sldId id="{256 + number}" r:id="rId{number + 1}"/>' for number in range(len(slides)))
    parts = {
        "[Content_Types].xml": _content_types(
            ("/ppt/presentation.xml", "presentationml.presentation.main"),
            *((f"/ppt/{name}", "presentationml.slide") for name in names),
        ),
        "_rels/.rels": _relations(("officeDocument", "ppt/presentation.xml")),
        "ppt/_rels/presentation.xml.rels": _relations(*(("slide", name) for name in names)),
        "ppt/presentation.xml": f"<p:presentation {spaces}><p:sldIdLst>{ids}</p:sldIdLst>"
        '<p:sldSz cx="9144000" cy="6858000"/><p:notesSz cx="6858000" cy="9144000"/></p:presentation>',
    }
    group = '<p:nvGrpSpPr><p:cNvPr id="1" name=""/><p:cNvGrpSpPr/><p:nvPr/></p:nvGrpSpPr><p:grpSpPr/>'
    place = '<a:xfrm><a:off x="900000" y="900000"/><a:ext cx="6000000" cy="900000"/></a:xfrm>'
    for number, (name, text) in enumerate(zip(names, slides, strict=True), start=1):
        show = ' show="0"' if number in hidden else ""
        box = (
            '<p:sp><p:nvSpPr><p:cNvPr id="2" name="t"/><p:cNvSpPr txBox="1"/><p:nvPr/></p:nvSpPr>'
            f'<p:spPr>{place}<a:prstGeom prst="rect"/></p:spPr>'
            f"<p:txBody><a:bodyPr/><a:p><a:r><a:t>{escape(text)}</a:t></a:r></a:p></p:txBody></p:sp>"
        )
        parts[f"ppt/{name}"] = f"<p:sld {spaces}{show}><p:cSld><p:spTree>{group}{box}</p:spTree></p:cSld></p:sld>"
    _write_zip(path, parts)


def write_opendocument(path: Path, text: str) -> None:
    """Write an ODT, ODS or ODP, by the extension, with one text."""
    kind = {".odt": "text", ".ods": "spreadsheet", ".odp": "presentation"}[path.suffix]
    spaces = " ".join(
        f'xmlns:{name}="urn:oasis:names:tc:opendocument:xmlns:{name}:1.0"'
        for name in ("office", "text", "table", "manifest")
    )
    spaces += ' xmlns:draw="urn:oasis:names:tc:opendocument:xmlns:drawing:1.0"'
    spaces += ' xmlns:svg="urn:oasis:names:tc:opendocument:xmlns:svg-compatible:1.0"'
    paragraph = f"<text:p>{escape(text)}</text:p>"
    cell = f'<table:table-cell office:value-type="string">{paragraph}</table:table-cell>'
    frame = f'<draw:frame svg:width="10cm" svg:height="2cm" svg:x="2cm" svg:y="2cm"><draw:text-box>{paragraph}'
    body = {
        "text": paragraph,
        "spreadsheet": f'<table:table table:name="One"><table:table-row>{cell}</table:table-row></table:table>',
        "presentation": f'<draw:page draw:name="One">{frame}</draw:text-box></draw:frame></draw:page>',
    }[kind]
    mime = f"application/vnd.oasis.opendocument.{kind}"
    version = 'manifest:version="1.2"'
    entries = f'<manifest:file-entry manifest:full-path="/" manifest:media-type="{mime}"/>'
    entries += '<manifest:file-entry manifest:full-path="content.xml" manifest:media-type="text/xml"/>'
    _write_zip(
        path,
        {
            "mimetype": mime,
            "META-INF/manifest.xml": f"<manifest:manifest {spaces} {version}>{entries}</manifest:manifest>",
            "content.xml": f'<office:document-content {spaces} office:version="1.2"><office:body>'
            f"<office:{kind}>{body}</office:{kind}></office:body></office:document-content>",
        },
    )


def write_mail(path: Path) -> None:
    """Write an e-mail with a text, its HTML and an attachment."""
    message = EmailMessage()
    message["From"], message["To"], message["Subject"] = "a@example.org", "b@example.org", "sums"
    message.set_content("seven & more\n")
    message.add_alternative("<p>seven &amp; more</p>", subtype="html")
    message.add_attachment(b"1,2\n", maintype="text", subtype="csv", filename="sums.csv")
    path.write_bytes(bytes(message))


def write_book(path: Path, chapters: Sequence[str]) -> None:
    """Write an e-book; its chapters are in the folder `text`, and a picture is beside that."""
    space, names = 'xmlns="http://www.idpf.org/2007/opf"', [f"text/{number}.xhtml" for number in range(len(chapters))]
    items = "".join(f'<item id="c{number}" href="{name}"/>' for number, name in enumerate(names))
    spine = "".join(f'<itemref idref="c{number}"/>' for number in range(len(chapters)))
    picture = io.BytesIO()
    Image.new("RGB", (9, 9), "red").save(picture, "PNG")
    parts = {
        "mimetype": "application/epub+zip",
        "META-INF/container.xml": '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
        '<rootfile full-path="OPS/book.opf"/></rootfiles></container>',
        "OPS/book.opf": f"<package {space}><manifest>{items}</manifest><spine>{spine}</spine></package>",
    }
    parts |= {f"OPS/{name}": f"<html><body>{text}</body></html>" for name, text in zip(names, chapters, strict=True)}
    _write_zip(path, parts)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("OPS/p.png", picture.getvalue())
