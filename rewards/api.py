"""All that a reward author needs: a response, a span of its text, and one decorator."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import os
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, Protocol, cast, overload

from rewards.namesakes import PACKAGES, import_with_namesakes

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

_NO_TRUTH: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Span:
    """Half-open range of characters of `Response.text`: `text[start:end]`."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a response, and what an environment answered to it.

    span: its characters of `Response.text`.
    observation: the answer's text, with one `<image>` at the position of each image; "" where none followed.
    images: of the answer, as paths or compressed bytes.
    facts: what the environment noted about the turn.
    fault: one word for why it could not do what the turn asked for; "" where it did.
    """

    span: Span
    observation: str = ""
    images: Sequence[str | bytes] = ()
    facts: Mapping[str, Any] = field(default_factory=lambda: _NO_TRUTH)
    fault: str = ""


@dataclass(frozen=True, slots=True)
class Response:
    """One sampled answer, as a reward sees it.

    text: decoded response, without the end-of-text token. With an environment, the policy's own words of all turns, a
        line break between them; what the environment wrote is in `turns` alone, where no reward can mistake it.
    truth: the row's gold columns; `answers` (list of str) and `evidence` (list of str, one per image) where given.
    num_tokens: response tokens, end-of-text included.
    truncated: True when sampling stopped at the token limit instead of at end-of-text.
    question: the question as the data set states it.
    images: the page images, as paths or compressed bytes, for judges that look at them.
    turns: of a sampled response at least one; empty where a response was made by hand from its text.
    """

    text: str
    truth: Mapping[str, Any] = field(default_factory=lambda: _NO_TRUTH)
    num_tokens: int = 0
    truncated: bool = False
    question: str = ""
    images: Sequence[str | bytes] = ()
    turns: Sequence[Turn] = ()


@dataclass(frozen=True, slots=True)
class Credit:
    """One score on one span; a reward that returns several teaches each span its own score.

    key: scores with the same key are compared across the group (e.g. "slot1").
    span: the characters it teaches; None teaches nothing, but the score still counts in the group's mean.
    determined: the character after which the score cannot change any more (`algorithm.credit=causal` teaches everything
        before it); None is the end of `span`, and of the response where there is no span.
    """

    key: str
    score: float
    span: Span | None
    determined: int | None = None


Score = float | None | Sequence[Credit]
Scope = Callable[[Response], "Span | None"]
Determined = Callable[[Response], "int | None"]
RewardFunction = Callable[..., "Score | Awaitable[Score]"]


class RewardError(ValueError):
    """A reward cannot be loaded, configured or used; the text says what to change."""


class Reward(Protocol):
    """A function that `@reward` has marked: call it with a response, ask it for the characters it may teach."""

    name: str
    scope: Scope
    short: str
    leading: bool
    determined: Determined | None

    def __call__(self, response: Response, /, **arguments: Any) -> Any:
        """Return the score: a number, None (did not apply) or several credits; an awaitable of that if async."""


@dataclass(frozen=True, slots=True)
class Between:
    """The scope from the first `start` marker to the first `end` marker; None is the start or the end of the text."""

    start: str | None
    end: str | None

    def __post_init__(self) -> None:
        """Refuse markers that cannot bound anything."""
        if "" in (self.start, self.end) or (self.start is not None and self.start == self.end):
            raise RewardError(
                f"between({self.start!r}, {self.end!r}): markers must be two different, non-empty strings. "
                "Use None for the start or the end of the text."
            )

    def __call__(self, response: Response) -> Span | None:
        """Return the span, the start marker inside and the end marker outside; None if a marker is missing."""
        start = 0 if self.start is None else response.text.find(self.start)
        end = len(response.text) if self.end is None else response.text.find(self.end)
        return Span(start, end) if 0 <= start <= end else None


def between(start: str | None, end: str | None) -> Between:
    """Return the scope between two markers, found in characters: the first occurrence of each in the whole text.

    The start marker is inside the scope, the end marker outside. A missing marker, or an end marker that comes before
    the start marker, gives None: the scope is missed, and `algorithm.missing_marker` decides what that means.

    >>> between("<think>", None)(Response("<observe></observe><think>so"))
    Span(start=19, end=28)
    """
    return Between(start, end)


whole = between(None, None)
"""The scope of a reward that teaches every token of the response."""


@dataclass(frozen=True, slots=True)
class Closed:
    """The character at which the last of several blocks is closed; None while one of them is not.

    markers: (start, end) of each block. A block is closed by the first end marker behind its first start marker.
    """

    markers: tuple[tuple[str, str], ...]

    def __call__(self, response: Response) -> int | None:
        """Return the character behind the last end marker; None if a block is not opened or not closed."""
        ends = []
        for start, end in self.markers:
            opened = response.text.find(start)
            closed = response.text.find(end, opened + len(start)) if opened >= 0 else -1
            if closed < 0:
                return None
            ends.append(closed + len(end))
        return max(ends)


def closed(*markers: tuple[str, str]) -> Closed:
    """Return where a reward that reads the named blocks is determined: once the last of them is closed.

    A block that is never closed leaves the reward undetermined until the response ends.

    >>> closed(("<answer>", "</answer>"))(Response("<answer>7</answer> and more"))
    18
    """
    return Closed(markers)


@overload
def reward(function: RewardFunction, /) -> Reward: ...
@overload
def reward(
    *, scope: Scope = whole, determined: Determined | None = None, short: str = "", leading: bool = False
) -> Callable[[RewardFunction], Reward]: ...
def reward(
    function: RewardFunction | None = None,
    /,
    *,
    scope: Scope = whole,
    determined: Determined | None = None,
    short: str = "",
    leading: bool = False,
) -> Reward | Callable[[RewardFunction], Reward]:
    """Mark a function of one response as a reward: it stays the same function and gains the attributes of `Reward`.

    Args:
        function: the function, where the decorator is written without parentheses.
        scope: the characters the reward may teach; `between(...)`, `whole`, or any function Response -> Span | None.
        determined: where the score is decided, as a function Response -> character, such as `closed(...)`; None is the
            end of the scope. Read by `algorithm.credit=causal` alone.
        short: an abbreviation for narrow places such as the console's line; "" is the name in the run's configuration.
        leading: whether displays with little room show this reward before others.

    Raises:
        RewardError: the decorated object is not a function of one response, or `scope` is not callable.
    """

    def mark(function: RewardFunction) -> Reward:
        if not inspect.isfunction(function):
            raise RewardError(f"@reward goes above a function, got {function!r}")
        if _response_parameter(function) is None:
            raise RewardError(f"@reward: '{function.__name__}' must take the response as its first argument")
        marked = cast(Reward, function)
        marked.name, marked.scope, marked.determined = function.__name__, scope, determined
        marked.short, marked.leading = short, leading
        return marked

    if not callable(scope):
        raise RewardError(f"@reward(scope=...) takes a function of the response, such as between(...), got {scope!r}")
    if determined is not None and not callable(determined):
        raise RewardError(
            f"@reward(determined=...) takes a function of the response, such as closed(...), got {determined!r}"
        )
    return mark if function is None else mark(function)


def _response_parameter(function: Callable[..., Any]) -> str | None:
    """Return the name of the parameter that takes the response; None if there is no positional one."""
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD, parameter.VAR_POSITIONAL):
            return parameter.name
        return None
    return None


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
    response_name = _response_parameter(function)
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


def check_score(value: object, num_chars: int | None = None) -> float | tuple[Credit, ...] | None:
    """Return a reward's result as a float, None or a tuple of credits.

    A bool counts as 0.0 or 1.0; an empty list of credits as None.

    Args:
        value: the (awaited) return value.
        num_chars: length of the response's text, to check that spans lie inside it, too.

    Raises:
        RewardError: a score is not a finite number, or a credit is malformed.
    """
    if value is None:
        return None
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return tuple(_check_credit(credit, num_chars) for credit in value) or None
    return _check_number(value)


def _check_number(value: object) -> float:
    if inspect.isawaitable(value):
        raise RewardError("the reward returned an awaitable inside its result. Await it.")
    if not isinstance(value, Real):
        raise RewardError(
            f"a score must be a number, None or a list of Credit, got {type(value).__name__} {str(value)[:80]!r}. "
            "Return float(...)."
        )
    number = float(value)
    if not math.isfinite(number):
        raise RewardError(f"a score must be finite, got {number}. Return None where the reward does not apply.")
    return number


def _check_credit(credit: object, num_chars: int | None) -> Credit:
    if not isinstance(credit, Credit):
        raise RewardError(f"a reward with several scores must return Credit(key, score, span), got {credit!r:.80}")
    if not isinstance(credit.key, str):
        raise RewardError(f"Credit.key must be a string, got {credit.key!r}")
    score, span = _check_number(credit.score), credit.span
    if span is not None:
        if not isinstance(span, Span):
            raise RewardError(f"Credit.span must be Span(start, end) or None, got {span!r}")
        if not 0 <= span.start <= span.end or (num_chars is not None and span.end > num_chars):
            limit = "" if num_chars is None else f" <= {num_chars}"
            raise RewardError(f"credit '{credit.key}': a span needs 0 <= start <= end{limit}, got {span}")
    where = credit.determined
    if where is not None and not (isinstance(where, int) and 0 <= where <= (where if num_chars is None else num_chars)):
        raise RewardError(
            f"credit '{credit.key}': determined must be a character of the response, 0 to {num_chars}, or None; "
            f"got {where!r}"
        )
    return Credit(credit.key, score, span, where)
