"""Perplexity and comparison on every form of text, of models in memory and by name."""

import pytest
import torch

import llmq
from llmq.errors import LlmqError
from llmq.evaluation import divergence
from llmq.text.windows import cut_windows

TEXT = "\n".join(f"line {i}: value = {i * i % 97}" for i in range(100))


def test_forms_of_a_text_give_one_perplexity(model_folder, tokenizer):
    folder = model_folder()
    model = llmq.load(folder, dtype="float32")
    length = {"sequence_length": 32}
    expected = llmq.perplexity(model, tokenizer, TEXT, **length)  # the call of earlier versions
    windows = cut_windows([TEXT], tokenizer, model.config, 32)
    assert torch.equal(expected.windows.tokens, windows.tokens)
    for found in (
        llmq.perplexity(model, TEXT, **length),
        llmq.perplexity(folder, [TEXT], **length),
        llmq.perplexity(model=model, tokenizer=tokenizer, text=TEXT, **length),
        llmq.perplexity(model, windows),
        llmq.perplexity(model, windows.tokens.tolist()),
    ):
        assert found.value == expected.value
    with pytest.raises(LlmqError, match="text: expected nothing behind a text"):
        llmq.perplexity(model, TEXT, TEXT)


def test_comparison_of_texts(model_folder, tokenizer):
    base = model_folder()
    quant = llmq.load(base, dtype="float32")
    llmq.quantize(quant, "w4g32", method="rtn")
    windows = llmq.evaluation_windows(base, TEXT, sequence_length=32)
    expected = divergence.compare(llmq.load(base, dtype="float32"), quant, windows)
    seen = []
    assert llmq.compare(base, quant, TEXT, sequence_length=32) == expected
    assert llmq.compare(base, quant, windows, lambda done, total: seen.append(total)) == expected
    assert set(seen) == {len(windows.tokens)}
    assert expected["kl_mean"] > 0
