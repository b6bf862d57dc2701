"""Who imports whom in the kernels, at module level: no circle, and `core` knows nobody but through
its registry."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2] / "kernels"
PATHS = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in sorted((ROOT / "llmq_kernels").rglob("*.py"))
    if path.name != "__init__.py"
}
ROOMS = ("core", "torch_cpu", "compiled", "triton")


def imported_by(path: Path) -> set[str]:
    """The modules of llmq_kernels that are run when this one is imported. Packages' own
    `__init__` files, which import nothing but `core`, are not counted."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & PATHS.keys()


IMPORTS = {module: imported_by(path) for module, path in PATHS.items()}


def room(module: str) -> str:
    return module.split(".")[1]


def reached(module: str) -> set[str]:
    """All that is run when a module is imported."""
    found, waiting = set(), [module]
    while waiting:
        new = IMPORTS[waiting.pop()] - found
        found |= new
        waiting += new
    return found


def test_every_module_is_seen_and_in_a_room():
    assert {room(module) for module in PATHS} == set(ROOMS)
    assert "llmq_kernels.core.weight" in IMPORTS["llmq_kernels.core.backend"]


def test_no_circle():
    order = list(TopologicalSorter(IMPORTS).static_order())  # raises `CycleError`, which names it
    assert set(order) == PATHS.keys()


def test_core_knows_the_other_rooms_through_its_registry_only():
    outside = {
        module
        for module, imported in IMPORTS.items()
        if room(module) == "core" and any(room(other) != "core" for other in imported)
    }
    assert outside == {"llmq_kernels.core.registry"}


def test_no_room_knows_who_chooses():
    for module in PATHS:
        if room(module) != "core":
            assert not reached(module) & {
                "llmq_kernels.core.registry",
                "llmq_kernels.core.dispatch",
                "llmq_kernels.core.restricted",
            }, module


def test_the_package_imports_core_only():
    for path in (ROOT / "llmq_kernels").rglob("__init__.py"):
        assert {room(module) for module in imported_by(path)} <= {"core"}
