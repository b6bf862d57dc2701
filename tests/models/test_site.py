"""A site gives its weight as `[N, K]`, whatever stores it."""

import pytest
import torch
from conftest import make_model
from torch import nn

from llmq.models.arch import quantizable_layers
from llmq.models.compat import Conv1D
from llmq.models.site import fused_names, site_of, sites_in


@pytest.mark.parametrize("module", [nn.Linear(5, 3), Conv1D(3, 5)], ids=["linear", "conv1d"])
def test_a_weight_is_a_view_that_the_layer_computes_with(module):
    site = site_of(module, "block.layer")
    assert site.shape == (3, 5)
    assert site.stored_name == "block.layer.weight"
    x, weight = torch.randn(2, 5), torch.randn(3, 5)
    site.write(weight)
    torch.testing.assert_close(module(x), x @ weight.T + site.bias)
    assert site.weight.data_ptr() == module.weight.data_ptr()
    assert torch.equal(site.stored(weight), module.weight)
    assert torch.equal(site.kind.weight(site.stored(weight)), weight)


def test_other_modules_are_no_sites():
    for module in (nn.Embedding(3, 5), nn.LayerNorm(5), nn.Conv1d(3, 5, 1)):
        assert site_of(module) is None


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "phi3"])
def test_the_sites_of_a_model_are_its_quantizable_layers_and_its_head(model_type):
    model = make_model(model_type)
    sites = {site.name: site.shape for site in sites_in(model)}
    assert sites.pop("lm_head")
    assert sites == {layer.name: layer.shape for layer in quantizable_layers(model)}
    state = model.state_dict()
    for site in sites_in(model):
        assert torch.equal(site.stored(site.weight), state[site.stored_name])


def test_what_engines_join_is_known_by_name():
    joined = ("a.gate_proj", "a.up_proj")
    assert [fused_names(name) for name in joined] == [joined, joined]
    assert fused_names("q_proj") == ("q_proj", "k_proj", "v_proj")
    assert fused_names("a.down_proj") == ("a.down_proj",)
    (site,) = (site for site in sites_in(make_model()) if site.name.endswith("0.mlp.up_proj"))
    assert site.fused_with == tuple(
        f"model.layers.0.mlp.{leaf}" for leaf in ("gate_proj", "up_proj")
    )
