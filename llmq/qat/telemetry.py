"""What a run says about its quantizers beside the loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmq.grid import rounding
from llmq.qat.shards import added_up, is_sharded, own_rows
from llmq.qat.weights import FakeQuantLinear, fake_quant_modules, whole


class Telemetry:
    """Counts over all layers at each call: how many codes changed since the last one, how many are
    zero, how many weights lie outside their grid. Keeps one byte per weight."""

    def __init__(self) -> None:
        self._codes: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> dict[str, float]:
        """flip_rate, zero_fraction, clip_fraction: shares of all weights in training; empty when
        nothing is quantized."""
        n = flips = zeros = clipped = 0
        is_split = is_sharded(model)
        for name, module in fake_quant_modules(model).items():
            codes, is_zero, is_clipped = _count(module, is_split)
            before = self._codes.get(name)
            flips += 0 if before is None else int((codes != before).sum())
            zeros, clipped, n = zeros + is_zero, clipped + is_clipped, n + codes.numel()
            self._codes[name] = codes
        if is_split:
            device = next(model.parameters()).device
            flips, zeros, clipped, n = added_up([flips, zeros, clipped, n], device)
        return (
            {"flip_rate": flips / n, "zero_fraction": zeros / n, "clip_fraction": clipped / n}
            if n
            else {}
        )


def _count(module: FakeQuantLinear, is_split: bool) -> tuple[Tensor, int, int]:
    """Codes, zeros among them and weights outside of the grid; of this process's share of the rows
    where the model is split."""
    master, spec = whole(module.master()), module.quantizer.spec
    scale, zero = module.quantizer.stored(master)
    codes = rounding.quantize(master, scale, zero, spec)
    value = rounding.dequantize(codes, scale, zero, spec)
    step = rounding.dequantize(torch.ones_like(codes), scale, torch.zeros_like(scale), spec)
    rows = own_rows(len(codes)) if is_split else slice(None)
    is_outside = (master - value).abs() > 0.5 * step
    # A copy, or the rows would keep the whole alive.
    return codes[rows].clone(), int((value[rows] == 0).sum()), int(is_outside[rows].sum())
