"""Mask secrets in a configuration before it is written, shown or uploaded."""

from __future__ import annotations

import re
from typing import Any

MASK = "********"
_SECRET = re.compile(
    r"(?:^|[_\-.])(?:key|api_?key|token|secret|password|passwd|credentials?|authorization)$", re.IGNORECASE
)
_IN_ADDRESS = re.compile(r"(?<=://)[^/\s@:]*:[^/\s@]*(?=@)")
_NO_SECRETS = frozenset({"eos_token", "pad_token", "bos_token", "image_token"})


def masked(value: Any, name: str = "") -> Any:
    """Return plain values with every text masked that is a secret by its key, or is in an address: `user:password@`.

    >>> masked({"judge": {"api_key": "sk-1", "url": "http://me:pw@host/v1"}, "max_tokens": 5})
    {'judge': {'api_key': '********', 'url': 'http://********@host/v1'}, 'max_tokens': 5}
    """
    if isinstance(value, dict):
        return {key: masked(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(masked(item, name) for item in value)
    if isinstance(value, str):
        is_secret = value and _SECRET.search(name) and name not in _NO_SECRETS
        return MASK if is_secret else masked_address(value)
    return value


def masked_address(text: str) -> str:
    """Return a text with the names and passwords in its addresses masked."""
    return _IN_ADDRESS.sub(MASK, text)
