"""Answer over HTTP: `python -m recipes.serve --model runs/x/export`, asked like any OpenAI-compatible server.

Replies have the parsed fields beside the usual choices. What a request may say is in `recipes.serve.chat_request`, the
queue in `recipes.serve.queue`. Built on `aiohttp`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

from recipes.answers.batch import result_line, step_line
from recipes.answers.options import Parser, port
from recipes.answers.questions import named_prompt
from recipes.answers.types import Answer, Answerer, Resampling
from recipes.infer import add_answerer_options, add_desk_options, answerer_of, default_prompt
from recipes.serve.chat_request import (
    CHARACTERS_PER_TOKEN,
    MIB,
    ChatRequest,
    RequestError,
    RequestLimits,
    read_request,
)
from recipes.serve.door import TOKEN_VARIABLE, Door, is_loopback, listen
from recipes.serve.queue import Piece, PromptQueue
from recipes.serve.replies import error_body, error_reply, errors_as_json, without_paths
from recipes.serve.sampling import SamplingRules, StopWatch, cut, logprobs_of, usage_of
from rollout.inputs.isolated import IsolatedDecoders
from rollout.keys import at_least
from rollout.types import Observation, Prompt, SamplingParams
from rsgrpo.errors import InputError, RsgrpoError, run_program

BODY_TIMEOUT_S = 60.0
SHUTDOWN_TIMEOUT_S = 60.0
NUM_DECODERS = max(2, min(8, os.cpu_count() or 1))

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """What the server asks the model and how much it accepts.

    template, system: what questions are put into, as in `recipes.infer`.
    rules: what requests may say of sampling. limits: see `recipes.serve.chat_request`.
    request_bytes: of a whole request. max_requests: accepted at once, waiting ones included.
    batch_size: prompts that an engine in this process is given at once. door: who may ask.
    """

    template: str
    system: str
    rules: SamplingRules
    limits: RequestLimits
    request_bytes: int = 64 * MIB
    max_requests: int = 32
    batch_size: int = 16
    door: Door = field(default_factory=Door)

    def __post_init__(self) -> None:
        at_least(1, **{"--max-request-mib": self.request_bytes, "--max-requests": self.max_requests})


class Server:
    """The HTTP side. `app` is what aiohttp runs."""

    def __init__(self, config: ServeConfig, answerer: Answerer, decoders: IsolatedDecoders | None = None) -> None:
        """Build `app`. decoders: None starts some, which end with the app."""
        self._config = config
        self._own_decoders = None if decoders else IsolatedDecoders(NUM_DECODERS)
        self._decoders = decoders or self._own_decoders
        self._readers = ThreadPoolExecutor(NUM_DECODERS, "request-reader")
        self._reader_free = asyncio.Semaphore(NUM_DECODERS)
        self._answerer = answerer
        self._queue = PromptQueue(answerer, num_threads=config.max_requests, batch_size=config.batch_size)
        self._num_requests = 0
        self._is_closing = False
        self.app = web.Application(
            client_max_size=config.request_bytes, middlewares=[errors_as_json, config.door.admit]
        )
        self.app.add_routes(
            [
                web.get("/health", self._health),
                web.get("/v1/models", self._models),
                web.post("/v1/chat/completions", self._complete),
            ]
        )
        self.app.on_shutdown.append(self._on_shutdown)
        self.app.on_cleanup.append(self._on_cleanup)

    async def _on_shutdown(self, _: web.Application) -> None:
        self._is_closing = True

    async def _on_cleanup(self, _: web.Application) -> None:
        await asyncio.to_thread(self._queue.close)
        self._readers.shutdown(wait=False, cancel_futures=True)
        if self._own_decoders:
            self._own_decoders.close()

    async def _health(self, _: web.Request) -> web.Response:
        status = "closing" if self._is_closing else "ok"
        facts = {
            "model": self._answerer.name,
            "requests": self._num_requests,
            "max_requests": self._config.max_requests,
        }
        return web.json_response({"status": status, **facts}, status=503 if self._is_closing else 200)

    async def _models(self, _: web.Request) -> web.Response:
        model = {"id": self._answerer.name, "object": "model", "created": 0, "owned_by": "rsgrpo"}
        model["has_template"] = bool(self._config.template)  # clients that apply a template themselves need to know
        return web.json_response({"object": "list", "data": [model]})

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        config = self._config
        if self._is_closing:
            raise RequestError(503, "the server is shutting down")
        if request.content_type != "application/json":
            raise RequestError(415, f"the content type must be application/json, got {request.content_type}")
        if self._num_requests >= config.max_requests:
            raise RequestError(429, f"{config.max_requests} requests are being answered, the limit; try again later")
        if (request.content_length or 0) > config.request_bytes:
            raise RequestError(
                413, f"the request has {request.content_length:,} bytes; the limit is {config.request_bytes:,} bytes"
            )
        self._num_requests += 1
        try:
            return await self._answer(request)
        finally:
            self._num_requests -= 1

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        config, request_id = self._config, f"chatcmpl-{uuid.uuid4().hex}"
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                body = await request.read()
        except TimeoutError as error:
            raise RequestError(408, f"the request did not arrive within {BODY_TIMEOUT_S:.0f} s") from error
        except web.HTTPRequestEntityTooLarge as error:
            raise RequestError(413, f"the request is larger than {config.request_bytes:,} bytes") from error
        except web.RequestPayloadError as error:
            reply = error_reply(400, f"the body cannot be read: {error}")
            reply.force_close()  # where the next request would begin is not known
            return reply
        chat = await self._read(body, request_id)
        del body  # the pages are in the prompt; this may be large
        return await (self._stream(request, chat) if chat.stream else self._whole(chat))

    async def _read(self, body: bytes, request_id: str) -> ChatRequest:
        """Check a request in a thread. Who leaves while he waits for one takes his request along."""
        config, loop = self._config, asyncio.get_running_loop()
        assert self._decoders is not None
        await self._reader_free.acquire()

        def free(_: Future[ChatRequest]) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._reader_free.release)

        work = self._readers.submit(
            read_request, body, request_id, self._answerer.name, config.template, config.system, config.rules,
            config.limits, self._decoders.check,
        )  # fmt: skip
        work.add_done_callback(free)  # not when the client leaves: the thread is busy until then
        return await asyncio.wrap_future(work)

    async def _whole(self, chat: ChatRequest) -> web.Response:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._last_piece(prompt, chat)) for prompt in chat.prompts]
        outputs: list[Answer] = []
        for task in tasks:
            output = task.result()
            if fault := _fault(output):
                raise fault
            assert isinstance(output, Answer)
            outputs.append(cut(output, chat.wanted.stop))
        choices = [
            {
                "index": number,
                "message": {"role": "assistant", "content": output.text},
                "finish_reason": output.finish_reason,
                **({"logprobs": logprobs_of(output)} if chat.wanted.logprobs else {}),
            }
            for number, output in enumerate(outputs)
        ]
        usage = usage_of(outputs)
        reply = self._reply(chat, "chat.completion", choices, outputs[0]) | ({"usage": usage} if usage else {})
        return web.json_response(reply)

    async def _last_piece(self, prompt: Prompt, chat: ChatRequest) -> Piece:
        async with aclosing(self._pieces(prompt, chat, streams=False)) as pieces:
            *_, output = [piece async for piece in pieces]
        return output

    async def _stream(self, request: web.Request, chat: ChatRequest) -> web.StreamResponse:
        """Send server-sent events: pieces of the text, then the parsed fields, the usage if asked for, then [DONE]."""
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
        stops, sent, output = StopWatch(chat.wanted.stop), "", None

        async def send(event: dict[str, Any]) -> None:
            await response.write(f"data: {json.dumps(event)}\n\n".encode())

        async def send_piece(text: str, output: Answer | None = None) -> None:
            nonlocal sent
            delta = {"role": "assistant", "content": text} if text or not sent else {}
            choice: dict[str, Any] = {"index": 0, "delta": delta, "finish_reason": output and output.finish_reason}
            if output is not None and chat.wanted.logprobs:
                choice["logprobs"] = logprobs_of(output)
            await send(self._reply(chat, "chat.completion.chunk", [choice], output))
            sent += text

        async with aclosing(self._pieces(chat.prompts[0], chat, streams=True)) as pieces:
            async for piece in pieces:
                fault = _fault(piece)
                if fault and not response.prepared:
                    raise fault
                if fault:
                    await send(error_body(502, str(fault)))
                    break
                if not response.prepared:
                    await response.prepare(request)
                if isinstance(piece, str) and (text := stops.pass_on(piece)):
                    await send_piece(text)
                if stops.is_over and not (chat.with_usage or chat.wanted.logprobs):  # the rest is not needed
                    await send_piece("", Answer(chat.prompts[0], sent, "stop"))
                    break
                if isinstance(piece, Observation):
                    event = self._reply(chat, "chat.completion.chunk", [{"index": 0, "delta": {}}], None)
                    await send(event | {"step": step_line(piece)})
                if isinstance(piece, Answer):
                    output = cut(piece, chat.wanted.stop)
                    await send_piece(output.text.removeprefix(sent), output)
        if output is not None and chat.with_usage:
            await send(self._reply(chat, "chat.completion.chunk", [], None) | {"usage": usage_of([output])})
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response

    async def _pieces(self, prompt: Prompt, chat: ChatRequest, *, streams: bool) -> AsyncGenerator[Piece, None]:
        """Yield what comes from the queue, up to the output or the error."""
        loop, heard = asyncio.get_running_loop(), asyncio.Queue[Piece]()

        def hear(piece: Piece) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(heard.put_nowait, piece)

        left = self._queue.ask(prompt, hear, streams=streams, sampling=chat.wanted.sampling)
        try:
            while True:
                piece = await heard.get()
                yield piece
                if not isinstance(piece, str | Observation):
                    return
        finally:
            left.set()

    def _reply(
        self, chat: ChatRequest, kind: str, choices: list[dict[str, Any]], output: Answer | None
    ) -> dict[str, Any]:
        model = self._answerer.name
        reply = {"id": chat.id, "object": kind, "created": int(time.time()), "model": model, "choices": choices}
        if output is None:
            return reply
        parsed = result_line(output, model)
        for slot in parsed["evidence"]:  # pages are named as the client named them
            slot["image"] = chat.files[slot["index"] - 1] if 1 <= slot["index"] <= len(chat.files) else None
        return reply | {"parsed": parsed}


def _fault(piece: Piece) -> RequestError | None:
    """Return what a request is refused with because of this piece; None for text and whole answers."""
    if isinstance(piece, RsgrpoError):
        return RequestError(502, without_paths(str(piece)))
    if isinstance(piece, Answer) and piece.finish_reason == "error":
        return RequestError(422, f"the question cannot be answered: {without_paths(str(piece.error))}")
    return None


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    top = Parser(prog="python -m recipes.serve", description=__doc__.split("\n")[0])
    where = top.add_argument_group("where to listen, and what to accept")
    where.add_argument(
        "--host", default="127.0.0.1", help=f"0.0.0.0 lets other machines in; set {TOKEN_VARIABLE} for a bearer token"
    )
    where.add_argument(
        "--allow-host", action="append", default=[], help="a further name under which clients may call this server"
    )
    where.add_argument("--port", type=port, default=8000, help="0: any free port")
    where.add_argument("--allow-folder", type=Path, action="append", default=[], help="files in it may be read")
    where.add_argument("--max-request-mib", type=int, default=64, help="largest request")
    where.add_argument("--max-image-mib", type=int, default=20, help="largest image, compressed")
    where.add_argument("--max-image-pixels", type=int, default=50_000_000, help="largest area before the resize")
    where.add_argument("--max-connections", type=int, default=256, help="further ones are closed at once")
    where.add_argument("--max-requests", type=int, default=32, help="waiting ones included; further ones get 429")
    what = top.add_argument_group("what to ask")
    what.add_argument(
        "--prompt",
        default="",
        help="a name in conf/prompt or a file; raw keeps messages as sent. Default: the model's own, else evidence.",
    )
    what.add_argument(
        "--allow-sampling",
        action="store_true",
        help="requests may choose temperature, top_p, top_k, seed, stop, n, fewer tokens than --max-tokens, and send "
        "earlier turns",
    )
    what.add_argument("--max-choices", type=int, default=4, help="largest n of a request, with --allow-sampling")
    what.add_argument("--system", default="", help="system message for requests without one")
    add_desk_options(what)
    add_answerer_options(top)
    return top


def config_of(options: argparse.Namespace) -> ServeConfig:
    """Return the settings of a command line."""
    from rsgrpo.data.prompts import read_template

    prompt = named_prompt(options.prompt or default_prompt(options), options.model)
    return ServeConfig(
        template=read_template(prompt),
        system=options.system or prompt.system,
        rules=SamplingRules(
            SamplingParams(
                temperature=options.temperature,
                top_p=options.top_p,
                top_k=options.top_k,
                max_tokens=options.max_tokens,
                seed=options.seed,
            ),
            is_free=options.allow_sampling,
            max_choices=options.max_choices,
            has_logprobs=not options.endpoint,
        ),
        limits=RequestLimits(
            max_images=options.max_images,
            image_bytes=options.max_image_mib * MIB,
            image_pixels=options.max_image_pixels,
            characters=options.max_prompt_tokens * CHARACTERS_PER_TOKEN,
            folders=tuple(options.allow_folder),
        ),
        request_bytes=options.max_request_mib * MIB,
        max_requests=options.max_requests,
        batch_size=options.batch_size,
        door=Door(os.environ.get(TOKEN_VARIABLE, ""), (options.host, *options.allow_host), options.max_connections),
    )


def serve(options: argparse.Namespace) -> None:
    """Serve until a signal; requests that are being answered are finished."""
    config = config_of(options)
    answerer = answerer_of(options)
    if options.allow_sampling and not isinstance(answerer, Resampling):
        raise InputError("--allow-sampling is not supported with --desk and --endpoint: omit one of them")
    if not is_loopback(options.host) and not config.door.token:
        log.warning("anyone who reaches %s can ask: there is no token. Set %s", options.host, TOKEN_VARIABLE)
    try:
        answerer.start()
        here = f"serving {answerer.name} at http://{options.host}:{options.port}/v1"
        asyncio.run(
            listen(
                lambda: Server(config, answerer).app, options.host, options.port, door=config.door,
                shutdown_timeout_s=SHUTDOWN_TIMEOUT_S, on_ready=lambda: print(here, flush=True),
            )
        )  # fmt: skip
    except OSError as error:
        raise InputError(f"cannot listen on {options.host}:{options.port}: {error}; choose another --port") from error
    finally:
        answerer.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    return run_program(lambda: serve(parser().parse_args(argv)))
