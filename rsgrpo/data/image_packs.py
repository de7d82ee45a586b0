"""Index and read the images packed in `images.parquet` files, the layout of EVisRAG-Train.

`rollout.inputs.packed` reads a single image from such a file.
"""

from __future__ import annotations

import hashlib
import logging
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rollout.files import replaced
from rollout.inputs.packed import PackedImage
from rsgrpo.errors import InputError

log = logging.getLogger(__name__)

IMAGE_FILE = "images.parquet"
MAX_GROUP_BYTES = 16 * 2**20  # of a row group, all of which is read for one image
ROWS_OF_COPY = 8
READ_BYTES = 2**20
_PACK = re.compile(r"images(-.*)?\.parquet")


def is_pack(name: str) -> bool:
    """Whether a file holds images for rows beside it: `images.parquet`, `images-*.parquet`."""
    return _PACK.fullmatch(name) is not None


def packs_in(folder: Path) -> list[Path]:
    """Return the packs of a folder."""
    return sorted(path for path in folder.glob("images*.parquet") if is_pack(path.name))


def image_key(name: str) -> str:
    """Return the key that an image is looked up by: its path, normalised.

    >>> image_key("./imgs//a.png")
    'imgs/a.png'
    """
    return posixpath.normpath(name)


def index_packs(packs: Sequence[Path]) -> dict[str, PackedImage]:
    """Return `image_key` -> where that image lies. No image is read, unless a pack must be copied.

    A row group has to be read whole for each of its images. Of a pack with large row groups, a copy in small ones is
    kept in the Hugging Face assets cache.

    Raises:
        InputError: a pack cannot be read, lacks its columns, or has two different images under one path.
    """
    import pyarrow

    index: dict[str, PackedImage] = {}
    for pack in packs:
        try:
            _add(index, pack)
        except (pyarrow.ArrowException, OSError) as error:
            raise InputError(f"{pack} is not a readable parquet file of images: {error}") from error
    return index


def packed_images(pack: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (path, compressed bytes) of all images, a few at a time in memory; rows without either are left out.

    Raises:
        InputError: it cannot be read, or lacks its columns.
    """
    import pyarrow

    try:
        for batch in _batches(pack):
            for row in batch.to_pylist():
                value = row.get("image", row.get("bytes"))
                content = value.get("bytes") if isinstance(value, Mapping) else value
                name = _name_of(row)
                if name and content is not None:
                    yield name, content
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{pack} is not a readable parquet file of images: {error}") from error


def _add(index: dict[str, PackedImage], pack: Path) -> None:
    import pyarrow.parquet

    columns, content = _columns(pack)
    metadata = pyarrow.parquet.read_metadata(pack)
    sizes = [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]
    file = pack if max(sizes, default=0) <= MAX_GROUP_BYTES else _copy_in_small_groups(pack)
    named = [column for column in ("path", "image.path", "bytes.path") if column in columns]
    changed_ns = file.stat().st_mtime_ns
    with pyarrow.parquet.ParquetFile(file) as opened:
        for group in range(opened.num_row_groups):
            for row, names in enumerate(opened.read_row_group(group, columns=named).to_pylist()):
                if not (name := _name_of(names)):
                    continue
                image = PackedImage(str(file), changed_ns, content, group, row, name)
                known = index.setdefault(image_key(name), image)
                if known is not image and known.read() != image.read():
                    raise InputError(f"{pack}: there are two different images for the path {name}")


def _columns(pack: Path) -> tuple[list[str], str]:
    """Return the columns of a pack, "a.b" for part b of a struct a, and the one of them that holds bytes.

    Raises:
        InputError: there is none.
    """
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.parquet.read_schema(pack)
    columns = list(schema.names)
    for name in schema.names:
        if pyarrow.types.is_struct(kind := schema.field(name).type):
            columns += [f"{name}.{kind.field(part).name}" for part in range(kind.num_fields)]
    content = next((name for name in ("image", "bytes") if name in columns), None)
    inner = f"{content}.bytes"
    if content is None or not (_holds_bytes(schema.field(content).type) or inner in columns):
        raise InputError(
            f"{pack} needs a column `image` (or `bytes`), bytes or {{bytes, path}}; it has {', '.join(schema.names)}"
        )
    if not {"path", f"{content}.path"} & set(columns):
        raise InputError(f"{pack} does not name its images: it needs a column `path`")
    return columns, inner if inner in columns else content


def _holds_bytes(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _name_of(row: Mapping[str, Any]) -> str | None:
    """Return the path in a row of a pack."""
    inner = row.get("image", row.get("bytes"))
    return row.get("path") or (inner.get("path") if isinstance(inner, Mapping) else None)


def _batches(pack: Path) -> Iterator[Any]:
    """Yield the image columns of a pack, a few rows at a time in memory even where all are one row group."""
    import pyarrow.parquet

    columns, _ = _columns(pack)
    kept = [name for name in ("path", "image", "bytes") if name in columns]
    with pyarrow.parquet.ParquetFile(pack, buffer_size=READ_BYTES, pre_buffer=False) as opened:
        yield from opened.iter_batches(batch_size=ROWS_OF_COPY, columns=kept, use_threads=False)


def _copy_in_small_groups(pack: Path) -> Path:
    """Return a copy of a pack that can be read image by image; it is made once, whole or not at all."""
    import pyarrow.parquet
    from huggingface_hub import cached_assets_path

    real = pack.resolve()
    state = f"{real}\0{real.stat().st_size}\0{real.stat().st_mtime_ns}"
    name = hashlib.sha256(state.encode(errors="surrogateescape")).hexdigest()[:32]
    target = cached_assets_path("rsgrpo", "packs", name) / pack.name
    if target.is_file():
        return target
    log.warning("%s has row groups of over %d MiB: copying it to %s", pack, MAX_GROUP_BYTES >> 20, target)
    options: dict[str, Any] = {"compression": "none", "use_dictionary": False}
    try:
        with replaced(target) as unfinished:
            writer = None
            for batch in _batches(pack):
                writer = writer or pyarrow.parquet.ParquetWriter(unfinished, batch.schema, **options)
                writer.write_batch(batch)
            assert writer is not None, "a pack without rows has no large row group"
            writer.close()
    except OSError as error:
        raise InputError(
            f"{pack} must be copied to be read image by image, but {target} cannot be written: {error}. Set "
            "HF_ASSETS_CACHE to a folder with room, or unpack the file: python -m recipes.prepare unpack"
        ) from error
    return target
