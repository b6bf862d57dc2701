"""What a backend was built for, declared and checked in one place.

A backend that refuses what it knows it cannot do accepts everything that is invented later. So each
one declares what it was built for, as one or more `Takes`, and `refusal` turns everything else
down: a code with other levels, a group size, a dtype that nobody thought of. What depends on the
machine or on the numbers of a weight (a CPU's instructions, shapes, the size of an act-order
group) stays with the backend."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from llmq_kernels.core.codes import Code
from llmq_kernels.core.weight import RUN_TIME_ACTIVATIONS, PackedWeight

CODE_BITS = 8  # `unpack` gives bytes
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_PLACES = {"cpu": "the CPU", "cuda": "GPUs"}


@dataclass(frozen=True)
class Takes:
    """Weights that are alike in what a backend does with them.

    devices: their types; None for any. activations: kinds of `PackedWeight.activations`. dtypes: of
    x. codes: whole records, so that another code under a known name is not taken for it; None for
    any of at most 8 bits. groups: the number that divides every group size, or 0 for one scale per
    row or tensor only, which the others take as well. zero: stored zero points: "none", those that
    are codes themselves (`0 .. 2^bits - 1`), any "byte", or "any" number. act_order: groups of
    columns that do not follow one another. scale_dtypes: of the stored scales; None for any."""

    devices: tuple[str, ...] | None
    activations: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    codes: tuple[Code, ...] | None
    groups: int
    zero: Literal["none", "code", "byte", "any"]
    act_order: bool = False
    scale_dtypes: tuple[torch.dtype, ...] | None = FLOATS


# What `reference` does: the whole specification.
EVERYTHING = Takes(
    devices=None,
    activations=("none", "int8-token", "int8-static", *RUN_TIME_ACTIVATIONS),
    dtypes=(*FLOATS, torch.float64),
    codes=None,
    groups=1,
    zero="any",
    act_order=True,
    scale_dtypes=None,
)


def refusal(
    takes: Sequence[Takes], weight: PackedWeight, dtype: torch.dtype, device: torch.device
) -> str | None:
    """Why none of `takes` covers a weight with activations of `dtype` on `device`, or None. Where
    there are several, it is the reason of that which comes closest."""
    closest, told = -1, ""
    for one in takes:
        failed = next(_failures(one, weight, dtype, device), None)
        if failed is None:
            return None
        if failed[0] > closest:
            closest, told = failed
    return told or "it was built for nothing"


def _failures(
    takes: Takes, weight: PackedWeight, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[int, str]]:
    """How many conditions held before one that does not, and that one in words; the cheapest
    conditions come first, and those that read numbers last."""
    reasons = (_device, _activations, _dtype, _code, _zero, _groups, _order, _scale, _zero_values)
    for held, reason in enumerate(reasons):
        if told := reason(takes, weight, dtype, device):
            yield held, told


def _words(names: Sequence[str], last: str = "and") -> str:
    return f" {last} ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _device(takes: Takes, weight: PackedWeight, dtype: torch.dtype, device: torch.device) -> str:
    if takes.devices is None or device.type in takes.devices:
        return ""
    places = [_PLACES.get(name, name) for name in takes.devices]
    return f"it runs on {_words(places, 'or')}, not on {device.type}"


def _activations(
    takes: Takes, weight: PackedWeight, dtype: torch.dtype, device: torch.device
) -> str:
    kind = weight.activations
    if kind in takes.activations:
        without_range = kind == "int8-static" and weight.input_range is None
        return "int8-static activations need an input_range" if without_range else ""
    if kind == "none":
        names = _words(takes.activations, "or")
        return (
            f"it computes with INT8 activations ({names}), which neither this weight's checkpoint "
            "nor --compute asks for"
        )
    if takes.activations == ("none",):
        names = _words([_name(one) for one in takes.dtypes], "or")
        return f"it computes with {names} activations as they are, not {kind}"
    known = [name for name in takes.activations if name != "none"]
    return f"it computes with {_words(known, 'or')} activations, not {kind}"


def _dtype(takes: Takes, weight: PackedWeight, dtype: torch.dtype, device: torch.device) -> str:
    if dtype in takes.dtypes:
        return ""
    names = _words([_name(one) for one in takes.dtypes], "or")
    return f"it computes with {names} activations, not {_name(dtype)}"


def _code(takes: Takes, weight: PackedWeight, dtype: torch.dtype, device: torch.device) -> str:
    code = weight.code
    fits = 1 <= code.bits <= CODE_BITS and code.levels <= 1 << code.bits
    if fits and (takes.codes is None or code in takes.codes):
        return ""
    names = (
        f"any codes of at most {CODE_BITS} bits"
        if takes.codes is None
        else f"the codes {_words([one.name for one in takes.codes])}"
    )
    what = f"{code.name} ({code.bits} bits, {code.levels} levels, zero at {code.offset:g})"
    return f"it was built for {names}, not {what}"


def _zero(takes: Takes, weight: PackedWeight, dtype: torch.dtype, device: torch.device) -> str:
    if weight.zero is None:
        return ""
    if takes.zero == "none":
        return f"it takes {weight.code.name} without zero points only"
    if takes.zero != "any" and weight.zero.dtype != torch.uint8:
        return f"it reads zero points of uint8, not {_name(weight.zero.dtype)}"
    return ""


def _groups(takes: Takes, weight: PackedWeight, dtype: torch.dtype, device: torch.device) -> str:
    if weight.scale.shape[1] == 1:
        return ""
    size, name = weight.group_size, weight.code.name
    if takes.groups == 0:
        return f"it takes {name} with one scale per row or tensor only, not groups of {size}"
    if size % takes.groups:
        return (
            f"it needs groups that are multiples of {takes.groups} columns for {name}, not {size}"
        )
    return ""


def _order(takes: Takes, weight: PackedWeight, dtype: torch.dtype, device: torch.device) -> str:
    return "" if weight.g_idx is None or takes.act_order else "it has no act-order groups"


def _scale(takes: Takes, weight: PackedWeight, dtype: torch.dtype, device: torch.device) -> str:
    if takes.scale_dtypes is None or weight.scale.dtype in takes.scale_dtypes:
        return ""
    names = _words([_name(one) for one in takes.scale_dtypes], "or")
    return f"it reads scales of {names}, not {_name(weight.scale.dtype)}"


def _zero_values(
    takes: Takes, weight: PackedWeight, dtype: torch.dtype, device: torch.device
) -> str:
    if weight.zero is None or takes.zero != "code":
        return ""
    largest, most = int(weight.zero.max()), (1 << weight.code.bits) - 1
    if largest <= most:
        return ""
    return f"it holds zero points of {weight.code.name} up to {most}, not {largest}"
