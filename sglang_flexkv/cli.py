"""The command ``sglang-flexkv``: shows whether ``--enable-flexkv`` works here, installs the monkey-patch,
looks after the SSD tier's files and remote stores, and replays traces (``cli_replay``).

Prints and asks only; what is looked at and written is in ``integration`` and ``storage``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.filesize import decimal
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from sglang_flexkv import cli_replay
from sglang_flexkv.cli_output import complain, console, errors, say, show
from sglang_flexkv.integration import diagnosis, startup
from sglang_flexkv.integration.diagnosis import Finding, Level

if TYPE_CHECKING:
    from sglang_flexkv.storage.ssd_tools import Inspection, Verification

_STYLES = {Level.OK: "green", Level.NOTE: "yellow", Level.PROBLEM: "red"}

app = typer.Typer(
    help="Checks and sets up sglang-flexkv for the SGLang of this environment.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
ssd_app = typer.Typer(help="Looks after the files of the SSD tier, without a server.", no_args_is_help=True)
app.add_typer(ssd_app, name="ssd")
remote_app = typer.Typer(help="Looks after remote stores, without a server.", no_args_is_help=True)
app.add_typer(remote_app, name="remote")
for _command in (cli_replay.replay, cli_replay.plan, cli_replay.generate_trace):
    app.command()(_command)

# Whether a path can be used is said by us, in one line: readable=False keeps typer from saying it.
_Directories = Annotated[
    list[Path], typer.Argument(metavar="DIR...", help="Directories of ssd_cache_dir.", readable=False)
]


def main() -> None:
    if isinstance(sys.stdout, TextIOWrapper):  # of a locale that lacks a character: an odd line, not an error
        sys.stdout.reconfigure(errors="backslashreplace")
    app()


@app.command()
def status() -> None:
    """Show whether --enable-flexkv works here, and what to do if not (exit code 1)."""
    with errors():
        findings = [*diagnosis.prerequisites(), *diagnosis.ways_in()]
    _print_table(findings)
    for finding in findings:
        if finding.level is not Level.OK:
            say(f"[{_STYLES[finding.level]}]{escape(_in_words(finding))}[/]")
    if _problems(findings):
        say("[red]--enable-flexkv does not work here yet.[/red]")
        raise typer.Exit(1)
    say("[green]--enable-flexkv works here.[/green]")


@app.command()
def install(
    force: Annotated[bool, typer.Option("--force", help="Even if the entry point works already.")] = False,
) -> None:
    """Install the monkey-patch, where SGLang cannot see the package's entry point."""
    problems = _problems(diagnosis.prerequisites())
    if problems:
        for problem in problems:
            complain(_in_words(problem))
        complain("Nothing was installed.")
        raise typer.Exit(1)
    directory = startup.site_packages()
    reason = diagnosis.why_no_entry_point()
    with errors():
        present = startup.state(directory) is startup.PatchState.CURRENT
    if reason is None and not force and not present:
        say("SGLang sees the entry point of sglang-flexkv: nothing needs to be installed.")
        return
    with errors():
        written = startup.install(directory)
    if not written:
        say("The monkey-patch is installed already.")
        return
    for path in written:
        say(f"wrote {path}")
    say(f"The monkey-patch is in effect for every process of {directory}.")


@app.command()
def uninstall() -> None:
    """Remove what install wrote."""
    with errors():
        removed = startup.uninstall(startup.site_packages())
    for path in removed:
        say(f"removed {path}")
    if not removed:
        say("The monkey-patch is not installed.")


@ssd_app.command("inspect")
def ssd_inspect(directories: _Directories) -> None:
    """Show what the files hold, also while a server uses them."""
    with errors():
        from sglang_flexkv.storage import ssd_tools

        unreadable = False
        for files in ssd_tools.find(directories):
            try:
                _print_inspection(ssd_tools.inspect(files))
            except ssd_tools.SsdFilesError as error:
                complain(str(error))
                unreadable = True
        if unreadable:
            raise typer.Exit(1)


@ssd_app.command("verify")
def ssd_verify(directories: _Directories) -> None:
    """Read every block and compare it with its checksums (exit code 1 if one differs)."""
    with errors():
        from sglang_flexkv.storage import ssd_tools

        wrong = False
        for files in ssd_tools.find(directories):
            try:
                with _progress(str(files.slots)) as progress:
                    result = ssd_tools.verify(files, progress)
            except ssd_tools.SsdFilesError as error:
                complain(str(error))
                wrong = True
                continue
            _print_verification(result)
            wrong = wrong or bool(result.bad_slots)
        if wrong:
            raise typer.Exit(1)


@ssd_app.command("clear")
def ssd_clear(
    directories: _Directories,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove the files. What they hold is lost; a server computes it again."""
    with errors():
        from sglang_flexkv.storage import ssd_tools

        found = ssd_tools.remains(directories)
        in_use = [each for each in found if each.owner]
        for each in in_use:
            complain(f"{each.files.slots} is in use by process {each.owner}")
        if in_use:
            complain("Nothing was removed: stop the server first.")
            raise typer.Exit(1)
        if not found:
            say("nothing to remove")
            return
        for each in found:
            for path in each.paths:
                say(escape(str(path)))
        if not yes:
            size = _gib(sum(each.disk_bytes for each in found))
            typer.confirm(f"Remove these files ({size})?", abort=True)
        say(f"[green]removed, {_gib(ssd_tools.clear(found))} freed[/green]")


@remote_app.command("check")
def remote_check(
    url: Annotated[
        str, typer.Argument(metavar="[URL]", help="As the setting remote; without it, that setting's own.")
    ] = "",
    config_file: Annotated[
        str, typer.Option("--flexkv-config-file", help="Where the setting is, if it is not FLEXKV_REMOTE.")
    ] = "",
) -> None:
    """Try a store: reach it, store, look up, load, compare (exit code 1 if a server could not use it)."""
    with errors():
        from sglang_flexkv.common.config import FlexKVConfig
        from sglang_flexkv.common.errors import ConfigError
        from sglang_flexkv.common.remote_url import parse_remote_url
        from sglang_flexkv.storage.remote.check import check

        try:
            named = parse_remote_url(url) if url else FlexKVConfig.load(config_file or None).remote
        except ValueError as error:
            raise ConfigError(str(error) if not url else f"URL {error}") from None
        if named is None:
            raise ConfigError("no store is named: give its URL, or set FLEXKV_REMOTE")
        if url and named.has_credentials:
            raise ConfigError(
                "a URL with credentials can be read by every user of this machine while the command runs; "
                "set FLEXKV_REMOTE to it and leave the argument out"
            )
        found = check(named)
        say(f"[bold]{escape(found.store)}[/bold]")
        for note in found.notes:
            say(f"  {escape(note)}")
        if found.get_mb_s:
            speeds = f"stores {found.put_mb_s:.0f} MB/s, loads {found.get_mb_s:.0f} MB/s"
            say(f"  {speeds} (one thread, values of 2 MiB)")
        if found.look_up_s:
            absent = f"to a prompt of 2,048 blocks that it lacks in {found.look_up_s * 1e3:.2f} ms"
            say(f"  answers in {found.round_trip_s * 1e3:.2f} ms; {absent}")
        if found.compression:
            say(f"  {escape(found.compression)}")
        if found.problem:
            say(f"[red]{escape(found.problem)}[/red]")
            raise typer.Exit(1)
        say("[green]A server can use it.[/green]")


def _print_inspection(i: Inspection) -> None:
    rows = [
        ("contents", i.label or "(no label)"),
        ("format", f"version {i.format_version}, namespace {i.namespace.hex()[:12]}"),
        ("slots", f"{i.num_slots} of {decimal(i.slot_bytes)}; the file has {_gib(i.file_bytes)}"),
        ("live", f"{i.live_blocks} blocks, {_gib(i.live_bytes)}"),
        (
            "journal",
            f"{decimal(i.journal_bytes)}, {i.journal_records} records, {i.damaged_bytes} bytes damaged",
        ),
        (
            "at restart",
            f"given up: {i.given_up_because}" if i.given_up_because else "kept, for the same model",
        ),
        ("in use", f"by process {i.owner}" if i.owner else "no"),
    ]
    say(f"[bold]{escape(str(i.files.slots))}[/bold]")
    for name, text in rows:
        say(f"  {name:<11}{escape(text)}")
    if i.identity is None:
        say("  identity   not recorded")
        return
    say("  identity")
    for name, text in sorted({**i.identity.settings, **i.identity.pool}.items()):
        say(f"    {escape(name)}: {escape(text)}")
    for name in sorted(i.identity.unclassified):
        say(f"    {escape(name)}: (set; whether it changes KV is not known)")


def _print_verification(result: Verification) -> None:
    bad = len(result.bad_slots)
    style = "red" if bad else "green"
    say(
        f"{escape(str(result.files.slots))}: {result.num_blocks} blocks, {_gib(result.num_bytes)} read, "
        f"[{style}]{bad} bad[/]"
    )
    if bad:
        say(f"  bad slots: {', '.join(map(str, result.bad_slots))}")
    if result.damaged_bytes:
        say(f"  [yellow]{result.damaged_bytes} damaged bytes of the journal: their blocks are lost[/yellow]")


@contextmanager
def _progress(name: str) -> Iterator[Callable[[int, int], None]]:
    """A bar that goes away when it is done, where there is a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(escape(name), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def _problems(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.level is Level.PROBLEM]


def _print_table(findings: list[Finding]) -> None:
    table = Table(show_header=False, box=None)
    for what, level, found, _ in findings:
        table.add_row(f"[{_STYLES[level]}]{level.value}[/]", what, escape(found))
    show(table)


def _in_words(finding: Finding) -> str:
    return f"{finding.what}: {finding.found}. To do: {finding.remedy}"


if __name__ == "__main__":  # from a source checkout, where there is no script
    main()
