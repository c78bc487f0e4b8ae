"""Grading, measures, curves, the command line: against tables, brute force and hand counts."""

import itertools
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, read_rows, write_rows

import answers
import data
import eval as evaluation
import report
from answers import parse_number
from data import Question, arithmetic, load_questions
from eval import evaluate, final_answer, grade, majority, pass_at_k, rewards
from rollout import Rollout

# --------------------------------------------------------------------------- numbers


def number(answer):
    return Question("", answer)


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


RIGHT = [
    "9*2=18\n#### 18", "#### $18.00", "####18", "#### 18 dollars a day.", "####\n18",
    "so \\boxed{18}", "so $\\boxed{\\$18}$.", "so \\boxed {\\text{18}}", "\\fbox{18}",
    "The answer is 18.", "Answer: 18", "**Answer:** 18", "The answer is $\\boxed{18}$.",
    "the answer is 18. She has 5 left.", "The Answer Is 18!", "The answer is 9*2 = 18 eggs",
    "#### \\boxed{18}", "the answer is **18**.", "#### 5\n#### 18", "\\boxed{5} no, \\boxed{18}",
    "The answer is 5.\n#### 18", "#### Step 1: add 5\n#### Step 2\n\\boxed{18}",
    "#### 18\n#### Done", "The answer is 18.\n####", "\\boxed{18} and \\boxed{",
    "The answer is 18.\nThe answer is not 5.",
]
WRONG = [
    "the answer is: $18.50, no", "#### 18\n#### 5", "\\boxed{18}, \\boxed{5}", "18", "",
    "She has 18 eggs.", "####", "#### eighteen", "#### 19", "#### -18", "#### 180", "#### 1.8",
    "#### 18.5", "#### 5 or 18", "#### 18 or 5", "#### 18, 19", "the answer is 5 or 18",
    "\\boxed{18, 19}", "\\boxed{18^2}", "#### 18:30", "#### 0x12",
    "the answer is 18 because 3*6=18 and 2+2=4", "\\boxed{18", "answer 18",
    "#### 18000" + "0" * 400, "####" + " " * 297 + "1800", "#### " + "0" * 400 + "18",
    "#### " + "x" * 295 + " 18.5",
]
# fmt: on


@pytest.mark.parametrize("response", RIGHT)
def test_right_responses(response):
    assert grade(response, number("18")) == 1.0


@pytest.mark.parametrize("response", WRONG)
def test_wrong_responses(response):
    reward = grade(response, number("18"))
    assert reward == 0.0 and type(reward) is float


def test_every_cut_of_the_window_reads_a_whole_number_or_none():
    for blanks in range(330):
        for marker, end in (("#### ", ""), ("the answer is ", ""), ("\\boxed{", "}")):
            for answer in (" " * blanks + "18005", "x" * blanks + " 18.05"):
                assert grade(f"{marker}{answer}{end}", number("18")) == 0
            assert grade(f"{marker}{'x' * blanks} 18 or 7{end}", number("18")) == 0


@pytest.mark.parametrize(
    "response, text",
    [
        ("so she has 18 eggs.", "18"),
        ("18.0", "18.0"),
        ("5 then 1,234.", "1,234"),
        ("16-3", "3"),
        ("it is -18", "-18"),
        ("3/4 of it", "3/4"),
        ("no digits", None),
        ("(-18)", "-18"),
        ("1" * 100, None),
        ("." * 150 + "1" * 60, None),
        ("1" + "0" * 70 + "18", None),
    ],
)
def test_last_number(response, text):
    assert final_answer(response, last_number=True) == text
    assert final_answer(response) is None


def test_a_marked_answer_comes_before_the_last_number():
    assert grade("#### 5, but 18", number("18"), last_number=True) == 0
    assert grade("the sum is 18", number("18"), last_number=True) == 1


PIECES = "####|\\boxed{|the answer is |{|}|1|1,|=|-|\\frac| |answer|/|.|\n|e9|\ud800|\0|½".split(
    "|"
)


@pytest.mark.parametrize("piece", PIECES)
def test_long_responses_are_read_in_linear_time(piece):
    """A million characters; in quadratic time this would not end."""
    long = piece * (1000000 // len(piece))
    for text in (long, "#### " + long, "#### 1" + piece * 250):
        assert grade(text, number("7"), last_number=True) == 0


def test_grading_cannot_be_crashed():
    rng = np.random.default_rng(0)
    for _ in range(1000):
        text = "".join(rng.choice(PIECES, size=12))
        assert grade(text + "\n#### 77", number("7")) == 0
        assert grade("#### " + text, number("7"), last_number=True) == 0


def test_a_question_that_cannot_be_graded():
    with pytest.raises(ValueError, match="kind 'essay'"):
        grade("#### 1", Question("", "1", kind="essay"))
    with pytest.raises(ValueError, match="'x' is not a number"):
        grade("#### 1", Question("", "x"))


@pytest.mark.skipif(
    not os.environ.get("SFL_GSM8K"), reason="SFL_GSM8K: a folder with GSM8K's {train,test}.jsonl"
)
@pytest.mark.parametrize("split, count", [("train", 7473), ("test", 1319)])
def test_every_gsm8k_solution(split, count):
    folder = os.environ["SFL_GSM8K"]
    questions = load_questions("gsm8k", split, data_dir=folder)
    texts = [row["answer"] for row in read_rows(Path(folder, f"{split}.jsonl"))]
    assert len(questions) == count
    for question, text in zip(questions, texts, strict=True):
        assert "<<" not in question.solution
        assert grade(text, question) == grade(question.solution, question) == 1
        head, answer = text.split("#### ")
        for right in (f"The answer is ${answer}.", f"\\boxed{{{answer}.0}}", f"#### {answer} eggs"):
            assert grade(head + right, question) == 1
        wrong = [f"#### {answer}{more}" for more in ("1", ".5", " or 7", "^2")]
        wrong.append(f"#### 1{answer}" if answer[0] != "-" else "#### 1")
        for last in wrong:
            assert grade(head + last, question) == 0, last
        assert "answer" in head.lower() or grade(f"{head}The result is {answer}", question) == 0


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
    first, before = judge.process, answers.timeouts["timeouts"]
    with monkeypatch.context() as patch:
        patch.setattr(answers, "JUDGE_SECONDS", 0.3)
        assert not judge.same("5", "9^{9^{9^{9}}}")
    assert first.poll() is not None and answers.timeouts["timeouts"] == before + 1
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


def test_fuzzed_grading_neither_raises_nor_hangs(monkeypatch):
    hypothesis = pytest.importorskip("hypothesis")
    given, text = hypothesis.given, hypothesis.strategies.text
    monkeypatch.setattr(answers, "JUDGE_SECONDS", 2)
    pieces = hypothesis.strategies.lists(
        hypothesis.strategies.sampled_from(
            [*PIECES, *r"\sqrt{ \pi x ^ _ ( ) [ ] , + - * = < & \\".split()]
        )
    )

    @hypothesis.settings(max_examples=150, deadline=None, derandomize=True)
    @given(text(max_size=80) | pieces.map("".join))
    def check(answer):
        for question in (number("18"), math_question("x+1"), math_question("[0,1)")):
            assert grade(f"\\boxed{{{answer}}}", question) in (0.0, 1.0)
            assert grade(answer, question, last_number=True) in (0.0, 1.0)

    check()


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


# --------------------------------------------------------------------------- measures


def test_rewards_of_finished_responses(tokenizer):
    question = arithmetic(1, 0, {2: 1})[0]
    right = data.encode_response(tokenizer, question.solution)
    wrong = data.encode_response(tokenizer, "#### 0" if question.answer != "0" else "#### 1")
    stop = [tokenizer.eos_token_id]
    finished, cut = Rollout([], right + stop, [], True), Rollout([], right, [], False)
    bad = Rollout([], wrong + stop, [], True)
    graded = rewards(tokenizer, [question, question], [[finished, cut], [bad, finished]])
    assert graded.dtype == np.float32 and graded.tolist() == [[1, 0], [0, 1]]


def test_pass_at_k_by_enumeration():
    for n in range(1, 8):
        for right, k in itertools.product(range(n + 1), range(1, n + 1)):
            samples = [True] * right + [False] * (n - right)
            draws = list(itertools.combinations(samples, k))
            share = sum(map(any, draws)) / len(draws)
            assert pass_at_k(right, n, k) == pytest.approx(share, abs=1e-12)
    assert pass_at_k(3, 100000, 50000) == pytest.approx(1 - 0.5**3, abs=1e-4)  # no overflow


def test_majority_by_drawing_among_the_tied():
    rng = np.random.default_rng(0)
    for _ in range(300):
        answers = [[None, 1, 2, 3][i] for i in rng.integers(0, 4, rng.integers(1, 7))]
        graded = [float(answer == 2) for answer in answers]
        counts = Counter(answer for answer in answers if answer is not None)
        tied = [answer for answer, count in counts.items() if count == max(counts.values())]
        assert majority(answers, graded) == (tied.count(2) / len(tied) if tied else 0)
    assert majority([None, None, 2], [0.0, 0.0, 1.0]) == 1  # no answer is no vote


def test_votes():
    assert [answers.vote(text) for text in ("18", "18.0", "$18", "18 dollars")] == [18] * 4
    assert answers.vote("x + 1") == answers.vote("x+ 1") != answers.vote("x+2")
    assert not answers.vote(None)


@pytest.fixture
def counted(monkeypatch, tiny, tokenizer):
    """`evaluate` of 3 questions with 4, 1 and 2 right among 4 answers, and one that is right but
    cut off. Returns the questions and the result."""
    questions = sorted(arithmetic(3, 0, {1: 2, 3: 1}), key=lambda q: q.level)

    def generate(model, prompts, *, n, **settings):
        assert n == 4 and settings["temperature"] == 1.0
        assert settings["stop_ids"] == [tokenizer.eos_token_id]
        assert prompts == data.encode_prompts(tokenizer, questions)
        groups = []
        for question, prompt, right in zip(questions, prompts, (4, 1, 2)):
            wrong = str((int(question.answer) + 1) % data.MODULUS)
            groups.append([])
            for j in range(4):
                text = f"#### {question.answer if j < right else wrong}"
                finished = (question, j) != (questions[0], 0)
                stop = [tokenizer.eos_token_id] * finished
                response = data.encode_response(tokenizer, text) + stop
                groups[-1].append(Rollout(prompt, response, [], finished))
        return groups

    monkeypatch.setattr(evaluation, "generate", generate)
    return questions, evaluate(tiny, tokenizer, questions, samples=4, temperature=1.0)


@pytest.mark.parametrize(
    "name, values",
    [
        ("accuracy", [3 / 4, 1 / 4, 2 / 4]),
        ("mean_accuracy", [3 / 4, 1 / 4, 2 / 4]),
        ("pass@1", [3 / 4, 1 / 4, 2 / 4]),
        ("pass@2", [1, 1 / 2, 5 / 6]),
        ("pass@4", [1, 1, 1]),
        ("maj@4", [1, 0, 1 / 2]),  # the third is tied, two and two
    ],
)
def test_measures_and_their_errors(counted, name, values):
    _, result = counted
    assert result[name] == pytest.approx(np.mean(values), abs=1e-6)
    error = np.std(values, ddof=1) / math.sqrt(3)
    assert result[name + "_se"] == pytest.approx(error, abs=1e-6)


def test_what_evaluate_counts(counted):
    questions, result = counted
    assert "pass@8" not in result and result["n"] == 3 and result["samples"] == 4
    assert result["success"] == [0.75, 0.25, 0.5]
    assert result["finished"] == pytest.approx(11 / 12)
    assert result["response_length"] == pytest.approx(35 / 12)
    assert result["by_level"][1] == {"n": 2, "accuracy": 0.5, "se": pytest.approx(0.25)}
    assert result["by_level"][3] == {"n": 1, "accuracy": 0.5, "se": None}
    first, second = result["responses"][0], result["responses"][4]
    assert len(result["responses"]) == 12
    assert first["reward"] == 0 and second["response"] == f"#### {questions[1].answer}"
    assert first["question"] == questions[0].question and first["answer"] == questions[0].answer
    json.dumps(result)


def test_table(counted):
    _, result = counted
    lines = report.table({"before": result, "after": result}).split("\n")
    assert len({len(line) for line in lines[1:4]}) == 1  # columns
    assert lines[0].split() == ["level", "questions", "before", "after"]
    assert lines[1].split()[:3] == ["all", "3", "0.500"]
    assert any(line.startswith("maj@4") for line in lines)


def test_evaluate_with_the_engine(tiny, tokenizer):
    questions = load_questions("arithmetic", "test", limit=6)
    greedy = evaluate(tiny, tokenizer, questions, max_new_tokens=8)
    assert greedy == evaluate(tiny, tokenizer, questions, max_new_tokens=8)
    assert "pass@1" not in greedy
    sampling = {"samples": 3, "temperature": 1.0, "max_new_tokens": 8, "seed": 1}
    sampled = evaluate(tiny, tokenizer, questions, **sampling)
    assert set(sampled) >= {"pass@1", "pass@2", "maj@3"}
    assert 1 <= sampled["response_length"] <= 8


@pytest.mark.parametrize(
    "count, settings, message",
    [
        (0, {}, "no questions"),
        (2, {"samples": 4}, "samples=4 at temperature=0"),
        (2, {"samples": 0}, "samples=0"),
        (2, {"max_new_tokens": 500}, "max_new_tokens=500"),
    ],
)
def test_evaluate_refuses(tiny, tokenizer, count, settings, message):
    questions = arithmetic(2, 0, {1: 1})[:count]
    with pytest.raises(ValueError, match=message):
        evaluate(tiny, tokenizer, questions, **settings)


# --------------------------------------------------------------------------- curves


def fake_run(folder, seed=0):
    rng = np.random.default_rng(seed)
    rows = [{"iteration": 0, "eval_accuracy": 0.1}]
    for i in range(12):
        row = {"iteration": i + 1, "reward_mean": rng.random(), "kl": 0.1}
        row |= {"learnable": 0.3, "solved_by_all": 0.2, "solved_by_none": 0.5}
        row |= {"tokens_generated": 100, "seconds_rollout": 1.25}
        row |= {"seconds_credit": 0.25, "seconds_update": 0.5}
        row["sampled"] = [
            [int(j), int(j) // 2, int(rng.integers(5)), 4] for j in rng.permutation(8)[:4]
        ]
        row["trained"] = [row["sampled"][0][0]]
        if i % 4 == 3:
            row |= {"eval_accuracy": rng.random(), "seconds_score": 2.0}
            row |= {"tokens_scored": 900, "tokens_credit": 100}
        rows.append(row)
    write_rows(folder / "metrics.jsonl", rows)
    return folder


def test_read_run_adds_up_what_was_spent(tmp_path):
    rows = report.read_run(fake_run(tmp_path))
    assert [row["tokens"] for row in rows[:6]] == [0, 100, 200, 300, 1400, 1500]
    assert [row["seconds"] for row in rows[:6]] == [0, 2, 4, 6, 10, 12]


PNG = b"\x89PNG"


def test_plot(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    names = ("sfl", "uniform", "other/sfl")
    runs = [str(fake_run(tmp_path / name, seed)) for seed, name in enumerate(names)]
    evaluation.main(["--plot", *runs, "--out", str(tmp_path / "new" / "a.png")])
    assert (tmp_path / "new" / "a.png").read_bytes().startswith(PNG)
    evaluation.main(["--plot", runs[1]])
    assert (tmp_path / "uniform" / "curves.png").read_bytes().startswith(PNG)
    assert "wrote" in capsys.readouterr().out


def test_plot_of_runs_with_little_in_them(tmp_path):
    pytest.importorskip("matplotlib")
    write_rows(tmp_path / "bare" / "metrics.jsonl", [{"iteration": 0}])
    with pytest.raises(ValueError, match="nothing to draw yet"):
        report.plot([tmp_path / "bare"], tmp_path / "a.png")
    write_rows(tmp_path / "short" / "metrics.jsonl", [{"iteration": 0, "reward_mean": 0.5}])
    report.plot([tmp_path / "short"] * 9, tmp_path / "a.png")  # more runs than colours
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"reward_mean": 1}, "line 1: no number in the field 'iteration'"),
        ({"iteration": 1, "learnable": "x"}, "line 1: no number in the field 'learnable'"),
        ("{", "line 1: not JSON"),
    ],
)
def test_plot_refuses_what_is_no_metrics(tmp_path, row, message):
    write_rows(tmp_path / "metrics.jsonl", [row])
    with pytest.raises(ValueError, match=message):
        evaluation.main(["--plot", str(tmp_path)])


# --------------------------------------------------------------------------- the command line


def test_command_line_evaluates(tiny_folder, tmp_path, capsys):
    arguments = ["--model", str(tiny_folder), "--limit=5", "--max-new-tokens", "4"]
    arguments += ["--device", "cpu"]
    evaluation.main([*arguments, "--samples", "2"])
    printed = capsys.readouterr().out
    assert "maj@2" in printed and "ran into --max_new_tokens 4" in printed
    report = json.loads((tiny_folder / "eval_arithmetic_test.json").read_text())
    results = report["results"]["arithmetic"]
    assert results["greedy"]["n"] == 5 and results["mean of 2"]["samples"] == 2
    assert report["settings"]["temperature"] == 0.35
    kept = tmp_path / "samples.jsonl"
    arguments += ["--out", str(tmp_path / "x" / "r.json"), "--save_samples", str(kept)]
    arguments += ["--against", str(tiny_folder)]
    evaluation.main(arguments)
    assert "greedy against 0.000: +0.000, 95% interval" in capsys.readouterr().out
    assert set(json.loads((tmp_path / "x" / "r.json").read_text())["results"]) == {"arithmetic"}
    assert [row["measure"] for row in read_rows(kept)] == ["greedy"] * 5


def test_a_runs_folder_is_evaluated_as_it_was_trained(tmp_path):
    (tmp_path / "model").mkdir()
    for file in (tmp_path / "config.json", tmp_path / "model" / "config.json"):
        used = {"dataset": "gsm8k", "data_dir": "d", "max_new_tokens": 77, "last_number": True}
        file.write_text(json.dumps(used | {"chat": "off", "stop": "Q:"}))
    args = evaluation.settings_for({"model": str(tmp_path)})
    assert (args.dataset, args.data_dir, args.max_new_tokens) == ("gsm8k", "d", 77)
    assert args.last_number and args.chat == "off" and args.stop == "Q:"
    other = evaluation.settings_for({"model": str(tmp_path), "dataset": "math500", "chat": "on"})
    assert (other.dataset, other.data_dir, other.chat) == ("math500", None, "on")


def test_the_protocol_of_vineppo():
    args = evaluation.settings_for({"model": "x", "protocol": "vineppo"})
    assert (args.samples, args.temperature, args.top_p) == (16, 0.35, 0.9)


def test_compare_against_enumeration():
    """All 2^8 flips of the differences' signs."""
    a, b = np.array([1, 1, 1, 1, 0, 1, 0, 1]), np.array([0, 1, 0, 0, 0, 1, 1, 0])
    first, second = ({"fingerprint": 1, "success": list(map(float, x))} for x in (a, b))
    difference, (low, high), p = evaluation.compare(first, second)
    signs = np.array(list(itertools.product((-1, 1), repeat=8)))
    extreme = np.abs(signs @ (a - b)) >= abs((a - b).sum())
    assert difference == 3 / 8 and p == pytest.approx(extreme.mean(), abs=0.02)
    assert low < difference < high and low == pytest.approx(-0.125, abs=0.13)
    assert evaluation.compare(first, first)[2] == 1
    with pytest.raises(ValueError, match="those were other questions"):
        evaluation.compare(first, {**second, "fingerprint": 2})


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("", "give --model DIR"),
        ("--model x --samples 0", "at least 1"),
        ("--nope", "unrecognized arguments: --nope"),
        ("--model x --samples two", "invalid int value: 'two'"),
        ("--model x --dataset gsm9k", "unknown data set"),
        ("--model x --temperature 1", "are for several samples"),
        ("--model x --top-p 1", "are for several samples"),
        ("--model x --data-dir y", "--data-dir y is for data sets with a name"),
        ("--model x --against nowhere", "--against nowhere: no evaluation in nowhere"),
        ("--plot nowhere", "holds no metrics.jsonl"),
        ("--plot nowhere --out a.pdf", "not the name of a .png"),
    ],
)
def test_command_line_refuses(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        evaluation.main(arguments.split())
    assert "\n" not in str(raised.value)


def test_program_says_one_line_and_exits_with_2(tmp_path):
    command = [sys.executable, str(ROOT / "eval.py"), "--model", str(tmp_path)]
    done = subprocess.run([*command, "--limit", "-1"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "eval.py: --limit -1 must be at least 0\n"
