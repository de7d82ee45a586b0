"""Search by words, fusion of rankings, filters, and near-duplicates."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pypdfium2", reason="needs the retrieval extra")

from recipes import retrieve
from recipes.retrieval.answers.library import Library, LibrarySettings
from recipes.retrieval.answers.page_view import pages_html
from recipes.retrieval.desk.shelf import store_shelf
from recipes.retrieval.evaluation.scores import resolve_qrels
from recipes.retrieval.pages.store import PageStore, StoreError
from recipes.retrieval.search.distinct import distinct_pages
from recipes.retrieval.search.exact import Hit, scan
from recipes.retrieval.search.found import FoundPage
from recipes.retrieval.search.fusion import fuse, learn_weights, parse_weights
from recipes.retrieval.search.keep import Filters, Keep, contents_of
from recipes.retrieval.search.retriever import Retriever, SearchSettings
from recipes.retrieval.search.shards import Shard
from recipes.retrieval.search.words import WordIndex, spaced
from rsgrpo.errors import InputError
from tests.material.retrieval import QUIET, ingested, write_image, write_pdf, write_vectors

TEXTS = ["the ibex climbs", "the cow and the cow graze", "the page of ibexes and cows", "nothing to see"]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    (tmp_path / "docs").mkdir()
    write_pdf(tmp_path / "docs" / "animals.pdf", TEXTS)
    write_image(tmp_path / "docs" / "blank.png")
    ingested(tmp_path / "store", tmp_path / "docs")
    return tmp_path / "store"


def found(store: Path, query: str, k: int = 9) -> list[int]:
    retriever = Retriever(store, store / "index", None, SearchSettings(by="words"))
    return [page.number for page in retriever.search([query], k)[0]]


def test_words_find_their_pages_whatever_their_endings(store):
    assert found(store, "Ibex?") == [1, 3]  # the shorter page first
    assert found(store, "cows") == [2, 3]
    assert found(store, "ÎBEX climbing") == [1, 3]
    assert found(store, "unicorn") == []
    assert found(store, 'ibex" OR NOT (') == [1, 3]  # no syntax of SQLite's
    assert found(store, "the", 1) == [2]  # on most pages, but there is nothing else


def test_a_search_that_finds_nothing_says_why(store, tmp_path, capsys):
    scans = tmp_path / "scans"
    write_image(tmp_path / "scan.png")
    ingested(scans, tmp_path / "scan.png")
    by_words = ["ibex", "--by", "words"]
    nothing = "none of the 1 pages has text, so no words can be found: ingest into a new store with --ocr, or"
    assert retrieve.main(["search", str(scans), *by_words]) == 0
    assert f"(no pages: {nothing}" in capsys.readouterr().out
    assert retrieve.main(["search", str(scans), *by_words, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["pages"] == []
    assert answer["why"].startswith(nothing)
    assert retrieve.main(["ask", str(scans), *by_words, "--engine", "fake", "--script", "{}"]) == 2
    assert f"no page was found: {nothing}" in capsys.readouterr().err
    with pytest.raises(InputError, match=f"the page desk cannot search .*: {nothing}"):
        store_shelf(str(scans), "", "words", 3)
    nobody = Library(scans, scans / "index", None, None, LibrarySettings(), QUIET, SearchSettings(by="words"))
    with pytest.raises(InputError, match=nothing):
        next(nobody.ask("ibex", 3, "multi_image"))
    assert retrieve.main(["search", str(store), "unicorn", "--by", "words"]) == 0
    why = "(no pages: none of the 4 pages with text has any of these words; pages without text: 1 (ingest"
    assert why in capsys.readouterr().out
    some = Library(store, store / "index", None, None, LibrarySettings(), QUIET, SearchSettings(by="words"))
    (shown,) = some.ask("unicorn", 3, "multi_image")
    assert why.removeprefix("(no pages: ") in pages_html(shown, str)
    assert retrieve.main(["search", str(store), "ibex", "--by", "words", "--type", "png"]) == 0
    why = "(no pages: no page of the documents that pass the filters has any of these words)\n"
    assert capsys.readouterr().out.endswith(why)


def test_scores_are_those_of_bm25(store):
    # Okapi BM25, k1 1.2, b 0.75, of SQLite's documentation: 4 pages, 3 + 6 + 6 + 3 words, "cow" on 2 of them
    idf = np.log((4 - 2 + 0.5) / (2 + 0.5))
    assert idf == 0  # SQLite uses 1e-6 instead
    words = WordIndex(store)
    words.update(PageStore.open(store))
    (hits,) = words.search(["climbs"], 5)
    idf = np.log((4 - 1 + 0.5) / (1 + 0.5))
    expected = idf * 1 * 2.2 / (1 + 1.2 * (0.25 + 0.75 * 3 / 4.5))
    assert hits[0].score == pytest.approx(expected, abs=1e-6)


def test_common_words_score_by_how_often_they_occur(store):
    words = WordIndex(store)
    words.update(PageStore.open(store))
    (hits,) = words.search(["cow"], 5)  # on half of the pages: of no weight to BM25, in any store as small as this one
    length = 1.2 * (0.25 + 0.75 * 6 / 4.5)
    wanted = [2 * 2.2 / (2 + length), 2.2 / (1 + length)]  # it is twice on the first of two pages of six words
    assert [hit.score for hit in hits] == pytest.approx(wanted, abs=1e-3)


def test_words_follow_the_store_and_survive_a_damaged_file(store, tmp_path):
    assert len(WordIndex(store)) == 0
    found(store, "ibex")
    assert len(WordIndex(store)) == 4
    write_pdf(tmp_path / "docs" / "more.pdf", ["an ibex alone"])
    (tmp_path / "docs" / "animals.pdf").unlink()
    ingested(store, tmp_path / "docs")
    assert found(store, "ibex") == [1]
    assert len(WordIndex(store)) == 1
    (store / "words.sqlite").write_bytes(b"no database" * 999)
    with pytest.raises(StoreError, match=r"words.sqlite: file is not a database; delete it, and it is made again"):
        WordIndex(store)


def test_text_without_spaces_is_found_by_pairs_of_characters(tmp_path):
    assert spaced("東") == " 東 "
    (tmp_path / "docs").mkdir()
    write_pdf(tmp_path / "docs" / "a.pdf", ["x"])
    ingested(tmp_path / "store", tmp_path / "docs")
    (page,) = PageStore.open(tmp_path / "store").pages()
    words = WordIndex(tmp_path / "store")

    class Japanese(PageStore):
        def pages(self):
            yield replace(page, text="その東京都庁です")

    words.update(Japanese(tmp_path / "store"))
    assert [len(hits) for hits in words.search(["東京都", "京都", "大阪"], 3)] == [1, 1, 0]


def test_fusion_is_by_reciprocal_ranks():
    one, other = [Hit("a", 5.0), Hit("b", 4.0)], [Hit("b", 0.1), Hit("c", 0.0)]
    fused = fuse([one, other], [1.0, 0.5], 3)
    assert [hit.page_id for hit in fused] == ["b", "a", "c"]
    assert [hit.score for hit in fused] == [round(1 / 6 + 0.5 / 5, 6), round(1 / 5, 6), round(0.5 / 6, 6)]
    assert fuse([one, []], [1.0, 1.0], 1) == [Hit("a", 0.2)]
    assert fuse([one, []], [1.0, 1.0], 1, constant=60) == [Hit("a", round(1 / 61, 6))]
    assert parse_weights("", ["x", "y"], [1.0, 4.0]) == [1.0, 4.0]
    for wrong in ("1", "1,x", "0,0", "1,-1"):
        with pytest.raises(InputError, match="weight"):
            parse_weights(wrong, ["x", "y"], [1.0, 1.0])


def test_weights_are_learnt_and_even_ones_win_ties():
    weights, best = learn_weights(2, lambda pair: -abs(pair[0] - 0.8))
    assert weights == [0.8, 0.2]
    assert best == pytest.approx(0)
    assert learn_weights(3, lambda _: 1.0)[0] == [1 / 3] * 3


def vectors_of(store: Path, folder: Path) -> list[str]:
    """Vectors by which page 2 of the animals is best for "ibex", then the blank page."""
    pages = {(page.document, page.number): page.page_id for page in PageStore.open(store).pages()}
    order = [pages["animals.pdf", number] for number in (2, 1, 3, 4)] + [pages["blank.png", 1]]
    table = np.array([[1.0, 0], [0.6, 0.8], [0, 1], [-1, 0], [0.9, 0.43]])
    return ["--kind", "imported", "--model", str(write_vectors(folder, order, table, {"ibex": [1.0, 0.0]}))]


def test_a_hybrid_search_fuses_vectors_and_words_from_one_flag(store, tmp_path, capsys):
    vectors = vectors_of(store, tmp_path / "vectors")
    assert retrieve.main(["index", str(store), *vectors]) == 0
    capsys.readouterr()

    def search(*options: str) -> list[tuple[str, int]]:
        assert retrieve.main(["search", str(store), "ibex", "-k", "9", "--json", *options]) == 0
        return [(page["document"], page["number"]) for page in json.loads(capsys.readouterr().out)["pages"]]

    by_vectors = search()
    assert by_vectors[:2] == [("animals.pdf", 2), ("blank.png", 1)]
    assert search("--by", "words") == [("animals.pdf", 1), ("animals.pdf", 3)]
    # page 1: 1/63 + 1/61; page 3: 1/64 + 1/62; page 2: 1/61
    assert search("--by", "hybrid")[:3] == [("animals.pdf", 1), ("animals.pdf", 3), ("animals.pdf", 2)]
    assert search("--by", "hybrid", "--weights", "1,0")[:2] == by_vectors[:2]
    assert search("--with-index", str(store / "index")) == by_vectors
    assert search("--type", "png") == [("blank.png", 1)]
    assert search("--by", "hybrid", "--folder", "*.pdf")[-1] != ("blank.png", 1)
    assert retrieve.main(["search", str(store), "ibex", "--type", "djvu"]) == 2
    assert "no document passes --type djvu" in capsys.readouterr().err


def test_runs_are_fused_with_weights_from_judgments(tmp_path, capsys):
    good = "".join(f"q{number} Q0 right 1 1.0 x\nq{number} Q0 bad 2 0.5 x\n" for number in range(4))
    (tmp_path / "good.run").write_text(good)
    (tmp_path / "bad.run").write_text(good.replace("right", "r").replace("bad", "right").replace(" r ", " bad "))
    (tmp_path / "qrels.tsv").write_text("".join(f"q{number}\tright\t1\n" for number in range(4)))
    runs = [str(tmp_path / name) for name in ("bad.run", "good.run")]
    options = ["--out", str(tmp_path / "f.run"), "--learn-from", str(tmp_path / "qrels.tsv")]
    assert retrieve.main(["fuse", *runs, *options]) == 0
    assert "weights 0.4,0.6: nDCG@10 1.0000" in capsys.readouterr().out
    assert (tmp_path / "f.run").read_text().startswith("q0 Q0 right 1 ")
    assert retrieve.main(["fuse", *runs, "--out", str(tmp_path / "f.run"), "--weights", "1"]) == 2


def test_filters_choose_documents_by_root_folder_kind_and_day(tmp_path):
    for name in ("one/2019/a.png", "one/b.pdf", "two/2019/c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("pdf"):
            write_pdf(tmp_path / name, ["x"])
        else:
            write_image(tmp_path / name, "red", 30 + len(name), ord(name[-5]))
    os.utime(tmp_path / "one" / "b.pdf", (1_500_000_000, 1_500_000_000))  # 2017-07-14
    ingested(tmp_path / "store", tmp_path / "one", tmp_path / "two")
    store = PageStore.open(tmp_path / "store")
    of = {row.content[:16]: row.document for row in store.documents()}

    def chosen(**filters: str) -> list[str]:
        return sorted(of[content] for content in contents_of(store, Filters(**filters)) or ())

    assert chosen(root=str(tmp_path / "one")) == ["2019/a.png", "b.pdf"]
    assert chosen(folder="2019") == ["2019/a.png", "2019/c.png"]
    assert chosen(folder="*/c.*") == ["2019/c.png"]
    assert chosen(type="pdf,docx") == ["b.pdf"]
    assert chosen(until="2017-07-14") == ["b.pdf"]
    assert chosen(since="2017-07-15") == ["2019/a.png", "2019/c.png"]
    assert chosen(root=str(tmp_path / "one"), folder="2019") == ["2019/a.png"]
    assert contents_of(store, Filters()) is None
    with pytest.raises(InputError, match="--since must be a day such as 2024-01-31, got 'May'"):
        Filters(since="May")


def test_a_scan_returns_only_pages_that_are_kept():
    ids = np.array([f"{letter * 16}-00001".encode() for letter in "abc"])
    shard = Shard(ids, np.eye(3, dtype=np.float32), np.arange(4), np.ones(3, bool))
    query = [np.array([0.5, 0.6, 0.7], np.float32)]
    keep = Keep(frozenset(["a" * 16, "b" * 16]), frozenset(["b" * 16 + "-00001"]))
    assert [hit.page_id[0] for hit in scan([shard], query, 3, multi_vector=False, keep=keep)[0]] == ["a"]
    assert [keep.has(page_id.decode()) for page_id in ids] == keep.mask(ids).tolist() == [True, False, False]


def page(rank: int, text: str, image: str) -> FoundPage:
    return FoundPage(rank, 1 / rank, f"p{rank}", f"{rank}.pdf", rank, image, text)


def test_near_duplicates_give_way_to_other_pages_but_numbers_never_do(tmp_path):
    for colour in ("red", "lime", "blue", "white", "black"):
        write_image(tmp_path / f"{colour}.png", colour)
    shutil.copy(tmp_path / "red.png", tmp_path / "again.png")
    words = " ".join(f"word{chr(97 + number % 26)}{chr(97 + number // 26)}" for number in range(60))
    pages = [
        page(1, f"{words} costs 7", str(tmp_path / "red.png")),
        page(2, f"{words} Costs: 7 indeed", str(tmp_path / "lime.png")),
        page(3, f"{words} costs 8", str(tmp_path / "blue.png")),
        page(4, "", str(tmp_path / "again.png")),
        page(5, "", str(tmp_path / "white.png")),
        page(6, "", str(tmp_path / "black.png")),
    ]
    kept = distinct_pages(pages, 3)
    assert [(found.rank, found.document) for found in kept] == [(1, "1.pdf"), (2, "3.pdf"), (3, "5.pdf")]
    assert kept[0].near == ("2.pdf, page 2", "4.pdf, page 4")


def test_judgments_may_use_any_name_of_a_page(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_pdf(tmp_path / name / "faq.pdf", ["a", name])
    shutil.copy(tmp_path / "one" / "faq.pdf", tmp_path / "one" / "copy.pdf")
    ingested(tmp_path / "store", tmp_path / "one", tmp_path / "two")
    pages = list(PageStore.open(tmp_path / "store").pages())
    of = {(Path(page.root).name, page.number): page.page_id for page in pages}
    judged = {"q": {"copy.pdf#2": 1, f"{tmp_path / 'two'}/faq.pdf#1": 2, f"{tmp_path / 'one'}/faq.pdf#1": 3}}
    assert resolve_qrels(judged, pages) == {"q": {of["one", 2]: 1, of["two", 1]: 2, of["one", 1]: 3}}
    with pytest.raises(InputError, match=r"'faq.pdf#1' matches 2 pages"):
        resolve_qrels({"q": {"faq.pdf#1": 1}}, pages)
