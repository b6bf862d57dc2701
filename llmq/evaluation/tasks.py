"""Task scores by lm-eval (the optional extra `eval`) of a model that is loaded already.

A task is a name that lm-eval knows, a YAML file of one, or a folder of such files. lm-eval's own
tasks, more than ten thousand files, are only looked through where one is asked for by its name."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmq.errors import LlmqError
from llmq.messages import did_you_mean
from llmq.models.arch import needs_bos
from llmq.storage.boundary import reading
from llmq.text.windows import added_bos

_YAML = (".yaml", ".yml")
_STDERR = "_stderr"


@dataclass(frozen=True)
class TaskSettings:
    """limit: questions per task, None for all. num_fewshot: solved examples before each question,
    None for what the task says. batch_size: texts that run through the model together.
    chat_template: whether questions go through the model's."""

    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: int = 1
    chat_template: bool = False


def check_installed() -> None:
    """Raise `LlmqError` without lm-eval."""
    if find_spec("lm_eval") is None:
        raise LlmqError(
            "--tasks: lm-eval is not installed; pip install '.[eval]' in a clone of llmq"
        )


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    settings: TaskSettings = TaskSettings(),
) -> dict[str, Any]:
    """Scores of a model on tasks, JSON-able. Raises `LlmqError` without lm-eval, for names that it
    does not know, and for what it cannot run."""
    check_installed()
    with _quiet():
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        manager, tasks = find_tasks(names)
        adds_bos = needs_bos(model.config) or None  # None: as the tokenizer does by itself
        with reading(f"--tasks {','.join(names)}", "lm-eval cannot run this", "see its data set"):
            harness = HFLM(
                pretrained=model,
                tokenizer=tokenizer,
                batch_size=settings.batch_size,
                add_bos_token=adds_bos,
            )
            found = lm_eval.simple_evaluate(
                model=harness,
                tasks=tasks,
                task_manager=manager,
                num_fewshot=settings.num_fewshot,
                limit=settings.limit,
                apply_chat_template=settings.chat_template,
            )
    return {
        "tasks": summarized(found, tokenizer),
        "lm_eval_version": lm_eval.__version__,
        "limit": settings.limit,
        "num_fewshot": settings.num_fewshot,
        "batch_size": settings.batch_size,
        "chat_template": settings.chat_template,
        "sequence_length": found.get("max_length"),
        "bos": "none" if adds_bos is None and added_bos(tokenizer) is None else "start",
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without lm-eval's remarks on how it is called; what it prints goes to stderr."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(level)


def find_tasks(names: Sequence[str]) -> tuple[Any, list[str]]:
    """lm-eval's task manager, and what it is to be asked for. Raises `LlmqError` for files that are
    not there, and names that are not known."""
    from lm_eval.tasks import TaskManager

    local = [Path(name) for name in names if is_local(name)]
    known = [name for name in names if not is_local(name)]
    for path in local:
        if not path.exists():
            raise LlmqError(f"--tasks {path}: no such file; give a task's YAML file or a folder")
    folders = [path for path in local if path.is_dir()]
    with reading("--tasks", "lm-eval cannot read the tasks", "compare with its own YAML files"):
        manager = TaskManager(include_path=folders or None, include_defaults=bool(known))
        in_folders = [_tasks_of(folder) for folder in folders]
    for name in known:
        if name not in manager.all_tasks:
            raise LlmqError(
                f"--tasks {name}: lm-eval knows no such task"
                f"{did_you_mean(name, manager.all_tasks)}; 'lm-eval ls tasks' lists them, and a "
                "file of yours is ./NAME.yaml"
            )
    files = [str(path) for path in local if not path.is_dir()]
    return manager, [*known, *files, *(name for each in in_folders for name in each)]


def is_local(name: str) -> bool:
    """Whether a task is a file or folder: by its suffix, or by a way to it."""
    return Path(name).suffix in _YAML or name.startswith((".", "/")) or name.endswith("/")


def _tasks_of(folder: Path) -> list[str]:
    from lm_eval.tasks import TaskManager

    found: list[str] = TaskManager(include_path=folder, include_defaults=False).all_subtasks
    if not found:
        raise LlmqError(f"--tasks {folder}: no YAML file in this folder is a task")
    return found


def summarized(
    found: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    """What lm-eval found, a record for each task and group: its version, number of shots and of
    questions, and its scores with their standard errors; of tasks whose answers are written, how
    many tokens they have on average."""
    records = []
    for name, figures in found["results"].items():
        questions = found["n-samples"].get(name, {})
        records.append(
            {
                "task": name,
                "version": found["versions"].get(name),
                "n_shot": found["n-shot"].get(name),
                "questions": questions.get("effective"),
                "questions_of_task": questions.get("original"),
                "tokens_per_answer": _tokens_per_answer(found, name, tokenizer),
                "scores": _scores(figures, found["higher_is_better"].get(name) or {}),
            }
        )
    return records


def _scores(
    figures: Mapping[str, Any], higher_is_better: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Of one task: figures are named METRIC,FILTER there."""
    scores = []
    for key, value in figures.items():
        metric, comma, name = key.partition(",")
        if not comma or metric.endswith(_STDERR):
            continue
        scores.append(
            {
                "metric": metric,
                "filter": name,
                "value": _number(value),
                "stderr": _number(figures.get(f"{metric}{_STDERR},{name}")),
                "higher_is_better": higher_is_better.get(metric),
            }
        )
    return scores


def _number(value: Any) -> float | None:
    """None for what lm-eval writes as text, such as a standard error that is not defined."""
    return None if value is None or isinstance(value, str) else float(value)


def _tokens_per_answer(
    found: Mapping[str, Any], name: str, tokenizer: PreTrainedTokenizerBase
) -> float | None:
    """Mean length of written answers, up to where a task ends them; None for chosen ones."""
    if found["configs"].get(name, {}).get("output_type") != "generate_until":
        return None
    # A sample is there once for each filter of its answers.
    answers = {sample["doc_id"]: sample["resps"] for sample in found["samples"].get(name, ())}
    texts = [text for each in answers.values() for given in each for text in given]
    if not texts:
        return None
    rows = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return sum(map(len, rows)) / len(rows)
