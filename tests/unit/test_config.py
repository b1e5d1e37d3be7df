"""Recipes: unknown keys name the nearest one, missing keys and bad values name the field."""

import shlex
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest

from draftwing.cli import build_parser, train
from draftwing.config import Eagle1Stage, Eagle3Stage, MedusaStage, Objective, TrainConfig, from_mapping, read_recipe
from draftwing.drafts.kinds import head_objectives

VALID = {"objective": "eagle3", "output": "out", "target": "tiny"}


ROOT = Path(__file__).parents[2]


def test_the_examples_of_train_are_commands_that_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for line in train.EXAMPLES.splitlines()[1:]:
        words = shlex.split(line, comments=True)
        options = build_parser().parse_args(words[words.index("draftwing") + 1 :])
        assert read_recipe(options.recipe, options.set)


def recipe(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_are_filled_in() -> None:
    config = from_mapping(TrainConfig, VALID)
    assert (config.objective, config.target, config.ttt_steps, config.ttt_decay) == ("eagle3", "tiny", 7, 0.8)


def test_lists_of_layers_become_tuples() -> None:
    assert from_mapping(TrainConfig, VALID | {"aux_layers": [1, 3, 5]}).aux_layers == (1, 3, 5)


def test_data_is_one_source_or_several() -> None:
    assert from_mapping(TrainConfig, VALID | {"data": "a.jsonl"}).data == "a.jsonl"
    assert from_mapping(TrainConfig, VALID | {"data": ["a.jsonl", "hub:org/b"]}).data == ("a.jsonl", "hub:org/b")


@pytest.mark.parametrize("data", [5, [], ["a.jsonl", 5], {"a": 1}])
def test_other_data_is_refused(data: object) -> None:
    with pytest.raises(ValueError, match=r"^data: expected a name or a list of names"):
        from_mapping(TrainConfig, VALID | {"data": data})


def test_an_unknown_key_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"^learning_rat: unknown key; did you mean 'learning_rate'"):
        from_mapping(TrainConfig, VALID | {"learning_rat": 1.0})


def test_a_misspelt_list_of_stages_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^stage: unknown key; did you mean 'stages'"):
        read_recipe(recipe(tmp_path, "stage: [{objective: eagle3, output: out, target: tiny}]"))


def test_no_stages_are_nothing_to_train(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^stages: empty; .*recipe\.yaml has nothing to train"):
        read_recipe(recipe(tmp_path, "stages: []"))


def test_null_is_no_list() -> None:
    with pytest.raises(ValueError, match=r"^aux_layers: expected a list of int, got None; an empty one is \[\]"):
        from_mapping(TrainConfig, VALID | {"aux_layers": None})


def test_an_unknown_key_near_nothing_lists_them_all() -> None:
    with pytest.raises(ValueError, match=r"^zzz: unknown key; known: objective, output, .*ttt_steps"):
        from_mapping(TrainConfig, VALID | {"zzz": 1})


@pytest.mark.parametrize("key", ["objective", "output"])
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(ValueError, match=f"^{key}: missing"):
        from_mapping(TrainConfig, {name: value for name, value in VALID.items() if name != key})


@pytest.mark.parametrize("objective", ["eagle1", "eagle3"])
def test_a_head_needs_a_target(objective: str) -> None:
    with pytest.raises(ValueError, match=f"^target: {objective} needs the model"):
        from_mapping(TrainConfig, {"objective": objective, "output": "out"})


def test_a_language_model_needs_no_target() -> None:
    assert from_mapping(TrainConfig, {"objective": "language_model", "output": "out"}).target == ""


@pytest.mark.parametrize(
    "key", ["sequence_length", "batch_size", "max_steps", "ttt_steps", "feature_steps", "medusa_heads", "log_every"]
)
def test_counts_are_at_least_1(key: str) -> None:
    with pytest.raises(ValueError, match=f"^{key}: expected at least 1, got 0"):
        from_mapping(TrainConfig, VALID | {key: 0})


def test_an_unknown_objective_names_the_known() -> None:
    with pytest.raises(
        ValueError, match=r"objective: expected one of language_model, .*, eagle3, medusa, got 'eagle2'"
    ):
        from_mapping(TrainConfig, VALID | {"objective": "eagle2"})


def test_an_unknown_loss_names_the_known() -> None:
    with pytest.raises(ValueError, match=r"^loss: expected one of kl, cross_entropy, lk, got 'mse'"):
        from_mapping(TrainConfig, VALID | {"loss": "mse"})


def test_lk_decay_is_not_negative() -> None:
    with pytest.raises(ValueError, match=r"^lk_decay: expected at least 0, got -1.0"):
        from_mapping(TrainConfig, VALID | {"lk_decay": -1})


def test_as_dict_reads_back() -> None:
    config = from_mapping(TrainConfig, VALID | {"aux_layers": [1, 2, 3], "architecture": {"hidden_size": 8}})
    assert from_mapping(TrainConfig, config.as_dict()) == config


def test_a_key_of_another_objective_is_checked_and_left() -> None:
    assert from_mapping(TrainConfig, VALID | {"medusa_heads": 2}).ttt_steps == 7
    with pytest.raises(ValueError, match=r"^medusa_heads: expected at least 1, got 0"):
        from_mapping(TrainConfig, VALID | {"medusa_heads": 0})


def test_an_objective_has_its_own_keys_and_the_common_ones_alone() -> None:
    """What a stage of one class is given is all that its objective can read; a recipe has the keys of all."""
    keys = {kind: {field.name for field in fields(kind)} for kind in (Eagle1Stage, Eagle3Stage, MedusaStage)}
    assert keys[MedusaStage] - keys[Eagle3Stage] == {"medusa_heads"}
    assert keys[Eagle1Stage] - keys[Eagle3Stage] == {"feature_steps", "feature_noise", "token_loss_weight"}
    assert keys[Eagle3Stage] - keys[Eagle1Stage] == {"draft_vocab_size"}
    assert set().union(*keys.values()) < {field.name for field in fields(TrainConfig)}


def test_every_objective_that_trains_a_head_is_listed() -> None:
    assert {*get_args(Objective)} - {"language_model", "self_generated"} == {*head_objectives()}


class TestRecipe:
    def test_one_stage(self, tmp_path: Path) -> None:
        path = recipe(tmp_path, "objective: eagle3\noutput: out\ntarget: tiny\nlearning_rate: 5.0e-4\n")
        assert [(stage.objective, stage.learning_rate) for stage in read_recipe(path)] == [("eagle3", 5e-4)]

    def test_stages_keep_their_order(self, tmp_path: Path) -> None:
        text = "stages:\n- {objective: language_model, output: a}\n- {objective: eagle1, output: b, target: a}\n"
        assert [stage.output for stage in read_recipe(recipe(tmp_path, text))] == ["a", "b"]

    @pytest.mark.parametrize("text", ["", "just words", "- a\n- b"])
    def test_anything_else_is_refused(self, tmp_path: Path, text: str) -> None:
        with pytest.raises(ValueError, match="expected a mapping of keys to values"):
            read_recipe(recipe(tmp_path, text))

    def test_keys_beside_stages_are_not_ignored(self, tmp_path: Path) -> None:
        text = "stages:\n- {objective: language_model, output: a}\nlearning_rate: 0.5\n"
        with pytest.raises(ValueError, match="learning_rate"):
            read_recipe(recipe(tmp_path, text))

    def test_a_number_written_without_a_dot_is_not_taken_as_text(self, tmp_path: Path) -> None:
        path = recipe(tmp_path, "objective: eagle3\noutput: out\ntarget: tiny\nlearning_rate: 1e-3\n")
        try:
            (stage,) = read_recipe(path)
        except ValueError as error:
            assert "learning_rate" in str(error)  # refusing it by name would do as well
        else:
            assert stage.learning_rate == 1e-3


class TestOverrides:
    TEXT = "stages:\n- {objective: language_model, output: a}\n- {objective: eagle3, output: b, target: a}\n"

    def test_they_hold_for_every_stage_and_are_typed_like_yaml(self, tmp_path: Path) -> None:
        overrides = ["learning_rate=1e-4", "aux_layers=[1, 2, 3]", "report_to=tensorboard", "target=x=y", "bf16=false"]
        for stage in read_recipe(recipe(tmp_path, self.TEXT), overrides):
            assert (stage.learning_rate, stage.aux_layers, stage.bf16) == (1e-4, (1, 2, 3), False)
            assert (stage.report_to, stage.target) == (("tensorboard",), "x=y")

    def test_they_reach_into_the_architecture(self, tmp_path: Path) -> None:
        text = "{objective: eagle3, output: b, target: a, architecture: {fc_norm: true}}"
        (stage,) = read_recipe(recipe(tmp_path, text), ["architecture.hidden_size=64"])
        assert stage.architecture == {"fc_norm": True, "hidden_size": 64}

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("learning_rate", "set: expected KEY=VALUE, got 'learning_rate'"),
            ("learnin_rate=1", "learnin_rate: unknown key; did you mean 'learning_rate'"),
            ("batch_size=2.5", "batch_size: expected int, got 2.5"),
            ("batch_size=[", "set: '\\[', given for batch_size, is no YAML value"),
            ("data.path=x", "data.path: unknown key; only architecture has keys inside"),
        ],
    )
    def test_mistakes_are_named(self, tmp_path: Path, override: str, message: str) -> None:
        with pytest.raises(ValueError, match=f"^{message}"):
            read_recipe(recipe(tmp_path, self.TEXT), [override])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"parallel": "fsdp"}, "parallel: expected one of ddp, fsdp2, got 'fsdp'"),
        ({"schedule": "steps"}, "schedule: expected one of cosine, linear, got 'steps'"),
        ({"report_to": ["wandb", "excel"]}, "report_to: expected some of tensorboard, wandb, mlflow, got 'excel'"),
        ({"init_from": "head", "architecture": {"fc_norm": True}}, "architecture: the head of init_from has its own"),
        ({"decode_prompts": 2, "device_map": "auto"}, "decode_prompts: a target that device_map splits cannot decode"),
        ({"objective": "language_model", "parallel": "fsdp2"}, "parallel: a language_model is trained with ddp"),
        (
            {"objective": "language_model", "architecture": {"vocab_size": 9}},
            "architecture.vocab_size: a language_model has its tokenizer's",
        ),
        ({1: 2}, "1: unknown key"),
        ({"accumulation_steps": 0}, "accumulation_steps: expected at least 1, got 0"),
        ({"max_rows": -1}, "max_rows: expected at least 1, got -1"),
        ({"max_rows": "all"}, "max_rows: expected int, got 'all'"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected at least 1, got 0"),
        ({"evaluate_rows": 0}, "evaluate_rows: expected at least 1, got 0"),
        ({"learning_rate": float("nan")}, "learning_rate: expected at least 0, got nan"),
        ({"temperatures": []}, r"temperatures: expected some numbers of at least 0, got \[\]"),
        ({"temperatures": ["hot"]}, "temperatures: expected float, got 'hot'"),
        ({"aux_layers": "low"}, "aux_layers: expected int, got 'low'"),
        ({"architecture": ["fc_norm"]}, "architecture: expected a mapping of keys to values"),
        ({"keep_checkpoints": 0}, "keep_checkpoints: expected at least 1, got 0"),
    ],
)
def test_settings_that_do_not_go_together(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        from_mapping(TrainConfig, VALID | values)


def test_a_single_value_stands_for_a_list() -> None:
    config = from_mapping(TrainConfig, VALID | {"aux_layers": 3, "temperatures": 1, "report_to": "wandb"})
    assert (config.aux_layers, config.temperatures, config.report_to) == ((3,), (1.0,), ("wandb",))
