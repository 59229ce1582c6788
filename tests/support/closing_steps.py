"""Finds out what a ``close`` consists of, so that each step of it can be made to fail."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from operator import attrgetter
from unittest import mock


class StepFailedError(Exception):
    pass


def steps_of(close: Callable[..., None]) -> list[str]:
    """The steps of a method that ends with ``run_all``, for example ``_transfer.close``.

    Nothing else in the method may fail: it returns early or sets a flag, and runs all steps.
    """
    (method,) = ast.parse(textwrap.dedent(inspect.getsource(close))).body
    assert isinstance(method, ast.FunctionDef)
    calls = [node for node in ast.walk(method) if isinstance(node, ast.Call)]
    (run_all,) = calls
    assert ast.unparse(run_all.func) == "run_all", ast.unparse(run_all)
    return [ast.unparse(step).removeprefix("self.") for step in run_all.args]


@contextmanager
def one_fails(owner: object, steps: list[str], failing: str, *, at_once: bool) -> Iterator[Counter[str]]:
    """One step of ``owner`` fails, before it has done anything or after all. Counts the calls of each."""
    called: Counter[str] = Counter()

    def stand_in(step: str) -> Callable[[], object]:
        original = attrgetter(step)(owner)

        def call() -> object:
            called[step] += 1
            if step == failing and at_once:
                raise StepFailedError(step)
            result = original()
            if step == failing:
                raise StepFailedError(step)
            return result

        return call

    with ExitStack() as stack:
        for step in steps:
            *path, name = step.split(".")
            part = attrgetter(".".join(path))(owner) if path else owner
            stack.enter_context(mock.patch.object(part, name, stand_in(step)))
        yield called
