"""The script that decodes whole models runs, on a small one."""

import importlib.util
from pathlib import Path

import pytest

from llmq_kernels.compiled import jit

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "benchmark_decode.py"
SMALL = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
}


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("benchmark_decode", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "SHAPE", SMALL)
    monkeypatch.setattr(module, "PROMPT", 8)
    return module


@pytest.mark.parametrize("engine", ["bfloat16", "llmq, exact", "llmq, int8, 8-bit head"])
def test_engines(script, engine):
    if reason := jit.missing():
        pytest.skip(reason)
    import torch

    result = script.measure(engine, torch.get_num_threads(), 4)
    assert result["decode"] > 0
    assert result["prefill"] > 0
    n_layers = (
        sum(
            SMALL[key] * width
            for key, width in (("hidden_size", 4 * 256), ("intermediate_size", 3 * 256))
        )
        * 2
    )
    assert (result["weights"] < n_layers) == (engine != "bfloat16"), (
        "packed weights take less than a byte each"
    )


def test_the_file_for_llama_cpp_has_the_same_shapes(script, tmp_path):
    gguf = pytest.importorskip("gguf", reason="needs the gguf extra")
    script.write_gguf(tmp_path / "model.gguf")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert len(tensors) == 3 + 2 * 9
    assert list(tensors["blk.0.ffn_gate.weight"].shape) == [256, 512]
    assert tensors["output.weight"].tensor_type == gguf.GGMLQuantizationType.Q6_K
