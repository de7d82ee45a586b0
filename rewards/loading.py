"""Find the reward that a configuration names as `module:function`, and bind its arguments."""

from __future__ import annotations

import difflib
import functools
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from rewards.namesakes import PACKAGES, import_with_namesakes
from rewards.types import Reward, RewardError

FOREIGN: Sequence[tuple[str, frozenset[str]]] = (
    ("verl", frozenset({"solution_str", "ground_truth"})),
    ("easyr1", frozenset({"reward_input"})),
    ("easyr1", frozenset({"reward_inputs"})),
    ("easyr1", frozenset({"predict", "ground_truth"})),
    ("easyr1", frozenset({"predicts", "ground_truths"})),
    ("trl", frozenset({"completions"})),
    ("verifiers", frozenset({"completion"})),
)
"""A function of `rewards.adapters`, and parameters by which rewards of its kind are known."""


def load_reward(target: str, arguments: Mapping[str, Any] | None = None) -> Reward:
    """Import the reward that `module:function` names and bind its keyword arguments.

    The module may be dotted; it is looked up on the Python path and in the current directory.

    Raises:
        RewardError: bad syntax, no such module or function, not decorated, or arguments it does not take.
    """
    module_name, colon, name = target.partition(":")
    if not colon or not module_name or not name:
        raise RewardError(f"a reward is named module:function, such as rewards.evisrag:accuracy, got {target!r}")
    if "/" in module_name or module_name.endswith(".py"):
        dotted = module_name.removesuffix(".py").strip("./").replace("/", ".")
        raise RewardError(f"{target!r} names a file. Name the module instead: {dotted}:{name}")
    module = import_user_module(module_name, name)
    shipped = sorted(key for key, value in vars(module).items() if _is_marked(value))
    if not hasattr(module, name):
        near = difflib.get_close_matches(name, shipped or list(vars(module)), n=3)
        hint = f"; did you mean {' or '.join(near)}? " if near else ". "
        rewards_there = (
            f"Its rewards are {', '.join(shipped)}." if shipped else "No function there is marked by @reward."
        )
        if module_name in PACKAGES and module.__name__ == module_name:
            rewards_there = (
                f"This is rsgrpo's own package, and {os.getcwd()} has no {module_name}.py of yours. Start from its "
                "folder, as `python -P -m ...`."
            )
        raise RewardError(f"'{module_name}' has no '{name}'{hint}{rewards_there}")
    function = getattr(module, name)
    if not _is_marked(function):
        if adapter := adapter_for(function):
            raise RewardError(f"'{target}' is a reward of {adapter}'s kind. {_use(adapter, target)}")
        raise RewardError(
            f"'{target}' is not a reward. Write @reward(scope=...) above it (from rewards.api import reward)."
        )
    return bind_reward(function, arguments or {})


def adapter_for(function: object) -> str:
    """Return the function of `rewards.adapters` that fits another trainer's reward, by its parameters; "" if none."""
    names = set(inspect.signature(function).parameters) if inspect.isfunction(function) else set()
    return next((adapter for adapter, wanted in FOREIGN if wanted <= names), "")


def _use(adapter: str, target: str) -> str:
    return (
        f"Use it through an adapter: rewards.NAME=rewards.adapters:{adapter} reward_args.NAME.function={target} (on "
        f'own: python -m rewards rewards.adapters:{adapter} FILE --args \'{{"function": "{target}"}}\').'
    )


def _is_marked(value: object) -> bool:
    return callable(value) and callable(getattr(value, "scope", None)) and isinstance(getattr(value, "name", None), str)


def import_user_module(module_name: str, name: str) -> ModuleType:
    """Import the module of a `module:name`, the current directory included.

    A module of ours that lacks the name gives way to the user's own in the current directory: `rewards:mine` is found
    in a `rewards.py` there.

    Raises:
        RewardError: it cannot be imported; the text names the cause.
    """
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return import_with_namesakes(module_name, name, Path.cwd())
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if missing and (module_name + ".").startswith(missing + "."):
            raise RewardError(
                f"no module '{missing}' for '{module_name}:{name}'. Start from the folder that contains it "
                f"(now {os.getcwd()}), or put that folder on PYTHONPATH."
            ) from error
        taken = missing.partition(".")[0] in PACKAGES
        fix = "rsgrpo has a package of that name: rename yours." if taken else "Install what it imports."
        raise RewardError(f"importing '{module_name}' failed: {error}. {fix}") from error
    except Exception as error:
        raise RewardError(f"importing '{module_name}' failed: {type(error).__name__}: {error}") from error


def bind_reward(function: Reward, arguments: Mapping[str, Any]) -> Reward:
    """Return the reward with keyword arguments filled in (`reward_args` of a run); scope and name stay.

    Raises:
        RewardError: an argument that the function does not take, or a required one that is missing.
    """
    parameters = list(inspect.signature(function).parameters.values())[1:]
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    response_name = response_parameter(function)
    for key in arguments:
        if key == response_name or (key not in names and not takes_any):
            near = difflib.get_close_matches(str(key), names, n=1)
            hint = f"did you mean '{near[0]}'? " if near else ""
            has = f"It takes {', '.join(names)}." if names else "It takes none."
            raise RewardError(f"reward '{function.name}' takes no argument '{key}'; {hint}{has}")
    required = [p.name for p in parameters if p.name in names and p.default is p.empty and p.name not in arguments]
    if required:
        if adapter := adapter_for(function):
            target = f"{function.__module__}:{function.name}"
            raise RewardError(
                f"reward '{function.name}' is of {adapter}'s kind: take @reward away. {_use(adapter, target)}"
            )
        raise RewardError(
            f"reward '{function.name}' needs the arguments {', '.join(required)}. Set them in reward_args."
        )
    if not arguments:
        return function
    bound = cast(Reward, functools.partial(function, **arguments))
    for attribute in ("name", "scope", "determined", "short", "leading"):
        setattr(bound, attribute, getattr(function, attribute))
    return bound


def response_parameter(function: Callable[..., Any]) -> str | None:
    """Return the name of the parameter that takes the response; None if there is no positional one."""
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD, parameter.VAR_POSITIONAL):
            return parameter.name
        return None
    return None
