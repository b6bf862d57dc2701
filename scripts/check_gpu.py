"""Whether a GPU quantizes and trains as the CPU does, in one call of some minutes.

    python scripts/check_gpu.py tiny
    python scripts/check_gpu.py MODEL --calibration FILE --processes 2

Products differ in the last bit between devices, and GPTQ hands every other code on to the rest of
its row and to all layers behind it (llmq/ptq/README.md). What must be: most codes are the same,
held-out divergence and the losses of training are the same
within tolerances, and several processes on the device give the bytes of one there. Prints what was
found as JSON; exit code 1 where something is beyond its tolerance."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import llmq
from llmq.inference.module import quantized_modules

LEAST_EQUAL_CODES = 0.7  # of 3 bits; by chance one in eight
MOST_DIFFERENCE = 0.05  # of divergences and losses


def ran(arguments: list[str], n_processes: int = 1) -> dict[str, Any]:
    """The report of an `llmq` command."""
    command = [sys.executable, "-m", "llmq"]
    if n_processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone"]
        command = [sys.executable, *launcher, f"--nproc-per-node={n_processes}", "-m", "llmq"]
    done = subprocess.run(
        [*command, *arguments, "--json"],
        capture_output=True,
        text=True,
        env={"OMP_NUM_THREADS": "1", **os.environ},
    )
    if done.returncode:
        sys.exit(f"llmq {' '.join(arguments)}: {done.stderr.strip()[-2000:]}")
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def equal_codes(one: Path, other: Path) -> float:
    """The share of codes that two folders have in common."""
    layers = [
        {name: module.qtensor() for name, module in quantized_modules(model).items()}
        for model in (llmq.load(str(one)), llmq.load(str(other)))
    ]
    same = total = 0
    for name, qtensor in layers[0].items():
        same += int((qtensor.codes() == layers[1][name].codes()).sum())
        total += qtensor.codes().numel()
    return same / total


def apart(one: float, other: float) -> float:
    return abs(one - other) / max(abs(one), 1e-9)


def quantized(args: argparse.Namespace, out: Path) -> dict[str, Any]:
    text = ["--calibration", args.calibration] if args.calibration else []
    size = ["--samples", str(args.samples), "--sequence-length", str(args.sequence_length)]
    line = ["--bits", "3", "--group-size", "64", "--asymmetric", *text, *size]

    def run(name: str, device: str, n_processes: int = 1) -> dict[str, Any]:
        folder = str(out / name)
        return ran(["quantize", args.model, folder, *line, "--device", device], n_processes)

    here, there = run("cpu", "cpu"), run("device", args.device)
    divergences = [[text["kl_mean"] for text in report["held_out"]] for report in (here, there)]
    differences = [apart(*pair) for pair in zip(*divergences, strict=True)]
    found: dict[str, Any] = {
        "seconds": {"cpu": here["seconds"], args.device: there["seconds"]},
        "equal_codes": equal_codes(out / "cpu", out / "device"),
        "held_out_kl": divergences,
        "largest_difference": max(differences, default=0.0),
    }
    good = found["equal_codes"] >= LEAST_EQUAL_CODES
    good &= found["largest_difference"] <= MOST_DIFFERENCE
    for n in args.processes:
        run(f"{n}-processes", args.device, n)
        weights = [
            b"".join(path.read_bytes() for path in sorted((out / name).glob("*.safetensors")))
            for name in ("device", f"{n}-processes")
        ]
        found[f"bytes_of_{n}_processes_equal"] = weights[0] == weights[1]
        good &= weights[0] == weights[1]
    return {**found, "is_good": bool(good)}


def trained(args: argparse.Namespace, out: Path) -> dict[str, Any]:
    text = ["--train", args.calibration] if args.calibration else []
    line = ["--scheme", "w2a8", "--init", "rtn", "--max-steps", str(args.steps), *text]
    line += ["--batch-size", "4", "--sequence-length", str(args.sequence_length)]
    reports = {
        device: ran(["qat", args.model, str(out / f"qat-{device}"), *line, "--device", device])
        for device in dict.fromkeys(("cpu", args.device))
    }
    losses = {name: [each["first_loss"], each["last_loss"]] for name, each in reports.items()}
    pairs = zip(losses["cpu"], losses[args.device], strict=True)
    largest = max(apart(*pair) for pair in pairs)
    return {
        "losses": losses,
        "largest_difference": largest,
        "is_good": largest <= MOST_DIFFERENCE,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--calibration")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--processes", type=int, nargs="*", default=[2])
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    if args.device != "cpu" and not torch.cuda.is_available():
        sys.exit("no GPU that torch can use; --device cpu runs the same against itself")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        found = {"quantize": quantized(args, out), "qat": trained(args, out)}
    print(json.dumps(found, indent=1))
    sys.exit(0 if all(each["is_good"] for each in found.values()) else 1)


if __name__ == "__main__":
    main()
