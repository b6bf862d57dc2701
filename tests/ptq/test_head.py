"""The full-precision model beside what was made of it."""

import torch
from conftest import make_model

from llmq.models.readers import ModelReader
from llmq.models.source import meta_model
from llmq.ptq.blocks import Blocks
from llmq.ptq.head import logits_of


def test_logits_of_what_leaves_the_last_block_are_the_models():
    model = make_model("gemma3_text")
    tokens = torch.randint(0, 64, (12,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        behind: list[torch.Tensor] = []
        handle = model.model.layers[-1].register_forward_hook(
            lambda module, args, output: behind.append(output)
        )
        expected = model(tokens[None])
        handle.remove()
        hidden = behind[0][0] if isinstance(behind[0], tuple) else behind[0]
        blocks = Blocks(meta_model(model.config, type(model)), ModelReader(model), "cpu")
        with blocks.with_weights_outside(with_head=True):
            parts = [
                logits_of(blocks, tokens[some], hidden[0, some], 0)
                for some in (slice(0, 5), slice(5, 12))
            ]
    assert torch.allclose(torch.cat(parts), expected.logits[0], atol=1e-5)
