"""Images made to harm whoever opens them."""

from __future__ import annotations

import io
import struct
import zlib

from PIL import Image

EPS = (
    b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%ImageData: 4 4 8 3 1 1 1 "x"\n%%EndComments\n{} loop\n%%EOF\n'
)
"""A program that never ends."""


def saved(kind: str, size: tuple[int, int] = (32, 32)) -> bytes:
    """Return a sound image in any format of Pillow's."""
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert("RGBA" if kind == "ICNS" else "RGB").save(buffer, kind)
    return buffer.getvalue()


def tile_bomb(side: int = 16, tile: int = 16_384) -> bytes:
    """Return a TIFF of `side` x `side` grey pixels in one deflated tile of `tile` x `tile`; it packs 1 to 1,000."""
    packer = zlib.compressobj(9)
    content = b"".join([*(packer.compress(bytes(tile)) for _ in range(tile)), packer.flush()])
    short, long = 3, 4
    entries = [
        (256, long, side), (257, long, side), (258, short, 8), (259, short, 8), (262, short, 1), (277, short, 1),
        (322, long, tile), (323, long, tile), (324, long, 8 + 2 + 10 * 12 + 4), (325, long, len(content)),
    ]  # fmt: skip
    table = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + table + struct.pack("<I", 0) + content
