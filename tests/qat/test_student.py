"""The loss is taken on the model's own logits, whatever lies between them and its hidden states."""

import pytest
import torch
from conftest import FAMILY_CONFIGS, make_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from llmq.errors import LlmqError
from llmq.models.source import meta_model
from llmq.qat.job import prepare_job
from llmq.qat.losses import LossWeights
from llmq.qat.settings import QATSettings, Scheme
from llmq.qat.student import Student, base_of, check_head, check_student, head_of, last_hidden
from llmq.recipe import Rule

TOKENS = torch.randint(2, 2048, (2, 16), generator=torch.Generator().manual_seed(0))
SMALL = {
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
SCALED = {
    "granite": {"logits_scaling": 8.0},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25, "layer_types": ["sliding_attention", "full_attention"]},
}


def scaled(model_type):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **SMALL, **SCALED[model_type])
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.normal_(std=0.1)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("model_type", [*SCALED, "gemma2", "gpt2", "opt"])
def test_logits_of_hidden_states_are_those_of_the_model(model_type):
    model = scaled(model_type) if model_type in SCALED else make_model(model_type)
    check_student(meta_model(model.config))
    check_head(model)
    hidden, expected = last_hidden(model, TOKENS), model(TOKENS).logits
    head = head_of(model)
    assert torch.equal(head(hidden), expected)
    torch.testing.assert_close(head(hidden.flatten(0, 1)), expected.flatten(0, 1))
    assert torch.equal(model(TOKENS).logits, expected)  # nothing of it stays behind


@pytest.mark.slow
@pytest.mark.parametrize("model_type", FAMILY_CONFIGS)
def test_logits_of_every_tested_family(model_type):
    check_head(make_model(model_type))


def test_the_loss_of_a_model_that_scales_its_logits_is_that_of_its_logits():
    model, teacher = scaled("granite"), scaled("granite")
    with torch.no_grad():
        teacher.lm_head.weight.mul_(1.5)
    found = Student(model, teacher, LossWeights(kl=1.0, ce=1.0))(TOKENS)
    log_p, log_q = (
        each(TOKENS).logits[:, :-1].log_softmax(-1).flatten(0, 1) for each in (teacher, model)
    )
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    expected = expected + torch.nn.functional.nll_loss(log_q, TOKENS[:, 1:].flatten())
    torch.testing.assert_close(found["loss"], expected)
    found["loss"].backward()
    gradient = model.lm_head.weight.grad.clone()
    model.zero_grad()
    expected.backward()
    torch.testing.assert_close(gradient, model.lm_head.weight.grad)


def test_a_model_that_cannot_be_taken_apart_is_refused_before_anything_is_computed():
    model = make_model()
    model.base_model_prefix = "nothing"
    assert base_of(model) is model.model  # by its embeddings
    model.get_input_embeddings = lambda: None
    with pytest.raises(LlmqError, match="no base model of its own"):
        check_student(model)
    model = make_model()
    model.get_output_embeddings = lambda: None
    with pytest.raises(LlmqError, match="no output head of its own"):
        check_student(model)


def test_windows_that_are_trained_on_begin_with_bos_where_it_is_needed(
    model_folder, calibration_file
):
    folder = model_folder("gemma", bos_token_id=7)
    settings = QATSettings(Scheme.parse("w4"), sequence_length=32, batch_size=2, max_steps=1)
    job = prepare_job(str(folder), settings, train=str(calibration_file))
    assert job.held_out.bos == "every-window"
    for windows in (job.windows, job.held_out.tokens):
        assert set(windows[:, 0].tolist()) == {0}  # the tokenizer's


def test_strict_refuses_what_would_be_left_out_or_differ(model_folder, calibration_file):
    folder = model_folder(num_hidden_layers=3)
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"num_hidden_layers": 3', '"num_hidden_layers": 2'))
    settings = QATSettings(Scheme.parse("w4"), sequence_length=32, batch_size=2, max_steps=1)
    arguments = {"train": str(calibration_file), "rules": (Rule.parse("*=w4g32"),)}
    job = prepare_job(str(folder), settings, **arguments)
    assert "does not load" in job.notes["layers beside the model"]
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "old.weight": torch.ones(2)}, folder / "model.safetensors")
    with pytest.raises(LlmqError, match=r"--strict: .* are not used"):
        prepare_job(str(folder), settings, strict=True, **arguments)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_gradients_are_those_of_the_whole_logits(family):
    """Of a head that is the embeddings, too, and of one behind a soft cap."""
    torch.manual_seed(0)
    student, teacher = (make_model(family, tie_word_embeddings=True) for _ in range(2))
    ids = torch.randint(2, 2048, (2, 12))
    Student(student, teacher, LossWeights(kl=0.7, ce=0.3)).train()(ids)["loss"].backward()
    found = {name: each.grad.clone() for name, each in student.named_parameters()}
    student.zero_grad()
    log_q = torch.log_softmax(student(ids).logits[:, :-1], -1)
    with torch.no_grad():
        log_p = torch.log_softmax(teacher(ids).logits[:, :-1], -1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    ce = -log_q.gather(-1, ids[:, 1:, None]).mean()
    (0.7 * kl + 0.3 * ce).backward()
    for name, parameter in student.named_parameters():
        scale = parameter.grad.abs().max()
        torch.testing.assert_close(found[name] / scale, parameter.grad / scale, rtol=0, atol=1e-5)
