"""A card on its way to the Hub: its code names the repository in the place of the folder."""

from __future__ import annotations

import re
import shlex

from llmq.cards.usage import quoted

_FENCE = "```"
_NAME = re.compile(r'llmq\.load\(("(?:[^"\\]|\\.)*")\)')
USE = "## How to use it\n\n"


def for_repository(card: str, repo_id: str) -> str:
    """A card of a folder whose code loads a repository. What stands outside of code stays, and so
    does a card without the code of llmq."""
    found = _NAME.search(card)
    if found is None:
        return card
    parts = card.split(_FENCE)  # every second one is code
    parts[1::2] = [part.replace(found[1], quoted(repo_id)) for part in parts[1::2]]
    return _FENCE.join(parts)


def with_download(card: str, repo_id: str, file_name: str) -> str:
    """A card of a file whose code begins with getting it from a repository."""
    command = f"hf download {repo_id} {shlex.quote(file_name)} --local-dir ."
    return card.replace(USE, f"{USE}```bash\n{command}\n```\n\n", 1)
