"""Statistics of experts against what running the block shows, and runs over whole models."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import llmq
from llmq.commands import rendering
from llmq.commands.cli import main
from llmq.inference.module import quantized_modules
from llmq.models.experts import unfuse, unfused_in
from llmq.ptq import experts as experts_of_stage
from llmq.ptq.block import _Calibrated
from llmq.ptq.job import prepare
from llmq.ptq.run import quantize_folder
from llmq.recipe import Recipe
from llmq.text.documents import calibration_windows
from tests.conftest import EXPERT_CONFIGS, make_model

FAST = ("mixtral", "gpt_oss")
KINDS = [
    kind if kind in FAST else pytest.param(kind, marks=pytest.mark.slow) for kind in EXPERT_CONFIGS
]
TOKENS = torch.randint(3, 2000, (1, 24), generator=torch.Generator().manual_seed(0))


def windows(n=16, length=32):
    text = torch.randint(2, 2048, (n * length * 2,), generator=torch.Generator().manual_seed(1))
    return calibration_windows(text, n, length, 0, "text").tokens


def only_experts():
    """Rules by which what runs before the first experts stays as it is."""
    return (llmq.Rule.parse("*.experts.*=w4g32"), llmq.Rule.parse("*=keep"))


def rows_of(model, name, tokens):
    """The inputs of a layer when the model runs, over all tokens."""
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
    with torch.no_grad():
        model(tokens, use_cache=False)
    handle.remove()
    return torch.cat(seen) if seen else torch.empty(0)


def measured(monkeypatch, model, recipe, tokens):
    """What GPTQ gets to see: statistics by layer, beside the weight it is given."""
    found = {}
    original = _Calibrated._solve_groups

    def spy(self, groups):
        for group, stats in groups:
            for layer in group.layers:
                found[f"{self.name}.{layer}"] = stats.n_tokens, stats.hessian.clone()
        return original(self, groups)

    monkeypatch.setattr(_Calibrated, "_solve_groups", spy)
    llmq.quantize(model, recipe, tokens)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_an_expert_is_measured_on_the_tokens_that_it_gets(kind, monkeypatch):
    """In the first block nothing is quantized before gate and up, so their rows are those of the
    full-precision model."""
    monkeypatch.setattr(experts_of_stage, "FEW_ROWS", 0)
    model, reference, tokens = make_model(kind), make_model(kind), windows(32, 32)
    unfuse(reference)
    prefix = next(iter(unfused_in(reference)))
    rules = only_experts()
    recipe = Recipe(rules=rules, inputs="quantized", sweeps=0, search=False)
    found = measured(monkeypatch, model, recipe, tokens)
    for number in range(4):
        name = f"{prefix}.{number}.up_proj"
        rows = rows_of(reference, name, tokens)
        n_tokens, hessian = found[name]
        if len(rows) < hessian.shape[0] / 2:
            continue  # measured on the others' tokens, too
        assert n_tokens == len(rows)
        expected = 2 * rows.T @ rows / len(rows)
        torch.testing.assert_close(hessian, expected, rtol=1e-3, atol=1e-4)


def test_an_expert_with_few_tokens_is_measured_on_all(monkeypatch):
    """H' = (n H_own + K/2 H_all) / (n + K/2), and H_all alone below the least number."""
    tokens = windows(2, 32)
    plain = {"inputs": "quantized", "sweeps": 0, "search": False}
    rules = only_experts()
    reference = make_model("mixtral")
    unfuse(reference)
    prefix = next(iter(unfused_in(reference)))
    every = []
    reference.get_submodule(prefix).register_forward_pre_hook(lambda _, args: every.append(args[0]))
    own = {n: rows_of(reference, f"{prefix}.{n}.up_proj", tokens) for n in range(4)}
    whole = 2 * every[0].T @ every[0] / len(every[0])
    k = whole.shape[0]
    for least in (0, 1000):
        monkeypatch.setattr(experts_of_stage, "FEW_ROWS", least)
        with monkeypatch.context() as patch:
            recipe = Recipe(rules=rules, **plain)
            found = measured(patch, make_model("mixtral"), recipe, tokens)
        for number, rows in own.items():
            n = len(rows)
            hessian = found[f"{prefix}.{number}.up_proj"][1]
            expected = whole
            if not least:
                assert 0 < n < k or n >= k / 2
                mine = 2 * rows.T @ rows / max(1, n)
                expected = mine if n >= k / 2 else (n * mine + k / 2 * whole) / (n + k / 2)
            torch.testing.assert_close(hessian, expected, rtol=1e-3, atol=1e-4)


def test_only_tokens_that_both_streams_send_to_an_expert_are_corrected_for():
    """Rows of the full-precision model where it has them, the expert's own elsewhere."""
    index = torch.tensor([[0, 1], [1, 2], [0, 2], [0, 1]])
    other = torch.tensor([[1, 0], [0, 2], [1, 2], [0, 3]])
    x = torch.arange(8.0).view(4, 1, 2)
    ours = experts_of_stage.Routed(x, index).share(0)
    exact = experts_of_stage.Routed(x + 100, other)
    assert ours.tokens.tolist() == [0, 2, 3]
    places, values = experts_of_stage._matches(ours.tokens, exact, 0)
    paired = experts_of_stage._paired(ours.x, places, values)
    assert paired.tolist() == [[100.0, 101.0], [4.0, 5.0], [106.0, 107.0]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "method", ["rtn", "gptq", pytest.param("blockwise", marks=pytest.mark.slow)]
)
def test_a_mixture_is_quantized_saved_and_loaded(
    kind, method, model_folder, calibration_file, tmp_path
):
    """Over 97% of what is not embeddings, head or kept on purpose is quantized, and the folder
    computes what was quantized in memory."""
    options = {} if method == "rtn" else {"samples": 8, "sequence_length": 32}
    options |= {"iterations": 3} if method == "blockwise" else {}
    recipe = Recipe.uniform("w4g32", method=method, **options)
    folder, text = model_folder(kind), None if method == "rtn" else str(calibration_file)
    report = quantize_folder(prepare(str(folder), recipe, calibration=text), tmp_path / "out")
    loaded = llmq.load(tmp_path / "out", dtype="float32")
    assert unfused_in(loaded)
    n_quantized = sum(layer["shape"][0] * layer["shape"][1] for layer in report["layers"])
    original = make_model(kind)
    n_weights = sum(
        parameter.numel()
        for name, parameter in original.named_parameters()
        if parameter.dim() in (2, 3) and not any(part in name for part in ("embed", "lm_head"))
    )
    assert n_quantized > 0.97 * n_weights
    dense = llmq.load(folder, dtype="float32")
    unfuse(dense)
    with torch.no_grad():
        for name, layer in quantized_modules(loaded).items():
            dense.get_submodule(name).weight.copy_(layer.qtensor().dequantize())
        expected = dense(TOKENS, use_cache=False).logits
        found = loaded(TOKENS, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    if method != "rtn":
        coverage = report["experts"][0]
        assert coverage["n_tokens"] == 8 * 32
        assert coverage["n_experts"] == 4


def test_waves_change_no_bit(model_folder, calibration_file, tmp_path, monkeypatch):
    recipe, folder = Recipe.uniform("w3g32", samples=8, sequence_length=32), model_folder("mixtral")
    weights = []
    for wave in (1, experts_of_stage.WAVE_BYTES):
        monkeypatch.setattr(experts_of_stage, "WAVE_BYTES", wave)
        job = prepare(str(folder), recipe, calibration=str(calibration_file))
        quantize_folder(job, tmp_path / f"out-{wave}")
        weights.append((tmp_path / f"out-{wave}" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_gptq_beats_rounding_on_experts(model_folder, calibration_file, tmp_path):
    recipe = Recipe.uniform("w3g32", samples=16, sequence_length=32)
    job = prepare(str(model_folder("qwen3_moe")), recipe, calibration=str(calibration_file))
    report = quantize_folder(job, tmp_path / "out")
    experts = [layer for layer in report["layers"] if ".experts." in layer["name"]]
    assert len(experts) == 2 * 4 * 3
    assert sum(layer["error"] for layer in experts) < sum(layer["rtn_error"] for layer in experts)


def test_experts_without_tokens_are_named_and_refused_when_strict(
    model_folder, calibration_file, tmp_path, capsys
):
    """A router that sends nothing to one of them."""
    folder = model_folder("gpt_oss")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if name.endswith("router.bias"):
            tensor[3] = -1000
    save_file(tensors, path, metadata={"format": "pt"})
    arguments = ["quantize", str(folder), str(tmp_path / "out"), "--group-size", "32", "--json"]
    arguments += ["--calibration", str(calibration_file), "--samples", "4"]
    assert main([*arguments, "--sequence-length", "16"]) == 0
    report = json.loads(capsys.readouterr().out)
    idle = rendering.idle_experts(report["experts"])
    assert idle == [f"model.layers.{index}.mlp.experts.3" for index in range(2)]
    assert all("3" in module["borrowed"] for module in report["experts"])
    assert main([*arguments, "--sequence-length", "16", "--strict", "--overwrite"]) == 1
    assert "no calibration token reached 2 experts" in capsys.readouterr().out
    assert (tmp_path / "out").exists()
