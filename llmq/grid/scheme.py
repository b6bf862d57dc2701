"""Schemes: weights, activations, keys and values in one word, as published results name them.

W4A16     4-bit weights, 16-bit activations         W8A8    both at 8 bits, activations per token
w3a8kv8   3-bit weights, 8-bit activations and 8-bit keys and values

Groups and zero points are those of the published results at that width."""

from __future__ import annotations

import re

from llmq.errors import LlmqError
from llmq.grid.spec import MAX_TEXT, ActSpec, QuantSpec

_SCHEME = re.compile(r"(?P<weights>w[2348]|ternary)(?:a(?P<activations>8|16))?(?:kv(?P<kv>[48]))?")
_GRIDS = {
    "w8": QuantSpec("int8", -1),
    "w4": QuantSpec("int4", 128),
    "w3": QuantSpec("int3", 128),
    "w2": QuantSpec("int2", 64, symmetric=False),
    "ternary": QuantSpec("ternary", 128),
}


def read_scheme(text: str) -> tuple[QuantSpec, ActSpec] | None:
    """Weights and activations of a scheme, None for what is none."""
    match = _SCHEME.fullmatch(text.strip().lower()) if len(text) <= MAX_TEXT else None
    if match is None:
        return None
    kv_bits = int(match["kv"]) if match["kv"] else None
    kind = "int8-token" if match["activations"] == "8" else "none"
    return _GRIDS[match["weights"]], ActSpec(kind, kv_bits)  # type: ignore[arg-type]


def parse_treatment(text: str) -> tuple[QuantSpec, ActSpec]:
    """Weights and activations of a spec such as w4g128, or of a scheme such as W4A16. What could be
    both, w4, is the spec: one scale per row. Raises `LlmqError` with the forms that exist."""
    try:
        return QuantSpec.parse(text), ActSpec()
    except LlmqError as error:
        found = read_scheme(text)
        if found is None:
            raise LlmqError(f"{error}; or a scheme such as W4A16, W8A8 or W2A16") from None
        return found
