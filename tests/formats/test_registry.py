"""What every format promises, for each that is registered."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from llmq.formats.registry import NAMES, all_formats, choose_format, format_named
from llmq.formats.settings import format_of, quantization_settings
from llmq.grid.spec import QuantSpec
from llmq.grid.tensor import QuantizedTensor
from llmq.recipe import Layer, LayerPlan

TEXTS = (
    *("w4g32", "w4g32-asym", "ternary-tensor", "w8", "w8-asym", "w3g32", "w3-asym"),
    *("w2g32-asym", "w4-tensor-asym"),
)
SPECS = [QuantSpec.parse(text) for text in TEXTS]
SHAPE = (64, 96)


def held_by(fmt):
    return [spec for spec in SPECS if fmt.refusal(spec, SHAPE) is None]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_reads_back_by_its_config_alone(name):
    fmt = format_named(name)
    assert fmt.name == name
    assert held_by(fmt)
    for spec in held_by(fmt):
        tensor = QuantizedTensor.quantize(torch.randn(SHAPE), spec)
        stored = fmt.write(tensor)
        assert fmt.marker in stored
        assert stored.keys() <= fmt.suffixes
        written = fmt.write_config({"layer": spec, "kept": None})
        assert [each.name for each in all_formats() if each.detects(written)] == [name]
        settings = quantization_settings(SimpleNamespace(quantization_config=written))
        assert format_of(settings) is fmt
        for config in (written, settings):  # the one of the run that writes, that of whoever loads
            read = fmt.read("layer", stored, config, SHAPE)
            read.validate("layer")
            assert torch.equal(read.dequantize(), tensor.dequantize())


@pytest.mark.parametrize("name", NAMES)
def test_the_size_of_a_layer_is_told_before_it_is_written(name):
    fmt = format_named(name)
    for spec in held_by(fmt):
        stored = fmt.write(QuantizedTensor.quantize(torch.randn(SHAPE), spec))
        written = {suffix: tensor for suffix, tensor in stored.items() if suffix != "weight_shape"}
        assert sum(tensor.nbytes for tensor in written.values()) == fmt.layer_bytes(spec, SHAPE)


@pytest.mark.parametrize("name", NAMES)
def test_auto_never_takes_a_format_that_refuses(name):
    fmt = format_named(name)
    for spec in SPECS:
        plans = [LayerPlan(Layer("layer", SHAPE), spec)]
        if choose_format("auto", plans) is fmt:
            assert fmt.refusal(spec, SHAPE) is None


def test_listing_the_names_imports_no_format():
    program = (
        "import sys; from llmq.formats.registry import NAMES; assert 'gptq' in NAMES; "
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
