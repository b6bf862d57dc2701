"""One matrix that can be quantized, whatever holds it.

A layer computes `y = x W^T + b` with a weight `[N, K]`; how its parameter stores that weight is
the kind's affair. Who solves, reports, trains or saves sees `[N, K]` and asks no further."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmq.models.compat import Conv1D
from llmq.models.keep import reason_to_keep
from llmq.recipe import Layer

# Layers beside each other that vLLM and SGLang join into one, by the last part of its name there
# and of theirs.
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
}


class Kind(ABC):
    """How a parameter stores a weight `[N, K]`. Both directions are views of what they get."""

    @abstractmethod
    def weight(self, parameter: Tensor) -> Tensor:
        """`[N, K]` of the parameter, or of a tensor of its shape."""

    @abstractmethod
    def stored(self, weight: Tensor) -> Tensor:
        """The inverse of `weight`."""


class Rows(Kind):
    """`nn.Linear`: a row for each output."""

    def weight(self, parameter: Tensor) -> Tensor:
        return parameter

    def stored(self, weight: Tensor) -> Tensor:
        return weight


class Columns(Kind):
    """GPT-2's `Conv1D`: a column for each output."""

    def weight(self, parameter: Tensor) -> Tensor:
        return parameter.T

    def stored(self, weight: Tensor) -> Tensor:
        return weight.T


# By the class of the module. A matrix inside a larger parameter, such as one expert of a fused one,
# is a kind with an index, and its sites come from the module that holds them all.
_KINDS: tuple[tuple[type[nn.Module], Kind], ...] = ((Conv1D, Columns()), (nn.Linear, Rows()))

# Classes with a forward of their own that gives the same.
_SAME = ("FalconLinear",)


@dataclass(frozen=True)
class Site:
    """name: of the module, below the one that was searched. parameter: of the module. kind: how
    that holds the weight."""

    name: str
    module: nn.Module
    kind: Kind
    parameter: str = "weight"

    @property
    def shape(self) -> tuple[int, int]:
        """`(N, K)`."""
        n, k = self.weight.shape
        return n, k

    @property
    def weight(self) -> Tensor:
        """The weight `[N, K]`, a view of the parameter."""
        return self.kind.weight(self._stored)

    @property
    def bias(self) -> Tensor | None:
        """What the layer adds `[N]`, or None."""
        return getattr(self.module, "bias", None)

    @property
    def stored_name(self) -> str:
        """The parameter's name below the module that was searched."""
        return f"{self.name}.{self.parameter}" if self.name else self.parameter

    @property
    def fused_with(self) -> tuple[str, ...]:
        """Names of the sites that other engines make one layer of, this one among them."""
        return fused_names(self.name)

    def as_layer(self, prefix: str) -> Layer:
        """Name in the model and shape, as recipes plan with it. prefix: of what was searched."""
        name = f"{prefix}.{self.name}" if prefix else self.name
        is_transposed = isinstance(self.kind, Columns)
        return Layer(name, self.shape, is_transposed, kept=reason_to_keep(self.name))

    def stored(self, weight: Tensor) -> Tensor:
        """`[N, K]` as the parameter has it (a view)."""
        return self.kind.stored(weight)

    @torch.no_grad()
    def write(self, weight: Tensor) -> None:
        """Have the layer compute with this weight `[N, K]`, in place."""
        self.weight.copy_(weight)

    @property
    def _stored(self) -> Tensor:
        parameter = getattr(self.module, self.parameter)
        assert isinstance(parameter, Tensor)
        return parameter


def site_of(module: nn.Module, name: str = "") -> Site | None:
    """The site of a module, or None for one that holds no matrix of a known kind, and for one that
    is quantized, whose weight is no parameter."""
    for module_class, kind in _KINDS:
        if isinstance(module, module_class) and "weight" in module._parameters:
            return Site(name, module, kind) if _computes_as(module, module_class) else None
    return None


def _computes_as(module: nn.Module, module_class: type[nn.Module]) -> bool:
    """Whether a module does what the class does: routers and layers of groups are linear by class
    and compute something else. Of a block that is being recorded, the class is asked."""
    own = type(module).forward
    return own is module_class.forward or type(module).__name__ in _SAME


def sites_in(root: nn.Module) -> Iterator[Site]:
    """Every site below a module, in the order of its modules."""
    for name, module in root.named_modules():
        site = site_of(module, name)
        if site is not None:
            yield site


def fused_names(name: str) -> tuple[str, ...]:
    """See `Site.fused_with`, for the name alone. Which of these a model has is not known here."""
    parent, dot, leaf = name.rpartition(".")
    for members in FUSED.values():
        if leaf in members:
            return tuple(f"{parent}{dot}{member}" for member in members)
    return (name,)


def joint_name(name: str) -> str | None:
    """What the layer is called that other engines make of this one and of those beside it, or None
    for a layer that stays by itself."""
    parent, dot, leaf = name.rpartition(".")
    for joint, members in FUSED.items():
        if leaf in members:
            return f"{parent}{dot}{joint}"
    return None
