"""Reading responses: what the rewards see, what can be recovered, and that nothing makes the parsers raise."""

from __future__ import annotations

import json
from random import Random

import pytest

from recipes.answers.parsing import Form, parse_lenient, parse_strict, parse_trajectory, says_insufficient
from rewards.api import Response
from rewards.evisrag import BLOCKS, abstained, accuracy, well_formed

GOOD = (
    "<observe>Two tables about Sweden.</observe>\n"
    "<evidence>\n[1]: Sweden 16%\n[2]: no relevant information\n</evidence>\n"
    "<think>Page [1] says 16%.</think>\n"
    "<answer>16%</answer>"
)
IMAGES = ("a.png", "b.png")
PARSERS = [parse_strict, parse_lenient]


def both(text, images=IMAGES):
    return parse_strict(text, images), parse_lenient(text, images)


def slots(parsed):
    return [(slot.index, slot.text, slot.relevant) for slot in parsed.evidence]


@pytest.mark.parametrize("parse", PARSERS)
def test_a_well_formed_response_is_read_whole(parse):
    parsed = parse(GOOD, IMAGES)
    assert (parsed.answer, parsed.observe, parsed.think) == ("16%", "Two tables about Sweden.", "Page [1] says 16%.")
    assert slots(parsed) == [(1, "Sweden 16%", True), (2, "no relevant information", False)]
    assert [slot.image for slot in parsed.evidence] == ["a.png", "b.png"]
    assert parsed.citations == (1,)
    assert parsed.format_ok
    assert not parsed.insufficient
    assert parsed.errors == ()


def test_a_parsed_answer_is_json():
    parsed = json.loads(json.dumps(parse_strict(GOOD, IMAGES).as_dict()))
    assert parsed["evidence"][0] == {"index": 1, "image": "a.png", "relevant": True, "text": "Sweden 16%"}
    assert list(parsed) == [
        "answer", "insufficient", "observe", "evidence", "think", "citations", "format_ok", "errors"
    ]  # fmt: skip


# Truncation


@pytest.mark.parametrize("length", range(len(GOOD) + 1))
def test_a_response_cut_at_any_character_keeps_what_it_has(length):
    text = GOOD[:length]
    strict, lenient = both(text)
    assert strict.format_ok == lenient.format_ok == (length == len(GOOD))
    assert bool(strict.errors) == (length < len(GOOD))
    assert strict.errors == tuple(dict.fromkeys(strict.errors))
    for name in ("observe", "think", "answer"):
        whole, kept = getattr(parse_strict(GOOD, IMAGES), name), getattr(lenient, name)
        assert whole.startswith(kept)
        assert getattr(strict, name) in ("", whole)
        opened = text.find(f"<{name}>")
        if opened >= 0 and len(text) > opened + len(name) + 2:
            assert kept or not text[opened + len(name) + 2 :].strip().rstrip("<")
    for slot in lenient.evidence:
        whole_slot = parse_strict(GOOD, IMAGES).evidence[slot.index - 1]
        assert whole_slot.text.startswith(slot.text)
        assert slot.relevant == (whole_slot.relevant and bool(slot.text))
    assert "<" not in lenient.answer + lenient.think + lenient.observe


@pytest.mark.parametrize("length", range(len(GOOD)))
def test_a_response_that_starts_anywhere_is_read(length):
    for parsed in both(GOOD[length:]):
        assert parsed.answer in ("16%", GOOD[length:].strip(), "") or length > GOOD.index("<answer>")


@pytest.mark.parametrize("parse", PARSERS)
def test_a_cut_off_page_without_evidence_is_not_taken_for_evidence(parse):
    text = "<observe>o</observe><evidence>[1]: 16%\n[2]: no relevant infor"
    assert [slot.relevant for slot in parse(text, IMAGES).evidence] == ([] if parse is parse_strict else [True, False])


# Tags


@pytest.mark.parametrize("name", BLOCKS)
def test_a_missing_block_is_named(name):
    start, end = GOOD.index(f"<{name}>"), GOOD.index(f"</{name}>") + len(name) + 3
    for parsed in both(GOOD[:start] + GOOD[end:]):
        assert f"no <{name}> block" in parsed.errors
        assert not parsed.format_ok
        assert getattr(parsed, name) == (() if name == "evidence" else "")


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_without_its_closing_tag_ends_at_the_next_block(name):
    strict, lenient = both(GOOD.replace(f"</{name}>", ""))
    assert f"<{name}> is not closed" in strict.errors
    whole = parse_strict(GOOD, IMAGES)
    if name == "evidence":
        assert slots(lenient) == slots(whole)
    else:
        assert getattr(strict, name) == ""
        assert getattr(lenient, name) == getattr(whole, name)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("form", ["<{}>", "</{}>"])
@pytest.mark.parametrize("other", BLOCKS)
def test_a_stray_tag_anywhere_never_loses_the_answer(name, form, other):
    tag = form.format(name)
    place = GOOD.index(f"<{other}>") + len(other) + 2 + 1
    text = GOOD[:place] + tag + GOOD[place:]
    strict, lenient = both(text)
    assert not strict.format_ok
    assert strict.errors
    assert set("16%") & set(lenient.answer)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_doubled_opening_tag_leaves_the_content(name):
    text = GOOD.replace(f"<{name}>", f"<{name}><{name}>")
    lenient = parse_lenient(text, IMAGES)
    whole = parse_strict(GOOD, IMAGES)
    assert (lenient.answer, lenient.think, lenient.observe) == (whole.answer, whole.think, whole.observe)
    assert slots(lenient) == slots(whole)
    assert f"<{name}> appears more than once" in lenient.errors


def test_a_tag_that_the_reasoning_quotes_does_not_become_the_answer():
    text = GOOD.replace("Page [1] says 16%.", "It goes into <answer> tags.")
    strict, lenient = both(text)
    assert strict.answer.startswith("tags.")  # as the reward reads it
    assert lenient.answer == "16%"
    assert lenient.think == "It goes into  tags."


def test_the_last_closed_answer_counts_with_the_blocks_before_it():
    draft = "<think>first</think><answer>12</answer>"
    strict, lenient = both(draft + GOOD + "<observe>once more")
    assert strict.answer == "12"
    assert lenient.answer == "16%"
    assert lenient.think == "Page [1] says 16%."
    assert lenient.observe == "Two tables about Sweden."


def test_blocks_inside_another_block_are_found():
    lenient = parse_lenient(f"<observe>seen {GOOD[GOOD.index('<evidence>') :]}</observe>", IMAGES)
    assert lenient.observe == "seen"
    assert lenient.answer == "16%"
    assert slots(lenient) == slots(parse_strict(GOOD, IMAGES))


@pytest.mark.parametrize(
    "form", [str.upper, str.title, lambda tag: tag.replace("<", "< ").replace("</", "< /").replace(">", " >")]
)
def test_tags_in_another_case_or_with_spaces_are_read_leniently(form):
    text = GOOD
    for name in BLOCKS:
        text = text.replace(f"<{name}>", form(f"<{name}>")).replace(f"</{name}>", form(f"</{name}>"))
    strict, lenient = both(text)
    assert strict.answer == ""
    assert (lenient.answer, lenient.think) == ("16%", "Page [1] says 16%.")
    assert not lenient.format_ok


def test_text_without_tags_is_an_answer_to_the_lenient_reader_only():
    strict, lenient = both(" 16 percent \n")
    assert (strict.answer, lenient.answer) == ("", "16 percent")
    assert "no <answer> block" in lenient.errors


def test_text_outside_of_the_blocks_is_a_fault():
    for text in ("Sure! " + GOOD, GOOD + " Done.", GOOD.replace("</think>\n", "</think> so ")):
        strict, lenient = both(text)
        assert strict.errors == ("text outside of the blocks, or blocks inside one another",)
        assert lenient.answer == strict.answer == "16%"


def test_blocks_out_of_order_are_read_and_named():
    order = [GOOD[GOOD.index(f"<{name}>") : GOOD.index(f"</{name}>") + len(name) + 3] for name in reversed(BLOCKS)]
    for parsed in both("\n".join(order)):
        assert parsed.answer == "16%"
        assert "the blocks are out of order" in parsed.errors


# Characters


@pytest.mark.parametrize("parse", PARSERS)
@pytest.mark.parametrize(
    "content",
    ["16 % Größe", "16 процентов", "１６パーセント", "١٦٪", "🇸🇪 16", "a\u200bb", "e\u0301", "\u2028x", "{}\\n",
     "\x00y"],
)  # fmt: skip
def test_any_characters_survive(parse, content):
    text = GOOD.replace("16%", content)
    parsed = parse(text, IMAGES)
    assert parsed.answer == content.strip()
    assert parsed.evidence[0].text == f"Sweden {content}".strip()
    assert parsed.format_ok


@pytest.mark.parametrize("parse", PARSERS)
@pytest.mark.parametrize("ending", ["\r\n", "\r", "\n\n", "\t\n "])
def test_line_ends_do_not_matter(parse, ending):
    parsed = parse(GOOD.replace("\n", ending), IMAGES)
    assert slots(parsed) == slots(parse_strict(GOOD, IMAGES))
    assert (parsed.answer, parsed.format_ok) == ("16%", True)


# Slots


@pytest.mark.parametrize("parse", PARSERS)
@pytest.mark.parametrize("num_slots", [1, 2, 5, 6, 9, 10, 11, 25, 120])
def test_any_number_of_slots_is_read(parse, num_slots):
    lines = "\n".join(f"[{number}]: fact {number}" for number in range(1, num_slots + 1))
    text = GOOD.replace(GOOD[GOOD.index("[1]: S") : GOOD.index("\n</evidence>")], lines)
    images = [f"{number}.png" for number in range(1, num_slots + 1)]
    parsed = parse(text, images)
    assert slots(parsed) == [(number, f"fact {number}", True) for number in range(1, num_slots + 1)]
    assert parsed.errors == ()


def test_missing_and_surplus_slots_are_named():
    for parsed in both(GOOD.replace("[2]: no", "[7]: no"), images=("a", "b", "c")):
        assert parsed.format_ok
        assert parsed.errors == ("no evidence slot for page 2, 3", "slot [7] names no page; there are 3")
        assert parsed.evidence[-1].image is None


def test_nothing_is_said_of_pages_when_their_number_is_unknown():
    assert parse_strict(GOOD.replace("[2]: no", "[7]: no")).errors == ()


def test_a_citation_of_no_page_is_a_fault():
    for parsed in both(GOOD.replace("Page [1]", "Page [3]")):
        assert parsed.citations == (3,)
        assert parsed.errors == ("citation [3] names no page; there are 2",)


@pytest.mark.parametrize(
    ("think", "cited"),
    [
        ("as [2] and [1] say", (1, 2)),
        ("as [1, 2] say", (1, 2)),
        ("as [1][2]", (1, 2)),
        ("page 2 has it", (2,)),
        ("Image 1 and Page 2", (1, 2)),
        ("page 47 of the report", ()),
        ("[0] and [01] and [x] and []", ()),
        ("the years 2019-2020", ()),
        ("", ()),
    ],
)
def test_citations_are_brackets_and_pages_that_exist(think, cited):
    text = GOOD.replace("Page [1] says 16%.", think)
    assert parse_strict(text, IMAGES).citations == cited


@pytest.mark.parametrize(
    ("label", "strict_reads"),
    [
        ("[{}]: ", True),
        ("[{}] ", False),
        ("[{}] : ", False),
        ("- [{}]: ", True),
        ("**[{}]**: ", False),
        ("[{}]\uff1a", False),
    ],
)
def test_labels_written_otherwise_are_read_leniently(label, strict_reads):
    text = GOOD.replace("[1]: ", label.format(1)).replace("[2]: ", label.format(2)).replace("</answer>", "")
    strict, lenient = both(text)
    assert [slot.index for slot in lenient.evidence] == [1, 2]
    assert lenient.evidence[0].text.startswith("Sweden 16%")
    assert [slot.relevant for slot in lenient.evidence] == [True, False]
    assert bool(strict.evidence) == strict_reads


def test_one_page_needs_no_label():
    text = "<evidence>Sweden 16%</evidence><answer>16%</answer>"
    assert slots(parse_lenient(text, ("a.png",))) == [(1, "Sweden 16%", True)]
    assert slots(parse_lenient(text, IMAGES)) == []


def test_a_repeated_slot_keeps_its_first_text():
    text = "<evidence>[1]:\n[1]: one\n[1]: two\n[2]: x"
    assert slots(parse_lenient(text, IMAGES)) == [(1, "one", True), (2, "x", True)]


@pytest.mark.parametrize(
    ("slot", "relevant"),
    [
        ("no relevant information", False),
        ("No relevant information.", False),
        ("", False),
        ("no relevant information but a table of 16%", True),
        ("No, 16%", True),
    ],
)
def test_a_slot_claims_evidence_unless_it_says_there_is_none(slot, relevant):
    text = GOOD.replace("Sweden 16%", slot)
    for parsed in both(text):
        assert parsed.evidence[0].relevant == relevant
        assert ("slot [1] is empty" in parsed.errors) == (slot == "")


# Abstaining


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("insufficient to answer", True),
        ("Insufficient to answer.", True),
        ("The pages are insufficient to answer the question", True),
        ("no relevant information", True),
        ("insufficient", False),
        ("16%", False),
        ("", False),
        ("sufficient to answer", False),
    ],
)
def test_an_abstention_is_recognised(answer, expected):
    assert says_insufficient(answer) == expected
    for parsed in both(GOOD.replace("16%</answer>", f"{answer}</answer>")):
        assert parsed.insufficient == expected


# The rewards see the same


def damaged(rng: Random) -> str:
    """A response with pieces cut, doubled and swapped."""
    pieces = [piece for name in BLOCKS for piece in (f"<{name}>", f"[1]: {name} 16%\n[2]: x", f"</{name}>", "\n")]
    for _ in range(rng.randint(0, 4)):
        place = rng.randrange(len(pieces))
        action = rng.choice(["drop", "double", "swap", "cut"])
        if action == "drop":
            pieces.pop(place)
        elif action == "double":
            pieces.insert(place, pieces[place])
        elif action == "swap":
            other = rng.randrange(len(pieces))
            pieces[place], pieces[other] = pieces[other], pieces[place]
        else:
            pieces[place] = pieces[place][: rng.randint(0, len(pieces[place]))]
    return "".join(pieces)


@pytest.mark.parametrize("seed", range(200))
def test_the_strict_reader_agrees_with_the_rewards(seed):
    text = damaged(Random(seed))
    strict, lenient = both(text)
    response = Response(text, truth={"answers": [strict.answer or "nothing"]})
    assert strict.format_ok == lenient.format_ok == bool(well_formed(response))
    assert accuracy(response) == (1.0 if strict.answer else 0.0)
    assert strict.insufficient == bool(abstained(response))
    assert bool(strict.errors) or strict.format_ok
    if strict.format_ok:
        assert strict == lenient


@pytest.mark.parametrize("seed", range(200))
def test_no_text_makes_a_parser_raise(seed):
    rng = Random(seed)
    parts = [
        "<", ">", "</", "answer", "think", "evidence", "observe", "[1]", "[2]:", "]:", "\n", "\r\n", "é", "\ud800", " ",
        "<answer>",
    ]  # fmt: skip
    text = "".join(rng.choice(parts) for _ in range(rng.randint(0, 60)))
    for images in (None, (), ("a",), (b"bytes", "b")):
        for parsed in both(text, images):
            assert isinstance(parsed.answer, str)
            json.dumps(parsed.as_dict())


@pytest.mark.parametrize(
    "text",
    ["<answer>" * 20_000, "<think></answer>" * 20_000, "[1]:" * 50_000, "<" * 200_000, "[1" * 100_000, "< " * 50_000,
     "<" + " " * 200_000, "[1 , " * 40_000],
)  # fmt: skip
def test_long_hostile_text_is_read_in_linear_time(text):
    for parsed in both(text):
        assert not parsed.format_ok


# Trajectories


def test_a_trajectory_needs_an_answer_and_the_blocks_that_it_was_asked_for():
    text = "first <open>1</open>\n<answer>7</answer>"
    assert parse_trajectory(text, 21).errors == ()
    assert parse_trajectory(text, 21, form=Form(("evidence", "answer"), is_all=False)).errors == (
        "no <evidence> block",
    )
    cited = "<open>2</open>\n<evidence>\n[2]: seven\n[5]: more\n</evidence><answer>7 [2]</answer>"
    parsed = parse_trajectory(cited, 15, IMAGES)
    assert [slot.image for slot in parsed.evidence] == ["b.png", None]
    assert parsed.errors == ("slot [5] names no page; there are 2",)


def test_a_call_is_never_the_answer_of_a_trajectory():
    calls = "<search>x</search>\n<open>1</open>"
    assert parse_trajectory(f"{calls}\nit is 7", len(calls) + 1).answer == "it is 7"
    unfinished = parse_trajectory(calls, len(calls))
    assert (unfinished.answer, unfinished.errors) == ("", ("no <answer> block", "the answer is empty"))
