"""Check the body of a chat completion request and turn it into a prompt with its pages.

Pages are data URLs, or files inside explicitly allowed folders. Nothing is fetched. What a body may cost is limited
before it is parsed, tokenised or decoded.
"""

from __future__ import annotations

import base64
import binascii
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import unquote, urlsplit

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from recipes.answers.questions import IMAGE_MARK, Question, to_prompt
from rollout.inputs.images import PromptError
from rollout.keys import at_least
from rollout.types import ImageSource, Prompt, SamplingParams
from rsgrpo.errors import InputError, RsgrpoError

MIB = 1024 * 1024
MAX_JSON_BYTES = MIB  # of a body, its base64 left out: lists in lists take 30 times their size when they are parsed
CHARACTERS_PER_TOKEN = 32  # on average; real text has 2 to 5

CheckImage = Callable[[bytes, int], tuple[int, int]]
"""Decodes an image unless it has more pixels than that; returns its (height, width) or raises PromptError."""


class RequestError(RsgrpoError):
    """A request that cannot be served, with the HTTP status to answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """Limits of a request.

    max_images: pages. image_bytes: of one page, compressed. image_pixels: of one page before its resize.
    characters: of all messages. folders: from which files may be read; empty allows only data URLs.
    """

    max_images: int = 5
    image_bytes: int = 20 * MIB
    image_pixels: int = 50_000_000
    characters: int = 15_000 * CHARACTERS_PER_TOKEN
    folders: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        at_least(0, **{"--max-images": self.max_images})
        at_least(1, **{"--max-image-mib": self.image_bytes, "--max-image-pixels": self.image_pixels})
        for folder in self.folders:
            if not folder.is_dir():
                raise InputError(f"--allow-folder {folder} is not a folder")


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A request that was accepted. stream: send the text in pieces. files: a page's address; None for a data URL."""

    prompt: Prompt
    stream: bool
    files: tuple[str | None, ...]


class _Model(BaseModel):
    model_config = ConfigDict(strict=True)


class _Address(_Model):
    url: str = Field(min_length=1)


class _TextPart(_Model):
    type: Literal["text"]
    text: str


class _ImagePart(_Model):
    type: Literal["image_url"]
    image_url: Annotated[_Address, BeforeValidator(lambda value: {"url": value} if isinstance(value, str) else value)]


_PARTS = ("text", "image_url")
_Part = Annotated[_TextPart | _ImagePart, Field(discriminator="type")]


class _Message(_Model):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        list[_Part],
        BeforeValidator(lambda value: [{"type": "text", "text": value}] if isinstance(value, str) else value),
    ]

    def text(self) -> str:
        """Return the text, with a mark where each image is."""
        return "".join(part.text if isinstance(part, _TextPart) else IMAGE_MARK for part in self.content)

    def addresses(self) -> list[str]:
        """Return where the images are."""
        return [part.image_url.url for part in self.content if isinstance(part, _ImagePart)]


class _Body(_Model):
    """What a body may say; a field that is null counts as omitted."""

    model_config = ConfigDict(strict=True, extra="forbid")

    messages: list[_Message] = Field(min_length=1)
    model: str = ""
    stream: bool = False
    n: float | None = None
    max_tokens: float | None = None
    max_completion_tokens: float | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: float | None = None
    seed: float | None = None
    user: Any = None
    metadata: Any = None

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, fields: Any) -> Any:
        return {k: v for k, v in fields.items() if v is not None} if isinstance(fields, dict) else fields


def read_request(
    body: bytes,
    request_id: str,
    model: str,
    template: str,
    system: str,
    sampling: SamplingParams,
    limits: RequestLimits,
    check_image: CheckImage,
) -> ChatRequest:
    """Check a request and make its prompt, whose pages are bytes.

    sampling: the server's; a request may repeat it, not change it.
    template: what the question is put into; "" takes the user's message as it is, with its pages in place.
    system: the system message where the request brings none.

    Raises:
        RequestError: it cannot be served.
    """
    if (num_bytes := json_bytes(body)) > MAX_JSON_BYTES:
        raise RequestError(
            413, f"the request has over {num_bytes:,} bytes beside its images; this server takes {MAX_JSON_BYTES:,}"
        )
    try:
        fields = _Body.model_validate_json(body)
    except ValidationError as error:
        raise RequestError(400, _fault(error)) from error
    if fields.model not in ("", model):
        raise RequestError(404, f"model {fields.model!r:.80} is not served here; the model is {model!r}")
    _check_sampling(fields, sampling)
    own_system, message = _split(fields.messages)
    text, addresses = message.text(), message.addresses()
    if len(addresses) > limits.max_images:
        raise RequestError(400, f"the request has {len(addresses)} images; this server takes {limits.max_images}")
    if (num_characters := len(text) + len(own_system)) > limits.characters:
        raise RequestError(
            413, f"the messages have {num_characters:,} characters; this server takes {limits.characters:,}"
        )
    plain = text.replace(IMAGE_MARK, " ").strip()
    if not plain:
        raise RequestError(400, "the user message has no text: write the question into it")
    if text.count(IMAGE_MARK) != len(addresses):
        raise RequestError(400, f"the text must not contain {IMAGE_MARK}; send images as parts of type image_url")
    images = tuple(_page(address, place, limits, check_image) for place, address in enumerate(addresses, start=1))
    try:
        prompt = to_prompt(Question(request_id, plain, images, text), template, own_system or system)
    except RsgrpoError as error:
        raise RequestError(400, str(error)) from error
    files = tuple(None if address[:5].lower() == "data:" else address for address in addresses)
    return ChatRequest(prompt, fields.stream, files)


def json_bytes(body: bytes) -> int:
    """Return the bytes of a body outside of base64, or any number above the limit once it is passed.

    From `;base64,` to the next quotation mark a valid body has no JSON, so that nothing can hide there.
    """
    num_bytes, start = 0, 0
    while num_bytes <= MAX_JSON_BYTES:
        found = body.find(b";base64,", start)
        if found < 0:
            return num_bytes + len(body) - start
        num_bytes += found - start + len(b";base64,")
        end = body.find(b'"', found)
        start = len(body) if end < 0 else end
    return num_bytes


def _fault(error: ValidationError) -> str:
    """Return the first fault of a body in one line, with the field it is in."""
    first = error.errors(include_url=False)[0]
    path = [part for before, part in pairwise(("", *first["loc"])) if not (isinstance(before, int) and part in _PARTS)]
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
    if first["type"] == "extra_forbidden":
        return f"field {place!r:.80} is not supported; supported are {', '.join(_Body.model_fields)}"
    if first["type"] == "missing":
        return f"{place} is missing"
    wanted = first["msg"].removeprefix("Input should be ")
    if wanted == first["msg"]:
        return f"{place or 'the body'}: {wanted}"
    return f"{place or 'the body'} must be {wanted}, got {first['input']!r:.80}"


def _check_sampling(fields: _Body, sampling: SamplingParams) -> None:
    """Refuse a request whose sampling differs from the server's."""
    served: dict[str, float] = {"temperature": sampling.temperature, "top_k": sampling.top_k, "n": 1}
    if sampling.temperature:  # greedy answers depend on neither
        served |= {"top_p": sampling.top_p, "seed": sampling.seed}
    for name, value in served.items():
        if (wanted := getattr(fields, name)) not in (None, value):
            raise RequestError(
                400, f"{name}={wanted:g} is not supported: this server always uses {value:g}. Omit the field."
            )
    for name in ("max_tokens", "max_completion_tokens"):
        if (wanted := getattr(fields, name)) is not None and not wanted >= sampling.max_tokens:
            raise RequestError(
                400,
                f"{name}={wanted:g} is not supported: this server always allows {sampling.max_tokens} tokens. "
                "Omit the field.",
            )


def _split(messages: list[_Message]) -> tuple[str, _Message]:
    """Return the text of the system message, "" without one, and the one user message."""
    system = ""
    for place, message in enumerate(messages):
        if message.role == "assistant":
            raise RequestError(400, f"messages[{place}]: one question per request; earlier turns are not supported")
        if message.role != "user":
            if place > 0:
                raise RequestError(400, f"messages[{place}]: the {message.role} message must be the first one")
            if message.addresses():
                raise RequestError(400, "the system message must be text")
            system = message.text()
    users = [message for message in messages if message.role == "user"]
    if len(users) != 1:
        raise RequestError(400, f"a request has one user message, got {len(users)}")
    return system, users[0]


def _page(address: str, place: int, limits: RequestLimits, check_image: CheckImage) -> ImageSource:
    """Return the compressed bytes of the page behind an address.

    Raises:
        RequestError: it may not be read, cannot be read, or is too large.
    """
    scheme = urlsplit(address[:64]).scheme.lower() if "://" in address[:64] else address[:5].lower().rstrip(":")
    if address[:5].lower() == "data:":
        content = _decoded(address, place, limits)
    elif "://" in address[:64] and scheme != "file":
        raise RequestError(400, f"image {place}: {scheme} addresses are not fetched; send the image as a data URL")
    else:
        content = _allowed_file(address, place, limits)
    try:
        height, width = check_image(content, limits.image_pixels)
    except PromptError as error:
        raise RequestError(400, f"image {place} cannot be read: {error}") from error
    if height * width > limits.image_pixels:
        raise RequestError(
            413, f"image {place} has {width} x {height} pixels; this server takes {limits.image_pixels:,}"
        )
    return content


def _decoded(address: str, place: int, limits: RequestLimits) -> bytes:
    head, comma, payload = address.partition(",")
    if not comma or not head.lower().startswith("data:image/") or not head.lower().endswith(";base64"):
        raise RequestError(400, f"image {place} must be data:image/...;base64,...; got {head!r:.60}")
    if len(payload) * 3 // 4 > limits.image_bytes + 2:
        raise RequestError(
            413, f"image {place} has {len(payload) * 3 // 4:,} bytes; this server takes {limits.image_bytes:,}"
        )
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(400, f"image {place} is not valid base64: {error}") from error


def _allowed_file(address: str, place: int, limits: RequestLimits) -> bytes:
    """Return the bytes of a file below an allowed folder; all others get one refusal, existing or not."""
    path = Path(unquote(address[len("file://") :]) if address[:7].lower() == "file://" else address)
    for folder in limits.folders:
        root = folder.resolve()
        try:
            real = (root / path).resolve()
            if real.is_relative_to(root):
                content = _bytes_below(root, real, limits.image_bytes)
                if len(content) > limits.image_bytes:
                    raise RequestError(413, f"image {place} is larger than {limits.image_bytes:,} bytes")
                return content
        except (OSError, ValueError, RuntimeError):  # too long, a null byte, a loop of links: no such file
            continue
    allowed = "a data URL; this server was given no --allow-folder"
    if limits.folders:
        allowed = "a file in an allowed folder, its path relative to that folder"
    raise RequestError(403, f"image {place} must be {allowed}; got {address!r:.80}")


def _bytes_below(root: Path, real: Path, max_bytes: int) -> bytes:
    """Return a file's bytes, one more than the limit at most; OSError unless what was opened is a file below `root`.

    Between the check of a path and its opening it may have become a link to somewhere else.
    """
    with open(os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(f"{real} is not a regular file")
        opened = Path(f"/proc/self/fd/{file.fileno()}")
        if opened.exists() and not Path(os.readlink(opened)).is_relative_to(root):
            raise OSError(f"{real} has become a link")
        return file.read(max_bytes + 1)
