"""What a request is made of: text and pages in the order of the prompt's marks.

Pages are sent as training sees them: decoded, resized, as PNG.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

from PIL import Image

from recipes.answers.questions import IMAGE_MARK
from rollout.config import InputsConfig
from rollout.inputs.images import PromptError, decode, read_size, smart_resize
from rollout.types import ImageSource, Prompt

PATCH = 28  # sides of merged vision tokens of the Qwen2-VL family; a server does not resize such images again


def messages_of(prompt: Prompt, inputs: InputsConfig) -> list[dict[str, Any]]:
    """Return a prompt and the turns before it as messages.

    Raises:
        PromptError: a page cannot be read, or there are too many.
    """
    if prompt.videos:
        raise PromptError("videos cannot be sent to an endpoint. Give a model folder, or frames as images.")
    if len(prompt.images) > inputs.max_images:
        raise PromptError(f"the prompt has {len(prompt.images)} images, inputs.max_images is {inputs.max_images}")
    pages = iter([page_url(source, inputs.min_pixels, inputs.max_pixels) for source in prompt.images])
    messages: list[dict[str, Any]] = []
    for asked, answered in prompt.history:
        messages += [{"role": "user", "content": _parts(asked, pages)}, {"role": "assistant", "content": answered}]
    messages.append({"role": "user", "content": _parts(prompt.text, pages)})
    if prompt.system:
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": prompt.system}]})
    return messages


def _parts(text: str, pages: Iterator[str]) -> list[dict[str, Any]]:
    """Return a message's text and pages in the order of its marks."""
    content: list[dict[str, Any]] = []
    for number, piece in enumerate(text.split(IMAGE_MARK)):
        if number:
            content.append({"type": "image_url", "image_url": {"url": next(pages)}})
        if piece:
            content.append({"type": "text", "text": piece})
    return content


def sent_tokens(source: ImageSource, inputs: InputsConfig) -> int:
    """Return one token per 28 x 28 pixels of an image as it is sent, which some servers count otherwise.

    Raises:
        PromptError: it cannot be read.
    """
    height, width = smart_resize(*read_size(source), PATCH, inputs.min_pixels, inputs.max_pixels)
    return height * width // PATCH**2


def page_url(source: ImageSource, min_pixels: int, max_pixels: int) -> str:
    """Return a page as a data URL: decoded and resized as for training, as PNG.

    Raises:
        PromptError: it cannot be read.
    """
    image = decode(source)
    height, width = smart_resize(image.height, image.width, PATCH, min_pixels, max_pixels)
    buffer = io.BytesIO()
    image.resize((width, height), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
