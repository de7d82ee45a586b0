"""The videos of a row: files of which frames are taken, or lists of frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rollout.config import InputsConfig
from rollout.inputs.videos import IMAGE_MARK, VIDEO_MARK, frames_of_file, frames_of_list, marked_pieces
from rollout.types import ImageSource
from rsgrpo.data.rows import ImageFolder

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True, slots=True)
class Video:
    """What a model sees of one video: frames, and the seconds from its start at which they were taken."""

    frames: tuple[ImageSource, ...]
    times: tuple[float, ...]


def video_entries(value: Any) -> list[Any]:
    """Return the entries of a video column: a list of them, one alone, or nothing.

    A list of texts is a list of files; the frames of one video are a list inside it.

    Raises:
        ValueError: it is a list of images, so that it is not known whether they are one video and when they were taken.
    """
    if value is None:
        return []
    if not isinstance(value, list | tuple):
        return [value]
    if value and all(isinstance(entry, str) and entry.lower().endswith(IMAGE_ENDINGS) for entry in value):
        raise ValueError(
            f"{len(value)} image files without times: not a video, nor a list of videos. For one video of these "
            'frames write [{"video": [...], "fps": 2}], or [[...]], which are inputs.video_fps frames in a second.'
        )
    return list(value)


def read_video(entry: Any, folder: ImageFolder, inputs: InputsConfig) -> Video:
    """Return an entry's video: a path, a list of frames, or {"video": either, "fps": frames of the list in a second}.

    Without `fps`, the frames of a list are `1 / inputs.video_fps` seconds apart.

    Raises:
        ValueError: the entry is none of these. PromptError: the video cannot be read.
    """
    fps = inputs.video_fps
    if isinstance(entry, Mapping):
        fps, entry = fps if entry.get("fps") is None else entry["fps"], entry.get("video")
        if isinstance(fps, bool) or not isinstance(fps, int | float) or not fps > 0:
            raise ValueError(f"fps of a video must be a number above 0, got {fps!r:.80}")
    if isinstance(entry, list | tuple):
        return Video(*frames_of_list([folder.resolve(frame) for frame in entry], float(fps), inputs))
    source = folder.resolve(entry) if isinstance(entry, str) and entry else None
    if not isinstance(source, str):
        raise ValueError(f"a video must be the path of a file or a list of frames, got {entry!r:.80}")
    if source.lower().endswith(IMAGE_ENDINGS):
        raise ValueError(f"{entry} is an image, not a video. The frames of a video are a list inside the list: [[...]]")
    return Video(*frames_of_file(source, inputs))


def in_order(
    text: str, images: Sequence[ImageSource], videos: Sequence[Video]
) -> tuple[tuple[ImageSource, ...], tuple[tuple[float, ...], ...]]:
    """Return images and frames in the order of the text's marks, and each video's times, as `Prompt` holds them.

    The marks must be as many as the images and the videos.
    """
    if not videos:
        return tuple(images), ()
    rest, clips = iter(images), iter(videos)
    found: list[ImageSource] = []
    for mark in marked_pieces(text, has_videos=True)[1::2]:
        found += [next(rest)] if mark == IMAGE_MARK else next(clips).frames
    return tuple(found), tuple(video.times for video in videos)


def require_marks(text: str, num_videos: int) -> str:
    """Return why a text does not show its videos; "" where it does."""
    num_marks = text.count(VIDEO_MARK)
    return (
        "" if num_marks == num_videos or not num_videos else f"{num_marks} {VIDEO_MARK} marks for {num_videos} videos"
    )
