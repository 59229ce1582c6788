"""What SGLang does with requests beside answering them (it refuses, preempts, gives up, pauses them, searches
with beams), and how its processes come and go, over our tiers.

What is expected is what the server answers to the same tokens under a salt that nobody else has, uncached.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import uuid
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import psutil
import pytest
from answers import ASK, EXACT, differing, rounding
from forked_server import ForkedServer, start_python
from server import DTYPE, ON_CPU, SGLangServer, wait_until_ended
from slot_files import store_on_ssd
from test_damaged_blocks import damage
from workload import some_tokens

from sglang_flexkv.storage import ssd_tools

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "tiny-gqa"
POOL_TOKENS = 2048
CHUNK_TOKENS = 256
RUNNING_MAX = 4
# Of as many requests as this none is refused, however late the scheduler comes to look at them.
QUEUED_MAX = 8
# Nothing waits that long unless the server is paused.
WAITING_S = 12
# One for all requests: to make one takes as long as some requests do.
LIMITS = httpx.Limits(max_connections=None, keepalive_expiry=2.0)  # as server.py has it
CLIENT = httpx.Client(timeout=120, limits=LIMITS, trust_env=False)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SGLangServer]:
    rounding(MODEL)  # measured before, and not beside it
    base = tmp_path_factory.mktemp("operation")
    (base / "ssd").mkdir()
    config = base / "flexkv.yaml"
    # A CPU tier of 1,300 tokens.
    config.write_text(
        f"cpu_cache_gb: 0.005\nssd_cache_gb: 0.5\nssd_cache_dir: {base / 'ssd'}\nload_policy: load\n"
    )
    flags: dict[str, Any] = {
        "enable-flexkv": True,
        "flexkv-config-file": str(config),
        "page-size": 1,  # which beams need
        "max-total-tokens": POOL_TOKENS,
        "chunked-prefill-size": CHUNK_TOKENS,
        "enable-mixed-chunk": True,
        "max-running-requests": RUNNING_MAX,
        "max-queued-requests": QUEUED_MAX,
        "enable-priority-scheduling": True,
        "schedule-policy": "fcfs",
        "log-level": "info",
    }
    env = {"SGLANG_REQ_WAITING_TIMEOUT": str(WAITING_S)}
    server = ForkedServer(MODEL, flags, env=env, log_path=base / "server.log")
    with server:
        yield server
    log = server.log()
    assert "hit an exception" not in log
    assert "sglang-flexkv closed: nothing left held" in log, server.log_tail()


def stored(server: SGLangServer, rng: random.Random, count: int, length: int) -> list[list[int]]:
    """Prompts that have left the device: the last ones are in the CPU tier, the others on SSD alone."""
    prompts = [some_tokens(rng, length + number) for number in range(count)]
    for prompt in prompts:
        store_on_ssd(server, prompt)
    server.generate(some_tokens(rng, POOL_TOKENS - 200), 1)
    return prompts


def from_tiers(answer: dict[str, Any]) -> int:
    details = answer["meta_info"]["cached_tokens_details"] or {}
    return int(details.get("host", 0)) + int(details.get("storage", 0))


def uncached(server: SGLangServer, prompt: list[int], count: int, **fields: Any) -> dict[str, Any]:
    answer = server.generate(prompt, count, cache_salt=uuid.uuid4().hex, **fields)
    assert answer["meta_info"]["cached_tokens"] == 0
    return answer


class Request:
    """A request in flight, in a thread of its own."""

    def __init__(
        self, pool: ThreadPoolExecutor, server: SGLangServer, prompt: list[int], count: int, **fields: Any
    ) -> None:
        self.prompt = prompt
        self.rid = str(fields.get("rid"))
        self.begun = Event()  # a first token has come, or the end
        self.future: Future[dict[str, Any]] = pool.submit(
            self._run, server.url, {"max_new_tokens": count}, fields
        )

    def _run(self, url: str, params: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
        """The last that came, an answer or an error."""
        params = {"temperature": 0.0, **params, **fields.pop("sampling_params", {})}
        body = {"input_ids": self.prompt, "sampling_params": params, "stream": True, **fields}
        if "beam_width" not in params:  # with beams SGLang refuses it
            body |= ASK
        last: dict[str, Any] = {}
        try:
            with CLIENT.stream("POST", f"{url}/generate", json=body) as response:
                for line in response.iter_lines():
                    if "{" in line:
                        last = json.loads(line.removeprefix("data: "))
                        self.begun.set()
        finally:
            self.begun.set()
        return last

    @property
    def end(self) -> str:
        """How it ended: "length", or why it did not."""
        last = self.future.result()
        reason = last["meta_info"]["finish_reason"] if "meta_info" in last else None
        return "length" if reason and reason["type"] == "length" else json.dumps(reason or last)


def check(server: SGLangServer, answered: list[tuple[list[int], dict[str, Any]]]) -> None:
    """That answers to prompts, asked for with ASK, are right as far as they came."""
    came = [(prompt, answer) for prompt, answer in answered if answer.get("output_ids")]
    asked = [
        {"prompt": prompt, "max_new_tokens": len(answer["output_ids"]), "cache_salt": uuid.uuid4().hex}
        for prompt, answer in came
    ]
    want = server.generate_many(asked, concurrency=RUNNING_MAX, **ASK)
    assert [answer["meta_info"]["cached_tokens"] for answer in want] == [0] * len(want)
    assert not differing([answer for _, answer in came], want, rounding(MODEL))


def check_requests(server: SGLangServer, requests: list[Request]) -> None:
    check(server, [(each.prompt, each.future.result()) for each in requests])


def check_beams(got: dict[str, Any], want: dict[str, Any]) -> None:
    """That two searches came to the same. Where rounding may prefer another token, which may lead to other
    beams, these are as likely."""
    found, expected = got["meta_info"]["beam_results"], want["meta_info"]["beam_results"]
    if EXACT:
        assert [beam["output_ids"] for beam in found] == [beam["output_ids"] for beam in expected]
        return
    scores, likely = ([beam["meta_info"]["sequence_score"] for beam in each] for each in (found, expected))
    assert scores == pytest.approx(likely, abs=rounding(MODEL))


def test_beams_over_a_prompt_that_comes_back(server: SGLangServer) -> None:
    rng = random.Random(1)
    search: dict[str, Any] = {"sampling_params": {"beam_width": 3, "n": 3}}
    prompts = stored(server, rng, 6, 300)
    for prompt in prompts[::-2]:
        answer = server.generate(prompt, 8, **search)
        assert from_tiers(answer) > 250
        check_beams(answer, uncached(server, prompt, 8, **search))
    # Those that are given up, beside another request.
    beamed, plain = stored(server, rng, 2, 300)
    with ThreadPoolExecutor(2) as pool:
        for number in range(3):
            given_up = Request(pool, server, beamed, 1000, rid=f"beams-{number}", **search)
            beside = Request(pool, server, plain, 30)
            check_requests(server, [beside])
            while not given_up.future.done():  # it may not have come yet
                server.abort(given_up.rid)
                wait([given_up.future], timeout=0.1)
            assert "abort" in given_up.end
    answer = server.generate(beamed, 8, **search)
    check_beams(answer, uncached(server, beamed, 8, **search))


def test_beams_over_blocks_that_are_damaged(server: SGLangServer) -> None:
    """The search begins anew, and computes what could not be loaded."""
    rng = random.Random(7)
    search: dict[str, Any] = {"sampling_params": {"beam_width": 3, "n": 3}}
    config = Path(str(server.flags["flexkv-config-file"]))
    for length in (200, 400):  # in one chunk, and in two
        prompt = stored(server, rng, 6, length)[0]
        before = server.metric("flexkv_failed_loads_total")
        assert damage(config.parent / "ssd", "tp0", every=1) > 10
        answer = server.generate(prompt, 8, **search)
        assert server.metric("flexkv_failed_loads_total") > before
        check_beams(answer, uncached(server, prompt, 8, **search))
        check_beams(answer, server.generate(prompt, 8, **search))


def test_a_prefix_that_several_want_at_once_is_loaded_once(server: SGLangServer) -> None:
    rng = random.Random(11)
    prompts = stored(server, rng, 6, 300)
    answered = []
    for prefix in (prompts[0], prompts[3]):
        before = server.metric("flexkv_loaded_tokens_total")
        asked = [prefix + some_tokens(rng, 20) for _ in range(RUNNING_MAX)]
        answers = server.request(
            "POST",
            "/generate",
            json={"input_ids": asked, "sampling_params": {"temperature": 0.0, "max_new_tokens": 8}, **ASK},
        ).json()
        assert server.metric("flexkv_loaded_tokens_total") - before < 1.1 * len(prefix)
        # On a slow machine the first one may have waited for SSD too long, and computed it: the others go on
        # from its first chunk then, or from all of it.
        cached = sum(answer["meta_info"]["cached_tokens"] for answer in answers)
        assert cached >= (RUNNING_MAX - 1) * CHUNK_TOKENS
        answered += zip(asked, answers, strict=True)
    check(server, answered)


def test_several_answers_and_logprobs_of_a_prompt_that_comes_back(server: SGLangServer) -> None:
    rng = random.Random(2)
    for start in (0, 150):
        prompt, other = stored(server, rng, 2, 300)
        ask: dict[str, Any] = {**ASK, "return_logprob": True, "logprob_start_len": start}
        got, want = server.generate(prompt, 4, **ask), uncached(server, prompt, 4, **ask)
        assert from_tiers(got) == start
        assert not differing([got], [want], rounding(MODEL))
        # The furthest of hundreds of tokens is further away than they are in the mean.
        limit = 1e-3 if EXACT else 4 * rounding(MODEL)
        names = ["input_token_logprobs"]
        if got["output_ids"] == want["output_ids"]:
            names.append("output_token_logprobs")
        for name in names:
            mine, others = got["meta_info"][name], want["meta_info"][name]
            assert [entry[1] for entry in mine] == [entry[1] for entry in others]
            assert [entry[0] for entry in mine[1:]] == pytest.approx(
                [entry[0] for entry in others[1:]], abs=limit
            )
        params = {"temperature": 0.0, "max_new_tokens": 6, "n": 3}
        body = {"input_ids": other, "sampling_params": params, **ASK}
        several = server.request("POST", "/generate", json=body).json()
        assert [len(answer["output_ids"]) for answer in several] == [6] * 3
        check(server, [(other, answer) for answer in several])


def test_what_is_refused_pushed_out_and_waits_too_long(server: SGLangServer) -> None:
    rng = random.Random(3)
    prompts = stored(server, rng, RUNNING_MAX + QUEUED_MAX + 4, 60)
    with ThreadPoolExecutor(len(prompts) + 1) as pool:
        # For as long as the others take to come, however slow the machine is.
        running = [Request(pool, server, prompt, 350, priority=5) for prompt in prompts[:RUNNING_MAX]]
        for each in running:
            each.begun.wait()
        waiting = [Request(pool, server, prompt, 4, priority=0) for prompt in prompts[RUNNING_MAX:]]
        wait_for_end(waiting, "queue is full")
        waiting.append(Request(pool, server, prompts[0], 4, priority=3))
        wait_for_end(waiting, "higher priority")
        server.request("POST", "/pause_generation", json={"mode": "in_place"})
        wait_for_end(waiting, "waiting timeout")
        server.request("POST", "/continue_generation", json={})
        assert {each.end for each in running} == {"length"}
        check_requests(server, running + waiting)
    check(server, [(prompt, server.generate(prompt, 4, **ASK)) for prompt in prompts[-3:]])


def wait_for_end(requests: list[Request], why: str) -> None:
    """Until one of them has ended for that reason."""
    while not any(why in each.end for each in requests if each.future.done()):
        left = [each.future for each in requests if not each.future.done()]
        assert left, [each.end for each in requests]
        wait(left, return_when=FIRST_COMPLETED)


def test_requests_that_are_preempted(server: SGLangServer) -> None:
    rng = random.Random(4)
    num_preempted = num_from_tiers = 0
    for _ in range(5):  # where the first have ended before the others come, nobody is in the way
        prompts = stored(server, rng, QUEUED_MAX, 150)
        with ThreadPoolExecutor(len(prompts)) as pool:
            low = [Request(pool, server, prompt, 150, priority=0) for prompt in prompts[:RUNNING_MAX]]
            for each in low:
                each.begun.wait()
            high = [Request(pool, server, prompt, 20, priority=100) for prompt in prompts[RUNNING_MAX:]]
            assert {each.end for each in low + high} == {"length"}
        check_requests(server, low + high)
        num_preempted += sum(each.future.result()["meta_info"]["num_retractions"] for each in low)
        num_from_tiers += sum(from_tiers(each.future.result()) for each in low + high)
        if num_preempted:
            break
    assert num_preempted > 0
    assert num_from_tiers > 0


@pytest.mark.parametrize("how", ["all aborted", "abort", "retract", "in_place"])
def test_everything_is_given_up_or_paused(server: SGLangServer, how: str) -> None:
    """While some requests run, others load or wait."""
    rng = random.Random(how)  # what is stored is new
    ends = how in ("all aborted", "abort")
    given_up: list[Request] = []
    for _ in range(8):
        prompts = stored(server, rng, QUEUED_MAX - 1, 150)
        with ThreadPoolExecutor(len(prompts)) as pool:
            requests = [Request(pool, server, prompt, 60) for prompt in prompts]
            requests[0].begun.wait()
            if how == "all aborted":
                server.abort(abort_all=True)
            else:
                server.request("POST", "/pause_generation", json={"mode": how})
                server.request("POST", "/continue_generation", json={})
            given_up += [each for each in requests if each.end != "length"]
        assert ends or not given_up
        check_requests(server, requests)
        check(server, [(prompt, server.generate(prompt, 4, **ASK)) for prompt in prompts[:2]])
        if given_up or not ends:  # on a fast machine all may have ended before
            break
    assert bool(given_up) == ends


def test_engines_in_one_process_and_a_signal_to_their_group(tmp_path: Path) -> None:
    """The second is warm from the first request on, and what the group leaves behind is whole."""
    ssd = tmp_path / "ssd"
    ssd.mkdir()
    config = tmp_path / "flexkv.yaml"
    config.write_text(f"cpu_cache_gb: 0.005\nssd_cache_gb: 0.5\nssd_cache_dir: {ssd}\nload_policy: load\n")
    rng = random.Random(6)
    prompts = [some_tokens(rng, 300) for _ in range(8)]
    job: dict[str, Any] = {
        "arguments": {
            "model_path": str(MODEL),
            "enable_flexkv": True,
            "flexkv_config_file": str(config),
            "max_total_tokens": POOL_TOKENS,
            "dtype": DTYPE,
            "random_seed": 1,
            "log_level": "info",
            "sleep_on_idle": True,
        },
        "prompts": prompts,
        "sampling_params": {"temperature": 0.0, "max_new_tokens": 6},
        "ask": ASK,
        "directory": str(ssd),
        "blocks": len(prompts) * (300 // 16),
    }
    if ON_CPU:
        job["arguments"]["device"] = "cpu"
    (tmp_path / "job.json").write_text(json.dumps(job))
    reading, writing = os.pipe()
    with (tmp_path / "job.json").open() as stdin, (tmp_path / "engines.log").open("wb") as log:
        program = ROOT / "tests" / "support" / "engines.py"
        process = start_python(program, [], (stdin.fileno(), writing, log.fileno()))
    os.close(writing)
    try:
        lines = (line for line in os.fdopen(reading) if line.startswith("answers "))
        cold, warm = (json.loads(next(lines).removeprefix("answers ")) for _ in range(2))
        next(lines)  # one round of what goes on
        tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        os.killpg(process.pid, signal.SIGINT)
        process.wait()
        assert not wait_until_ended(tree, 30.0)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert [answer["meta_info"]["cached_tokens"] for answer in cold] == [0] * len(prompts)
    details = [answer["meta_info"]["cached_tokens_details"] for answer in warm]
    assert [each["storage"] for each in details] == [288] * len(prompts)
    assert not differing(warm, cold, rounding(MODEL))
    (files,) = ssd_tools.find([ssd])
    assert ssd_tools.owner(files) is None
    verified = ssd_tools.verify(files, lambda _done, _total: None)
    assert verified.num_blocks > 0
    assert not verified.bad_slots
