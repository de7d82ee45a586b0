"""The options that several commands of `recipes.retrieve` and `recipes.app` share, and what they open.

What runs models is imported when it is needed, because loading it takes half a minute.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import get_args

from recipes.answers.at_desk import MAX_IMAGES, desk_turns
from recipes.answers.conversations import open_conversing
from recipes.answers.options import add_options, chosen, option_of
from recipes.answers.questions import named_prompt
from recipes.answers.reader import Reader, per_thousand
from recipes.answers.spec import AnswerModelConfig, AnswerRolloutConfig, AnswerSpec, EndpointConfig, pixel_limits
from recipes.retrieval.answers.generation import Setting
from recipes.retrieval.answers.library import Library, LibrarySettings
from recipes.retrieval.encoders.base import EncoderSettings, PageEncoder, identify
from recipes.retrieval.encoders.choice import load_encoder
from recipes.retrieval.pages.store import PageStore
from recipes.retrieval.search.index import IndexFault, VectorIndex
from recipes.retrieval.search.keep import Filters
from recipes.retrieval.search.origin import recall
from recipes.retrieval.search.retriever import Retriever, SearchSettings
from recipes.retrieval.search.sync import bring_in_line
from rollout.config import InputsConfig, TurnsConfig
from rollout.inputs.images import smart_resize
from rollout.keys import keys_of, named
from rsgrpo.data.prompt_file import prompt_of_model
from rsgrpo.data.prompts import read_template
from rsgrpo.errors import InputError
from rsgrpo.records.console import Console

EXTRAS = dict.fromkeys(("pypdfium2", "faiss", "sentence_transformers", "pytrec_eval"), "retrieval")
MAX_K = 20
"""Pages of one question to a library."""
KEPT = "finished work is kept; run the same command to resume"
WITH_TEXT_PROMPT = ("evidence", "direct")
"""Prompts that have a form for pages as text, NAME_text; others show the texts in place of the images."""
PIXEL_BOXES = {"qwen2_5_vl": 28}
"""Kinds of models that write boxes in pixels of the page as they see it, with the factor of both sides."""
ANSWER_OPTIONS = {
    "model.path": "--answer-model",
    "rollout.engine": "--engine",
    "rollout.script": "--script",
    "rollout.device": "--device",
    "rollout.max_response_tokens": "--max-tokens",
    "inputs.max_images": "-k",
    "inputs.min_pixels": "--answer-max-pixels",
    "inputs.max_pixels": "--answer-max-pixels",
    "inputs.max_prompt_tokens": "--max-prompt-tokens",
    "endpoint.url": "--endpoint",
    "endpoint.model": "--answer-model",
    "endpoint.max_tries": "--max-tries",
    "endpoint.timeout_s": "--timeout-s",
    "endpoint.api_key_env": "--api-key-env",
}
"""What these commands call the keys of an `AnswerSpec`."""


def add_encoder(command: argparse.ArgumentParser) -> None:
    """Add the store and its encoder."""
    command.add_argument("store", type=Path, metavar="STORE", help="folder that ingest made")
    command.add_argument(
        "--model", default="", help="folder or hub name; with --kind imported the folder of vectors; default: that of "
        "the index",
    )  # fmt: skip
    command.add_argument("--index", type=Path, help="default: STORE/index")
    add_options(command, EncoderSettings)


def encoder_settings(options: argparse.Namespace) -> EncoderSettings:
    """Return how the encoder is loaded: by the command line or, without --model, like the one that made the index.

    Raises:
        InputError: the settings contradict each other, or the model is unknown.
    """
    asked = chosen(EncoderSettings, options)
    return asked if options.model else recall(index_folder(options), asked)


def open_encoder(options: argparse.Namespace) -> PageEncoder:
    """Return the encoder; InputError if it cannot be loaded, or the one that the index names has changed since."""
    settings = encoder_settings(options)
    if not options.model and settings.kind != "imported":
        try:
            VectorIndex.open(index_folder(options)).require(identify(settings))
        except IndexFault as error:
            raise InputError(f"without --model, {settings.model} is opened, but {error}") from error
    return load_encoder(settings)


def index_folder(options: argparse.Namespace) -> Path:
    """Return the index's folder."""
    return Path(options.index or options.store / "index")


def add_search_options(command: argparse.ArgumentParser) -> None:
    """Add how pages are searched."""
    command.add_argument("-k", type=int, default=5, help="number of pages")
    add_options(command, SearchSettings)
    command.add_argument(
        "--with-index", type=Path, action="append", default=[], metavar="INDEX",
        help="fuse the results of this index too, with the encoder that made it; may be repeated",
    )  # fmt: skip
    add_options(command.add_argument_group("which documents are searched"), Filters)
    command.add_argument(
        "--rerank-index", type=Path, metavar="INDEX", help="late-interaction index that reorders the candidates"
    )
    command.add_argument("--rerank", metavar="MODEL", help="model of --rerank-index; default: the one that made it")


def search_settings(options: argparse.Namespace) -> SearchSettings:
    """Return how pages are searched, with the reranker loaded; InputError if the reranker cannot be opened."""
    reranker, folder = None, options.rerank_index
    if options.rerank and folder is None:
        raise InputError("--rerank needs --rerank-index; set it to the index that this model made")
    if folder is not None:
        late = chosen(
            EncoderSettings, options, model=options.rerank or "", kind="late", encode_with="transformers", pooling="",
            query_prefix=None, revision="",
        )  # fmt: skip
        reranker = (load_encoder(late if options.rerank else recall(folder, late)), folder)
    further = tuple((load_encoder(recall(folder, _how_run(options))), folder) for folder in options.with_index)
    return chosen(SearchSettings, options, reranker=reranker, further=further)


def _how_run(options: argparse.Namespace) -> EncoderSettings:
    """Return settings that say how a model is run, and nothing of which one."""
    return EncoderSettings(
        "", device=options.device, batch_size=options.batch_size, trust_remote_code=options.trust_remote_code
    )


def add_sync(command: argparse.ArgumentParser) -> None:
    """Add whether indexes that are behind their store are brought in line first."""
    command.add_argument("--sync", action="store_true", help="first bring indexes that are behind the store in line")


def open_retriever(options: argparse.Namespace) -> Retriever:
    """Return the store, its indexes and encoders, put together; indexes that are behind are updated or named.

    Messages go to stderr, because results go to stdout.
    """
    PageStore.open(options.store)
    search = search_settings(options)
    encoder = None if search.by == "words" else open_encoder(options)
    with Console(sys.stderr) as console:
        if options.sync:
            bring_in_line(options.store, index_folder(options), encoder, search, console)
        retriever = Retriever(options.store, index_folder(options), encoder, search, chosen(Filters, options))
        for lag in retriever.lags:
            console.warning(f"{lag}; add --sync, or run: python -m recipes.retrieve sync {options.store}")
    return retriever


def add_answerer(command: argparse.ArgumentParser) -> None:
    """Add who answers and how."""
    who = command.add_argument_group("who answers")
    who.add_argument("--answer-model", default="", help="model folder or hub id; with --endpoint, the server's name")
    who.add_argument("--engine", choices=("hf", "vllm", "fake"), default="hf", help="what runs the model")
    who.add_argument("--endpoint", default="", metavar="URL", help="OpenAI-compatible server, such as .../v1")
    who.add_argument("--max-tries", type=int, default=6, help="requests per answer before the endpoint counts as down")
    endpoint = keys_of(EndpointConfig)
    for name in ("timeout_s", "api_key_env"):
        about = endpoint[name]
        who.add_argument(option_of(name), type=type(about.default), default=about.default, help=about.help)
    who.add_argument("--script", default="", help="answers of the fake engine")
    who.add_argument(
        "--prompt",
        default="",
        help="a name in conf/prompt or a template file (default: the model's own, else evidence)",
    )
    who.add_argument("--max-tokens", type=int, default=2048, help="longest answer, in tokens")
    who.add_argument("--max-prompt-tokens", type=int, help="longest prompt, in tokens; default: that of recipes.infer")
    who.add_argument("--answer-max-pixels", type=int, default=0, help="largest area of a page; 0: the model's default")
    who.add_argument("--setting", choices=get_args(Setting), default="multi_image", help="how pages become prompts")


@named(ANSWER_OPTIONS)
def open_reader(options: argparse.Namespace, max_pages: int, turns: TurnsConfig | None = None) -> Reader:
    """Return who answers, with the prompt that questions are put into.

    Args:
        max_pages: the most pages of one question.
        turns: the page desk at which the model looks up its pages; None gives it its pages.

    Raises:
        InputError: they cannot be opened.
    """
    own = prompt_of_model(options.answer_model)
    prompt_name = options.prompt or ("" if own else "evidence" if turns is None else "desk")
    prompt = named_prompt(prompt_name, options.answer_model)
    template = read_template(prompt)
    if not template:
        raise InputError(f"--prompt {options.prompt} has no template for a question; choose another prompt")
    min_pixels, max_pixels = pixel_limits(options.answer_model)
    if options.answer_max_pixels:
        min_pixels, max_pixels = min(min_pixels, options.answer_max_pixels), options.answer_max_pixels
    limits = {"min_pixels": min_pixels, "max_pixels": max_pixels, "max_images": max_pages}
    if options.max_prompt_tokens:
        limits["max_prompt_tokens"] = options.max_prompt_tokens
    name = options.answer_model if options.endpoint else ""
    spec = AnswerSpec(
        AnswerModelConfig(options.answer_model),
        AnswerRolloutConfig(
            engine=options.engine, script=options.script, max_response_tokens=options.max_tokens,
            device=options.device or "auto", turns=turns or TurnsConfig(),
        ),
        InputsConfig(**limits),
        chosen(EndpointConfig, options, url=options.endpoint, model=name),
    )  # fmt: skip
    has_text = prompt_name in WITH_TEXT_PROMPT
    text_template = read_template(named_prompt(f"{prompt_name}_text")) if has_text else ""
    frame = _box_frame(options.answer_model, min_pixels, max_pixels)
    return Reader(open_conversing(spec), template, prompt.system, text_template, frame)


def _box_frame(model: str, min_pixels: int, max_pixels: int) -> Callable[[int, int], tuple[float, float]]:
    """Return the coordinates in which a model writes boxes: see `Reader`."""
    file = Path(model) / "config.json"
    kind = json.loads(file.read_text(encoding="utf-8")).get("model_type", "") if file.is_file() else ""
    if kind not in PIXEL_BOXES:
        return per_thousand

    def resized(width: int, height: int) -> tuple[float, float]:
        rows, columns = smart_resize(height, width, PIXEL_BOXES[kind], min_pixels, max_pixels)
        return columns, rows

    return resized


def add_desk(command: argparse.ArgumentParser) -> None:
    """Add the option with which `open_library` lets the model look up its pages."""
    command.add_argument(
        "--desk",
        action="store_true",
        help="let the model look up its pages by itself: it searches, opens pages, zooms in, and answers",
    )


def open_library(options: argparse.Namespace, console: Console) -> Library:
    """Return what the page shows; RsgrpoError if the store, the encoder or the answerer cannot be opened."""
    if not 1 <= options.k <= MAX_K:
        raise InputError(f"-k must be in [1, {MAX_K}], got {options.k}")
    settings = chosen(LibrarySettings, options)
    if options.by != "words":
        encoder_settings(options)  # refuses a wrong command line before the answerer starts
    at_desk = getattr(options, "desk", False)
    index, with_answers = index_folder(options), options.answer_model or options.endpoint
    if at_desk and not (with_answers or options.script):
        raise InputError("--desk needs a model that looks up the pages: name it by --answer-model or --endpoint")
    with ExitStack() as on_failure:
        reader = None
        if with_answers or options.script or options.engine != "hf":
            arguments = {"index": str(index), "by": options.by, "k": options.k}
            turns = desk_turns(options.store, **arguments) if at_desk else None
            reader = open_reader(options, MAX_IMAGES if at_desk else MAX_K, turns)
            on_failure.callback(reader.answerer.close)
            reader.answerer.start()  # so that the first question does not wait for it
        search = search_settings(options)
        encoder = None if search.by == "words" else open_encoder(options)
        filters = chosen(Filters, options)
        library = Library(
            options.store, index, encoder, reader, settings, console, search, filters, at_desk=at_desk
        )  # fmt: skip
        if at_desk:
            library.lend_to_desk(options.k)
        on_failure.pop_all()
    return library
