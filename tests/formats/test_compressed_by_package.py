"""What the compressed-tensors package compresses is read with the values that it decompresses, and
what llmq writes is decompressed with the values that llmq has."""

import pytest
import torch

from llmq.formats.compressed import COMPRESSED
from llmq.formats.compressed_settings import layout_of
from llmq.grid.spec import ActSpec, QuantSpec
from llmq.grid.tensor import QuantizedTensor

pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")

from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme

N, K = 128, 256
PRESETS = {
    "W4A16": "pack-quantized",
    "W3A16": "pack-quantized",
    "W4A16_ASYM": "pack-quantized",
    "W8A8": "int-quantized",
    "W4A8": "int-quantized",
    "FP8": "float-quantized",
    "FP8_DYNAMIC": "float-quantized",
    "FP8_BLOCK": "float-quantized",
    "NVFP4A16": "nvfp4-pack-quantized",
    "MXFP4A16": "mxfp4-pack-quantized",
    "MXFP8A16": "mxfp8-quantized",
}


def largest(weight: torch.Tensor, args) -> torch.Tensor:
    """The largest magnitude under each scale."""
    if args.strategy == "tensor":
        return weight.abs().amax().view(1)
    rows, columns = args.block_structure or (1, args.group_size or K)
    return weight.abs().view(N // rows, rows, K // columns, columns).amax((1, 3))


def compressed(scheme: QuantizationScheme, layout: str) -> dict[str, torch.Tensor]:
    """A random weight in a layout, by the package."""
    weight, args = torch.randn(N, K, dtype=torch.bfloat16), scheme.weights
    top = largest(weight, args)
    if args.type == "int":
        scale = top / (2 ** (args.num_bits - 1) - 0.5)
    else:
        scale = top / (448 if args.num_bits == 8 else 6)
    state = {"weight": weight, "weight_scale": scale}
    if not args.symmetric:
        state["weight_zero_point"] = torch.randint(-8, 8, scale.shape, dtype=torch.int8)
    if layout.startswith("nvfp4"):
        state["weight_global_scale"] = (448 * 6 / weight.abs().amax()).float().view(1)
        state["weight_scale"] = (
            (scale * state["weight_global_scale"]).to(torch.float8_e4m3fn).float()
        )
    if layout.startswith("mx"):
        state["weight_scale"] = torch.exp2(torch.log2(scale.float()).ceil()).bfloat16()
    return BaseCompressor.get_value_from_registry(layout).compress(state, scheme)


@pytest.mark.parametrize("preset", PRESETS)
def test_values_are_those_of_the_package(preset):
    layout, scheme = PRESETS[preset], preset_name_to_scheme(preset, ["Linear"])
    stored = compressed(scheme, layout)
    expected = BaseCompressor.get_value_from_registry(layout).decompress(stored, scheme)["weight"]
    settings = {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": scheme.model_dump(mode="json")},
    }
    config = COMPRESSED.read_config(settings)
    found = COMPRESSED.dense("layer", stored, config, (N, K))
    if found is None:
        qtensor = COMPRESSED.read("layer", stored, config, (N, K))
        qtensor.validate("layer")
        found = qtensor.dequantize()
    assert torch.equal(found.to(expected.dtype), expected)


@pytest.mark.parametrize("kind", ["none", "int8-token"])
@pytest.mark.parametrize("text", ["w2g32", "w3g64-asym", "w4g128", "w4-asym", "w5", "w8", "w8g32"])
def test_the_package_decompresses_what_is_written(text, kind):
    spec, fmt = QuantSpec.parse(text), COMPRESSED.given(ActSpec(kind))
    tensor = QuantizedTensor.quantize(torch.randn(N, K), spec)
    (group,) = fmt.write_config({"layer": spec})["config_groups"].values()
    stored = {**fmt.write(tensor), "weight_scale": tensor.scale.float()}
    compressor = BaseCompressor.get_value_from_registry(layout_of(spec, ActSpec(kind)))
    found = compressor.decompress(stored, QuantizationScheme.model_validate(group))["weight"]
    assert torch.equal(found, tensor.dequantize())
