"""Responses, measures, the command line: against tables, brute force and hand counts."""

import itertools
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, read_rows, write_rows

import data
import eval as evaluation
from data import PLAIN_PROMPT, Question, arithmetic, load_questions
from eval import evaluate, final_answer, grade, majority, pass_at_k, rewards
from plumbing import answers, checkpoint, commands, report
from rollout import Rollout

# --------------------------------------------------------------------------- responses


def number(answer):
    return Question("", answer)


# fmt: off
RIGHT = [
    "9*2=18\n#### 18", "#### $18.00", "####18", "#### 18 dollars a day.", "####\n18",
    "so \\boxed{18}", "so $\\boxed{\\$18}$.", "so \\boxed {\\text{18}}", "\\fbox{18}",
    "The answer is 18.", "Answer: 18", "**Answer:** 18", "The answer is $\\boxed{18}$.",
    "the answer is 18. She has 5 left.", "The Answer Is 18!", "The answer is 9*2 = 18 eggs",
    "#### \\boxed{18}", "the answer is **18**.", "#### 5\n#### 18", "\\boxed{5} no, \\boxed{18}",
    "The answer is 5.\n#### 18", "#### Step 1: add 5\n#### Step 2\n\\boxed{18}",
    "#### 18\n#### Done", "The answer is 18.\n####", "\\boxed{18} and \\boxed{",
    "The answer is 18.\nThe answer is not 5.", "so \\boxed 18.", "$\\boxed 18$",
    "<answer>18</answer>",
    "The final answer is:\n\\[\n18\n\\]", "The answer is *18*.", "The answer is `18`.",
    "#### 18 🎉",
    "The answer is 18 — as required.", "#### 18 -- done", "#### １８", "#### 1.8 \\times 10^1",
    "\\boxed{18}. The answer is in lowest terms.", "#### 18 N",
]
WRONG = [
    "the answer is: $18.50, no", "#### 18\n#### 5", "\\boxed{18}, \\boxed{5}", "18", "",
    "She has 18 eggs.", "####", "#### eighteen", "#### 19", "#### -18", "#### 180", "#### 1.8",
    "#### 18.5", "#### 5 or 18", "#### 18 or 5", "#### 18, 19", "the answer is 5 or 18",
    "\\boxed{18, 19}", "\\boxed{18^2}", "#### 18:30", "#### 0x12",
    "the answer is 18 because 3*6=18 and 2+2=4", "\\boxed{18", "answer 18",
    "#### 18000" + "0" * 400, "####" + " " * 297 + "1800", "#### " + "0" * 400 + "18",
    "#### " + "x" * 295 + " 18.5", "#### 18 — or 5", "<answer>18 or 5</answer>", "#### 2x+1=18",
    "\\boxed{x^2=18}", "\\boxed 1 8", "The answer is \\[18\\] or \\[5\\]",
    "\\boxed{18} \\boxed 5",
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


def test_fuzzed_grading_neither_raises_nor_hangs(monkeypatch):
    pytest.importorskip("math_verify")
    hypothesis = pytest.importorskip("hypothesis")
    given, text = hypothesis.given, hypothesis.strategies.text
    monkeypatch.setattr(answers, "JUDGE_SECONDS", 1)
    questions = [number("18"), Question("", "x+1", kind="math"), Question("", "[0,1)", kind="math")]
    pieces = hypothesis.strategies.lists(
        hypothesis.strategies.sampled_from(
            [*PIECES, *r"\sqrt{ \pi x ^ _ ( ) [ ] , + - * = < & \\".split()]
        )
    )

    @hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
    @given(text(max_size=80) | pieces.map("".join))
    def check(answer):
        for question in questions:
            assert grade(f"\\boxed{{{answer}}}", question) in (0.0, 1.0)
            assert grade(answer, question, last_number=True) in (0.0, 1.0)

    check()


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
                if (question, j) == (questions[1], 3):
                    text = f"={question.answer}"  # right, but not marked
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
        ("accuracy_lenient", [3 / 4, 2 / 4, 2 / 4]),
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
    assert any(line.split()[:3] == ["last", "number", "0.583"] for line in lines)


def test_only_the_last_column_of_a_table_has_several_samples(counted):
    _, result = counted
    greedy = {name: value for name, value in result.items() if "@" not in name}
    lines = report.table({"greedy": greedy, "mean of 4": result}).split("\n")
    (majority,) = [line for line in lines if line.startswith("maj@4")]
    assert len(majority) == len(lines[1]) and majority.count("±") == 1


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


def test_latex_is_not_compared_again_to_be_lenient(tiny, tokenizer, monkeypatch):
    asked = []

    def rewards(tokenizer, questions, groups, **how):
        asked.append(([question.kind for question in questions], how["last_number"]))
        return np.zeros((len(questions), 1), np.float32)

    monkeypatch.setattr(evaluation, "rewards", rewards)
    for kind in ("number", "math"):
        result = evaluate(tiny, tokenizer, [Question("1+1\n", "2", kind=kind)], max_new_tokens=1)
    assert asked == [(["number"], False), (["number"], True), (["math"], False)]
    assert result["accuracy_lenient"] == result["accuracy"] == 0


def test_evaluate_samples_with_the_engine_it_is_given(tiny, tokenizer):
    class Engine:
        def generate(self, prompts, **how):
            return [[Rollout(prompt, [1], [], True)] * how["n"] for prompt in prompts]

    questions = arithmetic(2, 0, {1: 1})
    result = evaluate(tiny, tokenizer, questions, samples=3, temperature=1.0, engine=Engine())
    assert result["response_length"] == 1 and len(result["responses"]) == 6


# --------------------------------------------------------------------------- the command line


def settings_for(**flags):
    argv = [f"--{name}={value}" for name, value in flags.items()]
    seen = commands.parse(evaluation.Settings, argv)
    return commands.parse(evaluation.Settings, argv, evaluation.usual(seen))


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
        used |= {"chat": "off", "stop": "Q:", "question_field": "its_own"}
        file.write_text(json.dumps(used))
    used = settings_for(model=tmp_path)
    assert (used.dataset, used.data_dir, used.max_new_tokens) == ("gsm8k", "d", 77)
    assert used.last_number and used.chat == "off" and used.stop == "Q:"
    assert settings_for(model=tmp_path, max_new_tokens=9).max_new_tokens == 9
    other = settings_for(model=tmp_path, dataset="math500", chat="on")
    assert (other.dataset, other.data_dir, other.chat) == ("math500", None, "on")
    assert (used.question_field, other.question_field) == ("its_own", None)


def test_a_file_is_taken_whole_unless_the_run_split_it(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [{"question": "1+1", "answer": "2"}])
    assert settings_for(model="x").split == settings_for(model="x", dataset=tmp_path).split
    assert settings_for(model="x", dataset=file).split == "all"
    assert settings_for(model="x", dataset=file, split="train").split == "train"
    write_rows(tmp_path / "model" / "config.json", [])
    (tmp_path / "config.json").write_text(json.dumps({"dataset": str(file)}))
    assert settings_for(model=tmp_path).split == "test"
    assert settings_for(model=tmp_path, dataset=file).split == "test"


def test_nothing_but_an_evaluation_is_written_over(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "load_model", None)  # refused before it
    data_file = write_rows(tmp_path / "rows.jsonl", [{"question": "1+1", "answer": "2"}])
    flags = ["--model", str(tiny_folder), "--dataset", str(data_file)]
    for flag in ("--out", "--save_samples"):
        with pytest.raises(ValueError, match=f"^{flag} .*give another name"):
            evaluation.main([*flags, flag, str(data_file)])
    (tmp_path / "new").mkdir()
    with pytest.raises(ValueError, match="--limit"):
        evaluation.main([*flags, "--limit", "-1", "--out", str(tmp_path / "no" / "e.json")])
    assert not (tmp_path / "no").exists() and len(read_rows(data_file)) == 1


def test_data_dir_is_for_the_named_sets_among_several(tiny_folder, tmp_path):
    for path in ("mine.jsonl", "svamp/train.jsonl", "svamp/test.jsonl"):
        write_rows(tmp_path / path, [{"question": f"1+1 {path}", "answer": "2"}])
    out = tmp_path / "out.json"
    files = ["--dataset", f"svamp,{tmp_path / 'mine.jsonl'}", "--out", str(out)]
    flags = ["--data-dir", str(tmp_path), "--split", "all", "--max_new_tokens", "4"]
    evaluation.main(["--model", str(tiny_folder), *files, *flags])
    assert len(json.loads(out.read_text())["results"]) == 2


def test_compare_against_enumeration():
    """All 2^8 flips of the differences' signs."""
    a, b = np.array([1, 1, 1, 1, 0, 1, 0, 1]), np.array([0, 1, 0, 0, 0, 1, 1, 0])
    first, second = ({"success": list(map(float, x))} for x in (a, b))
    difference, (low, high), p = report.compare(first, second)
    signs = np.array(list(itertools.product((-1, 1), repeat=8)))
    extreme = np.abs(signs @ (a - b)) >= abs((a - b).sum())
    assert difference == 3 / 8 and p == pytest.approx(extreme.mean(), abs=0.02)
    assert low < difference < high and low == pytest.approx(-0.125, abs=0.13)
    assert report.compare(first, first)[2] == 1


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
        ("--model x --out FOLDER", "--out FOLDER: a folder"),
        ("--model x --out FILE/x.json", "--out FILE/x.json: cannot write in FILE"),
        ("--model x --save_samples FOLDER", "--save_samples FOLDER: a folder"),
        ("--model x --save_samples FILE/x", "--save_samples FILE/x: cannot write in FILE"),
        ("--model x --dataset FOLDER", "FOLDER has no test"),
        ("--model x --limit 9999", "cannot take 9999 questions"),
        ("--plot nowhere", "holds no metrics.jsonl"),
        ("--plot nowhere --out a.pdf", "not the name of a .png"),
    ],
)
def test_command_line_refuses_before_it_loads_a_model(arguments, message, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "load_model", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").touch()
    (tmp_path / "FOLDER").mkdir()
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        evaluation.main(arguments.split())
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--against BEFORE --limit 4 --max_new_tokens 1", "those were other questions"),
        ("--against EMPTY --limit 5 --max_new_tokens 1", "--against holds no greedy of arithmetic"),
        (
            "--against BEFORE --samples 2 --limit 5 --max_new_tokens 1",
            "--against holds no mean of 2 of arithmetic",
        ),
        ("--max_new_tokens 300", "no arithmetic question fits the context of 256"),
        ("--max_new_tokens 245", "too long for the context of 256 with --max_new_tokens 245"),
    ],
)
def test_command_line_refuses_before_it_samples(tiny_folder, tmp_path, monkeypatch, flags, message):
    before = tmp_path / "before.json"
    common = ["--model", str(tiny_folder), "--device", "cpu"]
    first = ["--limit", "5", "--max_new_tokens", "1", "--out", str(before)]
    evaluation.main([*common, *first])
    monkeypatch.setattr(evaluation, "generate", None)
    empty = tmp_path / "empty.json"
    empty.write_text('{"results": {}}')
    flags = flags.replace("BEFORE", str(before)).replace("EMPTY", str(empty)).split()
    with pytest.raises(ValueError, match=message):
        evaluation.main([*common, *flags, "--out", str(tmp_path / "after.json")])


def test_skip_long_leaves_out_what_does_not_fit(tiny_folder, tmp_path, capsys):
    out = tmp_path / "out.json"
    chains = ["1+2+3+4+5+6+7+8", "1+2"]
    rows = [{"question": chain, "answer": "3"} for chain in chains]
    data_file = write_rows(tmp_path / "rows.jsonl", rows)
    arguments = ["--model", tiny_folder, "--dataset", data_file, "--out", out, "--skip_long"]
    length = len(PLAIN_PROMPT)  # a token a character, of the tiny tokenizer
    room = 256 - length + len("{question}") - len(chains[1])
    evaluation.main([*map(str, arguments), "--max_new_tokens", str(room)])
    assert "left out 1 of 2" in capsys.readouterr().err
    [results] = json.loads(out.read_text())["results"].values()
    assert results["greedy"]["n"] == 1


def test_program_says_one_line_and_exits_with_2(tmp_path):
    command = [sys.executable, str(ROOT / "eval.py"), "--model", str(tmp_path)]
    done = subprocess.run([*command, "--limit", "-1"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "eval.py: --limit -1 must be at least 0\n"
