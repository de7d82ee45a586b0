"""A page as the address that a chat request holds it under: its pixels as training sees them, as PNG, in base64."""

from __future__ import annotations

import base64
import io

from PIL import Image

from rollout.inputs.images import decode, smart_resize
from rollout.types import ImageSource

PATCH = 28  # sides of merged vision tokens of the Qwen2-VL family; a server resizes such images no further


def page_url(source: ImageSource, min_pixels: int, max_pixels: int) -> str:
    """Return a page as a data URL: decoded and resized as for training, as PNG.

    Raises:
        PromptError: it cannot be read.
    """
    image = decode(source)
    height, width = smart_resize(image.height, image.width, PATCH, min_pixels, max_pixels)
    buffer = io.BytesIO()
    image.resize((width, height), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
