"""The names by which other engines look up what config.json says of a layer.

They are those that the layer is stored under, which transformers may call otherwise (Mixtral's
`block_sparse_moe.experts.0.w1` is its `mlp.experts.0.gate_proj`); and where an engine has one layer
for several, that of the whole: vLLM looks for a module of experts by its own name in what GPTQ and
AWQ say, and by those of its first expert in what compressed-tensors says."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from llmq.formats.base import Specs
from llmq.grid.spec import QuantSpec

_EXPERT = re.compile(r"^(.*\.experts)\.\d+\..+$")


def module_of_experts(name: str) -> str | None:
    """The module that all experts lie in, of the name of a layer of one; None of another layer."""
    found = _EXPERT.match(name)
    return found and found[1]


def alike_experts(specs: Specs) -> dict[str, QuantSpec | None]:
    """Modules of experts whose layers are all quantized alike, with the spec; None: all kept."""
    found: dict[str, set[QuantSpec | None]] = {}
    for name, spec in specs.items():
        if module := module_of_experts(name):
            found.setdefault(module, set()).add(spec)
    return {module: specs.pop() for module, specs in found.items() if len(specs) == 1}


def both(names: Iterable[str], stored: Mapping[str, str]) -> list[str]:
    """Names, and behind them those that some are stored under, each once."""
    names = list(names)
    return list(dict.fromkeys([*names, *(stored[name] for name in names if name in stored)]))


def with_modules(stored: Mapping[str, str]) -> dict[str, str]:
    """Names of layers -> those that they are stored under, and the same of modules of experts."""
    modules = {
        module: other
        for name, its in stored.items()
        if (module := module_of_experts(name))
        and (other := module_of_experts(its))
        and module != other
    }
    return {**stored, **modules}
