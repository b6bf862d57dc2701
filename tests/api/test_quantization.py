"""`llmq.quantize` from folder to folder and in memory is what the rooms below give."""

import builtins
import json

import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file

import llmq
from llmq.errors import LlmqError
from llmq.ptq import in_memory
from llmq.qat.weights import fake_quant_modules
from llmq.recipe import Recipe

TEXTS = [f"line {i}: value = {i * i % 97}" for i in range(60)]
SMALL = {"samples": 4, "sequence_length": 16}


def weights(model):
    return {name: tensor for name, tensor in model.state_dict().items() if "lm_head" not in name}


def assert_equal(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_folder_to_folder_equals_in_memory(model_folder, tmp_path):
    folder = model_folder()
    seen = []
    report = llmq.quantize(
        folder, tmp_path / "out", ["w4g32", "*.down_proj=w8"], TEXTS, on_block=seen.append, **SMALL
    )
    model = llmq.load(folder)
    blocks = llmq.quantize(model, ["w4g32", "*.down_proj=w8"], TEXTS, **SMALL)
    assert_equal(weights(llmq.load(tmp_path / "out")), weights(model))
    assert len(seen) == len(blocks) == 2
    assert report["calibration"]["source"] == "given texts"
    assert report["out"] == str(tmp_path / "out")
    stored = json.loads((tmp_path / "out" / "report.json").read_text())
    assert json.loads(json.dumps(report)) == {"out": report["out"], **stored}
    rows, block_rows = report.rows(), blocks.rows()
    assert [row["name"] for row in rows] == [row["name"] for row in block_rows]
    assert {row["spec"] for row in rows} == {"w4g32", "w8"}
    assert [row["error"] for row in rows] == [row["error"] for row in block_rows]
    assert {row["block"] for row in block_rows} == {0, 1}


def test_forms_of_text_in_memory(model_folder):
    """Texts, their windows, and the ids of these: the same weights. So does the call of earlier
    versions."""
    folder = model_folder(num_hidden_layers=1)
    windows = llmq.calibration_windows(folder, TEXTS, **SMALL)
    expected = llmq.load(folder)
    in_memory.quantize(expected, Recipe.uniform("w4g32"), windows.tokens)
    for calibration in (TEXTS, windows, windows.tokens.tolist()):
        model = llmq.load(folder)
        llmq.quantize(model, "w4g32", calibration, **SMALL)
        assert_equal(weights(model), weights(expected))
    for arguments, options in (
        ((Recipe.uniform("w4g32"), windows.tokens), {}),
        ((), {"recipe": Recipe.uniform("w4g32"), "tokens": windows.tokens}),
    ):
        model = llmq.load(folder)
        llmq.quantize(model, *arguments, **options)
        assert_equal(weights(model), weights(expected))


def test_schemes_with_activations(model_folder, tmp_path):
    report = llmq.quantize(model_folder(), tmp_path / "out", "W8A8", method="rtn")
    assert report["recipe"]["activations"]["kind"] == "int8-token"
    assert report["calibration"] is None


def test_calibration_by_name_and_a_text_in_its_place(model_folder, calibration_file, tmp_path):
    folder = model_folder()
    report = llmq.quantize(folder, tmp_path / "out", "w4g32", str(calibration_file), **SMALL)
    assert report["calibration"]["source"] == calibration_file.name
    for text in ("two\nlines", "word " * 100):
        with pytest.raises(LlmqError, match=r"calibration: a text of .* give texts as a list"):
            llmq.quantize(folder, tmp_path / "other", "w4g32", text)
    with pytest.raises(LlmqError, match="exists already"):
        llmq.quantize(folder, tmp_path / "out", "w8", method="rtn")
    llmq.quantize(folder, tmp_path / "out", "w8", method="rtn", overwrite=True)
    assert any(
        "weight_packed" in name for name in load_file(next((tmp_path / "out").glob("*.saf*")))
    )


def test_tables_need_pandas_and_say_so(monkeypatch):
    model = make_model()
    blocks = llmq.quantize(model, "w4g32", method="rtn")
    report = llmq.Report({"layers": [{"name": "a", "bits_per_weight": 4.5}]})
    assert list(blocks.to_pandas()["name"]) == [row["name"] for row in blocks.rows()]
    assert list(report.to_pandas().columns) == ["name", "bits_per_weight"]
    real = builtins.__import__

    def without(name, *rest):
        if name == "pandas":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    for table in (blocks, report):
        with pytest.raises(LlmqError, match=r"needs pandas.*use rows\(\)"):
            table.to_pandas()


def test_training_takes_the_same_forms(model_folder):
    folder = model_folder()
    model = llmq.prepare_qat(llmq.load(folder, dtype="float32"), "w4g32", IDS)
    assert fake_quant_modules(model)
    assert llmq.freeze(model, llmq.ActSpec())


IDS = torch.randint(2, 2048, (4, 16), generator=torch.Generator().manual_seed(1))
