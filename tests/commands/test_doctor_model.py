"""`llmq doctor MODEL`: what would become of a model, from its config alone."""

import json

import pytest
from conftest import make_model

from llmq.commands.cli import main


def doctor(capsys, *arguments):
    code = main(["doctor", *map(str, arguments)])
    assert code == 0
    return capsys.readouterr().out


@pytest.fixture
def hybrid(tmp_path):
    """A folder with a config and nothing else."""
    make_model("qwen3_5_text").config.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text()) | {"architectures": ["Qwen3_5ForCausalLM"]}
    path.write_text(json.dumps(config))
    return tmp_path / "model"


def test_what_is_quantized_what_is_kept_and_why(hybrid, capsys):
    found = json.loads(doctor(capsys, hybrid, "--json"))
    assert found["refusal"] is None
    assert not found["has_weights"]
    assert found["class"] == "Qwen3_5ForCausalLM"
    assert "model.layers.0.linear_attn.in_proj_qkv" in found["quantized"]
    (reason,) = [
        reason for reason, names in found["kept"].items() if any("in_proj_a" in n for n in names)
    ]
    assert "rates at which a state decays" in reason
    assert found["formats"]["compressed-tensors"] == "holds all of it"
    text = doctor(capsys, hybrid)
    assert "in_proj_a" in text
    assert "none in this folder" in text


def test_what_cannot_be_quantized_is_a_result(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "vit", "architectures": ["ViTModel"]}')
    found = json.loads(doctor(capsys, tmp_path, "--json"))
    assert "not a causal language model" in found["refusal"]
    assert found["quantized"] == []
    assert "cannot be quantized" in doctor(capsys, tmp_path)
