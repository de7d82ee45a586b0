"""Text of pages that have none, read by Tesseract for the text baseline. The home of pytesseract, which is optional."""

from __future__ import annotations

from PIL import Image

from rsgrpo.errors import InputError

OCR_TIMEOUT_S = 60.0  # of a page


def require_ocr(language: str) -> None:
    """Raise InputError unless the package, the program and the languages ("eng", "eng+deu") are installed."""
    try:
        import pytesseract
    except ModuleNotFoundError as error:
        install = 'install the extra, for example with `pip install -e ".[ocr]"`'
        raise InputError(f"--ocr needs pytesseract, which is not installed; {install}") from error
    try:
        installed = pytesseract.get_languages()
    except pytesseract.TesseractNotFoundError as error:
        raise InputError(
            "--ocr needs the program `tesseract`, which is not on PATH; install it (Debian: tesseract-ocr)"
        ) from error
    missing = [name for name in language.split("+") if name not in installed]
    if missing:
        raise InputError(f"--ocr {language}: Tesseract lacks {', '.join(missing)}; choose from {', '.join(installed)}")


def read_text(image: Image.Image, language: str) -> tuple[str, str]:
    """Return the text in a page's image, and what went wrong ("" if nothing did)."""
    import pytesseract

    try:
        return pytesseract.image_to_string(image, lang=language, timeout=OCR_TIMEOUT_S), ""
    except (pytesseract.TesseractError, RuntimeError) as error:  # RuntimeError is what it raises for its timeout
        return "", f"Tesseract cannot read it: {error}"
