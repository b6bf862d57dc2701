"""What llmq relies on of transformers' internals, one test per kind: a version that breaks one
fails here, by name."""

import ast
import copy
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_model
from torch import nn
from transformers import AttentionInterface, AutoConfig, DynamicCache

import llmq
from llmq.models import compat

ROOT = Path(llmq.__file__).parent


@pytest.mark.parametrize("name", compat.HOMES)
def test_every_name_is_where_it_is_looked_for(name):
    assert getattr(compat, name) is not None


def test_a_name_that_has_moved_is_missed_with_the_version(monkeypatch):
    monkeypatch.setitem(
        compat.HOMES, "Conv1D", ("transformers.nowhere", "transformers.pytorch_utils")
    )
    assert compat.Conv1D is compat.__getattr__("Conv1D")  # found in the older place
    monkeypatch.setitem(compat.HOMES, "Conv1D", ("transformers.nowhere",))
    with pytest.raises(
        ImportError, match=r"transformers \d.* has no Conv1D in transformers\.nowhere"
    ):
        _ = compat.Conv1D
    with pytest.raises(AttributeError, match="no attribute 'Conv3D'"):
        _ = compat.Conv3D


def test_nobody_else_imports_from_inside_transformers():
    allowed = {"transformers", "transformers.utils"}  # documented
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = []
            if isinstance(node, ast.ImportFrom) and node.module:
                modules = [node.module]
            elif isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            inside = [each for each in modules if each.partition(".")[0] == "transformers"]
            if not allowed.issuperset(inside) and path.name != "compat.py":
                found.append(f"{path.relative_to(ROOT)}: {inside}")
    assert not found


def test_a_model_and_generate_take_the_cache_by_its_name():
    model = make_model()
    name = compat.cache_name()
    for call in (model.forward, model.model.forward):
        assert name in inspect.signature(call).parameters
    tokens, cache = torch.tensor([[1, 2, 3]]), DynamicCache(config=model.config)
    with torch.no_grad():
        output = model.model(tokens, use_cache=True, **{name: cache})
    assert output[name] is cache
    assert cache.get_seq_length() == 3


def test_importing_compat_imports_nothing_of_transformers():
    program = (
        "import sys, llmq.models.compat; "
        "print(sorted({'transformers', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


def test_conv1d_stores_its_weight_transposed():
    layer = compat.Conv1D(3, 5)  # outputs, inputs
    assert layer.weight.shape == (5, 3)
    x = torch.randn(2, 5)
    torch.testing.assert_close(layer(x), x @ layer.weight + layer.bias)


def test_model_types_and_their_classes():
    assert compat.causal_models()["llama"] == "LlamaForCausalLM"
    assert compat.wrapper_models()["gemma3"] == "Gemma3ForConditionalGeneration"


def test_stored_names_are_those_of_the_model_after_renaming():
    model = make_model()
    state = model.state_dict()
    expected = [compat.Renamed(name, name, None) for name in state]
    assert list(compat.renamed(model, state)) == expected
    bare = [name.removeprefix("model.") for name in state if name != "lm_head.weight"]
    for each in compat.renamed(model, bare):
        assert each == compat.Renamed(each.stored, f"model.{each.stored}", None)


@pytest.mark.parametrize("tied", [True, False])
def test_ties_are_those_of_the_config(tied):
    model = make_model(tie_word_embeddings=tied)
    expected = {"lm_head.weight": "model.embed_tokens.weight"}
    assert compat.ties(model) == (expected if tied else {})
    assert compat.possible_ties(model) == expected


def test_buffers_that_models_compute_are_redundant():
    redundant = compat.redundant_names(make_model())
    assert redundant.search("model.layers.0.self_attn.rotary_emb.inv_freq")
    assert redundant.search("model.rotary_emb.inv_freq")
    assert not redundant.search("model.layers.0.self_attn.q_proj.weight")


@pytest.mark.parametrize(("family", "widths"), [("llama", [16, 16]), ("gemma4_text", [16, 32])])
def test_sizes_of_each_layer(family, widths):
    config = AutoConfig.for_model(
        *(family,), num_hidden_layers=2, head_dim=16, global_head_dim=32, hidden_size=64
    )
    assert [layer.head_dim for layer in compat.layer_configs(config)] == widths


def test_layers_use_the_attention_function_that_their_config_names():
    model, calls = make_model(), []

    def attention(module, query, key, value, attention_mask, **kwargs):
        calls.append(query.shape)
        return compat.sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    assert compat.attention_name(model.config) == compat.SDPA
    expected = model(torch.arange(2, 10)[None]).logits
    AttentionInterface.register("compat-test", attention)
    compat.AttentionMaskInterface.register("compat-test", compat.sdpa_mask)
    for module in model.modules():
        if compat.attention_name(getattr(module, "config", None)) == compat.SDPA:
            compat.set_attention_name(module.config, "compat-test")
    assert torch.equal(model(torch.arange(2, 10)[None]).logits, expected)
    assert calls == [(1, 2, 8, 32)] * 2  # [B, heads, T, head_dim], once a layer


def test_a_layer_of_a_cache_has_keys_and_values_and_a_length():
    layer = compat.DynamicLayer()
    keys = torch.randn(1, 2, 3, 4)
    assert not layer.is_initialized
    layer.lazy_initialization(keys, keys)
    assert layer.is_initialized
    assert layer.get_seq_length() == 0
    layer.update(keys, keys)
    assert torch.equal(layer.keys, keys)
    assert layer.get_seq_length() == 3
    cache = DynamicCache(config=make_model().config)
    assert len(cache.layers) in (0, 2)  # made at once or as they come


def test_rotary_settings_of_configs_and_modules():
    config = make_model().config
    assert compat.has_rotary_positions(config)
    assert compat.rotary_parameters(config)["rope_type"] == "default"
    assert not compat.has_rotary_positions(AutoConfig.for_model("gpt2"))
    scaled = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = make_model(rope_parameters=scaled)
    found = [kind for module in model.modules() for kind in compat.rotary_types(module)]
    assert found == ["dynamic"]
    assert compat.rotary_types(nn.Linear(2, 2)) == []


def test_registered_quantizers_are_asked_before_and_after_loading():
    for name in ("_process_model_before_weight_loading", "_process_model_after_weight_loading"):
        assert hasattr(compat.HfQuantizer, name)
    settings = compat.QuantizationConfigMixin(quant_method="llmq")
    assert copy.deepcopy(settings).to_dict()["quant_method"] == "llmq"
    for register in (compat.register_quantizer, compat.register_quantization_config):
        with pytest.raises(ValueError, match="already"):
            register("llmq")(object)  # llmq's own is there


def test_a_base_model_hands_over_hidden_states_first():
    hidden = torch.randn(1, 2, 3)
    output = compat.BaseModelOutputWithPast(last_hidden_state=hidden)
    assert output[0] is hidden
    assert output.last_hidden_state is hidden


def test_reporters_are_listed_by_name():
    assert all(isinstance(name, str) for name in compat.get_available_reporting_integrations())


def test_remarks_and_bars_of_transformers_come_back(capsys, monkeypatch):
    from transformers.utils import logging

    before = logging.get_verbosity()
    monkeypatch.setattr(logging, "_tqdm_active", True)
    with compat.only_errors():
        assert logging.get_verbosity() == logging.ERROR
        assert list(logging.tqdm(range(2), desc="Loading weights")) == [0, 1]
        assert not capsys.readouterr().err
    assert logging.get_verbosity() == before
    assert logging.is_progress_bar_enabled()


@pytest.mark.parametrize("is_installed", [False, True])
def test_a_method_is_taken_over_only_where_its_package_is_missing(monkeypatch, is_installed):
    mapping = {"gptq": int, "bitnet": int}
    monkeypatch.setattr("transformers.quantizers.auto.AUTO_QUANTIZATION_CONFIG_MAPPING", mapping)
    monkeypatch.setattr(
        compat, "find_spec", lambda name: name if is_installed and name == "gptqmodel" else None
    )
    taken = compat.adopt_methods(str, ("gptq", "bitnet", "llmq"))
    assert taken == ([] if is_installed else ["gptq"])
    assert mapping == {"gptq": int if is_installed else str, "bitnet": int}


def test_a_tensor_that_a_rule_takes_for_another_is_found():
    """transformers saves the last norm of DeepSeek-V4 under its own name, and reads it as that of
    a compressor, which the original checkpoint has under a name alike."""
    if compat.get_checkpoint_conversion_mapping("deepseek_v4") is None:
        pytest.skip("this transformers has no DeepSeek-V4")
    assert compat.find_lost_tensors("llama") == []
    compat.find_lost_tensors("deepseek_v4")
    assert compat.find_lost_tensors("deepseek_v4") == [], "once is enough"
    rules = compat.get_checkpoint_conversion_mapping("deepseek_v4")
    renamings = [rule for rule in rules if isinstance(rule, compat.WeightRenaming)]
    assert not any(rule.was_used() for rule in renamings)
    names = {
        "model.norm.weight": "model.norm.weight",
        "model.layers.0.attn.compressor.norm.weight": (
            "model.layers.0.self_attn.compressor.kv_norm.weight"
        ),
    }
    for stored, expected in names.items():
        found = stored
        for rule in renamings:
            found, _ = rule.rename_source_key(found)
        assert found == expected
    assert compat.undo_renamings(rules, names.values()) == {
        name: stored for stored, name in names.items()
    }
