"""FSDP2: parameters, gradients and optimizer state of a network in pieces, one on each process.

torch's ``fully_shard`` itself and not accelerate's plugin, which (1.15) leaves CPU processes to DDP without
a word: so what is tested on CPUs is what runs on GPUs. Checkpoints hold whole tensors, as those of DDP do:
a run may be continued either way and with another number of processes.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def make_mesh(device: torch.device, processes: int) -> DeviceMesh:
    """All processes in one row."""
    return init_device_mesh(device.type, (processes,))


def shard(root: nn.Module, blocks: Iterable[nn.Module], mesh: DeviceMesh) -> None:
    """Cut ``root`` in place; each of ``blocks`` is gathered only while it runs.

    A forward pass has to go through ``root`` and through each of ``blocks`` themselves, not their insides.
    """
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(root, mesh=mesh)


def is_sharded(network: nn.Module) -> bool:
    """Whether ``shard`` has cut it."""
    return isinstance(network, FSDPModule)


def whole_tensor(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, on every process; others as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that lies on this process, without gradient; others as they are."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@contextlib.contextmanager
def whole(*networks: nn.Module | None) -> Iterator[None]:
    """Inside, the parameters of sharded networks are whole, on every process; others are left alone."""
    cut: list[Any] = [network for network in networks if isinstance(network, FSDPModule)]
    for network in cut:
        network.unshard()
    try:
        yield
    finally:
        for network in cut:
            network.reshard()


def gathered(state: Any) -> Any:
    """Nested dicts and lists with whole tensors in place of sharded ones. Called by all processes alike."""
    if isinstance(state, Tensor):
        return whole_tensor(state)
    if isinstance(state, dict):
        return {key: gathered(value) for key, value in state.items()}
    if isinstance(state, list):
        return [gathered(value) for value in state]
    return state


def exchange(
    optimizer: torch.optim.Optimizer,
    names: dict[nn.Parameter, str],
    pieces: dict[str, nn.Parameter],
) -> None:
    """Give an optimizer the pieces of its parameters, and of their state.

    names: its parameters before they were cut -> name. pieces: name -> parameter now.
    """
    state = optimizer.state_dict()
    for group in optimizer.param_groups:
        group["params"] = [pieces[names[parameter]] for parameter in group["params"]]
    optimizer.state.clear()
    load_optimizer(optimizer, state)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state of whole tensors into an optimizer whose parameters are sharded."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    pieces = {
        number: {name: piece_of(value, parameters[number]) for name, value in entry.items()}
        for number, entry in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": pieces})


def piece_of(value: Any, parameter: Tensor) -> Any:
    """A whole tensor as the parameter of the same shape lies; other values as they are."""
    if not (isinstance(value, Tensor) and isinstance(parameter, DTensor)):
        return value
    if value.shape != parameter.shape:
        return value
    # every process has the whole tensor, so nothing is sent
    return distribute_tensor(
        value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )
