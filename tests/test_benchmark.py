"""The benchmarks run; what they say is for whoever runs them."""

import json
import subprocess
import sys
from types import SimpleNamespace

import benchmark
import pytest
from conftest import ROOT, small_llama


def test_generation(capsys, tmp_path):
    small_llama(97, max_position_embeddings=512).save_pretrained(tmp_path)
    size = f"generation --prompts 2 --n 3 --max_new_tokens 9 --runs 2 --model {tmp_path}".split()
    benchmark.main(size)
    out = capsys.readouterr().out
    assert "ours" in out and "model.generate, batch" in out and "100.0%" in out
    benchmark.main([*size, "--prefixes"])
    out = capsys.readouterr().out
    assert "ours, a forward a request" in out and "model.generate" not in out


def test_logprobs(capsys, monkeypatch):
    peaks = {"backbone": 1e6, "plain": 3e6, "ours": 2e6}  # those of one process would be the same
    printed = []

    def child(command, **settings):  # in this process: starting one takes seconds
        printed.append(capsys.readouterr().out)
        benchmark.main(command[2:])
        measured, what = capsys.readouterr().out, command[-1]
        assert json.loads(measured)
        return SimpleNamespace(stdout=measured if what == "speed" else json.dumps(peaks[what]))

    sizes = "logprobs --batch 1 --time 9 --vocab 99 --width 64 --layers 1 --runs 1".split()
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *sizes])
    monkeypatch.setattr(subprocess, "run", child)
    benchmark.main(sizes)
    assert "2 MB, 0.50 of what plain adds to the backbone" in "".join(printed)
    assert "time, ours to plain" in capsys.readouterr().out


def test_iteration(capsys):
    benchmark.main(["iteration", "--runs", "1", "--rival", "none"])
    assert "sfl, ppo" in capsys.readouterr().out


def test_accounts(capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "UPDATES", ["--algo grpo"])
    benchmark.main("forecast --model tiny --tokens 512".split())
    assert "tiny --algo grpo" in capsys.readouterr().out
    benchmark.main("decode_cost --model tiny --rows 8 --columns 64".split())
    out = capsys.readouterr().out
    assert out.count("ms a step at least") == 5 and out.count("a row's own 32 columns") == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("generation --model nowhere", "--model nowhere is neither a folder nor a size"),
        ("generation --prompts 0", "--prompts: 0 must be at least 1"),
    ],
)
def test_bad_input_is_one_line(arguments, message):
    command = [sys.executable, str(ROOT / "tests" / "benchmark.py"), *arguments.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr.splitlines()[-1]
