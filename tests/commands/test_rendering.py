"""Notes, tables and lines of a command's text."""

import json
import sys

import pytest

from llmq.commands import rendering
from llmq.commands.cli import main

KINDS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")


def test_notes_that_say_the_same_are_one_line_with_their_count():
    notes = {f"model.layers.{i}.{kind}": "too wide" for i in range(30) for kind in KINDS}
    notes |= {"model.layers.7.mlp.down_proj": "kept", "format gptq": "no bias"}
    assert rendering.note_lines(notes) == [
        "note: 90 layers, model.layers.*.self_attn.{q_proj,k_proj}, model.layers.*.mlp.up_proj: "
        "too wide",
        "note: model.layers.7.mlp.down_proj: kept",
        "note: format gptq: no bias",
    ]


def test_lines_are_broken_for_a_terminal_only(monkeypatch):
    pairs = {"name": "word " * 30, "other": "-"}
    assert rendering.render_pairs(pairs).count("\n") == 1
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "40")
    lines = rendering.render_pairs(pairs).splitlines()
    assert len(lines) > 3
    assert max(map(len, lines)) <= 40
    assert all(line.startswith((" " * 7, "name   ", "other  ")) for line in lines)


def test_comparison_fits_in_80_columns(capfd, monkeypatch, model_folder):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    folder = str(model_folder())
    command = ["compare", folder, folder, "--max-windows", "2", "--sequence-length", "16"]
    assert main(command) == 0
    out, err = capfd.readouterr()
    assert "KL, mean" in out
    assert max(map(len, out.splitlines())) <= 80
    assert "Loading weights" not in err
    assert "windows 0/2" in err
    assert main([*command, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["kl_mean"] == pytest.approx(0, abs=1e-9)
