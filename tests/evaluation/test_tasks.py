"""Tasks of lm-eval on a loaded model, against plain computations; skipped without lm-eval."""

import importlib.util
import json
import random
import re
from pathlib import Path

import pytest
import torch
from conftest import make_model

import llmq
from llmq.errors import LlmqError
from llmq.evaluation import tasks
from llmq.evaluation.protocols.words import as_written, n_words
from llmq.evaluation.tasks import TaskSettings, is_local, run_tasks, summarized

HAS_LM_EVAL = importlib.util.find_spec("lm_eval") is not None
with_lm_eval = pytest.mark.skipif(
    not HAS_LM_EVAL, reason="lm-eval is not installed: pip install '.[eval]'"
)

QUESTIONS = [
    {"question": f"{i} + {i} =", "choices": [f"{2 * i}", "none of them"], "answer": i % 2}
    for i in range(10)
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
  cache_dir: {cache}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
{more}
metadata:
  version: 1.0
"""
CHOICE = """doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true"""
WRITTEN = """doc_to_target: "{{choices[answer]}}"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 5
  do_sample: false
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true"""


@pytest.fixture
def task_folder(tmp_path):
    """A folder with a task of each kind: choices, and written answers."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in QUESTIONS))
    for name, kind, more in (
        ("sums", "multiple_choice", CHOICE),
        ("written_sums", "generate_until", WRITTEN),
    ):
        text = TASK.format(name=name, data=data, cache=tmp_path / "cache", kind=kind, more=more)
        (folder / f"{name}.yaml").write_text(text)
    return folder


@torch.no_grad()
def accuracy(model, tokenizer, rows):
    """Of the likeliest choice, one at a time."""
    n_right = 0
    for row in rows:
        context = tokenizer(row["question"])["input_ids"]
        scores = []
        for choice in row["choices"]:
            whole = tokenizer(f"{row['question']} {choice}")["input_ids"]
            found = torch.log_softmax(model(torch.tensor([whole])).logits[0].double(), -1)
            scores.append(sum(found[i - 1, whole[i]] for i in range(len(context), len(whole))))
        n_right += scores.index(max(scores)) == row["answer"]
    return n_right / len(rows)


@with_lm_eval
def test_a_local_task_on_a_loaded_model(task_folder, tokenizer):
    """A quantized one; its score is that of a plain computation."""
    model = make_model()
    llmq.quantize(model, "w4g32", method="rtn")
    settings = TaskSettings(limit=8, batch_size=3)
    found = run_tasks(model, tokenizer, [str(task_folder / "sums.yaml")], settings)
    (task,) = found["tasks"]
    (score,) = task["scores"]
    assert (task["task"], task["n_shot"], task["version"]) == ("sums", 0, 1.0)
    assert (task["questions"], task["questions_of_task"]) == (8, 10)
    assert task["tokens_per_answer"] is None
    assert (score["metric"], score["higher_is_better"]) == ("acc", True)
    expected = accuracy(model, tokenizer, QUESTIONS[:8])
    assert score["value"] == pytest.approx(expected)
    assert score["stderr"] == pytest.approx((expected * (1 - expected) / 7) ** 0.5)
    assert (found["limit"], found["bos"], found["chat_template"]) == (8, "none", False)
    assert re.fullmatch(r"\d+\.\d+.*", found["lm_eval_version"])


@with_lm_eval
def test_a_folder_of_tasks_and_the_tokens_of_written_answers(task_folder, tokenizer):
    model = make_model()
    before = model(torch.arange(8)[None]).logits
    found = run_tasks(model, tokenizer, [f"{task_folder}/"], TaskSettings(num_fewshot=1))
    assert torch.equal(model(torch.arange(8)[None]).logits, before)
    by_name = {task["task"]: task for task in found["tasks"]}
    assert by_name.keys() == {"sums", "written_sums"}
    assert {task["n_shot"] for task in by_name.values()} == {1}
    assert 0 < by_name["written_sums"]["tokens_per_answer"] <= 8  # of 5, written and read again
    assert by_name["sums"]["tokens_per_answer"] is None


@with_lm_eval
def test_families_that_need_bos_get_it(task_folder, tokenizer):
    found = run_tasks(make_model("gemma"), tokenizer, [str(task_folder / "sums.yaml")])
    assert found["bos"] == "start"


@with_lm_eval
def test_unknown_tasks_and_files(task_folder, tokenizer, tmp_path):
    (tmp_path / "empty").mkdir()
    (task_folder / "sums.yaml").write_text("task: [")
    for name, message in (
        (f"{tmp_path}/none.yaml", "no such file"),
        (f"{tmp_path}/empty/", "no YAML file in this folder is a task"),
        (f"{task_folder}/sums.yaml", "lm-eval cannot run this"),
    ):
        with pytest.raises(LlmqError, match=message):
            run_tasks(make_model(), tokenizer, [name])


@with_lm_eval
@pytest.mark.slow
def test_a_name_that_lm_eval_does_not_know(tokenizer):
    with pytest.raises(LlmqError, match=r"knows no such task \(did you mean hellaswag"):
        run_tasks(make_model(), tokenizer, ["hellaswagg"])


@with_lm_eval
@pytest.mark.parametrize("length", [16, 24, 64])
def test_protocol_words_scores_documents_as_lm_eval_does(tokenizer, length):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = make_model()
    texts = ["\n".join(f"row {i}: {i * k % 13}" for i in range(20)) for k in (3, 7)] + ["short"]
    harness = HFLM(pretrained=model, tokenizer=tokenizer, max_length=length)
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]
    expected = harness.loglikelihood_rolling(requests, disable_tqdm=True)
    found = llmq.perplexity(
        model, texts, tokenizer=tokenizer, protocol="words", sequence_length=length
    )
    assert -found.nll == pytest.approx(sum(expected), rel=1e-5)


@with_lm_eval
def test_protocol_words_detokenises_and_counts_as_lm_eval_does():
    import lm_eval

    path = Path(lm_eval.__file__).parent / "tasks" / "wikitext" / "preprocess_wikitext.py"
    spec = importlib.util.spec_from_file_location("preprocess_wikitext", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    pieces = ["a", "N", "1", "=", "@-@", "@,@", "@.@", *"()[]{}\"':;.!?,", "'s", "°", "s '", "\n"]
    generator = random.Random(0)
    for _ in range(500):
        words = generator.choices(pieces, k=40)
        text = "".join(word + generator.choice([" ", "", "  ", "\n"]) for word in words)
        assert as_written(text) == module.wikitext_detokenizer({"page": text})
        counted = module.process_results({"page": text}, (0.0,))
        assert counted["word_perplexity"] == (0.0, n_words(text))


def test_without_lm_eval_the_extra_is_named(monkeypatch, tokenizer):
    monkeypatch.setattr(tasks, "find_spec", lambda name: None)
    with pytest.raises(LlmqError, match=r"not installed; pip install '\.\[eval\]'"):
        run_tasks(make_model(), tokenizer, ["hellaswag"])


@pytest.mark.parametrize(
    ("name", "expected"),
    [("hellaswag", False), ("mmlu_pro", False), ("a.yaml", True), ("./tasks", True), ("t/", True)],
)
def test_names_and_files_are_told_apart(name, expected):
    assert is_local(name) == expected


def test_what_lm_eval_finds_is_told_by_task(tokenizer):
    found = {
        "results": {
            "sums": {"alias": "sums", "acc,none": 0.5, "acc_stderr,none": 0.1, "sample_len": 4},
            "said": {"f1,strict": 0.25, "f1_stderr,strict": "N/A", "f1,loose": 0.5},
            "group": {"alias": "group", "acc,none": 0.5, "acc_stderr,none": 0.05},
        },
        "versions": {"sums": 1.0, "said": 2.0},
        "n-shot": {"sums": 0, "said": 5},
        "n-samples": {"sums": {"original": 9, "effective": 4}},
        "higher_is_better": {"sums": {"acc": True}, "said": {"f1": None}},
        "configs": {"said": {"output_type": "generate_until"}},
        "samples": {
            "said": [  # one answer, seen through two filters, and another
                {"doc_id": 0, "resps": [["a b"]]},
                {"doc_id": 0, "resps": [["a b"]]},
                {"doc_id": 1, "resps": [["a b c d"]]},
            ]
        },
    }
    sums, said, group = summarized(found, tokenizer)
    score = {"metric": "acc", "filter": "none", "value": 0.5, "stderr": 0.1}
    assert sums["scores"] == [{**score, "higher_is_better": True}]
    assert (sums["questions"], sums["questions_of_task"], sums["tokens_per_answer"]) == (4, 9, None)
    assert [(each["filter"], each["value"]) for each in said["scores"]] == [
        ("strict", 0.25),
        ("loose", 0.5),
    ]
    assert [each["stderr"] for each in said["scores"]] == [None, None]
    lengths = [len(tokenizer(text)["input_ids"]) for text in ("a b", "a b c d")]
    assert said["tokens_per_answer"] == sum(lengths) / 2
    assert (group["n_shot"], group["questions"], group["version"]) == (None, None, None)
