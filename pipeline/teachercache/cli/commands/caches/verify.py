"""`teachercache verify`: bytes of a cache against its manifest."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from teachercache.cli.options import CacheLocation, Json
from teachercache.console import run_command
from teachercache.progress import ShownProgress

MOST_WINDOWS = 20  # that are named


def verify(
    cache: CacheLocation,
    quick: Annotated[bool, typer.Option("--quick", help="sizes, schemas and counts only: no hashing")] = False,
    deep: Annotated[
        bool, typer.Option("--deep", help="also read every row and check what it says; minutes a GB")
    ] = False,
    workers: Annotated[
        int, typer.Option(min=1, help="hash so many files at a time; with --deep, read rows in so many processes")
    ] = 1,
    repair: Annotated[
        bool,
        typer.Option("--repair", help="first put back a manifest that is lost or damaged, from what else is there"),
    ] = False,
    as_json: Json = False,
) -> None:
    """Check every byte of a cache against its manifest. Exit status 1: it is not whole."""

    def work(console: Console) -> dict[str, Any]:
        from teachercache.cache import verify as check
        from teachercache.cache.quarantined import lost_windows
        from teachercache.cache.storage.source import manifest_of

        if repair:
            from teachercache.cache.repair import repair_manifest

            console.print(repair_manifest(cache), markup=False, soft_wrap=True)
        with ShownProgress(console, "checking") as progress:
            problems = check(cache, quick=quick, deep=deep, workers=workers, progress=progress)
        what = "sizes, schemas and counts" if quick else "every byte and every row" if deep else "every byte"
        errors = [vars(problem) for problem in problems]
        result = {"ok": not problems, "cache": cache, "checked": what, "errors": errors}
        if not problems:
            manifest = manifest_of(cache)
            audit = manifest.audit
            result |= {"quarantined": audit.quarantined, "windows_quarantined": audit.windows_quarantined}
            result["lost_windows"] = lost_windows(cache, manifest, most=MOST_WINDOWS)
        return result

    def show(result: dict[str, Any]) -> Any:
        if result["ok"]:
            return Text.assemble((_found(result["checked"]), "green"), f" {cache}{_lost(result)}")
        lines = [Text.assemble((e["file"], "red"), f": {e['reason']}; {e['remedy']}") for e in result["errors"]]
        return Text("\n").join(lines)

    raise typer.Exit(run_command(work, as_json=as_json, show=show))


def _found(checked: str) -> str:
    """Name for a cache without problems: nobody knows that it is whole who did not hash it."""
    return "whole" if checked.startswith("every byte") else f"no problem in {checked}; bytes were not hashed:"


def _lost(result: dict[str, Any]) -> str:
    """Names windows without targets, of which quarantine/ has all."""
    lost = result["windows_quarantined"]
    if not lost:
        return ""
    lines = [
        f"\n  bytes {each['byte_start']}-{each['byte_end']} of document {each['source_id']}: {each['reason']}"
        for each in result["lost_windows"]
    ]
    return f"; {lost:,} windows of stored rows have no targets: quarantine/ says which, and why" + "".join(lines)
