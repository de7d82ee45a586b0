"""Environments of tests: what they do follows from the turn alone, so that it is the same in every engine."""

from __future__ import annotations

import os
import signal
import threading
import time
import zlib
from collections.abc import Sequence
from typing import Any, ClassVar

from rollout.turns.environment import Reply
from rollout.types import Prompt


class Pages:
    """Answers with 0 to 3 page images, up to `most` times; the policy decides by what it writes."""

    def __init__(self, prompt, pages: Sequence[str], most: int = 3, stop: Sequence[str] = ()):
        self.pages, self.most, self.stop = pages, most, tuple(stop)
        self.num_turns = 0

    def step(self, turn):
        self.num_turns += 1
        number = zlib.crc32(turn.encode())
        if self.num_turns > self.most or number % 5 == 0:
            return None
        images = [self.pages[(number + index) % len(self.pages)] for index in range(number % 4)]
        return Reply(f"page {number % 10}: {'<image> ' * len(images)}", images, facts={"number": number})


class Moody(Pages):
    """Fails on a fifth of the turns, by what they say; kills its process where the path in KILL_AT_PATH exists."""

    def step(self, turn):
        if (path := os.environ.get("KILL_AT_PATH")) and os.path.exists(path):
            os.kill(os.getpid(), signal.SIGKILL)
        if zlib.crc32(turn[::-1].encode()) % 5 == 0:
            raise ConnectionError("the index is down")
        return super().step(turn)


class Hanging(Pages):
    """Never answers a third of the turns."""

    def step(self, turn):
        if zlib.crc32(turn[::-1].encode()) % 3 == 0:
            threading.Event().wait()
        return super().step(turn)


class Keyed:
    """Needs a key and an address, and ends after the first turn."""

    def __init__(self, prompt, api_key: str, url: str):
        assert api_key
        assert url

    def step(self, turn):
        return None


class Faulty:
    """Raises, answers nonsense, a control token, an unreadable image, too many images, too long, then ends."""

    stop = ("e", "a", "o", "1", "<")

    def __init__(self, prompt):
        self.answers = iter(
            [
                ValueError("no such page <|im_end|>"),
                "not a reply",
                Reply("a <|im_start|> of a stranger"),
                Reply("<image>", ("/nowhere.png",)),
                Reply("<image>" * 99, ("/nowhere.png",) * 99),
                Reply("long " * 2000),
                Reply(facts={"done": True}, ends=True),
            ]
        )

    def step(self, turn):
        answer = next(self.answers)
        if isinstance(answer, Exception):
            raise answer
        return answer


class Slow:
    """Async; the second answer never comes."""

    stop = ("e", "a", "o", "1", "<")

    def __init__(self, prompt):
        self.num_turns = 0

    async def step(self, turn):
        self.num_turns += 1
        if self.num_turns == 2:
            time.sleep(3600)  # noqa: ASYNC251 - not even a cancelled task would wake it
        return Reply("here")


class Queue:
    """Answers the first turn of a prompt of `order` only when all rollouts of those before it are over, and of others.

    class attributes: set by a test. left: rollouts per prompt that are not over.
    """

    max_turn_tokens = 4
    order: Sequence[str] = ()
    left: ClassVar[dict[str, int]] = {}
    changed = threading.Condition()

    def __init__(self, prompt):
        self.id, self.num_turns = prompt.id, 0

    @classmethod
    def begin(cls, order, left):
        cls.order, cls.left = order, dict(left)

    def may_go(self):
        if self.id not in self.order:
            return True
        behind = self.order[self.order.index(self.id) :]
        return not any(left for id, left in self.left.items() if id not in behind)

    def step(self, turn):
        self.num_turns += 1
        with self.changed:
            if self.num_turns == 1:
                self.changed.wait_for(self.may_go)
            if self.num_turns == 3:
                self.left[self.id] -= 1
                self.changed.notify_all()
                return None
        return Reply(f"answer {self.num_turns} of {len(turn)}")


class Refuses:
    def __init__(self, prompt):
        if prompt.id == "two":
            raise KeyError(prompt.id)

    def step(self, turn):
        return None


def conversation(processor: Any, prompt: Prompt, rollout: Any) -> tuple[Any, ...]:
    """Return (ids, is_sampled, pixel_values, image_grid_thw) of the whole row of one rollout, as plain lists."""
    encoded = processor.encode(prompt)
    ids, sampled = list(encoded.token_ids_T), [False] * len(encoded.token_ids_T)
    parts = [encoded]
    done = 0
    for observation in [*rollout.observations, None]:
        end = len(rollout.token_ids_T) if observation is None else observation.at
        ids += list(rollout.token_ids_T[done:end])
        sampled += [True] * (end - done)
        done = end
        if observation is not None:
            ids += observation.token_ids_S
            sampled += [False] * len(observation.token_ids_S)
            parts.append(processor.encode_images(observation.images))
    pixels = [part.pixel_values for part in parts if part.pixel_values is not None]
    grids = [part.image_grid_thw for part in parts if part.image_grid_thw is not None]
    return ids, sampled, pixels, grids
