"""One model quantized by 1, 2 and 4 processes: whether the bytes are the same, and what each number
of them takes.

    python scripts/measure_ranks.py tiny WORK_DIR
    python scripts/measure_ranks.py MODEL WORK_DIR --ranks 1 2 4 -- --bits 3 --asymmetric

What follows `--` goes to `llmq quantize`. Processor seconds are of all processes together, the peak
is that of the largest; wall time says something only where every process has a core of its own."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
PROBE = """
import json, resource, subprocess, sys, time
started = time.monotonic()
done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
seconds = {"wall": time.monotonic() - started, "processor": used.ru_utime + used.ru_stime}
print(json.dumps({"rc": done.returncode, **seconds, "peak": used.ru_maxrss}))
"""


def measured(n: int, command: list[str]) -> dict[str, Any]:
    """What a command takes on n processes, each of one thread."""
    python = [sys.executable, "-m", "llmq"]
    if n > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"]
        python = [sys.executable, *launcher, "-m", "llmq"]
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *python, *command],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if found["rc"]:
        sys.exit(f"{n} processes: llmq quantize failed with exit code {found['rc']}")
    return found


def digest(folder: Path) -> str:
    """Of all weights of a folder."""
    sha256 = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        sha256.update(path.read_bytes())
    return sha256.hexdigest()


def main() -> None:
    arguments = sys.argv[1:]
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("work_dir", type=Path)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    args = parser.parse_args(arguments[:split])
    print("| processes | wall s | processor s | times one | peak MB of one | sha256 |")
    print("|---|---|---|---|---|---|")
    hashes, first = set(), 0.0
    for n in args.ranks:
        out = args.work_dir / f"{n}-processes"
        shutil.rmtree(out, ignore_errors=True)
        found = measured(n, ["quantize", args.model, str(out), *arguments[split + 1 :]])
        first = first or found["processor"]
        hashes.add(digest(out))
        print(
            f"| {n} | {found['wall']:.0f} | {found['processor']:.0f} | "
            f"{found['processor'] / first:.2f} | {found['peak'] * UNIT / 1e6:.0f} | "
            f"{digest(out)[:12]} |",
            flush=True,
        )
    sys.exit("the bytes differ" if len(hashes) > 1 else 0)


if __name__ == "__main__":
    main()
