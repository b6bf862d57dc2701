"""The arguments of blocks: every sequence has its own, whichever sequences a batch takes, and
architectures for which that cannot be had are refused before anything is computed."""

import pytest
import torch
from conftest import make_model
from transformers import AutoConfig, AutoModelForCausalLM

import llmq
from llmq.errors import LlmqError
from llmq.inference.module import quantized_modules
from llmq.models.arch import find_blocks
from llmq.ptq import block as block_module
from llmq.ptq import engine
from llmq.ptq.batches import Batches
from llmq.ptq.block_calls import BlockCalls
from llmq.ptq.capture import BlockRecorder
from llmq.recipe import Recipe

TOKENS = torch.randint(2, 2048, (5, 24), generator=torch.Generator().manual_seed(3))
SMALL = {
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
GEMMA4 = {
    "num_hidden_layers": 6,
    "head_dim": 16,
    "global_head_dim": 32,
    "vocab_size_per_layer_input": 2048,
    "hidden_size_per_layer_input": 16,
    "sliding_window": 8,
    "num_kv_shared_layers": 0,
}
# Two mamba blocks that return tuples, and alibi with a row per head and sequence.
BAMBA = {
    "num_hidden_layers": 2,
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_d_state": 16,
    "mamba_chunk_size": 16,
}


def build(model_type, **settings):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SMALL, **settings})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


MODELS = {
    "llama": lambda: make_model("llama"),
    "gemma3_text": lambda: make_model("gemma3_text"),
    "falcon-alibi": lambda: make_model("falcon", alibi=True),
    "gemma4_text": lambda: build("gemma4_text", **GEMMA4),
    "bamba": lambda: build("bamba", **BAMBA),
}


@torch.no_grad()
def states_of(model, tokens):
    """The outputs of every block in the model's own forward pass, by block."""
    _, blocks = find_blocks(model)
    found = []
    handles = [
        block.register_forward_hook(
            lambda _module, _args, output: found.append(
                output[0] if isinstance(output, tuple) else output
            )
        )
        for block in blocks
    ]
    model(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_calls_of_any_sequences_reproduce_the_model(name, tmp_path):
    model = MODELS[name]()
    _, blocks = find_blocks(model)
    inputs = []
    calls = BlockCalls.record(
        BlockRecorder(model, blocks), Batches(TOKENS, 2), tmp_path, inputs.append
    )
    hidden = torch.cat(inputs)
    for chosen in ([0, 1], [2, 3], [4], [4, 0, 2]):
        expected = states_of(model, TOKENS[chosen])
        state = hidden[chosen]
        for index, block in enumerate(blocks):
            state = calls.of(index)(chosen).run(block, state)
            assert torch.allclose(state, expected[index], rtol=1e-5, atol=1e-5), (chosen, index)
    assert any(path.stat().st_size for path in tmp_path.iterdir()) is (name == "gemma4_text")
    calls.forget(len(blocks) - 1)
    assert not list(tmp_path.iterdir())


def test_what_is_the_same_for_all_sequences_is_kept_once(tmp_path):
    model = make_model("llama")
    _, blocks = find_blocks(model)
    calls = BlockCalls.record(BlockRecorder(model, blocks), Batches(TOKENS, 2), tmp_path)
    first, second = calls.of(0)([0, 1]), calls.of(1)([3, 4])
    assert len(calls._slots) < 8, "cos, sin and positions, for both blocks"
    assert all(
        torch.equal(one, two)
        for one, two in zip(
            first.kwargs["position_embeddings"], second.kwargs["position_embeddings"], strict=True
        )
    )
    assert calls.of(0, torch.bfloat16)([0]).kwargs["position_embeddings"][0].dtype == torch.bfloat16


@torch.no_grad()
@pytest.mark.parametrize("method", ["gptq", "blockwise"])
def test_per_layer_embeddings_calibrate_on_their_own_sequence(method, monkeypatch):
    """All blocks are kept but the last, so its layers see what they see in the model. Batches of
    two, the last one smaller."""
    monkeypatch.setattr(engine, "batch_size", lambda plans, length: 2)
    model, exact = build("gemma4_text", **GEMMA4), build("gemma4_text", **GEMMA4)
    seen = []
    block = exact.model.layers[5]
    block.mlp.down_proj.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    exact(TOKENS, use_cache=False)
    x = seen[0].reshape(-1, 128)
    measured = {}
    report = block_module.report_layer

    def watch(name, original, result, stats):
        if name.endswith("down_proj"):
            measured[name] = stats.hessian.clone()
        return report(name, original, result, stats)

    monkeypatch.setattr(block_module, "report_layer", watch)
    alike = {"token_weights": "equal", "scale_steps": 0}
    recipe = Recipe.uniform(
        "w8", method=method, samples=5, sequence_length=24, iterations=2, **alike
    )
    rules = (llmq.Rule.parse("*.5.mlp.down_proj=w8"), llmq.Rule.parse("*=keep"))
    llmq.quantize(model, Recipe(**{**vars(recipe), "rules": rules}), TOKENS)
    (hessian,) = measured.values()
    expected = 2 * x.T @ x / len(x)
    assert float((hessian - expected).norm() / expected.norm()) < 1e-5


REFUSED = {
    "hidden states of shape": lambda: build(
        "gemma3n_text",
        num_hidden_layers=4,
        vocab_size_per_layer_input=2048,
        hidden_size_per_layer_input=16,
        head_dim=16,
        laurel_rank=16,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        activation_sparsity_pattern=[0.0] * 4,
        pad_token_id=0,
    ),
    "block 6 does not take the outputs": lambda: build(
        "gemma4_text", **{**GEMMA4, "num_hidden_layers": 12, "num_kv_shared_layers": 6}
    ),
    "is the same tensor as": lambda: build(
        "zamba2",
        num_hidden_layers=4,
        num_key_value_heads=4,
        layer_types=["mamba", "hybrid", "mamba", "hybrid"],
        mamba_d_state=16,
        n_mamba_heads=8,
        mamba_ngroups=1,
        num_mem_blocks=1,
        adapter_rank=8,
        pad_token_id=0,
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_blocks_that_are_more_than_a_chain_are_refused(message, monkeypatch):
    model = REFUSED[message]()
    monkeypatch.setattr(engine, "quantize_block", None)
    with pytest.raises(LlmqError, match=message):
        llmq.quantize(model, Recipe.uniform("w4g32", samples=5, sequence_length=24), TOKENS)
    assert not quantized_modules(model)


def test_state_that_passes_between_blocks_beside_hidden_states_is_noticed(monkeypatch):
    """A second block that adds what the first has left behind. Nothing shows in its arguments."""
    model = make_model("llama")
    kind = type(model.model.layers[0])
    forward, left = kind.forward, []

    def leaving(self, hidden_states, *args, **kwargs):
        output = forward(self, hidden_states, *args, **kwargs)
        left.append(hidden_states)
        return output + 0.5 * left[-2] if len(left) == 2 else output

    monkeypatch.setattr(kind, "forward", leaving)
    with pytest.raises(LlmqError, match=r"block 0 on its own is .*% off"):
        llmq.quantize(model, Recipe.uniform("w4g32", samples=5, sequence_length=24), TOKENS)


def test_arguments_that_change_from_batch_to_batch_are_refused(monkeypatch, tmp_path):
    model = make_model("llama")
    inner, count = model.model.forward, [0]

    def forward(*args, **kwargs):
        count[0] += 1
        return inner(*args, step=torch.tensor(count[0]), **kwargs)

    monkeypatch.setattr(model.model, "forward", forward)
    _, blocks = find_blocks(model)
    with pytest.raises(LlmqError, match=r"kwargs\['step'\], which changes from batch to batch"):
        BlockCalls.record(BlockRecorder(model, blocks), Batches(TOKENS, 2), tmp_path)
