"""`llmq.QATCallback` in transformers' Trainer as it is."""

import json

import pytest
import torch
from conftest import make_model
from transformers import Trainer, TrainingArguments

import llmq
from llmq.errors import LlmqError, VerificationError
from llmq.grid.spec import ActSpec
from llmq.qat.schedule import Phases
from llmq.qat.weights import fake_quant_modules
from llmq.recipe import Recipe

RECIPE = Recipe.uniform("w2g32-asym", method="rtn", activations=ActSpec("int8-token"))


def prepared(**options):
    torch.manual_seed(0)
    return llmq.prepare_qat(make_model(), RECIPE, **options)


def rows(n=16):
    ids = torch.randint(2, 2048, (n, 16), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer(model, folder, n_steps=5, callback=None, optimizers=None, **options):
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=n_steps,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        use_cpu=True,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        **{"save_strategy": "no", **options},
    )
    if optimizers is None:
        # fast enough for weights to reach another code
        groups = llmq.qat_parameter_groups(model, lr_weights=1e-2)
        optimizers = (torch.optim.AdamW(groups), None)
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=rows(),
        callbacks=[llmq.QATCallback() if callback is None else callback],
        optimizers=optimizers,
    )


def values_of(model):
    return {name: each.qtensor().dequantize() for name, each in fake_quant_modules(model).items()}


@pytest.mark.parametrize("lora_rank", [None, 4])
def test_five_steps_and_a_folder_with_the_very_values_that_were_trained(
    lora_rank, tmp_path, tokenizer
):
    model = prepared(lora_rank=lora_rank)
    start = values_of(model)
    run = trainer(model, tmp_path / "run")
    run.train()
    losses = [row for row in run.state.log_history if "loss" in row]
    assert len(losses) == 5
    assert all(0 <= row["flip_rate"] <= 1 and "clip_fraction" in row for row in losses)
    assert sum(row["flip_rate"] for row in losses) > 0
    trained = values_of(model)
    assert any(not torch.equal(start[name], trained[name]) for name in start)
    llmq.freeze(model, RECIPE.activations)
    llmq.save(model, tmp_path / "out", tokenizer=tokenizer)
    loaded = llmq.load(tmp_path / "out")
    for name, value in trained.items():
        assert torch.equal(loaded.get_submodule(name).qtensor().dequantize(), value)


def test_a_step_leaves_positive_scales_where_they_are_kept(tmp_path):
    model, seen = prepared(), []
    scales = [each.quantizer.scale for each in fake_quant_modules(model).values()]

    class Seeing(llmq.QATCallback):
        def on_optimizer_step(self, *args, **kwargs):
            before = min(float(scale.min()) for scale in scales)
            super().on_optimizer_step(*args, **kwargs)
            seen.append((before, min(float(scale.min()) for scale in scales)))

    groups = llmq.qat_parameter_groups(model, lr_scales=1.0)  # far below zero with one step
    optimizers = (torch.optim.AdamW(groups), None)
    trainer(model, tmp_path, 1, callback=Seeing(), optimizers=optimizers).train()
    [(before, after)] = seen
    assert before < 0 < after


def test_the_phases_of_a_run(tmp_path):
    """Activations are quantized from the second half on, weights gradually, and all at the end."""
    seen = []

    class Watching(llmq.QATCallback):
        def on_step_end(self, args, state, control, **kwargs):
            module = next(iter(fake_quant_modules(kwargs["model"]).values()))
            seen.append((module.strength, module.activations.enabled))

    model = prepared()
    trainer(model, tmp_path, 4, Watching(Phases(gradual=1.0, activations=0.5))).train()
    assert seen == [(0.0, False), (0.25, False), (0.5, True), (0.75, True)]
    assert all(module.strength == 1 for module in fake_quant_modules(model).values())


def test_a_run_goes_on_where_its_checkpoint_is(tmp_path):
    whole, first, second = prepared(), prepared(), prepared()
    trainer(whole, tmp_path / "whole", 4).train()
    trainer(first, tmp_path / "run", 4, save_strategy="steps", save_steps=2).train()
    again = trainer(second, tmp_path / "run", 4)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for found in (values_of(first), values_of(second)):
        for name, value in values_of(whole).items():
            assert torch.equal(found[name], value), name
    state = json.loads((tmp_path / "run" / "checkpoint-2" / "trainer_state.json").read_text())
    assert "flip_rate" in state["log_history"][0]


def test_what_is_refused(tmp_path):
    plain = make_model()
    with pytest.raises(LlmqError, match=r"call llmq.prepare_qat\(model, recipe, texts\) before"):
        trainer(plain, tmp_path, optimizers=(None, None)).train()
    with pytest.raises(LlmqError, match=r"q_proj.quantizer: scales .* would decay by 0.1"):
        trainer(prepared(), tmp_path, optimizers=(None, None), weight_decay=0.1).train()
    model = prepared()
    next(iter(fake_quant_modules(model).values())).weight.register_hook(
        lambda grad: grad * torch.nan
    )
    with pytest.raises(VerificationError, match=r"step 1: .* NaN .* give a lower learning rate"):
        trainer(model, tmp_path).train()
