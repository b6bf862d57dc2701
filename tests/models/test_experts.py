"""Experts as layers: the same model, and the same weights out of every way of storing them."""

import copy
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import llmq
from llmq.errors import LlmqError
from llmq.models.experts import choices_of, layout_of, token_shares, unfuse, unfused_in
from llmq.models.source import Source, meta_model
from llmq.models.stored import StoredModel
from tests.conftest import EXPERT_CONFIGS, make_model

FAST = ("mixtral", "gpt_oss", "llama4_text")
KINDS = [
    kind if kind in FAST else pytest.param(kind, marks=pytest.mark.slow) for kind in EXPERT_CONFIGS
]
TOKENS = torch.randint(3, 2000, (2, 24), generator=torch.Generator().manual_seed(0))


def logits(model):
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


@pytest.mark.parametrize("kind", KINDS)
def test_an_unfused_model_computes_the_same(kind):
    """Each product has the same operands; sums over experts come in another order, at most."""
    model = make_model(kind)
    model.set_experts_implementation("eager")
    expected, n_weights = logits(model), sum(p.numel() for p in model.parameters())
    names = [name for name, module in model.named_modules() if layout_of(module) is not None]
    unfuse(model)
    assert list(unfused_in(model)) == names
    assert names
    assert sum(p.numel() for p in model.parameters()) == n_weights
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=2e-6)
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied), logits(model))


@pytest.mark.parametrize("kind", KINDS)
def test_a_share_is_what_an_expert_multiplies(kind):
    """The rows of `Routed.share` are the inputs that the expert's own layer sees."""
    model = make_model(kind)
    unfuse(model)
    name, module = next(iter(unfused_in(model).items()))
    seen, calls = {}, []
    module.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(module.routed(*args, **kwargs)), with_kwargs=True
    )
    for index in range(module.n_experts):
        module.expert(index).layer("up_proj").register_forward_pre_hook(
            lambda _, args, index=index: seen.__setitem__(index, args[0])
        )
    logits(model)
    for index in range(module.n_experts):
        share = calls[0].share(index)
        if index not in seen:
            assert len(share.x) == 0, name
            continue
        assert torch.equal(share.x, seen[index])
        assert bool((share.tokens[1:] > share.tokens[:-1]).all()), "in order, each token once"


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_of_storing_experts_gives_the_same_weights(kind, model_folder):
    """Fused by the names of the class, or one by one by those of the original checkpoint."""
    folder = model_folder(kind)
    model = llmq.load(folder, dtype="float32")
    unfuse(model)
    expected = model.state_dict()
    stored = StoredModel.of(Source.open(folder))
    stored.check()
    found = stored.source.tensors.read(stored.names.values())
    experts = [name for name in expected if ".experts." in name]
    assert len(experts) >= 8
    for name in experts:
        assert torch.equal(found[stored.names[name]], expected[name]), name


def test_an_expert_tensor_of_another_shape_is_named(model_folder):
    folder = model_folder("gpt_oss")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("experts.gate_up_proj"))
    save_file({**tensors, name: tensors[name][:, :, 1:].contiguous()}, path)
    with pytest.raises(LlmqError, match=rf"tensor {name} has shape .*, expected \[4, 64, 64\]"):
        StoredModel.of(Source.open(folder))


def test_shares_of_tokens_are_those_of_the_config():
    model = meta_model(make_model("mixtral").config)
    assert choices_of(model.config) == 2
    assert set(token_shares(model).values()) == {0.5}


@pytest.mark.parametrize("hands_on", [False, True])
@pytest.mark.parametrize("n_tokens", [1, 6])
def test_a_number_behind_the_last_expert_adds_nothing_or_what_came_in(n_tokens, hands_on):
    """Routers that mask a choice name such a number; LongCat's hand the inputs on there."""
    model = make_model("mixtral")
    unfuse(model)
    module = next(iter(unfused_in(model).values()))
    module.layout = replace(module.layout, hands_on=hands_on)
    x = torch.randn(n_tokens, 64, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([[2, module.n_experts]] * n_tokens)
    weights = torch.tensor([[0.75, 0.5]] * n_tokens)
    expected = 0.75 * module.outputs(2, x) + (0.5 * x if hands_on else 0)
    torch.testing.assert_close(module(x, index, weights), expected)
