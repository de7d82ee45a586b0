"""Rows read while a run trains: passes, order, going on after a stop, bad rows, and what cannot be streamed."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from random import Random
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from recipes.files.row_check import Uncounted
from rollout.config import InputsConfig
from rsgrpo.config.train import DataConfig, PromptConfig, SftConfig, TrainConfig
from rsgrpo.data.rows import open_rows, read_rows
from rsgrpo.data.streaming import StreamedPrompts, shuffled
from rsgrpo.errors import ConfigError, InputError, RsgrpoError
from tests.material.synthetic_run import png

INPUTS = InputsConfig(min_pixels=784, max_pixels=3136)


def row_of(number: int, **changes: Any) -> dict[str, Any]:
    return {"id": f"r{number}", "prompt": f"question {number}", "answer": [str(number)]} | changes


def write(folder: Path, rows: list[Any], name: str = "rows.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def stream_of(source: str, seed: int = 0, **settings: Any) -> StreamedPrompts:
    return StreamedPrompts(
        DataConfig(train=source, streaming=True, **settings), PromptConfig(), Uncounted(INPUTS), seed
    )


def ids(stream: StreamedPrompts, n: int) -> list[str]:
    return [prompt.id for prompt in stream.next(n)]


def test_without_shuffle_the_stream_is_the_file_pass_after_pass(tmp_path):
    stream = stream_of(write(tmp_path, [row_of(n) for n in range(3)]), shuffle=False)
    assert [ids(stream, 2) for _ in range(3)] == [["r0", "r1"], ["r2", "r0"], ["r1", "r2"]]
    assert stream.epoch == 1


def test_every_pass_has_every_row_once_in_an_order_of_its_own_that_the_seed_fixes(tmp_path):
    source = write(tmp_path, [row_of(n) for n in range(40)])
    passes = [tuple(ids(stream, 40)) for stream in [stream_of(source, shuffle_buffer=8)] for _ in range(3)]
    assert all(len(set(one)) == 40 for one in passes)
    assert len(set(passes)) == 3
    assert ids(stream_of(source, shuffle_buffer=8), 120) == list(itertools.chain(*passes))
    assert ids(stream_of(source, seed=1, shuffle_buffer=8), 40) != list(passes[0])


def test_a_buffer_of_one_keeps_the_order_and_a_row_waits_no_longer_than_the_buffer_lasts(tmp_path):
    rows, _ = open_rows(write(tmp_path, [row_of(n) for n in range(30)]))
    assert [row.number for row in shuffled(rows, 1, Random(0))] == list(range(1, 31))
    rows, _ = open_rows(str(tmp_path / "rows.jsonl"))
    drawn = [row.number for row in shuffled(rows, 5, Random(0))]
    assert sorted(drawn) == list(range(1, 31))
    assert all(number <= place + 5 for place, number in enumerate(drawn, start=1))


@pytest.mark.parametrize("taken", [0, 1, 6, 7, 8, 20])
def test_a_stream_goes_on_exactly_where_its_state_was_taken(tmp_path, taken):
    rows = [row_of(n) if n != 4 else row_of(n, answer=None) for n in range(8)]
    source = write(tmp_path, rows)
    stream = stream_of(source, shuffle_buffer=3, bad_rows="drop")
    stream.next(taken)
    state = json.loads(json.dumps(stream.state()))
    resumed = stream_of(source, shuffle_buffer=3, bad_rows="drop")
    resumed.load_state(state)
    assert resumed.state() == state
    assert ids(resumed, 20) == ids(stream, 20)


def test_a_state_of_another_source_seed_or_order_is_refused(tmp_path):
    source = write(tmp_path, [row_of(n) for n in range(3)])
    state = stream_of(source).state()
    for other in (stream_of(source, seed=1), stream_of(source, shuffle_buffer=2), stream_of(source, shuffle=False)):
        with pytest.raises(InputError, match="are not those of the checkpoint"):
            other.load_state(state)
    write(tmp_path, [row_of(0)])
    with pytest.raises(InputError, match="has fewer rows than when the checkpoint was written"):
        stream_of(source).load_state(state | {"position": 2})


def test_a_bad_row_stops_the_run_when_it_is_met_or_is_passed_over_and_counted(tmp_path):
    rows = [row_of(0), row_of(1, answer=None), row_of(2)]
    source = write(tmp_path, rows)
    stream = stream_of(source, shuffle=False)
    assert ids(stream, 1) == ["r0"]
    with pytest.raises(RsgrpoError, match=r"line 2 of rows\.jsonl, id r1: no gold answer"):
        stream.next(1)
    stream = stream_of(source, shuffle=False, bad_rows="drop")
    assert ids(stream, 4) == ["r0", "r2", "r0", "r2"]
    assert stream.dropped == {"no gold answer": 2}


def test_a_source_without_a_usable_row_is_an_error_and_no_endless_search(tmp_path):
    source = write(tmp_path, [row_of(1, answer=None)])
    with pytest.raises(RsgrpoError, match="has no usable row"):
        stream_of(source, bad_rows="drop").next(1)
    with pytest.raises(InputError, match="has no usable row"):
        stream_of(source, bad_rows="drop").first(3)


def test_the_first_rows_are_looked_at_without_moving(tmp_path):
    stream = stream_of(write(tmp_path, [row_of(n) for n in range(5)]), shuffle=False)
    assert [prompt.id for prompt in stream.first(2)] == ["r0", "r1"]
    assert len(stream.first(9)) == 5
    assert ids(stream, 1) == ["r0"]


def test_shards_with_images_inside_are_streamed_as_they_would_be_read(tmp_path):
    for shard in range(2):
        rows = [
            row_of(2 * shard + n, prompt="<image>?", image=[{"bytes": png(), "path": None}], evidence=["x"])
            for n in range(2)
        ]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"train-0000{shard}-of-00002.parquet")
    opened, folder = open_rows(f"{tmp_path}:train")
    whole, same_folder = read_rows(f"{tmp_path}:train")
    assert list(opened) == whole
    assert folder == same_folder
    (prompt,) = stream_of(f"{tmp_path}:train", shuffle=False).next(1)
    assert prompt.images == (png(),)


def test_what_must_be_read_whole_is_refused_with_the_way_out(tmp_path):
    (tmp_path / "rows.json").write_text("[]")
    with pytest.raises(InputError, match=r"reads \.jsonl and \.parquet files; rows\.json can only be read whole"):
        stream_of(str(tmp_path / "rows.json"))
    with pytest.raises(InputError, match="does not exist"):
        stream_of("none.jsonl")
    with pytest.raises(InputError, match="org/name is not on this machine and cannot be downloaded from the hub"):
        stream_of("org/name:train")


@pytest.mark.parametrize("schema", [TrainConfig, SftConfig])
def test_a_streamed_run_says_how_long_it_is(schema):
    with pytest.raises(ConfigError, match=r"cannot count the rows in advance\. Set total_steps"):
        schema(data=DataConfig(train="x.jsonl", streaming=True))
    assert schema(data=DataConfig(train="x.jsonl", streaming=True), total_steps=3).data.streaming
