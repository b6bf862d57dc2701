"""`llmq advise` and `llmq sweep` on the bundled model."""

import json

import pytest

from llmq.commands.advise import share
from llmq.commands.cli import main

TEXT = ["--max-windows", "4", "--sequence-length", "64"]
QUICK = [*TEXT, "--samples", "4", "--calibration-length", "64"]


def run(capsys, *arguments):
    code = main([*map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_advice_and_its_command(tmp_path, capsys):
    options = ["--max-loss", "8%", "--methods", "rtn", "--work-dir", tmp_path / "work"]
    code, found = run(capsys, "advise", "tiny", *options, *QUICK)
    assert code == 0
    points = {point["rung"]: point for point in found["points"]}
    assert points[found["recommended"]]["loss_ci95"][1] <= 0.08
    assert points[found["next_smaller"]]["loss_ci95"][1] > 0.08
    assert found["next_smaller"] == found["points"][-1]["rung"]
    folders = [path for path in (tmp_path / "work").iterdir() if path.is_dir()]
    assert [str(path) for path in folders] == [found["folder"]]
    assert (folders[0] / "llmq-manifest.json").is_file()
    assert main([*found["command"].replace("OUT", str(tmp_path / "out")).split()[1:]]) == 0
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert written["stored_bytes"] == points[found["recommended"]]["n_bytes"]


def test_a_sweep_leaves_a_page_a_table_and_figures(tmp_path, capsys):
    rungs = ["--rung", "w8:rtn", "--rung", "w4g128:rtn", "--rung", "w3g128:rtn"]
    arguments = ["sweep", "tiny", tmp_path / "sweep", *rungs, *QUICK]
    code, found = run(capsys, *arguments, "--plot", tmp_path / "sweep.png")
    assert code == 0
    assert found["front"] == ["w3g128:rtn", "w4g128:rtn", "w8:rtn"]
    assert json.loads((tmp_path / "sweep" / "sweep.json").read_text())["points"] == found["points"]
    assert "<svg" in (tmp_path / "sweep" / "sweep.html").read_text()
    assert (tmp_path / "sweep.png").stat().st_size > 5000
    assert main([*map(str, arguments)]) == 0
    assert "| **w8** | rtn |" in capsys.readouterr().out


@pytest.mark.parametrize(("text", "value"), [("1%", 0.01), (".05", 0.05), ("20%", 0.2)])
def test_shares(text, value):
    assert share(text) == pytest.approx(value)


def test_what_is_refused(capsys, tmp_path):
    code, found = run(capsys, "advise", "tiny", "--max-loss", "much")
    assert code == 2
    assert "expected a share above 0, such as 1% or .01, got 'much'" in found["error"]
    code, found = run(capsys, "advise", "tiny", "--methods", "rtn,gpqt")
    assert "did you mean gptq?" in found["error"]
    code, found = run(capsys, "sweep", "tiny", tmp_path / "x", "--rung", "w9")
    assert code == 2
