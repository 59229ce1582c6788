"""The command ``sglang-flexkv``: shows whether ``--enable-flexkv`` works here, and installs the monkey-patch.

Prints and asks only; what is looked at and written is in ``integration``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sglang_flexkv.common.errors import FlexKVError
from sglang_flexkv.integration import diagnosis, startup
from sglang_flexkv.integration.diagnosis import Finding, Level

_STYLES = {Level.OK: "green", Level.NOTE: "yellow", Level.PROBLEM: "red"}

app = typer.Typer(
    help="Checks and sets up sglang-flexkv for the SGLang of this environment.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console(highlight=False)


def main() -> None:
    app()


@app.command()
def status() -> None:
    """Show whether --enable-flexkv works here, and what to do if not (exit code 1)."""
    findings = [*diagnosis.prerequisites(), *diagnosis.ways_in()]
    _print_table(findings)
    problems = _problems(findings)
    _print_problems(problems)
    if problems:
        _say("[red]--enable-flexkv does not work here yet.[/red]")
        raise typer.Exit(1)
    _say("[green]--enable-flexkv works here.[/green]")


@app.command()
def install(
    force: Annotated[bool, typer.Option("--force", help="Even if the entry point works already.")] = False,
) -> None:
    """Install the monkey-patch, where SGLang cannot see the package's entry point."""
    problems = _problems(diagnosis.prerequisites())
    if problems:
        _print_problems(problems)
        _say("[red]Nothing was installed.[/red]")
        raise typer.Exit(1)
    directory = startup.site_packages()
    reason = diagnosis.why_no_entry_point()
    present = startup.state(directory) is startup.PatchState.CURRENT
    if reason is None and not force and not present:
        _say("SGLang sees the entry point of sglang-flexkv: nothing needs to be installed.")
        return
    written = _or_exit(startup.install, directory)
    if not written:
        _say("The monkey-patch is installed already.")
        return
    for path in written:
        _say(f"wrote {path}")
    _say(f"The monkey-patch is in effect for every process of {directory}.")


@app.command()
def uninstall() -> None:
    """Remove what install wrote."""
    removed = _or_exit(startup.uninstall, startup.site_packages())
    for path in removed:
        _say(f"removed {path}")
    if not removed:
        _say("The monkey-patch is not installed.")


def _problems(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.level is Level.PROBLEM]


def _print_table(findings: list[Finding]) -> None:
    table = Table("", "", show_edge=False)
    table.add_column("found", overflow="fold")  # paths are one long word
    table.add_column("what to do", overflow="fold")
    for what, level, found, remedy in findings:
        table.add_row(f"[{_STYLES[level]}]{level.value}[/]", what, escape(found), escape(remedy))
    console.print(table)


def _print_problems(problems: list[Finding]) -> None:
    """One line each, which a narrow terminal or a log does not cut as it cuts the table."""
    for what, _, found, remedy in problems:
        _say(f"[red]{what}:[/red] {escape(found)}. To do: {escape(remedy)}")


def _say(text: str) -> None:
    console.print(text, soft_wrap=True)


def _or_exit(action: Callable[[Path], list[Path]], directory: Path) -> list[Path]:
    try:
        return action(directory)
    except FlexKVError as error:
        _say(f"[red]{escape(str(error))}[/red]")
        raise typer.Exit(1) from None


if __name__ == "__main__":  # from a source checkout, where there is no script
    main()
