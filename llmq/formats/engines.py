"""What other engines ask of a folder beyond its format, as far as the layers decide it."""

from __future__ import annotations

from llmq.formats.base import Specs
from llmq.grid.spec import QuantSpec
from llmq.models.site import fused_names


def fused_disagreement(specs: Specs) -> str | None:
    """Layers that vLLM and SGLang join into one although they are quantized differently (or one of
    them is not), so that these engines cannot load the folder; None where there are none."""
    first: dict[tuple[str, ...], tuple[str, QuantSpec | None]] = {}
    for name, spec in specs.items():
        other, expected = first.setdefault(fused_names(name), (name, spec))
        if spec != expected:
            return (
                f"vLLM and SGLang will not: {other} ({expected or 'kept'}) and {name} "
                f"({spec or 'kept'}) are one layer there, whose parts must be quantized alike"
            )
    return None
