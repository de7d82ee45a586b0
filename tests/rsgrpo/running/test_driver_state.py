"""The driver's state in a checkpoint: an exact round trip, a version, and nothing that a file could run."""

from __future__ import annotations

import datetime
import decimal
import json
import pickle
from typing import Any

import numpy as np
import pytest

from rewards.api import Credit, Span
from rollout.types import Prompt, Rollout, RolloutGroup
from rsgrpo.running.driver_state import StateError, read_state, write_state
from rsgrpo.types import ScoredGroup


def a_group(num_tokens: int = 40) -> ScoredGroup:
    logprobs_T: Any = np.linspace(-3, -0.1, num_tokens, dtype=np.float32)
    score: Any = np.float32(0.3)
    truth: Any = {"answers": ["7"], "when": datetime.date(2024, 2, 29), "price": decimal.Decimal("1.10"), 3: (1, None)}
    prompt = Prompt("p é", "<image>?", ("page.png", b"\x00\xff"), truth, "?", "s")
    rollout = Rollout(
        list(range(num_tokens)),
        logprobs_T,
        "text\ud800".encode("utf-16", "surrogatepass").decode("utf-16", "replace"),
        [(i, i + 1) for i in range(num_tokens)],
        "stop",
        4,
    )
    other = Rollout((1, 2), [-0.1, float("-inf")], "", ((0, 0), (0, 0)), "length", 4)
    return ScoredGroup(
        RolloutGroup(prompt, (rollout, other), 7),
        ("a", "b"),
        [[0.1 + 0.2, None], [float("nan"), score]],
        [[(Credit("", 0.5, Span(0, 3)),), ()], [(Credit("k", 1.0, None),), ()]],
        [[False, True], [True, False]],
        ("m",),
        [[1.0], [None]],
        (0, 1),
    )


STATE: dict[str, Any] = {
    "validated": True,
    "stream": {"epoch": 2, "position": 2**70, "nested": [{"$odd": {}}, {}]},
    "surplus": [a_group(), a_group(2)],
    "ready": (4, ([a_group()], {"rollout/tries": 1.0})),
    "tracker": {"metrics_lines": 3},
}


def test_a_round_trip_is_exact_down_to_types_and_bits(tmp_path):
    write_state(tmp_path, STATE)
    back = read_state(tmp_path)
    assert repr(back) == repr(STATE)  # repr of a float is exact, and shows types
    mine, theirs = STATE["surplus"][0].group.rollouts[0], back["surplus"][0].group.rollouts[0]
    assert theirs.logprobs_T.dtype == np.float32
    assert theirs.logprobs_T.tobytes() == mine.logprobs_T.tobytes()
    assert back["surplus"][0].group.prompt == STATE["surplus"][0].group.prompt


def test_a_value_without_a_safe_form_is_named_by_its_place(tmp_path):
    with pytest.raises(StateError, match=r"surplus\[0\]\.truth is a object"):
        write_state(tmp_path, {"surplus": [Prompt("a", "?", truth=object())]})  # type: ignore[arg-type]


def test_another_version_and_a_damaged_file_are_refused(tmp_path):
    write_state(tmp_path, STATE)
    file = tmp_path / "driver.json"
    whole = file.read_text()
    file.write_text(json.dumps({"version": 9, "state": {}}))
    with pytest.raises(StateError, match=r"format version 9, this release reads 1.*name="):
        read_state(tmp_path)
    for damaged in (whole[:-9], json.dumps({"version": 1, "state": {"x": {"$Popen": {"args": "true"}}}})):
        file.write_text(damaged)
        with pytest.raises(StateError, match="holds no driver state that can be read"):
            read_state(tmp_path)


def test_arrays_that_hold_objects_are_not_unpickled(tmp_path):
    write_state(tmp_path, {"x": np.zeros(2)})
    objects: Any = {"0": np.array([print], dtype=object)}
    np.savez(tmp_path / "driver.npz", **objects)
    with pytest.raises(StateError, match="allow_pickle"):
        read_state(tmp_path)


class Hostile:
    def __reduce__(self):
        return exec, ("raise SystemExit('code was run')",)


def test_a_pickle_of_an_older_release_is_read_if_it_holds_our_types_only(tmp_path):
    (tmp_path / "driver.pkl").write_bytes(pickle.dumps({"surplus": [a_group()][:0], "stream": {"epoch": 1}}))
    assert read_state(tmp_path) == {"surplus": [], "stream": {"epoch": 1}}
    scores: Any = np.array([[1.0]], np.float32)
    group = ScoredGroup(RolloutGroup(Prompt("a", "?"), ()), ("a",), scores, [], [])
    (tmp_path / "driver.pkl").write_bytes(pickle.dumps({"surplus": [group]}))
    assert repr(read_state(tmp_path)) == repr({"surplus": [group]})


def test_a_pickle_that_would_run_code_is_refused_unrun(tmp_path):
    (tmp_path / "driver.pkl").write_bytes(pickle.dumps({"surplus": [Hostile()]}))
    with pytest.raises(StateError, match=r"older release, and it asks for builtins\.exec"):
        read_state(tmp_path)
