"""Loading weights: transformers' table of unused weights is not printed. Messages of libraries in one line."""

from __future__ import annotations

import pytest
from transformers.utils import logging

from llavactl.core.library_errors import loading, reason


def test_transformers_logs_only_errors_while_weights_are_loaded() -> None:
    before = logging.get_verbosity()
    logging.set_verbosity_warning()
    try:
        with loading("language model", "some/model", weights=True):
            assert logging.get_verbosity() == logging.ERROR
        assert logging.get_verbosity() == logging.WARNING
    finally:
        logging.set_verbosity(before)


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        (
            "[/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:2",
            "Connection closed by peer [::1]:2",
        ),
        (
            "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.hpp:268, unhandled system error\nmore",
            "NCCL error: unhandled system error",
        ),
        (
            "device-side assert triggered at ../aten/src/ATen/native/cuda/Loss.cu:240: nll_loss",
            "device-side assert triggered: nll_loss",
        ),
        ("records.json:12: not JSON", "records.json:12: not JSON"),
    ],
)
def test_places_in_the_source_of_a_library_are_left_out(message: str, shown: str) -> None:
    assert reason(RuntimeError(message)) == shown
