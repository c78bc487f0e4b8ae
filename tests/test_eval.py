"""Questions, grading and measures: against tables, brute force and hand-counted cases."""

import argparse
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
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import eval as sfl_eval
from eval import (Question, arithmetic, decode_response, encode_prompts, encode_response, evaluate, final_answer, grade,
                  load_questions, majority, parse_number, pass_at_k, rewards)
from rollout import Rollout


def number(answer):
    return Question("", answer)


def word_tokenizer():
    words = ["<pad>", "<eos>", "\n", "#### ", "+", "-", "="] + [str(i) for i in range(97)]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d+|#### |\n|."), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>")


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    tokenizer = word_tokenizer()
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=128, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id))
    return model.eval(), tokenizer


def written(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


# ----------------------------------------------------------------------------------------------------------------------
# Data sets


def test_arithmetic_solutions_are_right_and_grade_1():
    for question in arithmetic(300, 3, {1: 1, 4: 2, 12: 1}):
        terms = re.findall(r"[+-]?\d+", question.prompt)
        assert question.prompt.endswith("\n") and len(terms) - 1 == question.level
        assert all(1 <= abs(int(t)) <= 9 for t in terms[1:]) and 0 <= int(terms[0]) < 97
        assert int(question.answer) == sum(map(int, terms)) % 97
        *steps, last = question.solution.split("\n")
        assert last == f"#### {question.answer}" and len(steps) == question.level
        value = terms[0]
        for step, term in zip(steps, terms[1:]):  # each step restates its operands and hands its result on
            left, result = step.split("=")
            assert left == value + term and (int(value) + int(term) - int(result)) % 97 == 0
            value = result
        assert value == question.answer and grade(question.solution, question) == 1
        assert grade(f"#### {question.answer}", question) == 1
        assert grade(f"#### {(int(question.answer) + 1) % 97}", question) == 0


def test_arithmetic_splits_are_disjoint_distinct_and_seeded():
    train, test = load_questions("arithmetic", "train"), load_questions("arithmetic", "test")
    assert len(train) == 2048 and len(test) == 512
    prompts = [q.prompt for q in train + test]
    assert len(set(prompts)) == len(prompts)
    for questions in (train, test):
        share = {level: count / len(questions) for level, count in Counter(q.level for q in questions).items()}
        assert all(abs(share[level] - wanted) < 0.003 for level, wanted in sfl_eval.ARITHMETIC_LEVELS.items())
        assert {q.level for q in questions[:100]} >= {1, 12}  # shuffled
    assert load_questions("arithmetic", "train", seed=5) == train
    assert arithmetic(50, 1) == arithmetic(50, 1) != arithmetic(50, 2)
    assert not {q.prompt for q in arithmetic(1300, 8, {1: 1})} & {q.prompt for q in arithmetic(300, 9, {1: 1}, "test")}
    assert [q.level for q in sorted(arithmetic(7, 0, {1: 1, 2: 1, 3: 1}), key=lambda q: q.level)].count(1) in (2, 3)


@pytest.mark.parametrize("arguments", [(0, 0), (5, 0, {}), (5, 0, {0: 1}), (5, 0, {1: -1, 2: 1}), (2000, 0, {1: 1})])
def test_arithmetic_refuses(arguments):
    with pytest.raises(ValueError, match="arithmetic"):
        arithmetic(*arguments)


def test_jsonl_file_and_folder(tmp_path):
    written(tmp_path / "train.jsonl", {"problem": "1+1?", "answer": 2, "level": 1}, "",
            {"prompt": " p? ", "answer": "1,000"})
    written(tmp_path / "test.jsonl", "\ufeff" + json.dumps({"question": "q?", "answer": "\\sqrt2", "solution": "root"}),
            {"question": "r?", "answer": "3", "solution": "so \\boxed{3}", "level": "easy"})
    one, two = load_questions(str(tmp_path), "train")
    assert one == Question("[MATH_TASK] Problem:\n1+1?\n\nSolution:", "2", None, "number", 1, "1+1?")
    assert two.question == "p?" and grade("#### 1000", two) == 1
    half, three = load_questions(str(tmp_path / "test.jsonl"), "test")
    assert half.kind == three.kind == "math"  # one kind for the whole file
    assert half.solution == " root\n#### \\sqrt2" and grade(half.solution, half) == 1  # the answer is made gradable
    assert three.solution == " so \\boxed{3}" and three.level == "easy" and grade(three.solution, three) == 1


def test_gsm8k_files(tmp_path):
    row = {"question": "Eggs?", "answer": "She has 16-3=<<16-3=13>>13.\nSo $<<13*2=26>>26.\n#### 26"}
    written(tmp_path / "test.jsonl", row)
    (question,) = load_questions("gsm8k", "test", data_dir=tmp_path)
    assert question.answer == "26" and question.solution == " She has 16-3=13.\nSo $26.\n#### 26"
    assert question.prompt + question.solution == "[MATH_TASK] Problem:\nEggs?\n\nSolution:" + question.solution
    assert load_questions(str(tmp_path), "test") == [question]  # the same rows, named by path


def test_gsm8k_from_the_hub(monkeypatch):
    import datasets
    rows = datasets.Dataset.from_list([{"question": "q", "answer": f"a\n#### {i}"} for i in (1, 2)])
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or rows)
    assert [q.answer for q in load_questions("gsm8k", "train")] == ["1", "2"]
    assert asked == [(("openai/gsm8k", "main"), {"split": "train"})]

    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach the Hub\nand more")
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ValueError, match="hub .Couldn't reach the Hub.: give --data-dir"):
        load_questions("gsm8k", "train")


def test_limit_is_a_seeded_subset_in_order():
    everything = load_questions("arithmetic", "test")
    some = load_questions("arithmetic", "test", limit=50, seed=1)
    places = [everything.index(q) for q in some]
    assert places == sorted(set(places)) and len(places) == 50
    assert some == load_questions("arithmetic", "test", limit=50, seed=1)
    assert some != load_questions("arithmetic", "test", limit=50, seed=2)
    assert load_questions("arithmetic", "test", limit=512) == everything


@pytest.mark.parametrize("content, message", [
    ("", "is empty"),
    ("\n \n", "is empty"),
    ('{"question": "q", "answer": "1"}\n{"question": ', "line 2: not JSON"),
    ('{"question": "q", "answer": ' + "1" * 5000 + "}", "line 1: not JSON"),
    ("[" * 100000, "line 1: not JSON"),
    ("[1]", "line 1: not a JSON object"),
    ('{"question": "q", "answer": "1"}\n\n{"answer": "1"}', "line 3: no text in a field 'question'"),
    ('{"question": "", "answer": "1"}', "line 1: no text in a field 'question'"),
    ('{"question": 5, "answer": "1"}', "line 1: no text in a field 'question'"),
    ('{"question": "q"}', "line 1: no text or number in a field 'answer'"),
    ('{"question": "q", "answer": true}', "line 1: no text or number in a field 'answer'"),
    ('{"question": "q", "answer": "x ####  "}', "line 1: no text or number in a field 'answer'"),
    ('{"question": "q", "answer": "1", "solution": 3}', "line 1: the field 'solution'"),
    ('{"question": "q", "answer": "1", "level": [1]}', "line 1: the field 'solution' must be text, and 'level'"),
])
def test_malformed_files_name_file_and_line(tmp_path, content, message):
    (tmp_path / "train.jsonl").write_text(content)
    for dataset, data_dir in ((str(tmp_path / "train.jsonl"), None), ("gsm8k", tmp_path)):
        with pytest.raises(ValueError, match=re.escape(message)) as raised:
            load_questions(dataset, "train", data_dir=data_dir)
        assert "train.jsonl" in str(raised.value) and "\n" not in str(raised.value)


def test_other_bad_requests(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "q", "answer": "1"}\n{"question": "caf\xe9", "answer": "1"}')
    written(tmp_path / "train.jsonl", {"question": "q", "answer": "#### some"})
    for message, arguments in [
        ("unknown data set 'gsm9k': give arithmetic, gsm8k, or", ("gsm9k", "train")),
        ("unknown split 'dev'", ("arithmetic", "dev")),
        ("missing.jsonl: No such file", ("missing.jsonl", "train")),
        ("no/such/folder: No such file", ("no/such/folder", "train")),
        ("test.jsonl: No such file", (str(tmp_path), "test")),
        ("latin.jsonl, line 2: not JSON", (str(tmp_path / "latin.jsonl"), "test")),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            load_questions(*arguments)
    with pytest.raises(ValueError, match="line 1: the answer 'some' is not a number"):
        load_questions("gsm8k", "train", data_dir=tmp_path)
    with pytest.raises(ValueError, match="nowhere/train.jsonl: No such file"):
        load_questions("gsm8k", "train", data_dir="nowhere")
    with pytest.raises(ValueError, match="is for --dataset gsm8k"):
        load_questions("arithmetic", "train", data_dir=tmp_path)
    for limit in (513, 0, -1):
        with pytest.raises(ValueError, match=f"cannot take {limit} questions: the test split of arithmetic has 512"):
            load_questions("arithmetic", "test", limit=limit)


# ----------------------------------------------------------------------------------------------------------------------
# Grading


@pytest.mark.parametrize("text, value", [
    ("18", 18), ("18.0", 18), ("18.", 18), ("$18", 18), ("18 dollars", 18), ("$18.00", 18), (r"\$18", 18),
    ("$18$", 18), ("US$18", 18), ("€18", 18), ("**18**", 18), ("**$18**", 18), ("18/day", 18), ("18 km/h", 18),
    ("018", 18), ("+18", 18), ("-18", -18), ("- 18", -18), ("\u221218", -18), ("-$18", -18), ("$-18", -18),
    ("a loss of -$18", -18),
    ("minus 18", -18), ("negative 18", -18), ("1,234", 1234), ("$1,234,567.89", Fraction(123456789, 100)),
    ("1{,}234", 1234), (r"1,\!234", 1234), (r"1\,234", 1234), ("3/4", Fraction(3, 4)),
    (r"\frac{3}{4}", Fraction(3, 4)), (r"\dfrac34", Fraction(3, 4)), (r"-\frac{1}{2}", Fraction(-1, 2)),
    ("18 1/2", Fraction(37, 2)), ("-3 1/2 hours", Fraction(-7, 2)), (r"2\frac{1}{2}", Fraction(5, 2)),
    (".5", Fraction(1, 2)), ("75%", 75), (r"75\%", 75), ("18 %", 18), (r"18^\circ", 18), (r"18\text{ cm}^2", 18),
    ("18 cm^2", 18), ("18 m²", 18), ("2 million", 2000000), ("18k", 18000), ("1e3", 1000),
    ("1e-05", Fraction(1, 100000)), ("9*2 = 18", 18), ("16 - 3 - 4 = 9", 9), ("x = 18", 18),
    ("the total cost = $18", 18), ("approximately 18 eggs", 18), ("18 = 18.0", 18), (r"\text{18}", 18), ("(18)", 18),
    ("i think 18", 18), ("dollars (18)", 18), ("-0", 0), ("10 am", 10), ("18-year", 18),
])
def test_numbers(text, value):
    assert parse_number(text) == value


@pytest.mark.parametrize("text", [
    "", "eighteen", "5 or 6", "5, 6", "5,6", "1.234,5", "1,23", "12,345,6", "1 234", "1'000", "1.2.3", "5:30",
    "18:00", "5-18", "5 - 18", "--18", "±18", "> 18", "≤18", "12/25/2020", "3/0", "3/4/5", "1/2 of 36", "5 + 5",
    "18*0", "2**3", "2^3", "18^2", "18²", "½", "18½", "٣", "１８", "一", "0x12", "3x2", "1_000", "x_{18}", "1{2}",
    "$5$6", r"\sqrt{18}", "√18", r"18\pi", "18π", "2x", "18!", r"5 \times 2", r"\frac{a}{2}", "18 (since 9*2=18)",
    "18~19", "x >= 18", "x != 18", "|-18|", "sqrt(18)", "f(18)", "18 = x", "x + 18", "x - 18",
    "2 + x", "1e9999", "1e999999999", "nan", "inf", "#",
    "-", ".", "1" * 301, "9" * 10000,
])
def test_not_one_number(text):
    assert parse_number(text) is None


@pytest.mark.parametrize("response, right", [
    ("9*2=18\n#### 18", True), ("#### $18.00", True), ("####18", True), ("#### 18 dollars a day.", True),
    ("####\n18", True), ("so \\boxed{18}", True), ("so $\\boxed{\\$18}$.", True), ("so \\boxed {\\text{18}}", True),
    ("\\fbox{18}", True), ("The answer is 18.", True), ("the answer is: $18.50, no", False), ("Answer: 18", True),
    ("**Answer:** 18", True), ("The answer is $\\boxed{18}$.", True), ("the answer is 18. She has 5 left.", True),
    ("The Answer Is 18!", True), ("The answer is 9*2 = 18 eggs", True), ("#### \\boxed{18}", True),
    ("the answer is **18**.", True), ("#### 5\n#### 18", True), ("#### 18\n#### 5", False),
    ("\\boxed{5} no, \\boxed{18}", True), ("\\boxed{18}, \\boxed{5}", False), ("The answer is 5.\n#### 18", True),
    ("#### Step 1: add 5\n#### Step 2\n\\boxed{18}", True), ("#### 18\n#### Done", True),
    ("The answer is 18.\n####", True), ("\\boxed{18} and \\boxed{", True),
    ("The answer is 18.\nThe answer is not 5.", True), ("18", False), ("", False), ("She has 18 eggs.", False),
    ("####", False), ("#### eighteen", False), ("#### 19", False), ("#### -18", False), ("#### 180", False),
    ("#### 1.8", False), ("#### 18.5", False), ("#### 5 or 18", False), ("#### 18 or 5", False),
    ("#### 18, 19", False), ("the answer is 5 or 18", False), ("\\boxed{18, 19}", False), ("\\boxed{18^2}", False),
    ("#### 18:30", False), ("#### 0x12", False), ("the answer is 18 because 3*6=18 and 2+2=4", False),
    ("\\boxed{18", False), ("answer 18", False), ("#### 18000" + "0" * 400, False),
    ("####" + " " * 297 + "1800", False), ("#### " + "0" * 400 + "18", False), ("#### " + "x" * 295 + " 18.5", False),
])
def test_grade_table(response, right):
    assert grade(response, number("18")) == float(right)
    assert type(grade(response, number("18"))) is float


def test_every_cut_of_the_window_reads_a_whole_number_or_none():
    for blanks in range(330):
        for marker, end in (("#### ", ""), ("the answer is ", ""), ("\\boxed{", "}")):
            assert grade(f"{marker}{' ' * blanks}18005{end}", number("18")) == 0
            assert grade(f"{marker}{'x' * blanks} 18.05{end}", number("18")) == 0
            assert grade(f"{marker}{'x' * blanks} 18 or 7{end}", number("18")) == 0


def test_last_number():
    for response, text in [("so she has 18 eggs.", "18"), ("18.0", "18.0"), ("5 then 1,234.", "1,234"), ("16-3", "3"),
                           ("it is -18", "-18"), ("3/4 of it", "3/4"), ("no digits", None), ("(-18)", "-18"),
                           ("1" * 100, None), ("." * 150 + "1" * 60, None), ("1" + "0" * 70 + "18", None)]:
        assert final_answer(response, last_number=True) == text
        assert final_answer(response) is None
    assert grade("#### 5, but 18", number("18"), last_number=True) == 0  # a marker has the word
    assert grade("the sum is 18", number("18"), last_number=True) == 1


def test_grading_is_linear_and_cannot_be_crashed():
    rng = np.random.default_rng(0)
    pieces = ["####", "\\boxed{", "the answer is ", "{", "}", "1", "1,", "=", "-", "\\frac", " ", "answer", "/", ".",
              "\n", "e9", "\ud800", "\0", "½"]
    started = time.perf_counter()
    for piece in pieces:
        long = piece * (1000000 // len(piece))
        for text in (long, "#### " + long, "#### 1" + piece * 250):
            grade(text, number("7"), last_number=True)
    for _ in range(1000):
        text = "".join(rng.choice(pieces, size=12))
        assert grade(text + "\n#### 77", number("7")) == 0
        grade("#### " + text, number("7"), last_number=True)
    assert time.perf_counter() - started < 30  # seconds; some 150 texts of a million characters


def test_a_question_that_cannot_be_graded():
    with pytest.raises(ValueError, match="kind 'essay'"):
        grade("#### 1", Question("", "1", kind="essay"))
    with pytest.raises(ValueError, match="'x' is not a number"):
        grade("#### 1", Question("", "x"))


@pytest.mark.skipif(not os.environ.get("SFL_GSM8K"), reason="SFL_GSM8K: a folder with GSM8K's {train,test}.jsonl")
def test_every_gsm8k_solution():
    folder, count = Path(os.environ["SFL_GSM8K"]), 0
    for split in ("train", "test"):
        raw = [json.loads(line)["answer"] for line in open(folder / f"{split}.jsonl", encoding="utf-8")]
        for question, text in zip(load_questions("gsm8k", split, data_dir=folder), raw, strict=True):
            count += 1
            head, answer = text.split("#### ")
            assert "<<" not in question.solution and grade(text, question) == grade(question.solution, question) == 1
            for right in (f"The answer is ${answer}.", f"\\boxed{{{answer}.0}}", f"#### {answer} dollars"):
                assert grade(head + right, question) == 1
            for wrong in (f"#### {answer}1", f"#### 1{answer}" if answer[0] != "-" else "#### 1", f"#### {answer}.5",
                          f"#### {answer} or 7", f"#### {answer}^2"):
                assert grade(head + wrong, question) == 0, wrong
            assert grade(f"{head}The result is {answer}", question) == 0 or "answer" in head.lower()
    assert count == 8792


def math_question(answer):
    pytest.importorskip("math_verify")
    return Question("", answer, kind="math")


@pytest.mark.parametrize("gold, answer, right", [
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\pi/2)", True), ("p - q", "-q+p", True), ("p - q", "q - p", False),
    (r"\frac{14}{3}", "14/3", True), (r"\frac{14}{3}", "4.6", False), (r"\text{even}", "even", True),
    (r"\text{even}", "odd", False), ("(1,234)", "1234", False), ("$10-4 n$", "10-4n", True),
    ("[0,1)", "(0,1)", False), ("9", "9", True), ("9", "9.0", True), ("9", "5 \\text{ or } 9", False),
    ("x", "(" * 280, False), ("x", "\\frac{" * 40, False), ("x", "\0", False), ("x", "\ud800", False),
    ("x", "a" * 1000000, False),
])
def test_math(gold, answer, right):
    assert grade(f"so $\\boxed{{{answer}}}$.", math_question(gold)) == float(right)


def test_math_takes_the_last_commitment():
    question = math_question("x+1")
    assert grade("\\boxed{x}, no: \\boxed{1+x}", question) == 1 and grade("\\boxed{1+x}, no: \\boxed{x}", question) == 0
    assert grade("#### $1+x$", question) == grade("The answer is $x + 1$.", question) == 1
    assert grade("x+1", question) == 0


def test_math_that_hangs_is_killed_and_the_next_is_graded(monkeypatch):
    question = math_question("x+y")
    assert grade("\\boxed{y+x}", question) == 1
    with monkeypatch.context() as patch:
        patch.setattr(sfl_eval, "JUDGE_SECONDS", 0.3)
        started = time.perf_counter()
        assert grade("\\boxed{9^{9^{9^{9}}}}", math_question("5")) == 0
        assert time.perf_counter() - started < 1.5
    assert grade("\\boxed{2y-x-y+2x}", question) == 1


def test_math_from_threads():
    question, graded = math_question("x+y"), []
    threads = [threading.Thread(target=lambda: graded.append(grade(f"\\boxed{{y+x+{i}-{i}}}", question)))
               for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert graded == [1.0] * 3


def test_math_verify_missing(monkeypatch):
    monkeypatch.setattr(sfl_eval, "find_spec", lambda _: None)
    assert grade("\\boxed{x + y}", Question("", "x+y", kind="math")) == 1  # the same text needs no algebra
    with pytest.raises(ValueError, match="pip install math-verify"):
        grade("\\boxed{z+x}", Question("", "x+z", kind="math"))


# ----------------------------------------------------------------------------------------------------------------------
# Text and tokens


def test_prompts_and_responses_of_the_word_tokenizer():
    tokenizer, question = word_tokenizer(), arithmetic(1, 0, {2: 1})[0]
    (prompt,), response = encode_prompts(tokenizer, [question]), encode_response(tokenizer, question.solution)
    assert len(prompt) == 6 and tokenizer.decode(prompt + response) == question.prompt + question.solution
    assert len(response) == 2 * 6 + 2  # a token a number: 37 + 5 = 42 newline, twice, then #### 34
    finished = Rollout(prompt, response + [tokenizer.eos_token_id], [], True)
    assert decode_response(tokenizer, finished) == question.solution
    cut = Rollout(prompt, response, [], False)
    assert decode_response(tokenizer, cut) == question.solution
    graded = rewards(tokenizer, [question, question], [[finished, cut], [cut, finished]])
    assert graded.dtype == np.float32 and graded.tolist() == [[1, 0], [0, 1]]  # unfinished: 0


def test_bos_is_kept_eos_is_not_and_the_chat_template_writes_its_own():
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", bos), ("<eos>", eos)])
    plus = tokenizer.convert_tokens_to_ids("+")
    assert encode_prompts(tokenizer, [Question("+", "1")]) == [[bos, plus]]
    assert encode_response(tokenizer, "++") == [plus, plus]
    with pytest.raises(ValueError, match="no chat template"):
        encode_prompts(tokenizer, [Question("+", "1")], chat="on")
    with pytest.raises(ValueError, match="unknown chat 'yes'"):
        encode_prompts(tokenizer, [], chat="yes")
    tokenizer.chat_template = ("{{ bos_token }}{% for m in messages %}={{ m.content[:1] }}{% endfor %}"
                               "{% if add_generation_prompt %}-{% endif %}")
    equals, minus = tokenizer.convert_tokens_to_ids(["=", "-"])
    assert encode_prompts(tokenizer, [Question("+", "1", question="-")]) == [[bos, equals, minus, minus]]
    assert encode_prompts(tokenizer, [Question("+", "1", question="-")], chat="off") == [[bos, plus]]


def test_response_has_no_word_start_mark():
    core = Tokenizer(models.WordLevel({"▁": 0, "▁a": 1, "a": 2, "\n": 3, "?": 4}, unk_token="?"))
    core.normalizer = normalizers.Prepend("▁")  # what a Llama 2 tokenizer does to all it is given
    core.pre_tokenizer = pre_tokenizers.Split(Regex("▁a|\n|."), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    assert tokenizer("a", add_special_tokens=False).input_ids == [1] and encode_response(tokenizer, "a") == [2]


def test_stop_ids(tiny):
    model, tokenizer = tiny
    assert sfl_eval.stop_ids(model, tokenizer) == [1]
    try:
        model.generation_config.eos_token_id = [7, 1]
        assert sfl_eval.stop_ids(model, tokenizer) == [1, 7]
        model.generation_config.eos_token_id = None
        bare = word_tokenizer()
        bare.eos_token = None
        with pytest.raises(ValueError, match="no stop token"):
            sfl_eval.stop_ids(model, bare)
    finally:
        model.generation_config.eos_token_id = 1


def test_load_model(tiny, tmp_path):
    for module in tiny:
        module.save_pretrained(tmp_path / "run" / "model")
    for path in (tmp_path / "run", tmp_path / "run" / "model"):
        model, tokenizer = sfl_eval.load_model(str(path))
        assert not model.training and model.dtype == torch.float32 and tokenizer.eos_token_id == 1
        assert torch.equal(model.lm_head.weight, tiny[0].lm_head.weight)
    assert sfl_eval.load_model(tmp_path / "run", device="auto", dtype="bfloat16")[0].dtype == torch.bfloat16
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", "./no/such/model"):
        with pytest.raises(ValueError, match="cannot load a model from .*: give --model a folder") as raised:
            sfl_eval.load_model(path)
        assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match="unknown dtype 'int8'"):
        sfl_eval.load_model(tmp_path / "run", dtype="int8")
    with pytest.raises(ValueError, match="no device 'tpu' here: give auto or"):
        sfl_eval.load_model(tmp_path / "run", device="tpu")


# ----------------------------------------------------------------------------------------------------------------------
# Measures


def test_pass_at_k_by_enumeration():
    for n in range(1, 8):
        for right, k in itertools.product(range(n + 1), range(1, n + 1)):
            draws = list(itertools.combinations([True] * right + [False] * (n - right), k))
            assert pass_at_k(right, n, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-12)
    assert pass_at_k(3, 100000, 50000) == pytest.approx(1 - 0.5**3, abs=1e-4)  # no overflow


def test_majority_by_drawing_among_the_tied():
    rng = np.random.default_rng(0)
    for _ in range(300):
        answers = [[None, 1, 2, 3][i] for i in rng.integers(0, 4, rng.integers(1, 7))]
        graded = [float(a == 2) for a in answers]
        counts = Counter(a for a in answers if a is not None)
        tied = [a for a, c in counts.items() if c == max(counts.values())]
        assert majority(answers, graded) == (tied.count(2) / len(tied) if tied else 0)
    assert majority([None, None, 2], [0.0, 0.0, 1.0]) == 1  # no answer is no vote
    assert [sfl_eval.vote(t) for t in ("18", "18.0", "$18", "18 dollars")] == [18] * 4
    assert sfl_eval.vote("x + 1") == sfl_eval.vote("x+ 1") != sfl_eval.vote("x+2")


def test_evaluate_counts(monkeypatch, tiny):
    model, tokenizer = tiny
    questions = arithmetic(3, 0, {1: 2, 3: 1})
    questions.sort(key=lambda q: q.level)
    wrong = [str((int(q.answer) + 1) % 97) for q in questions]
    texts = [[q.answer] * right + [w] * (4 - right) for q, w, right in zip(questions, wrong, (4, 1, 2))]
    unfinished = (0, 0)  # the first of four right answers is cut off

    def fake(model, prompts, *, n, **settings):
        assert n == 4 and settings["temperature"] == 1.0 and settings["stop_ids"] == [1]
        assert prompts == encode_prompts(tokenizer, questions)
        ends = [[(i, j) != unfinished for j in range(4)] for i in range(3)]
        return [[Rollout(prompt, encode_response(tokenizer, f"#### {text}") + [1] * end, [], end)
                 for text, end in zip(*row)] for prompt, *row in zip(prompts, texts, ends)]
    monkeypatch.setattr(sfl_eval, "generate", fake)
    result = evaluate(model, tokenizer, questions, samples=4, temperature=1.0)

    def close(name, values):
        assert result[name] == pytest.approx(np.mean(values), abs=1e-6)
        assert result[name + "_se"] == pytest.approx(np.std(values, ddof=1) / math.sqrt(3), abs=1e-6)
    for name in ("accuracy", "mean_accuracy", "pass@1"):
        close(name, [3 / 4, 1 / 4, 2 / 4])
    close("pass@2", [1, 1 / 2, 5 / 6])
    close("pass@4", [1, 1, 1])
    close("maj@4", [1, 0, 1 / 2])  # the third is tied, two and two
    assert "pass@8" not in result and result["n"] == 3 and result["samples"] == 4
    assert result["success"] == [0.75, 0.25, 0.5]
    assert result["finished"] == pytest.approx(11 / 12) and result["response_length"] == pytest.approx(35 / 12)
    assert result["by_level"][1] == dict(n=2, accuracy=0.5, se=pytest.approx(0.25))
    assert result["by_level"][3] == dict(n=1, accuracy=0.5, se=None)
    assert result["examples"][0]["reward"] == 0 and result["examples"][1]["response"] == f"#### {questions[1].answer}"
    json.dumps(result)
    table = sfl_eval.table(result, result)
    assert "maj@4" in table and "0.500" in table and len({len(line) for line in table.split("\n")[1:4]}) == 1


def test_evaluate_with_the_engine(tiny):
    model, tokenizer = tiny
    questions = load_questions("arithmetic", "test", limit=6)
    greedy = evaluate(model, tokenizer, questions, max_new_tokens=8)
    assert greedy == evaluate(model, tokenizer, questions, max_new_tokens=8) and "pass@1" not in greedy
    sampled = evaluate(model, tokenizer, questions, samples=3, temperature=1.0, max_new_tokens=8, seed=1)
    assert set(sampled) >= {"pass@1", "pass@2", "maj@3"} and 1 <= sampled["response_length"] <= 8
    with pytest.raises(ValueError, match="no questions"):
        evaluate(model, tokenizer, [])
    with pytest.raises(ValueError, match="samples=4 at temperature=0"):
        evaluate(model, tokenizer, questions, samples=4)
    with pytest.raises(ValueError, match="with max_new_tokens=500 it passes"):
        evaluate(model, tokenizer, questions, max_new_tokens=500)


# ----------------------------------------------------------------------------------------------------------------------
# Curves and the command line


def fake_run(folder, seed=0):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    rows = [dict(iteration=i + 1, reward_mean=rng.random(), learnable=0.3, solved_by_all=0.2, solved_by_none=0.5,
                 tokens_generated=100, seconds_rollout=1.25, seconds_credit=0.25, seconds_update=0.5,
                 kl=None) for i in range(12)]
    for row in rows[3::4]:
        row.update(eval_accuracy=rng.random(), tokens_scored=900, tokens_credit=100, seconds_score=2.0)
    written(folder / "metrics.jsonl", {"iteration": 0, "eval_accuracy": 0.1}, *rows)
    return folder


def test_plot(tmp_path, capsys):
    runs = [str(fake_run(tmp_path / name, seed)) for seed, name in enumerate(("sfl", "uniform", "other/sfl"))]
    rows = sfl_eval.read_run(runs[0])
    assert [row["tokens"] for row in rows[:6]] == [0, 100, 200, 300, 1400, 1500]
    assert [row["seconds"] for row in rows[:6]] == [0, 2, 4, 6, 10, 12]
    sfl_eval.main(["--plot", *runs, "--out", str(tmp_path / "new" / "a.png")])
    assert (tmp_path / "new" / "a.png").read_bytes().startswith(b"\x89PNG")
    sfl_eval.main(["--plot", runs[1]])
    assert (tmp_path / "uniform" / "curves.png").exists() and "wrote" in capsys.readouterr().out


def test_plot_of_runs_with_little_in_them(tmp_path):
    (tmp_path / "bare").mkdir()
    written(tmp_path / "bare" / "metrics.jsonl", {"iteration": 0})
    sfl_eval.plot([tmp_path / "bare"] * 9, tmp_path / "a.png")


def test_plot_refuses(tmp_path):
    fake_run(tmp_path / "run")
    with pytest.raises(ValueError, match="holds no metrics.jsonl"):
        sfl_eval.main(["--plot", str(tmp_path)])
    with pytest.raises(ValueError, match="not the name of a .png"):
        sfl_eval.main(["--plot", str(tmp_path / "run"), "--out", str(tmp_path / "a.pdf")])
    for row, message in [({"reward_mean": 1}, "line 1: no number in the field 'iteration'"),
                         ({"iteration": 1, "learnable": "x"}, "line 1: no number in the field 'learnable'"),
                         ("{", "line 1: not JSON")]:
        written(tmp_path / "run" / "metrics.jsonl", row)
        with pytest.raises(ValueError, match=message):
            sfl_eval.main(["--plot", str(tmp_path / "run")])


def test_command_line_evaluates(tiny, tmp_path, capsys):
    for module in tiny:
        module.save_pretrained(tmp_path / "run" / "model")
    arguments = ["--model", str(tmp_path / "run"), "--limit=5", "--max-new-tokens", "4", "--device", "cpu"]
    sfl_eval.main([*arguments, "--samples", "2"])
    printed, report = capsys.readouterr().out, json.loads((tmp_path / "run" / "eval_arithmetic_test.json").read_text())
    assert report["greedy"]["n"] == 5 and report["sampled"]["samples"] == 2
    assert report["settings"]["temperature"] == 0.35 and "maj@2" in printed and "ran into --max_new_tokens 4" in printed
    sfl_eval.main([*arguments, "--out", str(tmp_path / "x" / "r.json")])
    assert json.loads((tmp_path / "x" / "r.json").read_text())["sampled"] is None


@pytest.mark.parametrize("arguments, message", [
    ([], "give --model DIR"), (["--model", "x", "--samples", "0"], "at least 1"),
    (["--nope"], "unrecognized arguments: --nope"),
    (["--model", "x", "--samples", "two"], "invalid int value: 'two'"),
    (["--model", "x", "--dataset", "gsm9k"], "unknown data set"),
    (["--model", "x", "--temperature", "1"], "are for several samples"),
    (["--model", "x", "--top-p", "1"], "are for several samples"),
    (["--model", "x", "--data-dir", "y"], "is for --dataset gsm8k"),
])
def test_command_line_refuses(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        sfl_eval.main(arguments)


def test_flags_may_have_hyphens():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data_dir")
    parser.add_argument("rest", nargs="?")
    assert sfl_eval.parse_args(parser, ["--data-dir=a-b", "c-d"]) == argparse.Namespace(data_dir="a-b", rest="c-d")
    assert sfl_eval.parse_args(parser, ["--data_dir", "a-b"]).data_dir == "a-b"


def test_program_says_one_line_and_exits_with_2(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "eval.py"), "--model", str(tmp_path), "--limit", "9999"],
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "eval.py: cannot take 9999 questions: the test split of arithmetic has 512\n"


def test_ctrl_c_is_130(capsys):
    def interrupted():
        raise KeyboardInterrupt
    with pytest.raises(SystemExit) as stopped:
        sfl_eval.command_line(interrupted)
    assert stopped.value.code == 130 and "interrupted" in capsys.readouterr().err
