"""EVisRAG in small: the published layout, benchmarks clean and worn, the order of the stages, and the final table."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image

from recipes import evisrag_mini, prepare
from recipes.answers.questions import to_prompt
from recipes.demo.evisrag_layout import BENCHMARKS, TRAIN, TRAIN_FILES, wear, write_mini
from recipes.evaluation.benchmarks import load_benchmark
from rsgrpo.data.image_packs import packed_images
from rsgrpo.data.rows import read_rows
from rsgrpo.errors import InputError
from rsgrpo.records.console import Console


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo-data")
    settings = prepare.DemoSettings(sft_items=12, train_items=6, val_items=20)
    prepare.write_demo_data(settings, folder, Console())
    return folder


@pytest.fixture(scope="module")
def hub(demo, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mini")
    write_mini(demo, folder, 10, seed=0)
    return folder


def benchmark(hub: Path, name: str):
    return load_benchmark(str(hub / name), folder="", topk=3)


def test_the_training_rows_are_the_demos_in_the_published_columns_and_names(demo, hub):
    for ours, published in TRAIN_FILES.items():
        rows, folder = read_rows(f"{hub / TRAIN}:{published}")
        before, _ = read_rows(str(demo / f"{ours}.jsonl"))
        assert folder == hub / TRAIN
        assert [dict(row.columns) for row in rows] == [
            {key: row.columns[key] for key in ("prompt", "answer", "image")} for row in before
        ]


def test_every_page_of_the_rows_is_packed_once_with_its_bytes(demo, hub):
    packed = dict(packed_images(hub / TRAIN / "images.parquet"))
    rows = [row for ours in TRAIN_FILES for row in read_rows(str(demo / f"{ours}.jsonl"))[0]]
    used = {path for row in rows for path in row.columns["image"]}
    assert set(packed) == used
    assert all(content == (demo / path).read_bytes() for path, content in packed.items())


def test_both_benchmarks_ask_the_same_of_the_same_pages_clean_and_worn(hub):
    clean, worn = (benchmark(hub, name) for name in BENCHMARKS)
    assert len(clean) == 10
    assert [(q.id, q.question, q.answers, q.evidence) for q in clean] == [
        (q.id, q.question, q.answers, q.evidence) for q in worn
    ]
    assert all(len(q.images) == 3 for q in clean)
    assert all(a != b for q, p in zip(clean, worn, strict=True) for a, b in zip(q.images, p.images, strict=True))


def test_rows_have_the_published_columns_and_say_what_they_can_know(hub):
    for name in BENCHMARKS:
        for row in read_rows(str(hub / name / "top3_test.jsonl"))[0]:
            assert set(row.columns) == {"qid", "query", "image", "answer", "is_sufficient", "evidence"}
            assert row.columns["is_sufficient"] == (row.columns["answer"] != ["insufficient to answer"])
            marked = [slot for slot in row.columns["evidence"] if slot != "no relevant information"]
            assert len(marked) == row.columns["is_sufficient"]
            if marked:
                assert marked[0].endswith(f"amount {row.columns['answer'][0]}")


def test_the_prompt_file_asks_as_the_training_rows_do(demo, hub):
    template = (hub / "prompt.txt").read_text()
    question = benchmark(hub, "EVisRAG-Test-Forms")[0]
    three_pages = next(row for row in read_rows(str(demo / "train.jsonl"))[0] if len(row.columns["image"]) == 3)
    asked = to_prompt(question, template).text
    assert asked.replace(question.question, "Q") == three_pages.columns["prompt"].replace(
        three_pages.columns["question"], "Q"
    )


def test_a_worn_page_is_another_picture_of_the_same_size_and_the_same_every_time():
    page = Image.new("L", (56, 28))
    page.paste(255, (10, 8, 20, 20))
    worn = wear(page, Random(1))
    assert worn.size == page.size
    assert np.array_equal(np.asarray(worn), np.asarray(wear(page, Random(1))))
    ink = np.asarray(worn, dtype=float)
    assert ink.max() < 255 * (0.85 + 4 * 0.12)
    assert (ink[:, 30:] > 0).any()  # the empty half is speckled


def test_the_same_seed_gives_the_same_files(demo, hub, tmp_path):
    write_mini(demo, tmp_path, 10, seed=0)
    for path in sorted(hub.rglob("*.*")):
        assert (tmp_path / path.relative_to(hub)).read_bytes() == path.read_bytes(), path


# The stages


def test_each_stage_starts_from_what_those_before_it_make(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commands: list[list[str]] = []
    Path("evisrag-mini").mkdir()
    monkeypatch.setattr(evisrag_mini, "run_module", lambda *arguments, **_: commands.append(list(map(str, arguments))))
    found = evisrag_mini.stages("hf")
    assert [stage.name for stage in found][:4] == ["data", "unpack", "sft", "rs-grpo"]
    for stage in found[:8]:
        stage.run()
    said = [" ".join(command) for command in commands]
    assert said[1] == "recipes.prepare unpack evisrag-mini/hub/EVisRAG-Train --out evisrag-mini/train"
    assert "rsgrpo.train recipe=evisrag_mini model.path=evisrag-mini/sft/export seed=0" in said
    assert sum("recipes.evaluate" in line and "model=evisrag-mini/rl/export" in line for line in said) == 2
    assert sum("against=" in line and "warm-start/predictions.jsonl" in line for line in said) == 2
    assert all("rollout=hf" in line for line in said if "recipes.evaluate" in line)


def test_the_demos_warm_start_is_taken_where_it_is_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = Path("demo/sft/export/preprocessor_config.json")
    whole.parent.mkdir(parents=True)
    whole.write_text("{}")
    assert next(stage for stage in evisrag_mini.stages("hf") if stage.name == "sft").makes == whole


def test_without_vllm_the_command_refuses_and_names_the_other_engine(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="make evisrag-mini ENGINE=hf"):
        evisrag_mini.require_engine("vllm")
    evisrag_mini.require_engine("hf")
    assert evisrag_mini.main([]) == 2
    assert capsys.readouterr().err.startswith("error: vLLM is not installed")


def test_a_folder_is_of_one_seed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evisrag_mini.require_seed(3)
    evisrag_mini.require_seed(3)
    with pytest.raises(InputError, match=r"started with seed 3, not 0\. Run the new seed in another folder"):
        evisrag_mini.require_seed(0)


def test_a_stage_that_fails_ends_the_command_with_its_own_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert evisrag_mini.main(["--engine", "hf"]) == 1
    error = capsys.readouterr().err
    assert "`python -m recipes.prepare mini` ended with exit code 2" in error


def test_the_final_table_shows_before_after_and_the_paired_difference():
    def report(em: float, slots: float, cited: float, **more: object) -> dict:
        estimates = {"slot_f1": {"value": slots}, "citation_f1": {"value": cited}}
        return {"scores": {"strict": {"global": {"em": {"value": em}}}, "evidence": estimates}, **more}

    difference = {"value": 0.3, "low": 0.2, "high": 0.4, "p_value": 0.0001}
    lines = evisrag_mini.score_lines(
        report(0.6, 0.8, 0.8), report(0.9, 0.95, 0.6, differences={"strict/global/em": difference})
    )
    assert lines == [
        ("EM", "60.0 → 90.0, +30.0 (+20.0 to +40.0), p < 0.001"),
        ("slot F1", "80.0 → 95.0"),
        ("citation F1", "80.0 → 60.0"),
    ]


def test_packing_again_from_the_command_line_reuses_or_refuses(demo, tmp_path, monkeypatch, capsys):
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "data").symlink_to(demo)
    if not (demo / "manifest.json").exists():
        (demo / "manifest.json").write_text(json.dumps({"format": 1, "settings": {"seed": 0}, "facts": {}}))
    monkeypatch.chdir(tmp_path)
    assert prepare.main(["mini", "--num-questions", "3"]) == 0
    assert "(made)" in capsys.readouterr().out
    assert prepare.main(["mini", "--num-questions", "3"]) == 0
    assert "(reused)" in capsys.readouterr().out
    assert prepare.main(["mini", "--num-questions", "4"]) == 2
    assert "num_questions=3 instead of 4" in capsys.readouterr().err
