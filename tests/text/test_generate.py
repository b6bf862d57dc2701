"""Text that a model writes itself: seeded, resumable, greedy at the start."""

import torch
from conftest import make_model

from llmq.text.generate import generate_batch, generate_windows, written_windows


def test_starts_are_greedy_and_the_rest_is_sampled():
    teacher = make_model()
    first = torch.arange(2, 34)
    tokens = generate_batch(teacher, first, 12, torch.Generator().manual_seed(0))
    assert tokens.shape == (32, 12)
    assert torch.equal(tokens[:, 0], first)
    with torch.no_grad():
        best = teacher(input_ids=tokens).logits.argmax(-1)
    follows = best[:, :-1] == tokens[:, 1:]
    assert bool(follows[:, :3].all()), "at least three greedy tokens"
    assert float(follows[:, 5:].float().mean()) < 0.9


def test_batches_are_not_made_twice(tmp_path):
    teacher = make_model()
    whole = generate_windows(teacher, 10, 8, tmp_path / "a", seed=1, batch_size=4)
    assert whole.shape == (10, 8)
    assert len(whole[:, 0].unique()) == 10, "each begins with another token of the vocabulary"
    assert torch.equal(
        generate_windows(teacher, 8, 8, tmp_path / "b", seed=1, batch_size=4), whole[:8]
    )
    calls = []
    teacher.forward = lambda *args, forward=teacher.forward, **kwargs: (
        calls.append(1) or forward(*args, **kwargs)
    )
    assert torch.equal(
        generate_windows(teacher, 10, 8, tmp_path / "b", seed=1, batch_size=4), whole
    )
    assert len(calls) == 7, "only the last batch was missing"
    assert torch.equal(written_windows(tmp_path / "b", 10, batch_size=4), whole)
    assert written_windows(tmp_path / "b", 13, batch_size=4) is None
    assert not torch.equal(
        generate_windows(teacher, 4, 8, tmp_path / "c", seed=2, batch_size=4), whole[:4]
    )
