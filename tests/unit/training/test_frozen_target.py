"""A frozen target in parts teaches what a whole one teaches; the parts that heads read are there, whole."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import head_training, new_head, tiny_llama

from draftwing.config import TrainConfig, from_mapping
from draftwing.target.model import TargetModel
from draftwing.training.frozen_target import frozen_target
from draftwing.training.stage import train_stage

AWAY = [*(f"model.layers.{layer}" for layer in range(1, 6)), "lm_head"]
HERE = ["model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.norm"]
ON_DISK = dict.fromkeys(HERE, "cpu") | dict.fromkeys(AWAY, "disk")
"""What accelerate comes to where the devices are full: the last layers are fetched from elsewhere as they run."""


def recipe(folder: Path, **changes: Any) -> TrainConfig:
    tiny_llama().float().save_pretrained(folder)
    values = {"objective": "eagle3", "output": "", "target": str(folder), "ttt_steps": 3, "aux_layers": [1, 3, 5]}
    return from_mapping(TrainConfig, values | changes)


def loss_and_gradients(config: TrainConfig, target: TargetModel) -> list[torch.Tensor]:
    torch.manual_seed(0)
    head = new_head(config, target, []).to(target.device)
    loss = head_training(head, target, config).eval()(torch.randint(1, 60, (2, 14)), torch.ones(2, 14).bool())["loss"]
    loss.backward()
    return [loss.detach(), *(p.grad for p in head.parameters() if p.grad is not None)]


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}, {"model": "disk", "lm_head": "cpu"}, ON_DISK])
@pytest.mark.parametrize("objective", ["eagle1", "eagle3"])
def test_split_over_devices_it_teaches_the_same(tmp_path: Path, objective: str, device_map: Any) -> None:
    config = recipe(tmp_path, objective=objective)
    whole = frozen_target(config, config.target)
    split = frozen_target(dataclasses.replace(config, device_map=device_map), config.target)
    num_away = sum(parameter.device.type == "meta" for parameter in split.model.parameters())
    assert (num_away > 40) == ("disk" in str(device_map)), "layers are away where they are meant to be"
    torch.testing.assert_close(loss_and_gradients(config, split), loss_and_gradients(config, whole), rtol=0, atol=0)
    for name in ("embedding", "output_head"):
        assert torch.equal(getattr(split, name).weight, getattr(whole, name).weight)


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    tiny_llama(tie_word_embeddings=True).float().save_pretrained(tmp_path)
    config = TrainConfig("eagle3", "", target=str(tmp_path), device_map=ON_DISK)
    split = frozen_target(config, config.target)
    assert split.output_head.weight is split.embedding.weight
    split.check_logits()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device_map": "automatic"}, "device_map: expected one of auto, balanced, balanced_low_0, sequential or a"),
        ({"device_map": 3}, "device_map: expected one of auto"),
        ({"device_map": {"model": "cpu", "lm_head": "nowhere"}}, "device_map: Expected one of cpu, cuda"),
        ({"shard_target": True}, "shard_target: shards over several processes; start them with `torchrun"),
        ({"shard_target": True, "device_map": "auto"}, "shard_target: is for several processes and device_map for one"),
        ({"shard_target": True, "decode_prompts": 2}, "decode_prompts: a target that shard_target splits cannot"),
        ({"device_map": "auto", "decode_prompts": 2}, "decode_prompts: a target that device_map splits cannot decode"),
        ({"device_map": "auto", "objective": "self_generated"}, "device_map: a target in parts cannot decode"),
        ({"shard_target": True, "objective": "language_model"}, "shard_target: a language_model without a teacher has"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        train_stage(recipe(tmp_path, **{"output": str(tmp_path / "out")} | changes))


def test_several_processes_do_not_split_over_the_same_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("draftwing.training.frozen_target.num_processes", lambda: 2)
    config = recipe(tmp_path, device_map="auto")
    with pytest.raises(ValueError, match=r"^device_map: .* run without torchrun, or set shard_target=true"):
        frozen_target(config, config.target)
