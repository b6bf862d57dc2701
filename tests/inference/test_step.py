"""Recorded decoding steps give what the model gives, and whatever they do not suit goes through the
model, with a reason."""

import pytest
import torch
from conftest import make_model

from llmq.activations.keys_values import quantize_kv
from llmq.grid.spec import QuantSpec
from llmq.grid.tensor import QuantizedTensor
from llmq.inference.cache import in_place_cache
from llmq.inference.decoding import generate, prepare_decoding
from llmq.inference.module import quantized_modules, swap
from llmq.inference.step import TOLERANCE, step_of
from llmq_kernels.compiled import decoding, jit

WIDE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
PROMPT = torch.arange(1, 20)[None]
NEW = 12


def ready(
    family="llama", compute="int8", spec=QuantSpec("int4", 128), dtype=torch.bfloat16, **overrides
):
    """A quantized model, prepared for decoding. INT8 activations, since every CPU with AVX2 has
    kernels for them."""
    if reason := decoding.missing():
        pytest.skip(reason)
    return prepare_decoding(quantized_model(family, compute, spec, dtype, **overrides))


def quantized_model(
    family="llama", compute="int8", spec=QuantSpec("int4", 128), dtype=torch.bfloat16, **overrides
):
    model = make_model(family, dtype=dtype, **(WIDE | overrides))
    vars(model.config).update({name: None for name, value in overrides.items() if value is None})
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings()
    ]
    swap(
        model,
        {
            name: QuantizedTensor.quantize(model.get_submodule(name).weight.detach().float(), spec)
            for name in names
        },
    )
    for module in quantized_modules(model).values():
        module.set_compute(compute)
    return model


@torch.no_grad()
def logits_of_steps(model, cache, n_new=NEW):
    """Of the prompt's last token and of the tokens after it, one by one."""
    rows = [model(PROMPT, past_key_values=cache, logits_to_keep=1).logits]
    rows += [model(torch.tensor([[7 * i + 3]]), past_key_values=cache).logits for i in range(n_new)]
    return torch.cat(rows, 1)[0]


def close(ours, theirs):
    return bool(((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1) <= TOLERANCE).all())


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {}),
        ("llama", {"num_key_value_heads": 4, "attention_bias": True}),
        (
            "llama",
            {
                "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
                "max_position_embeddings": 22,
            },
        ),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {"use_sliding_window": False, "layer_types": ["full_attention"] * 2}),
        ("qwen3", {}),
        ("qwen3", {"head_dim": 32}),
    ],
    ids=["llama", "biases", "dynamic rope", "mistral", "qwen2", "qwen3", "narrow heads"],
)
def test_recorded_steps_give_the_models_logits(family, overrides):
    model = ready(family, **overrides)
    step = step_of(model)
    assert step.reason is None
    with torch.inference_mode():
        ours = logits_of_steps(model, in_place_cache(model.config, 64))
    assert step.reason is None
    assert step.replayed == NEW - 1, "all but the first, which the model computes"
    model.base_model.forward = step._forward
    assert close(ours, logits_of_steps(model, in_place_cache(model.config, 64)))


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec("int8", -1),
        QuantSpec("int4", 64, symmetric=False),
        QuantSpec("int3", 128),
        QuantSpec("ternary", 64),
    ],
    ids=str,
)
@pytest.mark.parametrize("compute", ["exact", "int8"])
def test_whatever_kernel_multiplies(spec, compute):
    model = ready(compute=compute, spec=spec)
    ours = logits_of_steps(model, in_place_cache(model.config, 64))
    step = step_of(model)
    if compute == "exact" and not (jit.supports("avx512bf16") or jit.supports("amx")):
        assert "is not one of llmq's kernels" in step.reason
    else:
        assert (step.reason, step.replayed) == (None, NEW - 1)
    model.base_model.forward = step._forward
    assert close(ours, logits_of_steps(model, in_place_cache(model.config, 64)))


def test_generated_tokens_are_the_models():
    model = ready()
    ours = generate(model, PROMPT, NEW, do_sample=False, pad_token_id=0)
    assert step_of(model).replayed == NEW - 2  # the prompt gives the first, the model the second
    model.base_model.forward = step_of(model)._forward
    assert torch.equal(ours, generate(model, PROMPT, NEW, do_sample=False, pad_token_id=0))


def test_caches_that_grow_and_change():
    """A buffer that is too small, one that is cropped as speculative decoding does, another text,
    other threads: the recording follows, inside and outside of inference mode."""
    model, n_threads = ready(), torch.get_num_threads()
    step = step_of(model)
    expected = logits_of_steps(model, in_place_cache(model.config, 64))
    assert close(logits_of_steps(model, in_place_cache(model.config, 8)), expected)
    cache = in_place_cache(model.config, 64)
    with torch.inference_mode():
        logits_of_steps(model, cache)
    before = step.replayed
    cache.crop(-NEW)
    with torch.no_grad():
        again = torch.cat(
            [model(torch.tensor([[7 * i + 3]]), past_key_values=cache).logits for i in range(NEW)],
            1,
        )[0]
        assert step.replayed == before + NEW, "the buffers stayed"
        assert close(again, expected[1:])
        try:
            torch.set_num_threads(n_threads + 1)
            model(PROMPT[:, :1], past_key_values=cache)
            assert step.replayed == before + NEW, "recorded again"
        finally:
            torch.set_num_threads(n_threads)


@torch.no_grad()
def test_weights_that_move_are_recorded_again():
    model = ready()
    step, cache = step_of(model), in_place_cache(model.config, 64)
    expected = logits_of_steps(model, cache)
    before = step.replayed
    for change in (
        lambda: next(iter(quantized_modules(model).values())).set_compute("int8"),
        lambda: setattr(model.model.norm.weight, "data", model.model.norm.weight.data.clone()),
    ):
        change()
        cache.crop(-1)
        assert close(
            model(torch.tensor([[7 * (NEW - 1) + 3]]), past_key_values=cache).logits[0],
            expected[-1:],
        )
        assert step.replayed == before


@torch.no_grad()
def test_what_a_recording_does_not_suit_goes_through_the_model():
    model = ready()
    step, cache = step_of(model), in_place_cache(model.config, 64)
    logits_of_steps(model, cache)
    before, token = step.replayed, PROMPT[:, :1]
    length = cache.get_seq_length()
    mask = torch.ones(1, length + 1, dtype=torch.int64)
    mask[0, 0] = 0
    model(token, past_key_values=cache, attention_mask=mask)
    assert len(model(token, past_key_values=cache, output_hidden_states=True).hidden_states) == 3
    model(token, past_key_values=cache, position_ids=torch.tensor([[3]]))
    model(PROMPT[:, :2], past_key_values=cache)
    model(token)
    with torch.enable_grad():
        model(token, past_key_values=cache)
    assert (step.replayed, step.reason) == (before, None)
    model(token, past_key_values=cache)
    assert step.replayed == before + 1


def test_attention_that_is_not_plain_is_left_to_the_model():
    """8 bits of keys and values change less than the comparison with the first token could see."""
    if reason := decoding.missing():
        pytest.skip(reason)
    model = quantized_model()
    quantize_kv(model, 8)
    assert "not llmq_kv8" in step_of(prepare_decoding(model)).reason


@pytest.mark.parametrize("before_rope", [False, True])
def test_quantized_keys_and_values_are_left_to_the_model(before_rope):
    if reason := decoding.missing():
        pytest.skip(reason)
    model = quantized_model()
    quantize_kv(model, 4, before_rope=before_rope)
    expected = logits_of_steps(model, in_place_cache(model.config, 64))
    plain = logits_of_steps(prepare_decoding(quantized_model()), in_place_cache(model.config, 64))
    ours = logits_of_steps(prepare_decoding(model), in_place_cache(model.config, 64))
    assert (ours - expected).norm() < 0.2 * (plain - expected).norm(), (
        "attention by another kernel flips a code here and there"
    )
    assert step_of(model).replayed == 0
    assert step_of(model).reason is not None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"family": "gemma3_text"}, "Gemma3"),
        ({"hidden_act": "gelu"}, "not gelu"),
        ({"family": "mistral"}, "sliding windows"),
        ({"dtype": torch.float32}, "not bfloat16"),
        (
            {"hidden_size": 320, "intermediate_size": 320, "spec": QuantSpec("int4", 64)},
            "constant_pad_nd",
        ),
    ],
    ids=["layers", "activation", "windows", "dtype", "padding"],
)
def test_reasons(change, reason):
    model = ready(**change)
    logits_of_steps(model, in_place_cache(model.config, 64), 3)
    assert reason in step_of(model).reason
    assert step_of(model).replayed == 0


def test_a_step_that_does_not_agree_is_not_used(monkeypatch):
    model = ready()
    monkeypatch.setattr(decoding, "gate", lambda gate, up: gate)
    expected = logits_of_steps(model, in_place_cache(model.config, 64))
    assert "is off by" in step_of(model).reason
    model.base_model.forward = step_of(model)._forward
    assert torch.equal(logits_of_steps(model, in_place_cache(model.config, 64)), expected)
