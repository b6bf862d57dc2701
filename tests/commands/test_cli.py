"""The command line as a user meets it: exit codes, one-line errors, JSON, and nothing left
behind."""

import json
import os
import shutil
import signal

import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file, save_file

from llmq.commands.catalog import command_parsers
from llmq.commands.cli import main
from llmq.errors import LlmqError
from llmq.grid.spec import QuantSpec
from llmq.recipe import Recipe, Rule
from llmq.schema import SCHEMA_VERSION
from llmq.text.hub import HubRows


@pytest.fixture
def llmq(capsys):
    """A function that runs the command line and returns (exit code, stdout, stderr)."""

    def run(*arguments):
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as exit_:
            code = exit_.code
        return code, *capsys.readouterr()

    return run


def small(calibration_file):
    return [
        "--group-size",
        "32",
        "--samples",
        "4",
        "--sequence-length",
        "32",
        "--calibration",
        calibration_file,
    ]


def test_the_whole_way(llmq, model_folder, calibration_file, tmp_path):
    folder, out = model_folder(dtype=torch.bfloat16), tmp_path / "out"
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    code, stdout, stderr = llmq("quantize", folder, out, *small(calibration_file), "--json")
    assert code == 0, stderr
    report = json.loads(stdout)
    assert report["format"] == "compressed-tensors"
    assert "blocks 2/2" in stderr
    assert "s left" in stderr

    evaluation = [
        "--data",
        calibration_file,
        "--sequence-length",
        "64",
        "--json",
        "--max-windows",
        "8",
    ]
    code, stdout, _ = llmq("eval", out, *evaluation)
    result = json.loads(stdout)
    assert code == 0
    assert result["ci95"][0] <= result["perplexity"] <= result["ci95"][1]
    assert (result["protocol"], result["tokens"]) == ("gptq", 8 * 63)

    code, stdout, _ = llmq("compare", folder, out, *evaluation)
    comparison = json.loads(stdout)
    assert code == 0
    assert comparison["quant_perplexity"] == pytest.approx(result["perplexity"], rel=1e-6)
    assert comparison["base_bytes"] > comparison["quant_bytes"]

    code, stdout, stderr = llmq(
        "generate", out, "--prompt", "def ", "--max-new-tokens", "5", "--json"
    )
    assert code == 0
    assert json.loads(stdout)["new_tokens"] <= 5
    assert "tokens/s" in stderr

    code, stdout, _ = llmq("inspect", out, "--json")
    inspected = json.loads(stdout)
    assert inspected["specs"] == {"w4g32": 14}
    assert inspected["tensor_kinds"]["weight_packed"] == 14
    assert (inspected["quantization"]["quant_method"], inspected["quantization"]["layout"]) == (
        "compressed-tensors",
        "pack-quantized",
    )
    for name in ("generation_config.json", "chat_template.jinja", "tokenizer.json"):
        assert (out / name).read_bytes() == (folder / name).read_bytes(), name
    for command in (
        ["inspect", out],
        ["inspect", folder],
        ["plan", folder, *small(calibration_file)],
        ["doctor"],
        ["compare", folder, folder, *evaluation[:4]],
        ["eval", folder, *evaluation[:4]],
    ):
        code, stdout, stderr = llmq(*command)
        assert code == 0, stderr
        assert len(stdout.splitlines()) >= 1


def test_plan_tells_what_would_happen_and_runs_nothing(
    llmq, model_folder, calibration_file, tmp_path
):
    code, stdout, _ = llmq(
        "plan", model_folder(), *small(calibration_file), "--rule", "*.o_proj=keep", "--json"
    )
    plan = json.loads(stdout)
    assert code == 0
    assert {
        layer["name"].rpartition(".")[2] for layer in plan["layers"] if layer["spec"] is None
    } == {"o_proj"}
    assert plan["planned_bytes"] < plan["source_bytes"]
    assert plan["planned_peak_bytes"] > 0
    assert (
        plan["planned_work_bytes"] > 4 * 32 * 4 * 64 * 4
    )  # two streams of two blocks' inputs: 4 samples of 32 tokens, 64 wide, float32
    assert plan["planned_seconds"] >= 0


def test_block_wise_tuning_is_planned_run_and_reported(
    llmq, model_folder, calibration_file, tmp_path
):
    folder = model_folder()
    plans = [
        json.loads(llmq("plan", folder, *small(calibration_file), "--method", method, "--json")[1])
        for method in ("gptq", "blockwise")
    ]
    assert plans[0]["planned_peak_bytes"] < plans[1]["planned_peak_bytes"]
    assert plans[1]["recipe"]["iterations"] == 45
    assert plans[1]["recipe"]["scale_steps"] == 36
    code, stdout, stderr = llmq(
        "quantize",
        folder,
        tmp_path / "out",
        *small(calibration_file),
        "--method",
        "blockwise",
        "--iterations",
        "2",
        "--scale-steps",
        "2",
        "--autocast",
    )
    assert code == 0, stderr
    assert "block error" in stdout
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["method"] == "blockwise"
    assert [block["index"] for block in report["tuned_blocks"]] == [0, 1]
    code, _, stderr = llmq(
        "quantize",
        folder,
        tmp_path / "other",
        *small(calibration_file),
        "--method",
        "blockwise",
        "--act-order",
    )
    assert code == 2
    assert "leave out --act-order" in stderr


def test_planned_size_is_the_size(llmq, model_folder, calibration_file, tmp_path):
    folder = model_folder(hidden_size=256, intermediate_size=512, dtype=torch.bfloat16)
    options = small(calibration_file)
    planned = json.loads(llmq("plan", folder, *options, "--json")[1])["planned_bytes"]
    stored = json.loads(llmq("quantize", folder, tmp_path / "out", *options, "--json")[1])[
        "stored_bytes"
    ]
    assert planned == pytest.approx(stored, rel=0.05)


def test_activations_are_quantized_and_stored(llmq, model_folder, calibration_file, tmp_path):
    from llmq import load
    from llmq.inference.module import quantized_modules

    code, _, stderr = llmq(
        "quantize",
        model_folder(),
        tmp_path / "out",
        "--bits",
        "8",
        "--activations",
        "int8-token",
        "--method",
        "rtn",
    )
    assert code == 0, stderr
    model = load(tmp_path / "out")
    assert {module.activations.kind for module in quantized_modules(model).values()} == {
        "int8-token"
    }
    tokens = torch.randint(2, 2048, (2, 32))
    with torch.no_grad():
        got, full = model(tokens).logits, make_model()(tokens).logits
    assert 0 < float((got - full).norm() / full.norm()) < 0.05


def test_recipe_file_repeats_a_run(llmq, model_folder, calibration_file, tmp_path):
    folder = model_folder()
    first = json.loads(
        llmq(
            "quantize",
            folder,
            tmp_path / "first",
            *small(calibration_file),
            "--rule",
            "*.o_proj=w8",
            "--json",
        )[1]
    )
    (tmp_path / "recipe.json").write_text(json.dumps(first["recipe"]))
    second = json.loads(
        llmq(
            "quantize",
            folder,
            tmp_path / "second",
            "--recipe",
            tmp_path / "recipe.json",
            "--calibration",
            calibration_file,
            "--json",
        )[1]
    )
    assert second["recipe"] == first["recipe"]
    assert second["layers"] == first["layers"]


@pytest.fixture
def planned(llmq, model_folder, tmp_path):
    """A function that plans with a recipe file and returns the recipe that comes out, rules in
    their short form."""
    folder = model_folder()

    def plan(recipe, *options):
        (tmp_path / "recipe.json").write_text(json.dumps(recipe))
        code, stdout, stderr = llmq(
            "plan",
            folder,
            "--recipe",
            tmp_path / "recipe.json",
            "--method",
            "rtn",
            *options,
            "--json",
        )
        assert code == 0, stderr
        result = json.loads(stdout)["recipe"]
        return result | {
            "rules": [
                (pattern, "keep" if spec is None else str(QuantSpec.from_json(spec)))
                for pattern, spec in result["rules"]
            ]
        }

    return plan


OVERRIDES = [
    ([], [("*.down_proj", "keep"), ("*", "w3g64")]),
    (["--group-size", "32"], [("*.down_proj", "keep"), ("*", "w3g32")]),
    (["--group-size", "0"], [("*.down_proj", "keep"), ("*", "w3-tensor")]),
    (["--asymmetric"], [("*.down_proj", "keep"), ("*", "w3g64-asym")]),
    (["--bits", "8"], [("*.down_proj", "keep"), ("*", "w8g64")]),
    (
        ["--bits", "2", "--group-size", "32", "--rule", "*.q_proj=w8"],
        [("*.q_proj", "w8"), ("*.down_proj", "keep"), ("*", "w2g32")],
    ),
]


@pytest.mark.parametrize(
    ("options", "rules"),
    OVERRIDES,
    ids=lambda value: " ".join(value) if value and isinstance(value[0], str) else "",
)
def test_options_override_fields_of_a_recipe_and_leave_the_rest(planned, options, rules):
    recipe = Recipe(
        (Rule("*.down_proj", None), Rule("*", QuantSpec("int3", 64))), samples=7, sequence_length=64
    ).to_json()
    for stored in (
        recipe,
        {"recipe": recipe, "seconds": 1.0},
    ):  # alone, and as the report of a run holds it
        result = planned(stored, *options)
        assert result["rules"] == rules
        assert (result["samples"], result["sequence_length"]) == (7, 64)


def test_what_a_recipe_leaves_out_is_as_without_one(planned):
    result = planned({"samples": 7}, "--bits", "8")
    assert (result["rules"], result["samples"], result["sequence_length"]) == (
        [("*", "w8")],
        7,
        128,
    )


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ([1], "not a recipe"),
        ({"recipe": 1}, "not a recipe"),
        ({"bits": 4}, "unknown keys bits"),
        ({"rules": [["*", QuantSpec("int4", 32, False).to_json()]]}, "ternary codes are symmetric"),
    ],
)
def test_a_recipe_that_cannot_be_used_is_named(llmq, tmp_path, recipe, message):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe))
    code, _, stderr = llmq("plan", "tiny", "--recipe", path, "--bits", "ternary")
    assert (code, stderr.count("\n")) == (2, 1)
    assert stderr.startswith(f"llmq: --recipe {path}")
    assert message in stderr


def test_next_to_no_temperature_is_none(llmq, model_folder):
    texts = [
        json.loads(
            llmq(
                "generate",
                model_folder(),
                "--prompt",
                "def",
                "--max-new-tokens",
                "4",
                "--temperature",
                value,
                "--json",
            )[1]
        )["text"]
        for value in ("0", "1e-40")
    ]
    assert texts[0] == texts[1]


def poison(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def other_tokenizer(folder):
    config = json.loads((folder / "config.json").read_text())
    config["vocab_size"] = 300
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:300].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def not_causal(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "t5"}))


def mixture(folder):
    (folder / "config.json").write_text(
        json.dumps({"model_type": "mixtral", "num_local_experts": 8})
    )  # beside the weights of a dense model


BAD_INPUT = [
    (poison, [], "tensor model.layers.1.mlp.up_proj.weight holds 1 NaN"),
    (truncate, [], "not a readable safetensors file"),
    (other_tokenizer, [], "beyond the model's vocabulary of 300"),
    (not_causal, [], "not a causal language model"),
    (mixture, [], "of the tensors that MixtralForCausalLM needs, the first being"),
    (shutil.rmtree, [], "no such folder"),
    (None, ["--rule", "*.dwon=w8"], "matches none"),
    (None, ["--rule", "nonsense"], "expected PATTERN=SPEC"),
    (None, ["--rule", "*.q_proj=w7"], "cannot read the quantization"),
    (None, ["--calibration", "/nowhere.txt"], "no such file"),
    (None, ["--calibration", " "], "--calibration: expected a text file"),
    (None, ["--sequence-length", "4096"], "positions for 128 tokens only"),
    (None, ["--group-size", "1"], "group size 1"),
    (None, ["--bits", "ternary", "--asymmetric"], "ternary codes are symmetric"),
    (None, ["--format", "gptq", "--bits", "ternary"], "no ternary codes"),
    (None, ["--device", "cuda"], "not available here"),
    (None, ["--strict", "--group-size", "96"], "--strict"),
    (None, ["--max-ram", "0.000001"], "planned to need"),
    (None, ["--max-gpu-memory", "8"], "the run is on the CPU"),
    (None, ["--recipe", "/nowhere.json"], "not a recipe"),
    (None, ["--bits", "7"], "see 'llmq quantize --help'"),
    (None, ["--frobnicate"], "unrecognized option --frobnicate; see 'llmq quantize --help'"),
]


@pytest.mark.parametrize(
    ("damage", "options", "message"),
    BAD_INPUT,
    ids=lambda value: (
        getattr(value, "__name__", None) or (" ".join(value) if isinstance(value, list) else "")
    ),
)
def test_bad_input_gets_one_line_and_leaves_nothing(
    llmq, model_folder, calibration_file, tmp_path, damage, options, message
):
    if "cuda" in options and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    folder = model_folder()
    if damage:
        damage(folder)
    before = sorted(tmp_path.iterdir())
    code, stdout, stderr = llmq(
        "quantize", folder, tmp_path / "new" / "out", *small(calibration_file), *options
    )
    errors = [line for line in stderr.splitlines() if line.startswith("llmq: ")]
    assert code == 2, stderr
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in stderr
    assert stdout == ""
    assert sorted(tmp_path.iterdir()) == before


def test_short_calibration_and_existing_output(llmq, model_folder, calibration_file, tmp_path):
    folder = model_folder()
    (tmp_path / "short.txt").write_text("too short")
    code, _, stderr = llmq(
        "quantize", folder, tmp_path / "out", "--calibration", tmp_path / "short.txt"
    )
    assert (code, "one sequence needs 128" in stderr) == (2, True)
    (tmp_path / "taken").mkdir()
    for options, message in (([], "exists already"), (["--overwrite"], "was not written by llmq")):
        code, stdout, stderr = llmq(
            "quantize", folder, tmp_path / "taken", *small(calibration_file), *options, "--json"
        )
        assert code == 2
        assert message in stderr
        assert message in json.loads(stdout)["error"]
    assert llmq("quantize", folder, tmp_path / "out", *small(calibration_file))[0] == 0
    assert llmq("quantize", folder, tmp_path / "out", *small(calibration_file))[0] == 2
    assert (
        llmq(
            "quantize",
            folder,
            tmp_path / "out",
            *small(calibration_file),
            "--overwrite",
            "--bits",
            "8",
        )[0]
        == 0
    )
    code, _, stderr = llmq(
        "quantize", tmp_path / "out", tmp_path / "twice", *small(calibration_file)
    )
    assert (code, "is quantized already (compressed-tensors)" in stderr) == (2, True)


def test_an_unknown_backend_is_bad_usage(llmq, monkeypatch, model_folder, tmp_path):
    assert (
        llmq("quantize", model_folder(), tmp_path / "out", "--method", "rtn", "--group-size", "32")[
            0
        ]
        == 0
    )
    monkeypatch.setenv("LLMQ_BACKEND", "warp-drive")
    code, _, stderr = llmq("generate", tmp_path / "out", "--prompt", "def")
    assert (code, "choose one of" in stderr, "cpu-int4" in stderr) == (2, True, True)


def test_what_is_missing_is_named(llmq, monkeypatch):
    plain = json.loads(llmq("doctor", "--json")[1])
    assert plain["missing"] == []
    assert plain["packages"]["torch"] == torch.__version__
    assert plain["devices"][0].startswith("cpu (")
    assert plain["backends"]["reference"] == "works here"
    monkeypatch.setattr(
        "llmq.commands.doctor._version",
        lambda package: None if package in ("datasets", "gguf") else "1",
    )
    result = json.loads(llmq("doctor", "--json")[1])
    assert result["missing"] == ["datasets"]
    assert "gguf" in result["missing_optional"]
    assert "datasets: pip install ." in llmq("doctor")[1]


def test_notes_of_layers_that_differ_go_to_stderr(llmq, model_folder, tmp_path):
    code, stdout, stderr = llmq(
        "quantize",
        model_folder(intermediate_size=172),
        tmp_path / "out",
        "--group-size",
        "64",
        "--method",
        "rtn",
        "--json",
    )
    assert code == 0
    report = json.loads(stdout)
    assert report["kept_layers"] == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    assert "note: 2 layers, model.layers.*.mlp.down_proj: kept in full precision" in stderr
    assert len(report["notes"]) == 2


@pytest.mark.parametrize(
    "family", ["llama", "gpt2"]
)  # rotary positions, which go on for ever, and learned ones, which end
def test_more_tokens_than_positions_are_refused(llmq, model_folder, calibration_file, family):
    folder = model_folder(family)
    for command in (["eval", folder], ["compare", folder, folder]):
        code, _, stderr = llmq(*command, "--data", calibration_file, "--sequence-length", "129")
        assert (code, stderr) == (
            2,
            f"llmq: --sequence-length 129: {family} has positions for 128 tokens only; give "
            "--sequence-length 128 or less\n",
        )
    prompt = ["generate", folder, "--json", "--prompt"]
    code, _, stderr = llmq(*prompt, "def", "--max-new-tokens", "128")
    assert (code, "128 tokens only; give --max-new-tokens 127 or less" in stderr) == (2, True)
    code, _, stderr = llmq(*prompt, "def " * 200)
    assert (code, "give a shorter --prompt" in stderr) == (2, True)
    code, stdout, stderr = llmq(*prompt, "def " * 100)
    assert code == 0, stderr
    assert json.loads(stdout)["new_tokens"] <= 28


def test_a_smaller_quantized_model_is_not_run_beyond_its_positions(
    llmq, model_folder, calibration_file
):
    folders = [model_folder(name="base"), model_folder(name="short", max_position_embeddings=64)]
    code, _, stderr = llmq(
        "compare", *folders, "--data", calibration_file, "--sequence-length", "128"
    )
    assert (code, "positions for 64 tokens only" in stderr) == (2, True)


def test_figures_carry_their_conditions(llmq, model_folder, calibration_file, monkeypatch):
    monkeypatch.setenv("LLMQ_COMPUTE", "int8")
    folder = model_folder(dtype=torch.bfloat16)
    other = model_folder(dtype=torch.float16, name="other")
    options = [
        "--data",
        calibration_file,
        "--sequence-length",
        "64",
        "--dtype",
        "auto",
        "--head-bits",
        "4",
    ]
    for command, intervals, dtype in (
        (["eval", folder], ["ci95"], "bfloat16"),
        (
            ["compare", folder, other],
            ["perplexity_ratio_ci95", "kl_mean_ci95"],
            "bfloat16 and float16",
        ),
    ):
        result = json.loads(llmq(*command, *options, "--max-windows", "2", "--json")[1])
        assert (result["compute"], result["head_bits"], result["dtype"]) == ("int8", 4, dtype)
        assert all(len(result[name]) == 2 for name in intervals)
        assert [
            json.loads(llmq(*command, *options, "--max-windows", "1", "--json")[1])[name]
            for name in intervals
        ] == [None] * len(intervals)
        text = llmq(*command, *options, "--max-windows", "1")[1]
        assert text.count("one window, no interval") == len(intervals)
        assert f"BOS none, {dtype}, compute int8, head at 4 bits" in text


def test_weights_that_are_no_numbers_generate_nothing(llmq, model_folder, calibration_file):
    folder = model_folder()
    poison(folder)
    commands = [
        (["generate", folder, "--prompt", "def"], 1),
        (["eval", folder, "--data", calibration_file], 2),
        (["compare", folder, folder, "--data", calibration_file], 2),
    ]
    for command, expected in commands:
        for dtype, remedy in (
            ("float32", "the checkpoint itself is at fault"),
            ("bfloat16", "try --dtype float32"),
        ):
            code, stdout, stderr = llmq(*command, "--dtype", dtype, "--json")
            assert code == expected
            assert f"NaN or infinite in {dtype}; {remedy}" in stderr
            assert json.loads(stdout).keys() == {"schema_version", "error"}


# (command, option, values that it refuses); every other argument is good.
BAD_NUMBERS = [
    ("eval", "--sequence-length", ["1", "0", "-5", "x", "2.5"]),
    ("eval", "--max-windows", ["0", "-1"]),
    ("compare", "--sequence-length", ["1"]),
    ("generate", "--max-new-tokens", ["0", "-4"]),
    ("generate", "--temperature", ["-1", "nan", "inf", "warm"]),
    ("generate", "--seed", ["-1", str(2**63)]),
    ("plan", "--max-ram", ["nan", "inf", "-1"]),
    ("plan", "--max-gpu-memory", ["nan"]),
    ("plan", "--samples", ["0"]),
    ("plan", "--sequence-length", ["1"]),
    ("plan", "--seed", [str(2**63)]),
    ("plan", "--damping", ["nan"]),
    ("plan", "--group-size", ["-2"]),
    ("plan", "--iterations", ["0"]),
    ("plan", "--learning-rate", ["inf"]),
    ("qat", "--seed", [str(2**32)]),
    ("qat", "--sequence-length", ["1"]),
    *(
        ("qat", option, ["0"])
        for option in ("--max-tokens", "--max-steps", "--batch-size", "--accumulation")
    ),
    *(
        ("qat", option, ["-1", "nan"])
        for option in (
            "--lr-weights",
            "--lr-scales",
            "--kl",
            "--ce",
        )
    ),
    *(("qat", option, ["-1"]) for option in ("--log-every", "--save-every", "--eval-every")),
    ("bench", "--rows", ["0"]),
    ("bench", "--repeats", ["0"]),
    ("bench", "--tune-seconds", ["-1", "nan"]),
]
POSITIONAL = {
    "compare": ["tiny", "out"],
    "qat": ["tiny", "out"],
    "generate": ["tiny", "--prompt", "def"],
    "bench": [],
}


@pytest.mark.parametrize(
    ("command", "option", "values"),
    BAD_NUMBERS,
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_numbers_get_one_line(llmq, command, option, values):
    for value in values:
        code, stdout, stderr = llmq(
            command, *POSITIONAL.get(command, ["tiny"]), option, value, "--json"
        )
        assert (code, stderr.count("\n")) == (2, 1)
        assert stderr.startswith(f"llmq: {option}: expected a ")
        assert stderr.endswith(f"got {value!r}; see 'llmq {command} --help'\n")
        error = {"schema_version": SCHEMA_VERSION, "error": stderr.removeprefix("llmq: ").strip()}
        assert json.loads(stdout) == error


def test_every_number_has_its_bounds():
    """Plain int and float take what no command can use: NaN, 0 windows, a seed of 100 bits."""
    plain = [
        f"{name} {action.dest}"
        for name, parser in command_parsers().items()
        for action in parser._actions
        if action.type in (int, float) and not action.choices
    ]
    assert plain == []


def test_a_reader_that_left_gets_no_traceback(llmq, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr("sys.stdout", stdout)
        code = main(["inspect", "tiny"])
        monkeypatch.undo()
    assert code == 141


@pytest.mark.parametrize(
    "disguise",
    [
        ValueError("could not determine the shape"),
        LlmqError("x: damaged; download it again"),
        OSError("failed"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_an_interruption_in_disguise_is_still_one(llmq, monkeypatch, disguise, number):
    """An exception raised by a signal inside a C extension comes out as the extension likes;
    safetensors makes a ValueError of it."""

    def interrupted(args):
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            raise disguise from None

    monkeypatch.setattr("llmq.commands.quantize.run", interrupted)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell that runs the tests in the background has it ignored
    try:
        code, _, stderr = llmq("quantize", "model", "out")
    finally:
        for handled, handler in handlers.items():
            signal.signal(handled, handler)
    assert (code, stderr) == (
        130,
        "llmq: interrupted; the same command continues where it stopped\n",
    )


def test_warnings_are_told_and_in_the_json(model_folder, monkeypatch, capsys):
    monkeypatch.setattr("llmq.text.hub.MAX_DOCUMENTS", 2)
    rows = [{"text": "some words of a row " * 20}] * 3
    monkeypatch.setattr("llmq.text.hub.open_rows", lambda *a, **k: HubRows(rows, "train", None))
    arguments = [
        "eval",
        str(model_folder()),
        "--data",
        "someone/texts",
        "--sequence-length",
        "16",
        "--max-windows",
        "2",
    ]
    assert main([*arguments, "--json"]) == 0
    found = capsys.readouterr()
    (warning,) = json.loads(found.out)["warnings"]
    assert "the first 2 documents are used" in warning
    assert f"llmq: warning: {warning}" in found.err
    assert main(arguments) == 0
    assert warning in capsys.readouterr().err
