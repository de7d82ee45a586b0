"""What decides the pixels of a page and which documents are refused, and the error of one document."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from recipes.answers.options import check_options
from rollout.keys import key
from rsgrpo.errors import RsgrpoError


class DocumentError(RsgrpoError):
    """This one document cannot be turned into pages; others are not affected."""


@dataclass(frozen=True, slots=True)
class RenderSettings:
    """What decides the pixels of a page, and which documents are too large."""

    dpi: int = key(150, "resolution of PDF and office pages", ge=10, le=1200)
    image_format: Literal["png", "jpeg"] = key("png", "format of the page images")
    max_page_pixels: int = key(16_000_000, "larger pages are scaled down", ge=1)
    max_pages: int = key(10_000, "documents with more pages are refused", ge=1)
    max_file_mb: int = key(2_048, "larger files are refused", ge=1)
    max_unpacked_mb: int = key(4_096, "office files that unpack to more are refused", ge=1)
    office_timeout_s: int = key(300, "time limit of one conversion by LibreOffice", ge=1)
    max_rendered_mb: int = key(4_096, "documents whose pages take more room than this are refused", ge=1)
    ocr: str = key("", "languages in which Tesseract reads pages that have no text: eng, eng+deu, ...")

    def __post_init__(self) -> None:
        check_options(self)

    def pixels(self) -> dict[str, Any]:
        """Return the settings that change the pixels or the text of an accepted page."""
        kept = {"dpi": self.dpi, "image_format": self.image_format, "max_page_pixels": self.max_page_pixels}
        return kept | {"ocr": self.ocr} if self.ocr else kept
