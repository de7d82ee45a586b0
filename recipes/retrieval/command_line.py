"""The options that several commands of `recipes.retrieve` and `recipes.app` share, and what they open.

Modules are imported when an option needs them, because loading those that run models takes half a minute.
"""

from __future__ import annotations

import argparse
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rollout.keys import named
from rsgrpo.errors import InputError

if TYPE_CHECKING:
    from recipes.answers.reader import Reader
    from recipes.retrieval.encoders.base import EncoderSettings, PageEncoder
    from recipes.retrieval.search.retriever import Retriever, SearchSettings

SettingsT = TypeVar("SettingsT")
SETTINGS = ("multi_image", "horizontal", "vertical", "weighted", "text")
EXTRAS = dict.fromkeys(("pypdfium2", "faiss", "sentence_transformers", "pytrec_eval"), "retrieval")
KEPT = "finished work is kept; run the same command to resume"
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
}
"""What these commands call the keys of an `AnswerSpec`."""


def chosen(settings: type[SettingsT], options: argparse.Namespace, **given: Any) -> SettingsT:
    """Return settings whose fields have the names of options; `given` goes before the options."""
    names = {field.name for field in fields(settings)} & set(vars(options))  # type: ignore[arg-type]
    return settings(**{name: getattr(options, name) for name in names} | given)


def add_encoder(command: argparse.ArgumentParser) -> None:
    """Add the store and its encoder."""
    command.add_argument("store", type=Path, metavar="STORE")
    command.add_argument(
        "--model", default="", help="folder or hub name; with --kind imported the folder of vectors; default: that of "
        "the index",
    )  # fmt: skip
    command.add_argument("--kind", choices=("image", "text", "late", "imported"), default="image")
    command.add_argument("--encode-with", choices=("transformers", "vllm"), default="transformers")
    command.add_argument("--index", type=Path, help="default: STORE/index")
    command.add_argument("--pooling", choices=("weighted_mean", "mean", "last", "cls"), default="")
    command.add_argument("--query-prefix", help="precedes every query; default: the model's own, or VisRAG's")
    command.add_argument("--min-pixels", type=int, default=4 * 28 * 28, help="smallest area of a resized page")
    command.add_argument("--max-pixels", type=int, default=1_280 * 28 * 28, help="largest area of a resized page")
    command.add_argument("--batch-size", type=int, default=8)
    command.add_argument("--device", default="", help="default: a GPU if there is one")
    command.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    command.add_argument("--revision", default="", help="hub commit of the model")
    command.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")


def encoder_settings(options: argparse.Namespace) -> EncoderSettings:
    """Return how the encoder is loaded: by the command line or, without --model, like the one that made the index.

    Raises:
        InputError: the settings contradict each other, or the model is unknown.
    """
    from recipes.retrieval.search.origin import recall

    asked = _asked_settings(options)
    return asked if options.model else recall(index_folder(options), asked)


def _asked_settings(options: argparse.Namespace) -> EncoderSettings:
    from recipes.retrieval.encoders.base import EncoderSettings

    return chosen(EncoderSettings, options, engine=options.encode_with)


def open_encoder(options: argparse.Namespace) -> PageEncoder:
    """Return the encoder.

    Raises:
        InputError: it cannot be loaded, or the one that the index names has changed since.
    """
    from recipes.retrieval.encoders.base import identify
    from recipes.retrieval.encoders.choice import load_encoder
    from recipes.retrieval.search.index import IndexFault, VectorIndex

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
    command.add_argument("--backend", choices=("exact", "flat", "ivf"), default="exact")
    command.add_argument("--num-probes", type=int, default=32, help="lists read per query (ivf)")
    command.add_argument(
        "--rerank-index", type=Path, metavar="INDEX", help="of late interaction: reorders the candidates"
    )
    command.add_argument("--rerank", metavar="MODEL", help="its model; default: the one that made it")
    command.add_argument("--candidates", type=int, default=100, dest="num_candidates", help="pages to rerank")


def search_settings(options: argparse.Namespace) -> SearchSettings:
    """Return how pages are searched, with the reranker loaded.

    Raises:
        InputError: the reranker cannot be opened.
    """
    from recipes.retrieval.encoders.choice import load_encoder
    from recipes.retrieval.search.origin import recall
    from recipes.retrieval.search.retriever import SearchSettings

    reranker, folder = None, options.rerank_index
    if options.rerank and folder is None:
        raise InputError("--rerank needs --rerank-index; set it to the index that this model made")
    if folder is not None:
        late = replace(
            _asked_settings(options), model=options.rerank or "", kind="late", engine="transformers", pooling="",
            query_prefix=None, revision="",
        )  # fmt: skip
        reranker = (load_encoder(late if options.rerank else recall(folder, late)), folder)
    return chosen(SearchSettings, options, reranker=reranker)


def open_retriever(options: argparse.Namespace) -> Retriever:
    """Return the store, its index and the encoder, put together."""
    from recipes.retrieval.search.retriever import Retriever

    search = search_settings(options)
    return Retriever(options.store, index_folder(options), open_encoder(options), search)


def add_answerer(command: argparse.ArgumentParser) -> None:
    """Add who answers and how."""
    who = command.add_argument_group("who answers")
    who.add_argument("--answer-model", default="", help="model folder or hub id; with --endpoint, the server's name")
    who.add_argument("--engine", choices=("hf", "vllm", "fake"), default="hf")
    who.add_argument("--endpoint", default="", metavar="URL", help="OpenAI-compatible server, such as .../v1")
    who.add_argument("--max-tries", type=int, default=6, help="requests for one answer before the endpoint is down")
    who.add_argument("--script", default="", help="answers of the fake engine")
    who.add_argument("--prompt", default="evidence", help="a name in conf/prompt or a template file")
    who.add_argument("--max-tokens", type=int, default=2048, help="of an answer")
    who.add_argument("--max-prompt-tokens", type=int, help="of question and pages; default: that of recipes.infer")
    who.add_argument("--answer-max-pixels", type=int, default=0, help="area of a resized page; 0: the engine's default")
    who.add_argument("--setting", choices=SETTINGS, default="multi_image", help="how pages become prompts")


@named(ANSWER_OPTIONS)
def open_reader(options: argparse.Namespace, max_pages: int) -> Reader:
    """Return who answers, with the prompt that questions are put into.

    Args:
        max_pages: the most pages of one question.

    Raises:
        InputError: they cannot be opened.
    """
    from recipes.answers.engine import open_answerer
    from recipes.answers.questions import named_prompt
    from recipes.answers.reader import Reader
    from recipes.answers.spec import AnswerModelConfig, AnswerRolloutConfig, AnswerSpec, EndpointConfig, pixel_limits
    from rollout.config import InputsConfig
    from rsgrpo.data.prompts import read_template

    prompt = named_prompt(options.prompt)
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
            device=options.device or "auto",
        ),
        InputsConfig(**limits),
        EndpointConfig(options.endpoint, name, max_tries=options.max_tries),
    )  # fmt: skip
    return Reader(open_answerer(spec), template, prompt.system)
