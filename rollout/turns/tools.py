"""Plain Python functions with type hints as tools, called in the form that chat models of the Qwen family know.

    rollout.turns.environment=rollout.turns.tools:Tools 'rollout.turns.arguments.functions=[my_tools:search]'

A turn calls by `<tool_call>{"name": "search", "arguments": {"query": "..."}}</tool_call>`, once or several times; a
turn without a call ends the episode. `schemas` describes the functions for the prompt.
"""

from __future__ import annotations

import inspect
import json
import pkgutil
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from pydantic import TypeAdapter, ValidationError, validate_call

from rollout.errors import ConfigError, one_line
from rollout.turns.environment import Reply
from rollout.types import ImageSource, Prompt

BAD_CALL = "bad_call"
_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)


class Tools:
    """An environment made of functions.

    A function returns text, JSON values, one image as bytes, a `Reply`, or (text, images).
    """

    stop = ("</tool_call>",)

    def __init__(self, prompt: Prompt, functions: Sequence[str]) -> None:
        """Take the functions that `module:name` names.

        Raises:
            ConfigError: one cannot be loaded, or a parameter has no type hint.
        """
        self._targets = tuple(functions)
        _loaded(self._targets)

    async def step(self, turn: str) -> Reply | None:
        """Run the calls of a turn, in order, and put their results one below the other."""
        calls = _CALL.findall(turn)
        if not calls:
            unfinished = "<tool_call>" in turn
            return _bad("the call is not closed by </tool_call>") if unfinished else None
        replies = [await self._run(call) for call in calls]
        return Reply(
            text="\n".join(f"<tool_response>{reply.text}</tool_response>" for reply in replies),
            images=[image for reply in replies for image in reply.images],
            facts={"calls": [dict(reply.facts) for reply in replies]},
            fault=next((reply.fault for reply in replies if reply.fault), ""),
            ends=any(reply.ends for reply in replies),
        )

    async def _run(self, call: str) -> Reply:
        functions = _loaded(self._targets)
        try:
            parsed = json.loads(call)
            name, arguments = parsed["name"], parsed.get("arguments", {})
            function = functions[name]
        except (ValueError, TypeError, AttributeError):
            return _bad('a call is JSON: {"name": ..., "arguments": {...}}')
        except KeyError as error:
            known = ", ".join(functions)
            return _bad(f"there is no tool {error}; the tools are {known}")
        if not isinstance(arguments, dict):
            return _bad("the arguments are an object: {...}")
        try:
            result = function(**arguments)
        except ValidationError as error:
            wrong = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]
            return _bad(f"{name}: {one_line('; '.join(wrong))}")
        result = await result if inspect.isawaitable(result) else result
        reply = _as_reply(result)
        facts = {"name": name, "arguments": arguments, **reply.facts}
        return Reply(reply.text, reply.images, facts, reply.fault, reply.ends)


def schemas(functions: Sequence[str]) -> list[dict[str, Any]]:
    """Return the functions as OpenAI's tool descriptions, for the prompt: name, docstring, JSON schema of arguments."""
    return [
        {
            "type": "function",
            "function": {
                "name": name,
                "description": inspect.getdoc(function) or "",
                "parameters": _arguments(function).json_schema(),
            },
        }
        for name, function in _plain(tuple(functions)).items()
    ]


def _arguments(function: Any) -> TypeAdapter[Any]:
    return TypeAdapter(function)


def _bad(why: str) -> Reply:
    return Reply(why, facts={"error": why}, fault=BAD_CALL)


def _as_reply(result: Any) -> Reply:
    if isinstance(result, Reply):
        return result
    if isinstance(result, bytes):
        return Reply("<image>", (result,))
    if isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], str):
        images: Sequence[ImageSource] = result[1]
        return Reply(result[0], images)
    return Reply(result if isinstance(result, str) else json.dumps(result, ensure_ascii=False))


@lru_cache(maxsize=16)
def _plain(targets: tuple[str, ...]) -> dict[str, Callable[..., Any]]:
    functions = {}
    for target in targets:
        try:
            function = pkgutil.resolve_name(target)
        except Exception as error:
            raise ConfigError(
                f"the tool {target} cannot be loaded: {type(error).__name__}: {one_line(error)}"
            ) from None
        bare = [name for name, p in inspect.signature(function).parameters.items() if p.annotation is p.empty]
        if bare:
            raise ConfigError(f"the tool {target} has no type hint for {', '.join(bare)}. Add one.")
        functions[function.__name__] = function
    return functions


@lru_cache(maxsize=16)
def _loaded(targets: tuple[str, ...]) -> dict[str, Callable[..., Any]]:
    return {name: validate_call(function) for name, function in _plain(targets).items()}
