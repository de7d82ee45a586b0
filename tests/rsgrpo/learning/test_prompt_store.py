"""Each prompt is decoded once a step, ahead of its use; each image passes the frozen tower once, and is remembered."""

from __future__ import annotations

import os
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rollout.inputs.processor import PromptInputs
from rollout.types import Prompt, SamplingParams
from rsgrpo.cluster.local import LocalCluster
from rsgrpo.config.train import AlgorithmConfig, ModelConfig
from rsgrpo.learning.feature_cache import FeatureFolder, tower_fingerprint
from rsgrpo.learning.learner import Learner
from rsgrpo.learning.policy import load_model
from rsgrpo.types import RsgrpoError, ScoredGroup, TrainGroup
from tests.material.learner import learnt, make_conversations, make_learner
from tests.material.training import tiny_run

WEIGHTS = [1.0, 2.0]
OVERLONG = "rewards.evisrag:overlong"


def prompts_of(groups: list[TrainGroup]) -> list[Prompt]:
    return [group.prompt for group in groups]


def test_a_prompt_is_encoded_once_over_passes_and_let_go_by_a_step_without_it(tiny_model_path, groups):
    learner = make_learner(tiny_model_path, self_check=False)
    learner.logprobs(groups)
    assert [learner.update(some, WEIGHTS)["perf/prompts_encoded"] for some in (groups, groups[1:], groups)] == [4, 0, 1]


def test_a_prompt_that_comes_twice_in_a_step_or_in_parts_is_encoded_once(tiny_model_path, groups):
    learner = make_learner(tiny_model_path, self_check=False, max_tokens_per_micro_batch=76)
    assert learner.update([*groups, groups[0]], WEIGHTS)["perf/prompts_encoded"] == 4


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0]], ids=str)
def test_prompts_prefetched_for_later_in_a_pass_are_encoded_once(order, tiny_model_path, groups):
    learner = make_learner(tiny_model_path, self_check=False, encode_ahead=2)
    learner.prefetch(prompts_of([groups[index] for index in order]))
    assert learner.update(groups, WEIGHTS)["perf/prompts_encoded"] == 4


def test_prompts_are_encoded_while_their_responses_are_sampled(tiny_model_path, groups, monkeypatch):
    learner = make_learner(tiny_model_path, self_check=False)
    encode, sampling = learner.encoder.encode, threading.Event()
    started: Counter[str] = Counter()
    done: Counter[str] = Counter()

    def slow(prompt: Prompt) -> PromptInputs:
        started[prompt.id] += 1
        assert sampling.wait(30)
        inputs = encode(prompt)
        done[prompt.id] += 1
        return inputs

    monkeypatch.setattr(learner.encoder, "encode", slow)
    learner.prefetch(prompts_of(groups))  # returns while every encoding waits
    assert not done
    sampling.set()
    pool = learner._passes.prompts._pool
    pool.shutdown(wait=True)  # the engines' work is over long after that
    assert started == done == {"p0": 1, "p1": 1, "p2": 1, "p3": 1}
    monkeypatch.setattr(learner._passes.prompts, "count_tokens", lambda prompts: [40] * len(prompts))
    metrics = learner.update(groups, WEIGHTS)
    assert done.total() == 4  # nothing is left to do, and the pool would take no more
    assert metrics["perf/prompts_encoded"] == 4
    assert metrics["time/encode_wait"] < 0.05


def test_a_training_step_lets_the_learner_decode_while_the_engine_samples(tiny_model_path, groups, tmp_path):
    config = tiny_run(tmp_path, tmp_path / "no rows are read", tiny_model_path, rewards={"overlong": OVERLONG})
    cluster = LocalCluster(config, total_steps=2, run_dir=tmp_path, check_stop=lambda: None)
    store = cluster.learner._passes.prompts
    sampling = SamplingParams(group_size=2, max_tokens=4)
    cluster.sync_weights(0)
    todo = [(prompts_of(groups), sampling)]
    [first, *_] = cluster.sample_to_learn(prompts_of(groups), lambda: todo.pop() if todo else None)
    assert isinstance(first, ScoredGroup)
    assert [key[0] for key in store._begun] == ["p0", "p1", "p2", "p3"]
    assert all(future.done() for future in store._begun.values())
    metrics = cluster.learn(groups, WEIGHTS, 1)
    assert metrics["perf/prompts_encoded"] == 4
    assert not store._begun
    cluster.close()


def test_a_thread_that_samples_ahead_may_prefetch_while_a_pass_takes_its_prompts(tiny_model_path, groups):
    learner = make_learner(tiny_model_path, self_check=False, encode_ahead=2)
    store, prompts = learner._passes.prompts, prompts_of(groups)
    learner.prefetch(prompts[:2])
    learner_thread = threading.Thread(target=store.get, args=(prompts[0],))

    class Begun(dict[Any, Any]):
        """Lets the learner's thread take a prompt between the moment it is found unneeded and that it is cancelled."""

        def __iter__(self) -> Any:
            found = list(super().__iter__())
            if learner_thread.ident is None:
                learner_thread.start()
                learner_thread.join(0.3)  # it waits for the lock, or is done
            return iter(found)

    store._begun = Begun(store._begun)
    learner.prefetch(prompts[2:])
    learner_thread.join()
    assert {key[0] for key in dict.keys(store._begun)} == {"p2", "p3"}


def test_what_was_prefetched_changes_nothing(tiny_model_path, groups):
    plain, early = make_learner(tiny_model_path), make_learner(tiny_model_path, encode_ahead=2)
    early.prefetch([*prompts_of(groups)[::-1], Prompt("dropped by the filter", "no images")])
    assert learnt(early.update(groups, WEIGHTS)) == learnt(plain.update(groups, WEIGHTS))


def test_no_more_prompts_wait_in_memory_than_asked_for(tiny_model_path, groups):
    learner = make_learner(tiny_model_path, encode_ahead=2)
    learner.prefetch(prompts_of(groups))
    learner.prefetch(prompts_of(groups)[2:])
    assert [key[0] for key in learner._passes.prompts._begun] == ["p2", "p3"]


def test_a_prefetched_prompt_that_cannot_be_read_fails_when_it_is_needed(tiny_model_path, groups, tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes(b"no image")
    learner = make_learner(tiny_model_path, self_check=False)
    learner.prefetch([Prompt("broken", "<image>what is this?", (str(path),))])
    assert learner.update(groups, WEIGHTS)["actor/skipped"] == 0
    with pytest.raises(RsgrpoError, match=r"prompt broken: .*broken\.png"):
        learner.update([TrainGroup(Prompt("broken", "<image>?", (str(path),)), groups[0].samples)], WEIGHTS)


def test_the_tower_runs_once_per_image_over_passes_and_steps(tiny_model_path, groups):
    learner = make_learner(tiny_model_path, algorithm=AlgorithmConfig(on_policy_shortcut=False), self_check=False)
    metrics = learner.update(groups, WEIGHTS)
    # Five pages, of which the four prompts show eight.
    assert (metrics["perf/images_encoded"], metrics["perf/features_reused"]) == (5, 3)
    learner.update(groups[1:], WEIGHTS)
    metrics = learner.update(groups, WEIGHTS)
    assert (metrics["perf/images_encoded"], metrics["perf/features_reused"]) == (0, 2)  # of the one that was let go


def settled(learner: Learner) -> Learner:
    """Wait until everything is on disk."""
    learner._passes.prompts._pool.shutdown(wait=True)
    return learner


def test_features_on_disk_give_the_very_same_update_without_the_tower(tiny_model_path, groups, tmp_path):
    folder = str(tmp_path / "features")
    first = make_learner(tiny_model_path, feature_cache=folder)
    computed = first.update(groups, WEIGHTS)
    assert (computed["perf/images_encoded"], computed["perf/features_read"]) == (5, 0)
    settled(first)
    assert len(list(Path(folder).glob("*/*.safetensors"))) == 5
    assert not list(Path(folder).glob("*/*.tmp"))
    second = make_learner(tiny_model_path, feature_cache=folder, vision_cache_mb=0)
    read = second.update(groups, WEIGHTS)
    assert read["perf/images_encoded"] == 0
    assert read["perf/features_read"] > 0
    assert learnt(read) == learnt(computed)
    for (name, one), (_, other) in zip(first.gather_weights(), second.gather_weights(), strict=True):
        assert torch.equal(one, other), name


def test_a_fingerprint_tells_towers_apart_by_weights_dtype_and_settings():
    torch.manual_seed(0)
    tower = torch.nn.Linear(4, 4)
    found = [tower_fingerprint(tower, {"image_mean": 0.5}), tower_fingerprint(tower, {"image_mean": 0.4})]
    assert tower_fingerprint(tower, {"image_mean": 0.5}) == found[0]
    with torch.no_grad():
        tower.bias[0] += 1e-6
    found.append(tower_fingerprint(tower, {"image_mean": 0.5}))
    found.append(tower_fingerprint(tower.to(torch.bfloat16), {"image_mean": 0.5}))
    assert len(set(found)) == 4


def test_features_of_another_tower_are_not_taken(tiny_model_path, groups, tmp_path):
    first = make_learner(tiny_model_path, feature_cache=str(tmp_path))
    first.update(groups, WEIGHTS)
    settled(first)
    hf = load_model(ModelConfig(path=tiny_model_path))
    with torch.no_grad():
        hf.model.visual.patch_embed.proj.weight[0] += 0.25
    second = make_learner(tiny_model_path, feature_cache=str(tmp_path), hf_model=hf)
    assert second.update(groups, WEIGHTS)["perf/features_read"] == 0


def test_a_torn_file_is_counted_and_computed_again(tiny_model_path, groups, tmp_path, caplog):
    first = make_learner(tiny_model_path, feature_cache=str(tmp_path))
    expected = first.update(groups, WEIGHTS)
    settled(first)
    torn = min(tmp_path.glob("*/*.safetensors"))
    torn.write_bytes(torn.read_bytes()[:100])
    second = make_learner(tiny_model_path, feature_cache=str(tmp_path))
    metrics = second.update(groups, WEIGHTS)
    assert metrics["perf/features_failed"] >= 1
    assert (metrics["perf/images_encoded"], metrics["perf/features_read"]) == (1, 4)
    assert learnt(metrics) == learnt(expected)
    assert "computing these features again" in caplog.text


def test_files_that_were_not_used_for_longest_go_first(tmp_path):
    features = torch.zeros(1000)
    size = 4096 + 1000
    folder = FeatureFolder(tmp_path, "tower", 3 * size)
    for index, name in enumerate("abc"):
        folder.put(name, features)
        path = tmp_path / "tower" / f"{name}.safetensors"
        assert path.stat().st_size < size
        os.utime(path, (index, index))
    assert folder.get("a") is not None  # used again
    folder.put("d", features)
    assert folder.evicted == 1
    assert {path.stem for path in tmp_path.glob("*/*")} == {"a", "c", "d"}
    assert folder.get("b") is None
    again = FeatureFolder(tmp_path, "another tower", 3 * size)
    for name in "efg":
        again.put(name, features)
    assert {path.stem for path in tmp_path.glob("tower/*")} < {"a", "c", "d"}  # room is shared by all towers


def test_what_was_counted_with_the_row_is_not_counted_again(tiny_model_path, groups, monkeypatch):
    learner = make_learner(tiny_model_path)
    store = learner._passes.prompts
    counted = store.count_tokens(prompts_of(groups))
    known = [
        replace(group, prompt=replace(group.prompt, num_tokens=n)) for group, n in zip(groups, counted, strict=True)
    ]

    def opens_images(prompt):
        raise AssertionError(f"the images of {prompt.id} were opened to count tokens")

    monkeypatch.setattr(learner.encoder, "count_tokens", opens_images)
    assert learner._passes.pack(known, [range(len(known))])
    with pytest.raises(AssertionError, match="p0"):
        learner._passes.pack(groups, [range(len(groups))])


def test_a_page_that_several_responses_read_is_decoded_once(tiny_model_path, page_images, monkeypatch):
    learner = make_learner(tiny_model_path, self_check=False)
    groups = make_conversations(learner.encoder, page_images, [1])
    again = [replace(groups[0], samples=(*groups[0].samples, *groups[0].samples))]
    expected = learner.logprobs(groups)
    read, decoded = learner.encoder.encode_images, Counter[Any]()

    def counted(images):
        decoded.update(images)
        return read(images)

    monkeypatch.setattr(learner.encoder, "encode_images", counted)
    found = learner.logprobs(again)
    assert decoded.total() == len(decoded) == len(page_images)
    for mine, theirs in zip(found[0], (*expected[0], *expected[0]), strict=True):
        assert abs(mine - theirs).max() < 1e-5
