"""The command ``llavactl lm-eval``: the program ``lm-eval`` with the model type ``llavactl``.

lm-evaluation-harness up to 0.4.13 finds only its own model types.
"""

from __future__ import annotations

import sys

import click

from llavactl import PluginError

_MODEL_OPTIONS = ("--model", "-M", "--config", "-C")


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def command(arguments: tuple[str, ...]) -> None:
    """Run benchmarks of lm-evaluation-harness on a model.

    Takes the arguments of the program lm-eval, such as --model_args model=runs/demo --tasks mmmu_val. The default of
    --model is llavactl. For their list: llavactl lm-eval run --help.
    """
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        raise PluginError(
            f"lm-evaluation-harness can't be imported: {error}", hint="pip install 'llavactl-harnesses[lm-eval]'"
        ) from error
    from llavactl_harnesses import lm_eval_model  # noqa: F401 - registers the model type

    sys.argv = ["lm-eval", *with_model(arguments)]
    cli_evaluate()


def with_model(arguments: tuple[str, ...]) -> list[str]:
    """``arguments`` of lm-eval's command ``run`` with ``--model llavactl``, unless they or a file set the model."""
    names = {argument.partition("=")[0] for argument in arguments}
    if arguments[:1] in ((), ("ls",), ("validate",)) or not names.isdisjoint((*_MODEL_OPTIONS, "-h", "--help")):
        return [*arguments]
    rest = arguments[1:] if arguments[0] == "run" else arguments
    return ["run", "--model", "llavactl", *rest]
