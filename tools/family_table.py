"""Run every law over every model family, and write what passed into the table of docs/howto/model_family.md.

python tools/family_table.py
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "howto" / "model_family.md"
BEGIN, END = "<!-- table: python tools/family_table.py -->", "<!-- end of table -->"
SUITE = (
    "tests/rollout/families/test_families.py",
    "tests/rollout/families/test_videos.py",
    "tests/laws/test_06_engine_equals_learner.py",
)
LAWS = {
    "test_shared_equals_plain": "shared row",
    "test_lora_gradients_equal_those_of_separate_rows": "LoRA",
    "test_text_only_rows_beside_image_rows_in_one_step_are_as_if_alone": "mixed rows",
    "test_micro_batches_and_recomputed_layers_do_not_matter": "micro-batches",
    "test_a_checkpoint_resumes_exactly": "checkpoint",
    "test_the_learner_trains_it_and_its_export_loads_and_has_the_hubs_names": "export",
    "test_the_embedded_engine_follows_an_update": "engine",
    "test_the_gate_finds_engine_and_learner_equal_and_that_images_matter": "gate",
    "test_the_plan_counts_the_parameters_of_the_folder": "plan",
    "test_an_image_becomes_as_many_tokens_as_transformers_processor_makes_of_it": "resize",
    "test_a_prompt_may_hold_no_token_of_an_image_or_of_a_turn": "tokens",
    "test_a_shared_row_equals_transformers_own_forward_of_each_response": "videos",
}


def main() -> None:
    """Run the suite and rewrite the table."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *SUITE]
        subprocess.run(command, cwd=ROOT, check=False)
        page = PAGE.read_text(encoding="utf-8")
        before, after = page.split(BEGIN)[0], page.split(END)[1]
        table = "\n".join(table_of(ET.parse(report).getroot()))
        PAGE.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")


def table_of(report: ET.Element) -> list[str]:
    """Return the rows of the table from pytest's report: how many cases of each law passed for each family."""
    from rollout.families import FAMILIES

    passed: dict[tuple[str, str], int] = defaultdict(int)
    failed = set()
    for case in report.iter("testcase"):
        test, _, parameters = case.attrib["name"].partition("[")
        family = next((part for part in re.split(r"[-\]]", parameters) if part in FAMILIES), None)
        if family is None or test not in LAWS:
            continue
        if any(child.tag in ("failure", "error") for child in case):
            failed.add((family, LAWS[test]))
        elif not any(child.tag == "skipped" for child in case):
            passed[family, LAWS[test]] += 1

    def cell(family: str, law: str) -> str:
        return "**fails**" if (family, law) in failed else f"✓ {passed[family, law]}" if passed[family, law] else "-"

    laws = list(LAWS.values())
    rows = [["family", *laws], ["---"] * (len(laws) + 1)]
    rows += [[f"`{family}`", *(cell(family, law) for law in laws)] for family in FAMILIES]
    return [f"| {' | '.join(row)} |" for row in rows]


if __name__ == "__main__":
    main()
