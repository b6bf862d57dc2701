"""A quantized weight: packed codes, scales, zero points and the spec that gives them meaning. What
every method produces, every format stores and every kernel multiplies with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmq.errors import LlmqError
from llmq.grid import rounding
from llmq.grid.spec import PER_ROW, PER_TENSOR, QuantSpec
from llmq_kernels.core.packing import pack, packed_width, unpack
from llmq_kernels.core.weight import PackedWeight


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A weight `[N, K]` in storage form.

    packed: int32 `[N, packed_width(K, bits)]`. scale: `[N, G]` in `spec.scale_dtype` (`[1, 1]` per
    tensor). zero: uint8, shaped like scale, or None where the code's offset is the zero point.
    g_idx: int32 `[K]`, the group of each column, only where groups are not consecutive (act-order).
    input_range: float32 `[2]`, scale and zero point of the layer's input, where that is quantized
    by a static range."""

    packed: Tensor
    scale: Tensor
    zero: Tensor | None
    spec: QuantSpec
    shape: tuple[int, int]
    g_idx: Tensor | None = None
    input_range: Tensor | None = None

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        spec: QuantSpec,
        g_idx: Tensor | None = None,
    ) -> QuantizedTensor:
        """Pack uint8 codes `[N, K]`. scale: the values that the codes were computed with; they must
        already be representable in `spec.scale_dtype`."""
        n, k = codes.shape
        stored_scale = scale.to(getattr(torch, spec.scale_dtype)).contiguous()
        stored_zero = None if zero is None else zero.to(torch.uint8).contiguous()
        return cls(pack(codes, spec.bits), stored_scale, stored_zero, spec, (n, k), g_idx)

    @classmethod
    def quantize(
        cls, weight: Tensor, spec: QuantSpec, importance: Tensor | None = None
    ) -> QuantizedTensor:
        """Round a float32 weight `[N, K]` to the nearest codes (RTN), with the scales of
        `quantizer.choose_scale`."""
        return cls.round(weight, *rounding.choose_scale(weight, spec, importance), spec)

    @classmethod
    def round(
        cls, weight: Tensor, scale: Tensor, zero: Tensor | None, spec: QuantSpec
    ) -> QuantizedTensor:
        """Round a float32 weight `[N, K]` to the nearest codes of a grid that is given; scale and
        zero as `quantizer.choose_scale` gives them."""
        return cls.from_codes(rounding.quantize(weight, scale, zero, spec), scale, zero, spec)

    def to(self, device: torch.device | str) -> QuantizedTensor:
        """The same weight on a device."""
        zero, g_idx, input_range = (
            None if tensor is None else tensor.to(device)
            for tensor in (self.zero, self.g_idx, self.input_range)
        )
        return QuantizedTensor(
            self.packed.to(device),
            self.scale.to(device),
            zero,
            self.spec,
            self.shape,
            g_idx,
            input_range,
        )

    def codes(self) -> Tensor:
        """uint8 `[N, K]`."""
        return unpack(self.packed, self.spec.bits, self.shape[1])

    def dequantize(self) -> Tensor:
        """float32 `[N, K]`."""
        return rounding.dequantize(self.codes(), self.scale, self.zero, self.spec, self.g_idx)

    def rows(self, start: int, stop: int) -> QuantizedTensor:
        """Rows `start` to `stop`: how a solve over stacked layers is taken apart. Not for
        per-tensor scales, which have no rows."""
        if self.spec.group_size == PER_TENSOR:
            raise LlmqError(
                "a tensor with one scale for the whole cannot be split by rows; quantize its parts "
                "one by one"
            )
        zero = None if self.zero is None else self.zero[start:stop].contiguous()
        g_idx = (
            None if self.g_idx is None else self.g_idx.clone()
        )  # parts are stored one by one and must not share memory
        return QuantizedTensor(
            self.packed[start:stop].contiguous(),
            self.scale[start:stop].contiguous(),
            zero,
            self.spec,
            (stop - start, self.shape[1]),
            g_idx,
            self.input_range,
        )

    def as_packed(self, activations: str = "none") -> PackedWeight:
        """The same tensors as the kernels take them. activations: see `llmq.grid.spec.ActSpec`."""
        return PackedWeight(
            self.packed,
            self.scale,
            self.zero,
            self.g_idx,
            self.spec.levels,
            self.spec.columns_per_group(self.shape[1]),
            self.shape,
            activations,
            self.input_range,
        )

    def validate(self, name: str) -> None:
        """Check shapes, dtypes and values against the spec, and raise `LlmqError` that names the
        tensor. Kernels index by `g_idx`, so its range is memory safety."""
        n, k = self.shape
        n_groups = self.spec.n_groups(k)
        scale_shape = (1, 1) if self.spec.group_size == PER_TENSOR else (n, n_groups)
        expected = {
            "packed": (self.packed, (n, packed_width(k, self.spec.bits)), torch.int32),
            "scale": (self.scale, scale_shape, getattr(torch, self.spec.scale_dtype)),
            "zero": (self.zero, scale_shape, torch.uint8),
            "g_idx": (self.g_idx, (k,), torch.int32),
            "input_range": (self.input_range, (2,), torch.float32),
        }
        for part, (tensor, shape, dtype) in expected.items():
            if tensor is not None and (tuple(tensor.shape) != shape or tensor.dtype != dtype):
                raise LlmqError(
                    f"{name}.{part}: expected {dtype} of shape {list(shape)} for {self.spec}, got "
                    f"{tensor.dtype} of shape {list(tensor.shape)}"
                )
        if (self.zero is None) != self.spec.symmetric:
            raise LlmqError(
                f"{name}: {self.spec} {'has no' if self.spec.symmetric else 'needs a'} zero point, "
                f"but the tensor has {'none' if self.zero is None else 'one'}"
            )
        if not torch.isfinite(self.scale).all():
            raise LlmqError(
                f"{name}.scale: {int((~torch.isfinite(self.scale)).sum())} values are NaN or "
                "infinite; the checkpoint is damaged"
            )
        if self.g_idx is not None and not (
            int(self.g_idx.min()) >= 0 and int(self.g_idx.max()) < n_groups
        ):
            raise LlmqError(
                f"{name}.g_idx: values from {int(self.g_idx.min())} to {int(self.g_idx.max())}, "
                f"expected 0 to {n_groups - 1}"
            )
        code = self.spec.levels
        if code.levels < 1 << code.bits and (largest := int(self.codes().max())) > code.max:
            raise LlmqError(
                f"{name}.packed: holds the code {largest}, which {code.name} does not have; the "
                "checkpoint is damaged"
            )


VALUES_AT_A_TIME = 1 << 22  # of a large weight that are float32 at a time: 16 MiB


def quantize_by_rows(
    weight: Tensor, spec: QuantSpec, importance: Tensor | None = None
) -> QuantizedTensor:
    """`QuantizedTensor.quantize` of a weight `[N, K]` of any real dtype, some rows in float32 at a
    time: for embeddings and heads of large vocabularies. Not for one scale per tensor."""
    parts = [
        QuantizedTensor.quantize(rows.detach().float(), spec, importance)
        for rows in some_rows(weight)
    ]
    return stack_rows(parts)


def some_rows(weight: Tensor) -> Sequence[Tensor]:
    """A weight `[N, K]` in parts that are worth working on at a time (views)."""
    return weight.split(max(1, VALUES_AT_A_TIME // weight.shape[1]))


def stack_rows(tensors: Sequence[QuantizedTensor]) -> QuantizedTensor:
    """One weight `[sum of N, K]` of several with the same spec, K and order of columns. One scale
    per tensor becomes one per row, with the same values."""
    first = tensors[0]
    if len(tensors) == 1:
        return first
    if any(
        each.spec != first.spec
        or each.shape[1] != first.shape[1]
        or not _same_order(each, first)
        or each.input_range is not None
        for each in tensors
    ):
        raise LlmqError(
            "weights can be stacked only if they are quantized alike: "
            f"{', '.join(f'{each.spec} of {list(each.shape)}' for each in tensors)}"
        )
    is_whole = first.spec.group_size == PER_TENSOR

    def per_row(values: Tensor, n_rows: int) -> Tensor:
        return values.expand(n_rows, -1) if is_whole else values

    scale = torch.cat([per_row(each.scale, each.shape[0]) for each in tensors])
    zeros = [per_row(each.zero, each.shape[0]) for each in tensors if each.zero is not None]
    spec = replace(first.spec, group_size=PER_ROW) if is_whole else first.spec
    packed = torch.cat([each.packed for each in tensors])
    return QuantizedTensor(
        packed,
        scale,
        torch.cat(zeros) if zeros else None,
        spec,
        (len(scale), first.shape[1]),
        first.g_idx,
    )


def _same_order(first: QuantizedTensor, second: QuantizedTensor) -> bool:
    if first.g_idx is None or second.g_idx is None:
        return first.g_idx is second.g_idx
    return torch.equal(first.g_idx, second.g_idx)
