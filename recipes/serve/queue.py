"""Between those who ask and the one who answers: a queue, the threads that empty it, and batches for an engine.

Knows no HTTP; who asks is called back from another thread.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import takewhile

from recipes.answers.types import Answer, Answerer
from rollout.types import Prompt
from rsgrpo.errors import RsgrpoError

log = logging.getLogger(__name__)

Piece = str | Answer | RsgrpoError


@dataclass(frozen=True, slots=True)
class Wish:
    """A prompt that waits.

    hear: is called with what comes. streams: also with pieces of the text. left: set when whoever asked is gone.
    """

    prompt: Prompt
    hear: Callable[[Piece], None]
    streams: bool
    left: threading.Event


class Desk:
    """Hands prompts to an answerer from threads of its own; what comes back is given to a callback.

    An engine takes what waits as one batch, then the next; a prompt that wants its text in pieces it takes alone. An
    endpoint takes every prompt as it comes.
    """

    def __init__(self, answerer: Answerer, *, num_threads: int, batch_size: int) -> None:
        self._answerer = answerer
        self._waiting: queue.SimpleQueue[Wish | None] = queue.SimpleQueue()
        in_batches = not answerer.is_concurrent
        work = partial(self._in_batches, batch_size) if in_batches else self._one_by_one
        self._threads = [
            threading.Thread(target=work, name=f"desk-{number}", daemon=True)
            for number in range(1 if in_batches else num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def ask(self, prompt: Prompt, hear: Callable[[Piece], None], *, streams: bool) -> threading.Event:
        """Queue a prompt; `hear` is called from another thread, at last with an output or with an error.

        streams: call it with pieces of text before.

        Returns:
            What to set when nobody listens any more: a prompt that still waits is dropped, a stream is ended.
        """
        wish = Wish(prompt, hear, streams, threading.Event())
        self._waiting.put(wish)
        return wish.left

    def close(self) -> None:
        """Let the threads finish what they do, drop what waits, and end."""
        while not self._waiting.empty():
            self._waiting.get()
        for _ in self._threads:
            self._waiting.put(None)
        for thread in self._threads:
            thread.join()

    def _one_by_one(self) -> None:
        while (wish := self._waiting.get()) is not None:
            if not wish.left.is_set():
                self._alone(wish)

    def _alone(self, wish: Wish) -> None:
        with closing(self._answerer.stream(wish.prompt)) as pieces:
            heard = takewhile(lambda _: not wish.left.is_set(), pieces)
            _deliver(heard, {wish.prompt.id: wish.hear}, streams=True)

    def _in_batches(self, batch_size: int) -> None:
        wish = self._waiting.get()
        while wish is not None:
            if wish.left.is_set():
                wish = self._waiting.get()
                continue
            if wish.streams:
                self._alone(wish)
                wish = self._waiting.get()
                continue
            batch, following = [wish], True
            while len(batch) < batch_size and following and not self._waiting.empty():
                wish = self._waiting.get()
                following = wish is not None and not wish.streams
                if wish is not None and following and not wish.left.is_set():
                    batch.append(wish)
            hears = {member.prompt.id: member.hear for member in batch}
            _deliver(self._answerer.answer([member.prompt for member in batch]), hears, streams=False)
            if following:
                wish = self._waiting.get()


def _deliver(pieces: Iterable[str | Answer], hears: dict[str, Callable[[Piece], None]], *, streams: bool) -> None:
    """Pass pieces on; whoever has heard no output in the end hears an error."""
    fault: RsgrpoError = RsgrpoError("the model returned no answer")
    try:
        for piece in pieces:
            if isinstance(piece, Answer):
                hears.pop(piece.prompt.id)(piece)
            elif streams:
                for hear in hears.values():
                    hear(piece)
    except RsgrpoError as error:
        fault = error
    except Exception as error:  # a bug of an engine must not leave clients waiting for ever, nor end this thread
        log.exception("the answerer failed")
        fault = RsgrpoError(f"the model failed: {type(error).__name__}")
    for hear in hears.values():
        hear(fault)
