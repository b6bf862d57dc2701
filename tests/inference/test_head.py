"""Head and embeddings at 8 and 4 bits."""

import pytest
import torch
from conftest import make_model

from llmq.errors import LlmqError
from llmq.grid.tensor import QuantizedTensor
from llmq.inference.decoding import prepare_decoding
from llmq.inference.embedding import QuantEmbedding
from llmq.inference.head import HEAD_SPECS, quantize_head
from llmq.inference.module import QuantLinear

TOKENS = torch.arange(1, 9)[None]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("family", "tied"), [("llama", False), ("llama", True), ("gemma3_text", True)]
)
@torch.no_grad()
def test_logits_are_those_of_the_rounded_weights(family, tied, bits):
    model, expected = (make_model(family, tie_word_embeddings=tied) for _ in range(2))
    embeddings, head = expected.get_input_embeddings(), expected.get_output_embeddings()
    assert (head.weight is embeddings.weight) == tied
    for module in {id(module.weight): module for module in (embeddings, head)}.values():
        module.weight.copy_(
            QuantizedTensor.quantize(module.weight.float(), HEAD_SPECS[bits]).dequantize()
        )
    quantize_head(model, bits)
    assert isinstance(model.get_output_embeddings(), QuantLinear)
    assert isinstance(model.get_input_embeddings(), QuantEmbedding)
    torch.testing.assert_close(model(TOKENS).logits, expected(TOKENS).logits, rtol=1e-4, atol=1e-4)


def test_none_changes_nothing_and_other_bits_are_refused():
    model = make_model()
    head = model.get_output_embeddings()
    assert prepare_decoding(model).get_output_embeddings() is head
    with pytest.raises(LlmqError, match="expected 8 or 4"):
        quantize_head(model, 5)
