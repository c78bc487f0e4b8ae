"""Are two answers equal? Against tables, gold answers and what policies write."""

import os
import threading
import time
from fractions import Fraction
from pathlib import Path

import pytest

import eval as evaluation
from data import Question, load_questions
from eval import grade, rewards
from plumbing import answers
from plumbing.answers import parse_number
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
    ("10 am", 10), ("18-year", 18),
])
def test_numbers(text, value):
    assert parse_number(text) == value


@pytest.mark.parametrize("text", [
    "", "eighteen", "5 or 6", "5, 6", "5,6", "1.234,5", "1,23", "12,345,6", "1 234", "1'000",
    "1.2.3", "5:30", "18:00", "5-18", "5 - 18", "--18", "±18", "> 18", "≤18", "12/25/2020",
    "3/0", "3/4/5", "1/2 of 36", "5 + 5", "18*0", "2**3", "2^3", "18^2", "18²", "½", "18½", "٣",
    "１８", "一", "0x12", "3x2", "1_000", "x_{18}", "1{2}", "$5$6", r"\sqrt{18}", "√18",
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
    "response, right",
    [
        ("\\boxed{x}, no: \\boxed{1+x}", True),
        ("\\boxed{1+x}, no: \\boxed{x}", False),
        ("#### $1+x$", True),
        ("The answer is $x + 1$.", True),
        ("x+1", False),
    ],
)
def test_math_takes_the_last_commitment(response, right):
    assert grade(response, math_question("x+1")) == float(right)


def test_math_that_hangs_is_killed_and_the_next_is_graded(monkeypatch):
    judge = answers.Judge()
    assert judge.same("x+y", "y+x")
    first, before = judge.process, len(answers.timeouts)
    with monkeypatch.context() as patch:
        patch.setattr(answers, "JUDGE_SECONDS", 0.3)
        assert not judge.same("5", "9^{9^{9^{9}}}")
    assert first.poll() is not None and len(answers.timeouts) == before + 1
    assert judge.same("x+y", "2y-x-y+2x") and judge.process is not first
    judge.process.kill()
    judge.process.wait()
    assert judge.same("x+y", "2y-x-y+3x-x")  # one that died is replaced


def test_math_from_threads():
    question, graded = math_question("x+y"), []

    def work(i):
        graded.append(grade(f"\\boxed{{y+x+{i}-{i}}}", question))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert graded == [1.0] * 3


def test_rewards_of_latex_are_graded_side_by_side(monkeypatch, tokenizer):
    """Each judge takes half a second; four of them do eight answers in two rounds, not in eight."""
    waiting, most = [], []

    class Slow:
        def same(self, gold, answer):
            waiting.append(answer)
            time.sleep(0.2)
            most.append(len(waiting))
            waiting.remove(answer)
            return True

    monkeypatch.setattr(answers, "Judge", Slow)
    fresh = type(answers.judges)()
    monkeypatch.setattr(answers, "judges", fresh)
    monkeypatch.setattr(evaluation, "judges", fresh)
    answers.set_judges(4)
    monkeypatch.setattr(evaluation, "decode_response", lambda tokenizer, rollout: rollout.prompt)
    group = [Rollout(f"\\boxed{{y+x+{i}}}", [1], [], True) for i in range(8)]
    graded = rewards(tokenizer, [math_question("x+y+z")], [group])
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
    monkeypatch.setattr(answers, "find_spec", lambda _: None)
    assert grade("\\boxed{x + y}", Question("", "x+y", kind="math")) == 1  # the same text
    with pytest.raises(ValueError, match="pip install math-verify"):
        grade("\\boxed{z+x}", Question("", "x+z", kind="math"))
