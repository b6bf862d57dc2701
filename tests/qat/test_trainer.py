"""What happens around the steps of training."""

import pytest
import torch
from conftest import make_model

import llmq
from llmq.evaluation.perplexity import evaluate
from llmq.evaluation.windows import Windows
from llmq.qat.losses import LossWeights
from llmq.qat.schedule import Phases
from llmq.qat.student import Student
from llmq.qat.trainer import held_out_perplexity
from llmq.recipe import Recipe
from llmq.spec import ActSpec


def test_held_out_text_is_scored_with_everything_quantized():
    """At a step that is neither at full strength nor quantizes activations yet, the score is that of the end; the next step goes on as scheduled."""
    model = make_model()
    llmq.prepare_qat(model, Recipe.uniform("w2g32-asym", method="rtn", activations=ActSpec("int8-token")))
    student = Student(model, None, LossWeights(kl=0, ce=1)).train()
    windows = Windows(torch.randint(2, 2048, (4, 16)), "none", "", "")
    phases = Phases(gradual=0.5, activations=0.5)
    phases.apply(student, 1.0)
    expected = evaluate(student.model, windows).value
    phases.apply(student, 0.1)
    assert evaluate(student.model, windows).value != pytest.approx(expected, rel=1e-4)
    assert held_out_perplexity(student, windows) == pytest.approx(expected, rel=1e-6)
    assert student.training
