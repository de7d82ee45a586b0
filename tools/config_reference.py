"""Write the "All keys" section of docs/reference/configuration.md from the keys that the configuration classes declare.

Run it after a key was added or changed: `python tools/config_reference.py` (`make format` does). A test compares.
"""

from __future__ import annotations

from pathlib import Path

from recipes.evaluate import EvaluateConfig
from recipes.retrieval.training.config import RetrieverConfig
from rollout.keys import Section, sections
from rsgrpo.config.train import SftConfig, TrainConfig
from rsgrpo.lab.config import LabConfig
from rsgrpo.plan.config import PlanConfig

DOCUMENT = Path(__file__).parent.parent / "docs" / "reference" / "configuration.md"
HEADING = "## All keys\n"
PROGRAMS = {
    "rsgrpo.train": TrainConfig,
    "recipes.sft": SftConfig,
    "rsgrpo.plan": PlanConfig,
    "rsgrpo.lab": LabConfig,
    "recipes.evaluate": EvaluateConfig,
    "recipes.train_retriever": RetrieverConfig,
}


def document(text: str) -> str:
    """Return the document with a fresh section of keys at its end; keys of an earlier program are not repeated."""
    parts, seen = [], set[tuple[str, str]]()
    for program, schema in PROGRAMS.items():
        shown = [_table(section, seen) for section in sections(schema)]
        parts += [f"\n### `{program}`\n", *shown]
    return text.partition(HEADING)[0] + HEADING + "".join(parts)


def _table(section: Section, seen: set[tuple[str, str]]) -> str:
    rows = []
    for field, about in section.keys.items():
        name = section.name(field)
        if (name, about.help) not in seen:
            seen.add((name, about.help))
            default = about.shown_default.replace("|", "\\|")
            rows.append(f"| `{name}` | `{default}` | {about.bounds} | {about.help} |\n")
    if not rows:
        return ""
    head = f"\n**`{section.path}`.** {section.about}\n" if section.path else f"\n{section.about}\n"
    return f"{head}\n| key | default | allowed | meaning |\n|---|---|---|---|\n{''.join(rows)}"


if __name__ == "__main__":
    DOCUMENT.write_text(document(DOCUMENT.read_text()))
