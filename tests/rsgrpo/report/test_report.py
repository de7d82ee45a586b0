"""The report page: complete, self-contained, and safe whatever a rollout says."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rollout.types import Observation, Prompt
from rsgrpo import cli
from rsgrpo.config.train import TrainConfig
from rsgrpo.errors import RsgrpoError
from rsgrpo.records.rollouts import write_rollouts
from rsgrpo.report.charts import build_charts, collect_curves, split_validation
from rsgrpo.report.line_chart import line_chart
from rsgrpo.report.model_card import method_of
from rsgrpo.report.page import (
    Change,
    collect_report,
    config_changes,
    headline,
    leading_names,
    main,
    write_report,
)
from tests.material.synthetic_run import REWARDS, make_scored, make_train_group, page_bytes, write_run

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)> &amp; 😀<think>{{data}}</think>"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "synthetic", num_steps=5, val_every=5)


def payload_of(page: str) -> dict[str, Any]:
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert match
    return json.loads(match[1])


def test_the_page_needs_nothing_from_outside(run_dir: Path) -> None:
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    page = path.read_text()
    assert set(re.findall(r"https?://[^\s\"')]+", page)) <= {"http://www.w3.org/2000/svg"}
    assert not re.findall(r"<link|@import|url\(|src=\"(?!data:)", page)
    assert "{{" not in page


def test_the_content_policy_allows_the_pages_own_script_only(run_dir: Path) -> None:
    page = write_report(run_dir).read_text()
    script = page.rsplit("<script>", 1)[1].rsplit("</script>", 1)[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in page


def hostile_run(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text("name: '</title><script>alert(2)</script>'\n")
    prompt = Prompt("<b>id</b>", HOSTILE, (), {"answers": [HOSTILE], "evidence": []}, HOSTILE)
    scored = make_scored(prompt, [HOSTILE, "x<think>"], [[1.0, 0.5, 1.0], [0.0, 0.5, float("nan")]])
    read = Observation(1, 1, (7,) * 9, f"{HOSTILE} <image> behind", (page_bytes(1, 2),), {HOSTILE: HOSTILE}, HOSTILE)
    first = dataclasses.replace(scored.group.rollouts[0], observations=(read,))
    group = dataclasses.replace(scored.group, rollouts=(first, scored.group.rollouts[1]))
    scored = dataclasses.replace(scored, group=group)
    write_rollouts(folder, 1, [scored], [make_train_group(scored)], terms=REWARDS)
    return folder


def test_what_a_rollout_says_never_becomes_markup(tmp_path: Path) -> None:
    page = write_report(hostile_run(tmp_path / "run")).read_text()
    assert len(re.findall("<script", page)) == len(re.findall("</script", page)) == 2
    assert "<img src=x" not in page
    (view,) = payload_of(page)["views"]
    assert view["groups"][0]["rollouts"][0]["text"] == HOSTILE
    assert view["groups"][0]["question"] == HOSTILE
    [read] = view["groups"][0]["rollouts"][0]["observations"]
    assert (read["at"], read["tokens"], read["fault"], read["facts"]) == (1, 9, HOSTILE, {HOSTILE: HOSTILE})
    assert payload_of(page)["images"][read["images"][0]].startswith("data:image/jpeg;base64,")
    assert view["groups"][0]["rollouts"][1]["rewards"][2]["score"] is None


def test_headline_compares_first_and_last_validation() -> None:
    curves = {
        "val/greedy/accuracy": [(0, 0.9), (10, 0.95)],
        "val/sampled/accuracy": [(0, 0.5), (5, 0.7), (10, 0.8)],
        "val/sampled/overlong": [(0, -1.0), (10, 0.0)],
        "val/loss": [(0, 2.0), (10, 1.0)],
        "val/sampled/num_prompts": [(0, 40.0), (10, 40.0)],
        "reward/accuracy/mean": [(1, 0.1)],
    }
    assert headline(curves, ["accuracy", "loss"]) == [
        Change("accuracy, sampled", 0.5, 0.8, False),
        Change("accuracy, greedy", 0.9, 0.95, False),
        Change("loss, validation", 2.0, 1.0, True),
    ]


def test_without_validation_the_headline_is_the_training_rewards_by_tenths() -> None:
    curve = [(step, float(step)) for step in range(1, 21)]
    curves = {"reward/x/mean": curve, "actor/loss": curve}
    assert headline(curves, ["loss"]) == [Change("x, training", 1.5, 19.5, False)]
    assert headline({}, []) == []


def test_what_leads_is_declared_by_the_rewards_and_without_any_everything_is_shown() -> None:
    rewards = {"mine": "rewards.evisrag:accuracy", "overlong": "rewards.evisrag:overlong", "gone": "no_module:gone"}
    config = {"rewards": rewards, "monitors": {"evidence": "rewards.evisrag:evidence"}}
    assert leading_names(config) == ["mine", "evidence", "loss"]
    curves = {"val/greedy/brevity": [(0, 0.5), (1, 0.75)], "val/greedy/num_tokens": [(0, 40.0), (1, 30.0)]}
    assert headline(curves, leading_names({})) == [Change("brevity, greedy", 0.5, 0.75, False)]


def test_a_validation_key_is_taken_apart() -> None:
    assert split_validation("val/greedy/accuracy") == ("greedy", "accuracy")
    assert split_validation("val/loss") == ("", "loss")
    assert split_validation("val/greedy/num_prompts") is None
    assert split_validation("actor/loss") is None


def test_curves_merge_lines_of_a_step_and_leave_nulls_out() -> None:
    lines: list[dict[str, Any]] = [
        {"step": 2, "time": 1.0, "a": 5},
        {"step": 1, "time": 0.0, "a": 1.0, "b": None},
        {"step": 2, "time": 2.0, "a": 6.0, "c": 3.0},
    ]
    assert collect_curves(lines) == {"a": [(1, 1.0), (2, 6.0)], "c": [(2, 3.0)]}


def test_every_metric_is_in_exactly_one_chart(run_dir: Path) -> None:
    report = collect_report(run_dir)
    keys = {key for line in (run_dir / "metrics.jsonl").read_text().splitlines() for key in json.loads(line)}
    num_series = sum(len(chart["series"]) + ("low" in chart["series"][0]) for chart in report["charts"])
    assert num_series == len(keys - {"step", "time"})
    sections = {chart["section"] for chart in report["charts"]}
    assert sections == {"validation", "rewards", "scopes", "responses", "learning", "speed"}


def test_a_rewards_band_is_its_mean_and_one_standard_deviation() -> None:
    (chart,) = build_charts({"reward/x/mean": [(1, 0.5), (2, 0.75)], "reward/x/std": [(1, 0.25), (2, 0.5)]})
    assert (chart["section"], chart["title"]) == ("rewards", "x")
    assert chart["series"][0]["low"] == [(1, 0.25), (2, 0.25)]
    assert chart["series"][0]["high"] == [(1, 0.75), (2, 1.0)]  # no score is above 1


def test_an_unknown_metric_is_still_drawn() -> None:
    (chart,) = build_charts({"my/own": [(1, 2.0)]})
    assert (chart["section"], chart["title"]) == ("other", "my/own")


def test_it_shows_the_first_middle_and_last_step_and_the_last_validation(run_dir: Path) -> None:
    views = collect_report(run_dir)["views"]
    assert [(view["split"], view["step"]) for view in views] == [("train", 1), ("train", 3), ("train", 5), ("val", 5)]
    assert views[0]["terms"] == list(REWARDS)
    assert views[3]["terms"] == []
    assert {group["mode"] for group in views[3]["groups"]} == {"sampled", "greedy"}
    only = collect_report(run_dir, step=2, max_groups=2)["views"]
    assert [(view["step"], len(view["groups"]), view["num_groups"]) for view in only] == [(2, 2, 4)]


def test_tokens_carry_the_advantages_of_training(run_dir: Path) -> None:
    report = collect_report(run_dir, step=1)
    group = next(group for group in report["views"][0]["groups"] if group["id"] == "form-1-1")
    rollout = group["rollouts"][0]
    ((start, end, _),) = rollout["terms"][0]  # accuracy: from <think> to the end
    tag = rollout["text"].index("<think>")
    assert rollout["starts"][start] <= tag < rollout["ends"][start]
    assert end == len(rollout["ids"])
    assert all(report["images"][image].startswith("data:image/") for image in group["images"])


def test_groups_with_a_signal_come_first(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("name: x\n")
    text = "<think>a"
    flat = make_scored(Prompt("flat", "q"), [text, text], [[1.0, 1.0, 1.0]] * 2)
    live = make_scored(Prompt("live", "q"), [text, text], [[1.0, 1.0, 1.0], [0.0, 1.0, 1.0]])
    write_rollouts(tmp_path, 1, [flat, live], [make_train_group(flat), make_train_group(live)], terms=REWARDS)
    (view,) = collect_report(tmp_path, max_groups=1)["views"]
    assert [group["id"] for group in view["groups"]] == ["live"]


@pytest.mark.parametrize(
    ("option", "method"),
    [
        ("rs_grpo", "reward-scoped GRPO (`per_reward`, credit `own`)"),
        ("causal", "reward-scoped GRPO (`per_reward`, credit `causal`)"),
        ("grpo", "GRPO with one advantage for the whole response (`grpo`)"),
    ],
)
def test_a_card_names_the_credit_rule_and_calls_plain_grpo_by_its_name(option: str, method: str) -> None:
    config = cli.compose(TrainConfig, overrides=["recipe=demo", f"algorithm={option}"])
    assert method_of(dataclasses.asdict(config.algorithm)) == method


def test_only_changed_settings_are_listed() -> None:
    config = {
        "name": "rsgrpo",
        "seed": 7,
        "algorithm": {"prompts_per_step": 32, "ratio": "gspo"},
        "rewards": {"a": "m:f"},
    }
    assert config_changes(config) == [
        ["seed", "7", "0"],
        ["algorithm.ratio", "gspo", "token"],
        ["rewards.a", "m:f", ""],
    ]
    assert config_changes({"batch_size": 8, "epochs": 1}) == [["batch_size", "8", "64"]]


def test_a_run_without_any_step_still_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("name: empty\n")
    payload = payload_of(write_report(tmp_path).read_text())
    assert (payload["charts"], payload["views"], payload["headline"]) == ([], [], [])
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time": 1.0, "actor/loss": 0.5}\n{"step": 2, "ti')
    payload = payload_of(write_report(tmp_path, tmp_path / "other.html").read_text())
    assert payload["charts"][0]["series"][0]["points"] == [[1, 0.5]]


def test_an_image_that_is_gone_is_said_to_be_gone(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("name: x\n")
    prompt = Prompt("p", "<image><image>", (str(tmp_path / "gone.png"), page_bytes(1, 2)))
    write_rollouts(tmp_path, 1, [make_scored(prompt, ["a"], [[1.0, 1.0, 1.0]])])
    images = list(collect_report(tmp_path)["images"].values())
    assert images[0] is None
    assert images[1].startswith("data:image/jpeg;base64,")


def test_wrong_folders_and_steps_are_refused(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RsgrpoError, match="is not a run folder"):
        write_report(tmp_path)
    with pytest.raises(RsgrpoError, match=r"no rollouts of step 99.*stored steps: 1, 2, 3, 4, 5"):
        write_report(run_dir, step=99)
    assert main([str(tmp_path)]) == 2
    assert "is not a run folder" in capsys.readouterr().err


def test_the_command_line_writes_where_it_is_told(run_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    command = [sys.executable, "-m", "rsgrpo.report", str(run_dir), "--out", str(out), "--step", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(out)
    assert out.stat().st_size > 10_000


def test_a_browser_draws_it_and_runs_nothing_hostile(tmp_path: Path, run_dir: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome") or pytest.skip("no Chromium here")

    def dom(path: Path) -> str:
        profile = f"--user-data-dir={tmp_path}/profile"
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000", profile]
        done = subprocess.run(
            [browser, *flags, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=60
        )
        return done.stdout

    shown = dom(write_report(run_dir, tmp_path / "good.html"))
    assert shown.count("<figure>") == len(collect_report(run_dir)["charts"])
    assert shown.count('class="panel rollout"') == 4
    assert "background:rgba(var(--up)" in shown
    assert "background:rgba(var(--down)" in shown
    assert 'class="out ' in shown
    hostile = dom(write_report(hostile_run(tmp_path / "run"), tmp_path / "hostile.html"))
    assert "&lt;/script&gt;" in hostile.split('<div id="viewer">')[1]
    assert set(re.findall(r'<img src="([^"]{5})', hostile)) == {"data:"}
    tokens = hostile.split('<div class="tokens">')[1]
    before, observation = tokens.split('<div class="observation miss">', 1)
    assert before.count("<span") == 1  # in its place: behind the first token
    assert re.search(r"</button> behind</div>\s*<span", observation)  # its image before the word, then the next token


def test_names_of_curves_that_end_close_together_stand_below_one_another(tmp_path: Path) -> None:
    series = {"high": [0.4, 0.5], "second": [0.1, 0.12], "third": [0.1, 0.11], "first": [0.1, 0.13]}
    line_chart(tmp_path / "curves.svg", "scores", "step", [0, 1], series, unit="")
    names = dict(re.findall(r'y="([\d.]+)" fill="#\w+">(\w+)<', (tmp_path / "curves.svg").read_text()))
    rows = {name: float(row) for row, name in names.items()}
    assert sorted(rows, key=rows.__getitem__) == ["high", "first", "second", "third"]
    ordered = sorted(rows.values())
    assert min(below - above for above, below in itertools.pairwise(ordered)) >= 13
