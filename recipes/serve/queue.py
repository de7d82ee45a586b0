"""The queue between HTTP and the answerer, emptied by threads; an engine is given batches.

Callers are called back from another thread.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import takewhile

from recipes.answers.types import Answer, Answerer, Resampling, Steps
from rollout.types import Observation, Prompt, SamplingParams
from rsgrpo.errors import RsgrpoError

log = logging.getLogger(__name__)

Piece = str | Observation | Answer | RsgrpoError


@dataclass(frozen=True, slots=True)
class Waiting:
    """A prompt in the queue.

    hear: called with each piece. alone: never put into a batch. left: set when the caller is gone.
    sampling: None as the answerer was told; a batch has one.
    """

    prompt: Prompt
    hear: Callable[[Piece], None]
    alone: bool
    left: threading.Event
    sampling: SamplingParams | None = None

    def goes_with(self, batch: Sequence[Waiting]) -> bool:
        """Whether this prompt can be sampled in one call with these."""
        ids = [waiting.prompt.id for waiting in batch]
        return not self.alone and self.sampling == batch[0].sampling and self.prompt.id not in ids


class PromptQueue:
    """Passes prompts to an answerer from its own threads and the results to callbacks.

    An engine gets all waiting prompts as one batch, then the next; a prompt that streams it gets alone. A concurrent
    answerer gets every prompt as it arrives.
    """

    def __init__(self, answerer: Answerer, *, num_threads: int, batch_size: int) -> None:
        self._answerer = answerer
        self._batch_size = batch_size
        self._queue: queue.SimpleQueue[Waiting | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"prompt-queue-{number}", daemon=True)
            for number in range(num_threads if answerer.is_concurrent else 1)
        ]
        for thread in self._threads:
            thread.start()

    def ask(
        self, prompt: Prompt, hear: Callable[[Piece], None], *, streams: bool, sampling: SamplingParams | None = None
    ) -> threading.Event:
        """Queue a prompt; `hear` is called from another thread, finally with an answer or with an error.

        streams: call it with pieces of the text before. sampling: of this prompt; None as the answerer was told.

        Returns:
            An event to set when nobody listens any more: a waiting prompt is dropped, a stream is ended.
        """
        waiting = Waiting(prompt, hear, streams or self._answerer.is_concurrent, threading.Event(), sampling)
        self._queue.put(waiting)
        return waiting.left

    def close(self) -> None:
        """Drop what waits, let the threads finish their current prompts, and join them."""
        while not self._queue.empty():
            self._queue.get()
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        following: Waiting | None = None
        while (first := following or self._queue.get()) is not None:
            batch, following = [first], None
            while not first.alone and len(batch) < self._batch_size and not self._queue.empty():
                following = self._queue.get()
                if following is None:  # the queue closes: after this batch
                    self._queue.put(None)
                if following is None or not following.goes_with(batch):
                    break
                batch.append(following)
                following = None
            batch = [waiting for waiting in batch if not waiting.left.is_set()]
            if batch:
                self._serve(batch, first)

    def _serve(self, batch: Sequence[Waiting], first: Waiting) -> None:
        answerer = self._answerer
        if first.sampling is not None:
            assert isinstance(answerer, Resampling), "only answerers of this package are asked in other ways"
            answerer = answerer.sampled(first.sampling)
        if first.alone:
            ask = answerer.steps if isinstance(answerer, Steps) else answerer.stream
            with closing(ask(first.prompt)) as pieces:
                _deliver(takewhile(lambda _: not first.left.is_set(), pieces), batch)
        else:
            _deliver(answerer.answer([waiting.prompt for waiting in batch]), batch)


def _deliver(pieces: Iterable[str | Observation | Answer], batch: Sequence[Waiting]) -> None:
    """Pass pieces on; callers without an answer in the end get an error."""
    hears = {waiting.prompt.id: waiting.hear for waiting in batch}
    fault: RsgrpoError = RsgrpoError("the model returned no answer")
    try:
        for piece in pieces:
            if isinstance(piece, Answer):
                hears.pop(piece.prompt.id)(piece)
            else:
                for hear in hears.values():
                    hear(piece)
    except RsgrpoError as error:
        fault = error
    except Exception as error:  # a bug of an engine must not leave clients waiting, nor end this thread
        log.exception("the answerer failed")
        fault = RsgrpoError(f"the model failed: {type(error).__name__}")
    for hear in hears.values():
        hear(fault)
