"""The files of the SSD tier: who may have a directory, what is reserved, and what is left behind."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_flexkv.common.config import GIB
from sglang_flexkv.common.errors import ConfigError
from sglang_flexkv.storage import ssd_store
from sglang_flexkv.storage.ssd_store import SsdStore, check_free_space

SLOT = 4096
HOLD_THE_LOCK = """
    import sys
    from pathlib import Path
    from sglang_flexkv.storage.ssd_store import SsdStore
    store = SsdStore((Path(sys.argv[1]),), 4, 4096, "rank0")
    print("locked", flush=True)
    sys.stdin.read()
"""


def files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# ---- what a store has ----


def test_space_is_really_reserved(tmp_path: Path) -> None:
    store = SsdStore((tmp_path,), 100, SLOT, "rank0")
    stat = (tmp_path / "flexkv-rank0.slots").stat()
    assert stat.st_size == 100 * SLOT
    assert stat.st_blocks * 512 >= 100 * SLOT  # a sparse file would have next to none
    store.close()


def test_slots_are_divided_between_directories(tmp_path: Path) -> None:
    directories = tuple(tmp_path / name for name in "abc")
    for directory in directories:
        directory.mkdir()
    store = SsdStore(directories, 10, SLOT, "rank0")
    assert [os.fstat(fd).st_size for fd in store.fds] == [4 * SLOT] * 3
    store.close()


def test_close_gives_files_and_lock_back(tmp_path: Path) -> None:
    store = SsdStore((tmp_path,), 4, SLOT, "rank0")
    fds = [*store.fds, *store._locks]
    store.close()
    assert files(tmp_path) == ["flexkv-rank0.lock"]  # unlinking a lock file could split its owners
    for fd in fds:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
    store.close()  # again is nothing
    SsdStore((tmp_path,), 4, SLOT, "rank0").close()


def test_what_a_crash_left_is_used_again(tmp_path: Path) -> None:
    (tmp_path / "flexkv-rank0.slots").write_bytes(b"old" * SLOT)
    (tmp_path / "flexkv-rank0.lock").write_text("4194304\n")
    store = SsdStore((tmp_path,), 4, SLOT, "rank0")
    assert os.fstat(store.fds[0]).st_size == 4 * SLOT
    assert int((tmp_path / "flexkv-rank0.lock").read_text()) == os.getpid()
    store.close()


def test_ranks_share_a_directory(tmp_path: Path) -> None:
    first = SsdStore((tmp_path,), 4, SLOT, "rank0")
    second = SsdStore((tmp_path,), 4, SLOT, "rank1")
    assert len(files(tmp_path)) == 4
    second.close()
    first.close()


# ---- directories that cannot be used ----


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"ssd_cache_dir: .*/nowhere does not exist; create it or name another"
    ):
        SsdStore((tmp_path / "nowhere",), 4, SLOT, "rank0")


def test_a_file_is_not_a_directory(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    with pytest.raises(ConfigError, match=r"ssd_cache_dir: .*/file is not a directory; create it or name"):
        SsdStore((path,), 4, SLOT, "rank0")


def test_directory_that_cannot_be_written(tmp_path: Path) -> None:
    # Permissions do not bind root, but sysfs lets nobody create files.
    directory = Path("/sys/kernel") if os.geteuid() == 0 else tmp_path
    if os.geteuid() != 0:
        directory.chmod(0o500)
    with pytest.raises(ConfigError, match=r"ssd_cache_dir: .* is not writable .*fix its permissions or name"):
        SsdStore((directory,), 4, SLOT, "rank0")


def test_the_same_directory_twice(tmp_path: Path) -> None:
    alias = tmp_path / "alias"
    alias.symlink_to(tmp_path)
    with pytest.raises(ConfigError, match="ssd_cache_dir lists the same directory twice; list each once"):
        SsdStore((tmp_path, alias), 4, SLOT, "rank0")
    assert files(tmp_path) == ["alias"]


@pytest.fixture
def other_server(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A second process that holds the directory."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLD_THE_LOCK), str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.wait()


def test_directory_of_another_server(tmp_path: Path, other_server: subprocess.Popen[str]) -> None:
    slots = tmp_path / "flexkv-rank0.slots"
    before = slots.stat()
    with pytest.raises(ConfigError) as caught:
        SsdStore((tmp_path,), 8, SLOT, "rank0")
    assert f"{tmp_path} is in use by another server (process {other_server.pid})" in str(caught.value)
    assert "give each server a directory of its own" in str(caught.value)
    after = slots.stat()
    assert (after.st_ino, after.st_size) == (before.st_ino, before.st_size), "the owner's file was touched"
    # The lock dies with its owner, however it dies.
    other_server.kill()
    other_server.wait()
    SsdStore((tmp_path,), 8, SLOT, "rank0").close()


def test_a_directory_that_fails_gives_the_others_back(tmp_path: Path) -> None:
    good = tmp_path / "good"
    good.mkdir()
    with pytest.raises(ConfigError, match="nowhere does not exist"):
        SsdStore((good, tmp_path / "nowhere"), 4, SLOT, "rank0")
    assert files(good) == ["flexkv-rank0.lock"]
    SsdStore((good,), 4, SLOT, "rank0").close()


# ---- space ----


def test_more_than_the_disk_has_is_refused_before_it_is_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssd_store.os, "posix_fallocate", lambda *_: pytest.fail("tried to reserve it"))
    stat = os.statvfs(tmp_path)
    too_many = 10 * stat.f_bavail * stat.f_frsize // SLOT
    with pytest.raises(ConfigError, match=r"ssd_cache_gb: .* GiB free and cannot take .* lower ssd_cache_gb"):
        SsdStore((tmp_path,), too_many, SLOT, "rank0")
    assert files(tmp_path) == ["flexkv-rank0.lock"]


def test_a_reservation_that_the_kernel_refuses_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A limit on file sizes refuses like a full disk, in the middle of it, and endangers nobody's disk.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10 * SLOT, hard))
    try:
        with pytest.raises(ConfigError, match=r"ssd_cache_gb: .* lower ssd_cache_gb or free space"):
            SsdStore((tmp_path,), 100, SLOT, "rank0")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files(tmp_path) == ["flexkv-rank0.lock"]
    SsdStore((tmp_path,), 4, SLOT, "rank0").close()


ON_A_SMALL_DISK = """
    mount -t tmpfs -o size={size} tmpfs {directory}
    exec {python} - {directory} <<'PROGRAM'
{program}
PROGRAM
"""


def on_a_small_disk(tmp_path: Path, size: str, program: str) -> str:
    """Runs a program with a tmpfs of its own mounted on ``tmp_path``; returns what it printed."""
    if subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small file system")
    script = ON_A_SMALL_DISK.format(
        size=size, directory=tmp_path, python=sys.executable, program=textwrap.dedent(program)
    )
    done = subprocess.run(
        ["unshare", "-m", "bash", "-ec", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_disk_that_fills_while_it_is_reserved(tmp_path: Path) -> None:
    program = """\
import sys
from pathlib import Path
from sglang_flexkv.common.errors import ConfigError
from sglang_flexkv.storage import ssd_store
directory = Path(sys.argv[1])
ssd_store._free_bytes = lambda _: 2**40  # somebody else takes the space after we asked
try:
    ssd_store.SsdStore((directory,), 1000, 4096, "rank0")
except ConfigError as error:
    print(error)
print(sorted(path.name for path in directory.iterdir()))
(directory / "all").write_bytes(bytes(900 * 1024))  # the space is free again
"""
    out = on_a_small_disk(tmp_path, "1m", program)
    assert "ssd_cache_gb:" in out
    assert "lower ssd_cache_gb or free space" in out
    assert "['flexkv-rank0.lock']" in out


def test_a_disk_without_a_single_free_byte(tmp_path: Path) -> None:
    program = """\
import sys
from pathlib import Path
from sglang_flexkv.common.errors import ConfigError
from sglang_flexkv.storage.ssd_store import SsdStore
directory = Path(sys.argv[1])
(directory / "all").write_bytes(bytes(64 * 1024))
try:
    SsdStore((directory,), 1, 4096, "rank0")
except ConfigError as error:
    print(error)
"""
    assert "ssd_cache_gb:" in on_a_small_disk(tmp_path, "64k", program)


def test_a_read_only_disk(tmp_path: Path) -> None:
    program = """\
import subprocess, sys
from pathlib import Path
from sglang_flexkv.common.errors import ConfigError
from sglang_flexkv.storage.ssd_store import SsdStore
subprocess.run(["mount", "-o", "remount,ro", sys.argv[1]], check=True)
try:
    SsdStore((Path(sys.argv[1]),), 1, 4096, "rank0")
except ConfigError as error:
    print(error)
"""
    out = on_a_small_disk(tmp_path, "64k", program)
    assert "is not writable (Read-only file system); fix its permissions" in out


def test_free_space_is_checked_over_all_directories_of_a_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.mkdir()
    b.mkdir()
    monkeypatch.setattr(ssd_store, "_free_bytes", lambda _: 3 * GIB)
    check_free_space({a: GIB, b: 2 * GIB})
    with pytest.raises(ConfigError, match=r"ssd_cache_gb: .* has 3.00 GiB free and cannot take 4.00 GiB"):
        check_free_space({a: 2 * GIB, b: 2 * GIB})


def test_slots_left_by_a_crash_count_as_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssd_store, "_free_bytes", lambda _: 0)
    with pytest.raises(ConfigError, match="ssd_cache_gb"):
        check_free_space({tmp_path: 100 * SLOT})
    with (tmp_path / "flexkv-dp0-tp0.slots").open("wb") as left:
        os.posix_fallocate(left.fileno(), 0, 100 * SLOT)
    check_free_space({tmp_path: 100 * SLOT})
