"""Attention of one token against float64."""

import pytest
import torch
from packed_weights import relative_error

from llmq.inference.attention import attention_forward
from llmq_kernels.compiled import decoding, jit


def inputs(batch, heads, shared, head_dim, n_tokens):
    query = torch.randn(batch, heads * shared, 1, head_dim).bfloat16() * 3
    key, value = (
        torch.randn(batch, heads, n_tokens + 9, head_dim).bfloat16()[:, :, :n_tokens]
        for _ in range(2)
    )  # views, as a cache gives them
    return query, key, value


def exact(query, key, value, scaling):
    return torch.nn.functional.scaled_dot_product_attention(
        query.double(), key.double(), value.double(), scale=scaling, enable_gqa=True
    )


@pytest.mark.parametrize("form", ["avx512vnni", "avx2"])
@pytest.mark.parametrize(
    "shape", [(1, 4, 1, 64, 130), (2, 3, 2, 128, 37), (1, 2, 4, 32, 1), (1, 1, 8, 96, 16)], ids=str
)
def test_against_float64(shape, form, monkeypatch):
    if not jit.supports(form):
        pytest.skip(jit.missing() or f"this CPU cannot run {form}")
    monkeypatch.setattr(decoding, "form", lambda: form)
    query, key, value = inputs(*shape)
    assert decoding.attention_refusal(query, key, value) is None
    out = decoding.attention(query, key, value, 0.2)
    assert out.shape == query.shape
    assert relative_error(out, exact(query, key, value, 0.2)) < 2.0**-8, "one rounding to bfloat16"


def test_scores_of_any_size():
    """Scores far apart and all alike; a softmax that forgets its maximum overflows."""
    if reason := jit.missing():
        pytest.skip(reason)
    query, key, value = inputs(1, 2, 1, 64, 50)
    for scaling in (100.0, 0.0):
        out = decoding.attention(query, key, value, scaling)
        assert torch.isfinite(out).all()
        assert relative_error(out, exact(query, key, value, scaling)) < 2.0**-8


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda q, k, v: (q.float(), k, v), "bfloat16"),
        (lambda q, k, v: (q.expand(-1, -1, 2, -1), k, v), "one query token"),
        (lambda q, k, v: (q, k.transpose(2, 3), v), "side by side"),
    ],
    ids=["dtype", "tokens", "strides"],
)
@torch.no_grad()
def test_what_it_does_not_take_goes_to_sdpa(change, reason):
    query, key, value = change(*inputs(1, 2, 1, 64, 64))
    assert reason in decoding.attention_refusal(query, key, value)
    if query.dtype == key.dtype:
        out, _ = attention_forward(
            torch.nn.Module(), query, key, value, None, scaling=0.1, is_causal=False
        )
        expected = exact(query, key, value, 0.1).transpose(1, 2)
        assert relative_error(out, expected) < 2.0**-6


def test_masks_and_gradients_go_to_sdpa(monkeypatch):
    monkeypatch.setattr(decoding, "attention", lambda *_: pytest.fail("the kernel has neither"))
    query, key, value = inputs(1, 2, 1, 64, 7)
    attention_forward(torch.nn.Module(), query, key, value, None, scaling=0.1, is_causal=False)
    with torch.no_grad():
        attention_forward(
            torch.nn.Module(),
            query,
            key,
            value,
            torch.zeros(1, 1, 1, 7, dtype=torch.bfloat16),
            scaling=0.1,
        )
