"""Rewards written for other trainers, used as they are: verl, EasyR1, TRL and verifiers.

Each adapter is a reward that takes the other function as an argument:

    +rewards.mine=rewards.adapters:verl +reward_args.mine.function=my_rewards:compute_score

Its scope is the whole response. For a narrower one, call the function from a reward of your own. Standard library only.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from numbers import Real
from typing import Any

from rewards.api import Response, RewardError, reward
from rewards.loading import import_user_module


@reward
def verl(response: Response, *, function: str, data_source: str = "", key: str = "score") -> Any:
    """Score by verl's `compute_score(data_source, solution_str, ground_truth, extra_info)`: a number or a dictionary.

    data_source: what the function is told where the row has no such column. key: of the score in a dictionary.
    """
    given = {
        "data_source": response.truth.get("data_source") or data_source,
        "solution_str": response.text,
        "ground_truth": gold_of(response),
        "extra_info": response.truth.get("extra_info") or {},
    }
    return _number(_call(_loaded(function), given), key)


@reward
def easyr1(response: Response, *, function: str, key: str = "overall") -> Any:
    """Score by EasyR1's `compute_score`, in any of its forms: of one response or of a batch, by text or by mapping.

    key: of the score in the dictionary that it returns.
    """
    called = _loaded(function)
    one = {"response": response.text, "response_length": response.num_tokens, "ground_truth": gold_of(response)}
    batch = {"reward_inputs": [one], "predicts": [response.text], "ground_truths": [one["ground_truth"]]}
    single = {"reward_input": one, "predict": response.text, "ground_truth": one["ground_truth"]}
    return _number(_first(_call(called, batch | single)), key)


@reward
def trl(response: Response, *, function: str, conversational: bool = False) -> Any:
    """Score by TRL's `f(completions, **columns)`, which returns a list of scores; the gold columns are `columns`.

    conversational: the function expects completions as lists of messages, not as texts.
    """
    completion: Any = [{"role": "assistant", "content": response.text}] if conversational else response.text
    prompt: Any = [{"role": "user", "content": response.question}] if conversational else response.question
    columns = {name: [value] for name, value in response.truth.items()}
    given = {"prompts": [prompt], "completions": [completion], "solution": [gold_of(response)]} | columns
    value = _call(_loaded(function), given)
    return _first_of(value) if inspect.isawaitable(value) else _first(value)


@reward
def verifiers(response: Response, *, function: str) -> Any:
    """Score by a reward function of verifiers: any of prompt, completion, answer, state, info and task."""
    messages = [{"role": "assistant", "content": response.text}]
    given = {
        "prompt": [{"role": "user", "content": response.question}],
        "completion": messages,
        "answer": gold_of(response),
        "state": {"completion": messages, "answer": gold_of(response)},
        "info": dict(response.truth),
        "task": str(response.truth.get("task", "default")),
    }
    return _call(_loaded(function), given)


def gold_of(response: Response) -> Any:
    """Return the gold as other trainers know it: the row's ground_truth, its answer as written, or its first answer."""
    truth = response.truth
    answers = truth.get("answers") or [""]
    return next((truth[name] for name in ("ground_truth", "gold") if truth.get(name) is not None), answers[0])


def _loaded(target: str) -> Callable[..., Any]:
    module_name, _, name = target.partition(":")
    if not module_name or not name:
        raise RewardError(f"function must be module:function, such as my_rewards:compute_score, got {target!r}")
    function: Callable[..., Any] | None = getattr(import_user_module(module_name, name), name, None)
    if not callable(function):
        raise RewardError(f"function={target}: the module '{module_name}' has no function '{name}'")
    return function


def _call(function: Callable[..., Any], given: Mapping[str, Any]) -> Any:
    """Call a function with those of the values that it takes, by name."""
    parameters = inspect.signature(function).parameters.values()
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    names = {parameter.name for parameter in parameters}
    return function(**{name: value for name, value in given.items() if takes_any or name in names})


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, Sequence) and not isinstance(value, str) and value else value


async def _first_of(values: Awaitable[Any]) -> Any:
    return _first(await values)


def _number(value: Any, key: str) -> Any:
    """Return the number itself, or the entry of a dictionary of scores."""
    if isinstance(value, Mapping):
        if not isinstance(value.get(key), Real):
            raise RewardError(f"the function returned no number under {key!r}; it has {', '.join(map(str, value))}")
        return float(value[key])
    return value
