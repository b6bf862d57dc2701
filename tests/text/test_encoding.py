"""Tokens of a text with the bytes that they stand for."""

import copy

import pytest
import torch
from tokenizers.processors import ByteLevel

from llmq.text.encoding import encode, token_bytes


def of_words(tokenizer, trim_offsets):
    """The tokenizer with offsets as Llama 3 (trimmed) or GPT-2 has them."""
    other = copy.deepcopy(tokenizer)
    other.backend_tokenizer.post_processor = ByteLevel(trim_offsets=trim_offsets)
    return other


@pytest.mark.parametrize("trim_offsets", [True, False])
@pytest.mark.parametrize("text", ["def f(x):\n    return  x \n\n", "für 中文 😀 naïve\n", " a"])
def test_bytes_of_tokens_add_up_to_the_text(tokenizer, trim_offsets, text):
    found = encode(text, of_words(tokenizer, trim_offsets))
    assert found.tokens.tolist() == tokenizer(text)["input_ids"]
    assert int(found.n_bytes.sum()) == len(text.encode())
    assert bool((found.n_bytes >= 0).all())


def test_bytes_are_those_of_each_token(tokenizer):
    text = "def main(argument):\n    return None\n"
    found = encode(text, tokenizer)
    assert found.n_bytes.tolist() == [len(tokenizer.decode([token])) for token in found.tokens]
    begun = found.begun_with(0)
    assert (begun.tokens[0], begun.n_bytes[0], len(begun.tokens)) == (0, 0, len(found.tokens) + 1)
    assert found.begun_with(None) is found


def test_a_character_of_several_tokens_counts_once():
    assert token_bytes("a😀b", [1, 2, 2, 2, 3]).tolist() == [1, 4, 0, 0, 1]
    assert token_bytes("", []).tolist() == []


def test_without_offsets_bytes_are_not_known(tokenizer, monkeypatch):
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    found = encode("a text", tokenizer)
    assert found.n_bytes is None
    assert torch.equal(found.tokens, torch.tensor(tokenizer("a text")["input_ids"]))
    assert found.begun_with(0).n_bytes is None
