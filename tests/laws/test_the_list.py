"""docs/laws.md names every file of this folder, and only files that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_law_names_the_tests_that_hold_it():
    rows = [line for line in (ROOT / "docs" / "laws.md").read_text().splitlines() if re.match(r"\| \d+ \|", line)]
    named = [set(re.findall(r"`(tests/[\w/]+\.py)`", row)) for row in rows]
    assert len(rows) >= 10
    assert all(named)
    assert [path for path in sorted(set.union(*named)) if not (ROOT / path).is_file()] == []
    here = {path.relative_to(ROOT).as_posix() for path in Path(__file__).parent.glob("test_[0-9]*.py")}
    assert here <= set.union(*named)
