"""The command ``llavactl web``."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llavactl import PluginError, data_dir, load_chat_model, load_recipe

if TYPE_CHECKING:
    from llavactl import Assistant

    from .gallery import Gallery
    from .sessions import Model


@click.command()
@click.option("-r", "--recipe", metavar="NAME|PATH", help="Use this recipe.  [default: ./recipe.yaml]")
@click.option(
    "-o",
    "--override",
    "overrides",
    multiple=True,
    metavar="KEY.PATH=VALUE",
    help="Override one value of the recipe (repeatable).",
)
@click.option("--model", metavar="DIR|ID", help="Use this model instead of the recipe's; a recipe is then optional.")
@click.option("--template", metavar="NAME", help="Override the model's conversation template.")
@click.option("--compare", metavar="DIR|ID", help="Answer each question with this model too, side by side.")
@click.option("--blind", is_flag=True, help="Hide the names of compared models, on random sides, until a vote.")
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    metavar="ADDRESS",
    help="Listen on this address. If other machines can reach it, the page requires the token in its URL.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    metavar="N",
    help="Listen on this port; 0: any free port.  [default: the first free port from 7860]",
)
@click.option(
    "--token", metavar="TEXT", help="Require this token.  [default: none on loopback, otherwise a random token]"
)
@click.option(
    "--allow-host",
    "names",
    multiple=True,
    metavar="NAME",
    help="Accept requests for this host name, for example of a reverse proxy (repeatable).",
)
@click.option("--allow-urls", is_flag=True, help="Add a field to download images from URLs with public addresses.")
def command(
    recipe: str | None,
    overrides: tuple[str, ...],
    model: str | None,
    template: str | None,
    compare: str | None,
    blind: bool,
    host: str,
    port: int | None,
    token: str | None,
    names: tuple[str, ...],
    allow_urls: bool,
) -> None:
    """Chat with a model in the browser.

    Prints the URL of the page. Conversations and votes are stored in a private folder of this user.
    """
    if blind and compare is None:
        raise click.UsageError("--blind requires --compare")
    if importlib.util.find_spec("gradio") is None:
        raise PluginError("gradio is not installed", hint="pip install 'llavactl-web[gradio]'")
    from . import server
    from .guard import LOOPBACK

    access = server.access_for(host, token, names)
    loaded = None if model is not None and not (recipe or overrides) else load_recipe(recipe, overrides)
    listening = server.listen(host, port)
    with listening, server.gradio_settings():
        from .sessions import Sessions, Setup
        from .store import Conversations, Votes

        folder = data_dir() / "web"
        setup = Setup(
            _models(functools.partial(load_chat_model, recipe, overrides, template=template), loaded, model, compare),
            Conversations(folder / "conversations"),
            Votes(folder / "votes.jsonl"),
            blind,
            allow_urls,
            allow_files=host in LOOPBACK,
        )
        sessions = Sessions(setup)
        app = server.application(sessions, _gallery(loaded), access)
        click.echo(server.url(listening, host, access.token))
        click.echo("Ctrl-C ends the server.", err=True)
        try:
            server.serve(app, listening)
        finally:
            sessions.end_all()


def _models(load: Callable[..., Assistant], recipe: Any, model: str | None, compare: str | None) -> list[Model]:
    from .sessions import Model

    models = [Model(model or str(recipe.name), load(model=model))]
    if compare is not None:
        name = compare if compare != models[0].name else f"{compare} (2)"
        models.append(Model(name, load(model=compare)))
    return models


def _gallery(recipe: Any) -> Gallery | None:
    from .gallery import Gallery

    return None if recipe is None else Gallery(Path(recipe.run_dir), [task.spec() for task in recipe.eval.tasks])
