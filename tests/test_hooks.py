"""What happens when another package is imported, in fresh interpreters."""

import subprocess
import sys

import pytest

HOOKED = "from llmq.hooks import when_imported\nwhen_imported('later', lambda: print('acted'))\n"


def printed(program, cwd):
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(cwd)!r})\n{program}"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.fixture
def later(tmp_path):
    """A folder with a module, which prints when it runs and can be made to fail."""
    (tmp_path / "later.py").write_text(
        "import builtins\nprint('ran')\nif hasattr(builtins, 'fail'): raise ValueError\nX = 1\n"
    )
    return tmp_path


def test_the_hook_acts_after_the_import_once(later):
    assert printed(f"{HOOKED}import later\nimport later\nprint(later.X)", later) == [
        "ran",
        "acted",
        "1",
    ]


def test_what_is_imported_already_is_acted_on_at_once(later):
    assert printed(f"import later\n{HOOKED}", later) == ["ran", "acted"]


def test_several_hooks_act_each(later):
    assert printed(f"{HOOKED}{HOOKED}{HOOKED}import later", later) == ["ran", *["acted"] * 3]


def test_other_modules_and_missing_ones_are_as_without(later):
    program = f"{HOOKED}import json\ntry:\n    import nowhere\nexcept ImportError:\n    print('no')"
    assert printed(program, later) == ["no"]
    (later / "later.py").unlink()
    program = f"{HOOKED}try:\n    import later\nexcept ImportError:\n    print('no')"
    assert printed(program, later) == ["no"]


def test_a_failed_import_is_not_acted_on_and_the_next_one_is(later):
    program = (
        f"{HOOKED}import builtins\nbuiltins.fail = True\ntry:\n    import later\n"
        "except ValueError:\n    print('failed')\ndel builtins.fail\nimport later"
    )
    assert printed(program, later) == ["ran", "failed", "ran", "acted"]
