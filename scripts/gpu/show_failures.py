"""A plug-in of pytest that prints at once why a test failed: who is cut off never gets to a summary."""

from __future__ import annotations

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        print(f"\n##### {report.nodeid} ({report.when})\n{report.longreprtext[-6000:]}", flush=True)
