"""What every test run needs."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import FrameType

import pytest

# Read when torch is imported, here and in all that tests start. Models are small, and several tests run at
# once: more threads would only wait for each other, and take processors to do it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Files that take minutes, the longest first. One that begins at the end of a run is waited for by itself.
LONGEST = ("test_end_to_end.py", "test_operation.py", "test_benchmarks.py")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-stores", action="store_true", help="Real servers over every kind of remote store."
    )
    parser.addoption(
        "--remote-runs",
        type=int,
        default=0,
        help="Seeds of remote stores that do what they like, shared out among their kinds; 0: one each.",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Makes xdist's processes forks of one that has imported SGLang, as are the servers that they start."""
    if not getattr(config.option, "tx", None):  # which the process has that starts the others
        return
    from forked_server import ON_CPU, share_zygote

    if ON_CPU:
        share_zygote()
        program = Path(__file__).parent / "support" / "forked_python.py"
        config.option.tx = [f"popen//python={sys.executable} {program}" for _ in config.option.tx]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Real servers over every kind of remote store take minutes: two kinds are enough in most runs."""
    marks = metafunc.definition.iter_markers("parametrize")
    named = any("kind_of_store" in mark.args[0] for mark in marks)  # which a test may do itself
    if "kind_of_store" in metafunc.fixturenames and not named:
        from remote_services import KINDS

        few = ["directory", "redis"]
        metafunc.parametrize(
            "kind_of_store", list(KINDS) if metafunc.config.getoption("--all-stores") else few
        )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def pytest_sessionstart(session: pytest.Session) -> None:
    """Has SIGTERM end the run as Ctrl-C does: fixtures are torn down, so no server is left behind."""

    def end(signum: int, _frame: FrameType | None) -> None:
        signal.signal(
            signum, signal.SIG_IGN
        )  # once is enough, and what is being torn down must get to its end
        session.shouldstop = "SIGTERM"  # whoever catches what is raised
        raise KeyboardInterrupt("SIGTERM")

    signal.signal(signal.SIGTERM, end)
