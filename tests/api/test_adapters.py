"""Adapters on a quantized base, with PEFT as it is: trained, saved, loaded, and merged."""

import json
from pathlib import Path

import pytest
import torch
from conftest import make_model
from format_models import dequantized, quantized_folder
from safetensors.torch import load_file
from torch import nn

import llmq
from llmq.errors import LlmqError
from llmq.formats.registry import NAMES
from llmq.grid.spec import ActSpec, QuantSpec
from llmq.inference.module import quantized_modules
from llmq.recipe import Recipe
from llmq.storage.manifest import check_folder

peft = pytest.importorskip("peft", reason="peft is not installed (pip install 'llmq[peft]')")

TOKENS = torch.randint(2, 2048, (2, 16), generator=torch.Generator().manual_seed(0))
DOWN = [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
ACT_ORDER = Path(__file__).parent.parent / "formats" / "folders" / "gptq-act-order"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder of GPTQ."""
    return quantized_folder(tmp_path_factory.mktemp("adapters") / "base", "gptq")


def lora(**options):
    settings = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    return peft.LoraConfig(**settings)


def train(model, steps=5, rate=5e-3):
    """Losses before each step on one batch."""
    parameters = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(parameters, rate)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=TOKENS % model.config.vocab_size, labels=TOKENS % 8).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def trained(folder, out, **options):
    """The folder of an adapter that was trained on a quantized folder, and the model with it."""
    torch.manual_seed(0)
    model = peft.get_peft_model(llmq.load(folder), lora(**options))
    train(model.train(), rate=2e-2)
    model.save_pretrained(out)
    return out, model.eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=TOKENS % model.config.vocab_size).logits.float()


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_lora_trains_saves_and_loads_on_a_quantized_base(base, tmp_path, dtype):
    plain = llmq.load(base, dtype=dtype)
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    torch.manual_seed(0)
    model = peft.get_peft_model(plain, lora())
    adapted = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert len(adapted) == len(quantized_modules(plain)) == 14
    losses = train(model.train())
    assert losses[-1] < losses[0]
    model.eval().save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(llmq.load(base, dtype=dtype), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
    after = model.unload().state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def gradients(model):
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    return {name: each.grad for name, each in model.named_parameters() if each.requires_grad}


def test_gradients_are_those_of_the_dequantized_model(base):
    """Also with gradient checkpointing, which computes the forward pass twice."""
    model = llmq.load(base, dtype="float32")
    plain = dequantized(llmq.load(base, dtype="float32"))
    found = []
    for each in (model, plain):
        torch.manual_seed(0)
        adapted = peft.get_peft_model(each, lora(init_lora_weights=False)).train()
        if each is model:
            each.gradient_checkpointing_enable({"use_reentrant": False})
        found.append(gradients(adapted))
    for name, gradient in found[0].items():
        assert torch.allclose(gradient, found[1][name], rtol=1e-3, atol=1e-6), name


def test_transformers_knows_what_trains_and_pefts_own_merge_names_the_way(base):
    from transformers.trainer_utils import validate_quantization_for_training

    plain = llmq.load(base)
    assert plain.hf_quantizer.is_trainable
    assert not plain.hf_quantizer.is_qat_trainable
    with pytest.raises(ValueError, match="attach trainable adapters"):
        validate_quantization_for_training(plain)
    model = peft.get_peft_model(plain, lora())
    validate_quantization_for_training(model)
    expected = logits(model)
    for is_safe in (False, True):
        with pytest.raises(LlmqError, match=r"llmq\.merge_adapter"):
            model.merge_and_unload(safe_merge=is_safe)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize(
    "name",
    [name if name == "gptq" else pytest.param(name, marks=pytest.mark.slow) for name in NAMES],
)
def test_a_merge_quantizes_again_what_changed_and_keeps_the_rest(tmp_path, name):
    folder = quantized_folder(tmp_path / "base", name)
    adapter, model = trained(folder, tmp_path / "adapter", target_modules=["down_proj"], r=8)
    report = llmq.merge_adapter(folder, adapter, out=tmp_path / "merged")
    out = Path(report["out"])
    check_folder(out)
    assert report["format"] == name
    assert [layer["name"] for layer in report["layers"]] == DOWN
    assert all(layer["kept"] > 0.3 and layer["codes_changed"] > 0 for layer in report["layers"])
    assert json.loads((out / "merge.json").read_text())["layers"] == report["layers"]
    for companion in ("config.json", "quantize_config.json"):
        if (folder / companion).is_file():
            assert (folder / companion).read_bytes() == (out / companion).read_bytes()
    before, after = (load_file(each / "model.safetensors") for each in (folder, out))
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert {key.rpartition(".")[0] for key in changed} == set(DOWN)
    merged, plain = llmq.load(out), llmq.load(folder)
    specs = {key: module.spec for key, module in quantized_modules(plain).items()}
    assert {key: module.spec for key, module in quantized_modules(merged).items()} == specs
    # The result is nearer to the model with its adapter than the base is.
    expected = logits(model)
    assert (logits(merged) - expected).norm() < (logits(plain) - expected).norm()


def test_a_merge_takes_shards_dora_and_weights_that_were_trained_whole(base, tmp_path):
    folder = llmq.save(llmq.load(base), tmp_path / "base", format="gptq", max_shard_bytes=150_000)
    options = {"target_modules": ["q_proj"], "use_dora": True, "modules_to_save": ["lm_head"]}
    adapter, model = trained(folder, tmp_path / "adapter", **options)
    report = llmq.merge_adapter(folder, adapter, out=tmp_path / "merged")
    assert [layer["name"] for layer in report["kept_layers"]] == ["lm_head"]
    assert len(report["layers"]) == 2
    names = {path.name for path in folder.iterdir()} - {"README.md"}
    assert len([name for name in names if name.endswith(".safetensors")]) > 1
    assert {path.name for path in (tmp_path / "merged").iterdir()} == {*names, "merge.json"}
    head = model.get_base_model().lm_head.modules_to_save["default"].weight
    merged = llmq.load(tmp_path / "merged").lm_head.weight
    assert torch.equal(merged, head.to(merged.dtype))


def test_a_small_change_is_kept_by_chance_and_undone_by_rounding_to_nearest(base, tmp_path):
    torch.manual_seed(0)
    model = peft.get_peft_model(llmq.load(base), lora(target_modules=["down_proj"], r=8))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.002)  # steps of 4-bit weights are ten times as large
    model.save_pretrained(tmp_path / "adapter")
    with pytest.warns(llmq.LlmqWarning, match="rounding kept 0%"):
        nearest = llmq.merge_adapter(
            base, tmp_path / "adapter", out=tmp_path / "nearest", rounding="nearest"
        )
    assert nearest["kept"] < 0.1
    merged = [
        llmq.merge_adapter(base, tmp_path / "adapter", out=tmp_path / str(index), seed=seed)
        for index, seed in enumerate((0, 0, 1))
    ]
    assert all(report["kept"] > 0.7 for report in merged)
    weights = [load_file(Path(report["out"]) / "model.safetensors") for report in merged]
    name = f"{DOWN[0]}.qweight"
    assert torch.equal(weights[0][name], weights[1][name])
    assert not torch.equal(weights[0][name], weights[2][name])
    with pytest.raises(LlmqError, match="expected one of nearest, stochastic"):
        llmq.merge_adapter(base, tmp_path / "adapter", out=tmp_path / "out", rounding="up")


def test_act_order_is_kept_by_a_merge(tmp_path):
    adapter, model = trained(ACT_ORDER, tmp_path / "adapter")
    report = llmq.merge_adapter(ACT_ORDER, adapter, out=tmp_path / "merged")
    assert len(report["layers"]) == len(quantized_modules(model))
    before, after = (
        load_file(Path(each) / "model.safetensors") for each in (ACT_ORDER, report["out"])
    )
    orders = [name for name in before if name.endswith("g_idx")]
    assert all(torch.equal(before[name], after[name]) for name in orders)
    merged, plain, expected = llmq.load(report["out"]), llmq.load(ACT_ORDER), logits(model)
    assert (logits(merged) - expected).norm() < (logits(plain) - expected).norm()


def test_a_merge_keeps_the_layout_of_layers_and_of_a_head(tmp_path):
    """With activations of 8 bits, 8-bit layers are stored as integers, and a head is packed."""
    model, w8 = make_model(), QuantSpec("int8", -1)
    activations = ActSpec("int8-token")
    llmq.quantize(model, Recipe.uniform(w8, method="rtn", head=w8, activations=activations))
    llmq.save(model, tmp_path / "base")
    targets = ["down_proj", "lm_head"]
    adapter, _ = trained(tmp_path / "base", tmp_path / "adapter", target_modules=targets)
    report = llmq.merge_adapter(tmp_path / "base", adapter, out=tmp_path / "out")
    assert {layer["name"] for layer in report["layers"]} == {*DOWN, "lm_head"}
    assert report["kept"] > 0.9
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {"lm_head.weight_packed", f"{DOWN[0]}.weight"} <= stored.keys()
    before, after = (llmq.load(tmp_path / name) for name in ("base", "out"))
    assert not torch.equal(logits(before), logits(after))


def test_what_cannot_be_merged_is_refused(base, tmp_path):
    plain, out = tmp_path / "plain", tmp_path / "out"
    make_model().save_pretrained(plain)
    model = peft.get_peft_model(llmq.load(base), lora(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    adapter = tmp_path / "adapter"
    with pytest.raises(LlmqError, match="merge_and_unload"):
        llmq.merge_adapter(plain, adapter, out=out)
    with pytest.raises(LlmqError, match="has no adapter_config"):
        llmq.merge_adapter(base, plain, out=out)
    with pytest.raises(LlmqError, match="exists already"):
        llmq.merge_adapter(base, adapter, out=plain)
    with pytest.raises(LlmqError, match="was it trained"):
        llmq.merge_adapter(base, adapter, out=out)
    path = adapter / "adapter_config.json"
    settings = json.loads(path.read_text())
    for change, message in (
        ({"bias": "all"}, "trains biases"),
        ({"target_modules": ["no_such_layer"]}, "does not fit"),
        ({"peft_type": "no_such_type"}, "peft cannot read it"),
    ):
        path.write_text(json.dumps({**settings, **change}))
        with pytest.raises(LlmqError, match=message):
            llmq.merge_adapter(base, adapter, out=out)
    assert not out.exists()


def test_an_adapter_of_a_tied_weight_is_refused(tmp_path):
    folder = quantized_folder(tmp_path / "tied", "gptq", tie_word_embeddings=True)
    model = peft.get_peft_model(llmq.load(folder), lora(target_modules=["embed_tokens"]))
    nn.init.ones_(model.get_base_model().model.embed_tokens.lora_embedding_A["default"])
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(LlmqError, match="no weight of its own"):
        llmq.merge_adapter(folder, tmp_path / "adapter", out=tmp_path / "out")
