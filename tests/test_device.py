"""Everything that `--device` names runs on a device that is not the CPU: no tensor is left behind,
and results come back. On a pretended one, since few machines that run tests have a GPU."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import pretend_device
import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file

import llmq
from llmq.commands import jobs, plan
from llmq.commands.cli import main
from llmq.commands.parser import Parser
from llmq.errors import LlmqError
from llmq.evaluation.perplexity import evaluate
from llmq.grid.spec import ActSpec, QuantSpec
from llmq.inference.module import quantized_modules
from llmq.models.source import load_config, load_tokenizer, resolve
from llmq.ptq.job import Job, prepare
from llmq.ptq.run import quantize_folder
from llmq.recipe import Recipe
from llmq.text.documents import load_documents
from llmq.text.windows import cut_windows


@pytest.fixture(scope="module")
def elsewhere():
    """A process of its own, since a device cannot be unregistered: a function that calls functions
    there."""
    if reason := pretend_device.missing():
        pytest.skip(reason)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


def recipe_of(method: str, options: dict[str, object]) -> Recipe:
    return Recipe.uniform(
        QuantSpec("int4", 32), method=method, samples=6, sequence_length=32, **options
    )


def job_of(folder: Path, method: str, options: dict[str, object]) -> Job:
    fmt = "gptq" if options.get("order") == "act" else "auto"
    return prepare(str(folder), recipe_of(method, options), format=fmt)


def quantize_there(
    folder: Path, out: Path, method: str, options: dict[str, object]
) -> dict[str, object]:
    with pretend_device.pretend_device() as device:
        return quantize_folder(job_of(folder, method, options), out, device=device)


# Of the model: the pretended device takes no parameters of a module that is made there.
WITHOUT_GRADIENTS = {"token_weights": "equal", "scale_steps": 0}
CASES = [
    ("llama", "smoothquant+gptq", {"activations": ActSpec("int8-static")}),
    ("gemma2", "blockwise", {"iterations": 3, "autocast": False, **WITHOUT_GRADIENTS}),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in [
            ("llama", "gptq", {}),
            ("gemma2", "gptq", {}),
            ("falcon", "gptq", {"inputs": "full-precision"}),
            ("qwen3", "gptq", {"order": "act"}),
        ]
    ),
]


@pytest.mark.parametrize(
    ("family", "method", "options"), CASES, ids=lambda value: str(value).replace(" ", "")
)
def test_blocks_are_quantized_there_as_here(
    family, method, options, elsewhere, model_folder, tmp_path
):
    folder = model_folder(family)
    there_report = elsewhere(quantize_there, folder, tmp_path / "there", method, options)
    report = quantize_folder(job_of(folder, method, options), tmp_path / "here")
    assert (there_report["device"], there_report["fallbacks"], report["fallbacks"]) == (
        pretend_device.NAME,
        [],
        [],
    )
    same = total = 0
    for file in sorted((tmp_path / "here").glob("*.safetensors")):
        here, there = load_file(file), load_file(tmp_path / "there" / file.name)
        assert here.keys() == there.keys()
        assert all(
            here[name].shape == there[name].shape and here[name].dtype == there[name].dtype
            for name in here
        )
        same += sum(torch.equal(here[name], there[name]) for name in here)
        total += len(here)
    if family in ("gemma2", "falcon"):
        assert same == total, "the same operators in the same order"
    else:  # another attention kernel, whose last bits decide a code now and then
        assert same > total // 3
        errors = [[layer["error"] for layer in each["layers"]] for each in (report, there_report)]
        assert errors[1] == pytest.approx(errors[0], rel=0.25)


def quantize_in_memory_there(split: bool) -> tuple[set[str], set[str], float]:
    """Devices of quantized and of kept tensors, and how far the logits are from those of the same
    model quantized on the CPU."""
    recipe = recipe_of("gptq", {})
    tokens = torch.randint(2, 2048, (6, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), pretend_device.pretend_device() as device:
        here, there = make_model(), make_model()
        (there.model.layers[0] if split else there).to(device)
        llmq.quantize(here, recipe, tokens)
        llmq.quantize(there, recipe, tokens)
        quantized = quantized_modules(there.model.layers[0])
        devices = {tensor.device.type for each in quantized.values() for tensor in each.buffers()}
        others = {tensor.device.type for tensor in there.model.layers[1].state_dict().values()}
        logits = there.to("cpu")(tokens).logits
        expected = here(tokens).logits
        return devices, others, float((logits - expected).norm() / expected.norm())


@pytest.mark.parametrize("split", [False, True])
def test_layers_of_a_model_in_memory_stay_on_their_device(split, elsewhere):
    """All of it there, or one block there and the rest here."""
    quantized, others, difference = elsewhere(quantize_in_memory_there, split)
    assert quantized == {pretend_device.NAME}
    assert others == {"cpu" if split else pretend_device.NAME}
    # The same sums where all was computed here; there another attention kernel decides some codes.
    assert difference == 0 if split else difference < 0.2


def test_a_model_without_data_in_memory_is_refused():
    model = llmq.load("tiny", dtype="float32")
    model.model.layers[0].mlp.to("meta")
    with pytest.raises(LlmqError, match=r"layers\.0\.mlp\..* has no data in memory"):
        llmq.quantize(model, recipe_of("rtn", {}))


def perplexity_there(max_windows: int) -> tuple[str, float]:
    with pretend_device.pretend_device() as device:
        model = llmq.load("tiny", dtype="float32", device=device)
        return model.device.type, evaluate(model, windows(max_windows)).value


def windows(n):
    model_dir = resolve("tiny")
    text = cut_windows(
        load_documents("bundled", "eval"), load_tokenizer(model_dir), load_config(model_dir), 128
    )
    return replace(text, tokens=text.tokens[:n])


def test_perplexity(elsewhere):
    device, there = elsewhere(perplexity_there, 3)
    assert device == pretend_device.NAME
    assert there == pytest.approx(
        evaluate(llmq.load("tiny", dtype="float32"), windows(3)).value, rel=1e-6
    )


def test_a_limit_of_gpu_memory():
    """Checked before anything touches the device."""
    args = Parser()
    plan.add_arguments(args)
    with pytest.raises(LlmqError, match="--max-gpu-memory 1e-06: the run is planned to need"):
        jobs.prepare_job(
            args.parse_args(
                [
                    "tiny",
                    "--device",
                    "cuda",
                    "--max-gpu-memory",
                    "0.000001",
                    "--samples",
                    "2",
                    "--sequence-length",
                    "32",
                ]
            )
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", ["rtn", "gptq", "blockwise"])
def test_quantized_on_a_gpu(method, model_folder, calibration_file, tmp_path):
    """The same model as on the CPU, up to codes that the last bit of another product decides."""
    recipe = Recipe.uniform("w4g32", method=method, samples=8, sequence_length=32, iterations=20)
    folder = model_folder()
    reports = [
        quantize_folder(
            prepare(str(folder), recipe, calibration=str(calibration_file)),
            tmp_path / device,
            device=device,
        )
        for device in ("cpu", "cuda")
    ]
    errors = [[layer["error"] for layer in report["layers"]] for report in reports]
    assert errors[1] == (pytest.approx(errors[0], rel=0.25) if method != "rtn" else errors[0])
    logits = [
        llmq.load(tmp_path / device, dtype="float32")(torch.arange(2, 20)[None]).logits
        for device in ("cpu", "cuda")
    ]
    assert float((logits[1] - logits[0]).norm() / logits[0].norm()) < 0.2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_fine_tuned_on_a_gpu(precision, model_folder, calibration_file, tmp_path):
    shape = [
        "--sequence-length",
        "32",
        "--batch-size",
        "4",
        "--max-steps",
        "6",
        "--group-size",
        "32",
        "--init",
        "rtn",
        "--scheme",
        "w4a8",
    ]
    options = ["--train", str(calibration_file), "--device", "cuda", "--precision", precision]
    assert main(["qat", str(model_folder()), str(tmp_path / "out"), *shape, *options]) == 0
    assert torch.isfinite(
        llmq.load(tmp_path / "out", dtype="float32")(torch.arange(2, 20)[None]).logits
    ).all()
