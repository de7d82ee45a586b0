"""The list of images that decode: what it vouches for, and when it does not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rsgrpo.data.checked_images import CHECKED_FILE, CheckedImages
from tests.material.synthetic_run import png


@pytest.fixture
def page(tmp_path) -> Path:
    path = tmp_path / "page.png"
    path.write_bytes(png("red"))
    return path


def counts(checked: CheckedImages) -> tuple[int, int]:
    return checked.num_decoded, checked.num_known


def test_an_unchanged_image_is_decoded_at_the_first_start_only(tmp_path, page):
    first = CheckedImages(tmp_path / "runs" / CHECKED_FILE)
    assert [first.fault_of(source) for source in (str(page), str(page), png("blue"))] == ["", "", ""]
    assert counts(first) == (2, 0)
    first.save()
    again = CheckedImages(tmp_path / "runs" / CHECKED_FILE)
    assert [again.fault_of(source) for source in (str(page), png("blue"), png("green"))] == ["", "", ""]
    assert counts(again) == (1, 2)


@pytest.mark.parametrize("change", ["content", "time", "decoder"])
def test_a_changed_image_is_decoded_again(tmp_path, page, change, monkeypatch):
    first = CheckedImages(tmp_path / CHECKED_FILE)
    first.fault_of(str(page))
    first.save()
    if change == "content":
        page.write_bytes(png("red")[:60])
    elif change == "time":
        os.utime(page, ns=(1, 1))
    else:
        monkeypatch.setattr("PIL.__version__", "0.1")
    again = CheckedImages(tmp_path / CHECKED_FILE)
    assert ("cannot be read" in again.fault_of(str(page))) == (change == "content")
    assert counts(again) == (1, 0)


def test_a_bad_image_is_never_remembered(tmp_path, page):
    page.write_bytes(b"hello")
    first = CheckedImages(tmp_path / CHECKED_FILE)
    assert "cannot be read" in first.fault_of(str(page))
    first.save()
    assert not (tmp_path / CHECKED_FILE).exists()
    again = CheckedImages(tmp_path / CHECKED_FILE)
    assert "cannot be read" in again.fault_of(str(page))


def test_a_line_that_was_cut_off_vouches_for_nothing(tmp_path, page):
    first = CheckedImages(tmp_path / CHECKED_FILE)
    first.fault_of(str(page))
    first.save()
    file = tmp_path / CHECKED_FILE
    file.write_text(file.read_text()[:-5])
    again = CheckedImages(file)
    assert again.fault_of(str(page)) == ""
    assert counts(again) == (1, 0)


def test_without_a_file_nothing_is_written(tmp_path, page):
    checked = CheckedImages()
    checked.fault_of(str(page))
    checked.save()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.png"]
