"""Fill the templates in the `assets` of a package: HTML and SVG with every value escaped, and Markdown.

A page extends `base.html` (style, header, and a content policy that allows nothing from outside); other packages may
add templates of their own.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

PACKAGE = "rsgrpo.report"


def render(name: str, /, *, package: str = PACKAGE, **values: Any) -> str:
    """Fill a template of a package's `assets` folder; text in .html and .svg files is escaped.

    The templates may include and extend those of `rsgrpo.report`, and call `asset(name)` for a file as it is.
    """
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader([_loader(package), _loader(PACKAGE)]),
        autoescape=jinja2.select_autoescape(("html", "svg")),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["cell"] = lambda text: text.replace("|", "\\|").replace("\n", " ")  # of a Markdown table
    environment.globals["asset"] = lambda name: Markup(asset(name))
    return environment.get_template(name).render(**values)


def asset(name: str, package: str = PACKAGE) -> str:
    """Return a text file of a package's `assets` folder."""
    return resources.files(package).joinpath("assets", name).read_text(encoding="utf-8")


def script_hash(script: str) -> str:
    """Return a script's SHA-256 as a content policy writes it."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def json_for_script(value: Any) -> Markup:
    """Return a value as JSON that can stand inside a script element; NaN and infinities become null."""
    text = json.dumps(_finite(value), allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _loader(package: str) -> jinja2.BaseLoader:
    def load(name: str) -> str | None:
        return asset(name, package) if resources.files(package).joinpath("assets", name).is_file() else None

    return jinja2.FunctionLoader(load)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
