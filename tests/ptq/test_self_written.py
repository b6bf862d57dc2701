"""Text that a model writes to be calibrated on: by seed, kept, told of, and not written for a
plan."""

import json

import pytest
import torch

from llmq.commands.cli import main
from llmq.errors import LlmqError
from llmq.models.source import Source
from llmq.ptq import self_written
from llmq.recipe import Recipe
from llmq.text.documents import read_text


def test_a_model_is_quantized_on_its_own_text(model_folder, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("LLMQ_CACHE_DIR", str(tmp_path / "cache"))
    options = ["--calibration", "self", "--samples", "3", "--sequence-length", "16"]
    folder, out = str(model_folder()), str(tmp_path / "out")
    assert main(["plan", folder, *options, "--json"]) == 0
    assert not (tmp_path / "cache" / "text").exists()
    assert json.loads(capsys.readouterr().out)["planned_peak_bytes"] > 0
    assert main(["quantize", folder, out, *options, "--json"]) == 0
    found = capsys.readouterr()
    text = json.loads(found.out)["calibration"]["text"]
    assert text["source"] == "self"
    assert text["rows"] == 3
    assert text["written"]["seed"] == 0
    assert "text of the model's own 11/11" in found.err  # 8 of them held out


def test_what_was_written_is_read_again(model_folder, monkeypatch, tmp_path):
    monkeypatch.setenv("LLMQ_CACHE_DIR", str(tmp_path))
    source = Source.open(model_folder())
    recipe = Recipe(samples=3, sequence_length=8)
    first = self_written.self_written(source, recipe, "cpu")
    assert first.tokens.shape == (3, 8)
    other = self_written.self_written(source, Recipe(samples=3, sequence_length=8, seed=1), "cpu")
    assert not torch.equal(first.tokens, other.tokens)
    monkeypatch.setattr(self_written, "load", None)  # the model is needed no more
    again = self_written.self_written(source, recipe, "cpu")
    assert again.sha256 == first.sha256


def test_it_is_no_text_to_be_judged_by():
    with pytest.raises(LlmqError, match="not to be judged by"):
        read_text("self", "eval")
