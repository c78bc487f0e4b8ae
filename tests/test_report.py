"""Tables, the log of a run and its alarms, pictures of runs."""

import io
import shlex
import sys
from argparse import Namespace

import numpy as np
import pytest
from conftest import read_rows, write_rows

import eval as evaluation
from plumbing import commands, report


def fake_run(folder, seed=0):
    rng = np.random.default_rng(seed)
    rows = [{"iteration": 0, "eval_accuracy": 0.1}]
    for i in range(12):
        row = {"iteration": i + 1, "reward_mean": rng.random(), "kl": 0.1}
        row |= {"learnable": 0.3, "solved_by_all": 0.2, "solved_by_none": 0.5}
        row |= {"tokens_generated": 100, "seconds_rollout": 1.25}
        row |= {"seconds_credit": 0.25, "seconds_update": 0.5}
        row["sampled"] = [
            [int(j), int(j) // 2, int(rng.integers(5)), 4] for j in rng.permutation(8)[:4]
        ]
        row["trained"] = [row["sampled"][0][0]]
        if i % 4 == 3:
            row |= {"eval_accuracy": rng.random(), "seconds_score": 2.0}
            row |= {"tokens_scored": 900, "tokens_credit": 100}
        rows.append(row)
    write_rows(folder / "metrics.jsonl", rows)
    return folder


def test_read_run_adds_up_what_was_spent(tmp_path):
    rows = report.read_run(fake_run(tmp_path))
    assert [row["tokens"] for row in rows[:6]] == [0, 100, 200, 300, 1400, 1500]
    assert [row["seconds"] for row in rows[:6]] == [0, 2, 4, 6, 10, 12]


PNG = b"\x89PNG"


def test_plot(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    names = ("sfl", "uniform", "other/sfl")
    runs = [str(fake_run(tmp_path / name, seed)) for seed, name in enumerate(names)]
    evaluation.main(["--plot", *runs, "--out", str(tmp_path / "new" / "a.png")])
    assert (tmp_path / "new" / "a.png").read_bytes().startswith(PNG)
    evaluation.main(["--plot", runs[1]])
    assert (tmp_path / "uniform" / "curves.png").read_bytes().startswith(PNG)
    assert "wrote" in capsys.readouterr().out


def test_plot_of_runs_with_little_in_them(tmp_path):
    pytest.importorskip("matplotlib")
    write_rows(tmp_path / "bare" / "metrics.jsonl", [{"iteration": 0}])
    with pytest.raises(ValueError, match="nothing to draw yet"):
        report.plot([tmp_path / "bare"], tmp_path / "a.png")
    write_rows(tmp_path / "short" / "metrics.jsonl", [{"iteration": 0, "reward_mean": 0.5}])
    report.plot([tmp_path / "short"] * 9, tmp_path / "a.png")  # more runs than colours
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"reward_mean": 1}, "line 1: no number in the field 'iteration'"),
        ({"iteration": 1, "learnable": "x"}, "line 1: no number in the field 'learnable'"),
        ("{", "line 1: not JSON"),
    ],
)
def test_plot_refuses_what_is_no_metrics(tmp_path, row, message):
    write_rows(tmp_path / "metrics.jsonl", [row])
    with pytest.raises(ValueError, match=message):
        evaluation.main(["--plot", str(tmp_path)])


# --------------------------------------------------------------------------- tables and the log


def test_the_command_in_the_summary_can_be_pasted(tmp_path):
    result = {"n": 1, "accuracy": 0.5, "accuracy_se": None, "by_level": {}, "response_length": 3.0}
    both = {"greedy": result | {"responses": []}}
    text = report.summary(tmp_path / "my $run", both, both)
    [line] = [line for line in text.splitlines() if line.startswith("look at")]
    assert shlex.split(line)[-1] == str(tmp_path / "my $run")


def test_a_finished_run_does_not_end_in_a_codec_error(tmp_path, monkeypatch):
    """Where stdout is ASCII: LANG=C without Python's coercion to UTF-8, a pipe of a cron job."""
    result = {"n": 1, "accuracy": 0.5, "accuracy_se": 0.1, "by_level": {}, "response_length": 3.0}
    example = {"question": "½?", "answer": "½", "reward": 1.0, "response": "½"}
    both = {"greedy": result | {"responses": [example]}}
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii"))
    commands.command_line(lambda: print(report.summary(tmp_path, both, both), flush=True))
    assert b"0.500 ? 0.100" in written.getvalue()


def test_a_resumed_runs_levels_were_read_from_json():
    level = {"n": 1, "accuracy": 0.5, "se": None}
    now = {"n": 1, "accuracy": 0.5, "accuracy_se": 0.1, "response_length": 3.0}
    then = now | {"by_level": {"2": level, "10": level}}
    now = now | {"by_level": {2: level, 10: level}}
    lines = report.table({"before": then, "after": now}).splitlines()
    assert [line.split()[0] for line in lines[2:4]] == ["2", "10"]


def row(**changes):
    usual = {"iteration": 1, "truncated": 0.0, "learnable": 0.3, "reward_mean": 0.5, "entropy": 1.0}
    return usual | changes


@pytest.mark.parametrize(
    "name, bad, at_once",
    [
        ("nan", {"nonfinite_steps": 1}, True),
        ("kl", {"kl": 1.5}, True),
        ("truncated", {"truncated": 0.6}, True),
        ("format", {"eval_accuracy": 0.1, "eval_lenient": 0.4}, True),
        ("agree", {"learnable": 0.0}, False),  # after ten iterations
        ("reward", {"reward_mean": 0.25}, False),
        ("entropy", {"entropy": 0.001}, False),
    ],
)
def test_alarms(name, bad, at_once):
    usual = [row(reward_mean=i / 20) for i in range(10)]
    assert list(report.alarms(usual)) == []
    changed = [each | bad for each in usual]
    assert [alarm for alarm, _ in report.alarms(changed)] == [name]
    assert (list(report.alarms([usual[0], *changed[1:]])) == []) == (not at_once)


def test_the_log_writes_every_row_and_warns_once(tmp_path, capsys):
    log = report.Log(tmp_path, Namespace(tensorboard=False, wandb=False))
    for _ in range(3):
        log(row(kl=2.0))
    assert read_rows(tmp_path / "metrics.jsonl") == [row(kl=2.0)] * 3
    assert capsys.readouterr().err.count("lower --lr") == 1
