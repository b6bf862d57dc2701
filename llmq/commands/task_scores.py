"""`llmq eval MODEL --tasks ...`: the scores of a model on tasks of lm-eval."""

from __future__ import annotations

import argparse
from typing import Any

from llmq.commands import options, rendering, scoring
from llmq.commands.parser import Parser
from llmq.errors import LlmqError

# Of options that only belong to one kind of evaluation, by their names in the parser.
OF_TEXT = ("data", "protocol", "stride", "sequence_length", "max_windows", "bos")
OF_TASKS = ("limit", "num_fewshot", "batch_size", "chat_template")


def add_arguments(parser: Parser) -> None:
    """Which tasks, and how they are put."""
    parser.section("tasks")
    parser.add_argument(
        "--tasks",
        metavar="TASKS",
        help="scores on tasks in place of a perplexity, by lm-eval (pip install '.[eval]'): "
        "names with commas between, such as hellaswag,arc_easy, or a YAML file or folder, "
        "./mytask.yaml",
    )
    parser.add_argument(
        "--limit", type=options.whole(1), metavar="N", help="the first N questions of each task"
    )
    parser.more.add_argument(
        "--num-fewshot",
        type=options.whole(0),
        metavar="N",
        help="solved examples before each question (default: what the task says)",
    )
    parser.more.add_argument(
        "--batch-size",
        type=options.whole(1),
        default=1,
        metavar="N",
        help="questions that run through the model together (default: 1)",
    )
    parser.more.add_argument(
        "--chat-template",
        action="store_true",
        help="put questions through the model's chat template",
    )


def check_options(args: argparse.Namespace) -> None:
    """Raise `LlmqError` for an option of the other kind of evaluation, which would do nothing."""
    others, reason = (
        (OF_TEXT, "goes with a text, not with --tasks, which bring their own")
        if args.tasks
        else (OF_TASKS, "goes with --tasks")
    )
    for name in others:
        if getattr(args, name) != args.parser.get_default(name):
            raise LlmqError(f"--{name.replace('_', '-')} {reason}; leave it out")


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The result as JSON-able data and as text."""
    from llmq.evaluation.tasks import TaskSettings, check_installed, run_tasks
    from llmq.inference.module import backends_in_use
    from llmq.models.source import Source
    from llmq.models.tokens import own_tokenizer

    check_installed()
    names = [name.strip() for name in args.tasks.split(",") if name.strip()]
    if not names:
        raise LlmqError("--tasks: expected names or YAML files, got none; such as hellaswag")
    source = Source.open(args.model, args.revision)
    verified = scoring.check_manifest(args, source.folder)
    model = scoring.load_scored(args, source)
    settings = TaskSettings(args.limit, args.num_fewshot, args.batch_size, args.chat_template)
    summary = {
        "model": args.model,
        **run_tasks(model, own_tokenizer(source), names, settings),
        "dtype": str(model.dtype).removeprefix("torch."),
        **scoring.conditions(args),
        "backends": backends_in_use(model),
        "verified": verified,
    }
    return summary, text_of(summary)


def text_of(summary: dict[str, Any]) -> str:
    """A table with a row for each score, and what they were measured with."""
    rows = [_row(task, score) for task in summary["tasks"] for score in task["scores"]]
    header = ["task", "metric", "value", "standard error", "shots", "questions"]
    header.append("tokens per answer")
    if all(task["tokens_per_answer"] is None for task in summary["tasks"]):
        header, rows = header[:-1], [row[:-1] for row in rows]
    return f"{rendering.render(rows, header)}\n\n{_conditions(summary)}"


def _row(task: dict[str, Any], score: dict[str, Any]) -> list[str]:
    name, how = score["metric"], score["filter"]
    questions = _known(task["questions"], "d")
    if task["questions"] != task["questions_of_task"]:
        questions += f" of {task['questions_of_task']}"
    return [
        task["task"],
        name if how == "none" else f"{name} ({how})",
        _known(score["value"], ".4f"),
        _known(score["stderr"], ".4f"),
        _known(task["n_shot"], "d"),
        questions,
        _known(task["tokens_per_answer"], ".1f"),
    ]


def _known(value: float | None, digits: str) -> str:
    return "-" if value is None else f"{value:{digits}}"


def _conditions(summary: dict[str, Any]) -> str:
    head = "" if summary["head_bits"] is None else f", head at {summary['head_bits']} bits"
    template = ", chat template" if summary["chat_template"] else ""
    line = (
        f"lm-eval {summary['lm_eval_version']}, texts up to {summary['sequence_length']} tokens, "
        f"BOS {summary['bos']}{template}, {summary['dtype']}, compute {summary['compute']}{head}"
    )
    return rendering.wrapped(line, rendering.terminal_width(), "  ")
