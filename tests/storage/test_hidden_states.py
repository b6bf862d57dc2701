"""Hidden states are the same numbers wherever they lie: in memory, in a file, or first in the one
and then in the other."""

import pytest
import torch

from llmq.storage.hidden_states import ActivationFile
from llmq.storage.room import Room

SHAPE = (7, 3, 5)  # 420 bytes in float32
ROOMS = {"memory": 10_000, "file": 0, "both": 200}


@pytest.fixture(params=ROOMS)
def file(request, tmp_path):
    room = Room(ROOMS[request.param])
    return ActivationFile(tmp_path / "inputs.bin", *SHAPE[1:], room=room)


def written(file, x, durable=False):
    with file.appender(durable=durable) as append:
        for batch in x.split(2):
            append(batch)
    return file


def test_what_is_read_is_what_was_written(file):
    x = torch.randn(SHAPE)
    written(file, x)
    assert file.n_sequences == 7
    for sizes in (3, (1, 4, 2)):
        assert torch.equal(torch.cat(list(file.batches(sizes))), x)
    assert torch.equal(file.sequences([5, 0]), x[[5, 0]])
    lies_in_memory = file.room.limit == ROOMS["memory"]
    assert file.path.exists() != lies_in_memory
    assert (file.room.peak, file.room.on_disk) == (
        (420, 0) if lies_in_memory else (min(file.room.limit, 120), 420)
    )


def test_two_readers_have_places_of_their_own(file):
    x = torch.randn(SHAPE)
    written(file, x)
    for one, other in zip(file.batches(1), file.batches(1), strict=True):
        assert torch.equal(one, other)


def test_what_was_read_is_a_copy(file):
    x = torch.randn(SHAPE)
    next(written(file, x).batches(7)).zero_()
    assert torch.equal(next(file.batches(7)), x)


def test_the_seal_is_the_same_wherever_it_lies(file, tmp_path):
    x = torch.randn(SHAPE)
    beside = ActivationFile(tmp_path / "beside.bin", *SHAPE[1:])
    assert written(file, x, True).recorded == written(beside, x, True).recorded
    assert file.is_sound
    file.recycle()
    assert not file.is_sound
    assert file.recorded == beside.recorded


def test_the_next_one_is_written_over_it(file, tmp_path):
    successor = ActivationFile(tmp_path / "next.bin", *SHAPE[1:], room=file.room)
    written(file, torch.randn(SHAPE))
    file.recycle(successor)
    assert not file.path.exists()
    x = torch.randn(SHAPE)[:4]
    assert torch.equal(next(written(successor, x).batches(4)), x)
    assert successor.n_sequences == 4


def test_a_file_gives_way_to_what_fits_into_memory_and_back(tmp_path):
    room = Room(420)
    file = ActivationFile(tmp_path / "inputs.bin", *SHAPE[1:], room=room)
    large, small = torch.randn(9, *SHAPE[1:]), torch.randn(SHAPE)
    for x in (large, small, large):
        assert torch.equal(next(written(file, x).batches(len(x))), x)
        assert file.path.exists() == (x is large)


def test_an_error_leaves_what_was_there(file):
    x = torch.randn(SHAPE)
    written(file, x)
    with pytest.raises(AttributeError), file.appender() as append:
        append(None)
    assert torch.equal(next(file.batches(7)), x)


def test_a_file_that_ends_too_early_is_named(file):
    written(file, torch.randn(SHAPE))
    with pytest.raises(OSError, match=r"inputs\.bin: ends in the middle"):
        file.sequences([7])


def test_what_was_given_up_takes_no_room(file):
    written(file, torch.randn(SHAPE))
    file.remove()
    file.room.clear()
    assert not file.path.exists()
    assert file.room.taken == 0
