"""Everything that needs a GPU, in one call of under ten minutes: the GPU tests, tuning, the kernel
table and decoding. Writes JSON (and a plot where matplotlib is installed) to a folder.

    python scripts/benchmark_kernels.py --out gpu-results

It runs from a clone as it is. Time is shared out: tests and tuning have their own limits, the table
stops where decoding needs what is left of --max-seconds, and what was not reached is counted in the
JSON. Each step is a process of its own: one that fails, or loses the GPU, is reported at the end
and does not stop the others; the exit code is 1 then. The tuned file in the folder can be shipped
as `kernels/llmq_kernels/triton/tuned/<gpu>.json`."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
ROOTS = [str(ROOT), str(ROOT / "kernels")]
sys.path[:0] = ROOTS

from llmq.benchmark import kernels, plot, tuner  # noqa: E402
from llmq.benchmark.decode import compare_decode  # noqa: E402
from llmq_kernels.triton import choices, tuning  # noqa: E402

STEPS = ("tests", "defaults", "tune", "kernels", "decode")

# kept for the last step: making and quantizing 8B weights on the device, and two times 64 tokens
DECODE_SECONDS = 90


def run_tests(out: Path, seconds: float) -> dict[str, Any]:
    """`pytest -m gpu`; its whole output goes to a file."""
    # Most of the time goes into compiling some 200 kernels.
    parallel = ["-n", str(min(os.cpu_count() or 1, 12))] if find_spec("xdist") else []
    with (out / "tests.txt").open(
        "w+"
    ) as log:  # a file, so that what ran before a timeout can be read
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-v", "-m", "gpu", *parallel, "tests/kernels"],
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
            env=environment(),
        )
        log.seek(0)
        last = log.read().strip().splitlines()[-1]
    if done.returncode:
        raise RuntimeError(f"pytest ended with {done.returncode}: {last}; see tests.txt")
    return {"result": last}


def environment() -> dict[str, str]:
    """That of a child, with the clone's packages."""
    path = os.pathsep.join([*ROOTS, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path}


def tune(device: torch.device, seconds: float, out: Path) -> dict[str, Any]:
    """Tuned choices, for this user and as a file to ship."""
    kinds = [kernels.Kind(text) for text in kernels.GPU_WEIGHTS]
    report = tuner.tune(kernels.GPU_SHAPES, kernels.GPU_ROWS, kinds, device, seconds)
    chip = choices.chip_of(device)
    name = f"{tuning.slug(chip.name)}.json"
    for path in (tuning.tuned_dir() / name, out / name):
        tuning.save(chip, path, versions())
    return {"problems": len(report.seconds), **asdict(report)}


def table(device: torch.device, out: Path, deadline: float) -> dict[str, Any]:
    """Every shape, M and kind of weight, as far as the time allows."""
    rows: list[dict[str, Any]] = []
    n_rows = len(kernels.GPU_SHAPES) * len(kernels.GPU_ROWS) * len(kernels.GPU_WEIGHTS)
    for row in kernels.measure(
        kernels.GPU_SHAPES,
        kernels.GPU_ROWS,
        [kernels.Kind(text) for text in kernels.GPU_WEIGHTS],
        device,
    ):
        rows.append(row)
        others = ", ".join(
            f"{name} {row['bf16_seconds'] / other['seconds']:.2f}"
            for name, other in row["others"].items()
            if "seconds" in other
        )
        print(
            f"{row['n']:6}x{row['k']:<6}{row['weights']:11}M={row['m']:<5}{row['ratio']:6.2f} x "
            f"bfloat16, {row['share_of_copy_bandwidth']:4.0%} of copy; {others}",
            flush=True,
        )
        if time.monotonic() > deadline:
            break
    if find_spec("matplotlib"):
        plot.ratios(rows, str(out / "kernels.png"))
    return {"rows": rows, "rows_not_reached": n_rows - len(rows)}


def versions() -> dict[str, Any]:
    """What the figures were measured with."""
    from importlib.metadata import version

    return {
        "torch": torch.__version__,
        "triton": version("triton"),
        "device": torch.cuda.get_device_name(),
        "driver_cuda": torch.version.cuda,
        "measured_at": time.strftime("%Y-%m-%d"),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    parser.add_argument("--tune-seconds", type=float, default=200)
    parser.add_argument("--test-seconds", type=float, default=200)
    parser.add_argument("--max-seconds", type=float, default=540, help="for everything")
    parser.add_argument("--layers", type=int, default=32, help="blocks of the synthetic Llama-3-8B")
    parser.add_argument("--only", nargs="+", choices=STEPS, help="some of the steps")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            "scripts/benchmark_kernels.py: no CUDA device; 'llmq bench' times the CPU kernels",
            file=sys.stderr,
        )
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    names = [name for name in STEPS if not args.only or name in args.only]
    if len(names) == 1:
        return int(not run_step(names[0], args))
    end = time.monotonic() + args.max_seconds
    failed = [name for name in names if not run_child(name, args, end - time.monotonic())]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def run_child(name: str, args: argparse.Namespace, seconds: float) -> bool:
    """One step in a process of its own: whether it went well."""
    command = [sys.executable, __file__, "--only", name, "--out", str(args.out)]
    for option in ("tune_seconds", "test_seconds", "layers"):
        command += [f"--{option.replace('_', '-')}", str(getattr(args, option))]
    command += ["--max-seconds", str(max(seconds, 1.0))]
    done = subprocess.run(command, env=environment())
    return done.returncode == 0


def run_step(name: str, args: argparse.Namespace) -> bool:
    """One step in this process; its result goes to a file."""
    device, started = torch.device("cuda", 0), time.monotonic()
    few = [kernels.Kind("w4g128")]
    steps: dict[str, Callable[[], Any]] = {
        "tests": lambda: run_tests(args.out, args.test_seconds),
        "defaults": lambda: {
            "rows": list(kernels.measure([(4096, 4096)], (1, 16, 64, 256), few, device))
        },  # before tuning: what the rules of thumb, or the shipped table, give
        "tune": lambda: tune(device, args.tune_seconds, args.out),
        "kernels": lambda: table(device, args.out, started + args.max_seconds - DECODE_SECONDS),
        "decode": lambda: compare_decode(device, num_hidden_layers=args.layers),
    }
    try:
        result = steps[name]()
    except Exception as error:  # reported with the others; machine time is scarce
        traceback.print_exc()
        result = {"failed": f"{type(error).__name__}: {error}"}
    result |= {"step_seconds": time.monotonic() - started, **versions()}
    (args.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"{name}: {result.get('failed', 'done')} in {result['step_seconds']:.0f} s", flush=True)
    if name == "decode":
        told = {key: value for key, value in result.items() if "tokens" in key or key == "ratio"}
        print(told, flush=True)
    return "failed" not in result


if __name__ == "__main__":
    sys.exit(main())
