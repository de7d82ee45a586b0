"""Predict a benchmark and score it: `python -m recipes.evaluate benchmark=SlideVQA model=runs/x/export topk=3`.

Predictions come from `recipes.answers.batch`, scores from `recipes.evaluation.scoring`, and the page from
`recipes.evaluation.page`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipes.answers.batch import answer_batch
from recipes.answers.conversations import open_conversing
from recipes.answers.harness_files import SUFFIXES, write_lmms, write_table
from recipes.answers.predictions import load_predictions, placed
from recipes.answers.questions import Question, fingerprint_of, named_prompt, to_prompt, warn_of_other_prompt
from recipes.answers.spec import AnswerModelConfig, AnswerRolloutConfig, AnswerSpec, EndpointConfig
from recipes.evaluation.benchmarks import load_benchmark
from recipes.evaluation.card import add_to_card
from recipes.evaluation.extra import extra_scorers, unread_columns
from recipes.evaluation.extraction import (
    INSTRUCTIONS,
    JUDGE_INSTRUCTIONS,
    ExtractorConfig,
    extract_answers,
    version_of,
)
from recipes.evaluation.official import PROTOCOLS
from recipes.evaluation.one_turn import baselines, image_counter
from recipes.evaluation.page import Policy, Results, as_json, as_markdown, as_page, worst_cases
from recipes.evaluation.scoring import Evaluation, ItemScore, compare_evaluations, evaluate_predictions
from rollout.config import InputsConfig, TurnsConfig
from rollout.errors import listed
from rollout.files import json_object, write_text
from rollout.keys import check, key, require
from rsgrpo import cli
from rsgrpo.config.train import PromptConfig
from rsgrpo.data.prompt_file import fingerprint, prompt_of_model
from rsgrpo.data.prompts import read_template
from rsgrpo.errors import InputError
from rsgrpo.records.console import Console
from rsgrpo.records.secrets import masked

PREDICTIONS_FILE = "predictions.jsonl"
SETTINGS_FILE = "settings.json"


@dataclass(frozen=True)
class EvaluateConfig:
    """One evaluation."""

    benchmark: str = key(
        "", "ChartQA, InfoVQA, SlideVQA, DocVQA or ViDoSeek, a folder of EVisRAG-Test's layout, or a file."
    )
    benchmark_dir: str = key("data", "Folder of benchmarks chosen by name; missing ones are downloaded from the hub.")
    image_dir: str = key("", 'Folder that relative image paths start from; "" means the benchmark\'s own folder.')
    topk: int = key(3, "Pages per question, which selects top<k>_test.jsonl; 0 uses all pages of a file.", ge=0)
    max_questions: int = key(0, "Use only the first questions, up to this number; 0 uses all.", ge=0)
    predictions: str = key("", "Score this file and predict nothing.")
    protocol: str = key(
        "",
        "The benchmark's own rule to score by as well.",
        one_of=("", *PROTOCOLS),
    )
    metrics: dict[str, str] = key({}, "Name -> module:function of a reward to score by as well.")
    model_card: bool = key(
        False, "Also write the scores into the README.md of the model's folder, an export of rsgrpo."
    )
    harness_files: bool = key(False, "Also write the answers as lmms-eval's samples and VLMEvalKit's .tsv and .xlsx.")
    mixed: bool = key(False, "Compare with `against` although it was predicted with other settings.")
    against: str = key("", "A second prediction file to compare with.")
    baselines: bool = key(
        False,
        "Also ask each question in one turn, without the environment, over as many thumbnails, and over as many pages, "
        "as fit into the image tokens that its trajectory took.",
    )
    baseline_model: str = key("", 'Model of the baselines; "" is the model itself.')
    baseline_prompt: str = key(
        "", 'Prompt of the baselines, a name in conf/prompt or a file; "" is that of baseline_model, else evidence.'
    )
    name: str = key("", 'Name of the folder in output_dir; "" derives it from benchmark and model.')
    output_dir: str = key("runs/evaluation", "Folder that holds evaluations.")
    seed: int = key(0, "Seed of sampling, bootstrap and permutations.", ge=0)
    bootstrap_samples: int = key(1000, "Bootstrap samples of the intervals; 0 gives no intervals.", ge=0)
    permutations: int = key(10_000, "Permutations of the paired test.", ge=1)
    worst_cases: int = key(12, "Worst answers to show on the page.", ge=0)
    own_prompt: bool = key(
        True,
        "Ask with the prompt that the model's folder carries, if any; any prompt=... on the command line unsets it.",
    )
    model: AnswerModelConfig = field(default_factory=AnswerModelConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    inputs: InputsConfig = field(default_factory=InputsConfig)
    rollout: AnswerRolloutConfig = field(default_factory=AnswerRolloutConfig)
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    extractor: ExtractorConfig = field(default_factory=ExtractorConfig)

    def __post_init__(self) -> None:
        check(self)
        require(
            re.fullmatch(r"(?!\.+$)[\w.=,+-]*", self.name) is not None,
            f"name must be letters, digits and any of _.=,+- because it names the folder; got {self.name!r}",
        )
        require(
            not self.baselines or self.rollout.turns.environment != "",
            "baselines=true compares trajectories with single turns. Set rollout.turns.environment as well.",
        )
        require(
            not self.extractor.url or self.protocol != "",
            "extractor.url: extracted answers are scored by a protocol. Set protocol, such as protocol=mmlongbench.",
        )
        require(
            bool(self.extractor.url) or self.protocol not in PROTOCOLS or not PROTOCOLS[self.protocol].is_judged,
            f"protocol={self.protocol} scores the marks of another model. Set extractor.url to its server.",
        )


def evaluate(config: EvaluateConfig) -> None:
    """Predict what is not predicted yet, score, and write results.json, results.md and report.html.

    Raises:
        InputError: the benchmark, the model or a prediction file cannot be used; finished predictions are kept.
    """
    questions = load_benchmark(
        config.benchmark, folder=config.benchmark_dir, topk=config.topk, image_dir=config.image_dir
    )
    questions = questions[: config.max_questions or None]
    if config.own_prompt and (own := prompt_of_model(config.model.path)):
        config = dataclasses.replace(config, prompt=own)
    elif not config.predictions:
        warn_of_other_prompt(config.prompt, config.model.path)
    folder = Path(config.output_dir) / folder_name(config)
    with Console() as console:
        path = Path(config.predictions or folder / PREDICTIONS_FILE)
        if not config.predictions:
            predict(config, questions, folder, console)
        report = score(config, questions, path, folder, console)
        if config.baselines:
            policies = beside(config, questions, path, report.evaluation, folder, console)
            report = dataclasses.replace(report, policies=policies)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "results.json", json.dumps(as_json(report), indent=2) + "\n")
        write_text(folder / "results.md", as_markdown(report))
        write_text(folder / "report.html", as_page(report))
        console.info(as_markdown(report))
        console.info(f"written: {folder / 'report.html'}, results.md, results.json")
        if config.model_card:
            add_to_card(Path(config.model.path), report)
        if config.harness_files:
            write_harness_files(folder, report.evaluation.items)


def write_harness_files(folder: Path, items: Sequence[ItemScore]) -> None:
    """Write the answered questions as lmms-eval's samples and as VLMEvalKit's tables."""
    rows = [
        {
            "id": item.question.id,
            "question": item.question.question,
            "answers": item.question.answers,
            "raw": item.prediction.text,
        }
        for item in items
        if item.prediction is not None
    ]
    write_lmms(folder / "lmms_samples_predictions.jsonl", rows)
    for suffix in SUFFIXES:
        write_table(folder / f"vlmevalkit{suffix}", rows)


def predict(config: EvaluateConfig, questions: Sequence[Question], folder: Path, console: Console) -> None:
    """Write the predictions that `folder` does not have yet.

    Raises:
        RsgrpoError: the folder was made with other settings, pages are missing, or the answerer gave up.
    """
    template = read_template(config.prompt)
    prompts = [to_prompt(question, template, config.prompt.system) for question in questions]
    require_pages(questions, config.image_dir)
    keep_settings(folder / SETTINGS_FILE, masked(prediction_settings(config)))
    spec = AnswerSpec(config.model, config.rollout, config.inputs, config.endpoint, config.seed)
    turns = config.rollout.turns
    with closing(open_conversing(spec)) as answerer:
        greedy = config.rollout.temperature == 0 and not turns.environment  # it may know more than the prompt says
        summary = answer_batch(prompts, answerer, folder / PREDICTIONS_FILE, share_equal=greedy, console=console)
    if summary.failed:
        console.warning(
            f"{summary.failed} of {len(questions)} questions could not be asked and count as missing. Their errors are "
            f"in {folder / PREDICTIONS_FILE}. Run the same command to ask them again."
        )


def beside(
    config: EvaluateConfig,
    questions: Sequence[Question],
    path: Path,
    trajectories: Evaluation,
    folder: Path,
    console: Console,
) -> list[Policy]:
    """Predict and score the baselines of one turn; return the policies of the table, the trajectories first.

    Raises:
        RsgrpoError: as `predict`; the environment cannot give its pages in one prompt.
    """
    model, rollout = config.model, dataclasses.replace(config.rollout, turns=TurnsConfig())
    if config.baseline_model:
        model = dataclasses.replace(model, path=config.baseline_model, revision="")
    prompt = named_prompt(config.baseline_prompt, config.baseline_model)
    spec = AnswerSpec(model, rollout, config.inputs, config.endpoint, config.seed)
    found = load_predictions(path).by_id
    policies = [Policy("trajectories", trajectories)]
    for name, asked in baselines(questions, found, config.rollout.turns, image_counter(spec)).items():
        most = max([config.inputs.max_images, *(len(question.images) for question in asked)])
        inputs = dataclasses.replace(config.inputs, max_images=most)
        single = dataclasses.replace(
            config, model=model, prompt=prompt, rollout=rollout, inputs=inputs, baselines=False, predictions=""
        )
        predict(single, asked, folder / f"one_turn_{name}", console)
        predictions = load_predictions(folder / f"one_turn_{name}" / PREDICTIONS_FILE)
        protocol = "" if config.extractor.url else config.protocol  # its answers are not read out
        scorers = extra_scorers(protocol, config.metrics)
        bootstrap = {"num_samples": config.bootstrap_samples, "seed": config.seed}
        evaluation = evaluate_predictions(asked, predictions, **bootstrap, scorers=scorers)
        gain = compare_evaluations(trajectories, evaluation, num_permutations=config.permutations, **bootstrap)
        policies.append(Policy(f"one turn, {name}", evaluation, gain))
    return policies


def score(config: EvaluateConfig, questions: Sequence[Question], path: Path, folder: Path, console: Console) -> Results:
    """Score a prediction file, and compare it with `against` where that is given. folder: keeps extracted answers."""
    bootstrap = {"num_samples": config.bootstrap_samples, "seed": config.seed}
    ids, extracted_by = [question.id for question in questions], ""

    def evaluated(file: Path, kept: str) -> Evaluation:
        nonlocal extracted_by
        predictions, extracted = placed(load_predictions(file), ids), None
        if config.extractor.url:
            is_judge = PROTOCOLS[config.protocol].is_judged
            kept_in = folder / (f"judged_{kept}" if is_judge else kept)
            found = extract_answers(questions, predictions, config.extractor, kept_in, console, is_judge=is_judge)
            instructions = JUDGE_INSTRUCTIONS if is_judge else INSTRUCTIONS
            extracted, extracted_by = found.by_id, f"{found.model}, instructions {version_of(instructions)}"
        scorers = extra_scorers(config.protocol, config.metrics, extracted)
        return evaluate_predictions(questions, predictions, **bootstrap, scorers=scorers)

    for column in unread_columns(config.protocol, questions):
        console.warning(
            f"protocol={config.protocol} chooses its rule by the column {column!r}, which no row has: all are scored "
            "by the rule for texts or numbers, which is not the benchmark's"
        )
    evaluation, other, differences = evaluated(path, "extracted.jsonl"), None, None
    facts = [("predictions", str(path)), ("benchmark", config.benchmark), ("topk", str(config.topk or "all"))]
    facts.append(("question hash", fingerprint_of(questions)))
    facts += protocol_facts(config, path, extracted_by)
    if config.against:
        require_same_settings(path, Path(config.against), mixed=config.mixed)
        other = evaluated(Path(config.against), "extracted_against.jsonl")
        differences = compare_evaluations(evaluation, other, num_permutations=config.permutations, **bootstrap)
        facts.append(("against", config.against))
    title = f"{Path(config.benchmark).stem}: {subject_of(config)}"
    return Results(title, facts, evaluation, differences, other, worst_cases(evaluation, other, config.worst_cases))


def protocol_facts(config: EvaluateConfig, path: Path, extracted_by: str = "") -> list[tuple[str, str]]:
    """Return what a score depends on, for results.json and the page: rule, prompt, pages, pixels and decoding."""
    chosen = PROTOCOLS.get(config.protocol)
    facts = [("protocol", f"{chosen.name} {chosen.version} ({chosen.source})")] if chosen else []
    how = "paper: first <answer>; else the last <answer> after the reasoning"
    how += f"; protocol: {extracted_by}" if extracted_by else ""
    facts.append(("extractor", how))
    settings = settings_of(path)
    if not settings:
        return [*facts, ("settings", "unknown: a file of predictions without settings.json beside it")]
    inputs, rollout = settings.get("inputs", {}), settings.get("rollout", {})
    decoding = ("temperature", "top_p", "top_k", "max_response_tokens")
    return [
        *facts,
        ("model", str(settings.get("model", {}).get("path") or settings.get("endpoint_model") or "unknown")),
        ("prompt hash", fingerprint(PromptConfig(**settings.get("prompt", {})))),
        ("pages", f"at most {inputs.get('max_images')}, topk {settings.get('topk') or 'all'}"),
        ("pixels", f"{inputs.get('min_pixels')} to {inputs.get('max_pixels')} a page"),
        ("decoding", ", ".join(f"{name} {rollout.get(name)}" for name in decoding)),
    ]


def settings_of(predictions: Path) -> dict[str, Any]:
    """Return the settings that lie beside a prediction file of ours; {} for any other file; InputError if damaged."""
    path = predictions.with_name(SETTINGS_FILE)
    return json_object(path.read_bytes(), f"{path} is damaged") if path.is_file() else {}


def require_same_settings(path: Path, against: Path, *, mixed: bool) -> None:
    """Refuse to put answers that were predicted with different settings into one table.

    Raises:
        ConfigError: prompt, pages, pixels or decoding differ, and `mixed` does not allow it.
    """
    one, other = settings_of(path), settings_of(against)
    differ = [name for name in ("benchmark", "topk", "prompt", "inputs", "rollout") if one.get(name) != other.get(name)]
    require(
        mixed or not (one and other and differ),
        f"{path} and {against} were predicted with different settings ({', '.join(differ)}), so their difference is "
        "not of the models alone. Predict one of them again, or set mixed=true.",
    )


def folder_name(config: EvaluateConfig) -> str:
    """Return the evaluation's folder: its name, or one made from benchmark and model (a sweep adds its own part)."""
    if config.name and not config.name.startswith("-"):
        return config.name
    made = f"{Path(config.benchmark).stem}-{subject_of(config)}-top{config.topk or 'all'}"
    return re.sub(r"[^\w.=,+-]+", "_", made) + config.name


def subject_of(config: EvaluateConfig) -> str:
    """Return what is evaluated: a file of predictions, or a model by the part of its path that tells it apart."""
    if config.predictions:
        path = Path(config.predictions)
        return f"{path.parent.name}/{path.stem}" if path.name == PREDICTIONS_FILE else path.stem
    model = config.endpoint.model or config.model.path if config.endpoint.url else config.model.path
    parts = [part for part in Path(model or "endpoint").parts if part not in ("export", "/")]
    return parts[-1] if parts else "model"


def prediction_settings(config: EvaluateConfig) -> dict[str, Any]:
    """Return the settings that decide what is predicted."""
    kept = dataclasses.asdict(config)
    names = ("topk", "seed", "model", "prompt", "inputs", "rollout")
    settings = {name: kept[name] for name in names} | {"benchmark": config.benchmark}
    for irrelevant in ("max_batch_sequences", "num_threads", "device", "vllm", "script"):
        settings["rollout"].pop(irrelevant)
    if not config.rollout.turns.environment:
        settings["rollout"].pop("turns")
    if config.endpoint.url:
        settings["model"], settings["endpoint_model"] = {}, config.endpoint.model
        settings["rollout"].pop("engine")
    return settings


def keep_settings(path: Path, settings: dict[str, Any]) -> None:
    """Write the settings of a folder that has no predictions yet.

    Raises:
        ConfigError: it has some, which were made with other settings.
        InputError: the settings there are damaged.
    """
    predictions = path.with_name(PREDICTIONS_FILE)
    if path.is_file() and predictions.is_file() and predictions.stat().st_size:
        before = json_object(path.read_bytes(), f"{path} is damaged")
        changed = [
            f"{name}={value!r}, was {before.get(name)!r}"
            for name, value in settings.items()
            if value != before.get(name)
        ]
        require(
            not changed,
            f"{path.parent} holds predictions made with other settings ({'; '.join(changed)}). Set another name, or "
            "remove the folder.",
        )
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(settings, indent=2) + "\n")


def require_pages(questions: Sequence[Question], image_dir: str) -> None:
    """Raise InputError, which lists the first of them, if page files are missing."""
    paths = {source for question in questions for source in question.images if isinstance(source, str)}
    missing = sorted(path for path in paths if not os.path.isfile(path))
    if missing:
        raise InputError(
            f"{len(missing)} of {len(paths)} pages are missing:\n{listed(missing)}\n"
            f"Unpack the benchmark's images beside its rows, or set image_dir (now {image_dir!r})."
        )


def spell_out(arguments: Sequence[str]) -> list[str]:
    """Read `model=PATH` as `model.path=PATH` where PATH is not an option of the group; a prompt unsets `own_prompt`."""
    if any(argument.startswith(("prompt=", "prompt.")) for argument in arguments):
        arguments = [*arguments, "own_prompt=false"]
    options = "|".join(map(re.escape, cli.groups(EvaluateConfig, "evaluate")["model"]))
    return [re.sub(rf"^model=(?!(?:{options})$)", "model.path=", argument) for argument in arguments]


if __name__ == "__main__":
    sys.argv[1:] = spell_out(sys.argv[1:])
    cli.run(evaluate, EvaluateConfig, "evaluate")
