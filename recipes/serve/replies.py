"""What every server of ours replies when something is wrong: one form of JSON, and no path of this machine in it."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection
from itertools import pairwise
from typing import Any

from aiohttp import web
from pydantic import ValidationError

from recipes.serve.door import Handler
from recipes.serve.sampling import RequestError

RETRY_AFTER_S = 5
_PATH = re.compile(r"(?<![\w/.:])(?:/[\w.@+-]+){2,}/?")
_PARTS = ("text", "image_url")

log = logging.getLogger(__name__)


def without_paths(text: str) -> str:
    """Return an error's text without the absolute paths of this machine; they are in its log."""
    return _PATH.sub("(a path)", text)


@web.middleware
async def errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer every error as JSON."""
    try:
        return await handler(request)
    except RequestError as error:
        return error_reply(error.status, str(error))
    except web.HTTPException as error:  # no such path, wrong method
        return error_reply(error.status, f"{request.method} {request.path:.80}: {error.reason}")
    except Exception:
        log.exception("a request failed")
        return error_reply(500, "the server failed; its log has the reason")


def error_reply(status: int, message: str) -> web.Response:
    """Return an error with the headers that belong to its status."""
    headers = {"Retry-After": str(RETRY_AFTER_S)} if status in (429, 502, 503) else {}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return web.json_response(error_body(status, message), status=status, headers=headers)


def error_body(status: int, message: str) -> dict[str, Any]:
    """Return an error as OpenAI's clients read it."""
    kind = "invalid_request_error" if status < 500 and status != 429 else "server_error"
    return {"error": {"message": message, "type": "rate_limit_error" if status == 429 else kind, "code": status}}


def fault_of(error: ValidationError, fields: Collection[str]) -> str:
    """Return the first fault of a body in one line, with the field it is in. fields: those that a body may have."""
    first = error.errors(include_url=False)[0]
    path = [part for before, part in pairwise(("", *first["loc"])) if not (isinstance(before, int) and part in _PARTS)]
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
    if first["type"] == "extra_forbidden":
        return f"field {place!r:.80} is not supported; supported are {', '.join(fields)}"
    if first["type"] == "missing":
        return f"{place} is missing"
    wanted = first["msg"].removeprefix("Input should be ")
    if wanted == first["msg"]:
        return f"{place or 'the body'}: {wanted}"
    return f"{place or 'the body'} must be {wanted}, got {first['input']!r:.80}"
