"""Search, ask and keep documents over HTTP: the server of `recipes.retrieve serve`, behind the door of `recipes.serve`.

What it does with a store is in `recipes.retrieval.answers.library`.
"""

from __future__ import annotations

import asyncio
import html
import tempfile
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from aiohttp import BodyPartReader, web
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from recipes.retrieval.answers.generation import Setting
from recipes.retrieval.answers.library import Library
from recipes.retrieval.answers.progress import AnswerProgress
from recipes.serve.chat_request import MIB, RequestError
from recipes.serve.door import Door
from recipes.serve.replies import errors_as_json, fault_of, without_paths
from rollout.keys import at_least
from rsgrpo.errors import InputError, RsgrpoError

MAX_K = 20
MAX_BODY_BYTES = MIB
BODY_TIMEOUT_S = 60.0
UPLOAD_TIMEOUT_S = 600.0
CHUNK_BYTES = 1 << 20

Result = TypeVar("Result")
BodyT = TypeVar("BodyT", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class DocumentServerConfig:
    """How much the server takes.

    setting, k: how a question is asked, where it does not say. max_requests: at once, waiting ones included.
    max_files, file_bytes, upload_bytes: files of an upload, bytes of one of them and of all.
    """

    setting: Setting = "multi_image"
    k: int = 5
    max_requests: int = 32
    max_files: int = 100
    file_bytes: int = 100 * MIB
    upload_bytes: int = 1024 * MIB
    door: Door = field(default_factory=Door)

    def __post_init__(self) -> None:
        at_least(1, **{"--max-requests": self.max_requests, "--max-files": self.max_files})


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class SearchBody(_Body):
    """What a search may say."""

    query: str = Field(min_length=1, description="What the pages are to be about.")
    k: int | None = Field(default=None, ge=1, le=MAX_K, description="Number of pages.")


class Turn(_Body):
    """An earlier question with its answer."""

    question: str
    answer: str


class AskBody(_Body):
    """What a question may say."""

    question: str = Field(min_length=1)
    k: int | None = Field(default=None, ge=1, le=MAX_K, description="Number of pages that are read.")
    history: list[Turn] = Field(default=[], description="Earlier questions, which this one may refer to.")


class RemoveBody(_Body):
    """Documents to remove."""

    documents: list[str] = Field(min_length=1, description="Names, or ROOT/NAME where several have one name.")


@dataclass(frozen=True, slots=True)
class _Route:
    method: str
    path: str
    about: str
    body: type[BaseModel] | None = None


ROUTES = (
    _Route("GET", "/health", "Whether the server takes requests; needs no token."),
    _Route("GET", "/openapi.json", "This interface as OpenAPI 3.1."),
    _Route("GET", "/docs", "This interface as a page."),
    _Route("POST", "/v1/search", "The pages for a query, best first.", SearchBody),
    _Route("POST", "/v1/ask", "The answer to a question, with its pages and citations.", AskBody),
    _Route("GET", "/v1/documents", "The documents of the store."),
    _Route("POST", "/v1/documents", "Add files (multipart/form-data); pages are searched when the reply comes."),
    _Route("DELETE", "/v1/documents", "Take documents out of the store.", RemoveBody),
    _Route("GET", "/v1/pages/{page_id}", "The image of a page."),
)


class DocumentServer:
    """The HTTP side of a library. `app` is what aiohttp runs."""

    def __init__(self, library: Library, config: DocumentServerConfig) -> None:
        self._library, self._config = library, config
        self._threads = ThreadPoolExecutor(config.max_requests, "documents")
        self._num_requests = 0
        self._is_closing = False
        self.app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[errors_as_json, config.door.admit])
        handlers: dict[tuple[str, str], Callable[[web.Request], Awaitable[web.StreamResponse]]] = {
            ("GET", "/health"): self._health,
            ("GET", "/openapi.json"): self._openapi,
            ("GET", "/docs"): self._docs,
            ("POST", "/v1/search"): self._search,
            ("POST", "/v1/ask"): self._ask,
            ("GET", "/v1/documents"): self._documents,
            ("POST", "/v1/documents"): self._add,
            ("DELETE", "/v1/documents"): self._remove,
            ("GET", "/v1/pages/{page_id}"): self._page,
        }
        for route in ROUTES:
            self.app.router.add_route(route.method, route.path, handlers[route.method, route.path])
        self.app.on_shutdown.append(self._on_shutdown)
        self.app.on_cleanup.append(self._on_cleanup)

    async def _on_shutdown(self, _: web.Application) -> None:
        self._is_closing = True

    async def _on_cleanup(self, _: web.Application) -> None:
        await asyncio.to_thread(self._threads.shutdown)

    async def _health(self, _: web.Request) -> web.Response:
        status = "closing" if self._is_closing else "ok"
        facts = {"status": status, "requests": self._num_requests, "max_requests": self._config.max_requests}
        return web.json_response(facts, status=503 if self._is_closing else 200)

    async def _openapi(self, _: web.Request) -> web.Response:
        return web.json_response(openapi())

    async def _docs(self, _: web.Request) -> web.Response:
        return web.Response(text=docs_page(), content_type="text/html")

    async def _search(self, request: web.Request) -> web.Response:
        body = await _read(request, SearchBody)

        def search() -> AnswerProgress:
            return next(self._library.ask(body.query, body.k or self._config.k, self._config.setting))  # the pages

        return web.json_response(_shown(await self._work(search)))

    async def _ask(self, request: web.Request) -> web.Response:
        body = await _read(request, AskBody)
        if self._library.reader is None:
            raise RequestError(404, "nobody answers here: the server was started without --answer-model or --endpoint")
        history = [(turn.question, turn.answer) for turn in body.history]

        def ask() -> AnswerProgress:
            *_, last = self._library.ask(body.question, body.k or self._config.k, self._config.setting, history)
            return last

        return web.json_response(_shown(await self._work(ask)))

    async def _documents(self, _: web.Request) -> web.Response:
        rows = await self._work(self._library.documents)
        shown = [{"document": row.document, "root": row.root, "pages": row.num_pages} for row in rows]
        return web.json_response({"documents": shown, "pages": self._library.num_pages})

    async def _add(self, request: web.Request) -> web.Response:
        if request.content_type != "multipart/form-data":
            raise RequestError(415, f"the content type must be multipart/form-data, got {request.content_type}")
        origin = urlsplit(request.headers.get("Origin", "")).netloc
        if origin not in ("", request.headers.get("Host", "")):  # a stranger's page may send forms without asking first
            raise RequestError(403, f"files are not taken from pages of {origin!r:.80}")
        with tempfile.TemporaryDirectory(prefix="rsgrpo-upload-") as folder:
            try:
                async with asyncio.timeout(UPLOAD_TIMEOUT_S):
                    files = await self._received(request, Path(folder))
            except TimeoutError as error:
                raise RequestError(408, f"the files did not arrive within {UPLOAD_TIMEOUT_S:.0f} s") from error
            added = await self._work(lambda: self._library.add(files))
        faults = [{"file": name, "fault": without_paths(fault)} for name, fault in added.faults]
        return web.json_response({"added": added.num_added, "faults": faults, "pages": self._library.num_pages})

    async def _received(self, request: web.Request, folder: Path) -> list[Path]:
        """Write the files of an upload into a folder, each into one of its own, because names may repeat."""
        files: list[Path] = []
        num_bytes = 0
        try:
            async for part in await request.multipart():
                if not isinstance(part, BodyPartReader) or not part.filename:
                    raise RequestError(400, "every part of the upload must be a file with a name")
                if len(files) == self._config.max_files:
                    raise RequestError(413, f"at most {self._config.max_files} files can be added at once")
                name = Path(unquote(part.filename).replace("\\", "/")).name or "document"
                file = folder / str(len(files)) / name
                file.parent.mkdir()
                num_bytes += await self._write(part, file, name, self._config.upload_bytes - num_bytes)
                files.append(file)
        except (ValueError, OSError) as error:
            raise RequestError(400, f"the upload cannot be read: {without_paths(str(error))}") from error
        return files

    async def _write(self, part: BodyPartReader, file: Path, name: str, left: int) -> int:
        num_bytes, limit = 0, min(left, self._config.file_bytes)
        with file.open("wb") as target:
            while chunk := await part.read_chunk(CHUNK_BYTES):
                num_bytes += len(chunk)
                if num_bytes > limit:
                    which = "--max-file-mb of a file" if limit == self._config.file_bytes else "all files together"
                    raise RequestError(413, f"{name!r:.80} is larger than this server takes ({which})")
                target.write(chunk)
        return num_bytes

    async def _remove(self, request: web.Request) -> web.Response:
        body = await _read(request, RemoveBody)
        removal = await self._work(lambda: self._library.remove(body.documents))
        removed = [row.document for row in removal.rows]
        return web.json_response({"removed": removed, "pages": self._library.num_pages})

    async def _page(self, request: web.Request) -> web.StreamResponse:
        image = await self._work(lambda: self._library.image_of(request.match_info["page_id"]))
        if image is None:
            raise RequestError(404, "there is no such page")
        return web.FileResponse(image, headers={"X-Content-Type-Options": "nosniff"})

    async def _work(self, work: Callable[[], Result]) -> Result:
        """Do something with the library in a thread; its faults become statuses."""
        if self._is_closing:
            raise RequestError(503, "the server is shutting down")
        if self._num_requests >= self._config.max_requests:
            raise RequestError(429, f"{self._config.max_requests} requests are being answered, the limit; try again")
        self._num_requests += 1
        done = asyncio.get_running_loop().run_in_executor(self._threads, work)
        done.add_done_callback(lambda _: self._left())  # not when the client leaves: the thread is busy until then
        try:
            return await asyncio.shield(done)
        except InputError as error:
            raise RequestError(400, without_paths(str(error))) from error
        except RsgrpoError as error:
            raise RequestError(502, without_paths(str(error))) from error

    def _left(self) -> None:
        self._num_requests -= 1


async def _read(request: web.Request, body: type[BodyT]) -> BodyT:
    if request.content_type != "application/json":
        raise RequestError(415, f"the content type must be application/json, got {request.content_type}")
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            return body.model_validate_json(await request.read())
    except TimeoutError as error:
        raise RequestError(408, f"the request did not arrive within {BODY_TIMEOUT_S:.0f} s") from error
    except web.HTTPRequestEntityTooLarge as error:
        raise RequestError(413, f"the request is larger than {MAX_BODY_BYTES:,} bytes") from error
    except ValidationError as error:
        raise RequestError(400, fault_of(error, body.model_fields)) from error


def _shown(progress: AnswerProgress) -> dict[str, Any]:
    """Return a question's pages and, where there is one, its answer. Pages are named by id, not by path."""
    pages = []
    for page in progress.pages:
        facts = {name: value for name, value in asdict(page).items() if name not in ("image", "root")}
        pages.append(facts | {"text": page.text[:500], "image": f"/v1/pages/{page.page_id}"})
    found: dict[str, Any] = {"pages": pages, "notes": list(progress.notes)}
    if (answered := progress.answered) is None:
        return found
    line = {name: value for name, value in answered.line.items() if name not in ("id", "question")}
    for slot in line["evidence"]:
        slot.pop("image", None)
    line["errors"] = [without_paths(error) for error in line["errors"]]
    cited = [{"document": page.document, "page": page.number, "page_id": page.page_id} for page in answered.cited]
    return found | line | {"cited": cited}


def openapi() -> dict[str, Any]:
    """Return the interface as OpenAPI 3.1."""
    paths: dict[str, dict[str, Any]] = {}
    for route in ROUTES:
        entry: dict[str, Any] = {"summary": route.about, "responses": {"200": {"description": "done"}}}
        if route.body is not None:
            schema = route.body.model_json_schema()
            entry["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
        elif route.method == "POST":
            files = {"type": "array", "items": {"type": "string", "format": "binary"}}
            schema = {"type": "object", "properties": {"files": files}}
            entry["requestBody"] = {"required": True, "content": {"multipart/form-data": {"schema": schema}}}
        if "{page_id}" in route.path:
            entry["parameters"] = [{"name": "page_id", "in": "path", "required": True, "schema": {"type": "string"}}]
        paths.setdefault(route.path, {})[route.method.lower()] = entry
    return {
        "openapi": "3.1.0",
        "info": {"title": "Documents", "version": "1", "description": "Search and ask a store of page images."},
        "components": {"securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
        "security": [{"token": []}],
        "paths": paths,
    }


def docs_page() -> str:
    """Return the interface as one page that loads nothing."""
    rows = []
    for route in ROUTES:
        fields = route.body.model_fields if route.body else {}
        named = ", ".join(
            f"<code>{name}</code>{'' if one.is_required() else ' (optional)'}" for name, one in fields.items()
        )
        cells = (f"<code>{route.method} {html.escape(route.path)}</code>", html.escape(route.about), named)
        rows.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    style = "body{font-family:system-ui;margin:2rem;color-scheme:light dark}td,th{padding:.3rem 1rem;text-align:left}"
    return (
        f"<!doctype html><meta charset=utf-8><title>Documents</title><style>{style}</style><h1>Documents</h1><p>Errors "
        'are <code>{"error": {"message", "type", "code"}}</code>. The interface for programs: <a href="openapi.json">'
        f"openapi.json</a>.<table><tr><th>request<th>what it does<th>fields</tr>{''.join(rows)}</table>"
    )
