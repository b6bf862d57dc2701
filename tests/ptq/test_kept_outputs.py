"""What solved modules give is read instead of computed again: the same bytes for fewer products."""

import itertools

import pytest
import torch
from conftest import make_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import llmq
from llmq.inference.module import quantized_modules
from llmq.ptq import kept_outputs
from llmq.ptq.kept_outputs import KeptOutputs
from llmq.ptq.leaves import Leaves
from llmq.ptq.streams import Streams
from llmq.recipe import Recipe

TOKENS = torch.randint(2, 400, (24, 32), generator=torch.Generator().manual_seed(0))


def quantized(kind, recipe):
    """Codes and scales of all layers, and the operations that they took."""
    model = make_model(kind)
    with FlopCounterMode(display=False) as counted:
        llmq.quantize(model, recipe, TOKENS)
    layers = {name: module.qtensor() for name, module in quantized_modules(model).items()}
    return layers, counted.get_total_flops()


def check_same(kind, recipe, monkeypatch):
    """Returns the share of operations that is left."""
    kept, n_kept = quantized(kind, recipe)
    monkeypatch.setattr(kept_outputs, "MOST_BYTES", 0)
    alone, n_alone = quantized(kind, recipe)
    for name, layer in alone.items():
        assert torch.equal(kept[name].dequantize(), layer.dequantize())
    return n_kept / n_alone


@pytest.mark.parametrize(
    ("kind", "options", "most"),
    [
        ("mixtral", {}, 0.95),
        *(
            pytest.param("llama", options, most, marks=pytest.mark.slow)
            for options, most in [
                ({}, 0.9),
                ({"method": "blockwise", "iterations": 2}, 1.0),
                ({"inputs": "full-precision"}, 1.0),
            ]
        ),
    ],
)
def test_the_same_bytes_for_less(kind, options, most, monkeypatch):
    assert check_same(kind, Recipe.uniform("w4g32", **options), monkeypatch) <= most


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["falcon", "gpt_oss", "gemma3_text", "qwen3_moe", "opt", "phi3"])
def test_of_every_kind(kind, monkeypatch):
    assert check_same(kind, Recipe.uniform("w4g32"), monkeypatch) <= 1


class Block(nn.Module):
    """Two modules of which the first gives more than a tensor or runs more than once."""

    def __init__(self, gives, times=1):
        super().__init__()
        self.inner, self.times = Inner(gives), times

    def forward(self, hidden):
        for _ in range(self.times):
            found = self.inner(hidden)
        return found[0] if isinstance(found, tuple) else found


class Inner(nn.Module):
    def __init__(self, gives):
        super().__init__()
        self.layer, self.gives, self.n_calls = nn.Linear(8, 8), gives, 0

    def forward(self, x):
        self.n_calls += 1
        return self.gives(self.layer(x))


LENGTHS = itertools.cycle((3, 2))


def streams_of(work_dir, n=4):
    tokens = torch.zeros(n, 3, dtype=torch.int64)
    return Streams(["quantized"], {}, {}, tokens, 8, Leaves(n, 1), work_dir, "cpu")


@pytest.mark.parametrize(
    ("gives", "times", "is_kept"),
    [
        (lambda y: y, 1, True),
        (lambda y: (y, None), 1, True),
        (lambda y: (y, y), 1, False),
        (lambda y: y.bfloat16(), 1, False),
        (lambda y: y, 2, False),
        (lambda y: y[:, : next(LENGTHS)], 1, False),  # as many rows as chose an expert
    ],
)
@torch.no_grad()
def test_what_is_kept(gives, times, is_kept, tmp_path):
    streams, block = streams_of(tmp_path), Block(gives, times)
    kept = KeptOutputs(streams, block, ["inner.layer"])
    batches = torch.randn(4, 1, 3, 8)
    with kept.passing():  # nothing is solved
        before = [block(each) for each in batches]
    kept.solved.add("inner.layer")
    for _ in range(2):
        with kept.passing():
            after = [block(each) for each in batches]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    # the layer alone is kept where the module around it is not
    assert kept.path("inner").is_file() == is_kept
    assert block.inner.n_calls == 4 * times * (2 if is_kept else 3)
    assert "forward" not in vars(block.inner)
    kept.forget()
    assert not list(tmp_path.glob("*.bin"))


@torch.no_grad()
def test_a_pass_that_ends_before_a_module_keeps_nothing(tmp_path):
    block = Block(lambda y: y)
    kept = KeptOutputs(streams_of(tmp_path), block, ["inner.layer"], solved={"inner.layer"})
    with kept.passing():
        block(torch.randn(1, 3, 8))
    assert not list(tmp_path.glob("*.bin"))
