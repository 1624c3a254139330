"""``python -m llavactl.cli``, for launchers that start modules (``torchrun -m llavactl.cli train --stage 1``)."""

from llavactl.cli import main

main()
