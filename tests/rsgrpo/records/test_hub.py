"""Model cards, and uploads to a hub that runs on this machine."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from rsgrpo.config.train import CheckpointConfig, ExportConfig, SftConfig, TrainConfig
from rsgrpo.errors import ConfigError, InputError, RsgrpoError
from rsgrpo.records import hub
from rsgrpo.records.hub import push_folder, require_login
from rsgrpo.report.model_card import ancestors, model_card, write_model_card
from tests.material.http_stub import QuietHandler, serving

REPOSITORY = "org/model"


@dataclass
class Hub:
    """A hub with at most one repository. files: path -> content, as the last commit has them."""

    is_private: bool | None = None
    files: dict[str, bytes] = field(default_factory=dict)
    knows_us: bool = True
    calls: list[str] = field(default_factory=list)
    url: str = ""


def handler_of(state: Hub) -> type[QuietHandler]:
    class Handler(QuietHandler):
        def reply(self, what: str, value: Any, status: int = 200, **headers: str) -> None:
            state.calls.append(what)
            self.send(status, {"Content-Type": "application/json", **headers}, json.dumps(value).encode())

        def do_GET(self) -> None:
            if not state.knows_us:
                self.reply("refused", {"error": "Invalid credentials"}, 401)
            elif self.path.startswith("/api/whoami-v2"):
                self.reply("whoami", {"name": "me", "type": "user", "orgs": []})
            elif state.is_private is None:
                self.reply("missing", {"error": "no"}, 404, **{"X-Error-Code": "RepoNotFound"})
            else:
                self.reply("info", {"id": REPOSITORY, "private": state.is_private, "siblings": [], "tags": []})

        def do_POST(self) -> None:
            body = self.body()
            if not state.knows_us:
                self.reply("refused", {"error": "Invalid credentials"}, 401)
            elif self.path.endswith("/repos/create"):
                wanted = json.loads(body)
                state.is_private = wanted.get("private", wanted.get("visibility") == "private")
                self.reply("create", {"url": f"{state.url}/{REPOSITORY}"})
            elif "/preupload/" in self.path:
                files = [
                    {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                    for file in json.loads(body)["files"]
                ]
                self.reply("preupload", {"files": files})
            elif "/commit/" in self.path:
                for line in body.splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "file":
                        state.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                self.reply(
                    "commit",
                    {"commitUrl": f"{state.url}/{REPOSITORY}/commit/1", "commitOid": "1", "pullRequestUrl": None},
                )
            else:
                self.reply(self.path, {})

    return Handler


@pytest.fixture
def our_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    state = Hub()
    with serving(handler_of(state)) as url:
        state.url = url
        monkeypatch.setenv("HF_ENDPOINT", url)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        yield state


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlibrary_name: transformers\n---\n# mine\n")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


# Uploads


def test_nothing_is_asked_of_the_hub_unless_it_is_named(our_hub):
    require_login(ExportConfig())
    assert our_hub.calls == []


def test_a_folder_is_uploaded_whole_into_a_private_repository(our_hub, exported):
    export = ExportConfig(REPOSITORY)
    require_login(export)
    assert our_hub.is_private is None
    assert push_folder(exported, export, "step 3").endswith(f"/{REPOSITORY}")
    assert our_hub.is_private is True
    assert our_hub.files["model.safetensors"] == b"weights"
    assert set(our_hub.files) == {"README.md", "model.safetensors"}


def test_a_public_repository_is_made_and_used_only_when_that_is_said(our_hub, exported):
    our_hub.is_private = False
    with pytest.raises(InputError, match="the repository exists and is public"):
        require_login(ExportConfig(REPOSITORY))
    require_login(ExportConfig(REPOSITORY, private=False))
    our_hub.is_private = None
    push_folder(exported, ExportConfig(REPOSITORY, private=False), "step 3")
    assert our_hub.is_private is False


def test_a_run_is_refused_before_it_starts_where_the_hub_does_not_know_us(our_hub):
    our_hub.knows_us = False
    with pytest.raises(InputError, match=r"org/model: the hub cannot be written to: .*hf auth login"):
        require_login(ExportConfig(REPOSITORY))


def test_an_upload_that_fails_says_where_the_model_is(our_hub, exported):
    our_hub.knows_us = False
    with pytest.raises(RsgrpoError, match=r"The model is in .*export: `hf upload org/model") as error:
        push_folder(exported, ExportConfig(REPOSITORY), "step 3")
    assert error.value.exit_code == 1
    assert (exported / "model.safetensors").read_bytes() == b"weights"


def test_a_hub_that_is_not_there_is_one_line(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(InputError, match="the hub cannot be written to"):
        require_login(ExportConfig(REPOSITORY))


@pytest.mark.parametrize("name", ["model", "a/b/c", "org/", "../x", "org/mo del"])
def test_a_name_that_is_no_repository_is_refused(name):
    with pytest.raises(ConfigError, match="must be a repository org/name"):
        ExportConfig(name)


@pytest.mark.parametrize("schema", [TrainConfig, SftConfig])
def test_what_is_not_exported_cannot_be_uploaded(schema):
    with pytest.raises(ConfigError, match=r"needs an export\. Set checkpoint\.export=true"):
        schema(checkpoint=CheckpointConfig(export=False), export=ExportConfig(REPOSITORY))


# Cards


def settings_of(model: str, **changes: Any) -> dict[str, Any]:
    return {
        "name": "mine",
        "rewards": {"accuracy": "rewards.evisrag:accuracy"},
        "model": {"path": model},
        "data": {"train": "org/rows:train", "val": "held_out.jsonl"},
        "inputs": {"min_pixels": 784, "max_pixels": 50176, "max_images": 4},
        "validation": {"greedy": True, "samples": 0},
        "algorithm": {"advantage": "per_reward"},
        "prompt": {"template": "", "file": "", "system": ""},
    } | changes


def write_run(folder: Path, settings: dict[str, Any]) -> Path:
    """Write a finished run of two validations; return its export."""
    (folder / "export").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    rows = [{"step": step, "val/greedy/accuracy": 0.25 * step, "val/greedy/num_prompts": 8.0} for step in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_model_card(folder, folder / "export", settings)
    return folder / "export"


def test_a_card_names_base_data_scores_settings_and_shows_the_curve(tmp_path):
    export = write_run(tmp_path / "run", settings_of("Org/Base-3B"))
    text = (export / "README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["base_model"] == "Org/Base-3B"
    assert front["datasets"] == ["org/rows"]
    assert front["library_name"] == "transformers"
    assert "| accuracy | 0.250 → 0.500 |" in text
    assert "![Held-out scores by training step](curves.svg)" in text
    assert "polyline" in (export / "curves.svg").read_text()
    assert "| `model.path` | Org/Base-3B |" in text
    assert "| `accuracy` | `rewards.evisrag:accuracy` | Set-token F1 of the answer block" in text
    assert yaml.safe_load((export / "training_config.yaml").read_text())["name"] == "mine"
    assert not (export / "prompt.txt").exists()


def test_a_second_stage_names_the_first_and_the_base_of_both(tmp_path):
    first = write_run(tmp_path / "sft", settings_of("Org/Base-3B"))
    second = write_run(tmp_path / "rl", settings_of(str(first)))
    assert ancestors(str(second)) == [str(second), str(first), "Org/Base-3B"]
    text = (second / "README.md").read_text()
    assert yaml.safe_load(text.split("---\n")[1])["base_model"] == "Org/Base-3B"
    assert f"`{first}` ← `Org/Base-3B`" in text


def test_local_names_are_no_hub_names(tmp_path):
    (tmp_path / "base").mkdir()
    data = {"train": str(tmp_path / "base"), "val": ""}
    card = model_card(settings_of("m", data=data), [str(tmp_path / "base")], {})
    assert set(yaml.safe_load(card.split("---\n")[1])) == {"library_name", "pipeline_tag", "tags"}
    assert "The run had no validation." in card


def test_the_prompt_of_training_is_exported_with_the_model(tmp_path):
    prompt = {"template": "{images}\nQ: {question}", "file": "", "system": ""}
    export = write_run(tmp_path / "run", settings_of("Org/Base", prompt=prompt))
    assert (export / "prompt.txt").read_text() == "{images}\nQ: {question}"
    assert "--prompt prompt.txt" in (export / "README.md").read_text()


def test_the_home_of_uploads_is_loaded_without_the_hubs_library():
    assert "huggingface_hub" not in vars(hub)
