"""The loss in chunks is the loss at once, and phases are functions of the share that is done."""

from dataclasses import replace

import pytest
import torch
from conftest import make_model

from llmq.errors import LlmqError
from llmq.grid.spec import QuantSpec
from llmq.qat.losses import Head, LossWeights, distillation_loss
from llmq.qat.schedule import Phases
from llmq.qat.settings import QATSettings, Scheme
from llmq.qat.student import Student, next_tokens


@pytest.mark.parametrize("with_teacher", [True, False])
def test_chunks_change_nothing(with_teacher):
    head, teacher_head = torch.nn.Linear(8, 50), torch.nn.Linear(6, 50)
    hidden, teacher_hidden = torch.randn(2, 9, 8, requires_grad=True), torch.randn(2, 9, 6)
    tokens = torch.randint(0, 50, (2, 9))
    targets = next_tokens(tokens)
    targets[1, 5:] = -100  # padding
    teacher = (
        {"teacher_hidden": teacher_hidden, "teacher_head": Head(teacher_head)}
        if with_teacher
        else {}
    )
    parts = distillation_loss(
        hidden,
        targets,
        Head(head, tuple(head.parameters())),
        LossWeights(0.7, 0.3),
        **teacher,
        chunk_tokens=4,
    )
    parts["loss"].backward()
    gradients = hidden.grad.clone(), head.weight.grad.clone()
    hidden.grad, head.weight.grad = None, None

    counted = targets != -100
    log_q = torch.log_softmax(head(hidden), -1)[counted]
    ce = -log_q.gather(1, targets[counted][:, None]).mean()
    p = torch.softmax(teacher_head(teacher_hidden), -1)[counted]
    kl = (p * (p.log() - log_q)).sum(-1).mean()
    expected = 0.7 * kl + 0.3 * ce if with_teacher else 0.3 * ce
    expected.backward()
    assert parts["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert float(parts["ce"]) == pytest.approx(ce.item(), rel=1e-5)
    assert torch.allclose(gradients[0], hidden.grad, atol=1e-6)
    assert torch.allclose(gradients[1], head.weight.grad, atol=1e-6)


def test_no_more_than_a_chunk_of_logits_exists():
    rows = []

    def head(hidden):
        rows.append(len(hidden))
        return hidden @ torch.ones(4, 30)

    hidden = torch.randn(3, 20, 4, requires_grad=True)
    distillation_loss(
        hidden,
        next_tokens(torch.randint(0, 30, (3, 20))),
        Head(head),
        LossWeights(),
        chunk_tokens=8,
    )["loss"].backward()
    assert max(rows) == 8
    assert sum(rows) == 57, "each chunk once"


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2", "opt", "gpt_neox", "falcon"])
def test_the_head_on_the_hidden_states_gives_the_models_logits(model_type):
    model = make_model(model_type)
    student = Student(model, make_model(model_type), LossWeights(1, 0))
    ids = torch.randint(2, 2048, (2, 12))
    assert student(ids)["loss"].item() == pytest.approx(0, abs=1e-5), "a model is its own teacher"
    expected = model(input_ids=ids, labels=ids).loss
    assert float(student(ids)["ce"]) == pytest.approx(expected.item(), rel=1e-4)
    assert not [name for name in student.state_dict() if not name.startswith("model.")]


def test_a_model_whose_logits_need_more_than_hidden_states_is_refused():
    model = make_model()
    forward = model.forward

    def with_tokens(input_ids=None, **kwargs):
        output = forward(input_ids=input_ids, **kwargs)
        return output if input_ids is None else type("Out", (), {"logits": output.logits + 1})()

    model.forward = with_tokens
    with pytest.raises(LlmqError, match="do not follow from its last hidden states"):
        Student(model, None, LossWeights(kl=0, ce=1))


def test_a_teacher_of_another_vocabulary_is_refused():
    with pytest.raises(LlmqError, match="vocabulary of 1024"):
        Student(make_model(), make_model(vocab_size=1024), LossWeights())


def test_phases():
    phases = Phases(warmup=0.1, gradual=0.2, freeze_scales=0.5)
    assert [phases.learning_rate(done) for done in (0, 0.05, 0.1)] == pytest.approx([0, 0.5, 1])
    assert phases.learning_rate(1.0) == 0
    assert phases.learning_rate(0.5, scales=True) == 0
    assert 0 < phases.learning_rate(0.5) < 1
    assert [phases.strength(done) for done in (0, 0.1, 0.2, 1)] == pytest.approx([0, 0.5, 1, 1])
    with pytest.raises(LlmqError, match="share of the run"):
        Phases(gradual=5)


def test_schemes_and_steps():
    assert Scheme.parse("w4a8kv8") == Scheme(QuantSpec("int4", 128), "int8-token", 8)
    assert Scheme.parse("w2") == Scheme(QuantSpec("int2", 64, symmetric=False))
    assert Scheme.parse("ternary").weights.code == "ternary"
    for text in ("w5", "ternarya4", "w4kv3", ""):
        with pytest.raises(LlmqError, match="expected w8"):
            Scheme.parse(text)
    settings = QATSettings(
        Scheme.parse("w4"), max_tokens=10_000, sequence_length=100, batch_size=5, accumulation=2
    )
    assert settings.n_steps(1000) == 10
    assert settings.n_steps(1000, n_processes=2) == 5
    with pytest.raises(LlmqError, match="--max-tokens 10000: one step takes 16000"):
        replace(settings, batch_size=80).n_steps(1000)
    with pytest.raises(LlmqError, match="both set the length"):
        replace(settings, max_steps=3)
    with pytest.raises(LlmqError, match="at least 0"):
        LossWeights(kl=-1.0)
    with pytest.raises(LlmqError, match="precision"):
        QATSettings(Scheme.parse("w4"), precision="fp8")
