"""Tokens to characters: the text is the decoder's, and a tag is found in every BPE context (law 4)."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from recipes.demo.model import train_tokenizer
from rollout.inputs.growing import fresh_text
from rollout.inputs.offsets import OffsetsError, token_spans

CORPUS = [
    "<observe>page 1 shows a code</observe>\n<evidence>\n[1]: code 4 amount 7\n[2]: no relevant information\n"
    "</evidence>\n<think>The amount is on page 1</think>\n<answer>7</answer>",
] * 20
# Rich in merges of ">" with what follows it, as Qwen's own vocabulary is.
FUSING = [f"<evidence>{tail}</evidence>" for tail in ("The", "\n", "\n\n", "[1]", "><think>", " a", "。", "é")] * 50
TOKENIZER = train_tokenizer(CORPUS + FUSING, vocab_size=700)
EOS = 256
"""Placeholder of end-of-text in the cases below; never a byte."""


def ids_of(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def decode(ids: list[int]) -> str:
    return str(TOKENIZER.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def byte_id(byte: int) -> int:
    """Return the token that is this one byte."""
    alphabet = {chr(n): n for n in [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]}
    rest = [n for n in range(256) if n not in alphabet.values()]
    character = {n: c for c, n in alphabet.items()} | {n: chr(256 + i) for i, n in enumerate(rest)}
    return TOKENIZER.get_vocab()[character[byte]]


@pytest.mark.parametrize(
    ("ids", "text", "spans"),
    [
        ([], "", ()),
        ([*b"ab", EOS], "ab", ((0, 1), (1, 2), (2, 2))),
        # A character that is split over tokens belongs to each of them.
        ([*"a\u00e9b".encode()], "a\u00e9b", ((0, 1), (1, 2), (1, 2), (2, 3))),
        # A response that is cut inside a character ends in one replacement character.
        ([*"x\u65e5".encode()[:-1]], "x\ufffd", ((0, 1), (1, 2), (1, 2))),
        ([*b"a\xff\xfeb"], "a\ufffd\ufffdb", ((0, 1), (1, 2), (2, 3), (3, 4))),
        ([EOS, *b"ab", EOS, *b"c", EOS], "abc", ((0, 0), (0, 1), (1, 2), (2, 2), (2, 3), (3, 3))),
        ([*b"a", len(TOKENIZER) + 5], "a", ((0, 1), (1, 1))),  # an id outside the vocabulary
    ],
)
def test_spans_worked_out_by_hand(ids, text, spans):
    """Numbers below 256 are bytes here, each a token of its own."""
    ids = [TOKENIZER.eos_token_id if n == EOS else byte_id(n) if n < 256 else n for n in ids]
    assert token_spans(TOKENIZER, ids) == (text, spans)
    assert decode(ids) == text


def test_added_tokens_that_are_not_special_keep_their_text():
    tokenizer = train_tokenizer(CORPUS, vocab_size=400)
    tokenizer.add_tokens(["<tool call>"])  # a space is outside the byte alphabet
    ids = tokenizer.encode("x<tool call>y", add_special_tokens=False)
    text, spans = token_spans(tokenizer, ids)
    assert text == "x<tool call>y" == tokenizer.decode(ids)
    assert spans == ((0, 1), (1, 12), (12, 13))


NEIGHBOURS = [
    "The", "\n", "\n\n", "\r\n", "[1]: x", "[", " [1]", ">", ">>", "><think>", "</evidence><think>", " ", "", "\t", "7",
    "。", "日本語", "\u00e9", "e\u0301", "\U0001f600", "\U0001f469\u200d\U0001f4bb", "\ufffd", "\u0000", "a" * 50, "'s",
    ".\n", "\u00a0", "<", "</",
]  # fmt: skip


@pytest.mark.parametrize("tag", ["<evidence>", "</evidence>", "<think>", "<answer>"])
@pytest.mark.parametrize("before", ["", "x", "\n", ">", "</observe>", "\U0001f600", "日", " "])
def test_a_tag_is_found_in_every_context(tag, before):
    for after in NEIGHBOURS:
        raw = before + tag + after
        ids = ids_of(raw)
        text, spans = token_spans(TOKENIZER, ids)
        assert text == decode(ids)
        start = text.find(tag)
        assert start >= 0
        found = {i for i, (s, e) in enumerate(spans) if s < start + len(tag) and e > start}
        assert found == tokens_holding_bytes(ids, text, start, start + len(tag)), repr(raw)


def tokens_holding_bytes(ids: list[int], text: str, start: int, end: int) -> set[int]:
    """Which tokens hold a byte of text[start:end], by decoding byte for byte with the tokenizer's own decoder."""
    wanted = range(len(text[:start].encode()), len(text[:end].encode()))
    held, position = set(), 0
    for index, token_id in enumerate(ids):
        size = len(TOKENIZER.convert_ids_to_tokens(token_id))  # one character of the vocabulary per byte
        if any(position + k in wanted for k in range(size)):
            held.add(index)
        position += size
    return held


def test_the_test_tokenizer_does_fuse_tags_with_their_neighbours():
    for after in (">\n", "><"):
        assert any(token.endswith(after.replace("\n", "Ċ")) for token in TOKENIZER.get_vocab()), after


@pytest.mark.parametrize("cut", range(1, 5))
def test_a_tag_before_a_cut_emoji_keeps_its_tokens(cut):
    body = "<answer>\U0001f600".encode()
    ids = [byte_id(b) for b in body[: len("<answer>") + cut]]
    text, spans = token_spans(TOKENIZER, ids)
    assert text == ("<answer>\ufffd" if cut < 4 else "<answer>\U0001f600")
    assert spans == (*((n, n + 1) for n in range(8)), *[(8, 9)] * cut)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60))
def test_any_text_decodes_as_the_tokenizer_decodes_it_and_spans_tile_it(text):
    check(ids_of(text))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, len(TOKENIZER) + 20), max_size=60))
def test_any_ids_decode_as_the_tokenizer_decodes_them_and_spans_tile_the_text(ids):
    check(ids)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=40))
def test_any_bytes_decode_as_the_tokenizer_decodes_them(raw):
    check([byte_id(b) for b in raw])


def check(ids: list[int]) -> None:
    text, spans = token_spans(TOKENIZER, ids)
    assert text == decode(ids)
    assert len(spans) == len(ids)
    reached = 0
    for start, end in spans:
        assert start <= end <= len(text)
        assert start in (reached, reached - 1)  # adjoins its predecessor, or shares one character with it
        reached = max(reached, end)
    assert reached == len(text)


def test_a_saved_and_loaded_tokenizer_gives_the_same_spans(tiny_model_path):
    loaded = AutoTokenizer.from_pretrained(tiny_model_path)
    ids = [*loaded.encode(CORPUS[0] + " 日本\U0001f600"), loaded.eos_token_id]
    text, spans = token_spans(loaded, ids)
    assert text == CORPUS[0] + " 日本\U0001f600"
    assert spans[-1] == (len(text), len(text))


def test_a_tokenizer_that_is_not_byte_level_is_refused_by_name():
    backend = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    backend.decoder = decoders.Metaspace()
    with pytest.raises(OffsetsError, match=r"byte-level BPE.*decoder Metaspace"):
        token_spans(PreTrainedTokenizerFast(tokenizer_object=backend), [0])


@pytest.mark.parametrize(
    ("told", "text", "is_whole", "fresh"),
    [
        ("", "ab", False, "ab"),
        ("ab", "ab", False, ""),
        ("a", "ab\ufffd", False, ""),
        ("a", "ab\ufffd", True, "b\ufffd"),
        ("ab", "ab\u00e9", False, "\u00e9"),
        ("abc", "abd", True, ""),
    ],
)
def test_a_listener_hears_whole_characters_once(told, text, is_whole, fresh):
    assert fresh_text(told, text, is_whole=is_whole) == fresh
