"""The cache that is written in place holds what transformers' own does."""

import pytest
import torch
from conftest import make_model
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from llmq.inference.cache import InPlaceLayer, cache_bytes, in_place_cache
from llmq.inference.decoding import generate


def feed(layer, lengths, batch=2):
    generator = torch.Generator().manual_seed(0)
    for length in lengths:
        yield layer.update(
            *(torch.randn(batch, 3, length, 4, generator=generator) for _ in range(2))
        )


@pytest.mark.parametrize("capacity", [16, 4, 1], ids=["fits", "doubles", "doubles often"])
def test_the_same_keys_and_values(capacity):
    lengths = (3, 1, 1, 4, 1)
    for ours, theirs in zip(
        feed(InPlaceLayer(capacity), lengths), feed(DynamicLayer(), lengths), strict=True
    ):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])


def test_nothing_is_copied_while_it_fits():
    layer = InPlaceLayer(8)
    places = {keys.data_ptr() for keys, _ in feed(layer, (3, 1, 1, 1, 1, 1))}
    assert len(places) == 1
    assert layer.get_seq_length() == 8


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.crop(-2),
        lambda layer: layer.batch_select_indices(torch.tensor([1, 0])),
        lambda layer: layer.reset(),
    ],
    ids=["crop", "reorder", "reset"],
)
def test_whatever_else_changes_it_is_kept(change):
    ours, theirs = InPlaceLayer(8), DynamicLayer()
    for layer in (ours, theirs):
        list(feed(layer, (3, 2)))
        change(layer)
    for mine, other in zip(feed(ours, (1, 1)), feed(theirs, (1, 1)), strict=True):
        assert torch.equal(mine[0], other[0])
        assert torch.equal(mine[1], other[1])


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "gpt2"])
def test_generated_tokens_are_those_of_the_default_cache(family):
    model, prompt = make_model(family), torch.arange(1, 7)[None]
    expected = model.generate(prompt, max_new_tokens=24, do_sample=False, pad_token_id=0)
    assert torch.equal(generate(model, prompt, 24, do_sample=False, pad_token_id=0), expected)
    beams = model.generate(prompt, max_new_tokens=8, num_beams=3, do_sample=False, pad_token_id=0)
    assert torch.equal(
        generate(model, prompt, 8, num_beams=3, do_sample=False, pad_token_id=0), beams
    )


def test_windows_keep_their_own_layers_and_bytes_are_counted():
    cache = in_place_cache(make_model("gemma3_text").config, 64)
    assert [type(layer) is InPlaceLayer for layer in cache.layers] == [False, True]
    cache = in_place_cache(make_model("llama").config, 64)
    assert isinstance(cache, DynamicCache)
    for index in range(2):
        cache.update(torch.zeros(1, 1, 5, 32), torch.zeros(1, 1, 5, 32), index)
    assert cache_bytes(cache) == 2 * 2 * 64 * 32 * 4
