"""What is stored decides: heads that are tied or not, tensors without a place, dtypes that are no
weights, files under other names, and the text model of a checkpoint of several."""

import json

import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import llmq
from llmq.errors import LlmqError, LlmqWarning
from llmq.models.arch import find_blocks
from llmq.models.shards import ShardReader
from llmq.models.source import Source, load_config, meta_model
from llmq.models.stored import StoredModel
from llmq.ptq.job import prepare
from llmq.ptq.run import quantize_folder
from llmq.recipe import Recipe
from llmq.storage.files import MANIFEST

RTN = Recipe.uniform("w8", method="rtn")
TOKENS = torch.arange(1, 33)[None]


def edit_config(folder, **settings):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def edit_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.fixture
def separate_head(model_folder):
    """A folder whose config says tied beside a head with values of its own."""
    folder = model_folder(tie_word_embeddings=False)
    edit_config(folder, tie_word_embeddings=True)
    return folder


@torch.no_grad()
def test_a_head_of_its_own_beside_a_config_that_says_tied_is_kept(separate_head, tmp_path):
    full = AutoModelForCausalLM.from_pretrained(separate_head)
    assert not torch.equal(full.lm_head.weight, full.model.embed_tokens.weight)
    job = prepare(str(separate_head), RTN, strict=True)
    assert "is stored" in job.notes["output head"]
    quantize_folder(job, tmp_path / "out")
    assert not json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]
    loaded = llmq.load(tmp_path / "out")
    assert torch.equal(loaded.lm_head.weight, full.lm_head.weight)
    # In memory, and from there to a folder in either way, the same holds.
    model = llmq.load(separate_head)
    assert not model.config.tie_word_embeddings
    llmq.quantize(model, RTN)
    assert torch.equal(model(TOKENS).logits, loaded(TOKENS).logits)
    llmq.save(model, tmp_path / "saved")
    model.save_pretrained(tmp_path / "pretrained")
    for name in ("saved", "pretrained"):
        again = llmq.load(tmp_path / name)
        assert not again.config.tie_word_embeddings
        assert torch.equal(again(TOKENS).logits, loaded(TOKENS).logits)


def test_a_head_that_is_stored_with_the_same_values_stays_tied(model_folder, tmp_path):
    folder = model_folder(tie_word_embeddings=True)
    embeddings = "model.embed_tokens.weight"
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t[embeddings].clone()}))
    job = prepare(str(folder), RTN, strict=True)
    assert job.notes == {}
    quantize_folder(job, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]
    assert "lm_head.weight" not in ShardReader(tmp_path / "out").names


@torch.no_grad()
def test_of_two_tied_tensors_either_may_be_the_one_that_is_stored(model_folder, tmp_path):
    folder = model_folder(tie_word_embeddings=True)
    expected = llmq.load(folder)(TOKENS).logits
    embeddings = "model.embed_tokens.weight"
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t.pop(embeddings)}))
    assert torch.equal(llmq.load(folder)(TOKENS).logits, expected)
    quantize_folder(prepare(str(folder), RTN, strict=True), tmp_path / "out")
    full, loaded = (llmq.load(path) for path in (folder, tmp_path / "out"))
    assert torch.equal(loaded.get_input_embeddings().weight, full.get_input_embeddings().weight)


def test_a_head_that_is_missing_beside_a_config_that_says_untied_is_named(model_folder):
    folder = model_folder(tie_word_embeddings=True)
    edit_config(folder, tie_word_embeddings=False)
    with pytest.raises(LlmqError, match=r"lm_head\.weight; config\.json says tie_word_embeddings"):
        prepare(str(folder), RTN)
    with pytest.raises(LlmqError, match=r"1 missing keys, the first being lm_head\.weight"):
        llmq.load(folder)


def test_tensors_without_a_place_are_named_when_a_model_is_loaded(model_folder):
    folder = model_folder()
    extra = {"model.layers.0.mlp.up_proj.bias": torch.ones(128), "lm_head.bias": torch.ones(2048)}
    edit_tensors(folder, lambda t: t.update(extra))
    with pytest.warns(LlmqWarning, match=r"2 of 23 tensors are not used .* lm_head\.bias"):
        llmq.load(folder)
    with pytest.raises(LlmqError, match=r"--strict: .* 2 of 23 tensors are not used"):
        llmq.load(folder, strict=True)


@pytest.mark.parametrize(
    ("suffix", "tensor"),
    [
        ("input_range", torch.tensor([0.1, 3.0])),  # without activations in the config
        ("weight", torch.ones(64, 128)),  # beside the packed one
    ],
)
def test_tensors_of_packed_layers_that_decide_nothing_are_named(suffix, tensor, tmp_path):
    model = make_model()
    llmq.quantize(model, RTN)
    llmq.save(model, tmp_path / "out", format="llmq")
    layer = "model.layers.1.mlp.down_proj"
    edit_tensors(tmp_path / "out", lambda t: t.update({f"{layer}.{suffix}": tensor}))
    (tmp_path / "out" / MANIFEST).unlink()  # which knows what was written
    with pytest.warns(LlmqWarning, match=rf"1 of .* {layer}\.{suffix}"):
        llmq.load(tmp_path / "out")
    with pytest.raises(LlmqError, match="--strict"):
        llmq.load(tmp_path / "out", strict=True)


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.bool, torch.uint8, torch.int32, torch.float8_e4m3fn]
)
def test_weights_that_are_no_real_numbers_are_refused(dtype, model_folder):
    folder = model_folder()
    name = "model.layers.1.mlp.down_proj.weight"
    edit_tensors(folder, lambda t: t.update({name: t[name].to(dtype)}))
    for read in (llmq.load, lambda folder: prepare(str(folder), RTN)):
        with pytest.raises(LlmqError, match=rf"tensor {name} is stored as \w+, expected F64, F32"):
            read(folder)


@torch.no_grad()
@pytest.mark.parametrize("name", ["pytorch_model.safetensors", "gptq_model-4bit-128g.safetensors"])
def test_one_file_under_another_name_is_read_by_all_or_none(name, model_folder, tmp_path):
    folder = model_folder()
    expected = llmq.load(folder)(TOKENS).logits
    (folder / "model.safetensors").rename(folder / name)
    assert torch.equal(llmq.load(folder)(TOKENS).logits, expected)
    quantize_folder(prepare(str(folder), RTN), tmp_path / "out")
    assert "transformers_weights" not in (tmp_path / "out" / "config.json").read_text()
    (folder / "second.safetensors").write_bytes((folder / name).read_bytes())
    for read in (llmq.load, lambda folder: prepare(str(folder), RTN)):
        with pytest.raises(LlmqError, match=r"no model\.safetensors and no"):
            read(folder)


@torch.no_grad()
def test_the_file_that_the_config_names_is_the_one_that_everybody_reads(model_folder):
    folder, other = model_folder(seed=1), model_folder(name="other", seed=2)
    (other / "model.safetensors").rename(folder / "chosen.safetensors")
    edit_config(folder, transformers_weights="chosen.safetensors")
    expected = AutoModelForCausalLM.from_pretrained(folder)(TOKENS).logits
    assert torch.equal(llmq.load(folder)(TOKENS).logits, expected)
    assert ShardReader(folder).start == "chosen.safetensors"
    for name in ("../other/config.safetensors", "missing.safetensors", 3):
        edit_config(folder, transformers_weights=name)
        with pytest.raises(LlmqError, match="transformers_weights is"):
            ShardReader(folder)


GPTQ_KEYS = ("bits", "group_size", "desc_act", "sym")


@torch.no_grad()
def test_settings_of_autogptq_beside_the_config_are_read(tmp_path):
    """Until 2023 config.json had none."""
    model = make_model()
    llmq.quantize(model, Recipe.uniform("w4g32", method="rtn"))
    llmq.save(model, tmp_path / "out", format="gptq")
    folder = tmp_path / "out"
    config = json.loads((folder / "config.json").read_text())
    settings = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    old = folder / "quantize_config.json"
    old.write_text(json.dumps({key: settings[key] for key in GPTQ_KEYS}))
    assert torch.equal(llmq.load(folder)(TOKENS).logits, model(TOKENS).logits)
    with pytest.raises(LlmqError, match=r"is quantized already \(gptq\)"):
        prepare(str(folder), RTN)
    old.write_text("{}")
    with pytest.raises(LlmqError, match=r"quantize_config\.json: not the settings"):
        llmq.load(folder)
    old.unlink()
    with pytest.raises(LlmqError, match=r"neither config\.json nor quantize_config\.json says how"):
        llmq.load(folder)


def test_settings_of_another_model_beside_a_full_precision_one_are_no_settings(model_folder):
    folder = model_folder()
    (folder / "quantize_config.json").write_text(json.dumps({"bits": 4}))
    assert getattr(load_config(folder), "quantization_config", None) is None


def vision_and_text(vision_layers):
    """A small Gemma 3 with a vision tower."""
    from transformers import Gemma3Config

    text = make_model("gemma3_text").config.to_dict()
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": vision_layers}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    return Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)


@pytest.mark.parametrize("vision_layers", [1, 2])
def test_blocks_are_those_of_the_text_model(vision_layers):
    model = meta_model(vision_and_text(vision_layers))
    assert find_blocks(model)[0] == "model.language_model.layers"


@torch.no_grad()
def test_the_other_parts_of_a_wrapper_stay_as_they_are(tmp_path, tokenizer):
    """Qwen3.5, whose text model transformers would build alone; its folder holds a vision tower as
    well, here one that is as deep."""
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    text = {"vocab_size": 2048, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    text |= {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    text |= {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16}
    text |= {"linear_value_head_dim": 16, "bos_token_id": 0, "eos_token_id": 0}
    vision = {"hidden_size": 32, "intermediate_size": 64, "depth": 4, "num_heads": 2}
    config = Qwen3_5Config(
        text_config={"model_type": "qwen3_5_text", **text},
        vision_config={**vision, "out_hidden_size": 64},
    )
    torch.manual_seed(0)
    Qwen3_5ForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    job = prepare(str(tmp_path / "model"), RTN, strict=True)
    assert not job.notes.keys() & {"source tensors", "layers beside the model"}
    (tmp_path / "model" / "preprocessor_config.json").write_text('{"size": 28}')
    assert all(plan.layer.name.startswith("model.language_model.layers") for plan in job.plans)
    job = prepare(str(tmp_path / "model"), RTN, strict=True)
    report = quantize_folder(job, tmp_path / "out")
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()
    assert report["unused_source_tensors"] == []
    before, after = (ShardReader(tmp_path / name) for name in ("model", "out"))
    others = [name for name in before.names if ".visual." in name]
    assert others
    kept, read = before.read(others), after.read(others)
    assert all(torch.equal(kept[name], read[name]) for name in others)
    full = llmq.load(tmp_path / "model", strict=True)(TOKENS).logits
    quantized = llmq.load(tmp_path / "out", strict=True)(TOKENS).logits
    assert (full - quantized).norm() < 0.05 * full.norm()
    opened = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    assert type(opened) is Qwen3_5ForConditionalGeneration
    assert torch.equal(opened(TOKENS).logits, quantized)
    of_text = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(of_text(TOKENS).logits, quantized)
    llmq.save(llmq.load(tmp_path / "out"), tmp_path / "again")
    assert ShardReader(tmp_path / "again").names.keys() == after.names.keys()


def test_a_tie_that_is_stored_in_part_is_refused(separate_head, monkeypatch):
    """A head of its own, whose bias would be tied, is nothing that a config can say."""
    model = meta_model(load_config(separate_head))
    ties = {"lm_head.weight": "model.embed_tokens.weight", "lm_head.bias": "model.norm.weight"}
    model.all_tied_weights_keys = ties
    monkeypatch.setattr("llmq.models.stored.meta_model", lambda config: model)
    with pytest.raises(LlmqError, match=r"lm_head\.bias is not stored at all"):
        StoredModel.of(Source(separate_head))


def test_an_adapter_beside_the_weights_is_not_passed_over(model_folder):
    folder = model_folder()
    readers = (llmq.load, lambda folder: prepare(str(folder), RTN))
    (folder / "adapter_config.json").write_text("{}")
    for read in readers:
        with pytest.raises(LlmqError, match="an adapter whose weights are not there"):
            read(folder)
    (folder / "adapter_model.safetensors").write_bytes(b"")
    for read in readers:
        with pytest.raises(LlmqError, match="an adapter that is not merged"):
            read(folder)
