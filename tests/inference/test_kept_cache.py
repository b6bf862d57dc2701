"""Turns that begin with earlier ones give the tokens of a fresh start, and compute only what is
new."""

import pytest
import torch
from conftest import make_model

from llmq.inference.decoding import generate
from llmq.inference.kept_cache import KeptCache

NEW = 6
OPTIONS = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def answered(model, kept, ids):
    """All tokens and how many came out of the cache."""
    cache, n_kept = kept.for_prompt(ids, NEW, OPTIONS)
    row = generate(model, torch.tensor([ids]), NEW, past_key_values=cache, **OPTIONS)[0].tolist()
    kept.keep(row)
    return row, n_kept


def test_turns_are_those_of_a_fresh_start():
    model = make_model(eos_token_id=None)
    kept = KeptCache(model)
    first, n_kept = answered(model, kept, [5, 6, 7, 8])
    assert n_kept == 0
    prompts = [
        ([*first, 9, 10, 11], len(first) - 1),  # the last token of an answer is in no cache
        ([*first[:5], 12, 13], 5),  # the answer was taken back
        ([5, 6, 7, 8], 3),  # at least one token is computed
        ([1, 2, 3], 0),
    ]
    for ids, expected in prompts:
        row, n_kept = answered(model, kept, ids)
        assert row == generate(model, torch.tensor([ids]), NEW, **OPTIONS)[0].tolist()
        assert n_kept == expected


def test_a_turn_that_was_not_finished_is_forgotten():
    model = make_model()
    kept = KeptCache(model)
    kept.for_prompt([5, 6, 7], NEW, OPTIONS)
    assert kept.for_prompt([5, 6, 7], NEW, OPTIONS)[1] == 0


@pytest.mark.parametrize(
    ("family", "options"),
    [("gemma3_text", {}), ("llama", {"num_beams": 2}), ("llama", {"use_cache": False})],
)
def test_what_cannot_be_shortened_is_not_kept(family, options):
    kept = KeptCache(make_model(family))
    assert kept.for_prompt([5, 6, 7], NEW, {**OPTIONS, **options}) == (None, 0)
