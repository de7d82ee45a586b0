"""EVisRAG end to end in minutes: `make evisrag-mini`, or `python -m recipes.evisrag_mini` after `recipes.prepare demo`.

Data in EVisRAG's layout, warm start, RS-GRPO, export, evaluation on two benchmarks, inference, a server. Every stage is
a command that is printed and can be typed; it reads what the stages before it wrote, and is passed over where its own
result is there. Owns the order, the folder `evisrag-mini` and the summary; knows nothing of how a stage does its work.
"""

from __future__ import annotations

import argparse
import base64
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
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.demo.evisrag_layout import BENCHMARKS, PROMPT_FILE, TEST_FILE, TRAIN, TRAIN_FILES
from rsgrpo.errors import InputError, RsgrpoError
from rsgrpo.records.console import Console

ROOT = Path("evisrag-mini")
HUB, ROWS, EVALUATION = ROOT / "hub", ROOT / "train", ROOT / "evaluation"
CHECKED = ROWS / "checked"  # every row of every file can be used
TRAINED = ROOT / "rl/export"
OWN_WARM_START, DEMO_WARM_START = ROOT / "sft/export", Path("demo/sft/export")
LAST_OF_EXPORT = "preprocessor_config.json"
ANSWER, SERVED = ROOT / "answer.json", ROOT / "served.json"
START_TIMEOUT_S, STOP_TIMEOUT_S, REQUEST_TIMEOUT_S = 180.0, 60.0, 120.0


@dataclass(frozen=True, slots=True)
class Stage:
    """One step. makes: a file that is there when it is done. run: does it."""

    name: str
    makes: Path
    run: Callable[[], None]


def stages(engine: str, seed: int = 0) -> list[Stage]:
    """Return what is to be done, in order. seed: of warm start and RL."""
    # The demo's warm start learnt from these very rows, with these very settings: where it is, it is not made again.
    warm_start = DEMO_WARM_START if (DEMO_WARM_START / LAST_OF_EXPORT).is_file() else OWN_WARM_START
    models = {"warm-start": warm_start, "rs-grpo": TRAINED}
    found = [
        Stage("data", HUB / PROMPT_FILE, command("recipes.prepare", "mini")),
        Stage("unpack", CHECKED, unpack),
        Stage("sft", warm_start / LAST_OF_EXPORT, command("recipes.sft", "recipe=evisrag_mini", f"seed={seed}")),
        Stage(
            "rs-grpo",
            TRAINED / LAST_OF_EXPORT,
            command("rsgrpo.train", "recipe=evisrag_mini", f"model.path={warm_start}", f"seed={seed}"),
        ),
    ]
    for benchmark in BENCHMARKS:
        for name, model in models.items():
            folder = EVALUATION / f"{benchmark}-{name}"
            options = [f"benchmark={HUB / benchmark}", f"model={model}", f"name={folder.name}", f"rollout={engine}"]
            if name == "rs-grpo":
                options.append(f"against={EVALUATION / f'{benchmark}-warm-start' / 'predictions.jsonl'}")
            run = command("recipes.evaluate", "recipe=evisrag_mini", *options)
            found.append(Stage(f"evaluate {benchmark} {name}", folder / "results.json", run))
    return [
        *found,
        Stage("infer", ANSWER, lambda: infer(engine)),
        Stage("serve", SERVED, lambda: serve(engine)),
    ]


def command(module: str, *options: str | Path) -> Callable[[], None]:
    """Return what runs `python -m module options` in a process of its own."""
    return lambda: run_module(module, *options)


def run_module(module: str, *options: str | Path, output: Any = None) -> None:
    """Show and run one command.

    Raises:
        RsgrpoError: it failed.
    """
    arguments = ["-m", module, *map(str, options)]
    show(arguments)
    code = subprocess.run([sys.executable, *arguments], stdout=output, check=False).returncode
    if code:
        raise RsgrpoError(f"`python {shlex.join(arguments)}` ended with {code}; mended, the same command goes on there")


def show(arguments: Sequence[str]) -> None:
    """Print a command as one would type it."""
    print(f"\n$ python {shlex.join(arguments)}", flush=True)


def unpack() -> None:
    """Write the packed pages to files, and check every row for what it will be used for."""
    run_module("recipes.prepare", "unpack", HUB / TRAIN, "--out", ROWS)
    limits = ("--min-pixels", "784", "--max-pixels", "50176", "--max-images", "4", "--max-prompt-tokens", "256")
    for name, purpose in (("sft", "sft"), ("train", "grpo")):
        rows = ROWS / f"{TRAIN_FILES[name]}.jsonl"
        run_module("recipes.prepare", "validate", rows, "--for", purpose, "--model", "demo/model", *limits)
    rows = HUB / list(BENCHMARKS)[1] / TEST_FILE
    run_module("recipes.prepare", "validate", rows, "--for", "test", "--prompt", HUB / PROMPT_FILE, *limits)
    CHECKED.parent.mkdir(exist_ok=True)
    CHECKED.touch()


def worn_question() -> tuple[str, list[Path]]:
    """Return the first question of the second benchmark, and its pages as files."""
    benchmark = list(BENCHMARKS)[1]
    run_module("recipes.prepare", "unpack", HUB / benchmark, "--out", ROOT / "test" / benchmark)
    with (HUB / benchmark / TEST_FILE).open(encoding="utf-8") as rows:
        row = json.loads(rows.readline())
    return row["query"], [ROOT / "test" / benchmark / path for path in row["image"]]


def model_options(engine: str) -> list[str]:
    """Return the options that infer and serve share."""
    limits = ["--max-tokens", "128", "--max-prompt-tokens", "256"]
    return ["--model", str(TRAINED), "--engine", engine, "--prompt", str(HUB / PROMPT_FILE), *limits]


def infer(engine: str) -> None:
    """Ask one question about worn pages and keep the parsed answer."""
    question, pages = worn_question()
    temporary = ANSWER.with_suffix(".partial")
    with temporary.open("wb") as file:
        run_module("recipes.infer", question, "--image", *pages, *model_options(engine), "--json", output=file)
    print(temporary.read_text(encoding="utf-8"))
    temporary.replace(ANSWER)


def serve(engine: str) -> None:
    """Start a server, ask it the same question with the pages inside the request, stop it, and keep the reply.

    Raises:
        RsgrpoError: it did not start, answer, or end with 0.
    """
    question, pages = worn_question()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["-m", "recipes.serve", *model_options(engine), "--port", str(port)]
    show(arguments)
    server = subprocess.Popen([sys.executable, *arguments])
    try:
        wait_for(server, f"http://127.0.0.1:{port}/health")
        urls = ["data:image/png;base64," + base64.b64encode(page.read_bytes()).decode() for page in pages]
        content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        body = {"messages": [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]}
        address = f"http://127.0.0.1:{port}/v1/chat/completions"
        request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT_S) as answer:
            reply = answer.read().decode()
        print(f"POST {address}: {json.dumps(json.loads(reply)['parsed'])}", flush=True)
        server.send_signal(signal.SIGTERM)
        if server.wait(STOP_TIMEOUT_S):
            raise RsgrpoError(f"the server ended with {server.returncode} after SIGTERM")
    except (OSError, ValueError, KeyError, subprocess.TimeoutExpired) as error:
        raise RsgrpoError(f"the server failed: {type(error).__name__}: {error}") from error
    finally:
        if server.poll() is None:
            server.kill()
    SERVED.write_text(reply, encoding="utf-8")


def wait_for(server: subprocess.Popen, address: str) -> None:
    """Return when the server says that it is well.

    Raises:
        RsgrpoError: it ended, or does not say so in time.
    """
    started = time.monotonic()
    while time.monotonic() - started < START_TIMEOUT_S:
        if server.poll() is not None:
            raise RsgrpoError(f"the server ended with {server.returncode} before it answered")
        try:
            with urllib.request.urlopen(address, timeout=5.0):
                return
        except OSError:
            pass  # not listening yet
        time.sleep(0.5)
    raise RsgrpoError(f"the server did not answer within {START_TIMEOUT_S:.0f} s")


def summary(times: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the rows of the last table: stages, scores before and after, answers, and where everything is."""
    rows = list(times)
    for benchmark in BENCHMARKS:
        before, after = (
            json.loads((EVALUATION / f"{benchmark}-{name}" / "results.json").read_text(encoding="utf-8"))
            for name in ("warm-start", "rs-grpo")
        )
        rows += [(f"{benchmark}, {label}", text) for label, text in score_lines(before, after)]
    answer = json.loads(ANSWER.read_text(encoding="utf-8"))
    served = json.loads(SERVED.read_text(encoding="utf-8"))["parsed"]
    rows.append(("inferred", f"{answer['question']} {answer['answer']}"))
    rows.append(("served", f"{answer['question']} {served['answer']}"))
    pages = [str(EVALUATION / f"{benchmark}-rs-grpo" / "report.html") for benchmark in BENCHMARKS]
    return [
        *rows,
        ("model", str(TRAINED)),
        ("training", str(ROOT / "rl/report.html")),
        ("evaluation", ", ".join(pages)),
    ]


def score_lines(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (score, "before → after, difference (95% interval), p"); `after` holds the comparison with `before`."""
    lines = []
    for label, path in (
        ("EM", "strict/global/em"),
        ("slot F1", "evidence/slot_f1"),
        ("citation F1", "evidence/citation_f1"),
    ):
        values = []
        for report in (before, after):
            node = report["scores"]
            for part in path.split("/"):
                node = node[part]
            values.append(node["value"])
        text = f"{100 * values[0]:.1f} → {100 * values[1]:.1f}"
        if found := after["differences"].get(path):
            text += f", {100 * found['value']:+.1f} ({100 * found['low']:+.1f} to {100 * found['high']:+.1f})"
            text += f", p {'< 0.001' if found['p_value'] < 0.001 else format(found['p_value'], '.3f')}"
        lines.append((label, text))
    return lines


def require_engine(engine: str) -> None:
    """Refuse to begin what could not be finished.

    Raises:
        InputError: vLLM is asked for and not installed.
    """
    if engine == "vllm" and importlib.util.find_spec("vllm") is None:
        raise InputError(
            "vLLM is not installed here, and --engine vllm (the default) evaluates, infers and serves with it: install "
            "it, or take the embedded engine: make evisrag-mini ENGINE=hf"
        )


def require_seed(seed: int) -> None:
    """Refuse to go on with what another seed began, and remember which one this folder is of.

    Raises:
        InputError: it is of another.
    """
    file = ROOT / "seed"
    begun = file.read_text(encoding="ascii").strip() if file.is_file() else "0" if ROOT.exists() else str(seed)
    if begun != str(seed):
        raise InputError(f"{ROOT} was begun with seed {begun}, now it is {seed}: run it in another folder")
    ROOT.mkdir(exist_ok=True)
    file.write_text(f"{seed}\n", encoding="ascii")


def main(argv: Sequence[str] | None = None) -> int:
    """Run all stages that are not done; return the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    top = argparse.ArgumentParser(prog="python -m recipes.evisrag_mini", description=__doc__.split("\n")[0])
    top.add_argument("--engine", choices=["vllm", "hf"], default="vllm", help="evaluates, infers and serves")
    top.add_argument("--seed", type=int, default=0, help="of SFT and RL; the data's is that of `recipes.prepare demo`")
    options = top.parse_args(argv)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # for all stages: waiting threads must not spin
    started, times = time.monotonic(), []
    try:
        require_engine(options.engine)
        require_seed(options.seed)
        for stage in stages(options.engine, options.seed):
            if stage.makes.is_file():
                times.append((stage.name, f"there already: {stage.makes}"))
                continue
            began = time.monotonic()
            stage.run()
            times.append((stage.name, f"{time.monotonic() - began:.0f} s"))
        with Console() as console:
            console.summary("EVisRAG in small", [*summary(times), ("time", f"{time.monotonic() - started:.0f} s")])
    except RsgrpoError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
