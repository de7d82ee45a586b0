"""Ask any OpenAI-compatible endpoint: concurrent requests, retries with backoff, streaming, on the `openai` client.

Pages are sent as training sees them: decoded, resized, as PNG.
"""

from __future__ import annotations

import asyncio
import base64
import copy
import importlib
import io
import json
import logging
import os
import queue
import random
import threading
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator, Iterator, Sequence
from contextlib import AsyncExitStack
from typing import Any, cast

import openai
from PIL import Image

from recipes.answers.questions import IMAGE_MARK
from recipes.answers.spec import EndpointConfig
from recipes.answers.types import Answer
from rollout.config import InputsConfig
from rollout.inputs.images import PromptError, decode, read_size, smart_resize
from rollout.types import ImageSource, Prompt, SamplingParams
from rsgrpo.errors import InputError, RsgrpoError

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 10.0
MAX_DELAY_S = 60.0
RETRIED = (408, 409, 425, 429)  # and every 5xx
HOPELESS = (401, 403, 404)
MAX_REPLY_BYTES = 16 << 20
PATCH = 28  # sides of merged vision tokens of the Qwen2-VL family; a server does not resize such images again
_OTHER_FORM = (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError)  # not a chat completion


class EndpointError(RsgrpoError):
    """The endpoint is down, refuses the key or does not know the model: nothing more can be asked."""


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


async def _bound(response: Any) -> None:
    """Limit what is read of a reply; a kilobyte of a compressed one may unpack to gigabytes."""
    if (encoding := response.headers.get("content-encoding", "identity")) != "identity":
        raise ReplyRefused(f"the reply is compressed ({encoding}), which was not asked for")
    response.stream = _Bounded(response.stream)


class Endpoint:
    """An answerer (`recipes.answers.types.Answerer`) behind HTTP; its requests run on a thread of their own.

    Attributes:
        name: of the model, as the server knows it.
    """

    is_concurrent = True

    def __init__(self, config: EndpointConfig, sampling: SamplingParams, inputs: InputsConfig) -> None:
        """Connect, and ask for the model's name where it is not given.

        Raises:
            EndpointError: the endpoint does not answer.
            InputError: it has a prompt template of its own.
        """
        self._config, self._sampling, self._inputs = config, sampling, inputs
        self._places = asyncio.Semaphore(config.concurrency)
        self._last_success = self._next_turn = 0.0
        key = os.environ.get(config.api_key_env, "")
        self._headers = {} if key else {"Authorization": openai.Omit()}  # the client insists on a key: it is not sent
        try:
            self._client = openai.AsyncOpenAI(
                base_url=config.url,
                api_key=key or "none",
                timeout=openai.Timeout(config.timeout_s, connect=CONNECT_TIMEOUT_S),
                max_retries=0,  # they are counted, paced and stopped here
                default_headers={"Accept-Encoding": "identity"},
                http_client=openai.DefaultAsyncHttpxClient(follow_redirects=False, event_hooks={"response": [_bound]}),
            )
        except Exception as error:  # httpx.InvalidURL, of whichever httpx the package brings
            raise EndpointError(f"endpoint.url={config.shown} is not a valid URL: {error}") from error
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="endpoint", daemon=True)
        self._thread.start()
        try:
            self.name = config.model or asyncio.run_coroutine_threadsafe(self._only_model(), self._loop).result()
        except BaseException:
            self.close()
            raise

    def start(self) -> None:
        """Do nothing: the server has loaded the model."""

    def answer(self, prompts: Sequence[Prompt]) -> Generator[Answer]:
        """Yield one answer per prompt as it arrives; a request that the server refuses becomes an answer with `error`.

        Raises:
            EndpointError: the endpoint is down, which stops all requests at once; what had arrived has been yielded.
        """

        async def ask_all(tell: Callable[[str | Answer], None]) -> None:
            try:
                async with asyncio.TaskGroup() as group:
                    for prompt in prompts:
                        group.create_task(self._ask(prompt, tell))
            except ExceptionGroup as errors:  # the first one stopped the others
                raise errors.exceptions[0] from None

        return cast(Generator[Answer], self._told(ask_all))

    def stream(self, prompt: Prompt) -> Generator[str | Answer]:
        """Yield the text in pieces as it is written, then the answer.

        Raises:
            EndpointError: the endpoint is down.
        """
        return self._told(lambda tell: self._ask_streaming(prompt, tell))

    def sampled(self, sampling: SamplingParams) -> Endpoint:
        """Return the same connection with another way of sampling; see `recipes.answers.types.Resampling`."""
        other = copy.copy(self)
        other._sampling = sampling
        return other

    def image_tokens(self, images: Sequence[ImageSource]) -> int:
        """Return the `sent_tokens` of images together; PromptError if one cannot be read."""
        return sum(sent_tokens(source, self._inputs) for source in images)

    def close(self) -> None:
        """Cancel what is in progress and close the connections."""
        if self._loop.is_closed():
            return

        async def finish() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._client.close()
            await asyncio.get_running_loop().shutdown_default_executor()

        asyncio.run_coroutine_threadsafe(finish(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _told(self, work: Callable[[Callable[[str | Answer], None]], Coroutine[Any, Any, None]]) -> Generator[Any]:
        """Yield what `work` tells while it runs on the endpoint's thread; leaving the generator cancels it."""
        heard: queue.SimpleQueue[str | Answer | None] = queue.SimpleQueue()
        done = asyncio.run_coroutine_threadsafe(work(heard.put), self._loop)
        done.add_done_callback(lambda _: heard.put(None))
        try:
            while (piece := heard.get()) is not None:
                yield piece
            done.result()
        finally:
            done.cancel()

    async def _only_model(self) -> str:
        config = self._config
        try:
            listing = self._client.models.with_raw_response.list
            reply = await self._until_answered(lambda: listing(extra_headers=self._headers))
            entries = json.loads(reply.content)["data"]
            models = [entry["id"] for entry in entries]
        except (PromptError, *_OTHER_FORM) as error:
            raise EndpointError(
                f"endpoint {config.shown} does not list its models ({error}); name the model: endpoint.model"
            ) from error
        if len(models) != 1:
            raise EndpointError(f"endpoint {config.shown} serves {', '.join(models) or 'no model'}; set endpoint.model")
        if entries[0].get("has_template") is True:  # it would put our prompt into its own
            raise InputError(f"endpoint {config.shown} is `recipes.serve`: start it with --prompt raw")
        return str(models[0])

    async def _ask(self, prompt: Prompt, tell: Callable[[str | Answer], None]) -> None:
        async with self._places:
            create = self._client.chat.completions.with_raw_response.create
            try:
                body = await asyncio.to_thread(self._body, prompt)
                content = (await self._until_answered(lambda: create(**body))).content
            except PromptError as error:
                tell(Answer(prompt, "", "error", str(error)))
                return
        try:
            text, reason, (num_prompt, num_response) = _read(content)
        except _OTHER_FORM as error:
            said = f"{type(error).__name__}: {error}; it begins {content[:80]!r}"
            tell(Answer(prompt, "", "error", f"the reply is not a chat completion: {said}"))
        else:
            num_image = await asyncio.to_thread(self.image_tokens, prompt.images)
            tell(
                Answer(
                    prompt, text, reason or "stop", num_prompt_tokens=num_prompt, num_response_tokens=num_response,
                    num_image_tokens=num_image,
                )
            )  # fmt: skip

    async def _ask_streaming(self, prompt: Prompt, tell: Callable[[str | Answer], None]) -> None:
        text, finish_reason = "", "stop"
        create = self._client.chat.completions.with_streaming_response.create
        async with self._places, AsyncExitStack() as connection:
            try:
                body = await asyncio.to_thread(self._body, prompt)
                reply = await self._until_answered(lambda: connection.enter_async_context(create(**body, stream=True)))
            except PromptError as error:
                tell(Answer(prompt, "", "error", str(error)))
                return
            try:
                async with asyncio.timeout(self._config.timeout_s):
                    async for piece, reason in _pieces(reply):
                        finish_reason = reason or finish_reason
                        if piece:
                            text += piece
                            tell(piece)
            except Exception as error:  # of openai, httpx or json; the text so far is kept
                fault = _broken_off(error, self._config.timeout_s)
                tell(Answer(prompt, text, "error", f"the answer broke off: {fault}"))
            else:
                tell(Answer(prompt, text, finish_reason))

    def _body(self, prompt: Prompt) -> dict[str, Any]:
        """Return the request: text and pages in the order of the prompt's marks.

        Raises:
            PromptError: a page cannot be read, or there are too many.
        """
        inputs, sampling = self._inputs, self._sampling
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
        # The seed differs by prompt, so that tries under other ids are other draws; greedy needs none.
        seed = sampling.seed + (zlib.crc32(prompt.id.encode()) if sampling.temperature else 0)
        return {
            "model": self.name,
            "messages": messages,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
            "seed": seed % 2**31,
            "extra_headers": self._headers,
            "extra_body": {"top_k": sampling.top_k} if sampling.top_k else None,
        }

    async def _until_answered(self, send: Callable[[], Awaitable[Any]]) -> Any:
        """Send a request until it is answered; return the reply.

        Raises:
            PromptError: the server refuses this request.
            EndpointError: no request can succeed.
        """
        config, started = self._config, time.monotonic()
        fault, delay_s = "", config.backoff_s
        for attempt in range(1, config.max_tries + 1):
            await self._await_turn()
            wait_s = delay_s
            try:
                async with asyncio.timeout(config.timeout_s):  # of the client's own, each ends a single read
                    reply = await send()
                self._last_success = time.monotonic()
                return reply
            except openai.APIStatusError as error:
                fault = f"HTTP {error.status_code}: {_detail(error)}"
                self._refuse_for_good(error, fault)
                given = error.response.headers.get("retry-after", "")
                wait_s = float(given) if given.isdigit() else delay_s
            except (openai.APIConnectionError, TimeoutError, ReplyRefused) as error:
                refused = error if isinstance(error, ReplyRefused) else error.__cause__
                if isinstance(refused, ReplyRefused):
                    raise PromptError(str(refused)) from error
                fault = _broken_off(error, config.timeout_s)
            if attempt < config.max_tries:
                log.info("try %d of %d failed, next in %.1f s: %s", attempt, config.max_tries, wait_s, fault)
                await asyncio.sleep(min(wait_s, MAX_DELAY_S) * random.uniform(1.0, 1.2))
                delay_s *= 2
        if self._last_success > started:  # others get through: it is this request that the server cannot answer
            raise PromptError(f"the endpoint failed {config.max_tries} times, the last time with {fault}")
        raise EndpointError(
            f"endpoint {config.shown} did not answer in {config.max_tries} tries, the last was {fault}. Check that the "
            "server is running and that endpoint.url is correct."
        )

    def _refuse_for_good(self, error: openai.APIStatusError, fault: str) -> None:
        """Raise unless the same request may succeed later; see `_until_answered`."""
        config, status = self._config, error.status_code
        if status < 400 and (where := error.response.headers.get("location")):
            raise EndpointError(f"endpoint {config.shown} redirects to {where}: set endpoint.url to that")
        if status in HOPELESS:
            hint = f"put the key into the environment variable {config.api_key_env} (endpoint.api_key_env)"
            if status == 404:
                hint = f"check endpoint.url, which usually ends in /v1, and endpoint.model={config.model!r}"
            raise EndpointError(f"endpoint {config.shown} refuses every request, {fault}; {hint}")
        if status < 500 and status not in RETRIED:
            raise PromptError(f"the endpoint refuses the request, {fault}")

    async def _await_turn(self) -> None:
        """Wait so that requests keep to `requests_per_minute`, retries included."""
        if self._config.requests_per_minute:
            turn = max(self._next_turn, time.monotonic())
            self._next_turn = turn + 60 / self._config.requests_per_minute
            await asyncio.sleep(turn - time.monotonic())


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


def _read(content: bytes) -> tuple[str, str, tuple[int | None, ...]]:
    """Return text, finish reason, and prompt and response tokens of a chat completion.

    Raises:
        One of _OTHER_FORM: it is something else.
    """
    reply = json.loads(content)
    choice, usage = reply["choices"][0], reply.get("usage")
    counts = (usage.get(name) if isinstance(usage, dict) else None for name in ("prompt_tokens", "completion_tokens"))
    tokens = tuple(count if isinstance(count, int) else None for count in counts)
    return _text(choice["message"].get("content")), _text(choice.get("finish_reason")), tokens


async def _pieces(reply: Any) -> AsyncIterator[tuple[str, str]]:
    """Yield (text, finish reason) of a streamed answer; from a server that does not stream, all at once.

    Raises:
        Exception: the server reports a failure, falls silent before the end, or sends something else.
    """
    if "text/event-stream" not in reply.headers.get("content-type", ""):
        text, reason, _ = _read(await reply.read())
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


def _detail(error: openai.APIStatusError) -> str:
    """Return what the server says is wrong, in one line."""
    said: Any = error.body
    if isinstance(said, dict):
        said = said.get("message") or said.get("detail") or said
    return " ".join(str(said or "").split())[:300] or "no reason given"


def _broken_off(error: Exception, timeout_s: float) -> str:
    """Return in one line why a reply did not come, or did not come to its end."""
    if isinstance(error, TimeoutError):
        return f"not finished within {timeout_s:g} s"
    if isinstance(error, openai.APIConnectionError):
        error = error.__cause__ if isinstance(error.__cause__, Exception) else error
    elif isinstance(error, openai.APIError):  # an event of the stream says that the server failed
        return error.body if isinstance(error.body, str) else error.message
    return f"{type(error).__name__}: {error}"
