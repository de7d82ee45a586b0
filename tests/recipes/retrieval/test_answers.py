"""From retrieved pages to answers: every setting, and `ask` and `generate` from the command line."""

from __future__ import annotations

import io
import json
import math
import random
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from recipes import infer, retrieve
from recipes.answers.questions import Question, named_prompt, to_prompt
from recipes.answers.reader import Reader
from recipes.answers.types import Answer
from recipes.retrieval.answers.answer_file import answer_file
from recipes.retrieval.answers.evidence import cited_pages, faults_of
from recipes.retrieval.answers.generation import AskedQuestion, answer_all, page_weights, paste, prompts_of
from recipes.retrieval.pages.store import PageStore
from recipes.retrieval.search.found import FoundPage
from rollout.config import InputsConfig
from rollout.inputs.processor import InputProcessor
from rollout.types import Prompt
from rsgrpo.data.prompts import read_template
from rsgrpo.errors import RsgrpoError
from tests.material.retrieval import coloured_store, write_image, write_vectors
from tests.material.taught_model import example, save_taught

TEMPLATE = "{images}\nQuestion: {question}"
ANSWER = "<observe>o</observe><evidence>\n[1]: no relevant information\n[2]: seven\n</evidence>"
ANSWER += "<think>t</think><answer>7</answer>"


class ScriptedAnswerer:
    """Answers by prompt id; keeps what it was asked."""

    name = "scripted"
    is_concurrent = False

    def __init__(self, script: dict[str, tuple[str, float | None]]) -> None:
        self._script = script
        self.asked: list[Prompt] = []

    def start(self) -> None:
        """Nothing to load."""

    def answer(self, prompts: Sequence[Prompt]) -> Iterator[Answer]:
        self.asked += prompts
        for prompt in reversed(prompts):  # the order is the answerer's own affair
            text, logprob = self._script[prompt.id]
            error = "" if text else "no answer"
            yield Answer(prompt, text, "stop" if text else "error", error, mean_logprob=logprob)

    def stream(self, prompt: Prompt) -> Generator[str | Answer]:
        yield from self.answer([prompt])

    def close(self) -> None:
        """Nothing to free."""


@pytest.fixture
def pages(tmp_path: Path) -> tuple[FoundPage, ...]:
    found = []
    for rank, (colour, size) in enumerate([("red", (30, 20)), ("blue", (10, 40))], start=1):
        write_image(tmp_path / f"{colour}.png", colour, *size)
        text = f"text of {colour} <image>"
        found.append(
            FoundPage(rank, 1.0 - rank / 10, f"p{rank}", f"{colour}.pdf", rank, str(tmp_path / f"{colour}.png"), text)
        )
    return tuple(found)


def test_pages_are_pasted_side_by_side_or_one_below_the_other(pages):
    paths = [page.image for page in pages]
    wide = np.asarray(Image.open(io.BytesIO(paste(paths, "horizontal"))))
    assert wide.shape == (40, 40, 3)
    assert wide[10, 10].tolist() == [255, 0, 0]
    assert wide[30, 10].tolist() == [255, 255, 255]
    assert wide[30, 35].tolist() == [0, 0, 255]
    tall = np.asarray(Image.open(io.BytesIO(paste(paths, "vertical"))))
    assert tall.shape == (60, 30, 3)
    assert tall[50, 5].tolist() == [0, 0, 255]
    with pytest.raises(RsgrpoError, match=r"are 30000 x 20 pixels; use fewer"):
        paste([pages[0].image] * 1000, "horizontal")


def test_the_weight_of_a_page_is_its_softmax_times_the_likelihood_of_its_answer():
    weights = page_weights([math.log(3), 0.0], [math.log(0.5), math.log(0.9)])
    assert weights == pytest.approx([0.75 * 0.5, 0.25 * 0.9])


def test_each_setting_asks_as_it_should(pages):
    asked, reader = AskedQuestion("q", "how many?", pages), Reader(ScriptedAnswerer({}), TEMPLATE)
    (multi,) = prompts_of(asked, "multi_image", reader)
    assert multi.images == tuple(page.image for page in pages)
    assert multi.text.count("<image>") == 2
    (text,) = prompts_of(asked, "text", reader)
    assert text.images == ()
    assert text.text == "[1]\ntext of red \n\n[2]\ntext of blue \nQuestion: how many?"
    singles = prompts_of(asked, "weighted", reader)
    assert [(prompt.id, prompt.images) for prompt in singles] == [
        ("q#1", (pages[0].image,)), ("q#2", (pages[1].image,))
    ]  # fmt: skip
    (pasted,) = prompts_of(asked, "vertical", reader)
    assert isinstance(pasted.images[0], bytes)
    with pytest.raises(RsgrpoError, match=r"'how many\?' has no pages"):
        prompts_of(AskedQuestion("q", "how many?", ()), "multi_image", reader)


def test_an_answer_cites_document_and_page(pages):
    reader = Reader(ScriptedAnswerer({"q": (ANSWER, None)}), TEMPLATE)
    (answered,) = answer_all([AskedQuestion("q", "how many?", pages)], "multi_image", reader)
    assert answered.line["answer"] == "7"
    assert [(page.document, page.number) for page in answered.cited] == [("blue.pdf", 2)]


def test_an_answer_from_one_pasted_image_can_only_cite_all_its_pages(pages):
    answerer = ScriptedAnswerer({"q": (ANSWER.replace("[2]", "[3]").replace("no relevant information", "seven"), None)})
    for setting in ("horizontal", "vertical"):
        (answered,) = answer_all([AskedQuestion("q", "which?", pages)], setting, Reader(answerer, TEMPLATE))
        assert [(page.document, answered.index_of(page)) for page in answered.cited] == [
            ("red.pdf", 1), ("blue.pdf", 1)
        ]  # fmt: skip


def test_weighted_selection_takes_the_surest_answer(pages):
    # softmax(.9, .8) = .525, .475; .525 * .1 < .475 * .9
    script: dict[str, tuple[str, float | None]]
    script = {"q#1": ("<answer>one</answer>", math.log(0.1)), "q#2": ("<answer>two</answer>", math.log(0.9))}
    (answered,) = answer_all([AskedQuestion("q", "?", pages)], "weighted", Reader(ScriptedAnswerer(script), TEMPLATE))
    assert (answered.line["id"], answered.line["answer"], answered.sources) == ("q", "two", (pages[1],))
    assert answered.weights == pytest.approx((0.0525, 0.4275), abs=1e-4)
    script["q#2"] = ("", None)  # that page's prompt failed: the other one answers
    (answered,) = answer_all([AskedQuestion("q", "?", pages)], "weighted", Reader(ScriptedAnswerer(script), TEMPLATE))
    assert answered.line["answer"] == "one"
    script["q#2"] = ("<answer>two</answer>", None)
    with pytest.raises(RsgrpoError, match="needs log-probabilities, but scripted returns none"):
        answer_all([AskedQuestion("q", "?", pages)], "weighted", Reader(ScriptedAnswerer(script), TEMPLATE))


def test_the_text_setting_speaks_of_text_and_fills_only_its_own_template(pages):
    own = named_prompt("evidence_text")
    braces = replace(pages[0], text="a {question} and {images}")
    reader = Reader(ScriptedAnswerer({"q": (ANSWER, None)}), TEMPLATE, text_template=read_template(own))
    asked = AskedQuestion("q", "how many?", (braces, pages[1]))
    (prompt,) = prompts_of(asked, "text", reader)
    assert prompt.text.startswith(
        "[1]\na {question} and {images}\n\n[2]\ntext of blue \n\nYou are given the text of pages"
    )
    assert prompt.text.endswith("Question: how many?")
    assert "page images" not in prompt.text
    (answered,) = answer_all([asked], "text", reader)
    assert [fault for fault in faults_of(answered.line) if "names no page" in fault] == []  # [2] was given
    assert [(cited.number, cited.text) for cited in cited_pages(answered)] == [(2, "seven")]


def test_what_is_said_of_a_page_that_was_not_given_appears_under_no_other(pages):
    text = ANSWER.replace("[1]: no relevant information\n[2]: seven", "[1]: six\n[9]: nine").replace(
        "<answer>7", "<answer>"
    )
    (answered,) = answer_all(
        [AskedQuestion("q", "?", pages)], "multi_image", Reader(ScriptedAnswerer({"q": (text, None)}), TEMPLATE)
    )
    assert [(cited.number, cited.text) for cited in cited_pages(answered)] == [(1, "six")]
    faults = faults_of(answered.line | {"finish_reason": "length"})
    for fault in ("slot [9] names no page; there are 2", "the answer is empty", "cut off at the token limit"):
        assert any(fault in said for said in faults)


def test_a_plain_answer_is_not_told_that_it_has_no_blocks(pages):
    reader = Reader(ScriptedAnswerer({"q": ("seven, as [3] says", None)}), TEMPLATE)
    (answered,) = answer_all([AskedQuestion("q", "?", pages)], "multi_image", reader)
    assert faults_of(answered.line) == ["citation [3] names no page; there are 2"]


class Interrupted(ScriptedAnswerer):
    """Ends after some answers, as a process that is killed does."""

    def __init__(self, script: dict[str, tuple[str, float | None]], after: int) -> None:
        super().__init__(script)
        self._after = after

    def answer(self, prompts: Sequence[Prompt]) -> Iterator[Answer]:
        yield from islice(super().answer(prompts), self._after)
        raise KeyboardInterrupt


@pytest.mark.parametrize("setting", ["multi_image", "weighted"])
def test_a_file_of_answers_survives_an_interruption_and_asks_nothing_twice(setting, pages, tmp_path):
    asked = [AskedQuestion(f"q{number}", f"how many {number}?", pages) for number in range(5)]
    each = [f"q{number}" if setting == "multi_image" else f"q{number}#{page}" for number in range(5) for page in (1, 2)]
    script: dict[str, tuple[str, float | None]] = dict.fromkeys(each, (ANSWER, -0.1))
    out, stopped = tmp_path / "out.jsonl", Interrupted(script, 6 if setting == "weighted" else 3)
    with pytest.raises(KeyboardInterrupt):
        answer_file(asked, setting, Reader(stopped, TEMPLATE), out)
    assert len(out.read_bytes().splitlines()) == 3
    with out.open("ab") as file:
        file.write(b'{"id": "q0", "fini')  # a line that was cut off by the kill
    second = ScriptedAnswerer(script)
    rows, num_reused = answer_file(asked, setting, Reader(second, TEMPLATE), out)
    assert num_reused == 3
    assert {prompt.question for prompt in second.asked} == {"how many 0?", "how many 1?"}
    assert [row["id"] for row in rows] == [question.id for question in asked]
    third = ScriptedAnswerer(script)
    again, num_reused = answer_file(asked, setting, Reader(third, TEMPLATE), out)
    assert (num_reused, third.asked, again) == (5, [], json.loads(json.dumps(rows)))
    other = ScriptedAnswerer(script)  # another template: everything is asked again
    assert answer_file(asked, setting, Reader(other, "{images} {question}"), out)[1] == 0
    assert answer_file(asked, setting, Reader(other, "{images} {question}"), out, limits=[99])[1] == 0


def test_pages_without_text_cannot_be_a_text_baseline(pages):
    bare = FoundPage(1, 1.0, "p", "d", 1, pages[0].image, " ")
    with pytest.raises(RsgrpoError, match=r"none of the pages of '\?' has text; use their images"):
        prompts_of(AskedQuestion("q", "?", (bare,)), "text", Reader(ScriptedAnswerer({}), TEMPLATE))


@pytest.fixture
def store(tmp_path: Path) -> Path:
    store = coloured_store(tmp_path, "red", "blue")
    queries = {"which?": [0.6, 0.8], "other?": [1.0, 0.0]}
    write_vectors(tmp_path / "vectors", PageStore.open(store).page_ids(), np.eye(2), queries)
    return store


def test_ask_search_run_top_and_generate_from_the_command_line(store, tmp_path, tiny_model_path, capsys):
    def command(*arguments: Any) -> str:
        assert retrieve.main([str(argument) for argument in arguments]) == 0
        return capsys.readouterr().out

    vectors = ["--kind", "imported", "--model", tmp_path / "vectors"]
    command("index", store, *vectors)
    found = json.loads(command("search", store, *vectors, "which?", "--json"))
    documents = [page["document"] for page in found["pages"]]
    by_id = {page.page_id: page.document for page in PageStore.open(store).pages()}
    ids = PageStore.open(store).page_ids()
    assert documents == [by_id[ids[1]], by_id[ids[0]]]  # scores .8 and .6
    again = json.loads(command("search", store, "which?", "--json"))  # the index says what made it
    assert [page["document"] for page in again["pages"]] == documents

    script = tmp_path / "script.jsonl"
    lines = [{"id": name, "responses": [ANSWER]} for name in ("question", "q1", "q2")]
    script.write_text("".join(json.dumps(line) + "\n" for line in lines))
    who = ["--engine", "fake", "--script", script, "--answer-model", tiny_model_path, "--answer-max-pixels", 3136]
    shown = command("ask", store, "which?", *vectors, "-k", 2, *who)
    assert shown.startswith(f"answer: 7\n  [2] {documents[1]}, page 1: seven\n")
    line = json.loads(command("ask", store, "which?", *vectors, "-k", 2, *who, "--json"))
    assert line["cited"] == [{"document": documents[1], "page": 1}]

    queries, qrels, run = tmp_path / "queries.jsonl", tmp_path / "qrels.tsv", tmp_path / "x.run"
    queries.write_text(
        '{"_id": "q1", "text": "which?", "answers": ["7"]}\n{"_id": "q2", "text": "other?", "answers": ["9"]}\n'
    )
    qrels.write_text(f"q1\t{documents[0]}\t1\nq2\t{documents[0]}\t1\n")
    command("run", store, *vectors, "--queries", queries, "--out", run, "-k", 2)
    top = ["--out", tmp_path / "top1_test.jsonl", "-k", 1]
    shown = command("top", store, run, "--queries", queries, "--qrels", qrels, *top)
    assert "2 questions, 1 with every relevant page" in shown
    rows = [json.loads(text) for text in (tmp_path / "top1_test.jsonl").read_text().splitlines()]
    assert [row["is_sufficient"] for row in rows] == [True, False]
    assert Path(rows[0]["image"][0]).exists()
    out = tmp_path / "answers.jsonl"
    base = ["generate", store, "--queries", queries, "--out", out, "--rule", "ChartQA", *who]
    assert "2 answers (0 from before), 0.5000 correct by the rule of ChartQA" in command(
        *base, "--run-file", run, "-k", 2
    )
    assert "2 answers (2 from before)" in command(*base, "--run-file", run, "-k", 2)
    assert "2 answers (0 from before), 0.5000 correct" in command(*base, "--oracle", qrels)
    assert [len(json.loads(text)["pages"]) for text in out.read_text().splitlines()] == [1, 1]


def test_ask_takes_the_time_limit_and_the_key_of_an_endpoint(store, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    vectors = ["--kind", "imported", "--model", str(tmp_path / "vectors")]
    assert retrieve.main(["index", str(store), *vectors]) == 0
    ask = ["ask", str(store), "which?", *vectors, "--endpoint", "http://127.0.0.1:9/v1"]
    assert retrieve.main([*ask, "--timeout-s", "0"]) == 2
    assert "--timeout-s must be > 0, got 0" in capsys.readouterr().err
    assert retrieve.main([*ask, "--api-key-env", "NO_SUCH_KEY", "--max-tries", "1"]) == 1
    assert "endpoint" in capsys.readouterr().err


def test_generate_refuses_queries_without_pages(store, tmp_path, capsys):
    (tmp_path / "queries.jsonl").write_text('{"_id": "q1", "text": "which?"}\n')
    (tmp_path / "x.run").write_text("")
    files = ["--queries", tmp_path / "queries.jsonl", "--run-file", tmp_path / "x.run", "--out", "x"]
    command = ["generate", store, *files]
    assert retrieve.main([str(part) for part in command]) == 2
    assert "query q1 has no pages" in capsys.readouterr().err


def test_a_real_model_answers_in_every_setting(store, tmp_path, tiny_model_path, capsys):
    vectors = ["--kind", "imported", "--model", str(tmp_path / "vectors")]
    assert retrieve.main(["index", str(store), *vectors]) == 0
    who = ["--answer-model", tiny_model_path, "--device", "cpu", "--answer-max-pixels", "3136", "--max-tokens", "8"]
    capsys.readouterr()

    def ask(setting: str) -> dict[str, Any]:
        command = ["ask", str(store), "which?", *vectors, "-k", "2", *who, "--setting", setting, "--json"]
        assert retrieve.main(command) == 0
        (line,) = [text for text in capsys.readouterr().out.splitlines() if text.startswith("{")]
        return json.loads(line)

    lines = {setting: ask(setting) for setting in ("multi_image", "horizontal", "vertical", "weighted")}
    assert all(line["raw"] and line["finish_reason"] in ("stop", "length") for line in lines.values())
    assert lines["multi_image"]["num_prompt_tokens"] > lines["weighted"]["num_prompt_tokens"]  # two pages, one page


def test_weighted_takes_the_answer_that_a_model_of_one_page_is_sure_of(store, tmp_path, attentive_model_path, capsys):
    ids = PageStore.open(store).page_ids()
    images = {page.page_id: page.image for page in PageStore.open(store).pages()}
    prompt, limits = named_prompt("demo"), InputsConfig(min_pixels=784, max_pixels=3136)
    first, second = (
        to_prompt(Question(place, "which?", (images[ids[row]],)), read_template(prompt), prompt.system)
        for place, row in (("first", 1), ("second", 0))
    )
    # any four digits are an answer to the page that is found first, one number to the one that is found second
    rng, sure = random.Random(0), "<answer>7777</answer>"
    anything = [f"<answer>{rng.randint(1000, 9999)}</answer>" for _ in range(60)]
    lessons = [lesson for answer in anything for lesson in ((first, answer), (second, sure))]
    model = save_taught(attentive_model_path, tmp_path / "taught", lessons, limits, 120)

    vectors = ["--kind", "imported", "--model", str(tmp_path / "vectors")]
    assert retrieve.main(["index", str(store), *vectors]) == 0
    who = ["--answer-model", model, "--device", "cpu", "--answer-max-pixels", "3136", "--prompt", "demo"]
    capsys.readouterr()
    command = ["ask", str(store), "which?", *vectors, "-k", "2", *who, "--max-tokens", "16"]
    assert retrieve.main([*command, "--setting", "weighted", "--json"]) == 0
    line = json.loads(next(text for text in capsys.readouterr().out.splitlines() if text.startswith("{")))
    assert [page["score"] for page in line["pages"]] == [0.8, 0.6]
    assert line["answer"] == "7777"

    processor = InputProcessor(model, limits)
    network = AutoModelForImageTextToText.from_pretrained(model)

    def mean_logprob(prompt: Prompt, answer: str) -> float:
        """Transformers' own loss, apart from any engine of ours."""
        with torch.no_grad():
            return -network(**example(processor, prompt, answer)).loss.item()

    answerer = infer.answerer_of(infer.parser().parse_args(["--model", model, "--device", "cpu", "--max-tokens", "16"]))
    (guess,) = answerer.answer([first])
    answerer.close()
    # softmax(.8, .6) = 1 / (1 + e^-.2), 1 / (1 + e^.2) = .54983, .45017
    expected = [0.54983 * math.exp(mean_logprob(first, guess.text)), 0.45017 * math.exp(mean_logprob(second, sure))]
    assert line["weights"] == pytest.approx(expected, rel=2e-3)
    assert expected[0] < expected[1]
