"""The AWQ format against its definition, written out independently, and a whole folder."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_model
from transformers import AwqConfig

import llmq
from llmq.errors import LlmqError
from llmq.formats.awq import AWQ
from llmq.formats.registry import choose_format
from llmq.formats.settings import quantization_settings
from llmq.grid.spec import ActSpec, QuantSpec
from llmq.grid.tensor import QuantizedTensor
from llmq.inference.module import quantized_modules
from llmq.recipe import Layer, LayerPlan, Recipe

ASYMMETRIC = QuantSpec.parse("w4g32-asym")


def unpack_by_definition(words: torch.Tensor) -> np.ndarray:
    """`[rows, columns * 8]`: bits 4 i to 4 i + 3 of word c hold column 8 c + order[i]."""
    words = words.numpy().view(np.uint32)
    found = np.zeros((words.shape[0], words.shape[1] * 8), np.float32)
    for i, column in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
        found[:, column::8] = (words >> np.uint32(4 * i)) & 15
    return found


@pytest.mark.parametrize("text", ["w4g32-asym", "w4-asym", "w4g32"])
def test_definition_and_round_trip(text):
    tensor = QuantizedTensor.quantize(torch.randn(24, 96), QuantSpec.parse(text))
    stored, config = AWQ.write(tensor), AWQ.write_config({"layer": tensor.spec})
    codes, zeros = (unpack_by_definition(stored[key]) for key in ("qweight", "qzeros"))
    groups = np.arange(96) // tensor.spec.columns_per_group(96)
    scales = stored["scales"].float().numpy()
    values = (scales[groups] * (codes - zeros[groups])).T
    assert torch.equal(torch.from_numpy(values.copy()), tensor.dequantize())
    read = AWQ.read("layer", stored, config, (24, 96))
    assert read.spec == tensor.spec
    assert torch.equal(read.packed, tensor.packed)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_folder_loads_as_it_was_saved(model_type, tmp_path):
    model = make_model(model_type)
    llmq.quantize(model, Recipe.uniform("w4g32-asym", method="rtn"))
    llmq.save(model, tmp_path / "out", format="awq")
    tokens = torch.arange(1, 17)[None]
    loaded = llmq.load(tmp_path / "out")
    assert quantized_modules(loaded).keys() == quantized_modules(model).keys()
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert AwqConfig(**settings).group_size == 32  # transformers' own class takes it
    loaded.save_pretrained(tmp_path / "again")
    kept = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert kept == settings


def test_what_it_cannot_hold_is_refused():
    def plans(*texts, shape=(64, 96)):
        specs = enumerate(map(QuantSpec.parse, texts))
        return [LayerPlan(Layer(f"layer.{i}", shape), spec) for i, spec in specs]

    assert choose_format("awq", plans("w4g32", "w4g32-asym")) is AWQ
    for refused, reason in (
        (plans("w8"), "4 bits"),
        (plans("ternary"), "4 bits"),
        (plans("w4-tensor"), "scale per tensor"),
        (plans("w4g32", shape=(60, 96)), "divisible by 8"),
        (plans("w4g32", "w4g96"), "one group size"),
    ):
        with pytest.raises(LlmqError, match=f"format awq cannot hold .*{reason}.*--format llmq"):
            choose_format("awq", refused)
    with pytest.raises(LlmqError, match="activations"):
        choose_format("awq", plans("w4g32"), ActSpec("int8-token"))
    with pytest.raises(LlmqError, match="act-order"):
        choose_format("awq", plans("w4g32"), act_order=True)
    tensor = QuantizedTensor.quantize(torch.randn(24, 96), ASYMMETRIC)
    order = torch.randperm(96).to(torch.int32) // 32
    moved = QuantizedTensor.from_codes(tensor.codes(), tensor.scale, tensor.zero, ASYMMETRIC, order)
    with pytest.raises(LlmqError, match="act-order"):
        AWQ.write(moved)


@pytest.mark.parametrize(
    "change", [{"bits": 3}, {"version": "gemv"}, {"zero_point": False}, {"group_size": 0}], ids=str
)
def test_settings_that_are_read_otherwise_are_refused(change):
    written = AWQ.write_config({"layer": ASYMMETRIC})
    with pytest.raises(LlmqError, match=next(iter(change))):
        quantization_settings(SimpleNamespace(quantization_config={**written, **change}))


@pytest.mark.parametrize("suffix", ["qweight", "qzeros", "scales"])
def test_damage_is_named(suffix):
    tensor = QuantizedTensor.quantize(torch.randn(24, 96), ASYMMETRIC)
    stored, config = AWQ.write(tensor), AWQ.write_config({"layer": ASYMMETRIC})
    with pytest.raises(LlmqError, match=rf"layer\.{suffix}"):
        AWQ.read("layer", {**stored, suffix: stored[suffix][:-1]}, config, (24, 96))
    with pytest.raises(LlmqError, match=f"{suffix} is missing"):
        AWQ.read(
            "layer",
            {key: part for key, part in stored.items() if key != suffix},
            config,
            (24, 96),
        )
