"""The options of `llmq qat`. Those that few people need are keys of recipe files."""

from __future__ import annotations

from llmq.commands import options, pushing
from llmq.commands.options import real, source, whole
from llmq.commands.parser import Parser, fold_into_recipes
from llmq.ptq.methods import METHODS
from llmq.ptq.transforms import TRANSFORMS

# Options of earlier versions, and how recipe files say the same.
RECIPE_KEYS = {
    "--warmup": "qat: {phases: {warmup: {}}}",
    "--gradual": "qat: {phases: {gradual: {}}}",
    "--activations-from": "qat: {phases: {activations: {}}}",
    "--freeze-ranges": "qat: {phases: {freeze_ranges: {}}}",
    "--freeze-scales": "qat: {phases: {freeze_scales: {}}}",
}


def add_arguments(parser: Parser) -> None:
    """Every option, none with a default that a recipe file could not override."""
    parser.add_argument("model", help=options.MODEL_HELP)
    parser.add_argument("out", help="the folder to write")
    parser.section("what it becomes")
    parser.add_argument(
        "--scheme",
        help="w8, w4, w3, w2 or ternary, with a8 and kv8 or kv4 behind where wanted: w4a8kv8 "
        "(default: w4)",
    )
    options.add_recipe_argument(parser)
    _add_scheme_arguments(parser)
    parser.section("training text")
    _add_text_arguments(parser)
    parser.section("training")
    _add_run_arguments(parser)
    _add_training_arguments(parser)
    parser.section("run and output")
    _add_device_arguments(parser)
    options.add_overwrite_argument(parser)
    pushing.add_push_arguments(parser)
    _add_cadence_arguments(parser)
    parser.more.add_argument(
        "--strict",
        action="store_true",
        help="refuse layers that would differ from what was asked, and stored tensors that would "
        "be left out",
    )
    options.add_revision_argument(parser)
    fold_into_recipes(parser, RECIPE_KEYS)


def _add_text_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--train",
        type=source,
        default="bundled",
        metavar="SOURCE",
        help=f"{options.TEXT_HELP} (default), or 'generated' by the teacher",
    )
    parser.add_argument(
        "--teacher",
        metavar="MODEL",
        help="full-precision teacher with the same vocabulary (default: the model itself)",
    )
    parser.more.add_argument(
        "--held-out",
        type=whole(0),
        dest="n_held_out",
        metavar="N",
        help="windows of the text that are not trained on, at most a tenth (default: 32)",
    )


def _add_run_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--max-tokens", type=real(1), metavar="N", help="training tokens (default: the text once)"
    )
    parser.more.add_argument(
        "--max-steps", type=whole(1), metavar="N", help="optimizer steps, instead of --max-tokens"
    )
    parser.add_argument(
        "--sequence-length",
        type=whole(2),
        metavar="T",
        help="tokens per window (default: 2048, or what the model has positions for)",
    )
    parser.add_argument(
        "--batch-size", type=whole(1), help="sequences per process and batch (default: 8)"
    )
    parser.more.add_argument(
        "--accumulation", type=whole(1), help="batches per optimizer step (default: 1)"
    )
    parser.more.add_argument("--seed", type=whole(0, 2**32 - 1), help="(default: 0)")
    parser.more.add_argument(
        "--lora-rank",
        type=whole(1),
        metavar="R",
        help="train a change of this rank of every weight, and scales: less memory (default: all)",
    )
    parser.more.add_argument(
        "--optimizer",
        metavar="NAME",
        help="of transformers' Trainer, such as adamw_torch_8bit (default: adamw_torch)",
    )


def _add_device_arguments(parser: Parser) -> None:
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.more.add_argument(
        "--precision",
        choices=("bf16", "fp16", "fp32"),
        help="arithmetic; master weights are float32 always (default: bf16 where the device "
        "multiplies it, else fp32)",
    )
    parser.more.add_argument(
        "--gradient-checkpointing",
        action="store_true",
        default=None,
        help="compute activations twice instead of keeping them",
    )
    parser.more.add_argument(
        "--shard",
        action="store_true",
        default=None,
        help="split masters, gradients and moments over the processes of torchrun (FSDP2)",
    )


def _add_scheme_arguments(parser: Parser) -> None:
    parser.more.add_argument(
        "--group-size",
        type=whole(-1),
        metavar="G",
        help="columns per scale; -1: one scale per row, 0: one per tensor (default: 128; w2: 64)",
    )
    parser.more.add_argument(
        "--asymmetric",
        action="store_true",
        help="a learned zero point per group (w2 has one, except with --quantizer seq)",
    )
    parser.more.add_argument(
        "--activations",
        choices=("int8-token", "int8-static"),
        help="which kind of INT8 activations a scheme with a8 has (default: int8-token)",
    )
    parser.more.add_argument(
        "--kv-before-rope",
        action="store_true",
        default=None,
        help="quantize keys before the rotary embedding, as LLM-QAT does",
    )
    options.add_rule_argument(parser.more)
    parser.more.add_argument(
        "--quantizer",
        choices=("lsq", "seq", "ste", "absmean"),
        help="learned scales, the same stretched over the range (ParetoQ; 2 bits and ternary), "
        "scales from the range (LLM-QAT), or absmean ternary (BitNet) (default: lsq)",
    )
    parser.more.add_argument(
        "--init",
        type=options.method_name,
        metavar="[TRANSFORM+]METHOD",
        help=f"the PTQ method of the start: {', '.join(METHODS)}; with {', '.join(TRANSFORMS)}+ "
        "before it, scale moves first (default: gptq)",
    )


def _add_training_arguments(parser: Parser) -> None:
    parser.more.add_argument(
        "--lr-weights",
        type=real(),
        help="peak learning rate of the weights (default: 0.001 to 0.004 of a step of each layer's "
        "own grid)",
    )
    parser.more.add_argument(
        "--lr-scales",
        type=real(),
        help="peak learning rate of scales and zero points (default: as far as the weights move)",
    )
    parser.more.add_argument(
        "--kl", type=real(), help="weight of KL divergence to the teacher (default: 1)"
    )
    parser.more.add_argument(
        "--ce",
        type=real(),
        help="weight of cross entropy with the text (default: 0.1; 1 with --kl 0; 0 with --train "
        "generated)",
    )
    parser.more.add_argument(
        "--max-grad-norm",
        type=real(),
        help="longer gradients are cut to this length; 0: none (default: 1)",
    )


def _add_cadence_arguments(parser: Parser) -> None:
    for name, what in (
        ("--log-every", "rows of the log (default: 100 times in the run)"),
        ("--save-every", "checkpoints to resume from (default: 5 times in the run)"),
        ("--eval-every", "held-out perplexity (default: 5 times in the run)"),
    ):
        parser.more.add_argument(name, type=whole(0), metavar="STEPS", help=what)
    parser.more.add_argument(
        "--report-to", default="none", help="none, tensorboard or wandb, through the Trainer"
    )
    parser.more.add_argument(
        "--plot", metavar="FILE", help="write loss and telemetry as a picture (needs matplotlib)"
    )
