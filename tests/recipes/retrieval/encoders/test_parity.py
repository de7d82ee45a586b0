"""What libraries compute for us against the formulas written out: gradients of a large batch, metrics of a ranking."""

from __future__ import annotations

import math
from random import Random
from typing import Any

import pytest
import torch

pytest.importorskip("sentence_transformers", reason="needs the retrieval extra")

from recipes.retrieval.encoders.base import EncoderSettings, identify
from recipes.retrieval.encoders.sentence import load_sentence_transformer
from recipes.retrieval.evaluation.scores import evaluate_run
from recipes.retrieval.search.exact import Hit
from recipes.retrieval.training.loop import InBatchLoss, inputs_of
from tests.material.retrieval import write_image

COLOURS = ("red", "lime", "blue", "white", "black", "yellow", "cyan")
SCALE = 50.0


@pytest.mark.parametrize("micro", [1, 3, 7])
def test_cached_gradients_are_those_of_one_plain_pass_over_the_whole_batch(tiny_model_path, tmp_path, micro):
    identity = identify(EncoderSettings(tiny_model_path, min_pixels=784, max_pixels=3136, query_prefix=""))
    to_inputs = inputs_of(identity)
    for colour in COLOURS:
        write_image(tmp_path / f"{colour}.png", colour, 56, 56)
    queries = [f"page {row}: amount {colour}" for row, colour in enumerate(COLOURS)]
    pages = [{"page": str(tmp_path / f"{colour}.png")} for colour in COLOURS]

    def gradients(cached: bool) -> tuple[float, torch.Tensor]:
        model = load_sentence_transformer(identity).train()
        columns: list[list[Any]] = [list(queries), list(pages)]
        features = [model.preprocess(to_inputs(column)) for column in columns]
        if cached:
            page_numbers = torch.arange(len(queries))[:, None]
            loss = InBatchLoss(model, scale=SCALE, mini_batch_size=micro)(features, page_numbers)
        else:
            queries_ND, pages_ND = (model(columns)["sentence_embedding"] for columns in features)
            loss = torch.nn.functional.cross_entropy(SCALE * queries_ND @ pages_ND.T, torch.arange(len(queries)))
        loss.backward()
        flat = [p.grad.flatten() for _, p in sorted(model.named_parameters()) if p.grad is not None]
        return loss.item(), torch.cat(flat).double()

    plain, cached = gradients(cached=False), gradients(cached=True)
    assert cached[0] == pytest.approx(plain[0], rel=1e-5)
    assert plain[1].norm() > 1e-3
    assert (cached[1] - plain[1]).norm() <= 1e-5 * plain[1].norm()


def direct(ranked: list[str], judged: dict[str, int], cutoff: int) -> dict[str, float]:
    """The formulas, with linear gains."""
    gains = [max(0, judged.get(page, 0)) for page in ranked[:cutoff]]
    ideal = sorted((grade for grade in judged.values() if grade > 0), reverse=True)[:cutoff]

    def discounted(values: list[int]) -> float:
        return sum(gain / math.log2(place + 2) for place, gain in enumerate(values))

    first = next((place for place, gain in enumerate(gains) if gain > 0), None)
    num_relevant = sum(grade > 0 for grade in judged.values())
    return {
        f"ndcg@{cutoff}": discounted(gains) / discounted(ideal),
        f"mrr@{cutoff}": 0.0 if first is None else 1 / (first + 1),
        f"recall@{cutoff}": sum(gain > 0 for gain in gains) / num_relevant,
    }


@pytest.mark.parametrize("seed", range(5))
def test_metrics_of_random_rankings_with_ties_are_the_formulas(seed):
    pytest.importorskip("pytrec_eval", reason="needs the retrieval extra")
    rng = Random(seed)
    names = [f"p{row}" for row in range(30)]
    run = {f"q{q}": [Hit(page, rng.randrange(6) / 4) for page in rng.sample(names, 20)] for q in range(8)}
    qrels = {f"q{q}": {page: rng.randrange(4) for page in rng.sample(names, 9)} | {"p0": 1} for q in range(10)}
    scores = evaluate_run(run, qrels, [1, 3, 10, 100])
    assert scores.num_missing == 2
    for query, judged in qrels.items():
        ranked = [hit.page_id for hit in sorted(run.get(query, []), key=lambda hit: (-hit.score, hit.page_id))]
        for cutoff in (1, 3, 10, 100):
            wanted = direct(ranked, judged, cutoff)
            assert {name: scores.per_query[query][name] for name in wanted} == pytest.approx(wanted, abs=1e-6)
