"""The table of families in llmq/models/README.md, from folders and from what was checked of them.

    python scripts/check_families.py FOLDER... --json > gptq.jsonl
    python scripts/families_table.py FOLDER... --results gptq.jsonl [--write llmq/models/README.md]

What is quantized and kept, and which formats hold it, is what `llmq doctor FOLDER` says; the last
column is the verdict of each check. Without --write the table is printed."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from llmq.messages import name_patterns
from llmq.models.config_only import open_to_plan
from llmq.ptq.prospect import HOLDS, Prospect, prospect
from llmq.recipe import Recipe

BEGIN, END = "<!-- table of families: begin -->", "<!-- table of families: end -->"
HEADER = ("family", "quantized", "kept in full precision", "beside the text model", "formats")
SPEC = "w4g32"  # of small models; what is kept does not depend on it


def row(folder: Path, checks: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """The cells of one family."""
    found = prospect(open_to_plan(str(folder)), Recipe.uniform(SPEC, method="rtn"))
    if found.refusal is not None:
        return (folder.name, f"refused: {_cell(found.refusal)}", "", "", "", _verdicts(checks))
    kept = [name for names in found.kept.values() for name in names]
    beside = [f"{part} as stored" for part in found.towers]
    beside += [f"{_start(found.extra)} copied"] if found.extra else []
    return (
        folder.name,
        _patterns(found.quantized),
        _patterns(kept),
        ", ".join(beside),
        _formats(found),
        _verdicts(checks),
    )


def _patterns(names: Sequence[str]) -> str:
    """Names of layers below their block."""
    below = [re.sub(r"^.*?\.(layers|blocks|h)\.\d+\.", "", name) for name in names]
    experts = [re.sub(r"\.experts\.\d+\.", ".experts.0.", name) for name in below]
    if not experts:
        return ""
    patterns = name_patterns(list(dict.fromkeys(experts)))
    return ", ".join(f"`{each.replace('.0.', '.*.')}`" for each in dict.fromkeys(patterns))


def _start(names: Sequence[str]) -> str:
    starts = {re.sub(r"(\.\d+|mtp)\..*$", r"\1.*", name) for name in names}
    return ", ".join(sorted(starts))


def _formats(found: Prospect) -> str:
    return ", ".join(name for name, says in found.formats.items() if says == HOLDS)


def _verdicts(checks: Sequence[dict[str, Any]]) -> str:
    """What each check found, those that found the same together."""
    found: dict[str, list[str]] = {}
    for check in checks:
        says = f": {_cell(check['says'])}" if check["verdict"] == "refused" else ""
        where = f"{check['method']} ({check['transformers']})"
        found.setdefault(check["verdict"] + says, []).append(where)
    return "; ".join(f"{', '.join(where)} {verdict}" for verdict, where in found.items())


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def table(folders: Iterable[Path], results: Iterable[Path]) -> str:
    """Markdown."""
    checks: dict[str, list[dict[str, Any]]] = {}
    for path in results:
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("{"):
                check = json.loads(line)
                checks.setdefault(check["kind"], []).append(check)
    rows = [(*HEADER, "checked"), tuple("---" for _ in (*HEADER, ""))]
    rows += [row(folder, checks.get(folder.name, [])) for folder in folders]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--results", nargs="*", type=Path, default=[])
    parser.add_argument("--write", type=Path, help="the file with the place of the table")
    args = parser.parse_args()
    made = table(args.folders, args.results)
    if args.write is None:
        print(made)
        return 0
    text = args.write.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    args.write.write_text(f"{before}{BEGIN}\n\n{made}\n\n{END}{after}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
