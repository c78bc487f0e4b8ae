"""Models on disk, command lines, progress bars."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import sft
from plumbing import checkpoint, commands

# --------------------------------------------------------------------------- models on disk


def test_load_model(tiny, tiny_folder):
    for path in (tiny_folder, str(tiny_folder / "model")):  # a run's folder, or its model's
        model, tokenizer = checkpoint.load_model(path)
        assert not model.training and model.dtype == torch.float32 and tokenizer.eos_token_id == 1
        assert torch.equal(model.lm_head.weight, tiny.lm_head.weight)
    model, _ = checkpoint.load_model(tiny_folder, device="auto", dtype="bfloat16")
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "path, settings, message",
    [
        ("empty", {}, "cannot load a model from .*: give --model a folder"),
        ("./no/such/model", {}, "cannot load a model from './no/such/model'"),
        ("model", {"dtype": "int8"}, "unknown dtype 'int8'"),
        ("model", {"device": "tpu"}, "no device 'tpu' here: give auto or"),
    ],
)
def test_load_model_refuses(tiny_folder, path, settings, message):
    (tiny_folder / "empty").mkdir(exist_ok=True)
    path = path if path.startswith(".") else tiny_folder / path
    with pytest.raises(ValueError, match=message) as raised:
        checkpoint.load_model(path, **settings)
    assert "\n" not in str(raised.value)


def same_weights(folder, model):
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    return all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters()))


def test_save_replaces_whole_files(tokenizer, tmp_path, monkeypatch):
    old, new = sft.tiny_model(tokenizer, 0), sft.tiny_model(tokenizer, 1)
    checkpoint.save_model(old, tokenizer, tmp_path / "model")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # as the new files are to take the old ones' place
        patch.setattr(checkpoint.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save_model(new, tokenizer, tmp_path / "model")
    assert same_weights(tmp_path / "model", old)
    checkpoint.save_model(new, tokenizer, tmp_path / "model")
    assert same_weights(tmp_path / "model", new)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# --------------------------------------------------------------------------- command lines


def test_flags_may_have_hyphens():
    table = "data_dir - - a folder\nrest_of_it 1 1.. a number"
    given = commands.parse_flags(table, "", ["--data-dir=a-b", "--rest-of-it", "3"])
    assert given == {"data_dir": "a-b", "rest_of_it": 3}
    assert commands.parse_flags(table, "", ["--data_dir", "a-b"]) == {"data_dir": "a-b"}


def test_help_says_defaults_of_zero_too(capsys):
    with pytest.raises(SystemExit):
        commands.parse_flags("kl_coef 0.0,1e-4 0.. a weight\nflag off - a switch", "", ["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "a weight (default 0.0; other data sets 0.0001)" in said and "a switch (" not in said


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
