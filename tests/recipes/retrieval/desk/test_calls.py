from __future__ import annotations

import pytest

from recipes.retrieval.desk.calls import BadCall, Call, parse_call


@pytest.mark.parametrize(
    ("turn", "call"),
    [
        ("<search> tax  rate\n2023 </search>", Call("search", "tax rate 2023")),
        ("<think>page two</think>\n<open>2</open>", Call("open", number=2)),
        ("<open>[12]</open>\n", Call("open", number=12)),
        ("<zoom>3 0 50 100 75.5</zoom>", Call("zoom", number=3, box=(0.0, 0.5, 1.0, 0.755))),
        ("<zoom>[3], [0, 50, 100, 75]</zoom>", Call("zoom", number=3, box=(0.0, 0.5, 1.0, 0.75))),
        ("<open>2</open><open>3</open>", Call("open", number=2)),
        ("<answer>7</answer><open>3</open>", None),
        ("it is 7", None),
        ("", None),
    ],
)
def test_a_turn_is_its_first_call(turn, call):
    assert parse_call(turn, 100) == call


@pytest.mark.parametrize(
    ("turn", "name", "says"),
    [
        ("<open>2", "open", "a whole call: <open>3</open>"),
        ("2</open>", "open", "a whole call"),
        ("<search>tax</open>", "search", "a whole call"),
        ("<search> </search>", "search", "Say what to look for"),
        ("<search>" + "a " * 600 + "</search>", "search", "at most 1000 characters"),
        ("<open>two</open>", "open", "by its number"),
        ("<open>1 2</open>", "open", "by its number"),
        ("<zoom>3</zoom>", "zoom", "<zoom>3 0 50 100 100</zoom>"),
        ("<zoom>3 0 0 50</zoom>", "zoom", "left, top, right and bottom"),
        ("<zoom>3 50 0 50 100</zoom>", "zoom", "left < right"),
        ("<zoom>3 0 0 50 101</zoom>", "zoom", "from 0 to 100"),
        ("<zoom>3 -5 0 50 100</zoom>", "zoom", "left, top, right and bottom"),
    ],
)
def test_a_bad_call_says_what_to_write(turn, name, says):
    with pytest.raises(BadCall, match=None) as error:
        parse_call(turn, 100)
    assert error.value.name == name
    assert says in str(error.value)
