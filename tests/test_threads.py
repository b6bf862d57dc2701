"""Threads that load, multiply and generate at once get what one alone gets, bit for bit."""

import copy
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import make_model

import llmq
from llmq.grid.spec import QuantSpec
from llmq.grid.tensor import QuantizedTensor
from llmq.inference.decoding import generate, prepare_decoding
from llmq.inference.fuse import SharedProduct
from llmq.inference.module import quantized_modules, swap
from llmq.inference.step import step_of
from llmq_kernels.compiled import decoding

THREADS = 8
SECONDS = 60
# Prompts and lengths of their own, so that whatever one takes of another shows.
PROMPTS = [torch.arange(3 + i, 20 + 5 * i)[None] for i in range(THREADS)]
NEW = [6 + i for i in range(THREADS)]


@pytest.fixture(autouse=True)
def _restless():
    """Have Python change threads as often as it can: what is rare on an idle machine shows."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def at_once(function, *columns):
    """`[function(*row) for row in zip(*columns)]`, a thread each, all let go together."""
    barrier = threading.Barrier(len(columns[0]))

    def run(*row):
        barrier.wait()
        return function(*row)

    with ThreadPoolExecutor(len(columns[0])) as pool:
        return list(pool.map(run, *columns))


def quantized_model(family="llama", compute="int8", **overrides):
    """Wide enough for recorded steps where the kernels run."""
    settings = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "dtype": torch.bfloat16,
    }
    model = make_model(family, **settings, **overrides)
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings()
    ]
    weights = {name: model.get_submodule(name).weight.detach().float() for name in names}
    spec = QuantSpec("int4", 128)
    swap(model, {name: QuantizedTensor.quantize(weights[name], spec) for name in names})
    if decoding.missing() is None:
        for module in quantized_modules(model).values():
            module.set_compute(compute)
    return model


def text(model, prompt, n_new):
    return generate(model, prompt, n_new, do_sample=False, eos_token_id=None, pad_token_id=0)


def logits(model, prompt):
    with torch.no_grad():
        return model(prompt).logits


def equal(ours, theirs):
    return all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def rounds(seconds):
    """Twice, or for so many seconds."""
    end = time.monotonic() + seconds
    yield 0
    yield 1
    while time.monotonic() < end:
        yield 2


LASTING = pytest.mark.parametrize(
    "seconds", [0, pytest.param(SECONDS, marks=pytest.mark.slow)], ids=["short", "lasting"]
)


@LASTING
@pytest.mark.parametrize("compute", ["int8", "exact"])
def test_threads_generate_with_one_prepared_model(compute, seconds):
    expected = [text(prepare_decoding(quantized_model(compute=compute)), PROMPTS[0], NEW[0])]
    model = prepare_decoding(quantized_model(compute=compute))
    step = step_of(model)
    first = at_once(lambda i: text(model, PROMPTS[0], NEW[0]), range(THREADS))
    assert equal(first, expected * THREADS), "the weights were laid out by all of them at once"
    expected = [text(model, *row) for row in zip(PROMPTS, NEW, strict=True)]
    before = step.replayed
    n_rounds = 0
    for _ in rounds(seconds):
        assert equal(at_once(lambda *row: text(model, *row), PROMPTS, NEW), expected)
        n_rounds += 1
    if step.reason is None:
        each = sum(n_new - 2 for n_new in NEW)  # the prompt gives the first, the model the second
        assert step.replayed - before == n_rounds * each
    products = [module for module in model.modules() if isinstance(module, SharedProduct)]
    assert products
    assert not any(product._waiting for product in products), "nothing is left behind"


@LASTING
def test_the_first_pass_through_a_model_and_all_others(seconds):
    expected = [logits(quantized_model(), prompt) for prompt in PROMPTS]
    for _ in rounds(seconds):
        model = quantized_model()
        for _ in range(2):
            assert equal(at_once(logits, [model] * THREADS, PROMPTS), expected)


def test_dtypes_and_saving_take_turns():
    model = quantized_model()
    layer = next(iter(quantized_modules(model).values()))
    inputs = [torch.randn(3, layer.in_features, dtype=torch.bfloat16) for _ in range(THREADS)]
    inputs = [x.float() if i % 2 else x for i, x in enumerate(inputs)]
    expected = [layer(x) for x in inputs]
    packed = layer.state_dict()["packed"].clone()

    def use(x):
        kept = [layer.state_dict()["packed"].clone() for _ in range(3)]
        return [layer(x) for _ in range(6)], kept

    for (outputs, kept), right in zip(at_once(use, inputs), expected, strict=True):
        assert equal(outputs, [right] * 6)
        assert equal(kept, [packed] * 3)


def test_a_model_is_prepared_once_while_others_use_it():
    model = prepare_decoding(quantized_model())
    expected = [text(model, *row) for row in zip(PROMPTS, NEW, strict=True)]
    ours = at_once(lambda *row: text(prepare_decoding(model), *row), PROMPTS, NEW)
    assert equal(ours, expected)


def test_frequencies_that_change_with_the_length():
    """Of a text shorter than the model was trained for and of longer ones."""
    scaling = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 16,
        "long_factor": [3.0 + i for i in range(16)],
    }
    sizes = {"original_max_position_embeddings": 32, "max_position_embeddings": 128}
    model = make_model("phi3", rope_parameters=scaling, **sizes)
    rotary = prepare_decoding(model).model.rotary_emb
    x, lengths = torch.zeros(1), [19 if i % 2 else 60 for i in range(THREADS)]
    places = [torch.arange(length)[None] for length in lengths]
    expected = [rotary(x, place)[0] for place in places]
    assert not torch.equal(expected[0][:, :19], expected[1])

    def turn(place):
        return [rotary(x, place)[0] for _ in range(150)]

    for cosines, right in zip(at_once(turn, places), expected, strict=True):
        assert equal(cosines, [right] * 150)


def test_a_copy_of_a_model_that_generated_makes_its_own_recordings():
    model = prepare_decoding(quantized_model())
    expected = text(model, PROMPTS[0], NEW[0])
    twin = copy.deepcopy(model)
    before = step_of(twin).replayed
    assert torch.equal(text(twin, PROMPTS[0], NEW[0]), expected)
    assert step_of(twin)._decoder is twin.base_model
    if step_of(model).reason is None:
        assert step_of(twin).replayed > before


@LASTING
def test_models_are_loaded_while_others_generate(seconds, tmp_path):
    """Loading changes the default dtype of the whole process, which nothing may allocate by."""
    llmq.save(quantized_model(), tmp_path / "quantized")
    model = prepare_decoding(quantized_model())
    expected = [text(model, *row) for row in zip(PROMPTS, NEW, strict=True)]
    stored = llmq.load("tiny").state_dict()
    dtype = torch.get_default_dtype()

    def work(i):
        if i % 2:
            return text(model, PROMPTS[i], NEW[i])
        if i % 4:
            return text(prepare_decoding(llmq.load(tmp_path / "quantized")), PROMPTS[i], NEW[i])
        return llmq.load("tiny").state_dict()

    for _ in rounds(seconds):
        for i, result in enumerate(at_once(work, range(THREADS))):
            if isinstance(result, dict):
                assert result.keys() == stored.keys()
                assert equal(result.values(), stored.values())
            else:
                assert torch.equal(result, expected[i])
        assert torch.get_default_dtype() == dtype


FIRST_TOUCH = """
import sys, threading
import llmq
barrier, results, errors = threading.Barrier(8), [], []
def run(i):
    try:
        barrier.wait()
        getattr(llmq, ["load", "QuantizedTensor", "Recipe", "load", "save", "QuantSpec"][i % 6])
        results.append(llmq.load("tiny").state_dict())
    except BaseException as error:
        errors.append(repr(error))
threads = [threading.Thread(target=run, args=(i,)) for i in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
import torch
results.append(llmq.load("tiny").state_dict())
first = results[0]
same = all(r.keys() == first.keys() for r in results)
same = same and all(torch.equal(r[k], first[k]) for r in results for k in r)
print(len(results), same, errors, torch.get_default_dtype())
"""


def test_first_touch_by_eight_threads():
    """In an interpreter that has imported nothing: whoever comes first, all load, and the process
    can go on loading."""
    done = subprocess.run(
        [sys.executable, "-c", FIRST_TOUCH],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "TRANSFORMERS_VERBOSITY": "error"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().splitlines()[-1] == "9 True [] torch.float32"
