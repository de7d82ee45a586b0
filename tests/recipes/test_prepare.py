"""The demo's data and model: what is on disk, what it shows, how the teacher errs, and that nothing is half written."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image

from recipes import prepare
from recipes.answers.questions import Question, named_prompt, to_prompt
from recipes.demo.forms import FIRST_VALIDATION_SCAN, FormJob, Scans, draw_item, draw_pool, larger_amount
from recipes.demo.items import Item, Reading, gold_text, prompt_text, response_text, teacher_reading, true_reading
from rewards import evisrag
from rewards.api import Response
from rewards.evisrag import INSUFFICIENT, NO_EVIDENCE, parse_gold
from rollout.config import InputsConfig
from rollout.inputs.processor import InputProcessor
from rsgrpo.config.train import DataConfig, PromptConfig
from rsgrpo.data.dataset import load_prompts
from rsgrpo.data.prompts import read_template
from rsgrpo.errors import RsgrpoError

SMALL = ["--sft-items", "30", "--train-items", "20", "--val-items", "10", "--vision-steps", "1"]
DEMO_INPUTS = InputsConfig(min_pixels=784, max_pixels=50176, max_images=4, max_prompt_tokens=256)
JOB = FormJob("easy", 0)
ITEM = Item((250, 931), (("2", "5"), ("9", "3")), "what amount is on page 2?", (1,), larger_amount)


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """A small demo, made by the command itself."""
    out = tmp_path_factory.mktemp("prepared") / "demo"
    assert prepare.main(["demo", "--out", str(out), *SMALL]) == 0
    return out


@pytest.fixture(scope="module")
def scans() -> Scans:
    return Scans()


def read(demo: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (demo / f"data/{name}.jsonl").read_text().splitlines()]


def found(pattern: str, text: str) -> str:
    [match] = re.findall(pattern, text)
    return match


def draw_items(scans: Scans, level="easy", count=3000) -> list[Item]:
    rng = Random("items")
    pool = draw_pool(scans, "train", 1, rng)
    return [draw_item(pool, level, rng) for _ in range(count)]


def test_texts_of_one_item_are_as_written_by_hand(demo):
    assert prompt_text(ITEM) == "[1]<image>[2]<image>what amount is on page 2?"
    template = read_template(named_prompt("demo"))
    for row in read(demo, "val"):
        assert to_prompt(Question("q", row["question"], tuple(row["image"])), template).text == row["prompt"]
    gold = f"<evidence>\n[1]: {NO_EVIDENCE}\n[2]: code 9 amount 3\n</evidence>\n<answer>3</answer>"
    assert gold_text(JOB, ITEM) == gold
    assert response_text(JOB, ITEM, Reading((("2", "5"), ("9", "8")), chosen=(0,), used=(0,))) == (
        f"<observe>2 5, 9 8</observe>\n<evidence>\n[1]: code 2 amount 5\n[2]: {NO_EVIDENCE}\n</evidence>\n"
        "<think>page 1 has it</think>\n<answer>5</answer>"
    )
    abstaining = {"evidence": [NO_EVIDENCE, NO_EVIDENCE], "answers": [INSUFFICIENT]}
    assert parse_gold(response_text(JOB, ITEM, Reading(ITEM.shown, (), ()))) == abstaining


def test_rows_have_the_columns_of_evisrag_and_one_mark_per_page(demo):
    for name, count in (("sft", 30), ("train", 20), ("val", 10)):
        rows = read(demo, name)
        assert len({row["id"] for row in rows}) == len(rows) == count
        for row in rows:
            assert list(row)[:5] == ["id", "question", "prompt", "answer", "image"]
            if "page" in row:
                assert f"page {row['page']}" in row["question"]
            else:
                assert "insufficient to answer" in row["answer"] or name == "sft"
            assert row["prompt"].count("<image>") == len(row["image"]) in (2, 3, 4)
            assert row["prompt"].endswith(row["question"])
            for path in row["image"]:
                with Image.open(demo / "data" / path) as page:
                    assert (page.size, page.mode) == ((56, 28), "L")


def test_every_page_on_disk_is_used_and_written_once(demo):
    used = {path for name in ("sft", "train", "val") for row in read(demo, name) for path in row["image"]}
    on_disk = list((demo / "data/images").iterdir())
    assert {f"images/{path.name}" for path in on_disk} == used
    assert len({path.read_bytes() for path in on_disk}) == len(on_disk)


def test_no_handwritten_digit_is_in_both_training_and_validation(demo):
    def digits(split: str) -> set[bytes]:
        pages = [np.asarray(Image.open(path)) for path in (demo / "data/images").glob(f"{split}-*")]
        assert pages
        return {half.tobytes() for page in pages for half in (page[:, :28], page[:, 28:])}

    assert not digits("train") & digits("val")


def test_pools_show_what_they_say_with_scans_of_their_own_split(scans):
    for split in ("train", "val"):
        pool = draw_pool(scans, split, 2, Random(0))
        assert [(page.code, page.amount) for page in pool[::2]] == [(c, a) for c in range(10) for a in range(10)]
        assert len(set(pool)) == 200
        for page in pool:
            assert scans.digits[page.code_scan] == page.code
            assert scans.digits[page.amount_scan] == page.amount
            assert (page.code_scan < FIRST_VALIDATION_SCAN) == (split == "train") == (page.amount_scan < 1400)


def test_items_take_pages_of_their_digits_from_the_pool(scans):
    pool, rng = draw_pool(scans, "val", 3, Random(1)), Random(2)
    for item in (draw_item(pool, "easy", rng) for _ in range(50)):
        assert tuple((str(pool[page].code), str(pool[page].amount)) for page in item.pages) == item.shown
        assert len({code for code, _ in item.shown}) == len(item.shown)


def test_pages_put_code_left_and_amount_right_and_jitter_moves_them(scans):
    page = draw_pool(scans, "train", 1, Random(0))[27]  # code 2, amount 7
    sheet = np.asarray(scans.render(page))
    for half, scan in ((sheet[:, :28], page.code_scan), (sheet[:, 28:], page.amount_scan)):
        small = np.asarray(Image.fromarray(half).resize((8, 8), Image.Resampling.BOX), dtype=float)
        assert np.corrcoef(small.ravel(), scans.images[scan].ravel())[0, 1] > 0.9
        assert half.max() > 128
    moved = [np.asarray(scans.render(page, Random(seed))) for seed in range(5)]
    assert len({image.tobytes() for image in moved}) > 1
    assert all(image.shape == (28, 56) for image in moved)


def test_easy_questions_name_the_relevant_page_or_one_that_is_not_there(scans):
    for item in draw_items(scans, count=300):
        [expected] = item.relevant or [len(item.pages)]
        assert found(r"page (\d)", item.question) == str(expected + 1)


def test_a_yes_or_no_question_is_answered_rightly_by_half_of_all_misreadings(scans):
    for item in draw_items(scans, "yes_no", count=300):
        if not item.relevant:
            assert "<answer>insufficient to answer</answer>" in gold_text(JOB, item)
            continue
        [page] = item.relevant
        assert item.question == f"is the amount on page {page + 1} over 4?"
        answer = found(r"<answer>(.*)</answer>", gold_text(JOB, item))
        assert answer == ("yes" if item.shown[page][1] in "56789" else "no")
        misread = [Reading((("0", amount),) * len(item.pages), (page,), (page,)) for amount in "0123456789"]
        assert sum(f"<answer>{answer}</answer>" in response_text(JOB, item, reading) for reading in misread) == 5


def test_two_hop_questions_name_two_pages_and_are_answered_by_the_larger_amount(scans):
    for item in draw_items(scans, "two_hop", count=300):
        named = [int(page) - 1 for page in re.findall(r"page (\d)", item.question)]
        assert len(set(named)) == 2
        if not item.relevant:  # one page is there, the other is not
            assert len(item.pages) in named
            assert parse_gold(gold_text(JOB, item))["evidence"] == [NO_EVIDENCE] * len(item.pages)
            continue
        assert list(item.relevant) == named
        gold = parse_gold(gold_text(JOB, item))
        assert [page for page, slot in enumerate(gold["evidence"]) if slot != NO_EVIDENCE] == sorted(named)
        assert gold["answers"] == [max(item.shown[page][1] for page in named)]


def test_on_two_pages_evidence_may_be_right_with_a_wrong_answer_and_the_reverse(scans):
    """Of one item, by hand; and what the teacher writes has both."""
    item = Item((0, 0, 0), (("1", "5"), ("2", "8"), ("3", "0")), "", (1, 0), larger_amount, hops=2)
    truth = parse_gold(gold_text(JOB, item))

    def scores(reading: Reading) -> tuple[float | None, float | None]:
        response = Response(response_text(JOB, item, reading), truth)
        return evisrag.evidence(response), evisrag.accuracy(response)

    assert scores(true_reading(item)) == (1, 1)
    assert "<think>page 1 and page 2 have it</think>" in response_text(JOB, item, true_reading(item))
    assert scores(Reading(item.shown, (0, 1), (0,))) == (1, 0)  # the second hop is forgotten
    assert scores(Reading((("1", "4"), *item.shown[1:]), (0, 1), (0, 1))) == (4 / 7, 1)  # the smaller one is misread
    readings = [teacher_reading(JOB, item, 0.3, Random(seed)) for seed in range(1000)]
    both = Counter((read == 1, right == 1) for read, right in map(scores, readings))
    assert both[True, False] > 30
    assert both[False, True] > 150
    assert all(1 <= len(reading.used) <= len(reading.chosen) for reading in readings if reading.chosen)


def test_lookup_questions_name_the_code_of_the_relevant_page_or_of_none(scans):
    for item in draw_items(scans, "lookup", count=300):
        code, codes = found(r"code (\d)", item.question), [code for code, _ in item.shown]
        assert [codes[page] for page in item.relevant] == ([code] if code in codes else [])


def test_fifteen_percent_of_questions_cannot_be_answered(scans):
    items = draw_items(scans)
    share = sum(not item.relevant for item in items) / len(items)
    assert share == pytest.approx(0.15, abs=0.02)  # 3 sigma at 3,000 items
    pages = Counter(len(item.pages) for item in items)
    assert all(count / len(items) == pytest.approx(1 / 3, abs=0.03) for count in pages.values())


def test_the_teacher_errs_as_often_as_the_noise_says(scans):
    items, rng = draw_items(scans), Random(3)
    readings = [teacher_reading(JOB, item, 0.3, rng) for item in items]
    both = list(zip(items, readings, strict=True))
    pairs = [pair for item, reading in both for pair in zip(item.shown, reading.shown, strict=True)]
    # A random digit is right one time in ten: 0.3 x 0.9.
    assert np.mean([true != read for true, read in pairs]) == pytest.approx(0.27, abs=0.015)
    # A random choice of n pages or none is right one time in n + 1: 0.18 x (2/3 + 3/4 + 4/5) / 3.
    assert np.mean([item.relevant != reading.chosen for item, reading in both]) == pytest.approx(0.133, abs=0.02)
    assert all(true[0] == read[0] for true, read in pairs)  # codes are read correctly
    assert all(teacher_reading(JOB, item, 0.0, rng) == true_reading(item) for item in items[:100])


def test_a_teachers_response_follows_from_its_own_errors(demo):
    for row in read(demo, "sft"):
        observed = found("<observe>(.*)</observe>", row["answer"]).split(", ")
        gold = parse_gold(row["answer"])
        claims = [(page, slot) for page, slot in enumerate(gold["evidence"]) if slot != NO_EVIDENCE]
        if not claims:
            assert gold["answers"] == [INSUFFICIENT]
            continue
        [(page, slot)] = claims
        code, amount = observed[page].split(" ")
        assert slot == f"code {code} amount {amount}"
        assert gold["answers"] == [amount]
        assert f"<think>page {page + 1} has it</think>" in row["answer"]


def test_the_training_gold_is_right(demo, scans):
    pool = draw_pool(scans, "train", 30, Random("0/pages/train"))
    for row in read(demo, "train"):
        pages = [pool[int(path.removesuffix(".png").split("-")[1])] for path in row["image"]]
        named = int(found(r"page (\d)", row["question"])) - 1
        expected = str(pages[named].amount) if named < len(pages) else INSUFFICIENT
        assert parse_gold(row["answer"])["answers"] == [expected]


def test_whole_responses_earn_every_reward_and_teach_no_bad_habit(demo):
    for name in ("sft", "val"):
        for row in read(demo, name):
            response = Response(row["answer"], truth=parse_gold(row["answer"]))
            rewards = (evisrag.accuracy, evisrag.evidence, evisrag.well_formed)
            assert [function(response) for function in rewards] == [1, 1, 1]
            assert (evisrag.no_early_index(response), evisrag.think_differs(response)) == (0, 0)


def test_the_same_settings_give_the_same_bytes_and_another_seed_does_not(demo, tmp_path):
    assert prepare.main(["demo", "--out", str(tmp_path / "again"), *SMALL]) == 0
    for path in [path for path in demo.rglob("*") if path.is_file()]:
        assert (tmp_path / "again" / path.relative_to(demo)).read_bytes() == path.read_bytes(), path.name
    other = prepare.DemoSettings(sft_items=3, train_items=3, val_items=3, seed=1)
    (tmp_path / "other").mkdir()
    prepare.write_demo_data(other, tmp_path / "other", prepare.Console())
    first = (tmp_path / "other/train.jsonl").read_text().splitlines()[0]
    assert json.loads(first)["image"] != read(demo, "train")[0]["image"]


def test_the_loader_accepts_every_row(demo):
    processor = InputProcessor(str(demo / "model"), DEMO_INPUTS)
    for name, count in (("sft", 30), ("train", 20), ("val", 10)):
        prompts = load_prompts(str(demo / f"data/{name}.jsonl"), DataConfig(), PromptConfig(), processor)
        assert len(prompts) == count
        assert prompts.dropped == {}
        assert all(len(prompt.truth["evidence"]) == len(prompt.images) for prompt in prompts)
    inputs = processor.encode(prompts[0])
    assert inputs.image_grid_thw is not None
    assert inputs.image_grid_thw.tolist() == [[1, 2, 4]] * len(prompts[0].images)
    assert inputs.token_ids_T.count(processor.image_token_id) == 2 * len(prompts[0].images)


def test_the_model_loads_as_an_ordinary_hugging_face_folder(demo):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(demo / "model")
    processor = AutoProcessor.from_pretrained(demo / "model")
    assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration"
    assert 1e6 < sum(parameter.numel() for parameter in model.parameters()) < 5e6
    assert model.get_input_embeddings().num_embeddings == len(processor.tokenizer) <= 512


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_5"])
def test_another_family_reads_the_same_rows_as_two_tokens_a_page(family, demo, tmp_path, capsys):
    from transformers import AutoModelForImageTextToText

    shutil.copytree(demo / "data", tmp_path / "data")
    assert prepare.main(["demo", "--out", str(tmp_path), "--family", family, *SMALL]) == 0
    assert "data (reused)" in re.sub(r"\S+/data", "data", capsys.readouterr().out)  # rows do not depend on the family
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    assert model.config.model_type == family
    assert 1e6 < sum(parameter.numel() for parameter in model.parameters()) < 5e6
    processor = InputProcessor(str(tmp_path / "model"), DEMO_INPUTS)
    prompts = load_prompts(str(tmp_path / "data/val.jsonl"), DataConfig(), PromptConfig(), processor)
    inputs = processor.encode(prompts[0])
    assert inputs.token_ids_T.count(processor.image_token_id) == 2 * len(prompts[0].images)
    # A state that fades within a token would never carry a page to its answer.
    states = [layer.linear_attn for layer in model.model.language_model.layers if hasattr(layer, "linear_attn")]
    assert len(states) == (3 if family == "qwen3_5" else 0)
    assert all(torch.nn.functional.softplus(state.dt_bias).max() < 0.11 for state in states)
    assert prepare.main(["demo", "--out", str(tmp_path), *SMALL]) == 2  # and a model does not change its kind in place
    assert f"family={family!r} instead of None" in capsys.readouterr().err


def test_an_unknown_family_is_answered_with_the_list(tmp_path, capsys):
    with pytest.raises(SystemExit):
        prepare.main(["demo", "--out", str(tmp_path), "--family", "gemma"])
    assert "'qwen2_5_vl', 'qwen3_vl', 'qwen3_5'" in capsys.readouterr().err


def test_tags_fuse_with_what_follows_as_in_the_real_tokenizer(demo):
    tokenizer = InputProcessor(str(demo / "model"), DEMO_INPUTS).tokenizer
    row = read(demo, "val")[0]
    tokens = [str(tokenizer.decode([token])) for token in tokenizer.encode(row["answer"])]
    assert ">\n" in tokens
    assert {">page", ">no"} & set(tokens)
    assert not any(re.search(r"\d.", token) or re.search(r".\d", token) for token in tokens)  # digits stand alone
    assert "".join(tokens) == row["answer"]


def test_the_tower_learns_to_read(scans):
    from recipes.demo.model import build_model, image_processor, train_tokenizer
    from recipes.demo.vision import Lessons, reading_accuracy, teach_to_read

    model = build_model(train_tokenizer(["0 1"], vocab_size=300))
    pool = [page for page in draw_pool(scans, "train", 20, Random(0)) if page.code < 2 and page.amount < 2]
    labels = [[page.code, page.amount] for page in pool]
    lessons = Lessons.of(image_processor(), [scans.render(page) for page in pool], labels)
    losses: list[float] = []
    head = teach_to_read(model, lessons, num_labels=2, num_steps=25, batch_pages=16, on_step=losses.append)
    assert len(losses) == 25
    assert losses[-1] < 0.5 * losses[0]
    assert reading_accuracy(model, head, lessons) > 0.9


def test_a_second_run_reuses_what_is_there_and_refuses_other_settings(demo, capsys):
    before = {path: path.stat().st_mtime_ns for path in demo.rglob("*")}
    assert prepare.main(["demo", "--out", str(demo), *SMALL]) == 0
    shown = capsys.readouterr().out
    for text in ("(reused)", "30 sft, 20 train, 10 val", "python -m recipes.sft recipe=sft_demo"):
        assert text in shown
    assert prepare.main(["demo", "--out", str(demo), *SMALL, "--noise", "0.1"]) == 2
    assert "noise=0.3 instead of 0.1" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in demo.rglob("*")} == before


def test_force_replaces_and_a_foreign_folder_is_refused_without_it(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "mine.txt").write_text("keep")
    with pytest.raises(RsgrpoError, match=r"not made by this command.*--force"):
        prepare.make_folder(folder, {"seed": 0}, lambda target: {}, force=False)
    assert (folder / "mine.txt").exists()
    assert prepare.make_folder(folder, {"seed": 0}, lambda target: {"n": 1}, force=True) == {"n": 1, "state": "made"}
    assert [path.name for path in folder.iterdir()] == ["manifest.json"]
    assert prepare.make_folder(folder, {"seed": 0}, lambda target: {"n": 2}, force=False)["n"] == 1


def test_a_folder_is_absent_until_it_is_whole(tmp_path):
    def fails(target: Path) -> dict:
        (target / "half").write_text("")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        prepare.make_folder(tmp_path / "data", {}, fails, force=False)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".data.partial").mkdir()  # of a run that was killed
    (tmp_path / ".data.partial/half").write_text("")
    prepare.make_folder(tmp_path / "data", {}, lambda target: {}, force=False)
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["manifest.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--noise", "1.5"], r"--noise must be in \[0, 1\], got 1.5"),
        (["--val-items", "0"], "--val-items must be >= 1, got 0"),
    ],
)
def test_impossible_settings_name_option_and_limit(tmp_path, capsys, arguments, message):
    assert prepare.main(["demo", "--out", str(tmp_path), *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)
