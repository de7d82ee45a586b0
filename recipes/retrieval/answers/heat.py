"""Similarity maps as pictures: violet where a page is most like the question, clear where it is least."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

COLOUR = (110, 0, 200)
OPACITY = 170  # of the most similar patch, of 255


def heat(similarities_RC: np.ndarray) -> Image.Image:
    """Return an RGBA image of one pixel per patch.

    The scale is that of the page: its least similar patch is clear, its most similar one the darkest. A page whose
    patches are all alike stays clear.

    >>> heat(np.array([[0.0, 0.5, 1.0]])).getpixel((1, 0))
    (110, 0, 200, 85)
    """
    low, high = float(similarities_RC.min()), float(similarities_RC.max())
    share_RC = (similarities_RC - low) / (high - low) if high > low else np.zeros_like(similarities_RC)
    pixels = np.empty((*similarities_RC.shape, 4), np.uint8)
    pixels[..., :3], pixels[..., 3] = COLOUR, share_RC * OPACITY
    return Image.fromarray(pixels, "RGBA")


def heat_uri(similarities_RC: np.ndarray) -> str:
    """Return the picture as an address that needs no server."""
    stream = io.BytesIO()
    heat(similarities_RC).save(stream, "PNG")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


def heated(page: Image.Image, similarities_RC: np.ndarray) -> Image.Image:
    """Return a page with its map over it, in RGB."""
    over = heat(similarities_RC).resize(page.size, Image.Resampling.NEAREST)
    return Image.alpha_composite(page.convert("RGBA"), over).convert("RGB")
