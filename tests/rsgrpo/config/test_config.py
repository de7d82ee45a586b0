"""What a user may write on the command line and in yaml, and what is said about mistakes."""

from __future__ import annotations

import dataclasses

import pytest
from hydra.errors import HydraException

from recipes.retrieval.training.config import RetrieverConfig
from rsgrpo import cli
from rsgrpo.config.checks import validate, validate_sft
from rsgrpo.config.renamed import RENAMED
from rsgrpo.config.train import AlgorithmConfig, SftConfig, TrainConfig
from rsgrpo.errors import RsgrpoError
from tests.material import ROOT

TRAIN_RECIPES = cli.groups(TrainConfig)["recipe"]
SFT_RECIPES = cli.groups(SftConfig, "sft")["recipe"]
CHOICES = [
    f"{group}={option}" for group, options in cli.groups(TrainConfig).items() if group != "recipe" for option in options
]


def train_config(*overrides: str) -> TrainConfig:
    return cli.compose(TrainConfig, "config", ["recipe=demo", *overrides])


def message_of(*overrides: str) -> str:
    """What the user would read."""
    try:
        validate(train_config(*overrides))
    except (RsgrpoError, HydraException, ValueError) as error:
        return cli.explain(error, TrainConfig)
    raise AssertionError(f"{overrides} were accepted")


# Recipes and groups


@pytest.mark.parametrize("recipe", TRAIN_RECIPES)
def test_every_training_recipe_composes_and_is_possible(recipe):
    validate(cli.compose(TrainConfig, "config", [f"recipe={recipe}"]))


@pytest.mark.parametrize("recipe", SFT_RECIPES)
def test_every_supervised_recipe_composes_and_is_possible(recipe):
    validate_sft(cli.compose(SftConfig, "sft", [f"recipe={recipe}"]))


@pytest.mark.parametrize("recipe", cli.groups(RetrieverConfig, "train_retriever")["recipe"])
def test_every_recipe_of_the_retriever_composes(recipe):
    assert cli.compose(RetrieverConfig, "train_retriever", [f"recipe={recipe}"])


@pytest.mark.parametrize("choice", CHOICES)
def test_every_group_option_composes_with_a_recipe(choice):
    needed = ["rollout=hf"] if choice == "cluster=inline" else []  # one process has no room for vLLM's own
    overrides = ["recipe=evisrag_7b_lora", choice, *needed, "data.train=a.jsonl", "data.val=b.jsonl"]
    validate(cli.compose(TrainConfig, "config", overrides))


def test_every_yaml_file_is_a_config_a_recipe_or_an_option():
    known = {f"{group}/{option}" for group, options in cli.groups(TrainConfig).items() for option in options}
    known |= {"config", *(f"sft/recipe/{recipe}" for recipe in SFT_RECIPES)}
    for program in ("sft", "evaluate", "train_retriever"):  # the recipes of evaluate are parsed in test_evaluate.py
        recipes = (ROOT / f"conf/{program}/recipe").glob("*.yaml")
        known |= {f"{program}/config", *(f"{program}/recipe/{path.stem}" for path in recipes)}
    files = {str(path.relative_to(ROOT / "conf").with_suffix("")) for path in (ROOT / "conf").rglob("*.yaml")}
    assert known == {name.replace("model/recipe/", "recipe/") for name in files}


def test_recipes_of_models_have_the_names_of_all_others_and_a_users_search_path_does_not_hide_them(tmp_path):
    in_folder = {path.stem for path in (ROOT / "conf/model/recipe").glob("*.yaml")}
    assert {"qwen3_vl_4b", "qwen3_5_9b", "internvl3_8b", "glm_4_1v_9b", "qwen3_vl_30b_a3b"} < in_folder
    assert in_folder < set(TRAIN_RECIPES)
    assert in_folder == {path.stem for path in (ROOT / "conf/sft/model/recipe").glob("*.yaml")} < set(SFT_RECIPES)
    (tmp_path / "recipe").mkdir()
    mine = "# @package _global_\ndefaults:\n  - qwen3_5_9b\nname: mine\n"
    (tmp_path / "recipe" / "mine.yaml").write_text(mine)
    for config_name, schema in (("config", TrainConfig), ("sft", SftConfig)):
        where = f"hydra.searchpath=[file://{tmp_path}, pkg://conf]"
        config = cli.compose(schema, config_name, [where, "recipe=mine"])
        assert (config.name, config.model.path) == ("mine", "Qwen/Qwen3.5-9B")


def test_the_reference_recipe_has_the_published_hyper_parameters():
    config = cli.compose(TrainConfig, "config", ["recipe=evisrag_7b"])
    assert config.model.path == "Qwen/Qwen2.5-VL-7B-Instruct"
    assert config.model.freeze_vision
    assert (config.rollout.group_size, config.rollout.temperature, config.rollout.top_p) == (8, 1.0, 1.0)
    assert (config.algorithm.prompts_per_step, config.algorithm.updates_per_step) == (32, 1)
    assert (config.inputs.max_prompt_tokens, config.rollout.max_response_tokens) == (15_000, 1_536)
    assert (config.inputs.max_images, config.inputs.min_pixels, config.inputs.max_pixels) == (5, 262_144, 1_568_000)
    assert (config.learner.lr, config.learner.lr_schedule, config.learner.betas) == (1e-6, "constant", (0.9, 0.999))
    assert (config.learner.weight_decay, config.learner.max_grad_norm, config.algorithm.kl_coef) == (0.01, 1.0, 0.0)
    filter_ = config.algorithm.filter
    assert (filter_.enabled, filter_.low, filter_.high, filter_.max_tries) == (True, 0.01, 6.9, 20)
    assert filter_.weights == {"accuracy": 3.0, "evidence": 3.0}
    validation = config.validation
    assert (validation.every, validation.temperature, validation.top_p) == (10, 0.1, 0.95)
    assert list(config.rewards) == [
        "accuracy", "evidence", "well_formed", "overlong", "no_early_index", "think_differs",
    ]  # fmt: skip
    assert config.reward_weights == {}


def test_the_reference_warm_start_has_the_published_hyper_parameters():
    config = cli.compose(SftConfig, "sft", ["recipe=evisrag_7b"])
    assert (config.learner.lr, config.learner.lr_schedule, config.learner.warmup_steps) == (5e-7, "cosine", 200)
    assert (config.epochs, config.batch_size, config.inputs.max_pixels) == (1, 64, 3_920_000)
    assert config.inputs.max_prompt_tokens + config.max_response_tokens == 32_000
    assert config.model.freeze_vision


def test_the_demo_takes_causal_credit_and_evisrag_the_published_one():
    assert train_config().algorithm.credit == "causal"
    for recipe in ("evisrag_7b", "evisrag_3b_lora", "evisrag_mini"):
        assert cli.compose(TrainConfig, "config", [f"recipe={recipe}"]).algorithm.credit == "own"


def test_ablations_are_one_override():
    assert train_config("algorithm=grpo").algorithm.advantage == "grpo"
    assert train_config("algorithm=gspo").algorithm.ratio == "gspo"
    assert train_config("algorithm.missing_marker=widen").algorithm.missing_marker == "widen"
    assert "evidence" not in train_config("rewards=evisrag_no_perception").rewards
    assert list(train_config("rewards=paper").rewards) == ["accuracy", "perception", "well_formed"]


# Maps


@pytest.mark.parametrize("plus", ["+", ""])
def test_a_reward_is_added_with_and_without_a_plus(plus):
    config = train_config(f"{plus}rewards.cites_page=mine:cites_page", f"{plus}reward_weights.cites_page=0.5")
    assert config.rewards["cites_page"] == "mine:cites_page"
    assert config.rewards["accuracy"] == "rewards.evisrag:accuracy"
    assert config.reward_weights == {"cites_page": 0.5}


def test_entries_of_maps_are_removed_replaced_and_nested():
    config = train_config(
        "~rewards.overlong", "rewards.accuracy=mine:accuracy", "reward_args.accuracy.words=[a,b]",
        "reward_args.accuracy.limits={low: 1, high: 2.5}", "algorithm.filter.weights.evidence=2",
    )  # fmt: skip
    assert "overlong" not in config.rewards
    assert config.rewards["accuracy"] == "mine:accuracy"
    assert config.reward_args["accuracy"] == {"words": ["a", "b"], "limits": {"low": 1, "high": 2.5}}
    assert config.algorithm.filter.weights["evidence"] == 2.0


def test_a_whole_map_sets_its_entries_and_keeps_the_others():
    config = train_config(
        "reward_args={accuracy: {words: [a, 'b, c'], limits: {low: 1, high: 2.5e-3}}}", "+rewards={mine: 'my:own'}",
        "rollout.turns={max_turns: 3, arguments: {store: \"a 'b'\", deep: {on: true, none: null}}}",
        "rollout.turns.arguments.k=4",
    )  # fmt: skip
    assert config.reward_args["accuracy"] == {"words": ["a", "b, c"], "limits": {"low": 1, "high": 2.5e-3}}
    assert config.rewards["mine"] == "my:own"
    assert "accuracy" in config.rewards
    turns = config.rollout.turns
    assert turns.arguments == {"store": "a 'b'", "deep": {"on": True, "none": None}, "k": 4}
    assert turns.max_turns == 3


# The object


def test_the_configuration_is_frozen():
    config = train_config()
    for part, key in ((config, "seed"), (config.learner, "lr"), (config.rollout, "group_size")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, key, 1)


def test_values_have_their_declared_types():
    config = train_config("learner.betas=[0,0.5]", "cluster.cpus.rollout=1")
    assert config.learner.betas == (0.0, 0.5)
    assert type(config.cluster.cpus["rollout"]) is float


# Messages


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["rollout.group_sise=4"], ["rollout.group_sise", "did you mean rollout.group_size?"]),
        (["group_size=4"], ["group_size", "did you mean rollout.group_size?"]),
        (["+learner.lrr=4"], ["learner.lrr", "did you mean learner.lr?"]),
        (["rolout=hf"], ["rolout", "did you mean rollout?"]),
        (["recipe=dmeo"], ["recipe=dmeo", "did you mean demo?", "evisrag_7b"]),
        (["algorithm=grop"], ["algorithm=grop", "did you mean grpo?"]),
        (["rollout.group_size=many"], ["rollout.group_size", "'many'", "must be a whole number"]),
        (["seed=1.5"], ["seed", "'1.5'", "must be a whole number"]),
        (["learner.lr="], ["learner.lr", "must be a number such as 1e-5"]),
        (["rewards=3"], ["int"]),
        (["learner.lr=[1"], ["learner.lr=[1", "key=value"]),
        (["learner.lr"], ["'learner.lr'", "key=value"]),
        (["~learner.lr"], ["learner.lr cannot be removed"]),
        (["algorithm.advantage=per_rewards"], ["'per_rewards'", "did you mean per_reward?", "rloo"]),
        (["rollout.engine=hg"], ["'hg'", "vllm"]),
        (["learner.betas=[0.9]"], ["learner.betas", "[0.9]"]),
        (["name=a/b"], ["name", "'a/b'"]),
        (["rewards.x=mine"], ["rewards.x", "module:function", "'mine'"]),
        (["algorithm.dual_clip=0.5"], ["algorithm.dual_clip must be 0 (off) or > 1, got 0.5"]),
        (["learner.lr=0"], ["learner.lr must be > 0, got 0"]),
        (["rollout.vllm.sleep_level=3"], ["rollout.vllm.sleep_level must be one of 0, 1, 2; got 3"]),
        (["inputs.min_pixels=9000000"], ["inputs.min_pixels must be <= inputs.max_pixels (50176), got 9000000"]),
        (["data.columns.promt=text"], ["data.columns.promt", "did you mean prompt?"]),
        (["rollout.vllm.engine_args.dtype=half"], ["rollout.vllm.engine_args.dtype", "Set rollout.dtype instead"]),
        (["guards.rules.pages='monitor/a/mean >= 0.1'"], ["guards.rules={monitor/a/mean: {min: 0.1}}"]),
    ],
)
def test_a_mistake_is_named_with_what_would_work(overrides, said):
    message = message_of(*overrides)
    for part in said:
        assert part in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["rollout.group_size=1"], "rollout.group_size must be >= 2 to normalise within a group, got 1"),
        (["rollout.temperature=0"], "rollout.temperature must be > 0 in training"),
        (["rollout.top_p=0.9"], "rollout.top_p=0.9 cuts the sampling distribution"),
        (["rollout.top_k=50"], "rollout.top_k=50 cuts the sampling distribution"),
        (
            ["inputs.max_prompt_tokens=15000", "rollout.max_response_tokens=1536",
             "learner.max_tokens_per_micro_batch=4096"],
            "learner.max_tokens_per_micro_batch 4096 < 15000 + 1536 = 16536",
        ),
        (
            ["inputs.max_prompt_tokens=1000", "rollout.max_response_tokens=500", "rollout.turns.environment=mine:Pages",
             "rollout.turns.max_observation_tokens=700", "learner.max_tokens_per_micro_batch=2199"],
            "2199 < 1000 + 500 + 700 = 2200 (inputs.max_prompt_tokens + rollout.max_response_tokens + "
            "rollout.turns.max_observation_tokens)",
        ),
        (["algorithm.prompts_per_step=12", "algorithm.updates_per_step=5"], "12 = 5 x 2 + 2"),
        (["reward_weights.acuracy=1"], "reward_weights.acuracy: there is no reward 'acuracy'; did you mean accuracy?"),
        (["reward_weights.accuracy=0"], "reward_weights.accuracy must be > 0, got 0"),
        (["reward_args.acuracy.normalise=strict"], "there is no reward 'acuracy'; did you mean accuracy?"),
        (["reward_timeouts_s.nobody=1"], "reward_timeouts_s.nobody"),
        (["algorithm.filter.enabled=true", "algorithm.filter.weights.nobody=1"], "algorithm.filter.weights.nobody"),
        (["monitors.accuracy=mine:accuracy"], "monitors.accuracy"),
        (["checkpoint.metric=val/greedy/acuracy"], "did you mean val/greedy/accuracy?"),
        (["validation.greedy=false", "checkpoint.metric=val/greedy/accuracy"], "not measured"),
        (["validation.every=0", "checkpoint.metric=val/sampled/accuracy"], "checkpoint.keep_best=0"),
        (["model.path="], "model.path is empty"),
        (["data.train="], "data.train is empty"),
        (["data.val="], "validation.every=0 validation.at_start=false"),
        (["learner.offload=true"], "learner.offload=true"),
        (["learner.attention=flash"], "learner.attention=flash needs a GPU"),
        (["rollout=vllm", "rollout.vllm.in_flight=true"], "here: algorithm.max_staleness=0 samples nothing while"),
        (["rollout=vllm", "rollout.vllm.in_flight=true", "rollout.vllm.sleep_level=0",
          "algorithm.max_staleness=1", "model.freeze_vision=false"],
         "here: model.freeze_vision=false makes the features"),
        (["rollout=vllm", "rollout.vllm.in_flight=true", "rollout.vllm.sleep_level=0",
          "algorithm.max_staleness=1", "model.lora.rank=8"],
         "here: model.lora.rank > 0 takes the adapter away"),
        (["cluster.num_cpus=1", "rollout.num_workers=3"], "workers need 1.1 CPUs"),
        (["model.lora.rank=8", "model.freeze_vision=false"], "model.lora.rank=8 puts adapters on the language model"),
        (["algorithm.filter.low=7"], "low=7 must be < high=6.9"),
    ],
)  # fmt: skip
def test_an_impossible_combination_shows_its_arithmetic(overrides, said):
    assert said in message_of(*overrides)


def test_no_rewards_are_refused():
    names = train_config().rewards
    assert message_of(*[f"~rewards.{name}" for name in names]).startswith("rewards is empty")


def test_biased_sampling_can_be_forced_and_a_kl_loss_without_gradient_is_warned_about(caplog):
    validate(train_config("rollout.top_p=0.9", "rollout.allow_biased_sampling=true"))
    assert caplog.text == ""
    validate(train_config("algorithm.kl_coef=0.01", "algorithm.kl_estimator=k1"))
    assert "zero expected gradient" in caplog.text


# The program


@pytest.mark.parametrize("old", RENAMED)
def test_a_key_of_the_last_release_is_answered_with_its_new_name(old):
    known = set(cli.keys(TrainConfig))
    assert old not in known
    message = message_of(f"{old}=1")
    assert message == f"{old} {RENAMED[old]}"
    new = message.partition(" has a new name: ")[2]
    assert not new or new.rpartition(".")[0] in known


def test_rollouts_of_older_weights_are_corrected_for_unless_another_cap_is_set():
    assert AlgorithmConfig().importance_cap == 0
    assert AlgorithmConfig(max_staleness=3).importance_cap == 2
    assert AlgorithmConfig(max_staleness=1, importance_cap=5.0).importance_cap == 5
