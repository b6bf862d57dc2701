"""The bundled text: the standard library's own sources, as found in the running interpreter.

Every Python installation carries several megabytes of text that nobody has to download, that nobody
may forget to licence and that everybody can read: its own modules. They train the bundled model
`tiny`, calibrate it and evaluate it. The split is by module name, so that the evaluation modules
are new to the model in every Python version, and no list of file names has to be kept. The text
differs a little between Python versions; each result carries the hash of its tokens."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

BUNDLED = "bundled"
SPLITS = ("train", "calibration", "eval")
# Tables of character mappings, third-party code, tests and generated files: not text that a small
# model learns anything from, or not in every installation.
_SKIPPED_PARTS = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "distutils",
    "site-packages",
    "dist-packages",
    "encodings",
    "ensurepip",
    "turtledemo",
    "__phello__",
    "lib-dynload",
}
_SKIPPED_PREFIXES = ("_sysconfigdata", "config-")


def modules(root: Path) -> Iterator[str]:
    """Paths below the root of the modules that are text, with forward slashes."""
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if not _SKIPPED_PARTS.intersection(relative.parts) and not relative.parts[0].startswith(
            _SKIPPED_PREFIXES
        ):
            yield relative.as_posix()


def split_of(module_path: str) -> str:
    """The split that a module belongs to: 1 in 20 each for evaluation and calibration, by a hash of
    its path with forward slashes."""
    return {0: "eval", 1: "calibration"}.get(
        hashlib.sha256(module_path.encode()).digest()[0] % 20, "train"
    )


def standard_library_documents(split: str) -> list[str]:
    """The sources of the modules of one split, ordered by path. `split` is one of `SPLITS`; another
    name raises `ValueError`."""
    if split not in SPLITS:
        raise ValueError(
            f"unknown split {split!r} of the bundled text; choose one of {', '.join(SPLITS)}"
        )
    root = Path(sysconfig.get_paths()["stdlib"])
    return [
        (root / name).read_text(encoding="utf-8", errors="replace")
        for name in sorted(modules(root))
        if split_of(name) == split
    ]
