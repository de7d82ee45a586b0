"""From rows of any layout to questions, and from a question to its prompt."""

from __future__ import annotations

import json

import pytest

from recipes.answers.questions import Question, named_prompt, prompt_hash, read_questions, to_prompt
from recipes.evaluation.official import chartqapro
from rollout.types import Prompt
from rsgrpo.errors import RsgrpoError


def test_rows_of_several_layouts_are_questions(tmp_path, page):
    rows = [
        {"qid": 1, "query": "how much?", "image": ["page.png"], "answer": ["16%", "16"], "is_sufficient": True},
        {"id": "2", "question": "who?", "images": "page.png"},
        {
            "prompt": "<image>when?",
            "image": ["page.png"],
            "answer": "<evidence>[1]: 2020</evidence><answer>2020</answer>",
        },
        {"question": "why?", "answer": "insufficient to answer"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second, third, fourth = read_questions(str(tmp_path / "rows.jsonl"))
    assert first == Question("1", "how much?", (page,), answers=("16%", "16"))
    assert (second.id, second.question, second.images, second.answers) == ("2", "who?", (page,), ())
    assert (third.id, third.question, third.answers, third.evidence) == ("row-3", "when?", ("2020",), ("2020",))
    assert not fourth.is_sufficient


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ([7], "a row must be a JSON object, got list"),
        ({"id": "1"}, "no question: it needs question, query or prompt"),
        ({"query": "q", "image": [7]}, "an image must be a path"),
        ({"query": "q", "image": ["a", "b"], "evidence": ["x"]}, "gold evidence has 1 entries for 2 images"),
        ({"query": "q", "is_sufficient": "maybe"}, "is_sufficient must be true or false"),
        ({"query": "q", "answer": {"a": 1}}, "a gold answer is a text or a list"),
    ],
)
def test_rows_that_are_no_questions_are_listed(tmp_path, row, complaint):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(RsgrpoError, match=rf"1 of 1 rows cannot be used:\n  line 1 of rows.jsonl: {complaint}"):
        read_questions(str(tmp_path / "rows.jsonl"))


def test_a_prompt_is_rendered_by_the_one_function():
    prompt = to_prompt(Question("q", "how much?", ("a.png", "b.png")), "{images}\n{question}", "Be brief.")
    assert prompt.text == "[1]: <image>\n[2]: <image>\nhow much?"
    assert (prompt.system, prompt.question) == ("Be brief.", "how much?")
    assert to_prompt(Question("q", "who?", ("a", "b")), "{question}{image_marks}").text == "who?<image><image>"


def test_a_prompt_that_shows_no_pages_is_refused():
    with pytest.raises(RsgrpoError, match="0 <image> marks for 1 images"):
        to_prompt(Question("q", "how much?", ("a.png",)), "{question}")
    with pytest.raises(RsgrpoError, match="no message of its own"):
        to_prompt(Question("q", "how much?"), "")


def test_the_hash_follows_what_is_asked_not_where_the_pages_lie():
    one = Prompt("1", "<image>q", ("here/a.png",))
    assert prompt_hash(one) == prompt_hash(Prompt("2", "<image>q", ("there/a.png",)))
    others = [
        Prompt("1", "<image>q", ("here/b.png",)),
        Prompt("1", "<image>Q", ("here/a.png",)),
        Prompt("1", "<image>q", (b"a.png",)),
    ]
    assert len({prompt_hash(prompt) for prompt in [one, *others]}) == 4


@pytest.mark.parametrize(
    "name", ["evidence", "evidence_example", "direct", "scene_graph", "contrastive", "subquestions"]
)
def test_every_shipped_prompt_asks_for_an_answer(name):
    from rsgrpo.data.prompts import read_template

    prompt = to_prompt(Question("q", "how {much}?", ("a", "b")), read_template(named_prompt(name)))
    assert "[1]: <image>\n[2]: <image>" in prompt.text
    assert prompt.text.endswith("how {much}?")
    assert ("<answer>" in prompt.text) == (name != "direct")
    assert "insufficient to answer" in prompt.text


def test_a_template_file_can_be_passed_and_an_unknown_name_names_the_nearest(tmp_path):
    (tmp_path / "mine.txt").write_text("{question}")
    assert named_prompt(str(tmp_path / "mine.txt")).file == str(tmp_path / "mine.txt")
    with pytest.raises(RsgrpoError, match="did you mean evidence"):
        named_prompt("evidenc")


def test_rows_of_chartqapro_are_their_last_question_with_the_turns_before(tmp_path):
    rows = [
        {"Question": ["how many?"], "Answer": ["7"], "Year": ["NO"], "Question Type": "Factoid", "Paragraph": ""},
        {"Question": ["when?", "and then? "], "Answer": ["2019", "2020"], "Year": ["YES", "YES"],
         "Question Type": "Conversational", "Paragraph": "Sales."},
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    one, two = read_questions(str(tmp_path / "rows.jsonl"), need_answers=True)
    assert (one.question, one.answers) == ("how many?", ("7",))
    assert (two.question, two.answers) == ("Context: Sales.\n\nQ1: when?\nA1: 2019\nQ2: and then?", ("2020",))
    assert chartqapro("2021", two.answers, two.columns) == 0.0  # a year
    assert chartqapro("7.1", one.answers, one.columns) == 1.0
