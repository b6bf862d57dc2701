"""What `plan` says of size, memory and time, and that `--quick` is what it says."""

import json

import pytest

from llmq.commands.cli import main
from llmq.commands.pace import rough_duration
from llmq.ptq import experts

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}


@pytest.fixture
def planned(capsys):
    def run(*arguments):
        assert main(["plan", *map(str, arguments), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def config_of_8b(tmp_path):
    folder = tmp_path / "llama-8b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_8B))
    return folder


def test_bytes_by_part(planned, model_folder):
    """Tied embeddings are one part, and what is not quantized is named."""
    plan = planned(
        model_folder(tie_word_embeddings=True), "--method", "rtn", "--group-size", "32",
        "--rule", "*.v_proj=w8g32", "--rule", "*.k_proj=keep",
    )  # fmt: skip
    parts = {(part["name"], part["spec"]): part for part in plan["parts"]}
    assert parts.keys() == {
        ("embeddings and head", None),
        ("layers", "w4g32"),
        ("layers", "w8g32"),
        ("layers that are kept", None),
        ("norms, biases and others", None),
    }
    table = parts["embeddings and head", None]
    assert table["weights"] == 2048 * 64
    assert table["planned_bytes"] == pytest.approx(table["source_bytes"])
    total = sum(part["planned_bytes"] for part in plan["parts"])
    assert total == pytest.approx(plan["planned_bytes"], abs=10)
    assert table["planned_bytes"] < plan["unquantized_bytes"] < plan["planned_bytes"]


def test_quick_is_planned_and_run(planned, model_folder, calibration_file, tmp_path, capsys):
    folder = model_folder()
    text = ["--calibration", str(calibration_file), "--group-size", "32"]
    plan, quick = planned(folder, *text), planned(folder, *text, "--quick")
    assert quick["calibration"]["windows"] == plan["quick"]["windows"] == [32, 128]
    assert quick["quick"] is None
    assert quick["planned_disk_bytes"] == plan["quick"]["planned_disk_bytes"]
    assert quick["estimate"]["flops"] < plan["estimate"]["flops"]
    out = tmp_path / "out"
    options = ["--quick", "--samples", "3"]  # what is said of one of them holds
    assert main(["quantize", str(folder), str(out), *text, *options]) == 0
    recipe = json.loads((out / "report.json").read_text())["recipe"]
    assert (recipe["samples"], recipe["sequence_length"]) == (3, 128)


def test_a_config_is_enough(planned, config_of_8b):
    """Nothing is read of 16 GB that are not there, and 8B parameters take no memory."""
    plan = planned(config_of_8b, "--max-ram", "16")
    assert plan["has_weights"] is False
    assert plan["source_bytes"] == pytest.approx(16.06e9, rel=0.001)
    assert plan["calibration"]["windows"] == [128, 2048]
    assert plan["memory"]["fits"] is True
    assert 5.3e9 < plan["planned_bytes"] < 6.2e9
    plan = planned(config_of_8b, "--max-ram", "5")
    assert plan["memory"]["fits"] is False
    assert list(plan["memory"]["fitting_methods"]) == ["hqq", "rtn"]


def test_fine_tuning_is_planned_too(planned, config_of_8b, capsys):
    plan = planned(config_of_8b, "--qat", "--max-ram", "16")
    assert plan["fits"] is False
    assert plan["fitting_options"] == {}
    assert plan["memory"]["optimizer"] == 2 * plan["memory"]["masters"] == 8 * plan["parameters"]
    half = ("--qat", "--precision", "bf16")  # whatever this processor multiplies
    plan = planned(config_of_8b, *half, "--max-ram", "190")
    assert plan["precision"] == "bf16"
    assert "--batch-size 1" in plan["fitting_options"]
    plan = planned(config_of_8b, *half, "--max-ram", "80")
    assert next(iter(plan["fitting_options"])) == "--lora-rank 16 --gradient-checkpointing"
    plan = planned(config_of_8b, "--qat", "--optimizer", "adamw_torch_8bit")
    assert plan["memory"]["optimizer"] == 2 * plan["parameters"]
    assert main(["plan", str(config_of_8b), "--qat", "--max-ram", "16"]) == 0
    assert "no option changes that" in capsys.readouterr().out
    for wrong in (["--qat", "--bits", "2"], ["--batch-size", "1"]):  # or it would be ignored
        assert main(["plan", "tiny", *wrong]) == 2
        assert f"{wrong[-2]}: " in capsys.readouterr().err
    assert main(["plan", "tiny", "--qat", "--max-ram", "8", "--gpu-memory", "80GB"]) == 2
    assert "both say how much memory" in capsys.readouterr().err


def test_fine_tuning_on_many_gpus_is_planned_with_a_part_on_each(planned, config_of_8b):
    one = planned(config_of_8b, "--qat", "--gpu-memory", "80GB")
    many = planned(config_of_8b, "--qat", "--gpus", "8", "--gpu-memory", "80GB")
    assert (one["shard"], many["shard"]) == (False, True)
    assert one["processes"] * 8 == many["processes"]
    for name in ("masters", "gradients", "optimizer"):
        assert one["memory"][name] == pytest.approx(8 * many["memory"][name], abs=8)
    # Embeddings and head of the teacher are on every GPU.
    assert one["memory"]["teacher"] / 8 < many["memory"]["teacher"] < one["memory"]["teacher"] / 3
    assert one["planned_seconds_per_million_tokens"] == pytest.approx(
        8 * many["planned_seconds_per_million_tokens"], rel=0.5
    )  # the speed of this machine is measured each time
    lora = planned(config_of_8b, "--qat", "--gpus", "8", "--lora-rank", "16")
    assert lora["shard"] is False  # all of the model on each


def test_a_run_that_does_not_fit_names_a_method_that_does(config_of_8b, model_folder, capsys):
    out = ["nowhere", "--group-size", "32", "--max-ram", "0.005"]
    assert main(["quantize", str(model_folder()), *out]) == 2
    assert "or use --method hqq, which takes 0.00 GB" in capsys.readouterr().err
    assert main(["quantize", str(config_of_8b), "nowhere"]) == 2
    assert "no model.safetensors" in capsys.readouterr().err


def test_times_as_people_say_them():
    assert [rough_duration(each) for each in (3, 89, 100, 20_000)] == [
        "3 s",
        "89 s",
        "2 min",
        "5.6 h",
    ]


def test_experts_that_are_measured_side_by_side_take_memory(planned, tmp_path, monkeypatch):
    """Statistics of a wave of experts, and the copies and solves of all of them. 1.82 GB above the
    libraries were measured of two of these blocks, with chunks of 4 MB instead of 64."""
    config = {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "dtype": "bfloat16",
        "hidden_size": 2048, "moe_intermediate_size": 512, "intermediate_size": 5632,
        "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 64, "vocab_size": 32000,
        "max_position_embeddings": 2048, "tie_word_embeddings": False,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = ["--method", "gptq", "--samples", "32", "--sequence-length", "512"]

    def peak():
        return planned(tmp_path, *options)["planned_peak_bytes"]

    in_waves = peak()
    assert 1.8e9 < in_waves < 2.1e9
    monkeypatch.setattr(experts, "WAVE_BYTES", 4 * experts.WAVE_BYTES)
    assert peak() > in_waves + 2 * experts.WAVE_BYTES / 4
