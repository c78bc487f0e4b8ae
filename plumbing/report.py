"""What was measured: tables for the terminal, a run's log and alarms, a picture of runs.

    python eval.py --plot runs/uniform runs/sfl --out curves.png         # a colour a run

The picture shows what metrics.jsonl holds: accuracy against iterations, tokens and seconds, and
below it what tells a healthy run from a sick one.
"""

import json
import math
import shlex
import sys
import zlib
from pathlib import Path

import numpy as np
from tqdm import tqdm

from plumbing.commands import first_line
from plumbing.files import read_rows
from plumbing.processes import rank

# --------------------------------------------------------------------------- tables


def table(results):
    """{heading: what `evaluate` returned} as text: a column each, a line for each level."""
    columns = list(results.values())
    text = ["level      questions" + " ".join(f"{heading:>17}" for heading in results)]

    def add_line(label, count, measured, name="accuracy"):
        cells = " ".join(mean_and_error(one, name) for one in measured)
        text.append(f"{label!s:<11}{count:>9}{cells}")

    add_line("all", columns[0]["n"], columns)
    # By position, not by key: levels that were read from JSON have become text.
    levels = zip(*(column["by_level"].values() for column in columns))
    for level, measured in zip(columns[0]["by_level"], levels):
        add_line(level, measured[0]["n"], measured)
    # Greedy columns have no measures of several samples.
    for name in columns[-1]:
        if "@" in name and not name.endswith("_se"):
            add_line(name, "", columns, name)
    # Runs of old have no lenient accuracy.
    if any(c.get("accuracy_lenient", c["accuracy"]) != c["accuracy"] for c in columns):
        add_line("last number", "", columns, "accuracy_lenient")
    lengths = " ".join(f"{column['response_length']:17.1f}" for column in columns)
    return "\n".join([*text, f"{'tokens':<20}{lengths}"])


def mean_and_error(measured, name):
    if name not in measured:
        return " " * 17
    error = measured.get(f"{name}_se", measured.get("se"))
    return f"{measured[name]:9.3f} ± " + ("?    " if error is None else f"{error:.3f}")


def summary(out, before, after):
    """What sfl.py prints in the end: the table, some responses before and after, what to do."""
    before, after = before["greedy"], after["greedy"]
    lines = ["", table({"before": before, "after": after})]
    for pair in zip(before["responses"], after["responses"]):
        lines += ["", f"question: {pair[0]['question'].strip()}   (answer: {pair[0]['answer']})"]
        for when, example in zip(("before", "after"), pair):
            lines.append(f"  {when}, reward {example['reward']:.0f}")
            lines += [f"    {line}" for line in example["response"].splitlines()]
    lines += ["", f"model    {out / 'model'}", f"metrics  {out / 'metrics.jsonl'}"]
    lines.append(f"look at  python eval.py --plot {shlex.quote(str(out))}")
    return "\n".join(lines)


# --------------------------------------------------------------------------- --against


def fingerprint(questions):
    return zlib.crc32("".join(q.prompt + q.answer for q in questions).encode())


def earlier_results(against, file):
    """The results in an evaluation's JSON, or in the one of that name in a run's folder."""
    path = Path(against)
    if path.is_dir():
        path /= file
    try:
        return dict(json.loads(path.read_text())["results"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"no evaluation in {path} ({first_line(error)})"
        raise ValueError(f"--against {against}: {reason}: make one by eval.py --model") from error


def check_earlier(earlier, name, measures, questions):
    """ValueError: these `earlier_results` cannot be compared with measures of these questions."""
    for measure in measures:
        before = earlier.get(name, {}).get(measure)
        if before is None:
            raise ValueError(f"--against holds no {measure} of {name}: evaluate that model on it")
        if before["fingerprint"] != fingerprint(questions):
            raise ValueError("--against: those were other questions: take the same --limit, --seed")


def compare(first, second, draws=10_000):
    """Is `first` better than `second` on the same questions? Both: what `evaluate` returned.
    Returns (mean difference, its 95 % interval, p)."""
    rng = np.random.default_rng(0)
    difference = np.array(first["success"]) - np.array(second["success"])  # (questions,)
    size = len(difference)
    # The interval is a paired bootstrap: means over questions drawn with replacement.
    means = [rng.choice(difference, size).mean() for _ in range(draws)]
    interval = np.quantile(means, (0.025, 0.975))
    # p: were both equally good, each difference's sign would be a coin flip. How often is the mean
    # of such flips as far from 0 as ours? (For one response a question that is McNemar's test.)
    flips = [difference @ rng.choice((-1, 1), size) / size for _ in range(draws)]
    least = abs(difference.mean()) - 1e-12  # rounding is no difference
    extreme = (np.abs(flips) >= least).sum()
    return float(difference.mean()), interval, (extreme + 1) / (draws + 1)


def comparison(now, before):
    difference, (low, high), p = compare(now, before)
    interval = f"{difference:+.3f}, 95% interval {low:+.3f} to {high:+.3f}, p = {p:.4f}"
    return f"against {before['accuracy']:.3f}: {interval}"


# --------------------------------------------------------------------------- the log of a run


def shares(batch):
    """Shares of the questions that all their responses solved, none, or some."""
    success = batch.rewards.mean(1)  # (questions,)
    by_all, by_none = float((success == 1).mean()), float((success == 0).mean())
    some = float(((success > 0) & (success < 1)).mean())
    return {"solved_by_all": by_all, "solved_by_none": by_none, "learnable": some}


def of_candidates(batch):
    """What a curriculum logs of questions that were sampled in order to choose."""
    successes = np.rint(batch.rewards.sum(1)).astype(int)
    histogram = np.bincount(successes, minlength=batch.rewards.shape[1] + 1).tolist()
    logged = {f"pool_{name}": share for name, share in shares(batch).items()}
    return {"pool": len(batch.questions), **logged, "pool_histogram": histogram}


def tokens_of(batch):
    return sum(len(rollout.response) for group in batch.groups for rollout in group)


def metrics(pool, iteration, batch, rollouts, optimizer):
    """A line of metrics.jsonl, but for what the update and the evaluation add."""
    logprobs = np.concatenate([rollout.logprobs for rollout in rollouts])
    sampled = []  # [question, its level, successes, attempts]
    for sample in pool.sampled:
        for i, rewards in zip(sample.questions, sample.rewards):
            sampled.append([int(i), pool.questions[i].level, int(sum(rewards)), len(rewards)])
    tokens = tokens_of(batch)
    return {
        "iteration": iteration + 1,
        "reward_mean": float(batch.rewards.mean()),
        **shares(batch),
        "response_length": float(np.mean([len(r.response) for r in rollouts])),
        "grading_timeouts": len(pool.grading["judges"].timeouts),  # since the start
        "truncated": float(np.mean([not r.finished for r in rollouts])),
        "entropy": float(-logprobs.mean()),  # unbiased, where top-p truncates nothing
        "lr": optimizer.param_groups[0]["lr"],
        "seconds_rollout": batch.seconds,
        # What choosing the questions took besides: sampled, and not trained on.
        "seconds_score": sum(sample.seconds for sample in pool.sampled) - batch.seconds,
        "tokens_generated": tokens,
        # sampled to choose the questions and not trained on
        "tokens_scored": sum(map(tokens_of, pool.sampled)) - tokens,
        "sampled": sampled,
        "trained": batch.questions.tolist(),  # which of them were trained on
    }


def of_evaluation(result):
    """What the log has of an evaluation."""
    names = ("accuracy", "accuracy_se", "response_length")
    logged = {f"eval_{name}": result[name] for name in names}
    # Right if the last number counted: far above the accuracy, the policy lacks the format.
    return logged | {"eval_lenient": result["accuracy_lenient"]}


def shown(row, result):
    """What the progress bar says; result: of the latest evaluation, {} before it."""
    numbers = {"reward": row["reward_mean"], "learnable": row["learnable"]}
    numbers |= {"accuracy": result.get("accuracy", math.nan), "length": row["response_length"]}
    return {name: f"{number:.3g}" for name, number in numbers.items()}


class Log:
    """metrics.jsonl, a row an iteration; TensorBoard and Weights & Biases, where asked for; and
    what a row warns of, once each, on stderr. Of several processes only the first one writes."""

    def __init__(self, out, config):
        self.rows = []
        self.warned = set()
        self.tensorboard = self.wandb = None
        if rank() > 0:
            return
        self.file = (out / "metrics.jsonl").open("a")
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(out / "tensorboard")
        if config.wandb:
            import wandb

            self.wandb = wandb.init(project="sfl", name=out.name, config=vars(config))

    def __call__(self, row):
        if rank() > 0:
            return
        self.rows = [*self.rows[-9:], row]  # as many as `alarms` looks at
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
    if row.get("eval_lenient", 0) > row.get("eval_accuracy", 0) + 0.1:
        shares = f"{row['eval_accuracy']:.0%} of the held-out answers are right as they are marked"
        way_out = "show the format (sft.py), or --last_number"
        yield "format", f"{shares}, {row['eval_lenient']:.0%} as the last number: {way_out}"
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


# --------------------------------------------------------------------------- pictures

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe-Ito
SECONDS = ("seconds_score", "seconds_rollout", "seconds_credit", "seconds_update")
TOKENS = ("tokens_generated", "tokens_scored", "tokens_credit")
# A panel each, against the iterations; accuracy also against what it cost.
METRICS = ("learnable", "solved_by_all", "solved_by_none", "reward_mean", "response_length")
METRICS += ("truncated", "entropy", "kl", "clip_fraction", "grad_norm", "lr", "explained_variance")
PANELS = [("eval_accuracy", spent) for spent in ("iteration", "tokens", "seconds")]
PANELS += [(metric, "iteration") for metric in METRICS]


def read_run(folder):
    """The rows of a run's metrics.jsonl. To each is added what was spent until then: tokens,
    seconds."""
    path = Path(folder, "metrics.jsonl")
    if not path.exists():
        raise ValueError(f"{folder} holds no metrics.jsonl: give a folder that sfl.py --out wrote")
    rows = []
    tokens, seconds = 0, 0.0
    drawn = {*SECONDS, *TOKENS, *METRICS, "eval_accuracy"}
    for where, row in read_rows(path):
        for key in {"iteration", *(drawn & row.keys())}:
            if not isinstance(row.get(key), (int, float)):
                raise ValueError(f"{where}: no number in the field {key!r}")
        tokens += sum(row.get(key, 0) for key in TOKENS)
        seconds += sum(row.get(key, 0) for key in SECONDS)
        rows.append({**row, "tokens": tokens, "seconds": seconds})
    return rows


def plot(runs, out):
    """Save a PNG of what runs looked like: a colour a run; faint: iterations, bold: smoothed. Of a
    single run also its frontier: which questions were solved when."""
    from matplotlib.figure import Figure  # not pyplot: it needs no screen

    curves = {str(run): read_run(run) for run in runs}
    logged = {key for rows in curves.values() for row in rows for key in row}
    panels = [panel for panel in PANELS if panel[0] in logged]
    if not panels:
        raise ValueError(f"{', '.join(curves)}: nothing to draw yet: wait for an iteration")
    height = math.ceil(len(panels) / 3)  # in rows of three panels
    below = 2 if len(curves) == 1 else 0  # rows for the frontier
    figure = Figure(figsize=(10, 2.1 * height + 1.75 * below), layout="constrained")
    grid = figure.add_gridspec(height + below, 3)
    for i, (metric, spent) in enumerate(panels):
        ax = figure.add_subplot(grid[i // 3, i % 3])
        draw_curves(ax, curves, metric, spent)
    handles = figure.axes[0].get_legend_handles_labels()
    if below:
        draw_frontier(figure.add_subplot(grid[height:, :]), *curves.values())
    for ax in figure.axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(length=2, labelsize=7)
    figure.legend(*handles, loc="outside upper center", ncols=4, frameon=False)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)


def draw_curves(ax, curves, metric, spent):
    from matplotlib.ticker import EngFormatter

    for number, (run, rows) in enumerate(curves.items()):
        points = [(row[spent], row[metric]) for row in rows if metric in row]
        x, y = np.array(points, float).reshape(-1, 2).T
        color = COLORS[number % len(COLORS)]
        style = ("-", "--", ":")[number // len(COLORS) % 3]  # more runs than colours
        if metric != "eval_accuracy":  # measured at every iteration: noisy
            ax.plot(x, y, color=color, alpha=0.2, linewidth=0.8)
            reach = max(1, len(y) // 20)  # neighbours on either side that are averaged
            y = [y[max(0, t - reach) : t + reach + 1].mean() for t in range(len(y))]
        ax.plot(x, y, label=run, linewidth=1.5, color=color, linestyle=style)
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))  # 100k: longer numbers would overlap
    ax.set_xlabel(spent, fontsize=8)
    ax.set_title(metric.replace("_", " "), fontsize=9)


def draw_frontier(ax, rows):
    """Questions, by difficulty, against iterations: what their samples showed, and (larger) which
    were trained on. A level's questions are spread over its band."""
    levels = {level for row in rows for _, level, _, _ in row.get("sampled", [])}
    levels = sorted(levels, key=lambda level: (isinstance(level, str), level or 0))
    points = {"never": [], "sometimes": [], "always": []}
    for row in rows:
        for question, level, successes, attempts in row.get("sampled", []):
            solved = "always" if successes == attempts else "sometimes" if successes else "never"
            size = 9 if question in row.get("trained", []) else 1.5
            place = 0.9 * (0.618 * question % 1)  # golden ratio: spreads any run of numbers
            points[solved].append((row["iteration"], levels.index(level) + place, size))
    for label, color in zip(points, ("#CCCCCC", "#D55E00", "#0072B2")):
        x, y, sizes = np.array(points[label]).reshape(-1, 3).T
        ax.scatter(x, y, s=sizes, c=color, label=label, linewidths=0)
    ax.set_yticks(np.arange(len(levels)) + 0.45, levels)
    ax.set_xlabel("iteration", fontsize=8)
    ax.set_title("training questions by level: solved by their responses", fontsize=9)
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=8)
