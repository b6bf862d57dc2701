"""Layers that read the same input become one product.

For one token a product of a small layer is mostly the cost of starting it: quantizing the input,
waking threads, allocating the output. q, k and v, and gate and up, read the very same tensor, so
their rows are stacked into one weight. Which layers these are is seen, not known: the model runs
once with every quantized layer replaced by a stand-in that notes its input and returns zeros, which
costs next to nothing and works for every family.

The modules keep their places. The first that is called with an input computes the product for all,
the others hand out their rows of it; in every thread for itself."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmq.errors import LlmqError
from llmq.grid.tensor import stack_rows
from llmq.inference.module import QuantLinear, quantized_modules


class SharedProduct(nn.Module):
    """One product for several layers. sizes: rows of each. What is not fetched yet is kept by
    thread: several can be in the same layer at once, each with an input of its own."""

    def __init__(self, linear: QuantLinear, sizes: Sequence[int]) -> None:
        super().__init__()
        self.linear, self.sizes = linear, tuple(sizes)
        self._waiting: dict[int, tuple[Tensor, list[Tensor | None]]] = {}

    def part(self, x: Tensor, index: int) -> Tensor:
        """`x @ W_index.T + bias_index`. Outputs live until they are fetched or another input
        comes."""
        # A compiled graph keeps what waits in variables of its own.
        thread = 0 if torch.compiler.is_compiling() else threading.get_ident()
        read, outputs = self._waiting.get(thread, (None, []))
        if read is not x or outputs[index] is None:
            outputs = list(self.linear(x).split(self.sizes, dim=-1))
            self._waiting[thread] = (x, outputs)
        output, outputs[index] = outputs[index], None
        assert output is not None
        if all(waiting is None for waiting in outputs):
            del self._waiting[thread]
        return output


class SharedPart(nn.Module):
    """Stands where a layer was whose rows are now part of a `SharedProduct`."""

    def __init__(self, product: SharedProduct, index: int, in_features: int) -> None:
        super().__init__()
        self.product, self.index = product, index
        self.in_features, self.out_features = in_features, product.sizes[index]

    def forward(self, x: Tensor) -> Tensor:
        return self.product.part(x, self.index)

    def _save_to_state_dict(self, destination: object, prefix: str, keep_vars: bool) -> None:
        raise LlmqError(
            f"{prefix.removesuffix('.')}: the layers of this model were fused for decoding; load "
            "the folder again to save it"
        )


def fuse_shared_inputs(model: PreTrainedModel) -> list[list[str]]:
    """Fuse what reads the same input and is quantized alike, in place. Returns the names of the
    layers that became one, group by group."""
    modules = quantized_modules(model)
    fused = []
    for names in _groups(model, modules):
        for alike in _alike({name: modules[name] for name in names}):
            if len(alike) > 1:
                _fuse(model, alike)
                fused.append(list(alike))
    return fused


def _groups(model: PreTrainedModel, modules: dict[str, QuantLinear]) -> list[list[str]]:
    if not modules:
        return []
    seen: list[
        tuple[Tensor, list[str]]
    ] = []  # holding the tensors keeps their identity from being reused
    with _stand_ins(modules, seen), torch.no_grad():
        model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.device), use_cache=False)
    return [names for _, names in seen]


@contextmanager
def _stand_ins(
    modules: dict[str, QuantLinear], seen: list[tuple[Tensor, list[str]]]
) -> Iterator[None]:
    def stand_in(name: str, n_rows: int) -> object:
        def forward(x: Tensor) -> Tensor:
            names = next((names for tensor, names in seen if tensor is x), None)
            if names is None:
                seen.append((x, [name]))
            else:
                names.append(name)
            return x.new_zeros(*x.shape[:-1], n_rows)

        return forward

    for name, module in modules.items():
        replacement = stand_in(name, module.out_features)
        module.forward = replacement  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        for module in modules.values():
            del module.forward


def _alike(modules: dict[str, QuantLinear]) -> list[dict[str, QuantLinear]]:
    """Layers whose weights can lie in one: same spec, activations and biases or none, and no order
    or range of inputs, and no hooks on their outputs (which quantize keys and values), of their
    own."""
    found: dict[object, dict[str, QuantLinear]] = {}
    for name, module in modules.items():
        is_own = (
            module.g_idx is not None
            or module.input_range is not None
            or bool(module._forward_hooks)
        )
        key = (
            module.spec,
            module.activations,
            module.compute,
            module.bias is None,
            name if is_own else None,
        )
        found.setdefault(key, {})[name] = module
    return list(found.values())


def _fuse(model: PreTrainedModel, modules: dict[str, QuantLinear]) -> None:
    first = next(iter(modules.values()))
    biases = [module.bias for module in modules.values() if module.bias is not None]
    linear = QuantLinear(
        stack_rows([module.qtensor() for module in modules.values()]),
        torch.cat(biases) if biases else None,
        first.activations,
        first.weight_dtype,
    )
    linear.set_compute(first.compute)
    product = SharedProduct(linear, [module.out_features for module in modules.values()])
    for index, (name, module) in enumerate(modules.items()):
        model.set_submodule(name, SharedPart(product, index, module.in_features))
