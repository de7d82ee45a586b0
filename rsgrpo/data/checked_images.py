"""Remember which images decode, so that an unchanged image is decoded only at the first start.

The file that remembers them is shared by all runs of one output folder, and may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import PIL

from rollout.inputs.images import PromptError, bytes_of, check_decodes
from rollout.inputs.packed import PackedImage
from rollout.inputs.videos import VideoFrame
from rollout.types import ImageSource

CHECKED_FILE = ".checked_images"
_DIGEST_BYTES = 16


class CheckedImages:
    """Tells whether an image decodes. Thread-safe; at worst two threads decode the same image.

    file: one digest per line of the images that decoded, of their path, size and time of change, or of their bytes.
        None: nothing is remembered beyond this object.
    """

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        # A damaged line vouches for no image.
        self._known = set(file.read_bytes().decode("ascii", "replace").split()) if file and file.is_file() else set()
        self._used: set[str] = set()
        self._faults: dict[str, str] = {}  # of this object's images, by digest; "" where one decodes

    @property
    def num_decoded(self) -> int:
        """Images that were decoded here."""
        return len(self._faults)

    @property
    def num_known(self) -> int:
        """Images that the file vouched for."""
        return len(self._used)

    def fault_of(self, source: ImageSource) -> str:
        """Return why an image cannot be decoded; "" where it can."""
        digest = _digest(source)
        if digest in self._known:
            self._used.add(digest)
            return ""
        if digest not in self._faults:
            try:
                check_decodes(source)
                self._faults[digest] = ""
            except PromptError as error:
                self._faults[digest] = str(error)
        return self._faults[digest]

    def save(self) -> None:
        """Add the images that were found good to the file."""
        new = [digest for digest, fault in self._faults.items() if not fault]
        if self._file is None or not new:
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a", encoding="ascii") as file:
            file.write("".join(f"{digest}\n" for digest in new))


def _digest(source: ImageSource) -> str:
    """Return a digest of an image as it is now, and of the decoder that judged it."""
    if isinstance(source, str | PackedImage):
        file, place = (source, "") if isinstance(source, str) else (source.file, f"{source.group}/{source.row}")
        found = os.stat(file)
        what = f"{os.path.abspath(file)}{place}\0{found.st_size}\0{found.st_mtime_ns}".encode(errors="surrogateescape")
    elif isinstance(source, VideoFrame):
        what = f"{os.path.abspath(source.file)}\0{source.changed_ns}\0{source.times[source.index]}".encode()
    else:
        what = bytes_of(source)
    return hashlib.blake2b(what, digest_size=_DIGEST_BYTES, key=PIL.__version__.encode()).hexdigest()
