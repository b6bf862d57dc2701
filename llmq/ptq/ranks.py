"""Processes that quantize one model together, each with its share of the calibration text.

torchrun (or `accelerate launch`) starts them and ends all when one dies; torch.distributed carries
what they tell each other, over gloo: what travels is sums, packed weights and a few numbers. Every
process takes the same way through the program, so that whoever sends meets whoever waits."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from llmq.errors import LlmqError, LostProcessError
from llmq.messages import brief
from llmq.ptq.leaves import N_LEAVES
from llmq.storage.workspace import differences

T = TypeVar("T")
# The launcher ends processes whose neighbour died; what waits longer waits for a slow one.
PATIENCE = timedelta(hours=24)


@dataclass
class Traffic:
    """sent: bytes that a process has given to others, once for each that takes them."""

    sent: int = 0


@dataclass(frozen=True)
class Ranks:
    """The processes as one of them sees them: number `rank` of `size`."""

    rank: int = 0
    size: int = 1
    traffic: Traffic = field(default_factory=Traffic, compare=False)

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes and reports."""
        return self.rank == 0

    @property
    def are_many(self) -> bool:
        return self.size > 1

    def broadcast(self, value: T, source: int = 0) -> T:
        """The value that process `source` has."""
        if not self.are_many:
            return value
        own = _packed(value) if self.rank == source else torch.empty(0, dtype=torch.uint8)
        n_bytes = torch.tensor([len(own)])
        with self._meeting():
            dist.broadcast(n_bytes, source)
            if self.rank != source:
                own = torch.empty(int(n_bytes), dtype=torch.uint8)
            dist.broadcast(own, source)
        if self.rank == source:
            self.traffic.sent += len(own) * (self.size - 1)
            return value
        found: T = pickle.loads(own.numpy().data)
        return found

    def gathered(self, value: T) -> list[T]:
        """The values of all processes, in their order."""
        if not self.are_many:
            return [value]
        return [self.broadcast(value, source) for source in range(self.size)]

    def all(self, value: bool) -> bool:
        return all(self.gathered(value))

    def any(self, value: bool) -> bool:
        return any(self.gathered(value))

    def send(self, tensor: Tensor, target: int) -> None:
        with self._meeting():
            dist.send(tensor.cpu().contiguous(), target)
        self.traffic.sent += tensor.numel() * tensor.element_size()

    def receive(self, like: Tensor, source: int) -> Tensor:
        """A tensor of the shape, dtype and device of another."""
        found = torch.empty_like(like, device="cpu")
        with self._meeting():
            dist.recv(found, source)
        return found.to(like.device)

    @contextmanager
    def _meeting(self) -> Iterator[None]:
        """Raise `LostProcessError` where the others are not there any more."""
        try:
            yield
        except RuntimeError as error:
            raise LostProcessError(
                f"process {self.rank} of {self.size} cannot reach another one ({brief(error)}): "
                "the launcher says which one ended first, and why; repeat the command to go on "
                "from what is finished"
            ) from error

    def check_same(self, values: dict[str, Any]) -> None:
        """Raise `LlmqError` that names the process and the value in which it differs from the
        first one."""
        everyones = self.gathered(values)
        for rank, theirs in enumerate(everyones):
            for name, value in everyones[0].items():
                if theirs.get(name) != value:
                    parts = ", ".join(differences(theirs.get(name), value))
                    raise LlmqError(
                        f"process {rank} of {self.size} has another {name} than process 0 "
                        f"({parts}, which is process 0); give all of them the same command, "
                        "software and files"
                    )


ONE = Ranks()


def check_size(n: int) -> None:
    """Raise `LlmqError` for a number of processes that the leaves cannot be shared among."""
    if N_LEAVES % n:
        raise LlmqError(
            f"{n} processes: expected 1, 2, 4 or {N_LEAVES}, which take equal shares of the "
            "calibration text"
        )


class _Pickler(pickle.Pickler):
    """Tensors as their own bytes: a part of another one would come with the whole of it."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return NotImplemented
        numbers = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return _tensor, (numbers.tobytes(), value.dtype, value.shape, value.device.type)


def _tensor(numbers: bytes, dtype: torch.dtype, shape: torch.Size, device: str) -> Tensor:
    if not numbers:
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.frombuffer(bytearray(numbers), dtype=dtype).reshape(shape).to(device)


def _packed(value: object) -> Tensor:
    """Something as bytes, uint8."""
    buffer = io.BytesIO()
    _Pickler(buffer).dump(value)
    return torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)


def started() -> Ranks:
    """The processes of this run, once they have found each other, each with a GPU of its own where
    there are any; one where no launcher started it. Raises `LlmqError` for a number that cannot
    share the work."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return ONE
    check_size(size)
    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=PATIENCE)
        if n_gpus := torch.cuda.device_count():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % n_gpus)
    return Ranks(dist.get_rank(), size)
