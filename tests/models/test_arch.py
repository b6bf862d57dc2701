"""The table of families: what a row says happens to a model, and is said."""

import json

import pytest
import torch
from conftest import make_model
from transformers import AutoModelForCausalLM

import llmq
from llmq.errors import LlmqError
from llmq.grid.spec import QuantSpec
from llmq.models import arch
from llmq.models.source import Source, load_config
from llmq.ptq.job import prepare
from llmq.ptq.run import quantize_folder
from llmq.recipe import Recipe, Rule

RTN = Recipe((Rule("*", QuantSpec(group_size=32)),), method="rtn")


def test_config_values_of_a_family_are_set_written_and_said(model_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(
        arch.FAMILIES, "llama", arch.Family("llama", config_values={"rms_norm_eps": 1e-4})
    )
    source = Source(model_folder())
    assert source.config.rms_norm_eps == 1e-4
    assert source.config_changes == {"rms_norm_eps": (1e-6, 1e-4)}
    report = quantize_folder(prepare(source, RTN), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rms_norm_eps"] == 1e-4
    assert "1e-06 in config.json" in report["notes"]["config.rms_norm_eps"]


def test_a_model_in_memory_that_was_built_without_them_is_refused(monkeypatch):
    monkeypatch.setitem(
        arch.FAMILIES, "llama", arch.Family("llama", config_values={"rms_norm_eps": 1e-4})
    )
    with pytest.raises(LlmqError, match=r"rms_norm_eps=0\.0001, found rms_norm_eps=1e-06"):
        arch.quantizable_layers(make_model())
    arch.quantizable_layers(make_model(rms_norm_eps=1e-4))


def test_a_config_with_these_values_already_is_not_changed(model_folder, monkeypatch):
    monkeypatch.setitem(
        arch.FAMILIES, "llama", arch.Family("llama", config_values={"rms_norm_eps": 1e-6})
    )
    source = Source(model_folder())
    assert source.config.rms_norm_eps == 1e-6
    assert source.config_changes == {}


def test_a_family_that_cannot_be_quantized_is_refused_with_the_reason(model_folder, monkeypatch):
    folder = model_folder()
    monkeypatch.setitem(arch.FAMILIES, "llama", arch.Family("llama", refused="it is a test"))
    with pytest.raises(LlmqError, match="llama: it is a test"):
        load_config(folder)


@torch.no_grad()
def test_rwkv_runs_without_dividing_its_weights(model_folder):
    folder = model_folder("rwkv", rescale_every=1)
    tokens = torch.arange(12)[None]
    expected = AutoModelForCausalLM.from_pretrained(folder)(tokens).logits
    got = llmq.load(folder, dtype="float32")(tokens).logits
    # Halved weights and states give the same up to the epsilon of the norms.
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
