"""When an answer is right, how good a model is, and what a run looked like.

    python eval.py --model runs/sfl                              # greedy accuracy, by difficulty
    python eval.py --model HUB_ID_OR_DIR --dataset gsm8k --samples 16    # + mean, pass@k, maj@16
    python eval.py --plot runs/uniform runs/sfl --out curves.png         # a colour a run

THE REWARD is 1 for the right final answer and 0 for anything else: no partial credit, no learned
judge. It reads the last answer that a response commits to. It is the part of the system that the
policy is paid to fool, so it is strict where leniency could be farmed:

    question 37+26-12 (mod 97), gold answer 51
    37+26=63\n63-12=51\n#### 51     1
    #### 51 or 52                   0   however right one of them is
    #### 63-12                      0   the question, said again
    37+26=63\n63-12=5               0   cut off by the length limit

Whatever text comes in, it is never executed and cannot hang the run.

THREE MEASURES, for c right among n samples of a question, averaged over questions, each with its
standard error:

    mean accuracy   c / n                         how often one sample is right
    pass@k          1 - C(n - c, k) / C(n, k)     is one of k samples right? Unbiased (Chen et al.
                                                  2021, arXiv 2107.03374, eq. 1)
    maj@n           is the most frequent answer right? (Wang et al. 2022, arXiv 2203.11171)
"""

import contextlib
import json
import math
import os
import queue
import re
import subprocess
import sys
import threading
import zlib
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import data
from data import braced, decode_response
from rollout import StopText, all_sum, generate, share

# --------------------------------------------------------------------------- when is it right?

# What announces an answer. Of several the LAST is the commitment, as in VinePPO and verl for ####
# and in Minerva for \boxed (lm-evaluation-harness takes the first ####): a model that corrects
# itself means its last word, and a list of guesses counts as one guess. On GSM8K this is the
# harness' strict match but for two things: it takes the first ####, and tells 18.0 from 18.
MARKER = re.compile(
    r"(?:####|\\(?:boxed|fbox)\s{0,3}\{|\banswer\s{0,3}(?:is\b(?!\s{0,3}not\b)|[:=])\s{0,3}:?)"
    r"\s{0,9}",
    re.I,
)
SENTENCE_END = re.compile(r"(?<!\\)[.!?](?=\s|$)|\n")  # not the \! of 1,\! 234
MARKERS_READ = 20  # with these bounds the time is linear in the length of the response
ANSWER_CHARS = 300


def final_answer(response, kind="number", last_number=False):
    """The text of the answer that a response commits to last, or None. A marker with no number
    behind it (for 'math': nothing) commits to nothing. last_number: where no marker does, take the
    last number; lenient, for other formats."""
    for marker in reversed(deque(MARKER.finditer(response), maxlen=MARKERS_READ)):
        window = response[marker.end() : marker.end() + ANSWER_CHARS]
        text = braced(window) if "{" in marker[0] else SENTENCE_END.split(window, maxsplit=1)[0]
        cut = len(text) >= ANSWER_CHARS - 1  # 18 of 1800 must not be read as 18
        if not cut and text.strip() and (kind == "math" or re.search("[0-9]", text)):
            return text.strip()
    if not last_number:
        return None
    end = 1 + max(response.rfind(digit) for digit in "0123456789")
    tail = response[max(0, end - 60) : end]
    number = re.search(r"(?:(?<![\w)])-)?[0-9.,]*[0-9](?:\s?/\s?[0-9.,]*[0-9])?$", tail)
    return number[0] if number and (number.start() > 0 or end <= 60) else None


def grade(response, question, *, last_number=False):
    """1.0 if the response's final answer equals the question's, else 0.0. No response makes it
    raise or hang. ValueError: a question that cannot be graded. last_number: see `final_answer`."""
    if question.kind not in ("number", "math"):
        raise ValueError(f"cannot grade kind {question.kind!r}: give 'number' or 'math'")
    answer, gold = final_answer(response, question.kind, last_number), question.answer
    if question.kind == "math":
        return float(answer is not None and same_math(gold, answer, question.question))
    if parse_number(gold) is None:
        raise ValueError(f"the gold answer {gold[:40]!r} is not a number: give kind='math'")
    return float(answer is not None and parse_number(answer) == parse_number(gold))


# --------------------------------------------------------------------------- how good is it?


def rewards(tokenizer, questions, rollouts, *, last_number=False):
    """One list of n `Rollout`s a question -> (questions, n) float32: 1 for a finished, right
    response, else 0. Graded in threads, as many as there are judges; several processes share."""
    graded = np.zeros((len(questions), max(map(len, rollouts), default=0)), np.float32)
    finished = []
    for i, (question, group) in enumerate(zip(questions, rollouts, strict=True)):
        for j, rollout in enumerate(group):
            if rollout.finished:
                finished.append((i, j, decode_response(tokenizer, rollout), question))

    def grade_one(entry):
        i, j, text, question = entry
        graded[i, j] = grade(text, question, last_number=last_number)

    if any(question.kind == "math" for question in questions):
        with ThreadPoolExecutor(judges.qsize()) as pool:
            list(pool.map(grade_one, share(finished)))
    else:
        for entry in share(finished):
            grade_one(entry)
    all_sum(torch.from_numpy(graded))  # in place
    return graded


def pass_at_k(right, n, k):
    """P(one of k samples is right) from `right` of n: 1 - C(n - c, k) / C(n, k) (Chen et al. 2021,
    eq. 1), in whole numbers of any size. The plug-in 1 - (1 - c/n)^k is biased low."""
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def majority(answers, graded):
    """Is the most frequent answer right? answers: hashable, None where a response gave none, which
    is no vote; graded: their rewards. A tie counts as the expectation of a random choice among the
    tied: the measure draws no numbers."""
    votes = Counter(answer for answer in answers if answer is not None)
    tied = [answer for answer, count in votes.items() if count == max(votes.values())]
    return sum(graded[answers.index(answer)] for answer in tied) / len(tied) if tied else 0.0


def evaluate(
    model, tokenizer, questions, *, samples=1, temperature=0.0, chat="auto", last_number=False,
    **generation,
):  # fmt: skip
    """Sample `samples` responses a question (by default one, greedy) and measure them. generation:
    what else `rollout.generate` takes. Returns a dict:

    n (questions), samples, accuracy and accuracy_se (each question's share of right samples,
    averaged: the error is clustered by question), by_level {level: {n, accuracy, se}},
    response_length (mean, tokens), finished (share), success (each question's share of right
    samples), fingerprint (of the questions), responses (a dict each); with several samples also
    mean_accuracy (= accuracy), pass@1, pass@2, pass@4 ... and maj@samples, each with its _se.
    ValueError: no questions, several greedy samples (all alike), what `generate` refuses."""
    check_evaluate(questions, samples, temperature)
    generation = {"stop_ids": data.stop_ids(model, tokenizer), "seed": 0, **generation}
    prompts = data.encode_prompts(tokenizer, questions, chat=chat)
    groups = generate(model, prompts, n=samples, temperature=temperature, **generation)
    graded = rewards(tokenizer, questions, groups, last_number=last_number)  # (questions, samples)
    success = graded.mean(1)
    responses = []
    majorities = []
    for i, (question, group) in enumerate(zip(questions, groups)):
        texts = [decode_response(tokenizer, rollout) for rollout in group]
        votes = [
            vote(final_answer(text, question.kind, last_number)) if rollout.finished else None
            for text, rollout in zip(texts, group)
        ]
        majorities.append(majority(votes, graded[i].tolist()))
        for text, rollout, reward in zip(texts, group, graded[i].tolist()):
            row = {"question": question.question or question.prompt, "answer": question.answer}
            row |= {"response": text, "finished": rollout.finished, "reward": reward}
            responses.append({**row, "tokens": len(rollout.response)})

    measures = {"accuracy": success}
    if samples > 1:
        measures["mean_accuracy"] = success
        for k in (2**i for i in range(samples.bit_length())):
            measures[f"pass@{k}"] = [pass_at_k(int(c), samples, k) for c in graded.sum(1)]
        measures[f"maj@{samples}"] = majorities
    result = {"n": len(questions), "samples": samples}
    for name, values in measures.items():
        result[name], result[name + "_se"] = mean_and_se(values)
    levels = {question.level for question in questions} - {None}
    result["by_level"] = {}
    for level in sorted(levels, key=lambda level: (isinstance(level, str), level)):
        mean, se = mean_and_se(success[[q.level == level for q in questions]])
        count = sum(q.level == level for q in questions)
        result["by_level"][level] = {"n": count, "accuracy": mean, "se": se}
    result["response_length"] = float(np.mean([row["tokens"] for row in responses]))
    result["finished"] = float(np.mean([row["finished"] for row in responses]))
    result["fingerprint"] = zlib.crc32("".join(q.prompt + q.answer for q in questions).encode())
    return {**result, "success": success.tolist(), "responses": responses}


def compare(first, second, draws=10_000):
    """Is `first` better than `second` on the same questions? Both: what `evaluate` returned.
    Returns (mean difference, its 95 % interval, p). The interval is a paired bootstrap over
    questions; p is the share of random flips of the differences' signs whose mean is as far from 0
    (for one response a question that is McNemar's test). ValueError: other questions."""
    if first["fingerprint"] != second["fingerprint"]:
        raise ValueError("--against: those were other questions: same --dataset, --split, --limit")
    rng = np.random.default_rng(0)
    difference = np.array(first["success"]) - np.array(second["success"])
    size = len(difference)
    means = np.array([difference[rng.integers(0, size, size)].mean() for _ in range(draws)])
    flips = np.array([difference @ rng.choice((-1, 1), size) / size for _ in range(draws)])
    extreme = (np.abs(flips) >= abs(difference.mean()) - 1e-12).sum()
    return float(difference.mean()), np.quantile(means, (0.025, 0.975)), (extreme + 1) / (draws + 1)


# ==================================================================================================
# That is the method. Below: numbers, LaTeX and its judges, curves, tables, the command line.
# ==================================================================================================


def stops(model, tokenizer, text=None):
    """What ends a response: the model's stop tokens, and `text`, in which \\n is a newline."""
    ids = data.stop_ids(model, tokenizer)
    if not text:
        return ids
    return StopText(ids, text.replace("\\n", "\n"), tokenizer.decode)


def vote(text):
    """What a final answer counts as in a vote: 18, 18.0 and $18 are one; LaTeX loses its spaces.
    None: no vote."""
    number = parse_number(text or "")
    return number if number is not None else text and re.sub(r"\s", "", text)


def mean_and_se(values):
    """(mean, its standard error over questions: std / sqrt(n)). One question tells nothing of the
    error: None."""
    values = np.asarray(values, np.float64)
    if len(values) < 2:
        return float(values.mean()), None
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))


def check_evaluate(questions, samples, temperature):
    if not questions:
        raise ValueError("no questions to evaluate on")
    if samples < 1 or (samples > 1 and temperature == 0):
        raise ValueError(
            f"samples={samples} at temperature={temperature}: need 1 or more, and for more a "
            "temperature"
        )


# --------------------------------------------------------------------------- numbers

# A number, as people write one: a sign, thousands' commas, a fraction, a scale; words may stand
# before it, and units behind.
WHOLE = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
REAL = rf"(?:{WHOLE}(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][+-]?[0-9]{{1,3}}(?![0-9]))?"
NUMBER = re.compile(
    rf"""\s*(?P<before>[A-Za-z:.,'()\s]*?(?<![A-Za-z]\()(?<![A-Za-z.,]))
    (?P<sign>[-+−–]\s*|(?:minus|negative)\s+)?
    (?:(?P<whole>[0-9]+)\s+(?=[0-9]+\s*/))?                       # 18 1/2 is 37/2
    (?P<top>{REAL})(?:\s*/\s*(?P<bottom>{REAL}))?
    (?:\s*(?P<word>hundred|thousand|million|billion|trillion)\b|(?P<letter>[kKMB])\b)?
    (?P<unit>(?:[\s()/.,'-](?:[A-Za-z\s()/.,'-]|(?<=[A-Za-z])(?:\s?\^[23]|[23²³])(?!\w))*)?)""",
    re.VERBOSE,
)
SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9}
SCALES |= {"trillion": 10**12, "k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9}
# What TeX and Markdown put around a number.
PART = r"\s*(?:\{\s*([^{}]+)\}|([0-9]))"
FRACTION = re.compile(r"\\[dt]?frac" + PART + PART)
SEPARATOR = re.compile(r"\{,\}|,\\!|\\[,!](?=[0-9]{3}(?![0-9]))")  # 1{,}234  1,\!234  1\,234
CURRENCY = re.compile(r"([-+]?)\s*\\?[$£€¥₹]")
DRESS = re.compile(
    r"\\(?:text|mathrm|mathbf|textbf|mbox|left|right|displaystyle|quad)(?![A-Za-z])|\\[()\[\],;: !]"
    r"|\^\s*\{?\s*\\circ\s*\}?|(?<=[A-Za-z])\}(?=\^)|\\?%|(?<![0-9])[{}]|[}~`°](?![0-9])|\*\*"
)


def parse_number(text):
    return read_number(text)[0]


@lru_cache(1 << 16)
def read_number(text):
    r"""(value, unit): the one number that a short text states, as an exact Fraction (never a
    float), and the letters of what follows it. '$1,234.50', '- 18', '18 1/2', '\frac{3}{4}', '75%'
    (75), '18 dollars', '2 million', '9*2 = 18'. The value is None if there is none, or more than
    one ('5 or 6', '5:30'), or something is left to do ('2^3', '18x', '36/2')."""
    none = None, ""
    if len(text) > ANSWER_CHARS or re.search(r"[<>≤≥≠]|!\s*=|\\(?:[lg]eq?|neq?)\b", text):
        return none
    left, equals, text = text.rpartition("=")
    if equals and parse_number(left.strip()) not in (None, parse_number(text)):
        return none  # 4 = 5
    if text.count("(") != text.count(")"):
        return none  # 18 (since 9*2 = 18)
    text = SEPARATOR.sub(",", text)
    text = FRACTION.sub(lambda m: f" {m[1] or m[2]}/{m[3] or m[4]} ", text)
    text = DRESS.sub(" ", CURRENCY.sub(r" \1", text))
    number = NUMBER.fullmatch(text.strip())
    if number is None:
        return none
    loose = number["sign"] and number["sign"][-1:].isspace() and number["sign"][0] in "-+−–"
    if loose and re.search("[A-Za-z]", number["before"]):  # x - 18
        return none
    top, bottom = (Fraction((number[part] or "1").replace(",", "")) for part in ("top", "bottom"))
    if bottom == 0 or (top / bottom).denominator != bottom and bottom != 1:  # 36/2
        return none
    unit = re.sub("[^a-z23]", "", number["unit"].lower())
    if unit in ("x", "y", "z", "n", "i"):
        return none
    value = int(number["whole"] or 0) + top / bottom
    value *= SCALES.get(number["word"] or number["letter"], 1)
    negative = (number["sign"] or "+").strip()[0] in "-−–mn"
    return (-value if negative else value), unit.rstrip("s")


# --------------------------------------------------------------------------- LaTeX

# What a grader does not do for the policy. An answer may have an operation of one of these kinds
# only if the gold answer has: for 9901, \boxed{99^2+99+1} restates the question.
OPERATIONS = [
    r"[\w)}\]]\s*[-+]",  # a sum
    r"\\(?:cdot|times|div)(?![A-Za-z])|\*|[0-9]\s*\(\s*-?[0-9.]+\s*\)",  # a product
    r"\^\s*(?!\{?\s*\\circ)",  # a power
    r"\)\s*[\^(]|[\w}]\s*\((?=[^(),]*[-+][^(),]*\))",  # of a sum: what is not expanded
    r"!|\\[dt]?binom",
    r"\\(?:int|sum|prod|lim|max|min|gcd|det)(?![A-Za-z])|\\frac\s*\{\s*d",
    r"\\(?:sin|cos|tan|cot|sec|csc|arc\w+|log|ln|exp)(?![A-Za-z])",
    r"\\(?:lfloor|lceil|pmod|bmod|mod)(?![A-Za-z])|\|",
]
OPERATIONS = [re.compile(pattern) for pattern in OPERATIONS]
UNEXPANDED = OPERATIONS[3]


@lru_cache(1 << 16)
def same_math(gold, answer, question=""):
    """Are two LaTeX expressions equal, and is the answer as worked out as the gold one? False where
    that cannot be told in JUDGE_SECONDS. Needs math-verify, unless both are numbers or the same
    text. question: one that says "factor" wants factors."""
    gold, answer = bare(gold), bare(answer)
    if re.sub(r"\s", "", gold) == re.sub(r"\s", "", answer):
        return True
    (value, unit), (value2, unit2) = read_number(gold), read_number(answer)
    if value is not None and not re.match(r"[(\[]", gold):  # (1,234) is a pair
        return value == value2 and (unit == unit2 or not (unit and unit2))
    left_to_do = [op.search(answer) and not op.search(gold) for op in OPERATIONS]
    factors = re.search(r"\b[Ff]actor", question) and UNEXPANDED.search(gold)
    if any(left_to_do) or (factors and not UNEXPANDED.search(answer)):
        return False
    if find_spec("math_verify") is None:
        raise ValueError(
            f"the gold answer {gold[:40]!r} needs math-verify to grade: pip install math-verify"
        )
    judge = judges.get()
    try:
        return judge.same(gold, answer)
    finally:
        judges.put(judge)


def bare(text):
    r"""Without $...$, \boxed{}, \left, \right, spaces of TeX, and a full stop at the end."""
    text = re.sub(r"\\(?:left|right|displaystyle)(?![A-Za-z])|(?<!\\)\\[,!;: ]", " ", text)
    text = re.sub(r"\\[dt]frac(?![A-Za-z])", r"\\frac", text).strip().rstrip(".")
    return text.strip("$ ")


# math-verify compares LaTeX with sympy, which some expressions keep busy for ever. Its own time
# limit is a signal, and works in the main thread only and not while C code runs (9^{9^{9^9}}): so
# it lives in processes that can be killed.
JUDGE = r"""
import contextlib, json, os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent; its end closes stdin
with contextlib.suppress(ImportError, ValueError, OSError):  # no such limit on this system
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
from math_verify import parse, verify
reply = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # whatever else prints must not look like a reply
def read(text):
    found = parse("\\boxed{%s}" % text, parsing_timeout=2)
    with contextlib.suppress(Exception):
        if found[0].is_Relational and not found[0].is_Equality:
            found[0] = found[0].as_set()  # x < 3 is (-oo, 3)
    return found
print("ready", file=reply, flush=True)
for line in sys.stdin:
    try:
        gold, answer = map(read, json.loads(line))
        same = bool(gold and answer) and verify(gold, answer, timeout_seconds=2)
    except Exception:
        same = False
    print(int(same), file=reply, flush=True)
"""
JUDGE_SECONDS = 6
timeouts = Counter()  # {"timeouts": how often a judge was killed}


class Judge:
    """One such process, started when it is needed, and anew after it was killed."""

    process = None

    def same(self, gold, answer):
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen(
                [sys.executable, "-c", JUDGE], text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            if self.ask("", seconds=120) != "ready":
                raise ValueError(
                    f"math-verify does not start: try {sys.executable} -c 'import math_verify'"
                )
        reply = self.ask(json.dumps([gold, answer]) + "\n", JUDGE_SECONDS)
        timeouts["timeouts"] += not reply
        return reply == "1"

    def ask(self, line, seconds):
        """Send a line; the reply, or '' if none comes in time, and then the process is killed."""
        timer, reply = threading.Timer(seconds, self.process.kill), ""
        timer.start()
        try:
            with contextlib.suppress(OSError):  # killed before it read the line
                print(line, end="", file=self.process.stdin, flush=True)
                reply = self.process.stdout.readline().strip()
        finally:
            timer.cancel()
            if not reply:  # late, crashed, interrupted: no later call may read this reply
                self.process.kill()
                self.process.wait()
        return reply


judges = queue.LifoQueue()  # the idle ones, the last used first


def set_judges(count=0):
    """So many processes compare LaTeX; 0: one a core."""
    while not judges.empty():
        judges.get()
    for _ in range(count or os.cpu_count() or 1):
        judges.put(Judge())


set_judges()


# --------------------------------------------------------------------------- curves and tables


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
            lines.append(line(name, "", [(results[-1][name], results[-1][name + "_se"])]))
    return "\n".join(lines)


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
    for where, row in data.read_rows(path):
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


# See data.read_settings. A * means: of a run's folder, what the run used.
SETTINGS = """
model            -              -     a model's folder, a run's folder, or a hub id
plot             -              +     draw these training runs instead
dataset          arithmetic     -     data sets' names, by commas, or a file's or folder's path *
bits             24             2..60 parity: bits of a question *
data_dir         -              -     a folder with the named data sets' files, not the hub *
question_field   -              -     the rows' name for the question; usual ones are found *
answer_field     -              -     and for the answer *
split            test           train|test|all  all: the default of a file in one piece
limit            0              0..   a random subset of that many questions of each; 0: all
protocol         greedy         greedy|vineppo  vineppo: 16 samples at temperature 0.35, top-p 0.9
samples          1              1..   samples a question, besides the greedy one
temperature      0.35           0..   of the samples
top_p            0.9            0..1  nucleus of the samples
max_new_tokens   256            1..   the longest response, in tokens *
stop             -              -     a text that ends a response; \\n is a newline *
last_number      off            -     a response with no marked answer: its last number *
chat             auto           auto|on|off  prompt through the chat template; auto: if any *
engine           slots          slots|hf  hf: generate through model.generate
judges           0              0..   processes that compare LaTeX; 0: one a core
device           auto           -     auto, cpu, cuda or mps
dtype            auto           auto|float32|bfloat16|float16  auto: bfloat16 on CUDA
seed             0              0..   of the subset and of the samples
against          -              -     an evaluated run's folder, or its JSON: is this one better?
save_samples     -              -     a file for every response and its grade, a JSON a line
out              -              -     JSON, or PNG of --plot; default: in the (first) run's folder
"""
OF_THE_RUN = ("dataset", "data_dir", "question_field", "answer_field", "max_new_tokens", "stop")
OF_THE_RUN += ("last_number", "chat", "bits")


def settings_for(flags):
    """All settings; where a run's folder is given, it is evaluated as it was trained."""
    settings = {name: row[0] for name, row in data.read_settings(SETTINGS).items()}
    if flags.get("protocol") == "vineppo":
        settings["samples"] = 16
    run = Path(flags["model"])
    trained_on = None
    if (run / "model" / "config.json").exists() and (run / "config.json").exists():
        used = json.loads((run / "config.json").read_text())
        trained_on = used["dataset"]
        if flags.get("dataset", trained_on) != trained_on:
            used.pop("data_dir")  # that was another's
        settings |= {name: used[name] for name in OF_THE_RUN if name in used}
    settings |= flags
    if Path(settings["dataset"]).is_file() and settings["dataset"] != trained_on:
        settings["split"] = flags.get("split", "all")
    args = SimpleNamespace(**settings)
    data.check_settings(SETTINGS, args)
    if args.samples == 1 and {"temperature", "top_p"} & flags.keys():
        raise ValueError("--temperature and --top_p are for several samples: give --samples too")
    return args


def evaluate_dataset(args, name, model, tokenizer):
    """{'greedy': ..., 'mean of 16': ...}: what `evaluate` returns, printed as it comes."""
    fields = {"question": args.question_field, "answer": args.answer_field}
    questions = data.load_questions(
        name, args.split, data_dir=args.data_dir, limit=args.limit or None, seed=args.seed,
        fields=fields, bits=args.bits,
    )  # fmt: skip
    names = ("max_new_tokens", "chat", "seed", "engine", "last_number")
    settings = {"progress": True, **{name: getattr(args, name) for name in names}}
    settings["stop_ids"] = stops(model, tokenizer, args.stop)
    results = {"greedy": evaluate(model, tokenizer, questions, **settings)}
    if args.samples > 1:
        settings |= {name: getattr(args, name) for name in ("samples", "temperature", "top_p")}
        results[f"mean of {args.samples}"] = evaluate(model, tokenizer, questions, **settings)
    print(f"{args.model} on {name}, {args.split} split", table(results), sep="\n")
    cut_off = f"{1 - results['greedy']['finished']:.1%} of the greedy responses"
    print(f"{cut_off} ran into --max_new_tokens {args.max_new_tokens}, which counts as wrong")
    return results


def earlier_results(against, file):
    """The results in an evaluation's JSON, or in the one of that name in a run's folder."""
    path = Path(against, file) if Path(against).is_dir() else Path(against)
    try:
        return json.loads(path.read_text())["results"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--against {against}: no evaluation in {path} ({data.first_line(error)}): run eval.py "
            "--model on it first"
        ) from error


def print_comparison(earlier, name, results):
    for measure, result in results.items():
        before = earlier.get(name, {}).get(measure)
        if before is None:
            raise ValueError(f"--against holds no {measure} of {name}: evaluate that model on it")
        difference, (low, high), p = compare(result, before)
        interval = f"{difference:+.3f}, 95% interval {low:+.3f} to {high:+.3f}, p = {p:.4f}"
        print(f"{measure} against {before['accuracy']:.3f}: {interval}")


def main(argv=None):
    flags = data.parse_flags(SETTINGS, "Evaluate a checkpoint, or draw training runs.", argv)
    if "plot" in flags:
        out = Path(flags.get("out") or Path(flags["plot"][0], "curves.png"))
        if out.suffix != ".png":
            raise ValueError(f"--out {out} is not the name of a .png file")
        plot(flags["plot"], out)
        return print(f"wrote {out}")
    if "model" not in flags:
        raise ValueError("nothing to do: give --model DIR to evaluate, or --plot RUN to draw")
    args = settings_for(flags)
    data.check_names(args.dataset.split(","), args.split, args.data_dir)  # before the model
    datasets = "+".join(Path(name).stem for name in args.dataset.split(","))
    file = f"eval_{datasets}_{args.split}.json"
    earlier = earlier_results(args.against, file) if args.against else {}
    set_judges(args.judges)
    model, tokenizer = data.load_model(args.model, device=args.device, dtype=args.dtype)
    evaluations = {}
    samples = []
    for name in args.dataset.split(","):
        evaluations[name] = evaluate_dataset(args, name, model, tokenizer)
        for measure, result in evaluations[name].items():
            rows = result.pop("responses")
            samples += [{"dataset": name, "measure": measure, **row} for row in rows]
        if args.against:
            print_comparison(earlier, name, evaluations[name])
    if args.save_samples:
        lines = [json.dumps(row) + "\n" for row in samples]
        Path(args.save_samples).write_text("".join(lines))
    folder = Path(args.model) if Path(args.model).is_dir() else Path()
    out = Path(args.out or folder / file)
    out.parent.mkdir(parents=True, exist_ok=True)
    content = {"settings": vars(args), "results": evaluations}
    out.write_text(json.dumps(content, indent=1) + "\n")
    print(f"wrote {out}")


if __name__ == "__main__":
    data.command_line(main)
