"""Where a model goes, in llmq's words and in those of transformers."""

import pytest
import torch

import llmq
from llmq.errors import LlmqError
from llmq.formats import placement
from llmq.formats.placement import device_of

CPU = torch.device("cpu")


@pytest.fixture
def two_gpus(monkeypatch):
    """Two GPUs, of which the second has room; nothing is ever put there."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: ((index + 1) * 1000, 0))


@pytest.mark.parametrize(
    ("device_map", "expected"),
    [
        ("cpu", "cpu"),
        (torch.device("cpu"), "cpu"),
        ("cuda", "cuda"),
        (1, "cuda:1"),
        ({"": 1}, "cuda:1"),
        ({"model": "cuda:0", "lm_head": "cuda:0"}, "cuda:0"),
        ({"model.embed_tokens": "cpu", "": "cpu"}, "cpu"),
        ("auto", "cuda:1"),
    ],
    ids=str,
)
def test_one_device(device_map, expected, two_gpus):
    assert device_of(None, device_map, 1200) == torch.device(expected)


def test_auto_is_the_cpu_where_no_gpu_has_room(two_gpus, monkeypatch):
    assert device_of(None, "auto", 2000) == CPU
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert device_of(None, "auto", 0) == device_of(None, None, 0) == CPU


@pytest.mark.parametrize(
    ("device", "device_map", "message"),
    [
        (None, {"a": 0, "b": "cpu"}, "spreads layers over 0, cpu, and llmq runs a model on one"),
        (None, {"a": 0, "b": "disk"}, "sends layers to disk"),
        (None, {}, "device_map is empty"),
        (None, "balanced", "device_map 'balanced': it would spread layers"),
        (None, "meta", "no weights would be loaded"),
        (None, "cuda:2", "device_map 'cuda:2': not available here, where torch sees 2 GPUs"),
        (None, "gpu", "device_map: expected 'cpu', .* got 'gpu'"),
        (None, True, "device_map: expected 'cpu', .* got True"),
        ("cpu", "auto", "both say where the model goes"),
        ("cuda:7", None, "device 'cuda:7': not available here"),
    ],
    ids=str,
)
def test_what_is_refused(device, device_map, message, two_gpus):
    with pytest.raises(LlmqError, match=message):
        device_of(device, device_map, 0)


def test_models_are_loaded_so(model_folder):
    folder = model_folder()
    for dtype in (torch.bfloat16, "bfloat16"):
        model = llmq.load(folder, dtype=dtype, device_map="auto" if dtype == "bfloat16" else "cpu")
        assert model.dtype == torch.bfloat16
    with pytest.raises(LlmqError, match=r"dtype torch.float64: expected one of auto, .* torch's"):
        llmq.load(folder, dtype=torch.float64)
    assert placement.ROOM > 1
