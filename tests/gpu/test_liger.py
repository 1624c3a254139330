"""liger's kernels on a GPU agree with torch. The check itself is tested in tests/model/cuda."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llavactl.model.cuda import liger


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_check_before_training_finds_no_fault(device: torch.device, dtype: torch.dtype) -> None:
    pytest.importorskip("liger_kernel")
    config = SimpleNamespace(
        model_type="llama", hidden_act="silu", hidden_size=4096, intermediate_size=11008, rms_norm_eps=1e-5
    )
    language: Any = SimpleNamespace(config=config)
    assert liger.blocker(language, device) == ""
    assert liger.fault(language, dtype, device) == ""
