"""What a run is worth in a few lines: scores, what never moved, what failed on the way, and what to try next."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rewards.namesakes import namesakes
from rsgrpo.records.run_log import LOG_FILE

_COUNTS = ("/num_prompts", "/num_tokens", "/prompt_errors")
_ERRORS = re.compile(r"reward/(?P<train>[^/]+)/errors|val/[^/]+/(?P<val>[^/]+)(?<!/prompt)_errors")

Rows = Sequence[Mapping[str, Any]]
"""Lines of metrics.jsonl."""


def scores(rows: Rows) -> dict[str, str]:
    """Return the first and the last value of every validation score, and which scores were always zero."""
    lines, zero = {}, []
    for key in sorted({key for row in rows for key in row if key.startswith("val/")}):
        values = [row[key] for row in rows if row.get(key) is not None]
        if not values or key.endswith(_COUNTS) or _ERRORS.fullmatch(key):
            continue
        if not any(values):
            zero.append(key)
        else:
            lines[key] = f"{values[0]:.3f}" + (f" → {values[-1]:.3f}" if len(values) > 1 else " (one validation)")
    means = sorted({key for row in rows for key in row if re.fullmatch(r"reward/[^/]+/mean", key)})
    zero += [key for key in means if not any(row.get(key) for row in rows)]
    return lines | ({"always zero": ", ".join(zero)} if zero else {})


def warnings(rows: Rows, rewards: Sequence[str]) -> list[str]:
    """Return what a run has to say about itself that its scores hide.

    rewards: names of the run's rewards.
    """
    found = []
    skipped = [row["actor/skipped"] for row in rows if row.get("actor/skipped") is not None]
    if skipped and all(skipped):
        found.append(
            f"none of the {len(skipped)} steps updated the model: in every group all responses scored alike, or the "
            "gradient was not finite. Look at the rewards, and raise rollout.temperature or algorithm.filter."
        )
    failed: Counter[str] = Counter()
    for row in rows:
        for key, count in row.items():
            if match := _ERRORS.fullmatch(key):
                failed[match["train"] or match["val"]] += int(count or 0)
    applied = {key.split("/")[1] for row in rows for key in row if re.fullmatch(r"reward/[^/]+/mean", key)}
    found += [
        f"reward '{name}' failed {count} times and was skipped (on_reward_error=skip). {LOG_FILE} has a traceback"
        + ("." if name in applied else "; it never gave a score.")
        for name, count in failed.items()
    ]
    found += [
        f"reward '{name}' applied to no response: it taught nothing."
        for name in rewards
        if applied and name not in applied and name not in failed
    ]
    return found


def next_commands(folder: Path, arguments: Sequence[str], reward: str) -> list[tuple[str, str]]:
    """Return three commands worth trying after a run; `arguments` started it, `reward` is a target of it."""
    kept = [argument for argument in arguments if not argument.startswith(("name=", "algorithm="))]
    again = " ".join(kept) or "recipe=..."
    program = f"python {'-P ' * bool(namesakes(Path.cwd()))}-m rewards"  # -P: a rewards.py here is not run in its place
    other = "rs_grpo" if "algorithm=grpo" in arguments else "grpo"
    return [
        (
            "what a reward says about the last rollouts",
            f"{program} {reward} {folder} --limit 4",
        ),
        ("the report at another step", f"python -m rsgrpo.report {folder} --step 1"),
        (
            f"the same run with algorithm={other}",
            f"python -m rsgrpo.train {again} name={folder.name}-{other} algorithm={other}",
        ),
    ]
