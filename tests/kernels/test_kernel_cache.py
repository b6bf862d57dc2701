"""Compiled kernels on disk: nothing is executed that another user could have written or that is
damaged, and nothing of that stops a run."""

import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from packed_weights import make_weight

from llmq_kernels import PreparedWeight, select_backend
from llmq_kernels.compiled import jit, object_check
from llmq_kernels.core import cache, errors, execution, restricted
from llmq_kernels.core.cache import Unsafe, private_folder, read_private, seal, unseal

if _reason := jit.missing() or (None if jit.supports("avx2") else "this CPU has no AVX2"):
    pytest.skip(_reason, allow_module_level=True)
ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
KERNEL = ("avx2", "quantize", "quantize_kernel", (False,))
OTHER = ("avx2", "elementwise", "norm_kernel", (True,))
NOBODY = 65534
needs_root = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root gives files away"
)


@pytest.fixture(autouse=True)
def told(monkeypatch):
    """What was told once may be told again."""
    monkeypatch.setattr(errors, "_told", set())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A cache of its own; the folder of kernels in it."""
    monkeypatch.setenv("LLMQ_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kernels"


def entry(kernel=KERNEL):
    """The path of a kernel in the cache, after it was put there, and its code."""
    before = set((cache.cache_dir() / "kernels").glob("*"))
    code = jit._object_code(*kernel)
    (path,) = set((cache.cache_dir() / "kernels").glob("*")) - before
    return path, code


def silent(function, *arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return function(*arguments)


def test_machine_code_is_kept_sealed_and_found(folder, monkeypatch):
    path, code = entry()
    assert path.read_bytes().endswith(code)
    assert path.stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o777 == folder.parent.stat().st_mode & 0o777 == 0o700
    assert list(folder.iterdir()) == [path]
    monkeypatch.setattr(jit, "kernel_text", lambda *_: pytest.fail("compiled again"))
    monkeypatch.setattr(object_check, "refusal", lambda *_: pytest.fail("tried again"))
    assert silent(jit._object_code, *KERNEL) == code


def swap_names(path):
    other, _ = entry(OTHER)
    shutil.copy(other, path)


def link(path):
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


def flip(path, at=-100):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def replace_by_pipe(path):
    path.unlink()
    os.mkfifo(path)


FAULTS = {
    "flipped code": (flip, "damaged or not what its name says"),
    "flipped hash": (lambda path: flip(path, 20), "damaged"),
    "flipped mark": (lambda path: flip(path, 0), "damaged"),
    "cut off": (lambda path: os.truncate(path, path.stat().st_size // 2), "damaged"),
    "cut off within the hash": (lambda path: os.truncate(path, 20), "damaged"),
    "empty": (lambda path: os.truncate(path, 0), "damaged"),
    "longer": (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "damaged"),
    "an object without a seal": (lambda path: path.write_bytes(path.read_bytes()[46:]), "damaged"),
    "another kernel's": (swap_names, "not what its name says"),
    "a link": (link, "is a link"),
    "a pipe": (replace_by_pipe, "is not a file"),
    "sparse and huge": (lambda path: os.truncate(path, 1 << 40), "bytes, more than"),
    "writable by others": (lambda path: path.chmod(0o602), r"written by others \(mode 0602"),
    "writable by the group": (lambda path: path.chmod(0o620), r"written by others \(mode 0620"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_bad_entry_is_built_again(folder, name):
    damage, message = FAULTS[name]
    path, code = entry()
    damage(path)
    with pytest.warns(errors.KernelWarning, match=f"{path.name}.*{message}.*is compiled again"):
        assert jit._object_code(*KERNEL) == code
    assert silent(jit._object_code, *KERNEL) == code
    assert path.is_file()
    assert not path.is_symlink()


@needs_root
def test_an_entry_of_another_user_is_built_again(folder):
    path, code = entry()
    os.chown(path, NOBODY, NOBODY)
    with pytest.warns(errors.KernelWarning, match=f"belongs to user {NOBODY}.*compiled again"):
        assert jit._object_code(*KERNEL) == code
    assert path.stat().st_uid == os.geteuid()


def test_an_entry_that_cannot_be_replaced_costs_a_compilation(folder):
    path, code = entry()
    path.unlink()
    path.mkdir()
    with pytest.warns(errors.KernelWarning, match="is not a file") as told:
        assert jit._object_code(*KERNEL) == code
    assert "cannot be written" in str(told[-1].message)


def others_write(folder):
    folder.chmod(0o777)


def group_writes_above(folder):
    folder.parent.chmod(0o775)


def link_of_another(folder):
    folder.rename(folder.parent / "theirs")
    folder.symlink_to("theirs")
    os.lchown(folder, NOBODY, NOBODY)


def given_away(folder):
    os.chown(folder, NOBODY, NOBODY)


def parent_given_away(folder):
    os.chown(folder.parent, NOBODY, NOBODY)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (others_write, "mode 0777"),
        (group_writes_above, "mode 0775"),
        pytest.param(link_of_another, "belongs to user", marks=needs_root),
        pytest.param(given_away, "belongs to user", marks=needs_root),
        pytest.param(parent_given_away, "belongs to user", marks=needs_root),
    ],
)
def test_a_folder_that_others_could_write_is_not_used(folder, harm, message):
    path, code = entry()
    harm(folder)
    path.write_bytes(b"planted")
    path.with_suffix(".mark").write_bytes(b"")
    with pytest.warns(errors.KernelWarning, match=f"{message}.*every process compiles for itself"):
        assert jit._object_code(*KERNEL) == code
    assert path.read_bytes() == b"planted"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # told once
        jit._object_code(*KERNEL)


def test_a_sticky_folder_on_the_way_is_safe_but_not_as_the_last(tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    assert private_folder(shared / "mine", create=True) == shared / "mine"
    with pytest.raises(Unsafe, match="mode 1777"):
        private_folder(shared)


def test_links_of_the_users_own_on_the_way_are_followed(tmp_path):
    (tmp_path / "disk").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to("disk")
    (tmp_path / "round").symlink_to("round")
    assert (
        private_folder(tmp_path / "link" / "a" / "b", create=True) == tmp_path / "disk" / "a" / "b"
    )
    (tmp_path / "up").symlink_to("disk/a/../../disk")
    assert private_folder(tmp_path / "up") == tmp_path / "disk"
    with pytest.raises(Unsafe, match="more than 40 links"):
        private_folder(tmp_path / "round")


def test_a_cache_that_cannot_be_written_is_said_and_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLMQ_CACHE_DIR", str(tmp_path / "file"))
    with pytest.warns(errors.KernelWarning, match="is not a folder.*every process compiles"):
        assert len(jit._object_code(*KERNEL)) > 0


def test_a_seal_is_bound_to_its_key(tmp_path):
    path = tmp_path / "entry"
    path.write_bytes(seal(b"key", b"content"))
    path.chmod(0o600)
    assert unseal(path, b"key") == b"content"
    with pytest.raises(Unsafe):
        unseal(path, b"keyc")
    path.write_bytes(seal(b"keyc", b"ontent"))
    with pytest.raises(Unsafe):
        unseal(path, b"key")
    with pytest.raises(FileNotFoundError):
        read_private(tmp_path / "none")


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        cache.write_private(tmp_path / "entry", b"content")
    assert list(tmp_path.iterdir()) == []


PRODUCTS = """
import sys, torch
from llmq_kernels import CODES, PackedWeight, PreparedWeight, pack
codes = (torch.arange(64 * 128) % 16).to(torch.uint8).view(64, 128)
scale = torch.full((64, 1), 2.0 ** -7).half()
meaning = (CODES["int4"], 128, (64, 128), "int8-group")
weight = PackedWeight(pack(codes, 4), scale, None, None, *meaning)
x = torch.full((3, 128), 127.0)
prepared = PreparedWeight(weight, torch.float32, torch.device("cpu"))
assert torch.equal(prepared.linear(x), x @ weight.dequantize().T), "wrong"
print(prepared.backend.name)
"""


def start(program, folder, *options):
    environment = {**os.environ, "LLMQ_CACHE_DIR": str(folder.parent), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    return subprocess.Popen(
        [sys.executable, *options, "-c", program],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out, err


def test_processes_that_fill_the_cache_at_once_agree(folder):
    runs = [start(PRODUCTS, folder) for _ in range(2)]
    assert {finish(run) for run in runs} == {("cpu-vnni\n", "")}
    names = [path.name for path in folder.iterdir()]
    assert len(names) >= 2
    assert all(name.endswith(".o") and not name.startswith(".") for name in names)
    flip(next(folder.glob("*.o")))
    out, err = finish(start(PRODUCTS, folder))  # a warm start, but for one
    assert out == "cpu-vnni\n"
    assert err.count("is compiled again") == 1


# --- probes ---------------------------------------------------------------------------------------

DEADLY = """; arguments:
define void @kernel(ptr %a) {
  call void @llvm.trap()
  ret void
}
declare void @llvm.trap()
"""
ENDLESS = DEADLY.replace("call void @llvm.trap()", "br label %x\nx:\n  br label %x").replace(
    "  ret void\n", ""
)
WILD = (
    "; arguments:\ndefine void @kernel(ptr %a) {\n  store volatile i64 1, ptr null\n  ret void\n}\n"
)
FINE = "; arguments: x* n\ndefine void @kernel(ptr %a) {\n  ret void\n}\n"
NAMELESS = FINE.replace("@kernel", "@other")


def compiled(text):
    machine = jit._machine("avx2")
    return machine.emit_object(jit._optimized(text, machine))


@pytest.mark.parametrize(("text", "number"), [(DEADLY, 4), (WILD, 11)], ids=["trap", "wild"])
def test_what_kills_is_found_by_a_child(text, number):
    assert (
        object_check.refusal(compiled(text), text) == f"a probe of it was ended by signal {number}"
    )
    assert object_check.refusal(compiled(FINE), FINE) is None


def test_what_is_no_object_is_found_by_a_child():
    assert object_check.refusal(compiled(FINE)[:200], FINE) is not None
    assert "no function" in object_check.refusal(compiled(NAMELESS), NAMELESS)


def test_the_child_imports_neither_torch_nor_what_lies_around(tmp_path, monkeypatch):
    object_check.close()
    for name in ("json", "struct", "llvmlite", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text("import os; os._exit(9)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert object_check.refusal(compiled(FINE), FINE) is None
    maps = Path(f"/proc/{object_check._child.process.pid}/maps")
    if maps.exists():
        assert "llvmlite" in maps.read_text()
        assert "torch" not in maps.read_text()


def test_one_child_judges_many_and_is_replaced_when_it_ends():
    object_check.close()
    assert object_check.refusal(compiled(FINE), FINE) is None
    first = object_check._child
    assert object_check.refusal(compiled(FINE), FINE) is None
    assert object_check._child is first
    first.process.kill()
    assert object_check.refusal(compiled(FINE), FINE) is None
    object_check.close()
    assert first.process.returncode is not None


@pytest.fixture
def mortal(monkeypatch):
    """Forms may die in this test, and live again after it."""

    def clear():
        jit._runs.cache_clear()
        jit.kernel.cache_clear()

    monkeypatch.setattr(execution, "this", execution.Process())
    clear()
    yield
    monkeypatch.undo()
    clear()


def test_a_form_whose_probe_died_is_not_offered(folder, mortal, monkeypatch):
    """And what runs is found by trying each backend in a child."""
    monkeypatch.setattr(object_check, "refusal", lambda code, text: "it died")
    monkeypatch.setattr("llmq_kernels.core.restricted._verdicts", {})
    weight, x = make_weight("int4", 128, 64, 128, activations="int8-group"), torch.randn(3, 128)
    with pytest.warns(errors.KernelWarning, match="are not used: it died"):
        assert not jit.supports("avx2")
    with pytest.warns(errors.KernelWarning, match="On the CPU run: .*reference"):
        prepared = PreparedWeight(weight, torch.float32, CPU)
    assert prepared.backend.name == "reference"
    assert execution.this.dead["avx2"] == "it died"
    assert list(folder.glob("*.o")) == []
    assert torch.isfinite(prepared.linear(x)).all()


@pytest.mark.parametrize("way", ["module", "operator"])
def test_a_kernel_that_dies_on_the_way_is_replaced(folder, mortal, monkeypatch, way):
    """The form's smallest kernel ran, the one that multiplies does not."""
    weight, x = make_weight("int4", 128, 64, 128, activations="int8-group"), torch.randn(3, 128)
    prepared = PreparedWeight(weight, torch.float32, CPU)
    assert prepared.backend.name == "cpu-vnni"
    monkeypatch.setattr("llmq_kernels.core.restricted.adapt", lambda: None)
    monkeypatch.setattr(object_check, "refusal", lambda code, text: "it died")
    arguments = (x, prepared.tensors, prepared.layout, None)
    with pytest.warns(errors.KernelWarning, match="are not used: it died"):
        out = prepared.linear(x) if way == "module" else torch.ops.llmq.linear(*arguments)
    expected = PreparedWeight(weight, torch.float32, CPU)
    assert expected.backend.name == "reference"  # narrower forms died, too
    assert torch.equal(out, expected.linear(x))
    if way == "module":
        assert prepared.backend.name == "reference"
        assert torch.equal(prepared.canonical_packed(), weight.packed)


# --- where executable memory is forbidden ---------------------------------------------------------

FORBID = """
import ctypes, sys
if ctypes.CDLL(None).prctl(65, 1, 0, 0, 0):  # PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN
    print("cannot"), sys.exit()
"""
RESTRICTED = (
    FORBID
    + """
import json, torch
from llmq_kernels import CODES, BACKENDS, PackedWeight, PreparedWeight, pack
from llmq_kernels.compiled import jit
from llmq_kernels.core import restricted
from llmq_kernels.core.reference_backend import fake_quantized
torch.manual_seed(0)
used = set()
for name in ("int4", "int8"):
    code = CODES[name]
    codes = torch.randint(0, code.levels, (64, 128), dtype=torch.uint8)
    for activations in ("none", "int8-token", "int8-group"):
        scale, meaning = torch.rand(64, 1).half() / 100, (code, 128, (64, 128), activations)
        weight = PackedWeight(pack(codes, code.bits), scale, None, None, *meaning)
        for dtype in (torch.bfloat16, torch.float32):
            for m in (1, 100):
                x = torch.randn(m, 128).to(dtype)
                seen = fake_quantized(x, weight)
                expected = seen.double() @ weight.dequantize().double().T
                prepared = PreparedWeight(weight, dtype, torch.device("cpu"))
                used.add(prepared.backend.name)
                out = prepared.linear(x, torch.zeros(64)).double()
                error = (out - expected).norm() / expected.norm()
                assert error < 2 * 2.0**-8, (name, activations, dtype, m, error)
x = torch.randn(1, 8, 16)
torch.nn.functional.conv1d(x, torch.ones(8, 1, 4), groups=8)
runs = [b.name for b in BACKENDS if restricted.verdict(b.name) is None]
print(json.dumps([sorted(used), runs, torch.backends.mkldnn.enabled]))
"""
)


def test_without_executable_memory_the_rest_runs_and_says_so(folder):
    out, err = finish(start(RESTRICTED, folder))
    if out == "cannot\n":
        pytest.skip("this kernel has no PR_SET_MDWE")
    used, runs, onednn = json.loads(out)
    assert set(used) <= set(runs)
    assert "reference" in used
    assert not {"cpu-amx", "cpu-avx512", "cpu-vnni", "cpu-w8a8"} & set(used)
    assert not onednn
    told = err.splitlines()
    assert len(told) == 1, err
    assert "may not execute memory that it wrote" in told[0]
    assert "oneDNN is off" in told[0]
    assert "cpu-vnni" in told[0].split("Not: ")[1]
    assert not folder.exists()


@pytest.mark.slow
def test_a_right_given_up_while_it_runs(folder):
    """A kernel that is there goes on, another one is not loaded any more, and nothing dies."""
    later = FORBID.replace("import ctypes, sys", "")
    program = (
        "import ctypes, sys\n"
        + PRODUCTS
        + later
        + """
assert torch.equal(prepared.linear(x), x @ weight.dequantize().T)
meaning = (CODES["int4"], 64, (64, 128), "int8-group")
wide = PackedWeight(pack(codes, 4), weight.scale.expand(64, 2), None, None, *meaning)
late = PreparedWeight(wide, torch.float32, torch.device("cpu"))
assert torch.equal(late.linear(x), x @ wide.dequantize().T)
print(late.backend.name)
"""
    )
    out, err = finish(start(program, folder))
    if "cannot" in out:
        pytest.skip("this kernel has no PR_SET_MDWE")
    assert out == "cpu-vnni\nreference\n"
    assert err.count("KernelWarning") == 1


def test_forbidden_memory_is_simulated_where_the_system_cannot_forbid(mortal, monkeypatch):
    monkeypatch.setattr(execution, "_ask", lambda: "it is forbidden")
    monkeypatch.setattr("llmq_kernels.core.restricted._verdicts", {"cpu-int4": None})
    assert restricted.reason() == "it is forbidden"
    weight = make_weight("int4", 128, 64, 128, activations="int8-group")
    assert jit.missing() == "it is forbidden"
    assert select_backend(weight, torch.float32, CPU).name == "reference"
    with pytest.raises(errors.KernelDied, match="it is forbidden"):
        jit.kernel("avx2", "elementwise", "gate_kernel")


def test_doctor_says_what_runs(folder):
    program = FORBID + "from llmq.commands.cli import main; sys.exit(main(['doctor', '--json']))"
    out, err = finish(start(program, folder))
    if "cannot" in out:
        pytest.skip("this kernel has no PR_SET_MDWE")
    result = json.loads(out)
    assert "may not execute" in result["executable_memory"]
    assert result["onednn"].startswith("off")
    assert result["backends"]["reference"] == "works here"
    assert "may not execute" in result["backends"]["cpu-vnni"]
    assert set(result["compiled_kernels"]["forms"].values()) == {result["executable_memory"]}
    assert any("oneDNN is off" in one for one in result["warnings"])
    assert err.count("llmq: warning:") == 1


def test_doctor_names_an_unsafe_cache(folder, capsys):
    from llmq.commands.cli import main

    entry()
    folder.chmod(0o777)
    assert main(["doctor"]) == 0
    assert "mode 0777" in capsys.readouterr().out


@pytest.mark.slow
def test_the_probe_is_cheap(folder):
    """Half a second for the first object on an idle machine, a few hundredths for the others."""
    object_check.close()
    code = compiled(FINE)
    started = time.perf_counter()
    for _ in range(21):
        assert object_check.refusal(code, FINE) is None
    assert time.perf_counter() - started < 10
