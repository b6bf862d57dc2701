"""How much calibration text is read by default: it goes by the model alone."""

import pytest

from llmq.models.source import Source
from llmq.ptq import sizing
from llmq.ptq.job import prepare
from llmq.ptq.sizing import default_text, default_windows, quick_windows
from llmq.recipe import Recipe

# width, positions, windows, and those of --quick
MODELS = {
    "tiny": (256, 256, (128, 256), (32, 256)),
    "SmolLM2-135M": (576, 8192, (72, 512), (36, 256)),
    "Gemma 3 270M": (640, 32768, (80, 512), (40, 256)),
    "Llama 3.2 1B": (2048, 131072, (64, 2048), (64, 512)),
    "Llama 3.1 8B": (4096, 131072, (128, 2048), (128, 512)),
    "GPT-2 XL": (1600, 1024, (100, 1024), (100, 256)),
    "few positions": (64, 128, (128, 128), (32, 128)),
}


@pytest.mark.parametrize("name", MODELS)
def test_windows_grow_with_the_width(name):
    width, positions, windows, quick = MODELS[name]
    found = default_windows(width, positions), quick_windows(width, positions)
    assert [(each.n_sequences, each.length) for each in found] == [windows, quick]


def test_wider_models_never_get_less_text():
    sizes = [default_windows(width, 8192) for width in range(1, 9000, 37)]
    n_tokens = [each.n_tokens for each in sizes]
    # cut into whole windows, of which a longer one may be left out
    assert all(
        b > a - each.length
        for a, b, each in zip(n_tokens[:-1], n_tokens[1:], sizes[1:], strict=True)
    )
    assert all(each.n_sequences <= 128 and each.length <= 2048 for each in sizes)


def test_the_text_goes_by_the_model(model_folder, monkeypatch):
    small = Source(model_folder())
    assert default_text(Source.open("tiny")) == "bundled"
    assert default_text(small) == "self"
    monkeypatch.setattr(sizing, "MOST_BYTES_THAT_WRITE", small.weight_bytes - 1)
    assert default_text(small) == "python-docs"


def test_a_text_that_nobody_asked_for_is_named_with_a_remedy(model_folder):
    recipe = Recipe(samples=2, sequence_length=16)
    job = prepare(str(model_folder()), recipe)
    assert job.tokens.source == "self"
    assert job.recipe.calibration == "self"
    assert "--calibration FILE" in job.notes["calibration text"]
    again = prepare(str(model_folder()), job.recipe)
    assert again.tokens.sha256 == job.tokens.sha256
    assert "calibration text" not in again.notes, "the recipe asked for it"
    assert "calibration text" not in prepare("tiny", recipe, check_scales=False).notes
