"""The experiments behind the README's tables and figures, each one command.

    python tests/experiments.py tune       # each curriculum's learning rate, one seed
    python tests/experiments.py curricula  # all curricula, each with its own settings
    python tests/experiments.py map        # where choosing pays: the learnable share from 0.5 down
    python tests/experiments.py foresight  # who knows best what is learnable: calibration, AUC
    python tests/experiments.py credit     # ppo, vineppo and grpo with few questions an iteration
    python tests/experiments.py gradients  # which way each method's gradient points (--task walks)
    python tests/experiments.py learners   # imitation against policy gradients: pass@k, samples
    python tests/experiments.py parity     # RL after next-token prediction
    python tests/experiments.py words --model DIR --data DIR   # a pretrained model, word problems
    python tests/experiments.py cost       # an iteration of ppo and vineppo: seconds and tokens
    python tests/experiments.py spend      # --mc_spend bisect against all states at K = 256
    python tests/experiments.py theory     # improvement after one step against learnability
    python tests/experiments.py values --model RUN   # Monte Carlo and critic against true values

Flags after `--` go to every run of sfl.py; runs that are already there are not run again. An arm's
runs differ in --seed alone. The goal is the best accuracy of the first arm (of the mean over its
seeds and over three evaluations in a row); what an arm needed is read where the mean of three
evaluations in a row first reaches it. Tokens and seconds count everything but evaluation: scoring,
rollouts, credit, update. "learnable": the share of the questions trained on that some but not all
responses solved. Tables go to stdout, figures to --out.
"""

import argparse
import itertools
import json
import os
import random
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # what is slow to import is imported where it is used

# --------------------------------------------------------------------------- curricula and others

EVERY = ["--eval_every", "4", "--save_every", "1000000", "--kl_sample", "0"]
SFL = "--curriculum sfl --candidates 512 --buffer_size 40 --refresh_every 15 --rho 1"
# Each with its own learning rate (`tune`), and long enough to see where it ends.
CURRICULA = {
    "uniform": "--curriculum uniform --lr 1e-4 --iterations 160",
    "uniform, 4x questions": "--curriculum uniform --lr 2e-4 --questions 64 --minibatch 512 "
    "--iterations 80",
    "dapo": "--curriculum dapo --max_candidates 256 --lr 2e-4 --iterations 40",
    "sfl": f"{SFL} --lr 2e-4 --iterations 80",
    "lilo": "--curriculum lilo --lr 2e-4 --iterations 60",
    "greso": "--curriculum greso --max_candidates 16 --lr 2e-4 --iterations 160",  # skips, no more
    "greso, dynamic": "--curriculum greso --lr 2e-4 --iterations 60",
    "pools": "--curriculum pools --lr 1e-4 --iterations 160",
    "mopps": "--curriculum mopps --max_candidates 1024 --memory 0.5 --lr 2e-4 --iterations 160",
    "posterior": "--curriculum posterior --rho 1 --lr 2e-4 --iterations 100",
    "posterior, no levels": "--curriculum posterior --rho 1 --lr 2e-4 --iterations 100",
}
COMMON = "--questions 16 --minibatch 128"


def flags_of(algo, name):
    return f"--algo {algo} {COMMON} {CURRICULA[name]}".split()


def tune(args):
    """Each curriculum's learning rate, one seed."""
    for algo in args.algos:
        for name in args.arms:
            arms = {f"lr {lr}": [*flags_of(algo, name), "--lr", lr] for lr in args.lrs}
            run_and_compare(args, f"{algo}-{name}-lr", arms, f"{algo}-{name}-")


def curricula(args):
    """All curricula, each with its own settings."""
    for algo in args.algos:
        arms = {name: flags_of(algo, name) for name in args.arms}
        run_and_compare(args, algo, arms, f"{algo}-")


# Few questions an iteration, half of the pool learnable: there credit matters. Each algorithm's
# learning rate: the best of 5e-5 (PPO), 1e-4, 2e-4, 4e-4 on seed 0.
FEW = "--questions 4 --minibatch 32 --max_candidates 32 --share 0.5"
CREDIT = {
    "uniform": {"ppo": "1e-4", "grpo": "2e-4", "vineppo": "2e-4"},
    "lilo": {"ppo": "2e-4", "grpo": "2e-4", "vineppo": "2e-4"},
    # Of 2e-4 to 1.6e-3, on 16 other graphs. The last one generates as many tokens as vineppo.
    "walks": {"ppo": "4e-4", "grpo": "4e-4", "vineppo": "8e-4", "grpo, 6x responses": "8e-4"},
}


def credit(args):
    """ppo, vineppo and grpo with few questions an iteration."""
    from plumbing import report

    iterations = {"uniform": "160", "lilo": "100", "walks": "200"}[args.arm]
    if args.arm == "walks":
        common = walks(walks_base(Path(args.runs, "walks")), "few")
    else:
        common = f"{FEW} --curriculum {args.arm}"
    common += f" --iterations {iterations}"
    arms = {}
    for name, lr in CREDIT[args.arm].items():
        algo, _, six = name.partition(", ")
        more = "--rollouts 48 --minibatch 192" if six else ""
        arms[name] = f"--algo {algo} --lr {lr} {common} {more}".split()
    if args.arm != "walks":
        return run_and_compare(args, f"credit-{args.arm}", arms, "credit-", f"-{args.arm}")
    folders = compare(args, "credit-walks", arms, "credit-", "-walks")
    # Greedy accuracy on 16 questions is coarse: so also how many samples were right.
    quarters = np.split(np.arange(int(iterations)), 4)
    names = [f"{quarter[0] + 1} to {quarter[-1] + 1}" for quarter in quarters]
    print(f"\n| success in iterations | {' | '.join(names)} |\n|{'---|' * 5}")
    for algo, runs in folders.items():
        rows = [report.read_run(run) for run in runs]
        rewards = np.array([[row["reward_mean"] for row in run] for run in rows])
        cells = [spread(rewards[:, quarter].mean(1), 3) for quarter in quarters]
        print(f"| {algo} | {' | '.join(cells)} |")


SHARES = (0.5, 0.25, 0.08, 0.02)


def map_of_shares(args, goal=0.8):
    """Iterations and tokens to the goal against the learnable share of the pool."""
    from matplotlib.figure import Figure

    from plumbing.report import COLORS

    folders, jobs = {}, {}
    for share, name, seed in itertools.product(SHARES, args.arms, range(args.seeds)):
        folder = Path(args.runs, f"grpo-{name}-seed{seed}")  # the default share's: `curricula`'s
        if share != 0.08:
            folder = Path(args.runs, f"share{share}-{name}-seed{seed}")
        folders[share, name, seed] = folder
        jobs[folder] = [*flags_of("grpo", name), *args.flags, "--seed", str(seed)]
        jobs[folder] += ["--share", str(share)]
    execute(jobs, args.workers)
    figure = Figure(figsize=(9, 3.6))
    axes = figure.subplots(1, 2)
    for spent, ax in zip(("iteration", "tokens"), axes):
        name_of = {"iteration": "iterations", "tokens": "1,000 tokens"}[spent]
        print(f"\n{name_of} to {goal}, mean ± sd of {args.seeds} seeds\n")
        print(f"| arm | {' | '.join(f'{share:.0%}' for share in SHARES)} |")
        print("|" + "---|" * (len(SHARES) + 1))
        for color, name in zip(COLORS, args.arms):
            cells, points = [], []
            for share in SHARES:
                runs = [curve(folders[share, name, seed]) for seed in range(args.seeds)]
                needed = [reached(run, goal, spent) for run in runs]
                cells.append(spread(needed, unit=1000 if spent == "tokens" else 1))
                points += [(share, need) for need in needed if need is not None]
            print(f"| {name} | {' | '.join(cells)} |")
            x, y = np.array(points).reshape(-1, 2).T
            ax.scatter(x, y, s=10, color=color)
            all_there = [share for share in SHARES if (x == share).sum() == args.seeds]
            means = [(share, np.mean(y[x == share])) for share in all_there]
            ax.plot(*np.array(means).reshape(-1, 2).T, color=color, label=name)
        ax.set(xscale="log", yscale="log", xlabel="learnable share of the pool")
        ax.minorticks_off()
        nice = (20, 50, 100) if spent == "iteration" else (50_000, 100_000, 200_000, 500_000)
        ax.set_yticks(nice, [f"{tick:,}" for tick in nice])
        ax.set_xticks(SHARES, [f"{share:.0%}" for share in SHARES])
        unit = {"iteration": "iterations", "tokens": "tokens"}[spent]
        ax.set_title(f"{unit} to an accuracy of {goal}", fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)
        ax.invert_xaxis()
    axes[0].legend(frameon=False, fontsize=8)
    save(figure, Path(args.out, "map.png"))


# Whose state says what is learnable. levels: as the data has them, or one for all.
REMEMBER = {
    "greso": ("greso", True),
    "pools": ("pools", True),
    "mopps": ("mopps", True),
    "posterior": ("posterior", True),
    "posterior, one level for all": ("posterior", False),
}


def foresight(args):
    """What each curriculum expects against what it finds, in its own runs; and how well it tells
    learnable questions from others (AUC), when all are shown the same runs' batches."""
    import data
    from plumbing import report

    questions = data.load_questions("arithmetic", "train")
    rows_of = {}
    for name, seed in itertools.product(("uniform", "posterior", "mopps"), range(args.seeds)):
        folder = Path(args.runs, f"grpo-{name}-seed{seed}")
        rows_of.setdefault(name, []).append(report.read_run(folder))
    print("| learnability in its own runs | expected | found | first 20: expected | found |")
    print("|---|---|---|---|---|")
    for name in ("posterior", "mopps"):
        pairs = [[expected_and_found(row) for row in rows] for rows in rows_of[name]]
        means = [np.mean(run[:end], 0) for end in (None, 20) for run in pairs]
        means = np.array(means).reshape(2, args.seeds, 2)
        cells = [spread(means[part, :, i], 3) for part in (0, 1) for i in (0, 1)]
        print(f"| {name} | {' | '.join(cells)} |")
    columns = [f"{what}, {run}" for run in ("uniform", "posterior") for what in ("AUC", "expected")]
    print(f"\n| on the batches of | {' | '.join(columns)} |\n|{'---|' * 5}")
    for arm, (name, levels) in REMEMBER.items():
        cells = []
        for trajectory in ("uniform", "posterior"):
            shown = [replay(name, levels, questions, run) for run in rows_of[trajectory]]
            cells.append(spread([auc(batches) for batches, _ in shown], 3))
            expected = [np.mean(expected) for _, expected in shown if expected]
            cells.append(spread(expected, 3) if expected else "")
        print(f"| {arm} | {' | '.join(cells)} |", flush=True)


def expected_and_found(row):
    """The mean learnability of a batch: what the curriculum expected, and the estimate."""
    from sfl import learnability

    found = [learnability(successes, attempts) for *_, successes, attempts in row["sampled"]]
    return row["learnability_expected"], np.mean(found)


class Recorded:
    """In place of a numpy Generator: a curriculum that asks it chooses what a run chose. Keeps the
    odds it was asked for."""

    def __init__(self, chosen):
        self.chosen, self.odds, self.rng = chosen, None, np.random.default_rng(0)
        self.beta = self.rng.beta

    def permutation(self, size):
        return self.chosen

    def choice(self, size, count, replace, p=None):
        self.odds = self.odds if p is None else p
        return self.chosen[:count]

    def random(self, size):
        return np.zeros(size)  # greso skips nothing


def replay(name, levels, questions, rows):
    """Shows a run's batches to a curriculum. Returns of each batch two arrays, the scores that the
    curriculum gave its questions before, and whether their responses disagreed; and the mean
    learnability that it expected of each batch, if it says."""
    import sfl

    flags = CURRICULA[name].split() + ["--algo", "grpo"]
    config, state, found, expected = sfl.parse(flags), {}, [], []
    pool = SimpleNamespace(questions=questions)
    pool.levels = lambda: [str(q.level) if levels else "all" for q in questions]
    for row in rows:
        successes = {i: s for i, _, s, _ in row["sampled"]}
        n = row["sampled"][0][-1]
        chosen = np.array(list(successes))
        config.questions = config.max_candidates = len(chosen)

        def sample(chosen, n, successes=successes):
            rewards = [[1.0] * successes[i] + [0.0] * (n - successes[i]) for i in chosen]
            return sfl.Batch(np.asarray(chosen), [[]] * len(chosen), np.array(rewards))

        pool.sample = sample
        rng = Recorded(chosen)
        before = dict(state)
        _, logged = sfl.CURRICULA[name](pool, config, state, rng)
        disagree = np.array([0 < s < n for s in successes.values()])
        found.append((score(name, before, rng, len(questions))[chosen], disagree))
        if "learnability_expected" in logged:
            expected.append(logged["learnability_expected"])
    return found, expected


def score(name, state, rng, size):
    """How learnable a curriculum takes each question to be: in any units, (size,)."""
    import sfl

    if name in ("pools", "posterior"):
        return rng.odds
    if name == "mopps":
        counts = np.array(state.get("counts", [[1.0, 1.0]] * size))
        return sfl.expected_learnability(*counts.T)
    streaks, q = np.array(state.get("streaks", [0] * size)), state.get("q", [0.5, 0.5])
    return np.where(streaks < 0, *q) ** abs(streaks)


def auc(batches):
    """The chance that of two questions of a batch the learnable one has the higher score than the
    other; a tie counts half."""
    right = []
    for scores, learnable in batches:
        above = scores[learnable][:, None] - scores[~learnable]
        right += ((above > 0) + 0.5 * (above == 0)).flatten().tolist()
    return np.mean(right)


# A pretrained model of 135 million parameters, on two cores. sfl and lilo sample more responses an
# iteration (1.9 and 4 times as many) and PPO trains a critic: they get fewer iterations.
WORDS = "--preset laptop --max_new_tokens 64 --eval_limit 0 --eval_every 10 "
MORE_WORDS = {
    "sfl": "--candidates 64 --buffer_size 16 --refresh_every 10 --iterations 40",
    "lilo": "--max_candidates 32 --iterations 25",
    "ppo": "--critic_lr 3e-5 --iterations 20",
}


def words(args):
    """A pretrained model learns word problems: a warm start, then choosing against not choosing.
    --data: a folder with demos.jsonl (with solutions), train.jsonl and test.jsonl."""
    from plumbing import report

    start = Path(args.runs, "words-sft")
    if not (start / "config.json").exists():
        demos = ["--dataset", f"{args.data}/demos.jsonl", "--model", args.model, "--chat", "off"]
        how = ["--epochs", "2", "--batch", "32", "--lr", "5e-5", "--out", str(start)]
        subprocess.run([sys.executable, str(ROOT / "sft.py"), *demos, *how], check=True)
    arms = {}
    for arm in args.arms:
        name, _, more = arm.partition(" ")
        algo, curriculum = name.split("-")
        flags = WORDS + MORE_WORDS.get(curriculum, "") + " " + MORE_WORDS.get(algo, "")
        learner = ["--algo", algo, "--curriculum", curriculum, *flags.split(), *more.split()]
        arms[arm] = ["--model", str(start), "--dataset", args.data, *learner]
    folders = compare(args, "words", arms, "words-")

    print("\n| | one sample | greedy | pass@8 | learnable | reward, last 10 |", end="")
    print(" entropy, last 10 | 1,000 tokens |\n|---|---|---|---|---|---|---|---|")
    before = evaluations(next(iter(folders.values()))[0])["before"]
    measured = [(before["sampled"], "accuracy"), (before["greedy"], "accuracy")]
    measured.append((before["sampled"], "pass@8"))
    cells = [f"{result[name]:.3f} ± {result[name + '_se']:.3f}" for result, name in measured]
    print(f"| the start | {' | '.join(cells)} ||||")
    success = {}  # of one sample, (seeds, questions)
    for arm, runs in folders.items():
        after = [evaluations(folder)["after"] for folder in runs]
        success[arm] = np.array([result["sampled"]["success"] for result in after])
        rows = [report.read_run(folder) for folder in runs]
        cells = [spread(success[arm].mean(1), 3)]
        cells.append(spread([result["greedy"]["accuracy"] for result in after], 3))
        cells.append(spread([result["sampled"]["pass@8"] for result in after], 3))
        for name, last in (("learnable", 0), ("reward_mean", 10), ("entropy", 10)):
            cells.append(spread([np.mean([row[name] for row in r[-last:]]) for r in rows], 2))
        cells.append(spread([r[-1]["tokens"] for r in rows], unit=1000))
        print(f"| {arm} | {' | '.join(cells)} |")
    first, *others = success
    for arm in others:
        ahead = success[arm] - success[first]
        questions = ahead.mean(0)  # (questions,)
        seeds = ", ".join(f"{gain:+.3f}" for gain in ahead.mean(1))
        error = questions.std(ddof=1) / len(questions) ** 0.5
        print(f"{arm} less {first}: {questions.mean():+.3f} ± {error:.3f}, paired; seeds {seeds}")


def evaluations(folder):
    return json.loads((folder / "evaluation.json").read_text())


def run_and_compare(args, title, arms, before, after=""):
    """`compare` from the tiny base, which is made once and not in each run."""
    import sft

    sft.tiny_base("runs/cache")
    compare(args, title, arms, before, after)


def compare(args, title, arms, before, after=""):
    """arms: {name: flags}. The runs lie in folders named `before`, the arm, `after`, the seed.
    Prints a table, draws the curves, and returns the folders, {arm: one a seed}."""
    folders, jobs = {}, {}
    for name in arms:
        arm = (before + name + after).replace(", ", "-").replace(" ", "-")
        folders[name] = [Path(args.runs, f"{arm}-seed{seed}") for seed in range(args.seeds)]
    for seed in range(args.seeds):  # all arms' first seeds first
        for name, flags in arms.items():
            jobs[folders[name][seed]] = [*flags, *args.flags, "--seed", str(seed)]
    execute(jobs, args.workers)
    runs = {name: [curve(folder) for folder in folders[name]] for name in arms}
    goal = print_table(title, runs)
    draw_curves(title, runs, goal, Path(args.out, f"{title}.png"))
    return folders


# A run of sfl.py, with another pool of questions.
CHANGED = """
import sys
sys.path.insert(0, {folder!r})
import data, sfl
from plumbing import commands
data.LEARNABLE_SHARE = {share}
questions_of = data.load_questions
def without_levels(*args, **settings):
    questions = questions_of(*args, **settings)
    for question in questions:
        question.level = None
    return questions
if {hide}:
    data.load_questions = without_levels
commands.command_line(sfl.main)
"""


def changes(folder, flags):
    """--share S is the pool's learnable share; the name of an arm may say that levels are hid."""
    share = 0.08
    if "--share" in flags:
        at = flags.index("--share")
        share = flags[at + 1]
        del flags[at : at + 2]
    return {"share": share, "hide": "no-levels" in folder.name}


def execute(jobs, workers):
    """jobs: {folder: flags of sfl.py}. Runs those that are not complete, `workers` at a time, a
    thread each."""

    def run(folder, flags):
        if (folder / "evaluation.json").exists() and "after" in evaluations(folder):
            return
        how = ["--out", str(folder), *EVERY, *flags]
        if (folder / "config.json").exists():
            how = ["--resume", str(folder)]
        folder.parent.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable,
            "-c",
            CHANGED.format(folder=str(ROOT), **changes(folder, how)),
            *how,
        ]
        one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
        with open(f"{folder}.log", "w") as log:
            done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=one_thread)
        failed = f"FAILED: see {log.name}"
        print(f"{failed if done.returncode else 'done'}  {folder}", flush=True)

    with ThreadPoolExecutor(workers) as threads:
        for result in [threads.submit(run, *job) for job in jobs.items()]:
            result.result()


def curve(folder):
    """Evaluations of a run, the starting model's first: arrays of what was spent, and accuracy."""
    from plumbing import report

    before = evaluations(folder)["before"]["greedy"]["accuracy"]
    rows = report.read_run(folder)
    evaluated = [row for row in rows if row.get("eval_accuracy") is not None]
    samples = 0  # responses, those that only served to choose included
    for row in rows:
        samples += sum(attempts for *_, attempts in row["sampled"]) + row.get("mc_rollouts", 0)
        row["samples"] = samples
    run = {
        spent: np.array([0] + [row[spent] for row in evaluated])
        for spent in ("iteration", "tokens", "seconds", "samples")
    }
    run["accuracy"] = np.array([before] + [row["eval_accuracy"] for row in evaluated])
    run["learnable"] = np.mean([row["learnable"] for row in rows])
    return run


def smooth(accuracy):
    return np.array([accuracy[max(0, i - 1) : i + 2].mean() for i in range(len(accuracy))])


def reached(run, goal, spent):
    """What the run had spent when its smoothed accuracy first reached the goal; None: never."""
    hits = np.flatnonzero(smooth(run["accuracy"]) >= goal)
    return run[spent][hits[0]] if len(hits) else None


def spread(values, digits=0, unit=1):
    """'mean +- sample sd' in these units, and how many seeds got there at all."""
    there = [value / unit for value in values if value is not None]
    if not there:
        return "never"
    text = f"{np.mean(there):.{digits}f}"
    if len(there) > 1:
        text += f" ± {np.std(there, ddof=1):.{digits}f}"
    return text if len(there) == len(values) else f"{text} ({len(there)}/{len(values)})"


def best(group):
    """The highest accuracy of the mean over seeds."""
    length = min(len(run["accuracy"]) for run in group)
    return np.mean([smooth(run["accuracy"])[:length] for run in group], 0).max()


def print_table(title, runs):
    """runs: {arm: a `curve` a seed}. A Markdown table; returns the goal."""
    first = next(iter(runs.values()))
    goal = best(first)
    start = first[0]["accuracy"][0]
    print(
        f"\n{title}: {len(first)} seeds. Goal: {goal:.3f}, the best accuracy of "
        f"`{next(iter(runs))}`; all start at {start:.3f}.\n"
    )
    columns = ["arm", "final accuracy", "best", "iterations to the goal"]
    columns += ["1,000 tokens to the goal", "time to the goal", "learnable"]
    print(f"| {' | '.join(columns)} |")
    print("|" + "---|" * len(columns))
    # machines differ: times are ratios to the first arm
    seconds = [reached(run, goal, "seconds") for run in first]
    unit = np.mean([s for s in seconds if s])
    for name, group in runs.items():
        cells = [
            name,
            spread([run["accuracy"][-3:].mean() for run in group], 3),
            f"{best(group):.3f}",
            spread([reached(run, goal, "iteration") for run in group]),
            spread([reached(run, goal, "tokens") for run in group], unit=1000),
            spread([reached(run, goal, "seconds") for run in group], 2, unit),
            f"{np.mean([run['learnable'] for run in group]):.0%}",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)
    return goal


def draw_curves(title, runs, goal, out):
    """Accuracy against iterations and tokens: mean and range of the seeds."""
    from matplotlib.figure import Figure  # not pyplot: it needs no screen

    from plumbing.report import COLORS

    figure = Figure(figsize=(10, 3.8))
    axes = figure.subplots(1, 2, sharey=True)
    labels = {
        "iteration": ("iteration", 1),
        "tokens": ("1,000 tokens generated, scoring included", 1e-3),
    }
    for ax, (spent, (label, scale)) in zip(axes, labels.items()):
        for number, (name, group) in enumerate(runs.items()):
            color = COLORS[number % len(COLORS)]
            style = "-" if number < len(COLORS) else "--"  # more arms than colours
            length = min(len(run["accuracy"]) for run in group)
            x = np.mean([run[spent][:length] for run in group], 0) * scale
            y = np.array([smooth(run["accuracy"])[:length] for run in group])
            ax.plot(x, y.mean(0), style, color=color, label=name, linewidth=1.8)
            ax.fill_between(x, y.min(0), y.max(0), color=color, alpha=0.15, linewidth=0)
        ax.axhline(goal, color="#999999", linewidth=0.8, linestyle=":")
        ax.set_xlabel(label)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("held-out accuracy")
    axes[0].legend(frameon=False, fontsize=8)
    seeds = len(next(iter(runs.values())))
    figure.suptitle(f"{title} (mean and range of {seeds} seeds)", fontsize=10)
    save(figure, out)


def save(figure, out, rect=None):
    """rect: what of the figure the axes may fill; None: all."""
    figure.tight_layout(rect=rect)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=140)
    print(f"wrote {out}")


# --------------------------------------------------------------------------- cost

COSTS = {
    "ppo": "--algo ppo",
    "vineppo": "--algo vineppo",
    "vineppo --mc_spend bisect": "--algo vineppo --mc_spend bisect",
}


def cost(args, repeats=3):
    """Seconds and tokens of an iteration from one checkpoint, on one thread, in turns."""
    from plumbing import report

    model = base_of(args)
    common = f"--curriculum uniform --iterations 6 --eval_limit 32 --lr 0 --model {model}".split()
    seconds, rows = {name: [] for name in COSTS}, {}
    for repeat in range(repeats):
        for name, flags in COSTS.items():
            folder = Path(args.runs, f"cost-{name.replace(' --', '-')}-{repeat}")
            execute({folder: [*common, *flags.split(), *args.flags, "--seed", str(repeat)]}, 1)
            rows[name] = report.read_run(folder)[1:]  # the first iteration warms up
            took = [sum(row[key] for key in report.SECONDS) for row in rows[name]]
            seconds[name].append(np.mean(took))
    columns = ["an iteration of", "time, ppo = 1: min / median / max", "tokens generated"]
    columns += ["of them for credit"]
    print(f"| {' | '.join(columns)} |")
    print("|" + "---|" * len(columns))
    for name in COSTS:
        ratios = np.array(seconds[name]) / seconds["ppo"]

        def mean(key, name=name):
            return np.mean([row.get(key, 0) for row in rows[name]])

        tokens = [mean("tokens_generated") + mean("tokens_credit"), mean("tokens_credit")]
        time = f"{ratios.min():.2f} / {np.median(ratios):.2f} / {ratios.max():.2f}"
        print(f"| {name} | {time} | {' | '.join(f'{count:,.0f}' for count in tokens)} |")


def base_of(args):
    """The folder of the model that --model names; without it, the tiny base."""
    import sft

    if args.model is None:
        return sft.tiny_base("runs/cache")
    model = Path(args.model, "model")
    return model if model.exists() else Path(args.model)


# --------------------------------------------------------------------------- spend


def spend(args, questions=14, k=9, truth=256):
    """Advantages of --mc_spend all and bisect against all states at K = 256: rollouts, mean
    absolute error, bias (its mean over the steps that the true ones call good, and bad)."""
    import data
    import eval as evaluation
    import vineppo
    from plumbing import checkpoint
    from rollout import Engine

    model, tokenizer = checkpoint.load_model(base_of(args))
    levels = dict.fromkeys(data.STEPS_WANTED, 1.0)
    asked = data.arithmetic(questions, 5, levels)
    prompts, stops = data.encode_prompts(tokenizer, asked), data.stop_ids(model, tokenizer)
    settings = {"max_new_tokens": 96, "stop_ids": stops}
    engine = Engine(model)
    groups = engine.generate(prompts, n=8, seed=0, **settings)
    rewards = evaluation.rewards(tokenizer, asked, groups)

    def advantages(seed, **how):
        stats = {}
        _, values = vineppo.mc_values(
            engine, tokenizer, asked, groups, rewards, score=evaluation.rewards, seed=seed,
            stats=stats, **how, **settings,
        )  # fmt: skip
        pairs = zip(values, rewards.flatten())
        steps = [vineppo.step_advantages(value, float(reward)) for value, reward in pairs]
        return np.concatenate(steps), stats

    true, _ = advantages(1, mc_rollouts=truth)
    base = None
    for how in ("all", "bisect"):
        estimates = [advantages(seed, mc_rollouts=k, spend=how) for seed in range(2, 6)]
        error = np.array([estimate - true for estimate, _ in estimates])
        spent = np.mean([stats["mc_rollouts"] for _, stats in estimates])
        base = base or spent
        good, bad = error[:, true > 0.1].mean(), error[:, true < -0.1].mean()
        print(
            f"{how:<8} rollouts {spent / base:.2f}   mean |error| {np.abs(error).mean():.3f}   "
            f"sd {error.std():.3f}   bias of good steps {good:+.3f}, of bad ones {bad:+.3f}"
        )


# --------------------------------------------------------------------------- gradients


def update_settings():
    """What ppo.py must know to score rollouts."""
    budget = {"tokens_per_microbatch": 4096, "fsdp": False, "dtype": "float32"}
    return SimpleNamespace(temperature=1.0, gamma=1.0, lam=1.0, **budget)


def gradients(args, n=8):
    """Which way each method's gradient points: estimates from a few responses against the gradient
    of thousands, the same questions for both; early and late in a run. --task: what is learned."""
    from plumbing import checkpoint

    runs, asked, settings = TASKS[args.task](args)
    execute({run: flags for run, flags in runs.values()}, args.workers)
    measured = {}
    for title, (run, _) in runs.items():
        kept = Path(args.runs, f"{args.task}-{run.name}.json")  # measured once
        if not kept.exists():
            policy, tokenizer = checkpoint.load_model(run)
            critic, found = load_critic(run, policy), []
            for name, questions in asked.items():
                row = compare_gradients(policy, tokenizer, critic, questions, n=n, **settings)
                found.append((name, *row))
            kept.write_text(json.dumps(found))
        measured[title] = json.loads(kept.read_text())
        for name, table, success, length, explained in measured[title]:
            print(
                f"\n{title}, {name}: success {success:.2f}, {length:.0f} tokens a response, the "
                f"critic explains {explained:.2f} of the variance\n"
            )
            print("| estimate | cosine | ahead of grpo | noise / signal | responses |")
            print("|---|---|---|---|---|")
            for method, row in table.items():
                cells = [method, f"{row['cosine']:.2f} ± {row['sd']:.2f}"]
                cells.append(f"{row['ahead']:+.2f} ± {row['se']:.2f}")
                cells.append(
                    f"{row['noise']:.1f}" if row["noise"] < 100 else f"{row['noise']:,.0f}"
                )
                print(f"| {' | '.join(cells)} | {row['spent']:.0f} |", flush=True)
    if args.task == "arithmetic":
        draw_gradients(measured, Path(args.out, "gradients.png"))


def of_arithmetic(args, questions=8):
    """{title: (run, flags of sfl.py)}, {name: questions}, and settings of `compare_gradients`."""
    import data
    import sft

    sft.tiny_base("runs/cache")
    flags = "--algo ppo --curriculum uniform --lr 1e-4 --eval_every 1000 --iterations".split()
    runs = {}
    for count in (40, 90):
        runs[f"after {count} iterations"] = (
            Path(args.runs, f"gradients-{count}"),
            [*flags, f"{count}"],
        )
    asked = {}
    for levels in ((2, 3), (4, 5), (7, 8)):
        name = f"{levels[0]} and {levels[1]} steps"
        asked[name] = data.arithmetic(questions, 7, dict.fromkeys(levels, 1))
    return runs, asked, {}


def of_walks(args, questions=8):
    """PPO on the few graphs that credit is compared on, and on many, which its critic cannot learn
    by heart. Both are looked at on the few."""
    import data

    folder = walks_base(Path(args.runs, "walks"))
    few = data.load_questions(str(folder / "few"), "train")
    runs = {}
    for pool, count in (("few", 25), ("few", 75), ("many", 100)):
        flags = (
            f"--algo ppo --lr {CREDIT['walks']['ppo']} {walks(folder, pool)} --iterations {count}"
        )
        name = f"{pool} graphs, after {count} iterations"
        runs[name] = Path(args.runs, f"walks-{pool}-{count}"), flags.split()
    asked = {"first half": few[:questions], "second half": few[questions:]}
    return runs, asked, {"max_new_tokens": 24}


def draw_gradients(measured, out):
    """The cosines over the success, one part a run."""
    from matplotlib.figure import Figure

    from plumbing.report import COLORS

    figure = Figure(figsize=(10, 3.6))
    axes = figure.subplots(1, len(measured), sharey=True)
    for ax, (title, found) in zip(axes, measured.items()):
        points = {}  # method -> [(success, cosine)]
        for _, table, success, *_ in found:
            for method, row in table.items():
                points.setdefault(method, []).append((success, row["cosine"]))
        for number, (method, pairs) in enumerate(points.items()):
            how = {"color": COLORS[number % len(COLORS)], "markersize": 4, "linewidth": 1.2}
            ax.plot(*zip(*pairs), "o-" if number < len(COLORS) else "o--", label=method, **how)
        ax.set(xlabel="success on the questions", xscale="log")
        ax.minorticks_off()
        ticks = [success for success, _ in pairs]
        ax.set_xticks(ticks, [f"{tick:.2f}" for tick in ticks])
        ax.set_title(f"{title} of PPO", fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("cosine with the true gradient")
    axes[-1].legend(frameon=False, fontsize=8)
    save(figure, out)


def compare_gradients(
    policy, tokenizer, critic, asked, *, n, repeats=16, truth=4096, more=8, max_new_tokens=96,
):  # fmt: skip
    """({method: cosine with the true gradient (mean, sd), noise / signal, responses an estimate
    takes}, success, length, share of the returns' variance that the critic explains). noise /
    signal is E|g|^2 / (E g.G/|G|)^2 - 1: free of the scale that a method gives its g. more: times
    the responses, of GRPO beside the others."""
    import torch

    import data
    import eval as evaluation
    import ppo
    import vineppo
    from plumbing import batches
    from rollout import Engine

    prompts, stops = data.encode_prompts(tokenizer, asked), data.stop_ids(policy, tokenizer)
    settings = update_settings()
    sampling = {"max_new_tokens": max_new_tokens, "stop_ids": stops}
    engine = Engine(policy)
    weights = list(policy.parameters())

    def attempt(n, seed):
        groups = engine.generate(prompts, n=n, seed=seed, **sampling)
        rewards = evaluation.rewards(tokenizer, asked, groups)
        return groups, rewards, [r for group in groups for r in group]

    def gradients_of(rollouts, methods):
        """d/d theta of the sum over tokens of A log pi, a response's mean, flat. methods: {name: A,
        (response length,) for each rollout}."""
        found = dict.fromkeys(methods, 0)
        for batch in batches.microbatches(rollouts, policy, settings.tokens_per_microbatch):
            logprobs = ppo.response_logprobs(policy, [rollouts[i] for i in batch], settings)
            for name, advantages in methods.items():
                advantage = torch.cat([advantages[i] for i in batch])
                loss = (advantage * logprobs).sum() / len(rollouts)
                pieces = torch.autograd.grad(loss, weights, retain_graph=True)
                found[name] += torch.cat([piece.flatten() for piece in pieces]).double()
        return found

    def by_group(rollouts, rewards, how):
        return ppo.per_token(rollouts, ppo.group_advantages(rewards, how=how).flatten())

    _, rewards, rollouts = attempt(truth // len(asked), 1)
    true = gradients_of(rollouts, {"rloo": by_group(rollouts, rewards, "rloo")})["rloo"]
    true /= true.norm()
    success = float(rewards.mean())
    length = np.mean([len(r.response) for r in rollouts])
    values = torch.cat(ppo.rollout_values(critic, rollouts, settings))
    returns = torch.cat(ppo.per_token(rollouts, rewards.flatten()))
    explained = 1 - float((returns - values).var() / returns.var())
    found, spent = {}, {}
    for repeat in range(repeats):
        groups, rewards, rollouts = attempt(n, 100 + repeat)
        methods = {how: by_group(rollouts, rewards, how) for how in ("grpo", "rloo")}
        for how in TREES:
            methods[how] = tree_advantages(tokenizer, groups, rewards, how=how)
        values = ppo.rollout_values(critic, rollouts, settings)
        for name, settings.lam in (("ppo", 1.0), ("ppo, lam 0.95", 0.95)):
            methods[name], _ = ppo.response_gae(values, rewards.flatten(), settings)
        methods["no baseline"] = ppo.per_token(rollouts, rewards.flatten())  # a critic with no idea
        for name, spend in (("vineppo", "all"), ("vineppo, bisect", "bisect")):
            stats = {}
            methods[name] = vineppo.mc_advantages(
                engine, tokenizer, asked, groups, rewards, score=evaluation.rewards,
                mc_rollouts=9, spend=spend, seed=100 + repeat, stats=stats, **sampling,
            )  # fmt: skip
            spent.setdefault(name, []).append(stats["mc_rollouts"] + len(rollouts))
        estimates = gradients_of(rollouts, methods)
        name = f"grpo, {more} x the responses"
        _, rewards, rollouts = attempt(more * n, 1000 + repeat)
        estimates |= gradients_of(rollouts, {name: by_group(rollouts, rewards, "grpo")})
        spent[name] = [len(rollouts)]
        for name, g in estimates.items():
            found.setdefault(name, []).append((float(g @ true), float(g @ g)))
    table = {}
    for name, pairs in found.items():
        along, square = np.array(pairs).T
        cosines = along / np.sqrt(np.maximum(square, 1e-30))
        ahead = cosines - table["grpo"]["cosines"] if table else cosines * 0
        table[name] = {
            "cosine": np.mean(cosines),
            "sd": np.std(cosines, ddof=1),
            "cosines": cosines.tolist(),
            "ahead": np.mean(ahead),  # of grpo, on the same responses
            "se": np.std(ahead, ddof=1) / repeats**0.5,
            "noise": square.mean() / along.mean() ** 2 - 1,
            "spent": np.mean(spent.get(name, n * len(asked))),
        }
    return table, success, length, explained


TREES = ("tree", "tree, shrunk", "tree, baseline")


def tree_advantages(tokenizer, groups, rewards, *, how, starts_of=None):
    """Credit from the group's own responses: V(s) is the mean reward of those that begin with s, at
    no rollout more. Where responses share no states there is nothing to tell.

        'tree'            V(next s) - V(s): all of a response's surprise falls on the step with
                          which it leaves the others (the tree of TEMPO, arXiv 2509.18314)
        'tree, shrunk'    the same; each V is averaged with one more response of its parent's value
        'tree, baseline'  reward - V(s), of the others that begin with s, or with the longest part
                          of s that others begin with (GiGPO's groups, 2505.10978)

    Like `vineppo.mc_advantages`: a tensor with a number for each response token, for each rollout.
    starts_of(response): where its steps start, by default its lines."""
    import torch

    import vineppo

    starts_of = starts_of or (lambda r: vineppo.step_starts(tokenizer, r.written()))
    shrink = 1 if how == "tree, shrunk" else 0
    advantages = []
    for group, grades in zip(groups, np.asarray(rewards, float)):
        starts = [starts_of(r) for r in group]
        rewards_of = {}  # state, its response tokens so far -> rewards of those that pass
        for r, grade, its_starts in zip(group, grades, starts):
            for start in its_starts:
                rewards_of.setdefault(tuple(r.response[:start]), []).append(grade)
        for r, grade, its_starts in zip(group, grades, starts):
            values, value = [], grades.mean()
            for start in its_starts:
                passed = rewards_of[tuple(r.response[:start])]
                if how != "tree, baseline":
                    value = (sum(passed) + shrink * value) / (len(passed) + shrink)
                elif len(passed) > 1:
                    value = (sum(passed) - grade) / (len(passed) - 1)
                values.append(value)
            of_step = vineppo.step_advantages(values, grade)
            if how == "tree, baseline":
                of_step = grade - np.array(values)
            lengths = np.diff([*its_starts, len(r.response)])
            advantages.append(torch.tensor(np.repeat(of_step, lengths), dtype=torch.float32))
    return advantages


# --------------------------------------------------------------------------- walks on a graph

WALKS = """--curriculum uniform --questions 4 --minibatch 32 --temperature 1 --top_p 1
--max_new_tokens 24 --context 256 --critic_lr 1e-3 --epochs 1 --lr_schedule constant --kl_coef 0
--tokens_per_microbatch 2048"""


def walks(folder, pool):
    """Flags of a run from the model that walks at random."""
    return f"{WALKS} --model {folder / 'base'} --dataset {folder / pool}"


NODES = range(10, 30)  # two digits each: a walk is written as one number
DEPTH = 4


def graph(rng):
    """{node: its two successors}, and the one path from the start to the goal. In every layer one
    node lies on the path. Whoever leaves it walks on just as long, and never comes back:

        start  a1  a2  a3  goal       from each one edge to the right, one to a b or c below;
               b1  b2  b3  b4         from every b and c to both the next b and the next c
               c1  c2  c3  c4

    The worth of a step thus shows at the last one only, or to whoever traces the edges."""
    names = rng.sample(NODES, 3 * DEPTH + 1)
    layers = [names[:1]] + [names[i : i + 3] for i in range(1, len(names), 3)]
    edges = {}
    for layer, (on, *off) in zip(layers, layers[1:]):
        edges[layer[0]] = [on, rng.choice(off)]
        edges |= {node: off for node in layer[1:]}
    return edges, [layer[0] for layer in layers]


def walk_question(rng):
    """A row of a data file, and a random walk as its solution, mostly a wrong one. The answer is
    the whole path as one number: who has not walked it does not know it."""

    def written(nodes):
        return "\n".join(map(str, nodes)), "".join(map(str, nodes))

    edges, path = graph(rng)
    pairs = [f"{node}>{after}" for node in edges for after in edges[node]]
    rng.shuffle(pairs)
    walk = path[:1]
    while walk[-1] in edges:
        walk.append(rng.choice(edges[walk[-1]]))
    lines, number = written(walk)
    question = f"{' '.join(pairs)} {path[-1]}<{path[0]}"  # goal and start
    return {"question": question, "answer": written(path)[1], "solution": f"{lines}\n#### {number}"}


def walks_base(folder, steps=1200):
    """A folder with data, `few` and `many`, and a tiny model that walks at random, `base`. A run is
    tested on what it trains on: to find its way in other graphs it would need far longer."""
    import data
    import sft
    from plumbing import checkpoint
    from plumbing.tiny import tiny_model, word_tokenizer

    if (folder / "base" / "config.json").exists():
        return folder
    rng = random.Random(0)
    for pool, size in (("few", 16), ("many", 4096)):
        rows = [walk_question(rng) for _ in range(size)]
        lines = [json.dumps({key: row[key] for key in ("question", "answer")}) for row in rows]
        (folder / pool).mkdir(parents=True, exist_ok=True)
        (folder / pool / "train.jsonl").write_text("\n".join(lines))
        (folder / pool / "test.jsonl").write_text("\n".join(lines[:256]))
    # One token an edge: it is then looked up by its content. A two-layer model that must first put
    # an edge together from its nodes did not learn to walk in 1,000 steps.
    before, after = data.PLAIN_PROMPT.split("{question}")
    edges = [f"{a}>{b} " for a, b in itertools.permutations(NODES, 2)]
    words = [before, after, "#### ", "<", *map(str, NODES), *[f"{n}\n" for n in NODES], *edges]
    cut = "|".join(
        [re.escape(before), after, r"\d\d>\d\d ", r"\d\d\n(?!\n)", r"\d\d", "#### ", "."]
    )
    tokenizer = word_tokenizer(words, cut)
    model = tiny_model(tokenizer, 0)
    rows = [walk_question(rng) for _ in range(16000)]
    prompts = [data.PLAIN_PROMPT.format(**row) for row in rows]
    questions = [data.Question(prompt, row["answer"]) for prompt, row in zip(prompts, rows)]
    examples = sft.demonstrations(tokenizer, questions, [row["solution"] for row in rows])
    drawn = np.random.default_rng(0).integers(0, len(examples), (steps, 64))
    sft.train(model, [[examples[i] for i in batch] for batch in drawn], lr=5e-3, warmup=0.15)
    checkpoint.save_model(model, tokenizer, folder / "base")
    return folder


TASKS = {"arithmetic": of_arithmetic, "walks": of_walks}


# --------------------------------------------------------------------------- learners, parity

LEARNERS = ("expert", "rcrl", "grpo", "ppo", "vineppo")
VINEPPO = "--algo vineppo --mc_spend bisect --questions 16 --minibatch 128 --rho 1 --lr 2e-4"
VINE_ITERATIONS = {"uniform": "100", "posterior": "60"}


def learners(args, k=64, limit=70):
    """All algorithms, with uniform and with posterior, and SFT going on: greedy accuracy, maj@k and
    pass@k of the final models, and samples to a goal."""
    import sft

    sft.tiny_base("runs/cache")
    folders, jobs = {}, {}
    for seed in range(args.seeds):
        for algo, name in itertools.product(LEARNERS, VINE_ITERATIONS):
            folder = Path(args.runs, f"{algo}-{name}-seed{seed}")
            flags = flags_of(algo, name)
            if algo in ("expert", "rcrl"):
                flags = f"--algo {algo} --curriculum {name} --rho 1 --eval_every 1".split()
            if algo == "vineppo":
                flags = [*VINEPPO.split(), "--curriculum", name]
                flags += ["--iterations", VINE_ITERATIONS[name]]
            jobs[folder] = [*flags, *args.flags, "--seed", str(seed)]
            folders.setdefault(f"{algo}, {name}", []).append(folder)
    execute(jobs, args.workers)
    folders = {"the start": [base_of(args)], **folders}
    folders["sft goes on"] = [sft_goes_on(args, seed) for seed in range(args.seeds)]
    results = {name: [passes(run, k, limit) for run in runs] for name, runs in folders.items()}
    runs = {name: [curve(run) for run in folders[name]] for name in list(folders)[1:-1]}
    goals = (0.6, 0.75)
    columns = ["greedy", "one sample", f"maj@{k}", f"pass@{k}"]
    columns += [f"1,000 samples to {goal}" for goal in goals]
    print(f"| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for name, found in results.items():
        cells = [spread([r[key] for r in found], 3) for key in ("greedy", "pass@1", f"maj@{k}")]
        cells.append(spread([r[f"pass@{k}"] for r in found], 3))
        for goal in goals:
            needed = [reached(run, goal, "samples") for run in runs.get(name, [])]
            cells.append(spread(needed, 1, 1000) if needed else "")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    draw_learners(results, runs, k, Path(args.out, "learners.png"))


def sft_goes_on(args, seed, steps=200):
    """The folder of the base model with more of the demonstrations it was made with."""

    import data
    import sft
    from plumbing import checkpoint

    folder = Path(args.runs, f"sft-seed{seed}")
    if not folder.exists():
        model, tokenizer = checkpoint.load_model(sft.tiny_base("runs/cache"))
        chains = sft.demonstrated_chains(random.Random(seed))
        hurry, hurry_rng = sft.TINY["stages"][-1][-1], random.Random(sft.TINY["seed"])
        texts = [data.solve(chain, hurry, hurry_rng) for chain in chains]
        questions = [data.worked(chain) for chain in chains]
        examples = sft.demonstrations(tokenizer, questions, texts)
        drawn = np.random.default_rng(seed).integers(0, len(examples), (steps, 96))
        sft.train(model, [[examples[i] for i in batch] for batch in drawn], lr=1e-3)
        checkpoint.save_model(model, tokenizer, folder)
    return folder


def passes(run, k, limit):
    """What `eval.evaluate` says of a final model: greedy, and with k samples at temperature 1.
    Kept beside the model."""
    import data
    import eval as evaluation
    from plumbing import checkpoint

    kept = Path(run, f"passes{k}.json")
    if not kept.exists():
        model, tokenizer = checkpoint.load_model(run)
        questions = data.load_questions("arithmetic", "test", limit=limit)
        greedy = evaluation.evaluate(model, tokenizer, questions, max_new_tokens=96)
        sampled = evaluation.evaluate(
            model, tokenizer, questions, samples=k, temperature=1.0, max_new_tokens=96
        )
        found = {key: x for key, x in sampled.items() if "@" in key}
        kept.write_text(json.dumps({**found, "greedy": greedy["accuracy"]}))
    return json.loads(kept.read_text())


def draw_learners(results, runs, k, out):
    """pass@k curves of the final models, and accuracy against samples."""
    from matplotlib.figure import Figure

    from plumbing.report import COLORS

    figure = Figure(figsize=(10, 3.8))
    axes = figure.subplots(1, 2)
    color_of = dict(zip(LEARNERS, COLORS))
    color_of |= {"the start": "#999999", "sft goes on": "#000000"}
    counts = [2**i for i in range(k.bit_length())]

    def style(name):
        algo, _, curriculum = name.partition(", ")
        return {"color": color_of[algo], "linestyle": ":" if curriculum == "uniform" else "-"}

    for name, found in results.items():
        y = [np.mean([r[f"pass@{count}"] for r in found]) for count in counts]
        axes[0].plot(counts, y, label=name, **style(name))
    for name, group in runs.items():
        length = min(len(run["accuracy"]) for run in group)
        x = np.mean([run["samples"][:length] for run in group], 0)
        y = np.mean([smooth(run["accuracy"])[:length] for run in group], 0)
        axes[1].plot(x[1:], y[1:], **style(name))
    axes[0].set(xscale="log", xlabel="k", ylabel="pass@k, held out", title="final models")
    axes[0].set_xticks(counts, counts)
    axes[0].minorticks_off()
    axes[1].set(xscale="log", xlabel="responses sampled", ylabel="greedy accuracy")
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=7, frameon=False, loc="right")
    save(figure, out, (0, 0, 0.84, 1))


P_COTS = ("0.05", "0.1", "0.2", "0.4")


def parity(args, iterations=60):
    """RL after next-token prediction (arXiv 2510.11495): accuracy and length as RL goes on."""
    from matplotlib.figure import Figure

    from plumbing.report import COLORS, read_run

    folders, jobs = {}, {}
    for share, seed in itertools.product(P_COTS, range(args.seeds)):
        folder = Path(args.runs, f"parity{args.bits}-{share}-seed{seed}")
        flags = f"--dataset parity --bits {args.bits} --p_cot {share} --algo grpo --curriculum "
        flags += f"uniform --lr 2e-4 --iterations {iterations} --eval_every 4"
        jobs[folder] = [*flags.split(), *args.flags, "--seed", str(seed)]
        folders.setdefault(share, []).append(folder)
    execute({runs[0]: jobs[runs[0]] for runs in folders.values()}, args.workers)  # with its SFT
    execute(jobs, args.workers)
    figure = Figure(figsize=(10, 3.4))
    axes = figure.subplots(1, 2)
    columns = ["greedy after SFT", "length", "greedy after RL", "length", "iterations to 0.95"]
    print(f"{args.bits} bits\n\n| p_cot | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for color, (share, runs) in zip(COLORS, folders.items()):
        curves = []
        for run in runs:
            before = json.loads((run / "evaluation.json").read_text())["before"]["greedy"]
            rows = [row for row in read_run(run) if "eval_accuracy" in row]
            points = [(0, before["accuracy"], before["response_length"])]
            names = ("iteration", "eval_accuracy", "eval_response_length")
            points += [tuple(row[name] for name in names) for row in rows]
            curves.append(np.array(points, float))
        curves = np.array(curves)  # (seeds, evaluations, 3)
        hits = [curve[curve[:, 1] >= 0.95, 0] for curve in curves]
        cells = [spread(curves[:, 0, 1], 2), spread(curves[:, 0, 2], 0)]
        cells += [spread(curves[:, -1, 1], 2), spread(curves[:, -1, 2], 0)]
        cells.append(spread([hit[0] if len(hit) else None for hit in hits]))
        print(f"| {share} | {' | '.join(cells)} |", flush=True)
        for ax, column in zip(axes, (1, 2)):
            for curve in curves:
                ax.plot(curve[:, 0], curve[:, column], color=color, alpha=0.25, linewidth=0.8)
            mean = curves.mean(0)
            ax.plot(mean[:, 0], mean[:, column], color=color, label=f"p_cot {share}")
    for ax, label in zip(axes, ("held-out accuracy, greedy", "response length, tokens")):
        ax.set(xlabel="iteration of RL", ylabel=label)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=8)
    save(figure, Path(args.out, f"parity{args.bits}.png"))


# --------------------------------------------------------------------------- theory


def theory(args):
    """LILO's theorem on real steps: what one small step on one question alone gains, against the
    question's learnability; and the line that the theorem predicts, gain = c p (1 - p)."""
    from matplotlib.figure import Figure

    x, y = improvements(base_of(args))
    picks = np.random.default_rng(0).integers(0, len(x), (2000, len(x)))
    bootstrap = [np.corrcoef(x[pick], y[pick])[0, 1] for pick in picks]
    low, high = np.percentile(bootstrap, [2.5, 97.5])
    slope = (x @ y) / (x @ x)  # c, by least squares
    explained = 1 - ((y - slope * x) ** 2).sum() / ((y - y.mean()) ** 2).sum()
    some = (x > 0.02) & (y > 0)  # below, the gain is mostly noise
    power = np.polyfit(np.log(x[some]), np.log(y[some]), 1)[0]
    ranks = [np.argsort(np.argsort(values)) for values in (x, y)]
    print(f"correlation with p(1 - p) {np.corrcoef(x, y)[0, 1]:.2f}", end=" ")
    print(f"(95% bootstrap {low:.2f} to {high:.2f}), of the ranks {np.corrcoef(*ranks)[0, 1]:.2f}")
    print(f"the line explains {explained:.0%} of the variance; best power {power:.2f}", end=" ")
    print(f"({some.sum()} questions above 0.02)")
    figure = Figure(figsize=(4.4, 3.8))
    ax = figure.subplots()
    ax.scatter(x, y, s=14, color="#0072B2", label="a question")
    ax.plot([0, 0.25], [0, 0.25 * slope], color="#D55E00", label="in proportion, as LILO predicts")
    ax.set(xlabel="learnability p(1 - p) before the step", ylabel="improvement in p")
    ax.set_title("one small step on one question", fontsize=10)
    ax.legend(frameon=False, fontsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    save(figure, Path(args.out, "theory.png"))


def improvements(model, questions=72, rollouts=384, lr=0.0003, seed=0):
    """From one checkpoint, for each question alone: the policy gradient of its success from
    `rollouts` responses, one small step of plain gradient ascent, and the change of its success,
    measured on as many other responses drawn before the step: E[(ratio - 1)(R - p)], where ratio is
    the new over the old probability of the response. (Its expectation is the exact change, and it
    has far less variance than counting successes again.)

    Returns arrays: learnability before the step, improvement."""
    import torch
    from tqdm import tqdm

    import data
    import eval as evaluation
    import ppo
    import sfl
    from plumbing import batches, checkpoint
    from rollout import Engine

    policy, tokenizer = checkpoint.load_model(model)
    engine = Engine(policy)
    pool = data.load_questions("arithmetic", "train")
    prompts, stops = data.encode_prompts(tokenizer, pool), data.stop_ids(policy, tokenizer)
    settings = update_settings()

    def attempt(indices, n, seed):
        chosen = [prompts[i] for i in indices]
        groups = engine.generate(chosen, n=n, max_new_tokens=96, stop_ids=stops, seed=seed)
        return groups, evaluation.rewards(tokenizer, [pool[i] for i in indices], groups)

    def log_probability(group):  # of each response: the sum over its tokens
        return torch.stack([x.sum() for x in ppo.rollout_logprobs(policy, group, settings)])

    _, rewards = attempt(range(len(pool)), 16, seed)
    score = sfl.learnability(rewards.sum(1), 16)
    rng, chosen = np.random.default_rng(seed), []
    scores = np.unique(score)
    for value in scores:  # evenly over learnability: most questions have none
        alike = rng.permutation(np.flatnonzero(score == value))
        chosen.extend(alike[: questions // len(scores)])
    start = [weight.detach().clone() for weight in policy.parameters()]
    learnability, gain = [], []
    for number, i in enumerate(tqdm(chosen, desc="theory", unit="question")):
        (group,), (reward,) = attempt([i], rollouts, seed + 1 + 2 * number)
        (others,), (others_reward,) = attempt([i], rollouts, seed + 2 + 2 * number)
        p = np.concatenate([reward, others_reward]).mean()
        policy.zero_grad()
        advantages = ppo.per_token(group, reward - reward.mean())
        for batch in batches.microbatches(group, policy, settings.tokens_per_microbatch):
            logprobs = ppo.response_logprobs(policy, [group[j] for j in batch], settings)
            advantage = torch.cat([advantages[j] for j in batch])
            (-(advantage * logprobs).sum() / rollouts).backward()
        old = log_probability(others)
        with torch.no_grad():
            for weight in policy.parameters():
                weight -= lr * weight.grad
        ratio = (log_probability(others) - old).exp()
        surplus = torch.tensor(others_reward - others_reward.mean())
        gain.append(float(((ratio - 1) * surplus).mean()))
        learnability.append(p * (1 - p))
        with torch.no_grad():
            for weight, before in zip(policy.parameters(), start):
                weight.copy_(before)
    print(f"{rollouts} + {rollouts} responses to each of {len(chosen)} questions, step {lr}")
    return np.array(learnability), np.array(gain)


# --------------------------------------------------------------------------- values

# Flags whose default is what the run used, for the values depend on them; here, without a run.
OF_THE_RUN = {
    "dataset": "arithmetic",
    "data_dir": None,
    "chat": "auto",
    "steps": None,
    "temperature": 1.0,
    "top_p": 1.0,
    "max_new_tokens": 256,
}


def values(args):
    """Monte Carlo values and the critic's against true ones, in states of a run's policy."""
    import data
    from plumbing import checkpoint

    check_values(args)
    run = Path(args.model)
    config = {}
    if (run / "model" / "config.json").is_file():
        config = json.loads((run / "config.json").read_text())
    for name, default in OF_THE_RUN.items():
        other_data = name == "data_dir" and args.dataset != config.get("dataset")
        if getattr(args, name) is None and not other_data:
            setattr(args, name, default if config.get(name) is None else config[name])
    questions = data.load_questions(args.dataset, args.split, data_dir=args.data_dir)
    shuffled = np.random.default_rng(args.seed).permutation(len(questions))
    questions = [questions[i] for i in shuffled[: 4 * args.states]]
    model, tokenizer = checkpoint.load_model(args.model, device=args.device)
    critic = load_critic(run, model) if config else None
    prompts = data.encode_prompts(tokenizer, questions, chat=args.chat)
    names = ("attempts", "states", "alternatives", "truth", "mc_rollouts", "max_new_tokens")
    names += ("temperature", "top_p", "seed")
    settings = {name: getattr(args, name) for name in names}
    settings["style"] = args.steps
    if args.steps in (None, "auto"):
        settings["style"] = "math" if questions[0].kind == "math" else "lines"
    settings["stop_ids"] = data.stop_ids(model, tokenizer)
    true, table = compare_values(
        model, tokenizer, questions, prompts, critic=critic, progress=True, **settings
    )
    print(
        f"{len(true)} states of {args.model} on {args.dataset}; true value ({args.truth} rollouts "
        f"each): mean {true.mean():.3f}, std {true.std():.3f}"
    )
    print(
        f"{'estimator':<12}{'correlation':>12}{'mean abs error':>16}{'right rankings':>16}"
        f"{'of pairs':>10}"
    )
    for name, row in table.items():
        print(
            f"{name:<12}{row['correlation']:>12.3f}{row['error']:>16.3f}{row['right']:>16.3f}"
            f"{row['pairs']:>10}"
        )
    if critic is None:
        print(f"no critic in {run / 'state' / 'training.pt'}: a run with --algo ppo leaves one")
    draw_values(true, table, args.out)


def check_values(args):
    counts = {name: getattr(args, name) for name in ("states", "attempts", "truth")}
    counts |= {"mc_rollouts": args.mc_rollouts, "alternatives": args.alternatives}
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"--{name} {count} must be at least 1")
    out = Path(args.out)
    if out.suffix != ".png" or not out.absolute().parent.is_dir():
        raise ValueError(f"--out {out} must end in .png and lie in a folder that exists")
    if find_spec("matplotlib") is None:
        raise ValueError("the scatter plot needs matplotlib: pip install matplotlib")


def load_critic(run, model):
    """The critic of a run's last checkpoint, or None."""
    import torch

    import ppo

    path = run / "state" / "training.pt"
    if not path.is_file():
        return None
    weights = torch.load(path, map_location=model.device, weights_only=True)["critic"]
    if weights is None:
        return None
    critic = ppo.ValueModel(model)
    critic.load_state_dict(weights)
    return critic


def sample_states(
    model, tokenizer, questions, prompts, *, attempts, states, alternatives, style,
    max_new_tokens, seed, **generation,
):  # fmt: skip
    """Distinct intermediate states of the policy's responses, `attempts` a question, to questions
    that some of these solve and some do not: elsewhere most values are 0 or 1, and nothing is to be
    told. And for each the distinct states to which `alternatives` fresh next steps lead, if they do
    not end the response.

    Returns points (question, rollout, start), the former first, and families: for each of the
    former, the range of its alternatives among the points."""
    import eval as evaluation
    import rollout
    import vineppo

    def starts(r):
        return vineppo.step_starts(tokenizer, r.written(), style=style)

    responses = rollout.generate(
        model, prompts, n=attempts, max_new_tokens=max_new_tokens, seed=seed, **generation
    )
    mixed = evaluation.rewards(tokenizer, questions, responses).std(1) > 0
    found = {}  # token prefix -> point
    for question, group, some_right in zip(questions, responses, mixed):
        for r in group if some_right or attempts == 1 else []:
            for start in starts(r)[1:]:
                key = tuple(r.prompt), tuple(r.response[:start])
                found[key] = (question, r, start)
    if not found:
        raise ValueError(
            f"{attempts} responses to each of {len(questions)} questions: no second step where "
            "some are right and some wrong; try --attempts 1 (all questions), another --steps or "
            "--temperature"
        )
    found = list(found.values())
    chosen = np.random.default_rng(seed).permutation(len(found))[:states]
    points = [found[i] for i in chosen]

    prefixes = [r.prompt + r.response[:start] for _, r, start in points]
    left = [max_new_tokens - start for _, _, start in points]
    groups = rollout.generate(
        model, prefixes, n=alternatives, max_new_tokens=left, seed=seed + 1, **generation
    )
    families = []
    for (question, r, start), group in zip(tuple(points), groups):
        nexts = {}
        for g in group:
            whole = rollout.Rollout(r.prompt, r.response[:start] + g.response, [], g.finished)
            later = [s for s in starts(whole) if s > start]
            if later:
                nexts[tuple(whole.response[: later[0]])] = question, whole, later[0]
        families.append(range(len(points), len(points) + len(nexts)))
        points += nexts.values()
    return points, families


def right_rankings(truth, error, estimate, families):
    """Share of the pairs of alternatives that `estimate` ranks as `truth` does, a tie being half
    right, and how many pairs: those whose truths differ by more than 2 standard errors, `error`.
    The order of the others is not known."""
    right = []
    for family in families:
        for i, j in itertools.combinations(family, 2):
            if abs(truth[i] - truth[j]) > 2 * np.hypot(error[i], error[j]):
                agree = np.sign((truth[i] - truth[j]) * (estimate[i] - estimate[j]))
                right.append(0.5 + 0.5 * agree)
    return float(np.mean(right)) if right else float("nan"), len(right)


def compare_values(
    model, tokenizer, questions, prompts, *, critic=None, attempts=8, states=64, alternatives=5,
    truth=256, mc_rollouts=9, style="lines", max_new_tokens=256, seed=0, **generation,
):  # fmt: skip
    """Values by `truth` rollouts against those by K others, and the critic's. Returns the true
    values (states,), and a dict: estimator -> its values (states,), correlation, mean absolute
    error, share of right rankings, pairs."""
    import eval as evaluation
    import ppo
    import rollout
    import vineppo

    engine = rollout.Engine(model)
    generation |= {"max_new_tokens": max_new_tokens, "seed": seed}
    points, families = sample_states(
        model, tokenizer, questions, prompts, attempts=attempts, states=states,
        alternatives=alternatives, style=style, **generation,
    )  # fmt: skip
    rewards = vineppo.state_rewards(
        engine, tokenizer, points, n=truth + mc_rollouts, score=evaluation.rewards, **generation
    )
    rewards = np.array(rewards)  # (points, truth + K): no rollout is in both
    true, fresh = rewards[:, :truth].mean(1), rewards[:, truth:]
    standard_error = rewards[:, :truth].std(1) / truth**0.5
    few = sorted({k for k in (1, 3, mc_rollouts) if k <= mc_rollouts})
    estimates = {f"MC, K={k}": fresh[:, :k].mean(1) for k in few}
    if critic is not None:
        rollouts = [r for _, r, _ in points]
        # one value a token: of the state in which it was chosen
        token_values = ppo.rollout_values(critic, rollouts, update_settings())
        of_points = [float(v[start]) for v, (_, _, start) in zip(token_values, points)]
        estimates["critic"] = np.array(of_points)
    table, count = {}, len(families)
    for name, estimate in estimates.items():
        x, y = true[:count], estimate[:count]
        right, pairs = right_rankings(true, standard_error, estimate, families)
        varied = np.ptp(x) > 0 and np.ptp(y) > 0
        table[name] = {
            "values": y,
            "correlation": np.corrcoef(x, y)[0, 1] if varied else float("nan"),
            "error": np.abs(x - y).mean(),
            "right": right,
            "pairs": pairs,
        }
    return true[:count], table


def draw_values(true, table, out):
    from matplotlib.figure import Figure

    shown = list(table)[-2:] if "critic" in table else list(table)[-1:]
    figure = Figure(figsize=(4.5 * len(shown), 4.5))
    axes = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for ax, name in zip(axes, shown):
        ax.plot([0, 1], [0, 1], color="gray", linewidth=1)
        ax.scatter(true, table[name]["values"], s=18, alpha=0.6)
        ax.set(title=f"{name}: correlation {table[name]['correlation']:.2f}")
        ax.set_xlabel("true value of the state")
    axes[0].set_ylabel("estimate")
    save(figure, out)


# --------------------------------------------------------------------------- the command line


def add_flags(command, add):
    """The flags of one command."""
    if command == "values":
        return add_values_flags(add)
    add("--runs", default="runs/experiments", help="where the runs are kept")
    add("--out", default="runs/experiments", help="where the figures go")
    if command == "learners":
        add("--model", help="the model they start from (default: the tiny base)")
    if command == "words":
        add("--model", required=True, help="the pretrained model's folder, or its hub id")
        add("--data", required=True, help="folder of demos.jsonl, train.jsonl and test.jsonl")
        add(
            "--arms",
            nargs="+",
            default=["grpo-uniform", "grpo-posterior", "grpo-sfl"],
            metavar="ALGO-CURRICULUM",
            help='flags may follow, as in "grpo-uniform --lr 2e-5"',
        )
    if command == "gradients":
        add("--task", default="arithmetic", choices=list(TASKS))
    if command == "parity":
        add("--bits", type=int, default=24, help="of a question (24)")
    if command in ("cost", "theory", "spend"):
        return add("--model", help="a run's or a model's folder (default: the tiny base)")
    add("--seeds", type=int, default=3)
    add("--workers", type=int, default=2, help="runs at a time, one thread each")
    if command in ("tune", "curricula"):
        add("--algos", nargs="+", default=["grpo"])
    if command in ("tune", "curricula", "map"):
        arms = ["uniform", "sfl", "greso", "posterior"] if command == "map" else list(CURRICULA)
        add("--arms", nargs="+", default=arms, choices=list(CURRICULA), metavar="ARM")
    if command == "tune":
        add("--lrs", nargs="+", default=["1e-4", "2e-4", "4e-4"], help="of the policy")
    if command == "credit":
        add("--arm", default="uniform", choices=list(CREDIT))


def add_values_flags(add):
    add("--model", required=True, help="a run's folder (with its critic, if any), or a model's")
    add("--states", type=int, default=64, help="intermediate states to compare at (64)")
    add("--attempts", type=int, default=8, help="responses a question; states come from those that "
        "are right at times, not always; 1: from all (8)")  # fmt: skip
    add("--truth", type=int, default=256, help="rollouts that make a state's true value (256)")
    add("--mc_rollouts", type=int, default=9, help="rollouts that make an estimate (9)")
    add("--alternatives", type=int, default=5, help="next steps from each state, to be ranked (5)")
    add("--split", default="test", help="of the questions the states come from (test)")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--seed", type=int, default=0)
    add("--out", default="values.png", help="the scatter plot (values.png)")
    run = "by default what the run used"
    add("--dataset", help=f"names or a path; {run}")
    add("--data_dir", "--data-dir", help=f"a folder with the named data set's files; {run}")
    add("--chat", help=f"prompt through the chat template: auto, on, off; {run}")
    add("--steps", choices=["lines", "math"], help=f"how responses are cut; {run}")
    add("--temperature", type=float, help=f"of all sampling; {run}")
    add("--top_p", type=float, help=f"of all sampling; {run}")
    add("--max_new_tokens", type=int, help=f"longest response, in tokens; {run}")


COMMANDS = (tune, curricula, map_of_shares, foresight, credit, gradients, learners, parity, words)
COMMANDS += (cost, spend, theory, values)


def parse(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        name = command.__name__.partition("_")[0]
        subparser = commands.add_parser(name, description=command.__doc__)
        add_flags(name, subparser.add_argument)
        subparser.set_defaults(run=command)
    end = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:end])
    args.flags = argv[end + 1 :]  # for all runs of sfl.py
    return args


def main(argv=None):
    args = parse(argv)
    args.run(args)


if __name__ == "__main__":
    arguments = parse()  # first: --help need not wait for the imports
    from plumbing import commands

    commands.command_line(lambda: arguments.run(arguments))
