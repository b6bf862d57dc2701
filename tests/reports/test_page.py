"""The page of a result: one file that loads nothing, with what was measured in it; looked at in a
browser where there is one."""

import json
import math
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

import llmq
from llmq.errors import LlmqError
from llmq.reports.page import PAGE, Sample, render, report_of
from llmq.storage.manifest import check_hashes

VOID = {"meta"}
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


class Reader(HTMLParser):
    """Refuses tags that do not close, and notes ids, texts and what would be loaded."""

    def __init__(self, page):
        super().__init__()
        self.open, self.ids, self.texts, self.loaded = [], [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids += [found["id"]] if "id" in found else []
        self.loaded += [found[key] for key in ("src", "href") if key in found]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "out"
    llmq.quantize("tiny", out, "w4g128", samples=4, sequence_length=64)
    return out


def test_quantizing_writes_it(folder):
    text = (folder / PAGE).read_text()
    page, report = Reader(text), report_of(folder)
    assert page.loaded == []
    assert set(page.ids) >= {"loss", "errors", "bytes", "engines", "settings"}
    shown = " ".join(page.texts)
    assert f"{report['held_out'][0]['quant_perplexity']:.3f}" in shown
    assert f"{report['stored_bytes'] / 1e6:,.1f} MB" in shown
    assert text.count('<span class="s') == len(report["layers"])
    assert check_hashes(folder).is_good
    assert PAGE in check_hashes(folder).ok


def test_what_others_wrote_is_shown_and_not_obeyed(folder):
    bad = "<script>alert(1)</script>"
    report = {**report_of(folder), "model": bad, "notes": {bad: bad}}
    text = render(report, samples=[Sample(bad, bad, bad)])
    assert "<script" not in text
    assert "".join(Reader(text).texts).count(bad) >= 5


def test_a_report_of_training():
    held_out = {"full_precision": {"perplexity": 9.0, "ci95": [8.0, 10.0]}}
    report = {"model": "m", "method": "qat", "versions": {"llmq": "1"}, "held_out": held_out}
    page = Reader(render(report, log=[{"step": 1, "ce": 2.0}, {"step": 2, "ce": 1.0}]))
    assert "training" in page.ids
    assert "8.0000 to 10.0000" in page.texts
    assert "loss" not in page.ids


def test_losses_without_end_have_no_place_in_the_picture(folder):
    report = report_of(folder)
    first, second = report["held_out"]
    first |= {"perplexity_ratio": math.inf, "quant_perplexity": math.inf}
    text = render(report)
    Reader(text)
    assert text.count("<circle") == 1 + 2
    second |= {"perplexity_ratio": math.nan, "kl_mean": math.nan}
    assert render(report).count("<circle") == 1
    log = [{"step": 1, "ce": math.nan}, {"step": 2, "held_out_perplexity": math.inf}]
    assert "<polyline" not in render(report, log=log)


def test_a_folder_without_a_report(tmp_path):
    with pytest.raises(LlmqError, match=r"there is no report.json in it"):
        report_of(tmp_path)


@pytest.mark.skipif(BROWSER is None, reason="no chromium to open the page with")
def test_a_browser_shows_it(folder, tmp_path):
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    flags += ["--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [BROWSER, *flags, "--dump-dom", f"file://{folder / PAGE}"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-500:]
    assert Reader(done.stdout).ids == Reader((folder / PAGE).read_text()).ids
    assert json.loads((folder / "report.json").read_text())["model"] in done.stdout
