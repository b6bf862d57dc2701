"""`llmq inspect CHECKPOINT`."""

from __future__ import annotations

import argparse
import warnings
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

from llmq.commands import options, rendering
from llmq.commands.engine_lines import engine_lines
from llmq.commands.parser import Parser

HELP = "Show what is stored in a model folder: format, layers, dtypes, sizes, and how it was made."

EXAMPLES = ("llmq inspect tiny", "llmq inspect tiny-w4 --json")


def add_arguments(parser: Parser) -> None:
    parser.add_argument("model", help=options.MODEL_HELP)
    parser.section("where it is")
    parser.add_argument("--revision", help="revision of a Hub model")


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The result as JSON-able data and as text."""
    from llmq.formats.settings import folder_readings, format_of, quantization_settings
    from llmq.models.source import Source
    from llmq.storage.json_files import read_object

    source = Source.open(args.model, args.revision)
    model_dir, config, shards = source.folder, source.config, source.shards
    settings = quantization_settings(config)
    gguf = model_dir / "gguf.json"  # in a folder that a file was unpacked into
    engines = None if gguf.is_file() else folder_readings(source)
    remarks: list[str] = []
    if settings is not None:
        # Read for loading, with llmq's own name in the place of the one that other engines go by.
        stored = config.quantization_config
        stored = stored if isinstance(stored, dict) else stored.to_dict()
        settings["quant_method"] = stored["quant_method"]
        remarks = format_of(settings).remarks(settings, shards.dtypes)
    suffixes = Counter(name.rpartition(".")[2] for name in shards.names)
    report = _report(model_dir / "report.json")
    result: dict[str, Any] = {
        "model": str(model_dir),
        "model_type": config.model_type,
        "gguf": read_object(gguf, "what a folder was unpacked from") if gguf.is_file() else None,
        "quantization": settings,
        "decoded": source.precision if settings is None else {},
        "engines": None if engines is None else [reading.to_json() for reading in engines],
        "remarks": remarks,
        "files": {path.name: path.stat().st_size for path in source.weight_paths},
        "bytes": source.weight_bytes,
        "tensors": len(shards.names),
        "tensor_kinds": dict(suffixes),
        "dtypes": dict(Counter(shards.dtypes.values())),
        "elements": sum(map(prod, shards.shapes.values())),
        "specs": dict(Counter(str(layer["spec"]) for layer in report["layers"]))
        if report
        else None,
        "report": {key: value for key, value in report.items() if key != "layers"}
        if report
        else None,
    }
    return result, _text(result)


def _report(path: Path) -> dict[str, Any] | None:
    """The report of the run that made a folder, or None, with a warning where a file of that name
    is something else: it says nothing of the weights, so that they are shown without it."""
    from llmq.errors import LlmqError, LlmqWarning
    from llmq.storage.boundary import reading
    from llmq.storage.json_files import read_object

    if not path.exists():
        return None
    try:
        report = read_object(path, "a report of llmq")
        with reading(path, "not a report of llmq", "it is left out"):
            Counter(str(layer["spec"]) for layer in report["layers"])
            _origin(report)
            rendering.outside_lines(report.get("outside", []))
        return report
    except LlmqError as error:
        warnings.warn(f"{error}; shown without it", LlmqWarning, stacklevel=2)
        return None


def _text(result: dict[str, Any]) -> str:
    pairs: dict[str, object] = {
        "model": f"{result['model']} ({result['model_type']})",
        "format": _format(result),
        "files": f"{len(result['files'])}, {result['bytes'] / 1e6:.1f} MB, "
        f"{result['tensors']} tensors",
        "dtypes": ", ".join(f"{dtype} x {count}" for dtype, count in result["dtypes"].items()),
    }
    if result["remarks"]:
        pairs["llmq runs it"] = "; ".join(result["remarks"])
    if gguf := result["gguf"]:
        types = ", ".join(f"{kind} x {count}" for kind, count in gguf["types"].items())
        pairs["unpacked from"] = f"{gguf['name']} ({types})"
    if result["specs"]:
        pairs["layers"] = ", ".join(f"{count} x {spec}" for spec, count in result["specs"].items())
    if report := result["report"]:
        pairs |= rendering.outside_lines(report.get("outside", []))
        pairs |= _origin(report)
    text = rendering.render_pairs(pairs)
    return f"{text}\n{engine_lines(result['engines'])}" if result["engines"] else text


def _format(result: dict[str, Any]) -> str:
    """The format of a folder, or what its weights are decoded from."""
    if result["quantization"] is not None:
        return str(result["quantization"]["format"])
    if not result["decoded"]:
        return "full precision"
    kinds = ", ".join(f"{count} x {kind}" for kind, count in result["decoded"].items())
    return f"{kinds}, decoded to bfloat16 where it is read"


def _origin(report: dict[str, Any]) -> dict[str, object]:
    """How a folder was made, from the report of `quantize` or of `qat`."""
    counts = ", ".join(
        f"{len(report[name])} {name}" for name in ("fallbacks", "notes") if name in report
    )
    pairs: dict[str, object] = {
        "made by": f"{report['method']} in {report['seconds']:.0f} s, "
        f"llmq {report['versions']['llmq']}, {counts}"
    }
    if report["method"] == "qat":
        pairs["training"] = (
            f"{report['budget']['tokens']} tokens of {report['train']['source']}, teacher "
            f"{report['teacher']}; shipped: {report['shipped']}"
        )
    else:
        calibration = report["calibration"]
        pairs["calibration"] = (
            f"{calibration['windows'][0]} x {calibration['windows'][1]} tokens of "
            f"{calibration['source']}, sha256 {calibration['sha256'][:16]}"
            if calibration
            else "none"
        )
    return pairs
