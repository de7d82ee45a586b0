"""Marking, loading, binding and checking a reward function."""

from __future__ import annotations

import asyncio
import doctest
import importlib
import inspect
import math
import pickle
import re
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest

import rewards.api
import rewards.evisrag
import rewards.text
from rewards.api import (
    Credit,
    Response,
    RewardError,
    Span,
    between,
    bind_reward,
    check_score,
    load_reward,
    reward,
    whole,
)
from tests.material import ROOT


@reward(scope=between("<evidence>", "</evidence>"))
def cites_page(response: Response) -> float | None:
    """1.0 when the gold page is cited in the evidence; None when the row has no gold page."""
    if "page" not in response.truth:
        return None
    return float(f"[{response.truth['page']}]" in response.text)


@reward
async def judge(response: Response, *, threshold: int, scale: float = 1.0) -> float:
    return scale * (len(response.text) > threshold)


def write_module(folder, monkeypatch, name: str, source: str) -> None:
    (folder / f"{name}.py").write_text(source)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))  # what loading appends is gone after the test
    importlib.invalidate_caches()
    monkeypatch.delitem(sys.modules, name, raising=False)


def test_a_marked_function_is_still_the_function():
    good = Response("<evidence>[2]: 16%</evidence>", truth={"page": 2})
    assert cites_page(good) == 1.0
    assert cites_page(Response("<evidence>[1]: 16%</evidence>", truth={"page": 2})) == 0.0
    assert cites_page(Response("x")) is None
    assert cites_page.name == "cites_page"
    assert (cites_page.__doc__ or "").startswith("1.0 when")
    assert cites_page.scope(good) == Span(0, 18)


def test_a_reward_without_scope_teaches_the_whole_response():
    assert judge.scope is whole
    assert [judge.scope(Response(text)) for text in ("abc", "")] == [Span(0, 3), Span(0, 0)]


def test_an_async_reward_is_awaited_by_its_caller():
    assert inspect.iscoroutinefunction(judge)
    assert asyncio.run(bind_reward(judge, {"threshold": 2, "scale": 0.5})(Response("abc"))) == 0.5


@pytest.mark.parametrize(
    ("start", "end", "text", "scope"),
    [
        ("<t>", "</t>", "ab<t>cd</t>ef", (2, 7)),  # start tag inside, end tag outside
        (None, "<t>", "ab<t>cd", (0, 2)),
        ("<t>", None, "ab<t>cd", (2, 7)),
        (None, None, "ab", (0, 2)),
        ("<t>", "</t>", "<t><t>x</t></t>", (0, 7)),  # nested: the first of each
        ("<t>", "</t>", "<t>1</t><t>2</t>", (0, 4)),  # repeated: the first of each
        ("<t>", "</t>", "</t><t>x</t>", None),  # the first end comes before the first start
        ("<t>", "</t>", "ab<t>cd", None),  # truncated
        ("<t>", "</t>", "ab</t", None),
        ("<t>", None, "", None),
        (None, "<t>", "<t>", (0, 0)),
        ("<t>", "</t>", "é日本\r\n<t>🙂</t>", (5, 9)),  # characters, not bytes
    ],
)
def test_between_takes_the_first_occurrence_of_each_marker(start, end, text, scope):
    assert between(start, end)(Response(text)) == (None if scope is None else Span(*scope))


@pytest.mark.parametrize(("start", "end"), [("", "x"), ("x", ""), ("x", "x")])
def test_between_refuses_markers_that_bound_nothing(start, end):
    with pytest.raises(RewardError, match="two different, non-empty"):
        between(start, end)


def test_only_a_function_of_a_response_can_be_marked():
    for wrong, message in (
        (3, "above a function"),
        (lambda: 1.0, "first argument"),
        (lambda *, response: 1.0, "first"),
    ):
        with pytest.raises(RewardError, match=message):
            reward(wrong)  # type: ignore[arg-type]
    with pytest.raises(RewardError, match="takes a function of the response"):
        reward(scope="<think>")  # type: ignore[call-overload]


def test_a_scope_can_be_any_function_of_the_response():
    @reward(scope=lambda response: Span(0, 1) if response.text else None)
    def first_character(response):
        return 1.0

    assert first_character.scope(Response("abc")) == Span(0, 1)
    assert first_character.scope(Response("")) is None


def test_rewards_load_by_name_also_from_the_current_directory(tmp_path, monkeypatch):
    source = "from rewards.api import reward\n@reward\ndef one(response, *, value=1.0):\n    return value\n"
    package = tmp_path / "my_rewards_pkg"
    package.mkdir()
    write_module(package, monkeypatch, "pages", source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    loaded = load_reward("my_rewards_pkg.pages:one", {"value": 0.25})
    assert loaded(Response("")) == 0.25
    assert loaded.name == "one"
    assert load_reward("rewards.evisrag:accuracy") is rewards.evisrag.accuracy


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("rewards.evisrag.accuracy", "named module:function"),
        (":accuracy", "named module:function"),
        ("rewards.evisrag:", "named module:function"),
        ("rewards/evisrag.py:accuracy", "Name the module instead: rewards.evisrag:accuracy"),
        ("no_such_package.x:f", "no module 'no_such_package'"),
        ("rewards.evisrg:accuracy", "no module 'rewards.evisrg'"),
        ("rewards.evisrag:acuracy", "did you mean accuracy"),
        ("rewards.text:set_f2", "did you mean set_f1"),
        ("rewards.evisrag:zzz", "Its rewards are abstained, accuracy"),
        ("rewards.evisrag:slot_score", "Write @reward"),
        ("rewards.evisrag:NO_EVIDENCE", "Write @reward"),
    ],
)
def test_a_reward_that_cannot_be_loaded_says_why(target, message):
    with pytest.raises(RewardError, match=message):
        load_reward(target)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import a_library_nobody_has", "No module named 'a_library_nobody_has'"),
        ("def f(:", "SyntaxError"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
    ],
)
def test_a_module_that_fails_to_import_says_why(tmp_path, monkeypatch, source, message):
    write_module(tmp_path, monkeypatch, "broken_rewards", source)
    with pytest.raises(RewardError, match=f"importing 'broken_rewards' failed: .*{message}"):
        load_reward("broken_rewards:f")


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (rewards.evisrag.overlong, {"max_token": 5}, "'overlong' takes no argument 'max_token'; did you mean 'max_tok"),
        (rewards.evisrag.well_formed, {"x": 1}, "It takes none"),
        (judge, {"response": 1, "threshold": 1}, "no argument 'response'"),
        (judge, {"scale": 2.0}, "needs the argument"),
    ],
)
def test_arguments_are_checked_when_they_are_bound(function, arguments, message):
    with pytest.raises(RewardError, match=message):
        bind_reward(function, arguments)


def test_a_bound_reward_keeps_name_and_scope_and_travels_to_another_process():
    bound = load_reward("rewards.evisrag:accuracy", {"normalise": "strict"})
    response = Response("<think></think><answer>12.5</answer>", {"answers": ["125"]})
    for copy in (bound, pickle.loads(pickle.dumps(bound))):
        assert copy.name == "accuracy"
        assert copy.scope(response) == Span(0, len(response.text))
        assert copy(response) == 0.0
    assert rewards.evisrag.accuracy(response) == 1.0


def test_any_keyword_is_accepted_by_a_function_that_takes_any():
    @reward
    def flexible(response, **options):
        return options["level"]

    assert bind_reward(flexible, {"level": 0.5})(Response("")) == 0.5


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        (1, 1.0),
        (True, 1.0),
        (False, 0.0),
        (-0.5, -0.5),
        (Fraction(1, 4), 0.25),
        (np.float32(0.5), 0.5),
        (np.float64(0.5), 0.5),
        ([], None),
        ([Credit("a", True, Span(0, 2)), Credit("b", 2, None)], (Credit("a", 1.0, Span(0, 2)), Credit("b", 2.0, None))),
    ],
)
def test_a_valid_result_becomes_a_float_or_credits(value, expected):
    checked = check_score(value)
    assert checked == expected
    assert type(checked) is type(expected)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (math.nan, "must be finite, got nan"),
        (math.inf, "must be finite, got inf"),
        (-math.inf, "must be finite, got -inf"),
        ("0.5", "got str '0.5'"),
        (np.ones(2), "got ndarray"),
        ({"score": 1}, "got dict"),
        ([0.5, 0.5], "return Credit"),
        ([("key", 0.5, None)], "return Credit"),
        ([Credit("a", math.nan, None)], "must be finite"),
        ([Credit("a", "1", None)], "got str"),  # type: ignore[arg-type]
        ([Credit(1, 1.0, None)], "must be a string"),  # type: ignore[arg-type]
        ([Credit("a", 1.0, (0, 2))], "Credit.span must be Span"),  # type: ignore[arg-type]
        ([Credit("a", 1.0, Span(2, 1))], "0 <= start <= end"),
        ([Credit("a", 1.0, Span(-1, 1))], "0 <= start <= end"),
        ([Credit("a", 1.0, Span(0, 6))], "0 <= start <= end <= 5"),
    ],
)
def test_an_invalid_result_is_named(value, message):
    with pytest.raises(RewardError, match=message):
        check_score(value, num_chars=5)


def test_a_forgotten_await_is_named():
    coroutine = judge(Response(""), threshold=1)
    with pytest.raises(RewardError, match="Await it"):
        check_score(coroutine)
    coroutine.close()


def test_the_rewards_room_needs_only_the_standard_library():
    code = (
        "import sys; before = set(sys.modules); import rewards.evisrag, rewards.__main__; "
        "roots = {name.split('.')[0] for name in set(sys.modules) - before}; "
        "print(sorted(roots - sys.stdlib_module_names - {'rewards'}))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


def test_the_examples_of_the_documentation_run():
    text = (ROOT / "docs" / "howto" / "rewards.md").read_text()
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, names)
    names["test_cites_page"]()  # type: ignore[operator]
    slots = Response("<evidence>\n[1]: 16\n[2]: a long line\n</evidence>")
    credits = check_score(bind_reward(names["short_lines"], {"max_chars": 7})(slots))  # type: ignore[arg-type]
    assert credits == (Credit("slot1", 1.0, Span(11, 18)), Credit("slot2", 0.0, Span(19, 35)))
    assert asyncio.run(names["sound_reasoning"](slots)) == 1.0  # type: ignore[operator]


@pytest.mark.parametrize("module", ["rewards.api", "rewards.text", "rewards.evisrag", "rewards.__main__"])
def test_examples_in_docstrings_hold(module):
    results = doctest.testmod(importlib.import_module(module))
    assert results.attempted > 0
    assert results.failed == 0
