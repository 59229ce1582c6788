"""How the commands speak: one console, lines that no narrow terminal cuts, errors without a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.markup import escape

from sglang_flexkv.common.errors import FlexKVError
from sglang_flexkv.common.paths import reason

console = Console(highlight=False)


def say(text: str) -> None:
    # Names of files may be bytes that are no text.
    console.print(text.encode(errors="backslashreplace").decode(), soft_wrap=True)


@contextmanager
def errors() -> Iterator[None]:
    """Errors that were raised on purpose end the command with one line."""
    try:
        yield
    except FlexKVError as error:
        say(f"[red]{escape(str(error))}[/red]")
        raise typer.Exit(1) from None
    except ImportError as error:
        say(f"[red]{escape(str(error))}[/red]; 'sglang-flexkv status' says what is wrong")
        raise typer.Exit(1) from None
    except BrokenPipeError:  # whoever read our output has gone
        raise
    except OSError as error:
        say(f"[red]{escape(f'{error.filename}: {reason(error)}')}[/red]")
        raise typer.Exit(1) from None
