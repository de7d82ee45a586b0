"""Map tokens to characters: which characters of the decoded text each token contains.

One rule for every byte-level BPE (Qwen's and all that derive from GPT-2): a token is bytes, the text is all bytes
decoded together, and a token's characters are those of which it contains any byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
from tokenizers import decoders
from transformers import PreTrainedTokenizerBase

from rollout.errors import InputError


class OffsetsError(InputError):
    """The tokenizer's tokens cannot be mapped to characters."""


def _byte_alphabet() -> dict[str, int]:
    """Return {character: byte} of a byte-level vocabulary.

    Printable Latin-1 characters are their own bytes; the other 68 bytes are numbered from U+0100 (GPT-2's table).
    """
    printable = set(chain(range(0x21, 0x7F), range(0xA1, 0xAD), range(0xAE, 0x100)))
    others = (byte for byte in range(0x100) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_alphabet()


def token_spans(
    tokenizer: PreTrainedTokenizerBase, token_ids_T: Sequence[int]
) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Decode a response and return which characters each token contains.

    The text equals `tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)`: an
    incomplete or invalid byte sequence is one U+FFFD. Neighbouring spans overlap where a character is split over
    tokens. A token that decodes to nothing (special, or outside the vocabulary) has an empty span at its position.

    With tokens "é"[0:1 byte], "é"[1:2]+"a", end-of-text the answer is ("éa", ((0, 1), (0, 2), (2, 2))).

    Returns:
        The text, and per token a half-open range (start, end) of its characters.

    Raises:
        OffsetsError: the tokenizer is not a byte-level BPE.
    """
    _require_byte_level(tokenizer)
    special_ids = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    tokens_T = tokenizer.convert_ids_to_tokens(list(token_ids_T))
    pieces_T = [
        b"" if token is None or index in special_ids else _token_bytes(token)
        for index, token in zip(token_ids_T, tokens_T, strict=True)
    ]
    text, character_of_byte = _decode(b"".join(pieces_T))
    character_of_byte.append(len(text))  # position of a token after the last byte
    spans_T = []
    first = 0
    for piece in pieces_T:
        start = character_of_byte[first]
        end = character_of_byte[first + len(piece) - 1] + 1 if piece else start
        spans_T.append((start, end))
        first += len(piece)
    return text, tuple(spans_T)


def _require_byte_level(tokenizer: PreTrainedTokenizerBase) -> None:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = getattr(backend, "decoder", None)
    if not isinstance(decoder, decoders.ByteLevel):
        raise OffsetsError(
            f"token offsets need a byte-level BPE tokenizer (decoder ByteLevel), got {type(tokenizer).__name__} with "
            f"decoder {type(decoder).__name__}. Use a model of the Qwen family, or another with such a tokenizer."
        )


def _token_bytes(token: str) -> bytes:
    """Return the bytes of a vocabulary entry; an added token outside the byte alphabet is its own UTF-8."""
    try:
        return bytes([_BYTE_OF_CHARACTER[character] for character in token])
    except KeyError:
        return token.encode()


def _decode(encoded: bytes) -> tuple[str, list[int]]:
    """Decode UTF-8 with one U+FFFD per invalid sequence; also return the character that each byte is part of."""
    text = ""
    character_of_byte: list[int] = []
    start = 0
    while start < len(encoded):
        bad_length = 0
        valid = encoded[start:]
        try:
            piece = valid.decode()
        except UnicodeDecodeError as error:
            valid, bad_length = valid[: error.start], error.end - error.start
            piece = valid.decode()
        opens_character = (np.frombuffer(valid, np.uint8) & 0xC0) != 0x80  # all but UTF-8's continuation bytes
        character_of_byte += (np.cumsum(opens_character) - 1 + len(text)).tolist()
        text += piece
        if bad_length:
            character_of_byte += [len(text)] * bad_length
            text += "\N{REPLACEMENT CHARACTER}"
        start += len(valid) + bad_length
    return text, character_of_byte
