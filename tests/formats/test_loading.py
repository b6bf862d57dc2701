"""Loading: through transformers after `import llmq`, with nothing made up, and nothing believed
that was not checked."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import llmq
from llmq.errors import LlmqError, VerificationError
from llmq.grid.spec import QuantSpec
from llmq.inference.module import QuantLinear, quantized_modules
from llmq.recipe import Recipe, Rule
from llmq.storage import files
from llmq.storage.files import MANIFEST

TOKENS = torch.randint(2, 2048, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def quantized(tmp_path, tokenizer):
    """A function that gives a quantized model in memory and the folder it was saved to."""

    def make(spec="w4g32", fmt="auto", name="quantized", **options):
        model = make_model(dtype=options.pop("dtype", torch.bfloat16), **options)
        llmq.quantize(model, Recipe.uniform(spec, method="rtn"))
        llmq.save(model, tmp_path / name, tokenizer=tokenizer, format=fmt)
        return model, tmp_path / name

    return make


@torch.no_grad()
@pytest.mark.parametrize("fmt", ["gptq", "gptq_v2", "llmq"])
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_logits_of_a_loaded_folder_are_bit_equal(quantized, fmt, dtype):
    model, folder = quantized(fmt=fmt)
    expected = (model if dtype == "auto" else model.float())(TOKENS).logits
    assert torch.equal(llmq.load(folder, dtype=dtype)(TOKENS).logits, expected)


@torch.no_grad()
def test_transformers_loads_an_llmq_folder_in_a_new_process(quantized):
    model, folder = quantized(fmt="llmq")
    torch.save(model(TOKENS).logits, folder / "expected.pt")
    # Without gradients, as the expected logits were computed: the CPU backend takes its fast path
    # only then.
    program = (
        "import sys, torch\n{}\ntorch.set_grad_enabled(False)\nmodel = "
        "AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype='auto')\n"
        "tokens = torch.randint(2, 2048, (2, 16), generator=torch.Generator().manual_seed(0))\n"
        "logits, expected = model(tokens).logits, torch.load(sys.argv[1] + '/expected.pt')\n"
        "assert torch.equal(logits, llmq.load(sys.argv[1])(tokens).logits), 'not what llmq.load "
        "gives'\n"
        "assert torch.equal(logits, expected), 'logits differ'"
    )
    for imports in (
        "import llmq\nfrom transformers import AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM\nimport llmq",
    ):
        done = subprocess.run(
            [sys.executable, "-c", program.format(imports), str(folder)],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr


@torch.no_grad()
def test_save_pretrained_of_a_loaded_model_round_trips(quantized, tmp_path):
    model, folder = quantized(fmt="llmq")
    llmq.load(folder).save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype="auto")
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def test_kept_layers_are_named_when_a_loaded_model_is_saved_again(tmp_path, tokenizer):
    model = make_model()
    llmq.quantize(
        model,
        Recipe(rules=(Rule("*.o_proj", None), Rule("*", QuantSpec("int4", 32))), method="rtn"),
    )
    llmq.save(model, tmp_path / "first", tokenizer=tokenizer, format="llmq")
    llmq.load(tmp_path / "first").save_pretrained(tmp_path / "second")
    settings = json.loads((tmp_path / "second" / "config.json").read_text())["quantization_config"]
    assert sorted(settings["modules_to_not_convert"]) == [
        f"model.layers.{i}.self_attn.o_proj" for i in range(2)
    ]
    with torch.no_grad():
        assert torch.equal(llmq.load(tmp_path / "second")(TOKENS).logits, model(TOKENS).logits)


def test_what_is_saved_is_read_back(tmp_path, monkeypatch):
    model = make_model()
    llmq.quantize(model, Recipe.uniform("w4g32", method="rtn"))

    def damaged(path, tensors):
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        next(iter(tensors.values())).view(-1).view(torch.uint8)[0] ^= 1
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)

    monkeypatch.setattr(files, "write_tensors", damaged)
    with pytest.raises(VerificationError, match="reads back otherwise"):
        llmq.save(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_saving_splits_into_shards_with_an_index(tmp_path, tokenizer):
    model = make_model()
    llmq.quantize(model, Recipe.uniform("w4g32", method="rtn"))
    llmq.save(model, tmp_path / "sharded", tokenizer=tokenizer, max_shard_bytes=200_000)
    shards = list((tmp_path / "sharded").glob("*.safetensors"))
    assert len(shards) > 1
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == {name for shard in shards for name in load_file(shard)}
    assert torch.equal(llmq.load(tmp_path / "sharded")(TOKENS).logits, model(TOKENS).logits)


def test_outputs_are_replaced_only_when_asked_and_ours(quantized, tmp_path):
    model, folder = quantized()
    with pytest.raises(LlmqError, match="--overwrite"):
        llmq.save(model, folder)
    llmq.save(model, folder, overwrite=True)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "precious.txt").write_text("x")
    with pytest.raises(LlmqError, match="not written by llmq"):
        llmq.save(model, tmp_path / "foreign", overwrite=True)
    assert (tmp_path / "foreign" / "precious.txt").read_text() == "x"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_scales_keep_their_dtype_when_the_model_is_cast(quantized):
    model, _ = quantized()
    before = {name: module.scale.clone() for name, module in quantized_modules(model).items()}
    model.to(torch.float32).half().bfloat16()
    model(TOKENS)
    for name, module in quantized_modules(model).items():
        assert torch.equal(module.scale, before[name])


def test_one_layout_is_resident_and_state_dict_gives_the_canonical_one(quantized):
    model, _ = quantized()
    canonical = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model(TOKENS)
    module = next(iter(quantized_modules(model).values()))
    assert isinstance(module, QuantLinear)
    assert module.backend in ("cpu-amx", "cpu-avx512", "cpu-int4", "reference")
    assert module.packed is None
    after = model.state_dict()
    assert after.keys() == canonical.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in canonical.items())


def edit_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


LAYER = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(
    ("spec", "change", "message"),
    [
        ("w4g32", lambda t: t.pop(f"{LAYER}.scale"), "scale is missing"),
        ("w4g32", lambda t: t.pop(f"{LAYER}.packed"), "lacks|no place|missing"),
        (
            "w4g32",
            lambda t: t.update({f"{LAYER}.scale": t[f"{LAYER}.scale"] * float("nan")}),
            "NaN or infinite",
        ),
        (
            "w4g32",
            lambda t: t.update({f"{LAYER}.scale": t[f"{LAYER}.scale"].float()}),
            "expected torch.float16",
        ),
        (
            "w4g32",
            lambda t: t.update({f"{LAYER}.packed": t[f"{LAYER}.packed"][:, :-1].contiguous()}),
            "expected torch.int32 of shape",
        ),
        (
            "w4g32",
            lambda t: t.update({f"{LAYER}.g_idx": torch.full((128,), 9, dtype=torch.int32)}),
            "g_idx: values from 9",
        ),
        (
            "ternary-g32",
            lambda t: t.update({f"{LAYER}.packed": torch.full_like(t[f"{LAYER}.packed"], -1)}),
            "code 3",
        ),
        (
            "w4g32",
            lambda t: t.update(
                {"model.layers.7.mlp.down_proj.packed": torch.zeros(1, 1, dtype=torch.int32)}
            ),
            "no such linear layer",
        ),
        ("w4g32", lambda t: t.pop("model.norm.weight"), "lacks 1 of the tensors"),
    ],
)
def test_damaged_tensors_are_refused(quantized, spec, change, message):
    _, folder = quantized(spec, fmt="llmq")
    edit_tensors(folder, change)
    (folder / MANIFEST).unlink()  # which knows what was written
    with pytest.raises(LlmqError, match=message):
        llmq.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["quantization_config"].update(version=99), "version 99"),
        (lambda c: c["quantization_config"].pop("spec"), "no usable spec"),
        (
            lambda c: c["quantization_config"].update(quant_method="hqq"),
            "quantization method 'hqq'",
        ),
        (lambda c: c["quantization_config"]["spec"].update(code="int9"), "unknown code"),
        (lambda c: c["quantization_config"]["spec"].update(group_size=64), "expected"),
    ],
)
def test_damaged_configs_are_refused(quantized, change, message):
    _, folder = quantized(fmt="llmq")
    edit_config(folder, change)
    with pytest.raises(LlmqError, match=message):
        llmq.load(folder)


def test_a_damaged_index_cannot_leave_the_folder(quantized, tmp_path):
    _, folder = quantized(fmt="llmq")
    (folder / MANIFEST).unlink()
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {"x": "../outside.safetensors"}})
    )
    with pytest.raises(LlmqError, match="plain names"):
        llmq.load(folder)


@pytest.mark.parametrize("kind", ["mixtral", pytest.param("gpt_neox", marks=pytest.mark.slow)])
def test_everything_but_packed_layers_gets_the_dtype_that_is_asked_for(
    kind, model_folder, tmp_path
):
    """Also what transformers renames while it loads: routers, heads."""
    folder = model_folder(kind, dtype=torch.bfloat16)
    llmq.quantize(folder, tmp_path / "out", "w4g32", method="rtn")
    model = llmq.load(tmp_path / "out", dtype="float32")
    packed = quantized_modules(model)
    others = {
        name: parameter.dtype
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[0] not in packed
    }
    assert len(others) > 5
    assert set(others.values()) == {torch.float32}
