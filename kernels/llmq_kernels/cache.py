"""Where what was compiled or measured on this machine is kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """`$LLMQ_CACHE_DIR`, else `llmq` in `$XDG_CACHE_HOME` or `~/.cache`."""
    if asked := os.environ.get("LLMQ_CACHE_DIR"):
        return Path(asked)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmq"
