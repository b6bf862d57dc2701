"""Folders that an earlier version wrote load with the same values for good.

`folders/` holds one small Llama in every format as commit c3ff7c4 of this project saved it (that of
compressed-tensors: the first with this format), and `folders/expected/` the dequantized weights
that it had in memory then.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import llmq
from llmq.inference.module import quantized_modules

FOLDERS = Path(__file__).parent / "folders"
NAMES = sorted(path.stem for path in (FOLDERS / "expected").glob("*.safetensors"))


def test_every_folder_has_its_values():
    folders = {path.name for path in FOLDERS.iterdir() if path.name != "expected"}
    assert folders == set(NAMES)
    assert len(NAMES) >= 12


@pytest.mark.parametrize("name", NAMES)
def test_values_are_those_that_were_saved(name):
    expected = load_file(FOLDERS / "expected" / f"{name}.safetensors")
    model = llmq.load(FOLDERS / name)
    found = {}
    for layer, module in quantized_modules(model).items():
        tensor = module.qtensor()
        found[f"{layer}.weight"] = tensor.dequantize()
        if tensor.input_range is not None:
            found[f"{layer}.input_range"] = tensor.input_range
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        assert torch.equal(found[key], values), key
    logits = model(input_ids=torch.arange(8)[None]).logits
    assert torch.isfinite(logits).all()
