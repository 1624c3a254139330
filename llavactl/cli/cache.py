"""``llavactl cache``: inspect, verify, prune, export and import the feature stores."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from llavactl.cli import completion, output
from llavactl.cli.help import Group
from llavactl.cli.options import json_option, load_vision, load_vision_if_given, recipe_options_or
from llavactl.cli.prompts import confirm
from llavactl.core.errors import StoreError

if TYPE_CHECKING:
    from llavactl.recipe.frame import VisionRecipe
    from llavactl.verbs.cache import PruneReport, VerifyReport


log = logging.getLogger(__name__)


@click.group(
    cls=Group,
    examples=[
        "llavactl cache info",
        "llavactl cache prune --dry-run",
        "llavactl cache export -r recipe.yaml --to pack",
    ],
)
def command() -> None:
    """Inspect, verify, prune and share the feature stores.

    Runs share the feature stores. Without -r the commands apply to all stores, with -r to those of one recipe.
    """


@command.command(
    examples=[
        "llavactl cache info",
        "llavactl cache info -r llava-v1.5-7b",
    ]
)
@recipe_options_or("all stores")
@json_option
def info(source: str | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """List the feature stores: fingerprint, number of images, size."""
    from llavactl.verbs.cache import info

    output.report(info(load_vision_if_given(source, overrides)), as_json)


@command.command(
    examples=[
        "llavactl cache verify",
        "llavactl cache verify -r recipe.yaml --recompute 100",
    ]
)
@recipe_options_or("all stores")
@click.option(
    "--recompute",
    type=click.IntRange(min=1),
    metavar="N",
    help="Also encode N images of each store again and compare the features to the bit.",
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Random seed of the choice of N images."
)
@json_option
def verify(source: str | None, overrides: tuple[str, ...], recompute: int | None, seed: int, as_json: bool) -> None:
    """Verify the checksum of every shard.

    Set damaged shards aside. Exit with 1 if shards are damaged or can't be read, or if recomputed features are
    different. Differences of rounding between devices or versions are reported, but not an error.
    """
    if recompute is None and click.get_current_context().get_parameter_source("seed") is ParameterSource.COMMANDLINE:
        raise click.UsageError("--seed needs --recompute")
    from llavactl.verbs.cache import verify

    report = verify(load_vision_if_given(source, overrides), recompute=recompute or 0, seed=seed)
    output.report(report, as_json)
    if error := _verify_error(report) or _recompute_error(report):
        raise error


def _recompute_error(report: VerifyReport) -> StoreError | None:
    if different := [store for store in report.recomputed if store.verdict == "different"]:
        first = different[0]
        return StoreError(
            f"store {first.store}: {first.different} of {first.compared} images have other features now",
            hint="the report has the conditions of both encodings; if they are the same, the features are wrong: "
            "remove the store's folder and run `llavactl extract`",
        )
    if none := [store for store in report.recomputed if store.verdict == "none" and store.reason]:
        return StoreError(
            f"store {none[0].store}: nothing was compared: {none[0].reason}",
            hint="pass the recipe of these images with -r",
        )
    return None


def _verify_error(report: VerifyReport) -> StoreError | None:
    damaged = f"{len(report.damaged)} damaged shards were set aside" if report.damaged else ""
    if report.unchecked:
        first = report.unchecked[0]
        unreadable = f"{len(report.unchecked)} shards can't be read, the first is {first.file} of {first.store}"
        return StoreError(
            f"{'; '.join(filter(None, (damaged, unreadable)))}: {first.reason}",
            hint="unreadable shards are unchanged: check permissions, disk and mount, then verify again",
        )
    return StoreError(damaged, hint="run `llavactl extract` to recompute their features") if damaged else None


@command.command(
    examples=[
        "llavactl cache prune --dry-run",
        "llavactl cache prune recipe.yaml other.yaml",
    ]
)
@click.argument(
    "recipes", nargs=-1, metavar="[RECIPE]...", shell_complete=completion.names_of("recipes", or_files=True)
)
@recipe_options_or("remove no store")
@click.option("--dry-run", is_flag=True, help="Print what would be removed; remove nothing.")
@click.option("--yes", is_flag=True, help="Remove without confirmation.")
@json_option
def prune(
    recipes: tuple[str, ...], source: str | None, overrides: tuple[str, ...], dry_run: bool, yes: bool, as_json: bool
) -> None:
    """Remove feature stores that no recipe needs, and unused files.

    The recipes are -r and RECIPEs, with the variants in their sections `sweep`. Without a recipe no store is
    removed, only unused files.
    """
    from llavactl.verbs.cache import prune

    main = _with_variants(source, overrides) if source or overrides else []
    kept = [*main, *(each for recipe in recipes for each in _with_variants(recipe, ()))]
    report = prune(*kept, dry_run=True)
    if not dry_run:
        if (report.stores or report.files) and not yes and not _confirmed(report):
            raise StoreError("nothing was removed")
        report = prune(*kept)
    output.report(report, as_json)


_dry_run_option = click.option("--dry-run", is_flag=True, help="Print images and bytes; write nothing.")


@command.command(
    examples=[
        "llavactl cache export -r recipe.yaml --to pack --dry-run",
        'llavactl cache export -r recipe.yaml --to pack --license "CC BY 4.0"',
    ],
    resumes=True,
)
@recipe_options_or("all stores")
@click.option("--to", type=click.Path(path_type=Path), required=True, metavar="DIR", help="Write the pack to DIR.")
@click.option("--license", "license_note", metavar="TEXT", default="", help="License of the features, for README.md.")
@_dry_run_option
@json_option
def export(
    source: str | None, overrides: tuple[str, ...], to: Path, license_note: str, dry_run: bool, as_json: bool
) -> None:
    """Write features as a folder for another machine.

    A feature pack has the shards, the names of the images and checksums: after `cache import`, training needs no
    images. With -r it has the features of this recipe only.
    """
    recipe = load_vision_if_given(source, overrides)
    from llavactl.verbs.cache import export_pack

    report = export_pack(to, recipe, base=_base(source), license_note=license_note, dry_run=dry_run)
    if report.unreadable:
        reasons = ", ".join(f"{count} × {reason}" for reason, count in report.unreadable.items())
        log.warning("%d images can't be read and are not in the pack: %s", sum(report.unreadable.values()), reasons)
    if not report.images:
        log.warning("the pack names no images, so that they are needed where it is used; -r names those of a recipe")
    output.report(report, as_json)


@command.command(
    "import",
    examples=[
        "llavactl cache import pack --dry-run",
        "llavactl cache import pack -r recipe.yaml",
    ],
    resumes=True,
)
@click.argument("pack", metavar="DIR", type=click.Path(path_type=Path))
@recipe_options_or("all stores of the pack")
@_dry_run_option
@json_option
def import_(pack: Path, source: str | None, overrides: tuple[str, ...], dry_run: bool, as_json: bool) -> None:
    """Add the features of a pack to the feature stores.

    Every shard with new features is verified, and nothing is stored twice. Run it in the folder of the recipe, or
    with -r: locations of images are relative to it. With -r only the features of this recipe are added.
    """
    recipe = load_vision_if_given(source, overrides)
    from llavactl.verbs.cache import import_pack

    report = import_pack(pack, recipe, base=_base(source), dry_run=dry_run)
    if report.missing:
        log.warning("the pack has no features for %d of the recipe's stores", len(report.missing))
    output.report(report, as_json)


def _base(source: str | None) -> Path:
    """The folder that paths in the recipe ``source`` are relative to; the working directory without a recipe."""
    from llavactl.recipe.resolve import find

    return find(source).base if source else Path.cwd()


def _with_variants(source: str | None, overrides: tuple[str, ...]) -> list[VisionRecipe]:
    """The recipe and the variants of its section ``sweep``, which have other features."""
    from llavactl.recipe.axes import load_sweep

    recipe = load_vision(source, overrides)
    if recipe.sweep is None or not recipe.sweep.axes:
        return [recipe]
    return [recipe, *(variant.recipe for variant in load_sweep(source, overrides).variants)]


def _confirmed(report: PruneReport) -> bool:
    if not sys.stdin.isatty():
        raise click.UsageError("stdin is not a terminal, so the removal can't be confirmed; pass --yes or --dry-run")
    question = f"Remove {len(report.stores)} stores and {len(report.files)} files, {report.bytes / 1e9:.1f} GB?"
    return confirm(question)
