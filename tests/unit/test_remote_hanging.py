"""A mount that hangs for ever: who starts beside it starts, who uses it goes on, who stops has stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hanging_mount import HangingMount
from store_suite import *  # noqa: F403

from sglang_flexkv.common.lower_tier import AwayError
from sglang_flexkv.common.patience import Patience
from sglang_flexkv.common.remote_url import parse_remote_url
from sglang_flexkv.storage.remote import tier as remote_tier
from sglang_flexkv.storage.remote.directory import DirectoryStore
from sglang_flexkv.storage.remote.tier import RemoteTier

PATIENCE_S = 120.0


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[HangingMount]:
    made = HangingMount(tmp_path)
    yield made
    made.stop()


@pytest.fixture
def store(mount: HangingMount) -> Iterator[DirectoryStore]:
    made = DirectoryStore(parse_remote_url(mount.url), 5.0)
    made.open()
    yield made
    made.close()


# A process with a cache on a mount, which hangs from when it says so; it ends as any does.
PROCESS = """
import sys
import numpy as np, torch
from sglang_flexkv import CacheConfig, KVCacheLayout, KVCacheLayoutType, kvtask
from sglang_flexkv.common.block import SequenceMeta, make_namespace
from sglang_flexkv.kvtask import KVTaskEngine, TaskStatus

kvtask._CLOSE_FLUSH_S = kvtask._CLOSE_WAIT_S = 1.0
BLOCKS, PATIENCE_S = 4, 60.0
namespace = make_namespace({"test": "hanging"})

def engine():
    layout = KVCacheLayout(KVCacheLayoutType.LAYERWISE, 1, BLOCKS, 16, 1, 64)
    config = CacheConfig(
        tokens_per_block=16, num_cpu_blocks=BLOCKS, remote=sys.argv[1], remote_timeout_s=0.2
    )
    return KVTaskEngine(config, layout.device_buffers(torch.zeros(layout.kv_shape)), namespace=namespace)

def keys(number):
    return SequenceMeta(np.arange(BLOCKS * 16) + 1000 * number, 16, namespace).block_keys

def launch(cache, task):
    cache.launch(task, np.arange(BLOCKS * 16))
    return task

def put(cache, number):
    task = launch(cache, cache.create_put(None, keys(number)))
    assert cache.wait([task], PATIENCE_S) and task.status is TaskStatus.COMPLETED, task.error

first = engine()
for number in range(2):  # the second takes the place of the first in memory
    put(first, number)
    assert first.flush_spills(PATIENCE_S)
print("stored", flush=True)
sys.stdin.readline()
if sys.argv[2] == "loads":
    get = launch(first, first.create_get(keys(0)))
    assert not first.wait([get], 0.5)
elif sys.argv[2] == "stores":
    put(first, 2)
    assert not first.flush_spills(0.5)
else:
    assert first.ask(keys(3)) is not None
# Who starts now starts without it.
second = engine()
put(second, 0)
get = launch(second, second.create_get(keys(0)))
assert second.wait([get], PATIENCE_S) and get.status is TaskStatus.COMPLETED, get.error
second.close()
first.close()
print("closed", flush=True)
"""


@pytest.mark.parametrize("what", ["loads", "stores", "looks up"])
def test_who_stops_while_a_mount_hangs_has_stopped(mount: HangingMount, what: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PROCESS, mount.url, what],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "stored\n", process.communicate()[1]
        mount.send(signal.SIGSTOP)
        out, err = process.communicate("go on\n", PATIENCE_S)
        assert (out, process.returncode) == ("closed\n", 0), err
        assert "does not answer" in err
    finally:
        process.kill()
        mount.send(signal.SIGCONT)


def test_a_store_that_hangs_when_it_is_opened_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One whose names are answered and whose bytes are not, or a client without a time limit."""
    goes_on = threading.Event()
    monkeypatch.setattr(remote_tier, "_OPEN_S", 0.1)
    tier = RemoteTier(parse_remote_url(f"file://{tmp_path}?max_gb=1"), 8, namespace=bytes(16))
    read = os.preadv

    def hang(*arguments: object) -> int:
        goes_on.wait(PATIENCE_S)
        return read(*arguments)  # type: ignore[arg-type]

    tier.clear(keep=True, flush=bytes(range(16)))
    tier.open()
    tier.close()  # it has left a generation to read
    tier = RemoteTier(parse_remote_url(f"file://{tmp_path}?max_gb=1"), 8, namespace=bytes(16))
    monkeypatch.setattr(os, "preadv", hang)
    threads = threading.active_count()
    for _ in range(2):
        with pytest.raises(AwayError, match="does not answer"):
            tier.open()
    assert threading.active_count() == threads + 1  # only one waits for it
    goes_on.set()
    tier._opening.wait()
    monkeypatch.setattr(remote_tier, "_OPEN_S", PATIENCE_S)
    tier.open()
    tier.close()


def test_what_comes_when_nobody_waits_is_undone() -> None:
    goes_on, undone = threading.Event(), threading.Event()
    patience = Patience()
    assert not patience.call(lambda: goes_on.wait(PATIENCE_S), 0.0, undone.set)
    goes_on.set()
    patience.wait()
    assert undone.is_set()
    assert patience.call(lambda: None, PATIENCE_S, undone.clear)
    assert undone.is_set()

    def fail() -> None:
        raise OSError("no")

    with pytest.raises(OSError, match="no"):
        patience.call(fail, PATIENCE_S)
