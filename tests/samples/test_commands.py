"""The commands that make, evaluate and compare the embedded models can be started."""

import subprocess
import sys
from importlib import import_module
from itertools import product

import pytest

WORDS = [
    *product(("make", "evaluate"), ("image", "unet", "video", "scorer")),
    *product(("compare",), ("methods", "guidance")),
]


@pytest.mark.parametrize("words", WORDS, ids=" ".join)
def test_every_command_explains_itself(embedded, words, monkeypatch, capsys):
    from embedded.__main__ import COMMANDS

    monkeypatch.setattr(sys, "argv", ["embedded", "--help"])
    with pytest.raises(SystemExit) as ended:
        import_module(COMMANDS[words]).main()
    assert ended.value.code == 0
    assert "--packages" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("words", [["make", "video", "--help"], ["make", "moon"]], ids=" ".join)
def test_the_folder_itself_is_the_program(embedded, words, tmp_path):
    done = subprocess.run(
        [sys.executable, embedded, *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode == 0) == (words[1] == "video")
    told = done.stdout if words[1] == "video" else done.stderr
    assert ("--vae-minutes" if words[1] == "video" else "evaluate scorer") in told
