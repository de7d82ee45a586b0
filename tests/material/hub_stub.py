"""A hub on this machine that has one data set; `huggingface_hub` and `datasets` talk to it as to the real one."""

from __future__ import annotations

import hashlib
import time
import urllib.parse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from tests.material.http_stub import QuietHandler, serving

COMMIT = "a" * 40


@dataclass
class DataSetHub:
    """What the hub does.

    name: of the data set. files: path -> content.
    breaks: paths whose connection closes in the middle. num_broken: how often one did.
    """

    name: str
    files: Mapping[str, bytes]
    breaks: set[str] = field(default_factory=set)
    num_broken: int = 0


def handler_of(hub: DataSetHub) -> type[QuietHandler]:
    def entry(path: str) -> dict[str, Any]:
        content = hub.files[path]
        return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    class Handler(QuietHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
            if not path.startswith((f"/api/datasets/{hub.name}", f"/datasets/{hub.name}/resolve/")):
                self.send(404, {"X-Error-Code": "RepoNotFound"}, b"")
            elif "/tree/" in path:
                self.send_json(200, [entry(file) for file in hub.files])
            elif path.startswith("/api/"):
                siblings = [{"rfilename": file} for file in hub.files]
                self.send_json(200, {"id": hub.name, "sha": COMMIT, "private": False, "tags": [], "siblings": siblings})
            else:
                self.send_file(path.split("/resolve/")[1].partition("/")[2])

        def do_POST(self) -> None:
            asked = urllib.parse.parse_qs(self.body().decode())["paths"]
            self.send_json(200, [entry(path) for path in asked if path in hub.files])

        def send_file(self, file: str) -> None:
            if file not in hub.files:
                return self.send(404, {"X-Error-Code": "EntryNotFound"}, b"")
            whole, (start, end) = hub.files[file], self.asked_range()
            content = whole[start:end]
            headers = {"ETag": f'"{entry(file)["oid"]}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            if "Range" in self.headers:
                headers["Content-Range"] = f"bytes {start}-{start + len(content) - 1}/{len(whole)}"
            self.send_response(206 if "Range" in self.headers else 200)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "HEAD":
                return None
            if file in hub.breaks:
                hub.num_broken += 1
                content = content[: len(content) // 2]
                self.close_connection = True
            self.wfile.write(content)
            return None

        def asked_range(self) -> tuple[int, int | None]:
            start, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
            return int(start), int(last) + 1 if last else None

    return Handler


@contextmanager
def data_set_hub(
    monkeypatch: pytest.MonkeyPatch, cache: str, name: str, files: Mapping[str, bytes]
) -> Iterator[DataSetHub]:
    """Serve one data set as the hub that both libraries use, with waits between their tries cut out."""
    import datasets
    import huggingface_hub

    hub = DataSetHub(name, files)
    with serving(handler_of(hub)) as url:
        for place in ("huggingface_hub.constants.ENDPOINT", "datasets.config.HF_ENDPOINT"):
            monkeypatch.setattr(place, url)
        template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        for place in ("huggingface_hub.constants.HF_HUB_OFFLINE", "datasets.config.HF_HUB_OFFLINE"):
            monkeypatch.setattr(place, False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", cache)
        monkeypatch.setattr(datasets.config, "STREAMING_READ_MAX_RETRIES", 2)
        monkeypatch.setattr(datasets.config, "STREAMING_READ_RETRY_INTERVAL", 0)
        monkeypatch.setattr(
            "huggingface_hub.utils._http.time", SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
        )
        huggingface_hub.HfFileSystem.clear_instance_cache()
        yield hub
        huggingface_hub.HfFileSystem.clear_instance_cache()
