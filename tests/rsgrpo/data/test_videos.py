"""Rows with videos: which frames are taken, in which order they are shown, and every fault of such a row."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from recipes.answers.questions import read_questions, to_prompt
from rollout.config import InputsConfig
from rollout.inputs.images import decode
from rollout.inputs.processor import InputProcessor
from rollout.inputs.videos import VideoFrame, _decoded, spread
from rsgrpo.config.train import DataConfig, PromptConfig
from rsgrpo.data.dataset import PromptDataset, load_prompts
from rsgrpo.errors import RsgrpoError

RAW = PromptConfig()
INPUTS = InputsConfig(784, 784 * 4, max_images=3, max_videos=2, max_frames=4, max_prompt_tokens=400)


@pytest.fixture(scope="module")
def processor(tiny_model_path) -> InputProcessor:
    return InputProcessor(tiny_model_path, INPUTS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Seven frames and a page, of a grey that tells which."""
    folder = tmp_path_factory.mktemp("frames")
    for index in range(7):
        Image.new("RGB", (56, 56), (index * 30,) * 3).save(folder / f"f{index}.png")
    Image.new("RGB", (28, 28), (255,) * 3).save(folder / "page.png")
    return folder


@pytest.fixture(scope="module")
def clip(folder) -> str:
    """A file of 2 s, 10 frames a second, brighter from frame to frame."""
    av = pytest.importorskip("av")
    with av.open(str(folder / "clip.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10, options={"qscale": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index in range(20):
            pixels = np.full((48, 64, 3), 10 + 12 * index, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return "clip.mp4"


def load(folder: Path, processor: InputProcessor, *rows: dict, prompt=RAW, **data) -> PromptDataset:
    path = folder / "train.jsonl"
    path.write_text("\n".join(json.dumps({"answer": ["x"]} | row) for row in rows))
    return load_prompts(str(path), DataConfig(**data), prompt, processor)


def names(prompt) -> list[str]:
    return [Path(image if isinstance(image, str) else image.name).name for image in prompt.images]


FRAMES = [f"f{index}.png" for index in range(7)]


def test_frames_of_a_list_are_spread_evenly_and_shown_where_the_marks_are(folder, processor):
    row = {"prompt": "a <video> b <image> c <video>", "image": ["page.png"]}
    clips = [{"video": FRAMES, "fps": 4}, FRAMES[:2]]
    (prompt,) = load(folder, processor, row | {"video": clips})
    assert names(prompt) == ["f0.png", "f2.png", "f4.png", "f6.png", "page.png", "f0.png", "f1.png"]
    assert prompt.videos == ((0.0, 0.5, 1.0, 1.5), (0.0, 0.5))  # the second at inputs.video_fps
    assert prompt.num_tokens == len(processor.encode(prompt).token_ids_T)
    (other,) = load(folder, processor, row | {"videos": clips})  # under either name
    assert (other.images, other.videos, other.truth) == (prompt.images, prompt.videos, prompt.truth)
    assert INPUTS.most_images == 3 + 2 * 2  # for a plan: two frames of a video have the pixels of an image
    assert [spread(7, 4), spread(1, 1), spread(5, 2)] == [[0, 2, 4, 6], [0], [0, 4]]


def test_messages_may_have_video_parts(folder, processor):
    parts = [
        {"type": "image", "image": "page.png"},
        {"type": "video", "video": FRAMES[:3], "fps": 1},
        {"type": "text", "text": "what?"},
    ]
    (prompt,) = load(folder, processor, {"prompt": [{"role": "user", "content": parts}], "solution": "x"})
    assert prompt.text == "<image><video>what?"
    assert names(prompt) == ["page.png", "f0.png", "f1.png", "f2.png"]
    assert prompt.videos == ((0.0, 1.0, 2.0),)


def test_a_template_shows_videos(folder, processor):
    template = PromptConfig(template="{images}\n{videos}\n{question}")
    row = {"question": "what?", "image": ["page.png"], "video": [FRAMES[:2]]}
    (prompt,) = load(folder, processor, row, prompt=template)
    assert prompt.text == "[1]: <image>\n<video>\nwhat?"
    with pytest.raises(RsgrpoError, match=r"0 <video> marks for 1 videos"):
        load(folder, processor, row, prompt=PromptConfig(template="{images}\n{question}"))


def test_frames_of_a_file_are_those_of_their_times(folder, clip, processor):
    (prompt,) = load(folder, processor, {"prompt": "<video> what?", "video": clip})
    ((*times,),) = prompt.videos
    assert times == pytest.approx([0.0, 0.6, 1.3, 1.9])  # of frames 0, 6, 13 and 19
    greys = [np.asarray(decode(image)).mean() for image in prompt.images]
    assert greys == pytest.approx([10 + 12 * index for index in (0, 6, 13, 19)], abs=6)
    frame = prompt.images[2]
    assert isinstance(frame, VideoFrame)
    assert frame.name.endswith("clip.mp4 at 1.30 s")
    assert pickle.loads(pickle.dumps(frame)) == frame.read()  # another machine needs no file
    assert processor.encode(prompt).image_grid_thw[0, 0] == 2


@pytest.mark.parametrize(
    ("video", "message"),
    [
        ([FRAMES, FRAMES, FRAMES], r"too many videos.*3 videos, inputs.max_videos is 2"),
        ("missing.mp4", r"unreadable video.*missing.mp4 cannot be read"),
        ("page.png", r"unreadable video.*page.png is an image, not a video"),
        (
            FRAMES[:3],
            r"unreadable video.*3 image files without times: .* write \[\{\"video\": \[\.\.\.\], \"fps\": 2\}\]",
        ),
        ([[]], r"a video needs at least one frame"),
        ([{"video": FRAMES, "fps": 0}], r"fps of a video must be a number above 0"),
        (7, r"must be the path of a file or a list of frames, got 7"),
        ([["f0.png", "gone.png"]], r"missing image.*gone.png does not exist"),
        ([["f0.png", "page.png"]], r"must have one size|marks"),
    ],
    ids=["many", "missing", "picture", "flat", "empty", "fps", "kind", "frame", "sizes"],
)
def test_a_video_that_cannot_be_used_is_a_bad_row(video, message, folder, processor):
    if video == "missing.mp4":
        pytest.importorskip("av")
    rows = [{"prompt": "<video>" * (len(video) if isinstance(video, list) else 1) + "what?", "video": video}]
    with pytest.raises(RsgrpoError, match=f"(?s){message}"):
        processor.encode(load(folder, processor, *rows)[0])


def test_without_pyav_a_file_is_refused_with_what_to_install(folder, processor, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(RsgrpoError, match=r'pip install -e "\.\[video\]"'):
        load(folder, processor, {"prompt": "<video>what?", "video": "any.mp4"})


def test_a_file_that_changed_is_refused(folder, clip, processor, tmp_path):
    copy = tmp_path / "copy.mp4"
    copy.write_bytes((folder / clip).read_bytes())
    (prompt,) = load(folder, processor, {"prompt": "<video> what?", "video": str(copy)})
    copy.write_bytes(copy.read_bytes() + b"x")
    _decoded.cache_clear()  # what another process knows
    with pytest.raises(RsgrpoError, match="has changed since its frames were chosen"):
        processor.encode(prompt)


def test_questions_of_a_file_have_videos_too(folder, processor):
    path = folder / "questions.jsonl"
    path.write_text(json.dumps({"id": "q", "prompt": "<video> what?", "video": [FRAMES[:3]]}))
    (question,) = read_questions(str(path), inputs=INPUTS)
    prompt = to_prompt(question, "")
    assert (names(prompt), prompt.videos) == (FRAMES[:3], ((0.0, 0.5, 1.0),))
    with pytest.raises(RsgrpoError, match=r"1 videos, but inputs.max_videos is 0. Raise it"):
        read_questions(str(path))
