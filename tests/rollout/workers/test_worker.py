"""Engines behind Ray: streaming, group affinity, weight sync, and what is said when a worker fails."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from transformers import AutoModelForImageTextToText

from rollout.config import InputsConfig, RolloutConfig
from rollout.engine import EngineError, shares
from rollout.hf.engine import HFEngine
from rollout.inputs.images import with_bytes
from rollout.inputs.stored import StoredImage, store_images
from rollout.meeting import LOOPBACK
from rollout.types import Prompt, RolloutGroup, SamplingParams
from rollout.workers.crew import Supervision
from rollout.workers.pool import RolloutPool
from rollout.workers.worker import (
    RolloutWorker,
    WorkerError,
    WorkerHandle,
    _meeting_address,
    _PutOnce,
    start_rollout_worker,
)

INPUTS = InputsConfig(min_pixels=28 * 28, max_pixels=28 * 28 * 16)
ROLLOUT = RolloutConfig(max_batch_sequences=8, num_threads=1)
SAMPLING = SamplingParams(group_size=4, max_tokens=12, seed=3)


@pytest.fixture(scope="module")
def cluster():
    ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def pool(cluster, tiny_model_path):
    workers = [
        start_rollout_worker(
            index,
            tiny_model_path,
            ROLLOUT,
            INPUTS,
            options={"num_cpus": 0.5, "runtime_env": {"env_vars": {"RSGRPO_GIVEN": "too"}}},
        )
        for index in range(2)
    ]
    pool = RolloutPool(workers, timeout_s=120)
    yield pool
    pool.close()
    pool.close()


@pytest.fixture(scope="module")
def prompts(page_images):
    pages = [("<image>" * (n % 3), tuple(page_images[: n % 3])) for n in range(7)]
    return [Prompt(f"p{n}", f"{marks}what is {n}?", images) for n, (marks, images) in enumerate(pages)]


def scripted_pool(timeout_s: float) -> RolloutPool:
    """A pool of one worker, number 3, that fails in the way that the sampling seed says."""

    class Scripted:
        def generate(self, prompts, sampling, ticket):
            yield RolloutGroup(prompts[0], (), error="a first group")
            if sampling.seed == 1:
                raise ValueError("the reading lamp is broken")
            if sampling.seed == 2:
                time.sleep(1)  # let the first group leave
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)

        def load_weights(self, named_tensors):
            raise KeyError(named_tensors[0][0])

        def ready(self):
            pass

        def ping(self):
            time.sleep(60)

        def abandon(self, ticket):
            pass

    actor: Any = ray.remote(Scripted).options(num_cpus=0).remote()
    ray.get(actor.ready.remote())
    return RolloutPool([WorkerHandle(3, actor, 8)], timeout_s=timeout_s)


def test_workers_sample_what_the_engine_samples_in_this_process(pool, prompts, tiny_model_path):
    """Pieces of at most max_batch_sequences, whoever takes them; the same bits, since the pieces are the same."""
    groups = {group.prompt.id: group for group in pool.generate(prompts, SAMPLING)}
    assert set(groups) == {prompt.id for prompt in prompts}
    engine = HFEngine(tiny_model_path, ROLLOUT, INPUTS, num_threads=1)
    for start in range(0, 7, 2):
        for group in engine.generate(prompts[start : start + 2], SAMPLING):
            assert groups[group.prompt.id] == group
    again = {group.prompt.id: group for group in pool.generate(prompts, SAMPLING)}
    assert again == groups


def test_both_workers_take_part_and_say_who_they_are(pool):
    states = pool.ping()
    assert [state["index"] for state in states] == [0, 1]
    assert len({state["pid"] for state in states} | {os.getpid()}) == 3
    for state in states:
        assert state["host"]
        assert 50 < state["rss_mb"] < 8_000
    assert _meeting_address(pool.workers, 60) == LOOPBACK  # all are on one node
    seen = ray.get(pool.workers[0].actor.__ray_call__.remote(lambda self: dict(os.environ)))
    wanted = {"OMP_NUM_THREADS": "1", "RSGRPO_GIVEN": "too"}
    assert {name: seen.get(name) for name in wanted} == wanted


def test_shares_are_equal_within_the_batch_limit(prompts):
    def sizes(num_prompts, group_size):
        return [len(share) for share in shares((prompts * 3)[:num_prompts], group_size, 8, num_engines=2)]

    assert sizes(7, 4) == [2, 2, 2, 1]
    assert sizes(7, 1) == [4, 3]
    assert sizes(16, 2) == [4, 4, 4, 4]
    assert sizes(3, 100) == [1, 1, 1]
    assert sizes(0, 4) == []


def test_the_least_busy_worker_is_given_the_next_share_while_it_has_room(cluster):
    class Scripted:
        """Answers a prompt once its own worker has `expected` of them at a time; says which worker it was."""

        def __init__(self, index, expected):
            self.index, self.here = index, threading.Barrier(expected)

        def generate(self, prompts, sampling, ticket):
            self.here.wait(timeout=60)
            for prompt in prompts:
                yield RolloutGroup(replace(prompt, images=()), (), num_prompt_tokens=self.index, error="none")

        def abandon(self, ticket):
            pass

    sampling = SamplingParams(group_size=4)
    todo = [([Prompt(f"p{n}", "?", images=(b"page",))], sampling) for n in range(6)]
    untyped: Any = ray.remote(Scripted)
    start = untyped.options(num_cpus=0, max_concurrency=8)
    handles = [WorkerHandle(i, start.remote(i, n), 1, max_sequences=4 * n) for i, n in enumerate((4, 2))]
    pool = RolloutPool(handles, timeout_s=60)
    groups = [group for group in pool.stream(lambda: todo.pop(0) if todo else None) if group is not None]
    # Both get one, then each two; then only the first has room.
    assert Counter(group.num_prompt_tokens for group in groups) == {0: 4, 1: 2}
    assert all(group.prompt.images == (b"page",) for group in groups), "the pool has the images that did not travel"
    pool.close()


def test_what_is_abandoned_ends_at_once_and_the_worker_goes_on(pool, prompts):
    endless = SamplingParams(group_size=4, max_tokens=10**6, seed=1)
    stream = pool.stream(lambda: (prompts[:2], endless) if pool.workers else None)
    assert next(stream) is None, "two shares are being sampled"
    stream.close()
    for group in pool.generate(prompts[:4], SAMPLING):
        assert len(group.rollouts) == 4


def test_synced_weights_reach_every_worker(pool, prompts, tiny_model_path):
    other = AutoModelForImageTextToText.from_pretrained(tiny_model_path, dtype=torch.float32)
    with torch.no_grad():
        other.lm_head.weight.copy_(other.lm_head.weight.flip(0))
    items = list(other.state_dict().items())
    chunks = [items[:20], ray.put(items[20:])]
    before = {group.prompt.id: group for group in pool.generate(prompts, SAMPLING)}
    pool.sync(iter(chunks), 5)
    assert [state["weights_version"] for state in pool.ping()] == [5, 5]
    groups = {group.prompt.id: group for group in pool.generate(prompts, SAMPLING)}
    assert {rollout.weights_version for group in groups.values() for rollout in group.rollouts} == {5}
    assert all(groups[key].rollouts[0].token_ids_T != before[key].rollouts[0].token_ids_T for key in before)
    engine = HFEngine(tiny_model_path, ROLLOUT, INPUTS, num_threads=1)
    engine.load_weights(items)
    engine.finish_weights(5)
    for group in engine.generate(prompts[:2], SAMPLING):
        assert groups[group.prompt.id] == group


def test_an_incomplete_sync_fails_and_names_worker_and_weights(pool, tiny_model_path):
    with pytest.raises(WorkerError, match=r"rollout worker 0 failed in finishing weights.*did not arrive") as caught:
        pool.sync([[("lm_head.weight", torch.zeros(359, 64))]], 6)
    assert isinstance(caught.value.cause, EngineError)
    model = AutoModelForImageTextToText.from_pretrained(tiny_model_path, dtype=torch.float32)
    pool.sync([list(model.state_dict().items())], 7)
    assert [state["weights_version"] for state in pool.ping()] == [7, 7]


def test_a_bad_prompt_comes_back_as_a_group_with_an_error(pool, prompts):
    groups = list(pool.generate([Prompt("bad", "<image>"), prompts[0]], SAMPLING))
    assert {group.prompt.id: group.error is None for group in groups} == {"bad": False, "p0": True}


def test_waiting_can_be_given_up(pool, prompts):
    calls: list[None] = []

    def check():
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(pool.generate(prompts, SAMPLING, check=check))
    assert len(list(pool.generate(prompts[:2], SAMPLING))) == 2, "the pool goes on to work"


@pytest.mark.parametrize(
    ("seed", "message"),
    [
        (1, r"(?s)rollout worker 3 failed in sampling.*the reading lamp is broken"),
        (2, r"rollout worker 3 died in sampling"),
        (3, r"rollout worker 3 took longer than rollout\.timeout_s=2 s for sampling"),
    ],
)
def test_a_worker_that_fails_is_named_with_the_cause(cluster, prompts, seed, message):
    pool = scripted_pool(timeout_s=2 if seed == 3 else 60)
    stream = pool.generate(prompts[:1], SamplingParams(seed=seed))
    assert next(stream).error == "a first group", "what was finished before is not lost"
    started = time.monotonic()
    with pytest.raises(WorkerError, match=message):
        next(stream)
    assert time.monotonic() - started < 30
    pool.close()


def test_a_worker_that_cannot_start_says_why(cluster, tiny_model_path):
    worker = start_rollout_worker(4, tiny_model_path, RolloutConfig(engine="fake", script="nowhere.jsonl"), INPUTS)
    with pytest.raises(WorkerError, match=r"(?s)rollout worker 4 failed.*rollout\.script: nowhere\.jsonl") as caught:
        RolloutPool([worker], timeout_s=60).ping()
    assert "\x1b" not in str(caught.value), "colours have no place in a log"


def test_failures_outside_sampling_are_named_too(cluster):
    pool = scripted_pool(timeout_s=60)
    with pytest.raises(WorkerError, match=r"(?s)rollout worker 3 failed in loading weights.*some\.weight"):
        pool.sync([[("some.weight", torch.zeros(1))]], 1)
    slow = RolloutPool(pool.workers, timeout_s=0.5)
    with pytest.raises(WorkerError, match=r"took longer than rollout\.timeout_s=0\.5 s for answering a ping"):
        slow.ping()
    pool.close()


def test_a_worker_killed_in_mid_step_is_replaced_and_every_prompt_is_sampled(cluster, prompts, tiny_model_path):
    def start(index):
        return start_rollout_worker(index, tiny_model_path, ROLLOUT, INPUTS, options={"num_cpus": 0.5})

    sent = []

    def send(workers):
        sent.append([worker.index for worker in workers])
        items = AutoModelForImageTextToText.from_pretrained(tiny_model_path, dtype=torch.float32).state_dict()
        supervised.sync([list(items.items())], 4, workers)

    supervision = Supervision(start, send, max_restarts=1)
    supervised: RolloutPool = RolloutPool([start(0), start(1)], timeout_s=120, supervision=supervision)
    send(supervised.workers)
    before = {group.prompt.id: group for group in supervised.generate(prompts, SAMPLING)}
    groups = supervised.generate(prompts, SAMPLING)
    arrived = [next(groups)]
    os.kill(supervised.ping()[1]["pid"], signal.SIGKILL)
    arrived += groups
    assert sorted(group.prompt.id for group in arrived) == sorted(before), "each prompt once"
    assert {rollout.weights_version for group in arrived for rollout in group.rollouts} == {4}
    assert sent == [[0, 1], [1]]
    assert supervised.num_restarts == 1
    # No batch has succeeded since that failure: one more ends the work.
    os.kill(supervised.ping()[0]["pid"], signal.SIGKILL)
    with pytest.raises(WorkerError, match=r"(?s)rollout worker 0 died.*consecutive failure 2"):
        list(supervised.generate(prompts, SAMPLING))
    supervised.close()


def test_stored_images_are_read_where_they_are_needed_and_are_stored_once(pool, prompts, page_images):
    content = Path(page_images[0]).read_bytes()
    loose = Prompt("p8", "<image><image>what?", (content, page_images[1]))
    stored = store_images(loose)
    image, path = stored.images
    assert isinstance(image, StoredImage)
    assert (image.read(), path) == loose.images
    assert store_images(stored) is stored
    assert store_images(prompts[2]) is prompts[2], "paths stay paths"
    as_bytes, as_reference = (next(iter(pool.generate([prompt], SAMPLING))) for prompt in (loose, stored))
    assert as_reference.rollouts == as_bytes.rollouts
    assert as_reference.prompt.images == stored.images
    elsewhere: Any = ray.remote(with_bytes)
    assert ray.get(elsewhere.options(num_cpus=0).remote(stored)) == loose
    assert hash(stored.images) == hash(ray.get(ray.put(stored)).images)


def test_a_worker_answers_a_ping_while_it_samples(pool, prompts):
    stream = (
        pool.workers[0]
        .actor.generate.options(num_returns="streaming")
        .remote(prompts, SamplingParams(group_size=8, max_tokens=200))
    )
    assert ray.get(pool.workers[0].actor.ping.remote(), timeout=120)["index"] == 0
    ready, _ = ray.wait([stream.completed()], timeout=0)
    assert not ready, "sampling was meant to be still running"
    assert len(list(stream)) == 7


def test_a_worker_is_an_ordinary_object_too(tiny_model_path, tmp_path):
    script = tmp_path / "script.jsonl"
    script.write_text(json.dumps({"id": "a", "responses": ["7"]}))
    rollout = RolloutConfig(engine="fake", script=str(script))
    worker: Any = RolloutWorker(0, tiny_model_path, rollout, INPUTS)
    (group,) = worker.generate([Prompt("a", "?")], SamplingParams(max_tokens=5))
    assert group.rollouts[0].text == "7"
    worker.load_weights([("x", torch.zeros(1))])
    worker.finish_weights(2)
    assert worker.engine.weights_version == 2
    worker.close()


def test_what_all_engines_get_is_put_into_the_object_store_once(monkeypatch):
    stored: list[Any] = []

    def put_into_store(args: Any) -> int:
        stored.append(args)
        return len(stored)

    monkeypatch.setattr(ray, "put", put_into_store)
    put = _PutOnce(2)
    adapter: tuple[Any, ...] = (b"tensors", {}, 1)
    start: tuple[Any, ...] = ()
    assert [put(adapter), put(adapter)] == [1, 1]
    assert [put(start), put(start)] == [2, 2]
    assert put(adapter) == 3  # forgotten once every engine had it
    assert stored == [adapter, start, adapter]
