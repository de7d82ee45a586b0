"""A model that cannot be had is refused after one request, before each of its files is asked for with retries."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

ASK = "import sys; from rollout.inputs.hub_model import require_reachable; require_reachable(*sys.argv[1:])"


def ask(endpoint: str, cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the library reads its settings when it is imported."""
    settings = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(cache), "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-c", ASK, *arguments]
    return subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, check=False)


@pytest.fixture
def hub():
    """A hub without models, which writes down what it is asked."""
    asked: list[str] = []

    class Empty(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.path)
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Empty)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def test_a_hub_that_does_not_answer_is_asked_once_and_named_with_the_way_around_it(hub, tmp_path):
    endpoint, asked = hub
    answered = ask(endpoint, tmp_path, "org/model", "v2")
    assert (answered.returncode, answered.stderr) == (0, ""), "whoever loads it says what the hub said"
    assert asked == ["/org/model/resolve/v2/config.json"]
    silent = ask("http://127.0.0.1:9", tmp_path, "org/model")
    assert "Retrying" not in silent.stderr
    last = silent.stderr.strip().splitlines()[-1]
    assert "InputError: model.path=org/model is neither a folder nor in the hub's cache" in last
    assert last.endswith("run `hf download org/model --local-dir FOLDER`; then set model.path=FOLDER here.")
    assert ask("http://127.0.0.1:9", tmp_path, str(tmp_path)).returncode == 0, "a folder needs no hub"
