"""Learnability, the curricula, and the whole job on a model small enough for a test."""

import copy
import itertools
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections import Counter
from pathlib import Path

import experiments
import numpy as np
import pytest
import torch
from conftest import ROOT, read_rows, small_llama, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer, Phi3Config

import data
import eval as evaluation
import sfl
import sft
from plumbing import attention, checkpoint, checks, memory, report

# --------------------------------------------------------------------------- learnability


@pytest.mark.parametrize("attempts", [2, 3, 8])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.93, 1.0])
def test_learnability_is_unbiased_and_the_plug_in_is_not(attempts, p):
    expected = plug_in = 0
    for s in range(attempts + 1):
        chance = math.comb(attempts, s) * p**s * (1 - p) ** (attempts - s)
        expected += chance * sfl.learnability(s, attempts)
        plug_in += chance * (s / attempts) * (1 - s / attempts)
    assert expected == pytest.approx(p * (1 - p), abs=1e-12)
    too_low = (attempts - 1) / attempts  # as the docstring says
    assert plug_in == pytest.approx(p * (1 - p) * too_low, abs=1e-12)


def test_learnability_takes_numbers_and_arrays_and_is_the_variance_of_rewards():
    rewards = np.random.default_rng(0).integers(0, 2, (50, 6))
    scores = sfl.learnability(rewards.sum(1), 6)
    assert np.allclose(scores, rewards.var(1, ddof=1))
    assert np.array_equal(sfl.Batch(np.arange(50), [], rewards).learnability(), scores)
    one = sfl.learnability(3, 6)
    assert np.ndim(one) == 0 and one == pytest.approx(9 / 30)


@pytest.mark.parametrize("successes, attempts", [(0, 1), (3, 2), (-1, 4)])
def test_learnability_refuses(successes, attempts):
    with pytest.raises(ValueError, match="attempts"):
        sfl.learnability(successes, attempts)


def test_most_takes_the_largest_and_breaks_ties_at_random():
    rng, scores = np.random.default_rng(0), np.array([0.1, 0.3, 0.1, 0.3, 0.0, 0.1])
    picks = Counter(frozenset(sfl.most(scores, 3, rng).tolist()) for _ in range(600))
    assert set(picks) == {frozenset({1, 3, tied}) for tied in (0, 2, 5)}
    assert all(150 < count < 250 for count in picks.values())


# --------------------------------------------------------------------------- the curricula
# On questions whose success rate is known.


def settings(**changes):
    defaults = {"questions": 8, "rollouts": 8, "rho": 0.5, "memory": 0.9}
    defaults |= {"refresh_every": 4, "candidates": 40, "buffer_size": 10, "score_rollouts": 8}
    return Namespace(**defaults | {"max_candidates": 40} | changes)


class Simulator:
    """A pool of a policy that solves question i with chance p[i]; remembers its calls."""

    def __init__(self, p, seed=0, levels=None):
        self.p, self.rng, self.calls = np.asarray(p), np.random.default_rng(seed), []
        self.questions, self.level_names, self.iteration = p, levels or ["one"] * len(p), 0

    def levels(self):
        return self.level_names

    def sample(self, chosen, n):
        chosen = np.asarray(chosen)
        draws = self.rng.random((len(chosen), n))
        rewards = (draws < self.p[chosen][:, None]).astype(np.float32)
        number = len(self.calls)
        groups = [[f"call {number}, {i}/{j}" for j in range(n)] for i in chosen]
        self.calls.append(sfl.Batch(chosen, groups, rewards))
        return self.calls[-1]


P = np.array([1.0] * 60 + [0.0] * 30 + [0.5] * 10)  # solved, out of reach, a frontier of 10


def choose(curriculum, config, pool, state=None, iteration=0, rng=None):
    """(batch, logged) of a curriculum, after what is true of every batch."""
    rng, state = rng or np.random.default_rng(0), {} if state is None else state
    pool.iteration = iteration
    batch, logged = curriculum(pool, config, state, rng)
    assert len(batch.questions) == config.questions == len(set(batch.questions.tolist()))
    assert batch.rewards.shape == (config.questions, config.rollouts)
    json.dumps([state, logged])  # goes into the checkpoint and into the log
    return batch, logged


def test_uniform_draws_every_question_alike():
    sample, rng = Simulator([0.5] * 20), np.random.default_rng(0)
    counts = Counter()
    for _ in range(2000):
        batch, logged = choose(sfl.uniform, settings(rollouts=2), sample, rng=rng)
        counts.update(batch.questions.tolist())
        assert batch is sample.calls[-1] and logged == {}
    assert len(counts) == 20 and all(abs(count - 800) < 100 for count in counts.values())
    assert len(sample.calls) == 2000


def test_sfl_refreshes_every_t_keeps_the_k_most_learnable_and_mixes_by_rho():
    args, state, rng = settings(candidates=100), {}, np.random.default_rng(1)
    sample, batches = Simulator(P), []
    for iteration in range(8):
        batch, logged = choose(sfl.sfl, args, sample, state, iteration, rng)
        assert batch is sample.calls[-1]
        assert (iteration % 4 == 0) == ("pool_learnable" in logged)
        assert set(batch.questions[:4].tolist()) <= set(state["buffer"])
        batches.append(batch.questions)
    scorings = [call for call in sample.calls if len(call.questions) == 100]
    assert len(scorings) == 2 and len(sample.calls) == 10
    assert all(len(set(call.questions.tolist())) == 100 for call in scorings)  # no repetition
    assert len(state["buffer"]) == 10
    # all 8 attempts agree once in 128 times
    assert len(set(state["buffer"]) & set(range(90, 100))) >= 9
    # one buffer, drawn from again and again
    assert len({tuple(questions[:4]) for questions in batches[4:]}) > 1
    rest = np.concatenate([questions[4:] for questions in batches])
    assert (rest < 90).mean() > 0.6  # the other half is uniform


@pytest.mark.parametrize("rho, buffered", [(0.0, 0), (0.25, 2), (1.0, 8)])
def test_rho_is_the_share_from_the_buffer(rho, buffered):
    state = {}
    batch, _ = choose(sfl.sfl, settings(rho=rho), Simulator(P), state)
    inside = [i in state["buffer"] for i in batch.questions]
    assert all(inside[:buffered]) and len(inside) == 8


def test_what_is_logged_of_a_scoring():
    sample = Simulator(P)
    _, logged = choose(sfl.sfl, settings(candidates=100), sample)
    rewards = sample.calls[0].rewards
    assert logged["pool"] == 100 and len(logged["pool_histogram"]) == 9
    solved = [int((rewards.sum(1) == count).sum()) for count in range(9)]
    assert logged["pool_histogram"] == solved and 60 <= solved[8] < 63
    assert logged["pool_solved_by_all"] == pytest.approx(solved[8] / 100)
    assert logged["pool_solved_by_none"] == pytest.approx(solved[0] / 100)
    assert logged["pool_learnable"] == pytest.approx(sum(solved[1:8]) / 100)


@pytest.mark.parametrize(
    "p, budget",
    [(P, 100), (np.full(100, 0.5), 40), (np.zeros(100), 40)],
    ids="rare many no".split(),
)
def test_lilo_trains_on_the_most_learnable_it_drew(p, budget):
    sample = Simulator(p)
    batch, logged = choose(sfl.lilo, settings(max_candidates=budget), sample)
    drawn = np.concatenate([call.questions for call in sample.calls])
    assert len(drawn) == len(set(drawn.tolist())) == logged["pool"] <= budget
    scores = np.concatenate([call.learnability() for call in sample.calls])
    assert sorted(batch.learnability()) == pytest.approx(sorted(scores)[-8:])
    assert logged["pool"] == budget  # all are drawn: 4 right of 8 come before 1 of 8
    # the very responses that showed it, with their rewards
    groups = {i: row for call in sample.calls for i, row in zip(call.questions, call.groups)}
    rewards = {i: row for call in sample.calls for i, row in zip(call.questions, call.rewards)}
    for row, i in enumerate(batch.questions):
        assert batch.groups[row] == groups[i]
        assert batch.rewards[row].tolist() == rewards[i].tolist()


def test_dapo_takes_the_first_that_disagree():
    sample = Simulator(P)
    batch, logged = choose(sfl.dapo, settings(), sample)
    drawn = np.concatenate([call.questions for call in sample.calls])
    scores = np.concatenate([call.learnability() for call in sample.calls])
    learnable = drawn[scores > 0]
    assert batch.questions[: len(learnable)].tolist() == learnable[:8].tolist()
    assert logged["pool"] == len(drawn) == 40 and len(learnable) < 8  # the budget ended it
    sample = Simulator(np.full(100, 0.5))
    batch, logged = choose(sfl.dapo, settings(), sample)
    assert logged["pool"] in (8, 16) and (batch.learnability() > 0).all()


def test_mopps_takes_the_draws_nearest_a_half_and_forgets_only_what_it_saw():
    args, rng, same = settings(memory=0.6), np.random.default_rng(3), np.random.default_rng(3)
    sample, state, ab = Simulator(P), {}, {i: (1.0, 1.0) for i in range(100)}
    for iteration in range(30):
        batch, logged = choose(sfl.mopps, args, sample, state, iteration, rng)
        candidates = same.permutation(100)[:40].tolist()
        p = dict(zip(candidates, same.beta(*zip(*[ab[i] for i in candidates]))))
        nearest = sorted(candidates, key=lambda i: (p[i] - 0.5) ** 2)[:8]
        assert batch.questions.tolist() == nearest and batch is sample.calls[-1]
        means = [a * b / (a + b) / (a + b + 1) for a, b in (ab[i] for i in nearest)]
        assert logged["learnability_expected"] == pytest.approx(np.mean(means), abs=1e-5)
        for i, successes in zip(nearest, batch.rewards.sum(1)):
            a, b = ab[i]
            ab[i] = 0.6 * a + 0.4 * 1 + successes, 0.6 * b + 0.4 * 1 + 8 - successes
        assert np.allclose(state["counts"], list(ab.values()), atol=1e-4)


def test_greso_skips_by_the_length_of_the_streak_and_adapts():
    args, rng, same = settings(), np.random.default_rng(4), np.random.default_rng(4)
    sample, state, visits = Simulator(P), {}, {i: [] for i in range(100)}
    solved, failed = 0.5, 0.5  # q
    for iteration in range(60):
        first = len(sample.calls)
        batch, logged = choose(sfl.greso, args, sample, state, iteration, rng)
        skipped = set()
        for i, chance in enumerate(same.random(100)):
            latest = visits[i][-1:] or [4]
            changes = [n for n, k in enumerate(reversed(visits[i])) if k != latest[0]]
            z = changes[0] if changes else len(visits[i])
            keep = {0: failed**z, 8: solved**z}.get(latest[0], 1)
            skipped |= {i} if chance > max(keep, 0.01) else set()
        order = same.permutation(100).tolist()
        order = [i for i in order if i not in skipped] + [i for i in order if i in skipped]
        drawn = np.concatenate([call.questions for call in sample.calls[first:]]).tolist()
        rewards = np.concatenate([call.rewards for call in sample.calls[first:]])
        assert drawn == order[: len(drawn)] and len(drawn) <= 40 and logged["pool"] == len(drawn)
        disagree = [i for i, row in zip(drawn, rewards) if 0 < row.sum() < 8]
        assert batch.questions.tolist()[: len(disagree)] == disagree[:8]
        for i, row in zip(drawn, rewards):
            visits[i].append(int(row.sum()))
        solved += 0.01 if (rewards.sum(1) == 8).mean() < 1 / 12 else -0.01
        failed += 0.01 if (rewards.sum(1) == 0).mean() < 1 / 6 else -0.01
        assert state["q"] == pytest.approx([failed, solved]) and 0.05 < failed < 0.95
    often = [len(visits[i]) for i in range(90, 100)]
    assert np.mean(often) > 3 * np.mean([len(visits[i]) for i in range(90)])


def test_pools_draw_by_the_latest_success_alone():
    args, rng, same = settings(), np.random.default_rng(5), np.random.default_rng(5)
    sample, state, odds = Simulator(P), {}, [1.0] * 100  # at first all alike
    for iteration in range(60):
        batch, _ = choose(sfl.pools, args, sample, state, iteration, rng)
        chosen = same.choice(100, 8, replace=False, p=np.array(odds) / sum(odds))
        assert batch.questions.tolist() == chosen.tolist() and batch is sample.calls[-1]
        for i, successes in zip(chosen, batch.rewards.sum(1)):
            odds[i] = 1.0 if successes in (3, 4, 5, 6) else 0.2
    assert set(odds) == {0.2, 1.0}


def test_posterior_finds_the_frontier_without_scoring():
    args, rng = settings(rho=0.75), np.random.default_rng(0)
    state, levels = {}, ["easy"] * 60 + ["hard"] * 30 + ["between"] * 10
    sample, hits = Simulator(P, levels=levels), []
    for iteration in range(60):
        batch, logged = choose(sfl.posterior, args, sample, state, iteration, rng)
        assert len(sample.calls) == iteration + 1 and batch is sample.calls[-1]
        assert 0 < logged["learnability_expected"] <= 0.25
        hits.append((batch.questions[:6] >= 90).mean())
    assert hits[0] < 0.5 < 0.8 < np.mean(hits[20:])


def test_posterior_learns_its_prior_without_the_bias_of_its_choice():
    """Most questions are always solved; those that are not are chosen again and again."""
    p = np.repeat([1.0, 0.5], [1400, 600])
    args, rng = settings(rho=1.0, memory=1.0, questions=16), np.random.default_rng(0)
    state, solved = {}, []
    for iteration in range(100):
        batch, _ = choose(sfl.posterior, args, Simulator(p, iteration), state, iteration, rng)
        solved.append(batch.rewards.mean())
    total, successes, learnability = state["seen"][0]
    assert successes / total == pytest.approx(p.mean(), abs=0.06)
    assert learnability / total == pytest.approx((p * (1 - p)).mean(), abs=0.03)
    assert abs(np.mean(solved) - p.mean()) > 0.1  # what a plain mean would have said


def test_posterior_forgets_as_the_policy_moves():
    args, rng = settings(rho=0.75, memory=0.8), np.random.default_rng(0)
    state, hits = {}, []
    for iteration in range(160):
        p = P if iteration < 80 else np.roll(P, 50)  # the frontier moves
        batch, _ = choose(sfl.posterior, args, Simulator(p, iteration), state, iteration, rng)
        hits.append((p[batch.questions[:6]] == 0.5).mean())
    assert np.mean(hits[60:80]) > 0.7 and np.mean(hits[140:]) > 0.7


@pytest.mark.parametrize("name", ["greso", "pools", "mopps", "posterior"])
def test_foresight_shows_a_curriculum_what_another_chose(name):
    """Two batches of experiments.py's `replay`: first nothing is known, then what had disagreed is
    put above what had not."""
    asked = [data.Question(f"{i}?", "1", level=1) for i in range(40)]
    first = [[i, 1, successes, 8] for i, successes in enumerate([0, 8, 4, 4, 0, 8])]
    rows = [{"sampled": first}, {"sampled": first[::-1]}]
    batches, _ = experiments.replay(name, True, asked, rows)
    (early, _), (late, learnable) = batches
    assert np.ptp(early) < 1e-12 and learnable.tolist() == [False, False, True, True, False, False]
    assert late[learnable].min() > late[~learnable].max()
    pairs = [(late, learnable)], [(early, learnable)]
    assert [experiments.auc(batches) for batches in pairs] == [1, 0.5]


# --------------------------------------------------------------------------- the whole job

FAST = """--curriculum sfl --iterations 4 --questions 4 --rollouts 4 --candidates 8 --buffer_size 4
--score_rollouts 2 --max_candidates 8 --refresh_every 2 --eval_limit 12 --eval_every 2
--save_every 2 --max_new_tokens 24 --minibatch 8 --mc_rollouts 2 --device cpu""".split()


def run(base, out, *flags):
    sfl.main(["--model", base, "--out", str(out), *FAST, *flags])
    return read_rows(out / "metrics.jsonl")


def resume(out, *flags):
    sfl.main(["--resume", str(out), *flags])
    return read_rows(out / "metrics.jsonl")


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def saved_state(out):
    return torch.load(out / "state" / "training.pt", weights_only=True)


def saved_iteration(out):
    return json.loads(saved_state(out)["loop"])["iteration"]


def interrupt(patch, module, name, call):
    """Ctrl-C, the `call`-th time that the function is called."""
    function, calls = getattr(module, name), itertools.count(1)

    def wrapped(*arguments, **settings):
        if next(calls) == call:
            raise KeyboardInterrupt
        return function(*arguments, **settings)

    patch.setattr(module, name, wrapped)


KEYS = """iteration reward_mean solved_by_all solved_by_none learnable response_length
tokens_generated tokens_scored seconds_score seconds_rollout seconds_credit
seconds_update""".split()


@pytest.mark.parametrize(
    "algo, curriculum",
    [("ppo", "sfl"), ("vineppo", "uniform"), ("grpo", "lilo"), ("rloo", "posterior")],
)
def test_the_whole_job(base, tmp_path, capsys, algo, curriculum):
    out = tmp_path / "run"
    rows = run(base, out, "--algo", algo, "--curriculum", curriculum)
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert set(KEYS) <= set(row) and row["tokens_generated"] > 0
        assert ("clip_fraction" in row) == (row["optimizer_steps"] > 0)
        shares = row["solved_by_all"] + row["solved_by_none"] + row["learnable"]
        assert shares == pytest.approx(1)
        assert ("value_loss" in row) == (algo == "ppo")
        assert ("tokens_credit" in row) == (algo == "vineppo")
    assert ["eval_accuracy" in row for row in rows] == [False, True, False, True]
    scored = [row["tokens_scored"] > 0 for row in rows]
    if curriculum == "lilo":
        assert scored == [row["pool"] > 4 for row in rows]
    else:
        assert scored == [curriculum == "sfl" and i % 2 == 0 for i in range(4)]
    printed = capsys.readouterr().out
    assert "before" in printed and "after" in printed and str(out / "model") in printed

    model, tokenizer = checkpoint.load_model(out)
    assert data.stop_ids(model, tokenizer) == [tokenizer.eos_token_id]
    start = weights(base)
    changed = any(not torch.equal(start[name], x) for name, x in model.state_dict().items())
    assert changed == any(row["optimizer_steps"] for row in rows)
    assert (saved_state(out)["critic"] is not None) == (algo == "ppo")
    assert not [path for path in out.rglob("*") if path.suffix in (".tmp", ".old")]
    both = json.loads((out / "evaluation.json").read_text())
    assert both["after"]["greedy"]["accuracy"] == rows[-1]["eval_accuracy"]
    assert both["before"]["sampled"]["samples"] == 8
    spent = report.read_run(out)[-1]["tokens"]  # what eval.py --plot draws
    columns = ("tokens_generated", "tokens_scored", "tokens_credit")
    assert spent == sum(row.get(column, 0) for row in rows for column in columns)


IMITATION = """--curriculum uniform --questions 8 --epochs 2 --lr 1e-3 --iterations 3
--eval_every 1 --save_every 1""".split()


@pytest.mark.parametrize("algo", ["expert", "rcrl"])
def test_imitators_in_the_same_loop(base, tmp_path, capsys, algo):
    out = tmp_path / "run"
    rows = run(base, out, "--algo", algo, "--kl_coef", "0.1", *IMITATION)  # no part of the loss
    kept = json.loads(saved_state(out)["loop"])["curriculum"]["kept"]
    assert [row["iteration"] for row in rows] == [1, 2, 3]
    assert rows[-1]["kept"] == len(kept) and "kl" in rows[0] and "clip_fraction" not in rows[0]
    returns = Counter(value for _, value, _ in kept)
    if algo == "expert":
        assert returns.keys() <= {1}
        assert len(kept) == len({(question, tuple(ids)) for question, _, ids in kept})
    else:
        assert len(kept) == 3 * 8 * 4
        assert returns[1] == round(sum(row["reward_mean"] for row in rows) * 32)
    model, tokenizer = checkpoint.load_model(out)
    assert (algo == "rcrl") == (data.TAGS[1] in tokenizer.get_vocab())
    [prompt] = data.encode_prompts(tokenizer, data.arithmetic(1, 0, {1: 1}))
    assert (algo == "rcrl") == (prompt[0] == model.config.vocab_size - 1)
    capsys.readouterr()
    evaluation.main(["--model", str(out), "--limit", "12"])  # as it was trained, the tag included
    greedy = json.loads((out / "eval_arithmetic_test.json").read_text())["results"]["arithmetic"]
    assert greedy["greedy"]["accuracy"] == rows[-1]["eval_accuracy"]


def test_a_round_also_imitates_the_solutions_where_asked(base, tmp_path):
    flags = ["--solutions", "--iterations", "1", "--epochs", "1", "--minibatch", "200"]
    [row] = run(base, tmp_path / "run", "--algo", "expert", *IMITATION, *flags)
    kept = json.loads(saved_state(tmp_path / "run")["loop"])["curriculum"]["kept"]
    assert row["kept"] == len(kept) + len(data.load_questions("arithmetic", "train"))


def test_every_call_has_random_numbers_of_its_own(base, tmp_path, monkeypatch):
    seeds, generate = [], sfl.Engine.generate

    def watched(engine, prompts, *, temperature, seed, **settings):
        seeds.extend([seed] * (temperature > 0 and settings["n"] < 8))  # not of evaluations
        return generate(engine, prompts, temperature=temperature, seed=seed, **settings)

    monkeypatch.setattr(sfl.Engine, "generate", watched)
    run(base, tmp_path / "run", "--algo", "vineppo")
    assert len(seeds) == len(set(seeds)) == 4 + 2 + 4  # rollouts, scorings, credit


def test_epochs_kl_and_gradient_checkpointing(base, tmp_path):
    flags = "--algo ppo --kl_coef 0.1 --epochs 2 --gradient_checkpointing".split()
    rows = run(base, tmp_path / "run", *flags)
    assert rows[0]["optimizer_steps"] == 4 and rows[0]["kl"] >= 0 and rows[-1]["kl"] > 0


# --------------------------------------------------------------------------- checkpoints


def test_what_saves_memory_changes_nothing(base, tmp_path):
    plain = run(base, tmp_path / "a", "--algo", "ppo")
    saving = run(base, tmp_path / "b", "--algo", "ppo", "--offload_optimizer")
    assert without_clocks(saving) == without_clocks(plain)


def without_clocks(rows):
    return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows]


@pytest.mark.parametrize(
    "algo, curriculum",
    [
        ("ppo", "sfl"), ("grpo", "posterior"), ("expert", "uniform"), ("rcrl", "lilo"),
        ("rloo", "mopps"), ("grpo", "greso"), ("ppo", "pools"),
    ],
)  # fmt: skip
def test_resume_is_exact(base, tmp_path, algo, curriculum):
    flags = ["--algo", algo, "--curriculum", curriculum, "--warmup", "0.5"]
    straight = run(base, tmp_path / "a", *flags)
    with pytest.MonkeyPatch.context() as patch:  # after the checkpoint of iteration 2
        updates = (sfl.sft, "imitate") if algo in sft.IMITATORS else (sfl.ppo, "update")
        interrupt(patch, *updates, call=4)
        with pytest.raises(SystemExit) as end:
            run(base, tmp_path / "b", *flags)
    assert end.value.code == 130
    assert len(read_rows(tmp_path / "b" / "metrics.jsonl")) == 3
    assert saved_iteration(tmp_path / "b") == 2
    weights(tmp_path / "b" / "model")  # a whole model
    assert without_clocks(resume(tmp_path / "b")) == without_clocks(straight)
    a, b = (weights(tmp_path / name / "model") for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_kill_at_each_step_of_each_save(base, tmp_path):
    """The k-th attempt dies just before its k-th file is renamed into its place."""
    straight, killed = tmp_path / "a", tmp_path / "b"
    expected = without_clocks(run(base, straight, "--lr", "1e-2"))
    for attempt in itertools.count(1):
        with pytest.MonkeyPatch.context() as patch:
            interrupt(patch, checkpoint, "put_in_place", call=attempt)
            try:
                if (killed / "config.json").exists():
                    rows = resume(killed)
                else:
                    shutil.rmtree(killed, ignore_errors=True)  # nothing was saved
                    rows = run(base, killed, "--lr", "1e-2")
                break
            except SystemExit as end:
                assert end.code == 130
    assert attempt > 8 and without_clocks(rows) == expected
    evaluated = (straight / "evaluation.json").read_text()
    assert (killed / "evaluation.json").read_text() == evaluated
    resume(straight)  # which has ended: evaluated again, as it is now
    assert (straight / "evaluation.json").read_text() == evaluated
    a, b = (weights(folder / "model") for folder in (straight, killed))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", ["config.json", "evaluation.json", "metrics.jsonl"])
def test_a_kill_while_a_file_is_written_leaves_the_old_one(base, tmp_path, name):
    """Half of it is there, then nothing more happens: of whichever write."""
    out = tmp_path / "run"
    run(base, out, "--iterations", "2")
    old = (out / name).read_text()
    write_text = Path.write_text

    def half(path, text, *arguments, **settings):
        if path.name.startswith(name):
            write_text(path, text[: len(text) // 2])
            raise KeyboardInterrupt
        return write_text(path, text, *arguments, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "write_text", half)
        with pytest.raises(SystemExit):
            resume(out, "--iterations", "4")
    if name != "evaluation.json":  # which comes last: the run has gone on
        assert (out / name).read_text() == old
    assert [row["iteration"] for row in resume(out, "--iterations", "4")] == [1, 2, 3, 4]
    json.loads((out / "evaluation.json").read_text())["after"]


def test_config_says_how_many_iterations_a_resumed_run_has(base, tmp_path):
    run(base, tmp_path / "run", "--iterations", "2")
    resume(tmp_path / "run", "--iterations", "3", "--save_every", "1")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["iterations"], config["save_every"]) == (3, 1)


def test_checkpoints_of_a_tokenizer_with_several_chat_templates(base, tmp_path):
    """These lie in a folder of their own."""
    model, tokenizer = checkpoint.load_model(base)
    tokenizer.chat_template = {"default": CHAT, "tools": CHAT + "!"}
    checkpoint.save_model(model, tokenizer, tmp_path / "model")
    run(str(tmp_path / "model"), tmp_path / "run")  # three checkpoints
    saved = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert saved.chat_template == tokenizer.chat_template


def test_a_model_trained_on_plain_prompts_is_saved_without_its_template(base, tmp_path, capsys):
    model, tokenizer = checkpoint.load_model(base)
    tokenizer.chat_template = CHAT
    checkpoint.save_model(model, tokenizer, tmp_path / "model")
    run(str(tmp_path / "model"), tmp_path / "run", "--chat", "off", "--iterations", "1")
    assert "prompted raw" in capsys.readouterr().err
    saved = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert saved.chat_template is None  # so whoever loads it prompts it as it was trained


@pytest.mark.parametrize("where", ["padded_batch", "value_loss"])
def test_when_memory_runs_out_the_cache_is_freed(where, base, tmp_path, monkeypatch):
    """In the first pass, which is the critic's values, and in the update."""
    function, freed, calls = getattr(sfl.ppo, where), [], itertools.count()
    free = sfl.Engine.free
    monkeypatch.setattr(sfl.Engine, "free", lambda engine: freed.append(1) or free(engine))

    def full(*arguments):
        if next(calls) == 0:
            raise torch.OutOfMemoryError
        return function(*arguments)

    monkeypatch.setattr(sfl.ppo, where, full)
    with pytest.warns(UserWarning, match="--tokens_per_microbatch 1024"):
        rows = run(base, tmp_path / "run")
    assert freed == [1] and len(rows) == 4
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["tokens_per_microbatch"] == 2048  # as it was given


def test_dry_run_says_what_a_run_takes(base, capsys):
    sfl.main(["--model", base, "--dry_run", "--device", "cpu"])
    said = capsys.readouterr().out
    assert "0.1 million parameters, ppo on cpu" in said and "together" in said


def test_a_folder_with_a_run_is_refused_and_resume_keeps_its_settings(base, tmp_path):
    out = tmp_path / "run"
    run(base, out, "--iterations", "2")
    before = (out / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match="--resume.*--out"):
        run(base, out)
    with pytest.raises(ValueError, match="--lr 0.5 cannot change on --resume"):
        resume(out, "--lr", "0.5")
    with pytest.raises(ValueError, match="no run there"):
        resume(tmp_path / "nowhere")
    assert (out / "metrics.jsonl").read_text() == before
    assert len(resume(out, "--iterations", "3")) == 3
    assert (out / "metrics.jsonl").read_text().startswith(before)


def test_two_runs_at_once_get_folders_of_their_own(base, tmp_path):
    flags = [*FAST, "--iterations", "1", "--eval_limit", "4", "--model", base]
    runs = [
        subprocess.Popen(
            [sys.executable, ROOT / "sfl.py", *flags, "--seed", seed], cwd=tmp_path,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for seed in "01"
    ]  # fmt: skip
    for job in runs:
        errors = job.communicate()[1]
        assert job.returncode == 0, errors
    folders = [tmp_path / "runs" / f"arithmetic-ppo-sfl-{i}" for i in (1, 2)]
    seeds = [json.loads((folder / "config.json").read_text())["seed"] for folder in folders]
    assert sorted(seeds) == [0, 1]


def test_a_run_in_progress_is_not_trampled(base, tmp_path):
    out = tmp_path / "run"
    run(base, out, "--iterations", "2")
    before = (out / "metrics.jsonl").read_text()
    with checkpoint.claim(Namespace(resume=out)):
        with pytest.raises(ValueError, match="in use by a run in progress"):
            resume(out, "--iterations", "3")
    assert (out / "metrics.jsonl").read_text() == before
    assert len(resume(out, "--iterations", "3")) == 3


@pytest.mark.parametrize(
    "content", [None, "", "[1]", '{"results": {}}', '{"algo": "ppo"}'], ids=str
)
def test_resume_of_a_folder_that_is_no_run(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=f"--resume {tmp_path}: no run there") as error:
        resume(tmp_path)
    assert "\n" not in str(error.value)


def test_resume_with_changed_data_is_told_so(base, tmp_path):
    rows = [{"question": f"{i}+1", "answer": str(i + 1)} for i in range(12)]
    for split in ("train", "test"):
        write_rows(tmp_path / f"{split}.jsonl", rows)
    run(base, tmp_path / "run", "--dataset", str(tmp_path), "--iterations", "2")
    write_rows(tmp_path / "train.jsonl", rows[:-1])
    with pytest.raises(ValueError, match="--resume.*other questions"):
        resume(tmp_path / "run", "--iterations", "3")
    # What was refused has changed nothing, so the run goes on with its own files.
    write_rows(tmp_path / "train.jsonl", rows)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["iterations"] == 2
    assert len(resume(tmp_path / "run")) == 2


def test_resume_of_a_run_that_lost_its_state_does_not_start_anew(base, tmp_path):
    run(base, tmp_path / "run", "--iterations", "2")
    shutil.rmtree(tmp_path / "run" / "state")
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match="has metrics but no .*training.pt"):
        resume(tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_resume_of_another_version_leaves_out_settings_it_does_not_know(base, tmp_path):
    run(base, tmp_path / "run", "--iterations", "2")
    file = tmp_path / "run" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"stop_early": False}))
    assert len(resume(tmp_path / "run", "--iterations", "3")) == 3


def test_more_iterations_of_a_falling_learning_rate_are_announced(base, tmp_path, capsys):
    flags = ["--lr_schedule", "linear", "--iterations", "2"]
    run(base, tmp_path / "run", *flags)
    assert "learning rate" not in capsys.readouterr().err
    resume(tmp_path / "run", "--iterations", "4")
    assert "learning rate" in capsys.readouterr().err


# --------------------------------------------------------------------------- other models and data


@pytest.fixture(scope="module")
def gsm8k_like(bpe, tmp_path_factory):
    """A folder of train.jsonl and test.jsonl in GSM8K's format, and of a model with a byte-level
    BPE."""
    folder, rows = tmp_path_factory.mktemp("gsm8k"), []
    for a, b in itertools.product(range(2, 14), range(2, 7)):
        question = f"Tom has {a} apples and buys {b} more. How many apples does he have?"
        solution = f"Tom has {a} + {b} = <<{a}+{b}={a + b}>>{a + b} apples.\n#### {a + b}"
        rows.append({"question": question, "answer": solution})
    write_rows(folder / "train.jsonl", rows[:40])
    write_rows(folder / "test.jsonl", rows[40:])
    model = small_llama(len(bpe), max_position_embeddings=512, eos_token_id=0)
    checkpoint.save_model(model, bpe, folder / "model")
    return folder


CHAT = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
CHAT += "{% if add_generation_prompt %}>{% endif %}"


@pytest.mark.parametrize(
    "template, start, end",
    [(None, "[MATH_TASK] Problem:\nTom has", "Solution:"), (CHAT, "[Tom has", "]>")],
)
def test_gsm8k_files_with_a_bpe_model(gsm8k_like, tmp_path, monkeypatch, template, start, end):
    model, tokenizer = checkpoint.load_model(gsm8k_like / "model")
    tokenizer.chat_template = template
    checkpoint.save_model(model, tokenizer, tmp_path / "model")
    prompts, generate = [], sfl.Engine.generate

    def watched(engine, some, **settings):
        prompts.extend(some)
        return generate(engine, some, **settings)

    monkeypatch.setattr(sfl.Engine, "generate", watched)
    flags = "--dataset gsm8k --context 512 --temperature 0.6 --top_p 0.9 --iterations 2".split()
    flags += ["--data-dir", str(gsm8k_like)]
    run(str(tmp_path / "model"), tmp_path / "run", *flags)
    text = AutoTokenizer.from_pretrained(tmp_path / "run" / "model").decode(prompts[0])
    assert text.startswith(start) and text.endswith(end)


def test_skip_long_leaves_long_questions_out(base, tmp_path, capsys):
    rows = [{"question": "1+1" * (60 if i == 3 else 1), "answer": "2"} for i in range(12)]
    for split in ("train", "test"):
        write_rows(tmp_path / f"{split}.jsonl", rows)
    flags = ["--dataset", str(tmp_path), "--context", "150", "--temperature", "1.0"]
    with pytest.raises(ValueError, match=r"training question 3 is .*--skip_long"):
        run(base, tmp_path / "run", *flags)
    flags += ["--skip_long", "--eval_limit", "5", "--iterations", "1"]
    run(base, tmp_path / "run", *flags)
    assert "left out 1 of 12 training questions" in capsys.readouterr().err


def test_what_is_too_long_is_what_the_engine_refuses(tokenizer):
    rope = dict(type="longrope", short_factor=[1.0] * 4, long_factor=[2.0] * 4)
    config = Phi3Config(
        hidden_size=32, num_attention_heads=4, num_hidden_layers=1, pad_token_id=0,
        original_max_position_embeddings=64, rope_scaling=rope,
    )  # fmt: skip
    args = Namespace(context=256, max_new_tokens=60, skip_long=True, chat="off")
    questions = [data.worked((5, *["+7"] * steps)) for steps in (1, 5)]  # of 4 and 12 tokens
    prompts = data.encode_prompts(tokenizer, questions)
    assert [len(prompt) for prompt in prompts] == [4, 12]
    longest = attention.longest_context(config)
    assert longest == 64 and memory.fitting(prompts, longest, args, "training") == [0]


# --------------------------------------------------------------------------- the command line


def test_defaults_follow_the_data_set():
    papers = vars(sfl.parse(["--dataset", "gsm8k"]))
    assert papers == vars(sfl.Settings(dataset="gsm8k"))
    assert papers["curriculum"] == "sfl" and papers["iterations"] == 650
    embedded = sfl.parse([])
    assert (embedded.model, embedded.curriculum, embedded.lr) == ("tiny", "posterior", 2e-4)
    assert sfl.parse(["--lr", "0.5"]).lr == 0.5
    rounds = sfl.parse(["--algo", "rcrl"])
    assert (rounds.questions, rounds.epochs, rounds.save_every, rounds.context) == (256, 2, 1, 256)
    rounds = sfl.parse(["--algo", "expert", "--dataset", "gsm8k", "--iterations", "3"])
    assert (rounds.questions, rounds.iterations, rounds.lr) == (1024, 3, 1e-5)


def test_help_says_what_each_setting_is_for(capsys):
    with pytest.raises(SystemExit):
        sfl.parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert (
        "questions trained on in an iteration (N_l)" in text
        and "{ppo,vineppo,grpo,rloo,expert,rcrl}" in text
    )


@pytest.mark.parametrize("name", sorted(sfl.PRESETS.keys() - {"home-gsm8k", "laptop"}))
def test_presets_are_the_papers_settings(name):
    args = sfl.parse(["--preset", name, "--algo", "vineppo"])
    assert args.algo == "vineppo"  # what is given has the last word
    papers = {"questions": 64, "rollouts": 8, "lr": 1e-6, "epochs": 2, "minibatch": 64, "rho": 0.5}
    papers |= {"temperature": 0.6, "top_p": 0.9, "max_new_tokens": 1024, "kl_coef": 1e-4}
    papers |= {"max_candidates": 256, "lr_schedule": "linear", "clip": 0.2, "score_rollouts": 8}
    assert {key: getattr(args, key) for key in papers} == papers
    refresh = (10, 256, 64) if "fast" in name else (50, 1280, 256)
    assert (args.refresh_every, args.candidates, args.buffer_size) == refresh
    assert args.dataset == name.rpartition("-")[2] and args.curriculum in name or "orz" in name


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--preset ppo", "--preset ppo: choose from uniform-gsm8k, "),
        ("--dataset gsm9k", "gsm9k"),
        ("--algo dqn", "invalid choice: 'dqn'.*ppo"),
        ("--no_such_flag", "no_such_flag"),
        ("--rho 1.5", r"--rho 1.5 must be in \[0, 1\]"),
        ("--rho -0.1", "--rho"),
        ("--rho nan", "--rho"),
        ("--lr fast", "fast"),
        ("--iterations 0", "--iterations 0 must be at least 1"),
        ("--lr inf", "--lr inf must be at least 0, and finite"),
        ("--resume=", "--resume : no run there"),
        ("--curriculum uniform --questions 5000", "--questions 5000 is more than the"),
        ("--candidates 5000", "--candidates 5000 is more than the"),
        ("--buffer_size 9", "--buffer_size 9 is more than --candidates 8"),
        ("--buffer_size 1", "more than --buffer_size 1"),
        ("--curriculum lilo --max_candidates 3", "--max_candidates 3"),
        ("--curriculum mopps --max_candidates 3", "--max_candidates 3"),
        ("--algo grpo --rollouts 1", "--rollouts 1"),
        ("--max_new_tokens 255", "no training question fits the context of 256"),
        ("--temperature 0", "--temperature"),
        ("--data-dir x", "--data-dir x is for data sets with a name"),
        ("--eval_limit 100000", "cannot take 100000 questions"),
        ("--device cuda:99", "cuda:99"),
        ("--dtype int8", "int8"),
        ("--model nobody/nothing", "nobody/nothing.*--model"),
        ("--model tiny --dataset gsm8k", "--model tiny knows only arithmetic"),
        ("--dataset math500", "math500 has no questions to train on"),
        ("--fsdp", "--fsdp is for several processes: torchrun"),
        ("--fsdp --offload_optimizer", "--fsdp does not go with --offload_optimizer"),
        ("--fsdp --algo rcrl", "--fsdp does not go with --algo rcrl"),
    ],
)
def test_bad_flags(base, tmp_path, flags, message):
    with pytest.raises(ValueError, match=message) as error:
        run(base, tmp_path / "run", *flags.split())
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_bad_data(base, tmp_path):
    write_rows(tmp_path / "train.jsonl", [{"question": "1+1?", "answer": "2"}, "not json"])
    with pytest.raises(ValueError, match=r"train.jsonl, line 2"):
        run(base, tmp_path / "run", "--dataset", str(tmp_path))
    assert not (tmp_path / "run").exists()


def test_a_model_that_cannot_stop(base, tmp_path):
    model, tokenizer = checkpoint.load_model(base)
    tokenizer.eos_token = None
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    checkpoint.save_model(model, tokenizer, tmp_path / "endless")
    with pytest.raises(ValueError, match="stop token"):
        run(str(tmp_path / "endless"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_bad_flag_of_the_program():
    """The exit code and the streams, which only a process has."""
    command = [sys.executable, "sfl.py", "--rho", "7"]
    bad = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert bad.returncode == 2 and bad.stdout == ""
    assert bad.stderr == "sfl.py: --rho 7.0 must be in [0, 1]\n"


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_the_iteration_finish_and_saves_it(base, tmp_path, number, code):
    out = tmp_path / "run"
    flags = "--iterations 100000 --eval_every 100000 --save_every 100000".split()
    command = [sys.executable, "sfl.py", *FAST, *flags, "--model", base, "--out", str(out)]
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "text": True}
    job = subprocess.Popen(command, cwd=ROOT, **pipes)
    metrics = Path(out, "metrics.jsonl")
    while job.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        time.sleep(0.05)
    job.send_signal(number)
    errors = job.communicate()[1]
    assert job.returncode == code and "--resume" in errors and "Traceback" not in errors
    assert len(read_rows(metrics)) == saved_iteration(out) >= 2
    weights(out / "model")


def test_three_bad_steps_in_a_row_end_the_run_saved(base, tmp_path, monkeypatch, capsys):
    calls = itertools.count(1)
    clip = sfl.ppo.clip_grad_norm_

    def broken(*arguments):
        return clip(*arguments) * (float("nan") if next(calls) in (1, 3, 4, 5) else 1)

    monkeypatch.setattr(sfl.ppo, "clip_grad_norm_", broken)
    out = tmp_path / "run"
    flags = "--algo grpo --iterations 40 --eval_every 40 --minibatch 100 --curriculum dapo".split()
    with pytest.raises(SystemExit) as end:
        run(base, out, *flags)
    assert end.value.code == 2
    rows = read_rows(out / "metrics.jsonl")
    steps = [
        row["nonfinite_steps"] for row in rows if row["optimizer_steps"] or row["nonfinite_steps"]
    ]
    assert steps == [1, 0, 1, 1, 1] and saved_iteration(out) == len(rows)
    errors = capsys.readouterr().err
    assert "three NaN or infinite steps of the policy" in errors and "--resume" in errors
    assert errors.count("no step was made") == 1  # each warning once
    monkeypatch.setattr(sfl.ppo, "clip_grad_norm_", clip)
    assert len(resume(out)) == 40


def row(**changes):
    usual = {"iteration": 1, "truncated": 0.0, "learnable": 0.3, "reward_mean": 0.5, "entropy": 1.0}
    return usual | changes


@pytest.mark.parametrize(
    "name, bad",
    [
        ("nan", {"nonfinite_steps": 1}),
        ("kl", {"kl": 1.5}),
        ("truncated", {"truncated": 0.6}),
        ("agree", {"learnable": 0.0}),
        ("reward", {"reward_mean": 0.25}),
        ("entropy", {"entropy": 0.001}),
    ],
)
def test_alarms(name, bad):
    usual = [row(reward_mean=i / 20) for i in range(10)]
    assert list(report.alarms(usual)) == []
    changed = [each | bad for each in usual]
    assert [alarm for alarm, _ in report.alarms(changed)] == [name]
    late = name in ("agree", "reward", "entropy")  # ten iterations long
    assert (list(report.alarms([usual[0], *changed[1:]])) == []) == late


# Two processes, which meet at a free port: two suites may run at once.
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def test_two_processes_do_what_one_does(base, tmp_path):
    """PPO over gloo: the same questions, responses and rewards, the same losses. An iteration with
    whole models, one with models in parts, then one process alone: each goes on from the last."""
    one, two = tmp_path / "one", tmp_path / "two"
    flags = ["--curriculum", "lilo", "--kl_coef", "0.01", "--epochs", "2"]
    expected = run(base, one, *flags)

    def torchrun(*flags):
        command = [*TORCHRUN, "sfl.py", *flags]
        job = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert job.returncode == 0, job.stderr
        assert job.stdout.count("metrics  ") == 1  # one of them speaks

    start = ["--model", base, "--out", str(two), *FAST, *flags]
    torchrun(*start, "--iterations", "1")
    torchrun("--resume", str(two), "--fsdp", "--iterations", "2")
    assert json.loads((two / "model" / "config.json").read_text())["architectures"] == [
        "LlamaForCausalLM"
    ]
    rows = resume(two, "--iterations", "4")
    assert len(rows) == len(expected)
    for ours, theirs in zip(rows, without_clocks(expected)):
        for name in theirs:
            if isinstance(theirs[name], list):
                assert ours[name] == theirs[name]
                continue
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name
    a, b = (weights(folder / "model") for folder in (one, two))
    assert all(torch.allclose(a[name], b[name], atol=1e-5) for name in a)


def test_a_process_that_dies_ends_all(base, tmp_path):
    command = [*TORCHRUN, "sfl.py", "--model", base, *FAST, "--rho", "7"]
    job = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert job.returncode != 0 and "--rho 7.0 must be in [0, 1]" in job.stderr


def test_what_would_train_quietly_on_nonsense(tiny, bpe, capsys):
    def check(questions, prompts=None, chat="auto", rows=None):
        model = small_llama(rows or len(bpe))
        args = Namespace(model="m", dataset="d", chat=chat, algo="ppo")
        prompts = prompts or [[i] for i in range(len(questions))]
        checks.check_start(args, model, bpe, questions, prompts, evaluation.grade)

    good = [data.Question(f"{i}?", str(i)) for i in range(40)]
    check(good)
    assert capsys.readouterr().err == ""
    with pytest.raises(ValueError, match="tokens, its embedding 9 rows"):
        check(good, rows=9)
    with pytest.raises(ValueError, match="leaves the question out"):
        check(good, prompts=[[1, 2]] * 40)
    sentences = [data.Question(f"{i}?", "x" * 400, kind="math") for i in range(4)]
    with pytest.raises(ValueError, match="no grader accepts.*--answer_field"):
        check(sentences)
    check(good[:15] + sentences[:1])
    assert "1 of 16 gold answers" in capsys.readouterr().err
    bpe = copy.deepcopy(bpe)
    bpe.chat_template = "{{ messages[0]['content'] }}"
    check(good, chat="off")
    assert "prompted raw" in capsys.readouterr().err
