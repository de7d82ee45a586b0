"""vLLM's pooling runner gives the vectors that transformers gives, for both families of vision-language models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sentence_transformers", reason="needs the retrieval extra")

from recipes.retrieval.encoders.base import EncoderError, EncoderSettings
from recipes.retrieval.encoders.choice import load_encoder
from recipes.retrieval.encoders.vllm import folder_pooling, pool
from recipes.retrieval.pages.store import Page
from rsgrpo.errors import RsgrpoError
from tests.material.tiny_families import save_family

pytestmark = pytest.mark.filterwarnings(  # vLLM imports what torch calls deprecated
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
QUERIES = ["what amount is on page 2?", "7"]


def test_each_pooling_is_its_formula():
    states = np.array([[3.0, 0.0], [0.0, 3.0], [6.0, 3.0]])
    np.testing.assert_allclose(pool(states, "weighted_mean"), [(3 + 18) / 6, (6 + 9) / 6])
    np.testing.assert_allclose(pool(states, "mean"), [3, 2])
    np.testing.assert_allclose(pool(states, "last"), [6, 3])
    np.testing.assert_allclose(pool(states, "cls"), [3, 0])


@pytest.mark.slow
@pytest.mark.parametrize(("family", "pooling"), [("qwen2.5", ""), ("qwen2.5 saved", "mean"), ("qwen3", "last")])
def test_vllm_gives_the_vectors_of_transformers(family, pooling, tiny_model_path, page_images, tmp_path):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    folder = save_family("qwen3_vl", tiny_model_path, tmp_path / "qwen3") if family == "qwen3" else tiny_model_path
    settings: dict[str, Any] = {"min_pixels": 32 * 32, "max_pixels": 16 * 32 * 32, "device": "cpu", "batch_size": 2}
    settings["query_prefix"] = "find: "
    plain = load_encoder(EncoderSettings(folder, pooling=pooling, **settings))
    if family.endswith("saved"):
        plain.model.save(str(tmp_path / "saved"))  # type: ignore[attr-defined]
        folder, pooling = str(tmp_path / "saved"), ""
        plain = load_encoder(EncoderSettings(folder, **settings))
    fast = load_encoder(EncoderSettings(folder, encode_with="vllm", pooling=pooling, **settings))
    try:
        assert fast.identity.fingerprint == plain.identity.fingerprint  # an index made by one is searched by the other
        pages = [Page(f"p{row}", "d", row + 1, path, 1, 1, "") for row, path in enumerate(page_images)]
        for found, wanted in (
            (fast.encode_pages(pages), plain.encode_pages(pages)),
            (fast.encode_queries(QUERIES), plain.encode_queries(QUERIES)),
        ):
            np.testing.assert_allclose(np.stack(found), np.stack(wanted), atol=2e-6)
        np.testing.assert_allclose(fast.encode_pages(pages[1:2])[0], fast.encode_pages(pages)[1], atol=2e-6)
        assert fast.encode_pages([]) == []
        with pytest.raises(EncoderError, match=r"a query has .* tokens, more than .*; shorten it"):
            fast.encode_queries(["page 1 " * 4_000])
    finally:
        fast.close()  # type: ignore[attr-defined]


def test_what_vllm_cannot_run_is_refused(tmp_path, tiny_model_path):
    def refused(fault: str, folder: Path, **changes: Any) -> None:
        with pytest.raises(EncoderError, match=fault):
            folder_pooling(folder, EncoderSettings(str(folder), encode_with="vllm", **changes))

    assert folder_pooling(Path(tiny_model_path), EncoderSettings("x", pooling="cls")) == "cls"
    refused("not a model folder", tmp_path)
    (tmp_path / "config.json").write_text("{}")
    modules = [{"type": f"x.{name}", "path": path} for name, path in (("Transformer", ""), ("Pooling", "1"))]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    refused("has Transformer, Pooling; --encode-with vllm supports only", tmp_path)
    (tmp_path / "modules.json").write_text(json.dumps([*modules, {"type": "x.Normalize", "path": "2"}]))
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "config.json").write_text('{"pooling_mode": "max"}')
    refused("pools by max; --encode-with vllm supports weightedmean, mean, lasttoken, cls", tmp_path)
    refused("which fixes the pooling", tmp_path, pooling="mean")
    (tmp_path / "1" / "config.json").write_text('{"pooling_mode": "lasttoken"}')
    assert folder_pooling(tmp_path, EncoderSettings("x")) == "last"
    (tmp_path / "config_sentence_transformers.json").write_text('{"prompts": {"query": "q: ", "document": ""}}')
    refused("has prompts of its own", tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    refused("holds adapters", tmp_path)
    with pytest.raises(RsgrpoError, match="--encode-with vllm supports --kind image only, not late"):
        EncoderSettings("x", "late", "vllm")
