"""`draftwing train --plan`: parameters are those of the networks, and every recipe plans from config.json alone."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import head_training, new_head, tiny_llama
from torch.utils.flop_counter import FlopCounterMode

import draftwing
from draftwing.cli import main
from draftwing.config import TrainConfig, read_recipe
from draftwing.drafts.eagle.network import DraftNetwork
from draftwing.target.load import read_target_config
from draftwing.target.model import TargetModel
from draftwing.training.estimates import StageEstimate, active_params, count_params, estimate_stages

RECIPES = Path(__file__).parents[3] / "recipes"
LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}
QWEN3_8B = LLAMA_8B | {
    "model_type": "qwen3",
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
}
QWEN3_30B = QWEN3_8B | {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
}
PUBLISHED = {
    "llama3.1-8b-eagle3": (LLAMA_8B, 8.03e9),
    "llama3.1-8b-eagle3.1": (LLAMA_8B, 8.03e9),
    "qwen3-8b-eagle3": (QWEN3_8B, 8.19e9),
    "qwen3-30b-a3b-eagle3": (QWEN3_30B, 30.53e9),
}
"""The targets' published shapes, and how many parameters their model cards name."""


@pytest.fixture(scope="module")
def target(stock_target: TargetModel) -> TargetModel:
    """Training reads its weights."""
    return stock_target


def config_folder(folder: Path, values: dict[str, Any]) -> str:
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    return str(folder)


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_plan_without_weights_or_network(tmp_path: Path, name: str) -> None:
    values, num_params = PUBLISHED[name]
    stages = read_recipe(RECIPES / f"{name}.yaml", [f"target={config_folder(tmp_path, values)}"])
    rows, head = estimate_stages(stages, num_processes=8, flops_per_second=4e14)
    assert (rows.objective, head.objective) == ("self_generated", "eagle3")
    assert head.target_params == pytest.approx(num_params, rel=2e-3)
    assert head.rows_per_step == 16
    assert 60 * 2**30 > head.memory["target"] > 14 * 2**30
    assert head.seconds is not None
    assert 1 < head.seconds / 3600 < 100
    assert rows.seconds is None


def test_a_mixture_of_experts_multiplies_what_it_chooses(tmp_path: Path) -> None:
    config = read_target_config(config_folder(tmp_path, QWEN3_30B))
    active = active_params(count_params(config), config)
    assert active + config.vocab_size * config.hidden_size == pytest.approx(3.35e9, rel=0.01)  # "A3B": 3.3 billion


def test_every_recipe_is_covered() -> None:
    assert {path.stem for path in RECIPES.glob("*.yaml")} == {*PUBLISHED, "tiny", "tiny_rivals", "smollm2"}


EMBEDDED = ["target=tiny", "teacher=tiny", "tokenizer=tiny"]


def test_medusa_heads_are_planned_and_the_model_that_learns_from_the_same_target() -> None:
    medusa, draft = estimate_stages(read_recipe(RECIPES / "tiny_rivals.yaml", EMBEDDED), 1, 1e11)
    assert medusa.trained_params == 4 * (4096 * 256 + 256 * 256 + 256)
    assert medusa.target_params > 8 * draft.trained_params > 0


def test_the_embedded_recipe_plans_before_anything_exists() -> None:
    """Its heads continue heads, for a target, that its earlier stages make."""
    plans = estimate_stages(read_recipe(RECIPES / "tiny.yaml"), num_processes=1, flops_per_second=1e11)
    assert plans[0].trained_params == plans[2].target_params
    *first, last = [plan.trained_params for plan in plans if plan.objective == "eagle3"]
    assert set(first) == {last - (3840 - 3072) * 256}, "the last one has a larger draft vocabulary"


@pytest.fixture
def plan(tmp_path: Path) -> StageEstimate:
    tiny_llama().config.save_pretrained(tmp_path)
    return estimate_stages([stage_for(tmp_path)], 1, 1e12)[0]


def stage_for(folder: Path, **changes: Any) -> TrainConfig:
    sizes: dict[str, Any] = {"draft_vocab_size": 48, "aux_layers": (1, 3, 5), "objective": "eagle3"}
    return TrainConfig(**sizes | {"output": "out", "target": str(folder)} | changes)


@pytest.mark.parametrize(
    ("objective", "trains"), [("eagle1", False), ("eagle1", True), ("eagle3", False), ("eagle3", True)]
)
def test_parameters_are_the_networks(
    tmp_path: Path, target: TargetModel, heads: dict[str, DraftNetwork], objective: str, trains: bool
) -> None:
    target.model.config.save_pretrained(tmp_path)
    plan = estimate_stages([stage_for(tmp_path, objective=objective, train_embedding=trains)], 1, 1e12)[0]
    size = sum(parameter.numel() for parameter in heads[objective].parameters())
    size += sum(parameter.numel() for parameter in target.embedding.parameters()) * trains
    assert (plan.trained_params, plan.frozen_params) == (size, 0)
    assert plan.target_params == sum(parameter.numel() for parameter in target.model.parameters())


def test_a_continued_head_keeps_its_shape(tmp_path: Path, plan: StageEstimate) -> None:
    more = {"init_from": "out", "aux_layers": ()}
    stages = [
        stage_for(tmp_path),
        stage_for(tmp_path, draft_vocab_size=None, **more),
        stage_for(tmp_path, draft_vocab_size=24, **more | {"output": "smaller"}),
        stage_for(tmp_path, draft_vocab_size=None, **more | {"train_embedding": True, "output": "embeds"}),
        stage_for(tmp_path, draft_vocab_size=None, **more | {"init_from": "embeds"}),
    ]
    _, same, smaller, embeds, keeps = estimate_stages(stages, 1, 1e12)
    assert (same.trained_params, same.memory, same.flops_per_step) == (
        plan.trained_params,
        plan.memory,
        plan.flops_per_step,
    )
    hidden_size = tiny_llama().config.hidden_size
    assert smaller.trained_params == plan.trained_params - 24 * hidden_size
    assert smaller.memory["logits"] < plan.memory["logits"]
    embedding = tiny_llama().get_input_embeddings().weight.numel()
    assert (embeds.trained_params, embeds.frozen_params) == (plan.trained_params + embedding, 0)
    assert (keeps.trained_params, keeps.frozen_params) == (plan.trained_params, embedding)


def test_so_does_one_in_a_file() -> None:
    stages = [TrainConfig("eagle3", "o", target="tiny", init_from="tiny", draft_vocab_size=n) for n in (None, 4096)]
    kept, whole = estimate_stages(stages, 1, 1e12)
    rows = json.loads((Path(draftwing.__file__).parent / "assets/tiny/eagle3/config.json").read_text(encoding="utf-8"))
    assert kept.trained_params == whole.trained_params - (4096 - rows["draft_vocab_size"]) * 256


def test_shards_divide_the_optimizer_and_steps_multiply_the_work(tmp_path: Path, plan: StageEstimate) -> None:
    sharded = estimate_stages([stage_for(tmp_path, parallel="fsdp2")], 4, 1e12)[0]
    assert sharded.memory["head: optimizer"] == plan.memory["head: optimizer"] // 4
    assert sharded.rows_per_step == 4 * plan.rows_per_step
    longer = estimate_stages([stage_for(tmp_path, accumulation_steps=3)], 1, 1e12)[0]
    assert longer.flops_per_step == 3 * plan.flops_per_step
    assert longer.memory == plan.memory


@pytest.mark.parametrize("objective", ["eagle1", "eagle3"])
def test_activations_are_what_autograd_keeps(tmp_path: Path, objective: str) -> None:
    """In bfloat16 autocast, a storage counted once, weights and their copies not at all; never less than there are."""
    sizes = {"hidden_size": 128, "intermediate_size": 448, "num_attention_heads": 8, "vocab_size": 256}
    model = tiny_llama(**sizes).bfloat16()
    model.config.save_pretrained(tmp_path)
    stage = stage_for(tmp_path, objective=objective, draft_vocab_size=None, batch_size=2, sequence_length=96)
    target = TargetModel(model)
    head = new_head(stage, target, []).float()
    weights = {p.numel() for p in [*head.parameters(), *model.parameters()] if p.dim() > 1}
    kept: dict[int, torch.Tensor] = {}
    training, ids = head_training(head, target, stage), torch.randint(1, 250, (2, 96))
    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(
            lambda x: kept.setdefault(x.untyped_storage().data_ptr(), x), lambda x: x
        ),
    ):
        training(ids, torch.ones_like(ids, dtype=torch.bool))
    measured = sum(x.untyped_storage().nbytes() for x in kept.values() if x.numel() not in weights)
    planned = estimate_stages([stage], 1, 1e12)[0].memory["activations"]
    assert 0.8 * planned < measured < planned


def test_targets_in_shards_and_buckets_of_gradients(tmp_path: Path, plan: StageEstimate) -> None:
    """DDP sums gradients in buckets as large as they are; of a target in shards two layers are whole at a time."""
    alone, *four = (
        estimate_stages([stage_for(tmp_path, **changes)], num_processes, 1e12)[0].memory
        for num_processes, changes in ((1, {}), (4, {}), (4, {"shard_target": True}))
    )
    assert alone == plan.memory
    assert [memory["head: gradients"] for memory in four] == [2 * alone["head: gradients"]] * 2
    layers = tiny_llama().model.layers
    size, one = sum(p.numel() for p in layers.parameters()), sum(p.numel() for p in layers[0].parameters())
    assert four[0]["target"] - four[1]["target"] == 2 * (size - size // 4 - 2 * one)


def test_products_are_those_that_torch_counts(tmp_path: Path, target: TargetModel, plan: StageEstimate) -> None:
    """Of the target's pass over one token; attention scores are a small part of it."""
    with FlopCounterMode(display=False) as counter:
        target.model(torch.zeros(1, 1, dtype=torch.int64), use_cache=False)
    assert 2 * plan.target_active_params == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_the_command_shows_and_prints_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = config_folder(tmp_path, QWEN3_8B)
    command = ["train", str(RECIPES / "qwen3-8b-eagle3.yaml"), "--plan", "--set", f"target={target}", "--tflops", "400"]
    assert main([*command, "--processes", "8"]) == 0
    shown = capsys.readouterr().out
    assert "8,190,735,360 parameters" in shown
    assert "Time assumes 400 TFLOP/s per process, as given" in shown
    assert main([*command, "--set", "bf16=false", "--set", "max_grad_norm=0"]) == 0
    shown = capsys.readouterr().out
    assert "bf16 False" in shown and "max_grad_norm 0.0" in shown, "what is switched off is said, too"
    assert main([*command, "--stage", "1", "--json"]) == 0
    (stage,) = json.loads(capsys.readouterr().out)["stages"]
    assert stage["memory_total"] == sum(stage["memory"].values())
    assert not (tmp_path / "build").exists()


def test_a_target_without_configuration_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    command = ["train", str(RECIPES / "qwen3-8b-eagle3.yaml"), "--plan", "--set", f"target={tmp_path / 'none'}"]
    assert main(command) == 2
    assert "target: cannot read the config of" in capsys.readouterr().err


def test_a_taught_model_needs_its_teacher_too() -> None:
    values = {
        "architecture": {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2},
        "vocab_size": 4096,
    }
    alone = TrainConfig("language_model", "out", **values)
    taught = dataclasses.replace(alone, vocab_size=7, tokenizer="tiny", teacher="tiny")
    plain, plan = (estimate_stages([stage], 1, 1e12)[0] for stage in (alone, taught))
    assert plan.trained_params == plain.trained_params == plain.target_params
    assert plan.target_params == sum(count_params(read_target_config("tiny")).values())
    assert plan.memory["target"] == 2 * plan.target_params
    assert plan.flops_per_step > plain.flops_per_step
