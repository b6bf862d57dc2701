"""What happens around the steps of training."""

from types import SimpleNamespace

import pytest
import torch
from conftest import make_model
from transformers import TrainerState

import llmq
from llmq.errors import VerificationError
from llmq.evaluation.perplexity import evaluate
from llmq.grid.spec import ActSpec
from llmq.qat.callback import SKIPPED_STEPS, QATCallback
from llmq.qat.losses import LossWeights
from llmq.qat.schedule import Phases
from llmq.qat.settings import QATSettings, Scheme
from llmq.qat.student import Student
from llmq.qat.trainer import (
    QATTrainer,
    held_out_perplexity,
    training_arguments,
)
from llmq.recipe import Recipe
from llmq.text.windows import Windows


def test_held_out_text_is_scored_with_everything_quantized():
    """At a step that is neither at full strength nor quantizes activations yet, the score is that
    of the end; the next step goes on as scheduled."""
    model = make_model()
    llmq.prepare_qat(
        model, Recipe.uniform("w2g32-asym", method="rtn", activations=ActSpec("int8-token"))
    )
    student = Student(model, None, LossWeights(kl=0, ce=1)).train()
    windows = Windows(torch.randint(2, 2048, (4, 16)), "none", "", "")
    phases = Phases(gradual=0.5, activations=0.5)
    phases.apply(student, 1.0)
    expected = evaluate(student.model, windows).value
    phases.apply(student, 0.1)
    assert evaluate(student.model, windows).value != pytest.approx(expected, rel=1e-4)
    assert held_out_perplexity(student, windows) == pytest.approx(expected, rel=1e-6)
    assert student.training


def test_learning_rates_of_a_run(tmp_path):
    """Weights fall to zero at the end, scales where they are to be frozen."""
    model = make_model()
    llmq.prepare_qat(model, Recipe.uniform("w4g32", method="rtn"))
    settings = QATSettings(
        Scheme.parse("w4"), init="rtn", phases=Phases(warmup=0.1, freeze_scales=0.5)
    )
    arguments = training_arguments(settings, 20, tmp_path, device="cpu")
    assert arguments.n_gpu <= 1, "no DataParallel"
    trainer = QATTrainer(
        settings=settings, model=Student(model, None, LossWeights(kl=0, ce=1)), args=arguments
    )
    trainer.create_optimizer_and_scheduler(20)
    rates = {"weights": [], "scales": []}
    for _ in range(20):
        for kind, found in rates.items():
            found.append(
                {
                    group["lr"] / group["initial_lr"]
                    for group in trainer.optimizer.param_groups
                    if group["kind"] == kind
                }
            )
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    for kind, found in rates.items():
        expected = [
            settings.phases.learning_rate(step / 20, scales=kind == "scales") for step in range(20)
        ]
        assert [sorted(each)[0] for each in found] == pytest.approx(expected)
    assert max(rates["scales"][10]) == 0 < min(rates["weights"][19])


def test_steps_that_the_scaler_of_fp16_skips_have_an_end():
    model = torch.nn.Linear(2, 2)
    callback = QATCallback()
    state, control = TrainerState(max_steps=1000), None

    def step(value, fp16):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, value)
        callback.on_pre_optimizer_step(
            SimpleNamespace(fp16=fp16, output_dir="nowhere"), state, control, model=model
        )

    for value in (
        [float("nan")] * (SKIPPED_STEPS - 1) + [1.0] + [float("inf")] * (SKIPPED_STEPS - 1)
    ):
        step(value, True)
    with pytest.raises(VerificationError, match="NaN or infinite"):
        step(float("nan"), True)
    callback.n_skipped = 0
    step(1.0, False)
    with pytest.raises(VerificationError, match="NaN or infinite"):
        step(float("nan"), False)
