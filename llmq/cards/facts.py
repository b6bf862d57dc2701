"""What a result is and how it was made, in a few lines of a table: from a report of `quantize` or
`qat`, as it is or as an export left it, or from what `llmq.save` knows of a model in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from llmq.cards.markdown import code, pairs, plain, table
from llmq.errors import LlmqError
from llmq.grid.spec import PER_ROW, PER_TENSOR, ActSpec, QuantSpec

QAT = "qat"
GGUF = "gguf"


def specs_of(report: Mapping[str, Any]) -> Counter[str]:
    """How many layers are quantized by each spec, the most frequent first."""
    specs = (layer["spec"] for layer in report["layers"])
    return Counter(dict(Counter(str(spec) for spec in specs if spec is not None).most_common()))


def kept_of(report: Mapping[str, Any]) -> list[str]:
    """Linear layers that stay in full precision."""
    if "kept_layers" in report:
        return list(report["kept_layers"])
    return [layer["name"] for layer in report["layers"] if layer["spec"] is None]


def bits_words(specs: Mapping[str, int]) -> str:
    """The bits of layers in words: "4 bits", "ternary", "2 to 8 bits"."""
    codes = {_code_of(spec) for spec in specs} - {""}
    bits = sorted({int(each) for each in codes if each.isdigit()})
    words = ["ternary"] * ("ternary" in codes)
    if bits:
        span = f"{bits[0]} to {bits[-1]}" if len(bits) > 1 else str(bits[0])
        words.append(f"{span} bits")
    return " and ".join(words) or "full precision"


def bits_tags(specs: Mapping[str, int]) -> list[str]:
    """The same as tags of the Hub: 4-bit, ternary."""
    codes = sorted({_code_of(spec) for spec in specs} - {""})
    return [f"{each}-bit" if each.isdigit() else each for each in codes]


def _code_of(spec: str) -> str:
    try:
        parsed = QuantSpec.parse(spec)
    except LlmqError:
        return ""
    return "ternary" if parsed.code == "ternary" else str(parsed.bits)


def describe(spec: str) -> str:
    """A spec in words: "4 bits, groups of 128"."""
    try:
        parsed = QuantSpec.parse(spec)
    except LlmqError:
        return ""
    whole = {PER_ROW: "a scale per row", PER_TENSOR: "a scale per tensor"}
    bits = "ternary" if parsed.code == "ternary" else f"{parsed.bits} bits"
    groups = whole.get(parsed.group_size, f"groups of {parsed.group_size}")
    return ", ".join([bits, groups] + ["zero points"] * (not parsed.symmetric))


def sizes(report: Mapping[str, Any]) -> str:
    """Markdown: bytes and bits before, where that is known, and after."""
    after, before = report["stored_bytes"], report.get("source_bytes")
    bits = report.get("bits_per_weight")
    rows = [["weight files", _megabytes(before), _megabytes(after)]]
    if bits:
        was = f"{bits * before / after:.2f}" if before else ""
        rows.append(["bits per weight of the model", was, f"{bits:.2f}"])
    if own := report.get("bits_per_quantized_weight"):
        rows.append(["bits per quantized weight, scales included", "", f"{own:.2f}"])
    if before:
        return table(["", "before", "after"], rows)
    return table(["", ""], [[name, own] for name, _, own in rows])


def _megabytes(n_bytes: int | None) -> str:
    return "" if n_bytes is None else f"{n_bytes / 1e6:,.1f} MB"


def settings(report: Mapping[str, Any]) -> str:
    """Markdown: how it was made, and what came out otherwise than asked."""
    n_kept = len(kept_of(report))
    rows = {
        "method": _method(report),
        "layers": ", ".join(
            f"{count} x {code(spec)} ({describe(spec)})" if describe(spec) else f"{count} x {spec}"
            for spec, count in specs_of(report).items()
        ),
        "linear layers in full precision": str(n_kept),
    }
    for outside in report.get("outside") or []:
        rows[plain(outside["role"])] = code(outside["spec"])
    rows |= _activations(report) | _text(report) | _deviations(report) | _exported(report)
    rows["format"] = code(report["format"])
    rows["made with"] = ", ".join(f"{name} {own}" for name, own in report["versions"].items())
    return pairs({name: value for name, value in rows.items() if value})


def _method(report: Mapping[str, Any]) -> str:
    method = report.get("method")
    if method != QAT:
        return "" if method is None else code(method)
    own, steps = report["settings"], report["budget"]
    shipped = (
        "" if report["shipped"] == "trained" else "; training did not beat it: it is the start"
    )
    return (
        f"`qat`, {steps['steps']:,} steps of {steps['tokens']:,} tokens in all, quantizer "
        f"{code(own['quantizer'])}, from a start by {code(own['init'])}{shipped}"
    )


def _activations(report: Mapping[str, Any]) -> dict[str, str]:
    if not quantizes_activations(report) or report["format"] == GGUF:
        return {}
    return {"activations": plain(_spec_of_activations(report))}


def quantizes_activations(report: Mapping[str, Any]) -> bool:
    """Whether more than weights was quantized when it was made."""
    return not _spec_of_activations(report).is_none


def _spec_of_activations(report: Mapping[str, Any]) -> ActSpec:
    found = report.get("activations") or (report.get("recipe") or {}).get("activations")
    return ActSpec.from_json(found or {})


def _text(report: Mapping[str, Any]) -> dict[str, str]:
    """The text that it was calibrated or trained on."""
    if report.get("method") == QAT:
        return {"training text": plain(report["train"]["source"])}
    text = report.get("calibration")
    if not text:
        return {}
    n_windows, length = text["windows"]
    return {
        "calibration text": f"{n_windows} x {length} tokens of {plain(text['source'])}, sha256 "
        f"`{text['sha256'][:16]}`"
    }


def _deviations(report: Mapping[str, Any]) -> dict[str, str]:
    rows = {}
    if "fallbacks" in report:
        rows["layers that fell back to plain rounding"] = str(len(report["fallbacks"]))
    if large := report.get("layers_with_large_error"):
        rows["layers that lost more than half of their output"] = str(len(large))
    return rows


def _exported(report: Mapping[str, Any]) -> dict[str, str]:
    found = report.get("exported")
    if not found:
        return {}
    source = found["source_format"]
    rows = {"exported from": f"{code(source)} format" if source else "full precision"}
    if count := found["n_requantized"]:
        rows["layers rounded anew by the export"] = (
            f"{count} of {found['n_layers']}, by at most {found['max_relative_error']:.2%} of the "
            "norm of their weights"
        )
    types = ", ".join(f"{number} x {name}" for name, number in found["types"].items())
    return {**rows, "stored tensors": types}
