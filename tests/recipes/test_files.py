"""Recipe files: YAML and JSON say the same, ready ones work, and each error names file and key."""

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from llmq.commands.cli import main
from llmq.errors import LlmqError
from llmq.qat.schedule import Phases
from llmq.qat.settings import QATSettings
from llmq.recipe import Recipe, Rule
from llmq.recipes import files
from llmq.recipes.files import read_recipe_file, ready_names

README = (Path(files.__file__).parent / "README.md").read_text()
QAT_RECIPES = {"w2-qat", "ternary-bitnet"}


@pytest.fixture
def written(tmp_path):
    """A function that writes a recipe file and returns its name."""

    def write(text, name="recipe.yaml"):
        path = tmp_path / name
        path.write_text(text if isinstance(text, str) else json.dumps(text))
        return str(path)

    return write


def test_yaml_and_json_say_the_same(written):
    data = {
        "method": "blockwise",
        "learning_rate": 1e-2,
        "search": False,
        "autocast": None,
        "rules": ["*.down_proj=w8", ["*.o_proj", "keep"], ["*", "w3g64-asym"]],
        "activations": {"kv_bits": 8},
        "qat": {"scheme": "w2", "phases": {"gradual": 0.5}},
    }
    from_json = read_recipe_file(written(data, "recipe.json"))
    for flow in (True, False):
        text = yaml.safe_dump(data, default_flow_style=flow)
        from_yaml = read_recipe_file(written(text))
        assert (from_yaml.recipe, from_yaml.qat) == (from_json.recipe, from_json.qat)
    recipe = Recipe.from_json(from_json.recipe)
    assert recipe.rules == (
        Rule.parse("*.down_proj=w8"),
        Rule("*.o_proj", None),
        Rule.parse("*=w3g64-asym"),
    )
    assert (recipe.learning_rate, recipe.activations.kv_bits) == (0.01, 8)


def test_a_ready_name_goes_before_a_folder_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w8a8").mkdir()
    assert read_recipe_file("w8a8").recipe["rules"] == ["*=w8"]
    with pytest.raises(LlmqError, match=r"--recipe \./w8a8: expected a regular file"):
        read_recipe_file("./w8a8")
    with pytest.raises(LlmqError, match=r"w4-gtpq: not a recipe: no such file, .* w4-gptq, w8a8"):
        read_recipe_file("w4-gtpq")


BAD = [
    ("- 1", "expected an object, got list"),
    ("sweeps: 4\nsweeps: 5", "line 2: key 'sweeps' appears twice"),
    ("1: 2", "line 1: keys are text"),
    ("swoops: 4", "unknown keys swoops; known are rules, method"),
    ("sweeps: 4.0", "sweeps 4.0: expected a whole number"),
    ("order: desc", "unknown order 'desc': expected group, static, none or act"),
    ("damping: .nan", "damping nan: expected a finite number"),
    ("seed: 2020-01-01", "put text in quotes"),
    ("activations: {kind: int4}", "unknown activations.kind 'int4'"),
    ("activations: {kinds: x}", "activations: unknown keys kinds"),
    ("activations: int8", "activations 'int8': expected an object with some of the keys kind"),
    ("rules: [*.down_proj=w8]", "line 1: what begins with \\* is an alias, .* needs quotes"),
    ("a: &a [1]\nb: *a", "line 2: what begins with \\* is an alias"),
    ("a: " + "[" * 100 + "]" * 100, "nested more than 64 deep"),
    ("a: !!python/object/apply:os.getcwd []", "not a recipe: no YAML"),
    ("a: [", "not a recipe: no YAML"),
    ("a: 1\n---\nb: 2", "not a recipe: no YAML"),
    ("a: " + "x" * (1 << 19), "expected at most 262144"),
    ("qat: w2", "qat 'w2': expected an object"),
    ("recipe: 1", "not a recipe: what it holds under 'recipe' is no object"),
]


@pytest.mark.parametrize(("text", "message"), BAD, ids=[message for _, message in BAD])
def test_errors_name_the_file_and_the_key(text, message, written):
    name = written(text)
    with pytest.raises(LlmqError, match=message) as caught:
        read_recipe_file(name)
    assert str(caught.value).startswith(f"--recipe {name}: ")
    assert len(str(caught.value)) <= 400


BAD_RULES = [
    (["w8"], r"rules\[0\]: rule 'w8': expected PATTERN=SPEC"),
    (["*=w4g128", ["*", "w7"]], r"rules\[1\]: cannot read the quantization 'w7'"),
    (["*=w4g128", ["*"]], r"rules\[1\]: rule \['\*'\]: expected 'PATTERN=SPEC', or a pair"),
    ("*=w4g128", r"rules '\*=w4g128': expected a list"),
]


@pytest.mark.parametrize(("rules", "message"), BAD_RULES)
def test_errors_name_the_rule(rules, message):
    with pytest.raises(LlmqError, match=message):
        Recipe.from_json({"rules": rules})


@pytest.mark.parametrize("name", sorted(set(ready_names()) - QAT_RECIPES))
def test_a_ready_recipe_quantizes_tiny(name, calibration_file, tmp_path):
    short = ["--samples", "2", "--sequence-length", "32", "--calibration", str(calibration_file)]
    if name == "w3-blockwise":
        short += ["--iterations", "1", "--scale-steps", "1"]
    out = tmp_path / "out"
    assert main(["quantize", "tiny", str(out), "--recipe", name, *short]) == 0
    report = json.loads((out / "report.json").read_text())
    stored = read_recipe_file(name).recipe
    assert report["recipe"]["method"] == stored["method"]
    (spec,) = {layer["spec"] for layer in report["layers"]}
    assert [f"*={spec}"] == stored["rules"]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(QAT_RECIPES))
def test_a_ready_recipe_fine_tunes_tiny(name, calibration_file, tmp_path, capsys):
    short = ["--max-steps", "1", "--batch-size", "1", "--sequence-length", "32", "--held-out", "0"]
    short += ["--train", str(calibration_file), "--device", "cpu", "--json"]
    out, again = tmp_path / "out", tmp_path / "again"
    rule = ["--rule", "*.layers.1.*=keep"]
    assert main(["qat", "tiny", str(out), "--recipe", name, *rule, *short]) == 0
    settings = json.loads(capsys.readouterr().out)["settings"]
    stored = read_recipe_file(name).qat
    assert settings["quantizer"] == stored["quantizer"]
    assert settings["phases"]["gradual"] == stored.get("phases", {"gradual": 0.0})["gradual"]
    report = str(out / "report.json")
    text = ["--train", str(calibration_file), "--device", "cpu", "--json"]
    assert main(["qat", "tiny", str(again), "--recipe", report, *text]) == 0
    assert json.loads(capsys.readouterr().out)["settings"] == settings
    weights = [(folder / "model.safetensors").read_bytes() for folder in (out, again)]
    assert weights[0] == weights[1]


def test_every_key_is_documented():
    """Each field is the first word of a row of its table, or one of several there."""
    ptq, qat = README.split("## Keys for `llmq qat`")
    for cls, part in ((Recipe, ptq), (QATSettings, qat), (Phases, qat)):
        keys = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\|([^|]*)\|", part, re.M))))
        assert {field.name for field in fields(cls)} <= keys, cls.__name__
    assert set(ready_names()) <= set(re.findall(r"^\| `([\w-]+)` \|", README, re.M))


def test_the_example_of_the_readme_is_read(written):
    (example,) = re.findall(r"```yaml\n(.*?)```", README, flags=re.DOTALL)
    recipe = read_recipe_file(written(example))
    assert Recipe.from_json(recipe.recipe).rules[0] == Rule("*.layers.0.*", None)
    assert recipe.qat is not None
