"""The prompt that an exported model was trained with, from the model's folder, so that every program can use it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import yaml

from rsgrpo.config.train import PromptConfig
from rsgrpo.data.prompts import read_template
from rsgrpo.errors import InputError

PROMPT_FILE, SETTINGS_FILE = "prompt.txt", "training_config.yaml"
"""The template, and the run's settings, which have the system message (`rsgrpo.report.model_card` writes both)."""


def fingerprint(prompt: PromptConfig) -> str:
    """Return 16 hexadecimal digits of a prompt's template and system message, whichever file the template is in.

    Raises:
        InputError: the template's file cannot be read.
    """
    text = f"{prompt.system}\0{read_template(prompt).strip()}"
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]


def prompt_of_model(model: str) -> PromptConfig | None:
    """Return the prompt that lies in a model's folder; None where rows had messages of their own.

    Raises:
        InputError: a file cannot be read.
    """
    template, settings = Path(model) / PROMPT_FILE, Path(model) / SETTINGS_FILE
    if not model or not template.is_file() or not settings.is_file():
        return None
    try:
        system = yaml.safe_load(settings.read_text(encoding="utf-8"))["prompt"]["system"]
        return PromptConfig(template=template.read_text(encoding="utf-8"), system=str(system))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError) as error:
        raise InputError(f"the prompt in {model} cannot be read: {type(error).__name__}: {error}") from error
