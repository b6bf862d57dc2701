"""Whatever a generation config says, the tokens are transformers' own, or it is refused by name."""

import json

import pytest
import torch
from conftest import make_model
from transformers import DynamicCache, GenerationConfig, StoppingCriteria

from llmq.errors import LlmqError
from llmq.grid.spec import QuantSpec
from llmq.grid.tensor import QuantizedTensor
from llmq.inference.cache import InPlaceLayer
from llmq.inference.decoding import generate, prepare_decoding
from llmq.inference.module import quantized_modules, swap
from llmq.inference.settings import (
    _RULES,
    check,
    check_values,
    effective,
    read_settings,
    takes_in_place_cache,
)
from llmq.inference.step import step_of
from llmq_kernels.compiled import decoding

PROMPT = torch.arange(3, 26)[None]
NEW = 12
SAMPLED = {"do_sample": True, "temperature": 0.7}
# One or two values of everything that a config can say, by what would go wrong.
SETTINGS = {
    "nothing": {},
    "no cache": {"use_cache": False},
    "static": {"cache_implementation": "static"},
    "long static": {"cache_implementation": "static", "max_cache_len": 64},
    "dynamic": {"cache_implementation": "dynamic", "cache_config": {"offloading": False}},
    "hybrid": {"cache_implementation": "hybrid"},
    "windows": {"cache_implementation": "sliding_window"},
    "no cache, and one": {"use_cache": False, "cache_implementation": "static"},
    "beams": {"num_beams": 3},
    "beams without cache": {"num_beams": 3, "use_cache": False},
    "static beams": {"num_beams": 2, "cache_implementation": "static"},
    "several beams": {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5},
    "patient beams": {"num_beams": 3, "early_stopping": "never"},
    "early beams": {"num_beams": 3, "early_stopping": True},
    "several texts": {**SAMPLED, "num_return_sequences": 3},
    "sampled beams": {**SAMPLED, "num_beams": 2, "top_k": 5},
    "dictionary": {"return_dict_in_generate": True},
    "scores": {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
    "states": {"return_dict_in_generate": True, "output_hidden_states": True},
    "scores for nobody": {"output_scores": True},
    "lookup": {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1},
    "chunks": {"prefill_chunk_size": 5},
    "guidance": {"guidance_scale": 1.5},
    "watermark": {"watermarking_config": {"bias": 2.5, "greenlist_ratio": 0.3}},
    "shortest": {"min_new_tokens": 8},
    "min length": {"min_length": 30},
    "longest": {"max_length": 26},
    "time": {"max_time": 100.0},
    "repetition": {"repetition_penalty": 1.8, "no_repeat_ngram_size": 2},
    "of the prompt": {"encoder_repetition_penalty": 1.2, "encoder_no_repeat_ngram_size": 2},
    "forced first": {"forced_bos_token_id": 7},
    "forced last": {"forced_eos_token_id": 9},
    "suppressed": {"suppress_tokens": list(range(900)), "begin_suppress_tokens": [1000, 1001]},
    "bad words": {"bad_words_ids": [[5], [6, 7]], "renormalize_logits": True},
    "bias": {"sequence_bias": [[[11], 3.0], [[12, 13], -2.0]]},
    "decay": {"exponential_decay_length_penalty": [2, 1.4]},
    "valid": {"remove_invalid_values": True},
    "ends": {"eos_token_id": [0, 5, 2000]},
    "no end": {"eos_token_id": None, "pad_token_id": None},
    "padding": {"pad_token_id": -1},
    "sampling": SAMPLED,
    "nucleus": {**SAMPLED, "top_p": 0.5, "min_p": 0.01, "typical_p": 0.9, "top_k": 0},
    "cutoffs": {**SAMPLED, "epsilon_cutoff": 3e-4, "eta_cutoff": 1e-3, "top_h": 0.9},
    "greedy with a temperature": {"do_sample": False, "temperature": 0.9, "top_p": 0.6},
    "contrast while sampling": {**SAMPLED, "penalty_alpha": 0.6, "top_k": 4},
    "groups of one": {"num_beam_groups": 1, "diversity_penalty": 0.0, "low_memory": False},
    "assistant's": {"num_assistant_tokens": 5, "assistant_confidence_threshold": 0.2},
    "compiling": {"disable_compile": True, "cache_implementation": "static"},
    "unknown": {"chat_format": "chatml", "max_window_size": 6144},
}
REFUSED = {
    "penalty_alpha": {"penalty_alpha": 0.6, "top_k": 4},
    "cache_implementation 'quantized'": {"cache_implementation": "quantized"},
    "cache_implementation 'offloaded'": {"cache_implementation": "offloaded"},
    "cache_implementation 'offloaded_static'": {"cache_implementation": "offloaded_static"},
    "dola_layers": {"dola_layers": "low"},
    "num_beam_groups": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "constraints": {"num_beams": 2, "constraints": [[5]]},
    "force_words_ids": {"num_beams": 2, "force_words_ids": [[5]]},
}


def quantized_llama():
    """Wide enough for recorded steps where the kernels run."""
    model = make_model(
        dtype=torch.bfloat16,
        hidden_size=256,
        intermediate_size=512,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
    )
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings()
    ]
    weights = {name: model.get_submodule(name).weight.detach().float() for name in names}
    spec = QuantSpec("int4", 128)
    swap(model, {name: QuantizedTensor.quantize(weights[name], spec) for name in names})
    for module in quantized_modules(model).values():
        module.set_compute("int8" if decoding.missing() is None else "exact")
    return model


def with_and_without_recorded_steps():
    """The one without has the same products and attention: of bfloat16 logits that are all but
    equal, another kernel's last bit decides."""
    theirs, ours = (prepare_decoding(quantized_llama()) for _ in range(2))
    theirs.base_model.forward = step_of(theirs)._forward
    return [theirs, ours]


MODELS = {
    "llama": lambda: [make_model()] * 2,
    "gemma3": lambda: [make_model("gemma3_text")] * 2,
    "quantized": with_and_without_recorded_steps,
}


@pytest.fixture(scope="module")
def models():
    """Pairs of the same model as transformers has it and as llmq runs it, made once."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = MODELS[name]()
        return made[name]

    return get


def sequences(output):
    return output if isinstance(output, torch.Tensor) else output.sequences


# What decides about the cache, for the models whose caches differ; the rest runs on one of them.
ABOUT_CACHES = ("nothing", "no cache", "static", "dynamic", "beams", "dictionary", "lookup")


def cases():
    for name in MODELS:
        for label, says in SETTINGS.items():
            is_slow = name != "llama" and label not in ABOUT_CACHES
            marks = [pytest.mark.slow] if is_slow else []
            yield pytest.param(name, says, id=f"{name}-{label}", marks=marks)


@pytest.mark.parametrize(("name", "says"), cases())
def test_tokens_are_transformers_own(models, name, says):
    theirs, ours = models(name)
    config = GenerationConfig.from_dict({"bos_token_id": 0, "eos_token_id": 0, **says})
    results = []
    for model, run in ((theirs, type(theirs).generate), (ours, generate)):
        model.generation_config = config
        torch.manual_seed(0)
        results.append(run(model, PROMPT, max_new_tokens=NEW))
    assert type(results[0]) is type(results[1])
    assert torch.equal(*map(sequences, results))


def test_recorded_steps_are_used_where_the_cache_is_llmqs(models):
    """And only there: what the test above compares is not the model with itself."""
    _, model = models("quantized")
    step = step_of(model)
    if step.reason is not None:
        pytest.skip(step.reason)
    expected = {"nothing": True, "dynamic": True, "ends": True, "dictionary": True}
    expected |= {"no cache": False, "static": False, "beams": False, "lookup": False}
    for name, is_replayed in expected.items():
        before = step.replayed
        model.generation_config = GenerationConfig.from_dict({"eos_token_id": 0, **SETTINGS[name]})
        generate(model, PROMPT, NEW)
        assert (step.replayed > before) == is_replayed, name


@pytest.mark.parametrize("says", REFUSED.values(), ids=REFUSED)
def test_what_transformers_has_no_code_for_is_refused_by_name(says, request):
    model = make_model()
    model.generation_config = GenerationConfig.from_dict(says)
    name = request.node.callspec.id
    with pytest.raises(LlmqError, match=name):
        generate(model, PROMPT, 2)


def test_offloaded_caches_are_refused_on_a_cpu_only():
    settings = effective(make_model(), {"cache_implementation": "offloaded"})
    check(settings, "cuda")
    with pytest.raises(LlmqError, match="cache_implementation 'offloaded'"):
        check(settings, "cpu")


def test_several_texts_of_the_likeliest_tokens_are_refused():
    model = make_model()
    for options, says in (
        ({"num_return_sequences": 2}, "num_return_sequences 2 needs"),
        ({"num_return_sequences": 3, "num_beams": 2}, "3 is more than the num_beams 2"),
    ):
        with pytest.raises(LlmqError, match=says):
            generate(model, PROMPT, 2, **options)


def test_options_go_before_the_config_of_the_call_and_that_before_the_models():
    model = make_model()
    model.generation_config = GenerationConfig(num_beams=2, use_cache=False, top_k=3)
    given = GenerationConfig(num_beams=3, use_cache=True)
    settings = effective(model, {"generation_config": given, "num_beams": 4})
    assert (settings["num_beams"], settings["use_cache"], settings["top_k"]) == (4, True, 3)
    assert effective(model, {"top_k": None})["top_k"] is None
    assert not takes_in_place_cache(model, effective(model, {}), {})
    assert takes_in_place_cache(model, settings, {})


def test_stop_strings(tokenizer):
    model = make_model()
    free = generate(model, PROMPT, NEW, eos_token_id=None, pad_token_id=0)
    stop = tokenizer.decode(free[0, PROMPT.shape[1] + 4])
    ours, theirs = (
        run(model, PROMPT, max_new_tokens=NEW, stop_strings=[stop], tokenizer=tokenizer)
        for run in (generate, type(model).generate)
    )
    assert torch.equal(ours, theirs)
    assert ours.shape[1] < free.shape[1]


class _Caches(StoppingCriteria):
    """Stops nothing; here to be an argument that is no setting."""

    def __call__(self, input_ids, scores, **kwargs):
        return torch.zeros(len(input_ids), dtype=torch.bool)


def test_a_cache_of_the_callers_own_is_used():
    model, cache = make_model(), DynamicCache()
    options = {"do_sample": False, "pad_token_id": 0, "stopping_criteria": [_Caches()]}
    first = generate(model, PROMPT, 4, past_key_values=cache, **options)
    assert cache.get_seq_length() == first.shape[1] - 1
    assert not any(isinstance(layer, InPlaceLayer) for layer in cache.layers)
    again = generate(model, first, 4, past_key_values=cache, **options)
    assert torch.equal(again, model.generate(PROMPT, max_new_tokens=8, **options))


def test_an_assistant_brings_its_own_loop():
    model, draft = make_model(), make_model(seed=1)
    options = {"do_sample": False, "pad_token_id": 0}
    expected = model.generate(PROMPT, max_new_tokens=NEW, **options)
    assert torch.equal(generate(model, PROMPT, NEW, assistant_model=draft, **options), expected)


def test_states_instead_of_keys_and_values():
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    config = MambaConfig(vocab_size=256, hidden_size=32, num_hidden_layers=2, state_size=4)
    model, prompt = MambaForCausalLM(config).eval(), torch.arange(1, 6)[None]
    options = {"do_sample": False, "pad_token_id": 0}
    expected = model.generate(prompt, max_new_tokens=6, **options)
    assert torch.equal(generate(model, prompt, 6, **options), expected)


def test_every_setting_that_transformers_has_is_known():
    """A new one gets transformers' own cache; here it shows, so that somebody looks."""
    known = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    others = {"compile_config", "watermarking_config", "dola_layers", "transformers_version"}
    others |= {"constraints", "force_words_ids", "continuous_batching_config"}
    assert set(_RULES) <= known
    assert known - set(_RULES) - others == set()


WRONG = [True, -1, 2.5, "x", [], {}, [[]], float("nan"), 10**30, ["x"], [None]]


@pytest.mark.parametrize("name", sorted(_RULES))
def test_damaged_values_are_named(name, tmp_path):
    path, refusals = tmp_path / "generation_config.json", []
    for value in WRONG:
        path.write_text(json.dumps({name: value}))
        try:
            check_values({name: value})
        except LlmqError as error:
            refusals.append(str(error))
            with pytest.raises(LlmqError, match=name):
                read_settings(tmp_path)
    assert len(refusals) >= 6
    assert all(name in refusal and "\n" not in refusal for refusal in refusals)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "no JSON"),
        ("[1]", "expected a JSON object, got a list"),
        ("[" * 100_000, "no JSON"),
        ('{"num_return_sequences": 2}', "num_return_sequences"),
        ('{"cache_implementation": "paper"}', "cache_implementation"),
        ('{"compile_config": {"mode": "x"}}', "compile_config"),
        ('{"watermarking_config": {"seeding_scheme": "x"}}', "watermarking_config"),
        ('{"suppress_tokens": [3], "forced_eos_token_id": 3}', "suppress_tokens"),
        ('{"early_stopping": "always"}', "early_stopping"),
        ('{"streamer": 1}', "streamer"),
    ],
)
def test_damaged_files(text, says, tmp_path):
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(LlmqError, match=says):
        read_settings(tmp_path)
