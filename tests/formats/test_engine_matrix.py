"""The script that asks every engine about every kind of result."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "engine_matrix.py"
# Of each folder it prints what is in it, and ends without a word where that is "die".
STAND_IN = """
import json, pathlib, sys
for folder in sys.argv[1:]:
    if folder.startswith("-"):
        break
    text = pathlib.Path(folder, "answer").read_text()
    if text == "die":
        sys.exit("out of memory")
    print("noise", flush=True)
    print(json.dumps({"folder": folder, "result": text, "worst": 0.25}), flush=True)
"""


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("engine_matrix", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # or its dataclasses cannot be made
    spec.loader.exec_module(module)
    return module


def folders_that_answer(root, *answers):
    folders = []
    for i, answer in enumerate(answers):
        folder = root / f"folder{i}"
        folder.mkdir()
        (folder / "answer").write_text(answer)
        folders.append(str(folder))
    return folders


def test_an_engine_that_dies_goes_on_with_the_next_folder(script, tmp_path, monkeypatch):
    (tmp_path / "check.py").write_text(STAND_IN)
    monkeypatch.setattr(script, "CHECK", tmp_path / "check.py")
    folders = folders_that_answer(tmp_path, "equal", "die", "differs")
    found = list(script.answers(sys.executable, folders, ["--engine", "x"]))
    assert [each["folder"] for each in found] == folders
    assert [each["result"] for each in found] == ["equal", "refused", "differs"]
    assert found[1]["reason"] == "the process ended (1): out of memory"


def test_an_engine_that_says_nothing_is_ended(script, tmp_path, monkeypatch):
    (tmp_path / "check.py").write_text("import time\ntime.sleep(60)")
    monkeypatch.setattr(script, "CHECK", tmp_path / "check.py")
    monkeypatch.setattr(script, "SECONDS", 0.2)
    (found,) = script.answers(sys.executable, folders_that_answer(tmp_path, "equal"), [])
    assert found["reason"].startswith("the process ended (-9)")


def test_the_table_has_a_row_for_each_result_and_the_reasons_below(script, tmp_path):
    results = script.Results(tmp_path / "results.json")
    engine = script.Engine.parse("an engine=/usr/bin/python:vllm")
    assert (engine.python, engine.key) == ("/usr/bin/python", "vllm")
    name = "an engine bfloat16"
    equal = {"result": "equal", "worst": 0.0123}
    results.keep("w8 / gptq", {"folder": "/b", "format": "gptq", name: equal})
    for row, folder in (("w2g64", "/c"), ("w3g64-asym", "/d")):
        reason = f"ValueError: {row[1]} bits in {folder}"
        refused = {"result": "refused", "reason": reason}
        results.keep(f"{row} / auto", {"folder": folder, "format": "x", name: refused})
    results.keep("w4g128 / auto", {"reason": "name the format"})
    differs = {"result": "differs", "worst": 0.25}
    results.keep("w4g128 / gptq", {"folder": "/a", "format": "gptq", name: differs})
    known = script.Results(tmp_path / "results.json")
    assert script.table(known, [engine], "bfloat16").splitlines() == [
        "| row | format | an engine |",
        "|---|---|---|",
        "| w4g128 | gptq | differs (0.25) |",
        "| w3g64-asym | x | refused (1) |",
        "| w2g64 | x | refused (1) |",
        "| w8 | gptq | equal (0.012) |",
        "",
        "- (1) an engine: ValueError: 3 bits in FOLDER",
    ]


@pytest.mark.slow
def test_llmq_agrees_with_itself_and_nothing_is_run_twice(
    script, tmp_path, monkeypatch, capsys, model_folder
):
    rows = {"w4": ["--bits", "4", "--group-size", "32"]}
    monkeypatch.setattr(script, "ROWS", rows)
    command = ["x", str(model_folder()), str(tmp_path / "work")]
    command += [f"--engine=llmq={sys.executable}:llmq", "--format=auto", "--format=awq"]
    monkeypatch.setattr(sys, "argv", command)
    script.main()
    written = capsys.readouterr().out
    assert "| w4 | compressed-tensors | equal (" in written
    assert "| w4 | awq | equal (" in written
    known = json.loads((tmp_path / "work" / "results.json").read_text())
    assert known["w4 / awq"]["llmq bfloat16"]["worst"] > 0
    monkeypatch.setattr(script, "CHECK", tmp_path / "is not run")
    monkeypatch.setattr(script, "run_llmq", None)
    script.main()
    assert capsys.readouterr().out == written
