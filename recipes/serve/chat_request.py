"""From the body of a chat completion request to a question and its pages: everything a stranger may send, checked.

Pages are data URLs, or files inside folders that were allowed by name. Nothing is fetched. Knows no HTTP and no engine.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from recipes.answers.questions import IMAGE_MARK, Question, to_prompt
from rollout.inputs.images import PromptError, check_decodes, read_size
from rollout.keys import at_least
from rollout.types import ImageSource, Prompt
from rsgrpo.errors import InputError, RsgrpoError

MIB = 1024 * 1024
KNOWN_FIELDS = (
    "model", "messages", "stream", "n", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "seed",
    "user", "metadata",
)  # fmt: skip
ROLES = ("system", "developer", "user")


class RequestError(RsgrpoError):
    """A request that cannot be served: an HTTP status, and what exactly is wrong."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """What a request may bring.

    max_images: pages. image_bytes: of one page as it is compressed. image_pixels: of one page before its resize.
    folders: where files may lie; empty allows data URLs alone.
    """

    max_images: int = 5
    image_bytes: int = 20 * MIB
    image_pixels: int = 50_000_000
    folders: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        at_least(0, max_images=self.max_images)
        at_least(1, image_bytes=self.image_bytes, image_pixels=self.image_pixels)
        for folder in self.folders:
            if not folder.is_dir():
                raise InputError(f"--allow-folder {folder} is not a folder")


@dataclass(frozen=True, slots=True)
class ServedSampling:
    """How this server samples; a request may repeat it, not change it."""

    temperature: float
    top_p: float
    seed: int
    max_tokens: int


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A request that passed. stream: send the text in pieces."""

    prompt: Prompt
    stream: bool


def read_request(
    body: bytes,
    request_id: str,
    model: str,
    template: str,
    system: str,
    sampling: ServedSampling,
    limits: RequestLimits,
) -> ChatRequest:
    """Check a request and make its prompt.

    template: what the question is put into; "" takes the user's message as it is, pages where they stand.
    system: the system message where the request brings none.

    Raises:
        RequestError: it cannot be served.
    """
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the body is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise RequestError(400, f"the body must be a JSON object, got {type(fields).__name__}")
    _check_fields(fields, model, sampling)
    own_system, content = _split_messages(fields.get("messages"))
    text, entries = _text_and_images(content)
    if len(entries) > limits.max_images:
        raise RequestError(400, f"the request has {len(entries)} images, this server takes {limits.max_images}")
    plain = text.replace(IMAGE_MARK, " ").strip()
    if not plain:
        raise RequestError(400, "the user message has no text: write the question into it")
    if text.count(IMAGE_MARK) != len(entries):
        raise RequestError(400, f"the text must not contain {IMAGE_MARK}; send images as parts of type image_url")
    images = tuple(_page(entry, place, limits) for place, entry in enumerate(entries, start=1))
    question = Question(request_id, plain, images, text)
    try:
        prompt = to_prompt(question, template, own_system or system)
    except RsgrpoError as error:
        raise RequestError(400, str(error)) from error
    return ChatRequest(prompt, fields.get("stream") is True)


def _check_fields(fields: Mapping[str, Any], model: str, sampling: ServedSampling) -> None:
    unknown = sorted(name for name, value in fields.items() if name not in KNOWN_FIELDS and value is not None)
    if unknown:
        raise RequestError(400, f"field {unknown[0]!r:.80} is not supported; supported are {', '.join(KNOWN_FIELDS)}")
    if fields.get("model") not in (None, "", model):
        raise RequestError(404, f"model {fields['model']!r:.80} is not served here; the model is {model!r}")
    if not isinstance(fields.get("stream") or False, bool):
        raise RequestError(400, f"stream must be true or false, got {fields['stream']!r:.80}")
    fixed: dict[str, float] = {"temperature": sampling.temperature, "top_k": 0, "n": 1}
    if sampling.temperature:  # greedy answers depend on neither
        fixed |= {"top_p": sampling.top_p, "seed": sampling.seed}
    for name, served in fixed.items():
        if fields.get(name) is not None and fields[name] != served:
            raise RequestError(
                400,
                f"{name}={fields[name]!r:.80} cannot be had: this server samples with {name}={served}; leave it out",
            )
    for name in ("max_tokens", "max_completion_tokens"):
        wanted = fields.get(name)
        if wanted is not None and not (isinstance(wanted, int | float) and wanted >= sampling.max_tokens):
            raise RequestError(
                400,
                f"{name}={wanted!r:.80} cannot be had: this server stops at {sampling.max_tokens} tokens; leave it out",
            )


def _split_messages(messages: Any) -> tuple[str, Any]:
    """Return the system message and the content of the one user message."""
    if not isinstance(messages, list) or not messages:
        raise RequestError(400, "messages must be a non-empty list")
    system, users = "", []
    for place, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RequestError(400, f"message {place} must be an object with a role")
        role = message["role"]
        if role == "user":
            users.append(message.get("content"))
        elif role in ROLES and place == 1:
            system, images = _text_and_images(message.get("content"))
            if images:
                raise RequestError(400, "the system message must be text")
        elif role in ROLES:
            raise RequestError(400, f"message {place}: the {role} message must be the first one")
        elif role == "assistant":
            raise RequestError(400, f"message {place}: one question per request; earlier turns are not supported")
        else:
            raise RequestError(400, f"message {place} has the unknown role {role!r:.80}; use {', '.join(ROLES)}")
    if len(users) != 1:
        raise RequestError(400, f"a request has one user message, got {len(users)}")
    return system, users[0]


def _text_and_images(content: Any) -> tuple[str, list[Any]]:
    """Return the text with a mark where each image stands, and the images' addresses."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise RequestError(400, f"content must be text or a list of parts, got {type(content).__name__}")
    texts: list[str] = []
    images: list[Any] = []
    for place, part in enumerate(parts, start=1):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image_url":
            address = part.get("image_url")
            images.append(address.get("url") if isinstance(address, dict) else address)
            texts.append(IMAGE_MARK)
        else:
            raise RequestError(
                400,
                f"content part {place} must be {{type: text, text}} or {{type: image_url, image_url: {{url}}}}, "
                f"got {part!r:.80}",
            )
    text = "".join(texts)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(400, f"the text is not valid Unicode: {error.reason}") from error
    return text, images


def _page(address: Any, place: int, limits: RequestLimits) -> ImageSource:
    """Return the page behind an address: compressed bytes, or the path of a file that may be read.

    Raises:
        RequestError: it may not be read, cannot be read, or is too large.
    """
    if not isinstance(address, str) or not address:
        raise RequestError(400, f"image {place} has no url")
    scheme = urlsplit(address[:64]).scheme.lower() if "://" in address[:64] else address[:5].lower().rstrip(":")
    if address[:5].lower() == "data:":
        source: ImageSource = _decoded(address, place, limits)
    elif "://" in address[:64] and scheme != "file":
        raise RequestError(400, f"image {place}: {scheme} addresses are not fetched; send the image as a data URL")
    else:
        source = _allowed_file(address, place, limits)
    try:
        height, width = read_size(source)
        if height * width > limits.image_pixels:
            raise RequestError(
                413, f"image {place} has {width} x {height} pixels, this server takes {limits.image_pixels:,}"
            )
        check_decodes(source)
    except PromptError as error:
        raise RequestError(400, f"image {place} cannot be read: {error}") from error
    return source


def _decoded(address: str, place: int, limits: RequestLimits) -> bytes:
    head, comma, payload = address.partition(",")
    if not comma or not head.lower().startswith("data:image/") or not head.lower().endswith(";base64"):
        raise RequestError(400, f"image {place} must be data:image/...;base64,...; got {head!r:.60}")
    if len(payload) * 3 // 4 > limits.image_bytes + 2:
        raise RequestError(
            413, f"image {place} has {len(payload) * 3 // 4:,} bytes, this server takes {limits.image_bytes:,}"
        )
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(400, f"image {place} is not valid base64: {error}") from error


def _allowed_file(address: str, place: int, limits: RequestLimits) -> str:
    """Return the real path of a file below an allowed folder; others are refused alike, whether there or not."""
    path = Path(unquote(address[len("file://") :]) if address[:7].lower() == "file://" else address)
    for folder in limits.folders:
        root = folder.resolve()
        try:
            real = (root / path).resolve()
            if not real.is_relative_to(root):
                continue
            if real.is_file():
                if real.stat().st_size > limits.image_bytes:
                    raise RequestError(413, f"image {place} is larger than {limits.image_bytes:,} bytes")
                return str(real)
        except (OSError, ValueError, RuntimeError):  # too long, a null byte, a loop of links: no such file
            continue
    allowed = "a data URL; this server was given no --allow-folder"
    if limits.folders:
        allowed = "a file in an allowed folder, its path taken from there"
    raise RequestError(403, f"image {place} must be {allowed}; got {address!r:.80}")
