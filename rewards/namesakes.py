"""Files of a user that have the name of one of our packages: find them, and load a module from one of them.

A `rewards.py` in the folder where a program is started is the usual case. Standard library only.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import ModuleType

PACKAGES = ("rsgrpo", "recipes", "rewards", "rollout", "conf")
ROOT = Path(__file__).resolve().parents[1]
PREFIX = "user_"
"""A module of a user's own `rewards.py` is known as `user_rewards`, because its own name is taken."""


def namesakes(folder: Path) -> list[Path]:
    """Return the files and folders directly in `folder` that have the name of one of our packages, ours left out."""
    found = [path for name in PACKAGES for path in (folder / f"{name}.py", folder / name) if path.exists()]
    return [path for path in found if path.resolve().parent != ROOT and not (path / "rsgrpo" / "train.py").is_file()]


def import_with_namesakes(module_name: str, name: str, folder: Path) -> ModuleType:
    """Import a module; one of ours that lacks `name` gives way to the user's of the same name in `folder`."""
    if module_name.partition(".")[0] not in PACKAGES:
        return importlib.import_module(module_name)
    try:
        ours = importlib.import_module(module_name)
    except ModuleNotFoundError:
        own = _import_own(module_name, folder)
        if own is None:
            raise
        return own
    return ours if hasattr(ours, name) else _import_own(module_name, folder) or ours


def _import_own(module_name: str, folder: Path) -> ModuleType | None:
    """Import `rewards` from the user's rewards.py or rewards/__init__.py, `rewards.mine` from rewards/mine.py."""
    top, _, rest = module_name.partition(".")
    file, package = folder / f"{top}.py", folder / top
    if not {file, package} & set(namesakes(folder)):
        return None
    if rest and (package / Path(*rest.split("."))).with_suffix(".py").is_file():
        _load(PREFIX + top, package / "__init__.py", package)
        return importlib.import_module(f"{PREFIX}{top}.{rest}")
    if not rest and file.is_file():
        return _load(PREFIX + top, file, None)
    return _load(PREFIX + top, package / "__init__.py", package) if not rest and package.is_dir() else None


def _load(alias: str, file: Path, package: Path | None) -> ModuleType:
    """Return the module `alias`, executed from a file once; a package may have no such file."""
    if alias not in sys.modules:
        loader = SourceFileLoader(alias, str(file)) if file.is_file() else None
        spec = ModuleSpec(alias, loader, origin=str(file), is_package=package is not None)
        if package is not None:
            spec.submodule_search_locations = [str(package)]
        spec.has_location = loader is not None
        module = sys.modules[alias] = importlib.util.module_from_spec(spec)
        try:
            if loader is not None:
                loader.exec_module(module)
        except BaseException:
            del sys.modules[alias]
            raise
    return sys.modules[alias]
