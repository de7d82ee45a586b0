"""Sound inputs, and what becomes of them when bytes are changed, lost, repeated or exchanged."""

from __future__ import annotations

import base64
import copy
import io
import json
import random
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from rollout.inputs.images import FORMATS
from tests.runs.fuzz.hostile_images import EPS, saved, tile_bomb

INTERESTING = (b"\0", b"\xff", b"\x7f", b"\x80", b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\x80\0\0\0")
VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1e308, 10**400, "", "x" * 5000, "\0", "\x1b[2J", "<image>", "data:", "file:///etc/passwd", "..",
    [], {}, [[[[]]]], {"a": {"b": []}}, "\u202e", "💥", ";base64,",
)  # fmt: skip


def mutated(content: bytes, draw: random.Random) -> bytes:
    """Return `content` after one to eight random changes."""
    changed = bytearray(content)
    for _ in range(draw.randint(1, 8)):
        if not changed:
            break
        place, kind = draw.randrange(len(changed)), draw.randrange(7)
        length = min(draw.choice((1, 4, 16, 64, 256)), len(changed) - place)
        if kind == 0:
            changed[place] ^= 1 << draw.randrange(8)
        elif kind == 1:
            changed[place] = draw.randrange(256)
        elif kind == 2:
            interesting = draw.choice(INTERESTING)
            changed[place : place + len(interesting)] = interesting
        elif kind == 3:
            del changed[place : place + length]
        elif kind == 4:
            changed[place:place] = changed[place : place + length] * draw.choice((1, 2, 50))
        elif kind == 5:
            other = draw.randrange(len(changed))
            changed[place : place + length] = changed[other : other + length]
        elif draw.random() < 0.3:
            del changed[place:]
    return bytes(changed)


def images() -> list[bytes]:
    """Return images in every allowed format, in several modes and compressions, and some of other formats."""
    found = [saved(kind, size) for kind in FORMATS for size in ((32, 32), (5, 40))]
    found += [_saved("TIFF", "RGB", compression=name) for name in ("tiff_deflate", "tiff_lzw", "packbits", "jpeg")]
    found += [_saved("TIFF", "1", compression="group4"), _saved("PNG", "P"), _saved("PNG", "I;16"), _saved("PNG", "LA")]
    found += [_saved("JPEG", "CMYK"), _saved("JPEG", "L", progressive=True), _saved("WEBP", "RGBA", lossless=True)]
    found += [_saved("GIF", "P", save_all=True, append_images=[Image.new("P", (9, 9))]), tile_bomb(16, 256)]
    return [*found, EPS, saved("ICO"), saved("ICNS"), saved("TGA")]


def _saved(kind: str, mode: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    gradient = Image.linear_gradient("L").resize((24, 24))
    (gradient.convert("I").point(lambda value: value * 200) if mode == "I;16" else gradient.convert(mode)).save(
        buffer, kind, **options
    )
    return buffer.getvalue()


def documents() -> list[tuple[str, bytes]]:
    """Return (name ending, bytes) of PDF files, images and an archive that claims to be a text document."""
    page = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").save(page, "PDF", save_all=True, append_images=[Image.new("L", (80, 50))])
    stack = io.BytesIO()
    Image.new("RGB", (20, 20)).save(stack, "TIFF", save_all=True, append_images=[Image.new("L", (30, 10))] * 3)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("content.xml", "<a>" * 1000)
    plain = b"%PDF-1.4\n1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj\n2 0 obj<</Type/Pages/Kids[3 0 R]/Count 1>>endobj\n"
    plain += b"3 0 obj<</Type/Page/Parent 2 0 R/MediaBox[0 0 200 100]/Contents 4 0 R>>endobj\n"
    plain += b"4 0 obj<</Length 29>>stream\n0 0 m 100 100 l S 10 10 5 5 re f\nendstream endobj\n"
    plain += b"trailer<</Root 1 0 R>>\n%%EOF"
    return [
        (".pdf", page.getvalue()), (".pdf", plain), (".tif", stack.getvalue()), (".png", saved("PNG")),
        (".jpg", saved("JPEG")), (".webp", saved("WEBP")), (".odt", archive.getvalue()),
    ]  # fmt: skip


def request_bodies(draw: random.Random) -> Iterator[bytes]:
    """Yield bodies of chat requests: with values exchanged anywhere, and with bytes changed."""
    picture = "data:image/png;base64," + base64.b64encode(saved("PNG", (8, 8))).decode()
    part = {"type": "image_url", "image_url": {"url": picture}}
    sound = {
        "model": "model", "temperature": 0, "max_tokens": 64, "stream": False, "n": 1, "user": "me",
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": [part, {"type": "text", "text": "how much?"}]},
        ],
    }  # fmt: skip
    while True:
        body = json.loads(json.dumps(sound))
        for _ in range(draw.choice((0, 1, 1, 2))):
            exchange(body, draw)
        written = json.dumps(body).encode()
        yield mutated(written, draw) if draw.random() < 0.4 else written


def exchange(value: Any, draw: random.Random) -> None:
    """Put a strange value somewhere into a JSON value, or take something away."""
    while True:
        key = draw.choice(list(value) if isinstance(value, dict) else range(len(value))) if value else None
        if key is None:
            return
        if isinstance(value[key], dict | list) and draw.random() < 0.7:
            value = value[key]
            continue
        if draw.random() < 0.2:
            del value[key]
        elif isinstance(value, dict) and draw.random() < 0.2:
            value[draw.choice(("tools", "role", "content", "url", "text", "\0", "__class__"))] = copy.deepcopy(
                draw.choice(VALUES)
            )
        else:
            value[key] = copy.deepcopy(draw.choice(VALUES))
        return


def texts(draw: random.Random) -> Iterator[str]:
    """Yield responses: pieces of the form in any order, with control characters, nested, repeated and cut."""
    tags = [f"<{end}{name}>" for name in ("observe", "evidence", "think", "answer") for end in ("", "/")]
    pieces = [*tags, "[1]:", "[2]: 16%", "[99999999999]", "\n", "no relevant information", "page 2", "16%", " "]
    pieces += [
        "insufficient to answer",
        "\x1b]52;c;YQ==\x07",
        "\x9b2J",
        "\ud800",
        "a" * 500,
        "[" * 50,
        "<" * 50,
        "&lt;",
    ]
    while True:
        text = "".join(draw.choice(pieces) for _ in range(draw.randint(0, 60)))
        yield text[: draw.randint(0, len(text))] if draw.random() < 0.3 else text


def damaged_tree(source: Path, target: Path | None, draw: random.Random) -> Path:
    """Change one file of a folder so that it differs: of a copy at `target`, or in place."""
    folder = source if target is None else shutil.copytree(source, target)
    path = draw.choice(sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size))
    before = after = path.read_bytes()
    while after == before:
        after = draw.choice((mutated(before, draw), before[: draw.randrange(len(before))], bytes(len(before))))
    path.write_bytes(after)
    return folder
