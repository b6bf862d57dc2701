"""BitNet folders: exact round trips, both meanings of the scale, and transformers' own reader on
what we write."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file, save_file

import llmq
from llmq.commands.cli import main
from llmq.errors import LlmqError
from llmq.formats.bitnet import BITNET
from llmq.grid.spec import QuantSpec
from llmq.grid.tensor import QuantizedTensor
from llmq.inference.module import quantized_modules
from llmq.models.source import load_config
from llmq.storage.files import MANIFEST

_READ = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
assert "llmq" not in sys.modules
with torch.no_grad():
    torch.save(model(input_ids=torch.arange(2, 30)[None]).logits, sys.argv[2])
"""


def test_rows_are_strided_by_quarters():
    weight = torch.randn(12, 64) * torch.rand(12, 1)
    qtensor = QuantizedTensor.quantize(weight, QuantSpec("ternary", 0))
    tensors = BITNET.write(qtensor)
    assert tensors["weight"].shape == (3, 64)
    for row in range(12):
        assert torch.equal(tensors["weight"][row % 3] >> 2 * (row // 3) & 3, qtensor.codes()[row])
    for config, stored in (
        ({"linear_class": "bitlinear"}, tensors["weight_scale"]),
        ({"linear_class": "autobitlinear"}, qtensor.scale.float().view(1)),
    ):
        read = BITNET.read(
            "x", {"weight": tensors["weight"], "weight_scale": stored}, config, (12, 64)
        )
        assert torch.equal(read.packed, qtensor.packed)
        assert torch.equal(read.scale, qtensor.scale)


def test_every_float16_scale_survives_its_reciprocal():
    scales = torch.arange(1, 0x7C00, dtype=torch.int16).view(torch.float16)
    assert torch.equal((1 / (1 / scales.float())).half(), scales)


@pytest.fixture
def bitnet_folder(model_folder, tmp_path):
    out = tmp_path / "out"
    assert (
        main(
            [
                "quantize",
                str(model_folder()),
                str(out),
                "--bits",
                "ternary",
                "--group-size",
                "0",
                "--activations",
                "int8-token",
                "--method",
                "rtn",
            ]
        )
        == 0
    )
    return out


def test_auto_writes_it_and_llmq_reads_it(bitnet_folder, tmp_path):
    config = load_config(bitnet_folder).quantization_config
    assert config["quant_method"] == "bitnet"
    model = llmq.load(bitnet_folder, dtype="float32")
    modules = quantized_modules(model)
    assert {module.activations.kind for module in modules.values()} == {"int8-token"}
    original = make_model()
    for name, module in modules.items():
        expected = QuantizedTensor.quantize(
            original.get_submodule(name).weight.detach(), QuantSpec("ternary", 0)
        )
        assert torch.equal(module.qtensor().packed, expected.packed)
        assert torch.equal(module.qtensor().scale, expected.scale)
    llmq.save(model, tmp_path / "again", format="bitnet")
    first, second = (
        load_file(folder / "model.safetensors")
        if (folder / "model.safetensors").exists()
        else _all(folder)
        for folder in (bitnet_folder, tmp_path / "again")
    )
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def _all(folder):
    return {
        name: tensor
        for path in folder.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def test_scales_that_float16_does_not_hold_are_kept_as_they_are():
    weight = torch.zeros(3, 64, dtype=torch.uint8)
    stored = torch.tensor([0.3], dtype=torch.bfloat16)
    for linear_class, expected in (
        ("bitlinear", 1 / stored.float()),
        ("autobitlinear", stored.float()),
    ):
        config = {"linear_class": linear_class}
        read = BITNET.read("x", {"weight": weight, "weight_scale": stored}, config, (12, 64))
        assert torch.equal(read.scale.float().view(1), expected)


def online_folder(folder, **settings):
    """Weights in full precision that transformers rounds whenever it computes."""
    model = make_model("qwen2")  # with biases
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "bitnet",
        "linear_class": "autobitlinear",
        "quantization_mode": "online",
        "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.up_proj"],
        **settings,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return model


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_in_full_precision_are_rounded_by_the_rule_of_transformers(dtype, tmp_path):
    model = online_folder(tmp_path / "online").to(dtype)
    with pytest.warns(llmq.LlmqWarning, match="online"):
        loaded = llmq.load(tmp_path / "online", dtype=dtype)
    modules = quantized_modules(loaded)
    assert len(modules) == 13
    assert "model.layers.0.mlp.up_proj" not in modules
    for name, module in modules.items():
        weight = model.get_submodule(name).weight.float()
        steps = 1.0 / weight.abs().mean().clamp(min=1e-5)
        expected = ((weight * steps).round().clamp(-1, 1) / steps).to(dtype)
        assert torch.equal(module.qtensor().dequantize().to(dtype), expected)


def test_what_online_does_not_mean_is_refused(tmp_path):
    for change, message in (
        ({"linear_class": "bitlinear"}, "autobitlinear"),
        ({"use_rms_norm": True}, "use_rms_norm"),
    ):
        online_folder(tmp_path / "online", **change)
        with pytest.raises(LlmqError, match=message):
            llmq.load(tmp_path / "online")


def test_weights_without_a_mean_are_refused(tmp_path):
    online_folder(tmp_path / "online")
    path = tmp_path / "online" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(LlmqError, match="up_proj"):
        llmq.load(tmp_path / "online")


def multiplying_folder(source, folder):
    """The same weights as "autobitlinear" has them: its scale multiplies, biases included."""
    shutil.copytree(source, folder)
    (folder / MANIFEST).unlink()
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["linear_class"] = "autobitlinear"
    path.write_text(json.dumps(config))
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name in [name for name in tensors if name.endswith("weight_scale")]:
            tensors[name] = 1 / tensors[name]
        save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*online")
@pytest.mark.parametrize("form", ["bitlinear", "autobitlinear", "online"])
def test_transformers_own_reader_agrees(form, bitnet_folder, tmp_path):
    """Without llmq in the process. Tolerance: both quantize activations to 8 bits per token; a code
    on the edge may fall to either side, 1 of 127 steps in a few of 64 to 128 products."""
    if form == "autobitlinear":
        multiplying_folder(bitnet_folder, tmp_path / form)
        bitnet_folder = tmp_path / form
    elif form == "online":
        online_folder(tmp_path / form)
        bitnet_folder = tmp_path / form
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _READ, str(bitnet_folder), str(tmp_path / "logits.pt")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    theirs = torch.load(tmp_path / "logits.pt")
    with torch.no_grad():
        ours = llmq.load(bitnet_folder, dtype="float32")(input_ids=torch.arange(2, 30)[None]).logits
    assert float((ours - theirs).abs().max()) < 0.05 * float(ours.std())


def test_what_it_cannot_hold(model_folder, tmp_path, capsys, bitnet_folder):
    folder = model_folder(name="other")
    for options, message in (
        (["--bits", "4", "--activations", "int8-token"], "one float16 scale per tensor only"),
        (["--bits", "ternary", "--group-size", "0"], "implies activations of 8 bits"),
    ):
        assert (
            main(
                [
                    "quantize",
                    str(folder),
                    str(tmp_path / "no"),
                    "--method",
                    "rtn",
                    "--format",
                    "bitnet",
                    *options,
                ]
            )
            == 2
        )
        assert message in capsys.readouterr().err
    path = next(
        path
        for path in bitnet_folder.glob("*.safetensors")
        if "model.layers.0.mlp.up_proj.weight" in load_file(path)
    )
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"][
        :-1
    ].clone()
    save_file(tensors, path)
    (bitnet_folder / MANIFEST).unlink()  # which knows what was written
    with pytest.raises(LlmqError, match="expected uint8 of shape"):
        llmq.load(bitnet_folder)
