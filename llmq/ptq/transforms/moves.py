"""Where scale can move inside a block, and moving it.

Layers that read the same tensor can have their columns multiplied if what gives that tensor is
divided: a norm, or a layer before them (up before down, v before o). Which norm or layer that is
stands in no table: one that could be it is scaled at random, and it is if nothing changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmq.models.arch import linear_shape, linear_weight
from llmq.ptq.capture import BlockCall, run_and_record

TOLERANCE = 1e-4  # of float32 products: what is no move changes outputs by some tenths
SPREAD = 0.5  # of the logarithms of factors that are tried


@dataclass(frozen=True)
class Move:
    """giver: a norm, or a layer that is quantized. takers: layers that read what it gives, and are
    all that do. offset: what a norm adds to its weight, None for a layer. repeats, width: takers
    read each `width` outputs so many times (heads that share keys and values)."""

    giver: str
    takers: tuple[str, ...]
    offset: float | None
    repeats: int = 1
    width: int = 1

    def gathered(self, columns: Tensor) -> Tensor:
        """Values of the takers' columns `[R, K]`, those of one output of the giver below each
        other: `[R * repeats, N]`."""
        heads = columns.unflatten(1, (-1, self.repeats, self.width))
        return heads.transpose(1, 2).flatten(2).flatten(0, 1)

    def spread(self, factors: Tensor) -> Tensor:
        """Factors of the giver's outputs `[N]` for the takers' columns `[K]`."""
        heads = factors.unflatten(0, (-1, 1, self.width))
        return heads.expand(-1, self.repeats, -1).flatten()

    @torch.no_grad()
    def apply(self, block: nn.Module, factors: Tensor, dtype: torch.dtype) -> Tensor:
        """Multiply the takers' columns, divide the giver. factors: of the giver's outputs, float32
        `[N]`. dtype: that a norm is stored in, whose rounding the takers make up for. Returns what
        the takers' columns were multiplied with, `[K]`."""
        if self.offset is None:
            linear_weight(block.get_submodule(self.giver)).div_(factors[:, None])
            if (bias := dict(block.named_parameters()).get(f"{self.giver}.bias")) is not None:
                bias.div_(factors)
        else:
            factors = _divide_norm(
                block.get_parameter(f"{self.giver}.weight"), self.offset, factors, dtype
            )
        columns = self.spread(factors)
        for taker in self.takers:
            linear_weight(block.get_submodule(taker)).mul_(columns)
        return columns


def _divide_norm(weight: Tensor, offset: float, factors: Tensor, dtype: torch.dtype) -> Tensor:
    """Divide a norm in place, as near as its dtype allows. Returns what it was divided by."""
    old = weight + offset
    stored = (old / factors - offset).to(dtype).float()
    found = old / (stored + offset)
    is_usable = torch.isfinite(found) & (found > 0)
    weight.copy_(torch.where(is_usable, stored, weight))
    return torch.where(is_usable, found, torch.ones_like(found))


def find_move(
    block: nn.Module, group: Sequence[str], layers: Sequence[str], call: BlockCall, hidden: Tensor
) -> Move | None:
    """How scale can reach the layers of a group, which read the same tensor, or None. layers: that
    are quantized. call, hidden: one sequence, to try it on."""
    candidates = list(_norms(block, group, call, hidden))
    if len(group) == 1:
        candidates += _layers_before(block, group[0], layers)
    before = _outputs(block, group, call, hidden)
    for move in candidates:
        if _holds(block, move, before, lambda: _outputs(block, group, call, hidden)):
            return move
    return None


def _norms(
    block: nn.Module, group: Sequence[str], call: BlockCall, hidden: Tensor
) -> Iterator[Move]:
    """The module with a weight per channel whose output is the very tensor that the group reads,
    as both kinds of norm: the weight itself multiplies, or one more than it."""
    layer = block.get_submodule(group[0])
    n_channels = _columns(layer)
    norms = {
        name: module
        for name, module in block.named_modules()
        if isinstance(weight := getattr(module, "weight", None), Tensor)
        and weight.shape == (n_channels,)
        and getattr(module, "bias", None) is None
    }
    with _watching(norms, layer) as found:
        call.run(block, hidden)
    for name in found:
        yield Move(name, tuple(group), 0.0, width=n_channels)
        yield Move(name, tuple(group), 1.0, width=n_channels)


@contextmanager
def _watching(norms: dict[str, nn.Module], layer: nn.Module) -> Iterator[list[str]]:
    """Names of the norms whose output enters a layer as it is."""
    outputs: dict[str, Tensor] = {}
    found: list[str] = []

    def keep(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda module, args, output: outputs.__setitem__(name, output)

    def look(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        entered = (*args, *kwargs.values())[0]
        found.extend(name for name, output in outputs.items() if output is entered)

    handles = [norm.register_forward_hook(keep(name)) for name, norm in norms.items()]
    handles.append(layer.register_forward_pre_hook(look, with_kwargs=True))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _layers_before(block: nn.Module, taker: str, layers: Sequence[str]) -> Iterator[Move]:
    """Other layers with an output for each column, or for several heads of them."""
    n_columns = _columns(block.get_submodule(taker))
    for name in reversed([each for each in layers if each != taker]):
        shape = linear_shape(block.get_submodule(name))
        assert shape is not None
        repeats, rest = divmod(n_columns, shape[0])
        if rest == 0 and repeats == 1:
            yield Move(name, (taker,), None, width=n_columns)
        elif rest == 0:
            parent = block.get_submodule(name.rpartition(".")[0])
            width = getattr(parent, "head_dim", 0)
            if width and shape[0] % width == 0:
                yield Move(name, (taker,), None, repeats, width)


def _columns(layer: nn.Module) -> int:
    shape = linear_shape(layer)
    assert shape is not None
    return shape[1]


@torch.no_grad()
def _outputs(
    block: nn.Module, group: Sequence[str], call: BlockCall, hidden: Tensor
) -> list[Tensor]:
    """What the layers of a group give, and what the block does."""
    watched = {name: block.get_submodule(name) for name in group}
    output, rows = run_and_record(block, {}, watched, call, hidden.clone())
    return [*rows.values(), output]


def _holds(
    block: nn.Module, move: Move, before: list[Tensor], run: Callable[[], list[Tensor]]
) -> bool:
    """Whether random factors change nothing. The block is left as it was."""
    names = (move.giver, *move.takers)
    parameters = [each for name in names for each in block.get_submodule(name).parameters()]
    kept = [parameter.detach().clone() for parameter in parameters]
    n_outputs = _columns(block.get_submodule(move.takers[0])) // move.repeats
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(n_outputs, generator=generator).mul(SPREAD).exp()
    columns = move.apply(block, factors.to(kept[0].device), torch.float32)
    after = run()
    with torch.no_grad():
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)
    if bool((columns == 1).all()):  # a norm that is zero everywhere, which nothing divides
        return False
    return all(_distance(a, b) < TOLERANCE for a, b in zip(before, after, strict=True))


def _distance(before: Tensor, after: Tensor) -> float:
    """Of a usual token: its change over its length."""
    change = (after.float() - before.float()).norm(dim=-1)
    return float((change / before.float().norm(dim=-1).clamp_min(1e-30)).median())
