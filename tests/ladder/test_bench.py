"""Rungs on a real model: what is measured, and that it is measured once."""

import json
from dataclasses import replace

import pytest

import llmq
from llmq.ladder import bench as bench_module
from llmq.ladder.bench import RESULTS, Bench, Point
from llmq.ladder.rungs import Rung
from llmq.ladder.training import train
from llmq.models.source import Source
from llmq.text.documents import load_documents
from llmq.text.windows import cut_windows

OPTIONS = {"samples": 8, "sequence_length": 64}


@pytest.fixture
def bench(tmp_path):
    source = Source.open("tiny")
    documents = load_documents("bundled", "eval")[:2]
    windows = cut_windows(documents, source.tokenizer, source.config, 64)
    return Bench(source, windows, tmp_path / "work", OPTIONS)


def test_a_rung_is_what_compare_says_and_is_measured_once(bench, monkeypatch):
    bench.work_dir.mkdir()
    said = []
    point = bench.measure(Rung("w4g128", "rtn"), said.append)
    assert said == ["w4g128:rtn: quantizing", "w4g128:rtn: measuring"]
    assert list(bench.work_dir.iterdir()) == [bench.work_dir / RESULTS]
    out = bench.work_dir / "own"
    llmq.quantize("tiny", out, "w4g128", method="rtn")
    expected = llmq.compare("tiny", out, bench.windows)
    assert point.loss == pytest.approx(expected["perplexity_ratio"] - 1, abs=1e-9)
    assert point.kl == pytest.approx(expected["kl_mean"], rel=1e-6)
    assert point.n_bytes == Source(out).weight_bytes
    monkeypatch.setattr(bench_module, "quantize", None)
    assert bench.measure(Rung("w4g128", "rtn")) == point
    assert Point.from_json(json.loads(json.dumps(point.to_json()))) == point


def test_a_run_that_ended_while_it_measured_measures_what_it_had_made(bench, monkeypatch):
    bench.work_dir.mkdir()
    rung = Rung("w4g128", "rtn")

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Bench, "compared", killed)
        with pytest.raises(KeyboardInterrupt):
            bench.measure(rung)
    said = []
    point = replace(bench, keep=True).measure(rung, said.append)
    assert said == ["w4g128:rtn: measuring"]
    assert bench.finished_in(rung) == point.seconds
    damaged = bench.work_dir / "w4g128-rtn" / "config.json"
    damaged.write_text(damaged.read_text() + " ")
    assert bench.finished_in(rung) is None
    llmq.quantize("tiny", bench.work_dir / "w4g128-rtn", "w4g64", method="rtn", overwrite=True)
    assert bench.finished_in(rung) is None


def test_other_options_are_another_result(bench):
    keys = {
        bench._key(Rung("w4g128", "gptq")),
        bench._key(Rung("w4g128", "rtn")),
        Bench(bench.source, bench.windows, bench.work_dir, {"samples": 9})._key(
            Rung("w4g128", "gptq")
        ),
    }
    assert len(keys) == 3


def test_a_line_that_was_cut_off_is_measured_again(bench):
    bench.work_dir.mkdir()
    (bench.work_dir / RESULTS).write_text('{"key": "a", "poi')
    assert bench._lines() == []


@pytest.mark.slow
def test_training_starts_from_gptq(bench):
    bench.work_dir.mkdir()
    failed = bench.measure(Rung("w2g64-asym", "rtn"))
    trained = train(bench, failed, 0.01, 2, "bundled")
    assert str(trained.before.rung) == "w2g64-asym:gptq"
    assert trained.before.loss < failed.loss
    assert trained.after.n_bytes == pytest.approx(failed.n_bytes, rel=1e-3)  # but for the head
    assert not (bench.work_dir / "w2g64-asym-qat").exists()
