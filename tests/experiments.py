"""The README's experiments on the arithmetic task, each one command; runs that are already there are not run again.

    python tests/experiments.py tune          # uniform's learning rate, chosen before the curricula are compared
    python tests/experiments.py curricula     # uniform, its compute-matched forms, sfl, lilo, posterior; ppo and grpo
    python tests/experiments.py credit        # ppo, vineppo and grpo on the same curriculum
    python tests/experiments.py cost          # an iteration of ppo, vineppo, vineppo --mc_reuse: seconds and tokens
    python tests/experiments.py theory        # improvement after one small step on a question against its learnability

Flags after `--` go to every run of sfl.py. An arm's runs differ in --seed alone. The goal is the final accuracy of the first arm (mean of its seeds over the last three
evaluations), and 9/10 is nine tenths of the way there; what an arm needed is read where the mean of three evaluations in a row
first reaches it. Tokens and seconds count everything but evaluation: scoring, rollouts, credit, update. "learnable": the share
of the training questions that some but not all responses solved. Tables go to stdout, figures to --out.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import eval as evaluation  # noqa: E402

EVERY = ["--eval_every", "2", "--save_every", "1000000"]
CURRICULA = {
    "uniform": ["--curriculum", "uniform"],
    "uniform, 4x questions": ["--curriculum", "uniform", "--questions", "128", "--minibatch", "1024"],
    "uniform, 4x rollouts": ["--curriculum", "uniform", "--rollouts", "32", "--minibatch", "1024"],
    "sfl": ["--curriculum", "sfl"],
    "lilo": ["--curriculum", "lilo"],
    "posterior": ["--curriculum", "posterior"],
}


def execute(jobs, workers):
    """jobs: {folder: flags of sfl.py}. Runs those that are not complete, `workers` at a time, a thread each."""
    def one(folder, flags):
        if (folder / "evaluation.json").exists() and "after" in json.loads((folder / "evaluation.json").read_text()):
            return
        how = ["--resume", str(folder)] if (folder / "config.json").exists() else ["--out", str(folder), *EVERY, *flags]
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{folder}.log", "w") as log:
            done = subprocess.run([sys.executable, str(ROOT / "sfl.py"), *how], stdout=log, stderr=subprocess.STDOUT,
                                  env=os.environ | {"OMP_NUM_THREADS": "1"})
        print(f"{'done' if done.returncode == 0 else 'FAILED: see ' + log.name}  {folder}", flush=True)
    with ThreadPoolExecutor(workers) as pool:
        for result in [pool.submit(one, folder, flags) for folder, flags in jobs.items()]:
            result.result()


def curve(folder):
    """Evaluations of a run, the starting model's first: arrays iteration, tokens, seconds, accuracy."""
    before = json.loads((folder / "evaluation.json").read_text())["before"]["greedy"]["accuracy"]
    rows = [row for row in evaluation.read_run(folder) if row.get("eval_accuracy") is not None]
    return {"iteration": np.array([0] + [row["iteration"] for row in rows]),
            "tokens": np.array([0] + [row["tokens"] for row in rows]),
            "seconds": np.array([0] + [row["seconds"] for row in rows]),
            "accuracy": np.array([before] + [row["eval_accuracy"] for row in rows]),
            "learnable": np.mean([row["learnable"] for row in evaluation.read_run(folder)])}


def smooth(accuracy):
    return np.array([accuracy[max(0, i - 1) : i + 2].mean() for i in range(len(accuracy))])


def reached(run, goal, what):
    """What the run had spent when its smoothed accuracy first reached the goal; None if it never did."""
    hits = np.flatnonzero(smooth(run["accuracy"]) >= goal)
    return run[what][hits[0]] if len(hits) else None


def spread(values, digits=0):
    """'mean +- sample sd', and how many seeds got there at all."""
    there = [v for v in values if v is not None]
    if not there:
        return "never"
    sd = np.std(there, ddof=1) if len(there) > 1 else float("nan")
    text = f"{np.mean(there):.{digits}f} ± {sd:.{digits}f}"
    return text if len(there) == len(values) else f"{text} ({len(there)}/{len(values)})"


def compare(title, arms, out):
    """arms: {name: [run folder, ...]}. Prints a Markdown table; draws accuracy against iterations, tokens and seconds."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    runs = {name: [curve(folder) for folder in folders] for name, folders in arms.items()}
    first = next(iter(runs.values()))
    goal = np.mean([run["accuracy"][-3:].mean() for run in first])
    start = first[0]["accuracy"][0]
    most = start + 0.9 * (goal - start)
    print(f"\n{title}: {len(first)} seeds. Goal: {goal:.3f}, the final accuracy of `{next(iter(runs))}`; it starts at {start:.3f}, and "
          f"{most:.3f} is nine tenths of the way.\n")
    print("| arm | final accuracy | iterations to the goal | iterations to 9/10 | 1,000 tokens to 9/10 | time to 9/10 | learnable |")
    print("|---|---|---|---|---|---|---|")
    unit = np.mean([s for run in first if (s := reached(run, most, "seconds"))])  # machines differ: times are ratios to the first arm
    for name, group in runs.items():
        final = spread([run["accuracy"][-3:].mean() for run in group], 3)
        whole = spread([reached(run, goal, "iteration") for run in group])
        near = {what: [reached(run, most, what) for run in group] for what in ("iteration", "tokens", "seconds")}
        tokens = spread([None if t is None else t / 1000 for t in near["tokens"]])
        relative = spread([None if t is None else t / unit for t in near["seconds"]], 2)
        learnable = np.mean([run["learnable"] for run in group])
        print(f"| {name} | {final} | {whole} | {spread(near['iteration'])} | {tokens} | {relative} | {learnable:.0%} |")
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), sharey=True)
    for ax, what, scale in zip(axes, ("iteration", "tokens", "seconds"), (1, 1e-3, 1)):
        for color, (name, group) in zip(evaluation.COLORS, runs.items()):
            length = min(len(run["accuracy"]) for run in group)
            x = np.mean([run[what][:length] for run in group], 0) * scale
            y = np.array([smooth(run["accuracy"])[:length] for run in group])
            ax.plot(x, y.mean(0), color=color, label=name, linewidth=1.8)
            ax.fill_between(x, y.min(0), y.max(0), color=color, alpha=0.15, linewidth=0)
        ax.axhline(goal, color="#999999", linewidth=0.8, linestyle=":")
        ax.set_xlabel({"iteration": "iteration", "tokens": "1,000 tokens generated, scoring included", "seconds": "seconds"}[what])
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("held-out accuracy")
    axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"{title} (mean and range of {len(first)} seeds)", fontsize=10)
    figure.tight_layout()
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=140)
    print(f"\nwrote {out}")


def cost(model, runs, repeats=3):
    """Seconds and tokens of an iteration of PPO and VinePPO from one checkpoint, on one thread, in alternating runs."""
    arms = {"ppo": ["--algo", "ppo"], "vineppo": ["--algo", "vineppo"], "vineppo --mc_reuse": ["--algo", "vineppo", "--mc_reuse"]}
    common = ["--curriculum", "uniform", "--model", str(Path(model, "model") if Path(model, "model").exists() else model),
              "--iterations", "6", "--eval_limit", "32", "--lr", "0"]
    seconds, rows = {name: [] for name in arms}, {}
    for repeat in range(repeats):
        for name, flags in arms.items():
            folder = runs / f"cost-{name.replace(' --', '-')}-{repeat}"
            execute({folder: [*common, *flags, "--seed", str(repeat)]}, 1)
            rows[name] = evaluation.read_run(folder)[1:]  # the first iteration warms up
            seconds[name].append(np.mean([sum(row[key] for key in evaluation.SECONDS) for row in rows[name]]))
    print("| an iteration of | time, ppo = 1: min / median / max | tokens generated | of them for credit | prefilled for "
          "credit | had each rollout its own prefill |\n|---|---|---|---|---|---|")
    for name in arms:
        ratios = np.array(seconds[name]) / seconds["ppo"]
        mean = {key: np.mean([row.get(key, 0) for row in rows[name]])
                for key in ("tokens_generated", "tokens_credit", "tokens_credit_prefilled", "tokens_credit_prompted")}
        print(f"| {name} | {ratios.min():.2f} / {np.median(ratios):.2f} / {ratios.max():.2f} | "
              f"{mean['tokens_generated'] + mean['tokens_credit']:,.0f} | {mean['tokens_credit']:,.0f} | "
              f"{mean['tokens_credit_prefilled']:,.0f} | {mean['tokens_credit_prompted']:,.0f} |")


def theory(model, out, questions=72, rollouts=384, lr=0.0003, seed=0):
    """LILO's theorem on real steps. From one checkpoint, for each question alone: the policy gradient of its success from
    `rollouts` responses, one small step of plain gradient ascent, and the change of its success, measured on as many other
    responses drawn before the step: E[(ratio - 1)(R - p)], ratio = new / old probability of the response (its
    expectation is the exact change, and it has far less variance than counting successes again)."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import torch
    from tqdm import tqdm

    import ppo
    import sfl
    from rollout import generate
    policy, tokenizer = evaluation.load_model(model)
    pool = evaluation.load_questions("arithmetic", "train", limit=600, seed=seed)
    prompts, stops = evaluation.encode_prompts(tokenizer, pool), evaluation.stop_ids(policy, tokenizer)

    def attempt(indices, n, seed):
        groups = generate(policy, [prompts[i] for i in indices], n=n, max_new_tokens=96, stop_ids=stops, seed=seed)
        return groups, evaluation.rewards(tokenizer, [pool[i] for i in indices], groups)
    score = sfl.learnability(attempt(range(len(pool)), 16, seed)[1].sum(1), 16)
    rng, values = np.random.default_rng(seed), np.unique(score)  # evenly over learnability: most questions have none
    chosen = np.concatenate([rng.permutation(np.flatnonzero(score == v))[: questions // len(values)] for v in values])
    weights = [p.detach().clone() for p in policy.parameters()]
    x, y = [], []
    for number, i in enumerate(tqdm(chosen, desc="theory", unit="question")):
        (group, other), rewards = zip(*((g[0], r[0]) for g, r in (attempt([i], rollouts, seed + 1 + 2 * number + k) for k in (0, 1))))
        p = np.concatenate(rewards).mean()
        policy.zero_grad()
        for part in ppo.microbatches(group, 4096):
            logprob = torch.stack([piece.sum() for piece in ppo.response_logprobs(policy, [group[j] for j in part], 1.0).split(
                [len(group[j].response) for j in part])])
            advantage = torch.tensor(rewards[0][part] - rewards[0].mean())
            (-(advantage * logprob).sum() / rollouts).backward()
        old = torch.stack([v.sum() for v in ppo.rollout_logprobs(policy, other)])
        with torch.no_grad():
            for weight in policy.parameters():
                weight -= lr * weight.grad
        new = torch.stack([v.sum() for v in ppo.rollout_logprobs(policy, other)])
        y.append(float((((new - old).exp() - 1) * torch.tensor(rewards[1] - rewards[1].mean())).mean()))
        x.append(p * (1 - p))
        with torch.no_grad():
            for weight, start in zip(policy.parameters(), weights):
                weight.copy_(start)
    x, y, level = np.array(x), np.array(y), np.array([pool[i].level for i in chosen])
    figure, ax = plt.subplots(figsize=(4.8, 3.6))
    for name, here, color in (("all", level > 0, None), ("one step", level == 1, "#D55E00"), ("several steps", level > 1, "#0072B2")):
        picks = np.random.default_rng(0).integers(0, here.sum(), (2000, here.sum()))
        low, high = np.nanpercentile([np.corrcoef(x[here][p], y[here][p])[0, 1] for p in picks], [2.5, 97.5])
        ranks = [np.argsort(np.argsort(v[here])) for v in (x, y)]
        print(f"{name:<14} {here.sum():3d} questions: correlation of the improvement with p(1 - p) {np.corrcoef(x[here], y[here])[0, 1]:.2f} "
              f"(95% bootstrap {low:.2f} to {high:.2f}), of their ranks {np.corrcoef(*ranks)[0, 1]:.2f}")
        if color:
            slope = (x[here] @ y[here]) / (x[here] @ x[here])
            ax.scatter(x[here], y[here], s=14, color=color, label=name)
            ax.plot([0, x[here].max()], [0, slope * x[here].max()], color=color, linewidth=1)
    print(f"({rollouts} + {rollouts} responses to each, step {lr})")
    ax.set(xlabel="learnability p(1 - p) before the step", ylabel="improvement in p", title="one small step on one question")
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(out, dpi=140)
    print(f"wrote {out}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("tune", "curricula", "credit", "cost", "theory"))
    parser.add_argument("--algos", nargs="+", default=["ppo", "grpo"])
    parser.add_argument("--arms", nargs="+", default=list(CURRICULA), help="of the curricula")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lrs", nargs="+", default=["1e-4", "2e-4", "4e-4"], help="tune: learning rates of the policy")
    parser.add_argument("--model", help="theory, cost: a run or model (default: the tiny base)")
    parser.add_argument("--runs", default="runs/experiments", help="where the runs are kept")
    parser.add_argument("--out", default="runs/experiments", help="where the figures go")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)  # what follows is for all runs of sfl.py
    args, flags = parser.parse_args(sys.argv[1:end]), sys.argv[end + 1 :]
    import sft
    base = str(sft.tiny_base("runs/cache"))
    runs, out = Path(args.runs), Path(args.out)
    if args.what == "theory":
        theory(args.model or base, out / "theory.png")
        return
    if args.what == "cost":
        cost(args.model or base, runs)
        return
    groups = {}  # title -> {arm: flags}
    for algo in args.algos:
        if args.what == "tune":
            groups[f"{algo}-lr"] = {f"lr {lr}": ["--algo", algo, "--curriculum", "uniform", "--lr", lr] for lr in args.lrs}
        elif args.what == "curricula":
            groups[algo] = {name: ["--algo", algo, *CURRICULA[name]] for name in args.arms}
    if args.what == "credit":
        groups["credit"] = {algo: ["--algo", algo, "--curriculum", "uniform"] for algo in ("ppo", "vineppo", "grpo")}
    places = {}
    for group, arms in groups.items():
        for arm in arms:  # credit's runs are the curricula's uniform ones
            name = f"{arm}-uniform" if group == "credit" else f"{group}-{arm.replace(', ', '-').replace(' ', '-')}"
            places[group, arm] = [runs / f"{name}-seed{seed}" for seed in range(args.seeds)]
    execute({folder: [*groups[group][arm], *flags, "--seed", str(seed)] for seed in range(args.seeds)
             for (group, arm), folders in places.items() for folder in [folders[seed]]}, args.workers)
    for group, arms in groups.items():
        compare(group, {arm: places[group, arm] for arm in arms}, out / f"{group}.png")


if __name__ == "__main__":
    main()
