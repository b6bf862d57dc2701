"""What transformers does with a model, done with one that was loaded from a folder of every format:
the outputs are those of a dequantized copy."""

import copy
import pickle
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from format_models import dequantized, quantized_folder
from transformers import AutoConfig, AutoModelForCausalLM, pipeline

import llmq
from llmq.errors import LlmqError
from llmq.formats.registry import NAMES
from llmq.formats.settings import quantization_settings
from llmq.models.compat import PACKAGES

TOKENS = torch.randint(2, 2048, (2, 16), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(TOKENS)
GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
PLACES = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "disk",
}


class Folder:
    """A folder of a format, with the models that tests read but do not change."""

    def __init__(self, path, name, tokenizer):
        self.path = quantized_folder(path, name, dtype=torch.float32)
        tokenizer.save_pretrained(self.path)
        self.tokenizer = tokenizer
        self.model = self.load()
        self.plain = dequantized(llmq.load(self.path))
        self.expected = logits(self.plain)

    def load(self, **options):
        """Through transformers' own loader, on llmq's kernels also where transformers has its own
        reader for the format."""
        config = AutoConfig.from_pretrained(self.path)
        config.quantization_config = quantization_settings(config)
        return AutoModelForCausalLM.from_pretrained(self.path, config=config, **options)


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits


@pytest.fixture(scope="module")
def folder(request, tmp_path_factory, tokenizer):
    return Folder(tmp_path_factory.mktemp("uses") / "model", request.param, tokenizer)


def is_as_expected(folder, model):
    """Whether logits are those of the dequantized copy, but for the order of additions."""
    return torch.allclose(logits(model), folder.expected, rtol=1e-4, atol=1e-4)


def generates_alike(folder, **options):
    settings = {"attention_mask": MASK, **GREEDY, **options}
    return torch.equal(
        folder.model.generate(TOKENS, **settings), folder.plain.generate(TOKENS, **settings)
    )


def loads(folder, tmp_path):
    assert is_as_expected(folder, folder.model)


def is_a_pipeline(folder, tmp_path):
    texts = [
        pipeline("text-generation", model=model, tokenizer=folder.tokenizer)("def f(", **GREEDY)
        for model in (folder.model, folder.plain)
    ]
    assert texts[0] == texts[1]


def goes_where_there_is_room(folder, tmp_path):
    assert is_as_expected(folder, folder.load(device_map="auto"))


def is_offloaded_and_saved(folder, tmp_path):
    model = folder.load(device_map=PLACES, offload_folder=tmp_path / "offloaded")
    assert model.lm_head.weight.is_meta
    for _ in range(2):
        assert is_as_expected(folder, model)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(llmq.load(tmp_path / "saved")), logits(folder.model))
    with pytest.raises(LlmqError, match="offloaded"):
        llmq.save(model, tmp_path / "again")
    with pytest.raises(LlmqError, match="offload_buffers"):
        folder.load(device_map=PLACES, offload_folder=tmp_path / "buffers", offload_buffers=True)


def compiles(folder, tmp_path):
    torch._dynamo.reset()
    assert is_as_expected(folder, torch.compile(folder.load(), backend="eager"))


def is_copied_and_pickled_before_and_after_it_ran(folder, tmp_path):
    model = folder.load()
    first = pickle.dumps(model)
    logits(model)
    for again in (pickle.loads(first), pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(logits(again), logits(model))


def generates_with_a_static_cache(folder, tmp_path):
    assert generates_alike(folder, cache_implementation="static")


def generates_from_a_batch_with_left_padding(folder, tmp_path):
    mask = MASK.clone()
    mask[0, :5] = 0
    assert generates_alike(folder, attention_mask=mask)


def generates_with_beams(folder, tmp_path):
    assert generates_alike(folder, num_beams=3)


def assists_itself(folder, tmp_path):
    one = {"attention_mask": MASK[:1], **GREEDY}
    assisted = folder.model.generate(TOKENS[:1], assistant_model=folder.load(), **one)
    assert torch.equal(assisted, folder.plain.generate(TOKENS[:1], **one))


USES = (
    loads,
    is_a_pipeline,
    goes_where_there_is_room,
    is_offloaded_and_saved,
    compiles,
    is_copied_and_pickled_before_and_after_it_ran,
    generates_with_a_static_cache,
    generates_from_a_batch_with_left_padding,
    generates_with_beams,
    assists_itself,
)


@pytest.mark.parametrize(
    "folder",
    [name if name == "gptq" else pytest.param(name, marks=pytest.mark.slow) for name in NAMES],
    indirect=True,
)
@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
def test_a_model_of_every_format(folder, use, tmp_path):
    use(folder, tmp_path)


PLAIN = """
import sys, torch
import llmq
from transformers import AutoModelForCausalLM
torch.set_grad_enabled(False)
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder)
tokens = torch.arange(2, 30)[None]
assert torch.equal(model(tokens).logits, llmq.load(folder, dtype=model.dtype)(tokens).logits)
print(type(model.hf_quantizer).__name__)
"""
MAPPING = """
import llmq
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as mapping
print(*(mapping[method].__name__ for method in ("gptq", "awq", "compressed-tensors")))
"""


def run(program, *arguments, path=()):
    search = [*map(str, path), *sys.path]
    return subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:] = {search}\n{program}", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    "name",
    [
        name if name == "gptq" else pytest.param(name, marks=pytest.mark.slow)
        for name in NAMES
        if name in PACKAGES
    ],
)
def test_transformers_loads_a_folder_whose_own_package_is_not_installed(tmp_path, name):
    if find_spec(PACKAGES[name]):
        pytest.skip(f"{PACKAGES[name]} is installed, which loads {name} folders then")
    done = run(PLAIN, str(quantized_folder(tmp_path / "model", name)))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "LlmqQuantizer"


@pytest.mark.slow
def test_a_package_that_is_installed_keeps_its_folders(tmp_path):
    for package in ("gptqmodel", "compressed_tensors"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    done = run(MAPPING, path=[tmp_path])
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["GPTQConfig", "AwqConfig", "CompressedTensorsConfig"]
