"""``llavactl doctor``: check the installation and the machine."""

from __future__ import annotations

import click

from llavactl.cli import output
from llavactl.cli.help import Command
from llavactl.cli.options import json_option


@click.command(
    cls=Command,
    examples=[
        "llavactl doctor",
        "llavactl doctor --json",
    ],
)
@json_option
def command(as_json: bool) -> None:
    """Check packages, devices, disk space, network and plugins."""
    from llavactl.verbs.doctor import doctor

    report = doctor()
    if as_json:
        output.document(report)
        return
    output.line(f"llavactl {report.llavactl}, Python {report.python}, {report.platform}")
    output.table([(f"  {name}", version) for name, version in report.packages.items()])
    for device in report.devices:
        output.line(f"{device.name}: {device.memory_gb:.0f} GB, {' '.join(device.dtypes)}")
    output.table([("plugin", plugin.name, f"{plugin.package} {plugin.version}") for plugin in report.plugins])
    output.line()
    rows = [("yes" if finding.works else "NO", finding.what, finding.why) for finding in report.findings]
    output.table(rows, styles={"yes": "green", "NO": "bold red"})
