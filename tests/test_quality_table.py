"""The benchmark of quality: what identifies a run, paired intervals, the table, and runs that fail
or are there already. Other tools are not needed: a peer here is an interpreter that copies."""

import argparse
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
# In place of another environment: says what it has, refuses to be GPTQModel, and writes what was
# written before, with a line in a log for every run.
PEER = """#!{python} -IS
import json, pathlib, shutil, sys
if sys.argv[1] == "-c":
    print(json.dumps(dict.fromkeys(sys.argv[3:], "1.0")))
    sys.exit()
_, tool, _, out, *options = sys.argv[1:]
with open("{log}", "a") as file:
    file.write(" ".join([tool, *options]) + chr(10))
if tool == "gptqmodel":
    sys.exit("no such thing as 3 bits")
shutil.copytree("{written}", out)
usage = {{"processor_seconds": 2.5, "peak_megabytes": 100}}
pathlib.Path(options[options.index("--usage") + 1]).write_text(json.dumps(usage))
"""


@pytest.fixture
def script(monkeypatch):
    """A function that imports a script by its name."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module


def test_a_tool_is_a_name_a_label_and_options(script):
    parse = script("quality_runs").Tool.parse
    assert str(parse("gptq")) == "gptq"
    assert str(parse('blockwise@old:{"iterations": 3}')) == "blockwise@old (iterations 3)"
    assert parse("autoround:best").options == {"iters": 1000}
    assert parse("autoround") == parse("autoround:default") == parse('autoround:{"iters": 200}')
    assert parse("autoround").options == parse("autoround:default").options == {"iters": 200}
    assert parse("gptq").needs_seeds
    assert not parse("rtn").needs_seeds
    for wrong in ("awq", "gptq:best", "gptq:{", "autoround@old", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="expected"):
            parse(wrong)


def test_a_text_has_a_name_and_perhaps_a_number_of_windows(script):
    parse = script("quality_runs").Text.parse
    assert (parse("a b=c.txt:60").source, parse("a b=c.txt:60").n_windows) == ("c.txt", 60)
    assert (parse("w=wikitext:train").source, parse("w=wikitext:train").n_windows) == (
        "wikitext:train",
        None,
    )
    with pytest.raises(argparse.ArgumentTypeError, match="expected NAME=SOURCE"):
        parse("c.txt")


@pytest.mark.parametrize(("family", "bos"), [("llama", "none"), ("gemma3_text", "every-window")])
def test_windows_begin_with_bos_where_a_family_needs_it(
    script, model_folder, calibration_file, family, bos
):
    text = script("quality_runs").Text("code", str(calibration_file), 5)
    found = text.windows(model_folder(family), 32)
    assert found.bos == bos
    assert found.tokens.shape == (5, 32)
    assert (len(found.tokens[:, 0].unique()) == 1) == (bos == "every-window")


def test_only_code_that_does_something_else_is_other_code(script):
    text_of = script("quality_runs").without_docstrings
    plain = "def f(x):\n    return x\n"
    said = '"""Module."""\n# why\ndef f(x):\n    """F."""\n    return x  # x\n'
    assert text_of(plain) == text_of(said)
    assert text_of(plain) != text_of(plain.replace("return x", "return -x"))


def result(base, quant, **more):
    """A line as `quality_runs.measure` makes it, of one text."""
    base, quant = torch.as_tensor(base), torch.as_tensor(quant)
    figures = {
        "windows": {"base_nll": base.tolist(), "quant_nll": quant.tolist()},
        "base_perplexity": float(base.mean().exp()),
        "kl_mean": 0.2,
        "kl_by_position": {"first": {"n_positions": 1, "mean": 0.5}},
    }
    took = {"wall_seconds": 1.0, "processor_seconds": 2.0, "peak_megabytes": 3}
    return {"figures": {"t": figures}, "bytes": 10**6, "took": took, **more}


@pytest.fixture
def rows(script):
    """Two tools that lose the same in every window but for .01 to .02, and rounding."""
    row = script("quality_figures").Row
    generator = torch.Generator().manual_seed(0)
    base = 3 + torch.rand(40, generator=generator)
    lost = torch.rand(40, generator=generator)
    more = 0.01 + 0.01 * torch.rand(40, generator=generator)
    found = {"gptq": lost, "llm-compressor": lost + more, "rtn": 2 * lost + 0.1}
    return [row("w3", name, name, [result(base, base + each)]) for name, each in found.items()]


def test_intervals_between_tools_are_paired(script, rows):
    interval = script("quality_figures").interval
    ours, peer, _ = rows
    low, high = interval(ours.draws)
    assert low < ours.gap < high
    assert interval(peer.draws)[0] < high, "the intervals of the two overlap"
    low, high = interval(ours.draws - peer.draws)
    assert -0.02 < low < high < -0.01
    assert ours.gap - peer.gap == pytest.approx((low + high) / 2, abs=1e-3)


def test_seeds_are_averaged_and_their_range_is_told(script):
    row = script("quality_figures").Row
    both = row("w3", "gptq", "gptq", [result([3.0, 3.0], [3.1, 3.3]), result([3.0] * 2, [3.2] * 2)])
    assert both.gap == pytest.approx(0.2)
    assert both.gaps["t"].tolist() == pytest.approx([0.15, 0.25])
    assert both.over_seeds() == pytest.approx((0.2, 0.2))


def test_the_table_compares_with_the_best_peer(script, rows):
    figures = script("quality_figures")
    lines = figures.table("w3", rows).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert {len(line) for line in cells} == {len(cells[0])}
    found = {line[0]: dict(zip(cells[0], line, strict=True)) for line in cells[2:]}
    assert found["llm-compressor"]["of the best GPTQ peer's"] == "1"
    assert found["gptq"]["of the best GPTQ peer's"].startswith("0.9")
    assert found["gptq"]["less the best peer's"].startswith("-0.01")
    assert "of the best tuning peer's" not in cells[0], "none of the rows is one"
    assert found["rtn"]["KL, first position"] == "0.5000"
    assert found["rtn"]["processor s"] == "2"


def test_layers_worse_than_rounding_are_named(script):
    layers = {"n": 7, "worse_than_rounding": 2, "largest": 1.25}
    row = script("quality_figures").Row
    (said,) = script("quality_figures").remarks(
        [row("w3", "gptq", "gptq", [result([3.0], [3.1], layers=layers)])]
    )
    assert "2 of 7 layers" in said
    assert "1.25 times" in said


@pytest.fixture
def written(script, tmp_path):
    """`tiny`, rounded to 3 bits by the script that runs are made of."""
    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps([list(range(16))]))
    tiny, usage = ROOT / "llmq" / "assets" / "tiny", tmp_path / "usage.json"
    shape = ["--tokens", str(ids), "--spec", "w3g64-asym", "--options", '{"method": "rtn"}']
    arguments = ["llmq", str(tiny), str(tmp_path / "written"), *shape, "--usage", str(usage)]
    script("quantize_with").main(arguments)
    assert json.loads(usage.read_text()).keys() == {"processor_seconds", "peak_megabytes"}
    return tmp_path / "written"


@pytest.fixture
def texts(calibration_file, tmp_path):
    """Arguments: short texts to calibrate and to measure on."""
    path = tmp_path / "text.txt"
    path.write_text(calibration_file.read_text()[:2000])
    return ["--calibration", str(path), "--text", f"code={path}:2", "--window-length", "64"]


def test_runs_fail_alone_and_are_not_repeated(script, written, texts, tmp_path, capsys):
    peer, log = tmp_path / "peer", tmp_path / "log"
    peer.write_text(PEER.format(python=sys.executable, log=log, written=written))
    peer.chmod(0o755)
    of_run = ["--samples", "2", "--sequence-length", "16"]
    of_run += ["--threads", str(torch.get_num_threads())]
    pythons = ["--python", f"gptqmodel={peer}", "--python", f"llm-compressor={peer}"]
    arguments = ["tiny", str(tmp_path / "work"), *texts, *of_run, *pythons]
    arguments += ["--tool", "llm-compressor", "--evaluate", f"mine={written}"]
    main = script("quality_table").main
    with pytest.raises(SystemExit, match=r"1 runs failed(.|\n)*no such thing as 3 bits"):
        main([*arguments, "--tool", "gptqmodel"])
    first = capsys.readouterr().out
    kinds = ["error" in json.loads(line) for line in lines_of(tmp_path / "work")]
    assert sorted(kinds) == [False, False, True]
    rows = [line for line in first.splitlines() if line.startswith(("| llm", "| mine"))]
    gaps = [row.split("|")[3] for row in rows]
    assert len(gaps) == 2
    assert gaps[0] == gaps[1], "the same folder"
    assert "| 100 |" in rows[0]

    main(arguments)
    assert capsys.readouterr().out == first
    assert len(lines_of(tmp_path / "work")) == 3
    assert [line.split()[0] for line in log.read_text().splitlines()] == [
        "llm-compressor",
        "gptqmodel",
    ]
    main([*arguments, "--seeds", "2"])
    assert len(lines_of(tmp_path / "work")) == 4, "another seed is another run of the peer"
    capsys.readouterr()

    known = ["--known", str(tmp_path / "work" / "results.jsonl")]
    main(["tiny", str(tmp_path / "other"), *arguments[2:], *known])
    assert capsys.readouterr().out == first
    assert not (tmp_path / "other" / "results.jsonl").exists()


def test_a_model_that_cannot_be_read_is_one_line(script, texts, tmp_path):
    with pytest.raises(SystemExit, match=r"^quality_table\.py: .*nowhere"):
        script("quality_table").main([str(tmp_path / "nowhere"), str(tmp_path / "work"), *texts])


def lines_of(work_dir):
    return (work_dir / "results.jsonl").read_text().splitlines()


def test_a_peer_without_an_environment_says_how_to_make_one(script, texts, tmp_path):
    arguments = ["tiny", str(tmp_path / "work"), "--tool", "autoround", *texts]
    with pytest.raises(SystemExit, match=r"install_peers\.sh DIR autoround"):
        script("quality_table").main(arguments)
