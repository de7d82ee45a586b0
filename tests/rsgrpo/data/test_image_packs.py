"""Images packed in images.parquet: the bytes that unpacked files would give, read one by one, from anywhere."""

from __future__ import annotations

import json
import multiprocessing
import pickle
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from recipes.answers.questions import prompt_hash, read_questions, to_prompt
from recipes.files.layouts import unpack
from recipes.files.row_check import Uncounted
from rollout.config import InputsConfig
from rollout.inputs import packed
from rollout.inputs.images import PromptError, bytes_of, decode
from rollout.inputs.packed import PackedImage
from rsgrpo.config.train import DataConfig, PromptConfig
from rsgrpo.data import image_packs as packs
from rsgrpo.data.checked_images import CheckedImages
from rsgrpo.data.dataset import load_prompts
from rsgrpo.data.image_packs import IMAGE_FILE, index_packs, packed_images
from rsgrpo.data.streaming import StreamedPrompts
from rsgrpo.errors import InputError
from rsgrpo.records.rollouts import _store_image
from tests.material.synthetic_run import png

NUM_PAGES = 12


def page(shade: int) -> bytes:
    return png((shade, shade, shade), 60, 40)


PAGES = {f"imgs/{number:02d}.png": page(number) for number in range(NUM_PAGES)}


@pytest.fixture(autouse=True)
def assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that copies go to; no row group is remembered from other tests."""
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", tmp_path / "assets")
    packed._column_of.cache_clear()
    return tmp_path / "assets"


def write_pack(
    path: Path, pages: Mapping[str, bytes | None] = PAGES, layout: str = "struct and path", **options: Any
) -> None:
    cells = [{"bytes": content, "path": name} for name, content in pages.items()]
    layouts: dict[str, dict[str, Any]] = {
        "struct and path": {"image": cells, "path": list(pages)},
        "struct alone": {"image": cells},
        "bytes": {"path": list(pages), "bytes": list(pages.values())},
        "large bytes": {"path": list(pages), "image": pyarrow.array(list(pages.values()), pyarrow.large_binary())},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(layouts[layout]), path, **options)


def write_rows(folder: Path) -> str:
    rows = [
        {
            "id": f"r{number}",
            "prompt": "<image><image>?",
            "image": [f"imgs/{number:02d}.png", f"./imgs//{(5 * number + 3) % NUM_PAGES:02d}.png"],
            "answer": ["x"],
        }
        for number in range(NUM_PAGES)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "train.jsonl")


def prompts_of(source: str, **settings: Any) -> list:
    return list(load_prompts(source, DataConfig(**settings), PromptConfig(), Uncounted(InputsConfig())))


def contents(prompt: Any) -> list[bytes]:
    return [Path(image).read_bytes() if isinstance(image, str) else bytes_of(image) for image in prompt.images]


@pytest.mark.parametrize("group_rows", [1, 5, 100])
@pytest.mark.parametrize("layout", ["struct and path", "struct alone", "bytes", "large bytes"])
def test_packed_images_are_the_bytes_of_the_unpacked_files(tmp_path, layout, group_rows):
    folder = tmp_path / "packed"
    source = write_rows(folder)
    write_pack(folder / IMAGE_FILE, PAGES, layout, row_group_size=group_rows)
    unpack(folder, tmp_path / "files")
    lazy, plain = prompts_of(source), prompts_of(str(tmp_path / "files/train.jsonl"))
    assert all(isinstance(image, PackedImage) for prompt in lazy for image in prompt.images)
    assert [contents(prompt) for prompt in lazy] == [contents(prompt) for prompt in plain]
    assert [prompt_hash(prompt) for prompt in lazy] == [prompt_hash(prompt) for prompt in plain]
    assert dict(packed_images(folder / IMAGE_FILE)) == PAGES


def test_a_streamed_folder_gives_the_same_prompts_as_one_that_is_read_whole(tmp_path):
    source = write_rows(tmp_path)
    write_pack(tmp_path / IMAGE_FILE, PAGES, row_group_size=5)
    settings: dict[str, Any] = {"train": source, "streaming": True, "shuffle": False}
    stream = StreamedPrompts(DataConfig(**settings), PromptConfig(), Uncounted(InputsConfig()), 0)
    assert stream.next(NUM_PAGES) == prompts_of(source)
    assert list(stream.first(2)) == prompts_of(source)[:2]


def test_images_of_several_packs_and_of_an_image_folder_are_found(tmp_path):
    names = list(PAGES)
    for shard, part in enumerate((names[:7], names[7:])):
        write_pack(tmp_path / f"images-{shard}.parquet", {name: PAGES[name] for name in part})
    rows = write_rows(tmp_path / "rows")
    prompts = prompts_of(rows, image_dir=str(tmp_path))
    assert contents(prompts[11]) == [page(11), page((5 * 11 + 3) % NUM_PAGES)]


def test_a_pack_in_one_piece_is_copied_once_into_pieces_that_are_read_alone(tmp_path, assets, monkeypatch):
    source = write_rows(tmp_path)
    write_pack(tmp_path / IMAGE_FILE, PAGES)
    monkeypatch.setattr(packs, "MAX_GROUP_BYTES", 100)
    monkeypatch.setattr(packs, "ROWS_OF_COPY", 5)
    prompts = prompts_of(source)
    (copy,) = assets.rglob(IMAGE_FILE)
    assert pyarrow.parquet.read_metadata(copy).num_row_groups == 3
    assert {image.file for prompt in prompts for image in prompt.images} == {str(copy)}
    assert [contents(prompt)[0] for prompt in prompts] == list(PAGES.values())
    made = copy.stat().st_mtime_ns
    prompts_of(source)
    assert copy.stat().st_mtime_ns == made
    write_pack(tmp_path / IMAGE_FILE, {name: page(200) for name in PAGES})  # another file of that name, another copy
    assert contents(prompts_of(source)[0]) == [page(200)] * 2


def test_a_copy_that_cannot_be_written_says_where_and_what_else_to_do(tmp_path, assets, monkeypatch):
    write_pack(tmp_path / IMAGE_FILE, PAGES)
    monkeypatch.setattr(packs, "MAX_GROUP_BYTES", 100)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pyarrow.parquet.ParquetWriter, "write_batch", full)
    with pytest.raises(
        InputError, match=r"No space left on device\. Set HF_ASSETS_CACHE to a folder with room, or unp"
    ):
        index_packs([tmp_path / IMAGE_FILE])
    assert not list(assets.rglob("*images*"))


def test_no_more_row_groups_than_a_few_stay_in_memory_and_threads_read_the_right_ones(tmp_path):
    write_pack(tmp_path / IMAGE_FILE, PAGES, row_group_size=1)
    index = index_packs([tmp_path / IMAGE_FILE])
    wanted = [name for step in (1, 5, 7, 11) for name in (list(PAGES) * step)[::step]] * 5
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda name: index[name].read(), wanted)) == [PAGES[name] for name in wanted]
    assert packed._column_of.cache_info().currsize == packed.GROUPS_KEPT


def read_in_child(images: list[PackedImage], answers: Any) -> None:
    answers.put([image.read() for image in images])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_images_are_read_after_a_fork_even_one_in_the_middle_of_a_read(tmp_path):
    write_pack(tmp_path / IMAGE_FILE, PAGES, row_group_size=2)
    index = index_packs([tmp_path / IMAGE_FILE])
    index["imgs/00.png"].read()
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    with packed._turn["lock"]:  # held, by a thread that the child will not have
        child = context.Process(target=read_in_child, args=(list(index.values()), answers))
        child.start()
    assert answers.get(timeout=30) == list(PAGES.values())
    child.join(30)
    assert child.exitcode == 0


def test_a_pack_that_was_replaced_meanwhile_gives_no_other_image(tmp_path):
    write_pack(tmp_path / IMAGE_FILE, PAGES, row_group_size=1)
    index = index_packs([tmp_path / IMAGE_FILE])
    write_pack(tmp_path / IMAGE_FILE, {name: page(200) for name in PAGES}, row_group_size=1)
    with pytest.raises(PromptError, match=r"images\.parquet has changed since it was indexed"):
        decode(index["imgs/00.png"])


def test_what_leaves_the_process_is_the_bytes_themselves(tmp_path):
    source = write_rows(tmp_path)
    write_pack(tmp_path / IMAGE_FILE, PAGES)
    prompt = prompts_of(source)[0]
    sent = pickle.dumps(prompt)
    (tmp_path / IMAGE_FILE).unlink()
    assert pickle.loads(sent).images == (page(0), page(3))


def test_a_packed_image_is_looked_at_stored_and_named_like_any_other(tmp_path):
    write_pack(tmp_path / IMAGE_FILE, PAGES)
    image = index_packs([tmp_path / IMAGE_FILE])["imgs/04.png"]
    assert decode(image).getpixel((0, 0)) == (4, 4, 4)
    assert (tmp_path / _store_image(tmp_path, image)).read_bytes() == page(4)
    known = tmp_path / "checked"
    first = CheckedImages(known)
    assert (first.fault_of(image), first.num_decoded) == ("", 1)
    first.save()
    again = CheckedImages(known)
    assert (again.fault_of(image), again.num_known, again.num_decoded) == ("", 1, 0)


def test_a_damaged_or_empty_image_in_a_pack_is_a_bad_row(tmp_path):
    source = write_rows(tmp_path)
    write_pack(tmp_path / IMAGE_FILE, {**PAGES, "imgs/01.png": page(1)[:40], "imgs/02.png": None})
    with pytest.raises(InputError) as caught:
        prompts_of(source)
    text = str(caught.value)
    assert "id r1: unreadable image: image imgs/01.png of" in text
    assert "images.parquet has no bytes for imgs/02.png" in text


def test_a_pack_that_says_two_things_or_not_enough_is_refused(tmp_path):
    table = pyarrow.table({"path": ["a.png", "./a.png"], "bytes": [page(1), page(1)]})
    pyarrow.parquet.write_table(table, tmp_path / IMAGE_FILE)
    assert list(index_packs([tmp_path / IMAGE_FILE])) == ["a.png"]
    table = pyarrow.table({"path": ["a.png", "a.png"], "bytes": [page(1), page(2)]})
    pyarrow.parquet.write_table(table, tmp_path / IMAGE_FILE)
    with pytest.raises(InputError, match=r"two different images for the path a\.png"):
        index_packs([tmp_path / IMAGE_FILE])
    for columns, complaint in (
        ({"path": ["a"]}, r"needs a column `image` \(or `bytes`\), bytes or \{bytes, path\}; it has path"),
        ({"path": ["a"], "image": [5]}, "needs a column `image`"),
        ({"path": ["a"], "image": [{"height": 5}]}, "needs a column `image`"),
        ({"image": [b"x"]}, "does not name its images: it needs a column `path`"),
    ):
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / IMAGE_FILE)
        with pytest.raises(InputError, match=complaint):
            index_packs([tmp_path / IMAGE_FILE])
        with pytest.raises(InputError, match=complaint):
            list(packed_images(tmp_path / IMAGE_FILE))
    (tmp_path / IMAGE_FILE).write_bytes(b"PAR1 no")
    with pytest.raises(InputError, match="is not a readable parquet file of images"):
        index_packs([tmp_path / IMAGE_FILE])


def test_the_pages_of_a_test_set_are_not_in_memory_until_they_are_looked_at(tmp_path):
    row = {"qid": 1, "query": "how much?", "image": ["imgs/03.png"], "answer": ["3"], "is_sufficient": True}
    (tmp_path / "top1_test.jsonl").write_text(json.dumps(row))
    write_pack(tmp_path / IMAGE_FILE, PAGES)
    (question,) = read_questions(str(tmp_path / "top1_test.jsonl"))
    (image,) = question.images
    assert packed._column_of.cache_info().currsize == 0
    assert isinstance(image, PackedImage)
    assert contents(to_prompt(question, "{images}\n{question}")) == [page(3)]
