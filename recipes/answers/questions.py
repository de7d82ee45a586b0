"""Read questions over page images from rows of any supported layout, and turn a question into its prompt.

Training, inference and evaluation all fill templates with `rsgrpo.data.prompts`.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from recipes.answers.harness_files import question_rows
from recipes.answers.parsing import is_irrelevant, says_insufficient
from rewards.evisrag import parse_gold
from rollout.config import InputsConfig
from rollout.inputs.videos import VIDEO_MARK
from rollout.keys import nearest
from rollout.types import ImageReference, ImageSource, Prompt
from rsgrpo.config.train import PromptConfig
from rsgrpo.data.faults import is_shared
from rsgrpo.data.foreign import IMAGE_KEYS as IMAGE_KEYS
from rsgrpo.data.foreign import IMAGE_MARK as IMAGE_MARK
from rsgrpo.data.foreign import VIDEO_KEYS, in_our_columns
from rsgrpo.data.foreign import first_of as first_of
from rsgrpo.data.prompt_file import PROMPT_FILE, prompt_of_model
from rsgrpo.data.prompts import render_template
from rsgrpo.data.rows import MAX_LISTED_ROWS, ImageFolder, Row, find_images, image_entries, read_rows
from rsgrpo.data.videos import Video, in_order, read_video, require_marks, video_entries
from rsgrpo.errors import InputError, listed

log = logging.getLogger(__name__)

ID_KEYS = ("id", "qid", "query_id", "question_id", "qa_id", "questionId", "uid")
QUESTION_KEYS = ("question", "query")
ANSWER_KEYS = ("answer", "answers")
RULE_COLUMNS = (
    "answer_format", "year", "Year", "question_type", "Question Type", "evidence_pages", "answer_page_idx", "pages",
    "gold_pages", "gold_box",
)  # fmt: skip
"""Columns by which `recipes.evaluation` scores, and those that an environment reads."""


@dataclass(frozen=True, slots=True)
class Question:
    """One question, with its gold where there is one.

    prompt: the row's own user message with `<image>` marks; "" where it has none.
    answers: accepted answers, in no order; empty where the row has no gold.
    is_sufficient: whether the pages settle the question; what the row says, else whether its gold answer abstains.
    evidence: one gold text per page; None where the row has none.
    videos: of each `<video>` in the message, what the model sees of it.
    columns: what else the row has that a scoring rule or an environment reads (RULE_COLUMNS).
    """

    id: str
    question: str
    images: tuple[ImageSource, ...] = ()
    prompt: str = ""
    answers: tuple[str, ...] = ()
    is_sufficient: bool = True
    evidence: tuple[str, ...] | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    videos: tuple[Video, ...] = ()

    @property
    def relevant_pages(self) -> frozenset[int] | None:
        """Numbers of the pages that settle the question, from 1; None where the row does not say.

        From the gold evidence, else from `evidence_pages` (SlideVQA, MMLongBench-Doc: numbers from 1, a list or its
        text), else from `answer_page_idx` (MP-DocVQA: one index from 0).
        """
        if self.evidence is not None:
            return frozenset(number for number, gold in enumerate(self.evidence, start=1) if not is_irrelevant(gold))
        if (listed_pages := self.columns.get("evidence_pages")) is not None:
            return frozenset(map(int, re.findall(r"\d+", str(listed_pages))))
        index = self.columns.get("answer_page_idx")
        return None if index is None else frozenset({int(index) + 1})


def read_questions(
    source: str, *, image_dir: str = "", need_answers: bool = False, inputs: InputsConfig | None = None
) -> list[Question]:
    """Read a data source (`rsgrpo.data.rows.read_rows`) in EVisRAG's training or test layout, or a mixture.

    Columns: id or qid; question, query or prompt; image or images; and, optional, answer or answers (a text, a list, or
    text with <evidence> and <answer>), is_sufficient, evidence (one text per page), video or videos.

    inputs: limits of videos; None refuses rows that have one.

    A .tsv is a table of VLMEvalKit's questions.

    Raises:
        InputError: the source cannot be read, or rows are unusable; it lists them.
    """
    if source.endswith(".tsv"):
        rows, folder = read_table(Path(source)), Path(source).parent
    else:
        rows, folder = read_rows(source, keep_broken=True)
    images = find_images(folder, image_dir)
    questions, faults = [], []
    for row in rows:
        try:
            questions.append(_question(row, images, need_answers=need_answers, inputs=inputs or InputsConfig()))
        except ValueError as error:
            faults.append(f"{row.place}: {error}")
    if faults:
        shown = listed(faults, MAX_LISTED_ROWS)
        if is_shared([fault.partition(": ")[2] for fault in faults], len(rows)):
            shown = f"  every row: {faults[0]}"
        raise InputError(f"{source}: {len(faults)} of {len(rows)} rows cannot be used:\n{shown}")
    return questions


def read_table(path: Path) -> list[Row]:
    """Return the questions of a VLMEvalKit table as rows."""
    return [Row(f"row {number} of {path}", number, row) for number, row in enumerate(question_rows(path), start=1)]


def to_prompt(question: Question, template: str, system: str = "") -> Prompt:
    """Return the prompt; without a template the row's own message.

    Raises:
        InputError: there is no text, or the marks do not match the images.
    """
    num_images, num_videos = len(question.images), len(question.videos)
    text = render_template(template, question.question, num_images, num_videos) if template else question.prompt
    if not (question.question if template else text).strip():
        lacks = "no question" if template else "no message of its own (column prompt); choose a prompt template"
        raise InputError(f"question {question.id}: the row has {lacks}")
    if text.count(IMAGE_MARK) != len(question.images):
        raise InputError(
            f"question {question.id}: the message has {text.count(IMAGE_MARK)} {IMAGE_MARK} marks for "
            f"{len(question.images)} images; a template shows them by {{images}}"
        )
    if why := require_marks(text, num_videos):
        raise InputError(f"question {question.id}: the message has {why}; a template shows them by {{videos}}")
    truth: dict[str, Any] = {**question.columns, "is_sufficient": question.is_sufficient}
    if question.answers:
        truth["answers"] = list(question.answers)
    if question.evidence is not None:
        truth["evidence"] = list(question.evidence)
    images, times = in_order(text, question.images, question.videos)
    return Prompt(question.id, text, images, truth, question.question, system, videos=times)


def prompt_hash(prompt: Prompt) -> str:
    """Return a short fingerprint of what a model is asked: system message, user message, and the pages by file name.

    A folder of pages may move without changing it; bytes count by their content.
    """
    digest = hashlib.sha256(f"{prompt.system}\0{prompt.text}".encode(errors="surrogatepass"))
    for turn in prompt.history:
        digest.update("\0".join(("", *turn)).encode(errors="surrogatepass"))
    for source in prompt.images:
        digest.update(b"\0" + (hashlib.sha256(source).digest() if isinstance(source, bytes) else _file_name(source)))
    if prompt.videos:
        digest.update(repr(prompt.videos).encode())
    return digest.hexdigest()[:16]


def _file_name(source: str | ImageReference) -> bytes:
    return Path(source if isinstance(source, str) else source.name).name.encode(errors="surrogateescape")


def fingerprint_of(questions: Sequence[Question]) -> str:
    """Return a short fingerprint of a benchmark: ids, questions, accepted answers, pages, rule columns and videos."""
    digest = hashlib.sha256()
    for one in questions:
        facts: tuple[object, ...] = (
            *(one.id, one.question, one.answers, one.is_sufficient, len(one.images), one.evidence, dict(one.columns)),
            *(video.times for video in one.videos),
        )
        digest.update(repr(facts).encode(errors="surrogatepass"))
    return digest.hexdigest()[:16]


def named_prompt(name: str, model: str = "") -> PromptConfig:
    """Return the prompt of a name in conf/prompt ("evidence", "direct", ...), or a template file.

    model: the folder whose own prompt, if it carries one, is meant by no name; without one that is "evidence". A
        warning says if another prompt is chosen than the model was trained with.

    Raises:
        InputError: there is neither.
    """
    own = prompt_of_model(model)
    if not name and own is not None:
        return own
    name = name or "evidence"
    if Path(name).is_file():
        found = PromptConfig(file=name)
    else:
        folder = resources.files("conf") / "prompt"
        options = sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))
        if name not in options:
            raise InputError(
                f"prompt {name!r} is neither a file nor one of {', '.join(options)}{nearest(name, options)}"
            )
        found = PromptConfig(**yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8")))
    warn_of_other_prompt(found, model)
    return found


def warn_of_other_prompt(prompt: PromptConfig, model: str) -> None:
    """Log a warning if a model's folder carries another prompt than this one."""
    own = prompt_of_model(model)
    template = Path(prompt.file).read_text(encoding="utf-8") if prompt.file else prompt.template
    if own is not None and (own.template.strip(), own.system.strip()) != (template.strip(), prompt.system.strip()):
        log.warning(
            "this prompt is not the one that %s was trained with (%s in its folder): expect other scores",
            model,
            PROMPT_FILE,
        )


def _question(row: Row, folder: ImageFolder, *, need_answers: bool, inputs: InputsConfig) -> Question:
    if row.fault:
        raise ValueError(row.fault)
    columns = in_our_columns(_last_turn(row.columns), texts=("prompt", *QUESTION_KEYS))
    row_id = first_of(columns, ID_KEYS)
    own = columns.get("prompt")
    question = first_of(columns, QUESTION_KEYS)
    if question is None and isinstance(own, str):
        question = own.replace(IMAGE_MARK, "").replace(VIDEO_MARK, "").strip()
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"no question: it needs question, query or prompt; it has {', '.join(columns)}")
    images = tuple(folder.resolve(entry) for entry in image_entries(first_of(columns, IMAGE_KEYS)))
    clips = video_entries(first_of(columns, VIDEO_KEYS))
    if len(clips) > inputs.max_videos:
        raise ValueError(f"the row has {len(clips)} videos, but inputs.max_videos is {inputs.max_videos}. Raise it")
    answers, evidence = _gold(first_of(columns, ANSWER_KEYS), columns.get("evidence"))
    if need_answers and not answers:
        raise ValueError(f"no gold answer: it needs answer or answers; it has {', '.join(columns)}")
    if evidence is not None and len(evidence) != len(images):
        raise ValueError(f"gold evidence has {len(evidence)} entries for {len(images)} images")
    abstains = bool(answers) and all(says_insufficient(answer) for answer in answers)
    return Question(
        id=f"row-{row.number}" if row_id is None else str(row_id),
        question=question,
        images=images,
        prompt=own if isinstance(own, str) else "",
        answers=answers,
        is_sufficient=_flag(columns["is_sufficient"]) if columns.get("is_sufficient") is not None else not abstains,
        evidence=evidence,
        columns={name: columns[name] for name in RULE_COLUMNS if columns.get(name) is not None},
        videos=tuple(read_video(entry, folder, inputs) for entry in clips),
    )


def _last_turn(columns: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a row of ChartQAPro (`Question` and `Answer`, lists of turns) as its last question, with what precedes it.

    Earlier turns are given with their gold answers, as the benchmark has it; any other row comes back as it is.
    """
    asked, answers = columns.get("Question"), columns.get("Answer")
    if not isinstance(asked, list) or not isinstance(answers, list) or not asked or len(asked) != len(answers):
        return columns
    turns = [
        f"Q{n}: {one.strip()}\nA{n}: {answer}" for n, (one, answer) in enumerate(zip(asked, answers, strict=True), 1)
    ]
    last = f"Q{len(asked)}: {asked[-1].strip()}" if len(asked) > 1 else asked[-1].strip()
    context = [f"Context: {text}\n"] if (text := str(columns.get("Paragraph") or "").strip()) else []
    return {**columns, "question": "\n".join([*context, *turns[:-1], last]), "answer": [str(answers[-1])]}


def _gold(answer: Any, evidence: Any) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
    """Return the accepted answers and the gold evidence of a row."""
    found = {} if evidence is None else {"evidence": evidence}
    if isinstance(answer, str):
        parsed = parse_gold(answer)
        answer = parsed.get("answers", [])
        found = parsed | found
    elif isinstance(answer, int | float):
        answer = [answer]
    elif answer is not None and not isinstance(answer, list | tuple):
        raise ValueError(f"a gold answer is a text or a list of texts, got {type(answer).__name__}")
    slots = found.get("evidence")
    if slots is not None and not (isinstance(slots, list | tuple) and all(isinstance(slot, str) for slot in slots)):
        raise ValueError(f"gold evidence is a list with one text per image, got {slots!r:.80}")
    return tuple(str(entry) for entry in answer or ()), None if slots is None else tuple(slots)


def _flag(value: Any) -> bool:
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    if isinstance(value, str) and value.strip().lower() in ("true", "false", "yes", "no", "0", "1"):
        return value.strip().lower() in ("true", "yes", "1")
    raise ValueError(f"is_sufficient must be true or false, got {value!r:.80}")
