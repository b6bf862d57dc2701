"""What `import llmq` offers: one list of it, its example, and its types."""

import ast
import doctest
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import llmq

SOURCE = Path(llmq.__file__).read_text()


def test_completion_shows_what_there_is_and_nothing_else():
    shown = {name for name in dir(llmq) if not name.startswith("__")}
    assert shown == set(llmq.__all__) - {"__version__"} == set(llmq._HOMES)
    for name in shown:
        value = getattr(llmq, name)
        assert inspect.getdoc(value), name
        assert value.__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = llmq.quantise


def test_type_checkers_see_the_same_names():
    (block,) = (node for node in ast.parse(SOURCE).body if isinstance(node, ast.If))
    homes = {alias.name: node.module for node in block.body for alias in node.names}
    assert homes == llmq._HOMES


def test_the_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (test,) = (t for t in doctest.DocTestFinder(recurse=False).find(llmq, "llmq") if t.examples)
    result = doctest.DocTestRunner().run(test)
    assert result.attempted >= 8
    assert result.failed == 0


USES = """
import torch
import llmq

model = llmq.load("tiny", dtype=torch.bfloat16, device_map={"": "cpu"})
reveal_type(llmq.quantize("tiny", "out"))
reveal_type(llmq.quantize("tiny", "out", "W8A8", ["a text"], samples=4).rows())
reveal_type(llmq.quantize(model, "w4g128", [[1, 2, 3]]))
reveal_type(llmq.quantize(model, ["W4A16", "*.down_proj=w8"], torch.zeros(2, 3)))
reveal_type(llmq.perplexity(model, "text"))
reveal_type(llmq.perplexity(model, llmq.load_tokenizer("tiny"), "text"))
reveal_type(llmq.generate(model, "def"))
reveal_type(llmq.generate(model, torch.zeros(1, 3)))
llmq.load(3)
"""


@pytest.mark.slow
def test_strict_type_checkers_know_every_use(tmp_path):
    program = tmp_path / "uses.py"
    program.write_text(USES)
    root = Path(llmq.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", str(program)],
        capture_output=True,
        text=True,
        timeout=900,
        cwd=root,  # whose settings say which packages have no types
    )
    lines = [line for line in done.stdout.splitlines() if "uses.py" in line]
    revealed = [line.partition('type is "')[2].rstrip('"') for line in lines if "Revealed" in line]
    # mypy names the modules of built-in types or not, by its version
    assert [re.sub(r"(\w+\.)+", "", name) for name in revealed] == [
        "Report",
        "list[dict[str, Any]]",
        "BlockReports",
        "BlockReports",
        "Perplexity",
        "Perplexity",
        "str",
        "Tensor",
    ]
    errors = [line for line in lines if " error: " in line]
    assert [int(line.split(":")[1]) for line in errors] == [14], done.stdout


def test_wrong_types_are_refused_by_name():
    from conftest import make_model

    model = make_model()
    cases = [
        (lambda: llmq.load(3), "model: expected a folder, .* got 3"),
        (lambda: llmq.load("tiny", dtype=32), "dtype 32: expected one of auto, float32"),
        (lambda: llmq.load("tiny", device=["cpu"]), "device: expected 'cpu', .* got list"),
        (lambda: llmq.load_tokenizer(None), "model: expected a transformers model, .* got None"),
        (lambda: llmq.quantize(None), "model: expected a transformers model, .* got None"),
        (lambda: llmq.quantize("tiny"), "out: expected the folder to write, got None"),
        (lambda: llmq.quantize(model, 4), "recipe: expected a Recipe, .* got 4"),
        (lambda: llmq.quantize(model, ["w8", 4]), "recipe: expected a Recipe, .* got 4"),
        (lambda: llmq.quantize(model, "w4", {"a"}), "calibration: expected a text, .* got set"),
        (lambda: llmq.quantize(model, "w4", "text"), "calibration: expected a list of texts"),
        (lambda: llmq.quantize(model, "w4", ["x"], tokenizer=3), "tokenizer: expected a tr"),
        (lambda: llmq.quantize(model, "w4", samples="9"), "samples '9': expected a whole"),
        (lambda: llmq.prepare_qat("tiny", "w4"), "model: expected a transformers model in mem"),
        (lambda: llmq.freeze(model, "w4"), "activations: expected an ActSpec, .* got 'w4'"),
        (lambda: llmq.save("tiny", "out"), "model: expected a transformers model, .* got 'tiny'"),
        (lambda: llmq.save(model, None), "out_dir: expected the folder to write, got None"),
        (lambda: llmq.export(3, "out", "gptq"), "checkpoint: expected a folder, .* got 3"),
        (lambda: llmq.perplexity(3, "x"), "model: expected a transformers model, .* got 3"),
        (lambda: llmq.perplexity(model, 3), "data: expected a text, .* got 3"),
        (lambda: llmq.compare(model, 3, "x"), "quant: expected a transformers model, .* got 3"),
        (lambda: llmq.generate(model, 3), "prompt: expected a text to go on from, .* got 3"),
        (lambda: llmq.generate(model, "x", "9"), "max_new_tokens: expected a whole .* got '9'"),
        (lambda: llmq.Recipe.uniform(4), "spec: expected a QuantSpec, .* got 4"),
        (lambda: llmq.QuantSpec.parse(4), "spec: expected a text such as w4g128, got 4"),
        (lambda: llmq.Rule.parse(4), "rule: expected a text PATTERN=SPEC, .* got 4"),
    ]
    tokenizer_of_tiny = llmq.load_tokenizer("tiny")
    model.config._name_or_path = tokenizer_of_tiny.name_or_path
    for call, message in cases:
        with pytest.raises(llmq.LlmqError, match=message):
            call()
    with pytest.raises(TypeError, match="quantize\\(\\) got an unexpected keyword argument 'bits'"):
        llmq.quantize(model, "w4", bits=4)


def test_importing_llmq_imports_nothing_heavy():
    program = (
        "import sys, llmq; dir(llmq); print({'torch', 'transformers', 'asyncio'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "set()\n"
    assert importlib.import_module("llmq.api").__doc__
