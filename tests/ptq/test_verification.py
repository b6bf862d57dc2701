"""A block counts once a block made of its stored bytes alone gives the recorded outputs."""

from dataclasses import replace

import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file

import llmq
from llmq.errors import VerificationError
from llmq.ptq.blocks import Blocks
from llmq.ptq.job import prepare
from llmq.ptq.results import StoredBlock
from llmq.ptq.run import quantize_folder
from llmq.ptq.sink import FolderSink
from llmq.ptq.transforms.apply import Moved
from llmq.recipe import Recipe

TOKENS = torch.randint(2, 2048, (4, 32), generator=torch.Generator().manual_seed(1))
RECIPE = Recipe.uniform("w4g32", samples=4, sequence_length=32, inputs="quantized")
TRANSFORMED = replace(RECIPE, method="smoothquant+gptq")


def change_blocks(monkeypatch, change):
    """A transform that does this to every block."""

    def transform_block(transform, block, *others):
        change(block)
        return Moved(transform.name)

    monkeypatch.setattr("llmq.ptq.block.transform_block", transform_block)


@pytest.fixture
def scaled_norms(monkeypatch):
    """A transform that moves scale from the first norm of a block into the layers that read it."""

    def change(block):
        factor = torch.linspace(1.1, 1.9, 64)
        block.input_layernorm.weight.mul_(factor)
        for layer in ("q_proj", "k_proj", "v_proj"):
            block.self_attn.get_submodule(layer).weight.div_(factor)

    change_blocks(monkeypatch, change)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("scaled_norms")
def test_norms_that_a_method_changes_are_stored(dtype, model_folder, calibration_file, tmp_path):
    source, out = model_folder(dtype=dtype), tmp_path / "out"
    quantize_folder(prepare(str(source), TRANSFORMED, calibration=str(calibration_file)), out)
    name = "model.layers.0.input_layernorm.weight"
    stored = {
        key: value for path in out.glob("*.safetensors") for key, value in load_file(path).items()
    }
    before = load_file(source / "model.safetensors")[name]
    expected = (before.float() * torch.linspace(1.1, 1.9, 64)).to(dtype)
    assert torch.equal(stored[name], expected)
    logits = llmq.load(out, dtype="float32")(TOKENS, use_cache=False).logits
    full = make_model(dtype=dtype).float()(TOKENS, use_cache=False).logits
    assert float((logits - full).norm() / full.norm()) < 0.5  # with unscaled norms it is 0.8


@torch.no_grad()
@pytest.mark.usefixtures("scaled_norms")
def test_norms_that_a_method_changes_reach_the_model_in_memory():
    model = make_model()
    before = model.model.layers[1].input_layernorm.weight.clone()
    llmq.quantize(model, TRANSFORMED, TOKENS)
    after = model.model.layers[1].input_layernorm.weight
    assert torch.equal(after, before * torch.linspace(1.1, 1.9, 64))


@pytest.mark.parametrize("lost", ["norm", "setting"])
def test_what_is_not_stored_is_noticed(lost, model_folder, calibration_file, tmp_path, monkeypatch):
    """A store that writes the norms of the source, and a method that changes what no file holds."""
    if lost == "norm":
        store = FolderSink.store

        def forgetting(self, result):
            stored = store(self, result)
            kept = {
                name: torch.ones_like(tensor) * 2 if "input_layernorm" in name else tensor
                for name, tensor in stored.kept.items()
            }
            return StoredBlock(stored.quantized, kept)

        monkeypatch.setattr(FolderSink, "store", forgetting)
        message = "input_layernorm.weight: the tensor read back differs"
    else:

        def change(block):
            block.input_layernorm.variance_epsilon = 1e-2

        change_blocks(monkeypatch, change)
        message = "made of what was stored does not reproduce the outputs"
    with pytest.raises(VerificationError, match=message):
        quantize_folder(
            prepare(str(model_folder()), TRANSFORMED, calibration=str(calibration_file)),
            tmp_path / "out",
        )
    assert not (tmp_path / "out").exists()


def test_the_solved_block_is_gone_when_its_copy_is_made(monkeypatch):
    """Verifying takes no second block in memory."""
    import gc
    import weakref

    alive, most = weakref.WeakSet(), []
    materialize = Blocks.materialize

    def counted(self, index, stored):
        gc.collect()
        most.append(len(alive))
        block = materialize(self, index, stored)
        alive.add(block)
        return block

    monkeypatch.setattr(Blocks, "materialize", counted)
    llmq.quantize(make_model(), RECIPE, TOKENS)
    assert max(most) == 0
    assert len(most) == 6, (
        "once to check that blocks run alone, to solve, and to verify; two blocks"
    )
