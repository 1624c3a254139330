"""Shell completion: its words in click's protocol, and what bash completes with the script that llavactl prints."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llavactl.core.builtin_plugin import COMMANDS
from llavactl.core.protocols import KINDS
from llavactl.core.registry import registry


def completed(line: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """What the shell functions of click call at the end of ``line``."""
    words = line.split(" ")
    code = "import sys; from llavactl.cli import main\ntry: main()\n"
    code += "finally: assert not {'torch', 'transformers', 'numpy', 'h5py', 'rich'} & set(sys.modules)"
    protocol = {
        "_LLAVACTL_COMPLETE": "bash_complete",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
    }
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **protocol, **variables},
        capture_output=True,
        text=True,
        check=True,
    )


def words(line: str) -> set[str]:
    return {word.removeprefix("plain,") for word in completed(line).stdout.splitlines()}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("llavactl ", set(COMMANDS)),
        ("llavactl ca", {"cache"}),
        ("llavactl data s", {"show", "stats"}),
        ("llavactl run --qu", {"--quiet"}),
        ("llavactl recipes copy ", set(registry().names("recipes"))),
        ("llavactl run -r llava-v1.5-7b-", {"llava-v1.5-7b-lora", "llava-v1.5-7b-qlora"}),
        ("llavactl train --stage 1 --recipe llava-v1-7", {"llava-v1-7b"}),
        ("llavactl run -r recipe.y", {"file,recipe.y"}),
        ("llavactl eval sci", {"scienceqa"}),
        ("llavactl export --format ", set(registry().names("formats"))),
        ("llavactl chat --template vicuna", {"vicuna-v0", "vicuna-v1"}),
        ("llavactl chat --image pho", {"file,pho"}),
        ("llavactl train --stage ", {"1", "2"}),
        ("llavactl components ", set(KINDS)),
        ("llavactl plugins check llava", {"llavactl"}),
    ],
)
def test_words(line: str, expected: set[str]) -> None:
    assert words(line) >= expected if line == "llavactl " else words(line) == expected


def test_a_broken_plugin_prints_nothing_at_a_completion(tmp_path: Path) -> None:
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[llavactl]\nbroken = broken_module\n")
    (tmp_path / "broken_module.py").write_text("1/0")
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    done = completed("llavactl run -r llava-v1-7", PYTHONPATH=path, LLAVACTL_PLUGINS="broken")
    assert (done.stdout, done.stderr) == ("plain,llava-v1-7b\n", "")


def with_program(folder: Path) -> dict[str, str]:
    """The environment of a shell that finds ``llavactl``, with ``folder`` as the home."""
    program = folder / "bin" / "llavactl"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m llavactl "$@"\n')
    program.chmod(0o755)
    return {**os.environ, "HOME": str(folder), "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}"}


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("llavactl run -r llava-v1.5-7b-q", ["llava-v1.5-7b-qlora"]),
        ("llavactl cache p", ["prune"]),
        ("llavactl run -r recipe.y", []),  # bash completes a file name: `compopt -o default`
    ],
)
def test_bash_completes(line: str, expected: list[str], tmp_path: Path) -> None:
    script = f"""
        eval "$(_LLAVACTL_COMPLETE=bash_source llavactl)"
        compopt() {{ printf "compopt %s %s\\n" "$@"; }}
        COMP_WORDS=({line})
        COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
        COMPREPLY=()
        _llavactl_completion llavactl
        echo "${{COMPREPLY[@]}}"
        complete -p llavactl
    """
    done = subprocess.run(
        ["bash", "-c", script], env=with_program(tmp_path), capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    *files, reply, registered = done.stdout.splitlines()
    assert reply.split() == expected
    assert files == ([] if expected else ["compopt -o default"])
    assert "_llavactl_completion llavactl" in registered


@pytest.mark.skipif(shutil.which("zsh") is None, reason="needs zsh")
def test_zsh_completes(tmp_path: Path) -> None:
    """Completion functions run only within the line editor: what they pass to it is printed."""
    script = """
        autoload -Uz compinit && compinit -u -d "$HOME/.zcompdump"
        eval "$(_LLAVACTL_COMPLETE=zsh_source llavactl)"
        _describe() { print -r -- "${(P@)3}"; }
        words=(llavactl tr) CURRENT=2
        _llavactl_completion
        print -r -- $_comps[llavactl]
    """
    done = subprocess.run(
        ["zsh", "-f", "-c", script], env=with_program(tmp_path), capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    described, registered = done.stdout.splitlines()
    assert described.startswith("train:")
    assert registered == "_llavactl_completion"


@pytest.mark.skipif(shutil.which("fish") is None, reason="needs fish")
def test_fish_completes(tmp_path: Path) -> None:
    script = """_LLAVACTL_COMPLETE=fish_source llavactl | source; complete -C "llavactl tr" """
    done = subprocess.run(
        ["fish", "-N", "-c", script], env=with_program(tmp_path), capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    assert [line.split("\t")[0] for line in done.stdout.splitlines()] == ["train"]
