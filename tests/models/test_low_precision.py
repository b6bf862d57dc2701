"""FP8 with scales and MXFP4 are read with the values that transformers has of them, and quantized
as the model in bfloat16 that they stand for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import llmq
from llmq.commands.cli import main
from llmq.errors import LlmqError
from llmq.grid.small_floats import e2m1_values, e8m0_values
from llmq.models.low_precision import decoded
from llmq.models.mxfp4_views import Mxfp4View
from llmq.models.scaled_views import ScaledView
from llmq.models.shards import ShardReader
from llmq.models.source import Source

try:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors
except ImportError:  # moved in another version
    pytest.skip("this transformers has no FP8 or MXFP4 of its own", allow_module_level=True)

SMALL = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 96, "vocab_size": 2048}
EXPERTS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
EXPERTS |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "num_experts_per_tok": 2}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}


def state_settings(folder: Path, settings: dict[str, object]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "quantization_config": settings}))


def fp8(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 and scales of blocks of rows and columns, the last of which may be smaller."""
    *lead, n, k = weight.shape
    rows, columns = -(-n // block[0]), -(-k // block[1])
    whole = torch.zeros(*lead, rows * block[0], columns * block[1])
    whole[..., :n, :k] = weight.float()
    scale = whole.view(*lead, rows, block[0], columns, block[1]).abs().amax((-3, -1)) / 448
    return (weight.float() / spread(scale, block, (n, k))).to(torch.float8_e4m3fn), scale


def spread(scale: torch.Tensor, block: tuple[int, int], shape: tuple[int, int]) -> torch.Tensor:
    rows = scale.repeat_interleave(block[0], -2)[..., : shape[0], :]
    return rows.repeat_interleave(block[1], -1)[..., : shape[1]]


def fp8_folder(folder: Path, block: tuple[int, int] | None) -> dict[str, torch.Tensor]:
    """Linear layers of a folder in FP8. block: None for one scale. Returns what is stored."""
    stored = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        stored[name] = tensor
        if name.endswith("proj.weight"):
            codes, scale = fp8(tensor, block or tuple(tensor.shape))
            stored[name], stored[f"{name}_scale_inv"] = codes, scale if block else scale.view(())
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    size = None if block is None else list(block)
    state_settings(folder, {"quant_method": "fp8", "weight_block_size": size})
    return stored


def gpt_oss(folder: Path, tokenizer) -> dict[str, torch.Tensor]:
    """A folder of gpt-oss in MXFP4 of random bytes. Returns the weights that they stand for."""
    settings = {**SMALL, **EXPERTS, "num_local_experts": 4, "num_hidden_layers": 2}
    settings |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    config = AutoConfig.for_model("gpt_oss", **settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    stored, expected = {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        stored[name] = tensor
        if tensor.ndim == 3:
            n_experts, k, n = tensor.shape
            blocks = torch.randint(0, 256, (n_experts, n, k // 32, 16), dtype=torch.uint8)
            scales = torch.randint(117, 122, (n_experts, n, k // 32), dtype=torch.uint8)
            del stored[name]
            stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            expected[name] = convert_moe_packed_tensors(blocks, scales)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    state_settings(folder, MXFP4)
    return expected


def reader(folder: Path, tensors: dict[str, torch.Tensor], block=None) -> ShardReader:
    save_file(tensors, folder / "model.safetensors")
    settings = {"quant_method": "fp8", "weight_block_size": block}
    return decoded(ShardReader(folder, {}), {"quantization_config": settings})


def rounded(folder: Path, out: Path) -> dict[str, torch.Tensor]:
    """What rounding makes of a folder."""
    llmq.quantize(folder, out, "w4g32", method="rtn")
    return load_file(out / "model.safetensors")


def test_small_floats():
    assert e2m1_values(torch.tensor([[0x21, 0xF8]], dtype=torch.uint8)).tolist() == [
        [0.5, 1, 0, -6]
    ]
    values = e8m0_values(torch.tensor([0, 127, 254, 255], dtype=torch.uint8))
    assert values[:3].tolist() == [2.0**-127, 1, 2.0**127]
    assert bool(values[3].isnan())


@pytest.mark.parametrize("block", [(32, 32), (1, 96), None], ids=["block", "row", "tensor"])
def test_fp8_has_the_values_of_transformers(block, tmp_path):
    make_model(dtype=torch.bfloat16, **SMALL, num_key_value_heads=2).save_pretrained(tmp_path)
    state = fp8_folder(tmp_path, block)
    source = Source.open(tmp_path)
    assert sum(source.precision.values()) == 7
    scaled = [name for name in state if f"{name}_scale_inv" in state]
    found = source.tensors.read(scaled)
    for name in scaled:
        scale = state[f"{name}_scale_inv"]
        expected = Fp8Dequantize(None)._dequantize_one(state[name], scale, torch.bfloat16)
        assert torch.equal(found[name], expected)


@pytest.mark.parametrize("name", ["weight_scale_inv", "weight_scale", "scale", "qscale_weight"])
def test_blocks_may_end_before_their_last_row_and_scales_have_several_names(name, tmp_path):
    weight = torch.randn(72, 80)
    codes, scale = fp8(weight, (32, 32))
    tensors = {"a.weight": codes, f"a.{name}": scale, "a.input_scale": torch.ones(())}
    shards = reader(tmp_path, tensors, [32, 32])
    assert list(shards.names) == ["a.weight"]
    expected = (codes.float() * spread(scale, (32, 32), (72, 80))).bfloat16()
    assert torch.equal(shards.read(["a.weight"])["a.weight"], expected)


@pytest.mark.parametrize("shape", [(3,), (3, 1, 1), (3, 40, 1), (3, 5, 2)])
def test_experts_in_one_tensor_are_read_one_by_one(shape, tmp_path):
    codes, scale = torch.randn(3, 40, 64).to(torch.float8_e4m3fn), torch.rand(shape)
    shards = reader(tmp_path, {"e.down_proj": codes, "e.down_proj_scale_inv": scale})
    grid = scale.view(*shape, *(1,) * (3 - scale.ndim))
    block = 40 // grid.shape[1], 64 // grid.shape[2]
    expected = (codes.float() * spread(grid, block, (40, 64))).bfloat16()
    assert torch.equal(shards.read(["e.down_proj"])["e.down_proj"], expected)
    from contextlib import ExitStack

    with ExitStack() as stack:
        assert torch.equal(shards.slices(stack)("e.down_proj")[1], expected[1])


def test_e2m1_with_exponents(tmp_path):
    packed = torch.randint(-128, 128, (4, 32), dtype=torch.int8)
    scale = torch.randint(120, 130, (4, 2), dtype=torch.uint8).view(torch.float8_e8m0fnu)
    shards = reader(tmp_path, {"a.weight": packed, "a.scale": scale}, [128, 128])
    expected = Fp8Dequantize(None)._dequantize_one(packed, scale, torch.bfloat16)
    assert torch.equal(shards.read(["a.weight"])["a.weight"], expected)


def test_what_fp8_becomes_is_what_the_model_in_bfloat16_becomes(tmp_path, tokenizer):
    folder, plain = tmp_path / "fp8", tmp_path / "plain"
    make_model(dtype=torch.bfloat16, **SMALL).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    fp8_folder(folder, (32, 32))
    model = llmq.load(folder)
    by_transformers = AutoModelForCausalLM.from_pretrained(folder)
    assert all(
        torch.equal(tensor, by_transformers.state_dict()[name])
        for name, tensor in model.state_dict().items()
    )
    model.save_pretrained(plain)
    tokenizer.save_pretrained(plain)
    found, expected = rounded(folder, tmp_path / "a"), rounded(plain, tmp_path / "b")
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    settings = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == "compressed-tensors"
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert report["source_precision"] == {"FP8 with a scale per 32 x 32": 7}
    assert "decoded to bfloat16" in report["notes"]["source"]


def test_what_mxfp4_becomes_is_what_the_model_in_bfloat16_becomes(tmp_path, tokenizer):
    folder, plain = tmp_path / "mxfp4", tmp_path / "plain"
    weights = gpt_oss(folder, tokenizer)
    source = Source.open(folder)
    assert source.precision == {"MXFP4": 4}
    found = source.decoded.read(weights)
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())
    model = llmq.load(folder)
    assert all(torch.equal(model.state_dict()[name], each) for name, each in weights.items())
    model.save_pretrained(plain)
    tokenizer.save_pretrained(plain)
    found, expected = rounded(folder, tmp_path / "a"), rounded(plain, tmp_path / "b")
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_plan_and_inspect_say_what_the_source_is(tmp_path, tokenizer, capsys):
    make_model(dtype=torch.bfloat16, **SMALL).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    fp8_folder(tmp_path, (32, 32))
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["decoded"] == {"FP8 with a scale per 32 x 32": 7}
    command = ["plan", str(tmp_path), "--method", "rtn", "--rule", "*.down_proj=keep", "--json"]
    assert main(command) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["source_precision"] == {"FP8 with a scale per 32 x 32": 7}
    assert plan["notes"]["kept weights"].startswith("1 are stored in fewer bits, the first being")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a.weight_scale_inv": (2, 2)}, "tensor a.weight_scale_inv holds scales, but the tensor"),
        ({"a.weight": (8, 8), "a.weight_scale_inv": (2, 2)}, "but a.weight is stored as F32"),
        ({"e.x_scales": (2, 4, 1)}, "tensor e.x_scales is stored without e.x_blocks"),
        ({"e.x_blocks": (2, 4, 1, 16)}, "tensor e.x_blocks is stored without e.x_scales"),
        ({"e.x_blocks": (2, 4, 1, 16), "e.x_scales": (2, 4, 3)}, "tensors e.x_blocks of shape"),
    ],
)
def test_parts_without_each_other_are_named(tensors, message, tmp_path):
    dtypes = {name: torch.uint8 if "e.x" in name else torch.float32 for name in tensors}
    stored = {name: torch.ones(shape, dtype=dtypes[name]) for name, shape in tensors.items()}
    with pytest.raises(LlmqError, match=message) as caught:
        reader(tmp_path, stored)
    assert "\n" not in str(caught.value)


def test_scales_that_do_not_fit_and_blocks_that_are_none(tmp_path):
    stored = {"a.weight": torch.ones(8, 8).to(torch.float8_e4m3fn)}
    with pytest.raises(LlmqError, match=r"a\.weight_scale_inv has shape \[3, 2\].*damaged"):
        reader(tmp_path, stored | {"a.weight_scale_inv": torch.ones(3, 2)})
    with pytest.raises(LlmqError, match=r"weight_block_size \[0, 4\]: expected"):
        reader(tmp_path, stored, [0, 4])
    shards = reader(tmp_path, stored | {"a.weight_scale_inv": torch.full((), torch.nan)})
    with pytest.raises(LlmqError, match=r"tensor a\.weight, made of .* holds 64 NaN"):
        shards.read(["a.weight"])


@pytest.mark.parametrize("kind", ["MXFP4", "FP8"])
def test_gate_and_up_of_an_expert_are_decoded_once(kind, tmp_path, tokenizer, monkeypatch):
    if kind == "MXFP4":
        gpt_oss(tmp_path, tokenizer)
    else:
        make_model("qwen3_moe").save_pretrained(tmp_path, save_original_format=False)
        tensors = load_file(tmp_path / "model.safetensors")
        name = "model.layers.0.mlp.experts.gate_up_proj"
        tensors[name], tensors[f"{name}_scale_inv"] = fp8(tensors[name], (32, 32))
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    view_class, calls = (Mxfp4View if kind == "MXFP4" else ScaledView), []
    part = view_class.part
    monkeypatch.setattr(
        view_class, "part", lambda *args: calls.append(args[2]) or part(*args), raising=True
    )
    tensors = Source.open(tmp_path).tensors
    prefix = "model.layers.0.mlp.experts"
    names = [f"{prefix}.{i}.{layer}_proj.weight" for i in range(2) for layer in ("gate", "up")]
    found = tensors.read(names)
    assert calls == [0, 1]
    for name, tensor in found.items():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, "no more of it than it is"
        assert torch.equal(tensor, tensors.read([name])[name])


def test_what_is_kept_of_fp8_is_within_half_a_step_of_bfloat16(tmp_path, tokenizer):
    """A product of FP8 and a scale in float32 has more digits than bfloat16 holds."""
    folder = tmp_path / "fp8"
    make_model(dtype=torch.bfloat16, **SMALL).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    stored = fp8_folder(folder, (32, 32))
    recipe = ["*.down_proj=keep", "w4g32"]
    report = llmq.quantize(folder, tmp_path / "out", recipe, method="rtn")
    name = "model.layers.0.mlp.down_proj.weight"
    found = load_file(tmp_path / "out" / "model.safetensors")[name]
    assert found.dtype == torch.bfloat16
    scale = spread(stored[f"{name}_scale_inv"], (32, 32), found.shape)
    exact = stored[name].float() * scale
    worst = ((found.float() - exact).abs() / exact.abs().clamp_min(1e-30)).max()
    assert 1 / 512 < float(worst) <= 1 / 256
    assert "within 1/256" in report["notes"]["kept weights"]


def test_what_the_class_does_not_load_is_copied_with_its_values(tmp_path, tokenizer):
    """Without a scale beside them, codes would be numbers like any others."""
    folder = tmp_path / "fp8"
    make_model(dtype=torch.bfloat16, **SMALL).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    stored = fp8_folder(folder, (32, 32))
    weight, scale = fp8(torch.randn(64, 96), (32, 32))
    stored |= {"mtp.fc.weight": weight, "mtp.fc.weight_scale_inv": scale}
    stored["mtp.norm.weight"] = torch.ones(64, dtype=torch.bfloat16)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    expected = (weight.float() * spread(scale, (32, 32), (64, 96))).bfloat16()
    report = llmq.quantize(folder, tmp_path / "folder", "w4g32", method="rtn")
    assert "mtp.fc.weight (FP8 with" in report["notes"]["copied weights"]
    model = llmq.load(folder)
    llmq.quantize(model, "w4g32", method="rtn")
    llmq.save(model, tmp_path / "memory")
    for name in ("folder", "memory"):
        found = load_file(tmp_path / name / "model.safetensors")
        copied = {each for each in found if each.startswith("mtp.")}
        assert copied == {"mtp.fc.weight", "mtp.norm.weight"}
        assert torch.equal(found["mtp.fc.weight"], expected)
        settings = json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]
        assert "mtp.fc" in settings["ignore"]
