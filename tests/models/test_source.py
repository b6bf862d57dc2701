"""A model is opened once per command: its config is parsed once, its headers are read once."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, DeepseekV3Config

import llmq
from llmq.commands.cli import main
from llmq.errors import LlmqError
from llmq.models import shards
from llmq.models.source import Source, meta_model
from llmq.recipe import Recipe


@pytest.fixture
def reads(monkeypatch):
    """Counts of what is read, by what it is and its folder."""
    counts: Counter = Counter()
    read_header, from_pretrained = shards.read_header, AutoConfig.from_pretrained

    def counted_header(path):
        counts["headers", Path(path).parent] += 1
        return read_header(path)

    def counted_config(folder, *args, **kwargs):
        counts["config", Path(folder)] += 1
        return from_pretrained(folder, *args, **kwargs)

    monkeypatch.setattr(shards, "read_header", counted_header)
    monkeypatch.setattr(AutoConfig, "from_pretrained", counted_config)
    return counts


COMMANDS = {
    "inspect": ["inspect", "MODEL"],
    "eval": ["eval", "MODEL", "--data", "TEXT", "--sequence-length", "32", "--max-windows", "2"],
    "compare": [
        *("compare", "MODEL", "QUANTIZED", "--data", "TEXT"),
        *("--sequence-length", "32", "--max-windows", "2"),
    ],
    "generate": ["generate", "MODEL", "--prompt", "def", "--max-new-tokens", "2"],
    "quantize": ["quantize", "MODEL", "OUT", "--method", "rtn", "--group-size", "32"],
    "qat": [
        *("qat", "MODEL", "OUT", "--train", "TEXT", "--scheme", "w4", "--group-size", "32"),
        *("--max-steps", "1", "--batch-size", "1", "--sequence-length", "32"),
    ],
}


@pytest.mark.parametrize(
    "command",
    ["inspect", "eval", "compare", "generate", "quantize", "qat"],
)
def test_a_command_opens_its_model_once(command, reads, model_folder, calibration_file, tmp_path):
    folder = model_folder()
    places = {"MODEL": folder, "OUT": tmp_path / "out", "TEXT": calibration_file}
    if "QUANTIZED" in COMMANDS[command]:
        places["QUANTIZED"] = quantized_folder(tmp_path)
    reads.clear()
    assert main([str(places.get(word, word)) for word in COMMANDS[command]]) == 0
    opened = {key: n for key, n in reads.items() if key[1] == folder}
    assert opened == {("config", folder): 1, ("headers", folder): 1}


def quantized_folder(tmp_path) -> Path:
    from conftest import make_model

    model = make_model()
    llmq.quantize(model, Recipe.uniform("w4g32", method="rtn"))
    return llmq.save(model, tmp_path / "quantized")


def test_a_quantized_folder_is_read_once(reads, tmp_path):
    folder = quantized_folder(tmp_path)
    reads.clear()
    llmq.load(folder)
    assert reads == {("config", folder): 1, ("headers", folder): 1}


@pytest.mark.parametrize("function", [llmq.perplexity, llmq.generate])
def test_a_function_of_python_opens_a_named_model_once(function, reads, model_folder):
    folder = model_folder()
    reads.clear()
    options = {"sequence_length": 16} if function is llmq.perplexity else {"max_new_tokens": 2}
    function(str(folder), "def main():\n    pass\n" * 8, **options)
    assert reads == {("config", folder): 1, ("headers", folder): 1}


def test_what_a_source_says_of_itself(model_folder):
    source = Source.open(str(model_folder()))
    assert Source.open(source) is source
    assert source.config is source.config
    assert source.name == "model"
    assert source.weight_names == {"model.safetensors"}
    assert source.weight_bytes == (source.folder / "model.safetensors").stat().st_size
    assert "tokenizer.json" in source.companions.files
    assert source.shards.dtypes.keys() == source.shards.shapes.keys()
    source.files.check()


def test_loading_leaves_an_open_source_as_it_was(tmp_path):
    source = Source.open(quantized_folder(tmp_path))
    before = source.config.to_dict()
    first, second = llmq.load(source), llmq.load(source)
    assert source.config.to_dict() == before
    tokens = torch.arange(1, 9)[None]
    assert torch.equal(first(tokens).logits, second(tokens).logits)


def test_a_folder_without_a_config_is_none(tmp_path):
    with pytest.raises(LlmqError, match=r"no config\.json"):
        Source.open(tmp_path)


def test_a_model_of_terabytes_is_built_without_weights():
    """Experts lie on the meta device from the first, tables of positions do not."""
    config = DeepseekV3Config(
        num_hidden_layers=1, first_k_dense_replace=0, moe_intermediate_size=1 << 18
    )
    model = meta_model(config)
    assert sum(4 * each.numel() for each in model.parameters()) > 5e12
    assert all(each.is_meta for each in model.parameters())
    assert not any(each.is_meta for name, each in model.named_buffers() if "inv_freq" in name)
