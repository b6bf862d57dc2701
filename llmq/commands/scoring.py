"""What the commands that score a model share: windows, the check of its files, and what a figure
depends on."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from llmq.models.source import Source
    from llmq.text.windows import Windows


def evaluation_windows(args: argparse.Namespace, source: Source) -> Windows:
    """The windows that `eval` and `compare` score."""
    from dataclasses import replace

    from llmq.models.arch import usual_length
    from llmq.models.tokens import own_tokenizer
    from llmq.text.documents import read_text
    from llmq.text.windows import cut_windows

    length = args.sequence_length or usual_length(source.config)
    tokenizer = own_tokenizer(source)
    text = read_text(args.data, "eval", tokenizer)
    windows = cut_windows(text.documents, tokenizer, source.config, length, args.bos)
    return replace(windows, tokens=windows.tokens[: args.max_windows], read=text.read)


def check_manifest(args: argparse.Namespace, model_dir: Path) -> dict[str, Any] | None:
    """Check the files of a folder that llmq wrote against their hashes, unless told not to; the
    number of files and the seconds it took, or None for a folder without a manifest. Raises
    `VerificationError`."""
    from llmq.storage.manifest import check_folder, has_manifest

    if args.no_verify or not has_manifest(model_dir):
        return None
    verdict = check_folder(model_dir)
    if verdict.seconds > 5:
        print(
            f"{model_dir}: {verdict.n_files} files checked against their hashes in "
            f"{verdict.seconds:.1f} s (--no-verify leaves it out)",
            file=sys.stderr,
        )
    return {"files": verdict.n_files, "seconds": verdict.seconds}


def conditions(args: argparse.Namespace) -> dict[str, Any]:
    """What else a figure depends on. compute: as quantized layers are asked to multiply; head_bits:
    of head and embeddings, None: as stored."""
    from llmq_kernels.core.compute import default_mode

    return {"compute": args.compute or default_mode(), "head_bits": args.head_bits}
