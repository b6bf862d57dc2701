"""What a run says of text that it was not calibrated on: the figures of `compare`, whatever the
family, and no other bytes."""

import json

import pytest
import torch
from conftest import families

from llmq.commands.cli import main
from llmq.evaluation.divergence import compare
from llmq.formats.load import load
from llmq.ptq import run as ptq_run
from llmq.ptq.job import prepare
from llmq.ptq.run import quantize_folder
from llmq.recipe import Recipe
from llmq.text.held_out import free_windows, window_starts
from llmq.text.windows import Windows


def recipe(**options):
    return Recipe.uniform("w4g32", samples=4, sequence_length=32, **options)


@pytest.mark.parametrize("family", families("llama", "gemma3_text"))
def test_it_is_what_compare_says_of_the_same_windows(
    family, model_folder, calibration_file, tmp_path
):
    folder = model_folder(family)
    job = prepare(str(folder), recipe(), calibration=str(calibration_file))
    report = quantize_folder(job, tmp_path / "out")
    assert [text["kind"] for text in report["held_out"]] == ["calibration", "other"]
    base, quant = load(folder, dtype="float32"), load(tmp_path / "out", dtype="float32")
    for text, told in zip(job.tokens.held_out, report["held_out"], strict=True):
        assert told["windows"] == [8, 32]
        expected = compare(base, quant, Windows(text.tokens, "none", "", ""))
        for name in ("kl_mean", "base_perplexity", "quant_perplexity", "top1_agreement"):
            assert told[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5), name
        assert told["kl_by_position"].keys() == expected["kl_by_position"].keys()
        told, expected = (each["kl_by_position"]["first"] for each in (told, expected))
        assert told["mean"] == pytest.approx(expected["mean"], rel=1e-3, abs=1e-5)


def test_the_result_is_the_same_without_and_the_screen_says_it(
    model_folder, calibration_file, tmp_path, capsys
):
    options = [str(model_folder()), "--calibration", str(calibration_file), "--samples", "4"]
    options += ["--sequence-length", "32", "--group-size", "32"]
    outs = [str(tmp_path / name) for name in ("with", "without")]
    assert main(["quantize", options[0], outs[0], *options[1:]]) == 0
    shown = capsys.readouterr().out
    assert "KL, held-out text" in shown
    assert "8 x 32 tokens of Python source" in shown
    assert main(["quantize", options[0], outs[1], *options[1:], "--no-held-out"]) == 0
    assert "KL" not in capsys.readouterr().out
    shards = [sorted((tmp_path / name).glob("*.safetensors")) for name in ("with", "without")]
    for first, second in zip(*shards, strict=True):
        assert first.read_bytes() == second.read_bytes()
    reports = [
        json.loads((tmp_path / name / "report.json").read_text()) for name in ("with", "without")
    ]
    assert [len(report["held_out"]) for report in reports] == [2, 0]


def test_a_failure_to_measure_costs_no_result(
    model_folder, calibration_file, tmp_path, monkeypatch
):
    job = prepare(str(model_folder()), recipe(), calibration=str(calibration_file))

    def fails(*arguments):
        raise RuntimeError("no head")

    monkeypatch.setattr("llmq.ptq.held_out.summarize", fails)
    report = quantize_folder(job, tmp_path / "out")
    assert {text["not_measured"] for text in report["held_out"]} == {"RuntimeError: no head"}
    assert not list((tmp_path / "out").glob("held-out-*"))


def test_a_run_that_goes_on_measures_the_same(
    model_folder, calibration_file, tmp_path, monkeypatch
):
    job = prepare(str(model_folder()), recipe(), calibration=str(calibration_file))
    whole = quantize_folder(job, tmp_path / "whole")["held_out"]

    def killed(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(ptq_run, "measure", killed)
    with pytest.raises(KeyboardInterrupt):
        quantize_folder(job, tmp_path / "out")
    monkeypatch.undo()
    report = quantize_folder(job, tmp_path / "out")
    assert report["resumed_at_block"] == 2
    assert report["held_out"] == whole


def test_free_windows_share_no_token_with_the_others():
    row, length, size = torch.arange(2000), 50, 16
    starts = window_starts(len(row), 20, length, seed=0)
    taken = set((starts[:, None] + torch.arange(length)).flatten().tolist())
    for n_windows in (5, 1000):
        found = free_windows(row, starts, length, size, n_windows)
        tokens = found.flatten().tolist()
        assert len(tokens) == len(set(tokens))
        assert not taken & set(tokens)
        assert torch.equal(found - found[:, :1], torch.arange(size).expand(len(found), size))
    assert 5 < len(found) < 100
    assert len(free_windows(row[:50], torch.tensor([0]), 50, size, 5)) == 0
