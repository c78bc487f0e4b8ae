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
learnable; `posterior` estimates learnability from the training rollouts so far.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np

import data
import job
import ppo
import sft
import vineppo
from plumbing import checkpoint, commands, processes, report
from plumbing.commands import progress_bar
from plumbing.processes import rank
from rollout import Rollout, generate


def learnability(successes, attempts):
    """Unbiased estimate of p (1 - p) from `successes` of `attempts`: s (a - s) / (a (a - 1)).
    Numbers or arrays. ValueError: fewer than 2 attempts, from which no variance can be estimated.

    The plug-in (s/a)(1 - s/a) is too low by the factor (a - 1)/a: the same draws serve as the mean
    and are measured against it. Where questions have had different numbers of attempts, it prefers
    whatever was tried often."""
    successes, attempts = np.asarray(successes, dtype=float), np.asarray(attempts, dtype=float)
    if np.any(attempts < 2) or np.any(successes < 0) or np.any(successes > attempts):
        need = "need at least 2 attempts, and successes between 0 and the attempts"
        raise ValueError(f"learnability of {successes} successes in {attempts} attempts: {need}")
    return (successes * (attempts - successes) / (attempts * (attempts - 1)))[()]


# --------------------------------------------------------------------------- the curricula
# Each takes the settings, the run's state (plain numbers and lists, saved with the checkpoint; in
# "groups" a label of each question's difficulty), the iteration from 0, the number of questions, a
# numpy Generator, and `sample`: sample(questions, n) -> Batch: .questions, .groups (n responses to
# each), .rewards (questions, n). Each returns the Batch to train on, and what to log.


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
        logged = candidate_metrics(scored)
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
    return drawn.take(best), candidate_metrics(drawn)


def dapo(args, state, iteration, size, rng, sample):
    """Dynamic sampling (DAPO, arXiv 2503.14476): draw until the batch is full of questions that are
    neither solved by all attempts nor by none, in the order in which they come."""
    order = rng.permutation(size)[: args.max_candidates]
    drawn = draw_until(order, args, sample, enough=args.questions)
    unlearnable = drawn.learnability() == 0  # these come last
    first = np.argsort(unlearnable, kind="stable")[: args.questions]
    return drawn.take(first), candidate_metrics(drawn)


def posterior(args, state, iteration, size, rng, sample):
    """Learnability from training rollouts alone: nothing is sampled only to be scored.

    Question i has s_i successes and f_i failures, both multiplied by `memory` each iteration
    because the policy they speak of is moving. With the prior Beta(strength mean,
    strength (1 - mean)) its success rate is Beta(alpha, beta), alpha = strength mean + s_i and
    beta = strength (1 - mean) + f_i. A share rho of the questions is drawn in proportion to the
    square of E[p (1 - p)] = alpha beta / ((alpha + beta) (alpha + beta + 1)). Not the largest ones:
    they would come again and again, and nothing would be learned about the others.

    The prior is that of the question's group (its level; unknown, the length of its prompt). If
    its mean success is mean and its mean learnability, mean_i p_i (1 - p_i), is m, the variance of
    p_i between questions is v = mean (1 - mean) - m, and the Beta of that mean and variance has
    strength mean (1 - mean) / v - 1 = m / v. Chosen questions are no fair sample of their group,
    hence the weight 1 / (1 + s_i + f_i) of an observation: a question seen often counts little."""
    counts = np.array(state.setdefault("counts", [[0.0, 0.0]] * size))  # successes, failures
    groups, group_of = np.unique(state["groups"], return_inverse=True)
    # of each group: weighted sums of 1, success and learnability
    seen = np.array(state.setdefault("seen", [[0.0] * 3] * len(groups)))
    # all groups, and a guess (mean 1/2, m 1/8), count as half a question in each
    whole = (seen.sum(0) + [1, 0.5, 0.125]) / (seen[:, 0].sum() + 1)
    _, mean, learnable = ((seen + 0.5 * whole) / (seen[:, :1] + 0.5)).T  # (groups,) each
    variance = np.maximum(mean * (1 - mean) - learnable, 1e-3)
    strength = np.clip(learnable / variance, 0.05, 20)
    alpha = np.maximum((strength * mean)[group_of] + counts[:, 0], 1e-3)  # (questions,)
    beta = np.maximum((strength * (1 - mean))[group_of] + counts[:, 1], 1e-3)
    expected = alpha * beta / ((alpha + beta) * (alpha + beta + 1))
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
    """The whole job; job.py says what it writes into args.out. Returns the held-out evaluations
    before and after. signals: see `commands.signals_wait`. commands.Stop: the run has ended early,
    and is saved."""
    run = job.setup(args)
    run.sample = Sampler(args, run)
    run.signals = signals or SimpleNamespace(came=[])
    before = job.start_or_resume(run, args)
    result = run.evaluate() if run.start else before["greedy"]  # as it is now
    log = job.Log(run.out, args)
    bar = progress_bar(run.out.name, args.iterations, "iteration", rank() == 0, run.start)
    run.signals.wait = True  # for the end of an iteration
    for iteration in range(run.start, args.iterations):
        if job.out_of_patience(args, run.state):
            break
        # 1. choose questions, sample responses, grade them
        run.sample.begin(iteration)
        choose = CURRICULA[args.curriculum]
        batch, row = choose(args, run.state, iteration, run.size, run.rng, run.sample)
        rollouts = [rollout for group in batch.groups for rollout in group]
        seconds = sum(sampled.seconds for sampled in run.sample.batches)
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
            of_response = ppo.group_advantages(batch.rewards, how=args.algo)
            advantages = ppo.per_token(rollouts, of_response.flatten())
        if args.algo in ("ppo", "vineppo"):  # group advantages keep their formula's scale
            advantages = ppo.whiten(advantages)
        row["seconds_credit"] = time.perf_counter() - clock

        # 3. update
        clock = time.perf_counter()
        job.prepare_update(args, run.optimizer, iteration)
        ref_logprobs = None
        if args.kl_coef > 0 and args.algo not in sft.IMITATORS:
            ref_logprobs = ppo.rollout_logprobs(run.reference, rollouts, run.settings)
        elif args.kl_sample > 0:
            row["kl"] = job.kl_to_start(args, run, rollouts)
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
        row = job.batch_metrics(run, iteration, batch, rollouts) | row
        if last or (iteration + 1) % args.eval_every == 0:
            result = run.evaluate()
            row |= {f"eval_{key}": result[key] for key in job.EVALUATED}
            run.state.setdefault("accuracies", []).append(result["accuracy"])
            last = last or job.out_of_patience(args, run.state)
        log(row)
        stop = job.reason_to_stop(run)
        if last or stop or (iteration + 1) % args.save_every == 0:
            job.save(run, iteration + 1)
        job.advance(bar, row, result)
        if stop:
            raise stop
    run.signals.wait = False
    bar.close()
    after = {"greedy": result, "sampled": run.evaluate(samples=8)}
    checkpoint.write(run.out / "evaluation.json", json.dumps({"before": before, "after": after}))
    return before, after


# ==================================================================================================
# That is the method. Below: batches, sampling and credit; settings, the command line. What a run
# is made of, its checkpoints and its log: job.py.
# ==================================================================================================


@dataclass
class Batch:
    """Questions, n responses to each, and how these were graded."""

    questions: np.ndarray  # (Q,) which of the training questions
    groups: list  # Q lists of n Rollouts
    rewards: np.ndarray  # (Q, n)
    seconds: float = 0.0  # what sampling took; of a `take`n part, the whole

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
    """Samples responses to training questions and grades them. Keeps the iteration's batches: how
    many there are seeds the next one, and their tokens and seconds are what choosing cost."""

    def __init__(self, args, run):
        self.args, self.run = args, run

    def begin(self, iteration):
        self.iteration, self.batches = iteration, []

    def seed(self):
        """Depends on nothing but what it is for: a resumed run draws the same."""
        return processes.seed_of(self.args.seed, self.iteration, len(self.batches))

    def __call__(self, chosen, n):
        start, run = time.perf_counter(), self.run
        prompts = [run.prompts[i] for i in chosen]
        if self.args.algo == "rcrl" and self.iteration == 0:  # the tag is not learned yet
            prompts = [data.with_tag(run.tokenizer, prompt, None) for prompt in prompts]
        groups = generate(run.policy, prompts, n=n, seed=self.seed(), **run.generation)
        rewards = run.rewards(run.tokenizer, [run.questions[i] for i in chosen], groups)
        batch = Batch(np.asarray(chosen), groups, rewards, time.perf_counter() - start)
        self.batches.append(batch)
        return batch


def with_uniform(chosen, count, size, rng):
    """Fill a batch up with questions drawn uniformly from those not in it."""
    rest = np.setdiff1d(np.arange(size), chosen)
    others = rng.choice(rest, count - len(chosen), replace=False)
    return np.concatenate([chosen, others]).astype(int)


def candidate_metrics(batch):
    """What to log of questions that were sampled in order to choose."""
    successes = np.rint(batch.rewards.sum(1)).astype(int)
    histogram = np.bincount(successes, minlength=batch.rewards.shape[1] + 1).tolist()
    logged = {f"pool_{name}": share for name, share in job.shares(batch.rewards).items()}
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
    questions = [run.questions[i] for i in batch.questions]
    advantages, spent = vineppo.mc_advantages(
        run.policy, run.tokenizer, questions, batch.groups, batch.rewards,
        mc_rollouts=args.mc_rollouts, max_steps=args.mc_max_steps or None, style=args.steps,
        spend=args.mc_spend, score=run.rewards, seed=run.sample.seed(), **run.generation,
    )  # fmt: skip
    names = ("mc_steps", "mc_filled", "mc_states", "mc_rollouts")
    logged = {name: spent[name] for name in names}
    logged["tokens_credit"] = spent["tokens_generated"]
    return advantages, logged


def imitate(args, run, batch):
    """A round of expert iteration or return-conditioned RL, on all that was kept so far."""
    kept = run.state.setdefault("kept", [])
    sft.keep(kept, args.algo, batch.questions, batch.groups, batch.rewards)
    stops = set(data.stop_ids(run.policy, run.tokenizer))
    examples = list(run.demonstrations)
    for question, reward, response in kept:
        prompt = run.prompts[question]
        if args.algo == "rcrl":
            prompt = data.with_tag(run.tokenizer, prompt, reward)
        examples.append(Rollout(prompt, response, [], response[-1] in stops))
    start = run.reference if args.expert_from == "initial" else None
    return sft.imitate(
        run.policy, start, examples, epochs=args.epochs, minibatch=args.minibatch,
        lr=run.optimizer.param_groups[0]["lr"], settings=run.settings, rng=run.rng,
    )  # fmt: skip


# --------------------------------------------------------------------------- settings

# See commands.read_settings. Behind a comma: for data not made here, the papers' on GSM8K (arXiv
# 2502.12272, 2410.01679).
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
mc_max_steps     0              0..   vineppo: steps whose end is estimated; 0: 25, or 20 of math
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
bits             24             5..60 parity: bits of a question
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
RHO = "realtreetune/rho-1b-sft-MATH"
MATH = rf"--dataset math --stop \n\n\nProblem: --model {RHO} --iterations 1000"
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
# What is usual for who imitates: few rounds of many samples. A pair: data made here, other data.
ROUNDS = "--questions 256 --minibatch 64 --eval_every 1 --save_every 1"
ROUNDS_OTHER = "--questions 1024 --lr 1e-5 --eval_every 1 --save_every 1"
IMITATION = {
    "expert": (f"{ROUNDS} --iterations 12 --lr 1e-3 --epochs 3", f"{ROUNDS_OTHER} --iterations 8"),
    "rcrl": (
        f"{ROUNDS} --iterations 8 --lr 2e-3 --epochs 2 --expert_from last",
        f"{ROUNDS_OTHER} --iterations 8",
    ),
}


def parse(argv=None):
    """The settings: flags that were not given have the data set's default or, on --resume, the
    run's own."""
    flags = commands.parse_flags(SETTINGS, "RL on the questions a model can almost answer.", argv)
    args = job.resumed(flags) if "resume" in flags else anew(flags)
    commands.check_settings(SETTINGS, args)
    job.check(args)
    if "resume" not in flags:
        args.out = job.new_folder(args)
    return args


def anew(flags):
    if "preset" in flags:
        if flags["preset"] not in PRESETS:
            raise ValueError(f"--preset {flags['preset']}: choose from {', '.join(PRESETS)}")
        preset = PRESETS[flags["preset"]].split()
        flags = (
            commands.parse_flags(SETTINGS, "", preset) | flags
        )  # what is given has the last word
    other = flags.get("dataset", "arithmetic") not in data.MADE_HERE  # which of a pair
    usual = IMITATION.get(flags.get("algo"), ("", ""))[other].split()
    flags = commands.parse_flags(SETTINGS, "", usual) | flags
    defaults = {name: row[other] for name, row in commands.read_settings(SETTINGS).items()}
    return SimpleNamespace(**defaults | flags)


def main(argv=None):
    with processes.several_processes(), commands.signals_wait() as signals:
        [args] = processes.from_first_process([parse(argv) if rank() == 0 else None])
        if args.dry_run:
            if rank() == 0:
                print(job.dry_run(args))
            return
        try:
            before, after = train(args, signals)
        except (KeyboardInterrupt, commands.Stop) as end:
            started = Path(args.out, "config.json").exists()
            way_out = f"go on from the last checkpoint with --resume {args.out}"
            what = str(end) or "interrupted"
            if rank() == 0:
                print(f"\n{what}: {way_out if started else 'nothing saved'}", file=sys.stderr)
            sys.exit(getattr(end, "code", 130))
        if rank() == 0:
            print(report.summary(Path(args.out), before, after))


if __name__ == "__main__":
    commands.command_line(main)
