"""The GPU layouts are permutations of the canonical codes and go back without loss; choices of
tiles are kept, found again and fit their chips."""

import json
from dataclasses import replace

import pytest
import torch
from packed_weights import make_weight

from llmq_kernels import unpack
from llmq_kernels.core import errors
from llmq_kernels.core.packing import packed_width
from llmq_kernels.triton import choices, layout, tuning
from llmq_kernels.triton.choices import CHIPS, Choice, Problem


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("n", "k"), [(5, 128), (3, 77), (7, 320)])
@pytest.mark.parametrize("code", ["ternary", "int2", "int3", "int4", "int8"])
def test_there_and_back(code, n, k, act_order):
    weight = make_weight(code, 32, n, k, act_order=act_order)
    words = layout.pack_units(weight)
    assert words.shape == (n, packed_width(layout.padded_columns(k), weight.code.bits))
    assert torch.equal(layout.unpack_units(weight, words), weight.packed)
    if weight.code.bits != 3:
        assert torch.equal(layout.unpack_bytes(weight, layout.pack_bytes(weight)), weight.packed)


def test_nothing_grows_where_k_is_a_multiple_of_128():
    for code in ("ternary", "int3", "int4", "int8"):
        weight = make_weight(code, 128, 6, 384)
        assert layout.pack_units(weight).nbytes == weight.packed.nbytes


def test_units_hold_what_a_tensor_core_thread_holds():
    """Unit j of a block of 32 holds columns {2j, 2j + 1, 2j + 8, 2j + 9} of both halves; codes half
    a unit apart are neighbours in memory of x."""
    weight = make_weight("int4", 128, 4, 128)
    codes, words = unpack(weight.packed, 4, 128).int(), layout.pack_units(weight)
    for block in range(4):
        for unit in range(4):
            word = words[:, block * 4 + unit]
            for pair in range(4):
                column = block * 32 + pair // 2 * 16 + pair % 2 * 8 + unit * 2
                assert torch.equal((word >> (4 * pair)) & 15, codes[:, column])
                assert torch.equal((word >> (4 * pair + 16)) & 15, codes[:, column + 1])


def test_bytes_hold_every_sixteenth_column():
    weight = make_weight("ternary", 128, 4, 128)
    stored = layout.pack_bytes(weight).view(torch.uint8).int()
    codes = unpack(weight.packed, 2, 128).int()
    for byte in range(32):
        for field in range(4):
            assert torch.equal(
                ((stored[:, byte] >> (2 * field)) + 1) & 3,  # stored less the offset of 1
                codes[:, byte // 16 * 64 + 16 * field + byte % 16],
            )


def test_uneven_act_order_groups_are_refused():
    weight = make_weight("int4", 32, 4, 64, act_order=True)
    assert layout.act_order_refusal(weight) is None
    weight.g_idx[weight.g_idx == 0] = 1
    assert "0 to 64 columns" in layout.act_order_refusal(weight)


def problems():
    for kind, bits, group in (
        ("float", 4, 128),
        ("float", 2, 32),
        ("float", 3, 0),
        ("float", 8, 64),
        ("int8", 2, 64),
        ("int8", 4, 0),
        ("int8", 8, 0),
    ):
        for n, k in ((4096, 4096), (28672, 4096), (4096, 14336), (96, 128)):
            for m in (1, 2, 8, 64, 256, 4096):
                yield Problem(kind, bits, group, "bfloat16", n, k, m)


@pytest.mark.parametrize("arch", CHIPS)
def test_choices_fit_their_chip(arch):
    chip = CHIPS[arch]
    for problem in problems():
        every = list(choices.candidates(problem, chip))
        assert every[0] == choices.default_choice(problem, chip)
        assert len(every) == len(set(every)) <= 144
        for choice in every:
            assert choices.fits(problem, choice, chip)
            assert problem.group % choice.block_k == 0 or choice.method != "gemm"


def test_rows_of_x_are_rounded_up():
    assert [choices.bucket(m) for m in (1, 2, 3, 5, 64, 65, 100000)] == [1, 2, 4, 8, 64, 128, 4096]


def forget():
    """Have the next lookup read the files again, as a new process does."""
    tuning._tuned.clear()
    tuning._chosen.clear()


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMQ_CACHE_DIR", str(tmp_path))
    forget()
    yield choices.Chip("sm_90", 132, 227 << 10, "Some GPU 3000")
    forget()


def test_the_fastest_candidate_is_kept_on_disk(gpu):
    problem = Problem("float", 4, 128, "bfloat16", 4096, 4096, 16)
    every = list(choices.candidates(problem, gpu))
    seconds = dict.fromkeys(every[:-1], 2.0) | {every[-1]: 1.0}
    assert tuning.keep(problem, gpu, seconds) == every[-1] == tuning.choose(problem, gpu)
    path = tuning.tuned_dir() / f"{tuning.slug(gpu.name)}.json"
    assert path.name == "some_gpu_3000.json"
    tuning.save(gpu, path, {"torch": "x"})
    forget()
    assert tuning.choose(problem, gpu) == every[-1]
    content = json.loads(path.read_text())
    assert content["gpu"] == gpu.name
    assert content["triton"]


def test_what_was_not_measured_takes_the_choice_of_the_nearest(gpu):
    measured = Problem("float", 4, 128, "bfloat16", 8192, 4096, 16)
    choice = Choice("gemm", 16, 128, 128, 2, 4, 6)
    tuning.keep(measured, gpu, {choice: 1.0})
    for problem, split_k in (
        (replace(measured, dtype="float16"), 2),
        (replace(measured, n=4096), 4),  # as many programs
        (replace(measured, n=1024, k=1024), 2),  # four tiles for each
        (replace(measured, m=8), 2),
        (replace(measured, k=14336), 2),
    ):
        assert tuning.choose(problem, gpu) == replace(choice, split_k=split_k)
    far = replace(measured, m=256)
    other = replace(measured, bits=2)
    for problem in (far, other):
        assert tuning.choose(problem, gpu) == choices.default_choice(problem, gpu)


WRONG = {
    "a step that crosses groups": Choice("gemm", 16, 64, 256),
    "too few columns for tensor cores": Choice("gemm", 8, 64, 128),
    "too much shared memory": Choice("gemm", 256, 256, 128, stages=8),
    "a row per thread for many rows": Choice("gemv", 4, 8, 1024),
}


@pytest.mark.parametrize("choice", WRONG.values(), ids=WRONG)
def test_a_choice_that_cannot_be_right_is_not_taken(gpu, choice):
    problem = Problem("float", 4, 128, "bfloat16", 4096, 4096, 16)
    tuning.keep(problem, gpu, {choice: 1.0})
    assert tuning.choose(problem, gpu) == choices.default_choice(problem, gpu)


def test_another_version_of_triton_is_named(gpu):
    path = tuning.tuned_dir() / "some_gpu_3000.json"
    tuning.save(gpu, path, {"triton": "2.1.0"})
    forget()
    errors._told.clear()
    with pytest.warns(errors.KernelWarning, match=r"measured with Triton 2\.1\.0"):
        tuning.tuned(gpu)


DAMAGED = {
    "an unknown field": '{"choices": {"a": {"method": "gemm", "block_q": 3}}}',
    "an unknown method": '{"choices": {"a": {"method": "guess"}}}',
    "a size that is none": '{"choices": {"a": {"method": "gemm", "block_n": 48}}}',
    "a size that is no integer": '{"choices": {"a": {"method": "gemm", "warps": 4.0}}}',
    "no object": "[]",
    "cut off": '{"choices": {"a"',
    "empty": "",
    "deep": "[" * 200_000,
    "no text": "\udcff\udcfe",
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_named_and_ignored(gpu, content):
    path = tuning.tuned_dir() / "some_gpu_3000.json"
    path.parent.mkdir()
    path.write_text(content, errors="surrogateescape")
    problem = Problem("float", 4, 128, "bfloat16", 64, 64, 1)
    errors._told.clear()
    with pytest.warns(errors.KernelWarning, match=r"some_gpu_3000\.json is not a file of tuned"):
        assert tuning.choose(problem, gpu) == choices.default_choice(problem, gpu)


def test_a_file_that_others_can_write_is_named_and_ignored(gpu):
    path, problem = (
        tuning.tuned_dir() / "some_gpu_3000.json",
        Problem("float", 4, 128, "bfloat16", 64, 64, 1),
    )
    path.parent.mkdir()
    path.write_text(json.dumps({"choices": {problem.key: {"method": "dequantize"}}}))
    assert tuning.choose(problem, gpu) == Choice("dequantize")
    path.chmod(0o666)
    forget()
    errors._told.clear()
    with pytest.warns(errors.KernelWarning, match=r"can be written by others \(mode 0666"):
        assert tuning.choose(problem, gpu) == choices.default_choice(problem, gpu)


def test_choice_is_one_line_of_json():
    assert Choice(**json.loads(json.dumps({"method": "gemm", "block_m": 32}))).block_m == 32
