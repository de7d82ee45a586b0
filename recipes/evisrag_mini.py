"""EVisRAG end to end in minutes: `make evisrag-mini`, or `python -m recipes.evisrag_mini` after `recipes.prepare demo`.

Data in EVisRAG's layout, warm start, RS-GRPO, export, evaluation on two benchmarks, inference, a server. Every stage is
a command that is printed and can be typed; it reads what the stages before it wrote, and is skipped if its own result
exists.
"""

from __future__ import annotations

import base64
import functools
import importlib.util
import json
import logging
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from recipes.answers.options import Parser
from recipes.demo.evisrag_layout import BENCHMARKS, PROMPT_FILE, TEST_FILE, TRAIN, TRAIN_FILES
from recipes.evaluation.intervals import Difference
from recipes.evaluation.page import signed
from rollout.errors import run_program
from rollout.files import json_object, read_jsonl, replaced, write_text
from rsgrpo.errors import InputError, RsgrpoError
from rsgrpo.records.console import Console

ROOT = Path("evisrag-mini")
HUB, ROWS, EVALUATION = ROOT / "hub", ROOT / "train", ROOT / "evaluation"
CHECKED = ROWS / "checked"  # exists once every row of every file has passed the check
TRAINED = ROOT / "rl/export"
OWN_WARM_START, DEMO_WARM_START = ROOT / "sft/export", Path("demo/sft/export")
LAST_OF_EXPORT = "preprocessor_config.json"
SCORES = {"EM": "strict/global/em", "slot F1": "evidence/slot_f1", "citation F1": "evidence/citation_f1"}
ANSWER, SERVED = ROOT / "answer.json", ROOT / "served.json"
START_TIMEOUT_S, STOP_TIMEOUT_S, REQUEST_TIMEOUT_S = 180.0, 60.0, 120.0


@dataclass(frozen=True, slots=True)
class Stage:
    """One step. makes: a file that exists once it is done."""

    name: str
    makes: Path
    run: Callable[[], None]


def stages(engine: str, seed: int = 0) -> list[Stage]:
    """Return all stages, in order. seed: of warm start and RL."""
    # The demo's warm start was trained on the same rows with the same settings, so it is reused.
    warm_start = DEMO_WARM_START if (DEMO_WARM_START / LAST_OF_EXPORT).is_file() else OWN_WARM_START
    recipe = "recipe=evisrag_mini"
    sft = functools.partial(run_module, "recipes.sft", recipe, f"seed={seed}")
    rl = functools.partial(run_module, "rsgrpo.train", recipe, f"model.path={warm_start}", f"seed={seed}")
    found = [
        Stage("data", HUB / PROMPT_FILE, functools.partial(run_module, "recipes.prepare", "mini")),
        Stage("unpack", CHECKED, unpack),
        Stage("sft", warm_start / LAST_OF_EXPORT, sft),
        Stage("rs-grpo", TRAINED / LAST_OF_EXPORT, rl),
    ]
    for benchmark in BENCHMARKS:
        before, after = (EVALUATION / f"{benchmark}-{name}" for name in ("warm-start", "rs-grpo"))
        for folder, model, more in (
            (before, warm_start, []),
            (after, TRAINED, [f"against={before / 'predictions.jsonl'}"]),
        ):
            options = [f"benchmark={HUB / benchmark}", f"model={model}", f"name={folder.name}", f"rollout={engine}"]
            run = functools.partial(run_module, "recipes.evaluate", recipe, *options, *more)
            found.append(Stage(f"evaluate {folder.name}", folder / "results.json", run))
    return [*found, Stage("infer", ANSWER, lambda: infer(engine)), Stage("serve", SERVED, lambda: serve(engine))]


def run_module(module: str, *options: str | Path, output: Any = None) -> None:
    """Print `python -m module options` and run it in a process of its own.

    Raises:
        RsgrpoError: it failed.
    """
    arguments = show(module, *options)
    code = subprocess.run([sys.executable, *arguments], stdout=output, check=False).returncode
    if code:
        raise RsgrpoError(
            f"`python {shlex.join(arguments)}` ended with exit code {code}. Fix what it reports, then run the same "
            "command to resume."
        )


def show(module: str, *options: str | Path) -> list[str]:
    """Print a command as it would be typed; return its arguments to Python."""
    arguments = ["-m", module, *map(str, options)]
    print(f"\n$ python {shlex.join(arguments)}", flush=True)
    return arguments


def unpack() -> None:
    """Write the packed pages to files, and check that every row serves its purpose."""
    run_module("recipes.prepare", "unpack", HUB / TRAIN, "--out", ROWS)
    limits = ("--min-pixels", "784", "--max-pixels", "50176", "--max-images", "4", "--max-prompt-tokens", "256")
    for name, purpose in (("sft", "sft"), ("train", "grpo")):
        rows = ROWS / f"{TRAIN_FILES[name]}.jsonl"
        run_module("recipes.prepare", "validate", rows, "--for", purpose, "--model", "demo/model", *limits)
    rows = HUB / list(BENCHMARKS)[1] / TEST_FILE
    run_module("recipes.prepare", "validate", rows, "--for", "test", "--prompt", HUB / PROMPT_FILE, *limits)
    CHECKED.parent.mkdir(exist_ok=True)
    write_text(CHECKED, "")


def worn_question() -> tuple[str, list[Path]]:
    """Return the first question of the second benchmark, and its pages as files."""
    benchmark = list(BENCHMARKS)[1]
    run_module("recipes.prepare", "unpack", HUB / benchmark, "--out", ROOT / "test" / benchmark)
    _, row = next(read_jsonl(HUB / benchmark / TEST_FILE))
    return row["query"], [ROOT / "test" / benchmark / path for path in row["image"]]


def model_options(engine: str) -> list[str]:
    """Return the options that infer and serve share."""
    limits = ["--max-tokens", "128", "--max-prompt-tokens", "256"]
    return ["--model", str(TRAINED), "--engine", engine, "--prompt", str(HUB / PROMPT_FILE), *limits]


def infer(engine: str) -> None:
    """Ask one question about worn pages and keep the parsed answer."""
    question, pages = worn_question()
    with replaced(ANSWER) as unfinished:
        with unfinished.open("wb") as file:
            run_module("recipes.infer", question, "--image", *pages, *model_options(engine), "--json", output=file)
        print(unfinished.read_text(encoding="utf-8"))


def serve(engine: str) -> None:
    """Start a server, ask it the same question with the pages inside the request, stop it, and keep the reply.

    Raises:
        RsgrpoError: it did not start, answer, or end with 0.
    """
    question, pages = worn_question()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    arguments = show("recipes.serve", *model_options(engine), "--port", address.rpartition(":")[2])
    server = subprocess.Popen([sys.executable, *arguments])
    try:
        wait_for(server, f"{address}/health")
        urls = ["data:image/png;base64," + base64.b64encode(page.read_bytes()).decode() for page in pages]
        content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        body = {"messages": [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]}
        reply = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=REQUEST_TIMEOUT_S).raise_for_status()
        print(f"POST {reply.url}: {json.dumps(reply.json()['parsed'])}", flush=True)
        server.send_signal(signal.SIGTERM)
        if server.wait(STOP_TIMEOUT_S):
            raise RsgrpoError(f"the server ended with exit code {server.returncode} after SIGTERM")
    except (httpx.HTTPError, ValueError, KeyError, subprocess.TimeoutExpired) as error:
        raise RsgrpoError(f"the server failed: {type(error).__name__}: {error}") from error
    finally:
        if server.poll() is None:
            server.kill()
    write_text(SERVED, reply.text)


def wait_for(server: subprocess.Popen, address: str) -> None:
    """Return once the server reports that it is healthy.

    Raises:
        RsgrpoError: it ended, or did not report so in time.
    """
    started = time.monotonic()
    while time.monotonic() - started < START_TIMEOUT_S:
        if server.poll() is not None:
            raise RsgrpoError(f"the server ended with exit code {server.returncode} before it answered")
        try:
            if httpx.get(address).is_success:
                return
        except httpx.HTTPError:
            pass  # not listening yet
        time.sleep(0.5)
    raise RsgrpoError(f"the server did not answer within {START_TIMEOUT_S:.0f} s")


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file."""
    return json_object(path.read_bytes(), str(path))


def summary(times: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the rows of the final table: stages, scores before and after, answers, and where everything is."""
    rows = list(times)
    for benchmark in BENCHMARKS:
        before, after = (
            read_json(EVALUATION / f"{benchmark}-{name}" / "results.json") for name in ("warm-start", "rs-grpo")
        )
        rows += [(f"{benchmark}, {label}", text) for label, text in score_lines(before, after)]
    answer, served = read_json(ANSWER), read_json(SERVED)["parsed"]
    pages = [str(EVALUATION / f"{benchmark}-rs-grpo" / "report.html") for benchmark in BENCHMARKS]
    return [
        *rows,
        ("inferred", f"{answer['question']} {answer['answer']}"),
        ("served", f"{answer['question']} {served['answer']}"),
        ("model", str(TRAINED)),
        ("training", str(ROOT / "rl/report.html")),
        ("evaluation", ", ".join(pages)),
    ]


def score_lines(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (score, "before → after, difference (95% interval), p"); `after` holds the comparison with `before`."""
    lines = []
    for label, path in SCORES.items():
        old, new = (
            functools.reduce(lambda node, part: node[part], path.split("/"), report["scores"])["value"]
            for report in (before, after)
        )
        found = after["differences"].get(path)
        paired = f", {signed(Difference(**found))}" if found else ""
        lines.append((label, f"{100 * old:.1f} → {100 * new:.1f}{paired}"))
    return lines


def require_engine(engine: str) -> None:
    """Raise InputError if vLLM is needed and not installed, before any work is done."""
    if engine == "vllm" and importlib.util.find_spec("vllm") is None:
        raise InputError(
            "vLLM is not installed, and --engine vllm (the default) evaluates, infers and serves with it. Install it, "
            "or use the embedded engine: make evisrag-mini ENGINE=hf"
        )


def require_seed(seed: int) -> None:
    """Record the seed of this folder; raise InputError if it was started with another."""
    file = ROOT / "seed"
    begun = file.read_text(encoding="ascii").strip() if file.is_file() else "0" if ROOT.exists() else str(seed)
    if begun != str(seed):
        raise InputError(f"{ROOT} was started with seed {begun}, not {seed}. Run the new seed in another folder.")
    ROOT.mkdir(exist_ok=True)
    write_text(file, f"{seed}\n")


def run_stages(engine: str, seed: int) -> None:
    """Run the stages whose result does not exist yet, and show the summary."""
    started, times = time.monotonic(), []
    require_engine(engine)
    require_seed(seed)
    for stage in stages(engine, seed):
        began = time.monotonic()
        exists = stage.makes.is_file()
        if not exists:
            stage.run()
        times.append((stage.name, f"skipped: {stage.makes} exists" if exists else f"{time.monotonic() - began:.0f} s"))
    with Console() as console:
        console.summary("EVisRAG in small", [*summary(times), ("time", f"{time.monotonic() - started:.0f} s")])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    top = Parser(prog="python -m recipes.evisrag_mini", description=__doc__.split("\n")[0])
    top.add_argument("--engine", choices=["vllm", "hf"], default="vllm", help="evaluates, infers and serves")
    top.add_argument("--seed", type=int, default=0, help="of SFT and RL; the data's is that of `recipes.prepare demo`")
    options = top.parse_args(argv)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # for all stages: waiting threads must not spin
    kept = "finished stages are kept; run the same command to resume"
    return run_program(lambda: run_stages(options.engine, options.seed), kept=kept)


if __name__ == "__main__":
    sys.exit(main())
