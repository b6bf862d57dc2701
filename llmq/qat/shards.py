"""Masters, gradients and moments split over processes, by torch's `fully_shard` (FSDP2).

A process keeps its rows of every parameter and gathers a block's while the block computes. They are
gathered in float32: what is quantized is the master, not a rounded copy of it. torch does this on
CPUs (gloo) as on GPUs (nccl), so what is tested on one is what runs on the other; accelerate's
plugin for it is not in effect on CPUs, and says nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.optim import Optimizer

from llmq.models.arch import find_blocks
from llmq.qat.student import Student

FOLDER = "shards"  # of a checkpoint


def shard(student: Student, blocks: Iterable[nn.Module], device: str) -> None:
    """Split a student over all processes in place, and the blocks of its teacher. blocks: those of
    the student. device: what kind of device they compute on."""
    mesh = init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    for block in blocks:
        block.register_forward_hook(_touch_all)
        fully_shard(block, mesh=mesh)
    fully_shard(student, mesh=mesh)
    register_fsdp_forward_method(student, "perplexity")
    for teacher in student.teachers:
        for block in find_blocks(teacher)[1]:
            # Nothing is above it that would gather it, so it has to be told to let go of its rows.
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
        teacher.to(torch.device(device).type)  # what is around them


def is_sharded(module: nn.Module) -> bool:
    """Whether a module's parameters lie in parts."""
    return isinstance(module, FSDPModule)


def _touch_all(block: nn.Module, args: Any, output: Any) -> Any:
    """Let every trained parameter of a block have a gradient, zero where none comes: experts that
    no token of this process chose. The processes add up what each has, one by one."""
    if not torch.is_grad_enabled():
        return output
    trained = [each.flatten()[0] for each in block.parameters() if each.requires_grad]
    nothing = 0 * torch.stack(trained).sum()
    if isinstance(output, Tensor):
        return output + nothing.to(output.dtype)
    return (output[0] + nothing.to(output[0].dtype), *output[1:])


def save_all(student: nn.Module, optimizer: Optimizer, folder: Path) -> None:
    """Each process writes its rows of the parameters and of the optimizer's state."""
    state = {
        "model": get_model_state_dict(student),
        "optimizer": get_optimizer_state_dict(student, optimizer),
    }
    save(state, checkpoint_id=folder / FOLDER)


def load_model(student: nn.Module, folder: Path) -> None:
    """Take the parameters of a checkpoint, of whatever number of processes."""
    state = {"model": get_model_state_dict(student)}
    load(state, checkpoint_id=folder / FOLDER)
    set_model_state_dict(student, state["model"])


def load_optimizer(student: nn.Module, optimizer: Optimizer, folder: Path) -> None:
    """Take the state of the optimizer of a checkpoint, of whatever number of processes."""
    state = {"optimizer": get_optimizer_state_dict(student, optimizer)}
    load(state, checkpoint_id=folder / FOLDER)
    set_optimizer_state_dict(student, optimizer, state["optimizer"])


def gathered(model: nn.Module) -> dict[str, Tensor]:
    """All parameters, whole and on the CPU, in the first process; nothing in the others."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: dict[str, Any] = get_model_state_dict(model, options=options)
    return state


def added_up(counts: Sequence[int], device: torch.device) -> list[int]:
    """Sums over all processes."""
    total = torch.tensor(counts, dtype=torch.int64, device=device)
    dist.all_reduce(total)
    found: list[int] = total.tolist()
    return found


def own_rows(n: int) -> slice:
    """The share of n rows that this process counts."""
    rank, size = dist.get_rank(), dist.get_world_size()
    return slice(rank * n // size, (rank + 1) * n // size)
