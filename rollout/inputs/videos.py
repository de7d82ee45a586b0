"""Videos: which frames a model sees of one, and when they were taken.

Frames are images from here on: decoded and resized as every other image is. A file is decoded by PyAV (the extra
`video`); a list of frames needs nothing.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from rollout.config import InputsConfig
from rollout.errors import one_line
from rollout.inputs.images import PromptError
from rollout.types import ImageSource, Prompt

IMAGE_MARK, VIDEO_MARK = "<image>", "<video>"
VIDEOS_KEPT = 4
"""Videos whose frames each process keeps, compressed."""
MAX_SECONDS = 4 * 3600.0
_MARKS = re.compile(f"({IMAGE_MARK}|{VIDEO_MARK})")


@dataclass(frozen=True, slots=True)
class VideoFrame:
    """One frame of a video file, decoded on demand. Pickled, it becomes its bytes (PNG).

    file: the video. changed_ns: its modification time when its frames were chosen.
    times: of all frames that are taken of it, in seconds from its start. index: of this frame among them.
    """

    file: str
    changed_ns: int
    times: tuple[float, ...]
    index: int

    @property
    def name(self) -> str:
        return f"{self.file} at {self.times[self.index]:.2f} s"

    def read(self) -> bytes:
        """Return the frame as PNG.

        Raises:
            OSError, ValueError: the file has changed, or ends before this frame.
        """
        try:
            return _decoded(self.file, self.changed_ns, self.times)[self.index]
        except (PromptError, OSError):
            raise
        except Exception as error:  # whatever PyAV raises because of the file's bytes
            raise ValueError(f"{self.file} cannot be decoded: {type(error).__name__}: {one_line(error)}") from error

    def __reduce__(self) -> tuple[Any, ...]:
        return bytes, (self.read(),)


def frames_of_file(path: str, inputs: InputsConfig) -> tuple[tuple[ImageSource, ...], tuple[float, ...]]:
    """Return evenly spaced frames of a video file, at most `inputs.max_frames`, and their times in seconds.

    Raises:
        PromptError: it is missing, cannot be read, or PyAV is not installed.
    """
    av = _pyav()
    try:
        with av.open(path) as container:
            stream = container.streams.video[0]
            rate = float(stream.average_rate or 0)
            seconds = float((stream.duration or 0) * (stream.time_base or 0)) or (container.duration or 0) / 1_000_000
    except Exception as error:
        raise PromptError(f"video {path} cannot be read: {type(error).__name__}: {one_line(error)}") from error
    count = round(seconds * rate)
    if not 0 < seconds <= MAX_SECONDS or count < 1:
        raise PromptError(
            f"video {path} lasts {seconds:g} s, but must last up to {MAX_SECONDS:g} s and say so. Cut or re-encode it."
        )
    wanted = min(max(2, round(seconds * inputs.video_fps)), inputs.max_frames, count)
    times = tuple(index / rate for index in spread(count, wanted))
    changed_ns = os.stat(path).st_mtime_ns
    return tuple(VideoFrame(path, changed_ns, times, index) for index in range(len(times))), times


def frames_of_list(
    frames: Sequence[ImageSource], fps: float, inputs: InputsConfig
) -> tuple[tuple[ImageSource, ...], tuple[float, ...]]:
    """Return evenly spaced ones of a video's frames, at most `inputs.max_frames`, and their times in seconds.

    fps: frames of the list in a second.

    Raises:
        PromptError: there is none.
    """
    if not frames:
        raise PromptError("a video needs at least one frame")
    chosen = spread(len(frames), min(len(frames), inputs.max_frames))
    return tuple(frames[index] for index in chosen), tuple(index / fps for index in chosen)


def spread(count: int, wanted: int) -> list[int]:
    """Return `wanted` of the indices 0 to count - 1, evenly spaced, both ends among them.

    >>> spread(10, 4)
    [0, 3, 6, 9]
    """
    return [0] if wanted == 1 else [round(index * (count - 1) / (wanted - 1)) for index in range(wanted)]


def step_of(times: Sequence[float]) -> float:
    """Return the mean seconds between frames; 1 for a single one."""
    return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 1.0


def marked_pieces(text: str, *, has_videos: bool) -> list[str]:
    """Split a text at its marks, which stay; without videos `<video>` is text."""
    return (_MARKS if has_videos else re.compile(f"({IMAGE_MARK})")).split(text)


def shown(prompt: Prompt) -> Iterator[tuple[slice, tuple[float, ...]]]:
    """Yield what a prompt shows, in order: the slice of its `images`, and the times of a video's frames.

    Raises:
        PromptError: marks and images, or marks and videos, differ in number.
    """
    asked = [*(message for message, _ in prompt.history), prompt.text]
    marks = [mark for text in asked for mark in marked_pieces(text, has_videos=bool(prompt.videos))[1::2]]
    if marks.count(IMAGE_MARK) != prompt.num_pages:
        raise PromptError(f"the text has {marks.count(IMAGE_MARK)} {IMAGE_MARK} marks for {prompt.num_pages} images")
    if marks.count(VIDEO_MARK) != len(prompt.videos):
        raise PromptError(f"the text has {marks.count(VIDEO_MARK)} {VIDEO_MARK} marks for {len(prompt.videos)} videos")
    start, videos = 0, iter(prompt.videos)
    for mark in marks:
        times = next(videos) if mark == VIDEO_MARK else ()
        end = start + (len(times) or 1)
        yield slice(start, end), times
        start = end


@lru_cache(maxsize=VIDEOS_KEPT)
def _decoded(file: str, changed_ns: int, times: tuple[float, ...]) -> tuple[bytes, ...]:
    """Return the frames that are shown at these times, as PNG; the file is decoded once, from its start."""
    if os.stat(file).st_mtime_ns != changed_ns:
        raise OSError(f"{file} has changed since its frames were chosen")
    frames: list[bytes] = []
    latest = None
    with _pyav().open(file) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        gap = 0.5 / float(stream.average_rate)
        for frame in container.decode(stream):
            latest = frame
            while len(frames) < len(times) and frame.time is not None and frame.time + gap >= times[len(frames)]:
                frames.append(_png(frame))
            if len(frames) == len(times):
                break
    if latest is None:
        raise ValueError(f"{file} has no frames")
    return (*frames, *[_png(latest)] * (len(times) - len(frames)))  # a length that was rounded up


def _png(frame: Any) -> bytes:
    buffer = io.BytesIO()
    frame.to_image().save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _pyav() -> Any:
    try:
        import av
    except ModuleNotFoundError as error:
        raise PromptError(
            "video files are decoded by PyAV, which is not installed. Install the extra "
            '(`pip install -e ".[video]"`), or give a list of frames, each an image.'
        ) from error
    return av
