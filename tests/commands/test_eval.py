"""What `llmq eval` says of a protocol."""

import json

import pytest

from llmq.commands.cli import main
from llmq.evaluation.protocols import PROTOCOLS

TEXT = "\n".join(f"line {i}: value = {i * i % 97}" for i in range(200))


@pytest.fixture
def evaluate(tmp_path, model_folder, capsys):
    """A function that runs `llmq eval` on a small model and returns (code, stdout, stderr)."""
    folder, path = model_folder(), tmp_path / "text.jsonl"
    rows = [{"text": TEXT}, {"text": "other words"}]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))

    def run(*options):
        capsys.readouterr()
        text = ("--data", str(path), "--sequence-length", "32")
        code = main(["eval", str(folder), *text, *options])
        return code, *capsys.readouterr()

    return run


SAID = {
    "gptq": "protocol gptq at 32, BOS none",
    "strided": "protocol strided at 32 with stride 16, BOS none",
    "llamacpp": "protocol llamacpp at 32, BOS none",
    "words": "in 2 documents, protocol words at 32, BOS start",
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_text_and_json_say_protocol_and_bos(evaluate, protocol):
    code, stdout, _ = evaluate("--protocol", protocol, "--json")
    report = json.loads(stdout)
    assert code == 0
    assert report["protocol"] == protocol
    assert report["ci95"][0] <= report["perplexity"] <= report["ci95"][1]
    text = evaluate("--protocol", protocol)[1]
    assert SAID[protocol] in text
    assert f"{report['bits_per_byte']:.4f} bits per byte" in text
    assert f"perplexity {report['perplexity']:.4f}" in text
    assert text.startswith("word perplexity" if protocol == "words" else "perplexity")


def test_windows_that_are_left_out_are_not_counted(evaluate):
    _, stdout, _ = evaluate(
        "--protocol", "strided", "--stride", "8", "--max-windows", "3", "--json"
    )
    report = json.loads(stdout)
    assert (report["windows"], report["stride"], report["tokens"]) == (3, 8, 31 + 2 * 8)
    _, stdout, _ = evaluate("--protocol", "words", "--max-windows", "1", "--json")
    report = json.loads(stdout)
    assert (report["documents"], report["documents_of_text"]) == (1, 2)
    assert report["ci95"] is None
    assert "one document, no interval" in evaluate("--protocol", "words", "--max-windows", "1")[1]
