"""Perplexity against an independent computation, the BOS policies, and the interval."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import make_model

import llmq
from llmq.errors import LlmqError
from llmq.evaluation.bootstrap import mean_interval, perplexity_of, ratio_interval
from llmq.evaluation.perplexity import Perplexity, perplexity_ratio, windows_per_batch
from llmq.text.windows import Parts, Windows, cut_windows

TEXT = "\n".join(f"line {i}: value = {i * i % 97}" for i in range(600))


def test_equals_an_independent_computation(tokenizer):
    model = make_model()
    result = llmq.perplexity(model, tokenizer, TEXT, sequence_length=48, bos="none")
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    total, count = 0.0, 0
    for start in range(0, len(ids) - 47, 48):
        window = torch.tensor([ids[start : start + 48]])
        with torch.no_grad():
            probabilities = torch.softmax(model(window).logits.double(), -1)
        for i in range(47):
            total -= math.log(probabilities[0, i, window[0, i + 1]])
            count += 1
    assert result.value == pytest.approx(math.exp(total / count), rel=1e-5)
    assert result.windows.n_targets == count == result.to_json()["tokens"]
    assert result.ci95[0] < result.value < result.ci95[1]


def test_the_figure_carries_what_identifies_it(tokenizer):
    report = llmq.perplexity(make_model(), tokenizer, TEXT, sequence_length=32).to_json()
    assert (report["protocol"], report["sequence_length"], report["bos"], report["dtype"]) == (
        "gptq",
        32,
        "none",
        "float32",
    )
    assert all(len(report[f"{name}_sha256"]) == 64 for name in ("text", "tokens", "tokenizer"))


def test_bos_policies(tokenizer):
    config, gemma = make_model().config, make_model("gemma2").config
    row = torch.tensor(tokenizer(TEXT, add_special_tokens=False)["input_ids"])
    assert torch.equal(cut_windows([TEXT], tokenizer, config, 32, "none").tokens[0], row[:32])
    every = cut_windows([TEXT], tokenizer, config, 32, "every-window")
    assert (every.tokens[:, 0] == tokenizer.bos_token_id).all()
    assert torch.equal(every.tokens[:, 1:].flatten(), row[: every.tokens[:, 1:].numel()])
    # This tokenizer adds no BOS by itself, so "start" must not either.
    assert torch.equal(cut_windows([TEXT], tokenizer, config, 32, "start").tokens[0], row[:32])
    assert cut_windows([TEXT], tokenizer, config, 32).bos == "none"
    assert cut_windows([TEXT], tokenizer, gemma, 32).bos == "every-window"
    with pytest.raises(LlmqError, match="every-window"):
        cut_windows([TEXT], tokenizer, config, 32, "sometimes")


def test_start_adds_the_tokenizers_own_bos_once(tokenizer):
    import copy

    from tokenizers.processors import TemplateProcessing

    adding = copy.deepcopy(tokenizer)
    adding.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
    )
    config = make_model().config
    row = cut_windows([TEXT], adding, config, 32, "start").tokens.flatten()
    assert int((row == 0).sum()) == 1
    assert int(row[0]) == 0


def test_too_little_text(tokenizer):
    with pytest.raises(LlmqError, match="tokens, but one window needs 128"):
        llmq.perplexity(make_model(), tokenizer, "short", sequence_length=128)


def test_windows_longer_than_the_model_has_positions_for(tokenizer):
    with pytest.raises(
        LlmqError, match="positions for 128 tokens only; give --sequence-length 128 or less"
    ):
        llmq.perplexity(make_model(), tokenizer, TEXT, sequence_length=129)


def test_nan_logits_are_an_error(tokenizer):
    model = make_model()
    model.lm_head.weight.data[5] = float("nan")
    with pytest.raises(LlmqError, match="logits are NaN"):
        llmq.perplexity(model, tokenizer, TEXT, sequence_length=32)


def test_interval_covers_the_mean_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for seed in range(60):
        values = torch.randn(50, generator=generator, dtype=torch.float64) + 3
        low, high = mean_interval(values, seed)
        covered += low < 3 < high
    assert 50 <= covered <= 60


def test_interval_of_a_ratio_draws_parts_as_wholes():
    """Of parts of one size it is that of the mean; a part of no weight changes nothing."""
    values = torch.randn(40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sizes = torch.full((40,), 7)
    assert ratio_interval(values * 7, sizes) == pytest.approx(mean_interval(values), rel=1e-12)
    sums, sizes = torch.tensor([2.0, 8.0]), torch.tensor([1, 4])
    assert ratio_interval(sums, sizes) == (2.0, 2.0)
    low, high = ratio_interval(torch.tensor([0.0, 8.0]), torch.tensor([4, 4]))
    assert (low, high) == (0.0, 2.0)


def test_more_than_a_float_holds_is_no_figure(tokenizer):
    """A text without spaces is one word."""
    text = "\n".join("x" * 40 for _ in range(40)).replace("\n", ",")
    result = llmq.perplexity(
        make_model(), [text, text], tokenizer=tokenizer, protocol="words", sequence_length=64
    )
    report = result.to_json()
    assert result.value == math.inf
    assert (report["perplexity"], report["ci95"], report["word_perplexity"]) == (None, None, None)
    assert 0 < report["bits_per_byte"] < report["token_perplexity"] < math.inf


def test_bytes_of_a_text_that_is_beyond_a_float():
    """4,000 nats for one token of two bytes."""
    windows = Windows(torch.zeros(1, 2, dtype=torch.int64), "none", None, None)
    windows = replace(windows, parts=Parts.windows(torch.tensor([2]), 1))
    score = Perplexity(math.inf, (math.inf, math.inf), torch.tensor([4000.0]), windows, "float32")
    report = score.to_json()
    assert report["bits_per_byte"] == pytest.approx(2000 / math.log(2))
    assert report["byte_perplexity"] is None


@pytest.mark.parametrize(
    ("length", "vocab_size", "expected"),
    [(256, 2048, 16), (2048, 49_152, 1), (256, 49_152, 5), (256, 262_144, 1), (8192, 2048, 1)],
)
def test_a_batch_holds_no_more_logits_than_its_memory(length, vocab_size, expected):
    assert windows_per_batch(length, vocab_size) == expected


def test_the_ratio_of_two_models_is_known_better_than_either():
    """Window by window the second loses 0.1 nats, whatever the windows are like."""
    windows = Windows(torch.zeros(3, 4, dtype=torch.int64), "none", None, None)
    base_nll = torch.tensor([2.0, 3.0, 4.0], dtype=torch.float64)
    base, other = (
        Perplexity(float(nll.mean().exp()), (0.0, 0.0), nll, windows, "float32")
        for nll in (base_nll, base_nll + 0.1)
    )
    found = perplexity_ratio(base, other)
    assert found["perplexity_ratio"] == pytest.approx(math.exp(0.1))
    assert found["perplexity_ratio_ci95"] == pytest.approx([math.exp(0.1)] * 2)
    one = Perplexity(1.0, (1.0, 1.0), base_nll[:1], windows, "float32")
    assert perplexity_ratio(one, one)["perplexity_ratio_ci95"] is None


def test_a_ratio_beyond_a_float_names_what_to_do():
    assert perplexity_of(1.0) == math.e
    with pytest.raises(LlmqError, match=r"mean of 800 nats .* llmq verify"):
        perplexity_of(800.0)
