"""Train a language model on the questions it can almost answer: sampling for learnability (SFL).

    python sfl.py                                                # a tiny model, minutes on a CPU
    python sfl.py --algo ppo --dataset gsm8k --model HUB_ID_OR_DIR      # the papers' settings
    python sfl.py --algo grpo --curriculum uniform --out runs/uniform   # a baseline

A policy samples n responses to a question and each is graded 0 or 1. If all are right or all are
wrong there is nothing to compare, and every policy-gradient method learns next to nothing from that
question. What teaches is the variance of success,

    learnability = p (1 - p)                     p: the policy's success rate on the question

zero where the model always fails, zero where it always succeeds, largest where it succeeds half of
the time. SFL (arXiv 2502.12272, after 2408.15099) samples questions by it. LILO, the same paper's
later version, shows that the expected improvement from a question grows linearly with it. Three
questions, eight responses each:

    12+7            1 1 1 1 1 1 1 1    learnability 0       known
    12+7-5+9        0 1 0 0 1 0 0 0    0.21 (unbiased)      almost: train on this one
    12+7-5+9-...    0 0 0 0 0 0 0 0    0                    out of reach

One iteration of training, `train` from top to bottom:

    questions --choose--> prompts --engine.generate--> rollouts --eval.rewards--> rewards
        ^                                                                            |
        +--- learnability <--- successes      policy <--ppo.update-- advantages <----+
            ppo: critic; vineppo: Monte Carlo; grpo, rloo: group; expert, rcrl: imitation, sft.py

This file in order: settings; learnability; the curricula, eight ways to choose; the loop; the
set-up that makes policy, critic and optimizer; the command line. `minimal.py` is all of it, naive.
"""

import copy
import json
import math
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch

import data
import eval as evaluation
import ppo
import sft
import vineppo
from plumbing import checkpoint, checks, commands, memory, processes, report
from plumbing.answers import Judges
from plumbing.attention import copy_of, longest_context
from plumbing.processes import rank
from rollout import Engine, Rollout, seed_of

# --------------------------------------------------------------------------- settings


Choosers = Literal["uniform", "sfl", "lilo", "dapo", "greso", "pools", "mopps", "posterior"]


@dataclass
class Settings:
    """Reinforcement learning on the questions that a model can almost answer. The defaults below
    are the papers' on GSM8K. Without --dataset, and with presets, expert and rcrl, others hold: see
    EMBEDDED, PRESETS and the like in sfl.py."""

    # The papers are arXiv 2502.12272 and 2410.01679; the names in brackets are their symbols.
    algo: Literal["ppo", "vineppo", "grpo", "rloo", "expert", "rcrl"] = "ppo"  # how it learns
    curriculum: Choosers = "sfl"  # chooses questions
    iterations: int = 650  # iterations of training
    seed: int = 0  # of everything random in the training

    # choosing questions
    questions: int = 64  # questions trained on in an iteration (N_l)
    rollouts: int = 8  # responses to each question
    rho: float = 0.5  # sfl, posterior: share of a batch chosen by learnability; else uniformly
    refresh_every: int = 50  # sfl: iterations between two scorings (T)
    candidates: int = 1280  # sfl: questions scored each time (N)
    buffer_size: int = 256  # sfl: how many of them are kept (K)
    score_rollouts: int = 8  # sfl: responses to each candidate (L)
    max_candidates: int = 256  # lilo, dapo, greso, mopps: questions drawn in an iteration, at most
    memory: float = 0.98  # posterior: share of old counts kept per iteration; mopps: per visit

    # sampling
    temperature: float = 0.6  # of the sampling, and of the log-probs in the loss
    top_p: float = 0.9  # nucleus of the sampling
    max_new_tokens: int = 1024  # longest response; a longer one is cut off and worth 0
    context: int = 2048  # longest prompt and response together, in tokens

    # the update
    lr: float = 1e-6  # learning rate of the policy (AdamW, no weight decay)
    critic_lr: float = 1e-6  # learning rate of the critic
    warmup: float = 0.03  # share of the iterations in which the learning rate rises
    lr_schedule: Literal["constant", "linear"] = "linear"  # after that; linear: to 0 at the end
    epochs: int = 2  # passes over an iteration's rollouts
    minibatch: int = 64  # rollouts per optimizer step
    loss_average: Literal["token", "response"] = "token"  # mean over tokens, or over responses
    clip: float = 0.2  # how far the ratio may move and still gain (PPO's epsilon)
    value_clip: float = 0.2  # the same for the critic's values
    kl_coef: float = 1e-4  # weight of a response's KL to the starting model
    kl_sample: int = 16  # with kl_coef 0: rollouts whose KL is measured; 0: none
    gamma: float = 1.0  # discount
    lam: float = 1.0  # GAE's lambda; at 1: return - V(s_t), at 0: r_t + V(s_{t+1}) - V(s_t)
    max_ratio: float = 10.0  # a minibatch whose mean ratio is larger is skipped
    max_grad_norm: float = 1.0  # a longer gradient is scaled down to this norm

    # vineppo; expert iteration and return-conditioned RL
    mc_rollouts: int = 9  # vineppo: fresh responses from each state (K)
    mc_max_steps: int = 0  # vineppo: steps judged in a response; 0: 25 lines, or 20 sentences
    mc_spend: Literal["all", "bisect"] = "all"  # vineppo: all states, or only where values change
    steps: Literal["auto", "lines", "math"] = "auto"  # vineppo: a step is a line; math: a sentence
    expert_from: Literal["initial", "last"] = "initial"  # expert, rcrl: where a round starts
    solutions: bool = False  # expert, rcrl: imitate the data set's own solutions, too

    # memory and speed
    tokens_per_microbatch: int = 16384  # padded tokens at a time; lower it if memory runs out
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory
    fsdp: bool = False  # under torchrun: each process keeps a part of the weights
    offload_optimizer: bool = False  # Adam's moments wait in host memory: less on the GPU, slower
    slots: int = 0  # sequences decoded at once; 0: by free memory
    device: str = "auto"  # auto, cpu, cuda or mps
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of products; auto: bfloat16 if fast

    # how often
    eval_every: int = 25  # iterations between two evaluations (held-out, greedy)
    eval_limit: int = 0  # held-out questions, a random subset; 0: all
    save_every: int = 25  # iterations between two checkpoints

    # data and model
    dataset: str = "arithmetic"  # names, joined by commas, or a file's or folder's path
    data_dir: str | None = None  # a folder with the named data set's files, instead of the hub
    question_field: str | None = None  # the rows' name for the question; usual ones are found
    answer_field: str | None = None  # and for the answer
    solution_field: str | None = None  # and for the solution
    bits: int = 24  # parity: bits of a question
    p_cot: float = 0.25  # parity: share of the demonstrations that are long
    model: str = "realtreetune/rho-1b-sft-GSM8K"  # tiny, a hub id or a model's folder
    chat: Literal["auto", "on", "off"] = "auto"  # prompt through the chat template; auto: if any
    stop: str | None = None  # a text that ends a response and is not graded; \n: a newline
    last_number: bool = False  # a response with no marked answer is graded by its last number
    skip_long: bool = False  # leave out questions that do not fit the context
    judges: int = 0  # processes that compare LaTeX answers; 0: one a core

    # the run
    preset: str | None = None  # a paper's run by name; other flags change it
    out: str | None = None  # folder of the run; by default a new one under runs/
    resume: str | None = None  # a run's folder: go on exactly where its checkpoint is
    dry_run: bool = False  # say what memory the run would take, and stop
    tensorboard: bool = False  # log to TensorBoard, too (in the run's folder)
    wandb: bool = False  # log to Weights & Biases, too
    cache: str = "runs/cache"  # where the tiny starting model is kept


# The tiny model and the data that is made here: small batches, large steps.
EMBEDDED = """--model tiny --curriculum posterior --iterations 76 --questions 16 --rho 1
--refresh_every 15 --candidates 512 --buffer_size 40 --max_candidates 128 --memory 0.95
--temperature 1 --top_p 1 --max_new_tokens 96 --context 256 --lr 2e-4 --critic_lr 1e-3 --epochs 1
--lr_schedule constant --minibatch 128 --kl_coef 0 --eval_every 10 --save_every 10
--tokens_per_microbatch 2048 """
# Imitation makes few rounds of many samples. SHORT: with the data made here; LONG: with other data.
ROUNDS = "--questions 256 --minibatch 64 --eval_every 1 --save_every 1 "
SHORT_ROUNDS = {
    "expert": ROUNDS + "--iterations 12 --epochs 3 --lr 1e-3",
    "rcrl": ROUNDS + "--iterations 8 --epochs 2 --lr 2e-3 --expert_from last",
}
LONG_ROUNDS = "--questions 1024 --iterations 8 --lr 1e-5 --eval_every 1 --save_every 1"
# The papers' runs: by PPO, or by VinePPO with --algo vineppo; grpo-orz by GRPO.
GSM8K = r"--dataset gsm8k --stop \n\n\nProblem: --curriculum "
MATH = r"--dataset math --stop \n\n\nProblem: --model realtreetune/rho-1b-sft-MATH "
MATH += "--iterations 1000 --curriculum "
FAST = "sfl --refresh_every 10 --candidates 256 --buffer_size 64"
PRESETS = {
    "uniform-gsm8k": GSM8K + "uniform",
    "sfl-gsm8k": GSM8K + "sfl",
    "sfl-fast-gsm8k": GSM8K + FAST,
    "lilo-gsm8k": GSM8K + "lilo",
    "uniform-math": MATH + "uniform",
    "sfl-math": MATH + "sfl",
    "sfl-fast-math": MATH + FAST,
    "lilo-math": MATH + "lilo",
    "grpo-orz": "--algo grpo --dataset orz --curriculum lilo",
    # Nobody's paper: for one card of 24 GB at home.
    "home-gsm8k": """--algo grpo --dataset gsm8k --curriculum posterior --questions 32 --epochs 1
        --model Qwen/Qwen2.5-0.5B-Instruct --max_new_tokens 512 --context 1024 --iterations 200
        --temperature 1 --top_p 1 --kl_coef 0 --gradient_checkpointing
        --tokens_per_microbatch 8192""",
    # Nobody's paper: for a model of some 135 million parameters (give --model and --dataset), on a
    # core or two.
    "laptop": """--algo grpo --curriculum posterior --questions 8 --minibatch 64 --epochs 1
        --iterations 80 --lr 1e-5 --lr_schedule constant --kl_coef 0 --temperature 1 --top_p 1
        --max_new_tokens 96 --eval_limit 256 --eval_every 10 --save_every 10 --kl_sample 0""",
}
# What --resume may change: nothing that the learning depends on, but for the number of iterations,
# which warm-up and linear decay go by.
CHANGEABLE = """iterations eval_every save_every device slots tokens_per_microbatch fsdp
gradient_checkpointing offload_optimizer data_dir cache judges""".split()


# --------------------------------------------------------------------------- learnability


def learnability(successes, attempts):
    """Unbiased estimate of p (1 - p) from `successes` of `attempts`: s (a - s) / (a (a - 1)).
    Numbers or arrays. ValueError: fewer than 2 attempts, from which no variance can be estimated.

    The plug-in (s/a)(1 - s/a) is too low by the factor (a - 1)/a on average: the draws are measured
    against their own mean. It would prefer questions that were tried more often than others."""
    successes = np.asarray(successes, dtype=float)
    attempts = np.asarray(attempts, dtype=float)
    too_few = np.any(attempts < 2)
    impossible = np.any(successes < 0) or np.any(successes > attempts)
    if too_few or impossible:
        need = "need at least 2 attempts, and successes between 0 and the attempts"
        raise ValueError(f"learnability of {successes} successes in {attempts} attempts: {need}")
    failures = attempts - successes
    return successes * failures / (attempts * (attempts - 1))


@dataclass
class Batch:
    """Questions, n responses to each, and how these were graded."""

    questions: np.ndarray  # (Q,) which of the training questions
    groups: list  # Q lists of n Rollouts
    rewards: np.ndarray  # (Q, n), 0 or 1
    seconds: float = 0.0  # that sampling and grading took

    def counts(self):
        """Successes and failures of each question, (Q, 2)."""
        n = self.rewards.shape[1]
        successes = self.rewards.sum(1)  # (Q,)
        return np.stack([successes, n - successes], 1)

    def learnability(self):
        n = self.rewards.shape[1]
        return learnability(self.rewards.sum(1), n)  # (Q,)

    def take(self, chosen):
        """Some of the questions. `seconds` stays what the whole batch took."""
        groups = [self.groups[i] for i in chosen]
        questions = self.questions[chosen]
        return Batch(questions, groups, self.rewards[chosen], self.seconds)


@dataclass
class Pool:
    """The training questions, and all that it takes to sample responses to them and grade these."""

    config: Settings
    engine: Engine
    tokenizer: object
    questions: list  # of data.Question
    prompts: list  # theirs, as token ids
    generation: dict  # settings of each `engine.generate`: temperature, stop tokens ...
    grading: dict  # settings of each `evaluation.rewards`
    iteration: int = 0
    sampled: list = field(default_factory=list)  # this iteration's batches

    def seed(self):
        # Depends on nothing but what it is for, so a resumed run draws the same numbers.
        return seed_of(self.config.seed, self.iteration, len(self.sampled))

    def sample(self, chosen, n):
        """n responses to each of the questions `chosen`, (Q,) indices -> Batch."""
        start = time.perf_counter()
        prompts = [self.prompts[i] for i in chosen]
        # rcrl asks for what is worth 1 (`encode_prompts` does), once that tag has been learned.
        if self.config.algo == "rcrl" and self.iteration == 0:
            prompts = [data.with_tag(self.tokenizer, prompt, None) for prompt in prompts]
        seed = self.seed()
        groups = self.engine.generate(prompts, n=n, seed=seed, **self.generation)
        questions = [self.questions[i] for i in chosen]
        rewards = evaluation.rewards(self.tokenizer, questions, groups, **self.grading)  # (Q, n)
        seconds = time.perf_counter() - start
        batch = Batch(np.asarray(chosen), groups, rewards, seconds)
        self.sampled.append(batch)  # its tokens are logged, and the next one has another seed
        return batch

    def levels(self):
        """The level of each question; where the data has none, a class of prompts as long."""
        names = []
        for question, prompt in zip(self.questions, self.prompts):
            name = str(question.level)
            if question.level is None:
                length = round(4 * math.log2(len(prompt)))  # four classes a doubling
                name = f"length {length}"
            names.append(name)
        return names


# --------------------------------------------------------------------------- the curricula
# Each takes the pool, the settings, its own state (plain numbers and lists, saved with the
# checkpoint) and a numpy Generator. Each returns the Batch to train on, and what to log.


def uniform(pool, config, state, rng):
    """The baseline: every question is equally likely, and none comes twice in a batch."""
    chosen = rng.choice(len(pool.questions), config.questions, replace=False)
    return pool.sample(chosen, config.rollouts), {}


def sfl(pool, config, state, rng):
    """Sampling for learnability with a buffer (arXiv 2502.12272; the symbols are the paper's). The
    paper's code may choose a question both by learnability and uniformly; here none comes twice."""
    logged = {}
    if pool.iteration % config.refresh_every == 0:  # every T iterations
        candidates = rng.choice(len(pool.questions), config.candidates, replace=False)  # (N,)
        scored = pool.sample(candidates, config.score_rollouts)  # L responses each
        best = most(scored.learnability(), config.buffer_size, rng)  # the K most learnable
        state["buffer"] = candidates[best].tolist()
        logged = report.of_candidates(scored)
    from_buffer = round(config.rho * config.questions)  # rho N_l
    chosen = rng.choice(state["buffer"], from_buffer, replace=False)
    # The other (1 - rho) N_l are uniform: a buffer is blind to what it did not score.
    chosen = with_uniform(chosen, config.questions, len(pool.questions), rng)
    return pool.sample(chosen, config.rollouts), logged


def lilo(pool, config, state, rng):
    """Rejection (LILO): draw more questions than needed, 4 N_l in the paper. Train on the N_l most
    learnable, with the very responses that showed it. 4 right of 8 are preferred to 1 of 8."""
    order = rng.permutation(len(pool.questions))
    candidates = order[: config.max_candidates]  # indices
    drawn = pool.sample(candidates, config.rollouts)
    best = most(drawn.learnability(), config.questions, rng)
    return drawn.take(best), report.of_candidates(drawn)


def dapo(pool, config, state, rng):
    """Dynamic sampling (DAPO, arXiv 2503.14476): draw questions until the batch is full of those
    whose responses disagree, `max_candidates` at most; if they do not suffice, others fill it. The
    first ones are taken: 4 right of 8 count no more than 1 of 8."""
    order = rng.permutation(len(pool.questions))
    candidates = order[: config.max_candidates]  # indices
    drawn = until_full(pool, config, candidates)
    return drawn.take(range(config.questions)), report.of_candidates(drawn)


def until_full(pool, config, order):
    """Sample questions in this order, a batch at a time, until as many as a batch disagree. Returns
    all that were sampled, those that disagree first."""
    batches = []
    learnable = 0  # questions so far whose responses disagree
    for start in range(0, len(order), config.questions):
        some = order[start : start + config.questions]
        batch = pool.sample(some, config.rollouts)
        batches.append(batch)
        learnable += (batch.learnability() > 0).sum()
        if learnable >= config.questions:
            break
    drawn = Batch(
        np.concatenate([batch.questions for batch in batches]),
        [group for batch in batches for group in batch.groups],
        np.concatenate([batch.rewards for batch in batches]),
        sum(batch.seconds for batch in batches),
    )
    # A stable sort: the learnable ones in their order, then the others.
    agree = drawn.learnability() == 0
    return drawn.take(np.argsort(agree, kind="stable"))


GRESO_SHARES = (1 / 6, 1 / 12)  # wanted among the drawn: failed by all responses, solved by all


def greso(pool, config, state, rng):
    """Dynamic sampling that skips (GRESO, arXiv 2506.02177). If the latest z visits to a question
    all failed, or all solved it, it is drawn with the chance q^z; q adapts to GRESO_SHARES."""
    size = len(pool.questions)
    # (questions,) how many of the latest visits in a row were all solved; below 0: all failed
    streaks = np.array(state.setdefault("streaks", [0] * size))
    q = np.array(state.setdefault("q", [0.5, 0.5]))  # of the failed, of the solved

    # 1. Skip some, and sample of the others.
    q_of = np.where(streaks < 0, q[0], q[1])  # (questions,)
    chance = np.maximum(q_of ** abs(streaks), 0.01)
    skipped = rng.random(size) > chance
    order = rng.permutation(size)
    order = sorted(order, key=skipped.__getitem__)  # skipped ones: last
    drawn = until_full(pool, config, order[: config.max_candidates])

    # 2. Count on. A streak ends where responses disagree, or agree the other way.
    solved = drawn.rewards.min(1) == 1  # (drawn,) by all responses
    failed = drawn.rewards.max(1) == 0
    agree = solved.astype(int) - failed  # 1, -1 or 0
    before = streaks[drawn.questions]
    goes_on = agree * before > 0
    streaks[drawn.questions] = agree + before * goes_on
    state["streaks"] = streaks.tolist()

    # 3. Where too many of a kind were drawn, skip more of them from now on.
    shares = [failed.mean(), solved.mean()]
    q += np.where(np.less(shares, GRESO_SHARES), 0.01, -0.01)
    state["q"] = q.clip(0.05, 0.95).tolist()
    return drawn.take(range(config.questions)), report.of_candidates(drawn)


OUTER_ODDS = 0.2  # of an easy or a hard question, where one between has 1 (prime-rl's numbers)


def pools(pool, config, state, rng):
    """prime-rl's difficulty pools: the odds of a question follow from its latest success alone."""
    size = len(pool.questions)
    latest = np.array(state.setdefault("latest", [0.5] * size))  # (questions,) unseen: odds 1
    between = (latest > 1 / 4) & (latest <= 3 / 4)
    odds = np.where(between, 1, OUTER_ODDS)
    odds = odds / odds.sum()
    chosen = rng.choice(size, config.questions, replace=False, p=odds)
    batch = pool.sample(chosen, config.rollouts)
    latest[chosen] = batch.rewards.mean(1)
    state["latest"] = latest.tolist()
    return batch, {}


def mopps(pool, config, state, rng):
    """MoPPS (arXiv 2507.04632): each p_i is drawn from Beta(alpha_i, beta_i), at first Beta(1, 1).
    The candidates nearest 1/2 are taken. Only questions that are seen forget."""
    size = len(pool.questions)
    # (questions, 2): alpha and beta of each
    counts = np.array(state.setdefault("counts", [[1.0, 1.0]] * size))
    candidates = rng.permutation(size)[: config.max_candidates]
    alpha, beta = counts[candidates].T
    drawn = rng.beta(alpha, beta)  # (candidates,) Thompson sampling
    nearest = np.argsort(abs(drawn - 1 / 2))
    chosen = candidates[nearest[: config.questions]]
    alpha, beta = counts[chosen].T
    expected = expected_learnability(alpha, beta)  # (Q,)
    batch = pool.sample(chosen, config.rollouts)
    # alpha <- lambda alpha + (1 - lambda) alpha_0 + s_i with alpha_0 = 1, and beta with f_i
    remembered = config.memory * counts[chosen] + (1 - config.memory)  # (Q, 2)
    counts[chosen] = remembered + batch.counts()
    state["counts"] = counts.round(6).tolist()
    return batch, {"learnability_expected": float(expected.mean())}


def expected_learnability(alpha, beta):
    """E[p (1 - p)] of p ~ Beta(alpha, beta), elementwise."""
    return alpha * beta / ((alpha + beta) * (alpha + beta + 1))


# Before anything is seen there is one made-up question: its weight, and the means of p and of
# p (1 - p) over Beta(1/2, 1/2).
GUESS = (1, 1 / 2, 1 / 8)
ALL_LEVELS_WEIGHT = 0.5  # in each level's means, the mean over all levels counts as half a question
LEAST_VARIANCE = 1e-3  # of the p_i of a level; at 0 its prior would be infinitely sure
STRENGTHS = (0.05, 20)  # least and most that a prior counts, in attempts
LEAST_COUNT = 1e-3  # of alpha and beta: no question's odds may fall to 0


def posterior(pool, config, state, rng):
    """Learnability from training rollouts alone, as in MoPPS and BOTS (arXiv 2510.26374): none is
    sampled only to score a question. CurES (2510.01037) scores first, PCL (2510.01135) asks a value
    model. Ours are a prior for each level, fitted by moments, counts that all decay, and the odds.

    Question i has had s_i successes and f_i failures. Both are multiplied by `memory` in each
    iteration, because the policy that had them has moved. The prior of its success rate p_i is its
    level's, Beta(strength mean, strength (1 - mean)). The posterior is Beta(alpha, beta) with

        alpha = strength mean + s_i,    beta = strength (1 - mean) + f_i.

    A share rho of the batch is drawn with odds in proportion to E[p (1 - p)]^2. To take the largest
    ones would not do: they would come again and again, and nothing be learned about the others."""
    size = len(pool.questions)
    # (questions, 2): successes and failures of each question
    counts = np.array(state.setdefault("counts", [[0.0, 0.0]] * size))
    levels, level_of = np.unique(pool.levels(), return_inverse=True)
    # (levels, 3): weighted sums over the questions seen of 1, success and learnability
    seen = np.array(state.setdefault("seen", [[0.0] * 3] * len(levels)))

    # 1. Fit each level's prior, and give it to the level's questions.
    mean, strength = beta_prior(seen)  # (levels,) each
    prior_alpha = (strength * mean)[level_of]  # (questions,)
    prior_beta = (strength * (1 - mean))[level_of]

    # 2. Draw questions by their expected learnability, then sample responses.
    alpha = np.maximum(prior_alpha + counts[:, 0], LEAST_COUNT)  # (questions,)
    beta = np.maximum(prior_beta + counts[:, 1], LEAST_COUNT)
    expected = expected_learnability(alpha, beta)
    odds = expected**2
    odds = odds / odds.sum()
    by_odds = round(config.rho * config.questions)
    chosen = rng.choice(size, by_odds, replace=False, p=odds)
    chosen = with_uniform(chosen, config.questions, size, rng)
    batch = pool.sample(chosen, config.rollouts)

    # 3. Forget a little, then count what was seen. The chosen questions are no fair sample of their
    # level. One that came often came because it is learnable, so it counts little for its level.
    counts *= config.memory
    seen *= config.memory
    attempts = counts[chosen].sum(1, keepdims=True)  # (Q, 1)
    weight = 1 / (1 + attempts)
    success = batch.rewards.mean(1)  # (Q,)
    observed = [np.ones(len(chosen)), success, batch.learnability()]
    observed = np.stack(observed, 1)  # (Q, 3)
    np.add.at(seen, level_of[chosen], weight * observed)  # += would count a level once only
    counts[chosen] += batch.counts()
    state["counts"] = counts.round(6).tolist()  # plain lists: they go into the checkpoint
    state["seen"] = seen.round(6).tolist()
    return batch, {"learnability_expected": float(expected[chosen].mean())}


def beta_prior(seen):
    """The Beta of each level, by moments: (levels, 3) sums -> mean, strength, (levels,) each.

    Over the questions of a level, p_i has the mean `mean`, and p_i (1 - p_i) has the mean m. So the
    variance of p_i is v = mean (1 - mean) - m. The Beta with that mean and variance has strength
    mean (1 - mean) / v - 1 = m / v. A level of which little was seen leans on all levels."""
    total = seen.sum(0) + GUESS  # (3,) weight, and weighted sums of two numbers
    all_levels = total / total[0]  # (3,) 1 and two means
    sums = seen + ALL_LEVELS_WEIGHT * all_levels  # (levels, 3)
    weights = sums[:, :1]  # (levels, 1)
    _, mean, learnable = (sums / weights).T  # (levels,) each
    variance = np.maximum(mean * (1 - mean) - learnable, LEAST_VARIANCE)  # v
    return mean, np.clip(learnable / variance, *STRENGTHS)


CURRICULA = {
    "uniform": uniform,
    "sfl": sfl,
    "lilo": lilo,
    "dapo": dapo,
    "greso": greso,
    "pools": pools,
    "mopps": mopps,
    "posterior": posterior,
}


def most(scores, k, rng):
    """Indices of the k largest scores, ties broken at random."""
    scores = np.asarray(scores)
    shuffled = rng.permutation(len(scores))  # indices; a stable sort keeps ties in this order
    order = np.argsort(-scores[shuffled], kind="stable")
    return shuffled[order[:k]]


def with_uniform(chosen, count, size, rng):
    """Fill a batch up with questions drawn uniformly from those not in it."""
    rest = np.setdiff1d(np.arange(size), chosen)
    others = rng.choice(rest, count - len(chosen), replace=False)
    return np.concatenate([chosen, others]).astype(int)


# --------------------------------------------------------------------------- the loop


def train(
    config,
    policy,
    critic,  # None where the algorithm needs none
    reference,  # the frozen starting model; likewise
    optimizer,  # of policy and critic
    pool,
    evaluate,  # () -> the held-out evaluation, a dict
    start,  # the first iteration: 0, or where the checkpoint is
    rng,  # of the curriculum and the minibatches
    state,  # the curriculum's own; it goes into the checkpoint
    signals,  # Ctrl-C, that waits
):
    """The iterations from `start` on, each logged, and saved now and then. Returns the last
    evaluation, {} if there was none. Raises commands.Stop, once it has saved, if it must end early.
    """
    out = Path(config.out)
    log = report.Log(out, config)
    bar = commands.progress_bar(out.name, config.iterations, "iteration", rank() == 0, start)
    free = pool.engine.free  # if memory runs out, the idle KV cache goes first
    result = {}
    signals.wait = True  # Ctrl-C lets the iteration finish
    for iteration in range(start, config.iterations):
        # --- 1. choose questions, sample responses to each, grade them
        pool.iteration = iteration
        pool.sampled = []  # all batches sampled to choose this one: their cost is logged
        choose = CURRICULA[config.curriculum]
        batch, logged = choose(pool, config, state, rng)  # batch.rewards: (questions, n), 0 or 1
        rollouts = [rollout for group in batch.groups for rollout in group]  # questions * n

        # --- 2. credit: one advantage for every response token, a (tokens,) tensor a rollout.
        # What is the reward compared with?
        clock = time.perf_counter()
        advantages = values = returns = None
        if config.algo == "ppo":  # with V(s_t) of the critic, before this iteration trains it
            values = ppo.rollout_values(critic, rollouts, config, when_full=free)
            advantages, returns = ppo.response_gae(values, batch.rewards.flatten(), config)
        elif config.algo == "vineppo":  # with fresh rollouts from the same state
            advantages, spent = monte_carlo_credit(pool, config, batch)
            logged |= spent
        elif config.algo in ("grpo", "rloo"):  # with the group's other responses
            of_response = ppo.group_advantages(batch.rewards, how=config.algo)  # (questions, n)
            advantages = ppo.per_token(rollouts, of_response.flatten())
        if config.algo in ("ppo", "vineppo"):  # group advantages keep their formula's scale
            advantages = ppo.whiten(advantages)
        logged["seconds_credit"] = time.perf_counter() - clock

        # --- 3. update
        clock = time.perf_counter()
        if config.offload_optimizer:
            free()  # the KV cache and Adam's moments need not fit together
        share = learning_rate_share(config, iteration)
        for group, lr in zip(optimizer.param_groups, (config.lr, config.critic_lr)):
            group["lr"] = lr * share
        ref_logprobs = None
        if config.algo in sft.IMITATORS:
            logged |= imitate(pool, config, policy, reference, optimizer, batch, rng, state)
        else:
            if config.kl_coef > 0:
                ref_logprobs = ppo.rollout_logprobs(reference, rollouts, config, when_full=free)
            logged |= ppo.update(
                policy,
                optimizer,
                rollouts,
                advantages,
                config,
                ref_logprobs=ref_logprobs,
                critic=critic,
                values=values,
                returns=returns,
                rng=rng,
                when_full=free,
            )
        if config.kl_sample > 0 and ref_logprobs is None:  # measured, not in the loss
            logged["kl"] = kl_to_start(config, reference, rollouts, free)
        logged["seconds_update"] = time.perf_counter() - clock

        # --- 4. measure, log, save
        logged = report.metrics(pool, iteration, batch, rollouts, optimizer) | logged
        done = iteration + 1
        last = done == config.iterations
        if last or done % config.eval_every == 0:
            result = evaluate()
            logged |= report.of_evaluation(result)
        log(logged)
        stop = commands.reason_to_stop(signals, policy, critic)
        if last or stop or done % config.save_every == 0:
            models = {"policy": policy, "critic": critic, "optimizer": optimizer}
            checkpoint.save(out, pool.tokenizer, models, done, rng, state)
        bar.set_postfix(report.shown(logged, result), refresh=False)
        bar.update()
        if stop:
            raise stop
    signals.wait = False
    bar.close()
    return result


def learning_rate_share(config, iteration):
    """What share of the learning rate to use: it rises to 1 in the warm-up, then stays or falls."""
    warm = config.warmup * config.iterations  # iterations
    share = min(1.0, (iteration + 1) / max(1, warm))  # + 1: at 0 the first one would be wasted
    if config.lr_schedule == "linear":
        left = config.iterations - iteration
        share = min(share, left / max(1, config.iterations - warm))
    return share


def monte_carlo_credit(pool, config, batch):
    """VinePPO's advantages for a batch, (tokens,) for each rollout; and their cost, to log."""
    questions = [pool.questions[i] for i in batch.questions]
    spent = {}
    advantages = vineppo.mc_advantages(
        pool.engine,
        pool.tokenizer,
        questions,
        batch.groups,
        batch.rewards,
        score=partial(evaluation.rewards, **pool.grading),
        mc_rollouts=config.mc_rollouts,
        max_steps=config.mc_max_steps,
        style=config.steps,
        spend=config.mc_spend,
        seed=pool.seed(),
        stats=spent,
        **pool.generation,
    )
    logged = {"tokens_credit": spent["tokens_generated"]}
    for name in ("mc_steps", "mc_filled", "mc_states", "mc_rollouts"):
        logged[name] = spent[name]
    return advantages, logged


def imitate(pool, config, policy, reference, optimizer, batch, rng, state):
    """A round of expert iteration or return-conditioned RL, on all that was kept so far."""
    kept = state.setdefault("kept", [])  # [question's index, reward, response] each
    sft.keep(kept, config.algo, batch.questions, batch.groups, batch.rewards)
    examples = []
    if config.solutions:
        shown = [q for q in pool.questions if q.solution]
        texts = [q.solution for q in shown]
        examples = sft.demonstrations(pool.tokenizer, shown, texts, config.chat)
    for question, reward, response in kept:
        prompt = pool.prompts[question]  # token ids
        if config.algo == "rcrl":  # the prompt says what the response was worth
            prompt = data.with_tag(pool.tokenizer, prompt, reward)
        examples.append(Rollout(prompt, response, [], finished=True))
    start = reference if config.expert_from == "initial" else None
    lr = optimizer.param_groups[0]["lr"]
    return sft.imitate(policy, start, examples, lr, config, rng)


def kl_to_start(config, reference, rollouts, free):
    """KL(policy || starting model) a token (k3), from a few rollouts. It is the KL of the policy
    that sampled them, before the update. free: called when memory runs out."""
    every = math.ceil(len(rollouts) / config.kl_sample)
    some = rollouts[::every]  # kl_sample at most, from all over the batch
    ref = torch.cat(ppo.rollout_logprobs(reference, some, config, when_full=free))  # (tokens,)
    sampled = torch.tensor([x for rollout in some for x in rollout.logprobs])  # (tokens,)
    return float(ppo.kl_k3(ref, sampled).mean())


# --------------------------------------------------------------------------- the set-up


def run(config, signals=None):
    """The whole job. Writes a folder, config.out: config.json (the settings), metrics.jsonl (a line
    an iteration), evaluation.json, model/ (loads with from_pretrained) and state/ (for an exact
    resume). Returns the held-out evaluations before and after. signals: from
    `commands.signals_wait`, if Ctrl-C should wait until the iteration is finished."""
    signals = signals or SimpleNamespace(came=[])
    settings = dict(vars(config))  # as given: later dtype changes and, if memory runs out, others
    first = rank() == 0

    # --- device: the tiny model (of "0" parameters) is faster on a CPU than on a Mac's GPU
    device = memory.pick_device(config.device, 0 if config.model == "tiny" else math.inf)
    if config.model == "tiny":
        torch.set_num_threads(min(2, torch.get_num_threads()))  # too small for more

    # --- questions: to train on, and held out
    fields = {
        "question": config.question_field,
        "answer": config.answer_field,
        "solution": config.solution_field,
    }
    how = {"data_dir": config.data_dir, "fields": fields, "bits": config.bits}
    questions = data.load_questions(config.dataset, "train", **how)
    limit = config.eval_limit or None
    held_out = data.load_questions(config.dataset, "test", limit=limit, **how)

    # --- policy: what is trained. A resumed run fills in its own weights, further down.
    base = config.model
    if base == "tiny":
        pretraining = {"bits": config.bits, "p_cot": config.p_cot, "progress": first}
        base = sft.tiny_base(config.cache, config.dataset, **pretraining)
    policy, tokenizer = checkpoint.load_model(base, device=device)  # in float32
    config.dtype = memory.precision(config.dtype, device, policy)  # of its matrix products
    decode_dtype = getattr(torch, config.dtype)
    memory.make_it_fit(config, policy, device)
    # rcrl: two new tokens in the prompt say what a response is worth. The policy does not know them
    # before it is trained: until then it is asked without them.
    untagged = copy.deepcopy(tokenizer)
    if config.algo == "rcrl":
        data.add_tags(policy, tokenizer, config.chat)

    # --- reference: a frozen copy, for the KL, or to start each round of imitation from
    reference = None
    imitates = config.algo in sft.IMITATORS
    if imitates or config.kl_coef > 0 or config.kl_sample > 0:
        # For a KL bfloat16 will do. Where the policy starts from it, it must not lose digits.
        reference = copy_of(policy, policy.dtype if imitates else decode_dtype)

    # --- prompts; checks for mistakes that raise nothing later, but train on nonsense
    prompts = data.encode_prompts(tokenizer, questions, chat=config.chat)  # token ids
    held_prompts = data.encode_prompts(tokenizer, held_out, chat=config.chat)
    made_for = longest_context(policy.config.get_text_config())  # None: any number of tokens
    longest = min(config.context, made_for or math.inf)
    keep = memory.fitting(prompts, longest, config, "training")  # indices
    questions = [questions[i] for i in keep]
    prompts = [prompts[i] for i in keep]
    keep = memory.fitting(held_prompts, longest, config, "held-out")
    held_out = [held_out[i] for i in keep]
    checks.check_sizes(config, len(questions))
    checks.check_start(config, policy, tokenizer, questions, prompts, evaluation.grade)
    has_solutions = any(q.solution for q in questions)
    usable = has_solutions or not config.solutions
    commands.require(usable, f"--solutions: {config.dataset} has none; leave the flag out")
    data.remember_chat(tokenizer, config.chat)  # whoever loads the model prompts it as it is here

    # --- critic: a copy of the policy with a scalar head
    if config.gradient_checkpointing:
        policy.gradient_checkpointing_enable()
    critic = ppo.ValueModel(policy) if config.algo == "ppo" else None

    # --- engine: samples with the policy's own weights. With --fsdp it needs a copy of them. It is
    # made here, before `shard` leaves each process only a part.
    slots = config.slots or None  # None: by free memory
    engine = Engine(policy, slots=slots, dtype=decode_dtype, own_copy=config.fsdp)
    if config.fsdp:
        in_bfloat16 = torch.bfloat16 if config.dtype == "bfloat16" else None
        processes.shard(policy, in_bfloat16)
        if critic is not None:
            processes.shard(critic, in_bfloat16)

    # --- optimizer: of both models, each at its own learning rate
    parameters = [{"params": policy.parameters(), "lr": config.lr}]
    if critic is not None:
        parameters.append({"params": critic.parameters(), "lr": config.critic_lr})
    # fused: on CUDA a step then takes no memory of its own. On a CPU it would round otherwise.
    fused = device.startswith("cuda")
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0, fused=fused)
    if config.offload_optimizer:
        memory.offload(optimizer, device)
    else:  # the engine leaves room for Adam's moments
        engine.promised = partial(memory.moments_to_come, optimizer)

    # --- settings of sampling, grading and evaluating
    generation = {
        "max_new_tokens": config.max_new_tokens,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "stop_ids": evaluation.stops(policy, tokenizer, config.stop),
        "progress": first and sys.stderr.isatty(),
    }
    grading = {"last_number": config.last_number, "judges": Judges(config.judges)}
    pool = Pool(config, engine, tokenizer, questions, prompts, generation, grading)

    def evaluate(samples=1, tokenizer=tokenizer):
        """The held-out questions: one greedy response to each, or several as in training."""
        asked = {"chat": config.chat, "seed": config.seed, "engine": engine}
        asked |= generation | grading
        if samples == 1:
            asked |= {"temperature": 0.0, "top_p": 1.0}  # greedy
        result = evaluation.evaluate(policy, tokenizer, held_out, samples=samples, **asked)
        return result | {"responses": result["responses"][:3]}  # as many as the summary shows

    # --- start, or go on from the checkpoint; then train
    rng = np.random.default_rng(config.seed)
    state = {"fingerprint": report.fingerprint(questions)}  # and the curriculum's own
    models = {"policy": policy, "critic": critic, "optimizer": optimizer}
    with checkpoint.claim(config) as out:  # nobody else writes into this folder
        config.out = settings["out"] = str(out)
        # Loaded first: a resume that is refused changes nothing.
        start = checkpoint.load(out, models, rng, state)
        checkpoint.write(out / "config.json", json.dumps(settings, indent=1) + "\n")
        if first:
            print(f"{config.model} on {device}, matrix products in {config.dtype}", file=sys.stderr)
        if start == 0:
            if first:  # on a large model the first evaluation takes long
                count = f"9 responses to each of {len(held_out)} held-out questions"
                print(f"before training: {count}", file=sys.stderr)
            greedy = evaluate(tokenizer=untagged)
            before = {"greedy": greedy, "sampled": evaluate(samples=8, tokenizer=untagged)}
            checkpoint.write(out / "evaluation.json", json.dumps({"before": before}))
            checkpoint.save(out, tokenizer, models, 0, rng, state)
        else:
            before = json.loads((out / "evaluation.json").read_text())["before"]
        signals.folder = out  # from here on there is a checkpoint to resume from
        result = train(
            config, policy, critic, reference, optimizer, pool, evaluate, start, rng, state, signals
        )
        greedy = result if result else evaluate()  # {}: no iteration was left to do
        after = {"greedy": greedy, "sampled": evaluate(samples=8)}
        both = {"before": before, "after": after}
        checkpoint.write(out / "evaluation.json", json.dumps(both))
    return before, after


# --------------------------------------------------------------------------- the command line


def parse(argv=None):
    """The settings of a command line. Raises ValueError where some make no sense."""
    given = sys.argv[1:] if argv is None else argv
    config = commands.parse(Settings, given)
    if config.resume is not None:
        saved = checkpoint.saved_settings(config.resume)
        config = commands.parse(Settings, given, saved)
        checkpoint.check_changes(config, saved, CHANGEABLE)
    else:
        unknown = f"--preset {config.preset}: choose from {', '.join(PRESETS)}"
        commands.require(config.preset in [None, *PRESETS], unknown)
        # Of a flag that comes twice the last one counts: first the data set's, the preset's, yours.
        preset = PRESETS.get(config.preset, "").split()
        config = commands.parse(Settings, preset + given)
        embedded = config.dataset in data.MADE_HERE
        usual = EMBEDDED if embedded else ""
        if config.algo in sft.IMITATORS:
            usual += SHORT_ROUNDS[config.algo] if embedded else LONG_ROUNDS
        config = commands.parse(Settings, usual.split() + preset + given)
        # Nobody named a model or preset, and the papers' is too large for the card: the preset that
        # fits. Your other flags still count.
        flags = {flag.partition("=")[0] for flag in given}
        named = flags & {"--model", "--preset"}
        if not (named or usual) and memory.is_too_large(config):
            return parse(["--preset", memory.HOME, *given])
    checks.check_settings(config)
    if config.model == "tiny":
        sft.check_tiny(config)
    if config.out and not config.resume:
        checkpoint.check_folder(config.out)
    return config


def main(argv=None):
    with processes.several_processes(), commands.signals_wait() as signals:
        # The first process parses and sends the others its settings.
        config = parse(argv) if rank() == 0 else None
        [config] = processes.from_first_process([config])
        if config.dry_run:
            if config.model == "tiny":
                model = sft.tiny_model(sft.tiny_tokenizer(config.dataset), 0)
            else:
                model = memory.outline(config.model)
            return print(memory.dry_run(config, model))
        before, after = run(config, signals)
        if rank() == 0:
            print(report.summary(Path(config.out), before, after))


if __name__ == "__main__":
    commands.command_line(main)
