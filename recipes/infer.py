"""Answer questions over page images: `python -m recipes.infer "how much?" --image a.png --model runs/x/export`.

One question, a conversation over the same pages, or a file of questions.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from recipes.answers.batch import answer_batch, result_line
from recipes.answers.engine import open_answerer
from recipes.answers.questions import Question, named_prompt, read_questions, to_prompt
from recipes.answers.spec import AnswerModelConfig, AnswerRolloutConfig, AnswerSpec, EndpointConfig, pixel_limits
from recipes.answers.types import Answer, Answerer
from rollout.config import InputsConfig
from rollout.keys import named
from rollout.types import Prompt
from rsgrpo.errors import InputError, RsgrpoError, run_program
from rsgrpo.records.console import Console

OPTIONS = {
    "model.path": "--model",
    "model.revision": "--revision",
    "model.trust_remote_code": "--trust-remote-code",
    "inputs.min_pixels": "--min-pixels",
    "inputs.max_pixels": "--max-pixels",
    "inputs.max_images": "--max-images",
    "inputs.max_prompt_tokens": "--max-prompt-tokens",
    "rollout.engine": "--engine",
    "rollout.temperature": "--temperature",
    "rollout.top_p": "--top-p",
    "rollout.max_response_tokens": "--max-tokens",
    "rollout.max_batch_sequences": "--batch-size",
    "rollout.dtype": "--dtype",
    "rollout.device": "--device",
    "rollout.num_threads": "--num-threads",
    "rollout.script": "--script",
    "endpoint.url": "--endpoint",
    "endpoint.model": "--model",
    "endpoint.api_key_env": "--api-key-env",
    "endpoint.concurrency": "--concurrency",
    "endpoint.timeout_s": "--timeout-s",
    "endpoint.max_tries": "--max-tries",
    "endpoint.requests_per_minute": "--requests-per-minute",
}
"""What `answerer_of` calls the keys of a configuration on a command line."""
HELP = "A question; or: /images A.png B.png ... other pages; /json shows the last answer as JSON; /quit"


class Session:
    """A prompt template, an answerer and a terminal; questions are answered one after another.

    images: the pages that questions are about; may be replaced.
    """

    def __init__(self, answerer: Answerer, template: str, system: str, images: Sequence[str], out: IO[str]) -> None:
        self.images = tuple(images)
        self._answerer = answerer
        self._template = template
        self._system = system
        self._out = out
        self._num_asked = 0

    def ask(self, question: str, *, show: bool = True) -> dict[str, Any]:
        """Answer one question, showing the text as it is written where the answerer can; return its result line."""
        self._num_asked += 1
        item = Question(f"question-{self._num_asked}", question, self.images)
        prompt = to_prompt(item, self._template, self._system)
        streamed = False
        output = Answer(prompt, "", "error", "no answer came")
        for piece in self._answerer.stream(prompt):
            if isinstance(piece, Answer):
                output = piece
            elif show:
                streamed = True
                self._out.write(piece)
                self._out.flush()
        line = result_line(output, self._answerer.name)
        if show:
            self._out.write(("\n" if streamed else f"{output.text}\n" if output.text else "") + f"{summary_of(line)}\n")
            self._out.flush()
        return line


def summary_of(line: dict[str, Any]) -> str:
    """Return the few lines that stand under an answer: the answer, the pages it rests on, and what is wrong."""
    if line["finish_reason"] == "error":
        return f"error: {line['errors'][0]}"
    pages = [
        f"  [{slot['index']}] {slot['image'] or ''}: {slot['text']}" for slot in line["evidence"] if slot["relevant"]
    ]
    parts = [f"answer: {line['answer']}" + (" (the pages are insufficient)" if line["insufficient"] else "")]
    parts += ["evidence:", *pages] if pages else []
    if line["finish_reason"] == "length":
        parts.append("cut off at the token limit: raise --max-tokens")
    parts += [f"fault: {fault}" for fault in line["errors"]]
    return "\n".join(parts)


def converse(session: Session, lines: IO[str], out: IO[str], *, prompts_user: bool) -> None:
    """Answer questions line by line until the input ends or says /quit."""
    last: dict[str, Any] | None = None
    if prompts_user:
        out.write(f"{HELP}\n")
    while True:
        if prompts_user:
            out.write("> ")
            out.flush()
        line = lines.readline()
        text = line.strip()
        if not line or text == "/quit":
            return
        try:
            if text.startswith("/images"):
                session.images = tuple(checked_images(text.split()[1:]))
            elif text == "/json":
                out.write(f"{json.dumps(last, ensure_ascii=False, indent=2)}\n")
            elif text.startswith("/"):
                out.write(f"unknown command {text.split()[0]}\n{HELP}\n")
            elif text:
                last = session.ask(text)
        except RsgrpoError as error:
            out.write(f"error: {error}\n")


def checked_images(paths: Sequence[str]) -> Sequence[str]:
    """Return the paths.

    Raises:
        InputError: one is not a file.
    """
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise InputError(f"no such image: {', '.join(missing)} (on the command line, put the question before --image)")
    return paths


def run_batch(options: argparse.Namespace, answerer: Answerer, template: str, system: str) -> None:
    """Answer a file of questions."""
    out = options.out or Path(options.batch.replace(":", ".").rstrip("/")).with_suffix(".answers.jsonl")
    questions = read_questions(options.batch, image_dir=options.image_dir)
    prompts: list[Prompt] = [to_prompt(question, template, system) for question in questions]
    with Console(sys.stderr) as console:
        summary = answer_batch(prompts, answerer, out, share_equal=options.temperature == 0, console=console)
        console.summary(
            "Answered",
            [
                ("questions", str(len(questions))),
                ("asked", str(summary.asked)),
                ("equal to another", str(summary.shared)),
                ("answered earlier", str(summary.reused)),
                ("failed", str(summary.failed)),
                ("answers", str(out)),
            ],
        )


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    top = argparse.ArgumentParser(
        prog="python -m recipes.infer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("question", nargs="?", help="one question; without it (and without --batch) a conversation")
    what = top.add_argument_group("what is asked")
    what.add_argument("--question", dest="named_question", help="the same as QUESTION, by name")
    what.add_argument("--image", "--images", nargs="+", action="extend", default=[], help="the pages, in order")
    what.add_argument("--batch", metavar="FILE", help="rows with id, question, image: see docs/reference/inference.md")
    what.add_argument("--image-dir", default="", help="folder that the rows' image paths start from (default: FILE's)")
    what.add_argument("--out", type=Path, help="jsonl of answers (default: beside FILE, as NAME.answers.jsonl)")
    what.add_argument("--prompt", default="evidence", help="a name in conf/prompt or a template file")
    what.add_argument("--system", default="", help="system message; the default is the prompt's, else the model's")
    what.add_argument("--json", action="store_true", help="print the result of one question as one JSON line")
    add_answerer_options(top)
    return top


def add_answerer_options(top: argparse.ArgumentParser) -> None:
    """Add the options that `answerer_of` reads."""
    who = top.add_argument_group("who answers")
    who.add_argument("--model", default="", help="model folder or hub id; with --endpoint, the name the server uses")
    who.add_argument("--engine", choices=["hf", "vllm", "fake"], default="hf", help="default: hf")
    who.add_argument("--endpoint", default="", metavar="URL", help="OpenAI-compatible server, such as .../v1")
    who.add_argument("--api-key-env", default="OPENAI_API_KEY", help="environment variable that holds its key")
    who.add_argument("--concurrency", type=int, default=8, help="requests to the endpoint at once")
    who.add_argument("--requests-per-minute", type=float, default=0.0, help="to the endpoint; 0: no limit")
    who.add_argument("--max-tries", type=int, default=6, help="requests for one answer before the endpoint is down")
    who.add_argument("--timeout-s", type=float, default=600.0, help="the longest that one answer may take")
    who.add_argument("--trust-remote-code", action="store_true", help="run code that the model's folder brings")
    who.add_argument("--revision", default="", help="hub commit of the model")
    who.add_argument("--script", default="", help="answers of the fake engine")
    _add_limits(top.add_argument_group("how"))


def _add_limits(how: argparse._ArgumentGroup) -> None:
    limits, rollout = InputsConfig(), AnswerRolloutConfig()
    how.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    how.add_argument("--top-p", type=float, default=1.0)
    how.add_argument("--seed", type=int, default=0)
    how.add_argument("--max-tokens", type=int, default=rollout.max_response_tokens, help="of an answer")
    own = f"default: the model folder's own, where it is narrower than {limits.max_pixels:,}"
    how.add_argument("--min-pixels", type=int, default=0, help=f"area of a resized page; {own}")
    how.add_argument("--max-pixels", type=int, default=0)
    how.add_argument("--max-images", type=int, default=limits.max_images, help="pages of a question")
    how.add_argument("--max-prompt-tokens", type=int, default=limits.max_prompt_tokens)
    how.add_argument("--batch-size", type=int, default=rollout.max_batch_sequences, help="of the embedded engine")
    how.add_argument("--dtype", choices=["float32", "bfloat16"], default=rollout.dtype, help="of the engine")
    how.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="of the embedded engine")
    how.add_argument("--num-threads", type=int, default=0, help="CPU threads; 0 leaves it to torch")


@named(OPTIONS)
def answerer_of(options: argparse.Namespace) -> Answerer:
    """Start what the command line chooses."""
    endpoint = EndpointConfig(
        url=options.endpoint,
        model=options.model if options.endpoint else "",
        api_key_env=options.api_key_env,
        concurrency=options.concurrency,
        max_tries=options.max_tries,
        timeout_s=options.timeout_s,
        requests_per_minute=options.requests_per_minute,
    )
    min_pixels, max_pixels = pixel_limits(options.model)
    inputs = InputsConfig(
        options.min_pixels or min_pixels,
        options.max_pixels or max_pixels,
        options.max_images,
        options.max_prompt_tokens,
    )
    rollout = AnswerRolloutConfig(
        engine=options.engine,
        temperature=options.temperature,
        top_p=options.top_p,
        max_response_tokens=options.max_tokens,
        max_batch_sequences=options.batch_size,
        dtype=options.dtype,
        num_threads=options.num_threads,
        device=options.device,
        script=options.script,
    )
    model = AnswerModelConfig(options.model, options.revision, options.trust_remote_code)
    return open_answerer(AnswerSpec(model, rollout, inputs, endpoint, options.seed))


def answer(options: argparse.Namespace) -> int:
    """Do what the command line says; return the exit code."""
    images = checked_images(options.image)
    from rsgrpo.data.prompts import read_template  # loads transformers

    prompt = named_prompt(options.prompt)
    template, system = read_template(prompt), options.system or prompt.system
    if options.batch and (options.question or options.image):
        raise InputError("--batch brings its own questions and pages: leave the question and --image out")
    if not options.batch and not template:
        raise InputError(f"--prompt {options.prompt} has no template to put a question into; choose another")
    answerer = answerer_of(options)
    try:
        if options.batch:
            run_batch(options, answerer, template, system)
            return 0
        session = Session(answerer, template, system, images, sys.stdout)
        if not options.question:
            answerer.start()  # so that the first question does not wait for it
            converse(session, sys.stdin, sys.stdout, prompts_user=sys.stdin.isatty())
            return 0
        line = session.ask(options.question, show=not options.json)
        if options.json:
            print(json.dumps(line, ensure_ascii=False))
        return int(line["finish_reason"] == "error")
    finally:
        answerer.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 2 for wrong input, 1 for a failure, 130 when stopped by Ctrl-C."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    top = parser()
    options = top.parse_args(argv)
    if options.question and options.named_question:
        top.error("the question is given twice: as QUESTION and as --question")
    options.question = options.question or options.named_question
    kept = "answers so far are kept; run the same command to resume" if options.batch else ""
    return run_program(lambda: answer(options), kept=kept)


if __name__ == "__main__":
    sys.exit(main())
