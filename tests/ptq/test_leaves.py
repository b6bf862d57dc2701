"""What processes take of the calibration text: all of it, once, in the batches of one process."""

from itertools import chain

import pytest

from llmq.ptq.leaves import N_LEAVES, Leaves, leaves_of


@pytest.mark.parametrize("n", [8, 11, 21, 64, 128])
@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_shares_are_the_whole_in_its_batches(n, batch_size):
    whole = Leaves(n, batch_size)
    assert whole.sequences == range(n)
    assert sum(whole.sizes) == n
    assert max(whole.sizes) <= batch_size
    assert len(whole.batches) == N_LEAVES
    for n_ranks in (2, 4, 8):
        shares = [Leaves(n, batch_size, rank, n_ranks) for rank in range(n_ranks)]
        assert list(chain(*(share.sequences for share in shares))) == list(range(n))
        assert list(chain(*(share.batches for share in shares))) == whole.batches
        lengths = [len(share.sequences) for share in shares]
        assert max(lengths) - min(lengths) <= N_LEAVES // n_ranks


def test_fewer_sequences_than_leaves():
    assert Leaves(3, 4).batches == [[1], [1], [1]]
    assert leaves_of(3) == [1, 1, 1]
    assert leaves_of(19) == [2, 2, 3, 2, 2, 3, 2, 3]
    assert leaves_of(0) == []
