"""Activation and key/value nodes: values against the reference arithmetic, gradients by hand,
moving ranges by their formula."""

import pytest
import torch
from conftest import make_model

import llmq
from llmq.activations.keys_values import fake_quantize_heads, quantize_kv
from llmq.activations.nodes import (
    EMA,
    ActivationQuantizer,
    fake_quantize_per_token,
    fake_quantize_ranged,
)
from llmq.activations.ranges import RangeObserver, static_range
from llmq.errors import LlmqError
from llmq.grid.spec import ActSpec
from llmq.qat.losses import LossWeights
from llmq.qat.schedule import Phases
from llmq.qat.student import Student
from llmq.qat.weights import fake_quant_modules
from llmq.recipe import Recipe
from llmq_kernels.core.reference import fake_quantize_static


def test_per_token_values_and_gradient():
    x = (torch.randn(3, 5, 32) * 4).requires_grad_()
    y = fake_quantize_per_token(x)
    scale = x.detach().abs().amax(-1, keepdim=True) / 127
    assert torch.allclose(y, (x / scale).round() * scale, atol=1e-6)
    upstream = torch.randn_like(x)
    y.backward(upstream)
    assert torch.equal(x.grad, upstream)


def test_static_values_and_gradient():
    x = (torch.randn(200) * 2).requires_grad_()
    found = static_range(torch.tensor(-1.0), torch.tensor(2.0))
    scale, zero = 3 / 255, 85.0
    assert found.tolist() == pytest.approx([scale, zero])
    y = fake_quantize_ranged(x, found)
    codes = (x.detach() / found[0]).round() + zero
    assert torch.allclose(y, (codes.clamp(0, 255) - zero) * scale, atol=1e-5)
    y.sum().backward()
    assert torch.equal(x.grad, ((codes >= 0) & (codes <= 255)).float())
    assert 0 < float(x.grad.mean()) < 1


def test_ranges_move_start_late_and_freeze():
    node = ActivationQuantizer("int8-static").train()
    first, second = torch.randn(100), torch.randn(100) * 3
    node.enabled = False
    assert torch.equal(node(first), first)
    node(second)
    assert float(node.high) == pytest.approx(
        float(first.max() + EMA * (second.max() - first.max()))
    )
    assert float(node.low) == pytest.approx(float(first.min() + EMA * (second.min() - first.min())))
    node.enabled, node.observing = True, False
    before = node.input_range()
    assert torch.equal(node(second), fake_quantize_static(second, before))
    assert torch.equal(node.input_range(), before)
    node.observing = True
    node.eval()(second * 9)
    assert torch.equal(node.input_range(), before), "evaluation does not move a range"


def test_range_methods():
    observer = RangeObserver()
    values = torch.cat([torch.randn(20000), torch.tensor([300.0])])
    observer.add(values)
    observer.add(torch.tensor([float("nan")]))
    widest, percentile, best = (
        observer.range(method) for method in ("minmax", "percentile", "mse")
    )
    assert float(widest[0]) == pytest.approx((300 - float(values.min())) / 255, rel=1e-5)
    assert percentile[0] < 0.1 * widest[0]
    sample = torch.cat(observer._samples)
    errors = [
        float((fake_quantize_static(sample, found) - sample).square().mean())
        for found in (best, widest)
    ]
    assert errors[0] <= errors[1]
    with pytest.raises(LlmqError, match="minmax, percentile, mse"):
        observer.range("other")
    with pytest.raises(LlmqError, match="no finite activation"):
        RangeObserver().range()


def test_observers_of_parts_have_seen_what_one_of_all_has():
    leaves = torch.randn(4, 3, 20_000, generator=torch.Generator().manual_seed(0))

    def observed(first, stop):
        observer = RangeObserver(first)
        for leaf in range(first, stop):
            for batch in leaves[leaf]:
                observer.add(batch)
            observer.next_leaf()
        return observer

    whole, merged = observed(0, 4), observed(0, 1)
    for part in (observed(1, 2), observed(2, 4), RangeObserver()):  # the last has seen nothing
        merged.merge(part.state())
    for method in ("minmax", "percentile", "mse"):
        assert torch.equal(merged.range(method), whole.range(method))
    assert not torch.equal(observed(1, 2).state(), observed(0, 1).state())


@pytest.mark.parametrize("bits", [8, 4])
def test_heads_are_quantized_one_by_one_and_only_once(bits):
    x = (torch.randn(2, 3, 5, 16) * 3).requires_grad_()
    y = fake_quantize_heads(x, bits)
    scale = x.detach().abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    assert torch.allclose(y, (x / scale).round() * scale, atol=1e-6)
    assert torch.allclose(fake_quantize_heads(y, bits), y, atol=1e-6)
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def on_grid(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Heads on their grid, with the gradient passed straight through: written out once more, by
    autograd."""
    scale = x.detach().abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    return x + ((x / scale).round() * scale - x).detach()


@pytest.mark.parametrize("before_rope", [False, True])
def test_gradients_of_a_whole_model_with_quantized_keys_and_values(before_rope, monkeypatch):
    """Every weight gets the gradient that autograd finds when keys and values are quantized by
    hand, where attention reads them or where the projections give them."""
    ids, bits = torch.randint(2, 2048, (2, 12)), 4
    ours, by_hand, plain = (make_model() for _ in range(3))
    quantize_kv(ours, bits, before_rope=before_rope)
    for model in (ours, plain):
        model(input_ids=ids, labels=ids).loss.backward()
    if before_rope:
        width = by_hand.config.hidden_size // by_hand.config.num_attention_heads
        for block in by_hand.model.layers:
            for projection in (block.self_attn.k_proj, block.self_attn.v_proj):
                projection.forward = lambda x, weight=projection.weight: on_grid(
                    (x @ weight.T).unflatten(-1, (-1, width)), bits
                ).flatten(-2)
    else:
        attend = torch.nn.functional.scaled_dot_product_attention
        monkeypatch.setattr(
            torch.nn.functional,
            "scaled_dot_product_attention",
            lambda q, k, v, **options: attend(q, on_grid(k, bits), on_grid(v, bits), **options),
        )
    by_hand(input_ids=ids, labels=ids).loss.backward()
    for (name, parameter), expected, without in zip(
        ours.named_parameters(), by_hand.parameters(), plain.parameters(), strict=True
    ):
        assert torch.allclose(parameter.grad, expected.grad, rtol=1e-3, atol=1e-6), name
        assert not torch.allclose(parameter.grad, without.grad, rtol=1e-3, atol=1e-6), name


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt2"])
def test_keys_and_values_after_rope(model_type):
    """The whole text at once and token by token with a cache compute the same function."""
    model, plain = make_model(model_type), make_model(model_type)
    quantize_kv(model, 4)
    ids = torch.randint(2, 2048, (1, 12))
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        assert not torch.allclose(whole, plain(input_ids=ids).logits, atol=1e-3)
        cache, steps = None, []
        for i in range(12):
            out = model(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    assert torch.allclose(torch.cat(steps, dim=1), whole, atol=1e-4)


def test_keys_and_values_before_rope_and_errors():
    model, plain = make_model("llama"), make_model("llama")
    quantize_kv(model, 4, before_rope=True)
    ids = torch.randint(2, 2048, (1, 12))
    with torch.no_grad():
        assert not torch.allclose(
            model(input_ids=ids).logits, plain(input_ids=ids).logits, atol=1e-3
        )
    with pytest.raises(LlmqError, match="8 or 4"):
        quantize_kv(model, 5)
    with pytest.raises(LlmqError, match="k_proj"):
        quantize_kv(make_model("gpt2"), 8, before_rope=True)


def test_a_static_range_starts_from_the_one_that_was_calibrated():
    start = torch.tensor([0.05, 100.0])
    node = ActivationQuantizer("int8-static", start)
    assert torch.allclose(node.input_range(), start)
    node.train()
    node(torch.full((4, 8), 50.0))
    assert float(node.high) == pytest.approx(0.05 * 155 + 0.01 * (50 - 0.05 * 155), rel=1e-4), (
        "one observation moves it by a hundredth"
    )


def test_a_range_without_data_is_named_instead_of_stored():
    with pytest.raises(LlmqError, match="has seen no data"):
        ActivationQuantizer("int8-static").input_range()


def static_model():
    tokens = torch.randint(2, 2048, (2, 16), generator=torch.Generator().manual_seed(1))
    return llmq.prepare_qat(
        make_model("llama"),
        Recipe.uniform("w4g32", samples=2, sequence_length=16, activations=ActSpec("int8-static")),
        tokens,
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_ranges_see_each_batch_once(checkpointing):
    """Neither the check of the head nor the second forward pass of gradient checkpointing is
    data."""
    model = static_model().train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    nodes = [module for module in model.modules() if isinstance(module, ActivationQuantizer)]
    calibrated = [node.high.clone() for node in nodes]
    student = Student(model, None, LossWeights(kl=0, ce=1)).train()
    assert [node.high for node in nodes] == calibrated
    tokens = torch.randint(2, 2048, (2, 16), generator=torch.Generator().manual_seed(0))
    seen = []
    for node in nodes:
        node.observe = lambda x, observe=node.observe: (seen.append(1), observe(x))
    for _ in range(2):
        student(tokens)["loss"].backward()
    assert len(seen) == 2 * len(nodes)


def test_the_schedule_sets_every_switch():
    model = static_model()
    phases = Phases(gradual=0.5, activations=0.2, freeze_ranges=0.6)
    for done, strength, enabled, observing in (
        (0.0, 0.0, False, True),
        (0.25, 0.5, True, True),
        (0.6, 1.0, True, False),
    ):
        phases.apply(model, done)
        assert {
            (module.strength, module.activations.enabled, module.activations.observing)
            for module in fake_quant_modules(model).values()
        } == {(strength, enabled, observing)}
