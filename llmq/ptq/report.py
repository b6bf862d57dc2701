"""What a quantization run says about itself: `report.json`, from measured values."""

from __future__ import annotations

from typing import Any

from llmq.cards.versions import versions
from llmq.formats.engines import readings
from llmq.models.identity import source_name
from llmq.ptq.job import Job
from llmq.ptq.methods import method_of
from llmq.ptq.parts import n_weights_of
from llmq.schema import SCHEMA_KEY, SCHEMA_VERSION
from llmq.text.documents import TokenSet


def build_report(
    job: Job,
    blocks: list[dict[str, Any]],
    *,
    source_bytes: int,
    stored_bytes: int,
    copied: list[str],
    resumed_at: int,
    seconds: float,
    device: str,
) -> dict[str, Any]:
    """Everything that was measured and decided, JSON-able. source_bytes, stored_bytes: size of the
    weight files before and after. copied: stored tensors that the model has no place for, which the
    output has as they were."""
    layers = _with_sizes([layer for block in blocks for layer in block["layers"]], job)
    n_weights = sum(layer["shape"][0] * layer["shape"][1] for layer in layers)
    bits = 8 * sum(layer["n_bytes"] for layer in layers) / n_weights
    return {
        SCHEMA_KEY: SCHEMA_VERSION,
        "model": job.source.name,
        "source_precision": job.source.precision,
        "method": job.recipe.method,
        "format": job.fmt.name,
        "recipe": job.recipe.to_json(),
        "calibration": None if job.tokens is None else _about_text(job.tokens),
        "source_bytes": source_bytes,
        "stored_bytes": stored_bytes,
        "n_quantized_layers": len(layers),
        "kept_layers": [plan.layer.name for plan in job.plans if plan.spec is None],
        "notes": job.notes,
        "engines": [reading.to_json() for reading in readings(job.result)],
        "bits_per_quantized_weight": round(bits, 4),
        "bits_per_weight": round(8 * stored_bytes / n_weights_of(job), 4),
        **_deviations(layers, job.recipe.damping),
        "unused_source_tensors": [],  # nothing is left out
        "copied_source_tensors": copied,
        "verified_blocks": len(blocks),
        "resumed_at_block": resumed_at,
        "seconds": round(seconds, 2),
        "seconds_per_block": [round(block["seconds"], 3) for block in blocks],
        "transforms": [
            {"block": block["index"], **moved}
            for block in blocks
            for moved in block.get("transforms", ())
        ],
        "experts": [module for block in blocks for module in block.get("experts", ())],
        "tuned_blocks": [_about_tuning(block) for block in blocks if _is_tuned(block)],
        "layers": layers,
        "device": device,
        **_precision(job, device),
        "versions": versions(),
    }


def outside_of_blocks(job: Job, found: dict[str, Any] | None) -> dict[str, Any]:
    """What the report says of embeddings and head that are quantized. found: as it was recorded
    when they were, None of folders that earlier versions began."""
    return {"outside": _with_sizes(found["tables"], job) if found else []}


def _with_sizes(layers: list[dict[str, Any]], job: Job) -> list[dict[str, Any]]:
    """What is known of layers, with what each takes in the format."""
    plans = {plan.layer.name: plan for plan in job.all_plans}
    sized = []
    for layer in layers:
        n_bytes, (n, k) = job.planned_bytes(plans[layer["name"]]), layer["shape"]
        sized.append({**layer, "n_bytes": n_bytes, "bits_per_weight": 8 * n_bytes / (n * k)})
    return sized


def _about_text(tokens: TokenSet) -> dict[str, Any]:
    return {
        "source": tokens.read.get("source") or source_name(tokens.source),
        "windows": list(tokens.tokens.shape),
        "sha256": tokens.sha256,
        "text": tokens.read,
    }


def _deviations(layers: list[dict[str, Any]], damping: float) -> dict[str, Any]:
    """Which layers came out otherwise than they should, and how many. damping: the usual one."""
    return {
        "fallbacks": [layer["name"] for layer in layers if layer["fallback"]],
        "layers_with_large_error": [layer["name"] for layer in layers if _is_large(layer)],
        "n_worse_than_rounding": sum(
            layer["error"] is not None and layer["error"] > layer["rtn_error"] for layer in layers
        ),
        "n_kept_rounding": sum(layer["kept_rounding"] for layer in layers),
        "n_extra_damping": sum(layer["damping"] > damping for layer in layers),
        "n_dead_columns": sum(layer["n_dead_columns"] for layer in layers),
        "n_dropped_rows": sum(layer["n_dropped_rows"] for layer in layers),
    }


def _is_tuned(block: dict[str, Any]) -> bool:
    return block["tuned_error"] is not None


_TUNING = (
    "index",
    "start_error",
    "tuned_error",
    "n_skipped_steps",
    "tuning_by_class",
    "tuning_worse_in",
)


def _about_tuning(block: dict[str, Any]) -> dict[str, Any]:
    return {key: block[key] for key in _TUNING}


def _precision(job: Job, device: str) -> dict[str, str | None]:
    """What was computed in which dtype, where it was computed at all."""
    needs, precision = method_of(job.recipe).needs(job.recipe), job.precision(device)
    stream = str(precision.stream).removeprefix("torch.")
    training = str(precision.training).removeprefix("torch.")
    gradients = str(precision.gradients).removeprefix("torch.")
    return {
        "full_precision_stream": stream if needs.hessian else None,
        "token_weights_in": None if job.recipe.token_weights == "equal" else gradients,
        "tuned_in": training if needs.tuning or job.recipe.scale_steps else None,
    }


LARGE_ERROR = 0.5


def _is_large(layer: dict[str, Any]) -> bool:
    """Whether a layer lost more than half of its output, or of its weights where nothing else was
    measured."""
    measured = layer["weight_error"] if layer["error"] is None else layer["error"]
    return measured is not None and not measured <= LARGE_ERROR
