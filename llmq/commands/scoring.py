"""What the commands that score a model share: windows, the check of its files, and what a figure
depends on."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from llmq.models.source import Source
    from llmq.text.windows import Windows

# Of the bundled text. A paired KL is known to some percent by then, and two cores are done with a
# model of 135M parameters in minutes rather than in tens of them.
DEFAULT_TOKENS = 32_768


def evaluation_windows(args: argparse.Namespace, source: Source) -> Windows:
    """The windows that `eval` and `compare` score."""
    from dataclasses import replace

    from llmq.evaluation.protocols import protocol_named
    from llmq.models.tokens import own_tokenizer
    from llmq.text.documents import read_text

    tokenizer = own_tokenizer(source)
    text = read_text(args.data, "eval", tokenizer)
    windows = protocol_named(args.protocol).windows(
        text.documents,
        tokenizer,
        source.config,
        sequence_length=args.sequence_length,
        stride=args.stride,
        bos=args.bos,
    )
    most = args.max_windows or _most_windows(args, source, windows)
    return replace(windows.first(most), read=text.read)


def _most_windows(args: argparse.Namespace, source: Source, windows: Windows) -> int | None:
    """How many windows of the text that nobody has chosen; text that was asked for is read to its
    end, and so is the bundled one by the bundled model, whose own it is."""
    from llmq.models.hub import is_bundled
    from llmq.text.corpus import BUNDLED

    if args.data != BUNDLED or is_bundled(source.folder):
        return None
    step = windows.settings.get("stride") or windows.sequence_length
    return max(1, DEFAULT_TOKENS // step)


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


def load_model(args: argparse.Namespace, source: Source) -> PreTrainedModel:
    """A model as options have it run, with the head that it stores."""
    from llmq.formats.load import load

    return load(
        source,
        dtype=args.dtype,
        device=args.device,
        compute=args.compute,
        strict=args.strict,
    )


def conditions(args: argparse.Namespace) -> dict[str, Any]:
    """What else a figure depends on. compute: as quantized layers are asked to multiply; head_bits:
    of head and embeddings, None: as stored."""
    from llmq_kernels.core.compute import default_mode

    return {"compute": args.compute or default_mode(), "head_bits": args.head_bits}


def load_scored(args: argparse.Namespace, source: Source) -> PreTrainedModel:
    """The model that is scored, its head in as many bits as asked for."""
    from llmq.inference.head import quantize_head

    model = load_model(args, source)
    quantize_head(model, args.head_bits)
    return model
