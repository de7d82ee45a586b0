"""A made-up run folder like those of training, for tests of whatever reads one."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml
from PIL import Image, ImageDraw

from rewards.api import Credit, Span
from rollout.types import Prompt, Rollout, RolloutGroup
from rsgrpo.config.train import TrackingConfig
from rsgrpo.records.tracking import Tracker
from rsgrpo.types import Sample, ScoredGroup, TrainGroup

REWARDS = ("accuracy", "evidence", "well_formed")
CONFIG = {"name": "synthetic", "seed": 7, "algorithm": {"prompts_per_step": 4}, "reward_weights": {"well_formed": 0.5}}


def png(color: str | tuple[int, int, int] = "red", width: int = 28, height: int = 28) -> bytes:
    """Return an image of one colour as PNG bytes."""
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), color).save(buffer, "PNG")
    return buffer.getvalue()


def page_bytes(code: int, amount: int) -> bytes:
    """Return a small form as png bytes."""
    image = Image.new("RGB", (300, 380), "white")
    draw = ImageDraw.Draw(image)
    draw.rectangle((16, 16, 284, 364), outline="#888")
    draw.text((36, 40), f"Code    {code}", fill="black", font_size=26)
    draw.text((36, 110), f"Amount  {amount}", fill="black", font_size=26)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def response_text(page: int, read: int, num_pages: int) -> str:
    """Return a well-formed response that read `read` on `page`."""
    slots = [
        f"[{i}]: the amount is {read}" if i == page else f"[{i}]: no relevant information"
        for i in range(1, num_pages + 1)
    ]
    evidence = "\n".join(slots)
    return (
        f"<observe>The question asks for the amount on page {page}. There are {num_pages} forms.</observe>\n"
        f"<evidence>\n{evidence}\n</evidence>\n<think>The form on page {page} says {read}.</think>\n"
        f"<answer>{read}</answer>"
    )


def make_rollout(text: str, *, ends: bool = True, version: int = 0) -> Rollout:
    """Return a rollout whose tokens are words and runs of punctuation, with end-of-text last where it `ends`."""
    spans = [match.span() for match in re.finditer(r" ?\w+|[^\w\s]+\n*|\s+", text)]
    spans += [(len(text), len(text))] if ends else []
    return Rollout(
        token_ids_T=list(range(100, 100 + len(spans))),
        logprobs_T=[-0.05 * (1 + t % 7) for t in range(len(spans))],
        text=text,
        token_spans_T=spans,
        finish_reason="stop" if ends else "length",
        weights_version=version,
    )


def make_scored(prompt: Prompt, texts: Sequence[str], scores_GK: Sequence[Sequence[float | None]]) -> ScoredGroup:
    """Return a scored group: accuracy on think and answer, evidence before it, format on all."""
    spans_GK = [[_scope(text, name) for name in REWARDS] for text in texts]
    credits_GK = [
        [(Credit("", score, span),) if score is not None else () for score, span in zip(scores_K, spans_K, strict=True)]
        for scores_K, spans_K in zip(scores_GK, spans_GK, strict=True)
    ]
    missed_GK = [[span is None for span in spans_K] for spans_K in spans_GK]
    group = RolloutGroup(prompt, tuple(make_rollout(text) for text in texts), num_prompt_tokens=40)
    return ScoredGroup(group, REWARDS, scores_GK, credits_GK, missed_GK)


def make_train_group(scored: ScoredGroup) -> TrainGroup:
    """Return per-reward standardised advantages on the tokens that overlap each span."""
    scores_GK = np.array([[0.0 if s is None else s for s in row] for row in scored.scores_GK])
    advantages_GK = (scores_GK - scores_GK.mean(0)) / (scores_GK.std(0, ddof=1) + 1e-6)
    samples = []
    for g, rollout in enumerate(scored.group.rollouts):
        scope_KT = np.zeros((len(REWARDS), len(rollout.token_ids_T)), dtype=bool)
        for k, credits in enumerate(scored.credits_GK[g]):
            for span in [credit.span for credit in credits if credit.span]:
                reaches_end = span.end == len(rollout.text)
                scope_KT[k] = [
                    (s < span.end and e > span.start) or (s == e and reaches_end) for s, e in rollout.token_spans_T
                ]
        advantages_KT = np.where(scope_KT, advantages_GK[g][:, None], 0).astype(np.float32)
        samples.append(Sample(np.array(rollout.token_ids_T), scope_KT, advantages_KT))
    return TrainGroup(scored.group.prompt, tuple(samples))


def make_groups(step: int, *, num_groups: int = 4, group_size: int = 4) -> list[ScoredGroup]:
    """Return groups in which more rollouts are right the later the step."""
    groups = []
    for p in range(num_groups):
        rng = np.random.default_rng([step, p])
        num_pages = 2 + p % 3
        forms = [tuple(rng.integers(0, 10, 2).tolist()) for _ in range(num_pages)]
        page = 1 + int(rng.integers(num_pages))
        amount = forms[page - 1][1]
        question = f"What amount is on page {page}?"
        evidence = [
            f"the amount is {amount}" if i == page else "no relevant information" for i in range(1, num_pages + 1)
        ]
        prompt = Prompt(
            id=f"form-{step}-{p}",
            text="<image>" * num_pages + question,
            images=tuple(page_bytes(*form) for form in forms),
            truth={"answers": [str(amount)], "evidence": evidence, "page": page},
            question=question,
        )
        right = [bool(rng.random() < 0.35 + 0.01 * step) for _ in range(group_size)]
        texts = [response_text(page, amount if ok else (amount + 3) % 10, num_pages) for ok in right]
        scores: list[list[float | None]] = [[float(ok), 1.0 if ok else 0.6, 1.0] for ok in right]
        if p == 0:  # one rollout forgets its tags
            texts[-1], scores[-1] = f"The amount is {amount}.", [0.0, 0.0, 0.0]
        groups.append(make_scored(prompt, texts, scores))
    return groups


def make_metrics(step: int, rng: np.random.Generator) -> dict[str, float]:
    """Return the metrics of one training step, noisy and improving."""
    rise = 1 - math.exp(-step / 15)
    metrics: dict[str, float] = {}
    values = ((0.55, 0.92, 0.05, 0.31), (0.7, 0.93, 0.03, 0.69), (0.97, 1.0, 0.01, 1.0))
    for name, (low, high, noise, token_frac) in zip(REWARDS, values, strict=True):
        metrics[f"reward/{name}/mean"] = low + (high - low) * rise + noise * rng.standard_normal()
        metrics[f"reward/{name}/std"] = 0.4 - 0.25 * rise
        metrics[f"scope/{name}/hit_rate"] = 0.98 + 0.02 * rise
        metrics[f"scope/{name}/token_frac"] = token_frac
    return metrics | {
        "rollout/num_tokens_mean": 70 + 2 * rng.standard_normal(),
        "rollout/num_tokens_max": 90.0,
        "rollout/truncated_frac": 0.01 * rng.random(),
        "actor/loss": 0.01 * rng.standard_normal(),
        "actor/entropy": 0.5 - 0.3 * rise + 0.01 * rng.standard_normal(),
        "actor/grad_norm": 0.8 + 0.1 * rng.standard_normal(),
        "actor/kl": 0.002 * step,
        "actor/clip_frac": 0.01 * rng.random(),
        "actor/mismatch_mean": 1e-6 * (1 + rng.random()),
        "actor/lr": 1e-4,
        "time/step": 12.3,
        "time/sample": 5.1 + 0.2 * rng.standard_normal(),
        "time/learn": 6.0,
        "time/sync": 0.2,
        "perf/response_tokens_per_s": 560.0,
    }


def write_run(run_dir: Path, *, num_steps: int = 40, val_every: int = 10) -> Path:
    """Write a run of `num_steps` steps, validated before it and after every `val_every` steps; return its folder."""
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    rng = np.random.default_rng(0)
    tracker = Tracker(run_dir, TrackingConfig(), CONFIG, name="synthetic", resume_step=None)
    for step in range(num_steps + 1):
        if step:
            tracker.log(step, make_metrics(step, rng))
            groups = make_groups(step)
            tracker.store_rollouts(step, groups, [make_train_group(g) for g in groups], terms=REWARDS)
        if step % val_every == 0:
            rise = 1 - math.exp(-step / 15)
            scores = {"accuracy": 0.585 + 0.32 * rise, "evidence": 0.72 + 0.2 * rise, "well_formed": 0.995}
            greedy = {"accuracy": 0.975 + 0.005 * rise, "evidence": 0.98, "well_formed": 1.0}
            modes = {"sampled": scores, "greedy": greedy}
            tracker.log(step, {f"val/{mode}/{name}": v for mode, named in modes.items() for name, v in named.items()})
            for mode in modes:
                tracker.store_rollouts(step, make_groups(step, num_groups=2, group_size=1), split="val", mode=mode)
    tracker.close()
    return run_dir


def _scope(text: str, reward: str) -> Span | None:
    think = text.find("<think>")
    if reward == "well_formed":
        return Span(0, len(text))
    if think < 0:
        return None
    return Span(think, len(text)) if reward == "accuracy" else Span(0, think)
