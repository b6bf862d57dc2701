"""Experts as layers like others.

transformers keeps the experts of a mixture in two or three parameters with a dimension for the
expert, and multiplies with slices of them. To quantize, train or pack an expert it has to be a
layer of its own: here such a module is *unfused*, replaced by one whose children are the experts,
each with `nn.Linear` layers under the names that original checkpoints give them. Routing is the
model's, the gate between the layers is that of the module that is replaced.

What a module's parameters hold is said by flags that transformers puts on its classes, or by a row
here. A module that has neither stays fused, which `arch.refuse_fused_experts` reports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from llmq.models.grouped import Grouped, grouped_weights, may_group
from llmq_kernels.triton.grouped import Tiles, tiles_of

GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"
GATE_UP = "gate_up_proj"
# The layers that one fused parameter holds, by its name.
LAYERS_OF = {GATE_UP: (GATE, UP), UP: (UP,), DOWN: (DOWN,)}
# Gates that a kernel computes with the layers before it, by its names.
GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": partial(functional.gelu, approximate="tanh"),
}
BIAS = "_bias"  # what ends the name of a parameter of biases


@dataclass(frozen=True)
class Layout:
    """How parameters hold the weights `[N, K]` of experts.

    is_transposed: `[E, K, N]` instead of `[E, N, K]`. has_gate: the first one is gate and up
    beside each other, else up alone. is_interleaved: their outputs alternate. has_bias: there are
    biases `[E, N]`, too. is_scaled_before: what enters the module is a copy of all tokens for each
    expert, times its routing weight, which is zero for the tokens that others get. hands_on:
    numbers behind the last expert hand their inputs on; elsewhere they add nothing."""

    is_transposed: bool = False
    has_gate: bool = True
    is_interleaved: bool = False
    has_bias: bool = False
    is_scaled_before: bool = False
    hands_on: bool = False

    @property
    def first(self) -> str:
        """The parameter of what reads the inputs."""
        return GATE_UP if self.has_gate else UP

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of all parameters."""
        weights = (self.first, DOWN)
        return (*weights, *(name + BIAS for name in weights)) if self.has_bias else weights

    def matrix(self, stored: Tensor) -> Tensor:
        """`[N, K]` of one expert as it is stored (a view)."""
        return stored.T if self.is_transposed else stored

    def cut(self, joint: Tensor, layer: str) -> Tensor:
        """The rows of one layer in a matrix `[N, K]`, or biases `[N]`, that may be gate and up in
        one (a view)."""
        if layer == DOWN or not self.has_gate:
            return joint
        if self.is_interleaved:
            return joint[0 if layer == GATE else 1 :: 2]
        half = len(joint) // 2
        return joint[:half] if layer == GATE else joint[half:]


# Classes without flags.
_LAYOUTS = {
    "Llama4TextExperts": Layout(is_transposed=True, is_scaled_before=True),
    "LongcatFlashExperts": Layout(hands_on=True),
}
_FLAGS = ("is_transposed", "has_gate", "is_concatenated", "has_bias")


def layout_of(module: nn.Module) -> Layout | None:
    """The layout of a module of fused experts, None for any other module."""
    if type(module).__name__ in _LAYOUTS:
        layout = _LAYOUTS[type(module).__name__]
    elif all(isinstance(getattr(module, flag, None), bool) for flag in _FLAGS):
        values: Any = module
        layout = Layout(
            values.is_transposed, values.has_gate, not values.is_concatenated, values.has_bias
        )
    else:
        return None
    found = [module._parameters.get(name) for name in layout.parameters]
    return layout if all(parameter is not None for parameter in found) else None


class Expert(nn.Module):
    """One expert: its layers, without what happens between them."""

    def layer(self, name: str) -> nn.Linear:
        """One of them, which was a linear layer before it was quantized."""
        found: Any = self._modules[name]
        return found  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Share:
    """What one expert gets of a call. tokens, slots: int64 `[n]`, the tokens that it gets, in
    order, and which of their choices it is. x: its inputs `[n, K]`."""

    tokens: Tensor
    slots: Tensor
    x: Tensor


@dataclass(frozen=True)
class Sorted:
    """The choices of all tokens, sorted by expert. places: int64 `[T S]`, in the flattened index,
    in order for each expert. starts: where the places of expert 0, 1, ... begin, and the end."""

    places: Tensor
    starts: list[int]

    @classmethod
    def of(cls, index: Tensor) -> Sorted:
        """index: `[T, S]`, see `Routed`."""
        flat = index.flatten()
        counts = torch.bincount(flat)
        return cls(flat.argsort(stable=True), [0, *counts.cumsum(0).tolist()])

    @property
    def n_numbers(self) -> int:
        """Up to the largest that was chosen."""
        return len(self.starts) - 1

    def expert(self, number: int) -> Tensor:
        """The places of one of them."""
        if number >= self.n_numbers:
            return self.places[:0]
        return self.places[self.starts[number] : self.starts[number + 1]]


@dataclass(frozen=True)
class Routed:
    """What a module of experts is called with. x: inputs `[T, 1, K]`, or `[T, S, K]` where each
    choice of a token has its own. index: int64 `[T, S]`, the experts that each token chose; a
    number that no expert has where it chose fewer. choices: the same, sorted, if that is known."""

    x: Tensor
    index: Tensor
    choices: Sorted | None = None

    def places(self, expert: int) -> Tensor:
        """Where it was chosen, int64 `[n]`: in the flattened index, in order."""
        if self.choices is not None:
            return self.choices.expert(expert)
        return (self.index.flatten() == expert).nonzero()[:, 0]

    def inputs(self, places: Tensor) -> Tensor:
        """What goes to the experts that were chosen there, `[n, K]`."""
        has_own = self.x.shape[1] > 1
        return self.rows.index_select(0, places if has_own else places // self.index.shape[1])

    def share(self, expert: int) -> Share:
        """What goes to one of them."""
        places, n_slots = self.places(expert), self.index.shape[1]
        return Share(places // n_slots, places % n_slots, self.inputs(places))

    @property
    def rows(self) -> Tensor:
        """All inputs `[T or T S, K]`, whoever they go to."""
        return self.x.flatten(0, 1)


class UnfusedExperts(nn.Module):
    """Experts `0`, `1`, ... as children. Every expert multiplies the tokens that are routed to it
    and those without any do not run."""

    def __init__(self, fused: nn.Module, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        self.n_experts = len(fused.get_parameter(DOWN))
        self._activation: str | None = None  # "": none of `GATES`
        for index in range(self.n_experts):
            self.add_module(str(index), _expert(fused, layout, index))
        for name in layout.parameters:
            delattr(fused, name)
        for name, child in list(fused.named_children()):
            if any(True for _ in child.parameters()):  # a norm behind the experts
                self.add_module(name, child)
                delattr(fused, name)
        # In a tuple, or it would be a part of this module, and be initialised as what it was.
        self._fused = (fused,)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_"):
                raise
            return getattr(self._fused[0], name)  # what the model's other code asks it for

    def expert(self, index: int) -> Expert:
        """One of them."""
        found = self._modules[str(index)]
        assert isinstance(found, Expert)
        return found

    def routed(self, hidden_states: Tensor, *routing: Tensor, **named: Tensor) -> Routed:
        """What the arguments of a call say."""
        if not self.layout.is_scaled_before:
            return Routed(hidden_states[:, None], (*routing, *named.values())[0])
        copies = hidden_states.view(self.n_experts, -1, hidden_states.shape[-1])
        chosen = copies.any(dim=-1)  # [E, T]
        n_slots = int(chosen.sum(dim=0).max())
        index = chosen.T.int().argsort(dim=1, descending=True, stable=True)[:, :n_slots]
        tokens = torch.arange(len(index), device=index.device)[:, None]
        x = copies[index, tokens]
        return Routed(x, index.where(chosen.T.gather(1, index), self.n_experts))

    def inner(self, expert: Expert, x: Tensor) -> Tensor:
        """What an expert's last layer gets for its inputs `[..., K]`."""
        up = expert.layer(UP)(x)
        return self._gated(expert.layer(GATE)(x) if self.layout.has_gate else None, up)

    def _gated(self, gate: Tensor | None, up: Tensor) -> Tensor:
        if gate is None:
            return self._activated(up)
        apply_gate = getattr(self._fused[0], "_apply_gate", None)
        if apply_gate is None:
            return self._activated(gate) * up
        joint = torch.cat((gate, up), dim=-1)
        if self.layout.is_interleaved:
            joint = torch.stack((gate, up), dim=-1).flatten(-2)
        found: Tensor = apply_gate(joint)
        return found

    def _activated(self, x: Tensor) -> Tensor:
        found: Tensor = self.act_fn(x)
        return found

    def outputs(self, index: int, x: Tensor) -> Tensor:
        """What an expert makes of its inputs `[..., K]`, and a number behind the last."""
        if index >= self.n_experts:
            return x if self.layout.hands_on else torch.zeros_like(x)
        expert = self.expert(index)
        return self._normed(expert.layer(DOWN)(self.inner(expert, x)))

    def _normed(self, found: Tensor) -> Tensor:
        norm = self._modules.get("post_expert_norm")
        return found if norm is None else norm(found)

    def forward(self, hidden_states: Tensor, *routing: Tensor, **named: Tensor) -> Tensor:
        """Hidden states `[T, K]`, the numbers `[T, S]` of the experts of each, and the weights
        `[T, S]` of their outputs, by whatever names the model calls them."""
        if self.layout.is_scaled_before:
            return self._of_copies(hidden_states)
        index, weights = (*routing, *named.values())
        if may_group(hidden_states) and (grouped := self._grouped(hidden_states)) is not None:
            return self._in_one_launch(hidden_states, index, weights, grouped)
        dtype = torch.promote_types(hidden_states.dtype, weights.dtype)
        found = torch.zeros_like(hidden_states, dtype=dtype)
        if len(hidden_states) == 1:
            return self._of_token(hidden_states, index[0].tolist(), weights, found)
        choices = Sorted.of(index)
        for number in range(choices.n_numbers):
            places = choices.expert(number)
            if len(places) == 0:
                continue
            tokens, slots = places // index.shape[1], places % index.shape[1]
            weighted = self.outputs(number, hidden_states[tokens]) * weights[tokens, slots, None]
            found.index_add_(0, tokens, weighted.to(dtype))
        return found.to(hidden_states.dtype)

    def _grouped(self, x: Tensor) -> Grouped | None:
        names = (GATE, UP, DOWN) if self.layout.has_gate else (UP, DOWN)
        experts = [self.expert(number) for number in range(self.n_experts)]
        layers = {name: [expert.layer(name) for expert in experts] for name in names}
        return grouped_weights(self, layers, x)

    def _in_one_launch(self, x: Tensor, index: Tensor, weights: Tensor, grouped: Grouped) -> Tensor:
        """The same with one launch per layer over all experts; nothing waits for the routing. The
        outputs of a token are added in the order of its choices."""
        n_slots = index.shape[1]
        experts, order = index.reshape(-1).sort(stable=True)
        tokens = order // n_slots
        tiles = tiles_of(experts, tokens, self.n_experts)
        inner = self._inner_of_sorted(x, tiles, grouped)
        made = self._normed(grouped[DOWN].linear(inner, tiles.of_sorted()))
        others = x[tokens] if self.layout.hands_on else made.new_zeros(())
        made = torch.where((experts < self.n_experts)[:, None], made, others)
        weighted = made * weights.reshape(-1)[order, None]
        found = torch.empty_like(weighted)
        found[order] = weighted
        return found.view(len(x), n_slots, -1).sum(dim=1).to(x.dtype)

    def _inner_of_sorted(self, x: Tensor, tiles: Tiles, grouped: Grouped) -> Tensor:
        """What the last layer of each sorted row's expert reads: in one launch where its kernel has
        the gate."""
        if not self.layout.has_gate:
            return self._gated(None, grouped[UP].linear(x, tiles))
        gate, up = grouped[GATE], grouped[UP]
        if (activation := self._known_gate(x.device)) is not None and up.goes_with(gate):
            return up.gated(gate, x, tiles, activation)
        return self._gated(gate.linear(x, tiles), up.linear(x, tiles))

    def _known_gate(self, device: torch.device) -> str | None:
        """Which of `GATES` this module's is, found by trying, or None. Limits of the usual size
        show, too."""
        if self._activation is None:
            gate = torch.linspace(-100, 100, 401, device=device)
            up = gate.flip(0)
            with torch.no_grad():
                own = self._gated(gate, up)
            known = (
                name for name in GATES if torch.allclose(own, GATES[name](gate) * up, atol=1e-4)
            )
            self._activation = next(known, "")
        return self._activation or None

    def _of_token(self, x: Tensor, chosen: list[int], weights: Tensor, found: Tensor) -> Tensor:
        """The same for one token, without sorting tokens: what decoding waits for. found: `[1, K]`
        zeros."""
        for slot in sorted(range(len(chosen)), key=chosen.__getitem__):
            weighted = self.outputs(chosen[slot], x) * weights[:, slot, None]
            found += weighted.to(found.dtype)
        return found.to(x.dtype)

    def _of_copies(self, hidden_states: Tensor) -> Tensor:
        """Where all tokens come once for each expert, `[E T, K]`, those of others as zeros."""
        copies = hidden_states.view(self.n_experts, -1, hidden_states.shape[-1])
        found = torch.zeros_like(copies)
        for number, copy in enumerate(copies):
            tokens = copy.any(dim=-1).nonzero()[:, 0]
            if len(tokens):
                found[number, tokens] = self.outputs(number, copy[tokens])
        return found.view_as(hidden_states)


def _expert(fused: nn.Module, layout: Layout, index: int) -> Expert:
    """An expert with copies of its weights."""
    expert = Expert()
    for parameter in (layout.first, DOWN):
        stored = fused.get_parameter(parameter)
        matrix = layout.matrix(stored[index])
        bias = fused.get_parameter(parameter + BIAS)[index] if layout.has_bias else None
        for name in LAYERS_OF[parameter]:
            weight = layout.cut(matrix, name)
            part = None if bias is None else layout.cut(bias, name)
            expert.add_module(name, _linear(weight, part, stored.requires_grad))
    return expert


def _linear(weight: Tensor, bias: Tensor | None, requires_grad: bool) -> nn.Linear:
    n, k = weight.shape
    layer = nn.Linear(k, n, bias=bias is not None, device="meta")
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            copy = value.detach().clone(memory_format=torch.contiguous_format)
            setattr(layer, name, nn.Parameter(copy, requires_grad=requires_grad))
    return layer


def unfuse(model: nn.Module) -> None:
    """Replace every module of fused experts, in place."""
    fused = [(name, module, layout_of(module)) for name, module in model.named_modules()]
    for name, module, layout in fused:
        if layout is not None:
            model.set_submodule(name, UnfusedExperts(module, layout).train(module.training))


# What configs call the number of experts that a token goes to.
_CHOICES = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k", "num_selected_experts")


def choices_of(config: Any) -> int | None:
    """How many experts each token goes to, None where the config does not say it."""
    found = [getattr(config, key, None) for key in _CHOICES]
    numbers = [number for number in found if isinstance(number, int) and number > 0]
    return numbers[0] if numbers else None


def token_shares(model: PreTrainedModel) -> dict[str, float]:
    """The share of all tokens that an expert sees where all see equally many, by module of
    experts."""
    choices = choices_of(model.config.get_text_config())
    return {
        name: 1.0 if choices is None else min(1.0, choices / module.n_experts)
        for name, module in unfused_in(model).items()
    }


def unfused_in(model: nn.Module) -> dict[str, UnfusedExperts]:
    """The modules of experts of a model, by name."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, UnfusedExperts)
    }


def module_of(layer: str) -> str:
    """The module of experts that a layer lies in, if it is one of an expert's."""
    return layer.rpartition(".")[0].rpartition(".")[0]
