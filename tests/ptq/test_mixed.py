"""Bits where they count: within the budget, alike where engines fuse layers, checked against one
width, and the same again from what was kept."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

import llmq
from llmq.commands.cli import main
from llmq.errors import LlmqError
from llmq.formats.registry import format_named
from llmq.models.site import fused_names
from llmq.ptq import mixed_run
from llmq.ptq.budget import disk_bytes, flops, stored_bytes, work_bytes
from llmq.ptq.choice import Budget
from llmq.ptq.costs import Cost
from llmq.ptq.job import prepare
from llmq.ptq.mixed import Problem, candidates_of
from llmq.ptq.run import quantize_folder
from llmq.recipe import Recipe, Rule


@pytest.fixture
def job(model_folder, calibration_file):
    recipe = Recipe.uniform("w4g32", samples=4, sequence_length=32)
    return prepare(str(model_folder()), recipe, calibration=str(calibration_file))


def some_cost(place, spec):
    return Cost((1 + place) * 4.0**-spec.bits + spec.symmetric * 1e-3)


def some_costs(problem):
    """Fewer bits cost more, and later layers more than earlier ones."""
    return {
        name: {str(spec): some_cost(i, spec) for spec in specs}
        for i, (name, specs) in enumerate(problem.candidates.items())
    }


@pytest.mark.parametrize(
    ("format", "options"),
    [("auto", {}), ("llmq", {"order": "act"}), ("gptq", {"order": "act"}), ("gptq", {})],
)
def test_sizes_are_those_of_the_file(model_folder, calibration_file, tmp_path, format, options):
    recipe = Recipe.uniform("w4g32", samples=4, sequence_length=32, **options)
    job = prepare(str(model_folder()), recipe, calibration=str(calibration_file), format=format)
    report = quantize_folder(job, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    told = {layer["name"]: layer["n_bytes"] for layer in report["layers"]}
    assert {plan.layer.name: job.planned_bytes(plan) for plan in job.plans} == told
    for layer, n_bytes in told.items():
        parts = {name: each for name, each in stored.items() if name.startswith(f"{layer}.")}
        parts.pop(f"{layer}.weight_shape", None)
        assert sum(each.nbytes for each in parts.values()) == n_bytes


def test_fused_layers_get_one_spec_and_rules_stay(job):
    rules = (Rule("*.0.*.o_proj", llmq.QuantSpec("int8", 32)), *job.recipe.rules)
    plans = Recipe(rules=rules).plan(plan.layer for plan in job.plans)
    problem = Problem.of(
        replace(job, plans=plans, recipe=replace(job.recipe, rules=rules)), Budget(3)
    )
    for bits in (2.9, 3.3, 4.1, 9):
        choice = problem.choose(some_costs(problem), Budget(bits))
        assert choice.bits <= bits
        by_group = {}
        for name, spec in choice.specs.items():
            by_group.setdefault(fused_names(name), set()).add(spec)
        assert all(len(specs) == 1 for specs in by_group.values())
        planned = choice.recipe(job.recipe).rules
        assert "model.layers.0.self_attn.o_proj" not in choice.specs
        assert planned[-1] == job.recipe.rules[-1]


def test_a_budget_that_is_too_small_is_refused_with_the_least(job):
    problem = Problem.of(job, Budget(3))
    with pytest.raises(LlmqError, match=r"--bpw 2: .* takes 2\.5000 bits"):
        problem.choose(some_costs(problem), Budget(2.0))
    assert problem.choose(some_costs(problem), Budget(2.5)).bits == 2.5
    with pytest.raises(LlmqError, match=r"--max-bytes 1000: .* give --max-bytes \d+"):
        problem.choose(some_costs(problem), Budget(n_bytes=1000))


def test_scales_per_row_are_candidates_where_a_format_takes_several_group_sizes(job):
    name = "model.layers.0.mlp.down_proj"
    found = [str(spec) for spec in Problem.of(job, Budget(3)).candidates[name]]
    assert found == [
        *("w2g32", "w2g32-asym", "w3g32", "w3", "w3g32-asym", "w3-asym", "w4g32", "w4"),
        *("w5g32", "w6g32", "w8g32"),
    ]
    one_size = replace(job, fmt=format_named("gptq"))
    (plan,) = [plan for plan in job.plans if plan.layer.name == name]
    assert all(spec.group_size == 32 for spec in candidates_of(plan, one_size))


def test_one_width_is_compared_where_it_takes_about_as_much(job):
    problem = Problem.of(job, Budget(3))
    costs = some_costs(problem)
    near = problem.uniform(costs, Budget(4.6))
    assert {str(spec) for spec in near.specs.values()} == {"w4g32"}
    assert problem.uniform(costs, Budget(7.9)) is None


def test_what_is_chosen_has_the_scales_that_were_measured_and_reads_no_weight(job, monkeypatch):
    costs = some_costs(Problem.of(job, Budget(3)))
    name = "model.layers.1.mlp.down_proj"
    costs[name] = {text: Cost(each.nats, "bfloat16") for text, each in costs[name].items()}
    monkeypatch.setattr(type(job.source.tensors), "read", None)
    mixed = mixed_run.choose(job, costs, Budget(4.6))
    (plan,) = [plan for plan in mixed.chosen.plans if plan.layer.name == name]
    assert plan.spec.scale_dtype == "bfloat16"
    assert "bfloat16" in mixed.chosen.notes[name]
    with pytest.raises(LlmqError, match=rf"--strict: .*{name}"):
        mixed_run.choose(job, costs, Budget(4.6), strict=True)


def test_both_results_are_counted(job):
    mixed = mixed_run.choose(job, some_costs(Problem.of(job, Budget(3))), Budget(4.6))
    both = [mixed.uniform, mixed.chosen]
    assert list(mixed.trials.values()) == both
    assert mixed.disk_bytes >= sum(map(stored_bytes, both)) + work_bytes(mixed.chosen)
    assert mixed.flops == sum(map(flops, both))
    alone = replace(mixed, uniform=None)
    assert (alone.disk_bytes, alone.flops) == (disk_bytes(mixed.chosen), flops(mixed.chosen))


def test_embeddings_take_part_in_a_budget_of_bytes(model_folder, calibration_file):
    recipe = Recipe.uniform("w4g32", samples=4, sequence_length=32)
    job = prepare(
        str(model_folder("llama", tie_word_embeddings=True)),
        recipe,
        calibration=str(calibration_file),
        format="llmq",
    )
    stored = stored_bytes(job)
    assert not Problem.of(job, Budget(4)).tables
    for share, is_kept in ((1.2, True), (0.6, False)):
        budget = Budget(n_bytes=int(share * stored))
        problem = Problem.of(job, budget)
        assert [table.role for table in problem.tables] == ["embeddings and head"]
        costs = some_costs(problem)
        for table, specs in problem.tables.items():
            costs[table.name] = {str(spec): some_cost(1, spec) for spec in specs}
        mixed = mixed_run.choose(job, costs, budget, format="llmq")
        assert stored_bytes(mixed.chosen) <= budget.n_bytes
        assert (mixed.chosen.outside == ()) == is_kept
        assert (mixed.chosen.recipe.embeddings is None) == is_kept


def test_measuring_costs_needs_space(job, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(LlmqError, match=r"activations of what bits are worth.*LLMQ_CACHE_DIR"):
        mixed_run.measured_costs(job, Budget(3.6), "cpu")


def test_experts_of_a_module_get_the_same_bits(model_folder, calibration_file, tmp_path):
    recipe = Recipe.uniform("w4g32", samples=4, sequence_length=32)
    job = prepare(str(model_folder("qwen3_moe")), recipe, calibration=str(calibration_file))
    costs = mixed_run.measured_costs(job, Budget(3.5), "cpu")
    mixed = mixed_run.choose(job, costs, Budget(3.5))
    for index in range(2):
        prefix = f"model.layers.{index}.mlp.experts."
        plans = [plan for plan in mixed.chosen.plans if plan.layer.name.startswith(prefix)]
        assert len({plan.spec for plan in plans}) == 1
        patterns = [rule.pattern for rule in mixed.chosen.recipe.rules if "experts" in rule.pattern]
        assert f"{prefix}*.down_proj" in patterns
    again = mixed.chosen.recipe.plan([plan.layer for plan in mixed.chosen.plans])
    assert [plan.spec for plan in again] == [plan.spec for plan in mixed.chosen.plans]


def options_of(model, calibration_file):
    found = [model, "--calibration", str(calibration_file), "--samples", "4"]
    return [*found, "--sequence-length", "32", "--group-size", "32"]


def test_the_command_keeps_the_better_one_and_its_recipe_runs_again(
    model_folder, calibration_file, tmp_path, capsys
):
    model, *options = options_of(str(model_folder()), calibration_file)
    assert main(["plan", model, *options, "--bpw", "4.6", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["mixed"]["mixed"] is None
    assert planned["mixed"]["n_results"] == 2
    assert planned["planned_disk_bytes"] > 2 * planned["planned_bytes"]
    out = tmp_path / "out"
    assert main(["quantize", model, str(out), *options, "--bpw", "4.6"]) == 0
    shown = capsys.readouterr().out
    report = json.loads((out / "report.json").read_text())
    told = report["mixed"]
    assert "mixed bits" in shown
    assert report["resumed_at_block"] == 0
    assert report["bits_per_quantized_weight"] <= 4.6
    assert report["bits_per_quantized_weight"] == told[told["kept"]]["bits_per_quantized_weight"]
    measured = {name: told[name]["held_out_kl"] for name in ("mixed", "uniform")}
    kept = [text["kl_mean"] for text in report["held_out"]]
    assert kept == pytest.approx(measured[told["kept"]])
    gain = mixed_run._gain(measured["mixed"], measured["uniform"])
    assert told["kept"] == ("mixed" if gain >= 0 else "uniform")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".out")] == []
    assert main(["plan", model, *options, "--bpw", "4.6", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)["mixed"]["mixed"]
    assert planned["layers_by_spec"] == told["mixed"]["layers_by_spec"]
    again = tmp_path / "again"
    recipe = ["--recipe", str(out / "report.json"), "--calibration", str(calibration_file)]
    assert main(["quantize", model, str(again), *recipe]) == 0
    shards = [sorted(folder.glob("*.safetensors")) for folder in (out, again)]
    for first, second in zip(*shards, strict=True):
        assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("better", ["mixed", "uniform"])
def test_what_loses_less_is_kept_also_by_a_run_that_goes_on(job, tmp_path, monkeypatch, better):
    problem = Problem.of(job, Budget(3))
    mixed = mixed_run.choose(job, some_costs(problem), Budget(4.6))
    gain = 1.0 if better == "mixed" else -1.0
    monkeypatch.setattr(mixed_run, "_gain", lambda *figures: gain)
    original, n_calls = mixed_run.quantize_folder, []

    def killed_at_the_second(*arguments, **options):
        n_calls.append(options["attempt"].variant)
        if len(n_calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(mixed_run, "quantize_folder", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        mixed_run.quantize_mixed(mixed, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    told = []
    report = mixed_run.quantize_mixed(
        mixed, tmp_path / "out", on_start=lambda done, total: told.append((done, total))
    )
    is_new = better == "mixed"  # the other one was finished by the run that was killed
    assert told == ([(0, 2)] if is_new else [(0, 2), (2, 2)])
    assert report["resumed_at_block"] == (0 if is_new else 2)
    assert n_calls == [".uniform", "", "", ".uniform" if better == "uniform" else ""]
    assert report["mixed"]["kept"] == better
    assert {path.name for path in tmp_path.iterdir() if "out" in path.name} == {"out"}
    specs = {layer["name"]: layer["spec"] for layer in report["layers"]}
    kept = mixed.chosen if better == "mixed" else mixed.uniform
    assert specs == {plan.layer.name: str(plan.spec) for plan in kept.plans}


@pytest.mark.slow
def test_python_takes_a_size(model_folder, calibration_file, tmp_path):
    texts = [calibration_file.read_text()]
    sizes = {"samples": 4, "sequence_length": 32, "method": "gptq"}
    limit = 1_000_000  # embeddings and head take 1,048,576, of which the format holds the head
    report = llmq.quantize(
        str(model_folder()), tmp_path / "out", "w4g32", texts, max_bytes=limit, **sizes
    )
    stored = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert 0.6 * limit < stored <= limit
    assert [table["role"] for table in report["outside"]] == ["head"]
    assert report["mixed"]["asked"] == f"--max-bytes {limit}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bpw", "3", "--bits", "4"], "each says how many bits"),
        (["--bpw", "3", "--method", "rtn"], "reads none; use --method gptq"),
        (["--max-bytes", "many"], "expected a size such as 60MB"),
        (["--bpw", "4", "--format", "awq"], "nothing to choose|holds no mixed bits"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    options, message, model_folder, calibration_file, tmp_path, capsys
):
    model, *others = options_of(str(model_folder()), calibration_file)
    assert main(["quantize", model, str(tmp_path / "out"), *others, *options]) == 2
    assert re.search(message, capsys.readouterr().err)
