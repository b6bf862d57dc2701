"""The card of a result, from real runs: its figures are those of the report, its code runs, and it
says of nothing more than is known."""

import json
import re
import shutil

import pytest
from huggingface_hub import ModelCard

import llmq
from llmq.cards.base import Base
from llmq.cards.facts import bits_tags, bits_words, describe
from llmq.cards.page import card, library_of

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SOURCE = """\
---
license: apache-2.0
language: [en]
pipeline_tag: text-generation
tags: [code]
---
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """`tiny` as a folder of the Hub's cache."""
    root = tmp_path_factory.mktemp("hub") / "models--someone--tiny" / "snapshots"
    folder = shutil.copytree(llmq.models.hub.resolve("tiny"), root / COMMIT)
    (folder / "README.md").write_text(SOURCE)
    return folder


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    """A folder by GPTQ, two layers kept."""
    folder = tmp_path_factory.mktemp("made") / "tiny-w4"
    recipe = ["w4g128", "*.layers.0.mlp.*_proj=w8", "*.layers.1.self_attn.[kv]_proj=keep"]
    return folder, llmq.quantize(source, folder, recipe, samples=4, sequence_length=64)


def test_the_head(made):
    head = ModelCard.load(made[0] / "README.md").data.to_dict()
    assert head == {
        "base_model": "someone/tiny",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "license": "apache-2.0",
        "language": ["en"],
        "pipeline_tag": "text-generation",
        "tags": ["code", "llmq", "quantized", "gptq", "compressed-tensors", "4-bit", "8-bit"],
    }


def test_its_figures_are_those_of_the_report(made):
    folder, report = made
    text = (folder / "README.md").read_text()
    assert text.count("# someone/tiny, 4 to 8 bits") == 1
    assert f"Made from `someone/tiny`, commit `{COMMIT}`." in text
    assert "26 of its 28 linear layers in 4 to 8 bits" in text
    assert "| linear layers in full precision | 2 |" in text
    assert "| layers that fell back to plain rounding | 0 |" in text
    assert "| layers | 23 x `w4g128` (4 bits, groups of 128), 3 x `w8`" in text
    before, after = (report[f"{name}_bytes"] / 1e6 for name in ("source", "stored"))
    assert f"| weight files | {before:.1f} MB | {after:.1f} MB |" in text
    assert f"| bits per weight of the model | 16.01 | {report['bits_per_weight']:.2f} |" in text
    assert len(report["held_out"]) == 2
    for measured in report["held_out"]:
        for name, places in (("perplexity_ratio", 4), ("kl_mean", 5)):
            low, high = (f"{bound:.{places}f}" for bound in measured[f"{name}_ci95"])
            assert f" {measured[name]:.{places}f} ({low} to {high}) |" in text
        assert f"| {measured['source']} | 8 x 64 | {measured['base_perplexity']:.3f} ->" in text
    assert report["calibration"]["sha256"][:16] in text
    for name, version in report["versions"].items():
        assert f"{name} {version}" in text
    assert not re.search(r"\{[{%]|None|nan", text)


def test_its_code_runs(made, monkeypatch, capsys):
    folder, report = made
    monkeypatch.chdir(folder.parent)
    codes = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert len(codes) == 2  # llmq, and transformers with compressed-tensors
    for code in codes:
        exec(compile(code, "README.md", "exec"), {})
    assert len(capsys.readouterr().out.strip()) > 0
    readers = {each["engine"] for each in report["engines"] if each["reads"]}
    assert readers == {"llmq", "transformers + compressed-tensors"}


def test_an_exact_export_has_the_same_figures(made, tmp_path):
    folder, report = made
    llmq.export(folder, tmp_path / "exported", "llmq")
    text = (tmp_path / "exported" / "README.md").read_text()
    assert f"commit `{COMMIT}`" in text
    assert f" {report['held_out'][0]['kl_mean']:.5f} (" in text
    assert "kept every value, bit for bit" in text
    assert "| exported from | `compressed-tensors` format |" in text
    head = ModelCard(text).data
    assert (head.base_model, head.license) == ("someone/tiny", "apache-2.0")
    # Its button would load random numbers.
    assert head.library_name == "llmq"
    assert "from_pretrained" not in text
    exported = json.loads((tmp_path / "exported" / "report.json").read_text())
    assert str(tmp_path) not in json.dumps(exported)
    size = (tmp_path / "exported" / "model.safetensors").stat().st_size
    bits = report["bits_per_weight"] * size / report["stored_bytes"]
    assert exported["bits_per_weight"] == pytest.approx(bits, abs=1e-3)


def test_what_was_rounded_anew_was_not_measured(made, source, tmp_path):
    folder = tmp_path / "w8"
    measured = llmq.quantize(source, folder, "w8g64-asym", method="rtn")
    measured["held_out"] = made[1]["held_out"]
    (folder / "report.json").write_text(json.dumps(measured))
    report = llmq.export(folder, tmp_path / "w8.gguf", "gguf", allow_requantize=True)
    text = (tmp_path / "w8.gguf.md").read_text()
    assert "Not measured: the export rounded weights anew. `llmq compare BASE w8.gguf`" in text
    assert f"| layers rounded anew by the export | {len(report.requantized)} of 28" in text
    assert "KL" not in text


def test_a_file_and_its_card(made, source, tmp_path):
    llmq.export(source, tmp_path / "full.gguf", "gguf")
    text = (tmp_path / "full.gguf.md").read_text()
    assert "This is the model in full precision" in text
    assert ModelCard(text).data.library_name == "gguf"
    assert 'llama-cli -m "full.gguf"' in text
    (tmp_path / "full.gguf").unlink()
    llmq.export(source, tmp_path / "full.gguf", "gguf")  # over the card of an earlier one
    (tmp_path / "other.gguf.md").write_text("my notes")
    with pytest.raises(llmq.LlmqError, match=r"other\.gguf\.md: exists already"):
        llmq.export(source, tmp_path / "other.gguf", "gguf")


def test_a_model_in_memory(source, tmp_path):
    model = llmq.load(source)
    llmq.quantize(model, ["ternary-g64", "*.down_proj=keep"], method="rtn")
    llmq.save(model, tmp_path / "saved")
    text = (tmp_path / "saved" / "README.md").read_text()
    assert "24 of its 28 linear layers in ternary" in text
    assert f"commit `{COMMIT}`" in text
    assert "\nNot measured. `llmq compare BASE saved` does it." in text
    size = (tmp_path / "saved" / "model.safetensors").stat().st_size
    assert f"| weight files | 7.3 MB | {size / 1e6:.1f} MB |" in text
    assert "method" not in text
    head = ModelCard(text).data
    assert head.tags == ["code", "llmq", "quantized", "ternary"]
    again = llmq.load(tmp_path / "saved")
    llmq.save(again, tmp_path / "again")
    text = (tmp_path / "again" / "README.md").read_text()
    assert ModelCard(text).data.base_model == "someone/tiny"  # of the card of its source
    assert "before" not in text


def test_a_report_that_is_none_of_llmq_is_told_and_left_out(made, tmp_path):
    folder = shutil.copytree(made[0], tmp_path / "copy")
    (folder / "report.json").write_text('{"layers": 3, "base_model": 3}')
    with pytest.warns(llmq.LlmqWarning, match="the card does without it"):
        llmq.export(folder, tmp_path / "out", "gptq_v2", allow_requantize=True)
    assert "\nNot measured" in (tmp_path / "out" / "README.md").read_text()


def test_marks_of_names_are_shown_as_they_are():
    engine = {"engine": "llmq", "version": "", "reads": True}
    report = {
        "format": "llmq",
        "layers": [{"name": "a", "spec": "w4g128"}],
        "stored_bytes": 1,
        "engines": [engine],
        "versions": {"llmq": "1"},
        "calibration": {"source": "a|b <b>*x*</b>\n# c", "windows": [1, 2], "sha256": "0" * 64},
    }
    text = card(report, Base("<b>`x`|\n# y"), "x")
    assert "# \\<b\\>\\`x\\`\\| # y, 4 bits" in text
    assert r"a\|b \<b\>\*x\*\</b\> # c" in text


@pytest.mark.parametrize(
    ("specs", "words", "tags"),
    [
        (["w4g128"], "4 bits", ["4-bit"]),
        (["w8", "w2g64-asym"], "2 to 8 bits", ["2-bit", "8-bit"]),
        (["ternary-g128"], "ternary", ["ternary"]),
        (["ternary", "w8"], "ternary and 8 bits", ["8-bit", "ternary"]),
        ([], "full precision", []),
    ],
)
def test_bits_in_words_and_tags(specs, words, tags):
    counted = dict.fromkeys(specs, 1)
    assert (bits_words(counted), bits_tags(counted)) == (words, tags)


def test_specs_in_words():
    assert describe("w3g64-asym") == "3 bits, groups of 64, zero points"
    assert describe("w8") == "8 bits, a scale per row"
    assert describe("ternary-tensor") == "ternary, a scale per tensor"
    assert describe("Q8_0") == ""


def test_library_by_who_reads_it():
    reads = {"engine": "transformers + gptqmodel", "reads": True}
    refuses = {"engine": "transformers", "reads": False}
    assert library_of({"format": "awq", "engines": [refuses, reads]}) == "transformers"
    assert library_of({"format": "llmq", "engines": [refuses]}) == "llmq"
    assert library_of({"format": "gguf", "engines": [reads]}) == "gguf"
