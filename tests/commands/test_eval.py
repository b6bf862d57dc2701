"""What `llmq eval` says of a protocol and of tasks, and the options that go with neither."""

import json

import pytest

from llmq.commands import task_scores
from llmq.commands.cli import main
from llmq.evaluation.protocols import PROTOCOLS

TEXT = "\n".join(f"line {i}: value = {i * i % 97}" for i in range(200))


@pytest.fixture
def evaluate(tmp_path, model_folder, capsys):
    """A function that runs `llmq eval` on a small model and returns (code, stdout, stderr)."""
    folder, path = model_folder(), tmp_path / "text.jsonl"
    rows = [{"text": TEXT}, {"text": "other words"}]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))

    def run(*options, has_text=True):
        capsys.readouterr()
        text = ("--data", str(path), "--sequence-length", "32") if has_text else ()
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--limit", "3"], "--limit goes with --tasks; leave it out"),
        (["--chat-template"], "--chat-template goes with --tasks"),
        (["--tasks", "x", "--bos", "none"], "--bos goes with a text, not with --tasks"),
        (["--tasks", "x", "--protocol", "words"], "--protocol goes with a text"),
        (["--tasks", " , "], "--tasks: expected names or YAML files, got none"),
        (["--tasks", "x"], "--tasks: lm-eval is not installed; pip install '.[eval]'"),
        (["--stride", "4"], "--stride 4: protocol gptq has none; use --protocol strided"),
    ],
    ids=" ".join,
)
def test_options_that_do_not_go_together(evaluate, monkeypatch, options, message):
    if message.startswith("--tasks: lm-eval"):
        monkeypatch.setattr("llmq.evaluation.tasks.find_spec", lambda name: None)
    else:
        monkeypatch.setattr("llmq.evaluation.tasks.check_installed", lambda: None)
    code, stdout, stderr = evaluate(*options, has_text=False)
    assert (code, stdout, stderr.count("\n")) == (2, "", 1)
    assert message in stderr


def test_the_table_of_tasks(monkeypatch):
    score = {"metric": "acc", "filter": "none", "value": 0.5, "stderr": 0.125}
    task = {"task": "sums", "n_shot": 0, "questions": 4, "questions_of_task": 9}
    summary = {
        "tasks": [{**task, "tokens_per_answer": None, "scores": [score]}],
        "lm_eval_version": "0.4.13",
        "sequence_length": 256,
        "bos": "none",
        "chat_template": True,
        "dtype": "float32",
        "compute": "exact",
        "head_bits": None,
    }
    assert task_scores.text_of(summary).splitlines() == [
        "task  metric   value  standard error  shots  questions",
        "----  ------  ------  --------------  -----  ---------",
        "sums  acc     0.5000          0.1250      0     4 of 9",
        "",
        "lm-eval 0.4.13, texts up to 256 tokens, BOS none, chat template, float32, compute exact",
    ]
    written = {"metric": "f1", "filter": "strict", "value": 0.25, "stderr": None}
    said = {**task, "task": "said", "tokens_per_answer": 12.25, "scores": [written]}
    line = task_scores.text_of({**summary, "tasks": [said]}).splitlines()[2]
    assert line.split() == ["said", "f1", "(strict)", "0.2500", "-", "0", "4", "of", "9", "12.2"]
