"""Throw mutated input at every border of the project: `python -m tests.runs.fuzz [KIND ...] --seed 0 --count 1000`.

Each kind says how many inputs it tried, how they ended, and the slowest one. Anything but the errors that a border
promises is a finding: it is printed with its seed and number, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.runs.fuzz.mutations import damaged_tree, documents, images, mutated, request_bodies, texts
from tests.runs.fuzz.turns import environment_attempts
from tests.runs.fuzz.values import config_attempts, reply_attempts, reward_attempts

Attempt = Callable[[], str]
"""Tries one input; returns how it ended, or raises, which is a finding."""


def image_attempts(draw: random.Random) -> Iterator[Attempt]:
    """Every way in which an image is opened."""
    from rollout.inputs.images import PromptError, check_decodes, decode, read_size

    seeds = images()

    def attempt(content: bytes) -> str:
        ends = []
        for open_it in (read_size, check_decodes, decode):
            try:
                open_it(content)
                ends.append("read")
            except PromptError as error:
                ends.append("a message of several lines" if "\n" in str(error) else "refused")
        assert "a message of several lines" not in ends
        return ends[-1]

    while True:
        content = mutated(draw.choice(seeds), draw)
        yield lambda content=content: attempt(content)  # type: ignore[misc]


def body_attempts(draw: random.Random) -> Iterator[Attempt]:
    """Requests to the server."""
    from recipes.serve.chat_request import RequestError, RequestLimits, read_request
    from recipes.serve.sampling import SamplingRules
    from rollout.inputs.images import check_decodes, read_size
    from rollout.types import SamplingParams

    sampling = SamplingParams(temperature=0.0, top_p=1.0, seed=0, max_tokens=64)

    def check(content: bytes, max_pixels: int) -> tuple[int, int]:
        size = read_size(content)
        if size[0] * size[1] <= max_pixels:
            check_decodes(content)
        return size

    def attempt(body: bytes) -> str:
        try:
            rules = SamplingRules(sampling, is_free=draw.random() < 0.5)
            read_request(body, "id", "model", "{images}\n{question}", "", rules, RequestLimits(), check)
        except RequestError as error:
            return f"status {error.status}"
        return "accepted"

    for body in request_bodies(draw):
        yield lambda body=body: attempt(body)  # type: ignore[misc]


def text_attempts(draw: random.Random) -> Iterator[Attempt]:
    """Responses of a model: parsers and terminal."""
    from recipes.answers.parsing import parse_lenient, parse_strict
    from rollout.errors import printable

    def attempt(text: str) -> str:
        parsed = parse_lenient(text, ["a.png", "b.png"])
        json.dumps(parsed.as_dict())
        parse_strict(text, None)
        assert printable(text).replace("\n", "").replace("\t", "").isprintable() or "\x1b" not in printable(text)
        return "well-formed" if parsed.format_ok else "malformed"

    for text in texts(draw):
        yield lambda text=text: attempt(text)  # type: ignore[misc]


def run_folder_attempts(draw: random.Random) -> Iterator[Attempt]:
    """Files of a run: a report, a resume and a comparison of settings."""
    from rsgrpo.config.train import TrackingConfig
    from rsgrpo.records.tracking import Tracker, read_metrics
    from rsgrpo.report.page import write_report
    from rsgrpo.running.settings import changed_settings
    from tests.material.synthetic_run import write_run

    scratch = Path(tempfile.mkdtemp(prefix="rsgrpo-fuzz-"))
    sound = write_run(scratch / "sound", num_steps=3, val_every=3)

    def attempt(run: Path) -> str:
        try:
            write_report(run)
            read_metrics(run)
            changed_settings(run, {"seed": 1})
            Tracker(run, TrackingConfig(wandb="disabled"), {}, name="x", resume_step=2).close()
            return "read"
        finally:
            shutil.rmtree(run)

    try:
        while True:
            run = damaged_tree(sound, scratch / "run", draw)
            yield lambda run=run: attempt(run)  # type: ignore[misc]
    finally:
        shutil.rmtree(scratch)


def checkpoint_attempts(draw: random.Random) -> Iterator[Attempt]:
    """A newest checkpoint in which something differs: the one before it must be used."""
    from rsgrpo.running.checkpoint import CheckpointFolder

    scratch = Path(tempfile.mkdtemp(prefix="rsgrpo-fuzz-"))

    def save(folder: Path) -> None:
        (folder / "model.bin").write_bytes(random.Random(0).randbytes(3000))

    def attempt(step: Path) -> str:
        try:
            found = CheckpointFolder(step.parent, keep_last=2, keep_best=0).to_resume()
            assert found is not None
            assert found.step == 4, "a damaged checkpoint was used"
            assert found.driver_state()["step"] == 4
            return "set aside"
        finally:
            shutil.rmtree(step.parent)

    try:
        while True:
            folder = scratch / "checkpoints"
            checkpoints = CheckpointFolder(folder, keep_last=2, keep_best=0)
            for step in (4, 8):
                checkpoints.write(step, save, {"step": step, "surplus": list(range(100))}, 0.5)
            damaged_tree(folder / "step_000008", None, draw)
            yield lambda folder=folder: attempt(folder / "step_000008")  # type: ignore[misc]
    finally:
        shutil.rmtree(scratch)


def document_attempts(draw: random.Random) -> Iterator[Attempt]:
    """Documents, ten to a folder, through the real workers."""
    from recipes.retrieval.pages.ingest import ingest
    from recipes.retrieval.pages.settings import RenderSettings
    from rsgrpo.records.console import Console

    scratch = Path(tempfile.mkdtemp(prefix="rsgrpo-fuzz-"))
    seeds = documents()

    def attempt() -> str:
        docs, store = scratch / "docs", scratch / "store"
        docs.mkdir()
        try:
            for number in range(10):
                name, content = draw.choice(seeds)
                (docs / f"{number}{name}").write_bytes(mutated(content, draw))
            with Console(io.StringIO()) as console:
                report = ingest(
                    [docs], store, RenderSettings(dpi=40), num_workers=1, page_timeout_s=60, console=console
                )
            died = [row.error for row in report.errors if "died" in row.error or "no progress" in row.error]
            assert not died, died
            return f"{len(report.errors)} of 10 refused"
        finally:
            shutil.rmtree(docs)
            shutil.rmtree(store, ignore_errors=True)

    try:
        while True:
            yield attempt
    finally:
        shutil.rmtree(scratch)


KINDS: dict[str, Callable[[random.Random], Iterator[Attempt]]] = {
    "images": image_attempts,
    "bodies": body_attempts,
    "texts": text_attempts,
    "runs": run_folder_attempts,
    "checkpoints": checkpoint_attempts,
    "documents": document_attempts,
    "configs": config_attempts,
    "rewards": reward_attempts,
    "replies": reply_attempts,
    "environments": environment_attempts,
}


def campaign(kind: str, seed: int, count: int, *, until: float | None = None) -> int:
    """Try `count` inputs of a kind, or those that fit until a time; print what came of them; return the findings."""
    ends: Counter[str] = Counter()
    findings, slowest = 0, 0.0
    attempts = KINDS[kind](random.Random(seed))
    for number in range(count):
        if until is not None and time.monotonic() > until:
            break
        attempt = next(attempts)
        start = time.monotonic()
        try:
            ends[attempt()] += 1
        except Exception:
            findings += 1
            print(f"FINDING: {kind}, seed {seed}, number {number}\n{traceback.format_exc()}")
        slowest = max(slowest, time.monotonic() - start)
    attempts.close()  # type: ignore[attr-defined]
    tried = sum(ends.values()) + findings
    how = dict(ends.most_common(12))
    print(f"{kind}: seed {seed}, {tried:,} tried, {findings} findings, slowest {slowest:.2f} s; {how}")
    return findings


def main() -> int:
    """Run the command line."""
    top = argparse.ArgumentParser(prog="python -m tests.runs.fuzz", description=__doc__)
    top.add_argument("kinds", nargs="*", metavar="KIND", help=f"default: all of {', '.join(KINDS)}")
    top.add_argument("--seed", type=int, default=0)
    top.add_argument("--count", type=int, default=1000, help="inputs of each kind")
    top.add_argument("--seconds", type=float, help="time for each kind; fewer inputs are tried then")
    options = top.parse_args()
    if unknown := set(options.kinds) - set(KINDS):
        top.error(f"there is no kind {', '.join(sorted(unknown))}")
    found = 0
    for kind in options.kinds or KINDS:
        until = None if options.seconds is None else time.monotonic() + options.seconds
        found += campaign(kind, options.seed, options.count, until=until)
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
