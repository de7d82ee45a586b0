"""The server as the model of other harnesses: lmms-eval itself, and requests as VLMEvalKit's wrapper sends them."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from recipes import prepare
from recipes.answers.predictions import load_predictions
from recipes.serve.sampling import SamplingRules
from tests.material import ROOT
from tests.material.serve import COMPLETE, SAMPLING, FakeAnswerer, data_url, post, talk

LMMS_EVAL = os.environ.get("LMMS_EVAL_PYTHON") or (sys.executable if importlib.util.find_spec("lmms_eval") else "")
FREE = SamplingRules(replace(SAMPLING, max_tokens=4096), is_free=True)


def jpeg() -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (40, 30), "white").save(content, "JPEG")
    return content.getvalue()


def vlmevalkit_request(*, system: str = "", **fields: Any) -> dict[str, Any]:
    """A request of VLMEvalKit's OpenAIWrapper (vlmeval/api/gpt.py) for a row with two pages."""
    address = "data:image/jpeg;base64," + base64.b64encode(jpeg()).decode()
    pages = [{"type": "image_url", "image_url": {"url": address, "detail": "low"}}] * 2
    content = [*pages, {"type": "text", "text": "[1][2]which share?"}]
    messages = [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": content}]
    return {"model": "served", "messages": messages, "n": 1, "temperature": 0, "max_tokens": 2048} | fields


@pytest.mark.parametrize("rules", [SamplingRules(SAMPLING), FREE], ids=["fixed", "--allow-sampling"])
def test_a_request_of_vlmevalkit_is_answered_with_the_pages_in_front_of_the_text(rules):
    answerer = FakeAnswerer()
    status, reply, _ = post(vlmevalkit_request(), answerer, rules=rules, template="")
    assert status == 200
    assert reply["choices"][0]["message"]["content"] == answerer.text
    [prompt] = answerer.prompts
    assert prompt.text == "<image><image>[1][2]which share?"
    assert prompt.images == (jpeg(), jpeg())
    assert [one.max_tokens for one in answerer.samplings] == ([2048] if rules.is_free else [])


def test_its_system_prompt_its_smoke_question_and_its_options_are_taken():
    answerer = FakeAnswerer()
    assert post(vlmevalkit_request(system="be short"), answerer, rules=FREE, template="")[0] == 200
    assert answerer.prompts[0].system == "be short"
    hello = {"role": "user", "content": [{"type": "text", "text": "hello"}]}  # what it asks before a run
    assert post(vlmevalkit_request(messages=[hello]), answerer, rules=FREE, template="")[0] == 200
    newer = vlmevalkit_request(max_completion_tokens=2048)  # of models that it takes for o1 and the like
    del newer["max_tokens"], newer["temperature"]
    assert post(newer, answerer, rules=FREE, template="")[0] == 200


def test_after_a_failure_it_sends_the_same_request_again_and_gets_the_answer():
    answerer = FakeAnswerer("down")
    raw = json.dumps(vlmevalkit_request()).encode()
    headers = {"Content-Type": "application/json", "Authorization": "Bearer sk-none"}

    async def scene(client: Any) -> list[tuple[int, Any]]:
        tries = []
        for text in ("down", "yes"):
            answerer.text = text
            async with client.post(COMPLETE, data=io.BytesIO(raw), headers=headers) as reply:
                tries.append((reply.status, await reply.json()))
        return tries

    (failed, said), (status, reply) = talk(scene, answerer, rules=FREE, template="")
    assert (failed, "choices" in said) == (502, False)  # it takes any status outside of 200 to 299 for a failure
    assert (status, reply["choices"][0]["message"]["content"]) == (200, "yes")


def test_a_page_as_png_and_other_details_are_the_same_to_the_server():
    for detail in ("high", "auto"):
        request = vlmevalkit_request()
        request["messages"][0]["content"][0] = {"type": "image_url", "image_url": {"url": data_url(), "detail": detail}}
        assert post(request, rules=FREE, template="")[0] == 200


@pytest.mark.slow
@pytest.mark.skipif(
    not LMMS_EVAL, reason="needs lmms-eval 0.7.3: install it here, or name its Python in LMMS_EVAL_PYTHON"
)
def test_lmms_eval_gets_from_the_server_what_we_get_from_the_model(tmp_path, tiny_model_path, page_images):
    """lmms-eval's own program, over the task folder that we write: greedy answers are equal, text by text."""
    rows = [{"id": f"q{n}", "question": f"what is on {n}?", "answer": "7", "image": page_images[:2]} for n in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    harness = ["harness", str(tmp_path / "rows.jsonl"), "--prompt", "direct", "--max-tokens", "12"]
    assert prepare.main([*harness, "--out", str(tmp_path / "h")]) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pixels = ["784", "12544"]
    server = subprocess.Popen(
        [sys.executable, "-m", "recipes.serve", "--model", str(tiny_model_path), "--prompt", "raw", "--allow-sampling",
         "--max-images", "4", "--max-tokens", "12", "--min-pixels", pixels[0], "--max-pixels", pixels[1],
         "--port", str(port)],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert server.stdout is not None
        assert "serving" in server.stdout.readline()
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
        environment = os.environ | offline | {"OPENAI_API_KEY": "none", "PYTHONPATH": ""}
        arguments = f"model_version={tiny_model_path},base_url=http://127.0.0.1:{port}/v1,num_concurrent=2"
        done = subprocess.run(
            [LMMS_EVAL, "-m", "lmms_eval", "--model", "openai", "--model_args", arguments, "--tasks", "rsgrpo_rows",
             "--include_path", str(tmp_path / "h/lmms_eval"), "--log_samples", "--output_path", str(tmp_path / "out"),
             "--batch_size", "1"],
            env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
    finally:
        server.terminate()
        server.communicate(timeout=60)  # closes its pipe too
    found = list(Path(tmp_path / "out").glob("**/*_samples_rsgrpo_rows.jsonl"))
    assert len(found) == 1, (done.stdout + done.stderr)[-3000:]  # it exits with 0 after an error of its own
    [samples] = found
    theirs = {f"q{place}": one.text.strip() for place, one in load_predictions(samples).by_id.items()}
    ours = subprocess.run(
        [sys.executable, "-m", "recipes.infer", "--batch", str(tmp_path / "rows.jsonl"), "--prompt", "direct",
         "--model", str(tiny_model_path), "--max-tokens", "12", "--min-pixels", pixels[0], "--max-pixels", pixels[1],
         "--out", str(tmp_path / "ours.jsonl")],
        cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert ours.returncode == 0, ours.stderr[-2000:]
    assert theirs == {name: one.text.strip() for name, one in load_predictions(tmp_path / "ours.jsonl").by_id.items()}
    assert len(theirs) == 3
