"""From a data source to rows: files, folders and hub data sets, and where a row's images are.

Knows formats and places; nothing of prompts, gold answers or models.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rollout.inputs.images import local_source
from rollout.packed import PackedImage
from rollout.types import ImageSource
from rsgrpo.data.hub_folder import hub_errors, published_files, published_folder
from rsgrpo.data.image_packs import image_key, index_packs, is_pack, packs_in
from rsgrpo.errors import InputError, SourceBroke

FILE_SUFFIXES = (".jsonl", ".json", ".parquet")
STREAMED_SUFFIXES = (".jsonl", ".parquet")
MAX_LISTED_ROWS = 20
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SHARD = re.compile(r"-\d+-of-\d+$")


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it was written.

    place: where it stands, for messages ("line 7 of train.jsonl").
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
    packed: images that lie in an `images.parquet`, by `rsgrpo.data.image_packs.image_key`.
    """

    folder: Path
    packed: Mapping[str, PackedImage] = field(default_factory=dict)

    def resolve(self, entry: Any) -> ImageSource:
        """Return a path, compressed bytes or where they lie for a path, bytes, {"bytes", "path"} or PIL image.

        A path may also be a `file://` or `data:` URL, and stand in a chat message's {"type": "image", "image": path}.

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
    """Read a data source whole.

    source: a .jsonl, .json or .parquet file; a folder with one such file (or the shards of one), or written by
        `datasets.save_to_disk`; a hub id. ":split" after a folder or hub id chooses a split.
    keep_broken: return rows that are no JSON object as well, with their `fault`, for callers that list bad rows.

    Returns:
        The rows, and the folder that relative image paths start from.

    Raises:
        InputError: nothing is there, it cannot be read (file and lines are named), or it has no rows.
    """
    if not source:
        raise InputError("no data source is given: set data.train (and data.val) to a file, a folder or a hub data set")
    path = Path(source)
    name, _, split = source.rpartition(":") if ":" in source else (source, "", "")
    if path.is_file():
        rows, folder = list(_read_file(path)), path.parent
    elif path.is_dir():
        rows, folder = _read_folder(path, "")
    elif split and Path(name).is_dir():
        rows, folder = _read_folder(Path(name), split)
    elif path.suffix not in FILE_SUFFIXES and _HUB_ID.fullmatch(name):
        rows, folder = _read_hub(name, split)
    else:
        raise InputError(f"data source {source} does not exist; give a file, a folder or a hub id (org/name:split)")
    if not rows:
        raise InputError(f"data source {source} has no rows")
    broken = [f"  {row.place}: {row.fault}" for row in rows if row.fault]
    if broken and not keep_broken:
        more = [f"  ... and {len(broken) - MAX_LISTED_ROWS} more"] if len(broken) > MAX_LISTED_ROWS else []
        listed = "\n".join([*broken[:MAX_LISTED_ROWS], *more])
        raise InputError(f"{source}: {len(broken)} of {len(rows)} rows cannot be read; mend or delete them:\n{listed}")
    return rows, folder


def open_rows(source: str) -> tuple[Iterator[Row], Path]:
    """Open a data source to be read once from its start, a few rows in memory at a time.

    source: a .jsonl or .parquet file; a folder with one such file or its shards; a hub id, which `datasets` streams.
        ":NAME" after a folder or hub id chooses a file or split. A hub data set with an `images.parquet` is fetched
        and read from disk.

    Returns:
        The rows, and the folder that relative image paths start from.

    Raises:
        InputError: nothing is there, or it can only be read whole.
    """
    name, _, split = source.rpartition(":") if ":" in source else (source, "", "")
    if Path(source).is_file():
        files, folder = [Path(source)], Path(source).parent
    elif Path(name).is_dir():
        files, folder = _data_files(Path(name), split), Path(name)
    elif _HUB_ID.fullmatch(name) and Path(source).suffix not in FILE_SUFFIXES:
        names = published_files(name)
        if names is not None and not any(map(is_pack, names)):
            return _stream_hub(name, split), Path(".")
        folder = _fetched(name, split)  # images are wanted in any order, and packs must lie on this machine for that
        files = _data_files(folder, split)
    else:
        raise InputError(f"data source {source} does not exist; give a file, a folder or a hub id (org/name:split)")
    whole = [path.name for path in files if path.suffix not in STREAMED_SUFFIXES]
    if whole:
        raise InputError(f"data.streaming reads {' and '.join(STREAMED_SUFFIXES)} files, {whole[0]} is read whole only")

    def numbered() -> Iterator[Row]:
        rows = (row for path in files for row in (_read_jsonl(path) if path.suffix == ".jsonl" else _batches(path)))
        yield from (replace(row, number=number) for number, row in enumerate(rows, start=1))

    return numbered(), folder


def _batches(path: Path) -> Iterator[Row]:
    """Yield the rows of a parquet file, a few at a time in memory."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=64):
                for columns in batch.to_pylist():
                    number += 1
                    yield _row(f"row {number} of {path.name}", number, columns)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path} is not a readable parquet file: {error}") from error


def _stream_hub(name: str, split: str) -> Iterator[Row]:
    """Stream a hub data set through `datasets`; images stay compressed."""
    import datasets

    try:
        loaded = datasets.load_dataset(name, streaming=True)
        chosen = split or (next(iter(loaded)) if len(loaded) == 1 else "")
        if chosen not in loaded:
            raise InputError(f"data source {name} has the splits {', '.join(loaded)}; choose one as {name}:SPLIT")
        stream = loaded[chosen]
    except hub_errors() as error:
        raise InputError(
            f"the hub data set {name} cannot be streamed: {error}; without a network, download it and name the folder"
        ) from error
    for column, feature in (stream.features or {}).items():
        kind = getattr(feature, "feature", feature)
        if isinstance(kind, datasets.Image):
            raw = datasets.Image(decode=False)
            stream = stream.cast_column(column, raw if kind is feature else datasets.List(raw))
    return _streamed(stream, name)


def _streamed(stream: Iterable[Any], name: str) -> Iterator[Row]:
    """Yield what comes over the network; `datasets` itself has tried again for minutes before it gives up."""
    import pyarrow
    from datasets.exceptions import DatasetsError

    faults = (DatasetsError, pyarrow.ArrowException, *hub_errors())
    number = 0
    try:
        for number, columns in enumerate(stream, start=1):
            yield _row(f"row {number} of {name}", number, columns)
    except faults as error:
        cause = error.__cause__ or error
        raise SourceBroke(
            f"the hub data set {name} broke off after row {number}: {type(cause).__name__}: {cause}\n"
            "The same command goes on from the last checkpoint; where the network does not hold, download the data set "
            f"(`hf download {name} --repo-type dataset --local-dir FOLDER`) and name the folder"
        ) from error


def find_images(folder: Path, image_dir: str) -> ImageFolder:
    """Return where images are: `image_dir`, else the data's folder, and what lies packed in its `images.parquet`.

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


def _read_file(path: Path) -> Iterator[Row]:
    if path.suffix == ".jsonl":
        return _read_jsonl(path)
    if path.suffix == ".json":
        return _number(_read_json(path), path.name)
    if path.suffix == ".parquet":
        return _number(_read_parquet(path), path.name)
    raise InputError(f"data file {path} must end in one of {', '.join(FILE_SUFFIXES)}")


def _number(rows: list[Any], name: str) -> Iterator[Row]:
    return (_row(f"row {number} of {name}", number, row) for number, row in enumerate(rows, start=1))


def _row(place: str, number: int, value: Any) -> Row:
    """Return a row of what stands there; to be anything but an object is its fault."""
    if isinstance(value, dict):
        return Row(place, number, value)
    return Row(place, number, {}, f"a row must be a JSON object, got {type(value).__name__}")


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as lines:
        number = 0
        for line_number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            number += 1
            place = f"line {line_number} of {path.name}"
            try:
                row = _row(place, number, _parse(line))
            except ValueError as error:
                row = Row(place, number, {}, str(error))
            yield row


def _read_json(path: Path) -> list[Any]:
    try:
        rows = _parse(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path} is {error}; mend it (broken rows can be dropped from a .jsonl only)") from error
    if not isinstance(rows, list):
        raise InputError(f"{path} must be a JSON list of objects; one object per line is a .jsonl file")
    return rows


def _parse(text: bytes) -> Any:
    """Return what a JSON text says.

    Raises:
        ValueError: it is broken; the message says how and where.
    """
    try:
        value = json.loads(text.removeprefix(b"\xef\xbb\xbf"))
        if b"\\ud" in text or b"\\uD" in text:  # half a character can be read, and written nowhere
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg} at character {error.pos}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"not valid JSON: {error}") from error
    except UnicodeEncodeError as error:
        raise ValueError(f"not valid Unicode: {error.object[error.start]!a} stands without its other half") from error
    except RecursionError as error:
        raise ValueError("not usable JSON: it is nested too deeply") from error


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path} is not a readable parquet file: {error}") from error


def _read_folder(folder: Path, split: str) -> tuple[list[Row], Path]:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        import datasets

        return _from_datasets(datasets.load_from_disk(str(folder)), str(folder), split), folder
    files = _data_files(folder, split)
    rows = [row for path in files for row in _read_file(path)]
    return [replace(row, number=number) for number, row in enumerate(rows, start=1)], folder


def _data_files(folder: Path, split: str) -> list[Path]:
    """Return the one data file of a folder, or the shards of one; `split` chooses among several by name."""
    there = sorted(path for path in folder.iterdir() if path.suffix in FILE_SUFFIXES and not is_pack(path.name))
    files = [path for path in there if not split or _SHARD.sub("", path.stem) == split]
    names = {_SHARD.sub("", path.stem) + path.suffix for path in files}
    if len(names) != 1:
        listed = ", ".join(sorted(names)) or "none among " + (", ".join(path.name for path in there) or "no data files")
        wanted = f" named {split}" if split else ""
        raise InputError(
            f"folder {folder} must hold one data file{wanted} ({', '.join(FILE_SUFFIXES)}), "
            f"found {listed}; name the file, or {folder}:NAME"
        )
    return files


def _read_hub(name: str, split: str) -> tuple[list[Row], Path]:
    """Read a hub data set as the folder it is published as, or through `datasets` where it has no data files on top."""
    folder = _fetched(name, split)
    files = [path for path in folder.iterdir() if path.suffix in FILE_SUFFIXES and not is_pack(path.name)]
    if files:
        return _read_folder(folder, split)
    import datasets

    try:
        loaded = datasets.load_dataset(str(folder))
    except (OSError, ValueError) as error:
        raise InputError(f"the hub data set {name} has no rows that can be read: {error}") from error
    return _from_datasets(loaded, name, split), folder


def _fetched(name: str, split: str) -> Path:
    local = f"data/{name.partition('/')[2]}"
    setting = f"data.train (or data.val) to {local}{':' * bool(split)}{split}"
    return published_folder(name, local=local, setting=setting)


def _from_datasets(loaded: Any, name: str, split: str) -> list[Row]:
    """Take rows out of a Dataset, or out of one split of a DatasetDict; images stay compressed."""
    if isinstance(loaded, Mapping):
        chosen = split or (next(iter(loaded)) if len(loaded) == 1 else "")
        if chosen not in loaded:
            raise InputError(f"data source {name} has the splits {', '.join(loaded)}; choose one as {name}:SPLIT")
        loaded = loaded[chosen]
    elif split:
        raise InputError(f"data source {name} has no splits, got {name}:{split}")
    return list(_number(loaded.with_format("arrow")[:].to_pylist(), name))
