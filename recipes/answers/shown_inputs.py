"""Show what a model is given for a question: its pages after the resize, tokens per page, and the rendered prompt."""

from __future__ import annotations

import re
from pathlib import Path

from rollout.inputs.images import name_of, read_size
from rollout.inputs.processor import InputProcessor
from rollout.types import Prompt


def show_inputs(prompt: Prompt, processor: InputProcessor, folder: Path | None = None) -> list[str]:
    """Return the lines to print; with a folder, also write the pages as the model sees them, page_1.png and so on.

    Raises:
        PromptError: the prompt cannot be used.
    """
    pages = processor.load_images(prompt)
    tokens = processor.page_tokens(prompt)
    total, limits = processor.count_tokens(prompt), processor.inputs
    lines = []
    for number, (source, page, num_tokens) in enumerate(zip(prompt.images, pages, tokens, strict=True), start=1):
        height, width = read_size(source)
        resized = f"{width} x {height} -> {page.width} x {page.height} pixels"
        lines.append(f"page {number}  {name_of(source)}  {resized}, {num_tokens:,} tokens")
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            page.save(folder / f"page_{number}.png")
    text_tokens = total - sum(tokens)
    state = "over the limit" if total > limits.max_prompt_tokens else "of"
    lines.append(
        f"prompt  {total:,} tokens ({sum(tokens):,} of pages, {text_tokens:,} of text), {state} "
        f"inputs.max_prompt_tokens={limits.max_prompt_tokens:,}; inputs.min_pixels={limits.min_pixels:,}, "
        f"inputs.max_pixels={limits.max_pixels:,}"
    )
    if folder is not None and pages:
        lines.append(f"pages written to {folder}")
    return [*lines, "", _readable(processor.template.prompt(prompt))]


def _readable(rendered: str) -> str:
    """Escape control characters but line breaks and tabs."""
    return re.sub(r"[^\n\t\x20-\x7e\u00a0-\U0010ffff]", lambda found: repr(found[0])[1:-1], rendered)
