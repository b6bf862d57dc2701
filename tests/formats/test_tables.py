"""Embeddings and head in the formats of other engines."""

import json

import pytest
import torch
from conftest import make_model

import llmq
from llmq.errors import LlmqError
from llmq.formats.compressed import CompressedTables
from llmq.formats.registry import all_formats
from llmq.grid.spec import ActSpec, QuantSpec
from llmq.inference.embedding import QuantEmbedding

TOKENS = torch.arange(1, 25)[None]


def quantized(spec="w4g32", **options):
    model = make_model(tie_word_embeddings=False)
    llmq.quantize(model, spec, method="rtn", **options)
    return model


def settings_of(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@torch.no_grad()
@pytest.mark.parametrize(
    ("spec", "head", "layout"),
    [
        ("w4g32", "w4g32", "pack-quantized"),
        pytest.param("w4g32", "w8", "pack-quantized", marks=pytest.mark.slow),
        ("W8A8", "w8", "mixed-precision"),
    ],
)
def test_a_head_of_its_own_is_stored_for_other_engines(spec, head, layout, tmp_path):
    model = quantized(spec, head=head)
    llmq.save(model, tmp_path / "out")
    settings = settings_of(tmp_path / "out")
    assert settings["format"] == layout
    (group,) = (
        each for each in settings["config_groups"].values() if each["targets"] == ["lm_head"]
    )
    assert group["input_activations"] is None
    assert "lm_head" not in settings["ignore"]
    loaded = llmq.load(tmp_path / "out")
    assert loaded.get_output_embeddings().activations == ActSpec()
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    llmq.save(loaded, tmp_path / "again", format="compressed-tensors")
    assert settings_of(tmp_path / "again") == settings


def test_what_other_engines_do_not_look_up_is_refused_with_the_reason(tmp_path):
    model = quantized(embeddings="w8")
    llmq.save(model, tmp_path / "out")
    assert settings_of(tmp_path / "out")["quant_method"] == "llmq"
    for fmt in all_formats():
        if not fmt.is_own:
            assert fmt.tables.refusal("embeddings", QuantSpec("int8", -1), (2048, 64))
            assert fmt.tables.refusal("embeddings and head", QuantSpec("int8", -1), (2048, 64))
    with pytest.raises(LlmqError, match=r"do not look up packed rows.*Use --format llmq"):
        llmq.save(model, tmp_path / "other", format="compressed-tensors")


@torch.no_grad()
def test_embeddings_of_other_tools_are_read_by_the_name_of_their_class(tmp_path, monkeypatch):
    model = quantized(embeddings="w8")
    monkeypatch.setattr(CompressedTables, "refusal", lambda *args: None)
    llmq.save(model, tmp_path / "out", format="compressed-tensors")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    for group in config["quantization_config"]["config_groups"].values():
        if group["targets"] == ["model.embed_tokens"]:
            group["targets"] = ["Embedding"]
    path.write_text(json.dumps(config))
    (tmp_path / "out" / "llmq-manifest.json").unlink()
    loaded = llmq.load(tmp_path / "out")
    assert isinstance(loaded.get_input_embeddings(), QuantEmbedding)
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    config["quantization_config"]["config_groups"].pop("group_1")
    path.write_text(json.dumps(config))
    with pytest.raises(LlmqError, match="no target of config_groups is about it"):
        llmq.load(tmp_path / "out")
