"""Settings of accelerate: supported ones, and unsupported ones that stop a run before any work."""

from __future__ import annotations

from pathlib import Path

import pytest

from llavactl.core.errors import RecipeError
from llavactl.core.processes import check_launch
from llavactl.testing import run_cli

PLAIN = {
    "ACCELERATE_USE_CPU": "True",
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_DYNAMO_BACKEND": "NO",
    "ACCELERATE_DYNAMO_MODE": "default",
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False",
}
"""Variables that `accelerate launch` sets without a configuration."""

UNSUPPORTED = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_USE_FSDP": "true",
    "ACCELERATE_USE_MEGATRON_LM": "true",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
}


def test_default_settings_are_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in PLAIN.items():
        monkeypatch.setenv(name, value)
    check_launch("bfloat16")
    check_launch()


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_settings_are_rejected(monkeypatch: pytest.MonkeyPatch, toy: Path, name: str) -> None:
    monkeypatch.setenv(name, UNSUPPORTED[name])
    for command in (["run"], ["train", "--stage", "1"]):
        result = run_cli(*command, cwd=toy)
        assert result.exit_code == 1
        (error, hint) = result.stderr.splitlines()
        assert name in error
        assert name in hint
    assert not (toy / "runs").exists()


@pytest.mark.parametrize(
    ("mixed", "precision", "supported"),
    [
        *(("no", precision, True) for precision in ("float32", "bfloat16")),
        *(("bf16", "bfloat16", True), ("bf16", "float32", False), ("bf16", None, True)),
        *(("fp16", "bfloat16", False), ("fp8", "bfloat16", False), ("fp8", None, False)),
    ],
)
def test_the_precision_must_match_the_recipe(
    monkeypatch: pytest.MonkeyPatch, mixed: str, precision: str | None, supported: bool
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", mixed)
    if supported:
        check_launch(precision)
        return
    with pytest.raises(RecipeError, match=f"ACCELERATE_MIXED_PRECISION={mixed}"):
        check_launch(precision)


def test_the_configuration_file_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "accelerate" / "default_config.yaml"
    file.parent.mkdir()
    file.write_text("distributed_type: DEEPSPEED\n", encoding="utf-8")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    check_launch()
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(RecipeError) as caught:
        check_launch()
    assert str(file) in caught.value.message


def test_world_size_without_master_addr(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such variables may be left over in a shell or a job script."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(RecipeError, match=r"WORLD_SIZE=2 .*MASTER_ADDR"):
        check_launch()
