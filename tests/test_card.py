"""What tests/gpu.py would check, on a card that is only pretended: its step sizes, its graphs."""

import gpu
import pytest
import torch
from card import Card

from plumbing import graphs, slots

SMALL = "--curriculum lilo --max_candidates 64 --rollouts 4 --questions 8 --eval_limit 4"
SMALL = [*SMALL.split(), "--max_new_tokens", "24", "--minibatch", "16"]


def pretend(monkeypatch):
    """Steps of a few sizes, each captured once and then replayed over junk; a look in eight."""
    sizes = graphs.step_sizes
    monkeypatch.setattr(slots, "step_sizes", lambda device, *size: sizes("cuda", *size))
    return Card(monkeypatch)


@pytest.mark.parametrize("family", gpu.FAMILIES)
def test_parity(family, monkeypatch):
    card = pretend(monkeypatch)
    assert gpu.parity(family, torch.float32, "cpu")
    assert card.replays > 64  # nothing fell back to plain steps


@pytest.mark.parametrize("algo", ["grpo", "ppo"])
def test_an_iteration_has_the_metrics_of_a_cpu(algo, base, monkeypatch):  # noqa: F811
    expected, _, _ = gpu.run(base, algo, "cpu", "float32", *SMALL)
    card = pretend(monkeypatch)
    found, _, _ = gpu.run(base, algo, "cpu", "float32", *SMALL)
    assert card.replays > 0 and gpu.differences(found, expected) == []
    assert any(row["learnable"] > 0 for row in expected) and expected[-1]["optimizer_steps"] > 0
    found[-1]["grad_norm"] *= 1.01
    assert gpu.differences(found, expected) == ["grad_norm"]


@pytest.mark.parametrize("algo", ["grpo", "ppo"])
def test_an_iteration_runs_in_bfloat16(algo, base, monkeypatch):  # noqa: F811
    """As on a card: a copy of the weights decodes, and the update is under autocast."""
    card = pretend(monkeypatch)
    rows, _, _ = gpu.run(base, algo, "cpu", "bfloat16", *SMALL)
    assert card.replays > 0
    assert all(row["optimizer_steps"] > 0 and row["nonfinite_steps"] == 0 for row in rows)
    assert 0 <= rows[0]["kl"] < 1e-3  # the sampler's log-probs are the scorer's, but for rounding


def test_without_a_card_nothing_is_claimed(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    gpu.main()
    assert "nothing is claimed" in capsys.readouterr().out
