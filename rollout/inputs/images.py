"""Turn an image source into the pixels that a model sees: decoding, orientation, colour and the single resize.

`opened` is the one place of this project that opens an image: which formats a decoder may see, how large an image may
be before it is decoded, and that whatever a decoder raises is a bad image with a message of one line.
"""

from __future__ import annotations

import base64
import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import overload
from urllib.parse import unquote

import numpy as np
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError

from rollout.errors import InputError, RsgrpoError, one_line, printable
from rollout.inputs.packed import PackedImage
from rollout.types import ImageReference, ImageSource, Prompt

MAX_ASPECT_RATIO = 200
FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "GIF", "BMP", "JPEG2000", "PPM")
"""Pillow reads more. Of those, EPS starts another program, ICO decodes before its size is known, and some crash."""
MAX_TILE_PIXELS = 2**22
"""A TIFF is decoded by whole tiles, which may be far larger than the image; larger ones may only be as the image."""
MAX_PNG_SIDE = 256
"""Larger thumbnails are encoded as JPEG."""


class PromptError(InputError):
    """This one prompt cannot be used: too long, an unreadable image, too many images, misplaced image marks."""


# The operation that undoes each EXIF orientation; 1 is upright.
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Return the height and width that Qwen's image processors resize to.

    Each side is rounded to a multiple of `factor`; if the area then lies outside [min_pixels, max_pixels], both sides
    are scaled by the same ratio and rounded down (up) to multiples. Only a side of one `factor` may break the limit.
    (qwen_vl_utils agrees on ordinary pages, but gives narrow ones a side of 0 pixels; a test covers both.)

    >>> smart_resize(100, 150, factor=28, min_pixels=784, max_pixels=10_000)
    (56, 112)

    Raises:
        PromptError: a side is empty, or one is more than 200 times the other.
    """
    if min(height, width) < 1 or max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise PromptError(
            f"an image of {width} x {height} pixels cannot be resized: its longer side must be at most "
            f"{MAX_ASPECT_RATIO} times the shorter. Crop or pad it."
        )
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


def read_size(source: ImageSource) -> tuple[int, int]:
    """Return (height, width) of the upright image from its header; no pixel is decoded.

    Raises:
        PromptError: the file is missing, not an image, or a decompression bomb.
    """
    with opened(source) as image:
        width, height = image.size
        return (width, height) if _orientation(image) in _SIDEWAYS else (height, width)


def check_decodes(source: ImageSource) -> None:
    """Decode the image as cheaply as its format allows and drop the pixels; raises as `decode`."""
    with opened(source) as image:
        _require_supported(image, source)
        _require_one_page(image, source)
        image.draft("L", (1, 1))  # JPEG: skip most of the inverse transform; other formats ignore it
        image.load()


def decode(source: ImageSource) -> Image.Image:
    """Return the upright RGB image: EXIF orientation applied, transparency on white, 16-bit grey scaled to 8.

    Raises:
        PromptError: the file is missing, not an image, truncated, a decompression bomb, or of floating-point pixels.
    """
    with opened(source) as image:
        _require_supported(image, source)
        _require_one_page(image, source)
        orientation = _orientation(image)
        image.load()
        upright = image.transpose(_TRANSPOSE[orientation]) if orientation in _TRANSPOSE else image
        return to_rgb(upright)


def thumbnail(source: ImageSource, max_side: int) -> Image.Image:
    """Return the upright RGB image, reduced to at most `max_side` pixels per side; raises as `decode`."""
    image = decode(source)
    image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    return image


def data_uri(source: ImageSource, max_side: int) -> str:
    """Return a thumbnail as a `data:` URL for an HTML page: PNG if it is small, else JPEG; raises as `decode`."""
    image = thumbnail(source, max_side)
    kind = "PNG" if max(image.size) <= MAX_PNG_SIDE else "JPEG"
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=78)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


@contextmanager
def opened(source: ImageSource) -> Iterator[Image.Image]:
    """Open an image lazily; whatever Pillow raises because of its bytes, here or in the block, becomes a PromptError.

    Raises:
        PromptError: it is missing, of another format than `FORMATS`, too large to decode safely, or damaged.
    """
    with _naming(source):
        try:
            image = Image.open(file_of(source), formats=FORMATS)
        except UnidentifiedImageError:
            known = ", ".join(FORMATS)
            raise PromptError(f"image {name_of(source)} cannot be read: it is damaged or not one of {known}") from None
        with image:
            _require_safe(image, source)
            yield image


def has_known_format(path: str) -> bool:
    """Say whether the first bytes of a file are those of an image that `opened` would read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            Image.open(path, formats=FORMATS).close()
    except Image.DecompressionBombError:
        return True
    except Exception:
        return False
    return True


def num_frames(image: Image.Image) -> int:
    """Return the number of pages of an opened TIFF; 1 for any other format, animated or not."""
    return int(getattr(image, "n_frames", 1)) if image.format == "TIFF" else 1


def decode_frame(image: Image.Image, source: ImageSource, index: int) -> Image.Image:
    """Return one page of an opened TIFF as RGB; raises as `decode`."""
    with _naming(source):
        image.seek(index)
        _require_safe(image, source)
        _require_supported(image, source)
        image.load()
        return to_rgb(image.copy())


@contextmanager
def _naming(source: ImageSource) -> Iterator[None]:
    """Turn whatever a decoder raises into a PromptError of one line that names the image.

    Decoders raise nearly everything when their input is damaged on purpose, so no list of classes would be complete.
    """
    try:
        yield
    except RsgrpoError:  # ours, raised in the block
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise PromptError(f"image {name_of(source)} is too large to decode safely: {error}. Scale it down.") from error
    except FileNotFoundError as error:
        raise PromptError(f"image {name_of(source)} does not exist") from error
    except MemoryError as error:
        raise PromptError(f"image {name_of(source)} needs more memory than there is. Scale it down.") from error
    except Exception as error:
        raise PromptError(
            f"image {name_of(source)} cannot be read: {type(error).__name__}: {one_line(error)}"
        ) from error


def _require_safe(image: Image.Image, source: ImageSource) -> None:
    """Refuse, before a pixel is decoded, what would take far more memory than a page."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise PromptError(
            f"image {name_of(source)} has {image.width} x {image.height} pixels, more than the "
            f"{limit:,} that Pillow considers safe. Scale it down."
        )
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        tags = image.tag_v2
        tile = tags.get(TiffImagePlugin.TILEWIDTH, 0), tags.get(TiffImagePlugin.TILELENGTH, 0)
        if tile[0] * tile[1] > max(MAX_TILE_PIXELS, image.width * image.height):
            raise PromptError(
                f"image {name_of(source)} of {image.width} x {image.height} pixels is stored in tiles of {tile[0]} x "
                f"{tile[1]}. Save it without tiles."
            )


def local_source(reference: str) -> str | bytes:
    """Return what a reference names: the bytes in a `data:` URL, the path in a `file://` URL, or the path itself.

    Raises:
        ValueError: an address on the network (nothing is fetched), or a data URL that does not hold a base64 image.
    """
    scheme = reference[:8].partition(":")[0].lower()
    if scheme == "data":
        head, _, payload = reference.partition(",")
        try:
            if not re.fullmatch(r"data:image/[^,]+;base64", head, re.IGNORECASE):
                raise ValueError(f"got {head!r:.60}")
            return base64.b64decode(payload, validate=True)
        except ValueError as error:
            raise ValueError(f"an image data URL must be data:image/...;base64,...: {error}") from error
    if scheme in ("http", "https"):
        raise ValueError(f"image {reference!r:.80} is not on this machine. Download it and give its path.")
    return unquote(reference[len("file://") :]) if reference[:7].lower() == "file://" else reference


def file_of(source: ImageSource) -> str | io.BytesIO:
    """Return what Pillow opens."""
    return source if isinstance(source, str) else io.BytesIO(bytes_of(source))


def bytes_of(source: bytes | ImageReference) -> bytes:
    """Return the compressed bytes of an image that is not a file of its own."""
    return source if isinstance(source, bytes) else source.read()


class _Images(Sequence[str | bytes]):
    """Images as a reward sees them."""

    def __init__(self, sources: Sequence[ImageSource]) -> None:
        self._sources = sources

    def __len__(self) -> int:
        return len(self._sources)

    @overload
    def __getitem__(self, index: int) -> str | bytes: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str | bytes]: ...
    def __getitem__(self, index: int | slice) -> str | bytes | Sequence[str | bytes]:
        if isinstance(index, slice):
            return readable(self._sources[index])
        source = self._sources[index]
        return source if isinstance(source, str) else bytes_of(source)


def readable(images: Sequence[ImageSource]) -> Sequence[str | bytes]:
    """Return images as paths or compressed bytes; one that lies elsewhere is read when it is looked at."""
    loaded = [image for image in images if isinstance(image, str | bytes)]
    return tuple(loaded) if len(loaded) == len(images) else _Images(images)


def name_of(source: ImageSource) -> str:
    """Name an image in a message."""
    if isinstance(source, PackedImage):
        return printable(f"{source.name} of {source.file}")
    if isinstance(source, bytes):
        return f"<{len(source):,} bytes>"
    return printable(source if isinstance(source, str) else source.name)


def with_bytes(prompt: Prompt) -> Prompt:
    """Return the prompt with the bytes of those of its images that are read on demand."""
    images = tuple(image if isinstance(image, str | bytes) else image.read() for image in prompt.images)
    return replace(prompt, images=images)


def _require_supported(image: Image.Image, source: ImageSource) -> None:
    if image.mode == "F":
        raise PromptError(f"image {name_of(source)} has floating-point pixels of unknown range. Save it with 8 bits.")
    if image.format == "TIFF" and image.mode == "I":
        raise PromptError(f"image {name_of(source)} has 32-bit pixels of unknown range. Save it with 8 bits.")


def _require_one_page(image: Image.Image, source: ImageSource) -> None:
    """Refuse a TIFF of several pages, of which a model would see the first alone; an animation is its first frame."""
    if (count := num_frames(image)) > 1:
        raise PromptError(
            f"image {name_of(source)} has {count} pages, of which a model would see the first alone. Save each page as "
            "an image of its own."
        )


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation (1 to 8) still to be applied, from what comes before the pixel data."""
    if image.format == "TIFF":
        return 1  # Pillow turns it upright itself
    # PngImageFile.getexif decodes the whole image to find EXIF data after it; the base method does not.
    return int(Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1))


def to_rgb(image: Image.Image) -> Image.Image:
    """Return decoded pixels as 8-bit RGB: transparency on white, 16-bit grey scaled to 8."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        grey = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255)
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")
