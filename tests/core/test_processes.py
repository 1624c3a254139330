"""accelerate's configuration: what is followed, and what is refused before any work."""

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
"""What `accelerate launch` says without a configuration."""

REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_USE_FSDP": "true",
    "ACCELERATE_USE_MEGATRON_LM": "true",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
}


def test_a_plain_one_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in PLAIN.items():
        monkeypatch.setenv(name, value)
    check_launch("bfloat16")
    check_launch()


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_done_is_refused(monkeypatch: pytest.MonkeyPatch, toy: Path, name: str) -> None:
    monkeypatch.setenv(name, REFUSED[name])
    for command in (["run"], ["train", "--stage", "1"]):
        result = run_cli(*command, cwd=toy)
        assert result.exit_code == 1
        (error, hint) = result.stderr.splitlines()
        assert name in error
        assert name in hint
    assert not (toy / "runs").exists()


@pytest.mark.parametrize(
    ("mixed", "precision", "fits"),
    [
        *(("no", precision, True) for precision in ("float32", "bfloat16")),
        *(("bf16", "bfloat16", True), ("bf16", "float32", False), ("bf16", None, True)),
        *(("fp16", "bfloat16", False), ("fp8", "bfloat16", False), ("fp8", None, False)),
    ],
)
def test_precision_is_the_recipes(
    monkeypatch: pytest.MonkeyPatch, mixed: str, precision: str | None, fits: bool
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", mixed)
    if fits:
        check_launch(precision)
        return
    with pytest.raises(RecipeError, match=f"ACCELERATE_MIXED_PRECISION={mixed}"):
        check_launch(precision)


def test_its_file_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "accelerate" / "default_config.yaml"
    file.parent.mkdir()
    file.write_text("distributed_type: DEEPSPEED\n", encoding="utf-8")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    check_launch()
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(RecipeError) as caught:
        check_launch()
    assert str(file) in caught.value.message


def test_several_processes_without_a_place_to_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a shell or a job script may leave them behind."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(RecipeError, match="WORLD_SIZE=2 is set but MASTER_ADDR is not"):
        check_launch()
