"""Transforming a block: what its layers read is measured, and scale moves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmq.models.arch import linear_weight
from llmq.ptq.capture import record_inputs
from llmq.ptq.streams import Streams
from llmq.ptq.transforms.base import Transform
from llmq.ptq.transforms.moves import Move, find_move

NOWHERE = "no norm or layer gives what it reads, and nothing else, in proportion"


@dataclass
class Moved:
    """What a transform has moved in a block. name: its own. columns, rows: what multiplied the
    columns of a layer's weight `[K]`, and what divided its rows `[N]`. pairs: givers and takers,
    with the largest and the smallest factor. left: layers that nothing could move to, and why."""

    name: str
    columns: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    pairs: list[dict[str, Any]] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"transform": self.name, "pairs": self.pairs, "left": self.left}


@torch.no_grad()
def transform_block(
    transform: Transform,
    block: nn.Module,
    groups: Sequence[Sequence[str]],
    streams: Streams,
    index: int,
    dtypes: Mapping[str, torch.dtype],
) -> Moved:
    """Move scale in block `index`, in place, between what gives the inputs of each group of layers
    and the group. dtypes: of stored tensors that are not quantized."""
    moved = Moved(transform.name)
    layers = [layer for group in groups for layer in group]
    assert streams.calls is not None
    call, hidden = streams.calls.of(index)([0]), streams.inputs_of(index).sequences([0])
    moves = []
    for group in groups:
        move = find_move(block, group, layers, call, hidden.to(streams.device))
        if move is None:
            moved.left.update(dict.fromkeys(group, NOWHERE))
        else:
            moves.append(move)
    largest = _largest_inputs(block, [move.takers[0] for move in moves], streams, index)
    for move in moves:
        _apply(transform, block, move, largest[move.takers[0]], dtypes, moved)
    return moved


def _apply(
    transform: Transform,
    block: nn.Module,
    move: Move,
    largest: Tensor,
    dtypes: Mapping[str, torch.dtype],
    moved: Moved,
) -> None:
    weights = torch.cat([linear_weight(block.get_submodule(taker)) for taker in move.takers])
    factors = transform.factors(move.gathered(largest[None]).amax(dim=0), move.gathered(weights))
    factors = factors.where(torch.isfinite(factors), factors.new_ones(()))
    factors = factors / factors.log().mean().exp()  # the giver keeps its size
    columns = move.apply(block, factors, dtypes.get(f"{move.giver}.weight", torch.float32))
    moved.columns.update(dict.fromkeys(move.takers, columns))
    if move.offset is None:
        moved.rows[move.giver] = factors
    moved.pairs.append(
        {
            "giver": move.giver,
            "takers": list(move.takers),
            "largest": float(columns.max()),
            "smallest": float(columns.min()),
        }
    )


def _largest_inputs(
    block: nn.Module, layers: Sequence[str], streams: Streams, index: int
) -> dict[str, Tensor]:
    """By layer: the largest magnitude of each of its inputs, float32 `[K]`, over the text."""
    found: dict[str, Tensor] = {}
    modules = {layer: block.get_submodule(layer) for layer in layers}
    for call, hidden in streams.batches(index, "quantized") if layers else ():
        for layer, x in record_inputs(block, modules, call, hidden).items():
            own = x.float().abs().flatten(0, -2).amax(dim=0)
            found[layer] = torch.maximum(found[layer], own) if layer in found else own
    return found
