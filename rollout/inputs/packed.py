"""An image inside a parquet file: a reference that reads its bytes on demand; `rsgrpo.data.image_packs` makes them.

Only the most recent row groups are cached, so that memory stays bounded however large the file is.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

GROUPS_KEPT = 4  # in each process


_turn = {"lock": threading.Lock()}  # one thread at a time decodes: each row group once, one beside those cached
# In a forked process the thread that holds the lock does not exist.
os.register_at_fork(after_in_child=lambda: _turn.update(lock=threading.Lock()))


@dataclass(frozen=True, slots=True)
class PackedImage:
    """One compressed image in one row of a parquet file.

    It may be used from any thread and after a fork. Pickled, it becomes its bytes: the process that unpickles it does
    not need the file and may run on another machine.

    file: the parquet file. changed_ns: its modification time when it was indexed.
    column: of the bytes, "image" or, inside a struct, "image.bytes".
    group, row: row group, and row within it, from 0.
    name: path under which the image is stored.
    """

    file: str
    changed_ns: int
    column: str
    group: int
    row: int
    name: str

    def read(self) -> bytes:
        """Return the image's bytes.

        Raises:
            OSError, ValueError: the file has changed since it was indexed, or has no bytes in this row.
        """
        with _turn["lock"]:
            found = _column_of(self.file, self.changed_ns, self.column, self.group)
        content: bytes | None = found[self.row].as_py()
        if content is None:
            raise OSError(f"{self.file} has no bytes for {self.name}")
        return content

    def __reduce__(self) -> tuple[Any, ...]:
        return bytes, (self.read(),)


@lru_cache(maxsize=GROUPS_KEPT)
def _column_of(file: str, changed_ns: int, column: str, group: int) -> Any:
    """Return one row group of a column of bytes, a pyarrow.ChunkedArray."""
    import pyarrow.compute
    import pyarrow.parquet

    if os.stat(file).st_mtime_ns != changed_ns:
        raise OSError(f"{file} has changed since it was indexed")
    # File objects must not be shared between threads, and Arrow's threads do not survive a fork: neither is used.
    with pyarrow.parquet.ParquetFile(file, metadata=_metadata(file, changed_ns), pre_buffer=False) as opened:
        found = opened.read_row_group(group, columns=[column], use_threads=False).column(0)
    return pyarrow.compute.struct_field(found, [0]) if "." in column else found


@lru_cache(maxsize=64)
def _metadata(file: str, changed_ns: int) -> Any:
    import pyarrow.parquet

    return pyarrow.parquet.read_metadata(file)
