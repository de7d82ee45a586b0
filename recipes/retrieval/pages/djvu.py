"""Pages of a DjVu document by DjVuLibre's programs: pixels by `ddjvu`, text by `djvutxt`, the rest by `djvused`.

Each runs with bounds and without a network, once per page, so that a damaged or slow page costs itself alone.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from pathlib import Path

from PIL import Image

from recipes.retrieval.pages.confined import alone, bound
from recipes.retrieval.pages.settings import DocumentError
from rollout.inputs.images import PromptError, decode

SUFFIXES = frozenset((".djvu", ".djv"))
PROGRAMS = ("djvused", "ddjvu", "djvutxt")
TIMEOUT_S = 60  # of one call
MEMORY_BYTES = 4 << 30  # address space of a program
FILE_BYTES = 1 << 30  # that it may write: more than Pillow's largest image
TEXT_BYTES = 16 << 20  # read of a page
USUAL_DPI, DPI = 300, range(25, 6001)  # of a page that says something else; as DjVuLibre does
_INFO = re.compile(r"^ *INFO \[\d+\] +DjVu (\d+)x(\d+),.*?(\d+) dpi", re.MULTILINE)
_TITLE = re.compile(r"^ *(\d+) P +\d+ .* T=(.*)$", re.MULTILINE)


def is_djvu(start: bytes) -> bool:
    """Say whether a file that begins like this is a DjVu document."""
    return start.startswith(b"AT&TFORM") and start[12:16] in (b"DJVU", b"DJVM")


class DjvuDocument:
    """A document and a folder for what the programs write."""

    def __init__(self, path: Path, scratch: Path) -> None:
        """Count the pages.

        Raises:
            DocumentError: DjVuLibre is not installed or cannot read the file, or the pages are in other files.
        """
        missing = [program for program in PROGRAMS if shutil.which(program) is None]
        if missing:
            raise DocumentError(
                f"{path.suffix} files need DjVuLibre, but `{missing[0]}` is not on PATH; install it (Debian: "
                "djvulibre-bin) and run the same command again, or convert the file to PDF"
            )
        with open(path, "rb") as file:
            start = file.read(32)
        if start[16:20] == b"DIRM" and not start[24] & 0x80:
            raise DocumentError("its pages are in other files; put them into one (`djvmcvt -b`)")
        self._scratch = scratch
        self._file = scratch / "document.djvu"  # hides odd names from the programs
        self._file.symlink_to(path.absolute())
        said = self._run("djvused", "-e", "n; ls", str(self._file))
        number, _, listed = said.partition("\n")
        if not number.strip().isdecimal() or not int(number):
            raise DocumentError("the DjVu document is broken or has no pages")
        self.num_pages = int(number)
        named = {int(found[1]): found[2].strip() for found in _TITLE.finditer(listed)}
        self.labels = {page: f"printed {title}" for page, title in named.items() if title not in ("", str(page))}

    def size(self, number: int) -> tuple[float, float]:
        """Return width and height of a page in points; DocumentError if they cannot be read."""
        said = self._run("djvused", "-e", f"select {number}; dump", str(self._file))
        found = _INFO.search(said)
        if found is None:
            raise DocumentError("the page has no size")
        width, height, dpi = map(int, found.groups())
        unit = 72 / (dpi if dpi in DPI else USUAL_DPI)
        return width * unit, height * unit

    def draw(self, number: int, width: int, height: int) -> Image.Image:
        """Return a page as RGB in this size; DocumentError if it cannot be decoded."""
        drawn = self._scratch / "page.ppm"
        options = ["-format=ppm", f"-page={number}", f"-size={width}x{height}", "-aspect=no"]
        self._run("ddjvu", *options, str(self._file), str(drawn))
        try:
            return decode(os.fspath(drawn))
        except PromptError as error:
            raise DocumentError(str(error).replace(f"image {drawn}", "the image")) from error
        finally:
            drawn.unlink(missing_ok=True)

    def text(self, number: int) -> str:
        """Return a page's text layer; DocumentError if it cannot be read."""
        return self._run("djvutxt", f"-page={number}", str(self._file)).rstrip("\f\n")

    def _run(self, program: str, *arguments: str) -> str:
        """Return what a program writes; DocumentError if it fails or takes too long."""
        said = self._scratch / "said"
        with open(said, "wb") as out, open(self._scratch / "faults", "w+b") as faults:
            limits = functools.partial(bound, memory_bytes=MEMORY_BYTES, cpu_s=TIMEOUT_S, file_bytes=FILE_BYTES)
            command = [*alone(), program, *arguments]
            try:
                done = subprocess.run(command, stdout=out, stderr=faults, timeout=TIMEOUT_S, preexec_fn=limits)
            except subprocess.TimeoutExpired as error:
                raise DocumentError(f"`{program}` took more than {TIMEOUT_S} s") from error
            faults.seek(0)
            complaint = faults.read(1 << 12).decode(errors="replace").replace(str(self._scratch), "").splitlines()
        if done.returncode:
            reason = complaint[0].removeprefix("***").strip() if complaint else f"exit code {done.returncode}"
            raise DocumentError(f"`{program}` cannot read it: {reason}")
        with open(said, "rb") as file:
            return file.read(TEXT_BYTES).decode("utf-8", "replace")
