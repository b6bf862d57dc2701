"""The weight of a packed layer as a tensor for whoever asks for `layer.weight`: PEFT and models
that want its shape, dtype or device get these at no cost, who computes with it gets the values, and
who would change it is told how that is done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import tree_any, tree_map

from llmq.errors import LlmqError

_READ_ONLY = (
    "the weight of a quantized layer is read-only: to merge an adapter, call "
    "llmq.merge_adapter(folder, adapter, out=OUT), which quantizes again what the adapter changes; "
    "to quantize other values, call llmq.quantize on the original model"
)


class WeightView(Tensor):
    """A weight `[N, K]` without storage. Every operator that reads it computes with `values()`,
    made anew each time and never kept; one that would write raises `LlmqError`. A part of it is a
    copy.

    values: gives the dequantized weight in `dtype` on `device`."""

    values: Callable[[], Tensor]
    # transformers' own initialisation leaves alone what says this of itself
    _is_hf_initialized = True

    @staticmethod
    def __new__(
        cls,
        values: Callable[[], Tensor],
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> WeightView:
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)

    def __init__(
        self,
        values: Callable[[], Tensor],
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.values = values

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.detach.default:
            return args[0]
        for index, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            written = args[index] if index < len(args) else kwargs.get(argument.name)
            if tree_any(_is_view, written):
                refuse_write()
        return func(*tree_map(_values_of, args), **tree_map(_values_of, kwargs))

    def _data(self) -> WeightView:
        return self

    def _set_data(self, value: Any) -> NoReturn:
        refuse_write()

    data = property(_data, _set_data)  # type: ignore[assignment]

    def __setitem__(self, key: Any, value: Any) -> NoReturn:
        refuse_write()

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.values()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.values().__reduce_ex__(protocol)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"WeightView(shape={list(self.shape)}, dtype={self.dtype}, device={self.device})"


def refuse_write() -> NoReturn:
    """Raise the `LlmqError` that a write gets."""
    raise LlmqError(_READ_ONLY)


def _is_view(value: Any) -> bool:
    return isinstance(value, WeightView)


def _values_of(value: Any) -> Any:
    return value.values() if isinstance(value, WeightView) else value
