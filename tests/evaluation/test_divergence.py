"""Comparing models: a model against itself, against an independent computation, and against the
wrong one."""

import pytest
import torch
from conftest import make_model

import llmq
from llmq.errors import LlmqError
from llmq.evaluation.divergence import compare
from llmq.recipe import Recipe
from llmq.text.windows import Windows

WINDOWS = Windows(
    torch.randint(2, 2048, (24, 32), generator=torch.Generator().manual_seed(3)), "none", "", ""
)


def quantized(spec):
    model = make_model()
    llmq.quantize(model, Recipe.uniform(spec, method="rtn"))
    return model


def test_a_model_equals_itself():
    result = llmq.compare(make_model(), make_model(), WINDOWS)
    assert result["kl_max"] <= 1e-7
    assert result["top1_agreement"] == 1.0
    assert result["perplexity_ratio"] == 1.0
    assert result["rms_probability_change"] == 0.0


@torch.no_grad()
def test_equals_an_independent_computation():
    base, quant = make_model(), quantized("w3g32")
    result = llmq.compare(base, quant, WINDOWS)
    p, q = (
        torch.softmax(model(WINDOWS.tokens).logits[:, :-1].double(), -1) for model in (base, quant)
    )
    kl = (p * (p.log() - q.log())).sum(-1)
    assert result["kl_mean"] == pytest.approx(float(kl.mean()), rel=1e-3)
    assert result["kl_max"] == pytest.approx(float(kl.max()), rel=1e-3)
    assert result["kl_p99"] == pytest.approx(
        float(kl.flatten().sort().values[int(0.99 * kl.numel())]), rel=0.05
    )
    assert result["top1_agreement"] == pytest.approx(
        float((p.argmax(-1) == q.argmax(-1)).double().mean()), abs=1e-6
    )
    targets = WINDOWS.tokens[:, 1:, None]
    nll = [-probabilities.gather(-1, targets).log().mean() for probabilities in (p, q)]
    assert result["perplexity_ratio"] == pytest.approx(float((nll[1] - nll[0]).exp()), rel=1e-4)
    low, high = result["perplexity_ratio_ci95"]
    assert low < result["perplexity_ratio"] < high


def test_fewer_bits_diverge_more():
    base = make_model()
    results = [
        llmq.compare(base, quantized(spec), WINDOWS) for spec in ("w8", "w4g32", "w2g32-asym")
    ]
    assert results[0]["kl_mean"] < results[1]["kl_mean"] < results[2]["kl_mean"]
    assert results[0]["top1_agreement"] > results[2]["top1_agreement"]


def test_other_vocabularies_are_refused():
    with pytest.raises(LlmqError, match="2048 and 1024 tokens"):
        llmq.compare(make_model(), make_model(vocab_size=1024), WINDOWS)


def test_the_divergence_is_told_by_position():
    """All of it, and the first token of a window on its own."""
    base, quant = make_model(), quantized("w3g32")
    result = llmq.compare(base, quant, WINDOWS)
    first = llmq.compare(base, quant, Windows(WINDOWS.tokens[:, :2], "none", "", ""))
    by_position = result["kl_by_position"]
    assert by_position["first"]["n_positions"] == 24
    assert by_position["first"]["mean"] == pytest.approx(first["kl_mean"], rel=1e-4)
    n = sum(each["n_positions"] for each in by_position.values())
    assert n == 24 * 31
    whole = sum(each["n_positions"] * each["mean"] for each in by_position.values()) / n
    assert whole == pytest.approx(result["kl_mean"], rel=1e-9)


@torch.no_grad()
def test_perplexity_is_told_by_position():
    """Against the losses of the positions themselves."""
    base, quant = make_model(), quantized("w3g32")
    windows = Windows(WINDOWS.tokens.clone(), "none", "", "")
    windows.tokens[:, 5] = 0
    found = compare(base, quant, windows, special={0})["perplexity_by_position"]
    targets = windows.tokens[:, 1:]
    is_special = (windows.tokens[:, :-1] == 0) & (torch.arange(31) > 0)
    for name, chosen in (
        ("first", (torch.arange(31) == 0).expand(24, 31)),
        ("special", is_special),
        ("other", ~is_special & (torch.arange(31) > 0)),
    ):
        assert found[name]["n_positions"] == int(chosen.sum())
        for key, model in (("base", base), ("quant", quant)):
            log_probabilities = torch.log_softmax(model(windows.tokens).logits[:, :-1].double(), -1)
            losses = -log_probabilities.gather(-1, targets[..., None])[..., 0]
            assert found[name][key] == pytest.approx(float(losses[chosen].mean().exp()), rel=1e-4)


def test_other_protocols_are_refused(tokenizer):
    model = make_model()
    text = "\n".join(f"line {i}" for i in range(60))
    windows = llmq.evaluation_windows(
        model, text, tokenizer=tokenizer, protocol="strided", sequence_length=16
    )
    with pytest.raises(LlmqError, match="windows of protocol strided: two models are compared by"):
        llmq.compare(model, model, windows)


def test_special_tokens_and_outliers_are_told_apart():
    base = make_model()
    with torch.no_grad():
        base.model.embed_tokens.weight[7] *= 1000
    windows = Windows(WINDOWS.tokens.clone(), "none", "", "")
    windows.tokens[:, 5], windows.tokens[:, 9] = 0, 7
    found = compare(base, quantized("w4g32"), windows, special={0})["kl_by_position"]
    assert found["special"]["n_positions"] >= 24
    assert found["outlier"]["n_positions"] >= 24
