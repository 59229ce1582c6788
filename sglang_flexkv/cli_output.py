"""How the commands speak: results on stdout, errors on stderr, lines that no narrow terminal cuts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sglang_flexkv.common.errors import FlexKVError
from sglang_flexkv.common.paths import reason

_TABLE_WIDTH_MAX = 1000

console = Console(highlight=False, emoji=False)
_error_console = Console(stderr=True, highlight=False, emoji=False)


def say(text: str) -> None:
    console.print(_printable(text), soft_wrap=True)


def show(table: Table) -> None:
    """Prints a table in full: a terminal breaks the lines that are too long for it, and a figure that is cut
    off would be lost."""
    needed = console.measure(table, options=console.options.update(width=_TABLE_WIDTH_MAX)).maximum
    Console(highlight=False, emoji=False, width=max(console.width, needed)).print(table)


def complain(text: str) -> None:
    """Says what is wrong. The text is plain, without markup."""
    _error_console.print(f"[red]{escape(_printable(text))}[/red]", soft_wrap=True)


def _printable(text: str) -> str:
    """Names of files may be bytes that are no text."""
    return text.encode(errors="backslashreplace").decode()


@contextmanager
def errors() -> Iterator[None]:
    """Errors that were raised on purpose, and those of the machine, end the command with a line on stderr."""
    try:
        yield
    except FlexKVError as error:
        complain(str(error))
    except ImportError as error:
        complain(f"{error}; 'sglang-flexkv status' says what is wrong")
    except MemoryError:
        complain("there is not enough memory for this; give less at once, or run it on a larger machine")
    except BrokenPipeError:  # whoever read our output has gone
        raise
    except OSError as error:
        complain(f"{error.filename or 'the output'}: {reason(error)}")
    else:
        return
    raise typer.Exit(1)
