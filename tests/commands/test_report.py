"""`llmq report`, and the page that `compare` leaves."""

import json
import shutil

import pytest

import llmq
from llmq.commands.cli import main
from llmq.reports.page import PAGE

SHORT = ["--max-windows", "4", "--sequence-length", "32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "out"
    llmq.quantize("tiny", out, "w4g128", method="rtn")
    return out


def run(capsys, *arguments):
    code = main([*map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_a_page_with_a_comparison_and_texts(folder, tmp_path, capsys):
    page = tmp_path / "page.html"
    arguments = ["--base", "tiny", "--prompt", "import os", "--max-new-tokens", "4"]
    code, found = run(capsys, "report", folder, *arguments, "--out", page, *SHORT)
    assert code == 0
    (sample,) = found["samples"]
    assert sample["before"] == llmq.generate("tiny", "import os", 4)
    assert sample["after"] == llmq.generate(folder, "import os", 4)
    text = page.read_text()
    assert f"{found['comparison']['quant_perplexity']:.3f}" in text
    assert "What both write" in text


def test_without_a_base_it_says_what_is_not_on_it(folder, capsys):
    assert main(["report", str(folder)]) == 0
    assert "--base MODEL adds them" in " ".join(capsys.readouterr().out.split())
    assert "compared on" not in (folder / PAGE).read_text()


def test_a_comparison_stands_on_the_page_of_the_folder(folder, capsys):
    code, found = run(capsys, "compare", "tiny", folder, *SHORT)
    assert code == 0
    assert found["page"] == str(folder / PAGE)
    assert "compared on" in (folder / PAGE).read_text()


@pytest.mark.parametrize("damaged", ["{", "[]", '{"model": 1, "layers": 3}', "\xff"])
def test_a_report_that_was_edited_costs_the_page_alone(folder, tmp_path, capsys, damaged):
    other = shutil.copytree(folder, tmp_path / "edited")
    (other / "report.json").write_text(damaged, "latin-1")
    code, found = run(capsys, "compare", "tiny", other, "--no-verify", *SHORT)
    assert (code, found["page"]) == (0, None)
    assert "report.json: no page can be made of it" in found["page_skipped"]
    for asked in (["report", other], ["compare", "tiny", other, "--no-verify", "--page", "x"]):
        code, found = run(capsys, *asked)
        assert code == 2
        assert "no page can be made of it" in found["error"]


def test_a_folder_of_another_tool_gets_no_page(folder, tmp_path, capsys):
    llmq.save(llmq.load(folder), tmp_path / "saved")
    code, found = run(capsys, "compare", "tiny", tmp_path / "saved", *SHORT)
    assert (code, found["page"]) == (0, None)
    assert not (tmp_path / "saved" / PAGE).exists()
    code, found = run(capsys, "report", tmp_path / "saved")
    assert code == 2
    assert "there is no report.json" in found["error"]
