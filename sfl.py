"""Train a language model on the questions it can almost answer: sampling for learnability (SFL), the main script.

    python sfl.py                                                       # arithmetic, a tiny model, PPO: minutes on CPU
    python sfl.py --algo ppo --dataset gsm8k --model HUB_ID_OR_DIR      # the papers' settings, on a GPU
    python sfl.py --algo grpo --curriculum uniform --out runs/uniform   # a baseline to compare with
    python sfl.py --report runs/uniform runs/sfl                        # what was solved by all, by none, between

A policy samples n responses to a question and each is graded 0 or 1. If all are right or all are wrong there is nothing
to compare, and every policy-gradient method learns next to nothing from them. What teaches is the variance of success,

    learnability = p (1 - p)                                    p: the policy's success rate on the question

zero where the model always fails, zero where it always succeeds, largest where it succeeds half of the time. SFL
(arXiv 2502.12272) samples questions by it; LILO shows that the expected improvement from a question grows linearly with
it. One iteration of training, here from top to bottom:

    questions --choose--> prompts --rollout.generate--> rollouts --eval.rewards--> rewards
        ^                                                                            |
        +--- learnability <--- successes      policy <--ppo.update-- advantages <----+
                                              (ppo: critic + GAE; vineppo: Monte Carlo; grpo, rloo: the group)

The curricula differ in nothing but the choice of questions:

    uniform    all questions alike
    sfl        every T iterations score N candidates with L responses each and buffer the K most learnable; a share rho
               of each batch comes from the buffer, the rest is uniform
    lilo       draw questions until enough of them turned out learnable, and train on the very responses that showed it
    posterior  no scoring at all: a Beta posterior of each question's success, from the training rollouts it has had, says
               which are learnable
"""

import argparse
import functools
import itertools
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import eval as evaluation
import ppo
import sft
import vineppo
from rollout import generate

ALGOS = ("ppo", "vineppo", "grpo", "rloo")
CURRICULA = ("sfl", "lilo", "posterior", "uniform")

# Every setting: its type, its default for the embedded arithmetic task, its default for any other data set (that of the
# papers on GSM8K, arXiv 2502.12272 and 2410.01679), and what it is. Read as a table; the parser is built from it.
SETTINGS = dict(
    algo=(ALGOS, "ppo", "ppo", "how a reward becomes credit"),
    curriculum=(CURRICULA, "sfl", "sfl", "how questions are chosen"),
    iterations=(int, 60, 650, "iterations of training"),
    seed=(int, 0, 0, "of everything random in the training"),
    # SFL, by the paper's names
    questions=(int, 32, 64, "questions an iteration (N_l)"),
    rollouts=(int, 8, 8, "responses to each question"),
    rho=(float, 0.5, 0.5, "share of the questions that is chosen by learnability, in [0, 1]; the rest is uniform"),
    refresh_every=(int, 10, 50, "sfl: iterations between two scorings (T)"),
    candidates=(int, 256, 1280, "sfl: questions scored each time (N)"),
    buffer_size=(int, 48, 256, "sfl: how many of them are kept (K)"),
    score_rollouts=(int, 8, 8, "sfl: responses to each candidate (L)"),
    max_candidates=(int, 128, 256, "lilo: most questions drawn in an iteration"),
    memory=(float, 0.95, 0.98, "posterior: share of the evidence on a question that an iteration keeps"),
    thompson=(bool, False, False, "posterior: choose by a draw from each question's posterior, not by its mean"),
    # sampling
    temperature=(float, 1.0, 0.6, "sampling temperature, also of the log-probs in the loss"),
    top_p=(float, 1.0, 0.9, "nucleus of the sampling"),
    max_new_tokens=(int, 96, 1024, "longest response, in tokens; a longer one is cut off and worth 0"),
    context=(int, 256, 2048, "longest prompt and response together, in tokens"),
    # PPO
    lr=(float, 2e-4, 1e-6, "learning rate of the policy (AdamW, no weight decay)"),
    critic_lr=(float, 1e-3, 1e-6, "learning rate of the critic"),
    warmup=(float, 0.03, 0.03, "share of the iterations in which the learning rate rises to its value"),
    epochs=(int, 1, 2, "passes over an iteration's rollouts"),
    minibatch=(int, 256, 64, "rollouts an optimizer step"),
    clip=(float, 0.2, 0.2, "PPO's ratio clip"),
    value_clip=(float, 0.2, 0.2, "PPO's value clip"),
    kl_coef=(float, 0.0, 1e-4, "weight of the KL loss to the frozen starting model; 0: no reference in memory"),
    gamma=(float, 1.0, 1.0, "discount"),
    lam=(float, 1.0, 1.0, "GAE's lambda"),
    max_ratio=(float, 10.0, 10.0, "a minibatch with a larger mean ratio is skipped"),
    max_grad_norm=(float, 1.0, 1.0, "gradient norm that is clipped to"),
    # VinePPO
    mc_rollouts=(int, 9, 9, "vineppo: fresh responses from each state (K)"),
    mc_max_steps=(int, 25, 25, "vineppo: steps of a response whose start is estimated"),
    mc_reuse=(bool, False, False, "vineppo: let the responses at hand count as estimates of their question's value"),
    steps=(("lines", "math"), "lines", "lines", "vineppo: how a response is cut into steps"),
    # cost
    tokens_per_microbatch=(int, 2048, 16384, "padded tokens in one forward and backward; lower it if memory runs out"),
    gradient_checkpointing=(bool, False, False, "recompute activations in the backward pass: slower, far less memory"),
    slots=(int, None, None, "sequences decoded at once (default: by free memory)"),
    # evaluation and checkpoints
    eval_every=(int, 5, 25, "iterations between two evaluations on held-out questions (greedy)"),
    eval_limit=(int, None, None, "held-out questions, a random subset (default: all)"),
    save_every=(int, 10, 25, "iterations between two checkpoints"),
)
DEFAULT_MODEL = "realtreetune/rho-1b-sft-GSM8K"
EVERYWHERE = dict(  # the same for all data sets, or chosen by them
    dataset=(str, "arithmetic", "arithmetic, gsm8k, or the path of a .jsonl file or of a folder of {train,test}.jsonl"),
    data_dir=(str, None, "gsm8k: a folder with train.jsonl and test.jsonl, instead of the hub"),
    model=(str, None, "tiny, a hub id or a model's folder (default: tiny for arithmetic, else " + DEFAULT_MODEL + ")"),
    out=(str, None, "folder of the run (default: a new one under runs/)"),
    device=(str, "auto", "auto, cpu, cuda or mps"),
    dtype=(str, "auto", "of the matrix products: auto (bfloat16 on CUDA), float32, bfloat16; weights are float32"),
    chat=(str, "auto", "prompt through the tokenizer's chat template: auto (if it has one), on, off"),
    engine=(str, "slots", "slots, or hf: generate through model.generate, for models the slots do not fit"),
    last_number=(bool, False, "a response with no marked answer is graded by its last number"),
    skip_long=(bool, False, "leave out questions that do not fit the context, instead of stopping"),
    cache=(str, "runs/cache", "where the tiny starting model is kept"),
)
CHANGEABLE = {"iterations", "device", "tokens_per_microbatch", "slots", "eval_every", "save_every",
              "gradient_checkpointing", "data_dir", "cache"}


# ----------------------------------------------------------------------------------------------------------------------
# Learnability


def learnability(successes, attempts):
    """Unbiased estimate of p (1 - p) from `successes` of `attempts`: s (a - s) / (a (a - 1)). Numbers or arrays.

    The plug-in, (s/a)(1 - s/a), is too low by the factor (a - 1)/a: its expectation is p(1 - p) - Var(s/a), because the
    same draws serve as the mean and are measured against it. The factor is common to all questions when all have had
    the same number of attempts, and ranking them does not see it. It matters when they have not: at a = 2 the plug-in
    halves a question's learnability, at a = 16 it takes a sixteenth, so it prefers whatever was tried often.
    Raises ValueError below 2 attempts, from which no variance can be estimated.
    """
    successes, attempts = np.asarray(successes, dtype=float), np.asarray(attempts, dtype=float)
    if np.any(attempts < 2) or np.any(successes < 0) or np.any(successes > attempts):
        raise ValueError(f"learnability of {successes} successes in {attempts} attempts: need at least 2 attempts, and "
                         "successes between 0 and the attempts")
    return (successes * (attempts - successes) / (attempts * (attempts - 1)))[()]


def variance(rewards):
    """Learnability for any rewards, (questions, n) -> (questions,): their unbiased variance. For rewards 0 and 1 it is
    `learnability(rewards.sum(1), n)`, number for number."""
    return np.var(np.asarray(rewards, dtype=float), axis=1, ddof=1)


def most(scores, k, rng):
    """Indices of the k largest scores, ties broken at random."""
    shuffled = rng.permutation(len(scores))
    return shuffled[np.argsort(-np.asarray(scores)[shuffled], kind="stable")[:k]]


def shares(rewards):
    """(solved by all, solved by none, learnable) shares of the questions; rewards (questions, n) of 0 and 1."""
    mean = np.asarray(rewards).mean(1)
    return float((mean == 1).mean()), float((mean == 0).mean()), float(((mean > 0) & (mean < 1)).mean())


def pool(rewards):
    """What to log of questions sampled in order to choose: how many, their shares, the histogram of their successes."""
    by_all, by_none, between = shares(rewards)
    successes = np.bincount(np.rint(rewards.sum(1)).astype(int), minlength=rewards.shape[1] + 1)
    return dict(pool=len(rewards), pool_solved_by_all=by_all, pool_solved_by_none=by_none, pool_learnable=between,
                pool_histogram=successes.tolist())


# ----------------------------------------------------------------------------------------------------------------------
# The curricula. Each is a function of (args, state, iteration, pool size, rng, attempt) that returns which questions to
# train on, the rollouts and rewards they were chosen by (lilo) or None, and what to log. `state` is a dict of plain
# numbers and lists, saved with the checkpoint. attempt(indices, n) samples n responses to each: (rollouts, rewards).


def uniform(args, state, iteration, size, rng, attempt):
    return rng.choice(size, args.questions, replace=False), None, {}


def with_uniform(chosen, args, size, rng):
    """Fill a batch up with questions drawn uniformly from those not in it: no question twice in one iteration."""
    rest = np.setdiff1d(np.arange(size), chosen)
    return np.concatenate([chosen, rng.choice(rest, args.questions - len(chosen), replace=False)]).astype(int)


def sfl(args, state, iteration, size, rng, attempt):
    """Sampling for learnability with a buffer (arXiv 2502.12272; the symbols are the paper's)."""
    logged = {}
    if iteration % args.refresh_every == 0:  # every T iterations
        candidates = rng.choice(size, args.candidates, replace=False)  # N, without replacement
        _, rewards = attempt(candidates, args.score_rollouts)  # L each
        state["buffer"] = candidates[most(variance(rewards), args.buffer_size, rng)].tolist()  # the K most learnable
        logged = pool(rewards)
    chosen = rng.choice(state["buffer"], round(args.rho * args.questions), replace=False)  # rho N_l of the buffer
    return with_uniform(chosen, args, size, rng), None, logged


def lilo(args, state, iteration, size, rng, attempt):
    """Rejection (LILO): draw chunks of questions until N_l of them are learnable or the budget is spent, and train on
    the most learnable with the responses that showed it. The rarer learnable questions get, the more are drawn."""
    drawn, groups, rewards = [], [], np.zeros((0, args.rollouts), np.float32)
    order = rng.permutation(size)[: args.max_candidates]
    while len(drawn) < len(order) and (variance(rewards) > 0).sum() < args.questions:
        chunk = order[len(drawn) : len(drawn) + args.questions]
        more, graded = attempt(chunk, args.rollouts)
        drawn, groups, rewards = [*drawn, *chunk], [*groups, *more], np.concatenate([rewards, graded])
    best = most(variance(rewards), args.questions, rng)
    return np.array(drawn)[best], ([groups[i] for i in best], rewards[best]), pool(rewards)


def posterior(args, state, iteration, size, rng, attempt):
    """Learnability from training rollouts alone: nothing is ever sampled only to be scored.

    Question i has s_i successes and f_i failures, both multiplied by `memory` each iteration because the policy they
    speak of is moving. Its success rate is Beta(a, b) with a = nu mu + s_i, b = nu (1 - mu) + f_i, and what is chosen are
    the largest expectations E[p (1 - p)] = a b / ((a + b) (a + b + 1)), ties broken at random.

    The prior is the data set's (its difficulty group's, where levels are known): mu, the mean success, and nu, how much
    one question tells about the others. If m is the mean learnability, mean_i p_i (1 - p_i), the variance of p_i between
    questions is v = mu (1 - mu) - m, and a Beta of that mean and variance has nu = mu (1 - mu) / v - 1 = m / v. Where
    questions are all-or-nothing nu is small and the prior U-shaped: an unseen question is probably not learnable, one
    seen to be is worth keeping. Both come from the uniform share of the batches only; the rest is a selection.

    Why not Thompson sampling, one draw of p_i each and the largest p_i (1 - p_i) (--thompson)? With thousands of
    questions and a few dozen picks the largest draws are flukes of the many that were never seen. The uniform share and
    the forgetting explore enough.
    """
    n = np.array(state.setdefault("counts", [[0.0, 0.0]] * size))  # (questions, 2): successes, failures
    groups, of = np.unique(state["groups"], return_inverse=True)  # difficulty groups; of[i]: the group of question i
    seen = np.array(state.setdefault("seen", [[0.0] * 3] * len(groups)))  # sums of 1, success and learnability
    whole = (seen.sum(0) + [1, 0.5, 0.125]) / (seen[:, 0].sum() + 1)  # start from a flat guess: mu 1/2, m 1/8
    _, mu, m = ((seen + 0.5 * whole) / (seen[:, :1] + 0.5)).T  # the whole counts as half a question in each group
    nu = np.clip(m / np.maximum(mu * (1 - mu) - m, 1e-3), 0.05, 20)
    a, b = np.maximum((nu * mu)[of] + n[:, 0], 1e-3), np.maximum((nu * (1 - mu))[of] + n[:, 1], 1e-3)
    p = rng.beta(a, b)
    score = p * (1 - p) if args.thompson else a * b / ((a + b) * (a + b + 1))
    return with_uniform(most(score, round(args.rho * args.questions), rng), args, size, rng), None, {}


def remember(args, state, chosen, rewards, picked):
    """After the rollouts: the posterior's evidence. picked: how many of the chosen, the first ones, were selected."""
    counts = np.array(state["counts"]) * args.memory
    counts[chosen] += np.stack([rewards.sum(1), (1 - rewards).sum(1)], 1)
    _, of = np.unique(state["groups"], return_inverse=True)
    seen = np.array(state["seen"]) * args.memory
    observed = np.stack([np.ones(len(chosen)), rewards.mean(1), variance(rewards)], 1)
    np.add.at(seen, of[chosen[picked:]], observed[picked:])
    state["counts"], state["seen"] = counts.round(6).tolist(), seen.round(6).tolist()


CHOOSE = dict(uniform=uniform, sfl=sfl, lilo=lilo, posterior=posterior)


# ----------------------------------------------------------------------------------------------------------------------
# Training


def train(args, resume=False):
    """The whole job. Writes config.json, metrics.jsonl, evaluation.json, model/ and state/ into args.out. Returns the
    held-out evaluations before and after."""
    out = Path(args.out)
    device = evaluation.pick_device(args.device)
    half = torch.bfloat16 if args.dtype == "bfloat16" or (args.dtype == "auto" and device.startswith("cuda")) else None
    questions = evaluation.load_questions(args.dataset, "train", data_dir=args.data_dir)
    held_out = evaluation.load_questions(args.dataset, "test", data_dir=args.data_dir, limit=args.eval_limit)
    check_sizes(args, len(questions))  # before the work of making or loading a model
    base = sft.tiny_base(args.cache) if args.model == "tiny" else args.model
    policy, tokenizer = evaluation.load_model(out if resume else base, device=device)
    stops = evaluation.stop_ids(policy, tokenizer)
    questions, prompts = fitting(args, tokenizer, policy, questions, "training")
    held_out, _ = fitting(args, tokenizer, policy, held_out, "held-out")
    check_sizes(args, len(questions))  # some may have been left out
    for model in (policy,) if args.gradient_checkpointing else ():
        model.gradient_checkpointing_enable()
    critic = ppo.ValueModel(policy) if args.algo == "ppo" else None
    reference = None
    if args.kl_coef > 0:
        reference = evaluation.load_model(base, device=device)[0].requires_grad_(False)

    optimizers = [torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
                  for model, lr in ((policy, args.lr), (critic, args.critic_lr)) if model is not None]

    sampling = dict(temperature=args.temperature, top_p=args.top_p, stop_ids=stops, engine=args.engine, dtype=half,
                    slots=args.slots, progress=sys.stderr.isatty())
    passes = dict(tokens_per_microbatch=args.tokens_per_microbatch, autocast=half)
    rng, state, start = np.random.default_rng(args.seed), {"groups": [str(q.level) for q in questions]}, 0
    if resume:
        start = load_state(out, rng, state, policy, critic, optimizers)
    else:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text(json.dumps(vars(args), indent=1) + "\n")

    def evaluate(samples=1):
        """Greedy accuracy on the held-out questions; with samples, their success rates at the training temperature."""
        settings = dict(samples=samples, temperature=args.temperature, top_p=args.top_p) if samples > 1 else {}
        return evaluation.evaluate(policy, tokenizer, held_out, max_new_tokens=args.max_new_tokens, chat=args.chat,
                                   seed=args.seed, engine=args.engine, slots=args.slots, dtype=half,
                                   last_number=args.last_number, progress=sampling["progress"], **settings)

    grade = functools.partial(evaluation.rewards, last_number=args.last_number)

    def stream(iteration, part):  # seeds that depend on nothing but what they are for: a resumed run draws the same
        return int(np.random.SeedSequence([args.seed, iteration, part]).generate_state(1, np.uint64)[0] >> 2)

    if start == 0:
        before = dict(greedy=evaluate(), sampled=evaluate(samples=8))
        (out / "evaluation.json").write_text(json.dumps(dict(before=before)) + "\n")
        save(out, 0, policy, tokenizer, rng, state, critic, optimizers)
    before = json.loads((out / "evaluation.json").read_text())["before"]
    result, accuracy, logged = None, before["greedy"]["accuracy"], (out / "metrics.jsonl").open("a")

    bar = tqdm(range(start, args.iterations), f"{args.algo}/{args.curriculum}", args.iterations, initial=start)
    for iteration in bar:
        clock, stats, scored = time.perf_counter(), {}, {}
        seconds = dict.fromkeys(("seconds_score", "seconds_rollout", "seconds_credit", "seconds_update"), 0.0)

        def lap(name):
            nonlocal clock
            now = time.perf_counter()
            seconds[name], clock = seconds[name] + now - clock, now

        calls = itertools.count()

        def attempt(indices, n, stats=scored):
            groups = generate(policy, [prompts[i] for i in indices], n=n, max_new_tokens=args.max_new_tokens,
                              seed=stream(iteration, next(calls)), stats=stats, **sampling)
            return groups, grade(tokenizer, [questions[i] for i in indices], groups)

        # 1. choose questions, sample responses, grade them
        chosen, at_hand, row = CHOOSE[args.curriculum](args, state, iteration, len(questions), rng, attempt)
        lap("seconds_score" if at_hand is None else "seconds_rollout")
        if at_hand is None:
            at_hand = attempt(chosen, args.rollouts, stats)
        groups, rewards = at_hand
        if args.curriculum == "posterior":
            remember(args, state, chosen, rewards, round(args.rho * args.questions))
        rollouts = list(itertools.chain.from_iterable(groups))
        lap("seconds_rollout")

        # 2. credit: one advantage a response token
        values = returns = None
        if args.algo == "ppo":
            advantages, values, returns = ppo.critic_advantages(critic, rollouts, rewards.reshape(-1), gamma=args.gamma,
                                                                lam=args.lam, **passes)
        elif args.algo == "vineppo":
            advantages, spent = vineppo.mc_advantages(
                policy, tokenizer, [questions[i] for i in chosen], groups, rewards, mc_rollouts=args.mc_rollouts,
                max_steps=args.mc_max_steps, style=args.steps, max_new_tokens=args.max_new_tokens, reuse=args.mc_reuse,
                score=grade, seed=stream(iteration, next(calls)), **sampling)
            row |= {key: spent[key] for key in ("mc_steps", "mc_filled", "mc_states", "mc_rollouts")}
            row |= dict(tokens_credit=spent["tokens_generated"], tokens_credit_prefilled=spent["tokens_prefilled"],
                        tokens_credit_prompted=spent["tokens_prompted"])  # had each of these rollouts its own prefill
        else:
            advantages = ppo.per_token(rollouts, ppo.group_advantages(rewards, how=args.algo).reshape(-1))
        if args.algo in ("ppo", "vineppo"):
            advantages = ppo.whiten(advantages)
        lap("seconds_credit")

        # 3. update
        for optimizer, lr in zip(optimizers, (args.lr, args.critic_lr)):
            optimizer.param_groups[0]["lr"] = lr * min(1.0, (iteration + 1) / max(1, args.warmup * args.iterations))
        ref_logprobs = None
        if reference is not None:
            ref_logprobs = ppo.rollout_logprobs(reference, rollouts, temperature=args.temperature, **passes)
        names = ("temperature", "clip", "value_clip", "kl_coef", "epochs", "minibatch", "max_grad_norm", "max_ratio")
        row |= ppo.update(policy, optimizers[0], rollouts, advantages, ref_logprobs=ref_logprobs, critic=critic,
                          critic_optimizer=optimizers[1] if critic else None, values=values, returns=returns, rng=rng,
                          **{name: getattr(args, name) for name in names}, **passes)
        lap("seconds_update")

        # 4. measure, log, save
        by_all, by_none, between = shares(rewards)
        used = [len(r.response) for r in rollouts]
        row = dict(iteration=iteration + 1, reward_mean=float(rewards.mean()), solved_by_all=by_all,
                   solved_by_none=by_none, learnable=between, response_length=float(np.mean(used)),
                   finished=float(np.mean([r.finished for r in rollouts])), tokens_generated=sum(used), **row, **seconds)
        # Responses sampled to choose the questions and not trained on; lilo trains on some of those it scores.
        row["tokens_scored"] = scored.get("tokens_generated", 0) - (sum(used) if not stats else 0)
        if (iteration + 1) % args.eval_every == 0 or iteration + 1 == args.iterations:
            result = evaluate()
            row |= dict(eval_accuracy=result["accuracy"], eval_accuracy_se=result["accuracy_se"],
                        eval_response_length=result["response_length"])
            accuracy = result["accuracy"]
        logged.write(json.dumps(row) + "\n")
        logged.flush()
        if (iteration + 1) % args.save_every == 0 or iteration + 1 == args.iterations:
            save(out, iteration + 1, policy, tokenizer, rng, state, critic, optimizers)
        bar.set_postfix(reward=f"{row['reward_mean']:.2f}", learnable=f"{between:.2f}", accuracy=f"{accuracy:.3f}",
                        length=f"{row['response_length']:.0f}")
    logged.close()
    after = dict(greedy=result or evaluate(), sampled=evaluate(samples=8))  # the last iteration has just evaluated
    (out / "evaluation.json").write_text(json.dumps(dict(before=before, after=after)) + "\n")
    return before, after


def fitting(args, tokenizer, policy, questions, which):
    """(questions, prompts). One that does not fit the context: ValueError, or with --skip_long it is left out."""
    limit = min(args.context, getattr(policy.config, "max_position_embeddings", None) or args.context)
    prompts = evaluation.encode_prompts(tokenizer, questions, chat=args.chat)
    long = [i for i, prompt in enumerate(prompts) if len(prompt) + args.max_new_tokens > limit]
    if long and not args.skip_long:
        raise ValueError(f"{which} question {long[0]} is {len(prompts[long[0]])} tokens: with --max_new_tokens "
                         f"{args.max_new_tokens} it passes the context of {limit} ({len(long)} of {len(prompts)} do): lower "
                         "--max_new_tokens, raise --context if the model allows it, or pass --skip_long")
    keep = sorted(set(range(len(prompts))) - set(long))
    if not keep:
        raise ValueError(f"no {which} question fits the context of {limit} with --max_new_tokens {args.max_new_tokens}: "
                         "lower it")
    if long:
        print(f"left out {len(long)} of {len(prompts)} {which} questions, too long for {limit} tokens", file=sys.stderr)
    return [questions[i] for i in keep], [prompts[i] for i in keep]


def check_sizes(args, size):
    """The numbers that only make sense together with the data set."""
    for name in ("questions", *dict(sfl=["candidates"], lilo=["max_candidates"]).get(args.curriculum, [])):
        if (value := getattr(args, name)) > size:
            raise ValueError(f"--{name} {value} is more than the {size} questions of {args.dataset}: lower it")
    if args.curriculum == "sfl" and args.buffer_size > args.candidates:
        raise ValueError(f"--buffer_size {args.buffer_size} is more than --candidates {args.candidates}: lower it")
    if args.curriculum == "sfl" and round(args.rho * args.questions) > args.buffer_size:
        raise ValueError(f"--rho {args.rho} of --questions {args.questions} is more than --buffer_size {args.buffer_size}: "
                         "raise --buffer_size")
    if args.curriculum == "lilo" and args.max_candidates < args.questions:
        raise ValueError(f"--max_candidates {args.max_candidates} is less than --questions {args.questions}: raise it")


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints: model/ is what from_pretrained loads; state/ is what an exact resume needs besides


def save(out, iteration, policy, tokenizer, rng, state, critic, optimizers):
    """state/training.pt holds everything a resume needs, the weights that belong to it too: one file, renamed over the
    old one, so that an interrupted save leaves the previous checkpoint. The critic lies beside it for vineppo.py."""
    (out / "state").mkdir(exist_ok=True)
    loop = dict(iteration=iteration, rng=rng.bit_generator.state, curriculum=state)
    torch.save(dict(loop=json.dumps(loop), policy=policy.state_dict(), critic=critic and critic.state_dict(),
                    optimizers=[o.state_dict() for o in optimizers]), out / "state" / "training.tmp")
    os.replace(out / "state" / "training.tmp", out / "state" / "training.pt")
    sft.save(policy, tokenizer, out / "model")
    if critic is not None:
        critic.save(out / "state" / "critic.tmp")
        os.replace(out / "state" / "critic.tmp", out / "state" / "critic.safetensors")


def load_state(out, rng, state, policy, critic, optimizers):
    """The inverse of `save`; returns the iteration to go on with, and forgets the metrics logged after it."""
    try:
        training = torch.load(out / "state" / "training.pt", map_location="cpu", weights_only=True)
        loop = json.loads(training["loop"])
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ValueError(f"--resume {out}: no usable {out / 'state' / 'training.pt'} "
                         f"({evaluation.first_line(error)}): start anew with --out") from error
    states = training["policy"], training["critic"], *training["optimizers"]
    for thing, saved in zip((policy, critic, *optimizers), states):
        if thing is not None:
            thing.load_state_dict(saved)
    rng.bit_generator.state = loop["rng"]
    state.update(loop["curriculum"])
    metrics = out / "metrics.jsonl"
    rows = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    (out / "metrics.tmp").write_text("".join(rows[: loop["iteration"]]))
    os.replace(out / "metrics.tmp", metrics)
    return loop["iteration"]


# ----------------------------------------------------------------------------------------------------------------------
# What a run tells


def summary(out, before, after):
    """Accuracy before and after, by difficulty; a few responses; where things lie."""
    was, now = before["greedy"], after["greedy"]

    def line(name, a, b, note=""):
        return f"{name:<18}  {a:8.3f} {b:8.3f}   {note}".rstrip()

    lines = ["", f"held-out accuracy   {'before':>8} {'after':>8}",
             line("greedy, all", was["accuracy"], now["accuracy"], f"standard error {now['accuracy_se']:.3f}")]
    for (level, a), b in zip(was["by_level"].items(), now["by_level"].values()):
        lines.append(line(f"  level {level}", a["accuracy"], b["accuracy"], f"n = {b['n']}"))
    lines += [line("sampled", before["sampled"]["accuracy"], after["sampled"]["accuracy"]),
              line("response length", was["response_length"], now["response_length"], "tokens, greedy")]
    for example in now["examples"][:3]:
        lines += ["", f"question: {example['question'].strip()}   (answer: {example['answer']})",
                  *(f"    {line}" for line in example["response"].splitlines()), f"    reward {example['reward']:.0f}"]
    lines += ["", f"model    {out / 'model'}", f"metrics  {out / 'metrics.jsonl'}",
              f"look at  python eval.py --plot {out};  python sfl.py --report {out}"]
    return "\n".join(lines)


def report(runs, path):
    """The paper's first figure: over training, the share of the training questions solved by all attempts, by none and by
    some; and the held-out questions' success rates before and after. A row a run; a table is printed."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    data = []
    for run in runs:
        rows = evaluation.read_run(run)
        try:
            results = json.loads(Path(run, "evaluation.json").read_text())
            sampled = {when: result["sampled"] for when, result in results.items()}
        except (OSError, ValueError) as error:
            raise ValueError(f"{run} holds no readable evaluation.json ({evaluation.first_line(error)}): "
                             "was it made by sfl.py?") from error
        data.append((Path(run).resolve().name, rows, sampled))
    figure, axes = plt.subplots(len(runs), 2, figsize=(10, 2.6 * len(runs) + 0.6), squeeze=False)
    print(f"{'run':<36} {'questions solved by':>20} all   none  some    held-out: all   none  some")
    for (name, rows, sampled), (left, right) in zip(data, axes):
        iterations = [row["iteration"] for row in rows]
        parts = [np.array([row[key] for row in rows]) for key in ("solved_by_none", "learnable", "solved_by_all")]
        left.stackplot(iterations, *parts, labels=("none", "some: learnable", "all"),
                       colors=("#CCCCCC", "#D55E00", "#0072B2"))
        left.set(title=f"{name}: training questions", xlabel="iteration", ylabel="share solved by", ylim=(0, 1),
                 xlim=(1, max(2, len(rows))))
        left.legend(loc="lower left", fontsize=8)
        for i, (when, result) in enumerate(sampled.items()):
            success, k = np.array(result["success"]), result["samples"]
            heights = np.bincount(np.rint(success * k).astype(int), minlength=k + 1) / len(success)
            right.bar(np.arange(k + 1) + (i - 0.5) * 0.4, heights, 0.4, label=when, color=("#999999", "#0072B2")[i])
            thirds = [(success == 1).mean(), (success == 0).mean(), ((success > 0) & (success < 1)).mean()]
            for phase, part in (("first", rows[: max(1, len(rows) // 10)]), ("last", rows[-max(1, len(rows) // 10) :])):
                if (phase == "first") == (when == "before"):
                    keys = ("solved_by_all", "solved_by_none", "learnable")
                    mean = [np.mean([row[key] for row in part]) for key in keys]
                    print(f"{name if i == 0 else '':<36} {phase + ' tenth':>20} " + " ".join(f"{x:5.2f}" for x in mean)
                          + f"   {when:>8}:  " + " ".join(f"{x:5.2f}" for x in thirds))
        right.set(title="held-out questions", xlabel=f"successes in {k} attempts", ylabel="share of questions")
        right.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
    print(f"wrote {path}")


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def add_flag(parser, name, kind, text):
    flag, text = f"--{name}", text.replace("%", "%%")
    if kind is bool:
        parser.add_argument(flag, action="store_true", default=None, help=text)
    elif isinstance(kind, tuple):
        parser.add_argument(flag, choices=kind, help=text)
    else:
        parser.add_argument(flag, type=kind, metavar={int: "N", float: "X", str: "S"}[kind], help=text)


def parse(argv=None):
    """(args, resume). Flags that were not given take the data set's defaults, or on --resume the run's own settings."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description="Sampling for learnability: RL on the questions a model "
                                                                     "can almost answer.")
    parser.add_argument("--resume", metavar="DIR", help="go on with this run, exactly where its checkpoint stopped")
    parser.add_argument("--report", nargs="+", metavar="RUN", help="draw what these runs' questions were solved by")
    for name, (kind, default, text) in EVERYWHERE.items():
        add_flag(parser, name, kind, text + ("" if default in (None, False) else f" (default {default})"))
    for name, (kind, small, large, text) in SETTINGS.items():
        default = f" (default {small}" + (")" if small == large else f"; other data sets {large})")
        add_flag(parser, name, kind, text + ("" if small is None or kind is bool else default))
    given = evaluation.parse_args(parser, argv)
    flags = {name: value for name, value in vars(given).items() if value is not None}
    flags.pop("resume", None), flags.pop("report", None)
    if given.report:
        return argparse.Namespace(report=given.report, out=given.out), False
    if given.resume:
        return resumed(Path(given.resume), flags), True
    args = {name: default for name, (_, default, _) in EVERYWHERE.items()} | flags
    embedded = args["dataset"] == "arithmetic"
    args = {name: small if embedded else large for name, (_, small, large, _) in SETTINGS.items()} | args
    args["model"] = args["model"] or ("tiny" if embedded else DEFAULT_MODEL)
    args = argparse.Namespace(**args)
    check_values(args)
    name = f"runs/{Path(args.dataset).stem}-{args.algo}-{args.curriculum}"
    if args.out is None:  # a new folder each time: nothing is overwritten
        args.out = next(f"{name}-{i}" for i in itertools.count(1) if not Path(f"{name}-{i}").exists())
    elif Path(args.out).exists() and (not Path(args.out).is_dir() or any(Path(args.out).iterdir())):
        raise ValueError(f"--out {args.out} holds something already: go on with that run by --resume {args.out}, or give "
                         "another --out")
    return args, False


def resumed(out, flags):
    try:
        saved = json.loads((out / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"--resume {out}: no run there ({evaluation.first_line(error)})") from error
    for name, value in flags.items():
        if name not in CHANGEABLE and saved.get(name) != value:
            raise ValueError(f"--{name} {value} cannot change on --resume (the run has {saved.get(name)}): leave it out, "
                             f"or start a new run with --out; these can: {', '.join(sorted(CHANGEABLE))}")
    args = argparse.Namespace(**saved | flags | {"out": str(out)})
    check_values(args)
    return args


def check_values(args):
    """Each flag by itself. ValueError names the value and its limits."""
    at_least = dict(iterations=1, questions=1, rollouts=1, refresh_every=1, candidates=1, buffer_size=1, score_rollouts=2,
                    max_candidates=1, max_new_tokens=1, context=2, epochs=1, minibatch=1, mc_rollouts=1, mc_max_steps=1,
                    tokens_per_microbatch=1, eval_every=1, save_every=1, slots=1, eval_limit=1, temperature=0, lr=0,
                    critic_lr=0, clip=0, value_clip=0, kl_coef=0, max_grad_norm=0, seed=0)
    for name, least in at_least.items():
        value = getattr(args, name)
        if value is not None and not value >= least:
            raise ValueError(f"--{name} {value} must be at least {least}")
    for name in ("rho", "gamma", "lam", "warmup", "memory", "top_p"):
        if not 0 <= getattr(args, name) <= 1:
            raise ValueError(f"--{name} {getattr(args, name)} must be in [0, 1]")
    if args.temperature == 0 or args.top_p == 0:
        raise ValueError("--temperature and --top_p must be above 0: training samples several different responses")
    if args.algo in ("grpo", "rloo") or args.curriculum in ("lilo", "posterior"):
        if args.rollouts < 2:
            raise ValueError(f"--rollouts {args.rollouts}: {args.algo} with {args.curriculum} compares responses to one "
                             "question: give at least 2")
    if args.model == "tiny" and args.dataset != "arithmetic":
        raise ValueError(f"--model tiny knows only arithmetic, not {args.dataset!r}: give --model a hub id or a folder")
    if args.engine not in ("slots", "hf") or args.dtype not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"--engine {args.engine} must be slots or hf, --dtype {args.dtype} auto, float32 or bfloat16")


def main(argv=None):
    args, resume = parse(argv)
    if getattr(args, "report", None):
        report(args.report, args.out or Path(args.report[0], "report.png"))
        return
    try:
        before, after = train(args, resume)
    except KeyboardInterrupt:
        saved = Path(args.out, "state", "training.pt").exists()
        print("\ninterrupted: " + (f"go on from the last checkpoint with --resume {args.out}" if saved else "nothing saved"),
              file=sys.stderr)
        sys.exit(130)
    print(summary(Path(args.out), before, after))


if __name__ == "__main__":
    evaluation.command_line(main)
