"""Rankings against judgments, files in and out, VisRAG's layouts and answer rules."""

from __future__ import annotations

import json
import math
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recipes import retrieve
from recipes.retrieval.evaluation.answer_rules import RULES, exact, first_letter, relaxed
from recipes.retrieval.evaluation.scores import (
    Query,
    evaluate_run,
    merge_runs,
    read_qrels,
    read_queries,
    read_run,
    resolve_qrels,
    top_rows,
    write_run,
)
from recipes.retrieval.evaluation.visrag_sets import write_visrag_set
from recipes.retrieval.pages.store import Page
from recipes.retrieval.search.exact import Hit
from rsgrpo.errors import RsgrpoError

QRELS = {"q1": {"a": 1, "c": 1}, "q2": {"x": 2, "y": 1}, "q3": {"a": 1}, "q4": {"a": 0}}
RUN = {
    "q1": [Hit("b", 0.9), Hit("a", 0.8), Hit("c", 0.7)],
    "q2": [Hit("y", 0.5), Hit("x", 0.5)],  # a tie: x comes before y
    "q9": [Hit("a", 1.0)],
}


def test_metrics_are_those_worked_out_by_hand():
    pytest.importorskip("pytrec_eval", reason="needs the retrieval extra")
    scores = evaluate_run(RUN, QRELS, [1, 2])
    second = 1 / math.log2(3)
    q1 = {"ndcg@1": 0, "mrr@1": 0, "recall@1": 0, "ndcg@2": second / (1 + second), "mrr@2": 0.5, "recall@2": 0.5}
    assert scores.per_query["q1"] == pytest.approx(q1)
    q2 = {"ndcg@1": 1, "mrr@1": 1, "recall@1": 0.5, "ndcg@2": 1, "mrr@2": 1, "recall@2": 1}
    assert scores.per_query["q2"] == pytest.approx(q2)
    assert set(scores.per_query["q3"].values()) == {0.0}  # missing from the run
    assert scores.mean["mrr@2"] == pytest.approx((0.5 + 1 + 0) / 3)
    assert (scores.num_missing, scores.num_without_relevant, scores.num_unjudged) == (1, 1, 1)


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


def test_scoring_nonsense_is_refused():
    pytest.importorskip("pytrec_eval", reason="needs the retrieval extra")
    with pytest.raises(RsgrpoError, match="no query has a relevant page"):
        evaluate_run(RUN, {"q1": {"a": 0}}, [1])
    with pytest.raises(RsgrpoError, match="--cutoffs must be >= 1"):
        evaluate_run(RUN, QRELS, [0])
    with pytest.raises(RsgrpoError, match="contains a page twice"):
        evaluate_run({"q1": [Hit("a", 1), Hit("a", 0.5)]}, QRELS, [1])


def test_run_files_survive_a_round_trip_and_scores_decide(tmp_path):
    write_run(tmp_path / "a.run", RUN, "tag")
    assert (tmp_path / "a.run").read_text().splitlines()[0] == "q1 Q0 b 1 0.900000 tag"
    found = read_run(tmp_path / "a.run")
    assert [hit.page_id for hit in found["q2"]] == ["x", "y"]
    assert found["q1"] == RUN["q1"]
    (tmp_path / "b.run").write_text("q1 Q0 low 1 0.1 t\nq1 Q0 high 2 0.9 t\n")
    assert read_run(tmp_path / "b.run") == {"q1": [Hit("high", 0.9), Hit("low", 0.1)]}
    for score in ("much", "nan", "inf"):
        (tmp_path / "c.run").write_text(f"q1 Q0 page 1 {score} tag\n")
        with pytest.raises(RsgrpoError, match=r"c\.run:1: a run line is"):
            read_run(tmp_path / "c.run")
    with pytest.raises(RsgrpoError, match="has white space"):
        write_run(tmp_path / "d.run", {"two words": []}, "t")


@pytest.mark.parametrize(
    "text", ["query-id\tcorpus-id\tscore\nq1\ta b\t1\n", "q1\ta b\t1\n", "q1\t0\ta b\t1\n", "\nq1\ta b\t1\n\n"]
)
def test_qrels_are_read_in_every_layout(tmp_path, text):
    (tmp_path / "qrels.tsv").write_text(text)
    assert read_qrels(tmp_path / "qrels.tsv") == {"q1": {"a b": 1}}


def test_faulty_qrels_and_queries_name_the_line(tmp_path):
    file = tmp_path / "file"
    twice = '{"_id": 1, "text": "a"}\n{"id": "1", "query": "b"}\n'
    for read, text, fault in (
        (read_qrels, "q1 a 1\nq1 a\n", "file:2: a judgment is"),
        (read_qrels, "q1 a 1\nq1 a 2\n", "two different judgments"),
        (read_queries, '{"_id": 1}\n', "file, line 1: a query needs _id"),
        (read_queries, "[]\n", "file, line 1: must be a JSON object"),
        (read_queries, '{"_id": null, "text": "a"}\n', "file, line 1: a query needs"),
        (read_queries, '{"_id": 1, "text": ' + 100_000 * "[" + "\n", "file, line 1: not usable JSON"),
        (read_queries, twice, "file, line 2: query id 1 occurs twice"),
    ):
        file.write_text(text)
        with pytest.raises(RsgrpoError, match=fault):
            read(file)
    file.write_text('{"qid": 7, "question": "what?", "answer": "x"}\n')
    assert read_queries(file) == [Query("7", "what?", ("x",))]
    with pytest.raises(RsgrpoError, match="cannot be read"):
        read_queries(tmp_path / "nowhere")


def page(page_id: str, document: str, number: int = 1) -> Page:
    return Page(page_id, document, number, f"/{page_id}.png", 1, 1, "")


def test_judged_pages_may_be_named_by_document():
    pages = [page("p1", "one.png"), page("p2", "two.pdf"), page("p3", "two.pdf", 2)]
    judged = {"q": {"one": 1, "two.pdf#2": 2, "p2": 1, "gone": 0}}
    assert resolve_qrels(judged, pages) == {"q": {"p1": 1, "p3": 2, "p2": 1}}
    with pytest.raises(RsgrpoError, match=r"'two\.pdf' matches 2 pages"):
        resolve_qrels({"q": {"two.pdf": 1}}, pages)
    with pytest.raises(RsgrpoError, match="'gone' of query q is not in the store"):
        resolve_qrels({"q": {"gone": 1}}, pages)


def test_top_rows_know_whether_the_pages_suffice():
    queries = [Query("q1", "one?", ("x",)), Query("q2", "two?"), Query("q3", "three?")]
    images = {name: f"/{name}.png" for name in "abcxy"}
    rows = top_rows(queries, RUN, QRELS, images, 2)
    first = {"qid": "q1", "query": "one?", "image": ["/b.png", "/a.png"], "answer": ["x"], "is_sufficient": False}
    assert rows[0] == first
    assert [row["is_sufficient"] for row in rows] == [False, True, False]


def visrag_set(source: Path, page: str, image: bytes, grade: Any = 1) -> Path:
    """Write a set of one page, one query and one judgment."""
    parts: dict[str, dict[str, Any]] = {
        "corpus": {"corpus-id": page, "image": {"bytes": image, "path": None}},
        "queries": {"query-id": "q1", "query": "one\u2028line", "answer": ["7"]},
        "qrels": {"query-id": "q1", "corpus-id": page, "score": grade},
    }
    for part, row in parts.items():
        (source / part).mkdir(parents=True)
        name = "corpus-00000.parquet" if part == "corpus" else "train.parquet"  # found once, whatever its name
        pq.write_table(pa.Table.from_pylist([row]), source / part / name)
    return source


@pytest.mark.parametrize(
    ("page", "name"),
    [("two", "two.png"), (".hidden", "%2Ehidden.png"), ("..", "%2E..png"), ("../up.jpg", "%2E.%2Fup.jpg")],
)
def test_a_visrag_set_becomes_plain_files_that_an_ingest_sees(tmp_path, page, name):
    source = visrag_set(tmp_path / "set", page, b"x", 1.0)
    assert write_visrag_set(str(source), tmp_path / "out") == (1, 1, 1)
    assert [file.name for file in (tmp_path / "out" / "documents").iterdir()] == [name]
    assert read_qrels(tmp_path / "out" / "qrels.tsv") == {"q1": {name: 1}}
    assert read_queries(tmp_path / "out" / "queries.jsonl") == [Query("q1", "one\u2028line", ("7",))]


def test_damaged_visrag_sets_say_where(tmp_path):
    with pytest.raises(RsgrpoError, match="has no corpus/"):
        write_visrag_set(str(tmp_path), tmp_path / "out")
    for grade in (0.5, math.nan, "high"):
        with pytest.raises(RsgrpoError, match=rf"a score in qrels must be a whole number, got {grade!r}"):
            write_visrag_set(str(visrag_set(tmp_path / str(grade), "a", b"x", grade)), tmp_path / "out")
    twice = visrag_set(tmp_path / "twice", "a", b"x")
    pq.write_table(pa.Table.from_pylist([{"corpus-id": "a", "image": b"y"}]), twice / "corpus" / "more.parquet")
    with pytest.raises(RsgrpoError, match="corpus-id a occurs twice with different images"):
        write_visrag_set(str(twice), tmp_path / "out")
    file = visrag_set(tmp_path / "cut", "a", b"x") / "queries" / "train.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(RsgrpoError, match=r"queries/train\.parquet cannot be read: .*; download it again"):
        write_visrag_set(str(tmp_path / "cut"), tmp_path / "out")


def test_runs_of_several_stores_merge_by_score(tmp_path, capsys):
    write_run(tmp_path / "a.run", {"q1": [Hit("a", 0.9), Hit("b", 0.5)], "q2": [Hit("b", 0.1)]}, "t")
    write_run(tmp_path / "b.run", {"q1": [Hit("c", 0.9), Hit("d", 0.7), Hit("b", 0.6)]}, "t")
    runs = [tmp_path / "a.run", tmp_path / "b.run"]
    ranked = [Hit("a", 0.9), Hit("c", 0.9), Hit("d", 0.7), Hit("b", 0.6)]  # b counts once, by its better score
    assert merge_runs(runs, 10) == ({"q1": ranked, "q2": [Hit("b", 0.1)]}, "t")
    command = ["merge", *map(str, runs), "--out", str(tmp_path / "all.run")]
    assert retrieve.main([*command, "-k", "2"]) == 0
    assert read_run(tmp_path / "all.run") == {"q1": ranked[:2], "q2": [Hit("b", 0.1)]}
    assert merge_runs([tmp_path / "all.run"], 2)[1] == "t"  # so that it may be merged again
    write_run(tmp_path / "b.run", {"q1": [Hit("c", 0.9)]}, "other")
    capsys.readouterr()
    assert retrieve.main(command) == 2
    assert "different tags (t in" in capsys.readouterr().err
    for fused in ("1a2b+words", "fused"):  # a score of 1/5 for the first page, whatever store it is from
        for run in runs:
            write_run(run, {"q1": [Hit("c", 0.2)]}, fused)
        assert retrieve.main(command) == 2
        assert "merge the runs of each search over all stores, then `fuse` the merged ones" in capsys.readouterr().err
    assert retrieve.main([*command, "-k", "0"]) == 2
    assert "k must be >= 1, got 0" in capsys.readouterr().err


def test_a_byte_order_mark_and_windows_line_ends_change_nothing(tmp_path):
    (tmp_path / "q.jsonl").write_bytes(b'\xef\xbb\xbf{"_id": "1", "text": "a"}\r\n{"_id": "2", "text": "b"}\r\n')
    assert [query.text for query in read_queries(tmp_path / "q.jsonl")] == ["a", "b"]
    (tmp_path / "q.tsv").write_bytes(b"\xef\xbb\xbf1\tx\t1\r\n2\ty\t0\r\n")
    assert read_qrels(tmp_path / "q.tsv") == {"1": {"x": 1}, "2": {"y": 0}}


def test_a_place_that_cannot_be_written_is_one_line_and_a_failure(tmp_path, capsys):
    write_run(tmp_path / "a.run", RUN, "t")
    assert retrieve.main(["merge", str(tmp_path / "a.run"), "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: [Errno 21] Is a directory: ")
    assert said.count("\n") == 1


def test_evaluate_from_the_command_line(tmp_path, capsys):
    pytest.importorskip("pytrec_eval", reason="needs the retrieval extra")
    write_run(tmp_path / "a.run", RUN, "t")
    (tmp_path / "qrels.tsv").write_text("".join(f"{q}\t{p}\t{g}\n" for q, d in QRELS.items() for p, g in d.items()))
    command = ["evaluate", str(tmp_path / "a.run"), "--qrels", str(tmp_path / "qrels.tsv"), "--cutoffs", "2"]
    assert retrieve.main(command) == 0
    assert "mrr@2      0.5000" in capsys.readouterr().out
    written = json.loads((tmp_path / "a.scores.json").read_text())
    assert written["per_query"]["q1"]["mrr@2"] == 0.5
    assert written["num_missing"] == 1
    (tmp_path / "qrels.tsv").write_text("q1\tdocument.pdf\t1\n")
    assert retrieve.main(command) == 0
    assert "no judged page is in the run; if judgments name documents, add --store" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rule", "prediction", "gold", "right"),
    [
        (exact, "Paris.", "paris", True), (exact, "  the  Cat ", "the cat", True), (exact, "-5", "5", False),
        (exact, "Paris, France", "Paris", False), (exact, "12.5", "125", False),
        (relaxed, "105", "100", True), (relaxed, "105.1", "100", False), (relaxed, "95", "100", True),
        (relaxed, "94.9", "100", False), (relaxed, "-95", "-100", True), (relaxed, "-95", "100", False),
        (relaxed, "0", "0", True), (relaxed, "0.01", "0", False), (relaxed, "$1,050", "1000", True),
        (relaxed, "10.2%", "10", True), (relaxed, "about 10", "10", False), (relaxed, "Yes", "yes", True),
        (relaxed, ".5", "0.5", True), (relaxed, "nan", "10", False), (relaxed, "", "10", False),
        (first_letter, "B", "B", True), (first_letter, "b) the second", "B", True), (first_letter, "(B)", "B", True),
        (first_letter, "Because", "B", False), (first_letter, "C", "B", False), (first_letter, "", "B", False),
        (first_letter, "**B**. x", "B) long text", True),
    ],
)  # fmt: skip
def test_an_answer_is_right_by_its_rule(rule, prediction, gold, right):
    assert rule(prediction, [gold]) is right
    assert rule(prediction, ["something else", gold]) is right


def test_every_data_set_has_its_rule(capsys):
    assert RULES["ChartQA"] is RULES["PlotQA"] is relaxed
    assert RULES["ArxivQA"] is first_letter
    with pytest.raises(SystemExit):
        retrieve.main(["generate", "s", "--queries", "q", "--oracle", "o", "--out", "a", "--rule", "chartqa"])
    assert "invalid choice: 'chartqa' (choose from 'ArxivQA', 'ChartQA'" in capsys.readouterr().err
