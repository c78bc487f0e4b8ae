"""Pictures of training runs."""

import numpy as np
import pytest
from conftest import write_rows

import eval as evaluation
from plumbing import report


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
