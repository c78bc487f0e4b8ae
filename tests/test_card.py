"""The paths of a card, on one that is only pretended: what tests/gpu.py would check on a real one,
how often the host waits, and what takes how much of its memory."""

import gpu
import numpy as np
import pytest
import torch
from card import Card

import rollout
import sfl
from rollout import StopText, generate

SMALL = "--curriculum lilo --max_candidates 32 --rollouts 4 --questions 8 --eval_limit 4"
SMALL += " --max_new_tokens 24 --minibatch 16 --iterations 1 --mc_rollouts 2 --slots 32"
SMALL = SMALL.split()


# --------------------------------------------------------------------------- sampling


def letters(ids):
    return "".join(chr(97 + i % 26) for i in ids)


@pytest.mark.parametrize("family", gpu.FAMILIES)
def test_generate_writes_what_a_cpu_does(family, monkeypatch):
    """Its graphs are recorded, and replayed over junk."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 512, length).tolist() for length in rng.integers(1, 30, 12)]
    how = {"n": 2, "max_new_tokens": [8, 40] * 6, "seed": 1, "slots": 16, "stop_ids": [2]}
    model = gpu.build(family, torch.float32, "cpu")
    for p in model.parameters():  # so large that what it writes is varied
        p.data.normal_(0, 0.2 if p.ndim > 1 else 0.02)
    hows = [{"temperature": 0}, {"top_p": 0.9, "temperature": 0.8}, {"top_k": 7, "top_p": 0.95}]
    hows += [{"stop_ids": StopText([2], "ee", letters)}]
    expected = [generate(model, prompts, **how | more) for more in hows]
    with Card(monkeypatch) as card:
        engine = rollout.Engine(model.to("cuda"), slots=how.pop("slots"))
        found = [engine.generate(prompts, **how | more) for more in hows]
    assert card.replays > 100
    for ours, theirs in zip(found, expected):
        for a, b in zip(sum(ours, []), sum(theirs, [])):
            assert a.response == b.response and a.finished == b.finished
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


def test_parity_of_gpu_py(monkeypatch):
    with Card(monkeypatch) as card:
        assert gpu.parity("qwen2", torch.float32)
    assert card.replays > 64  # nothing fell back to plain steps


def test_devices_do_not_mix(monkeypatch):
    with Card(monkeypatch) as card:
        there, here = torch.ones(3, device="cuda"), torch.ones(3)
        assert there.device == torch.device("cuda:0") and there.is_cuda and not there.cpu().is_cuda
        assert (there * 2 + torch.tensor(1.0)).tolist() == [3, 3, 3]  # a number may be anywhere
        for mixed in (lambda: there + here, lambda: torch.cat([there, here])):
            with pytest.raises(RuntimeError, match="same device"):
                mixed()
        with pytest.raises(TypeError, match="numpy"):
            np.asarray(there)
        there[here > 0] = 0.0
    assert {what for what, _ in card.waits} >= {"read by tolist", "size of a mask", "copy"}


def test_on_a_mac(base, monkeypatch):
    """mps has no float64, and no graphs."""
    with Card(monkeypatch, kind="mps") as card:
        with pytest.raises(TypeError, match="float64"):
            torch.zeros(3, device="mps").double().to("mps")
        rows, _, _ = gpu.run(base, "ppo", "mps", "float32", *SMALL)
    assert card.replays == 0 and rows[0]["optimizer_steps"] > 0


# --------------------------------------------------------------------------- training


@pytest.mark.parametrize("algo", gpu.ALGORITHMS)
def test_an_iteration_has_the_metrics_of_a_cpu(algo, base, monkeypatch):
    expected, _, _ = gpu.run(base, algo, "cpu", "float32", *SMALL)
    with Card(monkeypatch) as card:
        found, _, _ = gpu.run(base, algo, "cuda", "float32", *SMALL)
    assert card.replays > 0 and gpu.differences(found, expected) == []
    assert expected[0]["learnable"] > 0


@pytest.mark.parametrize("algo", gpu.ALGORITHMS)
def test_an_iteration_runs_in_bfloat16(algo, base, monkeypatch):
    """A copy of the weights decodes, and the update is under autocast."""
    with Card(monkeypatch) as card:
        [row], _, _ = gpu.run(base, algo, "cuda", "bfloat16", *SMALL)
    assert card.replays > 0
    if algo not in sfl.sft.IMITATORS:
        assert row["optimizer_steps"] > 0 and row["nonfinite_steps"] == 0
    assert 0 <= row["kl"] < 1e-2  # the sampler's log-probs are the scorer's, but for rounding


def test_metrics_that_differ_are_named():
    row = {"grad_norm": 1.0, "seconds_update": 3.0}
    assert gpu.differences([row], [row | {"seconds_update": 4.0}]) == []
    assert gpu.differences([row], [row | {"grad_norm": 1.01}]) == ["grad_norm"]


def test_without_a_card_nothing_is_claimed(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    gpu.main()
    assert "nothing is claimed" in capsys.readouterr().out
