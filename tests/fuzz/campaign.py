"""Run many mutated inputs in child processes, and count what came out of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BATCH = 500
_TESTS = Path(__file__).resolve().parents[1]


@dataclass
class Findings:
    """counts: inputs by (command, outcome). bad: every result that should not be."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    bad: list[dict[str, Any]] = field(default_factory=list)

    def add(self, result: dict[str, Any]) -> None:
        self.counts[result["command"], result["outcome"]] += 1
        if result["outcome"] not in ("ok", "refused"):
            self.bad.append(result)

    def table(self) -> str:
        """Inputs by command and outcome, and each finding in two lines."""
        lines = [
            f"{command:10} {outcome:10} {n}"
            for (command, outcome), n in sorted(self.counts.items())
        ]
        for result in self.bad:
            trace = str(result.get("trace", "")).strip().splitlines()[-9:]
            said = [*map(str, result.get("faults", [])), *trace] or [result["stderr"][-300:]]
            lines.append(f"{result['seed']} {result['outcome']} {result.get('argv')}")
            lines += [f"    {line[:200]}" for line in said]
        return "\n".join(lines)


def run(seed: str, n_inputs: int, bases: Path, scratch: Path) -> Findings:
    """Inputs 0 to `n_inputs` of a seed, in processes of `BATCH` each; a process that dies is a
    finding, and the next goes on after the input that it died of."""
    findings = Findings()
    journal = scratch / "journal"
    index = 0
    while index < n_inputs:
        last = min(index + BATCH, n_inputs)
        journal.unlink(missing_ok=True)
        command = [sys.executable, str(_TESTS / "fuzz" / "drive.py"), str(bases), str(scratch)]
        environment = {**os.environ, "PYTHONPATH": _python_path(), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, str(journal), seed, str(index), str(last)],
            env=environment
            | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
            # torch makes this folder in the temporary one, which is watched
            | {"TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor")},
            capture_output=True,
        )
        rows = (
            [json.loads(row) for row in journal.read_text().splitlines()]
            if journal.exists()
            else []
        )
        for row in rows:
            if "outcome" in row:
                findings.add(row)
        started = [row["starts"] for row in rows if "starts" in row]
        if done.returncode != 0:
            at = started[-1] if started else index
            note = (scratch / "stderr").read_text(errors="replace")[-600:] if rows else done.stderr
            findings.add(
                {"seed": f"{seed}-{at}", "command": "process", "outcome": f"died {done.returncode}"}
                | {"stderr": str(note)[-600:]}
            )
            index = at + 1
        else:
            index = last
        if not started:
            break
    return findings


def _python_path() -> str:
    root = _TESTS.parent
    return os.pathsep.join([str(root), str(root / "kernels"), str(_TESTS)])
