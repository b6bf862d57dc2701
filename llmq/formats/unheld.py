"""Layers whose shape a format that was asked for cannot hold: a few small ones are kept in full
precision, where refusing the whole model would help nobody."""

from __future__ import annotations

from dataclasses import replace

from llmq.formats.base import Format
from llmq.recipe import LayerPlan

MAX_SHARE = 0.05  # of the weights to be quantized; more is another model than the one asked for
_USUAL = (4096, 4096)  # a shape that every format holds, whatever the spec


def kept_where_unheld(fmt: Format, plans: list[LayerPlan]) -> list[LayerPlan]:
    """The plans, with layers kept whose shape is all that the format refuses, and a note. What is
    more than `MAX_SHARE` stays as it was planned, for `choose_format` to refuse."""
    kept = [_kept(fmt, plan) for plan in plans]
    before, after = _n_quantized(plans), _n_quantized(kept)
    return kept if before - after <= MAX_SHARE * before else plans


def _kept(fmt: Format, plan: LayerPlan) -> LayerPlan:
    if plan.spec is None or fmt.refusal(plan.spec, _USUAL):
        return plan
    reason = fmt.refusal(plan.spec, plan.layer.shape)
    if reason is None:
        return plan
    note = f"kept in full precision: format {fmt.name}: {reason}"
    return replace(plan, spec=None, note=note)


def _n_quantized(plans: list[LayerPlan]) -> int:
    sizes = [plan.layer.shape[0] * plan.layer.shape[1] for plan in plans if plan.spec is not None]
    return sum(sizes)
