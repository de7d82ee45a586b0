"""Check the body of a chat completion request and turn it into a prompt with its pages.

Pages are data URLs, or files inside explicitly allowed folders. Nothing is fetched. What a body may cost is limited
before it is parsed, tokenised or decoded.
"""

from __future__ import annotations

import base64
import binascii
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import unquote, urlsplit

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from recipes.answers.questions import IMAGE_MARK, Question, prompt_hash, to_prompt
from recipes.serve.replies import fault_of
from recipes.serve.sampling import RequestError as RequestError
from recipes.serve.sampling import SamplingRules, Wanted, wanted_sampling
from rollout.inputs.images import PromptError
from rollout.keys import at_least
from rollout.types import ImageSource, Prompt
from rsgrpo.errors import InputError, RsgrpoError

MIB = 1024 * 1024
MAX_JSON_BYTES = MIB  # of a body, its base64 left out: lists in lists take 30 times their size when they are parsed
CHARACTERS_PER_TOKEN = 32  # on average; real text has 2 to 5

CheckImage = Callable[[bytes, int], tuple[int, int]]
"""Decodes an image unless it has more pixels than that; returns its (height, width) or raises PromptError."""


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
    """A request that was accepted.

    id: of the reply. prompts: one per choice, the same but for their ids. stream: send the text in pieces.
    with_usage: end a stream with the number of tokens. files: a page's address; None for a data URL.
    """

    id: str
    prompts: tuple[Prompt, ...]
    wanted: Wanted
    stream: bool
    with_usage: bool
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


class _StreamOptions(_Model):
    include_usage: bool = False


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
    stop: str | list[str] | None = None
    logprobs: bool | None = None
    top_logprobs: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    stream_options: _StreamOptions | None = None
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
    rules: SamplingRules,
    limits: RequestLimits,
    check_image: CheckImage,
) -> ChatRequest:
    """Check a request and make its prompts, whose pages are bytes.

    rules: what a request may say of sampling.
    template: what questions are put into; "" takes the user's messages as they are, with their pages in place.
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
        raise RequestError(400, fault_of(error, _Body.model_fields)) from error
    if fields.model not in ("", model):
        raise RequestError(404, f"model {fields.model!r:.80} is not served here; the model is {model!r}")
    wanted = wanted_sampling(fields, rules)
    own_system, turns = _turns(fields.messages, several=rules.is_free)
    addresses = [address for message, _ in turns for address in message.addresses()]
    if len(addresses) > limits.max_images:
        raise RequestError(400, f"the request has {len(addresses)} images; this server takes {limits.max_images}")
    num_characters = len(own_system) + sum(len(message.text()) + len(answer) for message, answer in turns)
    if num_characters > limits.characters:
        raise RequestError(
            413, f"the messages have {num_characters:,} characters; this server takes {limits.characters:,}"
        )
    for message, _ in turns:
        _check_text(message)
    pages = iter([_page(address, place, limits, check_image) for place, address in enumerate(addresses, start=1)])
    asked = [_prompt(message, pages, request_id, template, own_system or system) for message, _ in turns]
    history = tuple((one.text, answer) for one, (_, answer) in zip(asked, turns[:-1], strict=False))
    images = tuple(source for one in asked for source in one.images)
    prompt = replace(asked[-1], images=images, history=history)
    name = f"seeded-{prompt_hash(prompt)}" if wanted.is_seeded else request_id
    prompts = tuple(replace(prompt, id=f"{name}-{number}" if number else name) for number in range(wanted.num_choices))
    shown = [message.addresses() for message, _ in turns if message.addresses()]
    files = tuple(None if address[:5].lower() == "data:" else address for address in (shown[-1] if shown else ()))
    with_usage = fields.stream_options is not None and fields.stream_options.include_usage
    return ChatRequest(request_id, prompts, wanted, fields.stream, with_usage, files)


def _prompt(message: _Message, pages: Iterator[ImageSource], request_id: str, template: str, system: str) -> Prompt:
    """Return one user message as a prompt with its own pages."""
    text = message.text()
    plain = text.replace(IMAGE_MARK, " ").strip()
    question = Question(request_id, plain, tuple(next(pages) for _ in message.addresses()), text)
    try:
        return to_prompt(question, template, system)
    except RsgrpoError as error:
        raise RequestError(400, str(error)) from error


def _check_text(message: _Message) -> None:
    text = message.text()
    if not text.replace(IMAGE_MARK, " ").strip():
        raise RequestError(400, "the user message has no text: write the question into it")
    if text.count(IMAGE_MARK) != len(message.addresses()):
        raise RequestError(400, f"the text must not contain {IMAGE_MARK}; send images as parts of type image_url")


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


def _turns(messages: list[_Message], *, several: bool) -> tuple[str, list[tuple[_Message, str]]]:
    """Return the text of the system message, "" without one, and the user messages with their answers, "" for the last.

    several: earlier turns are allowed.
    """
    is_system = messages[0].role in ("system", "developer")
    system, said = messages[0].text() if is_system else "", messages[is_system:]
    if is_system and messages[0].addresses():
        raise RequestError(400, "the system message must be text")
    for place, message in enumerate(said, start=int(is_system)):
        if message.role in ("system", "developer"):
            raise RequestError(400, f"messages[{place}]: the {message.role} message must be the first one")
        if message.role == "assistant" and not several:
            raise RequestError(
                400,
                f"messages[{place}]: one question per request; earlier turns are not supported (the server was started "
                "without --allow-sampling)",
            )
        if message.role == "assistant" and message.addresses():
            raise RequestError(400, f"messages[{place}]: an earlier answer must be text")
    users = [message for message in said if message.role == "user"]
    if len(users) != 1 and not several:
        raise RequestError(400, f"a request has one user message, got {len(users)}")
    roles = [message.role for message in said]
    if roles[::2] != ["user"] * len(users) or roles[1::2] != ["assistant"] * (len(users) - 1):
        raise RequestError(400, f"messages must alternate from user to user, got {', '.join(roles) or 'none'}")
    answers = [*(message.text() for message in said[1::2]), ""]
    return system, list(zip(users, answers, strict=True))


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
