"""Embeddings in storage form, alone and as the other side of a head."""

import copy
import pickle

import pytest
import torch
from conftest import make_model
from torch import nn

from llmq.grid.spec import QuantSpec
from llmq.grid.tensor import QuantizedTensor, quantize_by_rows
from llmq.inference.embedding import QuantEmbedding, quantized_tables, swap_tables
from llmq.inference.module import QuantLinear
from llmq.models.outside import TIED, tables_of
from llmq_kernels.core.dispatch import PreparedWeight

IDS = torch.tensor([[3, 0, 76], [3, 5, 1]])


def table(spec="w8", n=80, k=96):
    torch.manual_seed(0)
    return QuantizedTensor.quantize(torch.randn(n, k), QuantSpec.parse(spec))


@pytest.mark.parametrize("spec", ["w8", "w4g32-asym", "w3g32", "ternary-g32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_looked_up_are_rows_of_the_dequantized_table(spec, dtype):
    qtensor = table(spec)
    plain = nn.Embedding.from_pretrained(qtensor.dequantize().to(dtype))
    assert torch.equal(QuantEmbedding(qtensor, dtype)(IDS), plain(IDS))
    tied = QuantEmbedding(QuantLinear(qtensor), dtype)
    assert torch.equal(tied(IDS), plain(IDS))


@pytest.mark.parametrize("spec", ["w8", "w4g32"])
def test_a_head_in_its_own_layout_is_the_one_copy(spec, monkeypatch):
    qtensor = table(spec)
    head = QuantLinear(qtensor)
    embeddings = QuantEmbedding(head, torch.bfloat16, padding_idx=0)
    expected = embeddings(IDS)
    head(torch.zeros(1, 96, dtype=torch.bfloat16))
    assert torch.equal(embeddings(IDS), expected)
    assert (head.packed is None) == head.prepared.shows_rows
    assert sum(buffer.nbytes for buffer in embeddings.buffers()) == 0
    monkeypatch.setattr(PreparedWeight, "shows_rows", False)  # of other machines
    head.set_compute("exact")
    head(torch.zeros(1, 96, dtype=torch.bfloat16))
    assert head.packed is not None
    assert torch.equal(embeddings(IDS), expected)


def test_the_dtype_follows_and_the_scales_do_not():
    embeddings = QuantEmbedding(table(), torch.bfloat16, embed_scale=torch.tensor(3.0))
    before = embeddings.scale.clone()
    assert embeddings(IDS).dtype == torch.bfloat16
    embeddings.to(torch.float32)
    assert embeddings(IDS).dtype == torch.float32
    assert torch.equal(embeddings.scale, before)
    assert torch.equal(embeddings(IDS), 3 * table().dequantize()[IDS])


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_copies_and_other_devices_keep_the_tie(family):
    model = make_model(family, tie_word_embeddings=True)
    (found,) = tables_of(model)
    assert found.role == TIED
    rows = quantize_by_rows(model.get_input_embeddings().weight, QuantSpec.parse("w8"))
    swap_tables(model, {TIED: rows})
    expected = model(IDS).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.to("cpu")):
        other.tie_weights()
        assert torch.equal(other(IDS).logits, expected)
        (name,) = quantized_tables(other)
        role, qtensor = quantized_tables(other)[name]
        assert (name, role) == (found.name, TIED)
        assert torch.equal(qtensor.packed, rows.packed)
        state = other.state_dict()
        assert f"{name}.packed" in state
        assert not any("lm_head" in key for key in state)


@torch.no_grad()
@pytest.mark.slow
def test_a_compiled_model_looks_up_the_same_rows():
    model = make_model("llama", tie_word_embeddings=True, dtype=torch.bfloat16)
    weight = model.get_input_embeddings().weight
    swap_tables(model, {TIED: quantize_by_rows(weight, QuantSpec.parse("w8"))})
    compiled = torch.compile(model, fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(compiled(IDS).logits, model(IDS).logits, rtol=0.1, atol=0.1)
