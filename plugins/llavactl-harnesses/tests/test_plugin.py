"""The package as a plugin of llavactl."""

import importlib.util
import subprocess
import sys

import pytest

from llavactl.testing import check_plugin, run_cli


def test_the_plugin_passes_the_conformance_kit() -> None:
    assert check_plugin("harnesses") == []


def test_importing_the_plugin_is_light() -> None:
    code = (
        "import sys, llavactl_harnesses; print(sorted({'torch', 'PIL', 'lm_eval', 'lmms_eval'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm_eval is installed")
def test_a_missing_harness_is_one_line() -> None:
    result = run_cli("lm-eval", "--tasks", "a")
    assert result.exit_code == 1
    assert "llavactl-harnesses[lm-eval]" in result.stderr
