"""The worked example of training an adapter on a quantized folder runs, on a small one."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from llmq.commands.cli import main

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "lora_finetune.py"


@pytest.mark.slow
def test_training_lowers_the_loss_and_merging_keeps_it(tmp_path, monkeypatch, capsys):
    pytest.importorskip("peft", reason="the script trains adapters of PEFT")
    pytest.importorskip("trl", reason="the script trains with TRL")
    spec = importlib.util.spec_from_file_location("lora_finetune", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    folder, out, texts = tmp_path / "q", tmp_path / "out", tmp_path / "texts.txt"
    assert main(["quantize", "tiny", str(folder), "--method", "rtn"]) == 0
    texts.write_text("\n".join(f"def f{i}(x): return x + {i}" for i in range(16)))
    arguments = [str(folder), str(out), "--texts", str(texts), "--steps", "4"]
    options = ["--sequence-length", "32", "--dtype", "float32", "--learning-rate", "3e-3"]
    monkeypatch.setattr(sys, "argv", ["lora_finetune.py", *arguments, *options])
    capsys.readouterr()
    script.main()
    report = json.loads(capsys.readouterr().out)
    assert len(report["losses"]) == 4
    assert report["losses"][-1] < report["losses"][0]
    scores = report["perplexity"]
    assert scores["adapter"] < scores["base"]
    assert scores["merged"] < scores["base"]
    assert main(["verify", str(out)]) == 0
