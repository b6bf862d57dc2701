"""What quantization costs on the bundled model, on text that it was not trained on. The README's
claims, on fewer tokens."""

from dataclasses import replace

import pytest

import llmq
from llmq.evaluation.perplexity import evaluate
from llmq.grid.spec import ActSpec
from llmq.models.source import load_config, load_tokenizer, resolve
from llmq.ptq.calibration import windows
from llmq.recipe import Recipe
from llmq.text.documents import load_documents
from llmq.text.windows import cut_windows


@pytest.fixture(scope="module")
def bundled():
    """Windows to score, and the perplexity of the full-precision model on them."""
    folder = resolve("tiny")
    text = cut_windows(
        load_documents("bundled", "eval"), load_tokenizer(folder), load_config(folder), 256
    )
    text = replace(text, tokens=text.tokens[:24])
    return text, evaluate(llmq.load("tiny", dtype="float32"), text).value


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "choice", "cost"),
    [
        ("int8-token", "mse", 0.005),
        ("int8-static", "mse", 0.005),
        ("int8-static", "minmax", 0.005),
        ("int8-static", "percentile", 0.01),
    ],
)
def test_weights_and_activations_of_8_bits_cost_less_than_half_a_percent(
    bundled, kind, choice, cost
):
    """Percentiles clip the few large inputs on purpose, which costs this model 0.7%; they are not
    the default."""
    text, full = bundled
    recipe = Recipe.uniform(
        "w8", samples=16, sequence_length=128, activations=ActSpec(kind), activation_range=choice
    )
    folder = resolve("tiny")
    model = llmq.load("tiny", dtype="float32")
    llmq.quantize(
        model,
        recipe,
        windows(load_tokenizer(folder), load_config(folder), recipe, "bundled").tokens,
    )
    assert evaluate(model, text).value == pytest.approx(full, rel=cost)
