"""Training the scales of all blocks together: exact gradients, and values as they are stored."""

import math

import pytest
import torch
from conftest import families

from llmq.formats.load import load
from llmq.grid.tensor import QuantizedTensor
from llmq.models.arch import weight_as_stored
from llmq.models.readers import CheckpointReader
from llmq.ptq import scale_tuning
from llmq.ptq.blocks import Blocks
from llmq.ptq.job import prepare
from llmq.ptq.results import StoredBlock
from llmq.ptq.scale_tuning import Pair, ScaleOptions, divergence_and_gradient
from llmq.recipe import Recipe

STEPS = 6
RECIPE = Recipe.uniform("w2g32", samples=64, sequence_length=32, scale_steps=STEPS)


class Rounded:
    """Blocks of a folder, rounded: what a run would have finished."""

    def __init__(self, blocks: Blocks, layers: list, spec) -> None:
        self.blocks, self.layers, self.spec = blocks, layers, spec

    def read_block(self, index):
        name = self.blocks.name(index)
        tensors = {f"{name}.{key}": value for key, value in self.blocks.read(index).items()}
        quantized = {
            layer: self.rounded(layer, tensors.pop(f"{layer}.weight").float())
            for layer in self.layers
            if layer.startswith(name + ".")
        }
        return StoredBlock(quantized, tensors)

    def rounded(self, layer, weight):
        module = self.blocks.model.get_submodule(layer)
        # which is its own inverse: GPT-2 stores [K, N]
        return QuantizedTensor.quantize(weight_as_stored(module, weight).contiguous(), self.spec)


def tuner_of(folder, calibration_file, tmp_path, **options):
    job = prepare(str(folder), RECIPE, calibration=str(calibration_file))
    blocks = Blocks(job.model, CheckpointReader(job.model, job.source.tensors), "cpu")
    layers = [plan.layer.name for plan in job.plans if plan.spec]
    pair = Pair(blocks, blocks, Rounded(blocks, layers, job.plans[0].spec))
    (tmp_path / "files").mkdir()
    settings = ScaleOptions(**{"steps": STEPS, **options})
    return scale_tuning._Tuner(pair, job.tokens.tokens, settings, tmp_path / "files"), pair


@pytest.mark.parametrize("family", families("llama", "gemma3_text"))
def test_gradients_are_those_of_the_whole_model(family, model_folder, calibration_file, tmp_path):
    """The same divergence by the whole model in memory, through the scales of its layers."""
    if family == "rwkv":
        pytest.skip("its whole changes in place what the way back needs, a block alone does not")
    folder = model_folder(family)
    tuner, pair = tuner_of(folder, calibration_file, tmp_path)
    sequences = [1, 5]
    with pair.exact.with_weights_outside(with_head=True):
        tuner._back(sequences)
    found = {name: shift for block in tuner.blocks for name, shift in block.shifts.items()}

    exact, own = load(folder, dtype="float32"), load(folder, dtype="float32")
    shifts, values = {}, {}
    for index in range(len(tuner.blocks)):
        for name, tensor in pair.finished.read_block(index).quantized.items():
            shift = torch.zeros_like(tensor.scale, dtype=torch.float32, requires_grad=True)
            factor = shift.exp().repeat_interleave(32, dim=1)
            layer = own.get_submodule(name)
            values[f"{name}.weight"] = weight_as_stored(layer, tensor.dequantize() * factor)
            shifts[name] = shift
    tokens = tuner.tokens[sequences]
    with torch.no_grad():
        likely = exact(tokens).logits.float().log_softmax(-1)
    logits = torch.func.functional_call(own, values, (tokens,)).logits.float()
    divergence = (likely.exp() * (likely - logits.log_softmax(-1))).sum(-1).mean()
    expected = torch.autograd.grad(divergence, list(shifts.values()))
    for name, gradient in zip(shifts, expected, strict=True):
        scale = gradient.abs().max()
        assert scale > 0, name
        assert torch.allclose(found[name].grad, gradient, rtol=1e-3, atol=1e-4 * scale), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_divergence_and_its_gradient_are_those_of_autograd(dtype):
    torch.manual_seed(0)
    aim, logits = (4 * torch.randn(5, 300, dtype=dtype) for _ in range(2))
    free = logits.double().requires_grad_()
    likely = torch.log_softmax(aim.double(), dim=-1)
    expected = (likely.exp() * (likely - torch.log_softmax(free, dim=-1))).sum(-1)
    (gradient,) = torch.autograd.grad(expected.sum(), free)
    found, of_logits = divergence_and_gradient(aim, logits)
    torch.testing.assert_close(found.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(of_logits.double(), gradient, rtol=1e-4, atol=1e-7)


def test_scales_begin_as_stored_and_end_as_they_are_stored(
    model_folder, calibration_file, tmp_path
):
    tuner, _ = tuner_of(model_folder(), calibration_file, tmp_path)
    block = tuner.blocks[0]
    for name, tensor in block.start.quantized.items():
        assert torch.equal(block.weight(name, "cpu"), tensor.dequantize())
        torch.nn.init.uniform_(block.shifts[name].detach(), -0.3, 0.3)
        moved = block.stored().quantized[name]
        assert moved.scale.dtype == tensor.scale.dtype
        assert torch.equal(moved.packed, tensor.packed)
        assert not torch.equal(moved.scale, tensor.scale)
        assert torch.equal(block.weight(name, "cpu"), moved.dequantize())


def test_steps_without_finite_gradients_are_counted(
    model_folder, calibration_file, tmp_path, monkeypatch
):
    tuner, _ = tuner_of(model_folder(), calibration_file, tmp_path)
    back = tuner._back

    def broken(sequences):
        back(sequences)
        next(iter(tuner.blocks[0].shifts.values())).grad[0, 0] = math.nan

    monkeypatch.setattr(tuner, "_back", broken)
    found = tuner.tune(lambda done, total: None)
    assert found.n_skipped == STEPS
    assert not found.is_kept
    assert found.kl == found.kl_start


def test_in_bfloat16_gradients_are_near_and_masters_stay_in_float32(
    model_folder, calibration_file, tmp_path
):
    found = []
    for number, dtype in enumerate((torch.float32, torch.bfloat16)):
        (tmp_path / str(number)).mkdir()
        tuner, _ = tuner_of(model_folder(), calibration_file, tmp_path / str(number), dtype=dtype)
        seen = []
        back = tuner._back

        def watched(sequences, back=back, tuner=tuner, seen=seen):
            back(sequences)
            shifts = [shift for block in tuner.blocks for shift in block.shifts.values()]
            assert {shift.dtype for shift in shifts} == {torch.float32}
            seen.append(torch.cat([shift.grad.flatten() for shift in shifts]))

        tuner._back = watched
        assert tuner.tune(lambda done, total: None).n_skipped == 0
        found.append(seen[0])
    full, half = found
    assert not torch.equal(full, half)
    assert (full - half).norm() < 0.1 * full.norm()
