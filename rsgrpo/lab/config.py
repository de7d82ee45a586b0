"""What the laboratory is asked: a training configuration, and which credit rules to measure on what."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from importlib import resources
from typing import Any

import yaml

from rollout.keys import check, key, nearest, require
from rsgrpo.config.train import AlgorithmConfig, TrainConfig

RULES = ["rs_grpo", "causal", "grpo", "gdpo", "whole", "per_scope", "blockwise"]
CONFIGURED = "configured"
RULE_KEYS = ("advantage", "credit", "baseline", "scale", "average")


@dataclass(frozen=True)
class LabOptions:
    """What the laboratory compares, on which rollouts, and where it writes."""

    rules: list[str] = key(
        RULES, f"Credit rules to compare: entries of conf/algorithm, and {CONFIGURED} for `algorithm` as given."
    )
    against: str = key("grpo", "The rule that the others are compared with; added where rules lacks it.")
    batches: int = key(8, "Batches of rollouts on which every rule's gradient is taken.", ge=2)
    reference_batches: int = key(16, "Further batches, from which the reference gradient is averaged.", ge=2)
    reward_batches: int = key(2, "Batches on which per_reward rules are also split by reward; 0 splits none.", ge=0)
    run: str = key("", 'Folder of a run whose stored rollouts are used; "" samples new ones.')
    step: int = key(0, "With run: the policy is the checkpoint of this step, the rollouts are later ones.", ge=0)
    fresh: bool = key(False, "With run: sample new rollouts from that checkpoint instead of reading stored ones.")
    shown_groups: int = key(6, "Groups of the first batch whose tokens lab.html shows.", ge=0)
    out: str = key("", 'Folder for lab.json and lab.html; "" is <output_dir>/<name>-lab.')

    def __post_init__(self) -> None:
        check(self, "lab")
        require(bool(self.rules), "lab.rules is empty: name at least one, for example lab.rules=[causal]")
        require(
            bool(self.run) or not (self.step or self.fresh), "lab.step and lab.fresh need lab.run: name a run folder"
        )


@dataclass(frozen=True)
class LabConfig(TrainConfig):
    """A training configuration with what the laboratory measures. Nothing is trained."""

    lab: LabOptions = field(default_factory=LabOptions)


def rules_of(config: LabConfig) -> dict[str, AlgorithmConfig]:
    """Return every rule to measure, by name, the one that the others are compared with first.

    An entry of conf/algorithm sets the keys that it names; what else makes a rule has its default, and ratios and clips
    are as configured. KL and entropy terms are left out: they do not depend on credit.

    Raises:
        ConfigError: there is no such entry, or it changes how responses are scored.
    """
    names = dict.fromkeys([config.lab.against, *config.lab.rules])
    options = sorted(
        entry.name.removesuffix(".yaml")
        for entry in resources.files("conf").joinpath("algorithm").iterdir()
        if entry.name.endswith(".yaml")
    )
    defaults = {each.name: each.default for each in fields(AlgorithmConfig) if each.name in RULE_KEYS}
    found = {}
    for name in names:
        values: dict[str, Any] = {}
        if name != CONFIGURED:
            require(
                name in options,
                f"lab.rules: there is no entry {name!r} in conf/algorithm{nearest(name, options)} "
                f"It has {', '.join(options)}; {CONFIGURED} is `algorithm` as given",
            )
            text = resources.files("conf").joinpath("algorithm", f"{name}.yaml").read_text(encoding="utf-8")
            values = defaults | yaml.safe_load(text)
        require(
            "missing_marker" not in values,
            f"lab.rules: {name} sets algorithm.missing_marker, which is applied when responses are scored, before any "
            "rule. Set algorithm.missing_marker for the whole measurement",
        )
        found[name] = replace(config.algorithm, **values, kl_coef=0.0, entropy_coef=0.0, updates_per_step=1)
    return found
