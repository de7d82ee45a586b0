"""Small images; no test itself."""

from __future__ import annotations

import io

from PIL import Image


def png(color: str | tuple[int, int, int] = "red", width: int = 28, height: int = 28) -> bytes:
    """Return an image of one colour as PNG bytes."""
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), color).save(buffer, "PNG")
    return buffer.getvalue()
