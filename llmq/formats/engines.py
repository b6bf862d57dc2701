"""Which engine reads which result: one row per engine, held against the engines' own checks in
tests/formats/test_engines.py where they are installed.

An engine has a rule for each format that it opens. A rule says why a result in that format is not
read all the same, as far as bits, group sizes, zero points, activations and the like decide it;
what an engine thinks of a model's family is not known here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from llmq.formats import engine_rules as rules
from llmq.formats.engine_rules import Result

Rule = Callable[[Result], str | None]


@dataclass(frozen=True)
class Engine:
    """version: the one that was looked at, on the day `checked`. how: "run" where it opened folders
    and its numbers were compared, "read" where its source was. rules: by format. otherwise: why it
    does not open any other. device: the one that a row is about which has a row without, too."""

    name: str
    version: str
    checked: str
    how: str
    rules: dict[str, Rule]
    otherwise: str
    exceptions: dict[str, str] = field(default_factory=dict)
    device: str = ""

    def refusal(self, result: Result) -> str | None:
        """Why it does not read a result, or None where it does."""
        rule = self.rules.get(result.format)
        if rule is not None:
            return rule(result)
        return self.exceptions.get(result.format, self.otherwise)


@dataclass(frozen=True)
class Reading:
    """What one engine makes of a result. reason: why it does not read it, None where it does."""

    engine: str
    version: str
    reason: str | None

    @property
    def reads(self) -> bool:
        return self.reason is None

    def to_json(self) -> dict[str, Any]:
        return {
            "engine": self.engine,
            "version": self.version,
            "reads": self.reads,
            "reason": self.reason,
        }


def readings(result: Result) -> list[Reading]:
    """What every engine makes of a result, in the order of `ENGINES`."""
    return [Reading(each.name, each.version, each.refusal(result)) for each in ENGINES]


def refused_by(result: Result) -> str | None:
    """Engines that open the format in general and not this result, with their reasons, or None
    where there are none. What one of them does on another device is not counted."""
    reasons = by_reason(
        [
            Reading(each.name, each.version, each.refusal(result))
            for each in ENGINES
            if result.format in each.rules and not each.device
        ]
    )
    told = [f"not read by {', '.join(names)}: {reason}" for reason, names in reasons.items()]
    return "; ".join(told) or None


def by_reason(found: list[Reading]) -> dict[str, list[str]]:
    """Names of the engines that do not read a result, by what keeps them from it."""
    names: dict[str, list[str]] = {}
    for reading in found:
        if reading.reason is not None:
            names.setdefault(reading.reason, []).append(reading.engine)
    return names


_FORMATS = ("llmq", "gptq", "gptq_v2", "awq", "bitnet", "compressed-tensors", "gguf")
_RANDOM = "without import llmq it fills the layers with random numbers"
_GGUF = "it opens GGUF files only"

ENGINES = (
    Engine(
        "llmq",
        "this version",
        "2026-11-26",
        "run",
        dict.fromkeys(_FORMATS, rules.anything),
        "it does not know the format",
    ),
    Engine(
        "transformers",
        "5.23",
        "2026-11-26",
        "run",
        {"bitnet": rules.anything},
        "it does not know the format",
        {
            "llmq": _RANDOM,
            "gptq": "it needs gptqmodel and optimum beside it",
            "gptq_v2": "it needs gptqmodel and optimum beside it",
            "awq": "it needs gptqmodel beside it",
            "compressed-tensors": "it needs compressed-tensors beside it",
            "gguf": "it needs gguf beside it, and unpacks all weights",
        },
    ),
    Engine(
        "transformers + compressed-tensors",
        "5.23 + 0.20",
        "2026-11-26",
        "run",
        {"bitnet": rules.anything, "compressed-tensors": rules.transformers_compressed},
        "compressed-tensors does not open it",
        {"llmq": _RANDOM},
    ),
    Engine(
        "transformers + gptqmodel",
        "5.23 + 7.7",
        "2026-11-26",
        "run",
        {
            "bitnet": rules.anything,
            "gptq": rules.optimum_gptq,
            "gptq_v2": rules.optimum_gptq,
            "awq": rules.transformers_awq,
        },
        "gptqmodel does not open it there",
        {"llmq": _RANDOM},
    ),
    Engine(
        "vLLM",
        "0.32",
        "2026-11-26",
        "read",
        {
            "gptq": rules.vllm_gptq,
            "gptq_v2": rules.vllm_gptq,
            "awq": rules.vllm_awq,
            "compressed-tensors": rules.vllm_compressed,
        },
        "it does not know the format",
    ),
    Engine(
        "vLLM on a CPU",
        "0.32",
        "2026-11-26",
        "run",
        {
            "gptq": rules.vllm_cpu_gptq,
            "gptq_v2": rules.vllm_cpu_gptq,
            "awq": rules.vllm_cpu_awq,
            "compressed-tensors": rules.vllm_cpu_compressed,
        },
        "it does not know the format",
        device="cpu",
    ),
    Engine(
        "SGLang",
        "0.5",
        "2026-11-26",
        "read",
        {
            "gptq": rules.sglang_gptq,
            "gptq_v2": rules.sglang_gptq,
            "awq": rules.vllm_awq,
            "compressed-tensors": rules.sglang_compressed,
        },
        "it does not know the format",
    ),
    Engine(
        "GPTQModel",
        "7.7",
        "2026-11-26",
        "run",
        {
            "gptq": rules.gptqmodel,
            "gptq_v2": rules.gptqmodel,
            "awq": rules.gptqmodel_awq,
            "bitnet": rules.anything,
        },
        "it opens GPTQ, AWQ and BitNet",
        {"llmq": _RANDOM},
    ),
    Engine(
        "mlx-lm",
        "0.32",
        "2026-11-26",
        "run",
        {"awq": rules.mlx_awq, "bitnet": rules.anything},
        "it does not know the format",
        {
            "gptq": "it takes GPTQ's layout for AWQ's",
            "gptq_v2": "it takes GPTQ's layout for AWQ's",
            "compressed-tensors": "it opens that of single models only",
        },
    ),
    Engine("llama.cpp", "0.3.36", "2026-11-26", "run", {"gguf": rules.anything}, _GGUF),
)
