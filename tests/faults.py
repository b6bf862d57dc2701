"""Runs that are killed, and machines that lose power: every point where a run touches the disk.

    python tests/faults.py --points 40          all of it, with a table at the end

Each run is a fork of this process, which has imported everything. A first run that nothing disturbs
counts the points: every open for writing, rename, removal, new folder, fsync and safetensors file.
Others are killed at one of them with SIGKILL and repeated. For a loss of power what was not synced
is taken away in between, in one of two ways:

    lost   a folder has the entries that it had when it was last synced, a file its contents of
           then;
           a file that never was is empty
    torn   names are as they were last, contents that were not synced end in the middle

The weights of the repeated run must be those of the undisturbed one, byte by byte."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import pickle
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

TEXT = ["--calibration", "TEXT"]
SHAPE = ["--group-size", "32", "--sequence-length", "32"]
WEAK = ["--recipe", "RECIPE", "--bits", "2"]
WEAK_START = {"search": False, "sweeps": 0, "damping": 1.0}  # something left to tune
TUNING = ["--method", "blockwise", "--iterations", "5", "--learning-rate", "0.05"]
TRAINING = ["--batch-size", "4", "--max-steps", "6", "--save-every", "2", "--log-every", "1"]
RATE = ["--lr-weights", "1e-3"]
PLAIN = ["--precision", "fp32", "--device", "cpu", "--init", "rtn"]
SHORT = ["--group-size", "32", "--sequence-length", "12"]
RUNS = {
    "quantize, gptq": ["quantize", "MODEL", "OUT", "--samples", "12", *TEXT, *SHAPE],
    "quantize, block-wise": [
        "quantize",
        "MODEL",
        "OUT",
        "--samples",
        "8",
        *TEXT,
        *SHAPE,
        *WEAK,
        *TUNING,
    ],
    "quantize, scales of all blocks": [
        "quantize",
        "MODEL",
        "OUT",
        "--samples",
        "16",
        *TEXT,
        *SHAPE,
        *WEAK,
        "--scale-steps",
        "3",
    ],
    "qat": ["qat", "MODEL", "OUT", "--train", "TEXT", *PLAIN, *SHAPE, *TRAINING, *RATE],
    "qat, generated text": [
        "qat",
        "MODEL",
        "OUT",
        "--train",
        "generated",
        *PLAIN,
        *SHORT,
        *TRAINING,
    ],
    "export": ["export", "QUANTIZED", "OUT", "--format", "gptq"],
}
# Share of the points of a run after which most of what it continues from lies there, and its output
# is not put together yet.
BEFORE_THE_END = {"quantize": 0.8, "qat": 0.6, "export": 0.6}


class Disk:
    """What of a folder would be there after a loss of power. Inodes are held open, so that their
    numbers are not given to others."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.contents: dict[int, bytes] = {}
        self.entries: dict[int, dict[str, tuple[int, bool]]] = {}
        self._held: list[int] = []
        for folder, _, names in os.walk(root):
            for path in [Path(folder), *(Path(folder) / name for name in names)]:
                descriptor = os.open(path, os.O_RDONLY)
                self.synced(descriptor)
                os.close(descriptor)

    def synced(self, descriptor: int) -> None:
        inode = os.fstat(descriptor).st_ino
        self._held.append(os.dup(descriptor))
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.is_dir():
            self.entries[inode] = {
                entry.name: (entry.inode(), entry.is_dir(follow_symlinks=False))
                for entry in os.scandir(path)
            }
        elif path.is_file():
            self.contents[inode] = path.read_bytes()

    def save(self, path: Path) -> None:
        path.write_bytes(pickle.dumps((self.contents, self.entries)))


def lose(root: Path, disk: Path, how: str) -> None:
    """Take away from a folder what was not synced."""
    contents, entries = pickle.loads(disk.read_bytes())

    def write_lost(inode: int, target: Path) -> None:
        target.mkdir()
        for name, (child, is_folder) in entries.get(inode, {}).items():
            if is_folder:
                write_lost(child, target / name)
            else:
                (target / name).write_bytes(contents.get(child, b""))

    if how == "lost":
        kept = root.with_name(root.name + ".kept")
        write_lost(root.stat().st_ino, kept)
        shutil.rmtree(root)
        kept.rename(root)
        return
    for path in root.rglob("*"):
        if path.is_file():
            now, before = path.read_bytes(), contents.get(path.stat().st_ino, b"")
            if now != before:
                end = (len(now) + (len(before) if now.startswith(before) else 0)) // 2
                path.write_bytes(now[:end] + before[end:])


class Point:
    """Counts what touches the disk under a folder, and ends the process at the n-th time."""

    def __init__(self, root: Path, n: int, side: Path) -> None:
        self.root, self.n, self.side = str(root), n, side
        self.count = 0
        self.disk = Disk(root)
        fsync = os.fsync

        def synced(descriptor: int) -> None:
            self.touch()
            fsync(descriptor)
            if os.readlink(f"/proc/self/fd/{descriptor}").startswith(self.root):
                self.disk.synced(descriptor)

        os.fsync = synced  # type: ignore[assignment]
        from llmq.storage import files

        save_file = files.save_file

        def saved(*args: object, **options: object) -> None:
            self.touch()
            save_file(*args, **options)
            self.touch()

        files.save_file = saved
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple) -> None:
        if event == "open":
            is_write = isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
            if is_write and self._is_inside(args[0]):
                self.touch()
        elif event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir") and (
            self._is_inside(args[0]) or args[-1] != -1
        ):
            self.touch()

    def _is_inside(self, path: object) -> bool:
        return isinstance(path, str | os.PathLike) and os.fspath(path).startswith(self.root)

    def touch(self) -> None:
        if self.n < 0:
            return
        self.count += 1
        if self.count == self.n:
            self.n = -1
            self.disk.save(self.side)
            os.kill(os.getpid(), signal.SIGKILL)


class Lab:
    """Runs commands in forks, on one model and text. root: what may be damaged."""

    def __init__(self, folder: Path) -> None:
        self.root, self.inputs = folder / "root", folder / "inputs"
        self.side = folder / "side"
        for path in (self.root, self.inputs, self.side):
            path.mkdir()
        self.in_fork(self._make_inputs)

    def _make_inputs(self) -> None:
        from conftest import make_model
        from transformers import AutoTokenizer

        from llmq.models.source import resolve

        make_model(num_hidden_layers=3, vocab_size=2048).save_pretrained(self.inputs / "model")
        AutoTokenizer.from_pretrained(resolve("tiny")).save_pretrained(self.inputs / "model")
        lines = [f"def function_{i}(value, other={i}):\n    return value + {i}" for i in range(400)]
        (self.inputs / "text.txt").write_text("\n".join(lines))
        (self.inputs / "recipe.json").write_text(json.dumps(WEAK_START))
        self._quantize()

    def _quantize(self) -> None:
        """A folder to export."""
        from llmq.commands.cli import main

        command = ["quantize", str(self.inputs / "model"), str(self.inputs / "quantized")]
        options = ["--method", "rtn", "--group-size", "32", "--format", "llmq"]
        assert main([*command, *options]) == 0

    def in_fork(self, work, output: Path | None = None) -> int:
        """The exit code of work in a fork; negative: the signal."""
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            code = 70
            try:
                if output is not None:
                    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
                    os.dup2(descriptor, 1)
                    os.dup2(descriptor, 2)
                code = work() or 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                with contextlib.suppress(Exception):
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(code)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def run(self, command: list[str], n: int | None = None) -> tuple[int, str, int]:
        """Exit code, output and number of points of a command, killed at the n-th (0: never)."""
        output, counted = self.side / "output", self.side / "count"
        names = {
            "MODEL": str(self.inputs / "model"),
            "TEXT": str(self.inputs / "text.txt"),
            "RECIPE": str(self.inputs / "recipe.json"),
            "QUANTIZED": str(self.inputs / "quantized"),
            "OUT": str(self.root / "out"),
        }
        arguments = [names.get(argument, argument) for argument in command]

        def work() -> int:
            from llmq.commands.cli import main

            if n is None:
                return main(arguments)
            point = Point(self.root, n, self.side / "disk")
            code = main(arguments)
            point.n = -1
            counted.write_text(str(point.count))
            return code

        code = self.in_fork(work, output)
        n_points = int(counted.read_text()) if n == 0 and code == 0 else 0
        return code, output.read_text(errors="replace"), n_points

    def clear(self) -> None:
        shutil.rmtree(self.root)
        self.root.mkdir()

    def weights(self) -> dict[str, str]:
        paths = (self.root / "out").glob("*.safetensors")
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}

    def faults_of_repeated(self, command: list[str], expected: dict[str, str]) -> tuple[str, str]:
        """What is wrong after a disturbed command is repeated ("" for nothing), and its output."""
        was_there = (self.root / "out").exists()
        if was_there and self.weights() != expected:
            return "a wrong output was left", ""
        code, output, _ = self.run(command)
        if code != (2 if was_there else 0):
            return f"exit code {code}: {output[-600:]}", output
        if self.weights() != expected:
            return f"other weights: {output[-600:]}", output
        if self.run(["verify", "OUT"])[0] != 0:
            return "the output does not verify", output
        left = sorted(path.name for path in self.root.iterdir() if path.name != "out")
        return (f"{left} was left behind" if left else ""), output


def try_points(
    lab: Lab, name: str, n_points: int, report: dict[str, dict[str, object]], loud: bool
) -> None:
    """Kill and lose power at evenly spread points of one command."""
    command = RUNS[name]
    lab.clear()
    code, output, n_all = lab.run(command, 0)
    assert code == 0, output
    expected = lab.weights()
    for kind, ways in (("killed", [None]), ("power lost", ["lost", "torn"])):
        points = sorted({1 + i * (n_all - 1) // max(1, n_points - 1) for i in range(n_points)})
        failed = {}
        for i, point in enumerate(points):
            lab.clear()
            code, output, _ = lab.run(command, point)
            assert code == -signal.SIGKILL, (code, output[-2000:])
            how = ways[i % len(ways)]
            if how is not None:
                lose(lab.root, lab.side / "disk", how)
            fault, _ = lab.faults_of_repeated(command, expected)
            if fault:
                failed[f"{point} {how or ''}".strip()] = fault
                if loud:
                    print(f"{name}, {kind} at {point} ({how}): {fault}", flush=True)
        report[f"{name}: {kind}"] = {
            "of": n_all,
            "tried": len(points),
            "same bytes": len(points) - len(failed),
            "failed": failed,
        }
        if loud:
            print(f"{name}: {kind}: {len(points) - len(failed)} of {len(points)}", flush=True)


def flip(path: Path, generator: random.Random) -> None:
    """Turn over one bit of a file, leaving its times as they are."""
    content, status = bytearray(path.read_bytes()), path.stat()
    content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def try_flips(
    lab: Lab, name: str, n_flips: int, report: dict[str, dict[str, object]], loud: bool
) -> None:
    """Turn over bits of what an interrupted command left, and repeat it."""
    command, generator = RUNS[name], random.Random(0)
    lab.clear()
    code, output, n_all = lab.run(command, 0)
    assert code == 0, output
    expected = lab.weights()
    lab.clear()
    code, output, _ = lab.run(command, int(n_all * BEFORE_THE_END[command[0]]))
    kept = lab.root.with_name("kept")
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(lab.root, kept)
    artefacts = sorted(
        path.relative_to(kept)
        for path in kept.rglob("*")
        if path.is_file() and path.stat().st_size and not path.name.endswith(".tmp")
    )
    chosen = artefacts if n_flips >= len(artefacts) else generator.sample(artefacts, n_flips)
    failed, n_told = {}, 0
    for artefact in chosen:
        shutil.rmtree(lab.root)
        shutil.copytree(kept, lab.root)
        flip(lab.root / artefact, generator)
        fault, output = lab.faults_of_repeated(command, expected)
        n_told += "warning" in output
        if fault:
            failed[str(artefact)] = fault
            if loud:
                print(f"{name}, a bit of {artefact}: {fault}", flush=True)
    report[f"{name}: a bit turned over in what is continued from"] = {
        "of": len(artefacts),
        "tried": len(chosen),
        "same bytes": len(chosen) - len(failed),
        "told": n_told,
        "failed": failed,
    }
    if loud:
        print(f"{name}: flips: {len(chosen) - len(failed)} of {len(chosen)}", flush=True)


def _import_everything(folder: Path) -> None:
    """What forks need: modules that are imported late come by running a command once. Nothing with
    gradients: their threads do not survive a fork."""
    import importlib

    from llmq.formats import export
    from llmq.storage import packing

    packing.MAX_SHARD_BYTES = 150_000  # several blocks to a shard, and several shards
    export.PART_BYTES = 30_000
    for name in ("llmq.qat.run", "torch._dynamo", "llmq.commands.verify"):
        importlib.import_module(name)
    from llmq.commands.cli import main as run

    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        run(["quantize", "tiny", str(folder / "first"), "--samples", "2", *SHAPE])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=40, help="of each kind and command")
    parser.add_argument("--flips", type=int, default=1000, help="files of a work folder at most")
    parser.add_argument("--only", nargs="*", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    started = time.monotonic()
    report: dict[str, dict[str, object]] = {}
    with tempfile.TemporaryDirectory(prefix="llmq-faults-") as folder:
        os.environ["LLMQ_CACHE_DIR"] = str(Path(folder) / "cache")
        _import_everything(Path(folder))
        lab = Lab(Path(folder))
        for name in args.only:
            if args.points:
                try_points(lab, name, args.points, report, not args.json)
            if args.flips:
                try_flips(lab, name, args.flips, report, not args.json)
    if args.json:
        print(json.dumps(report))
        return
    for name, row in report.items():
        print(f"{name:60} {row['same bytes']} of {row['tried']}")
    print(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
