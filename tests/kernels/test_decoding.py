"""The kernels between the products, against torch's operators with the same roundings."""

import subprocess
import sys

import pytest
import torch
from torch.nn.functional import silu

from llmq_kernels.compiled import decoding, jit
from llmq_kernels.compiled.recording import NotRecordable, Recording

FORMS = ["avx512vnni", "avx2"]


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    if not jit.supports(request.param):
        pytest.skip(jit.missing() or f"this CPU cannot run {request.param}")
    monkeypatch.setattr(decoding, "form", lambda: request.param)


def bf16(*shape):
    return (torch.randn(*shape) * 3).bfloat16()


def off_by_one_rounding(ours, theirs, share):
    """How sums in another order may show: at most `share` of the numbers differ, and those by one
    step of bfloat16."""
    differ = ours != theirs
    steps = (ours.view(torch.int16).int() - theirs.view(torch.int16).int()).abs()
    return float(differ.float().mean()) <= share and int(steps.max()) <= 1


def rms_norm(x, weight, eps):
    values = x.float()
    return weight * (values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


@pytest.mark.parametrize(("rows", "k"), [(1, 2048), (5, 64), (3, 16)])
@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_norm(form, rows, k, eps):
    x, weight = bf16(rows, k), bf16(k)
    assert off_by_one_rounding(decoding.norm(x, weight, eps), rms_norm(x, weight, eps), 0.01)


def test_norm_of_a_sum_keeps_the_sum(form):
    x, delta, weight = bf16(1, 2048), bf16(1, 2048), bf16(2048)
    expected = x + delta
    out = decoding.norm(x, weight, 1e-6, delta)
    assert torch.equal(x, expected)
    assert off_by_one_rounding(out, rms_norm(expected, weight, 1e-6), 0.01)


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
def test_rotation_and_cache(form, head_dim):
    query, key, value = bf16(4 * head_dim), bf16(2 * head_dim), bf16(2 * head_dim)
    angles = torch.rand(head_dim // 2).repeat(2) * 6
    cosine, sine = angles.cos().bfloat16(), angles.sin().bfloat16()
    keys, values = (torch.zeros(1, 2, 9, head_dim, dtype=torch.bfloat16) for _ in range(2))

    def rotated(x):
        heads = x.view(-1, head_dim)
        low, high = heads.chunk(2, -1)
        return heads * cosine + torch.cat((-high, low), -1) * sine

    expected = rotated(query), rotated(key), value.view(2, head_dim)
    decoding.rotate_and_store(query, key, value, cosine, sine, keys, values, torch.tensor(6))
    assert torch.equal(query.view(4, head_dim), expected[0])
    assert torch.equal(keys[0, :, 5], expected[1])
    assert torch.equal(values[0, :, 5], expected[2])
    assert not keys[0, :, [0, 1, 2, 3, 4, 6, 7, 8]].any(), "other tokens"
    assert not values[0, :, [0, 1, 2, 3, 4, 6, 7, 8]].any()


def test_gate(form):
    gate = torch.cat(
        [
            torch.linspace(-100, 100, 4080),
            torch.tensor([0.0, -0.0, 1e-30, -1e-30, 3e38, -3e38] + [1.0] * 10),
        ]
    ).bfloat16()
    up = bf16(len(gate))
    ours, theirs = decoding.gate(gate, up), silu(gate) * up
    tiny = theirs.abs() < 1e-30  # where torch's exponential is a denormal number
    assert ours[tiny].abs().max() < 1e-30
    assert off_by_one_rounding(ours[~tiny], theirs[~tiny], 0.01)


def test_bias(form):
    for x, bias in (
        (bf16(1, 48), bf16(48)),
        (bf16(3, 48), bf16(48)),
        (bf16(1, 7), bf16(7)),
        (torch.randn(1, 48), torch.randn(48)),
    ):  # the first by the kernel, the others by torch
        expected = x + bias
        decoding.add_bias(x, bias)
        assert torch.equal(x, expected)


def test_attention_sees_as_many_tokens_as_it_is_told_when_it_runs(form):
    query, n_tokens = bf16(1, 4, 1, 64), torch.tensor(5)
    keys, values = bf16(1, 2, 40, 64), bf16(1, 2, 40, 64)
    with Recording() as recording:
        out = decoding.attention(query, keys, values, 0.1, n_tokens)
    assert len(recording) == 1
    for n in (5, 1, 33, 40):
        n_tokens.fill_(n)
        recording.replay()
        assert torch.equal(out, decoding.attention(query, keys[:, :, :n], values[:, :, :n], 0.1))


def test_recordings_repeat_and_refuse(form):
    x, weight = bf16(1, 64), bf16(64)
    with Recording() as recording:
        out = decoding.norm(x.view(1, 64), weight, 1e-6)
    for _ in range(2):
        x.copy_(bf16(1, 64))
        recording.replay()
        assert torch.equal(out, decoding.norm(x, weight, 1e-6))
    with pytest.raises(NotRecordable, match="mul"), Recording():
        x * 2
    with pytest.raises(NotRecordable, match="not bfloat16"):
        decoding.norm(x.float(), weight, 1e-6)
    assert torch.equal(decoding.norm(x, weight, 1e-6), out), "after a refusal kernels run again"


def test_nothing_of_it_needs_llvmlite_to_be_imported():
    program = (
        "import sys; sys.modules['llvmlite'] = None; "
        "import llmq.inference.decoding, llmq_kernels.core.dispatch"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
