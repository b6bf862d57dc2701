"""`llmq doctor`."""

from __future__ import annotations

import argparse
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from llmq.commands import doctor_model, options, rendering
from llmq.commands.parser import Parser

HELP = (
    "Print versions, devices, the backends that work here, and what is missing; of a MODEL, what "
    "would be quantized, what kept and why, and which formats hold it."
)
EXAMPLES = ("llmq doctor", "llmq doctor --json", "llmq doctor Qwen/Qwen3.5-4B")

REQUIRED = (
    "torch",
    "transformers",
    "datasets",
    "accelerate",
    "safetensors",
    "huggingface-hub",
    "rich",
)
OPTIONAL = {
    "triton": "GPU kernels",
    "llvmlite": "'.[cpu]': fast CPU kernels",
    "lm-eval": "'.[eval]': its tasks on a loaded model",
    "gguf": "'.[gguf]': the comparison with llama.cpp",
    "matplotlib": "'.[plots]': plots",
    "pillow": "'.[vision]': pictures beside calibration text",
}


def add_arguments(parser: Parser) -> None:
    parser.add_argument("model", nargs="?", help=options.MODEL_HELP)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The result as JSON-able data and as text."""
    if args.model is not None:
        return doctor_model.examine(args.model)
    import torch

    from llmq import __version__
    from llmq_kernels import BACKENDS
    from llmq_kernels.core import restricted, trials

    devices = [
        f"cpu ({torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()})"
    ]
    devices += [
        f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())
    ]
    restricted.adapt()  # warns, where this process cannot run what others can
    places = [torch.device("cpu")] + [
        torch.device("cuda", i) for i in range(torch.cuda.device_count())
    ]
    backends = {backend.name: trials.obstacle(backend, places) for backend in BACKENDS}
    packages = {name: _version(name) for name in (*REQUIRED, *OPTIONAL)}
    result: dict[str, Any] = {
        "llmq": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "devices": devices,
        "backends": {name: reason or "works here" for name, reason in backends.items()},
        "executable_memory": restricted.reason() or "allowed",
        "onednn": _onednn(),
        "backend_override": os.environ.get("LLMQ_BACKEND"),
        "compute": os.environ.get("LLMQ_COMPUTE") or "exact",
        "compiled_kernels": _compiled_kernels(),
        "missing": [name for name in REQUIRED if packages[name] is None],
        "missing_optional": {
            name: purpose for name, purpose in OPTIONAL.items() if packages[name] is None
        },
    }
    return result, _text(result)


def _onednn() -> str:
    """Whether torch multiplies with oneDNN in this process."""
    import torch

    from llmq_kernels.core import restricted

    if not torch.backends.mkldnn.is_available():
        return "not in this torch"
    if torch.backends.mkldnn.enabled:
        return "works here"
    return f"off: {restricted.verdict(restricted.ONEDNN) or 'it generates code'}"


def _compiled_kernels() -> dict[str, Any]:
    """What the kernels that llmq compiles for the CPU have here."""
    from llmq_kernels.compiled import jit, threads
    from llmq_kernels.core.cache import cache_dir

    forms = {
        form: jit.obstacle(form, "not on this CPU or system") or "works here" for form in jit.FORMS
    }
    return {
        "forms": forms,
        "threads": threads.threads_of(),
        "cache": str(cache_dir()),
        "cache_state": jit.cache_obstacle() or "used",
    }


def _text(result: dict[str, Any]) -> str:
    pairs: dict[str, object] = {
        "llmq": result["llmq"],
        "python": f"{result['python']} on {result['platform']}",
    }
    pairs |= {name: number or "-" for name, number in result["packages"].items()}
    pairs |= {"devices": ", ".join(result["devices"])}
    pairs |= {f"backend {name}": state for name, state in result["backends"].items()}
    pairs["compute"] = (
        f"{result['compute']} (--compute int8 or LLMQ_COMPUTE=int8 rounds activations to INT8, for "
        "speed)"
    )
    compiled = result["compiled_kernels"]
    pairs |= {f"kernels for {form}": state for form, state in compiled["forms"].items()}
    kept = f"kept in {compiled['cache']}"
    if compiled["cache_state"] != "used":
        kept = f"not kept: {compiled['cache_state']}"
    pairs["compiled kernels"] = f"in {compiled['threads']}, {kept}"
    pairs["executable memory"] = result["executable_memory"]
    pairs["oneDNN"] = result["onednn"]
    if result["missing"]:
        pairs["missing"] = (
            f"{', '.join(result['missing'])}: pip install . in a clone of llmq brings them"
        )
    for name, purpose in result["missing_optional"].items():
        pairs[f"optional {name}"] = f"not installed ({purpose})"
    return rendering.render_pairs(pairs)
