"""What an endpoint sends back: bounded, then read as a chat completion, or said in one line what is wrong with it."""

from __future__ import annotations

import importlib
import json
from collections.abc import AsyncIterator
from typing import Any

import openai

MAX_REPLY_BYTES = 16 << 20
OTHER_FORM = (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError)  # not a chat completion


# Of whichever httpx the package brings: the class that its default client derives from.
_HTTPX: Any = importlib.import_module(openai.DefaultAsyncHttpxClient.__mro__[1].__module__.partition(".")[0])


class ReplyRefused(Exception):
    """A reply that is too long, or compressed and so of unknown length."""


class _Bounded(_HTTPX.AsyncByteStream):
    """The bytes of a reply, up to `MAX_REPLY_BYTES`."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        num_bytes = 0
        async for piece in self._stream:
            num_bytes += len(piece)
            if num_bytes > MAX_REPLY_BYTES:
                raise ReplyRefused(f"the reply is longer than {MAX_REPLY_BYTES >> 20} MiB")
            yield piece

    async def aclose(self) -> None:
        await self._stream.aclose()


async def bound(response: Any) -> None:
    """Limit what is read of a reply; a kilobyte of a compressed one may unpack to gigabytes."""
    if (encoding := response.headers.get("content-encoding", "identity")) != "identity":
        raise ReplyRefused(f"the reply is compressed ({encoding}), which was not asked for")
    response.stream = _Bounded(response.stream)


def read(content: bytes) -> tuple[str, str, tuple[int | None, ...]]:
    """Return text, finish reason, and prompt and response tokens of a chat completion.

    Raises:
        One of OTHER_FORM: it is something else.
    """
    reply = json.loads(content)
    choice, usage = reply["choices"][0], reply.get("usage")
    counts = (usage.get(name) if isinstance(usage, dict) else None for name in ("prompt_tokens", "completion_tokens"))
    tokens = tuple(count if isinstance(count, int) else None for count in counts)
    return _text(choice["message"].get("content")), _text(choice.get("finish_reason")), tokens


async def pieces(reply: Any) -> AsyncIterator[tuple[str, str]]:
    """Yield (text, finish reason) of a streamed answer; from a server that does not stream, all at once.

    Raises:
        Exception: the server reports a failure, falls silent before the end, or sends something else.
    """
    if "text/event-stream" not in reply.headers.get("content-type", ""):
        text, reason, _ = read(await reply.read())
        yield text, reason
        return
    is_finished = False
    async for event in await reply.parse():
        for choice in (event.choices if "choices" in event.model_fields_set else None) or ():
            delta, reason = getattr(choice, "delta", None), _text(choice.finish_reason)
            is_finished = is_finished or bool(reason)
            yield _text(delta.content if delta is not None else None), reason
    if not is_finished:
        raise EOFError("the stream ended before the answer did")


def _text(value: Any) -> str:
    """Return a text of a reply, "" for none; what is not valid Unicode cannot be written anywhere and is replaced.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(value, str | None):
        raise TypeError(f"a text was expected, got {value!r:.80}")
    return (value or "").encode(errors="replace").decode()


def detail(error: openai.APIStatusError) -> str:
    """Return what the server says is wrong, in one line."""
    said: Any = error.body
    if isinstance(said, dict):
        said = said.get("message") or said.get("detail") or said
    return " ".join(str(said or "").split())[:300] or "no reason given"


def broken_off(error: Exception, timeout_s: float) -> str:
    """Return in one line why a reply did not come, or did not come to its end."""
    if isinstance(error, TimeoutError):
        return f"not finished within {timeout_s:g} s"
    if isinstance(error, openai.APIConnectionError):
        error = error.__cause__ if isinstance(error.__cause__, Exception) else error
    elif isinstance(error, openai.APIError):  # an event of the stream says that the server failed
        return error.body if isinstance(error.body, str) else error.message
    return f"{type(error).__name__}: {error}"
