"""From a command line to one configuration object. The only module that knows hydra and omegaconf.

`run` finds `conf/` wherever the program is started, and turns every mistake of the user into one readable message.
Knows nothing of what the program does.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
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
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError
from yaml import YAMLError

from rsgrpo.config.limits import nearest
from rsgrpo.errors import USER_ERROR, RsgrpoError
from rsgrpo.stopping import StopRequested

ConfigT = TypeVar("ConfigT")

SHOWN_KEYS = {"learner": "learner.lr=1e-5 tracking=wandb_offline", "rollout": "prompt=direct rollout=vllm"}
MAX_NAME_CHARS = 120
INTERRUPTED = 130
KINDS = {"Float": "a number such as 1e-5", "Integer": "a whole number", "Boolean": "true or false"}


def run(main: Callable[[ConfigT], int | None], schema: type[ConfigT], config_name: str = "config") -> NoReturn:
    """Parse the command line into a `schema` object, call `main` with it and exit with its return value.

    Args:
        main: the program. A returned int is the exit code. A raised `RsgrpoError` is printed without a trace; the code
            is then the error's own. HYDRA_FULL_ERROR=1 in the environment shows the trace. StopRequested gives 0.
        schema: dataclass with a default for every key.
        config_name: "config" reads `conf/config.yaml`, any other NAME `conf/NAME/config.yaml`.
    """
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(help_text(schema, config_name))
        sys.exit(0)
    # The sweep flag may stand anywhere; the parser below wants it behind the overrides.
    arguments = sorted(sys.argv[1:], key=lambda argument: argument in ("-m", "--multirun"))
    sys.argv[1:] = [_entry(argument, schema) for argument in arguments]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname).1s %(name)s: %(message)s")
    _store_schema(schema)
    full_trace = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # lets errors reach us instead of being printed and swallowed
    started = False

    def fail(error: Exception, code: int) -> NoReturn:
        if full_trace:
            raise error
        print(f"error: {explain(error, schema, config_name, sys.argv[1:])}", file=sys.stderr)
        sys.exit(code)

    def task(node: DictConfig) -> None:
        nonlocal started
        try:
            config = _to_object(node)
        except (RsgrpoError, OmegaConfBaseException, ValueError) as error:
            fail(error, USER_ERROR)
        started = True
        try:
            exit_code = main(config)
        except StopRequested:  # the program has said so; exit handlers would wait for what the signal took as well
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
        except KeyboardInterrupt:
            print("stopped at once", file=sys.stderr)
            sys.exit(INTERRUPTED)
        except RsgrpoError as error:
            fail(error, error.exit_code)
        if exit_code:
            sys.exit(exit_code)

    try:
        hydra.main(version_base="1.3", config_path=f"pkg://{_package(config_name)}", config_name="config")(task)()
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:
        if started:
            raise
        fail(error, USER_ERROR)
    sys.exit(0)


def _to_object(node: DictConfig) -> Any:
    """Turn a composed configuration into its dataclass; runs of a sweep get names of their own."""
    config: Any = OmegaConf.to_object(node)
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        swept = re.sub(r"[^\w.=,+-]+", "_", HydraConfig.get().job.override_dirname)
        config = dataclasses.replace(config, name=job_name(config.name, swept))
    return config


def job_name(name: str, swept: str) -> str:
    """Return the run name of one job of a sweep; where it is too long, a digest keeps two jobs out of one folder."""
    full = f"{name}-{swept}".rstrip("-")
    if len(full) <= MAX_NAME_CHARS:
        return full
    digest = hashlib.sha256(swept.encode()).hexdigest()[:8]
    return f"{full[: MAX_NAME_CHARS - len(digest) - 1]}-{digest}"


def compose(schema: type[ConfigT], config_name: str = "config", overrides: typing.Sequence[str] = ()) -> ConfigT:
    """Return the configuration that `overrides` give, for notebooks and tests.

    Raises:
        RsgrpoError: a setting is wrong.
        HydraException: an override names no key or no option.
    """
    _store_schema(schema)
    with hydra.initialize_config_module(_package(config_name), version_base="1.3"):
        node = hydra.compose("config", [_entry(override, schema) for override in overrides])
        return typing.cast(ConfigT, OmegaConf.to_object(node))


def explain(error: Exception, schema: type, config_name: str = "config", arguments: typing.Sequence[str] = ()) -> str:
    """Return one message that names the key, as `arguments` write it, the value and the nearest valid one."""
    text = str(error).strip()
    if isinstance(error, RsgrpoError):
        return text
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options is not None:
        group, _, option = error.missing_cfg_file.rpartition("/")
        options = sorted({*groups(schema, config_name).get(group, []), *error.options})
        return f"{group}={option}: there is no such {group}{nearest(option, options)} There are {', '.join(options)}"
    if isinstance(error, OverrideParseException):
        reason = text.splitlines()[0]
        return f"cannot read {error.override!r}: {reason}; write key=value, with quotes around special characters"
    required = re.match(r"You must specify '([\w/]+)'", text)
    if required:
        group = required[1]
        options = groups(schema, config_name).get(group, [])
        return (
            f"{group} is missing: choose one, for example {group}={_easiest(options)} (there are {', '.join(options)})"
        )
    cause = _omegaconf_cause(error)
    return text if cause is None else _explain_key(cause, text, schema, config_name, arguments)


def _explain_key(
    cause: OmegaConfBaseException, text: str, schema: type, config_name: str, arguments: typing.Sequence[str]
) -> str:
    found = str(cause.full_key or cause.key or "")
    # Of an unknown a.b.c the error may name only a, or take a for a value.
    written = [argument.lstrip("+~").partition("=")[0] for argument in arguments]
    key = next((name for name in written if name.startswith(f"{found}.")), found)
    source = re.match(r"In '([^']+)'", text)
    where = f" (in {source[1]}.yaml)" if source and "_schema_" not in source[1] else ""
    if isinstance(cause, ValidationError) and key == found:
        first_line = str(cause).strip().splitlines()[0]
        wrong = re.match(r"Value (.+) of type '\w+' could not be converted to (\w+)", first_line)
        if wrong and wrong[2] in KINDS:
            return f"{key} must be {KINDS[wrong[2]]}, got {wrong[1]}{where}"
        return f"{key}: {first_line}{where}"
    known = [*keys(schema), *groups(schema, config_name)]
    if key in known:
        return f"{key} cannot be removed with ~; set it to another value"
    last = key.rpartition(".")[2]
    same_end = [name for name in known if name.rpartition(".")[2] == last]
    close = f"; did you mean {same_end[0]}?" if same_end else nearest(key, known)
    return f"{key}: there is no such key{close or '.'} `--cfg job` shows all keys{where}"


def keys(schema: type, prefix: str = "") -> Iterator[str]:
    """Yield every dotted key of a dataclass."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        yield prefix + field.name
        if dataclasses.is_dataclass(hints[field.name]):
            yield from keys(typing.cast(type, hints[field.name]), f"{prefix}{field.name}.")


def groups(schema: type, config_name: str = "config") -> dict[str, list[str]]:
    """Return the groups of `conf/` that this program takes, each with its options; `recipe` comes first."""
    found = {"recipe": _options(resources.files(_package(config_name)) / "recipe")}
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
    recipe = _easiest(found["recipe"])
    lines = [f"  {group:<{width}}  {', '.join(options)}" for group, options in found.items()]
    keys_shown = next((keys for group, keys in SHOWN_KEYS.items() if group in found), "lr=1e-5")
    return "\n".join(
        [
            f"usage: {program} recipe=RECIPE [group=option ...] [key=value ...]",
            "",
            "Groups and their options:",
            *lines,
            "",
            "Examples:",
            f"  {program} recipe={recipe}",
            f"  {program} recipe={recipe} name=first {keys_shown}",
            f"  {program} recipe={recipe} seed=1,2,3 --multirun",
            "",
            "All keys and their values:  " + f"{program} recipe={recipe} --cfg job",
            "Your own yaml files:        --config-dir FOLDER (with recipe/NAME.yaml in it)",
            "What the keys mean:         docs/reference/configuration.md",
        ]
    )


def _options(folder: Traversable) -> list[str]:
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def _easiest(options: list[str]) -> str:
    return min(options, key=lambda option: "demo" not in option)


def _package(config_name: str) -> str:
    return "conf" if config_name == "config" else f"conf.{config_name}"


def _store_schema(schema: type) -> None:
    node = OmegaConf.structured(schema)
    _thaw(node)
    ConfigStore.instance().store(name="_schema_", node=node)


def _thaw(node: DictConfig) -> None:
    """Let yaml files and overrides fill a frozen dataclass; the object that comes out at the end is frozen again."""
    OmegaConf.set_readonly(node, None)
    for key in node:
        if OmegaConf.is_dict(node[key]):
            _thaw(node[key])


def _entry(argument: str, schema: type) -> str:
    """Let `rewards.name=...` and `+rewards.name=...` both add to a flat map, and no `+` invent a key elsewhere."""
    match = re.match(r"\+*(?P<key>[A-Za-z_][\w.]*)=", argument)
    if not match or match["key"].startswith("hydra."):
        return argument
    in_map = any(match["key"].startswith(prefix + ".") for prefix in _flat_maps(schema))
    return ("++" if in_map else "") + argument.lstrip("+")


@functools.cache
def _flat_maps(schema: type) -> list[str]:
    """Keys that hold a dict, such as `rewards`."""
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
