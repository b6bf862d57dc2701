"""Classes of positions: each position has one, and what a mean hides shows in its own."""

import pytest
import torch
from conftest import make_model

from llmq.evaluation.position_classes import (
    CLASSES,
    HeldOutLosses,
    class_means,
    classify,
    clearly_worse,
    is_special,
    special_ids,
    watching_lengths,
    worse_classes,
)


def test_each_position_has_one_class():
    special = torch.zeros(2, 6, dtype=torch.bool)
    special[0, 0] = special[0, 3] = special[1, 2] = True
    lengths = torch.ones(2, 6)
    lengths[0, 3] = lengths[1, 4] = 11
    lengths[1, 5] = 9
    names = [[CLASSES[index] for index in row] for row in classify(special, lengths, 1.0).tolist()]
    assert names == [
        ["first", "other", "other", "special", "other", "other"],
        ["first", "other", "special", "other", "outlier", "other"],
    ]
    means = class_means(torch.arange(12.0).view(2, 6), classify(special, lengths, 1.0))
    assert {name: (mean.n, mean.mean) for name, mean in means.items()} == {
        "first": (2, 3.0),
        "special": (2, 5.5),
        "outlier": (1, 10.0),
        "other": (7, pytest.approx((1 + 2 + 4 + 5 + 7 + 9 + 11) / 7)),
    }
    assert "outlier" not in class_means(torch.ones(2, 6), classify(special))


def test_special_tokens_are_those_of_tokenizer_and_config(tokenizer):
    config = make_model(eos_token_id=[5, 7], pad_token_id=9).config
    assert special_ids(config) == {0, 5, 7, 9}
    assert special_ids(config, tokenizer) == {0, 5, 7, 9} | set(tokenizer.all_special_ids)
    assert is_special(torch.tensor([[3, 5], [0, 8]]), {0, 5}).tolist() == [
        [False, True],
        [True, False],
    ]
    assert not is_special(torch.tensor([3, 5]), ()).any()


def test_a_class_that_becomes_worse_is_seen_beside_a_mean_that_falls():
    special = torch.zeros(40, 64, dtype=torch.bool)
    classes = classify(special)
    generator = torch.Generator().manual_seed(0)
    before = torch.rand(40, 64, generator=generator)
    after = before - 0.1
    after[:, 0] = before[:, 0] + 0.05
    assert after.mean() < before.mean()
    means = [class_means(values, classes) for values in (before, after)]
    assert worse_classes(*means) == ["first"]
    assert worse_classes(means[0], means[0]) == []
    losses = HeldOutLosses({"start": before, "trained": after}, classes)
    assert losses.worse("start", "trained") == ["first"]
    assert losses.by_class()["trained"]["first"]["n_positions"] == 40


def test_what_a_sample_cannot_tell_is_not_worse():
    """A difference within its standard error, and a single position."""
    classes = classify(torch.zeros(12, 8, dtype=torch.bool))
    before = torch.zeros(12, 8)
    after = torch.zeros(12, 8)
    after[:, 0] = torch.tensor([1.0, -1.0]).repeat(6) + 0.1
    assert clearly_worse(before, after, classes) == []
    after[:, 0] = 0.1
    assert clearly_worse(before, after, classes) == ["first"]
    assert clearly_worse(before[:1], after[:1], classes[:1]) == []


@torch.no_grad()
def test_lengths_are_relative_to_their_block():
    model = make_model()
    model.model.embed_tokens.weight[7] *= 100
    tokens = torch.randint(8, 2048, (3, 16))
    tokens[1, 5] = 7
    found = []
    with watching_lengths(model, found):
        model(tokens)
        model(tokens[:1])
    assert [tuple(ratios.shape) for ratios in found] == [(3, 16), (1, 16)]
    assert float(found[0][1, 5]) > 10
    assert float(found[0].median()) < 2
    assert not model.model.layers[0]._forward_hooks
