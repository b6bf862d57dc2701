"""The rungs: a spec and a method each."""

from __future__ import annotations

from dataclasses import dataclass

from llmq.errors import LlmqError
from llmq.grid.scheme import parse_treatment
from llmq.ptq.methods import split_name

# From large to small; of equal bits those in larger groups are smaller.
SPECS = ("w8", "w4g64", "w4g128", "w3g64-asym", "w3g128", "w2g64-asym")
METHODS = ("rtn", "gptq", "blockwise")  # from cheap to dear
USUAL = (
    "w8:rtn",
    *(f"{spec}:{method}" for spec in SPECS[1:] for method in ("rtn", "gptq")),
)


@dataclass(frozen=True)
class Rung:
    """spec: of all layers. method: its name, with transforms before it or without."""

    spec: str
    method: str

    @classmethod
    def parse(cls, text: str) -> Rung:
        """Read SPEC:METHOD, such as w4g128:gptq; SPEC alone is by GPTQ. Raises `LlmqError`."""
        spec, _, method = text.partition(":")
        parse_treatment(spec)
        method = method or "gptq"
        split_name(method)
        return cls(spec, method)

    def __str__(self) -> str:
        return f"{self.spec}:{self.method}"

    @property
    def folder_name(self) -> str:
        return f"{self.spec}-{self.method.replace('+', '-')}"


def read_rungs(texts: list[str]) -> list[Rung]:
    """Rungs without any twice. Raises `LlmqError` for none."""
    if not texts:
        raise LlmqError("no rungs: give some as SPEC:METHOD, such as w4g128:gptq")
    return [Rung.parse(text) for text in dict.fromkeys(texts)]
