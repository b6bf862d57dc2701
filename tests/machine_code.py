"""What a compiled kernel does for a packed word, counted in machine code, and the table that it is
held against.

The table, `kernels/machine_code.json`, has by version of Triton and kernel the instructions per
packed word in the loop over K, and the registers of a thread. With `LLMQ_RECORD=1` the tests that
count write it instead of reading it; `scripts/test_versions.sh` has the versions."""

import json
import os
import re
import subprocess
from pathlib import Path

TABLE = Path(__file__).parent / "kernels" / "machine_code.json"
TOLERANCE = 1.02  # of the same version
OTHER_VERSION = 1.25  # of one that is not in the table, against the nearest one before it

_LABEL = re.compile(r"^\s*(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(.*)")
_BRANCH = re.compile(r"\bBRA\b.*`\((\.L_x_\d+)\)")


def loops(code):
    """The instructions of each loop of disassembled SASS, innermost or not."""
    lines, starts, found = [], {}, []
    for line in code.splitlines():
        if label := _LABEL.match(line):
            starts[label[1]] = len(lines)
        elif instruction := _INSTRUCTION.match(line):
            lines.append(instruction[1])
            branch = _BRANCH.search(line)
            if branch and branch[1] in starts and starts[branch[1]] < len(lines) - 1:
                found.append(lines[starts[branch[1]] :])
    return found


def main_loop(code):
    """The shortest loop with products of tensor cores in it, or of vectors where it has none."""
    for product in (re.compile("MMA"), re.compile("FFMA|HFMA2")):
        found = [loop for loop in loops(code) if any(map(product.search, loop))]
        if found:
            return min(found, key=len)
    raise AssertionError("no loop with products in it")


def loads_wide(code):
    """Whether the loop reads 128 bits at a time from memory beyond the chip."""
    return any(re.search(r"\bLDG(STS)?\.E\S*\.128", line) for line in main_loop(code))


def registers(cubin):
    """Of a thread."""
    import triton

    tool = Path(triton.knobs.nvidia.nvdisasm.path).with_name("cuobjdump")
    command = [tool, "--dump-resource-usage", cubin]
    usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(re.search(r"REG:(\d+)", usage)[1])


def hold(name, code, cubin, words):
    """Fail where a kernel does more than the table says. words: packed words of a thread in one
    round of the loop."""
    import triton

    version = ".".join(triton.__version__.split(".")[:2])
    figures = {
        "instructions per word": round(len(main_loop(code)) / words, 2),
        "registers": registers(cubin),
    }
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    if os.environ.get("LLMQ_RECORD") == "1":
        table.setdefault(version, {})[name] = figures
        TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
        return
    known = max((each for each in table if _number(each) <= _number(version)), key=_number)
    most = TOLERANCE if known == version else OTHER_VERSION
    for what, value in figures.items():
        expected = table[known][name][what]
        assert value <= most * expected, f"{name}: {value} {what}, {expected} with Triton {known}"


def _number(version):
    return tuple(map(int, version.split(".")))
