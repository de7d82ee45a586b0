"""From a command line to one configuration object. The only module that knows hydra and omegaconf.

`run` finds `conf/` wherever the program is started, and turns every mistake of the user into one readable message.
Knows nothing of what the program does.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import os
import re
import sys
import typing
from collections.abc import Callable, Iterator
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any, NoReturn, TypeVar

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from rsgrpo.errors import RsgrpoError

ConfigT = TypeVar("ConfigT")

USER_ERROR = 2
RUN_ERROR = 1


def run(main: Callable[[ConfigT], int | None], schema: type[ConfigT], config_name: str = "config") -> NoReturn:
    """Parse the command line into a `schema` object, call `main` with it and exit with its return value.

    Args:
        main: the program. A returned int is the exit code; a raised `RsgrpoError` is printed, and the code is 1.
        schema: dataclass with a default for every key.
        config_name: "config" reads `conf/config.yaml`, any other NAME `conf/NAME/config.yaml`.
    """
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(help_text(schema, config_name))
        sys.exit(0)
    sys.argv[1:] = [_map_entry(argument, schema) for argument in sys.argv[1:]]
    ConfigStore.instance().store(name="_schema_", node=schema)
    exit_code = 0

    def task(node: DictConfig) -> None:
        nonlocal exit_code
        config = to_object(node)
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname).1s %(name)s: %(message)s")
        try:
            exit_code = main(config) or 0
        except RsgrpoError as error:
            _fail(str(error), RUN_ERROR)
        if exit_code:
            sys.exit(exit_code)

    package = "pkg://conf" if config_name == "config" else f"pkg://conf.{config_name}"
    full_trace = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # lets errors reach us instead of being printed and swallowed
    try:
        hydra.main(version_base="1.3", config_path=package, config_name="config")(task)()
    except (HydraException, OmegaConfBaseException, RsgrpoError, ValueError) as error:
        if full_trace or not isinstance(error, HydraException | OmegaConfBaseException | RsgrpoError):
            raise
        _fail(explain(error, schema, config_name), USER_ERROR)
    sys.exit(exit_code)


def to_object(node: DictConfig) -> Any:
    """Turn a composed configuration into its dataclass; runs of a sweep get names of their own."""
    config: Any = OmegaConf.to_object(node)
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        swept = re.sub(r"[^\w.=,+-]+", "_", HydraConfig.get().job.override_dirname)
        config = dataclasses.replace(config, name=f"{config.name}-{swept or HydraConfig.get().job.num}"[:120])
    return config


def compose(schema: type[ConfigT], config_name: str = "config", overrides: typing.Sequence[str] = ()) -> ConfigT:
    """Return the configuration that `overrides` give, for notebooks and tests.

    Raises:
        RsgrpoError: a setting is wrong.
        HydraException: an override names no key or no option.
    """
    ConfigStore.instance().store(name="_schema_", node=schema)
    package = "conf" if config_name == "config" else f"conf.{config_name}"
    with hydra.initialize_config_module(package, version_base="1.3"):
        node = hydra.compose("config", [_map_entry(override, schema) for override in overrides])
        return typing.cast(ConfigT, OmegaConf.to_object(node))


def explain(error: Exception, schema: type, config_name: str = "config") -> str:
    """Return one message that names the key, the value and the nearest valid one."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options is not None:
        group, _, option = error.missing_cfg_file.rpartition("/")
        options = groups(schema, config_name).get(group) or sorted(set(error.options))
        return f"{group}={option}: there is no such {group}; {_nearest(option, options)}{', '.join(options)}"
    cause = _omegaconf_cause(error)
    text = str(error).strip()
    required = re.match(r"You must specify '([\w/]+)'", text)
    if required:
        group = required[1]
        options = groups(schema, config_name).get(group, [])
        return f"{group} is missing: choose one, for example {group}={options[0]} (there are {', '.join(options)})"
    if cause is None:
        return text
    key = str(cause.full_key or cause.key or "")
    where = _source(text)
    if isinstance(cause, ValidationError):
        return f"{key}: {_first_line(cause)}{where}"
    known = [*keys(schema), *groups(schema, config_name)]
    return f"{key}: there is no such key; {_nearest(key, known)}`--cfg job` shows all keys{where}"


def keys(schema: type, prefix: str = "") -> Iterator[str]:
    """Yield every dotted key of a dataclass."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        yield prefix + field.name
        if dataclasses.is_dataclass(hints[field.name]):
            yield from keys(typing.cast(type, hints[field.name]), f"{prefix}{field.name}.")


def groups(schema: type, config_name: str = "config") -> dict[str, list[str]]:
    """Return the groups of `conf/` that this program takes, each with its options; `recipe` comes first."""
    own = resources.files("conf") if config_name == "config" else resources.files(f"conf.{config_name}")
    found = {"recipe": _options(own / "recipe")}
    fields = {field.name for field in dataclasses.fields(schema)}
    for folder in sorted(resources.files("conf").iterdir(), key=lambda entry: entry.name):
        if folder.name in fields and folder.is_dir():
            found[folder.name] = _options(folder)
    return found


def help_text(schema: type, config_name: str = "config") -> str:
    """Return what `--help` prints."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"python -m {spec.name}" if spec else f"python {sys.argv[0]}"
    found = groups(schema, config_name)
    width = max(map(len, found))
    recipe = found["recipe"][0]
    lines = [f"  {group:<{width}}  {', '.join(options)}" for group, options in found.items()]
    return "\n".join(
        [
            f"usage: {program} recipe=RECIPE [group=option ...] [key=value ...]",
            "",
            "Groups and their options:",
            *lines,
            "",
            "Examples:",
            f"  {program} recipe={recipe}",
            f"  {program} recipe={recipe} name=first learner.lr=1e-5 tracking=wandb_offline",
            f"  {program} recipe={recipe} seed=1,2,3 --multirun",
            "",
            "All keys and their values:  " + f"{program} recipe={recipe} --cfg job",
            "Your own yaml files:        --config-dir FOLDER (with recipe/NAME.yaml in it)",
            "What the keys mean:         docs/configuration.md",
        ]
    )


def _options(folder: Traversable) -> list[str]:
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def _map_entry(argument: str, schema: type) -> str:
    """Let `rewards.name=...` and `+rewards.name=...` both add to a flat map, or replace what is there."""
    match = re.match(r"\+?(?P<key>[A-Za-z_][\w.]*)=", argument)
    if match and any(match["key"].startswith(prefix + ".") for prefix in _flat_maps(schema)):
        return "++" + argument.lstrip("+")
    return argument


def _flat_maps(schema: type) -> list[str]:
    found = []
    for key in keys(schema):
        holder: Any = schema
        for part in key.split("."):
            holder = typing.get_type_hints(holder)[part]
        if typing.get_origin(holder) is dict:
            found.append(key)
    return found


def _omegaconf_cause(error: BaseException | None) -> OmegaConfBaseException | None:
    while error is not None:
        if isinstance(error, OmegaConfBaseException):
            return error
        error = error.__cause__ or error.__context__
    return None


def _nearest(word: str, known: typing.Iterable[str]) -> str:
    """Say which known key or option comes closest, also when only its last part was written."""
    names = list(known)
    best = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if not best:
        last = word.rpartition(".")[2]
        best = [name for name in names if name.rpartition(".")[2] == last][:1]
    return f"did you mean {best[0]}? " if best else ""


def _source(message: str) -> str:
    match = re.match(r"In '([^']+)'", message)
    return f" (in conf/{match[1]}.yaml)" if match and not match[1].startswith("structured") else ""


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def _fail(message: str, code: int) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)
