"""Does a server answer as llmq does with the same folder?

    python scripts/check_serving.py FOLDER -- transformers serve FOLDER --device cpu \\
        --dtype float32 --port 8000
    python scripts/check_serving.py FOLDER -- vllm serve FOLDER --dtype bfloat16 --port 8000

Starts the command, waits until it says that it is healthy, asks for a greedy completion, stops it,
and compares the text with that of `llmq.generate` in float32. Prints a JSON object: both texts and
how many characters from the start they share. Ends with 1 where there was no answer, or where not
even the first tokens are equal: sums in another order may turn a near tie later on. Run it where
llmq is installed; the command may be of any environment."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from typing import Any

import llmq

PROMPT = "Water boils at a lower temperature on a mountain because"
SHARED = 20  # characters from the start
STDERR = 2


def wait(url: str, server: subprocess.Popen[bytes], seconds: float) -> None:
    """Until the server is healthy. Raises `SystemExit` where it ends, or takes too long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if server.poll() is not None:
            raise SystemExit(f"the server ended with exit code {server.returncode}")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    raise SystemExit(f"the server was not healthy within {seconds:.0f} s")


def completion(url: str, model: str, n_tokens: int, seconds: float) -> str:
    """The text that the server goes on with, greedily."""
    asked = {"model": model, "prompt": PROMPT, "max_tokens": n_tokens, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/v1/completions",
        json.dumps(asked).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=seconds) as response:
        found: dict[str, Any] = json.load(response)
    return str(found["choices"][0]["text"])


def n_shared(one: str, other: str) -> int:
    """How many characters from the start are equal."""
    pairs = itertools.zip_longest(one, other)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder")
    parser.add_argument("command", nargs="+", help="behind --")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--seconds", type=float, default=300, help="for the start, and the answer")
    args = parser.parse_args(argv)
    ours = llmq.generate(llmq.load(args.folder, dtype="float32"), PROMPT, args.tokens)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    server = subprocess.Popen(
        args.command,
        stdout=STDERR,
        stderr=STDERR,
        env=environment,
        start_new_session=True,
    )
    try:
        wait(args.url, server, args.seconds)
        theirs = completion(args.url, args.folder, args.tokens, args.seconds)
    finally:
        server.terminate()
        server.wait(timeout=60)
    shared = n_shared(ours, theirs)
    print(json.dumps({"llmq": ours, "server": theirs, "shared_characters": shared}))
    sys.exit(shared < min(SHARED, len(ours)))


if __name__ == "__main__":
    main()
