"""What an on-disk format is: a name, a reason to refuse, and a pair of pure functions between a
`QuantizedTensor` and named tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from llmq.grid.spec import QuantSpec
from llmq.grid.tensor import QuantizedTensor

Specs = Mapping[str, QuantSpec | None]


def _as_stored(bias: Tensor, tensors: dict[str, Tensor], config: dict[str, Any]) -> Tensor:
    return bias


@dataclass(frozen=True)
class Format:
    """name: as in `--format`. marker: the tensor suffix by which a stored layer is recognised.
    refusal(spec, shape): why a layer cannot be stored exactly, or None. write(qtensor): tensors by
    suffix. read(name, tensors, config, shape): a layer back from its tensors, the
    `quantization_config` and the weight's shape (N, K). config(specs): the `quantization_config` of
    config.json from the specs of all linear layers (None: kept in full precision). suffixes: of the
    tensors that `read` uses. bias(bias, tensors, config): what is added to a layer's output, from
    what is stored."""

    name: str
    marker: str
    refusal: Callable[[QuantSpec, tuple[int, int]], str | None]
    write: Callable[[QuantizedTensor], dict[str, Tensor]]
    read: Callable[[str, dict[str, Tensor], dict[str, Any], tuple[int, int]], QuantizedTensor]
    config: Callable[[Specs], dict[str, Any]]
    suffixes: frozenset[str]
    bias: Callable[[Tensor, dict[str, Tensor], dict[str, Any]], Tensor] = _as_stored
