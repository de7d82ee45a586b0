"""From characters to tokens: the one place where a span of text becomes a token mask."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rewards.api import Span


def token_mask(token_spans_T: Sequence[tuple[int, int]], span: Span | None, num_chars: int) -> np.ndarray:
    """Return the (T,) bool mask of the tokens that a span of characters covers.

    A token is covered if any character of which it holds a byte lies in the span, so a token that fuses the end of one
    tag with the start of the next is in both scopes. A token without characters is covered at its position; after the
    last character (end of text) it is covered by every span that reaches the end.

    Args:
        token_spans_T: half-open (start, end) characters of each token.
        span: characters to cover; None covers nothing.
        num_chars: length of the whole text.

    >>> token_mask([(0, 3), (2, 5), (5, 5)], Span(3, 5), 5).tolist()
    [False, True, True]
    """
    mask_T = np.zeros(len(token_spans_T), dtype=bool)
    if span is None or not len(token_spans_T):
        return mask_T
    start_T, end_T = np.asarray(token_spans_T, dtype=np.int64).T
    has_chars_T = end_T > start_T
    mask_T |= has_chars_T & (start_T < span.end) & (end_T > span.start)
    mask_T |= ~has_chars_T & (start_T >= span.start) & (start_T < span.end)
    if span.end >= num_chars:
        mask_T |= ~has_chars_T & (start_T >= num_chars)
    return mask_T
