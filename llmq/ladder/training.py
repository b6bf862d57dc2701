"""Whether training would hold a bound: a short run of QAT at the size that failed, measured on the
same text."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from typing import Any

from llmq.grid.scheme import parse_treatment
from llmq.ladder.bench import Bench, Point
from llmq.ladder.rungs import Rung
from llmq.qat.job import prepare_job
from llmq.qat.run import fine_tune
from llmq.qat.settings import QATSettings, Scheme

WORTH = 0.25  # of the excess over the bound: less is not a beginning
LENGTH, BATCH = 256, 8


@dataclass(frozen=True)
class Trained:
    """What so many steps made of a size that failed before."""

    before: Point
    after: Point
    n_steps: int
    bound: float

    @property
    def repaired(self) -> float:
        """The share of the excess over the bound that is gone."""
        excess = self.before.loss - self.bound
        return (self.before.loss - self.after.loss) / excess if excess > 0 else 1.0

    @property
    def remark(self) -> str:
        change = f"{self.before.loss:.2%} to {self.after.loss:.2%}"
        what = f"{self.n_steps} steps ({self.after.seconds:.0f} s) take {self.before.rung} from "
        if self.after.most <= self.bound:
            return f"{what}{change}, which is within the bound: QAT is worth it"
        share = f"{self.repaired:.0%} of what is too much"
        verdict = "a longer run is worth it" if self.repaired >= WORTH else "not worth a longer run"
        return f"{what}{change}, {share}: {verdict}"

    def to_json(self) -> dict[str, Any]:
        return {
            "before": self.before.to_json(),
            "after": self.after.to_json(),
            "steps": self.n_steps,
            "repaired": self.repaired,
            "remark": self.remark,
        }


def train(bench: Bench, failed: Point, bound: float, n_steps: int, text: str) -> Trained:
    """Train the spec of a rung that failed, from what GPTQ makes of it. text: that is trained on,
    as `llmq qat --train` takes it."""
    start = bench.measure(Rung(failed.rung.spec, "gptq"))
    folder = bench.work_dir / f"{failed.rung.spec}-qat"
    spec, _ = parse_treatment(failed.rung.spec)
    settings = QATSettings(
        Scheme(spec),
        max_steps=n_steps,
        sequence_length=LENGTH,
        batch_size=BATCH,
        n_held_out=0,
    )
    started = time.monotonic()
    job = prepare_job(bench.source, settings, train=text, device=bench.device)
    fine_tune(job, folder, overwrite=True)
    seconds = round(time.monotonic() - started, 1)
    after = bench.compared(start.rung, folder, seconds)
    if not bench.keep:
        shutil.rmtree(folder)
    return Trained(start, after, n_steps, bound)
