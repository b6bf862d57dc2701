"""One model and one text, on which rungs are measured: each is quantized into a folder of its own,
compared with full precision, and both are noted, so that a run that ends goes on where it was."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from llmq.api.quantization import quantize
from llmq.cards.versions import versions
from llmq.evaluation.divergence import compare
from llmq.evaluation.position_classes import special_ids
from llmq.formats.load import load
from llmq.ladder.rungs import Rung
from llmq.models.source import Source
from llmq.storage import files
from llmq.storage.manifest import check_hashes
from llmq.text.windows import Windows

RESULTS = "results.jsonl"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Point:
    """A rung as it was measured. n_bytes: of the weight files. loss: the ratio of perplexities
    less 1, with its 95% interval, None where nothing is known of its spread; kl: in nats per token.
    seconds: that quantizing took, kept from the first time."""

    rung: Rung
    n_bytes: int
    loss: float
    loss_ci95: tuple[float, float] | None
    kl: float
    kl_ci95: tuple[float, float] | None
    seconds: float

    @property
    def most(self) -> float:
        """The upper end of what the loss may be."""
        return self.loss if self.loss_ci95 is None else self.loss_ci95[1]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "rung": str(self.rung)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Point:
        pairs = {name: data[name] and tuple(data[name]) for name in ("loss_ci95", "kl_ci95")}
        return cls(**{**data, **pairs, "rung": Rung.parse(data["rung"])})


@dataclass(frozen=True)
class Bench:
    """source: the full-precision model. windows: that are measured on. work_dir: where results and
    folders go. options: of `llmq.quantize`. keep: the folders, until `remove`."""

    source: Source
    windows: Windows
    work_dir: Path
    options: dict[str, Any]
    device: str = "cpu"
    keep: bool = False

    @cached_property
    def base(self) -> PreTrainedModel:
        return load(self.source, dtype="float32", device=self.device)

    def measure(self, rung: Rung, say: Say = lambda text: None) -> Point:
        """The rung, from the notes or new. say: told what is done at the moment."""
        key = self._key(rung)
        known = [line for line in self._lines() if line["key"] == key and "point" in line]
        if known:
            return Point.from_json(known[-1]["point"])
        seconds = self.finished_in(rung)
        if seconds is None:
            seconds = self._quantize(rung, say)
        say(f"{rung}: measuring")
        point = self.compared(rung, self.folder_of(rung), seconds)
        self._note({"key": key, "point": point.to_json()})
        if not self.keep:
            self.remove(rung)
        return point

    def folder_of(self, rung: Rung) -> Path:
        """Where the quantized model of a rung goes."""
        return self.work_dir / rung.folder_name

    def remove(self, rung: Rung) -> None:
        """The folder of a rung, where there is one."""
        shutil.rmtree(self.folder_of(rung), ignore_errors=True)

    def finished_in(self, rung: Rung) -> float | None:
        """The seconds that the folder of a rung took, where it is there and whole, such as one of
        a run that ended while it measured."""
        key, folder = self._key(rung), self.folder_of(rung)
        for line in reversed(self._lines()):
            if line["key"] == key and "seconds" in line and _is_still(folder, line["manifest"]):
                return float(line["seconds"])
        return None

    def _quantize(self, rung: Rung, say: Say) -> float:
        """Make the folder of a rung. Returns the seconds that it took."""
        folder = self.folder_of(rung)
        started = time.monotonic()
        say(f"{rung}: quantizing")
        quantize(
            self.source.folder,
            folder,
            rung.spec,
            method=rung.method,
            device=self.device,
            overwrite=True,
            **self.options,
        )
        seconds = round(time.monotonic() - started, 1)
        manifest = files.digest(folder / files.MANIFEST)["sha256"]
        self._note({"key": self._key(rung), "seconds": seconds, "manifest": manifest})
        return seconds

    def compared(self, rung: Rung, folder: Path, seconds: float) -> Point:
        """What a finished folder loses. seconds: that it took."""
        written = Source(folder)
        quant = load(written, dtype="float32", device=self.device)
        special = special_ids(self.source.config, self.source.tokenizer)
        found = compare(self.base, quant, self.windows, special=special)
        ratio, divergence = found["perplexity_ratio_ci95"], found["kl_mean_ci95"]
        return Point(
            rung,
            written.weight_bytes,
            found["perplexity_ratio"] - 1,
            None if ratio is None else (ratio[0] - 1, ratio[1] - 1),
            found["kl_mean"],
            None if divergence is None else (divergence[0], divergence[1]),
            seconds,
        )

    def _key(self, rung: Rung) -> str:
        """A hash of everything that decides a result."""
        stamps = self.source.files.stamps
        files = {name: [stamp.size, stamp.mtime_ns] for name, stamp in stamps.items()}
        options = {name: str(value) for name, value in self.options.items()}
        text = self.windows.identity()["tokens_sha256"]
        data = json.dumps([str(rung), files, options, text, versions()], sort_keys=True)
        return hashlib.sha256(data.encode()).hexdigest()

    def _note(self, line: dict[str, Any]) -> None:
        with (self.work_dir / RESULTS).open("a") as file:
            file.write(json.dumps(line) + "\n")

    def _lines(self) -> list[dict[str, Any]]:
        path = self.work_dir / RESULTS
        lines = path.read_text().splitlines() if path.is_file() else []
        found = []
        for line in lines:
            try:
                found.append(json.loads(line))
            except ValueError:  # the end of a run that was killed while it wrote
                continue
        return found


def _is_still(folder: Path, manifest: str) -> bool:
    """Whether a folder is the one with that hash of its manifest, and whole."""
    path = folder / files.MANIFEST
    if not path.is_file() or files.digest(path)["sha256"] != manifest:
        return False
    return check_hashes(folder).is_good
