"""The laboratory: its arithmetic by hand, its gradients against the learner, and both of its inputs end to end."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rewards.api import Credit, Span
from rollout.config import RolloutConfig
from rollout.types import Prompt, Rollout, RolloutGroup
from rsgrpo import cli
from rsgrpo.algorithm.advantages import Rule, credit_groups
from rsgrpo.algorithm.scoring import RewardSet
from rsgrpo.cluster.local import LocalCluster
from rsgrpo.config.train import AlgorithmConfig, CheckpointConfig, DataConfig, TrainConfig
from rsgrpo.errors import ConfigError, InputError
from rsgrpo.lab.__main__ import main
from rsgrpo.lab.batches import policy_checkpoint, stored_batches
from rsgrpo.lab.compare import block_masks, block_shares, interval, signal_to_noise, token_weights
from rsgrpo.lab.config import LabConfig, LabOptions, rules_of
from rsgrpo.lab.experiment import Results, measure
from rsgrpo.lab.gradients import Measured, Reference, measure_batch, reference_gradient
from rsgrpo.lab.page import write_results
from rsgrpo.records.console import Bar, Console
from rsgrpo.records.rollouts import read_rollouts
from rsgrpo.running.run import Run
from rsgrpo.running.stopping import StopRequested
from rsgrpo.train import take_step
from rsgrpo.types import Sample, ScoredGroup, TrainGroup
from tests.material.learner import make_learner
from tests.material.training import tiny_run

REWARDS = """
from rewards.api import Response, between, reward


@reward
def brief(response: Response) -> float:
    return -len(response.text) / 100


@reward(scope=between("=", None))
def counted(response: Response) -> float:
    return float(response.text.partition("=")[2] == response.truth["answers"][0])
"""
TEXT = "ab=cd"
SPANS = ((0, 1), (1, 2), (2, 4), (4, 5), (5, 5))


def scored_group(seed: int, *, whole: bool = False) -> ScoredGroup:
    """Four rollouts of five tokens: `look` teaches "ab", `answer` the rest; or both the whole response."""
    rng = np.random.default_rng(seed)
    scopes = (Span(0, 5), Span(0, 5)) if whole else (Span(0, 2), Span(2, 5))
    scores_GK = [[float(rng.integers(3)), float(rng.random())] for _ in range(4)]
    rollouts = tuple(
        Rollout(tuple(rng.integers(0, 300, 5).tolist()), (-1.0,) * 5, TEXT, SPANS, "stop", 0) for _ in range(4)
    )
    credits_GK = [
        [(Credit("", score, span),) for score, span in zip(scores_K, scopes, strict=True)] for scores_K in scores_GK
    ]
    prompt = Prompt(f"p{seed}", f"question {seed}")
    return ScoredGroup(RolloutGroup(prompt, rollouts), ("look", "answer"), scores_GK, credits_GK, [[False] * 2] * 4)


@pytest.fixture(scope="module")
def learner(tiny_model_path):
    return make_learner(tiny_model_path)


def test_intervals_are_those_of_student():
    found = interval([1.0, 2.0, 4.0])  # mean 7/3, variance 7/3
    assert found.mean == pytest.approx(7 / 3)
    assert found.half_width == pytest.approx(4.303 * math.sqrt(7 / 3 / 3))
    assert math.isnan(interval([1.0]).half_width)
    assert interval([0.0, 1.0] * 30).half_width == pytest.approx(
        2.001 * np.std([0, 1] * 30, ddof=1) / 60**0.5, rel=2e-3
    )


def test_signal_to_noise_does_not_take_noise_for_signal():
    assert signal_to_noise([1.0, 9.0], 4.0) == pytest.approx(
        1.5
    )  # gradients 1 and 3: mean 2, variance 2, 4 - 2 / 2 = 3
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(4000, 4))
    found = signal_to_noise((noise**2).sum(1).tolist(), float((noise.mean(0) ** 2).sum()))
    assert found == pytest.approx(0.0, abs=2e-3)


def test_token_weights_are_what_the_loss_multiplies_with():
    scope_KT = np.array([[True, True, False, False], [True, True, True, True]])
    sample = Sample(np.arange(4), scope_KT, np.array([[1.0, 1.0, 0.0, 0.0], [-0.5] * 4], dtype=np.float32))
    groups = [TrainGroup(Prompt("p", "t"), (sample,))]
    [[by_scope]] = token_weights(groups, (1.0, 3.0), "scope")  # active weights add up to 4, T is 2 and 4 of 4 tokens
    np.testing.assert_allclose(by_scope, [[0.5, 0.5, 0, 0], [-0.375] * 4])
    [[by_response]] = token_weights(groups, (1.0, 3.0), "response")
    np.testing.assert_allclose(by_response, [[0.25, 0.25, 0, 0], [-0.375] * 4])


def test_blocks_are_named_by_the_scopes_that_cover_them():
    blocks = block_masks(scored_group(0), 0)
    assert {label: mask_T.tolist() for label, mask_T in blocks.items()} == {
        "look": [True, True, False, False, False],
        "answer": [False, False, True, True, True],
    }
    assert list(block_masks(scored_group(0, whole=True), 0)) == ["no scope"]
    assert block_shares([[np.array([1.0, 0, -2.0, 0, 1.0])]], [[blocks]]) == {"look": 0.25, "answer": 0.75}


def test_a_gradient_is_the_one_that_the_learner_steps_along(tiny_model_path, learner):
    scored = [scored_group(seed) for seed in range(3)]
    for name in ("per_reward", "grpo"):
        algorithm = AlgorithmConfig(advantage=name)
        groups = credit_groups(scored, Rule.of(algorithm), (1.0, 2.0))
        weights = (1.0, 2.0) if name == "per_reward" else (1.0,)
        gradient = learner.gradient(groups, weights, algorithm)
        metrics = make_learner(tiny_model_path, algorithm=algorithm).update(groups, weights)
        assert float(gradient.norm()) == pytest.approx(metrics["actor/grad_norm"], rel=1e-5)
    nothing = [dataclasses.replace(group, samples=tuple(map(untaught, group.samples))) for group in groups]
    assert not learner.gradient(nothing, (1.0,), algorithm).any()


def untaught(sample: Sample) -> Sample:
    return dataclasses.replace(sample, advantages_KT=np.zeros_like(sample.advantages_KT))


def test_the_reference_is_the_leave_one_out_gradient_by_hand(learner):
    batch = [scored_group(7)]
    weights = (1.0, 0.5)
    reference = reference_gradient(learner, [batch, batch], weights, AlgorithmConfig(), lambda: None)
    sums = np.array(batch[0].scores_GK, dtype=float) @ weights
    advantages = sums - (sums.sum() - sums) / 3
    samples = tuple(
        Sample(np.array(rollout.token_ids_T), np.ones((1, 5), bool), np.full((1, 5), a, np.float32))
        for rollout, a in zip(batch[0].group.rollouts, advantages, strict=True)
    )
    by_hand = learner.gradient([TrainGroup(batch[0].group.prompt, samples)], (1.0,), AlgorithmConfig())
    assert reference.agreement == pytest.approx(1.0, abs=1e-4)
    assert reference.norm == pytest.approx(float(by_hand.norm()), rel=1e-4)
    torch.testing.assert_close(reference.direction * reference.norm, by_hand, rtol=1e-4, atol=1e-7)


def test_causal_credit_is_plain_leave_one_out_where_every_reward_is_determined_at_the_end(learner):
    batch = [scored_group(seed, whole=True) for seed in range(2)]
    weights = (1.0, 0.5)
    reference = reference_gradient(learner, [batch, batch], weights, AlgorithmConfig(), lambda: None)
    causal = AlgorithmConfig(advantage="per_reward", credit="causal", baseline="leave_one_out", scale="none")
    measured = Measured()
    measure_batch(learner, batch, weights, causal, reference, measured, split=True)
    assert measured.whole.cosines == pytest.approx([1.0], abs=1e-4)
    assert math.sqrt(measured.whole.squared_norms[0]) == pytest.approx(reference.norm / 1.5, rel=1e-4)


def test_the_parts_of_the_rewards_add_up_to_their_rule(learner):
    batch = [scored_group(seed) for seed in range(2)]
    direction = torch.zeros_like(learner.gradient(credit_groups(batch, "grpo", (1.0, 1.0)), (1.0,), AlgorithmConfig()))
    measured = Measured()
    reference = Reference(direction, 1.0, 1.0)
    measure_batch(learner, batch, (1.0, 2.0), AlgorithmConfig(), reference, measured, split=True)
    parts: Any = [measured.by_reward[name].total for name in ("look", "answer")]
    torch.testing.assert_close(parts[0] + parts[1], measured.whole.total, rtol=1e-4, atol=1e-6)
    assert measured.reward_shares["look"] == [{"look": 1.0, "answer": 0.0}]


@pytest.fixture
def config(tmp_path: Path, tiny_model_path: str, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    """Rows without pages and scripted answers, of which one in four is right."""
    (tmp_path / "lab_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(str(tmp_path))
    rows = [{"id": f"r{n}", "prompt": f"how many stars? {'*' * n}", "answer": str(n)} for n in range(1, 5)]
    source, script = tmp_path / "rows.jsonl", tmp_path / "script.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    entries = [{"id": f"r{n}", "responses": [f"so ={n}", "=9", "no idea", "= 7"]} for n in range(1, 5)]
    script.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return tiny_run(
        tmp_path,
        source,
        tiny_model_path,
        total_steps=4,
        rewards={"brief": "lab_rewards:brief", "counted": "lab_rewards:counted"},
        reward_args={},
        data=DataConfig(train=str(source), gold="rewards.gold:plain"),
        rollout=RolloutConfig(engine="fake", script=str(script), group_size=4, max_response_tokens=24),
        checkpoint=CheckpointConfig(every=2, keep_last=2, keep_best=0, export=False),
    )


def lab_config(config: TrainConfig, **options: Any) -> LabConfig:
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(TrainConfig)}
    few: dict[str, Any] = {
        "batches": 2,
        "reference_batches": 2,
        "reward_batches": 1,
        "rules": ["rs_grpo", "causal", "gdpo"],
    }
    return LabConfig(**values, lab=LabOptions(**few | options))


class Balanced(HTMLParser):
    """Raises where an element is closed that was not the last one opened."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in ("meta", "img", "br", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_fresh_rollouts_give_a_table_json_and_a_page(config, tmp_path, capsys):
    main(lab_config(config))
    printed = capsys.readouterr().out
    assert "minus grpo" in printed
    assert "by reward, on 1 of these batches" in printed
    results = json.loads((tmp_path / "run-lab/lab.json").read_text())
    assert [row["rule"] for row in results["rules"]] == ["grpo", "rs_grpo", "causal", "gdpo"]
    assert results["rules"][0]["difference"] == {"mean": 0.0, "half_width": 0.0}
    grpo, rs_grpo = (np.array(row["cosines"]) for row in results["rules"][:2])
    assert results["rules"][1]["difference"]["mean"] == pytest.approx((rs_grpo - grpo).mean())
    assert (results["batches"], results["reference_batches"], results["group_size"]) == (2, 2, 4)
    assert set(results["rules"][1]["blocks"]) == {"counted", "no scope"}
    assert [reward["reward"] for reward in results["rules"][1]["rewards"]] == ["brief", "counted"]
    page = (tmp_path / "run-lab/lab.html").read_text()
    parser = Balanced()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    data = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    assert data["rules"] == ["grpo", "rs_grpo", "causal", "gdpo"]
    rollout = data["groups"][0]["rollouts"][0]
    assert all(len(weights) == len(rollout["starts"]) for weights in rollout["weights"].values())


def test_stored_rollouts_are_credited_as_in_training(config, tmp_path, capsys):
    with Run.open(config, start_cluster=LocalCluster) as run:
        for step in run.steps_left:
            take_step(run, step)
    stored = lab_config(config, run=str(tmp_path / "run"))
    batches = stored_batches(stored, RewardSet.from_config(stored), 4, Bar())
    weights_K = [1.0, 1.0]
    for step, scored in enumerate(batches, start=1):
        rows = read_rollouts(tmp_path / f"run/rollouts/step_{step:06d}.parquet")
        groups = credit_groups(scored, Rule.of(config.algorithm), weights_K)
        samples = [sample for group in groups for sample in group.samples]
        for row, sample in zip(rows, samples, strict=True):
            np.testing.assert_array_equal(row.scope_KT(), sample.scope_KT)
            np.testing.assert_array_equal(row.advantages_KT(), sample.advantages_KT)
    main(stored)
    assert "written" in capsys.readouterr().out
    main(
        lab_config(config, run=str(tmp_path / "run"), step=4, fresh=True, rules=["causal"], out=str(tmp_path / "later"))
    )
    assert json.loads((tmp_path / "later/lab.json").read_text())["step"] == 4
    with pytest.raises(InputError, match=r"stored rollouts of 2 steps after step 2, and .* need 4"):
        stored_batches(lab_config(config, run=str(tmp_path / "run"), step=2), RewardSet.from_config(stored), 4, Bar())
    with pytest.raises(InputError, match=r"lab.step=3: .* has checkpoints of steps 2, 4"):
        policy_checkpoint(lab_config(config, run=str(tmp_path / "run"), step=3))


def test_a_measurement_that_is_stopped_keeps_the_batches_that_it_has(config, tmp_path, capsys):
    wanted = lab_config(config, batches=4)
    seen: list[int] = []
    before = signal.getsignal(signal.SIGTERM)

    def stop_at_three(results: Results) -> None:
        seen.append(results.num_batches)
        write_results(wanted, results)
        if results.num_batches == 3:
            signal.raise_signal(signal.SIGTERM)

    with Console() as console:
        results = measure(wanted, rules_of(wanted), console, stop_at_three)
    assert seen == [2, 3]
    assert next(results.lines()).startswith("3 (stopped: 4 were asked for) batches of 2 x 4 rollouts")
    assert all(math.isfinite(row.difference.half_width) for row in results.rows)
    written = json.loads((tmp_path / "run-lab/lab.json").read_text())
    assert (written["batches"], written["wanted_batches"]) == (3, 4)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_measurement_that_is_stopped_before_two_batches_says_so(config, tmp_path, capsys):
    (tmp_path / "stopping_rewards.py").write_text(
        "import signal\nfrom rewards.api import Response, reward\n\n\n"
        "@reward\ndef stops(response: Response) -> float:\n"
        "    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL and not sent:\n"
        "        sent.append(signal.raise_signal(signal.SIGTERM))\n    return 1.0\n\n\nsent = []\n"
    )
    stopping = dataclasses.replace(config, rewards={"stops": "stopping_rewards:stops"})
    with pytest.raises(StopRequested):
        main(lab_config(stopping))
    assert "Stopped by SIGTERM before two batches were measured" in capsys.readouterr().out
    assert not (tmp_path / "run-lab/lab.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rules": []}, "lab.rules is empty"),
        ({"batches": 1}, "lab.batches must be >= 2, got 1"),
        ({"step": 20}, "lab.step and lab.fresh need lab.run: name a run folder"),
        ({"rules": ["casual"]}, "there is no entry 'casual' in conf/algorithm; did you mean causal?"),
        ({"rules": ["widen"]}, "widen sets algorithm.missing_marker"),
        ({"run": "no/such/run"}, "lab.run=no/such/run: there is no such folder"),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_line(config, options, message):
    with pytest.raises((ConfigError, InputError)) as error:
        main(lab_config(config, **options))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_rules_are_entries_of_the_algorithm_group_and_the_configured_one():
    config = cli.compose(
        LabConfig,
        overrides=["recipe=demo", "algorithm=causal", "algorithm.scale=none", "lab.rules=[configured,rs_grpo]"],
    )
    rules = rules_of(config)
    assert list(rules) == ["grpo", "configured", "rs_grpo"]
    assert (rules["configured"].credit, rules["configured"].scale) == ("causal", "none")
    assert (rules["rs_grpo"].credit, rules["rs_grpo"].scale) == ("own", "std")
    assert all(name in rules_of(LabConfig()) for name in LabOptions().rules)
