"""``llavactl cache``: what the feature stores hold; verify and prune them."""

from __future__ import annotations

import sys

import click

from llavactl.cli import output
from llavactl.cli.options import json_option, load_vision, load_vision_if_given, recipe_options_or
from llavactl.core.errors import StoreError


@click.group()
def command() -> None:
    """The feature stores, shared between runs: all of them, or with -r those that one recipe needs."""


@command.command()
@recipe_options_or("every store")
@json_option
def info(source: str | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """What is stored, and for which fingerprint."""
    from llavactl.verbs.cache import info

    output.report(info(load_vision_if_given(source, overrides)), as_json)


@command.command()
@recipe_options_or("every store")
@json_option
def verify(source: str | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Hash every shard again and list those that are damaged or can't be read. Exit 1 if there are any."""
    from llavactl.verbs.cache import verify

    report = verify(load_vision_if_given(source, overrides))
    output.report(report, as_json)
    if report.unchecked:
        first = report.unchecked[0]
        aside = f"{len(report.damaged)} damaged shards were set aside, " if report.damaged else ""
        raise StoreError(
            f"{aside}{len(report.unchecked)} shards can't be read; the first is {first.file} of {first.store}: "
            f"{first.reason}",
            hint="unreadable shards were left as they are: check permissions, disk and mount, then verify again",
        )
    if report.damaged:
        raise StoreError(
            f"{len(report.damaged)} damaged shards were set aside", hint="`llavactl extract` recomputes their features"
        )


@command.command()
@click.argument("needed", nargs=-1, metavar="[RECIPE]...")
@recipe_options_or("no store is removed")
@click.option("--dry-run", is_flag=True, help="Say what would be removed, and remove nothing.")
@click.option("--yes", is_flag=True, help="Don't ask.")
@json_option
def prune(
    needed: tuple[str, ...], source: str | None, overrides: tuple[str, ...], dry_run: bool, yes: bool, as_json: bool
) -> None:
    """Remove the stores that none of the recipes (-r and RECIPEs) needs, and files that nothing reads.

    Without a recipe only such files are removed: features may have taken days.
    """
    from llavactl.verbs.cache import prune

    given = load_vision_if_given(source, overrides)
    recipes = [*([given] if given else []), *(load_vision(each, ()) for each in needed)]
    report = prune(*recipes, dry_run=True)
    if not dry_run:
        removes = f"Remove {len(report.stores)} stores and {len(report.files)} files, {report.bytes / 1e9:.1f} GB?"
        if (report.stores or report.files) and not yes and not _agreed(removes):
            raise StoreError("nothing was removed")
        report = prune(*recipes)
    output.report(report, as_json)


def _agreed(question: str) -> bool:
    if not sys.stdin.isatty():
        raise click.UsageError("there is nobody to ask: pass --yes, or look first with --dry-run")
    return click.confirm(question, err=True)
