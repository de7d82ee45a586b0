"""What a row would save that shares more than the prompt: turns and observations with which siblings begin alike.

    python -m benchmarks.shared_turns runs/desk_demo desk/model

A row of the learner is `[prompt | r_1 ... r_G]`. Responses of the same first call read the same page; a tree of
prefixes would hold both once. This counts the tokens of stored rollouts in both forms: as they are, with pages of the
size that `page_desk_7b` opens, and with words before each call, which siblings rarely choose alike. A token costs about
the same at any place of a row, so 1 / (1 - share saved) bounds what a tree can gain in the learner's passes.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rollout.types import Observation
from rsgrpo.records.rollouts import StoredRollout, read_rollouts, rollout_files
from rsgrpo.records.tracking import read_metrics

PAGE_TOKENS, THUMBNAIL_TOKENS = 1280, 64
"""Vision tokens of a page that is opened, and of a thumbnail of the prompt, in `page_desk_7b`."""

Piece = tuple[object, int]
"""What siblings must have in common, and how many tokens it is."""


@dataclass(frozen=True, slots=True)
class Setting:
    """How trajectories are counted. page_tokens: of each image; 0 as stored. words: sampled before each turn."""

    title: str
    page_tokens: int = 0
    words: int = 0


SETTINGS = (
    Setting("as stored"),
    Setting("pages of 1,280 tokens", PAGE_TOKENS),
    *(Setting(f"and {words} words before each turn", PAGE_TOKENS, words) for words in (10, 50, 100)),
)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="+", help="folders of runs with stored rollouts")
    parser.add_argument("model", type=Path, help="the model folder that they started from")
    options = parser.parse_args()
    image_token = json.loads((options.model / "config.json").read_text())["image_token_id"]
    groups = [group for run in options.run for group in stored_groups(run)]
    agreement = float(np.mean([np.exp(r.rollout_logprobs_T).mean() for _, group in groups for r in group]))
    print(f"{len(groups)} groups; two siblings choose the same next token with probability {agreement:.3f}\n")
    print("| trajectories | prompt | responses | shared beyond the prompt | saved | bound on speed |")
    print("|---|---|---|---|---|---|")
    for setting in SETTINGS:
        counted = np.array([count(group, tokens, setting, image_token, agreement) for tokens, group in groups])
        prompt, responses, distinct = counted.sum(0)
        saved = (responses - distinct) / (prompt + responses)
        shared = f"{prompt / len(groups):,.0f} | {responses / len(groups):,.0f} | {1 - distinct / responses:.1%}"
        print(f"| {setting.title} | {shared} | {saved:.1%} | {1 / (1 - saved):.2f} |")


def stored_groups(run: Path) -> Iterator[tuple[float, list[StoredRollout]]]:
    """Yield the groups of a run, with the mean prompt length of their step."""
    lengths = {row["step"]: row.get("rollout/num_prompt_tokens_mean") for row in read_metrics(run)}
    for step, path in rollout_files(run).items():
        groups: dict[int, list[StoredRollout]] = {}
        for rollout in read_rollouts(path):
            groups.setdefault(rollout.group, []).append(rollout)
        for group in groups.values():
            yield float(lengths[step] or 0), group


def count(
    group: Sequence[StoredRollout], prompt_tokens: float, setting: Setting, image_token: int, agreement: float
) -> tuple[float, int, int]:
    """Return tokens of the prompt, of all responses, and of their distinct prefixes."""
    chance = random.Random(group[0].prompt_id)
    if setting.page_tokens:
        prompt_tokens += (THUMBNAIL_TOKENS - 1) * len(group[0].images)  # the demo's thumbnails are one token each
    total, nodes = 0, dict[tuple[int, object], int]()
    distinct = 0
    for rollout in group:
        node = 0
        for key, num_tokens in pieces(rollout, setting, image_token, agreement, chance):
            total += num_tokens
            if (node, key) not in nodes:
                nodes[node, key] = len(nodes) + 1
                distinct += num_tokens
            node = nodes[node, key]
    return prompt_tokens, total, distinct


def pieces(
    rollout: StoredRollout, setting: Setting, image_token: int, agreement: float, chance: random.Random
) -> Iterator[Piece]:
    """Yield a response piece by piece; a sampled word is the one that siblings may share, or nobody's."""
    done = 0
    for observation in (*rollout.observations, None):
        end = len(rollout.token_ids_T) if observation is None else observation.at
        if end > done:
            yield from ((0 if chance.random() < agreement else object(), 1) for _ in range(setting.words))
        yield from ((token, 1) for token in rollout.token_ids_T[done:end])
        done = end
        if observation is not None:
            yield from read(observation, setting, image_token)


def read(observation: Observation, setting: Setting, image_token: int) -> Iterator[Piece]:
    """Yield an observation; an image is one piece."""
    texts = [token for token in observation.token_ids_S if token != image_token]
    if not texts:
        return
    yield tuple(texts), len(texts)
    stored = len(observation.token_ids_S) - len(texts)
    for image in observation.images:
        yield str(image), setting.page_tokens or stored // len(observation.images)


if __name__ == "__main__":
    main()
