"""Plain functions as tools: what a call does, and what the policy is told when it is wrong."""

from __future__ import annotations

import asyncio
import inspect
import pickle
from typing import Any

import pytest

from rollout.errors import ConfigError
from rollout.turns.environment import Reply
from rollout.turns.probe import PROBE, Probe
from rollout.turns.tools import Tools, schemas
from rollout.types import Prompt

HERE = "tests.rollout.turns.test_tools"
FUNCTIONS = [f"{HERE}:{name}" for name in ("search", "open_page", "finish", "add")]


def search(query: str, limit: int = 2) -> list[str]:
    """Find pages."""
    return [f"{query} {index}" for index in range(limit)]


async def open_page(number: int) -> tuple[str, list[str]]:
    return f"page {number}: <image>", [f"{number}.png"]


def finish(answer: str) -> Reply:
    return Reply(facts={"answer": answer}, ends=True)


def add(a: int, b: int) -> int:
    return a + b


def bare(query) -> str:
    return query


def step(turn):
    return asyncio.run(Tools(Prompt("p", "?"), FUNCTIONS).step(turn))


def call(text):
    return step(f"I look. <tool_call>{text}</tool_call>")


def test_calls_run_in_order_and_their_results_come_together():
    reply = step(
        '<tool_call>{"name": "search", "arguments": {"query": "sum", "limit": "1"}}</tool_call>'
        '<tool_call>{"name": "open_page", "arguments": {"number": 3}}</tool_call>'
    )
    assert reply.text == '<tool_response>["sum 0"]</tool_response>\n<tool_response>page 3: <image></tool_response>'
    assert (list(reply.images), reply.fault, reply.ends) == (["3.png"], "", False)
    assert [fact["name"] for fact in reply.facts["calls"]] == ["search", "open_page"]


def test_a_turn_without_a_call_ends_the_episode_and_so_may_a_tool():
    assert step("The answer is 7.") is None
    reply = call('{"name": "finish", "arguments": {"answer": "7"}}')
    assert reply.ends
    assert reply.facts["calls"][0]["answer"] == "7"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("search(total)", "a call is JSON"),
        ('["search"]', "a call is JSON"),
        ('{"name": "find"}', "there is no tool 'find'; the tools are search, open_page, finish, add"),
        ('{"name": "search", "arguments": ["sum"]}', "the arguments are an object"),
        ('{"name": "search", "arguments": {"q": "sum"}}', "search: query: Missing required argument; q: Unexpected"),
        ('{"name": "add", "arguments": {"a": 1, "b": "x"}}', "add: b: Input should be a valid integer"),
    ],
)
def test_a_wrong_call_is_answered_with_what_is_wrong(text, said):
    reply = call(text)
    assert reply.fault == "bad_call"
    assert said in reply.text


def test_a_call_that_is_not_closed_is_a_wrong_call():
    assert step('<tool_call>{"name": "search"').fault == "bad_call"


@pytest.mark.parametrize(
    "made",
    [
        Tools(Prompt("p", "?"), FUNCTIONS),
        Probe(Prompt("p", "?", truth={PROBE: [("1.png",), ("2.png", "3.png")]})),
    ],
    ids=lambda made: type(made).__name__,
)
def test_an_episode_that_was_pickled_between_two_turns_goes_on(made):
    turn = '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>'

    def answer(environment):
        reply: Any = environment.step(turn)
        return asyncio.run(reply) if inspect.iscoroutine(reply) else reply

    answer(made)
    thawed = pickle.loads(pickle.dumps(made))
    expected = answer(made)
    assert expected is not None
    assert answer(thawed) == expected


def test_schemas_describe_the_functions_for_a_prompt():
    first = schemas(FUNCTIONS)[0]["function"]
    assert (first["name"], first["description"]) == ("search", "Find pages.")
    assert first["parameters"]["required"] == ["query"]
    assert first["parameters"]["properties"]["limit"] == {"default": 2, "title": "Limit", "type": "integer"}


def test_a_function_without_hints_and_one_that_does_not_exist_are_refused():
    with pytest.raises(ConfigError, match="no type hint for query"):
        Tools(Prompt("p", "?"), [f"{HERE}:bare"])
    with pytest.raises(ConfigError, match="cannot be loaded: AttributeError"):
        Tools(Prompt("p", "?"), [f"{HERE}:nothing"])
