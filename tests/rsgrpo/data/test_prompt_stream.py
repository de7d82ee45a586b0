"""The training stream: every prompt once an epoch, and a state from which it goes on exactly."""

from __future__ import annotations

import json

import pytest

from rollout.types import Prompt
from rsgrpo.data.dataset import PromptDataset, PromptStream
from rsgrpo.errors import RsgrpoError


def numbered(count: int, name: str = "p") -> PromptDataset:
    return PromptDataset([Prompt(id=f"{name}{n}", text="t") for n in range(count)])


def ids(prompts: list[Prompt]) -> list[str]:
    return [prompt.id for prompt in prompts]


def test_without_shuffle_the_stream_is_the_file_and_wraps_inside_a_batch():
    stream = PromptStream(numbered(5), seed=0, shuffle=False)
    assert [ids(stream.next(3)) for _ in range(3)] == [["p0", "p1", "p2"], ["p3", "p4", "p0"], ["p1", "p2", "p3"]]


def test_every_epoch_holds_every_prompt_once_in_another_order():
    stream = PromptStream(numbered(50), seed=1, shuffle=True)
    flat = [prompt_id for _ in range(15) for prompt_id in ids(stream.next(10))]
    epochs = [flat[start : start + 50] for start in (0, 50, 100)]
    assert all(sorted(epoch) == sorted(ids(list(numbered(50)))) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_the_order_is_fixed_by_the_seed():
    def order(seed):
        return ids(PromptStream(numbered(20), seed=seed, shuffle=True).next(40))

    assert order(3) == order(3)
    assert order(3) != order(4)


@pytest.mark.parametrize("taken", [0, 1, 6, 7, 8, 13, 14, 20])
def test_a_stream_goes_on_exactly_where_its_state_was_taken(taken):
    stream = PromptStream(numbered(7), seed=5, shuffle=True)
    stream.next(taken)
    state = json.loads(json.dumps(stream.state()))
    resumed = PromptStream(numbered(7), seed=5, shuffle=True)
    resumed.load_state(state)
    assert resumed.state() == state
    assert ids(resumed.next(20)) == ids(stream.next(20))


def test_a_batch_larger_than_the_data_set_takes_several_epochs():
    assert ids(PromptStream(numbered(2), seed=0, shuffle=False).next(5)) == ["p0", "p1", "p0", "p1", "p0"]


@pytest.mark.parametrize(
    ("other", "key"),
    [
        (PromptStream(numbered(4), 0, True), "num_prompts was 5, is 4"),
        (PromptStream(numbered(5, "q"), 0, True), "fingerprint"),
        (PromptStream(numbered(5), 1, True), "seed was 0, is 1"),
        (PromptStream(numbered(5), 0, False), "shuffle was True, is False"),
    ],
)
def test_a_state_of_other_rows_is_refused(other, key):
    with pytest.raises(RsgrpoError, match=key):
        other.load_state(PromptStream(numbered(5), 0, True).state())
