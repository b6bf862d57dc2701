"""The stored block must be the block that was computed."""

from __future__ import annotations

from collections.abc import Set

import torch

from llmq.errors import VerificationError
from llmq.ptq.block import QuantizedBlock
from llmq.ptq.blocks import Blocks
from llmq.ptq.results import StoredBlock
from llmq.ptq.streams import Streams


def verify_block(
    blocks: Blocks,
    streams: Streams | None,
    index: int,
    solved: QuantizedBlock,
    read_back: StoredBlock,
) -> None:
    """The same values in every tensor, and the same outputs on the first batch from a block made of
    what was stored alone. Raises `VerificationError`."""
    name = blocks.name(index)
    written = StoredBlock(solved.quantized, solved.kept)
    check_same(name, written, read_back, device=blocks.device)
    if solved.first_output is None or streams is None:
        return
    block = blocks.rebuild(index, read_back)
    call, hidden = next(streams.batches(index, "quantized"))
    if not torch.equal(call.run(block, hidden), solved.first_output):
        raise VerificationError(
            f"{name}: a block made of what was stored does not reproduce the outputs recorded "
            "when it was quantized"
        )


def check_same(
    name: str, written: StoredBlock, read_back: StoredBlock, *, device: str = "cpu"
) -> None:
    """The same values in every tensor. Raises `VerificationError`."""
    _check_names(name, "quantized layers", read_back.quantized.keys(), written.quantized.keys())
    _check_names(name, "kept tensors", read_back.kept.keys(), written.kept.keys())
    for key, tensor in read_back.kept.items():
        own = written.kept[key]
        if tensor.dtype != own.dtype or not torch.equal(tensor, own):
            raise VerificationError(
                f"{key}: the tensor read back differs from the one written; the disk or the "
                "memory is faulty"
            )
    for layer, stored in read_back.quantized.items():
        values = stored.to(device).dequantize()
        if not torch.equal(values, written.quantized[layer].to(device).dequantize()):
            raise VerificationError(
                f"{layer}: the weight read back differs from the weight written; the disk or "
                "the memory is faulty"
            )


def _check_names(name: str, kind: str, there: Set[str], written: Set[str]) -> None:
    if there != written:
        raise VerificationError(
            f"{name}: {len(there)} {kind} were read back, {len(written)} were written; the "
            "output is not usable"
        )
