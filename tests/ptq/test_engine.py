"""The main job on every family: quantize block by block, save, reload, same logits; and what the
engine promises beside that."""

import json
import os

import pytest
import torch
from conftest import FAMILY_CONFIGS, families, make_model
from safetensors.torch import load_file

import llmq
from llmq.errors import LlmqError, VerificationError
from llmq.grid.spec import ActSpec, QuantSpec
from llmq.inference.module import quantized_modules
from llmq.ptq import precision
from llmq.ptq.job import prepare
from llmq.ptq.precision import Precision
from llmq.ptq.run import quantize_folder
from llmq.recipe import Recipe, Rule
from llmq.storage import files
from llmq.text.documents import calibration_windows

TOKENS = torch.randint(2, 2048, (6, 32), generator=torch.Generator().manual_seed(1))


def recipe(spec="w4g32", **options):
    return Recipe.uniform(spec, **{"samples": 6, "sequence_length": 32, **options})


@torch.no_grad()
@pytest.mark.parametrize("model_type", FAMILY_CONFIGS)
def test_quantize_save_reload(model_type, model_folder, calibration_file, tmp_path):
    _quantize_save_reload(model_type, "gptq", model_folder, calibration_file, tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("model_type", families("llama"))
def test_quantize_save_reload_in_the_native_format(
    model_type, model_folder, calibration_file, tmp_path
):
    _quantize_save_reload(model_type, "llmq", model_folder, calibration_file, tmp_path)


def _quantize_save_reload(model_type, fmt, model_folder, calibration_file, tmp_path):
    folder = model_folder(model_type)
    out = tmp_path / "out"
    report = quantize_folder(
        prepare(str(folder), recipe(), calibration=str(calibration_file), format=fmt), out
    )
    assert report["format"] == fmt
    assert not report["fallbacks"]
    assert all(layer["error"] < layer["rtn_error"] for layer in report["layers"])

    loaded = llmq.load(out, dtype="float32")
    in_memory = make_model(model_type)
    tokens = calibration_windows_of(folder, calibration_file)
    llmq.quantize(in_memory, recipe(), tokens)
    assert (
        len(quantized_modules(loaded))
        == report["n_quantized_layers"]
        == len(quantized_modules(in_memory))
    )
    expected, got = (model(TOKENS, use_cache=False).logits for model in (in_memory, loaded))
    assert torch.equal(got, expected)
    full = make_model(model_type)(TOKENS, use_cache=False).logits
    assert 0 < float((got - full).norm() / full.norm()) < 0.5


def calibration_windows_of(folder, calibration_file):
    from llmq.models.source import load_config, load_tokenizer
    from llmq.ptq.calibration import windows

    return windows(
        load_tokenizer(folder), load_config(folder), recipe(), str(calibration_file)
    ).tokens


@torch.no_grad()
def test_an_mlp_that_no_group_divides_is_quantized_by_rows(
    model_folder, calibration_file, tmp_path
):
    """172 columns, as in stories260K: kept by the rule for groups, exact by rows."""
    folder = model_folder(intermediate_size=172)
    report = quantize_folder(
        prepare(str(folder), recipe("w4"), calibration=str(calibration_file)), tmp_path / "out"
    )
    assert not report["kept_layers"]
    in_memory = make_model(intermediate_size=172)
    llmq.quantize(in_memory, recipe("w4"), calibration_windows_of(folder, calibration_file))
    assert torch.equal(
        llmq.load(tmp_path / "out", dtype="float32")(TOKENS).logits, in_memory(TOKENS).logits
    )


@torch.no_grad()
@pytest.mark.parametrize(
    "spec", ["w8", "w3g64-asym", "w2g32-asym", "ternary-g32", "w4-tensor", "w4g32-asym"]
)
def test_every_code_survives_the_disk(spec, model_folder, calibration_file, tmp_path):
    out = tmp_path / "out"
    quantize_folder(
        prepare(
            str(model_folder(dtype=torch.bfloat16)), recipe(spec), calibration=str(calibration_file)
        ),
        out,
    )
    loaded = llmq.load(out)
    assert loaded.dtype == torch.bfloat16
    assert {str(module.spec) for module in quantized_modules(loaded).values()} == {spec}
    assert torch.isfinite(loaded(TOKENS, use_cache=False).logits).all()


@torch.no_grad()
def test_act_order_stores_and_loads_g_idx(model_folder, calibration_file, tmp_path):
    for fmt in ("gptq", "llmq"):
        out = tmp_path / fmt
        quantize_folder(
            prepare(
                str(model_folder(name=f"model-{fmt}")),
                recipe(order="act"),
                calibration=str(calibration_file),
                format=fmt,
            ),
            out,
        )
        assert all(
            module.g_idx is not None for module in quantized_modules(llmq.load(out)).values()
        )
    assert (
        json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"][
            "desc_act"
        ]
        is True
    )
    assert torch.equal(
        llmq.load(tmp_path / "gptq", dtype="float32")(TOKENS).logits,
        llmq.load(tmp_path / "llmq", dtype="float32")(TOKENS).logits,
    )


def test_rules_decide_layer_by_layer(model_folder, calibration_file, tmp_path):
    rules = (
        Rule("*.down_proj", QuantSpec("int8", -1)),
        Rule("*.layers.0.self_attn.*", None),
        Rule("*", QuantSpec("int4", 32)),
    )
    job = prepare(
        str(model_folder()),
        Recipe(rules=rules, samples=6, sequence_length=32),
        calibration=str(calibration_file),
    )
    out = tmp_path / "out"
    report = quantize_folder(job, out)
    assert report["format"] == "compressed-tensors"
    assert len(report["kept_layers"]) == 4
    modules = quantized_modules(llmq.load(out))
    assert {name: str(module.spec) for name, module in modules.items() if "down" in name} == {
        f"model.layers.{i}.mlp.down_proj": "w8" for i in range(2)
    }
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    assert {"model.layers.0.self_attn.q_proj", "lm_head"} <= set(settings["ignore"])


def test_act_order_with_one_scale_per_row_has_nothing_to_say_in_the_config(
    model_folder, calibration_file, tmp_path
):
    quantize_folder(
        prepare(
            str(model_folder()),
            recipe("w4", order="act"),
            calibration=str(calibration_file),
            format="gptq",
        ),
        tmp_path / "out",
    )
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"][
            "desc_act"
        ]
        is False
    )
    assert all(
        module.g_idx is None for module in quantized_modules(llmq.load(tmp_path / "out")).values()
    )


@pytest.mark.parametrize("kept", ["*.layers.0.*", "*.layers.1.*", "*.o_proj"])
@pytest.mark.parametrize("fmt", ["gptq", "llmq"])
def test_saved_configs_name_the_kept_layers_as_the_folder_does(kept, fmt, model_folder, tmp_path):
    settings = Recipe(
        rules=(
            Rule(kept, None),
            Rule("*.down_proj", QuantSpec("int8", -1)),
            Rule("*", QuantSpec("int4", 32)),
        ),
        method="rtn",
    )
    quantize_folder(prepare(str(model_folder()), settings, format=fmt), tmp_path / "folder")
    in_memory = make_model()
    llmq.quantize(in_memory, settings)
    llmq.save(in_memory, tmp_path / "memory", format=fmt)
    llmq.save(llmq.load(tmp_path / "folder"), tmp_path / "loaded", format=fmt)
    folder, memory, loaded = (
        json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]
        for name in ("folder", "memory", "loaded")
    )
    assert folder == memory == loaded
    n_kept = (
        len(folder["modules_to_not_convert"])
        if fmt == "llmq"
        else sum(name.startswith("-:") for name in folder["dynamic"])
    )
    joint = 2 if fmt == "gptq" else 0  # patterns for qkv_proj and gate_up_proj
    assert n_kept == (2 if "o_proj" in kept else 7 + joint)


def test_a_named_format_that_other_engines_will_not_load_is_noted(model_folder):
    settings = Recipe(
        rules=(Rule("*.v_proj", QuantSpec("int8", -1)), Rule("*", QuantSpec("int4", 32))),
        method="rtn",
    )
    folder = str(model_folder())
    noted = prepare(folder, settings, format="gptq", strict=True).notes["format gptq"]
    assert "not read by vLLM, SGLang: model.layers.0.self_attn.q_proj (w4g32)" in noted
    job = prepare(folder, settings)
    assert list(job.notes) == [f"format {job.fmt.name}"] == ["format compressed-tensors"]
    assert prepare(folder, settings, format="llmq").notes == {}


def test_rtn_needs_no_text_and_equals_plain_rounding(model_folder, tmp_path):
    from llmq.grid.tensor import QuantizedTensor

    out = tmp_path / "out"
    report = quantize_folder(
        prepare(str(model_folder()), recipe(method="rtn"), calibration="/nowhere"), out
    )
    assert report["calibration"] is None
    model = make_model()
    for name, module in quantized_modules(llmq.load(out)).items():
        assert torch.equal(
            module.qtensor().packed,
            QuantizedTensor.quantize(
                model.get_submodule(name).weight, QuantSpec("int4", 32)
            ).packed,
        )


def test_full_precision_stream_gives_other_hessians_and_block_errors(
    model_folder, calibration_file, tmp_path
):
    reports = []
    for stream in ("quantized", "full-precision", "both"):
        seen = []
        job = prepare(
            str(model_folder(name=stream)),
            recipe("w3g32", inputs=stream),
            calibration=str(calibration_file),
        )
        quantize_folder(job, tmp_path / f"out-{stream}", on_block=seen.append)
        reports.append(seen)
    assert [report.output_error is None for report in reports[0]] == [True, True]
    assert all(0 < report.output_error < 1 for block in reports[1:] for report in block)
    assert len({sum(layer.error for layer in report[1].layers) for report in reports}) == 3
    # Correcting each layer for what was lost before it keeps the blocks closer to the
    # full-precision model.
    assert reports[2][-1].output_error < reports[1][-1].output_error


@pytest.mark.parametrize("model_type", families("llama", "gpt2", "gemma3_text", "falcon"))
def test_a_full_precision_stream_in_bfloat16_leads_to_the_same_place(model_type, monkeypatch):
    """Its roundings are noise of 2^-9 per number; what is taken from it are means over 960 tokens.
    Masks and rotary tables of every family have to follow its dtype."""
    tokens = calibration_windows(torch.randint(2, 2048, (3000,)), 30, 32, 0, "text").tokens
    reports = []
    for native in (True, False):
        monkeypatch.setattr(precision, "multiplies_bfloat16", lambda device, native=native: native)
        model = make_model(model_type, dtype=torch.bfloat16)
        assert Precision.of(model.config, recipe(), "cpu").stream == (
            torch.bfloat16 if native else torch.float32
        )
        reports.append(llmq.quantize(model, recipe(), tokens))
    for ours, exact in zip(*reports, strict=True):
        assert ours.output_error == pytest.approx(exact.output_error, rel=0.1)
        assert all(layer.error < layer.rtn_error for layer in ours.layers)


def test_plain_rounding_reads_text_for_static_ranges_only():
    tokens = calibration_windows(torch.randint(2, 2048, (3000,)), 8, 32, 0, "text").tokens
    models = [make_model(), make_model()]
    static = Recipe.uniform("w8", method="rtn", activations=ActSpec("int8-static"))
    with pytest.raises(LlmqError, match="activations int8-static needs calibration text"):
        llmq.quantize(make_model(), static)
    llmq.quantize(models[0], static, tokens)
    llmq.quantize(models[1], Recipe.uniform("w8", method="rtn"))
    for ours, plain in zip(*(quantized_modules(model).values() for model in models), strict=True):
        assert torch.equal(ours.qtensor().packed, plain.qtensor().packed)
        assert float(ours.qtensor().input_range[0]) > 0
        assert plain.qtensor().input_range is None


def test_report_counts_and_card(model_folder, calibration_file, tmp_path):
    out = tmp_path / "out"
    folder = model_folder()
    report = quantize_folder(prepare(str(folder), recipe(), calibration=str(calibration_file)), out)
    assert report == json.loads((out / "report.json").read_text())
    assert report["verified_blocks"] == 2
    assert report["calibration"]["windows"] == [6, 32]
    assert len(report["calibration"]["sha256"]) == 64
    assert report["bits_per_quantized_weight"] == pytest.approx(4.5)
    assert "| method | `gptq` |" in (out / "README.md").read_text()
    stored = set(load_file(out / "model.safetensors"))
    assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} <= stored
    assert not list(tmp_path.glob(".out*"))


def test_an_unfaithful_disk_is_noticed(model_folder, calibration_file, tmp_path, monkeypatch):
    from llmq.storage.partial_checkpoint import PartialCheckpoint

    write = PartialCheckpoint.write_block

    def corrupt(self, index, tensors):
        written = write(self, index, tensors)
        for name in written:
            if name.endswith("down_proj.weight_packed"):
                written[name][0, 0] ^= 1
        return written

    monkeypatch.setattr(PartialCheckpoint, "write_block", corrupt)
    with pytest.raises(VerificationError, match="differs from the weight written"):
        quantize_folder(
            prepare(str(model_folder()), recipe(), calibration=str(calibration_file)),
            tmp_path / "out",
        )
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize(
    "damaged",
    [
        "model.layers.1.input_layernorm.weight",
        "model.layers.0.self_attn.k_proj.weight",
        "model.norm.weight",
        "model.embed_tokens.weight",
    ],
)
def test_damage_to_any_stored_tensor_is_noticed(
    model_folder, calibration_file, tmp_path, monkeypatch, damaged
):
    """Norms, kept layers, and what lies outside the blocks."""
    write = files.write_tensors

    def damage(path, tensors):
        write(
            path,
            {
                name: tensor.clone().index_put_(
                    (torch.tensor([0]),) * tensor.dim(), torch.tensor(7.0)
                )
                if name == damaged
                else tensor
                for name, tensor in tensors.items()
            },
        )

    monkeypatch.setattr(files, "write_tensors", damage)
    rules = (Rule("*.layers.0.self_attn.*", None), Rule("*", QuantSpec("int4", 32)))
    job = prepare(str(model_folder()), Recipe(rules=rules, method="rtn"))
    with pytest.raises(VerificationError, match=f"tensor {damaged} read back differs"):
        quantize_folder(job, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_output_that_is_a_link_is_replaced_behind_it(model_folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to("elsewhere/target")
    job = prepare(str(model_folder()), recipe(method="rtn"))
    quantize_folder(job, tmp_path / "elsewhere" / "target")
    model = llmq.load(tmp_path / "out")
    quantize_folder(
        prepare(str(tmp_path / "model"), recipe("w8", method="rtn")),
        tmp_path / "out",
        overwrite=True,
    )
    assert {
        str(module.spec) for module in quantized_modules(llmq.load(tmp_path / "out")).values()
    } == {"w8"}
    llmq.save(model, tmp_path / "out", overwrite=True)
    assert {
        str(module.spec) for module in quantized_modules(llmq.load(tmp_path / "out")).values()
    } == {"w4g32"}
    assert (tmp_path / "out").is_symlink()
    assert [
        path.name
        for folder in (tmp_path, tmp_path / "elsewhere")
        for path in sorted(folder.iterdir())
    ] == ["elsewhere", "model", "out", "target"]


def test_weights_can_be_read_by_whom_the_umask_lets(model_folder, tmp_path):
    before = os.umask(0o027)
    try:
        quantize_folder(prepare(str(model_folder()), recipe(method="rtn")), tmp_path / "out")
        llmq.save(llmq.load(tmp_path / "out"), tmp_path / "saved")
    finally:
        os.umask(before)
    assert {
        path.stat().st_mode & 0o777
        for name in ("out", "saved")
        for path in (tmp_path / name).iterdir()
    } == {0o640}


def test_a_layer_that_never_runs_is_an_error():
    model = make_model()
    tokens = calibration_windows(torch.randint(2, 2048, (200,)), 4, 16, 0, "text").tokens
    original = type(model.model.layers[0].mlp).forward
    try:
        type(model.model.layers[0].mlp).forward = lambda self, x: self.down_proj(
            self.act_fn(self.gate_proj(x))
        )
        with pytest.raises(LlmqError, match="up_proj: this layer did not run"):
            llmq.quantize(model, recipe(), tokens)
    finally:
        type(model.model.layers[0].mlp).forward = original


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (TOKENS[0, :31], "31 tokens, but one sequence needs 32"),  # a row is cut into windows
        (TOKENS[None], r"expected int64 of shape \[n, length\], got torch\.int64 of shape \[1, "),
        (TOKENS[:0], r"of shape \[0, 32\]"),
        (TOKENS.float(), r"got torch\.float32"),
        (TOKENS - 5000, "token id -.* is negative"),
        (TOKENS + 2048, "beyond the model's vocabulary"),
        (None, "needs calibration text"),
    ],
)
def test_tokens_in_memory_that_are_no_windows(tokens, message):
    model = make_model()
    with pytest.raises(LlmqError, match=message):
        llmq.quantize(model, recipe(), tokens)
    assert not quantized_modules(model)


def test_models_in_memory_that_cannot_be_quantized():
    model = make_model()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    with pytest.raises(
        LlmqError, match=r"tensor model\.layers\.1\.mlp\.up_proj\.weight holds 1 NaN"
    ):
        llmq.quantize(model, recipe(), TOKENS)
    model = make_model("gpt2")
    with pytest.raises(LlmqError, match="no k_proj"):
        llmq.quantize(model, recipe(activations=ActSpec(kv_bits=8, kv_before_rope=True)), TOKENS)
    assert not quantized_modules(model)
    llmq.quantize(model, recipe(), TOKENS)
    with pytest.raises(LlmqError, match="quantized already"):
        llmq.quantize(model, recipe(), TOKENS)


@torch.no_grad()
@pytest.mark.parametrize("before_rope", [False, True])
def test_keys_and_values_in_memory_are_those_of_the_folder(before_rope, tmp_path):
    model = make_model()
    llmq.quantize(model, recipe(activations=ActSpec(kv_bits=4, kv_before_rope=before_rope)), TOKENS)
    logits = model(TOKENS).logits
    llmq.save(model, tmp_path / "out")
    assert torch.equal(llmq.load(tmp_path / "out")(TOKENS).logits, logits)
    without = make_model()
    llmq.quantize(without, recipe(), TOKENS)
    assert not torch.equal(without(TOKENS).logits, logits)


def test_fallbacks_are_counted_and_too_many_fail(
    model_folder, calibration_file, tmp_path, monkeypatch
):
    monkeypatch.setattr("llmq.ptq.methods.gptq.factor_of_reversed", lambda hessian: None)
    with pytest.raises(VerificationError, match="14 of 14 layers fell back") as error:
        quantize_folder(
            prepare(str(model_folder()), recipe(), calibration=str(calibration_file)),
            tmp_path / "out",
        )
    assert error.value.exit_code == 1
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(report["fallbacks"]) == 14
    assert all(layer["damping"] >= 1.0 for layer in report["layers"])  # at last the whole mean


def test_tied_and_sharded_models_lose_nothing(model_folder, calibration_file, tmp_path):
    folder = model_folder("llama", max_shard_size="100KB", tie_word_embeddings=True)
    assert len(list(folder.glob("*.safetensors"))) > 1
    out = tmp_path / "out"
    quantize_folder(prepare(str(folder), recipe(), calibration=str(calibration_file)), out)
    loaded = llmq.load(out)
    assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    assert "lm_head.weight" not in load_file(out / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gptq", "blockwise"])
def test_any_number_of_threads_gives_the_same_bytes(method, tmp_path):
    """A model that is large enough for all of them to take part."""
    results, before = [], torch.get_num_threads()
    for n_threads in (1, 2):
        torch.set_num_threads(n_threads)
        job = prepare(
            "tiny",
            Recipe.uniform("w3g128", method=method, samples=20, sequence_length=128, iterations=6),
        )
        out = tmp_path / str(n_threads)
        report = quantize_folder(job, out)
        stored = {}
        for path in out.glob("*.safetensors"):
            stored |= load_file(path)
        results.append((stored, report))
    torch.set_num_threads(before)
    assert results[0][1]["layers"] == results[1][1]["layers"]
    for name, tensor in results[0][0].items():
        assert torch.equal(tensor, results[1][0][name]), name
