"""Another model reads answers out of responses, the protocol scores those, and the model's card says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from recipes.answers.spec import AnswerModelConfig
from recipes.evaluate import EvaluateConfig, evaluate
from recipes.evaluation.extraction import INSTRUCTIONS, ExtractorConfig, answer_in, version_of
from rsgrpo.errors import ConfigError, InputError
from rsgrpo.records.integrity import damage, write_sums


@pytest.fixture
def files(tmp_path: Path, monkeypatch) -> Path:
    """Two questions, responses that answer them in words, and an export with a card."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {"id": "a", "question": "what share?", "answer": ["16"], "answer_format": "Int"},
        {"id": "b", "question": "which year?", "answer": ["Not answerable"], "answer_format": "None"},
    ]
    said = [
        {"id": "a", "raw": "The page shows <image> sixteen, that is 16 of them."},
        {"id": "b", "raw": "No page says."},
    ]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("said.jsonl").write_text("".join(json.dumps(row) + "\n" for row in said))
    Path("export").mkdir()
    Path("export/README.md").write_text("# model\n\n## Use\n\nask it\n")
    write_sums(Path("export"))
    return tmp_path


def config_of(**changes) -> EvaluateConfig:
    chosen: dict[str, Any] = {
        "protocol": "mmlongbench",
        "predictions": "said.jsonl",
        "name": "e",
        "bootstrap_samples": 10,
    } | changes
    return EvaluateConfig(benchmark="rows.jsonl", topk=0, **chosen)


def results() -> dict:
    return json.loads(Path("runs/evaluation/e/results.json").read_text())


def extractor(number: int, body: dict) -> str:
    text = body["messages"][0]["content"][0]["text"]
    assert "Extracted answer:" in text
    return "Extracted answer: 16" if "sixteen" in text else "Extracted answer: Not answerable"


def test_a_protocol_scores_what_another_model_reads_out_of_the_responses(files, serve):
    evaluate(config_of())
    assert results()["scores"]["protocol"]["mmlongbench"]["value"] < 1
    stub = serve(extractor)
    evaluate(config_of(extractor=ExtractorConfig(stub.url)))
    assert results()["scores"]["protocol"]["mmlongbench"]["value"] == 1.0
    assert f"protocol: served-model, instructions {version_of(INSTRUCTIONS)}" in results()["extractor"]
    assert results()["scores"]["paper"]["global"]["em"]["value"] == 0.0  # answers as written
    asked = len(stub.bodies)
    evaluate(config_of(extractor=ExtractorConfig(stub.url)))
    assert len(stub.bodies) == asked  # kept beside the results


def judge(number: int, body: dict) -> str:
    text = body["messages"][0]["content"][0]["text"]
    assert "Reference answers: 16\n" in text or "Reference answers: Not answerable\n" in text
    return "Extracted answer: 4" if "sixteen" in text else "3"


def test_a_judge_marks_answers_for_vidoseek_and_one_is_needed(files, serve):
    with pytest.raises(ConfigError, match=r"protocol=vidoseek scores the marks of another model\. Set extractor\.url"):
        config_of(protocol="vidoseek")
    evaluate(config_of(protocol="vidoseek", extractor=ExtractorConfig(serve(judge).url)))
    assert results()["scores"]["protocol"]["vidoseek"]["value"] == 0.5
    assert "protocol: served-model, instructions " in results()["extractor"]
    assert version_of(INSTRUCTIONS) not in results()["extractor"]
    assert Path("runs/evaluation/e/judged_extracted.jsonl").is_file()  # beside extracted.jsonl of another protocol


def test_a_reply_is_an_answer_with_or_without_the_line_that_was_asked_for():
    assert answer_in("Answer format: Int\nextracted answer:  [7] \n") == "7"
    assert answer_in('Extracted answer: ["a", "b"]') == '["a", "b"]'
    assert answer_in("16%") == "16%"


def test_an_extractor_needs_a_protocol_and_an_address():
    with pytest.raises(ConfigError, match=r"extractor\.url: extracted answers are scored by a protocol"):
        config_of(protocol="", extractor=ExtractorConfig("http://localhost:1/v1"))
    with pytest.raises(ConfigError, match=r"extractor\.url must start with http"):
        ExtractorConfig("localhost:1")


def test_the_models_card_carries_scores_with_all_that_they_depend_on_once(files):
    model = AnswerModelConfig("export")
    for _ in range(2):
        evaluate(config_of(model=model, model_card=True))
    evaluate(config_of(model=model, model_card=True, protocol="anls"))
    card = Path("export/README.md").read_text()
    assert card.count("## Evaluations") == 1
    assert card.count("### rows.jsonl, 2 questions") == 2
    assert "- protocol: mmlongbench 2 (arXiv 2407.01523" in card
    assert "- protocol: anls 2" in card
    assert "| answers, strict: EM | 0.0 (0.0 to 0.0) |" in card
    assert card.endswith("## Use\n\nask it\n")
    assert damage(Path("export"), 1) == []


def test_a_folder_without_a_card_gets_none(files):
    with pytest.raises(InputError, match=r"model_card=true: \. has no README\.md"):
        evaluate(config_of(model=AnswerModelConfig("."), model_card=True))
