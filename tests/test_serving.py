"""The script that asks a server: one that answers as llmq does, one that does not, one that
ends."""

import json
import runpy
import socket
import sys
from pathlib import Path

import pytest

import llmq

ROOT = Path(__file__).resolve().parent.parent
SERVER = """
import json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
port, text = int(sys.argv[1]), sys.argv[2]
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200), self.end_headers()
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert asked["temperature"] == 0
        self.send_response(200), self.end_headers()
        answer = {"choices": [{"text": text[: 4 * asked["max_tokens"]]}]}
        self.wfile.write(json.dumps(answer).encode())
HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def ask(capsys):
    main = runpy.run_path(str(ROOT / "scripts" / "check_serving.py"))["main"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def run(text):
        command = [sys.executable, "-c", SERVER, str(port), text]
        url = f"http://127.0.0.1:{port}"
        with pytest.raises(SystemExit) as end:
            main(["tiny", "--url", url, "--tokens", "12", "--seconds", "60", "--", *command])
        return end.value.code, capsys.readouterr().out

    return run


def test_a_server_that_answers_as_llmq_does(ask):
    prompt = "Water boils at a lower temperature on a mountain because"
    ours = llmq.generate(llmq.load("tiny", dtype="float32"), prompt, 12)
    code, out = ask(ours)
    assert not code
    assert json.loads(out)["shared_characters"] == min(len(ours), 48)


def test_one_that_does_not(ask):
    code, out = ask("something else")
    assert code
    assert json.loads(out)["shared_characters"] < 20


def test_one_that_ends(capsys):
    main = runpy.run_path(str(ROOT / "scripts" / "check_serving.py"))["main"]
    command = [sys.executable, "-c", "raise SystemExit(3)"]
    with pytest.raises(SystemExit, match="ended with exit code 3"):
        main(["tiny", "--url", "http://127.0.0.1:9", "--tokens", "2", "--", *command])
