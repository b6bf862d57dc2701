"""`llmq compare` by class of position, and on multiple choice."""

import json

import pytest

from llmq.commands.cli import main

QUESTIONS = [
    {"question": f"line {i}: the value is", "choices": ["one", "two", "six"], "answer": i % 3}
    for i in range(12)
]


@pytest.fixture
def compare(model_folder, capsys, calibration_file):
    """A function that compares a small model with another and returns (code, stdout, stderr)."""
    base, quant = model_folder(), model_folder(name="other", seed=1)
    text = ["--data", str(calibration_file), "--sequence-length", "32", "--max-windows", "4"]

    def run(*options):
        capsys.readouterr()
        code = main(["compare", str(base), str(quant), *text, *map(str, options)])
        return code, *capsys.readouterr()

    return run


def test_changed_answers_in_text_and_json(compare, tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in QUESTIONS))
    code, stdout, stderr = compare("--choices", path, "--json")
    assert code == 0, stderr
    found = json.loads(stdout)["choices"]
    assert (found["file"], found["questions"], found["bos"]) == ("questions.jsonl", 12, "none")
    worse, better = found["right_to_wrong"], found["wrong_to_right"]
    assert worse, "a model of other weights that answers alike"
    assert better
    n_right = round(found["base_accuracy"] * 12)
    assert round(found["quant_accuracy"] * 12) == n_right - len(worse) + len(better)
    for flip in (*worse, *better):
        assert flip["right"] == QUESTIONS[flip["row"]]["answer"]
        assert flip["right"] in (flip["base"], flip["quant"])
    text = compare("--choices", path)[1]
    assert f"{found['base_accuracy']:.2%} -> {found['quant_accuracy']:.2%} of 12 questions" in text
    assert f"{len(worse)} right to wrong" in text
    assert f"McNemar's exact test p = {found['mcnemar_p']:.3g}" in text
    assert "choices, quantized 36/36" in stderr


def test_perplexity_and_divergence_by_position(compare):
    code, stdout, _ = compare("--json")
    report = json.loads(stdout)
    assert code == 0
    assert "choices" not in report
    found = report["perplexity_by_position"]
    assert found.keys() == report["kl_by_position"].keys() >= {"first", "other"}
    text = compare()[1]
    assert f"first {found['first']['base']:.4g} -> {found['first']['quant']:.4g}" in text


def test_a_file_that_holds_no_questions_is_refused_before_anything_runs(compare, tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"question": "q", "choices": ["a"], "answer": 0}\n')
    code, stdout, stderr = compare("--choices", path)
    assert (code, stdout, stderr.count("\n")) == (2, "", 1)
    assert "row 0: expected two or more texts in 'choices'" in stderr
