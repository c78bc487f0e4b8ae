"""Command lines and progress bars."""

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from plumbing import commands


@dataclass
class Settings:
    """An example."""

    data_dir: str | None = None  # a folder
    weight: float = 0.0  # 100% of it
    switch: bool = False  # on or off


def test_flags_may_have_hyphens_and_defaults_others():
    assert commands.parse(Settings, ["--data-dir=a-b"]) == Settings("a-b")
    given = commands.parse(Settings, ["--data_dir", "a-b", "--switch"], {"weight": 0.5})
    assert given == Settings("a-b", 0.5, True)


def test_help_is_the_comment_and_says_a_default_of_zero_too(capsys):
    with pytest.raises(SystemExit):
        commands.parse(Settings, ["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "An example." in said and "100% of it (default: 0.0)" in said


@pytest.mark.parametrize(
    "error, code, line",
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (ValueError("too long\nby far"), 2, "too long"),
        (FloatingPointError("a NaN"), 2, "a NaN"),
        (PermissionError(13, "No", "runs"), 2, "[Errno 13] No: 'runs'"),
    ],
)
def test_exit_codes(capsys, error, code, line):
    def main():
        raise error

    with pytest.raises(SystemExit) as stopped:
        commands.command_line(main)
    assert stopped.value.code == code
    assert capsys.readouterr().err == f"{Path(sys.argv[0]).name}: {line}\n"


def test_bars_in_a_log_file_write_few_lines(capsys):
    with commands.progress_bar("work", 20000, "step") as bar:
        for i in range(20000):
            bar.set_postfix(i=i, refresh=False)
            bar.update()
    lines = [line for line in capsys.readouterr().err.split("\n") if line.strip()]
    assert 1 <= len(lines) <= 3 and all("\r" not in line.strip("\r") for line in lines)
