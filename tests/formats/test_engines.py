"""The table of engines: what it says of each kind of result, that quantize and inspect say the
same, and that the engines themselves agree, where they are installed."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import make_model

import llmq
from llmq.commands.cli import main
from llmq.commands.engine_lines import WIDTH, engine_lines
from llmq.formats.engine_rules import Result
from llmq.formats.engines import ENGINES, readings, refused_by
from llmq.formats.registry import NAMES
from llmq.grid.spec import ActSpec, QuantSpec
from llmq.recipe import Recipe

NAME = "model.layers.0.mlp.down_proj"


def reasons(format, *texts, activations="none", act_order=False):
    """By engine: why it does not read layers of these specs, None where it does."""
    specs = {f"{NAME}.{i}": QuantSpec.parse(text) for i, text in enumerate(texts)}
    result = Result(format, specs, ActSpec(activations), act_order)
    return {reading.engine: reading.reason for reading in readings(result)}


def reading(format, *texts, **options):
    return {engine for engine, reason in reasons(format, *texts, **options).items() if not reason}


ALL_GPTQ = {"llmq", "transformers + gptqmodel", "vLLM", "vLLM on a CPU", "SGLang", "GPTQModel"}
VLLM = {"vLLM", "vLLM on a CPU"}
PACKED = {"llmq", "transformers + compressed-tensors", "vLLM", "SGLang"}


@pytest.mark.parametrize(
    ("format", "texts", "options", "expected"),
    [
        ("llmq", ["ternary-g64"], {}, {"llmq"}),
        ("gptq", ["w4g128"], {}, ALL_GPTQ),
        ("gptq", ["w8"], {}, ALL_GPTQ - {"vLLM on a CPU"}),
        ("gptq", ["w3g64"], {}, ALL_GPTQ - VLLM),
        ("gptq", ["w4g16"], {}, ALL_GPTQ - VLLM),
        ("gptq", ["w4g64", "w4g128"], {}, ALL_GPTQ - {"transformers + gptqmodel"}),
        ("gptq", ["w4g128"], {"act_order": True}, ALL_GPTQ - VLLM - {"SGLang"}),
        ("gptq_v2", ["w4g64-asym"], {}, ALL_GPTQ - VLLM),
        ("gptq_v2", ["w3g64-asym"], {}, ALL_GPTQ - VLLM),
        ("awq", ["w4g64-asym"], {}, {*ALL_GPTQ, "mlx-lm"}),
        ("awq", ["w4-asym"], {}, {"llmq", "SGLang"} | VLLM),
        ("bitnet", ["ternary-tensor"], {}, None),
        ("compressed-tensors", ["w4g128"], {}, {*PACKED, "vLLM on a CPU"}),
        ("compressed-tensors", ["w4g128", "w8"], {}, PACKED),
        ("compressed-tensors", ["w2g64"], {}, PACKED - {"SGLang"}),
        ("compressed-tensors", ["w4g64-asym"], {}, {"llmq"} | VLLM),
        ("compressed-tensors", ["w8"], {"activations": "int8-token"}, {*PACKED, *VLLM}),
        ("compressed-tensors", ["w8"], {"activations": "int8-static"}, {*PACKED, *VLLM}),
        ("compressed-tensors", ["w8-asym"], {"activations": "int8-token"}, {"llmq"}),
    ],
)
def test_who_reads_what(format, texts, options, expected):
    if expected is None:
        expected = {engine.name for engine in ENGINES if format in engine.rules}
        assert {"transformers", "mlx-lm"} <= expected
    assert reading(format, *texts, **options) == expected


def test_parts_of_one_layer_that_differ_are_named():
    specs = {f"a.{name}": QuantSpec() for name in ("q_proj", "k_proj")} | {"a.v_proj": None}
    for format in ("gptq", "awq", "compressed-tensors"):
        told = refused_by(Result(format, specs))
        assert "vLLM, SGLang" in told
        assert "a.v_proj (kept)" in told


@pytest.mark.parametrize("format", NAMES)
@pytest.mark.parametrize("text", ["w4g128", "w3g64-asym", "ternary-tensor", "w8-tensor"])
def test_every_engine_has_an_answer_that_fits(format, text):
    for activations in ("none", "int8-token", "int8-static"):
        engines = readings(Result(format, {NAME: QuantSpec.parse(text)}, ActSpec(activations)))
        assert len({each.engine for each in engines}) == len(ENGINES)
        assert engines[0].reads  # llmq itself
        lines = engine_lines([each.to_json() for each in engines]).splitlines()
        assert max(map(len, lines)) <= WIDTH


def test_rows_are_complete():
    for engine in ENGINES:
        assert engine.how in ("run", "read")
        assert engine.checked.startswith("20")
        assert engine.version
        assert engine.rules


@pytest.mark.parametrize(("format", "spec"), [("gptq", "w4g32"), ("awq", "w4g32-asym")])
def test_quantize_and_inspect_say_the_same(format, spec, model_folder, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--method", "rtn", "--group-size", "32", "--format", format, "--json"]
    options += ["--asymmetric"] * spec.endswith("asym")
    assert main(["quantize", str(model_folder()), str(out), *options]) == 0
    written = json.loads(capsys.readouterr().out)["engines"]
    assert main(["inspect", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["engines"]
    assert found == written == json.loads((out / "report.json").read_text())["engines"]
    assert {"engine", "version", "reads", "reason"} == set(found[0])
    assert main(["inspect", str(out)]) == 0
    text = capsys.readouterr().out
    assert "read by      llmq, transformers + gptqmodel, vLLM" in text
    assert "not read by  transformers: it needs gptqmodel" in text


def test_inspect_knows_order_and_kept_parts(tmp_path, capsys):
    model = make_model()
    llmq.quantize(model, Recipe.uniform("w4g32", method="rtn"))
    llmq.save(model, tmp_path / "out", format="gptq")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["desc_act"] = True
    path.write_text(json.dumps(config))
    assert main(["inspect", str(tmp_path / "out"), "--json"]) == 0
    found = {each["engine"]: each for each in json.loads(capsys.readouterr().out)["engines"]}
    assert "desc_act" in found["vLLM"]["reason"]
    assert found["GPTQModel"]["reads"]


ROOT = Path(__file__).parents[2]
VARIABLE = "LLMQ_ENGINES"
# Of scripts/check_engines.py -> the package, and the row of the table.
CHECKED = {
    "vllm": ("vllm", "vLLM on a CPU"),
    "gptqmodel": ("gptqmodel", "GPTQModel"),
    "mlx-lm": ("mlx_lm", "mlx-lm"),
    "transformers": ("transformers", "transformers"),
    "transformers+compressed-tensors": (
        "compressed_tensors",
        "transformers + compressed-tensors",
    ),
    "transformers+gptqmodel": ("gptqmodel", "transformers + gptqmodel"),
}
FOLDERS = {
    "gptq": ["--format", "gptq"],
    "gptq-8": ["--format", "gptq", "--bits", "8"],
    "gptq-fused": ["--format", "gptq", *(f"--rule=*.{part}_proj=w4g32" for part in "qkv")],
    "gptq-unlike": ["--format", "gptq", "--rule=*.q_proj=w4g32"],
    "gptq-order": ["--format=gptq", "--method=gptq", "--act-order", "--samples=4"],
    "gptq_v2": ["--format", "gptq_v2", "--group-size", "64", "--asymmetric"],
    "awq": ["--format", "awq", "--group-size", "64", "--asymmetric"],
    "awq-row": ["--format", "awq", "--group-size", "-1"],
    "packed": ["--format", "compressed-tensors"],
    "packed-asymmetric": ["--format", "compressed-tensors", "--asymmetric"],
    "packed-2": ["--format", "compressed-tensors", "--bits", "2", "--group-size", "64"],
    "llmq": ["--format", "llmq"],
}


def interpreter(key):
    """Of the environment that an engine is installed in: as LLMQ_ENGINES says, or this one."""
    given = dict(pair.split("=", 1) for pair in os.environ.get(VARIABLE, "").split() if "=" in pair)
    if key in given:
        return given[key]
    package = CHECKED[key][0]
    is_plain = key == "transformers" and any(map(find_spec, ("compressed_tensors", "gptqmodel")))
    if find_spec(package) is None or is_plain:
        pytest.skip(f"{key} is not installed here: set {VARIABLE}='{key}=PYTHON ...' to its Python")
    return sys.executable


def run_check(python, *arguments):
    """The JSON objects that scripts/check_engines.py prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if python == sys.executable:
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    else:
        environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [python, str(ROOT / "scripts" / "check_engines.py"), *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Folders of `tiny`, each with the log-probabilities that llmq gives beside it."""
    place = tmp_path_factory.mktemp("engines")
    for name, options in FOLDERS.items():
        method = [] if "--method=gptq" in options else ["--method", "rtn"]
        assert main(["quantize", "tiny", str(place / name), *method, *options]) == 0
    run_check(sys.executable, *(place / name for name in FOLDERS), "--write")
    return place


@pytest.mark.slow
@pytest.mark.parametrize("key", CHECKED)
def test_the_engines_agree(key, written):
    python, row = interpreter(key), CHECKED[key][1]
    engine = key.partition("+")[0]
    dtype = "bfloat16" if engine in ("vllm", "gptqmodel") else "float32"
    folders = [written / name for name in FOLDERS]
    results = run_check(python, *folders, "--engine", engine, "--dtype", dtype)
    assert len(results) == len(FOLDERS)
    for folder, result in zip(folders, results, strict=True):
        report = json.loads((folder / "report.json").read_text())
        said = next(each for each in report["engines"] if each["engine"] == row)
        is_same = result["result"] != "refused" and result["worst"] <= 3 * result["own"]
        assert is_same == said["reads"], (said, result)
