"""`llmq bench` and what stands behind it, on a CPU: figures are figures, refusals are one line, and
the decoder is the model it claims to be."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_model

from llmq.benchmark import kernels, rivals
from llmq.benchmark.decode import StaticDecoder, compare_decode, quantize_layers, synthetic_llama
from llmq.benchmark.kernels import Kind
from llmq.commands.cli import main
from llmq.grid.spec import QuantSpec
from llmq.inference.module import quantized_modules
from llmq_kernels import unpack

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("quantized", [False, True])
def test_decoder_generates_what_transformers_generates(quantized):
    model = make_model("llama")
    if quantized:
        quantize_layers(model, QuantSpec("int4", 32))
        assert quantized_modules(model)
    first = torch.tensor([[3], [1000]])
    decoder = StaticDecoder(model, 2, 16)
    tokens, seconds = decoder.decode(first[:, 0], 9, use_graph=False)
    assert seconds > 0
    expected = model.generate(
        first,
        attention_mask=torch.ones_like(first),
        max_new_tokens=9,
        min_new_tokens=9,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert torch.equal(torch.stack(tokens, dim=1), expected[:, 1:])
    again, _ = decoder.decode(
        first[:, 0], 9, use_graph=False
    )  # from an empty cache, whatever an earlier run left there
    assert torch.equal(torch.stack(again), torch.stack(tokens))


def test_decoding_is_compared_on_one_synthetic_model():
    shape = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    result = compare_decode(CPU, QuantSpec("int4", 32), n_tokens=3, max_length=8, **shape)
    assert result["ratio"] == pytest.approx(
        result["quantized_tokens_per_second"] / result["bf16_tokens_per_second"]
    )
    assert len(result["backends"]) == 1
    assert synthetic_llama(CPU, **shape).config.rope_parameters["rope_theta"] == 5e5


@pytest.mark.parametrize("text", ["w4g128", "w3g64-asym", "ternary+a8", "w4g128+a8g", "w8-tensor"])
def test_random_weights_hold_only_codes_of_their_kind(text):
    kind = Kind(text)
    weight = kernels.random_weight(kind, 16, 256, CPU)
    codes = unpack(weight.packed, weight.code.bits, 256)
    assert codes.unique().tolist() == list(range(weight.code.levels))
    assert weight.activations == {"a8": "int8-token", "a8g": "int8-group"}.get(
        text.partition("+")[2], "none"
    )
    assert weight.dequantize().shape == (16, 256)


def test_rows_of_the_table():
    rows = list(
        kernels.measure([(128, 256)], (1, 3), [Kind("w4g128"), Kind("w8+a8")], CPU, repeats=2)
    )
    assert [(row["m"], row["weights"]) for row in rows] == [
        (1, "w4g128"),
        (3, "w4g128"),
        (1, "w8+a8"),
        (3, "w8+a8"),
    ]
    for row in rows:
        assert row["ratio"] == pytest.approx(row["bf16_seconds"] / row["seconds"])
        assert row["share_of_copy_bandwidth"] > 0
    own = rows[0]["others"]["torch int4pack"]
    assert own["relative_error"] < 2 * 2.0**-8
    assert set(rows[0]["others"]) == set(rivals.RIVALS)


def test_a_rival_that_fails_is_named_with_its_reason(monkeypatch):
    def broken(codes, scale):
        raise OSError("no such\nthing")

    monkeypatch.setattr(rivals, "RIVALS", {"broken": broken})
    assert rivals.seconds(64, 128, {1: torch.randn(1, 128).bfloat16()}, CPU, 1) == {
        1: {"broken": {"missing": "OSError: no such thing"}}
    }


def run(capsys, *arguments):
    capsys.readouterr()
    code = main(["bench", *arguments])
    return code, *capsys.readouterr()


def test_command_on_a_cpu(capsys):
    arguments = [
        "--device",
        "cpu",
        "--shapes",
        "128x128",
        "--rows",
        "2",
        "--weights",
        "w4g128",
        "--repeats",
        "1",
    ]
    code, stdout, _ = run(capsys, *arguments, "--json")
    assert code == 0
    result = json.loads(stdout)
    assert [row["n"] for row in result["rows"]] == [128]
    code, stdout, _ = run(capsys, *arguments)
    assert code == 0
    assert "speed-up over torch's bfloat16 linear" in stdout
    assert "GemLite" in stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--decode"], "needs a CUDA device"),
        (["--tune"], "needs a CUDA device"),
        (["--shapes", "4096"], "expected outputs x inputs"),
        (["--weights", "w7"], "cannot read the quantization"),
    ],
)
def test_refusals_are_one_line(capsys, arguments, message):
    code, stdout, stderr = run(capsys, "--device", "cpu", *arguments)
    assert (code, stdout) == (2, "")
    assert message in stderr
    assert len(stderr.splitlines()) == 1


@pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="this machine has a GPU, on which the script would run for minutes",
)
def test_gpu_script_without_a_gpu():
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "benchmark_kernels.py"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "no CUDA device" in done.stderr


def gpu_script():
    spec = importlib.util.spec_from_file_location(
        "benchmark_kernels", ROOT / "scripts" / "benchmark_kernels.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_gpu_script_stops_its_table_in_time(monkeypatch, tmp_path):
    """One row is measured whatever the time; the others are counted."""
    script = gpu_script()
    monkeypatch.setattr(kernels, "GPU_SHAPES", ((128, 256), (64, 128)))
    monkeypatch.setattr(kernels, "GPU_ROWS", (1, 3))
    for deadline, n_rows in ((0.0, 1), (float("inf"), 8)):
        result = script.table(CPU, tmp_path, deadline)
        assert len(result["rows"]) == n_rows
        assert result["rows_not_reached"] == 8 - n_rows


def test_gpu_script_runs_its_tests_within_their_time(monkeypatch, tmp_path):
    """The command is what counts here: its tests are replaced by one that passes and one that never
    ends."""
    script = gpu_script()
    (tmp_path / "tests" / "kernels").mkdir(parents=True)
    test, marks = (
        tmp_path / "tests" / "kernels" / "test_it.py",
        "import pytest, time\n@pytest.mark.gpu\ndef test_it():\n    ",
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: of a GPU\n")
    monkeypatch.setattr(script, "ROOT", tmp_path)
    test.write_text(marks + "pass\n")
    assert "1 passed" in script.run_tests(tmp_path, 60)["result"]
    test.write_text(marks + "assert False\n")
    with pytest.raises(RuntimeError, match="1 failed"):
        script.run_tests(tmp_path, 60)
    test.write_text(marks + "time.sleep(100)\n")
    with pytest.raises(subprocess.TimeoutExpired):
        script.run_tests(tmp_path, 5)
    assert "test session starts" in (tmp_path / "tests.txt").read_text()
