"""What a result was made with."""

from __future__ import annotations

import platform

import torch
import transformers

import llmq


def versions() -> dict[str, str]:
    """Of llmq and of what decides its numbers, by name."""
    return {
        "llmq": llmq.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
