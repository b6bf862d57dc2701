"""Recording block calls: the block-by-block run must be the model's own forward pass, for every
family."""

import pytest
import torch
from conftest import FAMILY_CONFIGS, make_model

from llmq.errors import LlmqError
from llmq.models.arch import find_blocks
from llmq.models.site import sites_in
from llmq.ptq.capture import BlockRecorder, record_inputs, shared_inputs


@torch.no_grad()
@pytest.mark.parametrize("model_type", FAMILY_CONFIGS)
def test_blocks_run_one_by_one_reproduce_the_model(model_type):
    model = make_model(model_type)
    _, blocks = find_blocks(model)
    tokens = torch.randint(2, 2048, (2, 40))
    hidden, calls = BlockRecorder(model, blocks).run(tokens)
    assert len(calls) == len(blocks)
    states = []
    handle = blocks[-1].register_forward_hook(
        lambda _, args, out: states.append(out[0] if isinstance(out, tuple) else out)
    )
    model(tokens, use_cache=False)
    handle.remove()
    for block, call in zip(blocks, calls, strict=True):
        hidden = call.run(block, hidden)
    assert torch.equal(hidden, states[0])
    assert "forward" not in vars(blocks[0])


@torch.no_grad()
def test_blocks_that_do_not_follow_each_other_directly_are_refused():
    model = make_model("llama")
    _, blocks = find_blocks(model)
    inner = model.model.forward

    def doubled(*args, **kwargs):
        """Something between the blocks: here the second sees twice what the first gives."""
        first = blocks[0].forward
        blocks[0].forward = lambda hidden, *rest, **more: 2 * first(hidden, *rest, **more)
        return inner(*args, **kwargs)

    model.model.forward = doubled
    with pytest.raises(LlmqError, match="block 1 does not take the outputs of the block before"):
        BlockRecorder(model, blocks).run(torch.randint(2, 2048, (2, 8)))


@torch.no_grad()
def test_layers_that_share_an_input_are_found_in_running_order():
    model = make_model("llama")
    _, blocks = find_blocks(model)
    hidden, calls = BlockRecorder(model, blocks).run(torch.randint(2, 2048, (1, 8)))
    layers = {site.name: site.module for site in sites_in(blocks[0])}
    groups = shared_inputs(blocks[0], layers, calls[0], hidden)
    assert groups == [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ]
    ran = []
    blocks[0].mlp.down_proj.register_forward_hook(lambda *_: ran.append(1))
    layers = {name: blocks[0].get_submodule(name) for name in ("mlp.gate_proj", groups[0][0])}
    rows = record_inputs(blocks[0], layers, calls[0], hidden)
    assert {name: x.shape for name, x in rows.items()} == dict.fromkeys(layers, (1, 8, 64))
    assert not ran
