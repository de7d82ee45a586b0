"""Ask any OpenAI-compatible endpoint: concurrent requests, retries with backoff, streaming. The home of `httpx`.

Pages are sent decoded and resized as training sees them. Nothing of engines, files or parsing is known here.
"""

from __future__ import annotations

import json
import logging
import os
import random
import threading
import time
import zlib
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import closing
from typing import Any

import httpx

from recipes.answers.data_urls import page_url
from recipes.answers.questions import IMAGE_MARK
from recipes.answers.spec import EndpointConfig
from recipes.answers.types import Answer
from rollout.config import InputsConfig
from rollout.inputs.images import PromptError
from rollout.types import Prompt, SamplingParams
from rsgrpo.errors import InputError, RsgrpoError

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 10.0
MAX_DELAY_S = 60.0
RETRIED = (408, 409, 425, 429)  # and every 5xx
HOPELESS = (401, 403, 404)
_OTHER_FORM = (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError)  # no chat completion


class EndpointError(RsgrpoError):
    """The endpoint is down, refuses the key or does not know the model: nothing more can be asked."""


class Endpoint:
    """An answerer (`recipes.answers.types.Answerer`) behind HTTP. Close it after use.

    Attributes:
        name: of the model, as the server knows it.
    """

    is_concurrent = True

    def __init__(self, config: EndpointConfig, sampling: SamplingParams, inputs: InputsConfig) -> None:
        """Connect, and ask for the model's name where it is not given.

        Raises:
            EndpointError: the endpoint does not answer.
            InputError: it has a prompt of its own.
        """
        self._config = config
        self._sampling = sampling
        self._inputs = inputs
        self._stop = threading.Event()
        self._fault: EndpointError | None = None  # the first, which stopped the others
        self._last_success = 0.0
        self._turn_lock = threading.Lock()
        self._next_turn = 0.0
        key = os.environ.get(config.api_key_env, "")
        try:
            self._client = httpx.Client(
                base_url=config.url.rstrip("/") + "/",
                headers={"Authorization": f"Bearer {key}"} if key else {},
                timeout=httpx.Timeout(config.timeout_s, connect=CONNECT_TIMEOUT_S),
                limits=httpx.Limits(max_connections=config.concurrency),
            )
        except httpx.InvalidURL as error:
            raise EndpointError(f"endpoint.url={config.url} is no address: {error}") from error
        try:
            self.name = config.model or self._only_model()
        except BaseException:
            self._client.close()
            raise

    def start(self) -> None:
        """Nothing to load: the model is the server's."""

    def answer(self, prompts: Sequence[Prompt]) -> Iterator[Answer]:
        """Yield one output per prompt as it arrives; a request that the server refuses becomes an output with `error`.

        Raises:
            EndpointError: the endpoint is down; what had arrived has been yielded before.
        """
        self._stop.clear()
        self._fault = None
        pool = ThreadPoolExecutor(self._config.concurrency, thread_name_prefix="endpoint")
        futures = [pool.submit(self._ask, prompt) for prompt in prompts]
        waiting = set(futures)
        try:
            for future in as_completed(futures):
                waiting.discard(future)
                yield future.result()
        except EndpointError as error:
            pool.shutdown(wait=True, cancel_futures=True)
            yield from (future.result() for future in waiting if _succeeded(future))
            raise (self._fault or error) from None
        finally:
            self._stop.set()
            pool.shutdown(wait=True, cancel_futures=True)

    def stream(self, prompt: Prompt) -> Generator[str | Answer]:
        """Yield the text in pieces as it is written, then the output.

        Raises:
            EndpointError: the endpoint is down.
        """
        self._stop.clear()
        text, finish_reason = "", "stop"
        try:
            body = self._body(prompt) | {"stream": True}
            with closing(self._open(body, stream=True)) as response:
                for delta, reason in _events(response, self._config.timeout_s):
                    finish_reason = reason or finish_reason
                    if delta:
                        text += delta
                        yield delta
        except PromptError as error:
            yield Answer(prompt, text, "error", str(error))
            return
        except (httpx.HTTPError, httpx.StreamError, *_OTHER_FORM) as error:
            yield Answer(prompt, text, "error", f"the answer broke off: {type(error).__name__}: {error}")
            return
        yield Answer(prompt, text, finish_reason)

    def close(self) -> None:
        """Close the connections."""
        self._stop.set()
        self._client.close()

    def _only_model(self) -> str:
        try:
            entries = self._request("GET", "models").json()["data"]
            models = [entry["id"] for entry in entries]
        except (PromptError, ValueError, KeyError, TypeError) as error:
            raise EndpointError(
                f"endpoint {self._config.url} lists no models ({error}); name the model: endpoint.model"
            ) from error
        if len(models) != 1:
            raise EndpointError(
                f"endpoint {self._config.url} serves {', '.join(models) or 'no model'}; choose one: endpoint.model"
            )
        if entries[0].get("has_template") is True:  # the prompt in it would stand around ours
            raise InputError(f"endpoint {self._config.url} is `recipes.serve`: start it with --prompt raw")
        return str(models[0])

    def _ask(self, prompt: Prompt) -> Answer:
        try:
            response = self._open(self._body(prompt))
        except PromptError as error:
            return Answer(prompt, "", "error", str(error))
        except EndpointError as error:
            self._fault = self._fault or error
            self._stop.set()  # at once: the others need not find out for themselves
            raise
        try:
            reply = response.json()
            choice = reply["choices"][0]
            text, reason = _text(choice["message"].get("content")), _text(choice.get("finish_reason")) or "stop"
            usage = reply.get("usage")
        except _OTHER_FORM as error:
            said = f"{type(error).__name__}: {error}; it begins {response.content[:80]!r}"
            return Answer(prompt, "", "error", f"the reply is no chat completion: {said}")
        counts = usage if isinstance(usage, dict) else {}
        num_prompt, num_response = (
            count if isinstance(count := counts.get(name), int) else None
            for name in ("prompt_tokens", "completion_tokens")
        )
        return Answer(
            prompt,
            text,
            reason,
            num_prompt_tokens=num_prompt,
            num_response_tokens=num_response,
        )

    def _body(self, prompt: Prompt) -> dict[str, Any]:
        """Return the request: text and pages in the order of the prompt's marks.

        Raises:
            PromptError: a page cannot be read, or there are too many.
        """
        limit = self._inputs.max_images
        if len(prompt.images) > limit:
            raise PromptError(f"the prompt has {len(prompt.images)} images, inputs.max_images is {limit}")
        content: list[dict[str, Any]] = []
        for number, piece in enumerate(prompt.text.split(IMAGE_MARK)):
            if number:
                url = page_url(prompt.images[number - 1], self._inputs.min_pixels, self._inputs.max_pixels)
                content.append({"type": "image_url", "image_url": {"url": url}})
            if piece:
                content.append({"type": "text", "text": piece})
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if prompt.system:
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": prompt.system}]})
        sampling = self._sampling
        return {
            "model": self.name,
            "messages": messages,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
            "seed": _seed(sampling, prompt.id),
            **({"top_k": sampling.top_k} if sampling.top_k else {}),
        }

    def _open(self, body: dict[str, Any], *, stream: bool = False) -> httpx.Response:
        return self._request("POST", "chat/completions", body, stream=stream)

    def _request(
        self, method: str, path: str, body: dict[str, Any] | None = None, *, stream: bool = False
    ) -> httpx.Response:
        """Send a request until it is answered.

        Raises:
            PromptError: the server refuses this request. EndpointError: no request can succeed.
        """
        config, started = self._config, time.monotonic()
        fault, delay_s = "", config.backoff_s
        for attempt in range(1, config.max_tries + 1):
            self._await_turn()
            if self._stop.is_set():
                raise EndpointError("stopped")
            try:
                request = self._client.build_request(method, path, json=body)
                response = self._client.send(request, stream=True)
                if not stream:
                    response = _read(response, config.timeout_s)
            except (httpx.TransportError, httpx.DecodingError) as error:
                fault = f"{type(error).__name__}: {error}"
                wait_s = delay_s
            else:
                if response.status_code < 300:
                    self._last_success = time.monotonic()
                    return response
                fault = f"HTTP {response.status_code}: {_detail(response)}"
                if response.is_redirect:
                    where = response.headers.get("location")
                    raise EndpointError(f"endpoint {config.url} sends on to {where}: set endpoint.url to that")
                if response.status_code in HOPELESS:
                    raise EndpointError(f"endpoint {config.url} refuses every request, {fault}; {self._hint(response)}")
                if response.status_code < 500 and response.status_code not in RETRIED:
                    raise PromptError(f"the endpoint refuses the request, {fault}")
                wait_s = _retry_after(response, delay_s)
            if attempt < config.max_tries:
                log.info("try %d of %d failed, next in %.1f s: %s", attempt, config.max_tries, wait_s, fault)
                if self._stop.wait(min(wait_s, MAX_DELAY_S) * random.uniform(1.0, 1.2)):
                    raise EndpointError("stopped")
                delay_s *= 2
        if self._last_success > started:  # others get through: it is this request that the server cannot answer
            raise PromptError(f"the endpoint failed {config.max_tries} times, {fault}")
        raise EndpointError(
            f"endpoint {config.url} did not answer in {config.max_tries} tries, the last was {fault}; is the server "
            "running, and is endpoint.url right?"
        )

    def _await_turn(self) -> None:
        """Wait so that requests keep to `requests_per_minute`."""
        if not self._config.requests_per_minute:
            return
        with self._turn_lock:
            turn = max(self._next_turn, time.monotonic())
            self._next_turn = turn + 60 / self._config.requests_per_minute
        if self._stop.wait(max(0.0, turn - time.monotonic())):
            raise EndpointError("stopped")

    def _hint(self, response: httpx.Response) -> str:
        if response.status_code == 404:
            return f"check endpoint.url, which usually ends in /v1, and endpoint.model={self._config.model!r}"
        return f"put the key into the environment variable {self._config.api_key_env} (endpoint.api_key_env)"


def _seed(sampling: SamplingParams, prompt_id: str) -> int:
    """Return a seed that differs by prompt, so that tries under other ids are other draws; greedy needs none."""
    return (sampling.seed + (zlib.crc32(prompt_id.encode()) if sampling.temperature else 0)) % 2**31


def _succeeded(future: Future[Answer]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is None


def _read(response: httpx.Response, timeout_s: float) -> httpx.Response:
    """Return a reply whole; httpx limits the time of each read, this one that of all together."""
    with closing(response):
        content = b"".join(_in_time(response.iter_bytes(), timeout_s))
    kept = {name: response.headers[name] for name in ("retry-after", "location") if name in response.headers}
    return httpx.Response(response.status_code, headers=kept, content=content)


def _in_time(chunks: Iterator[bytes], timeout_s: float) -> Iterator[bytes]:
    """Yield what comes, for so long.

    Raises:
        httpx.ReadTimeout: there was no end by then.
    """
    deadline = time.monotonic() + timeout_s
    for chunk in chunks:
        yield chunk
        if time.monotonic() > deadline:
            raise httpx.ReadTimeout(f"no end within {timeout_s:g} s")


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the lines of a stream. Only a line feed ends one: a text may hold what else Python takes for an end."""
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
    yield rest


def _text(value: Any) -> str:
    """Return a text of a reply, "" for none; what is no Unicode in it cannot be written anywhere and is replaced.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(value, str | None):
        raise TypeError(f"a text was expected, got {value!r:.80}")
    return (value or "").encode(errors="replace").decode()


def _events(response: httpx.Response, timeout_s: float) -> Iterator[tuple[str, str]]:
    """Yield (text, finish reason) of a streamed answer; of a server that does not stream, all at once.

    Raises:
        httpx.StreamError: the server says that it failed, or falls silent before the end.
        httpx.ReadTimeout: there was no end in time.
    """
    chunks = _in_time(response.iter_bytes(), timeout_s)
    if "text/event-stream" not in response.headers.get("content-type", ""):
        choice = json.loads(b"".join(chunks))["choices"][0]
        yield _text(choice["message"].get("content")), _text(choice.get("finish_reason"))
        return
    is_finished = False
    for line in _lines(chunks):
        payload = line.removeprefix(b"data:").strip() if line.startswith(b"data:") else b""
        if payload == b"[DONE]":
            return
        event = json.loads(payload) if payload else {}
        if fault := event.get("error"):
            raise httpx.StreamError(str(fault.get("message", fault) if isinstance(fault, dict) else fault))
        for choice in event.get("choices") or []:
            is_finished = is_finished or bool(choice.get("finish_reason"))
            yield _text((choice.get("delta") or {}).get("content")), _text(choice.get("finish_reason"))
    if not is_finished:
        raise httpx.StreamError("the stream ended before the answer did")


def _detail(response: httpx.Response) -> str:
    """Return what the server says is wrong, in one line."""
    text = response.read().decode(errors="replace").strip()
    try:
        error = json.loads(text).get("error")
        text = error["message"] if isinstance(error, dict) else str(error or text)
    except (ValueError, KeyError, AttributeError):
        pass  # not the usual form: the text itself will do
    return " ".join(text.split())[:300] or "no reason given"


def _retry_after(response: httpx.Response, default_s: float) -> float:
    given = response.headers.get("retry-after", "")
    return float(given) if given.isdigit() else default_s
