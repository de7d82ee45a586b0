"""EVisRAG by its hub names, from a cache on this machine: the published layout, and what is said without a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import yaml

from recipes.evaluation.benchmarks import load_benchmark
from rollout.inputs.images import bytes_of
from rsgrpo.config.checks import require_found
from rsgrpo.data.rows import find_images, read_rows
from rsgrpo.errors import ConfigError, InputError
from tests.material import ROOT

TRAIN_ROW = {
    "prompt": "<image><image>how much?",
    "answer": "<evidence>\n[1]: 16%\n[2]: no relevant information\n</evidence>\n<answer>16%</answer>",
    "image": ["images/a.png", "images/b.png"],
}
TEST_ROW = {"qid": "q1", "query": "how much?", "image": ["imgs/a.png"], "answer": ["16%"], "is_sufficient": True}
IMAGES = {"images/a.png": b"page a", "images/b.png": b"page b", "imgs/a.png": b"page c"}


def publish(cache: Path, name: str, files: dict[str, list[dict[str, Any]]]) -> None:
    """Put a data set where the hub's library keeps what it has fetched."""
    folder = cache / f"datasets--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0123abc")
    for file, rows in files.items():
        (snapshot / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    cells = [{"bytes": content, "path": path} for path, content in IMAGES.items()]
    pyarrow.parquet.write_table(pyarrow.table({"image": cells, "path": list(IMAGES)}), snapshot / "images.parquet")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path


@pytest.mark.parametrize("file", ["evisrag", "evisrag_sft"])
def test_the_default_rows_are_files_of_the_published_data_set(cache, file):
    names = {"evidencecot_SFT.jsonl": 3, "evidencecot_GRPO.jsonl": 2, "test_GRPO.jsonl": 1}
    publish(cache, "openbmb/EVisRAG-Train", {name: [TRAIN_ROW] * count for name, count in names.items()})
    conf = ROOT / "conf" / "data" / f"{file}.yaml"
    settings = yaml.safe_load(conf.read_text())
    for key, source in (("train", settings["train"]), ("val", settings["val"])):
        require_found(f"data.{key}", source)
        rows, folder = read_rows(source)
        assert len(rows) == names[f"{source.partition(':')[2]}.jsonl"]
        images = find_images(folder, "")
        found = [images.resolve(path) for path in rows[0].columns["image"]]
        assert [bytes_of(image) for image in found if not isinstance(image, str)] == [b"page a", b"page b"]


def test_a_file_that_the_data_set_does_not_have_lists_those_that_it_has(cache):
    publish(cache, "openbmb/EVisRAG-Train", {"other_GRPO.jsonl": [TRAIN_ROW]})
    with pytest.raises(InputError, match=r"named evidencecot_GRPO .* found none among other_GRPO\.jsonl"):
        read_rows("openbmb/EVisRAG-Train:evidencecot_GRPO")


def test_a_benchmark_comes_by_name_with_its_packed_pages(cache, tmp_path):
    publish(cache, "openbmb/EVisRAG-Test-SlideVQA", {"top3_test.jsonl": [TEST_ROW]})
    (question,) = load_benchmark("SlideVQA", folder=str(tmp_path / "nowhere"), topk=3)
    assert (question.id, question.answers) == ("q1", ("16%",))
    assert [bytes_of(image) for image in question.images if not isinstance(image, str)] == [b"page c"]


def test_without_a_network_the_message_is_the_command_and_the_setting(cache):
    with pytest.raises(ConfigError) as error:
        read_rows("openbmb/EVisRAG-Train:evidencecot_GRPO")
    text = str(error.value)
    assert "`hf download openbmb/EVisRAG-Train --repo-type dataset --local-dir data/EVisRAG-Train`" in text
    assert "set data.train (or data.val) to data/EVisRAG-Train:evidencecot_GRPO" in text
    with pytest.raises(ConfigError, match=r"--local-dir data/EVisRAG-Test-DocVQA`; then set benchmark_dir=data"):
        load_benchmark("DocVQA", folder="data", topk=3)
