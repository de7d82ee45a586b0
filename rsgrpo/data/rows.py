"""Read rows from a data source (a file, a folder or a hub data set), and find the images of a row."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from rollout.files import parse_json
from rollout.inputs.images import local_source
from rollout.inputs.packed import PackedImage
from rollout.types import ImageSource
from rsgrpo.data.faults import MAX_LISTED_ROWS as MAX_LISTED_ROWS
from rsgrpo.data.hub_folder import published_files, published_folder
from rsgrpo.data.image_packs import image_key, index_packs, is_pack, packs_in
from rsgrpo.errors import InputError, SourceBroke, listed
from rsgrpo.records.hub import hub_errors

FILE_SUFFIXES = (".jsonl", ".json", ".parquet")
STREAMED_SUFFIXES = (".jsonl", ".parquet")
ROWS_IN_MEMORY = 64
MAX_ROWS = 2_000_000  # read whole; a small compressed file may hold many more than memory does
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SHARD = re.compile(r"-\d+-of-\d+$")


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it was written.

    place: where it was found, for messages ("line 7 of train.jsonl").
    number: from 1, in file order; it names a row without an id.
    columns: name -> value; empty where the row cannot be read.
    fault: why it cannot be read; "" where it can.
    """

    place: str
    number: int
    columns: Mapping[str, Any]
    fault: str = ""


@dataclass(frozen=True, slots=True)
class ImageFolder:
    """Where image entries of rows are looked up.

    folder: start of relative paths.
    packed: the images in an `images.parquet`, by `rsgrpo.data.image_packs.image_key`.
    """

    folder: Path
    packed: Mapping[str, PackedImage] = field(default_factory=dict)

    def resolve(self, entry: Any) -> ImageSource:
        """Return a path, compressed bytes or a packed image for a path, bytes, {"bytes", "path"} or PIL image.

        A path may also be a `file://` or `data:` URL, or the image of a chat message, {"type": "image", "image": path}.

        Raises:
            ValueError: the entry is none of these.
        """
        if isinstance(entry, Mapping) and "image" in entry:
            entry = entry["image"]
        if isinstance(entry, Mapping) and ("bytes" in entry or "path" in entry):
            entry = entry.get("path") if entry.get("bytes") is None else entry["bytes"]
        if isinstance(entry, str):
            entry = local_source(entry)
        if isinstance(entry, bytes | bytearray | memoryview):
            return bytes(entry)
        if isinstance(entry, Path | str) and str(entry):
            packed = self.packed.get(image_key(str(entry)))
            return str(self.folder / entry) if packed is None else packed
        if hasattr(entry, "save") and hasattr(entry, "mode"):  # a PIL image
            buffer = io.BytesIO()
            entry.save(buffer, "PNG")
            return buffer.getvalue()
        raise ValueError(
            f"an image must be a path, bytes, a mapping with bytes or path, or a PIL image, got {entry!r:.80}"
        )


def read_rows(source: str, *, keep_broken: bool = False) -> tuple[list[Row], Path]:
    """Read a data source whole: the rows of `open_rows`, and the folder that relative image paths start from.

    keep_broken: also return rows that are not JSON objects, with their `fault`, for callers that list bad rows.

    Raises:
        InputError: there is nothing, it cannot be read (the message names file and lines), it has no rows, or more than
            `MAX_ROWS`.
    """
    opened, folder = open_rows(source)
    rows = list(islice(opened, MAX_ROWS + 1))
    if len(rows) > MAX_ROWS:
        raise InputError(f"{source} has more than {MAX_ROWS:,} rows. Split it, or train with data.streaming=true")
    if not rows:
        raise InputError(f"data source {source} has no rows")
    broken = [f"{row.place}: {row.fault}" for row in rows if row.fault]
    if broken and not keep_broken:
        raise InputError(
            f"{source}: {len(broken)} of {len(rows)} rows cannot be read. Fix or delete them:\n"
            f"{listed(broken, MAX_LISTED_ROWS)}"
        )
    return rows, folder


def open_rows(source: str, *, streamed: bool = False) -> tuple[Iterator[Row], Path]:
    """Open a data source to be read once from its start.

    source: a .jsonl, .json or .parquet file; a folder with one such file (or the shards of one), or written by
        `datasets.save_to_disk`; a hub id. ":NAME" after a folder or hub id chooses a file or split.
    streamed: hold a few rows in memory at a time, and read a hub data set over the network, unless it has an
        `images.parquet`: such images are wanted in any order, so that the files must be on this machine.

    Returns:
        The rows, and the folder that relative image paths start from.

    Raises:
        InputError: nothing is there, or it can only be read whole. Reading the rows raises it where a file is broken.
    """
    if not source:
        raise InputError("No data source is given: set data.train (and data.val) to a file, a folder or a hub data set")
    path = Path(source)
    name, _, split = source.rpartition(":") if ":" in source and not path.is_dir() else (source, "", "")
    if path.is_file():
        return _file_rows([path], streamed), path.parent
    if Path(name).is_dir():
        return _folder_rows(Path(name), split, streamed), Path(name)
    if path.suffix in FILE_SUFFIXES or not _HUB_ID.fullmatch(name):
        raise InputError(f"data source {source} does not exist; give a file, a folder or a hub id (org/name:split)")
    if streamed:
        files = published_files(name)
        if files is not None and not any(map(is_pack, files)):
            return _rows(_hub_stream(name, split)), Path(".")
    local = f"data/{name.partition('/')[2]}"
    folder = published_folder(
        name, local=local, setting=f"data.train (or data.val) to {local}{':' * bool(split)}{split}"
    )
    if _files_in(folder):
        return _folder_rows(folder, split, streamed), folder
    import datasets

    try:
        loaded = datasets.load_dataset(str(folder))
    except (OSError, ValueError) as error:
        raise InputError(f"the hub data set {name} has no rows that can be read: {error}") from error
    return _saved_rows(loaded, name, split), folder


def find_images(folder: Path, image_dir: str) -> ImageFolder:
    """Return where images are: `image_dir`, else the data's folder, and the images packed in its `images.parquet`.

    Raises:
        InputError: `image_dir` is not a folder, or `images.parquet` cannot be read or lacks its columns.
    """
    start = Path(image_dir) if image_dir else folder
    if not start.is_dir():
        raise InputError(f"data.image_dir {image_dir} is not a folder")
    return ImageFolder(start, index_packs(packs_in(start)))


def image_entries(value: Any) -> list[Any]:
    """Return the entries of an image column: a list, one image alone, or nothing."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def image_paths(value: Any) -> list[str]:
    """Return the paths among the entries of an image column."""
    entries = [entry.get("path") if isinstance(entry, Mapping) else entry for entry in image_entries(value)]
    return [entry for entry in entries if isinstance(entry, str)]


def _rows(found: Iterable[tuple[str, Any]]) -> Iterator[Row]:
    """Number (place, value) pairs; a value that is not an object, or an error in its place, is the row's fault."""
    for number, (place, value) in enumerate(found, start=1):
        if isinstance(value, dict):
            yield Row(place, number, value)
        elif isinstance(value, ValueError):
            yield Row(place, number, {}, str(value))
        else:
            yield Row(place, number, {}, f"a row must be a JSON object, got {type(value).__name__}")


def _placed(values: Iterable[Any], name: str) -> Iterator[tuple[str, Any]]:
    return ((f"row {number} of {name}", value) for number, value in enumerate(values, start=1))


def _file_rows(files: Sequence[Path], streamed: bool) -> Iterator[Row]:
    for path in files:
        if path.suffix not in FILE_SUFFIXES:
            raise InputError(f"data file {path} must end in one of {', '.join(FILE_SUFFIXES)}")
        if streamed and path.suffix not in STREAMED_SUFFIXES:
            allowed = " and ".join(STREAMED_SUFFIXES)
            raise InputError(f"data.streaming reads {allowed} files; {path.name} can only be read whole")
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}
    return _rows(pair for path in files for pair in readers[path.suffix](path))


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                value: Any
                try:
                    value = parse_json(line)
                except ValueError as error:
                    value = error
                yield f"line {number} of {path.name}", value


def _read_json(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        rows = parse_json(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path} is {error}. Fix it (broken rows can be dropped only from a .jsonl file)") from error
    if not isinstance(rows, list):
        raise InputError(f"{path} must be a JSON list of objects; a file with one object per line ends in .jsonl")
    return _placed(rows, path.name)


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            batches = file.iter_batches(batch_size=ROWS_IN_MEMORY)
            yield from _placed((row for batch in batches for row in batch.to_pylist()), path.name)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path} is not a readable parquet file: {error}") from error


def _files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in FILE_SUFFIXES and not is_pack(path.name))


def _folder_rows(folder: Path, split: str, streamed: bool) -> Iterator[Row]:
    """Return the rows of a folder's one data file, or of its shards; `split` chooses among several by name."""
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        import datasets

        return _saved_rows(datasets.load_from_disk(str(folder)), str(folder), split)
    there = _files_in(folder)
    files = [path for path in there if not split or _SHARD.sub("", path.stem) == split]
    names = {_SHARD.sub("", path.stem) + path.suffix for path in files}
    if len(names) != 1:
        found = ", ".join(sorted(names)) or "none among " + (", ".join(path.name for path in there) or "no data files")
        wanted = f" named {split}" if split else ""
        raise InputError(
            f"folder {folder} must hold one data file{wanted} ({', '.join(FILE_SUFFIXES)}), found {found}. Name the "
            f"file, or {folder}:NAME"
        )
    return _file_rows(files, streamed)


def _saved_rows(loaded: Any, name: str, split: str) -> Iterator[Row]:
    """Return the rows of a Dataset, or of one split of a DatasetDict; images stay compressed."""
    if isinstance(loaded, Mapping):
        loaded = _chosen(loaded, name, split)
    elif split:
        raise InputError(f"data source {name} has no splits, got {name}:{split}")
    batches = loaded.with_format("arrow").iter(batch_size=ROWS_IN_MEMORY)
    return _rows(_placed((row for batch in batches for row in batch.to_pylist()), name))


def _chosen(splits: Mapping[str, Any], name: str, split: str) -> Any:
    """Return the split that is named, or the only one."""
    chosen = split or (next(iter(splits)) if len(splits) == 1 else "")
    if chosen not in splits:
        raise InputError(f"data source {name} has the splits {', '.join(splits)}; choose one as {name}:SPLIT")
    return splits[chosen]


def _hub_stream(name: str, split: str) -> Iterator[tuple[str, Any]]:
    """Stream a hub data set through `datasets`; images stay compressed."""
    import datasets

    try:
        stream = _chosen(datasets.load_dataset(name, streaming=True), name, split)
    except hub_errors() as error:
        raise InputError(
            f"the hub data set {name} cannot be streamed: {error}. Without a network, download it and name the folder"
        ) from error
    for column, feature in (stream.features or {}).items():
        kind = getattr(feature, "feature", feature)
        if isinstance(kind, datasets.Image):
            raw = datasets.Image(decode=False)
            stream = stream.cast_column(column, raw if kind is feature else datasets.List(raw))
    return _until_it_breaks(stream, name)


def _until_it_breaks(stream: Iterable[Any], name: str) -> Iterator[tuple[str, Any]]:
    """Yield rows from the network; `datasets` itself retries for minutes before it gives up."""
    import pyarrow
    from datasets.exceptions import DatasetsError

    number = 0
    try:
        for number, columns in enumerate(stream, start=1):
            yield f"row {number} of {name}", columns
    except (DatasetsError, pyarrow.ArrowException, *hub_errors()) as error:
        cause = error.__cause__ or error
        raise SourceBroke(
            f"the hub data set {name} broke off after row {number}: {type(cause).__name__}: {cause}\n"
            "Run the same command to resume from the last checkpoint. If the network is unreliable, download the data "
            f"set (`hf download {name} --repo-type dataset --local-dir FOLDER`) and name the folder"
        ) from error
