"""The shape of the project: imports go downwards, `kernels/` is no package, everything installs,
and the code is clean."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import zipfile
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Each room may import the rooms below it and itself.
ROOMS = [
    "commands",
    "ladder",
    "api",
    "benchmark",
    "qat",
    "ptq",
    "evaluation",
    "reports",
    "formats",
    "cards",
    "activations",
    "text",
    "inference",
    "models",
    "recipes",
    "recipe",
    "grid",
    "storage",
    "fields",
    "patterns",
    "arguments",
    "errors",
    "messages",
]
KERNELS = ROOT / "kernels" / "llmq_kernels"
TESTS = ROOT / "tests"


def imports_of(path: Path):
    """(imported module, whether at module level) for llmq and llmq_kernels."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (
                (f"{node.module}.{alias.name}" if node.module == "llmq" else node.module)
                for alias in node.names
            )
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def part_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "llmq" and len(parts) > 1 and parts[1] in ROOMS else None


@pytest.mark.parametrize(
    "path", sorted((ROOT / "llmq").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT))
)
def test_imports_go_downwards(path):
    own = part_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
    if own is None:
        return
    for module in imports_of(path):
        other = part_of(module)
        if other is not None:
            assert ROOMS.index(other) >= ROOMS.index(own), f"{path.name} in {own} imports {module}"


def at_import(path: Path) -> set[str]:
    """What a module imports when it is imported itself, as far as it is ours."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return {name for name in found if name.split(".")[0] in ("llmq", "llmq_kernels")}


def test_no_module_imports_itself_on_the_way():
    paths = {name_of(path): path for path in modules()}
    graph = {name: at_import(path) & paths.keys() for name, path in paths.items()}
    assert len(list(TopologicalSorter(graph).static_order())) == len(paths)


def modules() -> list[Path]:
    """Every module but the `__init__`s, which only name what a package has."""
    found = [*(ROOT / "llmq").rglob("*.py"), *KERNELS.rglob("*.py")]
    return sorted(path for path in found if path.stem != "__init__")


def name_of(path: Path) -> str:
    root = KERNELS.parent if path.is_relative_to(KERNELS) else ROOT
    return ".".join(path.relative_to(root).with_suffix("").parts)


def room_and_name(path: Path) -> tuple[str, str]:
    """The first folder of a path, and the name of a module or of its test."""
    return path.parts[0] if len(path.parts) > 1 else "", path.stem.removeprefix("test_")


def test_every_module_has_a_test():
    """Of its own name in the folder of its room, or as tests/README.md says."""
    rows = re.findall(r"^\| (`.*\.py`) \| (`.*`) \|$", (TESTS / "README.md").read_text(), re.M)
    table = {}
    for left, right in rows:
        tests = re.findall(r"`([^`]+)`", right)
        assert [name for name in tests if not (TESTS / name).is_file()] == []
        table |= dict.fromkeys(re.findall(r"`([^`]+)`", left), tests)
    own = {room_and_name(path.relative_to(TESTS)) for path in TESTS.rglob("test_*.py")}
    without = set()
    for path in modules():
        module = Path(*name_of(path).split("."))
        room = Path("kernels") if module.parts[0] == "llmq_kernels" else Path()
        if room_and_name(room / Path(*module.parts[1:])) not in own:
            without.add(f"{module}.py")
    missing, useless = sorted(without - table.keys()), sorted(table.keys() - without)
    assert missing == [], "give them a test, or a line in tests/README.md"
    assert useless == [], "these lines of tests/README.md are of no use"


# Modules of device code: Triton's functions need it when they are defined, so nothing but a launch
# may import these.
DEVICE_CODE = {
    f"llmq_kernels.triton.{name}" for name in ("dequantize", "experts", "gemv", "gemm", "int8")
}


@pytest.mark.parametrize(
    "path", sorted(KERNELS.rglob("*.py")), ids=lambda path: str(path.relative_to(KERNELS))
)
def test_kernels_know_neither_llmq_nor_transformers_and_no_triton_at_import(path):
    modules = list(imports_of(path))
    assert not [module for module in modules if module.split(".")[0] in ("llmq", "transformers")]
    if ".".join(path.relative_to(KERNELS.parent).with_suffix("").parts) in DEVICE_CODE:
        return
    top_level = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            top_level |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            top_level |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    assert not [
        module for module in top_level if module.split(".")[0] == "triton" or module in DEVICE_CODE
    ]


def test_kernels_is_a_source_root_not_a_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with an sdist, and the wheel that is made from it."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"  # a copy, because building leaves its files where it builds
    ignored = shutil.ignore_patterns(".git", ".*cache", ".venv", "build", "tests", "*.egg-info")
    shutil.copytree(ROOT, source, ignore=ignored)
    call(sys.executable, "-m", "build", "--outdir", folder, source, timeout=600)
    return folder


def call(*command, timeout=120, **settings):
    """What a command prints."""
    settings |= {"capture_output": True, "text": True, "timeout": timeout}
    done = subprocess.run([str(part) for part in command], **settings)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_what_a_wheel_holds(built):
    names = zipfile.ZipFile(next(built.glob("llmq-*.whl"))).namelist()
    expected = ["assets/tiny/model.safetensors", "py.typed", "recipes/w4-gptq.yaml"]
    expected += ["recipes/README.md", "commands/cli.py", "cards/card.md.jinja"]
    assert {f"llmq/{name}" for name in expected} | {"llmq_kernels/core/codes.py"} <= set(names)
    assert not [name for name in names if name.startswith(("tests", "scripts", "kernels"))]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["*.whl", "*.tar.gz"])
def test_installed_in_a_fresh_environment_it_quantizes_tiny(kind, built, tmp_path):
    """What it depends on comes from this environment, behind the fresh one's own packages."""
    call(sys.executable, "-m", "venv", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (site / "behind.pth").write_text(sysconfig.get_path("purelib"))
    package = next(built.glob(f"llmq-{kind}"))
    # With it, pip finds the checkout and takes the package for installed.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    install = ("-m", "pip", "install", "--no-deps", "--quiet", package)
    call(python, *install, env=environment, timeout=600)
    settings = {"cwd": tmp_path, "env": environment, "timeout": 300}
    llmq = tmp_path / "venv" / "bin" / "llmq"
    where = call(python, "-c", "import llmq, llmq_kernels; print(llmq.__file__)", **settings)
    assert where.startswith(str(site))
    call(llmq, "quantize", "tiny", "out", "--recipe", "w4-gptq", "--samples", "2", **settings)
    evaluation = json.loads(call(llmq, "eval", "out", "--max-windows", "2", "--json", **settings))
    assert 1 < evaluation["perplexity"] < 100


def test_an_editable_install_is_this_checkout():
    program = "import llmq; print(llmq.__file__)"
    assert call(sys.executable, "-c", program, cwd="/").startswith(str(ROOT))


def test_help_answers_at_once():
    """0.3 s is the promise on an idle machine; imports are what could break it, so these are
    checked exactly and the clock is given room."""
    program = (
        "import sys; sys.argv = ['llmq', '--help']\nfrom llmq.commands.cli import main\ntry:\n    "
        "main()\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'rich', 'datasets'} & set(sys.modules)))"
    )
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
    assert "quantize" in done.stdout
    assert time.perf_counter() - started < 2


def test_nobody_is_sent_to_the_package_index_for_llmq():
    """The name belongs to somebody else there."""
    for path in [
        *ROOT.glob("*.md"),
        *(
            path
            for root in ("llmq", "kernels", "scripts")
            for path in (ROOT / root).rglob("*")
            if path.suffix in (".py", ".sh", ".md")
        ),
    ]:
        assert not re.search(r"pip install\W+(-\S+ )*llmq", path.read_text()), path


def test_no_path_of_one_machine_and_no_service_is_named():
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, tracked.stdout.split("\0")):
        path = ROOT / name
        if path.suffix in (".py", ".md", ".sh", ".toml", ".txt", "") and path.is_file():
            text = path.read_text(errors="ignore")
            assert "/ro" + "ot/" not in text, name
            assert "/wo" + "rk/" not in text, name
