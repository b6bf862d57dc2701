"""From LLVM's text to code that runs (`threads`).

llvmlite, a pip package, compiles; nobody needs a C compiler. The machine code is kept in the user's
cache folder (`cache`) under a hash of the kernel's text, the target and LLVM's version, so a warm
start loads a file; without a folder that is safe each process compiles for itself. What was just
compiled runs in a child process first (`object_check`). Where memory may not be made executable
(`execution`), or a probe died, the forms concerned are not offered and their callers take
others."""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import importlib
import platform
import threading
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from llmq_kernels.compiled import object_check
from llmq_kernels.compiled.threads import Kernel
from llmq_kernels.core import execution
from llmq_kernels.core.cache import Unsafe, cache_dir, private_folder, seal, unseal, write_private
from llmq_kernels.core.errors import KernelDied, tell

# x86 levels that kernels are written for. The features are what LLVM may use in the compiled code.
AVX2 = "+avx2,+fma,+f16c,+bmi,+bmi2,+popcnt"
AVX512 = AVX2 + ",+avx512f,+avx512bw,+avx512dq,+avx512vl,+avx512vnni"
FORMS: dict[str, str] = {
    "avx2": AVX2,
    "avxvnni": AVX2 + ",+avxvnni",
    "avx512vnni": AVX512,
    "avx512bf16": AVX512 + ",+avx512bf16",
    "amx": AVX512 + ",+avx512bf16,+amx-tile,+amx-bf16,+amx-int8",
}


def missing() -> str | None:
    """Why nothing can be compiled here, or None."""
    return execution.this.forbidden or _cannot_compile()


@cache
def _cannot_compile() -> str | None:
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return f"its kernels are written for x86-64, not {platform.machine()}"
    if not find_spec("llvmlite"):
        return "llvmlite is not installed (pip install '.[cpu]' in a clone of llmq)"
    return execution.forbidden()


@cache
def cpu_flags() -> frozenset[str]:
    """LLVM's names of the features of this CPU that the system lets programs use."""
    from llvmlite import binding

    return frozenset(name for name, present in binding.get_host_cpu_features().items() if present)


def supports(form: str) -> bool:
    """Whether this process can run a form: the CPU says so, and its smallest kernel does."""
    return missing() is None and form not in execution.this.dead and _runs(form)


@cache
def _runs(form: str) -> bool:
    if not cpu_flags().issuperset(FORMS[form].replace("+", "").split(",")):
        return False
    if form == "amx" and not _tiles_allowed():
        return False
    try:
        with _building:
            _object_code(form, *_SMALLEST)
    except KernelDied:
        return False
    return True


_building = threading.Lock()  # one thread at a time compiles and loads
_SMALLEST = ("elementwise", "add_kernel", ())  # the kernel that stands for its form


def _bury(form: str, reason: str) -> KernelDied:
    execution.this.dead[form] = reason
    tell(f"llmq's compiled kernels for {form} are not used: {reason}")
    return KernelDied(f"kernels for {form} cannot run here: {reason}")


def obstacle(form: str, otherwise: str) -> str | None:
    """Why kernels of a form cannot run here, or None. otherwise: what is said where only the CPU
    is in the way."""
    return missing() or (None if supports(form) else execution.this.dead.get(form, otherwise))


def _tiles_allowed() -> bool:
    """Ask Linux for the 8 KB of tile registers, once per process: arch_prctl(ARCH_REQ_XCOMP_PERM,
    XFEATURE_XTILEDATA)."""
    if platform.system() != "Linux":
        return False
    return ctypes.CDLL(None).syscall(158, 0x1023, 18) == 0


# --- compiling ------------------------------------------------------------------------------------


def _machine(form: str) -> object:
    """LLVM's target machine with the features of a form."""
    from llvmlite import binding

    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    triple = binding.get_default_triple()
    return binding.Target.from_triple(triple).create_target_machine(
        cpu="x86-64", features=FORMS[form], opt=3, reloc="pic", codemodel="jitdefault", jit=True
    )


def _optimized(text: str, machine: object) -> object:
    from llvmlite import binding

    module = binding.parse_assembly(text)
    module.verify()
    builder = binding.create_pass_builder(
        machine, binding.create_pipeline_tuning_options(speed_level=2)
    )
    builder.getModulePassManager().run(module, builder)
    return module


def assembly(text: str, form: str) -> str:
    """The assembly of a kernel, for any form, whatever this CPU is."""
    machine = _machine(form)
    return machine.emit_assembly(_optimized(text, machine))  # type: ignore[attr-defined]


@cache
def _sources() -> bytes:
    """Everything that a kernel's machine code depends on, beside its parameters."""
    import llvmlite

    folder = Path(__file__).parent
    return (
        b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
        + llvmlite.__version__.encode()
    )


def _object_code(form: str, module: str, function: str, parameters: tuple[object, ...]) -> bytes:
    """Machine code from the cache, or written, compiled, tried and put there. A warm start does not
    even write the kernel's text. Raises `KernelDied`."""
    what = repr((form, platform.system(), module, function, parameters))
    key = hashlib.sha256(_sources() + what.encode()).digest()
    folder = _folder()
    path = None if folder is None else folder / f"{key.hex()[:32]}.o"
    if path is not None:
        try:
            return unseal(path, key)
        except FileNotFoundError:
            pass
        except Unsafe as error:
            tell(f"{error}; kernel {module}.{function} is compiled again")
    machine = _machine(form)
    text = kernel_text(module, function, *parameters)
    code: bytes = machine.emit_object(_optimized(text, machine))  # type: ignore[attr-defined]
    _try(form, code, text)
    if path is not None:
        try:
            write_private(path, seal(key, code))
        except OSError as error:
            tell(f"{path} cannot be written ({error.strerror}); every process compiles for itself")
    return code


def _folder() -> Path | None:
    """Where compiled kernels are kept, or None where that is not safe or not possible."""
    if execution.this.is_trial:
        return None
    try:
        return private_folder(cache_dir() / "kernels", create=True)
    except Unsafe as error:
        told = str(error)
    except OSError as error:
        told = f"{error.filename or cache_dir()} cannot be used ({error.strerror})"
    tell(f"{told}; compiled kernels are not kept, every process compiles for itself")
    return None


def cache_obstacle() -> str | None:
    """Why compiled kernels are not kept, or None."""
    try:
        private_folder(cache_dir() / "kernels")
    except FileNotFoundError:
        return None  # it will be made
    except (Unsafe, OSError) as error:
        return str(error)
    return None


def _try(form: str, code: bytes, text: str) -> None:
    """Run a fresh object in a child process. Raises `KernelDied`."""
    if execution.this.is_trial:
        return
    try:
        reason = object_check.refusal(code, text)
    except OSError as error:
        tell(f"fresh kernels are used untried: no process can be started ({error.strerror})")
        return
    if reason:
        raise _bury(form, reason)


def kernel_text(module: str, function: str, *parameters: object) -> str:
    """LLVM's text of `function(*parameters)` of a module of this folder. Imported by name, since
    these modules need llvmlite."""
    text: str = getattr(importlib.import_module(f"{__package__}.{module}"), function)(*parameters)
    return text


atexit.register(object_check.close)
_ENGINES: list[object] = []  # keeps the code alive


def _load(form: str, code: bytes, symbol: str) -> int:
    """The address of a function of an object file. Raises `KernelDied` where loading would end the
    process."""
    from llvmlite import binding

    if reason := execution.forbidden() or missing():
        raise KernelDied(f"kernels for {form} cannot be loaded: {reason}")
    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), _machine("avx2"))
    engine.add_object_file(binding.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _ENGINES.append(engine)
    return int(engine.get_function_address(symbol))


@cache
def kernel(form: str, module: str, function: str, *parameters: object) -> Kernel:
    """The kernel whose text `llmq_kernels.module.function(*parameters)` writes. Raises `KernelDied`
    where this process cannot run it."""
    if reason := obstacle(form, "this CPU or system has no such instructions"):
        raise KernelDied(f"kernel {module}.{function} cannot run in its {form} form: {reason}")
    with _building:
        return Kernel(_load(form, _object_code(form, module, function, parameters), "kernel"))
