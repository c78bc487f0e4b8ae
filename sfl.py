"""Train a language model on the questions it can almost answer: sampling for learnability (SFL).

    python sfl.py                                                # a tiny model, minutes on a CPU
    python sfl.py --algo ppo --dataset gsm8k --model HUB_ID_OR_DIR      # the papers' settings
    python sfl.py --algo grpo --curriculum uniform --out runs/uniform   # a baseline

A policy samples n responses to a question and each is graded 0 or 1. If all are right or all are
wrong there is nothing to compare, and every policy-gradient method learns next to nothing from
them. What teaches is the variance of success,

    learnability = p (1 - p)                     p: the policy's success rate on the question

zero where the model always fails, zero where it always succeeds, largest where it succeeds half of
the time. SFL (arXiv 2502.12272, after 2408.15099) samples questions by it; LILO shows that the
expected improvement from a question grows linearly with it. Three questions, eight responses each:

    12+7            1 1 1 1 1 1 1 1    learnability 0       known
    12+7-5+9        0 1 0 0 1 0 0 0    0.21                 almost: train on this one
    12+7-5+9-...    0 0 0 0 0 0 0 0    0                    out of reach

One iteration of training, `train` from top to bottom:

    questions --choose--> prompts --rollout.generate--> rollouts --eval.rewards--> rewards
        ^                                                                            |
        +--- learnability <--- successes      policy <--ppo.update-- advantages <----+
            ppo: critic; vineppo: Monte Carlo; grpo, rloo: group; expert, rcrl: imitation, sft.py

The curricula: `uniform` takes all questions alike; `sfl` scores candidates now and then and buffers
the most learnable; `lilo` and `dapo` draw more than they need and train on those that turn out
learnable; `posterior` knows from the training rollouts so far.
"""

import contextlib
import copy
import itertools
import json
import math
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import eval as evaluation
import ppo
import sft
import vineppo
from rollout import ENGINES, Rollout, all_sum, generate, many_processes, progress_bar, rank, seed_of


def learnability(successes, attempts):
    """Unbiased estimate of p (1 - p) from `successes` of `attempts`: s (a - s) / (a (a - 1)).
    Numbers or arrays. ValueError: fewer than 2 attempts, from which no variance can be estimated.

    The plug-in (s/a)(1 - s/a) is too low by the factor (a - 1)/a: the same draws serve as the mean
    and are measured against it. Where questions have had different numbers of attempts, it prefers
    whatever was tried often."""
    successes, attempts = np.asarray(successes, dtype=float), np.asarray(attempts, dtype=float)
    if np.any(attempts < 2) or np.any(successes < 0) or np.any(successes > attempts):
        raise ValueError(
            f"learnability of {successes} successes in {attempts} attempts: need at least 2 "
            "attempts, and successes between 0 and the attempts"
        )
    return (successes * (attempts - successes) / (attempts * (attempts - 1)))[()]


# --------------------------------------------------------------------------- the curricula
# Each takes the settings, its own state (plain numbers and lists, saved with the checkpoint), the
# iteration from 0, the number of questions, a numpy Generator, and `sample`: sample(questions, n)
# -> Batch: .questions, .groups (n responses to each), .rewards (questions, n). Each returns the
# Batch to train on, and what to log.


def uniform(args, state, iteration, size, rng, sample):
    chosen = rng.choice(size, args.questions, replace=False)
    return sample(chosen, args.rollouts), {}


def sfl(args, state, iteration, size, rng, sample):
    """Sampling for learnability with a buffer (arXiv 2502.12272; the symbols are the paper's). Its
    code permits a question in both halves of a batch; here none comes twice."""
    logged = {}
    if iteration % args.refresh_every == 0:  # every T iterations
        candidates = rng.choice(size, args.candidates, replace=False)  # N
        scored = sample(candidates, args.score_rollouts)  # L each
        best = most(scored.learnability(), args.buffer_size, rng)  # the K most learnable
        state["buffer"] = candidates[best].tolist()
        logged = pool(scored)
    from_buffer = round(args.rho * args.questions)  # rho N_l
    chosen = rng.choice(state["buffer"], from_buffer, replace=False)
    return sample(with_uniform(chosen, args.questions, size, rng), args.rollouts), logged


def lilo(args, state, iteration, size, rng, sample):
    """Rejection (LILO): draw more questions than needed, 4 N_l in the paper, and train on the N_l
    most learnable with the very responses that showed it: 4 right of 8 are preferred to 1 of 8.
    With --stop_early no more are drawn once N_l are learnable at all."""
    order = rng.permutation(size)[: args.max_candidates]
    drawn = draw_until(order, args, sample, enough=args.questions if args.stop_early else None)
    best = most(drawn.learnability(), args.questions, rng)
    return drawn.take(best), pool(drawn)


def dapo(args, state, iteration, size, rng, sample):
    """Dynamic sampling (DAPO, arXiv 2503.14476): draw until the batch is full of questions that are
    neither solved by all attempts nor by none, in the order in which they come."""
    order = rng.permutation(size)[: args.max_candidates]
    drawn = draw_until(order, args, sample, enough=args.questions)
    agrees = drawn.learnability() == 0
    first = np.argsort(agrees, kind="stable")[: args.questions]  # those that agree come last
    return drawn.take(first), pool(drawn)


def posterior(args, state, iteration, size, rng, sample):
    """Learnability from training rollouts alone: nothing is sampled only to be scored.

    Question i has s_i successes and f_i failures, both multiplied by `memory` each iteration
    because the policy they speak of is moving. Its success rate is Beta(a, b) with
    a = nu mu + s_i, b = nu (1 - mu) + f_i, and a share rho of the questions is drawn in proportion
    to the square of the expectation E[p (1 - p)] = a b / ((a + b) (a + b + 1)). Not the largest
    ones: they would come again and again, and nothing would be learned about the others.

    The prior is that of the question's group (its level; unknown, the length of its prompt): mu,
    the mean success, and nu, how much one question tells about the others. If m is the group's mean
    learnability, mean_i p_i (1 - p_i), the variance of p_i between questions is
    v = mu (1 - mu) - m, and a Beta of that mean and variance has nu = mu (1 - mu) / v - 1 = m / v.
    Chosen questions are no fair sample of their group, hence the weight 1 / (1 + s_i + f_i) of an
    observation: what is news counts."""
    counts = np.array(state.setdefault("counts", [[0.0, 0.0]] * size))  # successes, failures
    groups, group_of = np.unique(state["groups"], return_inverse=True)
    # of each group: weighted sums of 1, success and learnability
    seen = np.array(state.setdefault("seen", [[0.0] * 3] * len(groups)))
    # start from a flat guess, mu 1/2 and m 1/8; the whole counts as half a question in each group
    whole = (seen.sum(0) + [1, 0.5, 0.125]) / (seen[:, 0].sum() + 1)
    _, mu, m = ((seen + 0.5 * whole) / (seen[:, :1] + 0.5)).T
    nu = np.clip(m / np.maximum(mu * (1 - mu) - m, 1e-3), 0.05, 20)
    a = np.maximum((nu * mu)[group_of] + counts[:, 0], 1e-3)
    b = np.maximum((nu * (1 - mu))[group_of] + counts[:, 1], 1e-3)
    expected = a * b / ((a + b) * (a + b + 1))
    odds = expected**2 / (expected**2).sum()
    chosen = rng.choice(size, round(args.rho * args.questions), replace=False, p=odds)
    chosen = with_uniform(chosen, args.questions, size, rng)
    batch = sample(chosen, args.rollouts)

    counts *= args.memory
    seen *= args.memory
    news = 1 / (1 + counts[chosen].sum(1, keepdims=True))
    observed = np.stack([np.ones(len(chosen)), batch.rewards.mean(1), batch.learnability()], 1)
    np.add.at(seen, group_of[chosen], news * observed)
    successes = batch.rewards.sum(1)
    counts[chosen] += np.stack([successes, args.rollouts - successes], 1)
    state["counts"], state["seen"] = counts.round(6).tolist(), seen.round(6).tolist()
    return batch, {"learnability_expected": float(expected[chosen].mean())}


CURRICULA = {"uniform": uniform, "sfl": sfl, "lilo": lilo, "dapo": dapo, "posterior": posterior}


# --------------------------------------------------------------------------- training


def train(args, signals=None):
    """The whole job. Writes config.json, metrics.jsonl, evaluation.json, model/ and state/ into
    args.out. Returns the held-out evaluations before and after. signals: see `signals_wait`. Stop:
    the run has ended early, and is saved."""
    run = setup(args)
    run.signals = signals or SimpleNamespace(came=[])
    before = start_or_resume(run, args)
    result, log = before["greedy"], Log(run.out, args)
    bar = progress_bar(run.out.name, args.iterations, "iteration", rank() == 0, run.start)
    run.signals.wait = True  # for the end of an iteration
    for iteration in range(run.start, args.iterations):
        if out_of_patience(args, run.state):
            break
        # 1. choose questions, sample responses, grade them
        run.sample.begin(iteration)
        choose = CURRICULA[args.curriculum]
        batch, row = choose(args, run.state, iteration, run.size, run.rng, run.sample)
        rollouts = [rollout for group in batch.groups for rollout in group]
        seconds = sum(call.seconds for call in run.sample.calls)
        row |= {"seconds_rollout": batch.seconds, "seconds_score": seconds - batch.seconds}

        # 2. credit: one advantage a response token
        clock = time.perf_counter()
        advantages = values = returns = None
        if args.algo == "ppo":
            advantages, values, returns = ppo.critic_advantages(
                run.critic, rollouts, batch.rewards.flatten(), run.settings, learn=run.one_pass
            )
        elif args.algo == "vineppo":
            advantages, spent = monte_carlo_credit(args, run, batch)
            row |= spent
        elif args.algo in ("grpo", "rloo"):
            scores = ppo.group_advantages(batch.rewards, how=args.algo)
            advantages = ppo.per_token(rollouts, scores.flatten())
        if args.algo in ("ppo", "vineppo"):
            advantages = ppo.whiten(advantages)
        row["seconds_credit"] = time.perf_counter() - clock

        # 3. update
        clock = time.perf_counter()
        prepare_update(args, run.optimizer, iteration)
        ref_logprobs = None
        if args.kl_coef > 0:
            ref_logprobs = ppo.rollout_logprobs(run.reference, rollouts, run.settings)
        elif args.kl_sample > 0:
            row["kl"] = kl_to_start(args, run, rollouts)
        if args.algo in sft.IMITATORS:
            row |= imitate(args, run, batch)
        else:
            row |= ppo.update(
                run.policy, run.optimizer, rollouts, advantages, run.settings, rng=run.rng,
                ref_logprobs=ref_logprobs, critic=run.critic, values=values, returns=returns,
                learned=run.one_pass,
            )  # fmt: skip
        row["seconds_update"] = time.perf_counter() - clock

        # 4. measure, log, save
        last = iteration + 1 == args.iterations
        row = batch_metrics(run, iteration, batch, rollouts) | row
        if last or (iteration + 1) % args.eval_every == 0:
            result = run.evaluate()
            row |= {f"eval_{key}": result[key] for key in EVALUATED}
            run.state.setdefault("accuracies", []).append(result["accuracy"])
            last = last or out_of_patience(args, run.state)
        log(row)
        stop = reason_to_stop(run)
        if last or stop or (iteration + 1) % args.save_every == 0:
            save(run, iteration + 1)
        advance(bar, row, result)
        if stop:
            raise stop
    run.signals.wait = False
    bar.close()
    after = {"greedy": result, "sampled": run.evaluate(samples=8)}
    write(run.out / "evaluation.json", json.dumps({"before": before, "after": after}))
    return before, after


# ==================================================================================================
# That is the method. Below: what a run consists of, checkpoints, settings, the command line.
# ==================================================================================================


@dataclass
class Batch:
    """Questions, n responses to each, and how these were graded."""

    questions: np.ndarray  # (Q,) which of the training questions
    groups: list  # Q lists of n Rollouts
    rewards: np.ndarray  # (Q, n)
    seconds: float = 0.0  # what sampling them took

    def learnability(self):
        return learnability(self.rewards.sum(1), self.rewards.shape[1])  # (Q,)

    def take(self, rows):
        groups = [self.groups[i] for i in rows]
        return Batch(self.questions[rows], groups, self.rewards[rows], self.seconds)

    def tokens(self):
        return sum(len(rollout.response) for group in self.groups for rollout in group)


def most(scores, k, rng):
    """Indices of the k largest scores, ties broken at random."""
    shuffled = rng.permutation(len(scores))
    return shuffled[np.argsort(-np.asarray(scores)[shuffled], kind="stable")[:k]]


class Sampler:
    """Samples responses to training questions and grades them. Keeps the calls of the iteration:
    each has random numbers of its own, and they are what choosing questions cost."""

    def __init__(self, args, policy, tokenizer, questions, prompts, generation):
        self.args, self.policy, self.tokenizer = args, policy, tokenizer
        self.questions, self.prompts, self.generation = questions, prompts, generation

    def begin(self, iteration):
        self.iteration, self.calls = iteration, []

    def seed(self):
        """Depends on nothing but what it is for: a resumed run draws the same."""
        return seed_of(self.args.seed, self.iteration, len(self.calls))

    def __call__(self, chosen, n):
        start = time.perf_counter()
        prompts = [self.prompts[i] for i in chosen]
        if self.args.algo == "rcrl" and self.iteration == 0:  # the tag is not learned yet
            prompts = [data.with_tag(self.tokenizer, prompt, None) for prompt in prompts]
        groups = generate(self.policy, prompts, n=n, seed=self.seed(), **self.generation)
        rewards = self.grade(self.tokenizer, [self.questions[i] for i in chosen], groups)
        batch = Batch(np.asarray(chosen), groups, rewards, time.perf_counter() - start)
        self.calls.append(batch)
        return batch

    def grade(self, tokenizer, questions, groups):
        return evaluation.rewards(tokenizer, questions, groups, last_number=self.args.last_number)


def with_uniform(chosen, count, size, rng):
    """Fill a batch up with questions drawn uniformly from those not in it: no question twice in one
    iteration."""
    rest = np.setdiff1d(np.arange(size), chosen)
    others = rng.choice(rest, count - len(chosen), replace=False)
    return np.concatenate([chosen, others]).astype(int)


def shares(rewards):
    """Of questions, rewards (questions, n) of 0 and 1: the shares solved by all attempts, by none,
    and by some: the learnable ones."""
    success = rewards.mean(1)
    by_all, by_none = float((success == 1).mean()), float((success == 0).mean())
    some = float(((success > 0) & (success < 1)).mean())
    return {"solved_by_all": by_all, "solved_by_none": by_none, "learnable": some}


def pool(batch):
    """What to log of questions that were sampled in order to choose."""
    successes = np.rint(batch.rewards.sum(1)).astype(int)
    histogram = np.bincount(successes, minlength=batch.rewards.shape[1] + 1).tolist()
    logged = {f"pool_{name}": share for name, share in shares(batch.rewards).items()}
    return {"pool": len(batch.questions), **logged, "pool_histogram": histogram}


def draw_until(order, args, sample, enough):
    """Sample the questions in this order, a batch at a time, until `enough` of them (None: all) are
    learnable. Returns one Batch of all that were drawn."""
    step = args.questions if enough else len(order)
    batches = []
    learnable = 0
    for start in range(0, len(order), step):
        batches.append(sample(order[start : start + step], args.rollouts))
        learnable += (batches[-1].learnability() > 0).sum()
        if enough and learnable >= enough:
            break
    questions = np.concatenate([batch.questions for batch in batches])
    groups = [group for batch in batches for group in batch.groups]
    rewards = np.concatenate([batch.rewards for batch in batches])
    return Batch(questions, groups, rewards, sum(batch.seconds for batch in batches))


def monte_carlo_credit(args, run, batch):
    """VinePPO's advantages for a batch, and what to log of them."""
    questions = [run.sample.questions[i] for i in batch.questions]
    style = args.steps
    if style == "auto":
        style = "math" if questions[0].kind == "math" else "lines"
    max_steps = args.mc_max_steps or {"lines": 25, "math": 20}[style]
    settings = {"mc_rollouts": args.mc_rollouts, "max_steps": max_steps}
    settings |= {"style": style, "spend": args.mc_spend}
    advantages, spent = vineppo.mc_advantages(
        run.policy, run.tokenizer, questions, batch.groups, batch.rewards, **settings,
        score=run.sample.grade, seed=run.sample.seed(), **run.sample.generation,
    )  # fmt: skip
    names = ("mc_steps", "mc_filled", "mc_states", "mc_rollouts")
    logged = {name: spent[name] for name in names}
    logged["tokens_credit"] = spent["tokens_generated"]
    return advantages, logged


def imitate(args, run, batch):
    """A round of expert iteration or return-conditioned RL, on all that was kept so far."""
    kept = run.state.setdefault("kept", [])
    sft.keep(kept, args.algo, batch.questions, batch.groups, batch.rewards)
    prompts = run.sample.prompts
    stops = set(data.stop_ids(run.policy, run.tokenizer))
    examples = list(run.demonstrations)
    for question, reward, response in kept:
        prompt = prompts[question]
        if args.algo == "rcrl":
            prompt = data.with_tag(run.tokenizer, prompt, reward)
        examples.append(Rollout(prompt, response, [], response[-1] in stops))
    start = run.reference if args.expert_from == "initial" else None
    return sft.imitate(
        run.policy, start, examples, epochs=args.epochs, minibatch=args.minibatch,
        lr=run.optimizer.param_groups[0]["lr"], settings=run.settings, rng=run.rng,
    )  # fmt: skip


def group_of(question, prompt):
    """What stands for a question's difficulty: its level, else its prompt's length."""
    return str(question.level or f"length {4 * math.log2(len(prompt)):.0f}")


def batch_metrics(run, iteration, batch, rollouts):
    tokens = batch.tokens()
    logprobs = np.concatenate([rollout.logprobs for rollout in rollouts])
    calls = run.sample.calls
    sampled = [
        [int(i), run.sample.questions[i].level, int(sum(rewards)), len(rewards)]
        for call in calls
        for i, rewards in zip(call.questions, call.rewards)
    ]
    return {
        "iteration": iteration + 1,
        "reward_mean": float(batch.rewards.mean()),
        **shares(batch.rewards),
        "response_length": float(np.mean([len(r.response) for r in rollouts])),
        "grading_timeouts": evaluation.timeouts["timeouts"],  # since the start
        "truncated": float(np.mean([not r.finished for r in rollouts])),
        "entropy": float(-logprobs.mean()),  # unbiased, where top-p truncates nothing
        "lr": run.optimizer.param_groups[0]["lr"],
        "tokens_generated": tokens,
        # sampled to choose the questions and not trained on
        "tokens_scored": sum(call.tokens() for call in calls) - tokens,
        # [question, its level, successes, attempts], and which were trained on
        "sampled": sampled,
        "trained": batch.questions.tolist(),
    }


def out_of_patience(args, state):
    """Is none of the last `patience` evaluations better than those before?"""
    accuracies = state.get("accuracies", [])
    earlier, latest = accuracies[: -args.patience], accuracies[-args.patience :]
    return bool(args.patience and earlier and max(latest) <= max(earlier))


EVALUATED = ("accuracy", "accuracy_se", "response_length")


def advance(bar, row, result):
    shown = {"reward": row["reward_mean"], "learnable": row["learnable"]}
    shown |= {"accuracy": result["accuracy"], "length": row["response_length"]}
    bar.set_postfix({name: f"{value:.3g}" for name, value in shown.items()}, refresh=False)
    bar.update()


class Log:
    """metrics.jsonl, a row an iteration; TensorBoard and Weights & Biases, where asked for; and
    what a row warns of, once each, on stderr."""

    def __init__(self, out, args):
        self.rows, self.warned = [], set()
        self.file = (out / "metrics.jsonl").open("a") if rank() == 0 else None
        self.tensorboard = self.wandb = None
        if args.tensorboard and rank() == 0:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(out / "tensorboard")
        if args.wandb and rank() == 0:
            import wandb

            self.wandb = wandb.init(project="sfl", name=out.name, config=vars(args))

    def __call__(self, row):
        self.rows = [*self.rows[-9:], row]
        if self.file is None:
            return
        print(json.dumps(row), file=self.file, flush=True)
        for name, text in alarms(self.rows):
            if name not in self.warned:
                self.warned.add(name)
                tqdm.write(f"iteration {row['iteration']}: {text}", file=sys.stderr)
        numbers = {name: x for name, x in row.items() if isinstance(x, (int, float))}
        if self.tensorboard:
            for name, number in numbers.items():
                self.tensorboard.add_scalar(name, number, row["iteration"])
        if self.wandb:
            self.wandb.log(numbers, step=row["iteration"])


def alarms(rows):
    """(name, what is wrong and what to try) of what the last ten rows show."""
    row = rows[-1]
    if row.get("nonfinite_steps"):
        yield "nan", "a NaN or an infinity, no step was made: lower --lr"
    if row.get("kl", 0) > 1:
        yield "kl", f"the KL to the start is {row['kl']:.2f} a token: lower --lr, raise --kl_coef"
    if row["truncated"] > 0.5:
        share = f"{row['truncated']:.0%} of the responses run into --max_new_tokens"
        yield "truncated", f"{share}, which is worth 0: raise it, or --stop TEXT"
    if len(rows) < 10:
        return
    if all(row["learnable"] == 0 for row in rows):
        what = "nothing to learn: in ten iterations no question was solved by some of its responses"
        yield "agree", f"{what}; try easier or harder questions, or --curriculum lilo"
    if len({row["reward_mean"] for row in rows}) == 1:
        what = f"the mean reward has been {row['reward_mean']:.3g} for ten iterations"
        yield "reward", f"{what}: look at the responses (eval.py --save_samples), or --last_number"
    if all(row["entropy"] < 0.01 and row["reward_mean"] < 0.95 for row in rows):
        yield "entropy", "the entropy has collapsed, all responses are alike: lower --lr"


class Stop(Exception):
    """Ends a run that is saved. code: the exit code."""

    def __init__(self, text, code):
        super().__init__(text)
        self.code = code


def reason_to_stop(run):
    """A Stop, or None: somebody asked, or three steps in a row were not finite."""
    asked = all_sum(torch.tensor(float(len(run.signals.came))))  # all stop at the same iteration
    if asked:
        return Stop("interrupted", 128 + (run.signals.came or [signal.SIGTERM])[0])
    bad = [getattr(model, "bad_steps", 0) for model in (run.policy, run.critic)]
    if max(bad) >= 3:
        which = "the policy" if bad[0] >= 3 else "the critic"
        return Stop(f"three NaN or infinite steps of {which} in a row: lower --lr", 2)
    return None


@contextlib.contextmanager
def signals_wait():
    """SIGTERM and Ctrl-C fill `.came` and, where `.wait` says so, let the iteration finish; the
    second one interrupts at once."""
    signals = SimpleNamespace(came=[], wait=False)

    def ask(number, frame):
        signals.came.append(number)
        if not signals.wait or len(signals.came) > 1:
            raise KeyboardInterrupt
        print("\nfinishing this iteration; Ctrl-C again: at once", file=sys.stderr)

    if threading.current_thread() is not threading.main_thread():
        yield signals  # signals are not this thread's
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def kl_to_start(args, run, rollouts):
    """k3 a token of a few of the rollouts, when the loss does not need it."""
    some = rollouts[:: max(1, len(rollouts) // args.kl_sample)]
    ref = torch.cat(ppo.rollout_logprobs(run.reference, some, run.settings))
    sampled = torch.tensor([x for rollout in some for x in rollout.logprobs])
    return float(ppo.kl_k3(ref, sampled).mean())


def prepare_update(args, optimizer, iteration):
    """Linear warm-up; then constant, or (linear) down to 0 behind the last iteration."""
    if args.offload_optimizer:
        ENGINES.clear()  # memory is tight: before an update the cache of keys and values goes
    warm = args.warmup * args.iterations
    share = min(1.0, (iteration + 1) / max(1, warm))
    if args.lr_schedule == "linear":
        share = min(share, (args.iterations - iteration) / max(1, args.iterations - warm))
    for group, lr in zip(optimizer.param_groups, (args.lr, args.critic_lr)):
        group["lr"] = lr * share


def setup(args):
    """Everything that an iteration touches, made or loaded: questions, models, optimizer."""
    out = Path(args.out)
    evaluation.set_judges(args.judges)
    evaluation.timeouts.clear()  # the metrics count this run's
    device = data.pick_device(args.device)
    if device == "cuda" and many_processes():
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    if args.model == "tiny":
        torch.set_num_threads(min(2, torch.get_num_threads()))  # too small for more
    half = torch.bfloat16 if uses_bfloat16(args, device) else None
    fields = {name: getattr(args, f"{name}_field") for name in ("question", "answer", "solution")}
    load = partial(
        data.load_questions, args.dataset, data_dir=args.data_dir, fields=fields, bits=args.bits
    )
    questions, held_out = load("train"), load("test", limit=args.eval_limit or None)
    check(args, len(questions))  # before the work of making or loading a model
    base = args.model
    if args.model == "tiny":
        show = rank() == 0
        how = {"bits": args.bits, "p_cot": args.p_cot, "progress": show}
        base = sft.tiny_base(args.cache, args.dataset, **how)
    saved = out / "model"
    whole = (saved / "config.json").exists()  # which comes last
    policy, tokenizer = data.load_model(saved if whole else base, device=device)
    reference = None
    dtype = reference_dtype(args, half)
    if dtype is not None:
        reference, its_tokenizer = data.load_model(base, device=device, dtype=dtype)
        reference.requires_grad_(False)
    untagged = tokenizer
    if args.algo == "rcrl":
        untagged = copy.deepcopy(its_tokenizer)
        data.add_tags(policy, tokenizer, args.chat)
        data.add_tags(reference, its_tokenizer, args.chat)
    stop_ids = evaluation.stops(policy, tokenizer, args.stop)
    questions, prompts = fitting(args, tokenizer, policy, questions, "training")
    held_out, _ = fitting(args, tokenizer, policy, held_out, "held-out")
    check(args, len(questions))  # some may have been left out
    check_start(args, policy, tokenizer, questions, prompts)
    if args.gradient_checkpointing:
        policy.gradient_checkpointing_enable()
    critic = ppo.ValueModel(policy) if args.algo == "ppo" else None
    if args.fsdp:
        ppo.shard(policy, decoder=half or policy.dtype)
        if critic is not None:
            ppo.shard(critic)
    parameters = [{"params": policy.parameters(), "lr": args.lr}]
    if critic is not None:
        parameters.append({"params": critic.parameters(), "lr": args.critic_lr})
    demonstrations = []
    if args.solutions:
        shown = [q for q in questions if q.solution]
        if not shown:
            raise ValueError(f"--solutions: {args.dataset} has none; leave the flag out")
        texts = [q.solution for q in shown]
        demonstrations = sft.demonstrations(tokenizer, shown, texts, args.chat)

    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    if args.offload_optimizer:
        optimizer.register_step_pre_hook(lambda *_: move_state(optimizer, device))
        optimizer.register_step_post_hook(lambda *_: move_state(optimizer, "cpu"))

    sampling = {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "top_p")}
    cost = {"engine": args.engine, "slots": args.slots or None, "dtype": half}
    cost |= {"progress": sys.stderr.isatty() and rank() == 0, "stop_ids": stop_ids}
    names = ("temperature", "gamma", "lam", "clip", "value_clip", "kl_coef", "epochs", "minibatch")
    names += ("max_grad_norm", "max_ratio", "tokens_per_microbatch", "loss_average", "fsdp")
    settings = ppo.Settings(autocast=half, **{name: getattr(args, name) for name in names})

    def evaluate(samples=1, tokenizer=tokenizer):
        """Greedy on the held-out questions; with samples, at the training temperature."""
        how = sampling if samples > 1 else {"max_new_tokens": args.max_new_tokens}
        result = evaluation.evaluate(
            policy, tokenizer, held_out, samples=samples, chat=args.chat, seed=args.seed,
            last_number=args.last_number, **cost, **how,
        )  # fmt: skip
        return {**result, "responses": result["responses"][:3]}

    one_step = args.epochs == 1 and args.questions * args.rollouts <= args.minibatch
    return SimpleNamespace(
        out=out,
        policy=policy,
        tokenizer=tokenizer,
        critic=critic,
        one_pass=one_step and not args.offload_optimizer,  # there the cache is still in memory
        reference=reference,
        optimizer=optimizer,
        settings=settings,
        demonstrations=demonstrations,
        untagged=untagged,
        sample=Sampler(args, policy, tokenizer, questions, prompts, sampling | cost),
        evaluate=evaluate,
        rng=np.random.default_rng(args.seed),
        state={"groups": [group_of(q, prompt) for q, prompt in zip(questions, prompts)]},
        size=len(questions),
        start=0,
    )


def uses_bfloat16(args, device):
    """Of the matrix products."""
    return args.dtype == "bfloat16" or (args.dtype == "auto" and device.startswith("cuda"))


def reference_dtype(args, half):
    """Of the frozen reference's weights; None: the run needs none. Nobody trains it: half the bytes
    do, unless a round of imitation starts from them."""
    if args.algo in sft.IMITATORS:
        return "float32"
    if args.kl_coef == 0 and args.kl_sample == 0:
        return None
    return "bfloat16" if half else "float32"


def move_state(optimizer, device):
    """Adam's moments, to where they are needed or to where they wait."""
    for state in optimizer.state.values():
        for name, tensor in state.items():
            if tensor.dim() > 0:  # not the step's number, which Adam wants on the CPU
                state[name] = tensor.to(device)


def fitting(args, tokenizer, policy, questions, which):
    """(questions, prompts). One that does not fit the context: ValueError, or with --skip_long it
    is left out."""
    limit = min(
        args.context, getattr(policy.config, "max_position_embeddings", None) or args.context
    )
    prompts = data.encode_prompts(tokenizer, questions, chat=args.chat)
    long = {i for i, prompt in enumerate(prompts) if len(prompt) + args.max_new_tokens > limit}
    if long and not args.skip_long:
        first = min(long)
        raise ValueError(
            f"{which} question {first} is {len(prompts[first])} tokens: with --max_new_tokens "
            f"{args.max_new_tokens} it passes the context of {limit} ({len(long)} of "
            f"{len(prompts)} do): lower --max_new_tokens, raise --context if the model allows it, "
            "or pass --skip_long"
        )
    keep = [i for i in range(len(prompts)) if i not in long]
    if not keep:
        raise ValueError(
            f"no {which} question fits the context of {limit} with --max_new_tokens "
            f"{args.max_new_tokens}: lower it"
        )
    if long:
        left_out = f"left out {len(long)} of {len(prompts)} {which} questions"
        print(f"{left_out}, too long for {limit} tokens", file=sys.stderr)
    return [questions[i] for i in keep], [prompts[i] for i in keep]


# --------------------------------------------------------------------------- checkpoints
# model/ is what from_pretrained loads; state/ is what an exact resume needs besides


def start_or_resume(run, args):
    """Prepare the run's folder, or load its checkpoint; a run that was stopped before its first one
    starts anew. Returns the evaluation before training."""
    if rank() == 0:
        run.out.mkdir(parents=True, exist_ok=True)
    write(run.out / "config.json", json.dumps(vars(args), indent=1) + "\n")
    if (run.out / "state" / "training.pt").exists():
        load_state(run)
    if run.start == 0:
        how = {"tokenizer": run.untagged}  # rcrl: the tags are not learned yet
        before = {"greedy": run.evaluate(**how), "sampled": run.evaluate(samples=8, **how)}
        write(run.out / "evaluation.json", json.dumps({"before": before}))
        save(run, 0)
        return before
    return json.loads((run.out / "evaluation.json").read_text())["before"]


def write(path, text):
    """The file is the old one or the new one, whatever interrupts this."""
    if rank() == 0:
        path.with_suffix(".tmp").write_text(text)
        data.put_in_place(path.with_suffix(".tmp"), path)


def save(run, iteration):
    """state/training.pt holds everything a resume needs, the weights that belong to it too: one
    file, renamed over the old one, so that an interrupted save leaves the previous checkpoint."""
    folder = run.out / "state"
    rng = run.rng.bit_generator.state
    loop = {"iteration": iteration, "rng": rng, "curriculum": run.state}
    state = {
        "loop": json.dumps(loop),
        "policy": ppo.put_together(run.policy.state_dict()),
        "critic": run.critic and ppo.put_together(run.critic.state_dict()),
        "optimizer": ppo.put_together(run.optimizer.state_dict()),
    }
    if rank() == 0:
        folder.mkdir(exist_ok=True)
        data.save_state(state, folder / "training.pt")
        data.save_model(run.policy, run.tokenizer, run.out / "model", state["policy"])


def load_state(run):
    """The inverse of `save`; and it forgets the metrics logged after it."""
    path = run.out / "state" / "training.pt"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        loop = json.loads(state["loop"])
        ppo.take_apart(state["policy"], dict(run.policy.named_parameters()))
        run.policy.load_state_dict(state["policy"])
        if run.critic is not None:
            ppo.take_apart(state["critic"], dict(run.critic.named_parameters()))
            run.critic.load_state_dict(state["critic"])
        groups = run.optimizer.param_groups
        parameters = [parameter for group in groups for parameter in group["params"]]
        for number, moments in state["optimizer"]["state"].items():
            ppo.take_apart(moments, dict.fromkeys(moments, parameters[number]))
        run.optimizer.load_state_dict(state["optimizer"])
    except Exception as error:  # cut off, another program's, another model's
        raise ValueError(
            f"--resume {run.out}: no usable {path} ({data.first_line(error)}): start anew with "
            "--out"
        ) from error
    run.rng.bit_generator.state = loop["rng"]
    run.state.update(loop["curriculum"])
    run.start = loop["iteration"]
    metrics = run.out / "metrics.jsonl"
    rows = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    write(metrics, "".join(rows[: run.start]))


# --------------------------------------------------------------------------- several processes
# torchrun --nproc_per_node=2 sfl.py ...: see rollout.py


@contextlib.contextmanager
def several_processes():
    """Under torchrun, the process group; else nothing."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def from_first_process(objects):
    if many_processes():
        dist.broadcast_object_list(objects)
    return objects


# --------------------------------------------------------------------------- will it fit?


def memory(args, model, half):
    """{owner: bytes} in a process at the peak, which is in the update. model: may lie on the meta
    device; half: are matrix products in bfloat16? Activations are those of a Llama-like layer."""
    config = model.config.get_text_config()
    layers, hidden = config.num_hidden_layers, config.hidden_size
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    kv = kv_heads * (getattr(config, "head_dim", None) or hidden // heads)
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    policy = 4 * sum(p.numel() for p in model.parameters())
    critic = 4 * sum(p.numel() for p in model.base_model.parameters()) * (args.algo == "ppo")
    columns = -(-min(args.context, PROMPT + args.max_new_tokens) // 64) * 64
    width = 2 if half else 4
    slots = args.slots or min(512 if half else 256, args.questions * args.rollouts)
    # what a layer keeps for the backward pass, a token
    kept = 4 * (9 * hidden + 4 * inner + 1.5 * kv) * (0.6 if half else 1)
    tokens = args.tokens_per_microbatch
    activations = tokens * layers * kept
    if args.gradient_checkpointing:
        activations = tokens * (layers * 4 * hidden + kept)
    cache = slots * (columns * 2 * layers * kv * width + 16 * config.vocab_size)
    reference = {None: 0, "bfloat16": policy / 2, "float32": policy}
    logits = 8 * min(tokens * config.vocab_size, 2**25)  # a chunk and its softmax
    decoder = policy / 2 if half else policy * args.fsdp  # a copy of the weights
    parts = dist.get_world_size() if args.fsdp and many_processes() else 1
    # --fsdp: embedding and head stay gathered for a pass, weights and gradient; and two layers
    tables = 4 * 2 * config.vocab_size * hidden
    gathered = (2 * tables + 2 * (policy - tables) / layers) * args.fsdp
    owners = {
        "policy": policy / parts + decoder,
        "critic": critic / parts,
        "reference": reference[reference_dtype(args, half)],
        "optimizer": 2 * (policy + critic) / parts,
        "gradients": max(policy, critic) / parts + gathered,
        "cache": 0 if args.offload_optimizer else cache,  # then it is freed before the update
        "activations": activations + logits,
    }
    if args.offload_optimizer:  # then these are never on the device together
        owners[min("optimizer", "activations", key=owners.get)] = 0
    return owners


PROMPT = 256  # tokens of a question, taken to be the longest
LESS = "--gradient_checkpointing, --offload_optimizer, --fsdp, --tokens_per_microbatch, --slots"


def dry_run(args):
    """What a run would take, from the model's configuration alone. A table as text."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from rollout import free_memory

    device = data.pick_device(args.device)
    half = uses_bfloat16(args, device)
    if args.model == "tiny":
        model = sft.tiny_model(sft.tiny_tokenizer(args.dataset), 0)
    else:
        try:
            config = AutoConfig.from_pretrained(args.model)
        except Exception as error:
            reason = data.first_line(error)
            raise ValueError(f"cannot read the config of {args.model!r}: {reason}") from error
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    owners = memory(args, model, half)
    parameters = sum(p.numel() for p in model.parameters())
    lines = [f"{args.model}: {parameters / 1e6:,.1f} million parameters, {args.algo} on {device}"]
    for owner, size in [*owners.items(), ("together", sum(owners.values()))]:
        lines.append(f"{owner:<12}{size / 2**30:9.2f} GiB")
    free = free_memory(device)
    if free < math.inf:
        fits = "it fits" if sum(owners.values()) < free else f"it does not fit: try {LESS}"
        lines.append(f"{'free':<12}{free / 2**30:9.2f} GiB: {fits}")
    if args.algo == "ppo":
        lines.append("--algo vineppo or grpo needs no critic")
    return "\n".join(lines)


# --------------------------------------------------------------------------- settings

# See data.read_settings. Behind the comma: the papers' on GSM8K (arXiv 2502.12272, 2410.01679).
SETTINGS = """
algo             ppo            ppo|vineppo|grpo|rloo|expert|rcrl what a reward is turned into
curriculum       posterior,sfl  uniform|sfl|lilo|dapo|posterior how questions are chosen
iterations       76,650         1..   iterations of training
seed             0              0..   of everything random in the training

questions        16,64          1..   questions an iteration (N_l)
rollouts         8              1..   responses to each question
rho              1.0,0.5        0..1  share of questions chosen by learnability; the rest is uniform
refresh_every    15,50          1..   sfl: iterations between two scorings (T)
candidates       512,1280       1..   sfl: questions scored each time (N)
buffer_size      40,256         1..   sfl: how many of them are kept (K)
score_rollouts   8              2..   sfl: responses to each candidate (L)
max_candidates   128,256        1..   lilo, dapo: questions drawn in an iteration, at most
stop_early       off            -     lilo: draw no more once enough questions are learnable
memory           0.95,0.98      0..1  posterior: share of the evidence that an iteration keeps

temperature      1.0,0.6        0..   of the sampling, also of the log-probs in the loss
top_p            1.0,0.9        0..1  nucleus of the sampling
max_new_tokens   96,1024        1..   longest response; a longer one is cut off and worth 0
context          256,2048       2..   longest prompt and response together, in tokens

lr               2e-4,1e-6      0..   learning rate of the policy (AdamW, no weight decay)
critic_lr        1e-3,1e-6      0..   learning rate of the critic
warmup           0.03           0..1  share of the iterations in which the learning rate rises
lr_schedule      constant,linear constant|linear after the warm-up; linear: to 0 at the end
epochs           1,2            1..   passes over an iteration's rollouts
minibatch        128,64         1..   rollouts an optimizer step
loss_average     token          token|response over all tokens, or 1/|o| for each response (GRPO)
clip             0.2            0..   PPO's ratio clip
value_clip       0.2            0..   PPO's value clip
kl_coef          0.0,1e-4       0..   weight of a response's KL to the starting model
kl_sample        16             0..   with kl_coef 0: rollouts whose KL is measured; 0: none
gamma            1.0            0..1  discount
lam              1.0            0..1  GAE's lambda
max_ratio        10.0           0..   a minibatch with a larger mean ratio is skipped
max_grad_norm    1.0            0..   gradient norm that is clipped to

mc_rollouts      9              1..   vineppo: fresh responses from each state (K)
mc_max_steps     0              0..   vineppo: steps whose end is estimated; 0: 25, or 20 of math's
mc_spend         all            all|bisect vineppo: estimate all states, or where values change
steps            auto           auto|lines|math vineppo: steps are lines, sentences, as data has it

expert_from      initial        initial|last expert, rcrl: the model that a round fine-tunes
solutions        off            -     expert, rcrl: imitate the data set's own solutions, too
patience         0              0..   end after so many evaluations with no better one; 0: never

tokens_per_microbatch 2048,16384     1..   padded tokens at a time; lower it if memory runs out
gradient_checkpointing off            -     recompute activations in the backward pass: less memory
fsdp             off            -     under torchrun: each process keeps a part of the weights
offload_optimizer off           -     Adam's moments wait in host memory: less on the GPU, slower
slots            0              0..   sequences decoded at once; 0: by free memory

eval_every       10,25          1..   iterations between two evaluations (held-out, greedy)
eval_limit       0              0..   held-out questions, a random subset; 0: all
save_every       10,25          1..   iterations between two checkpoints

preset           -              -     a paper's run by name; other flags change it
dataset          arithmetic     -     names, joined by commas, or a file's or folder's path
bits             24             2..60 parity: bits of a question
p_cot            0.25           0..1  parity: share of the demonstrations that are long
data_dir         -              -     a folder with the named data set's files, instead of the hub
question_field   -              -     the rows' name for the question; as usual: found by itself
answer_field     -              -     and for the answer
solution_field   -              -     and for the solution
model            tiny,realtreetune/rho-1b-sft-GSM8K -     tiny, a hub id or a model's folder
out              -              -     folder of the run; by default a new one under runs/
resume           -              -     a run's folder: go on exactly where its checkpoint is
dry_run          off            -     say what memory the run would take, and stop
device           auto           -     auto, cpu, cuda or mps
dtype            auto           auto|float32|bfloat16 of matrix products; auto: bfloat16 on CUDA
chat             auto           auto|on|off prompt through the chat template; auto: if there is one
engine           slots          slots|hf hf: model.generate, for models the slots do not fit
stop             -              -     a text that ends a response and is not graded; \\n: a newline
judges           0              0..   processes that compare LaTeX answers; 0: one a core
last_number      off            -     a response with no marked answer is graded by its last number
skip_long        off            -     leave out questions that do not fit the context
tensorboard      off            -     log to TensorBoard, too (in the run's folder)
wandb            off            -     log to Weights & Biases, too
cache            runs/cache     -     where the tiny starting model is kept
"""
# The papers' runs. PPO by default; --algo vineppo is the other. What is not said is the table's.
FAST = "--curriculum sfl --refresh_every 10 --candidates 256 --buffer_size 64"
GSM8K = r"--dataset gsm8k --stop \n\n\nProblem:"
MATH = (
    r"--dataset math --stop \n\n\nProblem: --model realtreetune/rho-1b-sft-MATH --iterations 1000"
)
PRESETS = {
    "uniform-gsm8k": f"{GSM8K} --curriculum uniform",
    "sfl-gsm8k": f"{GSM8K} --curriculum sfl",
    "sfl-fast-gsm8k": f"{GSM8K} {FAST}",
    "lilo-gsm8k": f"{GSM8K} --curriculum lilo",
    "uniform-math": f"{MATH} --curriculum uniform",
    "sfl-math": f"{MATH} --curriculum sfl",
    "sfl-fast-math": f"{MATH} {FAST}",
    "lilo-math": f"{MATH} --curriculum lilo",
    "grpo-orz": "--algo grpo --dataset orz --curriculum lilo",
}
# What is usual for who imitates: few rounds of many samples. Arithmetic and parity, other data.
ROUNDS = "--questions 256 --minibatch 64 --eval_every 1 --save_every 1"
ROUNDS_OTHER = "--questions 1024 --lr 1e-5 --eval_every 1 --save_every 1"
IMITATION = {
    "expert": (f"{ROUNDS} --iterations 12 --lr 1e-3 --epochs 3", f"{ROUNDS_OTHER} --iterations 8"),
    "rcrl": (
        f"{ROUNDS} --iterations 8 --lr 2e-3 --epochs 2 --expert_from last",
        f"{ROUNDS_OTHER} --iterations 8",
    ),
}
# What --resume may change.
CHANGEABLE = ("iterations", "device", "tokens_per_microbatch", "slots", "eval_every", "save_every")
CHANGEABLE += ("gradient_checkpointing", "offload_optimizer", "fsdp", "data_dir", "cache", "judges")


def parse(argv=None):
    """The settings: flags that were not given have the data set's default or, on --resume, the
    run's own."""
    flags = data.parse_flags(SETTINGS, "RL on the questions a model can almost answer.", argv)
    if "resume" in flags:
        return resumed(flags)
    if "preset" in flags:
        if flags["preset"] not in PRESETS:
            raise ValueError(f"--preset {flags['preset']}: choose from {', '.join(PRESETS)}")
        preset = PRESETS[flags["preset"]].split()
        flags = data.parse_flags(SETTINGS, "", preset) | flags  # what is given has the last word
    other = flags.get("dataset", "arithmetic") not in data.MADE_HERE
    usual = IMITATION.get(flags.get("algo"), ("", ""))[other].split()
    flags = data.parse_flags(SETTINGS, "", usual) | flags
    defaults = {name: row[other] for name, row in data.read_settings(SETTINGS).items()}
    args = SimpleNamespace(**defaults | flags)
    check(args)
    name = f"runs/{Path(args.dataset).stem}-{args.algo}-{args.curriculum}"
    if args.out is None:  # a new folder each time: nothing is overwritten
        names = (f"{name}-{i}" for i in itertools.count(1))
        args.out = next(name for name in names if not Path(name).exists())
    out = Path(args.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(
            f"--out {out} holds something already: go on with that run by --resume {out}, or give "
            "another --out"
        )
    return args


def resumed(flags):
    out = Path(flags["resume"])
    try:
        saved = json.loads((out / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"--resume {out}: no run there ({data.first_line(error)})") from error
    for name in flags.keys() - {"resume", *CHANGEABLE}:
        if saved.get(name) != flags[name]:
            raise ValueError(
                f"--{name} {flags[name]} cannot change on --resume (the run has "
                f"{saved.get(name)}): leave it out, or start a new run with --out; these can: "
                f"{', '.join(sorted(CHANGEABLE))}"
            )
    saved["fsdp"] = saved.get("fsdp", False) and many_processes()
    args = SimpleNamespace(**saved | flags | {"out": str(out)})
    check(args)
    return args


def check(args, size=None):
    """ValueError: settings that do not make sense, by themselves, together, or (once the questions
    are loaded) with `size` questions."""
    data.check_settings(SETTINGS, args)
    if args.temperature == 0 or args.top_p == 0:
        raise ValueError("--temperature and --top_p must be above 0: training samples differ")
    compares = args.algo in ("grpo", "rloo") or args.curriculum in ("lilo", "dapo", "posterior")
    if compares and args.rollouts < 2:
        raise ValueError(
            f"--rollouts {args.rollouts}: {args.algo} with {args.curriculum} compares responses to "
            "one question: give at least 2"
        )
    if args.model == "tiny":
        sft.check_tiny(args)
    if args.fsdp and (args.offload_optimizer or args.algo in sft.IMITATORS):
        other = "--offload_optimizer" if args.offload_optimizer else f"--algo {args.algo}"
        raise ValueError(f"--fsdp does not go with {other}: leave one of them out")
    if args.fsdp and not (many_processes() or args.dry_run):
        raise ValueError("--fsdp is for several processes: torchrun --nproc_per_node=2 sfl.py ...")
    for package in ("tensorboard", "wandb"):
        if getattr(args, package) and find_spec(package) is None:
            raise ValueError(f"--{package} needs a package: pip install {package}")
    sizes = {"questions": args.questions}
    chosen = round(args.rho * args.questions)
    at_most = []  # (flag, its value, what it may not pass, that one's value, which to change)
    if args.curriculum == "sfl":
        sizes["candidates"] = args.candidates
        at_most = [("buffer_size", args.buffer_size, "--candidates", args.candidates, "lower it")]
        raise_it = "raise --buffer_size"
        at_most += [("rho times --questions", chosen, "--buffer_size", args.buffer_size, raise_it)]
    if args.curriculum in ("lilo", "dapo"):
        sizes["max_candidates"] = args.max_candidates
        raise_it = "raise --max_candidates"
        at_most = [("questions", args.questions, "--max_candidates", args.max_candidates, raise_it)]
    if size is not None:
        what = f"the questions of {args.dataset},"
        at_most += [(name, value, what, size, "lower it") for name, value in sizes.items()]
    for name, value, what, limit, way_out in at_most:
        if value > limit:
            raise ValueError(f"--{name} {value} is more than {what} {limit}: {way_out}")


def check_start(args, policy, tokenizer, questions, prompts, count=16):
    """ValueError, or a line on stderr, for what would train quietly on nonsense."""
    rows = len(policy.get_input_embeddings().weight)
    if len(tokenizer) > rows:
        raise ValueError(
            f"--model {args.model}: its tokenizer has {len(tokenizer)} tokens, its embedding "
            f"{rows} rows: they are not of one model"
        )
    if len(set(map(tuple, prompts))) == 1 < len({question.prompt for question in questions}):
        raise ValueError(
            "all prompts are alike: the chat template leaves the question out: give --chat off"
        )
    some = questions[:: max(1, len(questions) // count)]
    refused = [q for q in some if evaluation.grade(f"\\boxed{{{q.answer}}}", q) == 0]
    if len(refused) == len(some):
        answer = refused[0].answer[:40]
        raise ValueError(
            f"no grader accepts the gold answers of {args.dataset} (such as {answer!r}), not even "
            "themselves: give --answer_field the field with the bare answer"
        )
    if rank() > 0:
        return
    if refused:
        share = f"{len(refused)} of {len(some)} gold answers looked at"
        print(f"{share} are not accepted by their own grader", file=sys.stderr)
    if tokenizer.chat_template and args.chat == "off" and args.algo != "rcrl":
        print("--chat off: this model has a chat template, and is prompted raw", file=sys.stderr)


def summary(out, before, after):
    """What the command prints in the end."""
    lines = ["", evaluation.table({"before": before["greedy"], "after": after["greedy"]})]
    responses = before["greedy"]["responses"], after["greedy"]["responses"]
    for pair in zip(*responses):
        lines += ["", f"question: {pair[0]['question'].strip()}   (answer: {pair[0]['answer']})"]
        for when, example in zip(("before", "after"), pair):
            lines.append(f"  {when}, reward {example['reward']:.0f}")
            lines += [f"    {line}" for line in example["response"].splitlines()]
    lines += ["", f"model    {out / 'model'}", f"metrics  {out / 'metrics.jsonl'}"]
    return "\n".join([*lines, f"look at  python eval.py --plot {out}"])


def main(argv=None):
    with several_processes(), signals_wait() as signals:
        [args] = from_first_process([parse(argv) if rank() == 0 else None])
        if args.dry_run:
            return rank() or print(dry_run(args))
        try:
            before, after = train(args, signals)
        except (KeyboardInterrupt, Stop) as end:
            started = Path(args.out, "config.json").exists()
            way_out = f"go on from the last checkpoint with --resume {args.out}"
            what = str(end) or "interrupted"
            if rank() == 0:
                print(f"\n{what}: {way_out if started else 'nothing saved'}", file=sys.stderr)
            sys.exit(getattr(end, "code", 130))
        if rank() == 0:
            print(summary(Path(args.out), before, after))


if __name__ == "__main__":
    data.command_line(main)
