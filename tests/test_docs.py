"""Pages that cannot lie about names: links, headings, programs, recipes and files that they mention exist."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
GROUPS = ("algorithm", "cluster", "learner", "rollout", "tracking")
USERS_OWN = {"NAME", "mine", "invoices"}


def anchor(heading: str) -> str:
    """Return the fragment that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def anchors(page: Path) -> set[str]:
    return {anchor(heading) for heading in re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)}


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_to_files_and_headings_that_exist(page):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"(https?|mailto):", target):
            continue
        path, _, fragment = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (fragment and file.suffix == ".md" and fragment not in anchors(file)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_programs_and_options_that_pages_show_exist(page):
    text = page.read_text(encoding="utf-8")
    programs = set(re.findall(r"python -m ((?:rsgrpo|recipes|rewards|rollout|benchmarks)[\w.]*)", text))
    assert {name for name in programs if importlib.util.find_spec(name.rstrip(".")) is None} == set()
    recipes = set(re.findall(r"\brecipe=([a-z][\w]*)", text))
    known = {path.stem for path in (ROOT / "conf").rglob("recipe/*.yaml")}
    assert recipes - known - USERS_OWN == set()
    for group in GROUPS:
        options = set(re.findall(rf"(?<![\w.]){group}=([a-z]\w*)", text))
        assert options - {path.stem for path in (ROOT / "conf" / group).glob("*.yaml")} == set(), group


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_files_that_pages_name_exist(page):
    text = page.read_text(encoding="utf-8")
    folders = "rsgrpo|rollout|rewards|recipes|tests|tools|benchmarks|docs|conf"
    paths = re.findall(rf"`((?:{folders})/[\w./]+\.(?:py|md|yaml|txt))(?::[\w:]+)?`", text)
    assert {path for path in paths if "NAME" not in path and not (ROOT / path).exists()} == set()


PARTS = "(?:algorithm|checkpoint|cluster|data|export|gate|guards|inputs|learner|model|plan|prompt|rollout|tracking)"
KEYS = set(re.findall(r"`([a-z_]+\.[\w.]+)`", (ROOT / "docs/reference/configuration.md").read_text(encoding="utf-8")))


def is_key(name: str) -> bool:
    """Whether a key, an entry of a map (`cluster.cpus.learner`) or a Python name (`rollout.types.Prompt`) exists."""
    parents = {name.rsplit(".", count)[0] for count in range(name.count("."))}
    is_python = name.startswith("rollout.") and importlib.util.find_spec(".".join(name.split(".")[:2])) is not None
    return bool(parents & KEYS) or is_python


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=named)
def test_keys_that_pages_name_exist(page):
    text = page.read_text(encoding="utf-8")
    names = set(re.findall(rf"(?<![\w/.:])({PARTS}\.[a-z_][\w.]*\w)(?=[`=])", text))
    files = {name for name in names if name.endswith((".py", ".md", ".json", ".jsonl", ".txt"))}
    assert {name for name in names - files if not is_key(name)} == set()
