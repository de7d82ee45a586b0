"""Try an environment without a model: write the turns of a policy, see what it would read.

Examples:
  python -m rollout.turns my_tools:Pages --arguments '{"folder": "pages"}' --turn '<open>3</open>' --turn 'It is 7.'
  python -m rollout.turns my_tools:Pages --image page1.png --prompt 'What is the total?'      # turns from the keyboard
  python -m rollout.turns my_tools:Pages --script turns.txt --model demo/model    # --- separates turns; tokens counted
  python -m rollout.turns rollout.turns.tools:Tools --arguments '{"functions": ["my_tools:search"]}' --schemas
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from rollout.config import TurnsConfig
from rollout.errors import InputError, printable, run_program
from rollout.inputs.images import read_size
from rollout.turns.caller import Caller
from rollout.turns.environment import Reply, load_environment, stop_strings
from rollout.types import Prompt

SEPARATOR = "---"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m rollout.turns", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("environment", metavar="MODULE:CLASS", help="the environment, as rollout.turns.environment names it")
    add("--arguments", metavar="JSON", default="{}", help="its arguments, an object (rollout.turns.arguments)")
    add("--prompt", default="", help="the question")
    add("--image", action="append", default=[], metavar="FILE", help="an image of the prompt; may be repeated")
    add("--truth", metavar="JSON", default="{}", help="the row's gold columns, an object")
    add("--turn", action="append", default=[], metavar="TEXT", help="a turn of the policy; may be repeated")
    add("--script", metavar="FILE", help=f"a file of turns, separated by lines of {SEPARATOR}")
    add("--timeout-s", type=float, default=60.0, help="time limit of an answer (default: %(default)g)")
    add("--model", default="", metavar="FOLDER", help="also count the tokens that this model would read")
    add("--schemas", action="store_true", help="print the descriptions of tools for the prompt, and stop")
    options = parser.parse_args(argv)
    return run_program(lambda: tryout(options))


def tryout(options: argparse.Namespace) -> int:
    """Show what the environment says to each turn; return 1 if it failed on one."""
    arguments, truth = _object("--arguments", options.arguments), _object("--truth", options.truth)
    if options.schemas:
        from rollout.turns.tools import schemas

        print(json.dumps(schemas(arguments.get("functions", [])), indent=2, ensure_ascii=False))
        return 0
    make = load_environment(TurnsConfig(environment=options.environment, arguments=arguments))
    assert make is not None, "argparse requires a name"
    prompt = Prompt("tryout", options.prompt, tuple(options.image), truth, question=options.prompt)
    environment = make(prompt)
    stop = stop_strings(environment)
    print(f"A turn ends at end-of-text{''.join(f' or {string!r}' for string in stop)}.")
    caller, read = Caller(environment, options.timeout_s), _reader(options.model)
    failed = False
    for number, turn in enumerate(_turns(options), 1):
        since = time.perf_counter()
        reply = caller.ask(turn)
        print(f"\n[turn {number}] {printable(turn)}")
        print(describe(reply, time.perf_counter() - since))
        failed |= reply is not None and reply.fault in ("exception", "timeout")
        if reply is None or reply.ends:
            break
        if read is not None:
            print(
                f"  tokens: {len(read.encode_observation(reply.text, tuple(reply.images), has_ended=True).token_ids_T)}"
            )
    return int(failed)


def describe(reply: Reply | None, seconds: float) -> str:
    """Return an answer as the lines that are printed of it."""
    if reply is None:
        return f"  the episode ends ({seconds:.2f} s)"
    lines = [f"  {line}" for line in printable(reply.text).splitlines()]
    lines += [
        f"  image {index}: {' x '.join(map(str, read_size(image)))}" for index, image in enumerate(reply.images, 1)
    ]
    lines += [f"  facts: {json.dumps(dict(reply.facts), ensure_ascii=False)}"] if reply.facts else []
    lines += [f"  fault: {reply.fault}"] if reply.fault else []
    lines += ["  the episode ends"] if reply.ends else []
    return "\n".join([*lines, f"  ({seconds:.2f} s)"])


def _turns(options: argparse.Namespace) -> Iterator[str]:
    yield from options.turn
    if options.script:
        with open(options.script, encoding="utf-8") as file:
            for turn in file.read().split(f"\n{SEPARATOR}\n"):
                yield turn.removesuffix("\n")
    elif not options.turn:
        if sys.stdin.isatty():
            print("Write a turn in a line; end with Ctrl-D.")
        for line in sys.stdin:
            yield line.removesuffix("\n")


def _object(option: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InputError(f"{option} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{option} must be a JSON object, got {text}")
    return value


def _reader(model: str) -> Any:
    if not model:
        return None
    from rollout.config import InputsConfig
    from rollout.inputs.processor import InputProcessor

    return InputProcessor(model, InputsConfig())


if __name__ == "__main__":
    sys.exit(main())
