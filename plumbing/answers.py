"""Are these two answers equal? Numbers exactly, LaTeX by math-verify in a process of its own.

    parse_number("$1,234.50")                 Fraction(2469, 2)
    parse_number("5 or 6")                    None: more than one
    same_math("\\frac{1}{2}", "0.5")          True

Machinery of eval.py's `grade`. Nothing here evaluates what it reads: numbers are taken apart by a
regular expression, and what sympy does to a LaTeX answer happens where it can be killed.
"""

import contextlib
import json
import os
import queue
import re
import subprocess
import sys
import threading
from fractions import Fraction
from functools import lru_cache
from importlib.util import find_spec

ANSWER_CHARS = 300  # a longer answer is not read


def braced(text):
    """What stands before the } that closes a { opened just before `text`; '' if none does."""
    depth = 1
    for brace in re.finditer(r"\\.|[{}]", text):  # \{ and \} are no braces
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[: brace.start()]
    return ""


def last_boxed(text):
    """What stands in the last \\boxed{} of a text, or None."""
    start = text.rfind("\\boxed{") + len("\\boxed{")
    return braced(text[start:]) if "\\boxed{" in text else None


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
# What TeX and Markdown put around a number: fractions, separators, currency, dress.
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


def vote(text):
    """What a final answer counts as in a vote: 18, 18.0 and $18 are one; LaTeX loses its spaces.
    None: no vote."""
    number = parse_number(text or "")
    return number if number is not None else text and re.sub(r"\s", "", text)


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


# --------------------------------------------------------------------------- judges


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
timeouts = []  # what a judge was killed over


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
        if not reply:
            timeouts.append((gold, answer))
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
