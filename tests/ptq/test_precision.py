"""What runs in bfloat16 by itself: only what may, only for models that are stored so, only where
the processor multiplies it, and never against the recipe."""

import pytest
import torch
from conftest import make_model

from llmq.ptq import precision
from llmq.ptq.precision import Precision
from llmq.recipe import Recipe

HALF, FULL = torch.bfloat16, torch.float32
TRAINED = {"method": "blockwise"}


def of(dtype=HALF, **options):
    return Precision.of(make_model(dtype=dtype).config, Recipe(**options), "cpu")


@pytest.mark.parametrize(
    ("options", "native", "other"),
    [
        ({}, Precision(HALF, FULL), Precision()),
        ({"inputs": "full-precision"}, Precision(), Precision()),
        ({**TRAINED, "token_weights": "equal"}, Precision(FULL, HALF), Precision()),
        (TRAINED, Precision(FULL, HALF, HALF), Precision()),
        ({**TRAINED, "autocast": False}, Precision(FULL, FULL, HALF), Precision()),
        ({**TRAINED, "autocast": True}, Precision(FULL, HALF, HALF), Precision(FULL, HALF)),
        ({"autocast": True}, Precision(HALF, FULL), Precision()),
        ({"scale_steps": 8}, Precision(HALF, HALF), Precision()),
        ({"scale_steps": 8, "autocast": False}, Precision(HALF, FULL), Precision()),
        ({"token_weights": "fisher"}, Precision(HALF, FULL, HALF), Precision()),
    ],
)
def test_precision(options, native, other, monkeypatch):
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda device: True)
    assert of(**options) == native
    assert of(FULL, **options) == other, "a model that is not stored in bfloat16"
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda device: False)
    assert of(**options) == other, "a processor without its products"
