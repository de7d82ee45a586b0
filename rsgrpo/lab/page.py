"""What the laboratory leaves: lab.json with every number, and lab.html, in which two rules are compared by token."""

from __future__ import annotations

import json
import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from markupsafe import Markup

from rollout.files import write_text
from rsgrpo.lab.config import LabConfig
from rsgrpo.lab.experiment import Results, out_folder, reward_cells, rule_cells
from rsgrpo.report.templates import asset, json_for_script, render, script_hash

PACKAGE = "rsgrpo.lab"


def write_results(config: LabConfig, results: Results) -> list[Path]:
    """Write both files, whole or not at all, and return them."""
    folder = out_folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    made = {
        "command": "python -m rsgrpo.lab " + shlex.join(sys.argv[1:]),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "model": config.model.path,
        "run": config.lab.run,
        "step": config.lab.step,
    }
    paths = [folder / "lab.json", folder / "lab.html"]
    write_text(paths[0], json.dumps({**made, **measured_values(results)}, indent=1) + "\n")
    write_text(paths[1], render_page(made, results))
    return paths


def measured_values(results: Results) -> dict[str, Any]:
    """Return all numbers, without the rollouts; what cannot be estimated from so few batches is null."""
    values = {
        "against": results.against,
        "batches": results.num_batches,
        "wanted_batches": results.wanted_batches,
        "reference_batches": results.num_reference_batches,
        "reward_batches": results.num_reward_batches,
        "prompts": results.prompts,
        "group_size": results.group_size,
        "reference": {"agreement_of_halves": results.reference_agreement, "norm": results.reference_norm},
        "scores": results.scores,
        "rules": [asdict(row) for row in results.rows],
    }
    return dict(json.loads(json_for_script(values)))


def render_page(made: dict[str, Any], results: Results) -> str:
    """Return the HTML page with its style, script and data inside."""
    script = asset("charts.js") + asset("lab.js", PACKAGE)
    labels = list(dict.fromkeys(label for row in results.rows for label in row.blocks))
    return render(
        "lab.html",
        package=PACKAGE,
        title="Credit laboratory",
        brand="RS-GRPO credit laboratory",
        made=made,
        results=results,
        labels=labels,
        rule_rows=[rule_cells(row, labels) for row in results.rows],
        reward_rows=[reward_cells(row, each, labels) for row in results.rows for each in row.rewards],
        script=Markup(script),
        script_hash=script_hash(script),
        data=json_for_script(shown_rollouts(results)),
    )


def shown_rollouts(results: Results) -> dict[str, Any]:
    """Return the groups of the page: texts, token spans, scores, and every rule's token weights."""
    groups = []
    for p, scored in enumerate(results.shown):
        rollouts = [
            {
                "text": rollout.text,
                "starts": [start for start, _ in rollout.token_spans_T],
                "ends": [end for _, end in rollout.token_spans_T],
                "scores": list(zip(scored.reward_names_K, scored.scores_GK[g], strict=True)),
                "weights": {
                    rule: [round(float(weight), 4) for weight in weights_PG[p][g]]
                    for rule, weights_PG in results.shown_weights.items()
                },
            }
            for g, rollout in enumerate(scored.group.rollouts)
        ]
        prompt = scored.group.prompt
        groups.append({"id": prompt.id, "question": prompt.question or prompt.text, "rollouts": rollouts})
    return {"rules": [row.rule for row in results.rows], "groups": groups}
