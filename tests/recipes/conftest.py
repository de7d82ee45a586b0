"""What several recipes are tested with: endpoints on this machine, and a page."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from tests.material.answering import write_page
from tests.material.http_stub import EndpointStub, start_endpoint


@pytest.fixture
def serve() -> Iterator[Callable[..., EndpointStub]]:
    """Start endpoints; they end with the test."""
    with ExitStack() as stack:
        yield partial(start_endpoint, stack)


@pytest.fixture
def page(tmp_path: Path) -> str:
    return write_page(tmp_path)
