"""Ask any OpenAI-compatible endpoint: concurrent requests, retries with backoff, streaming, on the `openai` client."""

from __future__ import annotations

import asyncio
import copy
import json
import logging
import os
import queue
import random
import threading
import time
import zlib
from collections.abc import Awaitable, Callable, Coroutine, Generator, Sequence
from contextlib import AsyncExitStack
from typing import Any, cast

import openai

from recipes.answers.endpoint.replies import OTHER_FORM, ReplyRefused, bound, broken_off, detail, pieces, read
from recipes.answers.endpoint.sent import messages_of, sent_tokens
from recipes.answers.spec import EndpointConfig
from recipes.answers.types import Answer
from rollout.config import InputsConfig
from rollout.inputs.images import PromptError
from rollout.types import ImageSource, Prompt, SamplingParams
from rsgrpo.errors import InputError, RsgrpoError

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 10.0
MAX_DELAY_S = 60.0
RETRIED = (408, 409, 425, 429)  # and every 5xx
HOPELESS = (401, 403, 404)


class EndpointError(RsgrpoError):
    """The endpoint is down, refuses the key or does not know the model: nothing more can be asked."""


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
                http_client=openai.DefaultAsyncHttpxClient(follow_redirects=False, event_hooks={"response": [bound]}),
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
        except (PromptError, *OTHER_FORM) as error:
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
            text, reason, (num_prompt, num_response) = read(content)
        except OTHER_FORM as error:
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
                    async for piece, reason in pieces(reply):
                        finish_reason = reason or finish_reason
                        if piece:
                            text += piece
                            tell(piece)
            except Exception as error:  # of openai, httpx or json; the text so far is kept
                fault = broken_off(error, self._config.timeout_s)
                tell(Answer(prompt, text, "error", f"the answer broke off: {fault}"))
            else:
                tell(Answer(prompt, text, finish_reason))

    def _body(self, prompt: Prompt) -> dict[str, Any]:
        """Return the request; PromptError as `messages_of`."""
        sampling = self._sampling
        # The seed differs by prompt, so that tries under other ids are other draws; greedy needs none.
        seed = sampling.seed + (zlib.crc32(prompt.id.encode()) if sampling.temperature else 0)
        return {
            "model": self.name,
            "messages": messages_of(prompt, self._inputs),
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
                fault = f"HTTP {error.status_code}: {detail(error)}"
                self._refuse_for_good(error, fault)
                given = error.response.headers.get("retry-after", "")
                wait_s = float(given) if given.isdigit() else delay_s
            except (openai.APIConnectionError, TimeoutError, ReplyRefused) as error:
                refused = error if isinstance(error, ReplyRefused) else error.__cause__
                if isinstance(refused, ReplyRefused):
                    raise PromptError(str(refused)) from error
                fault = broken_off(error, config.timeout_s)
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
