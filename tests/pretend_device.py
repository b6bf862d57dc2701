"""A device that is not the CPU, for machines that have none: tensors say that they are on
`pretend:0`, live in CPU memory, and refuse to meet tensors of the CPU.

What CUDA would object to, tensors of two devices in one operation, this objects to as well, so that
code which moves blocks of a model to a device and results back can be run to its end without one.
Like CUDA, numbers (tensors without dimensions) and indices may come from the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

NAME = "pretend"
_MOVES = ("aten::copy_", "aten::_to_copy", "aten::set_")
_TAKE_CPU_INDICES = ("aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_")


def missing() -> str | None:
    """Why this torch cannot pretend, or None."""
    has = hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend")
    return None if has else f"torch {torch.__version__} has no devices written in Python"


class PretendTensor(torch.Tensor):
    """held: the tensor on the CPU with the numbers."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, real: torch.Tensor, requires_grad: bool | None = None) -> torch.Tensor:
        if (
            requires_grad is not None
        ):  # accelerate makes parameters by the class of those it replaces
            return torch.nn.Parameter(real, requires_grad)
        options = {
            "strides": real.stride(),
            "storage_offset": real.storage_offset(),
            "dtype": real.dtype,
            "layout": real.layout,
            "requires_grad": False,
        }
        tensor: PretendTensor = torch.Tensor._make_wrapper_subclass(
            cls, real.size(), device=torch.device(NAME, 0), **options
        )
        tensor.held = real
        return tensor

    def __repr__(self, **_: Any) -> str:
        return f"pretend {self.held!r}"

    def tolist(self) -> Any:
        return self.held.tolist()  # torch has it for its own class only

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _run(func, args, kwargs or {})


class _Factories(TorchDispatchMode):
    """Sees what has no tensor that could say where it belongs, too."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return _run(func, args, kwargs or {})


class _Backend(torch.utils.backend_registration._DummyBackendModule):
    """What torch asks of a device's module."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = func._schema.name
    given = [value for value in tree_iter((args, kwargs)) if isinstance(value, torch.Tensor)]
    pretend = [value for value in given if isinstance(value, PretendTensor)]
    target = kwargs.get("device")
    on_device = target.type == NAME if isinstance(target, torch.device) else bool(pretend)
    if not pretend and not on_device:
        return func(*args, **kwargs)
    if pretend and name not in _MOVES:
        _check(name, given)
    real_args, real_kwargs = tree_map_only(
        PretendTensor, lambda tensor: tensor.held, (args, kwargs)
    )
    if isinstance(target, torch.device):
        real_kwargs["device"] = torch.device("cpu")
    result = func(*real_args, **real_kwargs)
    if (
        name == "aten::_to_copy"
        and result is not None
        and any(result is tensor.held for tensor in pretend)
    ):
        result = result.clone()
    if not on_device:
        return result
    if name == "aten::copy_" and not isinstance(args[0], PretendTensor):
        return args[0]
    owners = {
        id(tensor.held): tensor for tensor in pretend
    }  # what was written in place stays the tensor it was

    def on_the_device(value: torch.Tensor) -> torch.Tensor:
        return owners[id(value)] if id(value) in owners else PretendTensor(value)

    return tree_map_only(torch.Tensor, on_the_device, result)


def _check(name: str, given: list[torch.Tensor]) -> None:
    strangers = [
        tensor for tensor in given if not isinstance(tensor, PretendTensor) and tensor.dim() > 0
    ]
    if name in _TAKE_CPU_INDICES:
        strangers = [
            tensor for tensor in strangers if tensor.dtype not in (torch.int64, torch.bool)
        ]
    if strangers:
        raise RuntimeError(
            f"{name}: expected all tensors on {NAME}:0, found one of shape "
            f"{list(strangers[0].shape)} on {strangers[0].device}"
        )


_LIBRARY = torch.library.Library("aten", "IMPL")


# For `torch.tensor(..., device=...)`, which modes do not see: a tensor is allocated and copied to.


def empty_strided(
    size: Any, stride: Any, dtype: torch.dtype | None = None, **_: Any
) -> torch.Tensor:
    return PretendTensor(torch.empty_strided(size, stride, dtype=dtype, device="cpu"))


def _copy_from(
    source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False
) -> torch.Tensor:
    real_source, real_target = (
        tensor.held if isinstance(tensor, PretendTensor) else tensor for tensor in (source, target)
    )
    real_target.copy_(real_source)
    return target


@contextmanager
def pretend_device() -> Iterator[str]:
    """The name of the device, which exists inside."""
    if torch._C._get_privateuse1_backend_name() != NAME:
        torch.utils.backend_registration._setup_privateuseone_for_python_backend(NAME, _Backend())
        for function in (empty_strided, _copy_from):
            _LIBRARY.impl(function.__name__, function, "PrivateUse1")
    with _Factories():
        yield NAME
