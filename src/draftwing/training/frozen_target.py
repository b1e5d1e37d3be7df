"""The frozen target of a training run: whole in every process, split over devices, or its layers sharded.

What heads read of it themselves, its embedding and its output head, is always whole on the process's own device.
"""

import os
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from accelerate.utils import align_module_device
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from draftwing.config import Stage
from draftwing.target.load import load_model, load_target
from draftwing.target.model import TargetModel
from draftwing.training.processes import current_device, num_processes, wait_for_others


def frozen_target(config: Stage, name: str) -> TargetModel:
    """The recipe's target or teacher `name`, in bfloat16 on a GPU if the recipe says so.

    Raises:
        ValueError: it cannot be loaded; `device_map` with several processes, `shard_target` with one.
    """
    device = current_device()
    dtype = torch.bfloat16 if device.type == "cuda" and config.bf16 else torch.float32
    if config.device_map:
        if num_processes() > 1:
            raise ValueError(
                "device_map: splits the target over the devices of one process; run without torchrun, or set "
                "shard_target=true instead"
            )
        return split_target(name, dtype, config.device_map, device)
    if config.shard_target:
        if num_processes() == 1:
            raise ValueError(
                "shard_target: shards over several processes; start them with `torchrun --nproc-per-node N -m "
                "draftwing train ...`, or set device_map=auto for one process with several GPUs"
            )
        return sharded_target(name, dtype, device)
    target = load_target(name, dtype, device)
    target.model.requires_grad_(False)
    return target


def split_target(name: str, dtype: torch.dtype, device_map: Any, device: torch.device) -> TargetModel:
    """A target whose layers accelerate puts on devices, or fetches from memory or disk where they run."""
    try:
        model = load_model(name, dtype, device_map=device_map).requires_grad_(False)
    except (ValueError, RuntimeError) as error:
        problem = str(error) if str(error).startswith("target:") else f"device_map: {error}"
        raise ValueError(problem) from error
    embedding, output_head = model.get_input_embeddings(), model.get_output_embeddings()
    keep_on(device, embedding, weights_of(embedding, device))
    is_tied = model.config.get_text_config().tie_word_embeddings
    keep_on(device, output_head, dict(embedding.named_parameters()) if is_tied else weights_of(output_head, device))
    return TargetModel(model)


def weights_of(module: nn.Module, device: torch.device) -> dict[str, nn.Parameter]:
    """A module's parameters on a device; those that accelerate has put away are fetched."""
    with align_module_device(module, device):
        weights = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    return {name: nn.Parameter(weight, requires_grad=False) for name, weight in weights.items()}


def keep_on(device: torch.device, module: nn.Module, weights: dict[str, nn.Parameter]) -> None:
    """Give a module weights that stay on a device; what it is given to read follows them there."""
    remove_hook_from_module(module)
    for name, weight in weights.items():
        setattr(module, name, weight)
    add_hook_to_module(module, AlignDevicesHook(execution_device=device))


def sharded_target(name: str, dtype: torch.dtype, device: torch.device) -> TargetModel:
    """A target of whose layers every process keeps a share; a layer is gathered while it runs (FSDP2).

    So all processes have to run it equally often, but each on rows of its own.
    """
    mesh = init_device_mesh(device.type, (num_processes(),))
    model, mistake = None, None
    for turn in range(num_processes()):  # one process of a machine after another, for it holds a whole model in memory
        if turn == int(os.environ["LOCAL_RANK"]):
            try:
                model = load_model(name, dtype).requires_grad_(False)
                shard_layers(model, mesh, device)
            except ValueError as error:  # every process makes it; none leaves while others wait for it
                mistake = error
        wait_for_others()
    if mistake is not None:
        raise mistake
    return TargetModel(model)


def shard_layers(model: Any, mesh: DeviceMesh, device: torch.device) -> None:
    """Leave this process its share of each decoder layer, and all of what is outside of them."""
    layers = [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]
    if not layers:
        raise ValueError(f"shard_target: transformers does not say what the layers of {type(model).__name__} are")
    in_layers = {id(parameter) for layer in layers for parameter in layer.parameters()}
    others = {parameter for parameter in model.parameters() if id(parameter) not in in_layers}
    for parameter in others:
        parameter.data = parameter.data.to(device)
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params=others)  # one root, so that the next layer is gathered ahead
