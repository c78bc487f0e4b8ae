"""The README keeps its word: minimal.py is the algorithm, its commands have these flags."""

import copy
import math
import re
import shlex

import numpy as np
import pytest
import torch
from conftest import ROOT, update_config

import data
import eval as evaluation
import minimal
import ppo
import sfl
import sft
from plumbing import commands
from rollout import Rollout

README = (ROOT / "README.md").read_text()


def test_it_shows_minimal_py_word_for_word():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert code == (ROOT / "minimal.py").read_text()


def test_minimal_computes_what_ppo_update_does(tiny, tokenizer):
    """Loss and gradient, on the very same rollouts, of an older policy."""
    torch.manual_seed(0)
    questions = data.arithmetic(3, 0, {1: 1, 2: 2})
    groups = [minimal.sample(tiny, tokenizer, question, 4) for question in questions]
    rewards = torch.tensor([[1.0, 0, 0, 1], [0, 1.0, 0, 0], [1.0, 1, 1, 0]])
    groups = [(prompt, responses, row) for (prompt, responses, _), row in zip(groups, rewards)]
    with torch.no_grad():
        now = [[minimal.logprobs(tiny, p, r) for r in rs] for p, rs, _ in groups]
    old = [[x + 0.2 * torch.randn(len(x)) for x in group] for group in now]
    tiny.zero_grad()
    loss = minimal.policy_loss(tiny, groups, old)
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in tiny.parameters()])
    tiny.zero_grad()

    rollouts = [Rollout(p, r, [], True) for p, responses, _ in groups for r in responses]
    scores = ppo.group_advantages(rewards, how="grpo").flatten()
    settings = update_config(minibatch=len(rollouts), max_grad_norm=math.inf)
    policy = copy.deepcopy(tiny)
    metrics = ppo.update(
        policy, torch.optim.SGD(policy.parameters(), lr=1.0), rollouts,
        ppo.per_token(rollouts, scores), settings, old_logprobs=sum(old, []),
    )  # fmt: skip
    moved = zip(tiny.parameters(), policy.parameters())
    gradient = torch.cat([(before - after).detach().flatten() for before, after in moved])
    assert metrics["policy_loss"] == pytest.approx(loss.item(), abs=1e-6)
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-3)
    assert expected.abs().max() > 1e-3 and 0 < metrics["clip_fraction"] < 1


def test_its_learnability_is_ours():
    for successes in range(9):
        rewards = torch.tensor([1.0] * successes + [0.0] * (8 - successes))
        assert minimal.learnability(rewards) == pytest.approx(sfl.learnability(successes, 8))


def test_it_trains(tiny, tokenizer, capsys, monkeypatch):
    policy, before = copy.deepcopy(tiny), copy.deepcopy(tiny)
    questions = data.arithmetic(8, 0, {1: 1})
    rng = np.random.default_rng(0)

    def lenient(text, question):  # an untrained model is never right
        return float(rng.integers(2))

    monkeypatch.setattr(minimal, "grade", lenient)
    minimal.train(policy, tokenizer, questions, iterations=1, size=2, n=2)
    assert "iteration 1: mean reward" in capsys.readouterr().out
    pairs = list(zip(policy.parameters(), before.parameters()))
    assert all(p.isfinite().all() for p, _ in pairs)


COMMANDS = re.findall(
    r"^(?:pip install .* && )?python (sfl|eval|sft)\.py(.*?)(?: +#.*)?$", README, re.M
)


def test_there_are_commands():
    assert len(COMMANDS) >= 8


@pytest.mark.parametrize("script, flags", COMMANDS)
def test_commands_have_these_flags(script, flags):
    module = {"sfl": sfl, "eval": evaluation, "sft": sft}[script]
    assert commands.parse(module.Settings, shlex.split(flags))
