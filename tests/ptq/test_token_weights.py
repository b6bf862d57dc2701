"""What tokens count: by the gradients behind them, for the layers of a block, and the same in a run
that goes on."""

import shutil

import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file

from llmq.commands.cli import main
from llmq.errors import LlmqError
from llmq.formats.load import load
from llmq.inference.module import quantized_modules
from llmq.models.readers import CheckpointReader
from llmq.models.source import Source
from llmq.models.stored import StoredModel
from llmq.ptq import gradients, token_weights
from llmq.ptq.blocks import Blocks
from llmq.ptq.in_memory import quantize
from llmq.ptq.job import prepare
from llmq.ptq.leaves import Leaves
from llmq.ptq.run import quantize_folder
from llmq.ptq.token_weights import TokenWeights, weights_of
from llmq.recipe import Recipe

TOKENS = torch.randint(2, 2048, (5, 24), generator=torch.Generator().manual_seed(3))
NAMES = {0: ["self_attn.q_proj", "self_attn.k_proj"], 1: ["mlp.down_proj"]}
OPTIONS = {"method": "gptq", "samples": 16, "sequence_length": 32}


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("models") / "model"
    make_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def blocks_of(model):
    source = Source.open(str(model))
    skeleton = StoredModel.of(source).skeleton
    return Blocks(skeleton, CheckpointReader(skeleton, source.tensors), "cpu")


def test_weights_are_1_on_average_and_grow_with_the_root_of_squares():
    found = weights_of(torch.tensor([[0.0, 1.0], [4.0, 9.0]]))
    assert found.mean() == pytest.approx(1)
    assert found[0, 0] == pytest.approx(0.1 / 1.1)  # nothing counts for nothing
    steps = found.flatten() - found[0, 0]
    assert (steps / steps[1]).tolist() == pytest.approx([0, 1, 2, 3])


def test_of_a_layer_that_nothing_depends_on_all_tokens_count_alike():
    assert torch.equal(weights_of(torch.zeros(2, 3)), torch.ones(2, 3))


def test_layers_that_read_the_same_share_the_sum(model, tmp_path):
    told = []
    weights = TokenWeights(tmp_path / "weights")
    weights.measure(
        blocks_of(model), TOKENS, Leaves(5, 4), NAMES, 7, lambda *done: told.append(done)
    )
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    backward = gradients.Backward(blocks_of(model), TOKENS, tmp_path, 7, sizes=[1] * 5)
    assert list(backward.forward()) == [0, 1]
    blocks = {blocks_of(model).name(index): own for index, own in NAMES.items()}
    for index, squares in zip((1, 0), backward.squared_lengths(blocks), strict=True):
        assert torch.equal(weights.of(index, NAMES[index]), weights_of(sum(squares.values())))
    assert [path.name for path in weights.folder.glob("gradients-*")] == []


@pytest.mark.parametrize("rank", [0, 1])
def test_parts_and_shares_change_nothing(rank, model, tmp_path, monkeypatch):
    """Each sequence has its own draws and its own batch, whatever others there are."""
    tokens = torch.cat([TOKENS, TOKENS.flip(1), TOKENS[:2]])
    whole, own = TokenWeights(tmp_path / "whole"), TokenWeights(tmp_path / "own")
    whole.measure(blocks_of(model), tokens, Leaves(12, 4), NAMES, 7)
    monkeypatch.setattr(token_weights, "KEPT_BYTES", 1)  # a part for every 4 sequences
    told: list[tuple[int, int]] = []
    leaves = Leaves(12, 4, rank, 2)
    share = tokens[leaves.sequences.start : leaves.sequences.stop]
    own.measure(blocks_of(model), share, leaves, NAMES, 7, lambda *done: told.append(done))
    assert told[-1] == (8, 8)
    parts = sorted(own.folder.glob("block-00001-*.safetensors"))
    assert len(parts) == 2
    found = torch.cat([load_file(path)["mlp.down_proj"] for path in parts])
    (expected,) = whole.folder.glob("block-00001-*.safetensors")
    expected = load_file(expected)["mlp.down_proj"]
    assert torch.equal(found, expected[leaves.sequences.start : leaves.sequences.stop])


def test_as_many_at_once_as_the_disk_is_given():
    kept = token_weights.kept_bytes(2048, 4096, 32)
    assert kept == 4 * 2048 * 4096 * 35
    at_once = token_weights.sequences_at_once(2048, 4096, 32)
    assert at_once * kept <= token_weights.KEPT_BYTES < (at_once + 4) * kept
    assert token_weights.sequences_at_once(1 << 20, 8192, 80) == 4
    assert token_weights.parts_of([4, 1, 4, 4, 2, 4], 8) == [[4, 1], [4, 4], [2, 4]]
    assert token_weights.parts_of([4, 4], 1) == [[4], [4]]


def test_in_bfloat16_they_are_near(model, tmp_path):
    full, half = TokenWeights(tmp_path / "full"), TokenWeights(tmp_path / "half")
    full.measure(blocks_of(model), TOKENS, Leaves(5, 4), NAMES, 7)
    half.measure(blocks_of(model), TOKENS, Leaves(5, 4), NAMES, 7, dtype=torch.bfloat16)
    for index, layers in NAMES.items():
        expected, found = full.of(index, layers), half.of(index, layers)
        assert not torch.equal(found, expected)
        # all but for tokens where another one was drawn
        assert ((found - expected).abs() < 0.1).float().mean() > 0.9


def test_what_lies_there_is_not_measured_again(model, tmp_path, monkeypatch):
    weights = TokenWeights(tmp_path)
    weights.measure(blocks_of(model), TOKENS, Leaves(5, 4), NAMES, 7)
    before = weights.of(0, NAMES[0])
    (tmp_path / "block-00001-00000.safetensors").write_bytes(b"damaged")
    weights.measure(blocks_of(model), TOKENS, Leaves(5, 4), NAMES, 7)
    assert torch.equal(weights.of(0, NAMES[0]), before)
    monkeypatch.setattr(token_weights, "Backward", None)
    weights.measure(blocks_of(model), TOKENS, Leaves(5, 4), NAMES, 7)


def test_a_model_without_finite_likelihoods_is_refused(model, tmp_path):
    blocks = blocks_of(model)
    load = blocks.load

    def broken(index):
        module = load(index)
        module.mlp.up_proj.weight.data[0, 0] = torch.inf
        return module

    blocks.load = broken
    with pytest.raises(LlmqError, match=r"likelihoods hold NaN or infinity .* --token-weights"):
        TokenWeights(tmp_path).measure(blocks, TOKENS, Leaves(5, 4), NAMES, 7)


def test_gradients_that_are_not_finite_are_refused(model, tmp_path, monkeypatch):
    run = gradients._Met.run

    def exploding(self, *args):
        found = run(self, *args)
        self.gradients = {name: own * torch.inf for name, own in self.gradients.items()}
        return found

    monkeypatch.setattr(gradients._Met, "run", exploding)
    with pytest.raises(LlmqError, match=r"layers.1.mlp.down_proj: NaN .* --token-weights equal"):
        TokenWeights(tmp_path).measure(blocks_of(model), TOKENS, Leaves(5, 4), NAMES, 7)


def quantized(model, calibration_file, out, **options):
    recipe = Recipe.uniform("w2g32", **{**OPTIONS, "token_weights": "fisher", **options})
    job = prepare(str(model), recipe, calibration=str(calibration_file))
    steps = []
    report = quantize_folder(job, out, on_step=lambda *step: steps.append(step))
    return report, steps


def weights_in(folder):
    return [path.read_bytes() for path in sorted(folder.glob("*.safetensors"))]


def test_a_run_and_one_that_goes_on_are_the_same(model, calibration_file, tmp_path, monkeypatch):
    report, steps = quantized(model, calibration_file, tmp_path / "out")
    assert report["recipe"]["token_weights"] == "fisher"
    assert steps == [("token weights", done, 4) for done in (1, 2, 3, 4)]
    _, steps = quantized(model, calibration_file, tmp_path / "plain", token_weights="equal")
    assert steps == []
    assert weights_in(tmp_path / "plain") != weights_in(tmp_path / "out")

    def killed(report):
        if report.index == 0:
            raise KeyboardInterrupt

    recipe = Recipe.uniform("w2g32", **OPTIONS, token_weights="fisher")
    job = prepare(str(model), recipe, calibration=str(calibration_file))
    with pytest.raises(KeyboardInterrupt):
        quantize_folder(job, tmp_path / "killed", on_block=killed)
    monkeypatch.setattr(token_weights, "Backward", None)  # they lie there
    report, steps = quantized(model, calibration_file, tmp_path / "killed")
    assert report["resumed_at_block"] == 1
    assert weights_in(tmp_path / "killed") == weights_in(tmp_path / "out")


def test_in_memory_it_is_the_same(model, calibration_file, tmp_path):
    recipe = Recipe.uniform("w2g32", **OPTIONS, token_weights="fisher")
    job = prepare(str(model), recipe, calibration=str(calibration_file))
    quantize_folder(job, tmp_path / "out")
    loaded = load(str(model), dtype="float32")
    quantize(loaded, recipe, job.tokens.tokens)
    expected = quantized_modules(load(tmp_path / "out"))
    for name, module in quantized_modules(loaded).items():
        assert torch.equal(module.qtensor().codes(), expected[name].qtensor().codes())


@pytest.mark.parametrize("method", ["rtn", "hqq"])
def test_methods_without_a_hessian_refuse_them(method):
    with pytest.raises(LlmqError, match=f"token weights fisher .* method {method} does without"):
        prepare("tiny", Recipe.uniform("w4g32", method=method, token_weights="fisher"))


def test_on_the_command_line(model, calibration_file, tmp_path, capsys):
    given = ["--calibration", str(calibration_file), "--samples", "4", "--sequence-length", "32"]
    options = [str(model), *given, "--json", "--token-weights"]
    needs = []
    for weights in ("equal", "fisher"):
        assert main(["plan", *options, weights]) == 0
        needs.append(capsys.readouterr().out)
    assert needs[0] != needs[1]


def test_of_experts_all_tokens_count_alike_which_is_said(model_folder, calibration_file, tmp_path):
    report, steps = quantized(model_folder("mixtral"), calibration_file, tmp_path / "out")
    assert report["notes"]["token weights"] == "not for experts, whose tokens all count alike"
    assert steps[-1] == ("token weights", 4, 4)
    shutil.rmtree(tmp_path / "out")
