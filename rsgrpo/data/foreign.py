"""Rows that were written for another trainer: told by their columns, and turned into ours.

verl: prompt (messages), images, reward_model.ground_truth. EasyR1: problem, answer, images. TRL: prompt (messages, with
image parts or an images column), completion or solution. ms-swift: messages, images, solution. LLaMA-Factory's rows are
converted by `recipes.files.layouts`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rollout.inputs.videos import IMAGE_MARK as IMAGE_MARK
from rollout.inputs.videos import VIDEO_MARK
from rsgrpo.data.rows import image_entries
from rsgrpo.data.videos import video_entries

IMAGE_KEYS = ("image", "images")
VIDEO_KEYS = ("video", "videos")
TRAINERS = ("verl", "easyr1", "trl", "swift", "llamafactory")
GOLD_KEYS = ("solution", "ground_truth", "answer", "answers")


def trainer_of(columns: Mapping[str, Any]) -> str:
    """Return one of TRAINERS, or "" for a row that is not shaped like any of their rows."""
    names = set(columns)
    if isinstance(columns.get("reward_model"), Mapping) and "prompt" in names:
        return "verl"
    if {"problem", "answer"} <= names:
        return "easyr1"
    prompt = columns.get("prompt")
    if isinstance(prompt, list) and all(isinstance(turn, Mapping) for turn in prompt):
        return "trl"
    if isinstance(columns.get("messages"), list):
        return "swift" if "solution" in names else "llamafactory"
    return "llamafactory" if {"instruction", "output"} <= names or "conversations" in names else ""


def how_to_convert(columns: Mapping[str, Any]) -> str:
    """Return a sentence with the command that converts such rows; "" for rows of no other trainer."""
    trainer = trainer_of(columns)
    if not trainer:
        return ""
    return (
        f". It looks like a row for {trainer}: convert the file with `python -m recipes.prepare convert FILE "
        f"--from {trainer} --out rows.jsonl`"
    )


def in_our_columns(
    columns: Mapping[str, Any], *, texts: Sequence[str], image: str = "images", video: str = "videos"
) -> Mapping[str, Any]:
    """Return a row of verl, EasyR1, TRL or ms-swift in our columns, its system message as `system`.

    texts: columns of which a row of ours has one as text; such a row, and one of no known trainer, comes back as it is.
    image, video: what the columns with the images and with the videos are to be called.

    Raises:
        ValueError: the row is like that trainer's and lacks something.
    """
    trainer = trainer_of(columns)
    if trainer in ("", "llamafactory") or any(isinstance(columns.get(name), str) for name in texts):
        return columns
    found = from_trainer(columns, trainer)
    renamed = {"images": image, "videos": video}
    return {renamed.get(name, name): value for name, value in found.items()}


def first_of(columns: Mapping[str, Any], keys: Sequence[str]) -> Any:
    """Return the value of the first of several column names that has one; None without any."""
    return next((columns[key] for key in keys if columns.get(key) is not None), None)


def from_trainer(columns: Mapping[str, Any], trainer: str) -> dict[str, Any]:
    """Return the columns prompt, answer and images, with system, id and what else the row has.

    trainer: one of TRAINERS.

    Raises:
        ValueError: the row is not one of that trainer's.
    """
    reader = {"verl": _verl, "easyr1": _easyr1, "trl": _chat, "swift": _chat}.get(trainer)
    return dict(columns) if reader is None else reader(columns)


def _verl(columns: Mapping[str, Any]) -> dict[str, Any]:
    reward_model = columns.get("reward_model")
    if not isinstance(reward_model, Mapping) or reward_model.get("ground_truth") is None:
        raise ValueError("a row for verl needs reward_model with ground_truth")
    extra = columns.get("extra_info")
    extra = dict(extra) if isinstance(extra, Mapping) else {}
    row = _from_messages(columns["prompt"], columns) | {"answer": _gold(reward_model["ground_truth"])}
    kept = {"data_source": columns.get("data_source"), "extra_info": extra or None}
    row |= {name: value for name, value in kept.items() if value is not None}
    return row | ({"id": f"{extra['split']}-{extra['index']}"} if {"split", "index"} <= extra.keys() else {})


def _easyr1(columns: Mapping[str, Any]) -> dict[str, Any]:
    problem = columns.get("problem")
    if not isinstance(problem, str):
        raise ValueError(f"a row for EasyR1 needs the text column problem, got {', '.join(columns)}")
    images = image_entries(first_of(columns, IMAGE_KEYS))
    found = {"prompt": _marked(problem, len(images)), "images": images, "answer": _gold(columns["answer"])}
    return _others(columns) | found


def _chat(columns: Mapping[str, Any]) -> dict[str, Any]:
    """A row of TRL or ms-swift: messages, whose last one may be the response, and a column with the gold."""
    turns = columns.get("prompt") if columns.get("prompt") is not None else columns.get("messages")
    completion = columns.get("completion")
    row = _from_messages(turns, columns)
    gold = first_of(columns, GOLD_KEYS)
    if gold is not None:
        return row | {"answer": _gold(gold)}
    answer = _text_of(completion)[0] if completion is not None else row.pop("response", "")
    if not answer:
        raise ValueError(f"no gold: a row needs {', '.join(GOLD_KEYS)}, a completion, or a message of the assistant")
    return row | {"answer": answer}


def _from_messages(turns: Any, columns: Mapping[str, Any]) -> dict[str, Any]:
    """Return system, prompt and images of a conversation of one question, and the assistant's turn as `response`."""
    if isinstance(turns, str):
        try:
            turns = json.loads(turns)
        except ValueError as error:
            raise ValueError(f"the messages are text that is not JSON: {error}") from error
    if not isinstance(turns, Sequence) or not all(isinstance(turn, Mapping) for turn in turns):
        raise ValueError(f"the prompt must be a list of messages, got {turns!r:.60}")
    found: dict[str, list[str]] = {}
    parts: list[Any] = []
    clips: list[Any] = []
    for turn in turns:
        text, images = _text_of([turn])
        found.setdefault(str(turn.get("role")), []).append(text)
        parts += images
        clips += _videos_of(turn)
    if len(found.get("user", [])) != 1 or len(found.get("assistant", [])) > 1:
        roles = ", ".join(str(turn.get("role")) for turn in turns)
        raise ValueError(f"a row must be one question, but its messages are of {roles}")
    images = [part for part in parts if part is not None] or image_entries(first_of(columns, IMAGE_KEYS))
    row = {**_others(columns), "prompt": _marked(found["user"][0], len(images)), "images": images}
    if videos := clips or video_entries(first_of(columns, VIDEO_KEYS)):
        row["videos"] = videos
    if "system" in found:
        row["system"] = found["system"][0]
    return row | ({"response": found["assistant"][0]} if "assistant" in found else {})


def _text_of(turns: Any) -> tuple[str, list[Any]]:
    """Return the text of messages, an image part as its mark, and the images (None where a column has them)."""
    if isinstance(turns, str):
        return turns, []
    texts, images = [], []
    for turn in turns:
        content = turn.get("content")
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content or ():
            if part.get("type") in ("image", "image_url"):
                address = part.get("image_url")
                images.append(part.get("image") or (address.get("url") if isinstance(address, Mapping) else address))
                texts.append(IMAGE_MARK)
            elif part.get("type") == "video":
                texts.append(VIDEO_MARK)
            else:
                texts.append(str(part.get("text") or ""))
    return "".join(texts), images


def _videos_of(turn: Mapping[str, Any]) -> list[Any]:
    """Return the videos among a message's parts, those that a column has left out."""
    content = turn.get("content")
    parts = content if isinstance(content, list | tuple) else ()
    return [part for part in parts if part.get("type") == "video" and part.get("video") is not None]


def _marked(text: str, num_images: int) -> str:
    """Return the text with a mark per image; where it has none, they come first."""
    return text if IMAGE_MARK in text or not num_images else IMAGE_MARK * num_images + text


def _gold(value: Any) -> Any:
    """Return a gold answer as ours: text with our tags as it is, any other one as a list of accepted texts."""
    if isinstance(value, str) and "</answer>" in value and "<evidence>" in value:
        return value
    if isinstance(value, Mapping):
        value = first_of(value, ("target", "answer", "answers", "value"))
    return [str(one) for one in value] if isinstance(value, list | tuple) else [str(value)]


def _others(columns: Mapping[str, Any]) -> dict[str, Any]:
    return {name: columns[name] for name in ("id", "evidence") if columns.get(name) is not None}
