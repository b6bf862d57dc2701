"""Which calibration sequences run through a block together, and how sums over them are ordered.

The sequences are cut into eight leaves of a binary tree, one after the other and as even as can be,
and each leaf into batches, none of which crosses it. Sums are taken batch by batch inside a leaf,
and leaves are merged in pairs. What is computed thus hangs on the text alone: 2, 4 or 8 processes
take whole subtrees, and give the bits of one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

N_LEAVES = 8


@dataclass(frozen=True)
class Leaves:
    """The share of one process. n_sequences: of all. batch_size: sequences that run through a block
    at a time, at most. n_ranks: processes, a divisor of the number of leaves."""

    n_sequences: int
    batch_size: int
    rank: int = 0
    n_ranks: int = 1

    @property
    def _n_leaves(self) -> int:
        return min(N_LEAVES, self.n_sequences)

    @property
    def own(self) -> range:
        """The numbers of the leaves of this process."""
        each = self._n_leaves // self.n_ranks
        return range(self.rank * each, (self.rank + 1) * each)

    @property
    def sequences(self) -> range:
        """The sequences of this process among all."""
        return range(self._start(self.own.start), self._start(self.own.stop))

    @cached_property
    def batches(self) -> list[list[int]]:
        """How many sequences the batches have, by leaf of this process."""
        sizes = [self._start(leaf + 1) - self._start(leaf) for leaf in self.own]
        return [list(self._cut(size)) for size in sizes]

    @cached_property
    def sizes(self) -> list[int]:
        """The same one after the other."""
        return [size for leaf in self.batches for size in leaf]

    def _start(self, leaf: int) -> int:
        return leaf * self.n_sequences // self._n_leaves

    def _cut(self, size: int) -> Iterator[int]:
        while size > 0:
            yield min(size, self.batch_size)
            size -= self.batch_size


def leaves_of(n: int) -> list[int]:
    """So many chunks, in the leaves of a process that has all of them."""
    return [sum(leaf) for leaf in Leaves(n, 1).batches]
