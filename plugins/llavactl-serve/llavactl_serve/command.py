"""The command ``llavactl serve``."""

from __future__ import annotations

import json
import logging
import re
import secrets
from pathlib import Path
from typing import Any

import click

from llavactl import Command

log = logging.getLogger("llavactl.serve")

TOKEN_VARIABLE = "LLAVACTL_SERVE_TOKEN"  # noqa: S105 - its name

_TOKEN = re.compile(r"[!-~]+")
_ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://[^/\s]+", re.IGNORECASE)


def _checked(pattern: re.Pattern[str], expected: str) -> Any:
    """A callback that checks the values of an option."""

    def check(_context: click.Context, _option: click.Parameter, value: Any) -> Any:
        for each in value if isinstance(value, tuple) else [value]:
            if each and not pattern.fullmatch(each):
                raise click.BadParameter(f"expected {expected}")
        return value

    return check


@click.command(
    cls=Command,
    examples=[
        "llavactl serve -r recipe.yaml",
        "llavactl serve --model llava-hf/llava-1.5-7b-hf --port 8080",
        "llavactl serve --model runs/demo --host 0.0.0.0 --max-batch 16",
    ],
)
@click.option("-r", "--recipe", "source", metavar="NAME|PATH", help="Use this recipe.  [default: ./recipe.yaml]")
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
@click.option("--name", metavar="NAME", help="Name of the model in requests.  [default: as given, or its folder]")
@click.option("--host", default="127.0.0.1", show_default=True, metavar="HOST", help="Listen on this address.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    metavar="N",
    help="Listen on this port; 0: any free port.",
)
@click.option(
    "--token",
    envvar=TOKEN_VARIABLE,
    metavar="TOKEN",
    callback=_checked(_TOKEN, "printable ASCII characters without spaces"),
    help=f"Require this bearer token. Other users can see arguments: prefer the variable {TOKEN_VARIABLE}.  "
    "[default: none on loopback, otherwise a random token]",
)
@click.option(
    "--max-batch",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    metavar="N",
    help="Generate at most N answers at once.",
)
@click.option(
    "--max-queue",
    type=click.IntRange(min=0),
    default=32,
    show_default=True,
    metavar="N",
    help="Queue at most N more requests, and refuse others.",
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    default=512,
    show_default=True,
    metavar="N",
    help="Generate at most N tokens if a request sets no limit.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=600.0,
    show_default=True,
    metavar="SECONDS",
    help="Cancel a request after this time, including waiting.",
)
@click.option(
    "--max-body",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
    metavar="MIB",
    help="Refuse requests with a larger body.",
)
@click.option("--allow-urls", is_flag=True, help="Download images from http(s) URLs in requests.")
@click.option(
    "--cors",
    multiple=True,
    metavar="ORIGIN",
    callback=_checked(_ORIGIN, "an origin (http://localhost:3000) or *"),
    help="Let web pages of this origin use the endpoint (repeatable).",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document: url, model and generated token.")
def command(
    source: str | None,
    overrides: tuple[str, ...],
    model: str | None,
    template: str | None,
    name: str | None,
    host: str,
    port: int,
    token: str | None,
    max_batch: int,
    max_queue: int,
    max_new_tokens: int,
    timeout: float,
    max_body: int,
    allow_urls: bool,
    cors: tuple[str, ...],
    as_json: bool,
) -> None:
    """Serve a model through an OpenAI-compatible endpoint.

    The URL is printed when the server is ready. New requests join the running batch. By default, only programs on this
    machine can connect; with another --host, every request needs a token.
    """
    from llavactl import Batcher, load_chat_model

    from .server import bound, is_loopback, run, url_of
    from .service import Service, Settings

    sock = bound(host, port)  # before the model is loaded
    try:
        new_token = None if token or is_loopback(sock) else secrets.token_urlsafe(32)
        assistant = load_chat_model(source, overrides, model=model, template=template)
        settings = Settings(
            name or model or _relative(assistant.name),
            token=token or new_token,
            cors=cors,
            max_queue=max_queue,
            max_body_bytes=max_body << 20,
            max_new_tokens=max_new_tokens,
            timeout_s=timeout,
            allow_urls=allow_urls,
            local=is_loopback(sock),
        )
        batcher = Batcher(assistant, max_batch)
        try:
            if batcher.max_batch < max_batch:
                log.warning("requests are answered one after another: batches would change this model's answers")
            sock.listen()  # a client may connect as soon as it knows the URL
            _announce(url_of(host, sock), settings.model, new_token, as_json)
            run(Service(batcher, settings), sock)
        finally:
            batcher.close()
    finally:
        sock.close()


def _relative(folder: str) -> str:
    """``folder`` relative to the working directory, if it is inside."""
    path, here = Path(folder).absolute(), Path.cwd()
    return path.relative_to(here).as_posix() if path.is_relative_to(here) else folder


def _announce(url: str, model: str, new_token: str | None, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"url": url, "model": model, "token": new_token}))
        return
    click.echo(url)
    if new_token is not None:
        click.echo(f"token: {new_token}")
    log.info("serving %s; press Ctrl-C to stop", model)
