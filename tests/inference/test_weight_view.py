"""A quantized layer is a linear layer whose weight can be read and not written."""

import copy
import pickle

import pytest
import torch
from torch import nn

from llmq.errors import LlmqError
from llmq.formats.native import NATIVE
from llmq.grid.spec import QuantSpec
from llmq.grid.tensor import QuantizedTensor
from llmq.inference.module import QuantLinear, swap
from llmq.inference.weight_view import WeightView
from llmq.models.site import site_of


@pytest.fixture
def layer():
    return QuantLinear(QuantizedTensor.quantize(torch.randn(32, 64), QuantSpec("int4", 32)))


def test_it_reads_as_the_dequantized_weight(layer):
    weight = layer.weight
    assert isinstance(layer, nn.Linear)
    assert (weight.shape, weight.dtype, weight.device.type) == ((32, 64), torch.float32, "cpu")
    values = layer.qtensor().dequantize()
    x = torch.randn(3, 64)
    assert torch.equal(x @ weight.T, x @ values.T)
    assert torch.equal(weight[3:5], values[3:5])
    assert torch.equal(torch.cat([weight, values]), torch.cat([values, values]))
    for copied in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight)), weight.clone()):
        assert torch.equal(copied, values)
        assert not isinstance(copied, WeightView)


def test_its_dtype_is_that_of_the_layer_that_was_replaced_and_follows_the_model(layer):
    model = nn.Sequential(nn.Linear(64, 32)).bfloat16()
    swap(model, {"0": layer.qtensor()})
    assert model[0].weight.dtype == torch.bfloat16
    assert model.half()[0].weight.dtype == torch.float16
    assert model[0].scale.dtype == torch.float16
    assert copy.deepcopy(model)[0].weight.dtype == torch.float16
    assert model.to("meta")[0].weight.device.type == "meta"


def test_it_is_neither_a_parameter_nor_stored_nor_a_site(layer):
    assert not list(layer.parameters())
    assert layer.state_dict().keys() == {"packed", "scale"}
    stored = layer.qtensor()
    n_bytes = NATIVE.layer_bytes(stored.spec, stored.shape)
    assert sum(buffer.nbytes for buffer in layer.buffers()) == n_bytes
    assert site_of(layer) is None
    assert site_of(nn.Linear(2, 2)) is not None


WRITES = {
    "in place": lambda layer: layer.weight.add_(1),
    "data": lambda layer: setattr(layer.weight, "data", torch.zeros(32, 64)),
    "data in place": lambda layer: layer.weight.data.zero_(),
    "a row": lambda layer: layer.weight.__setitem__(0, 1.0),
    "out": lambda layer: torch.add(torch.zeros(32, 64), 1, out=layer.weight),
    "init": lambda layer: nn.init.normal_(layer.weight),
    "reset": lambda layer: layer.reset_parameters(),
    "parameter": lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(32, 64))),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_writing_is_refused_with_the_way(layer, write):
    with pytest.raises(LlmqError, match=r"llmq\.merge_adapter"):
        write(layer)


def test_transformers_own_initialisation_leaves_it_alone(layer):
    from transformers import initialization as init

    before = layer.weight.clone()
    init.normal_(layer.weight)
    assert layer._is_hf_initialized
    assert torch.equal(layer.weight, before)
