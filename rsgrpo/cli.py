"""Turn a command line into one configuration object. The only module that imports hydra and omegaconf.

`run` finds `conf/` wherever the program is started, and turns every user error into one readable message.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import textwrap
import typing
from collections.abc import Callable, Iterator
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any, Literal, NoReturn, TypeVar

import hydra
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError
from yaml import YAMLError

from rollout.errors import INTERRUPTED, leave, run_program
from rollout.keys import Section, nearest, sections
from rsgrpo.config.renamed import RENAMED
from rsgrpo.errors import USER_ERROR, ConfigError, RsgrpoError
from rsgrpo.running.stopping import StopRequested

ConfigT = TypeVar("ConfigT")

SHOWN_KEYS = {"learner": "learner.lr=1e-5 tracking=wandb_offline", "rollout": "prompt=direct rollout=vllm"}
MAX_NAME_CHARS = 120
HELP_COLUMN, HELP_WIDTH = 36, 120
UNREADABLE = (HydraException, OmegaConfBaseException, YAMLError, ValueError, OSError, TypeError, AssertionError)
"""What hydra raises for settings that cannot be read; OSError for a key that no file could be named by, the last two
where a group is given something that is not the name of an option."""
KINDS = {"Float": "a number such as 1e-5", "Integer": "a whole number", "Boolean": "true or false"}


def run(main: Callable[[ConfigT], int | None], schema: type[ConfigT], config_name: str = "config") -> NoReturn:
    """Parse the command line into a `schema` object, call `main` with it and exit with its return value.

    Args:
        main: the program. A returned int is the exit code. A raised `RsgrpoError` is printed without a traceback and
            sets the exit code; HYDRA_FULL_ERROR=1 in the environment shows the traceback. StopRequested exits with 0.
        schema: dataclass with a default for every key.
        config_name: "config" reads `conf/config.yaml`, any other NAME `conf/NAME/config.yaml`.
    """
    if {"--help", "-h"} & set(sys.argv[1:]):
        wanted = [argument for argument in sys.argv[1:] if "=" not in argument and not argument.startswith("-")]
        sys.exit(run_program(lambda: print(help_text(schema, config_name, *wanted[:1]))))
    # The sweep flag may be anywhere; hydra's parser wants it after the overrides.
    arguments = sorted(sys.argv[1:], key=lambda argument: argument in ("-m", "--multirun"))
    sys.argv[1:] = [entry for argument in arguments for entry in _entries(argument, schema)]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname).1s %(name)s: %(message)s")
    _store_schema(schema)
    full_trace = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # lets errors reach us instead of being printed and swallowed
    started = False

    def fail(error: Exception, code: int) -> NoReturn:
        if full_trace:
            raise error
        print(f"error: {explain(error, schema, config_name, sys.argv[1:])}", file=sys.stderr)
        leave(code)

    def task(node: DictConfig) -> None:
        nonlocal started
        try:
            config = _to_object(node, schema)
        except (RsgrpoError, OmegaConfBaseException, ValueError) as error:
            fail(error, USER_ERROR)
        started = True
        try:
            exit_code = main(config)
        except StopRequested:  # already reported; exit handlers would wait for workers that the signal killed
            leave(0, at_once=True)
        except KeyboardInterrupt:
            print("Stopped.", file=sys.stderr)
            leave(INTERRUPTED)
        except RsgrpoError as error:
            fail(error, error.exit_code)
        if exit_code:
            leave(exit_code)

    try:
        hydra.main(version_base="1.3", config_path=f"pkg://{_package(config_name)}", config_name="config")(task)()
    except UNREADABLE as error:
        if started:
            raise
        fail(error, USER_ERROR)
    leave(0)


def _to_object(node: DictConfig, schema: type[ConfigT]) -> ConfigT:
    """Turn a composed configuration into its dataclass; each run of a sweep gets its own name."""
    config: Any = _built(schema, OmegaConf.to_container(node, resolve=True))
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        job = HydraConfig.get()
        left_out = job.job.config.override_dirname.exclude_keys
        settings = [setting for setting in job.overrides.task if setting.partition("=")[0].lstrip("+~") not in left_out]
        config = dataclasses.replace(config, name=job_name(config.name, varying(settings, sys.argv[1:])))
    return typing.cast(ConfigT, config)


def varying(settings: typing.Sequence[str], arguments: typing.Sequence[str]) -> list[str]:
    """Return those settings of a job, "key=value", whose key the command line gives several values; all if none."""
    keys_of_several = {
        argument.partition("=")[0].lstrip("+~")
        for argument in arguments
        if re.search(r"=.*(,|\b(range|choice|glob|interval)\()", argument)
    }
    return [one for one in settings if one.partition("=")[0].lstrip("+~") in keys_of_several] or list(settings)


def job_name(name: str, settings: typing.Sequence[str]) -> str:
    """Return the run name of one job of a sweep, which can be typed unquoted; one that is too long ends in a digest.

    >>> job_name("demo", ["seed=1", "learner.lr=1e-5"])
    'demo-seed-1-lr-1e-5'
    """
    pairs = [setting.lstrip("+~").partition("=")[::2] for setting in settings]
    ends = [key.rpartition(".")[2] for key, _ in pairs]
    labels = [f"{end if ends.count(end) == 1 else key}-{value}" for end, (key, value) in zip(ends, pairs, strict=True)]
    full = re.sub(r"[^\w.+-]+", "_", "-".join([name, *labels])).rstrip("-")
    if len(full) <= MAX_NAME_CHARS:
        return full
    digest = hashlib.sha256(" ".join(settings).encode()).hexdigest()[:8]
    return f"{full[: MAX_NAME_CHARS - len(digest) - 1]}-{digest}"


def compose(schema: type[ConfigT], config_name: str = "config", overrides: typing.Sequence[str] = ()) -> ConfigT:
    """Return the configuration that `overrides` give, for notebooks and tests.

    Raises:
        RsgrpoError: a setting is wrong.
        HydraException: an override names no key or no option.
    """
    _store_schema(schema)
    with hydra.initialize_config_module(_package(config_name), version_base="1.3"):
        node = hydra.compose("config", [entry for override in overrides for entry in _entries(override, schema)])
        return _to_object(node, schema)


def compose_or_explain(schema: type[ConfigT], config_name: str, overrides: typing.Sequence[str]) -> ConfigT:
    """Return what `compose` does; what is wrong with an override becomes one message.

    Raises:
        ConfigError: the overrides cannot be used.
    """
    try:
        return compose(schema, config_name, overrides)
    except UNREADABLE as error:
        raise ConfigError(explain(error, schema, config_name, overrides)) from error


def explain(error: Exception, schema: type, config_name: str = "config", arguments: typing.Sequence[str] = ()) -> str:
    """Return one message that names the key as `arguments` write it, the value and the nearest valid one."""
    text = str(error).strip()
    if isinstance(error, RsgrpoError):
        return text
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options is not None:
        group, _, option = error.missing_cfg_file.rpartition("/")
        options = sorted({*groups(schema, config_name).get(group, []), *error.options})
        return f"{group}={option}: there is no such {group}{nearest(option, options)} Choose {', '.join(options)}."
    if isinstance(error, OverrideParseException):
        reason = text.splitlines()[0]
        return f"cannot read {error.override!r}: {reason}. Write key=value, with quotes around special characters."
    if isinstance(error, OSError):  # hydra looks for a file that is named like the key
        return f"{max(arguments, key=len, default='')[:60]}...: there is no such key. `--help` shows all keys"
    if isinstance(error, TypeError | AssertionError):
        fix = "Give a group the name of an option, such as learner=gpu"
        return f"the settings cannot be read ({text or 'hydra refuses them'}). {fix}"
    required = re.match(r"You must specify '([\w/]+)'", text)
    if required:
        group = required[1]
        options = groups(schema, config_name).get(group, [])
        return f"{group} is missing. Choose one of {', '.join(options)}, for example {group}={_easiest(options)}."
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OmegaConfBaseException):
        cause = cause.__cause__ or cause.__context__
    return text if cause is None else _explain_key(cause, text, schema, config_name, arguments)


def _explain_key(
    cause: OmegaConfBaseException, text: str, schema: type, config_name: str, arguments: typing.Sequence[str]
) -> str:
    found = str(cause.full_key or cause.key or "")
    # For an unknown a.b.c the error may name only a, or treat a as a value.
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
        return f"{key} cannot be removed with ~. Set it to another value."
    if key in RENAMED:
        return f"{key} {RENAMED[key]}{where}"
    last = key.rpartition(".")[2]
    same_end = [name for name in known if name.rpartition(".")[2] == last]
    close = f"; did you mean {same_end[0]}?" if same_end else nearest(key, known)
    return f"{key}: there is no such key{close or '.'} `--help` shows all keys{where}"


def keys(schema: type) -> Iterator[str]:
    """Yield every dotted key of a dataclass, including its parts."""
    for section in sections(schema):
        if section.path:
            yield section.path
        yield from map(section.name, section.keys)


def groups(schema: type, config_name: str = "config") -> dict[str, list[str]]:
    """Return the groups of `conf/` that this program takes, each with its options; `recipe` comes first."""
    fields = {field.name for field in dataclasses.fields(schema)}
    own = resources.files(_package(config_name))
    options = {"recipe": _options(own / "recipe") + _options(own / "model" / "recipe")}
    folders = sorted(resources.files("conf").iterdir(), key=lambda entry: entry.name)
    options |= {folder.name: _options(folder) for folder in folders if folder.name in fields}
    return {group: sorted(names) for group, names in options.items()}


def _options(folder: Traversable) -> list[str]:
    """Return the names of the yaml files in a folder; none where there is no folder."""
    files = folder.iterdir() if folder.is_dir() else ()
    return [file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml")]


def help_text(schema: type, config_name: str = "config", part: str = "") -> str:
    """Return what `--help` prints; with the path of a part, such as "learner", only the keys of that part.

    Raises:
        ConfigError: there is no such part.
    """
    parts = list(sections(schema))
    if part:
        found = [section for section in parts if f"{section.path}.".startswith(f"{part}.")]
        if not found:
            raise ConfigError(f"--help {part}: there is no such part{nearest(part, [one.path for one in parts])}")
        return "\n\n".join(map(_section_help, found))
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"python -m {spec.name.removesuffix('.__main__')}" if spec else f"python {sys.argv[0]}"
    all_groups = groups(schema, config_name)
    width = max(map(len, all_groups))
    run = f"{program} recipe={_easiest(all_groups['recipe'])}"
    example = next((shown for group, shown in SHOWN_KEYS.items() if group in all_groups), "lr=1e-5")
    options = "\n".join(f"  {group:<{width}}  {', '.join(names)}" for group, names in all_groups.items())
    return f"""usage: {program} recipe=RECIPE [group=option ...] [key=value ...]

Groups and their options:
{options}

Keys and their defaults:

{"".join(_section_help(section) + chr(10) * 2 for section in parts)}Examples:
  {run}
  {run} name=first {example}
  {run} seed=1,2,3 --multirun

The keys of one part:       {program} --help {parts[-1].path or "| less"}
All values of a run:        {run} --cfg job
Your own yaml files:        --config-dir FOLDER (with recipe/NAME.yaml in it)"""


def _section_help(section: Section) -> str:
    width = max(80, min(HELP_WIDTH, shutil.get_terminal_size((HELP_WIDTH, 24)).columns))
    lines = [f"{section.path}: {section.about}" if section.path else section.about]
    for field, about in section.keys.items():
        name = f"  {section.name(field)}={about.shown_default}"
        text = about.help + (f" ({about.bounds})" if about.bounds else "")
        if len(name) >= HELP_COLUMN:
            lines.append(name)
            name = ""
        indent = " " * HELP_COLUMN
        lines += textwrap.wrap(
            text, width, initial_indent=name.ljust(HELP_COLUMN), subsequent_indent=indent, break_on_hyphens=False
        )
    return "\n".join(lines)


def _easiest(options: list[str]) -> str:
    return min(options, key=lambda option: "demo" not in option)


def _package(config_name: str) -> str:
    return "conf" if config_name == "config" else f"conf.{config_name}"


class RecipesOfModels(SearchPathPlugin):
    """Lets hydra also find a program's recipes in `model/recipe`, which change little but the model.

    A search path of the user's own (`hydra.searchpath`) replaces the one of a configuration, but not this.
    """

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for element in list(search_path.get_path()):
            package = element.path.removeprefix("pkg://")
            is_ours = element.provider == "main" and package.partition(".")[0] == "conf"
            if is_ours and (resources.files(package) / "model" / "recipe").is_dir():
                search_path.append("rsgrpo", f"pkg://{package}.model")


def _store_schema(schema: type) -> None:
    Plugins.instance().register(RecipesOfModels)
    ConfigStore.instance().store(name="_schema_", node=OmegaConf.structured(_loose(schema)))


def _loose(schema: type) -> type:
    """Return a twin of a dataclass that omegaconf can fill: not frozen, not checked, without Literal."""
    hints: dict[str, Any] = typing.get_type_hints(schema)
    twins: list[tuple[str, Any, Any]] = []
    for field in dataclasses.fields(schema):
        hint, default = hints[field.name], field.default
        factory: Any = field.default_factory
        if typing.get_origin(hint) is Literal:
            hint = type(typing.get_args(hint)[0])
        elif dataclasses.is_dataclass(hint):
            hint = factory = _loose(typing.cast(type, hint))
        made: Any = {"default": default} if default is not dataclasses.MISSING else {"default_factory": factory}
        twins.append((field.name, hint, dataclasses.field(**made)))
    return dataclasses.make_dataclass(schema.__name__, twins)


def _built(schema: type, values: Any) -> Any:
    """Return the dataclass with these values, which checks them."""
    hints = typing.get_type_hints(schema)
    parts = {
        name: _built(hints[name], value) for name, value in values.items() if dataclasses.is_dataclass(hints[name])
    }
    return schema(**values | parts)


def _entries(argument: str, schema: type) -> list[str]:
    """Let `rewards.name=...` and `+rewards.name=...` both add to a flat map, but no `+` create a key elsewhere.

    A whole map, `rewards={name: ...}`, becomes one such argument per entry: hydra refuses entries that are not there.
    """
    match = re.match(r"\+*(?P<key>[A-Za-z_][\w.]*)=", argument)
    if not match or match["key"].startswith("hydra."):
        return [argument]
    maps = [
        part.name(name) for part in sections(schema) for name, key in part.keys.items() if isinstance(key.default, dict)
    ]
    key = match["key"]
    holds_map = key in maps or ("." in key and any(name.startswith(f"{key}.") for name in maps))
    if holds_map and (entries := _map_of(argument.lstrip("+"))):
        parts = [f"{key}.{name}={_as_override(value)}" for name, value in entries.items()]
        return [entry for part in parts for entry in _entries(part, schema)]
    in_map = any(key.startswith(prefix + ".") for prefix in maps)
    return [("++" if in_map else "") + argument.lstrip("+")]


def _map_of(argument: str) -> dict[str, Any]:
    """Return the map that an override sets; {} for any other value, and for what hydra cannot read and will name."""
    try:
        override = OverridesParser.create().parse_override(argument)
        value = None if override.is_sweep_override() else override.value()
    except OverrideParseException:
        return {}
    return value if isinstance(value, dict) else {}


def _as_override(value: Any) -> str:
    """Return a value as hydra's grammar writes it."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{name}:{_as_override(entry)}" for name, entry in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_as_override, value)) + "]"
    return QuotedString(value, Quote.single).with_quotes() if isinstance(value, str) else json.dumps(value)
