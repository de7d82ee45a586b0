"""A retriever learns: exact gradients, resumption, mined negatives, settings that are refused."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from tests.material import ROOT

pytest.importorskip("sentence_transformers", reason="needs the retrieval extra")

from safetensors.torch import load_file

from recipes.retrieval.encoders.base import EncoderSettings, identify
from recipes.retrieval.encoders.sentence import SentenceEncoder, load_sentence_transformer
from recipes.retrieval.pages.store import Page
from recipes.retrieval.training.config import RetrieverConfig
from recipes.retrieval.training.loop import HeldOut, InBatchLoss, as_dataset, encode, inputs_of, mine_negatives, train
from recipes.retrieval.training.pairs import Pair, read_pairs
from recipes.train_retriever import main, split
from rsgrpo import cli
from rsgrpo.errors import RsgrpoError
from tests.material.retrieval import QUIET, write_image

COLOURS = ("red", "lime", "blue", "white", "black", "yellow", "cyan", "magenta")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[Pair]:
    folder = tmp_path_factory.mktemp("coloured")
    for colour in COLOURS:
        write_image(folder / f"{colour}.png", colour, 56, 56)
    return [Pair(f"page {row}: amount {colour}", str(folder / f"{colour}.png")) for row, colour in enumerate(COLOURS)]


def config(tiny_model_path: str, out: Path, **changes: Any) -> RetrieverConfig:
    base = RetrieverConfig(
        name="run", output_dir=str(out), base_model=tiny_model_path, pairs="unused", min_pixels=784, max_pixels=3136,
        batch_size=8, micro_batch_size=4, total_steps=4, lr=1e-3, warmup_steps=0, log_every=1, save_every=2,
        eval_every=100, held_out_pairs=0, num_threads=1,
    )  # fmt: skip
    return replace(base, **changes)


def untrained(path: str) -> tuple[Any, Any]:
    """Return a model and what makes its inputs; queries have no prefix."""
    identity = identify(EncoderSettings(path, min_pixels=784, max_pixels=3136, query_prefix=""))
    return load_sentence_transformer(identity).train(), inputs_of(identity)


def cached_loss(path: str, pairs: list[Pair], micro: int) -> tuple[float, torch.Tensor, float]:
    """Return the loss, its gradients in one row, and the accuracy."""
    model, to_inputs = untrained(path)
    columns: list[list[Any]] = [[pair.query for pair in pairs], [{"page": pair.page} for pair in pairs]]
    features = [model.preprocess(to_inputs(column)) for column in columns]
    loss = InBatchLoss(model, scale=50.0, mini_batch_size=micro)
    numbers = {page: number for number, page in enumerate(dict.fromkeys(pair.page for pair in pairs))}
    value = loss(features, torch.tensor([[numbers[pair.page]] for pair in pairs]))
    value.backward()
    return value.item(), gradients_of(model), loss.accuracy


def gradients_of(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for _, p in sorted(model.named_parameters()) if p.grad is not None]).double()


def test_cached_gradients_are_those_of_one_plain_pass_over_the_whole_batch(tiny_model_path, pairs):
    model, to_inputs = untrained(tiny_model_path)
    columns: list[list[Any]] = [[pair.query for pair in pairs], [{"page": pair.page} for pair in pairs]]
    queries_ND, pages_ND = (model(model.preprocess(to_inputs(column)))["sentence_embedding"] for column in columns)
    plain = torch.nn.functional.cross_entropy(50 * queries_ND @ pages_ND.T, torch.arange(len(pairs)))
    plain.backward()
    wanted = gradients_of(model)
    assert wanted.norm() > 1e-3
    for micro in (1, 3, 8):
        value, gradients, accuracy = cached_loss(tiny_model_path, pairs, micro)
        assert value == pytest.approx(plain.item(), rel=1e-5)
        assert (gradients - wanted).norm() <= 1e-5 * wanted.norm()
        assert accuracy == ((queries_ND @ pages_ND.T).argmax(1) == torch.arange(8)).float().mean().item()


def test_a_page_is_not_a_negative_of_its_other_queries(tiny_model_path, pairs):
    twice = [*pairs[:4], *(replace(pair, query=f"again {pair.query}") for pair in pairs[:4])]
    model, to_inputs = untrained(tiny_model_path)
    queries = torch.tensor(encode(model.eval(), [pair.query for pair in twice], to_inputs, 8))
    pages = torch.tensor(encode(model, [{"page": pair.page} for pair in pairs[:4]], to_inputs, 8))
    own = torch.arange(4).repeat(2)
    others_twice = np.log(2) * (1 - torch.eye(4)).repeat(2, 1)  # log 2: there are two of every other page, one own
    direct = torch.nn.functional.cross_entropy(50 * queries @ pages.T + others_twice, own)
    for micro in (8, 3):
        value, _, accuracy = cached_loss(tiny_model_path, twice, micro)
        assert value == pytest.approx(direct.item(), rel=1e-4)
        assert accuracy == ((queries @ pages.T).argmax(1) == own).float().mean().item()


def test_a_mined_negative_that_is_anothers_own_page_counts_against_the_first_query_only():
    nothing: Any = torch.nn.Sequential(torch.nn.Identity())  # the embeddings are given
    loss = InBatchLoss(nothing, scale=1.0, mini_batch_size=2)
    queries, pages = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    numbers = torch.tensor([[0, 1], [1, 0]])  # each has the other's page as its negative
    value = loss.calculate_loss([[queries], [pages], [pages.flip(0)]], numbers)
    # own page 1, other page 0, own page again masked, other page again 0: log(e + 1 + 1) - 1
    assert value.item() == pytest.approx(np.log(np.e + 2) - 1)
    assert loss.accuracy == 1.0


def test_equal_pages_have_equal_numbers():
    rows = as_dataset([Pair("a", b"x", (b"y",)), Pair("b", b"y", (b"x",)), Pair("c", b"x", (b"z",))], seed=1)
    found = {row["query"]: row["label"] for row in rows}
    assert found == {"a": [0, 1], "b": [1, 0], "c": [0, 2]}


def test_a_retriever_learns_its_pairs_and_its_folder_is_an_encoder(tiny_model_path, pairs, tmp_path):
    settings = config(tiny_model_path, tmp_path, total_steps=60, lr=1e-3, save_every=60, temperature=0.1)
    out = tmp_path / "run"
    out.mkdir()
    (out / "metrics.jsonl").write_text('{"step": 0, "kept": 1}\n{"step": 14, "loss": 9.0}\n{"step": 15, "lo')  # killed
    metrics = train(settings, pairs, pairs, out, QUIET)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert "kept" in rows.pop(0)
    assert all(row.get("loss") != 9.0 for row in rows)
    steps = [row for row in rows if "in_batch_accuracy" in row]
    assert steps[-1]["loss"] < 0.5 * steps[0]["loss"]
    assert metrics["recall@1"] >= 0.75
    encoder = SentenceEncoder(EncoderSettings(str(out / "model"), device="cpu"))
    pages = [Page(pair.page, "d", 1, str(pair.page), 1, 1, "") for pair in pairs if isinstance(pair.page, str)]
    scores = np.stack(encoder.encode_queries([pair.query for pair in pairs])) @ np.stack(encoder.encode_pages(pages)).T
    assert (scores.argmax(1) == np.arange(8)).mean() == metrics["recall@1"]  # prefix and sizes came with the folder


def test_a_resumed_run_ends_where_an_unbroken_one_does(tiny_model_path, pairs, tmp_path):
    first, second = tmp_path / "a" / "run", tmp_path / "b" / "run"
    first.mkdir(parents=True)
    train(config(tiny_model_path, tmp_path / "a"), pairs * 2, [], first, QUIET)
    second.mkdir(parents=True)
    shutil.copytree(first / "checkpoint-2", second / "checkpoint-2")
    (second / "checkpoint-3").mkdir()  # was being written when the run died
    train(config(tiny_model_path, tmp_path / "b"), pairs * 2, [], second, QUIET)
    unbroken, resumed = (load_file(folder / "model" / "model.safetensors") for folder in (first, second))
    untrained = load_file(Path(tiny_model_path) / "model.safetensors")
    assert not all(torch.equal(value, untrained.get(name, value)) for name, value in unbroken.items())
    for name, value in unbroken.items():
        torch.testing.assert_close(resumed[name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("freeze", [False, True])
def test_lora_trains_adapters_only_and_its_folder_is_an_encoder(tiny_model_path, pairs, tmp_path, freeze):
    settings = config(tiny_model_path, tmp_path, lora_rank=4, total_steps=2, freeze_vision=freeze)
    out = tmp_path / "run"
    out.mkdir()
    train(settings, pairs, [], out, QUIET)
    adapters = load_file(out / "model" / "adapter_model.safetensors")
    assert all("lora_" in name for name in adapters)
    assert any("visual" in name for name in adapters) is not freeze
    trained = SentenceEncoder(EncoderSettings(str(out / "model"), device="cpu"))
    assert np.isfinite(np.stack(trained.encode_queries(["amount red"]))).all()


def test_mined_negatives_are_the_nearest_other_pages():
    pairs = [Pair("a", "p0"), Pair("b", "p2")]
    pages = ["p0", "p1", "p2"]
    queries, vectors = np.array([[1.0, 0], [0, 1.0]]), np.array([[1.0, 0], [0.8, 0.6], [0.6, 0.8]])
    mined = mine_negatives(pairs, queries, vectors, pages, 1)
    assert [pair.negatives for pair in mined] == [("p1",), ("p1",)]
    with pytest.raises(RsgrpoError, match="mined_negatives 3 needs more than 3 distinct pages, got 3; lower it"):
        mine_negatives(pairs, queries, vectors, pages, 3)


def test_training_with_mined_negatives_runs(tiny_model_path, pairs, tmp_path):
    (tmp_path / "run").mkdir()
    train(config(tiny_model_path, tmp_path, mined_negatives=1, total_steps=1), pairs, [], tmp_path / "run", QUIET)
    assert (tmp_path / "run" / "model" / "retriever.json").exists()


def test_held_out_metrics_are_worked_out_by_hand(monkeypatch):
    # pages p, q; the second query's own page comes second: 1 / log2(3)
    vectors = {"x": [1.0, 0], "y": [1.0, 0], "p": [0.8, 0.6], "q": [0.6, 0.8]}

    def scripted(_: Any, items: Any, *__: Any) -> np.ndarray:
        return np.array([vectors[item if isinstance(item, str) else item["page"]] for item in items])

    monkeypatch.setattr("recipes.retrieval.training.loop.encode", scripted)
    found = HeldOut([Pair("x", "p"), Pair("y", "q")], list, 8)(None)
    assert found == pytest.approx({"ndcg@10": (1 + 1 / np.log2(3)) / 2, "recall@1": 0.5, "num_pages": 2})


def test_pairs_are_read_from_jsonl_and_from_visrags_parquet(tmp_path, pairs):
    name = Path(str(pairs[0].page)).name
    shutil.copy(str(pairs[0].page), tmp_path / name)
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"query": "red?", "image": name, "negatives": [name]}) + "\n")
    path = str(tmp_path / name)
    assert read_pairs(str(tmp_path / "pairs.jsonl")) == [Pair("red?", path, (path,))]
    content = Path(path).read_bytes()
    (tmp_path / "hub" / "data").mkdir(parents=True)
    row = {"query": "red?", "image": {"bytes": content, "path": name}, "source": "demo"}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "hub" / "data" / "train-0.parquet")
    assert read_pairs(str(tmp_path / "hub")) == [Pair("red?", content)]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('{"query": "x", "image": "gone.png"}', r"1 rows cannot be used:\n  p\.jsonl:1: image .* does not exist"),
        ('{"query": " ", "image": "a"}', "the query is empty"),
        ('{"image": "a"}', r"a row needs query \(text\), image and, optionally, a list negatives; it has image"),
        ('{"query": "x", "image": {}}', "an image must be a path, bytes"),
        ('{"query": "x", "image": "a", "negatives": "b"}', "optionally, a list negatives"),
        ('\n\n{"query": 7, "image": "a"}\n', r"p\.jsonl:3: a row needs query \(text\)"),
        ("[1]", "must be a JSON object, got list"),
        ("not json", "line 1: not "),
        ("", "has no pairs"),
    ],
)
def test_bad_pairs_are_listed(tmp_path, text, fault):
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(RsgrpoError, match=fault):
        read_pairs(str(tmp_path / "p.jsonl"))


def test_broken_tables_and_slim_pages_are_refused(tmp_path):
    whole = tmp_path / "whole.parquet"
    pq.write_table(pa.Table.from_pylist([{"query": "red?", "image": "gone.png"}] * 50), whole)
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "train-0.parquet").write_bytes(whole.read_bytes()[:-40])
    with pytest.raises(RsgrpoError, match=r"train-0\.parquet cannot be read: .*pairs must be jsonl or parquet"):
        read_pairs(str(tmp_path / "hub"))
    with pytest.raises(RsgrpoError, match=r"50 rows cannot be used:\n  whole\.parquet:1: [^$]*\n  \.\.\. and 40 more"):
        read_pairs(str(whole))
    write_image(tmp_path / "slim.png", "red", 2_010, 10)
    (tmp_path / "p.jsonl").write_text('{"query": "x", "image": "slim.png"}')
    with pytest.raises(RsgrpoError, match="an image of 2010 x 10 pixels is too narrow for any model"):
        read_pairs(str(tmp_path / "p.jsonl"))


def test_a_page_whose_pixels_are_damaged_ends_the_run_with_its_name(tiny_model_path, pairs, tmp_path):
    content = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(content, "PNG")
    (tmp_path / "cut.png").write_bytes(content.getvalue()[:-500])  # its header is whole
    cut = [*pairs[:7], Pair("the cut one", str(tmp_path / "cut.png"))]
    (tmp_path / "run").mkdir()
    with pytest.raises(RsgrpoError, match=r"cut\.png cannot be read: .*; fix or remove the pair"):
        train(config(tiny_model_path, tmp_path), cut, [], tmp_path / "run", QUIET)


def test_held_out_pairs_share_no_page_with_training():
    pairs = [Pair(f"q{row}", f"p{row % 5}") for row in range(20)]
    rest, held = split(pairs, 5, seed=0)
    assert len(rest) + len(held) == 20
    assert len(held) >= 5
    assert not {pair.page for pair in rest} & {pair.page for pair in held}
    with pytest.raises(RsgrpoError, match="held_out_pairs 20 leaves no pair"):
        split(pairs, 20, seed=0)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"batch_size": 1}, "batch_size must be >= 2"),
        ({"temperature": 0.0}, "temperature must be > 0"),
        ({"pooling": "men"}, "pooling must be one of .*did you mean mean"),
        ({"total_steps": 0}, "total_steps must be >= 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, fault):
    with pytest.raises(RsgrpoError, match=fault):
        RetrieverConfig(**changes)


def test_a_run_of_other_settings_is_not_continued(tiny_model_path, tmp_path, pairs):
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"query": p.query, "image": p.page}) + "\n" for p in pairs))
    settings = config(tiny_model_path, tmp_path, pairs=str(tmp_path / "p.jsonl"), total_steps=1)
    same = [json.dumps({"query": f"{number}", "image": pairs[0].page}) + "\n" for number in range(8)]
    (tmp_path / "same.jsonl").write_text("".join(same))
    one_page: dict[str, Any] = {"pairs": str(tmp_path / "same.jsonl")}
    for changes, fault in (
        ({"batch_size": 99}, "batch_size 99 is more than the 8 training pairs"),
        (one_page, "all 8 training pairs have the same page"),
        (one_page | {"held_out_pairs": 2}, r"held_out_pairs 2 leaves no pair of 8 pairs \(on 1 pages\)"),
        ({"base_model": ""}, "base_model is empty"),
    ):
        with pytest.raises(RsgrpoError, match=fault):
            main(replace(settings, **changes))
    main(settings)
    assert (tmp_path / "run" / "model" / "modules.json").exists()
    with pytest.raises(RsgrpoError, match=r"started with other settings \(lr 0.001 -> 0.1\)"):
        main(replace(settings, lr=0.1))


@pytest.mark.parametrize("recipe", sorted(path.stem for path in (ROOT / "conf/train_retriever/recipe").glob("*.yaml")))
def test_every_recipe_parses(recipe):
    found = cli.compose(RetrieverConfig, "train_retriever", [f"recipe={recipe}", "lr=0.5"])
    assert (found.lr, found.temperature) == (0.5, 0.05 if recipe == "forms" else 0.02)


def test_the_command_line_names_a_wrong_key():
    result = subprocess.run(
        [sys.executable, "-m", "recipes.train_retriever", "recipe=visrag", "batchsize=3"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 2
    assert "batchsize: there is no such key; did you mean batch_size?" in result.stderr


@pytest.mark.slow
def test_two_ranks_learn_what_one_learns_from_both_batches(tiny_model_path, pairs, tmp_path):
    rows = [{"query": pair.query, "image": pairs[row // 2].page} for row, pair in enumerate(pairs)]  # pages occur twice
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ["recipe=visrag", f"base_model={tiny_model_path}", f"pairs={tmp_path}/p.jsonl", f"output_dir={tmp_path}"]
    settings += ["held_out_pairs=0", "max_pixels=3136", "min_pixels=784", "total_steps=2", "save_every=2", "lr=1e-3"]
    settings += ["log_every=1", "bf16=false", "gradient_checkpointing=false", "num_threads=1", "warmup_steps=0"]
    module = ["-m", "recipes.train_retriever", *settings]
    several = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29541", *module]
    for command in ([*module, "name=one", "batch_size=8"], [*several, "name=both", "batch_size=4"]):
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True)
    one, both = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "both"))
    for name, value in one.items():
        torch.testing.assert_close(both[name], value, rtol=1e-4, atol=1e-5, msg=name)
