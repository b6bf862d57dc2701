"""Which dtype holds the scales of a layer.

Float16 ends at 6e-8 below and 65504 above, and from 6e-5 down it loses digits: a 4-bit layer with
weights around 1e-7 would have scales of 1e-8, which round to nothing, and all its output would be
lost. What other engines read has float16 scales, so float16 is what a layer gets as long as little
is lost; otherwise the next dtype that holds them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

import torch
from torch import Tensor

from llmq.grid import rounding
from llmq.grid.spec import QuantSpec
from llmq.recipe import LayerPlan

DTYPES = ("float16", "bfloat16", "float32")
# How far rounding a scale may move the outermost code, in steps. Half a step is what rounding the
# weights moves them by; float16 moves that of 8 bits by a sixteenth, bfloat16 by a quarter.
_MOST_MOVED = 0.125
_MOST_LOST = 1e-3  # share of a layer's squared weights whose scales may move further


def lost_share(weight: Tensor, spec: QuantSpec) -> float:
    """The share of a layer's squared weights, float32 `[N, K]`, that lies in groups whose scale its
    dtype does not hold well; infinite if one is too large for it."""
    is_lost, is_finite = _lost(weight, spec)
    if not is_finite:
        return float("inf")
    if not bool(is_lost.any()):
        return 0.0
    largest = weight.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    energy = rounding.grouped(weight / largest, spec).square().sum(-1)
    return float(energy[is_lost].sum() / energy.sum())


def _lost(weight: Tensor, spec: QuantSpec) -> tuple[Tensor, bool]:
    """Which groups of a float32 weight `[N, K]` have a scale that its dtype does not hold well, and
    whether it holds all at all."""
    scale, _ = rounding.range_scale(weight, spec)
    stored = scale.to(getattr(torch, spec.scale_dtype)).float()
    outermost = spec.levels.max / 2
    is_lost = (stored - scale).abs() * outermost > _MOST_MOVED * scale
    return is_lost, bool(torch.isfinite(stored).all())


def lost_energy(weight: Tensor, spec: QuantSpec) -> tuple[float, float]:
    """The squared weights of some rows, float32 `[n, K]`, that lie in groups whose scale its dtype
    does not hold well (infinite if one is too large for it), and all of them: `lost_share` of a
    weight that is looked at in parts."""
    is_lost, is_finite = _lost(weight, spec)
    energy = rounding.grouped(weight, spec).double().square().sum(-1)
    lost = float(energy[is_lost].sum()) if is_finite else float("inf")
    return lost, float(energy.sum())


def most_lost(spec: QuantSpec) -> float:
    """The share that may be lost: no more than rounding the weights loses anyway."""
    return min(_MOST_LOST, 4.0**-spec.bits)


def fitting_spec(weight: Tensor, spec: QuantSpec) -> QuantSpec:
    """The spec with the first scale dtype, from its own on, that holds the scales of a float32
    weight `[N, K]`."""
    for name in DTYPES[DTYPES.index(spec.scale_dtype) :]:
        spec = replace(spec, scale_dtype=name)  # type: ignore[arg-type]
        if lost_share(weight, spec) <= most_lost(spec):
            break
    return spec


def fitting_plans(
    plans: list[LayerPlan],
    weight_of: Callable[[str], Tensor],
    later: Collection[str] = (),
) -> tuple[list[LayerPlan], list[str]]:
    """Plans whose specs hold the scales of their layers, each with a note where it differs from
    what was asked, and the names of these layers. weight_of: a layer's weight `[N, K]` by name, one
    at a time. later: layers that are not looked at."""
    fitting, changed = [], []
    for plan in plans:
        if plan.spec is not None and plan.layer.name not in later:
            weight = weight_of(plan.layer.name).float()
            spec = fitting_spec(weight, plan.spec)
            if spec != plan.spec:
                changed.append(plan.layer.name)
                whose = f"those of weights of up to {float(weight.abs().max()):.2g}"
                plan = with_scale_dtype(plan, spec, whose)
        fitting.append(plan)
    return fitting, changed


def with_scale_dtype(plan: LayerPlan, spec: QuantSpec, whose: str = "them") -> LayerPlan:
    """A plan with another spec, which is noted where its scale dtype is another one. whose: scales
    that the planned dtype does not hold."""
    planned = plan.spec
    if planned is None or spec.scale_dtype == planned.scale_dtype:
        return replace(plan, spec=spec)
    note = f"scales in {spec.scale_dtype}: {planned.scale_dtype} does not hold {whose}"
    return replace(plan, spec=spec, note=f"{plan.note}; {note}" if plan.note else note)
