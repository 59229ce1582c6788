"""The kit's comparison of real servers (scripts/gpu/real_sglang.py) against servers that only pretend: does
it measure what it says, and notice what is wrong?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "gpu" / "real_sglang.py"

# Three tiers of whole prompts, each in order of use. Answers depend on the prompt alone, unless told not to.
FAKE = """
import hashlib, http.server, json, os, threading, time
from collections import OrderedDict

class SGLangServer:
    starts = 0

    def __init__(self, model, flags, env=None, log_path=None, start_timeout_s=0, stop_grace_s=0):
        self.flags, self.env, self.pid = flags, env or {}, os.getpid()
        self.flexkv = bool(flags.get("enable-flexkv"))
        self.device, self.cpu, self.ssd = OrderedDict(), OrderedDict(), set()

    def start(self):
        refused = os.environ.get("FAKE_REFUSES", "")
        if refused and not self.flags.get(refused):
            raise RuntimeError("cannot start with prefill graphs")
        fake = self
        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = 1 << 20
            def log_message(self, *_): pass
            def do_GET(self):
                self.send_response(200); self.send_header("content-length", "0"); self.end_headers()
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                answer = fake.answer(body)
                data = ("data: " + json.dumps(answer) + "\\n\\ndata: [DONE]\\n\\n").encode()
                self.send_response(200)
                self.send_header("content-length", str(len(data))); self.end_headers()
                self.wfile.write(data)
        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    @property
    def url(self): return f"http://127.0.0.1:{self.http.server_address[1]}"

    def stop(self, grace=0):
        if hasattr(self, "http"): self.http.shutdown()

    def answer(self, body):
        prompt = tuple(body["input_ids"]); size = len(prompt)
        tiers = {"device": prompt in self.device, "host": prompt in self.cpu, "storage": prompt in self.ssd}
        source = next((name for name, there in tiers.items() if there), None)
        cached = (size - 1) // 16 * 16 if source else 0
        time.sleep({None: 0.02, "device": 0.002, "host": 0.004, "storage": 0.008}[source])
        self.put(self.device, prompt, self.flags["max-total-tokens"])
        if self.flexkv:
            tokens = float(self.env["FLEXKV_CPU_CACHE_GB"]) * 2**30 / int(os.environ["FAKE_TOKEN_BYTES"])
            self.put(self.cpu, prompt, tokens); self.ssd.add(prompt)
        seed = hashlib.sha256(repr(prompt).encode()).digest()
        ids = list(seed[: body["sampling_params"]["max_new_tokens"]])
        if os.environ.get("FAKE_WRONG") == source and self.flexkv and source: ids[-1] += 1
        return {"output_ids": ids, "meta_info": {"prompt_tokens": size, "cached_tokens": cached,
            "cached_tokens_details": {source: cached} if source else {},
            "output_token_logprobs": [[-0.5, i, None] for i in ids]}}

    @staticmethod
    def put(tier, prompt, limit):
        tier[prompt] = True; tier.move_to_end(prompt)
        while sum(map(len, tier)) > limit: tier.popitem(last=False)
"""


def run(folder: Path, **environment: str) -> tuple[int, dict]:
    (folder / "tests" / "support").mkdir(parents=True)
    (folder / "tests" / "support" / "server.py").write_text(textwrap.dedent(FAKE))
    model = folder / "model"
    model.mkdir()
    fields = {
        "num_hidden_layers": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "vocab_size": 4096,
        "hidden_size": 8,
    }
    (model / "config.json").write_text(json.dumps(fields))
    out = folder / "out.json"
    command = [sys.executable, str(SCRIPT), "--root", str(folder), "--model", str(model)]
    command += ["--json", str(out), "--logs", str(folder / "logs"), "--sizes", "512,2048", "--deadline", "60"]
    environment = {**os.environ, "FAKE_TOKEN_BYTES": str(2 * 2 * 1 * 8 * 2), **environment}
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=120)
    assert out.exists(), done.stdout + done.stderr
    return done.returncode, json.loads(out.read_text())


def test_a_good_server_meets_everything(tmp_path: Path) -> None:
    status, result = run(tmp_path)
    assert (status, result["verdict"], result["problems"]) == (0, "met", [])
    assert {check["failed"] for check in result["checks"].values()} == {0}
    assert sorted(check["count"] for check in result["checks"].values()) == [3, 3, 3, 3, 6, 6]
    assert {row["kind"] for row in result["rows"]} == {
        "recompute",
        "device of stock",
        "cold",
        "device",
        "cpu",
        "ssd",
    }
    for size in ("512", "2048"):
        assert result["summary"][size]["recompute_over_cpu"] > 0
    assert result["four_at_once"] == {"prompts": 8, "from_cpu": 8, "same_as_alone": 8}
    # One that is computed at once, and one of which something is left when the rest is being stored.
    chunk = result["flags"]["chunked-prefill-size"]
    tokens = {what: of["tokens"] for what, of in result["first_prompts"].items()}
    assert tokens == {"one chunk": chunk - 1, "a chunk and 7 tokens": chunk + 7}


@pytest.mark.parametrize(("source", "kind"), [("host", "cpu"), ("storage", "ssd"), ("device", "device")])
def test_a_wrong_token_is_noticed(tmp_path: Path, source: str, kind: str) -> None:
    status, result = run(tmp_path, FAKE_WRONG=source)
    assert (status, result["verdict"]) == (1, "missed")
    assert [what.partition(":")[0] for what in result["failed"]] == [kind]


def test_what_cannot_be_started_is_given_up(tmp_path: Path) -> None:
    status, result = run(tmp_path, FAKE_REFUSES="disable-prefill-cuda-graph")
    assert (status, result["given_up"]) == (0, {"disable-prefill-cuda-graph": True})
    assert len(result["problems"]) == 1


def test_a_server_that_never_starts_is_reported(tmp_path: Path) -> None:
    status, result = run(tmp_path, FAKE_REFUSES="no-such-flag")
    assert (status, result["verdict"]) == (1, "missed")
    assert len(result["problems"]) == 5  # one per step of the ladder, and that there is none left
