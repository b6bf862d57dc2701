"""Block-wise tuning: never worse than its start, the same every time, and what comes out is what
was trained."""

import json

import pytest
import torch
from conftest import make_model

import llmq
from llmq.errors import LlmqError
from llmq.grid.spec import ActSpec, QuantSpec
from llmq.grid.tensor import QuantizedTensor
from llmq.inference.module import quantized_modules
from llmq.models.arch import linear_weight
from llmq.models.site import sites_in
from llmq.ptq.capture import BlockRecorder
from llmq.ptq.job import prepare
from llmq.ptq.methods import method_of
from llmq.ptq.methods.base import SolvedBlock
from llmq.ptq.methods.blockwise import (
    METHOD,
    BlockwiseOptions,
    _backward,
    _Master,
    sequences_per_step,
    tune_block,
)
from llmq.ptq.run import quantize_folder
from llmq.ptq.stats import LayerStats
from llmq.recipe import Recipe
from llmq.storage.hidden_states import ActivationFile
from llmq.text.documents import calibration_windows

LENGTH, N_SEQUENCES = 32, 128


def recipe(spec="w2g32-asym", **options):
    """Block training alone, from a weak start (plain GPTQ, all but overdamped) that few steps can
    beat."""
    alone = {"token_weights": "equal", "scale_steps": 0}
    weak = {"search": False, "sweeps": 0, "damping": 1.0, "iterations": 30, "learning_rate": 0.05}
    return Recipe.uniform(
        spec,
        method="blockwise",
        **{"samples": 128, "sequence_length": LENGTH, **alone, **weak, **options},
    )


@torch.no_grad()
def add_sink(model, strength):
    """Token 0, first in every window, switches one neuron of block 0 on, whose output is many times
    as long as that of any other token."""
    model.model.embed_tokens.weight[0] = torch.eye(64)[0] * 4
    mlp = model.model.layers[0].mlp
    for layer in (mlp.gate_proj, mlp.up_proj):
        layer.weight[0] = torch.eye(64)[0] * strength
    model.model.layers[0].self_attn.o_proj.weight.mul_(0.5)


class Problem:
    """Block 0 of a small model, its inputs and outputs in files, and plain rounding as the
    start."""

    def __init__(
        self, folder, model_type="llama", spec="w2g32-asym", n_sequences=N_SEQUENCES, sink=0.0
    ):
        model = make_model(model_type)
        tokens = torch.randint(2, 2048, (n_sequences, LENGTH))
        if sink:
            add_sink(model, sink)
            tokens[:, 0] = 0
        blocks = model.get_submodule("transformer.h" if model_type == "gpt2" else "model.layers")
        batch = sequences_per_step(n_sequences, LENGTH)
        hidden, _ = BlockRecorder(model, blocks).run(tokens)
        _, calls = BlockRecorder(model, blocks).run(torch.randint(2, 2048, (batch, LENGTH)))
        self.block, self.call = blocks[0], calls[0]
        self.inputs, self.targets = (
            ActivationFile(folder / name, LENGTH, hidden.shape[-1])
            for name in ("in.f32", "out.f32")
        )
        with (
            torch.no_grad(),
            self.inputs.appender() as append,
            self.targets.appender() as append_target,
        ):
            for part in hidden.split(batch):
                append(part)
                append_target(self.call.run(self.block, part))
        self.weights = {site.name: site.weight.detach().clone() for site in sites_in(self.block)}
        self.start = {
            name: QuantizedTensor.quantize(weight, QuantSpec.parse(spec))
            for name, weight in self.weights.items()
        }

    def tune(self, special=None, **options):
        return tune_block(
            SolvedBlock(
                self.block,
                self.weights,
                self.start,
                self.inputs,
                self.targets,
                lambda sequences: self.call,
                special,
                torch.float32,
                seed=0,
            ),
            BlockwiseOptions(**{"iterations": 30, "learning_rate": 0.05, **options}),
        )


@pytest.mark.parametrize(
    ("model_type", "spec"),
    [("llama", "w2g32-asym"), ("llama", "w3g32"), ("gpt2", "ternary-g32"), ("gemma2", "w4-tensor")],
)
def test_tuning_lowers_the_error(model_type, spec, tmp_path):
    problem = Problem(tmp_path, model_type, spec)
    state = {name: tensor.clone() for name, tensor in problem.block.state_dict().items()}
    tuning = problem.tune()
    assert 0 < tuning.error < 0.95 * tuning.start_error
    assert tuning.n_skipped == 0
    for name, tensor in tuning.tensors.items():
        tensor.validate(name)
        assert not torch.equal(tensor.packed, problem.start[name].packed)
    assert all(
        torch.equal(tensor, state[name]) for name, tensor in problem.block.state_dict().items()
    )


def test_the_reported_error_is_that_of_the_packed_result(tmp_path):
    """Seen from outside: put the packed weights into the block and measure on all sequences; the
    gain must be there too."""
    problem = Problem(tmp_path)
    tuning = problem.tune()

    @torch.no_grad()
    def error(tensors):
        for name, tensor in tensors.items():
            linear_weight(problem.block.get_submodule(name)).copy_(tensor.dequantize())
        batch = sequences_per_step(N_SEQUENCES, LENGTH)
        outputs = [
            problem.call.run(problem.block, hidden) for hidden in problem.inputs.batches(batch)
        ]
        target = torch.cat(list(problem.targets.batches(batch)))
        return float(
            ((torch.cat(outputs) - target).square().sum(-1) / target.square().sum(-1)).mean()
        )

    before, after = error(problem.start), error(tuning.tensors)
    assert after < before
    # Two steps take all sequences here, so both figures are means over the same tokens, summed in
    # another order.
    assert before == pytest.approx(tuning.start_error, rel=1e-4)
    assert after == pytest.approx(tuning.error, rel=1e-4)


def test_a_start_that_cannot_be_beaten_is_kept(tmp_path):
    problem = Problem(tmp_path)
    tuning = problem.tune(learning_rate=1.0, iterations=3)
    assert tuning.error == tuning.start_error
    assert all(
        torch.equal(tensor.packed, problem.start[name].packed)
        for name, tensor in tuning.tensors.items()
    )


def test_a_result_that_breaks_the_first_position_is_not_kept(tmp_path):
    """On average tuning makes the block ten times better here, and its attention sink worse."""
    problem = Problem(tmp_path, n_sequences=64, sink=4.0)
    target = torch.cat(list(problem.targets.batches(64)))
    lengths = target.norm(dim=-1)
    assert float(lengths[:, 0].mean() / lengths.median()) > 100
    tuning = problem.tune(learning_rate=0.02)
    first, other = tuning.by_class["first"], tuning.by_class["other"]
    assert first.tuned > first.start
    assert other.tuned < 0.3 * other.start
    assert (first.n_positions, other.n_positions) == (
        64,
        64 * (LENGTH - 1) - tuning.by_class["outlier"].n_positions,
    )
    assert "first" in tuning.worse
    assert tuning.error == tuning.start_error
    assert all(tensor is problem.start[name] for name, tensor in tuning.tensors.items())


def test_a_result_that_holds_the_first_position_is_kept(tmp_path):
    tuning = Problem(tmp_path, spec="w3g32", n_sequences=64, sink=4.0).tune(learning_rate=0.02)
    assert tuning.worse == []
    assert tuning.error < tuning.start_error
    assert all(errors.tuned <= errors.start for errors in tuning.by_class.values())


def test_special_tokens_are_judged_on_their_own(tmp_path):
    problem = Problem(tmp_path, n_sequences=64)
    special = torch.zeros(64, LENGTH, dtype=torch.bool)
    special[3, 7] = special[9, 0] = True
    tuning = problem.tune(special=special)
    assert tuning.by_class["special"].n_positions == 1
    assert tuning.by_class["first"].n_positions == 64


@pytest.mark.parametrize("autocast", [False, True])
def test_equal_seeds_give_equal_bits_and_others_do_not(autocast, tmp_path):
    problem = Problem(tmp_path)
    first, again, other = (
        problem.tune(seed=seed, iterations=10, autocast=autocast).tensors for seed in (0, 0, 1)
    )
    for name, tensor in first.items():
        assert torch.equal(tensor.packed, again[name].packed)
        assert torch.equal(tensor.scale, again[name].scale)
    assert any(not torch.equal(tensor.packed, other[name].packed) for name, tensor in first.items())


@pytest.mark.parametrize("spec", ["w4g32", "w2g32-asym", "ternary", "w4-tensor", "w8"])
def test_what_was_trained_is_what_is_packed(spec):
    weight = torch.randn(24, 96)
    master = _Master(
        weight,
        QuantizedTensor.quantize(weight, QuantSpec.parse(spec)),
        BlockwiseOptions(tune_zero_points=True),
    )
    with torch.no_grad():
        if master.zero is not None:
            master.zero.add_(torch.randn_like(master.zero))
        master.weight.add_(torch.randn_like(weight), alpha=0.3)
        master.scale.mul_(torch.rand_like(master.scale) * 6)
    master.keep_in_range()
    stored = master.freeze()
    stored.validate("weight")
    assert torch.equal(master.value(), stored.dequantize())
    assert torch.equal(master.freeze().packed, stored.packed)


def test_tiny_scales_do_not_vanish():
    """An almost empty group: its float16 scale is not a normal number, and a quarter of it would be
    zero, which stands for one."""
    weight = torch.randn(4, 64)
    weight[:, 32:] *= 1e-7
    master = _Master(
        weight, QuantizedTensor.quantize(weight, QuantSpec("int4", 32)), BlockwiseOptions()
    )
    with torch.no_grad():
        master.scale.zero_()
    master.keep_in_range()
    assert float(master.freeze().dequantize()[:, 32:].abs().max()) < 1e-5


def test_sequences_with_nan_are_skipped_and_counted(tmp_path):
    problem = Problem(tmp_path)
    hidden = torch.cat(list(problem.inputs.batches(8)))
    hidden[5, 3] = torch.nan
    with problem.inputs.appender() as append:
        append(hidden)
    tuning = problem.tune(iterations=8)
    assert tuning.n_skipped == 4  # two steps take all sequences, and one of them the damaged one
    assert all(bool(torch.isfinite(tensor.scale).all()) for tensor in tuning.tensors.values())


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llama", pytest.param("gemma2", marks=pytest.mark.slow)])
def test_quantize_save_reload(model_type, model_folder, calibration_file, tmp_path):
    """The engine's promises hold: what is loaded computes what was trained, in a folder and in
    memory."""
    folder, out = model_folder(model_type), tmp_path / "out"
    job = prepare(str(folder), recipe(), calibration=str(calibration_file))
    report = quantize_folder(job, out)
    assert report == json.loads((out / "report.json").read_text())
    assert len(report["tuned_blocks"]) == 2
    assert all(block["tuned_error"] <= block["start_error"] for block in report["tuned_blocks"])
    assert any(block["tuned_error"] < block["start_error"] for block in report["tuned_blocks"])
    assert all(
        {"first", "other"} <= block["tuning_by_class"].keys() for block in report["tuned_blocks"]
    )
    assert all(0 < layer["error"] < 1 for layer in report["layers"])
    loaded, in_memory = llmq.load(out, dtype="float32"), make_model(model_type)
    llmq.quantize(in_memory, recipe(), job.tokens.tokens)
    assert len(quantized_modules(loaded)) == report["n_quantized_layers"]
    tokens = torch.randint(2, 2048, (4, LENGTH))
    assert torch.equal(
        loaded(tokens, use_cache=False).logits, in_memory(tokens, use_cache=False).logits
    )


@pytest.mark.parametrize("inputs", ["quantized", "full-precision", "both"])
@pytest.mark.parametrize("samples", [1, 3])
def test_few_sequences_and_every_kind_of_start(inputs, samples):
    model = make_model(num_hidden_layers=3)
    tokens = calibration_windows(torch.randint(2, 2048, (3000,)), samples, LENGTH, 0, "text").tokens
    reports = llmq.quantize(model, recipe(inputs=inputs, iterations=2), tokens)
    assert [block.tuned_error is not None for block in reports] == [True] * 3


def test_a_start_from_plain_rounding():
    """It is RTN with scales searched under each layer's own inputs, which tuning makes better,
    too."""
    tokens = calibration_windows(torch.randint(2, 2048, (3000,)), 64, LENGTH, 0, "text").tokens
    first = {
        init: llmq.quantize(make_model(), recipe(init=init, search=True, iterations=20), tokens)[0]
        for init in ("rtn", "gptq")
    }
    assert first["rtn"].start_error > first["gptq"].start_error > 0
    assert first["rtn"].tuned_error < 0.95 * first["rtn"].start_error
    weight, stats = torch.randn(24, 64), LayerStats(64)
    stats.add(torch.randn(4, LENGTH, 64) * torch.rand(64))
    stats.finish()
    spec = QuantSpec.parse("w2g32-asym")
    for search in (True, False):
        expected = QuantizedTensor.quantize(
            weight, spec, stats.hessian.diagonal() if search else None
        )
        found = METHOD.solve(weight, stats, spec, recipe(init="rtn", search=search)).tensor
        assert torch.equal(found.dequantize(), expected.dequantize())


def test_zero_points_are_tuned_when_asked(tmp_path):
    problem = Problem(tmp_path)
    for asked in (False, True):
        tuning = problem.tune(tune_zero_points=asked)
        assert tuning.error < tuning.start_error
        moved = [
            not torch.equal(tensor.zero, problem.start[name].zero)
            for name, tensor in tuning.tensors.items()
        ]
        assert any(moved) is asked
        for name, tensor in tuning.tensors.items():
            tensor.validate(name)


def test_a_step_without_a_finite_gradient_is_none():
    parameter = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.SGD([parameter])
    assert _backward(parameter.sum(), optimizer)
    assert not _backward(parameter.sqrt().sum(), optimizer), "the loss is 0, its gradient infinite"
    assert not _backward(parameter.sum() * torch.nan, optimizer)


def test_blocks_that_are_kept_are_passed_by():
    from llmq.recipe import Rule

    model = make_model()
    tokens = calibration_windows(torch.randint(2, 2048, (3000,)), 4, LENGTH, 0, "text").tokens
    rules = (Rule.parse("*.layers.0.*=keep"), Rule.parse("*=w4g32"))
    first, second = llmq.quantize(
        model,
        Recipe(rules=rules, method="blockwise", iterations=2, samples=4, sequence_length=LENGTH),
        tokens,
    )
    assert first.tuned_error is None
    assert second.tuned_error is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "act"}, "act-order"),
        ({"iterations": 0}, "iterations 0"),
        ({"learning_rate": 0.0}, "learning rate"),
        ({"learning_rate": 2.0}, "learning rate"),
    ],
)
def test_impossible_settings(options, message):
    with pytest.raises(LlmqError, match=message):
        method_of(recipe(**options))


def test_calibration_text_is_needed():
    with pytest.raises(LlmqError, match="method blockwise needs calibration text"):
        llmq.quantize(make_model(), recipe())


def test_static_activation_ranges_survive_tuning():
    model = make_model()
    tokens = calibration_windows(torch.randint(2, 2048, (3000,)), 4, LENGTH, 0, "text").tokens
    llmq.quantize(model, recipe("w8", activations=ActSpec("int8-static"), iterations=2), tokens)
    assert all(
        module.qtensor().input_range is not None for module in quantized_modules(model).values()
    )
