"""What strangers may send as an image: only known formats reach a decoder, and every fault is one line."""

from __future__ import annotations

import os
import resource
import tracemalloc

import pytest
from PIL import Image, PngImagePlugin

from rollout.inputs.images import FORMATS, PromptError, check_decodes, decode, read_size, thumbnail
from tests.runs.fuzz.hostile_images import EPS, saved, tile_bomb

OPENERS = (read_size, check_decodes, decode, lambda source: thumbnail(source, 8))
OTHER_FORMATS = ("ICO", "ICNS", "AVIF", "DDS", "TGA", "PCX", "SGI", "QOI", "IM", "SPIDER")


@pytest.mark.parametrize("kind", FORMATS)
def test_the_allowed_formats_are_read(kind):
    assert decode(saved(kind)).size == (32, 32)


@pytest.mark.parametrize("kind", OTHER_FORMATS)
def test_no_decoder_of_another_format_sees_the_bytes(kind):
    try:
        content = saved(kind)
    except (KeyError, OSError, ValueError):
        pytest.skip(f"this Pillow does not write {kind}")
    for open_it in OPENERS:
        with pytest.raises(PromptError, match=r"<[\d,]+ bytes> cannot be read: it is damaged or not one of PNG, JPEG"):
            open_it(content)


def test_an_image_starts_no_other_program(tmp_path, monkeypatch):
    ghostscript = tmp_path / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    for open_it in OPENERS:
        with pytest.raises(PromptError, match="cannot be read"):
            open_it(EPS)
    assert not (tmp_path / "started").exists()


def test_a_tiff_of_huge_tiles_is_refused_before_a_tile_is_decoded():
    bomb = tile_bomb()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for open_it in OPENERS:
        with pytest.raises(PromptError, match="16 x 16 pixels is stored in tiles of 16384 x 16384"):
            open_it(bomb)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB; one tile has 256 MiB


@pytest.mark.parametrize("fault", [RuntimeError, IndexError, NotImplementedError, AttributeError, AssertionError])
def test_whatever_a_decoder_raises_is_a_bad_image_with_one_line(monkeypatch, fault):
    def load(self):
        raise fault("first line\nsecond \x1b[2J line")

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    for open_it in (check_decodes, decode):
        with pytest.raises(PromptError) as caught:
            open_it(saved("PNG"))
        assert str(caught.value).endswith(f"cannot be read: {fault.__name__}: first line second \\x1b[2J line")


def test_an_image_beyond_the_memory_is_a_bad_image(monkeypatch):
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda self: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(PromptError, match="needs more memory than there is"):
        decode(saved("PNG"))


def test_a_bomb_by_its_header_takes_no_memory(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    tracemalloc.start()
    for open_it in OPENERS:
        with pytest.raises(PromptError, match="safe"):
            open_it(saved("PNG", (40, 40)))
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()
