"""Gradients that are computed block by block are those of the whole model, and what they say of a
spec is what happens to the model."""

import pytest
import torch
from conftest import families

from llmq.errors import LlmqError
from llmq.formats.load import load
from llmq.grid.spec import QuantSpec
from llmq.grid.tensor import QuantizedTensor
from llmq.models.arch import linear_weight, quantizable_layers
from llmq.models.outside import tables_of
from llmq.models.readers import CheckpointReader
from llmq.models.source import Source
from llmq.models.stored import StoredModel
from llmq.ptq import expert_costs
from llmq.ptq.blocks import Blocks
from llmq.ptq.gradients import Backward, draw
from llmq.ptq.outside import quantize_table
from llmq.ptq.sensitivity import _by_block, _lost, measure, n_tokens
from llmq.recipe import Recipe
from llmq.storage.hidden_states import ActivationFile
from llmq.text.documents import read_text, tokenize

TOKENS = torch.randint(2, 2048, (5, 24), generator=torch.Generator().manual_seed(3))
SPEC = QuantSpec("int2", 32, symmetric=False)


def blocks_of(model):
    source = Source.open(str(model))
    skeleton = StoredModel.of(source).skeleton
    return Blocks(skeleton, CheckpointReader(skeleton, source.tensors), "cpu")


def layers_of(blocks):
    return [layer.name for layer in quantizable_layers(blocks.model)]


def gradients_of_the_whole(model, layers):
    """By the outputs of each layer, for the tokens that the blocks draw, sequence by sequence."""
    outputs = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _, args, output, name=name: outputs.__setitem__(name, output)
        )
        for name in layers
    ]
    found = {name: [] for name in layers}
    for number, row in enumerate(TOKENS):
        generator = torch.Generator().manual_seed(7 + number)
        likely = torch.log_softmax(model(row[None]).logits[0], -1)
        drawn = draw(likely.detach().exp(), generator)
        total = likely.gather(1, drawn).sum()
        gradients = torch.autograd.grad(total, [outputs[name] for name in layers])
        for name, gradient in zip(layers, gradients, strict=True):
            found[name].append(gradient.reshape(len(row), -1))
    for handle in handles:
        handle.remove()
    return {name: torch.stack(parts) for name, parts in found.items()}


@pytest.mark.parametrize("family", families("llama", "gemma3_text"))
def test_gradients_are_those_of_the_whole_model(family, model_folder, tmp_path):
    folder = model_folder(family)
    blocks = blocks_of(folder)
    layers = layers_of(blocks)
    if family == "rwkv":
        pytest.skip("its whole changes in place what the way back needs, a block alone does not")
    expected = gradients_of_the_whole(load(folder, dtype="float32"), layers)
    backward = Backward(blocks, TOKENS, tmp_path, 7)
    assert list(backward.forward()) == [0, 1]
    candidates = {name: [SPEC] for name in layers}
    seen = set()
    for block in backward.backward(_by_block(blocks, candidates)):
        for name, file in block.gradients.items():
            full_name = f"{blocks.name(block.index)}.{name}"
            gradient = torch.cat(list(file.batches(2)))
            scale = expected[full_name].abs().max()
            torch.testing.assert_close(
                gradient / scale, expected[full_name] / scale, atol=2e-5, rtol=0
            )
            seen.add(full_name)
    assert seen == set(layers)
    again = Backward(blocks, TOKENS, tmp_path, 7)
    assert list(again.forward()) == [0, 1]
    for index, squares in zip(
        (1, 0), again.squared_lengths(_by_block(blocks, candidates)), strict=True
    ):
        for name, found in squares.items():
            own = expected[f"{blocks.name(index)}.{name}"].square().sum(-1)
            torch.testing.assert_close(found / own.max(), own / own.max(), atol=4e-5, rtol=0)


def met(file):
    return torch.cat([*file.batches(2), torch.empty(0, file.length, file.width)])


@pytest.mark.parametrize("family", families("llama", "mixtral"))
def test_windows_that_go_forward_only_leave_their_inputs(family, model_folder, tmp_path):
    """In files of their own, the same as of a pass with gradients for all."""
    blocks, tokens = blocks_of(model_folder(family)), TOKENS.repeat(2, 1)[:8]
    layers = _by_block(blocks, {name: [SPEC] for name in layers_of(blocks)})
    whole, parts = [], []
    for found, n_others in ((whole, 0), (parts, 4)):
        backward = Backward(blocks, tokens, tmp_path, 7, n_others=n_others)
        assert list(backward.forward()) == [0, 1]
        assert len(backward.measured) == 8 - n_others
        for block in backward.backward(layers):
            inputs, others, gradients = (
                {name: met(file) for name, file in files.items()}
                for files in (block.inputs, block.others, block.gradients)
            )
            found.append((inputs, others, gradients))
    for (inputs, none, gradients), (own, others, own_gradients) in zip(whole, parts, strict=True):
        assert not any(len(rows) for rows in none.values())
        for name, rows in inputs.items():
            assert torch.equal(torch.cat([own[name], others[name]]), rows)
        for name, rows in own_gradients.items():
            assert torch.equal(rows, gradients[name][: len(rows)])


def test_layers_are_solved_on_other_windows_than_measured(tmp_path):
    """What GPTQ gains on its own windows is no part of the estimate."""
    blocks = blocks_of("tiny")
    layers = layers_of(blocks)[6::7]
    source = Source.open("tiny")
    documents = read_text("bundled", "calibration", source.tokenizer).documents
    windows = tokenize(documents, source.tokenizer)[: 16 * 32].view(16, 32)
    recipe, candidates = Recipe.uniform(SPEC), {name: [SPEC] for name in layers}
    honest = measure(blocks, windows, candidates, recipe, tmp_path)
    own = measure(blocks, windows[:8].repeat(2, 1), candidates, recipe, tmp_path)
    assert n_tokens(windows) == (16 * 32, 8 * 32)
    assert n_tokens(windows[:7]) == (7 * 32, 7 * 32)
    for name in layers:
        assert honest[name][0].nats > 1.2 * own[name][0].nats


def kept(path, rows):
    file = ActivationFile(path, *rows.shape[1:])
    with file.appender(durable=False) as append:
        append(rows)
    return file


def test_the_first_position_does_not_count(tmp_path):
    error, x, g = torch.randn(3, 5), torch.randn(6, 7, 5), torch.randn(6, 7, 3)
    g[:, 0] *= 100
    expected = float(((x @ error.T) * g)[:, 1:].square().sum()) / 2
    assert _lost(error, kept(tmp_path / "x", x), kept(tmp_path / "g", g)) == pytest.approx(expected)
    rows = x.flatten(0, 1)[:, None], g.flatten(0, 1)[:, None]  # of an expert: no positions
    expected = float(((x @ error.T) * g).square().sum()) / 2
    files = kept(tmp_path / "x", rows[0]), kept(tmp_path / "g", rows[1])
    assert _lost(error, *files) == pytest.approx(expected)


def test_it_predicts_what_a_layer_costs(tmp_path):
    """On the bundled model: two bits in one layer at a time, measured on the same windows."""
    blocks = blocks_of("tiny")
    layers = layers_of(blocks)[::3]
    recipe = Recipe.uniform(SPEC, method="rtn")
    source = Source.open("tiny")
    documents = read_text("bundled", "calibration", source.tokenizer).documents
    windows = tokenize(documents, source.tokenizer)[: 8 * 64].view(8, 64)
    told = []
    costs = measure(
        blocks,
        windows,
        {name: [SPEC] for name in layers},
        recipe,
        tmp_path,
        lambda *done: told.append(done),
    )
    assert told[-1] == (2 * len(blocks), 2 * len(blocks))
    assert not list(tmp_path.iterdir())
    model = load("tiny", dtype="float32")
    estimated, measured = [], []
    with torch.no_grad():
        base = torch.log_softmax(model(windows).logits, -1)
        for name in layers:
            weight = linear_weight(model.get_submodule(name))
            original = weight.clone()
            weight.copy_(QuantizedTensor.quantize(original, SPEC).dequantize())
            own = torch.log_softmax(model(windows).logits, -1)
            weight.copy_(original)
            measured.append(float((base.exp() * (base - own)).sum(-1).mean()))
            estimated.append(costs[name][0].nats)
    ranks = torch.tensor([estimated, measured]).argsort(1).argsort(1).double()
    assert torch.corrcoef(ranks)[0, 1] > 0.8
    assert 1 / 3 < sum(estimated) / sum(measured) < 3


def test_blocks_without_a_way_back_are_refused(model_folder, tmp_path, monkeypatch):
    blocks = blocks_of(model_folder())
    spec = {name: [SPEC] for name in layers_of(blocks)}
    monkeypatch.setattr(torch.nn.functional, "silu", lambda x: x.exp().relu_().exp_().log_())
    with pytest.raises(LlmqError, match=r"no gradients come back.*--rule"):
        measure(blocks, TOKENS, spec, Recipe.uniform(SPEC, method="rtn"), tmp_path)


def divergence(base, quant):
    base, quant = torch.log_softmax(base, -1), torch.log_softmax(quant, -1)
    return float((base.exp() * (base - quant)).sum(-1).mean())


def test_embeddings_and_head_cost_what_they_lose(model_folder, tmp_path):
    folder = model_folder()
    blocks = blocks_of(folder)
    tables = {table: [SPEC] for table in tables_of(blocks.model)}
    costs = measure(blocks, TOKENS, {}, Recipe(method="rtn"), tmp_path, tables=tables)
    model = load(folder, dtype="float32")
    with torch.no_grad():
        base = model(TOKENS).logits
        for table in tables:
            weight = model.get_submodule(table.name).weight
            original = weight.clone()
            weight.copy_(quantize_table(original, SPEC).dequantize())
            lost = divergence(base, model(TOKENS).logits)
            weight.copy_(original)
            (cost,) = costs[table.name]
            about = 1e-3 if table.role == "head" else 2.0
            assert lost / (1 + about) < cost.nats < lost * (1 + about), table.role


def test_some_experts_stand_for_all(model_folder, tmp_path, monkeypatch):
    blocks = blocks_of(model_folder("qwen3_moe"))
    layers = layers_of(blocks)
    specs = [SPEC, QuantSpec("int4", 32)]
    found = {}
    for n_experts in (2, 8):
        monkeypatch.setattr(expert_costs, "MEASURED", n_experts)
        costs = measure(blocks, TOKENS, dict.fromkeys(layers, specs), Recipe(), tmp_path)
        assert costs.keys() == set(layers)
        experts = [own for name, own in costs.items() if ".experts." in name]
        found[n_experts] = [sum(own[i].nats for own in experts) for i in range(len(specs))]
    assert found[8][0] > 3 * found[8][1] > 0
    assert found[2] == pytest.approx(found[8], rel=0.5)


def test_scales_that_float16_does_not_hold_are_found(model_folder, tmp_path, monkeypatch):
    blocks = blocks_of(model_folder())
    read = blocks.reader.read_parameters

    def smaller(names):
        return {
            name: tensor * 1e-6 if "down_proj" in name else tensor
            for name, tensor in read(names).items()
        }

    monkeypatch.setattr(blocks.reader, "read_parameters", smaller)
    candidates = {name: [SPEC] for name in layers_of(blocks)}
    costs = measure(blocks, TOKENS, candidates, Recipe(method="rtn"), tmp_path)
    others = {name for name, (cost,) in costs.items() if cost.scale_dtype != "float16"}
    assert others == {name for name in candidates if "down_proj" in name}


def test_tokens_are_drawn_with_their_likelihoods():
    share = torch.tensor([[0.0, 0.5, 0.2, 0.3, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0]])
    n = 4000
    generator = torch.Generator().manual_seed(0)
    drawn = draw(share.repeat(n, 1), generator).view(n, 2)
    counts = torch.stack([drawn[:, row].bincount(minlength=5) for row in range(2)])
    spread = 4 * (share * (1 - share) * n).sqrt()  # four standard deviations
    assert bool(((counts - n * share).abs() <= spread).all())
