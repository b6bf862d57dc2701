"""Rounding activations at run time: only when asked for, visible, and never part of what is
saved."""

import json

import pytest
import torch
from torch import nn

import llmq
from llmq.commands.cli import main
from llmq.errors import LlmqError
from llmq.grid.spec import QuantSpec
from llmq.grid.tensor import QuantizedTensor
from llmq.inference.module import QuantLinear, backends_in_use, quantized_modules
from llmq_kernels.compiled import int8_backend, jit
from llmq_kernels.core.compute import default_mode


@pytest.fixture
def folder(model_folder, tokenizer, tmp_path):
    model = llmq.load(model_folder(dtype=torch.bfloat16))
    llmq.quantize(
        model, llmq.Recipe.uniform("w4g32", method="rtn"), torch.randint(0, 2048, (4, 32))
    )
    llmq.save(model, tmp_path / "quantized", tokenizer=tokenizer)
    return tmp_path / "quantized"


def need_integer_kernels():
    if reason := int8_backend.machine_refusal():
        pytest.skip(reason)


def layer():
    return QuantLinear(QuantizedTensor.quantize(torch.randn(48, 128), QuantSpec("int4", 32)))


def test_exact_unless_asked():
    module, x = layer(), torch.randn(3, 128)
    module(x)
    assert module.compute == "exact"
    assert module.backend not in ("cpu-vnni", "cpu-w8a8")


def test_int8_can_be_taken_back_and_leaves_the_weight_alone():
    need_integer_kernels()
    module, x = layer(), torch.randn(3, 128)
    exact, words = module(x), module.qtensor().packed.clone()
    module.set_compute("int8")
    rounded = module(x)
    assert module.backend == "cpu-vnni"
    assert not torch.equal(rounded, exact)
    assert (
        (rounded - exact).norm() < 0.02 * exact.norm()
    )  # half a step of 1/127 of the largest of 32 values, uniform: about 0.6%
    assert torch.equal(module.qtensor().packed, words)
    assert module.activations.kind == "none"
    module.set_compute("exact")
    assert torch.equal(module(x), exact)


def test_layers_without_integer_kernel_stay_exact():
    module = QuantLinear(QuantizedTensor.quantize(torch.randn(48, 60), QuantSpec("int4", 20)))
    module.set_compute("int8")
    module(torch.randn(3, 60))
    assert module.backend == "reference"


def test_load_passes_the_mode_on(folder, monkeypatch):
    need_integer_kernels()
    tokens = torch.randint(0, 2048, (1, 16))
    for argument, environment, expected in (
        (None, None, "exact"),
        ("int8", None, "int8"),
        (None, "int8", "int8"),
        ("exact", "int8", "exact"),
    ):
        monkeypatch.setenv("LLMQ_COMPUTE", environment or "")
        model = llmq.load(folder, compute=argument)
        assert {module.compute for module in quantized_modules(model).values()} == {expected}
        model(tokens)
        assert ("cpu-vnni" in backends_in_use(model)) == (expected == "int8")


def test_mistakes_are_named(folder, monkeypatch):
    with pytest.raises(LlmqError, match="expected one of exact, int8"):
        llmq.load(folder, compute="int4")
    monkeypatch.setenv("LLMQ_COMPUTE", "fast")
    with pytest.raises(ValueError, match="LLMQ_COMPUTE=fast"):
        default_mode()
    with pytest.raises(LlmqError, match="LLMQ_COMPUTE=fast"):
        llmq.load(folder)
    monkeypatch.delenv("LLMQ_COMPUTE")
    monkeypatch.setattr(
        jit,
        "missing",
        lambda: "llvmlite is not installed (pip install '.[cpu]' in a clone of llmq)",
    )
    with pytest.raises(LlmqError, match=r"\.\[cpu\]"):
        llmq.load(folder, compute="int8")


def test_the_command_line_shows_it(folder, calibration_file, capsys):
    need_integer_kernels()
    results = {}
    for mode in ("exact", "int8"):
        assert (
            main(
                [
                    "eval",
                    str(folder),
                    "--data",
                    str(calibration_file),
                    "--sequence-length",
                    "32",
                    "--max-windows",
                    "2",
                    "--compute",
                    mode,
                    "--json",
                ]
            )
            == 0
        )
        results[mode] = json.loads(capsys.readouterr().out)
    assert list(results["int8"]["backends"]) == ["cpu-vnni"]
    assert "cpu-vnni" not in results["exact"]["backends"]
    assert results["int8"]["perplexity"] == pytest.approx(results["exact"]["perplexity"], rel=0.02)
    assert main(["doctor", "--json"]) == 0
    doctor = json.loads(capsys.readouterr().out)
    assert doctor["compute"] == "exact"
    assert set(doctor["compiled_kernels"]["forms"]) == set(jit.FORMS)


def test_dense_models_have_no_mode():
    assert backends_in_use(nn.Linear(2, 2)) == {}
