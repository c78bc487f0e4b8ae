"""Are two answers equal? Against tables, gold answers and what policies write."""

import contextlib
import importlib
import os
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import pytest
from conftest import ROOT

import eval as evaluation
from data import Question, load_questions
from eval import grade, rewards
from plumbing import answers
from plumbing.answers import Judges, parse_number
from rollout import Rollout

# --------------------------------------------------------------------------- numbers


# fmt: off
@pytest.mark.parametrize("text, value", [
    ("18", 18), ("18.0", 18), ("18.", 18), ("$18", 18), ("18 dollars", 18), ("$18.00", 18),
    (r"\$18", 18), ("$18$", 18), ("US$18", 18), ("€18", 18), ("**18**", 18), ("**$18**", 18),
    ("18/day", 18), ("18 km/h", 18), ("018", 18), ("+18", 18), ("-18", -18), ("- 18", -18),
    ("\u221218", -18), ("-$18", -18), ("$-18", -18), ("a loss of -$18", -18), ("minus 18", -18),
    ("negative 18", -18), ("1,234", 1234), ("$1,234,567.89", Fraction(123456789, 100)),
    ("1{,}234", 1234), (r"1,\!234", 1234), (r"1\,234", 1234), ("3/4", Fraction(3, 4)),
    (r"\frac{3}{4}", Fraction(3, 4)), (r"\dfrac34", Fraction(3, 4)),
    (r"-\frac{1}{2}", Fraction(-1, 2)), ("18 1/2", Fraction(37, 2)),
    ("-3 1/2 hours", Fraction(-7, 2)), (r"2\frac{1}{2}", Fraction(5, 2)), (".5", Fraction(1, 2)),
    ("75%", 75), (r"75\%", 75), ("18 %", 18), (r"18^\circ", 18), (r"18\text{ cm}^2", 18),
    ("18 cm^2", 18), ("18 m²", 18), ("2 million", 2000000), ("18k", 18000), ("1e3", 1000),
    ("1e-05", Fraction(1, 100000)), ("9*2 = 18", 18), ("16 - 3 - 4 = 9", 9), ("x = 18", 18),
    ("the total cost = $18", 18), ("approximately 18 eggs", 18), ("18 = 18.0", 18),
    (r"\text{18}", 18), ("(18)", 18), ("i think 18", 18), ("dollars (18)", 18), ("-0", 0),
    ("10 am", 10), ("１８", 18), ("18-year", 18),
])
def test_numbers(text, value):
    assert parse_number(text) == value


@pytest.mark.parametrize("text", [
    "", "eighteen", "5 or 6", "5, 6", "5,6", "1.234,5", "1,23", "12,345,6", "1 234", "1'000",
    "1.2.3", "5:30", "18:00", "5-18", "5 - 18", "--18", "±18", "> 18", "≤18", "12/25/2020",
    "3/0", "3/4/5", "1/2 of 36", "5 + 5", "18*0", "2**3", "2^3", "18^2", "18²", "½", "18½", "٣",
    "一", "0x12", "3x2", "1_000", "x_{18}", "1{2}", "$5$6", r"\sqrt{18}", "√18",
    r"18\pi", "18π", "2x", "18!", r"5 \times 2", r"\frac{a}{2}", "18 (since 9*2=18)", "18~19",
    "x >= 18", "x != 18", "|-18|", "sqrt(18)", "f(18)", "18 = x", "x + 18", "x - 18", "2 + x",
    "1e9999", "1e999999999", "nan", "inf", "#", "-", ".", "1" * 301, "9" * 10000,
])
def test_not_one_number(text):
    assert parse_number(text) is None


# --------------------------------------------------------------------------- LaTeX


def math_question(answer):
    pytest.importorskip("math_verify")
    return Question("", answer, kind="math")


# kind: (gold, right answers, wrong ones)
# fmt: off
MATH = {
    "integers": [
        ("9", ["9", "9.0", "$9$", "9.", r"\$9", "x=9", "9\\%", r"\text{9}", "09"],
         [r"5 \text{ or } 9", "3^2", "3*3", r"3\cdot 3", "10-1", "18/2", r"\frac{18}{2}", "4=9",
          r"\sqrt{81}", "9,0", "90", "-9", r"\pm 9", "9x", "0x9"]),
        ("9901", ["9,901", "9901", r"9{,}901", r"9\,901"], ["99^2+99+1", "99 \\cdot 100 + 1"]),
        ("-3", ["-3", "- 3", "\u22123"], ["3", "0-3", "-(3)(1)", "-\\sqrt{9}"]),
    ],
    "fractions": [
        (r"\frac{14}{3}", ["14/3", r"\dfrac{14}{3}", r"\frac{14}3", r"4\frac{2}{3}", "4 2/3"],
         ["4.6", "4.67", r"\frac{28}{6}", "14:3", r"\frac{3}{14}"]),
        (r"\frac 59", ["5/9", r"\frac{5}{9}", r"\frac59"], ["0.56", "9/5", "10/18"]),
        ("0.5", [".5", r"\frac12", "1/2", "0.50"], ["2/4", "5", r"\frac{1}{3}"]),
        (r"\frac{x}{2}", [r"\frac{1}{2}x", "x/2", r"\dfrac{x}{2}"], ["2x", r"\frac{2}{x}"]),
    ],
    "radicals": [
        (r"2\sqrt{2}", [r"2 \sqrt{2}", r"2\sqrt2"], ["2.83", r"\sqrt{2}", r"\sqrt{6}"]),
        (r"3+2\sqrt{5}", [r"2\sqrt{5}+3", r"3 + 2\sqrt 5"], [r"5\sqrt{5}", r"3-2\sqrt{5}"]),
        (r"\frac{\sqrt{3}}{3}", [r"\dfrac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}"],
         [r"\frac{\sqrt{3}}{2}", r"\sqrt{3}"]),
    ],
    "intervals": [
        ("[0,1)", ["[0, 1)", r"\left[0,1\right)"], ["(0,1)", "[0,1]", "[0,1"]),
        (r"(-\infty,3)", ["x<3", r"\left(-\infty, 3\right)"], [r"x \le 3", r"(3,\infty)", "3"]),
        (r"(2,5]", [r"\left( 2,5 \right]"], ["[2,5)", "2,5", "(5,2]"]),
    ],
    "sets, tuples, lists": [
        (r"\{1,2\}", [r"\{2,1\}", r"\left\{1, 2\right\}"], [r"\{1\}", r"\{1,2,3\}"]),
        (r"\left( 3, \frac{\pi}{2} \right)", [r"(3,\pi/2)", r"(3, \frac{\pi}{2})"],
         [r"(\frac{\pi}{2},3)", r"(3,\pi)", "3"]),
        ("(1,234)", ["(1, 234)"], ["1234", "1,234", "(1234)"]),
        ("2,3", ["2, 3", "3,2"], ["23", "2", "2,3,4", "6"]),
    ],
    "matrices": [
        (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}",
         [r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}"],
         [r"\begin{pmatrix} 1 & 3 \\ 2 & 4 \end{pmatrix}", "(1,2,3,4)", r"\begin{pmatrix} 1 & 2"]),
    ],
    "units, percent, degrees": [
        (r"2\text{ cm}", ["2", r"2 \text{ cm}", "2 cm", r"2\ \mathrm{cm}"],
         [r"2\text{ m}", "2 m", "3 cm", "2 cm^2"]),
        (r"10\%", ["10", r"10 \%", "10%"], ["1", "0.01"]),
        (r"45^\circ", ["45", r"45^{\circ}", "45°", r"45 ^\circ"], ["54", "4.5"]),
        ("36", [r"36\text{ square inches}", r"36^\circ", "36 feet"], [r"6^2", "3.6"]),
    ],
    "text, choices": [
        (r"\text{even}", ["even", r"\textbf{even}"], ["odd", r"\text{not even}", "e"]),
        (r"\text{(C)}", ["(C)", "C", r"\text{C}"], ["(B)", "D"]),
        (r"\text{Evelyn}", ["Evelyn"], ["Carla"]),
    ],
    "expressions": [
        ("p - q", ["-q+p", "p-q"], ["q - p", "p+q"]),
        ("$10-4 n$", ["10-4n", "-4n+10"], ["10-4", "6n"]),
        ("x^2+2x+1", ["1+2x+x^2"], ["(x+1)^2", "(x+1)(x+1)", "x^2+2x"]),
        ("6r^2-4r-24", ["-24+6r^2-4r"], ["2(3r^2-2r-12)", "6r^2"]),
        ("9901x", ["9901x"], ["(99^2+99+1)x", "x"]),
        (r"\frac{1}{2}", ["0.5"], [r"\int_0^1 x dx", r"\lim_{x\to 0}\frac{x}{2x}", r"\sin 30^\circ",
         r"\sum_{k=2}^{\infty} 2^{-k}", r"\frac{1}{4}+\frac{1}{4}", r"2^{-1}"]),
        ("120", ["120"], ["5!", r"\binom{10}{3}", r"5\times 24", "(12)(10)", "|-120|"]),
    ],
    "equations": [
        ("y=2x+3", ["y = 2x + 3", "y=3+2x"], ["y=2x", "x=2y+3"]),
        ("5", ["x = 5", "n=5"], ["4=5", "5=6", "x \\ne 5", r"x \geq 5"]),
    ],
    "what breaks": [
        ("x", [], ["(" * 280, "\\frac{" * 40, "\0", "\ud800", "a" * 1000000, "", "}{", "\\"]),
    ],
}
# fmt: on
# What people write, by the kinds of trouble it gave: (gold, right answers, wrong or refused ones).
# fmt: off
FORMS = {
    "the right side of an equation": [
        ("5", ["x=5", "f(2)=5", r"\text{Area} = 5", "AB=5", r"\angle ABC = 5^\circ", "x_1=5",
               r"\theta=5", "2+3=5", "P(A)=5", "[ABC]=5"],
         ["x^2=5", "2x+1=5", "3x=5", "x+y=5", "xy=5", "|x|=5", "x(x+1)=5", r"\sqrt{x}=5",
          r"\frac{x}{2}=5", "2^x=5", r"\log_2 x=5", "n!=5", "-x=5", "(x+1)(x-1)=5", "x=5=6",
          r"\sum_{k=1}^n k=5", "x=6, x=5"]),
        ("x=5", ["5", "x = 5"], ["y=5", "x=6", "6"]),
        ("2x-3y+7z-4=0", ["4x-6y+14z-8=0", "2x-3y+7z=4"], ["0", "4", "2x-3y+7z+4=0", "0=0"]),
        ("3x-y+13=0", ["y=3x+13"], ["3x+4y+14=0", "0", "3x-y=13"]),
        ("x^2+y^2=25", ["25=x^2+y^2", "2x^2+2y^2=50"], ["25", "x^2+y^2=5", "x+y=5"]),
        (r"y=-\frac12x+\frac34", ["2x+4y-3=0", r"\frac34-\frac12x"], ["2x+4y=0", r"\frac34"]),
        ("y=3x-1", ["3x-1", "3x-y=1"], ["y-2=3(x-1)", "y=3x"]),
        (r"\log_3(27)=3", [r"\log_3(27)=3"], ["3"]),  # names no value: strict
        ("f(x)=x^2", ["x^2", "y=x^2"], ["x", "x^2+1"]),
        ("x=1, y=2", ["y=2, x=1"], ["x=2, y=1"]),
        ("x=-6, x=2", ["-6,2", r"x=2 \text{ or } x=-6"], ["-6", "2"]),
    ],
    "not cancelled, collected, expanded": [
        (r"\frac{5p^3}{4}+4p^2+4p", [r"\frac{5p^3}{4}+4p+4p^2"],
         [r"\frac{5p^4+16p^3+16p^2}{4p}"]),
        ("x+1", ["1+x"],
         [r"\frac{x^2+2x+1}{x+1}", r"\frac{(x+1)^2}{x+1}", "(x^2+2x+1)(x+1)^{-1}", "x+2-1",
          r"\frac{2x+2}{2}", r"x(1+\frac1x)", "|x+1|", r"\ln e^{x+1}", "x+1+0", "x+2^0", "x+1!",
          r"x+\sin^2x+\cos^2x", r"x+\frac22", r"x+\frac{x}{x}", "x+1+10^{-40}x", "x+1=0",
          r"\frac{d}{dx}(\frac{x^2}{2}+x)", r"\max(x+1,x)", r"\sqrt{(x+1)^2}", r"x+\cosh 0",
          r"x+\tanh\infty", r"x+\Gamma(2)", r"\begin{vmatrix}x&-1\\1&1\end{vmatrix}"]),
        (r"2\sqrt{2}", [r"2\sqrt2"],
         [r"\sqrt{8}", "8^{1/2}", "2^{3/2}", r"\sqrt2\sqrt4", r"\frac{4}{\sqrt2}", r"\sqrt[4]{64}",
          r"\sqrt2+\sqrt2", r"\sqrt{4\cdot2}", r"\frac{\sqrt{32}}{2}", "2.8284271247461903"]),
        (r"1+\sqrt5", [r"\sqrt5+1"], [r"\sqrt{6+2\sqrt5}"]),
        (r"\frac{\pi}{4}", [r"\pi/4"], [r"\frac{2\pi}{8}", r"\arctan 1", "0.7853981633974483"]),
        (r"\frac{x+y}{xy}", [r"\frac{y+x}{yx}"], [r"\frac1x+\frac1y"]),
        ("6(x+2)", ["6x+12"], ["6(x+1)", "6x+6+6"]),
        ("x^6", ["x^6"], ["(x^2)^3", r"x^2\cdot x^4"]),
        ("2^{100}", ["2^{100}"], ["4^{50}", r"2\cdot 2^{99}", "2^{99}"]),
    ],
    "powers of ten": [
        ("4.5e33", [r"4.5 \times 10^{33}", r"4.5\cdot10^{33}", r"4.5\times 10^{33}\text{ erg}",
                    "4.5*10^33", "4.5 × 10^{33}", r"4.5 \times 10^{33} \mathrm{~erg}"],
         [r"4.5 \times 10^{32}", "4.5", r"4.5 \times 10", r"45 \times 10^{33}", "10^{33}"]),
        ("0.005", [r"5\times10^{-3}"], [r"5\times10^{3}", r"5\times10^{-2}"]),
        ("1e-3", ["10^{-3}", "0.001"], ["10^{3}", "10^{-3}x"]),
        ("32", ["32"], [r"2\times 4^2", "2^5"]),
    ],
    "separators": [
        ("10000",
         [r"10,\!000", r"10{,}000", r"10\,000", r"10\;000", "10~000", r"10\ 000", "10,000"],
         ["10 000", "10.000", "10;000"]),  # a space may part two numbers, a full stop is a point
        (r"10,\!234", ["10234", "10,234"], ["234,10", "234, 10", "10", "234"]),
        (r"1,\!234,\!567", ["1234567"], [r"1,\!234,\!56"]),
    ],
    "tiny values": [
        ("2^{-100}", ["2^{-100}"], ["2^{-99}", "0"]),
        ("2^{-100}x", ["2^{-100}x"], ["2^{-99}x"]),
        (r"\{1, 2^{-100}\}", [r"\{2^{-100}, 1\}"], [r"\{1, 2^{-99}\}"]),
        ("100x^{99}", ["100x^{99}"], ["100x^{99}+1", "100x^{98}"]),
        ("e^{200}", ["e^{200}"], ["e^{200}+1", "e^{199}"]),
        ("x^{100}+x^{50}+1", ["1+x^{50}+x^{100}"], ["x^{100}+x^{51}+1", "x^{101}+x^{50}+1"]),
        (r"(1, 2^{-100}\pi)", [r"(1, 2^{-100}\pi)"], [r"(1, 2^{-99}\pi)"]),
    ],
    "units": [
        ("12", ["12 N", r"12\text{ N}", r"12\text{ m s}^{-1}", "12 m s^{-1}", r"12\,\Omega",
                "１２", "12 Ω"], ["12x", "12 x", "12 x^2", "12 y", r"12\pi"]),
        (r"3\text{ m/s}", [r"3\text{ m s}^{-1}", "3"], [r"3\text{ m}", r"3\text{ km/s}"]),
    ],
    "inequalities": [
        ("(0,8.5)", ["0<x<8.5", "8.5>x>0"], [r"0\le x<8.5", "0<x<8", "x<8.5"]),
        (r"(-\infty,-1)\cup(2,\infty)",
         ["x<-1 or x>2", r"x<-1 \text{ or } x>2", r"x>2\text{ or }x<-1"],
         ["x<-1 and x>2", "x<-1", "-1<x<2"]),
    ],
    "signs": [
        (r"-\frac23", [r"\frac{2}{-3}", r"\frac{-2}{3}", r"-\cfrac{2}{3}"], [r"\frac{-2}{-3}"]),
        ("x^2+1", ["x²+1", r"x^2 + 1"], ["x2+1"]),
        (r"2\sqrt3", ["2√3", "2√(3)"], ["√3"]),
        (r"\emptyset", [r"\varnothing", "∅"], ["0"]),
    ],
    "choices": [
        ("B", ["(B)", "(B) 12", "B.", r"\text{(B)}", r"\textbf{(B)}\ 12"],
         ["(C)", "(A) or (B)", "(B) or (C)", "(A), (B)", "(B)+1"]),
        (r"\text{(B)}", ["(B) 12", "B"], ["A"]),
    ],
    "what the parser drops": [
        (r"3\mathbf{i}+2\mathbf{j}", [r"3\mathbf{i} + 2\mathbf{j}"], ["3", "2"]),
        ("11_5", ["11_{5}"], ["11", "11_6"]),
        (r"\cos(2) \approx -0.416", [r"\cos(2)\approx-0.416"], [r"\cos(2) \approx -0.416+1"]),
        (r"x=\ln 4=2\ln 2", [r"x=\ln4=2\ln 2"], [r"x=\ln 4=2\ln 2+1", r"x=\ln 5=2\ln 2"]),
        (r"c^2(\gamma^2-1)", [r"c^2(\gamma^2-1)"], [r"c^2(\gamma^2-1)+1"]),
        ("2!", ["2"], [r"2\text{ not }3\hspace{1}"]),
        (r"\pi", [r"\pi"], [r"\phantom{\pi}1"]),
    ],
    "braces": [
        (r"\frac{x}{23}", [r"\frac x{23}"], [r"\frac{x2}{3}"]),
        (r"\frac{1}{23}", [r"\frac1{23}"], [r"\frac{12}{3}"]),
        ("x^{12}", ["x^{12}"], ["x^{1}2"]),
    ],
    "lists of guesses": [
        ("5", ["5"],
         [r"5 \text{ or } 6", "5;6", "5/6", "5 6", r"5\quad 6", "5|6", "[4,6]", r"5\pm1", "4<x<6",
          r"x\in\{5,6\}", "5, no 6", r"4.\overline{9}", "4.999...", "5%6", r"5\neq6", "5^{1}"]),
        ("(-2,3)", ["(-2, 3)"], ["3,-2", r"\{-2,3\}", "(-2,3), (3,-2)", "(-2,1+2)"]),
    ],
}
# fmt: on
MATH |= FORMS
PAIRS = [
    pytest.param(gold, answer, right, id=f"{kind}-{gold}-{answer[:20]!r}")
    for kind, rows in MATH.items()
    for gold, *both in rows
    for right, answers in zip((True, False), both)
    for answer in answers
]


def test_there_are_many_pairs():
    assert len(PAIRS) >= 120


@pytest.mark.parametrize("gold, answer, right", PAIRS)
def test_math(gold, answer, right):
    assert grade(f"so $\\boxed{{{answer}}}$.", math_question(gold)) == float(right)


@pytest.mark.parametrize("answer, right", [("2(x+1)(x-1)", 1), ("2x^2-2", 0), ("2(x-1)(1+x)", 1)])
def test_who_asks_for_factors_wants_factors(answer, right):
    question = math_question("2(x-1)(x+1)")
    question.question = "Factor $2x^2-2$ completely."
    assert grade(f"\\boxed{{{answer}}}", question) == right


@pytest.mark.parametrize(
    "question, gold, answer, right",
    [
        (r"Write $\frac{3}{20}$ as a decimal.", "0.15", r"\frac{3}{20}", 0),
        (r"Write $\frac{3}{20}$ as a decimal.", "0.15", "0.15", 1),
        (r"Write in standard notation: $8.7 \times 10^{5}$", "870000", r"8.7 \times 10^5", 0),
        ("Rewrite $2x+4y-3=0$.", r"y=-\frac12x+\frac34", "2x+4y-3=0", 0),
        ("Factor $2x^2-2$.", "2(x-1)(x+1)", "(2x-2)(x+1)", 0),
        (r"Rationalize $\frac{1}{\sqrt3}$", r"\frac{\sqrt3}{3}", r"\frac{1}{1\sqrt{3}}", 0),
        (r"An angle of $45^\circ$", "45", r"45^\circ", 1),
    ],
)
def test_the_question_is_not_its_answer(question, gold, answer, right):
    asked = math_question(gold)
    asked.question = question
    assert grade(f"\\boxed{{{answer}}}", asked) == right


@pytest.mark.parametrize(
    "response, right",
    [
        (r"\boxed{x}, no: \boxed{1+x}", 1),
        (r"\boxed{1+x}, no: \boxed{x}", 0),
        ("#### $1+x$", 1),
        ("The answer is $x + 1$.", 1),
        ("x+1", 0),
        # a box left open or empty commits to nothing: the one before counts
        (r"\boxed{x+1} and \boxed{", 1),
        (r"\boxed{x+1} \boxed{}", 1),
        (r"\boxed{x+1", 0),
        # a remark is no answer, unless nothing else is
        (r"\boxed{x+1} The answer is in lowest terms.", 1),
        (r"\boxed{x+1} So the answer is simplified.", 1),
        (r"\boxed{x+1}" + "\n#### Explanation of the steps", 1),
        (r"\boxed{x+1}. Answer: see above.", 1),
        (r"\boxed{x+1}. The answer is 5.", 0),  # the last word counts
        (r"\boxed{x+1}. The answer is $x$.", 0),
        ("The final answer is:\n\\[\nx+1\n\\]", 1),
        ("The final answer is: $$x+1$$", 1),
        (r"The answer is \[x+1\] or \[x\]", 0),
        (r"The answer is \(x+1\).", 1),
        ("<answer>x+1</answer>", 1),
        ("<answer>x+1 or x</answer>", 0),
        ("The answer is *x+1*.", 1),
        ("The answer is `x+1`.", 1),
        ("The answer is x+1 — as required.", 1),
        ("The answer is x+1 — or x.", 0),
        ("The answer is x+1 \U0001f389", 1),
    ],
)
def test_math_takes_the_last_commitment(response, right):
    assert grade(response, math_question("x+1")) == right


def test_math_that_hangs_is_killed_and_the_next_is_graded(monkeypatch):
    pytest.importorskip("math_verify")
    judges = Judges(1)
    assert judges.same("x+y", "y+x")
    first = judges.idle.queue[0]
    with monkeypatch.context() as patch:
        patch.setattr(answers, "JUDGE_SECONDS", 0.3)
        assert not judges.same("5+x", "9^{9^{9^{9}}}+x")
    assert first.poll() is not None and judges.timeouts == [("5+x", "9^{9^{9^{9}}}+x")]
    assert judges.same("x+y", " y+x")  # one that died is replaced
    assert judges.idle.queue[0] is not first and len(judges.timeouts) == 1


def test_a_gold_answer_that_ran_out_of_time_is_read_again(monkeypatch):
    sympy = pytest.importorskip("sympy")
    monkeypatch.syspath_prepend(ROOT / "plumbing")
    judge = importlib.import_module("judge")
    replies = [TimeoutError, [sympy.Symbol("x")]]

    def parse_latex(*args, raise_on_error=False, **settings):
        reply = replies.pop(0)
        if reply is not TimeoutError:
            return reply
        if raise_on_error:
            raise TimeoutError
        return []  # as math-verify does

    fakes = {"sympy": sympy, "parse_latex": parse_latex, "CONFIG": None}
    for name, fake in fakes.items():
        monkeypatch.setattr(judge, name, fake, raising=False)
    with contextlib.suppress(TimeoutError):
        judge.read("x")
    assert judge.read("x") == sympy.Symbol("x")


def test_judges_end_with_their_interpreter_and_read_no_torch():
    """Killed, not ended: nothing is left behind. And a program without __main__ can have judges."""
    pytest.importorskip("math_verify")
    program = (
        "from plumbing.answers import Judges; j = Judges(1); assert j.same('x+y', 'y+x')\n"
        "pid = j.idle.queue[0].pid; maps = open(f'/proc/{pid}/maps').read()\n"
        "print(pid, 'torch' in maps, flush=True); import os; os.kill(os.getpid(), 9)"
    )
    if not Path("/proc/self/maps").exists():
        pytest.skip("reads /proc")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    pid, torch = done.stdout.split()
    assert torch == "False"
    for _ in range(50):  # its standard input ends
        path = Path(f"/proc/{pid}/stat")
        if not path.exists() or path.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    raise AssertionError("an orphan")


def test_math_from_threads():
    question, graded = math_question("x+y"), []

    def work(i):
        graded.append(grade(f"\\boxed{{y{' ' * i}+x}}", question))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert graded == [1.0] * 3


def test_rewards_of_latex_are_graded_side_by_side(monkeypatch, tokenizer):
    """Four judges do eight answers in two rounds, not in eight."""
    waiting, most = [], []

    class Slow(Judges):
        def same(self, gold, answer, question=""):
            waiting.append(answer)
            time.sleep(0.2)
            most.append(len(waiting))
            waiting.remove(answer)
            return True

    monkeypatch.setattr(evaluation, "decode_response", lambda tokenizer, rollout: rollout.prompt)
    group = [Rollout(f"\\boxed{{y+x+{i}}}", [1], [], True) for i in range(8)]
    graded = rewards(tokenizer, [math_question("x+y+z")], [group], judges=Slow(4))
    assert graded.tolist() == [[1.0] * 8] and max(most) == 4


@pytest.mark.skipif(
    not os.environ.get("SFL_EVAL_DATA"), reason="SFL_EVAL_DATA: a folder with four .jsonl files"
)
@pytest.mark.parametrize("name", ["math500", "college_math", "olympiadbench", "minerva_math"])
def test_gold_answers_and_their_honest_rewritings(name):
    """An answer as long as what is read of a response may have been cut, and is worth nothing."""
    path = Path(os.environ["SFL_EVAL_DATA"], f"{name}.jsonl")
    for question in load_questions(str(path), "all"):
        gold, question.kind = question.answer, "math"
        rewritten = [gold, f" {gold} ", gold.replace("\\frac", "\\dfrac")]
        if "\\left" not in gold and "\\sqrt[" not in gold and gold.count("(") == gold.count(")"):
            pieces = gold.replace("\\(", "").replace("\\)", "")
            rewritten.append(pieces.replace("(", "\\left(").replace(")", "\\right)"))
        for answer in rewritten:
            whole = len(answer) < evaluation.ANSWER_CHARS - 1
            assert not whole or grade(f"\\boxed{{{answer}}}", question) == 1, answer


def test_math_verify_missing(monkeypatch):
    monkeypatch.setattr(answers.sys, "executable", "false")  # no judge can start
    judges = Judges(1)
    same_text, other_text = (Question("", gold, kind="math") for gold in ("x+y", "y+x"))
    assert grade("\\boxed{x + y}", same_text, judges=judges) == 1
    for _ in range(2):
        with pytest.raises(ValueError, match="pip install math-verify"):
            grade("\\boxed{x + y}", other_text, judges=judges)
