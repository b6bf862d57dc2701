"""The worked example of quantization-aware training on chats with TRL runs, on a small model."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest

import llmq
from llmq.commands.cli import main
from llmq.models.source import resolve

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "qat_sft.py"
TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"


@pytest.fixture
def chat_model(tmp_path):
    """The bundled model, whose tokenizer has a chat template."""
    folder = tmp_path / "tiny-chat"
    shutil.copytree(resolve("tiny"), folder)
    tokenizer = llmq.load_tokenizer(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--lora-rank", "8"]])
def test_training_lowers_the_loss_and_the_folder_is_whole(
    options, chat_model, tmp_path, monkeypatch, capsys
):
    pytest.importorskip("trl", reason="the script trains with TRL")
    spec = importlib.util.spec_from_file_location("qat_sft", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    chats = tmp_path / "chats.jsonl"
    rows = [
        [
            {"role": "user", "content": f"What is {i} plus {i + 1}?"},
            {"role": "assistant", "content": f"{i} plus {i + 1} is {2 * i + 1}."},
        ]
        for i in range(64)
    ]
    chats.write_text("\n".join(json.dumps({"messages": row}) for row in rows))
    out = tmp_path / "out"
    arguments = [str(chat_model), str(out), "--data", str(chats), "--recipe", "w2g64-asym"]
    sizes = ["--steps", "6", "--batch-size", "2", "--sequence-length", "128"]
    monkeypatch.setattr(sys, "argv", ["qat_sft.py", *arguments, *sizes, *options])
    capsys.readouterr()
    script.main()
    report = json.loads(capsys.readouterr().out)
    assert len(report["losses"]) == 6
    assert report["losses"][-1] < 0.9 * report["losses"][0]
    assert max(report["flip_rates"]) > 0
    assert main(["verify", str(out)]) == 0
