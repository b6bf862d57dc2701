"""FP8, MXFP8, MXFP4 and NVFP4 against their definitions, number by number."""

import pytest
import torch

from llmq.errors import LlmqError
from llmq.formats.compressed_floats import decode
from llmq.formats.compressed_settings import WeightArgs

N, K = 6, 64


def e4m3(byte: int) -> float:
    """A sign, four bits of exponent (bias 7) and three of mantissa (OCP 8-bit floats)."""
    sign, exponent, mantissa = byte >> 7, byte >> 3 & 15, byte & 7
    size = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -size if sign else size


def e2m1(nibble: int) -> float:
    """A sign, two bits of exponent (bias 1) and one of mantissa (OCP microscaling formats)."""
    sign, exponent, mantissa = nibble >> 3, nibble >> 1 & 3, nibble & 1
    size = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    return -size if sign else size


def fp8_bytes(*shape: int) -> torch.Tensor:
    """Bytes that are numbers."""
    found = torch.randint(0, 256, shape, dtype=torch.uint8)
    return torch.where(found & 127 == 127, found - 1, found)


def fp4(args: WeightArgs):
    packed = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8)
    values = [[e2m1(byte >> shift & 15) for byte in row for shift in (0, 4)] for row in packed]
    return {"weight_packed": packed}, torch.tensor(values)


def fp8(args: WeightArgs):
    stored = fp8_bytes(N, K)
    values = torch.tensor([[e4m3(int(byte)) for byte in row] for row in stored])
    return {"weight": stored.view(torch.float8_e4m3fn)}, values


def exponents(group_size: int):
    stored = torch.randint(110, 135, (N, K // group_size), dtype=torch.uint8)
    return {"weight_scale": stored}, 2.0 ** (stored.float() - 127)


def reals(rows: int, columns: int):
    stored = torch.rand(rows, columns).bfloat16() + 0.1
    return {"weight_scale": stored}, stored.float()


def of_tensor():
    stored = torch.rand(1) + 0.1
    return {"weight_scale": stored}, stored.view(1, 1)


def of_nv():
    """What is stored is the scale times the global one."""
    local, whole = fp8_bytes(N, K // 16), torch.tensor([37.5])
    values = torch.tensor([[e4m3(int(byte)) for byte in row] for row in local])
    stored = {"weight_scale": local.view(torch.float8_e4m3fn), "weight_global_scale": whole}
    return stored, values / 37.5


CASES = {
    "FP8 per tensor": (WeightArgs("float", 8, True, 0), fp8, of_tensor),
    "FP8 per row": (WeightArgs("float", 8, True, -1), fp8, lambda: reals(N, 1)),
    "FP8 in blocks": (WeightArgs("float", 8, True, 0, (4, 48)), fp8, lambda: reals(2, 2)),
    "MXFP8": (WeightArgs("float", 8, True, 32), fp8, lambda: exponents(32)),
    "MXFP4": (WeightArgs("float", 4, True, 32), fp4, lambda: exponents(32)),
    "NVFP4": (WeightArgs("float", 4, True, 16), fp4, of_nv),
}


@pytest.mark.parametrize("case", CASES)
def test_definition(case):
    args, weights, scales = CASES[case]
    stored, values = weights(args)
    stored_scales, scale = scales()
    rows, columns = args.block or (1, K // scale.shape[1])
    scale = scale.repeat_interleave(rows if scale.shape[0] < N else 1, 0)
    if scale.shape[0] > 1:
        scale = scale[:N]
    scale = scale.repeat_interleave(columns, 1)[:, :K]
    found = decode("layer", stored | stored_scales, args, (N, K))
    assert torch.equal(found, values * scale)


@pytest.mark.parametrize("case", CASES)
def test_damage_is_named(case):
    args, weights, scales = CASES[case]
    stored = weights(args)[0] | scales()[0]
    for suffix in stored:
        others = {key: tensor for key, tensor in stored.items() if key != suffix}
        with pytest.raises(LlmqError, match=rf"layer.*{suffix} is missing"):
            decode("layer", others, args, (N, K))
        too_many = torch.cat([stored[suffix], stored[suffix]])
        with pytest.raises(LlmqError, match=rf"layer\.{suffix}"):
            decode("layer", {**others, suffix: too_many}, args, (N, K))
