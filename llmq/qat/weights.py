"""Linear layers whose weight is trained through its quantizer, and the way in and out of them.

A `FakeQuantLinear` holds the float32 master weight and a weight quantizer. Forward it multiplies
with what will be stored, bit for bit; backward the gradient reaches master, scale and zero point.
Four quantizers share the one rounding of `llmq.grid.rounding`:

    lsq      scales (and zero points) are learned (Esser et al., 2020; asymmetric: LSQ+, Bhalgat et
             al., 2020): the default, since it can start from any quantized checkpoint as it is
    seq      the same on grids without a level to spare, starting from the largest magnitude
             (ParetoQ's stretched elastic quantization, Liu et al., 2025): 2 bits with levels at
             half-integers
             ("w2h"), or ternary; every code then stands for an equal share of the range
    ste      scales follow the weights' range at every step (LLM-QAT, Liu et al., 2023); gradient
             straight through
    absmean  ternary codes under the mean magnitude of their group (BitNet b1.58, Ma et al., 2024);
             gradient straight through without a mask, so a weight far outside still moves

The masters start as the original weights moved into the cells of their codes: quantized again they
give the very codes of the start (GPTQ's, or any other method's), and where a code agrees with the
original weight, and is not at the edge of the cell, nothing moves. Starting from dequantized values
would put every weight in the middle of its cell, half a step from any flip; starting at the very
edge, where GPTQ's choices lie that are not the nearest code, would have the first noise undo them
all at once (the README has what that costs)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmq.activations.nodes import ActivationQuantizer
from llmq.arguments import check_type
from llmq.errors import LlmqError
from llmq.formats.hf_quantizer import state_quantization
from llmq.grid import rounding
from llmq.grid.fakequant import fake_quantize_ste, lsq_factor, straight_through
from llmq.grid.spec import ActSpec, QuantSpec
from llmq.grid.tensor import QuantizedTensor
from llmq.inference.module import QuantLinear
from llmq.models.site import site_of
from llmq.models.stored import state_ties
from llmq.qat.lora import LoRA, check_rank
from llmq.qat.pace import grid_rate, margin
from llmq_kernels.core.reference import expand_groups

QuantizerName = Literal["lsq", "seq", "ste", "absmean"]


def check_quantizer(name: QuantizerName, spec: QuantSpec, where: str = "") -> None:
    """Raise `LlmqError` for a quantizer that is not made for a grid."""
    if name == "absmean" and spec.code != "ternary":
        raise LlmqError(
            f"{where}quantizer absmean is for ternary codes, not {spec}; use lsq or ste"
        )
    if name == "seq" and spec.code not in ("int2h", "ternary"):
        raise LlmqError(
            f"{where}quantizer seq is for 2-bit codes with half-integer levels (w2h) and ternary "
            f"ones, not {spec}; use lsq"
        )


class WeightQuantizer(nn.Module):
    """spec: the grid. scale, zero: float32 masters of what is stored, `[N or 1, G]`; parameters
    under "lsq" and "seq", absent otherwise."""

    scale: Tensor | None
    zero: Tensor | None

    def __init__(
        self,
        spec: QuantSpec,
        name: QuantizerName,
        scale: Tensor | None = None,
        zero: Tensor | None = None,
    ) -> None:
        super().__init__()
        check_quantizer(name, spec)
        self.spec, self.name = spec, name
        learned = name in ("lsq", "seq")
        self.register_parameter(
            "scale", nn.Parameter(scale.float().clone()) if learned and scale is not None else None
        )
        self.register_parameter(
            "zero", nn.Parameter(zero.float().clone()) if learned and zero is not None else None
        )

    def stored(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point as they will be stored, float32, for a whole master weight
        `[N, K]`."""
        if self.scale is not None:
            self.keep_positive()
            zero = None if self.zero is None else rounding.round_zero(whole(self.zero), self.spec)
            return rounding.round_scale(whole(self.scale), self.spec), zero
        scale, zero = rounding.range_scale(
            weight, self.spec
        )  # the mean magnitude for ternary codes
        return rounding.round_scale(scale, self.spec), zero

    @torch.no_grad()
    def keep_positive(self) -> None:
        """Stop a learned scale, wherever an optimizer has moved it, at the smallest number that its
        dtype holds: beyond zero it would turn every code's sign, and zero stands for an empty
        group."""
        if self.scale is not None:
            limits = torch.finfo(getattr(torch, self.spec.scale_dtype))
            self.scale.clamp_(min=limits.tiny * limits.eps)

    def forward(self, weight: Tensor) -> Tensor:
        """The fake-quantized weight, float32 `[N, K]`."""
        if self.scale is not None:
            self.keep_positive()
            return fake_quantize_ste(
                weight, self.scale, self.zero, self.spec, lsq_factor(self.spec, *weight.shape)
            )
        with torch.no_grad():
            scale, zero = self.stored(weight)
            value = rounding.fake_quantize(weight, scale, zero, self.spec)
        return straight_through(weight, value)


class FakeQuantLinear(nn.Module):
    """`y = x @ fake_quantize(W).T + bias`.

    weight: float32 master `[N, K]`. lora: a low-rank change of it, trained in its place, or None.
    activations: quantizes x first, or None. strength: lambda of
    gradual quantization, `W + lambda (q(W) - W)` with q's own gradient; 1 is full quantization."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        weight_quantizer: WeightQuantizer,
        activations: ActivationQuantizer | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight.float().clone())
        self.bias = None if bias is None else nn.Parameter(bias.float().clone())
        self.quantizer = weight_quantizer
        self.activations = activations
        self.lora: LoRA | None = None
        self.strength = 1.0

    def master(self) -> Tensor:
        """What is quantized, float32 `[N, K]`: the weight, changed by `lora`."""
        return self.weight if self.lora is None else self.weight + self.lora()

    def forward(self, x: Tensor) -> Tensor:
        master = self.master()
        weight = self.quantizer(master)
        if self.strength < 1:
            weight = torch.lerp(master, weight, self.strength)
        if self.activations is not None:
            x = self.activations(x)
        return nn.functional.linear(x, weight, self.bias)

    def add_lora(self, lora: LoRA) -> None:
        """Train a low-rank change in the place of weight and bias."""
        self.lora = lora
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)

    @torch.no_grad()
    def merge_lora(self) -> None:
        """Make the change a part of the weight: what is quantized stays the same, bit for bit."""
        self.weight.copy_(self.master())
        self.lora = None

    @torch.no_grad()
    def qtensor(self) -> QuantizedTensor:
        """The weight as it will be stored. Its values are those of the last forward pass at full
        strength, bit for bit."""
        master = self.master()
        scale, zero = self.quantizer.stored(master)
        packed = QuantizedTensor.round(master, scale, zero, self.quantizer.spec)
        if self.activations is None or self.activations.kind != "int8-static":
            return packed
        return replace(packed, input_range=self.activations.input_range())

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"spec={self.quantizer.spec}, quantizer={self.quantizer.name}"
        )


def whole(tensor: Tensor) -> Tensor:
    """A tensor, gathered from all processes where it lies in parts (`llmq.qat.shards`). All of them
    have to call this together."""
    gathered: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return gathered


def masters(original: Tensor, start: QuantizedTensor, margin: float) -> Tensor:
    """Float32 master weights `[N, K]`: the original ones, moved into the cells of the codes of
    `start`, so many steps from the edge. Outside the grid's range they are clipped to its end
    cells."""
    value = start.dequantize()
    reach = (0.5 - margin) * expand_groups(
        start.scale.float(), start.shape[1], start.spec.columns_per_group(start.shape[1])
    )
    return torch.minimum(torch.maximum(original.float(), value - reach), value + reach)


def stretched_scale(weight: Tensor, spec: QuantSpec) -> Tensor:
    """SEQ's start `[N or 1, G]`: the range from -max|w| to max|w| in as many equal parts as there
    are codes."""
    return 2 * rounding.grouped(weight, spec).abs().amax(-1) / spec.levels.levels


def fake_quant_modules(model: nn.Module) -> dict[str, FakeQuantLinear]:
    """Name -> module of every layer in training."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, FakeQuantLinear)
    }


@torch.no_grad()
def prepare(
    model: nn.Module,
    start: Mapping[str, QuantizedTensor],
    name: QuantizerName = "lsq",
    activations: str = "none",
    lora_rank: int | None = None,
    seed: int = 0,
    n_steps: int | None = None,
) -> None:
    """Replace linear layers by `FakeQuantLinear` in place, from the quantized weights `start` by
    layer name. lora_rank: train a change of this rank of each, scales and zero points, and nothing
    else; None: everything. seed: of its first values. n_steps: updates of the run that
    follows, None where unknown. Raises `LlmqError` for act-order weights, whose groups are not
    consecutive."""
    generator = torch.Generator().manual_seed(seed)
    if lora_rank is not None:
        check_rank(lora_rank)
        model.requires_grad_(False)
    for layer, qtensor in start.items():
        if qtensor.g_idx is not None:
            raise LlmqError(
                f"{layer}: weights with a stored g_idx (act-order) cannot be trained; start from a "
                "result without --act-order"
            )
        site = site_of(model.get_submodule(layer), layer)
        if site is None:
            raise LlmqError(f"{layer}: {type(model).__name__} has no linear layer of this name")
        original, bias = site.weight, site.bias
        kept_off = margin(grid_rate(qtensor.spec, n_steps))
        weight = masters(original, qtensor, kept_off) if name == "lsq" else original
        scale = stretched_scale(original.float(), qtensor.spec) if name == "seq" else qtensor.scale
        weight_quantizer = WeightQuantizer(qtensor.spec, name, scale, qtensor.zero)
        module = FakeQuantLinear(
            weight,
            bias,
            weight_quantizer,
            ActivationQuantizer.of(activations, qtensor.input_range),
        )
        if lora_rank is not None:
            module.add_lora(LoRA(lora_rank, module.weight, generator))
        model.set_submodule(layer, module)


def merge_lora(model: nn.Module) -> None:
    """Make the low-rank changes of all layers a part of their weights, in place: on the device that
    trained them, since another one's products differ in the last bit."""
    for module in fake_quant_modules(model).values():
        module.merge_lora()


@torch.no_grad()
def freeze(model: nn.Module, activations: ActSpec = ActSpec()) -> dict[str, QuantizedTensor]:
    """Replace every `FakeQuantLinear` by a `QuantLinear` with the same values, in place, and return
    the packed weights. Raises `LlmqError` when one would differ by a bit, and for other activations
    than the layers were trained with."""
    check_type("activations", activations, ActSpec, "an ActSpec, such as recipe.activations")
    frozen = {}
    for name, module in fake_quant_modules(model).items():
        trained = "none" if module.activations is None else module.activations.kind
        if trained != activations.kind:
            raise LlmqError(
                f"{name}: was trained with activations {trained}, not {activations.kind}; call "
                "llmq.freeze(model, recipe.activations)"
            )
        qtensor = frozen[name] = module.qtensor()
        if not torch.equal(qtensor.dequantize(), module.quantizer(module.master())):
            raise LlmqError(
                f"{name}: the packed weight differs from the weight that was trained; this is a "
                "defect of llmq, please report it"
            )
        bias = None if module.bias is None else module.bias.detach()
        model.set_submodule(name, QuantLinear(qtensor, bias, activations, module.weight.dtype))
    if frozen and isinstance(model, PreTrainedModel):
        state_ties(model)
        state_quantization(model)
    return frozen
