r"""Are these two answers equal? Numbers exactly, LaTeX by math-verify in a process of its own.

    parse_number("$1,234.50")                 Fraction(2469, 2)
    parse_number("5 or 6")                    None: more than one
    same_math("\\frac{1}{2}", "0.5")          True
    same_math("x^2+y^2=25", "25")             False: an equation is no number

Nothing here evaluates what it reads: numbers are taken apart by a regular expression, and what
sympy does to a LaTeX answer happens in judge.py, a process that can be killed.
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
from functools import cache, lru_cache
from math import gcd
from pathlib import Path

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
    r"""What stands in the last \boxed{} or \fbox{} of a text, or None."""
    boxes = list(re.finditer(r"\\(?:boxed|fbox)(?![A-Za-z])\s*(?:\{|([\w.-]*\w))", text))
    if not boxes:
        return None
    return boxes[-1][1] or braced(text[boxes[-1].end() :])


# --------------------------------------------------------------------------- how people write

# The same sign by other keys: full-width digits (as Chinese models write), minus, powers, roots.
KEYS = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
KEYS |= str.maketrans("−–\u00a0\u2009\u202f", "--~~~")
SIGNS = {"²": "^{2}", "³": "^{3}", "⁻¹": "^{-1}"}
SIGNS |= {"×": r"\times ", "·": r"\cdot ", "π": r"\pi "}
SIGNS |= {"∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup "}
SIGNS |= {"∅": r"\emptyset ", r"\varnothing": r"\emptyset ", "θ": r"\theta "}
# Thousands as TeX has them: 1{,}234  1,\!234  1\,234  1\;234  1~234. All groups or none, so that
# 1,\;234 stays a list, and 10,\!234 is not the list 234, 10.
GROUP = r"(?:\{,\}|,\\!\s*|\\[,;:! ]\s*|~)"
GROUPED = re.compile(rf"(?<![0-9.,])[0-9]{{1,3}}(?:{GROUP}[0-9]{{3}})+(?![0-9])")
TEN_TO = r"\s*10\s*\^\s*(?:\{\s*([+-]?[0-9]{1,3})\s*\}|([+-]?[0-9]{1,3}))(?![0-9])"
# 4.5 \times 10^{33} is a way to write a number, not a product left to do
SCIENTIFIC = re.compile(rf"(?<=[0-9])\s*(?:\\times|\\cdot|[×·*]|(?<=\s)x(?=\s)){TEN_TO}")
POWER_OF_TEN = re.compile(rf"^([+-]?){TEN_TO}")


def plain(text):
    """With separators and powers of ten as Python has them, and one key for one sign."""
    text = GROUPED.sub(lambda m: re.sub(GROUP, "", m[0]), text.translate(KEYS))
    text = SCIENTIFIC.sub(lambda m: f"e{m[1] or m[2]}", text)
    return POWER_OF_TEN.sub(lambda m: f"{m[1]}1e{m[2] or m[3]}", text.strip(" $"))


# --------------------------------------------------------------------------- equations

# What may stand left of "=" and be left out: x, x_1, f(2), f^{-1}(x), AB, \angle ABC, (x,y), words.
# Not x^2, 2x+1 or x(x+1): the right side of a question's own equation is not its solution.
LETTER = r"(?:[A-Za-z]|\\(?:theta|alpha|beta|gamma|lambda|mu|phi|omega|sigma|rho|Delta|ell))"
INDEX = r"(?:_(?:\w|\{[\w\\ ]+\})|'){0,3}"
NAME = re.compile(
    rf"""\s*(?:{LETTER}{INDEX}                                          # x, x_1
    |(?:[A-Zf-hp-s]|\\phi){INDEX}(?:\^\{{-1\}})?\([^()=+*]*\)           # f(2), P(A \cap B)
    |[x-z]{INDEX}\([tx]\) | [B-Z]\^\{{?-1\}}? | \\frac\{{d\w\}}\{{d\w\}}
    |(?:m\s*)?(?:\\(?:angle|triangle)\s*)?[A-Z](?:\s*[A-Z]){{0,3}}     # AB, m \angle ABC
    |\|[A-Z]{{2}}\| | \[[A-Z]{{3,}}\]
    |\(\w(?:\s*,\s*\w)+\)                                               # (x, y)
    |[A-Za-z' ]*[A-Za-z]{{3}}[A-Za-z' ]*)\s*(?:=|\\in(?![A-Za-z]))\s*""",
    re.VERBOSE,
)
SUM = re.compile(r"(?:[-+*/$.,0-9e\s()×÷·^]|\\(?:times|cdot|div|left|right)|[A-Za-z]{3,})+")


def equation(text):
    """(name, right side) of x = 5 and of 9*2 = 18; (None, text) where no right side is a value."""
    letters = re.sub(r"\\(?:mathrm|mathbf|text|textbf)\s*\{([^{}]*)\}", r"\1", text)
    if named := NAME.match(letters):
        name = re.sub(r"[\s=]|\\in", "", named[0])
        # x = 1 or x = 2: the same name again says nothing new
        again = rf"((?:,|;|\bor\b|\band\b)\s*)\$?\s*{re.escape(name)}\s*="
        right = re.sub(again, r"\1", letters[named.end() :])
        return (None, text) if "=" in outside_braces(right) else (name, right)
    left, equals, right = text.rpartition("=")
    if equals and SUM.fullmatch(left) and parse_number(left) in (None, parse_number(right)):
        return "", right
    return None, text


def outside_braces(text):
    r"""Not the = of \sum_{k=1}."""
    while text != (text := re.sub(r"\{[^{}]*\}", "", text)):
        pass
    return text


# --------------------------------------------------------------------------- numbers

# A number: a sign, thousands' commas, a fraction, a scale; words may stand before it, and units
# behind.
WHOLE = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
REAL = rf"(?:{WHOLE}(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][+-]?[0-9]{{1,3}}(?![0-9]))?"
NUMBER = re.compile(
    rf"""\s*(?P<before>[A-Za-z:.,'()\s]*?(?<![A-Za-z]\()(?<![A-Za-z.,]))
    (?P<sign>[-+]\s*|(?:minus|negative)\s+)?
    (?:(?P<whole>[0-9]+)\s+(?=[0-9]+\s*/))?                       # 18 1/2 is 37/2
    (?P<top>{REAL})(?:\s*/\s*(?P<bottom>{REAL}))?
    (?:\s*(?P<word>hundred|thousand|million|billion|trillion)\b|(?P<letter>[kKMB])\b)?
    (?P<unit>(?:[\s()/.,'Ωμ-](?:[A-Za-zΩμ·\s()/.,'-]
        |(?<=[A-Za-z])(?:\s?\^-?[1-9]|[23²³])(?!\w))*)?)""",
    re.VERBOSE,
)
SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9}
SCALES |= {"trillion": 10**12, "k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9}
# What TeX and Markdown put around a number: fractions, currency, dress.
PART = r"\s*(?:\{\s*([^{}]+)\}|([0-9]))"
FRACTION = re.compile(r"\\[dtc]?frac" + PART + PART)
CURRENCY = re.compile(r"([-+]?)\s*\\?[$£€¥₹]")
DRESS = re.compile(
    r"\\(?:text|mathrm|mathbf|textbf|mbox|left|right|displaystyle|quad)(?![A-Za-z])|\\[()\[\],;: !]"
    r"|\^\s*\{?\s*\\circ\s*\}?"
    r"|(?<=[A-Za-z])\}(?=\^)|\\?%|(?<![0-9])[{}]|[}~`°](?![0-9])|^\s*\*+|\*+(?![0-9*])|`"
)


def parse_number(text):
    return read_number(text)[0]


def fraction(match):
    """a/b of \\frac{a}{b}; the sign of \\frac{2}{-3} stands before it."""
    top, bottom = (match[1] or match[2]).strip(), (match[3] or match[4]).strip()
    if bottom.startswith("-") and not top.startswith("-"):
        top, bottom = "-" + top, bottom[1:]
    return f" {top}/{bottom} "


@lru_cache(1 << 16)
def read_number(text):
    r"""(value, unit): the one number that a short text states, as an exact Fraction (never a
    float), and the letters of what follows it. '$1,234.50', '- 18', '18 1/2', '\frac{3}{4}', '75%'
    (75), '18 dollars', '2 million', '9*2 = 18', '4.5 \times 10^{33}'. The value is None if there is
    none, or more than one ('5 or 6', '5:30'), or something is left to do ('2^3', '18x', '36/2')."""
    none = None, ""
    if len(text) > ANSWER_CHARS or re.search(r"[<>≤≥≠]|!\s*=|\\(?:[lg]eq?|neq?)\b", text):
        return none
    if "=" in text:
        name, text = equation(text)
        if name is None or "=" in text:
            return none  # 4 = 5, x^2 = 5
    if text.count("(") != text.count(")"):
        return none  # 18 (since 9*2 = 18)
    text = FRACTION.sub(fraction, plain(text)).replace("\\Omega", "Ω").replace("\\mu", "μ")
    text = re.sub(r"\^\s*\{\s*(-?[0-9])\s*\}", r"^\1", text)  # s^{-1}
    text = DRESS.sub(" ", CURRENCY.sub(r" \1", text))
    number = NUMBER.fullmatch(text.strip())
    if number is None:
        return none
    loose = number["sign"] and number["sign"][-1:].isspace() and number["sign"][0] in "-+"
    if loose and re.search("[A-Za-z]", number["before"]):  # x - 18
        return none
    top, bottom = (Fraction((number[part] or "1").replace(",", "")) for part in ("top", "bottom"))
    if bottom == 0 or (top / bottom).denominator != bottom and bottom != 1:  # 36/2
        return none
    unit = number["unit"].strip(" .,'-")
    if re.match(r"[a-fi-kn-ru-z](?![a-zA-Z])", unit):  # 18 x: m, s, g, h, l, t are units
        return none
    # m/s, m s^{-1}: the same letters
    unit = re.sub(r"/\s*([A-Za-z]+)\^?([23]?)", lambda m: f"{m[1]}-{m[2] or 1}", unit)
    unit = re.sub("[^A-Za-zΩμ0-9-]", "", unit.replace("²", "2").replace("³", "3"))
    value = int(number["whole"] or 0) + top / bottom
    value *= SCALES.get(number["word"] or number["letter"], 1)
    negative = (number["sign"] or "+").strip()[0] in "-mn"
    return (-value if negative else value), unit.lower().rstrip("s")


def vote(text):
    """What a final answer counts as in a vote: 18, 18.0 and $18 are one; LaTeX loses its spaces.
    None: no vote."""
    number = parse_number(text or "")
    return number if number is not None else text and re.sub(r"\s", "", text)


# --------------------------------------------------------------------------- LaTeX

# What the judge cannot see, because its parser does it: an answer may have no more of these than
# the gold answer. For 120, \binom{10}{3} restates the question.
OPERATIONS = (
    r"!|\\[dt]?binom",
    r"\\(?:int|sum|prod|lim|max|min|gcd|det|bigcup|bigcap)(?![A-Za-z])|\\frac\s*\{\s*d",
    r"\\(?:(?:sin|cos|tan|cot|sec|csc)h?|arc\w+|operatorname)(?![A-Za-z])",
    r"\\(?:log|ln|exp|lg|Gamma|zeta)(?![A-Za-z])|\{vmatrix",
    r"\\(?:lfloor|lceil|pmod|bmod|mod)(?![A-Za-z])|\||\bmod\b",
)
# An answer with one of these is an expression: if the question shows it, it is not worked out.
SHOWN = re.compile(
    r"(?<=.)[-+]|[*/=(<>]|\\[lg]eq?(?![a-z])|\de[-+]?\d|\^(?!\s*\{?\s*\\circ)"
    r"|\\(?:frac|sqrt|times|cdot)"
)
CHOICE = re.compile(r"\(?([A-J])(?:\)?$|[).:]+(?:\s|\\|$)(?!.*(?:\([A-J]\)|\b[B-J]\b)).*)", re.S)


def unreduced(text):
    """How many fractions of whole numbers are not in lowest terms: the parser reduces them."""
    pairs = re.findall(r"\b([0-9]+)\s*/\s*([0-9]+)", FRACTION.sub(fraction, text))
    return sum(gcd(int(top), int(bottom)) > 1 for top, bottom in pairs)


def bare(text):
    r"""Without $...$, \boxed{}, \left, \right, spaces of TeX, and a full stop at the end."""
    text = plain(re.sub(r"\\(?:boxed|fbox)\s*(?=\{)", "", text))
    for sign, command in SIGNS.items():
        text = text.replace(sign, command)
    text = re.sub(r"√\s*(\w+|\([^()]*\))", r"\\sqrt{\1}", text)
    text = re.sub(r"\\(?:left|right|displaystyle)(?![A-Za-z])|(?<!\\)\\[,!;: ]|~", " ", text)
    text = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", text)
    text = re.sub(r"\s*\b(or|and)\b(?![^{]*\})", r" \\text{ \1 }", text.replace("$", " "))
    return text.strip(" *`").rstrip(".").strip()


def squeezed(text):
    r"""Without dress and spaces; but 5 6 does not become 56, nor \frac{1}{23} \frac{12}{3}."""
    text = re.sub(r"\\(?:text\w*|mathrm|mbox)\s*\{([^{}]*)\}|\\?\$", r"\1", text)
    text = re.sub(r"([_^])\s*\{(\w)\}", r"\1\2", text)
    return re.sub(r"\s+(?![0-9])|(?<![0-9])\s+", "", text)


def same_math(gold, answer, question="", judges=None):
    """Are two LaTeX expressions equal, and is the answer as worked out as the gold one? False where
    that cannot be told in JUDGE_SECONDS. Needs math-verify, unless both are numbers or the same
    text. question: its own words are no answer to it, and one that says "factor" wants factors."""
    gold, answer = bare(gold), bare(answer)
    if squeezed(gold) == squeezed(answer):
        return bool(squeezed(gold))
    restated = SHOWN.search(answer) and squeezed(answer) in squeezed(bare(question))
    (name, right), (name2, right2) = equation(gold), equation(answer)
    clash = name and name2 and name.lower() != name2.lower() and max(len(name), len(name2)) == 1
    if restated or clash:  # x = 5 is another line than y = 5
        return False
    (value, unit), (value2, unit2) = read_number(gold), read_number(answer)
    if value is not None and not re.match(r"[(\[]", gold):  # (1,234) is a pair
        return value == value2 and (unit == unit2 or not (unit and unit2))
    undressed = [re.sub(r"\\text\w*|[{}\\$]", "", text).strip() for text in (gold, answer)]
    letter, letter2 = map(CHOICE.fullmatch, undressed)
    if letter and letter2:  # (B) 12: the choice counts, not its text
        return letter[1] == letter2[1]
    equations = ["=" in outside_braces(text) for text in (gold, answer)]
    if not any(equations) or (name or not equations[0]) and (name2 or not equations[1]):
        gold, answer = bare(right), bare(right2)  # values, named or not
    elif not all(equations):
        return False  # an equation and a value
    if squeezed(gold) == squeezed(answer):
        return True
    if any(len(re.findall(op, answer)) > len(re.findall(op, gold)) for op in OPERATIONS):
        return False
    if unreduced(answer) > unreduced(gold):
        return False
    return (judges or default_judges()).same(gold, answer, question)


# --------------------------------------------------------------------------- judges

# math-verify compares LaTeX with sympy, which some expressions keep busy for ever. Its own time
# limit is a signal, and works in the main thread only and not while C code runs (9^{9^{9^9}}): so
# it lives in processes that can be killed. Not pebble.ProcessPool: its spawned workers import the
# program that runs, torch and all, and need its `if __name__ == "__main__"`.
JUDGE_SECONDS = 6


class Judges:
    """Processes that compare LaTeX, each started when it is needed and anew after it was killed.
    count 0: one a core. For any number of threads. timeouts: what a judge was killed over."""

    def __init__(self, count=0):
        self.count = count or os.cpu_count() or 1
        self.timeouts = []
        self.known = {}
        self.idle = queue.LifoQueue()  # the last used first
        for _ in range(self.count):
            self.idle.put(None)

    def same(self, gold, answer, question=""):
        """Blocks until a judge is idle and has answered, or was killed: then they are not."""
        entry = (gold, answer, question)
        if entry in self.known:
            return self.known[entry]
        judge = self.idle.get()
        try:
            if judge is None or judge.poll() is not None:
                judge = start_judge()  # if that fails, the next call tries again
            reply = ask(judge, json.dumps(entry) + "\n", JUDGE_SECONDS)
        finally:
            self.idle.put(judge)
        if not reply:
            self.timeouts.append((gold, answer))
        if len(self.known) < 1 << 16:
            self.known[entry] = reply == "1"
        return reply == "1"


default_judges = cache(Judges)  # for calls that bring none: made by the first one


def start_judge():
    program = [sys.executable, str(Path(__file__).with_name("judge.py"))]
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    judge = subprocess.Popen(program, text=True, **streams)
    if ask(judge, "", seconds=120) != "ready":
        way_out = f"pip install math-verify, and try {sys.executable} -c 'import math_verify'"
        raise ValueError(f"LaTeX answers need math-verify, which does not start: {way_out}")
    return judge


def ask(judge, line, seconds):
    """Send a line; the reply, or '' if none comes in time, and then the process is killed."""
    timer, reply = threading.Timer(seconds, judge.kill), ""
    timer.start()
    try:
        with contextlib.suppress(OSError):  # killed before it read the line
            print(line, end="", file=judge.stdin, flush=True)
            reply = judge.stdout.readline().strip()
    finally:
        timer.cancel()
        if not reply:  # late, crashed, interrupted: no later call may read this reply
            judge.kill()
            judge.wait()
    return reply
