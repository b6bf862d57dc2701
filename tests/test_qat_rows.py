"""The figures that the table of quantization-aware training draws from its runs."""

import importlib
import json
import math
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("qat_rows")


def result(gap, kind="ptq", scheme="w4", method="gptq", n_bytes=100, seconds=10.0):
    """Windows that all have the same gap, so that intervals have no width."""
    base = [2.0, 3.0, 4.0]
    windows = {"base_nll": base, "quant_nll": [nll + gap for nll in base], "kl": [0.1] * 3}
    figures = {"windows": windows, "base_perplexity": math.exp(3), "kl_mean": 0.1}
    figures["kl_by_position"] = {"first": {"mean": 0.5}}
    figures["quant_perplexity"] = math.exp(3 + gap)
    run = {"kind": kind, "scheme": scheme, "method": method}
    took = {"from_start": True, "processor_seconds": seconds, "wall_seconds": seconds}
    return {"run": run, "figures": {"text": figures}, "bytes": n_bytes, "took": took}


RESULTS = {
    "control": result(-0.02, "control", "", ""),
    "ptq-w8a8-rtn": result(0.001, scheme="w8a8", method="rtn", n_bytes=200),
    "ptq-w4-rtn": result(0.2, method="rtn"),
    "ptq-w4-gptq": result(0.1),
    "qat-w4-gptq": result(0.01, "qat", seconds=12.0),
}


def test_a_perplexity_against_another_on_the_same_windows(script):
    for other, gap in ((None, 0.01), (RESULTS["control"], 0.03)):
        found = script.against(RESULTS["qat-w4-gptq"], other)
        assert found == pytest.approx([math.exp(gap) - 1] * 3, abs=1e-6)


def test_what_training_takes_away_of_what_gptq_adds(script):
    share = script.recovered(RESULTS["ptq-w4-gptq"], RESULTS["qat-w4-gptq"])
    assert share == pytest.approx(0.9)


def test_claims_are_of_the_runs_that_there_are(script):
    about = {"bytes": 400, "tokens": 1000, "trained_tokens": 10_000}
    found = script.claims(RESULTS, about)
    assert found["of what GPTQ adds at w4, QAT takes away"] == "90%"
    assert found["weight files at w8a8"] == "50% of the source's"
    assert found["tokens of QAT"] == "1,000, 0.1 of the model's training"
    assert found["time of QAT at w4, of plain fine-tuning's"] == "1.20"
    assert found["QAT at 4 bits against PTQ at INT8 with activations"].startswith("+0.90%")
    assert not any("W4A8KV8" in claim for claim in found)
    control = RESULTS["control"]
    went_on = {**control, "took": {**control["took"], "from_start": False}}
    on_gpu = {**control, "key": {"device": "cuda"}}
    for other in (went_on, on_gpu):
        found = script.claims({**RESULTS, "control": other}, about)
        assert not any("time of" in claim for claim in found)


def test_a_column_for_every_folder(script, tmp_path):
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
        about = {"model": folder.name, "bytes": 400, "tokens": 8, "trained_tokens": None}
        (folder / "about.json").write_text(json.dumps(about))
        lines = [json.dumps(each) for each in RESULTS.values()]
        (folder / "results.jsonl").write_text("\n".join(lines))
    page = script.page(folders)
    assert page.splitlines()[0] == "| | one | two |"
    assert "| of what GPTQ adds at w4, QAT takes away | 90% | 90% |" in page


def test_the_table_has_every_run(script):
    found = script.table(RESULTS, ["text"]).splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in found[3:]] == list(RESULTS)


def test_generated_text_has_no_control(script):
    found = {name: each for name, each in RESULTS.items() if name != "control"}
    lines = script.table(found, ["text"]).splitlines()
    assert len(lines) == 3 + len(found)
    assert all(line.count("|") == lines[0].count("|") for line in lines)
    about = {"bytes": 400, "tokens": 1000, "trained_tokens": None}
    assert "of what GPTQ adds at w4, QAT takes away" in script.claims(found, about)
    assert not any("fine-tuning" in claim for claim in script.claims(found, about))


def test_samples_are_a_line_each(script):
    assert script.samples({"a": "one\n\ntwo"}).strip() == "**a**: one two"
