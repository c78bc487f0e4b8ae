"""What was measured: tables for the terminal, and a picture of one or more training runs.

    python eval.py --plot runs/uniform runs/sfl --out curves.png         # a colour a run

The picture shows what metrics.jsonl holds: accuracy against iterations, tokens and seconds, and
below it what tells a healthy run from a sick one.
"""

import json
from pathlib import Path

import numpy as np

from plumbing.commands import first_line
from plumbing.rows import read_rows


def table(columns):
    """What the commands print: {heading: what `evaluate` returned}, by difficulty."""

    def line(label, count, cells):
        errors = ["?    " if se is None else f"{se:.3f}" for _, se in cells]
        cells = [f"{mean:9.3f} ± {error}" for (mean, _), error in zip(cells, errors)]
        return f"{label!s:<10}{count:>10}" + " ".join(cells)

    results = list(columns.values())
    first = results[0]
    lines = ["level      questions" + " ".join(f"{heading:>17}" for heading in columns)]
    lines.append(line("all", first["n"], [(r["accuracy"], r["accuracy_se"]) for r in results]))
    rows = zip(first["by_level"], *(r["by_level"].values() for r in results))
    for level, *cells in rows:
        lines.append(line(level, cells[0]["n"], [(c["accuracy"], c["se"]) for c in cells]))
    lengths = " ".join(f"{r['response_length']:17.1f}" for r in results)
    lines.append(f"{'tokens':<20}{lengths}")
    for name in results[-1]:
        if "@" in name and not name.endswith("_se"):
            cell = line("", "", [(results[-1][name], results[-1][name + "_se"])]).strip()
            lines.append(f"{name:<20}{cell:>{18 * len(results) - 1}}")
    return "\n".join(lines)


def summary(out, before, after):
    """What the command prints in the end."""
    lines = ["", table({"before": before["greedy"], "after": after["greedy"]})]
    responses = before["greedy"]["responses"], after["greedy"]["responses"]
    for pair in zip(*responses):
        lines += ["", f"question: {pair[0]['question'].strip()}   (answer: {pair[0]['answer']})"]
        for when, example in zip(("before", "after"), pair):
            lines.append(f"  {when}, reward {example['reward']:.0f}")
            lines += [f"    {line}" for line in example["response"].splitlines()]
    lines += ["", f"model    {out / 'model'}", f"metrics  {out / 'metrics.jsonl'}"]
    return "\n".join([*lines, f"look at  python eval.py --plot {out}"])


def earlier_results(against, file):
    """The results in an evaluation's JSON, or in the one of that name in a run's folder."""
    path = Path(against, file) if Path(against).is_dir() else Path(against)
    try:
        return json.loads(path.read_text())["results"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"no evaluation in {path} ({first_line(error)})"
        raise ValueError(
            f"--against {against}: {reason}: run eval.py --model on it first"
        ) from error


COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe-Ito
SECONDS = ("seconds_score", "seconds_rollout", "seconds_credit", "seconds_update")
TOKENS = ("tokens_generated", "tokens_scored", "tokens_credit")
# What stands in the picture: a metric, against what was spent
PANELS = """
eval_accuracy    iteration   held-out accuracy
eval_accuracy    tokens      held-out accuracy
eval_accuracy    seconds     held-out accuracy
learnable        iteration   questions solved by some
solved_by_all    iteration   questions solved by all
solved_by_none   iteration   questions solved by none
reward_mean      iteration   mean reward
response_length  iteration   response length, tokens
truncated        iteration   truncated responses
entropy          iteration   entropy a token
kl               iteration   KL to the start, a token
clip_fraction    iteration   clipped tokens
grad_norm        iteration   gradient norm
lr               iteration   learning rate
explained_variance  iteration  critic: explained variance
"""
PANELS = [line.split(None, 2) for line in PANELS.strip().splitlines()]


def read_run(folder):
    """The rows of a run's metrics.jsonl; to each is added what was spent until then: tokens,
    seconds."""
    path = Path(folder, "metrics.jsonl")
    if not path.exists():
        raise ValueError(f"{folder} holds no metrics.jsonl: give a folder that sfl.py --out wrote")
    rows = []
    tokens, seconds = 0, 0.0
    numbers = {"iteration", *SECONDS, *TOKENS, *(key for key, _, _ in PANELS)}
    for where, row in read_rows(path):
        for key in numbers & row.keys() | {"iteration"}:
            if not isinstance(row.get(key), (int, float)):
                raise ValueError(f"{where}: no number in the field {key!r}")
        tokens += sum(row.get(key, 0) for key in TOKENS)
        seconds += sum(row.get(key, 0) for key in SECONDS)
        rows.append({**row, "tokens": tokens, "seconds": seconds})
    return rows


def plot(runs, out):
    """Draw what runs looked like and save a PNG: a colour a run; faint: iterations, bold: smoothed.
    Of a single run also its frontier: which questions were solved when."""
    from matplotlib.figure import Figure  # not pyplot: it needs no screen
    from matplotlib.ticker import EngFormatter

    curves = [read_run(run) for run in runs]
    names = [Path(run).resolve().name for run in runs]
    names = [str(run) if names.count(name) > 1 else name for run, name in zip(runs, names)]
    shown = [panel for panel in PANELS if any(panel[0] in row for rows in curves for row in rows)]
    if not shown:
        raise ValueError(f"{', '.join(names)}: nothing to draw yet: wait for an iteration")
    lines = -(-len(shown) // 3)
    figure = Figure(figsize=(10, 2.1 * lines + 3.5 * (len(runs) == 1)))
    grid = figure.add_gridspec(lines + 2 * (len(runs) == 1), 3)
    for i, (key, spent, label) in enumerate(shown):
        ax = figure.add_subplot(grid[i // 3, i % 3])
        for number, rows in enumerate(curves):
            points = [(row[spent], row[key]) for row in rows if key in row]
            points = np.array(points, float).reshape(-1, 2)
            color = COLORS[number % len(COLORS)]
            style = {"color": color, "linestyle": ("-", "--", ":")[number // len(COLORS) % 3]}
            if key != "eval_accuracy":  # measured at every iteration: noisy
                ax.plot(*points.T, color=color, alpha=0.2, linewidth=0.8)
                points[:, 1] = smooth(points[:, 1], max(1, len(points) // 20))
            ax.plot(*points.T, label=names[number], linewidth=1.5, **style)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(length=2, labelsize=7)
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
        ax.set_xlabel(spent, fontsize=8)
        ax.set_title(label, fontsize=9)
        if i == 0:
            handles = ax.get_legend_handles_labels()
    if len(runs) == 1:
        draw_frontier(figure.add_subplot(grid[lines:, :]), curves[0])
    figure.legend(*handles, loc="upper center", ncols=min(4, len(runs)), frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.97 - 0.02 * ((len(runs) - 1) // 4)))
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)


def draw_frontier(ax, rows):
    """Questions, by difficulty, against iterations: what their samples showed, and (larger) which
    were trained on. A level's questions are spread over its band."""
    groups = [(row["iteration"], *group) for row in rows for group in row.get("sampled", [])]
    levels = sorted({group[2] for group in groups}, key=lambda level: (str(type(level)), level))
    band = {level: i for i, level in enumerate(levels)}
    trained = {(row["iteration"], i) for row in rows for i in row.get("trained", [])}
    jitter = np.random.default_rng(0).random
    place = {question: jitter() for question in {group[1] for group in groups}}
    for color, label in (("#CCCCCC", "never"), ("#D55E00", "sometimes"), ("#0072B2", "always")):
        points = []
        for iteration, question, level, successes, attempts in groups:
            share = successes / attempts
            found = "never" if share == 0 else "always" if share == 1 else "sometimes"
            if found == label:
                size = 9 if (iteration, question) in trained else 1.5
                points.append((iteration, band[level] + 0.9 * place[question], size))
        x, y, sizes = np.array(points).reshape(-1, 3).T
        ax.scatter(x, y, s=sizes, c=color, label=label, linewidths=0)
    ax.set_yticks(np.arange(len(levels)) + 0.45, levels)
    ax.tick_params(length=2, labelsize=7)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_xlabel("iteration", fontsize=8)
    ax.set_title("training questions by level: solved by their responses", fontsize=9)
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=8)


def smooth(values, reach):
    """The mean of each value and its neighbours, `reach` on either side."""
    return [values[max(0, t - reach) : t + reach + 1].mean() for t in range(len(values))]
