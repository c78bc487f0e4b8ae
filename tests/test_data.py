"""Questions, data sets in every shape they come in, text and tokens, models on disk."""

import copy
import json
import os
import random
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import read_rows, small_llama, write_rows
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import data
import sft
from data import Question, arithmetic, load_questions
from eval import grade
from plumbing import checkpoint
from plumbing.files import SUFFIXES
from rollout import Rollout

EVAL_DATA = os.environ.get("SFL_EVAL_DATA")  # a folder with math500.jsonl and three others
GSM8K = os.environ.get("SFL_GSM8K")
EVALUATION_ONLY = [name for name, source in data.DATASETS.items() if source[2] is None]


def numbered(start, stop):
    """Rows that can be told apart."""
    return [{"question": f"What is {i}?", "answer": str(i)} for i in range(start, stop)]


def numbers(questions):
    """Which of the numbered rows these are."""
    return [int(q.answer) for q in questions]


def refused(message, *arguments, **settings):
    """Loading fails in one line that says this."""
    with pytest.raises(ValueError, match=message) as raised:
        load_questions(*arguments, **settings)
    assert "\n" not in str(raised.value)


# --------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize("hurry", [None, {1: 1, 2: 1, 3: 1}])
def test_arithmetic_solutions_hand_on_their_results(hurry):
    """And each line counts its last term: of one term that is right."""
    rng = random.Random(0)
    counts = Counter()
    for _ in range(200):
        chain = data.draw_chain(rng, 6)
        assert set(chain[1:]) <= set(data.TERMS) and len(set(chain[1:])) == 6
        *lines, last = data.solve(chain, hurry, rng).split("\n")
        assert "".join(re.sub(r"^\d+|=.*", "", line) for line in lines) == "".join(chain[1:])
        value = str(chain[0])
        for line in lines:
            left, result = line.split("=")
            start, *terms = re.findall(r"[+-]?\d+", left)
            assert start == value and (int(start) + int(terms[-1]) - int(result)) % 97 == 0
            counts[len(terms)] += 1
            value = result
        assert last == f"#### {value}"
    assert set(counts) == ({1, 2, 3} if hurry else {1})
    assert data.solve((3, "+7", "-5"), {2: 1}, rng) == "3+7-5=95\n#### 95"
    assert data.solve((3, "+7", "-5")) == "3+7=10\n10-5=5\n#### 5"


@pytest.mark.parametrize("share", [0.08, 0.5])
def test_arithmetic_pools_are_disjoint_distinct_and_as_announced(monkeypatch, share):
    monkeypatch.setattr(data, "LEARNABLE_SHARE", share)
    splits = {split: load_questions("arithmetic", split) for split in ("train", "test")}
    prompts = [q.prompt for questions in splits.values() for q in questions]
    assert len(set(prompts)) == len(prompts)
    for split, questions in splits.items():
        size = data.POOL_SIZES[split]
        levels = [q.level for q in questions]
        assert abs(len(levels) - size) <= len(set(levels)) and levels != sorted(levels)
        wanted = sum(level in data.STEPS_WANTED for level in levels)
        assert wanted / size == pytest.approx(share if split == "train" else 1, abs=0.01)
    assert sum(q.level == 1 for q in splits["train"]) == round(0.6 * (1 - share) * 1280)
    assert max(q.level for q in splits["test"]) == 8 and max(levels) == 8
    assert load_questions("arithmetic", "train", seed=5) == splits["train"]
    assert load_questions("arithmetic", "all") == splits["train"] + splits["test"]


def test_arithmetic_questions_are_right_seeded_and_split_by_a_hash():
    levels = {1: 1, 4: 1, 12: 1}
    for question in arithmetic(120, 3, levels):
        start, *terms = map(int, re.findall(r"[+-]?\d+", question.prompt))
        assert question.prompt.endswith("\n") and len(terms) == question.level
        assert 0 <= start < 97 and question.answer == str((start + sum(terms)) % 97)
        assert grade(question.solution, question) == 1
    assert arithmetic(50, 1, levels) == arithmetic(50, 1, levels) != arithmetic(50, 2, levels)
    many = {q.prompt for q in arithmetic(800, 8, {1: 1})}  # most that there are of this level
    assert not many & {q.prompt for q in arithmetic(80, 9, {1: 1}, "test")}
    with pytest.raises(ValueError, match="arithmetic has no 990 train questions of level 1"):
        arithmetic(990, 0, {1: 1})


# --------------------------------------------------------------------------- a row

# fmt: off
ROWS = [  # row, question, answer, solution, level
    # the plain form, numbers as text or not
    ({"problem": "1+1?", "answer": 2, "level": 1}, "1+1?", "2", None, 1),
    ({"prompt": " p? ", "answer": "1,000"}, "p?", "1,000", None, None),
    ({"question": "q?", "answer": 0.5}, "q?", "0.5", None, None),
    ({"question": "q?", "answer": 0}, "q?", "0", None, None),
    ({"question": "q?", "answer": 0, "result": "5"}, "q?", "0", None, None),
    # a solution that does not say its answer is completed, for the grader must find it
    ({"question": "q", "answer": "3", "solution": "so"}, "q", "3", " so\n#### 3", None),
    ({"input": "q", "answer": 3, "solution": "\\boxed3", "level": "L"}, "q", "3", " \\boxed3", "L"),
    # GSM8K: the solution in the answer, with notes for a calculator
    ({"question": "q", "answer": "She has <<16-3=13>>13.\nSo $<<13*2=26>>26.\n#### 26"},
     "q", "26", " She has 13.\nSo $26.\n#### 26", None),
    # SVAMP: other names, and capitals
    ({"Question": "H?", "question_concat": "3. H?", "Answer": "3.0"}, "3. H?", "3.0", None, None),
    # as their authors ship them: SVAMP, ASDiv, MAWPS
    ({"Body": "He has 3 eggs.", "Question": "How many?", "Answer": 3.0, "Equation": "3"},
     "He has 3 eggs. How many?", "3.0", None, None),
    ({"body": "7 red, 2 green.", "question": "All?", "answer": "9 (apples)", "formula": "7"},
     "7 red, 2 green. All?", "9", None, None),
    ({"sQuestion": "q", "lEquations": ["X=2"], "lSolutions": [2.0]}, "q", "2.0", None, None),
    ({"input": "q", "target": 7}, "q", "7", None, None),
    ({"question": "q", "chain": "<c/>", "result": "9"}, "q", "9", None, None),
    ({"question": "q", "answer": "3 (mod 7)"}, "q", "3 (mod 7)", None, None),
    # pandas writes whole numbers as 3.0 where some are missing
    ({"question": "q", "answer": "3", "level": 3.0}, "q", "3", None, 3),
    ({"question": "q", "answer": "3", "level": float("nan")}, "q", "3", None, None),
    ({"question": "q", "answer": "3", "level": ""}, "q", "3", None, None),
    # Alpaca; LLM-Adapters, whose output is a solution only if it comes to the answer
    ({"instruction": "Add.", "input": "3 and 4", "output": "3+4=7\n#### 7"},
     "Add.\n\n3 and 4", "7", " 3+4=7\n#### 7", None),
    ({"instruction": "1+1?", "input": "", "output": "2"}, "1+1?", "2", " 2\n#### 2", None),
    ({"instruction": "q", "output": "So it is 6. The answer is 6.", "answer": "6.0"},
     "q", "6.0", " So it is 6. The answer is 6.\n#### 6.0", None),
    ({"question": "q", "response": "#### 5", "answer": "6"}, "q", "6", None, None),
    # MetaMath
    ({"query": "q", "response": "The answer is: 5"}, "q", "5", " The answer is: 5\n#### 5", None),
    # verl; messages; parts of a message; ShareGPT
    ({"prompt": [{"role": "system", "content": "Think."}, {"role": "user", "content": "q"}],
      "reward_model": {"style": "rule", "ground_truth": "72"}}, "q", "72", None, None),
    ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "#### 4"}]},
     "q", "4", " #### 4", None),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}],
      "ground_truth": ["4"]}, "q", "4", None, None),
    ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "\\boxed{4}"}]},
     "q", "4", " \\boxed{4}", None),
    # OlympiadBench: a context, lists
    ({"context": "Let n=2.", "question": "n?", "solution": ["two"], "final_answer": ["2"]},
     "Let n=2.\nn?", "2", " two\n#### 2", None),
    ({"context": None, "input": "q", "solution": [], "answer": [1, "2"]}, "q", "1, 2", None, None),
    # Minerva: the answer only inside the solution, the last of several boxes
    ({"problem": "f?", "solution": "\\boxed{1}, then \\boxed{\\frac{a}{b}}."},
     "f?", "\\frac{a}{b}", " \\boxed{1}, then \\boxed{\\frac{a}{b}}.", None),
    # Open-Reasoner-Zero: a dialogue; its evaluation sets
    ([{"from": "human", "value": "2+2?"}, {"from": "assistant", "ground_truth": {"value": "4"}}],
     "2+2?", "4", None, None),
    ({"prompt": [{"from": "user", "value": "2+3?"}], "final_answer": "5"}, "2+3?", "5", None, None),
]
# fmt: on


@pytest.mark.parametrize("row, question, answer, solution, level", ROWS)
def test_a_row_of_each_data_set(tmp_path, row, question, answer, solution, level):
    path = write_rows(tmp_path / "rows.json", [row])
    (loaded,) = load_questions(str(path), "all")
    found = (loaded.question, loaded.answer, loaded.solution, loaded.level)
    assert found == (question, answer, solution, level)
    assert loaded.prompt == f"[MATH_TASK] Problem:\n{question}\n\nSolution:"


def test_an_answer_that_is_none_is_quoted(tmp_path):
    for answer in (float("nan"), ""):
        path = str(write_rows(tmp_path / "rows.jsonl", [{"question": "q", "answer": answer}]))
        refused(f"no usable answer .*not '{answer}'", path, "all")
    refused("an empty name in --dataset 'arithmetic,'", "arithmetic,", "train")


def test_fields_that_are_named(tmp_path):
    row = {
        "frage": "1+1?",
        "target": "2",
        "why": "2 it is",
        "answer": "5",
        "a": {"b": 7, "c": None},
    }
    path = str(write_rows(tmp_path / "rows.json", [row]))
    fields = {"question": "frage", "answer": "target", "solution": "why"}
    (found,) = load_questions(path, "all", fields=fields)
    assert (found.question, found.answer, found.solution) == ("1+1?", "2", " 2 it is\n#### 2")
    looked_for = "no usable question in a field question_concat or question or .*"
    there = "the row's fields are frage, target, why, answer, a.b, a.c: name one with --"
    refused(looked_for + there + "question_field", path, "all")
    for name in ("a.b", "A.B"):
        assert load_questions(path, "all", fields=fields | {"answer": name})[0].answer == "7"
    for name in ("targets", "a.c"):  # is not there: no other is taken for it
        looked_for = f"no usable answer in a field {name}; {there}answer_field"
        refused(looked_for, path, "all", fields=fields | {"answer": name})
    # Of several data sets it is for one: gsm8k's own are known.
    write_rows(tmp_path / "gsm8k" / "train.jsonl", numbered(0, 1))
    other = write_rows(tmp_path / "other.jsonl", [{"question": "q", "gold": "7"}])
    both = load_questions(f"gsm8k,{other}", "train", data_dir=tmp_path, fields={"answer": "gold"})
    assert numbers(both) == [0, 7]


def test_solutions_of_calculator_notes_alone(tmp_path, capsys):
    answers = ["So <<16-3-4=9>>9.\nThen $<<9*2=18>>18.\n#### 18", "It is 5.\n#### 5"]
    answers += ["He has <<2*3=6>>6, 7 with the cat.\n#### 7", "<<1000*2=2000>>2000\n#### 2,000"]
    rows = [{"question": f"q{i}", "answer": answer} for i, answer in enumerate(answers)]
    write_rows(tmp_path / "train.jsonl", rows)
    questions = load_questions("gsm8k", "train", data_dir=tmp_path, notes=True)
    shown = [" 16-3-4=9\n9*2=18\n#### 18", None, None, " 1000*2=2000\n#### 2,000"]
    assert [q.solution for q in questions] == shown
    assert [grade(q.solution, q) for q in questions if q.solution] == [1, 1]
    assert "2 of 4 questions have no calculator notes that end in" in capsys.readouterr().err
    text = load_questions("gsm8k", "train", data_dir=tmp_path)
    assert [q.answer for q in questions] == [q.answer for q in text] == ["18", "5", "7", "2,000"]
    assert text[1].solution == " It is 5.\n#### 5" and capsys.readouterr().err == ""


@pytest.mark.skipif(not GSM8K, reason="SFL_GSM8K: a folder with GSM8K's train.jsonl, test.jsonl")
def test_nearly_all_of_gsm8k_has_notes():
    questions = load_questions("gsm8k", "train", data_dir=GSM8K, notes=True)
    shown = [q for q in questions if q.solution]
    assert len(shown) > 7000
    for q in shown:
        assert re.fullmatch(rf" ([-+*/().0-9]+=[-0-9./]+\n)+#### {re.escape(q.answer)}", q.solution)


# fmt: off
@pytest.mark.parametrize("more, kind, said", [
    ({}, "number", ""),
    ({"a": "$1,234.50", "b": "-3/4", "c": "50%"}, "number", ""),
    ({"a": "n/a"}, "math", "1 of 41 answers are no numbers .*line 41: the answer 'n/a'"),
    ({"a": "36/2"}, "math", "1 of 41"),  # the grader reads no number
    ({"a": "\\pi", "b": "\\sqrt2", "c": "x"}, "math", ""),  # so many are no mistakes
    ({"What is 1?": "1.0"}, "number", ""),
    ({"What is 1?": "5"}, "number", "1 questions come twice.*line 2: .*'1'.*line 41: .*'5'"),
])
# fmt: on
def test_a_file_has_one_kind_and_odd_answers_are_named(tmp_path, capsys, more, kind, said):
    rows = numbered(0, 40) + [{"question": q, "answer": answer} for q, answer in more.items()]
    loaded = load_questions(str(write_rows(tmp_path / "rows.jsonl", rows)), "all")
    assert len(loaded) == len(rows) and {q.kind for q in loaded} == {kind}
    err = capsys.readouterr().err
    assert re.search(said, err) and err.count("\n") == bool(said)


# --------------------------------------------------------------------------- files and splits


# fmt: off
@pytest.mark.parametrize("file, content", [
    ("rows.jsonl", "\ufeff{}\n\n{}\n \n{}"),  # blank lines and a byte order mark
    ("rows.json", "\ufeff[\n{},\n{},\n{}]\n"),
    ("rows.json", "{}\n{}\n{}"),  # that is lines of JSON
])
# fmt: on
def test_forms_of_json(tmp_path, file, content):
    rows = map(json.dumps, numbered(0, 3))
    (tmp_path / file).write_text(content.format(*rows))
    assert numbers(load_questions(str(tmp_path / file), "all")) == [0, 1, 2]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_one_file_is_split_by_the_question(tmp_path, suffix):
    """The same split in every format, whatever else the file holds. A folder needs none."""
    splits = ("train", "test", "all")
    write_rows(tmp_path / f"train{suffix}", numbered(0, 3))
    write_rows(tmp_path / f"test{suffix}", numbered(3, 5))
    parts = [numbers(load_questions(str(tmp_path), split)) for split in splits]
    assert parts == [[0, 1, 2], [3, 4], [0, 1, 2, 3, 4]]
    path = str(write_rows(tmp_path / f"rows{suffix}", numbered(0, 400)))
    train, test, both = (numbers(load_questions(path, split)) for split in splits)
    assert both == list(range(400)) == sorted(train + test)
    assert train == sorted(train) and test == sorted(test)  # the file's order
    assert 20 < len(test) < 60  # a tenth
    more = write_rows(tmp_path / "more.jsonl", numbered(100, 1000)[::-1])
    kept = [i for i in numbers(load_questions(str(more), "test")) if i < 400]
    assert kept == [i for i in reversed(test) if i >= 100]


# fmt: off
@pytest.mark.parametrize("name, files", [
    ("gsm8k", "gsm8k/train.jsonl gsm8k/test.jsonl"),
    ("gsm8k", "train.jsonl test.jsonl"),
    ("math", "math/train.parquet math/test.json"),
    ("svamp", "train.json test.parquet"),
    ("orz", "orz/train.json orz/test.json"),
    ("gsm8k", "openai/gsm8k/main/train.jsonl openai/gsm8k/main/test.jsonl"),
    ("owner/name", "owner/name/train.jsonl owner/name/test.jsonl"),  # as the message advises
])
# fmt: on
def test_data_dir_with_a_file_for_each_split(tmp_path, name, files):
    for file, start in zip(files.split(), (0, 5)):
        write_rows(tmp_path / file, numbered(start, start + 5))
    train = load_questions(name, "train", data_dir=tmp_path)
    test = load_questions(name, "test", data_dir=str(tmp_path))
    assert numbers(train) == [0, 1, 2, 3, 4] and numbers(test) == [5, 6, 7, 8, 9]
    if name in data.DATASETS:  # not what the rows suggest
        assert {q.kind for q in train + test} == {data.DATASETS[name][-1]}


# fmt: off
@pytest.mark.parametrize("name, file", [
    ("orz", "orz.jsonl"), ("orz", f"orz/{data.ORZ_FILE}"), ("owner/name", "owner/name.jsonl"),
    ("math500", "math500.jsonl"),
    ("olympiadbench", "OE_TO_maths_en_COMP/OE_TO_maths_en_COMP.parquet"),
])
# fmt: on
def test_data_dir_with_one_file(tmp_path, capsys, name, file):
    write_rows(tmp_path / file, numbered(0, 100))
    test = numbers(load_questions(name, "test", data_dir=tmp_path))
    if name in EVALUATION_ONLY:
        assert test == list(range(100))
    else:  # split as any one file is
        train = numbers(load_questions(name, "train", data_dir=tmp_path))
        assert sorted(train + test) == list(range(100)) and 0 < len(test) < 30
    assert capsys.readouterr().err == ""


def test_one_file_of_a_set_with_a_test_split_is_not_cut(tmp_path, capsys):
    """Whose is it? It is not cut to a tenth without a word. The rows are those that people have."""
    rows = [{"body": f"He saw {i}.", "question": "How many?", "answer": i + 0.0} for i in range(99)]
    write_rows(tmp_path / "svamp.csv", rows)
    whole = load_questions("svamp", "all", data_dir=tmp_path)
    assert [q.question for q in whole] == [f"He saw {i}. How many?" for i in range(99)]
    assert grade("#### 98", whole[98]) == 1 and capsys.readouterr().err == ""
    assert load_questions("svamp", "test", data_dir=tmp_path) == whole
    said = capsys.readouterr().err
    assert re.search("all of .*svamp.csv is taken for svamp's test split .*svamp/train.csv", said)
    message = "svamp's train or its test split: call it svamp/train.csv or svamp/test.csv, or give"
    refused(message, "svamp", "train", data_dir=tmp_path)


LAYOUTS = {
    "main": "main/{}-00000-of-00002.parquet main/{}-00001-of-00002.parquet",
    "data": "data/{}-00000-of-00002-0a1b2c3d.parquet data/{}-00001-of-00002-4e5f.parquet",
    "converted": "default/{}/0000.parquet default/{}/0001.parquet",
    "top": "{}-00000-of-00002.jsonl.gz {}-00001-of-00002.jsonl.gz",
    "numbered": "{}_0.csv {}_1.csv",
    "saved": "{}/data-00000-of-00002.arrow {}/data-00001-of-00002.arrow",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_folders_as_the_hub_has_them(tmp_path, layout):
    folder = tmp_path / "gsm8k"
    for start, split in enumerate(("train", "test")):
        for shard, file in enumerate(LAYOUTS[layout].format(split, split).split()):
            first = 10 * start + 3 * shard
            write_rows(folder / file, numbered(first, first + 3))
    write_rows(folder / "socratic" / "train-00000-of-00001.parquet", numbered(20, 22))
    for dataset, data_dir in [(str(folder), None), ("gsm8k", tmp_path), ("gsm8k", folder)]:
        for split, first in (("train", 0), ("test", 10)):
            questions = load_questions(dataset, split, data_dir=data_dir)
            assert numbers(questions) == list(range(first, first + 6))
        assert len(load_questions(dataset, "all", data_dir=data_dir)) == 12
    first, last = LAYOUTS[layout].format("train", "train").split()
    if "-of-" in last:
        (folder / first).unlink()
        refused(f"has 1 of the 2 files that {Path(last).name} is one of", str(folder), "train")


def test_what_datasets_saves_to_disk(tmp_path):
    from datasets import Dataset, DatasetDict

    both, one = tmp_path / "both", str(tmp_path / "one")
    rows = {"train": numbered(0, 5), "test": numbered(5, 9)}
    DatasetDict({name: Dataset.from_list(rows[name]) for name in rows}).save_to_disk(both)
    Dataset.from_list(numbered(0, 40)).save_to_disk(one, num_shards=2)
    assert numbers(load_questions(str(both), "train")) == [0, 1, 2, 3, 4]
    assert numbers(load_questions("svamp", "test", data_dir=both)) == [5, 6, 7, 8]
    whole, train, test = (load_questions(one, split) for split in ("all", "train", "test"))
    assert numbers(whole) == list(range(40)) == sorted(numbers(train + test))
    assert len(test) < 20  # by the hash


def test_a_folder_of_the_name_comes_first(tmp_path):
    for start, file in ((0, "gsm8k/test.jsonl"), (3, "gsm8k.jsonl"), (6, "test.jsonl")):
        write_rows(tmp_path / file, numbered(start, start + 3))
    assert numbers(load_questions("gsm8k", "test", data_dir=tmp_path)) == [0, 1, 2]


def test_unions(tmp_path, monkeypatch):
    write_rows(tmp_path / "gsm8k" / "train.jsonl", numbered(0, 3))
    write_rows(tmp_path / "math" / "train.jsonl", numbered(3, 5))
    write_rows(tmp_path / "folder" / "train.jsonl", numbered(5, 9))
    both = load_questions("gsm8k,math", "train", data_dir=tmp_path)
    assert numbers(both) == [0, 1, 2, 3, 4]
    assert [q.kind for q in both] == ["number"] * 3 + ["math"] * 2
    some = load_questions("gsm8k,math", "train", data_dir=tmp_path, limit=4)
    assert len(some) == 4 and set(numbers(some)) < {0, 1, 2, 3, 4}
    monkeypatch.chdir(tmp_path)
    for path in ("./folder", str(tmp_path / "folder")):  # and a name
        both = load_questions(f"{path},math", "train", data_dir=".")
        assert numbers(both) == [5, 6, 7, 8, 3, 4]
    made, read = (load_questions(name, "train") for name in ("arithmetic", "./folder"))
    assert load_questions("arithmetic,./folder", "train") == [*made, *read]
    write_rows(tmp_path / "train.jsonl", numbered(0, 9))  # whose? of one data set alone
    there = r"has no svamp/train or svamp \(\.jsonl.*it has folder, "
    refused(there, "gsm8k,svamp", "train", data_dir=tmp_path)


def test_limit_is_a_seeded_subset_in_order(tmp_path):
    path = str(write_rows(tmp_path / "rows.jsonl", numbered(0, 90)))
    limits = {"limit": 50, "seed": 1}, {"limit": 50, "seed": 1}, {"limit": 50, "seed": 2}
    some, same, other = (numbers(load_questions(path, "all", **limit)) for limit in limits)
    assert some == sorted(set(some)) and len(some) == 50 and some == same != other
    assert numbers(load_questions(path, "all", limit=90)) == list(range(90))


@pytest.mark.skipif(not EVAL_DATA, reason="SFL_EVAL_DATA: a folder with math500.jsonl and others")
@pytest.mark.parametrize("name", ["math500", "college_math", "olympiadbench", "minerva_math"])
def test_every_question_of_the_evaluation_data(name):
    questions = load_questions(name, "test", data_dir=EVAL_DATA)
    rows = read_rows(Path(EVAL_DATA, f"{name}.jsonl"))
    for question, row in zip(questions, rows, strict=True):
        assert (row.get("question") or row["problem"]).strip() in question.question
        assert (row.get("context") or "") in question.question
        assert question.kind == "math" and question.answer
        answer = row.get("final_answer") or row.get("answer")
        if answer is None:  # Minerva
            assert f"\\boxed{{{question.answer}}}" in re.sub(r"\s+(?=})", "", row["solution"])
        else:
            assert question.answer in (answer, ", ".join(answer))


@pytest.fixture
def hub(monkeypatch):
    """Stands in for `datasets.load_dataset`: hands out rows and notes what it was asked for."""
    hub = SimpleNamespace(rows=numbered(0, 3), asked=[])

    def load_dataset(*arguments, split):
        hub.asked.append((*arguments, split))
        return hub.rows

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    return hub


@pytest.mark.parametrize("name", [name for name in data.DATASETS if name != "orz"])
def test_a_data_set_comes_from_the_hub(hub, name):
    hub_id, configuration, train, test, kind = data.DATASETS[name]
    for split, its_name in (("test", test), ("train", train)):
        if its_name:
            questions = load_questions(name, split)
            assert hub.asked.pop() == (hub_id, configuration, its_name)
            assert numbers(questions) == [0, 1, 2] and {q.kind for q in questions} == {kind}


def test_a_data_set_of_the_hub_by_its_id(hub):
    hub.rows = [{"Frage": "1+1?", "Antwort": "2"}, {"Frage": "x?", "Antwort": "\\pi"}]
    fields = {"question": "Frage", "answer": "Antwort"}
    questions = load_questions("some-one/some.thing", "train", fields=fields)
    assert hub.asked == [("some-one/some.thing", None, "train")]
    found = [(q.question, q.answer, q.kind) for q in questions]
    assert found == [("1+1?", "2", "math"), ("x?", "\\pi", "math")]
    refused("test, row 0: no usable question in a field", "some-one/some.thing", "test")


def test_orz_is_a_file_of_the_hub_and_split(tmp_path, monkeypatch):
    path, asked = write_rows(tmp_path / "all.json", numbered(0, 100)), []
    download = lambda *where, **kind: asked.append(where) or path  # noqa: E731
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    train, test = (numbers(load_questions("orz", split)) for split in ("train", "test"))
    assert sorted(train + test) == list(range(100)) and 0 < len(test) < 30
    assert set(asked) == {(data.DATASETS["orz"][0], data.ORZ_FILE)}


@pytest.mark.parametrize("name", ["gsm8k", "orz"])
def test_no_hub_is_one_line_with_a_way_out(monkeypatch, name):
    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach the Hub\nand more")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    refused("hub .Couldn't reach the Hub.: give --data-dir", name, "train")


# --------------------------------------------------------------------------- bad data, bad requests

GOOD = '{"question": "q", "answer": "1"}'

# fmt: off
BAD_LINES = [
    ("", "is empty"),
    ("\n \n", "is empty"),
    (GOOD + '\n{"question": ', "line 2: not JSON"),
    ('{"question": "q", "answer": ' + "1" * 5000 + "}", "line 1: not JSON"),
    ('{"a": ' * 100000, "line 1: not JSON"),
    ('[\n{"question": "q"}]', "line 1: not a JSON object but a list: is it a .json file?"),
    ("7", "line 1: neither a JSON object nor a dialogue but '7'"),
    (GOOD.encode("utf-16"), "UTF-16, not UTF-8"),
    (GOOD.encode("utf-16-le"), "UTF-16, not UTF-8"),
    ("version https://git-lfs.github.com/spec/v1\noid sha256:4d\n", "a git-lfs pointer"),
    (GOOD.encode() + b'\n{"question": "caf\xe9", "answer": "1"}', "line 2: not JSON"),
    (GOOD + '\n{"question": "\\ud800", "answer": "1"}', "line 2: no usable question"),
    ('{"question": "q", "answer": NaN}', "no usable answer in a field answer or final_answer"),
    ('{"question": "q", "answer": "nan"}', "the row's fields are question, answer"),
    ('{"question": "q", "answer": [1, NaN]}', "no usable answer in a field"),
    ('{"question": "q", "answer": {"a": 1}}', "fields are question, answer.a"),
    ('{"question": "q", "solution": "no box"}', "line 1: no usable answer in a field"),
    ('{"prompt": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}',
     "no usable question in a field"),
    (GOOD + '\n\n{"answer": "1"}', "line 3: no usable question in a field"),
    ('{"question": "", "answer": "1"}', "line 1: no usable question in a field"),
    ('{"question": 5, "answer": "1"}', "line 1: no usable question in a field"),
    ('{"question": "q"}', "line 1: no usable answer in a field"),
    ('{"question": "q", "answer": true}', "line 1: no usable answer in a field"),
    ('{"question": "q", "answer": "x ####  "}', "line 1: no usable answer in a field"),
    ('{"question": "q", "answer": "1", "solution": 3}', "line 1: the field 'solution'"),
    ('{"question": "q", "answer": "1", "level": [1]}', "the level [1] is neither text nor"),
    ('{"question": "q", "answer": "1", "level": 2.5}', "the level 2.5 is neither text nor"),
]
BAD_FILES = [
    ("rows.json", '{"question": "q"}', "rows.json, line 1: no usable answer in a field"),
    ("rows.json", '{\n"question": "q"\n}', "rows.json, line 1: not JSON"),
    ("rows.json", "[1,", "rows.json: not JSON"),
    ("rows.json", '[{"question": "q"}]', "rows.json, entry 0: no usable answer"),
    ("rows.json", f"[{GOOD}, 1]", "rows.json, entry 1: neither"),
    ("rows.json", f"[{GOOD}, null]", "rows.json, entry 1: neither"),
    ("rows.json", f'[{GOOD}, [{{"value": "q"}}]]', "entry 1: no usable"),
    ("rows.json", f'[{GOOD}, [{{"from": "user", "value": "q"}}]]', "entry 1: no usable answer"),
    ("rows.json", f'[{GOOD}, {{"prompt": [], "answer": "1"}}]', "entry 1: no usable"),
    ("rows.json", f'[{GOOD}, {{"prompt": ["text"], "answer": "1"}}]', "entry 1: no usable"),
    ("rows.parquet", "no parquet", "cannot read .*rows.parquet"),
    ("rows.parquet", "version https://git-lfs.github.com/spec/v1", "a git-lfs pointer"),
    ("rows.arrow", "no arrow", "cannot read .*rows.arrow"),
    ("rows.jsonl.gz", "not zipped", "cannot read .*rows.jsonl.gz"),
    ("rows.csv", "question,answer\n", "rows.csv has no train questions"),
    ("rows.csv", "question,answer\nq,1,2\n", "line 2 has more fields than the header"),
    ("rows.csv", "question,answer\nq\n", "line 2: no usable answer in a field"),
    ("rows.csv", "question;answer\nq;1\n", "the row's fields are question;answer"),
    *[("train.jsonl", content, re.escape(message)) for content, message in BAD_LINES],
]
# fmt: on


@pytest.mark.parametrize("file, content, message", BAD_FILES)
def test_malformed_files_are_named(tmp_path, file, content, message):
    content = content if isinstance(content, bytes) else content.encode()
    (tmp_path / file).write_bytes(content)
    refused(message, str(tmp_path / file), "train")
    if file == "train.jsonl":
        refused(f"train.jsonl.*{message}", "gsm8k", "train", data_dir=tmp_path)


# fmt: off
BAD_REQUESTS = [
    ("unknown data set 'gsm9k', and no such file: give arithmetic, parity, gsm8k, .* or the path",
     "gsm9k", "train", {}),
    ("unknown data set 'gsm9k'", "arithmetic,gsm9k", "train", {}),
    ("unknown split 'dev': give train, test or all", "arithmetic", "dev", {}),
    ("'missing.jsonl', and no such file", "missing.jsonl", "train", {}),
    ("'folder/missing.jsonl', and no such file", "folder/missing.jsonl", "train", {}),
    ("'no/such/folder', and no such file", "no/such/folder", "train", {}),
    (r"has no test \(.*it has train.jsonl", "FOLDER", "test", {}),
    ("has no train and test", "FOLDER", "all", {}),
    (r"'./a', and no such file.* \(without a comma, which separates", "./a,b.jsonl", "train", {}),
    ("line 1: the answer 'some' is not a number", "gsm8k", "train", {"data_dir": "FOLDER"}),
    ("nowhere has no gsm8k/train or gsm8k", "gsm8k", "train", {"data_dir": "nowhere"}),
    ("for data sets with a name .*arithmetic", "arithmetic", "train", {"data_dir": "FOLDER"}),
    (r"cannot take 3 questions: .*FOLDER has 1 \(train", "FOLDER", "train", {"limit": 3}),
    ("cannot take 0 questions", "arithmetic", "test", {"limit": 0}),
    ("cannot take -1 questions", "arithmetic", "test", {"limit": -1}),
]
# fmt: on


@pytest.mark.parametrize("message, dataset, split, settings", BAD_REQUESTS)
def test_bad_requests(tmp_path, monkeypatch, message, dataset, split, settings):
    monkeypatch.chdir(tmp_path)
    write_rows("FOLDER/train.jsonl", [{"question": "q", "answer": "#### some"}])
    write_rows("a,b.jsonl", [{"question": "q", "answer": "1"}])
    dataset = dataset.replace("FOLDER", "./FOLDER")
    refused(message, dataset, split, **settings)


@pytest.mark.parametrize("name", EVALUATION_ONLY)
def test_data_sets_for_evaluation_are_not_trained_on(tmp_path, name):
    for file, count in ((f"{name}.jsonl", 9), (f"{name}/test.jsonl", 7)):
        write_rows(tmp_path / file, numbered(0, count))
        for names in (name, f"gsm8k,{name}"):
            message = f"{name} has no questions to train on"
            refused(message, names, "train", data_dir=tmp_path)
        for split in ("test", "all"):
            assert len(load_questions(name, split, data_dir=tmp_path)) == count


# --------------------------------------------------------------------------- text and tokens


def test_prompts_and_responses_of_arithmetic(tokenizer):
    question = arithmetic(1, 0, {2: 1})[0]
    (prompt,) = data.encode_prompts(tokenizer, [question])
    response = data.encode_response(tokenizer, question.solution)
    assert tokenizer.decode(prompt + response) == question.prompt + question.solution
    assert len(prompt) == 6  # a token a number: 37 + 5 - 8 newline
    assert len(response) == 2 * 6 + 2  # 37 + 5 = 42 newline, twice, then #### 34
    for end, finished in (([tokenizer.eos_token_id], True), ([], False)):
        rollout = Rollout(prompt, response + end, [], finished)
        assert data.decode_response(tokenizer, rollout) == question.solution


def test_bos_is_kept_eos_is_not_and_the_chat_template_writes_its_own():
    tokenizer = sft.tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", bos), ("<eos>", eos)]
    )
    plus, equals, minus = tokenizer.convert_tokens_to_ids(["+", "=", "-"])
    question = Question("+", "1", question="-")
    assert data.encode_prompts(tokenizer, [question]) == [[bos, plus]]
    assert data.encode_response(tokenizer, "++") == [plus, plus]
    for chat, message in (("on", "no chat template"), ("yes", "unknown chat 'yes'")):
        with pytest.raises(ValueError, match=message):
            data.encode_prompts(tokenizer, [question], chat=chat)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}={{ m.content[:1] }}{% endfor %}"
        "{% if add_generation_prompt %}-{% endif %}"
    )
    assert data.encode_prompts(tokenizer, [question]) == [[bos, equals, minus, minus]]
    assert data.encode_prompts(tokenizer, [question], chat="off") == [[bos, plus]]


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{% if %}", "{{ 1 + 'a' }}"])
def test_a_chat_template_that_fails_is_one_line(template):
    tokenizer, questions = sft.tiny_tokenizer(), arithmetic(1, 0, {1: 1})
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match="the chat template fails .*: give --chat off") as raised:
        data.encode_prompts(tokenizer, questions)
    assert "\n" not in str(raised.value)
    assert data.encode_prompts(tokenizer, questions, chat="off")


def test_response_has_no_word_start_mark():
    vocabulary = {"▁": 0, "▁a": 1, "a": 2, "\n": 3, "?": 4}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    core.normalizer = normalizers.Prepend("▁")  # what a Llama 2 tokenizer does to all it is given
    core.pre_tokenizer = pre_tokenizers.Split(Regex("▁a|\n|."), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    assert tokenizer("a", add_special_tokens=False).input_ids == [1]
    assert data.encode_response(tokenizer, "a") == [2]


def test_stop_ids(tokenizer):
    assert tokenizer.eos_token_id == 1
    for configured, expected in ((None, [1]), (7, [1, 7]), ([7, 1], [1, 7])):
        model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=configured))
        assert data.stop_ids(model, tokenizer) == expected
    model = SimpleNamespace(generation_config=None)
    assert data.stop_ids(model, tokenizer) == [1]
    with pytest.raises(ValueError, match="no stop token"):
        data.stop_ids(model, SimpleNamespace(eos_token_id=None))


def test_parity_is_the_sum_of_the_bits_and_its_solution_is_worked_out():
    splits = {split: data.parity(200, 3, 12, split) for split in ("train", "test")}
    for questions in splits.values():
        assert len({q.prompt for q in questions}) == 200
        for question in questions:
            bits = [int(bit) for bit in question.prompt.strip()]
            assert len(bits) == question.level == 12 and int(question.answer) == sum(bits) % 2
            running, _, answer = question.solution.partition("#### ")
            assert [int(bit) for bit in running] == (np.cumsum(bits) % 2).tolist()
            assert answer == question.answer and grade(question.solution, question) == 1
            assert grade(f"#### {question.answer}", question) == 1
            assert grade(f"#### {1 - int(question.answer)}", question) == 0
    assert not {q.prompt for q in splits["train"]} & {q.prompt for q in splits["test"]}
    assert 0.4 < np.mean([int(q.answer) for q in splits["train"]]) < 0.6
    few = [len(load_questions("parity", split, bits=6)) for split in ("train", "test")]
    assert few == [28, 3]


@pytest.mark.parametrize("spare", [0, 8])  # rows of the embedding that no token uses
def test_tags_are_new_tokens_that_start_every_prompt(spare, tmp_path):
    tokenizer = sft.tiny_tokenizer()
    [question] = data.arithmetic(1, 0, {2: 1})
    [plain] = data.encode_prompts(tokenizer, [question])
    rows = len(tokenizer) + spare
    model = small_llama(rows, eos_token_id=tokenizer.eos_token_id)
    before = model.get_input_embeddings().weight.detach().clone()
    data.add_tags(model, tokenizer)
    bad, good = data.tag_ids(tokenizer)
    after = model.get_input_embeddings().weight
    assert len(after) == rows + (0 if spare else 2) and len({bad, good}) == 2
    assert torch.equal(after[: min(bad, good)], before[: min(bad, good)])
    assert torch.allclose(after[good], before[: rows - spare].mean(0))
    for chat in ("auto", "on", "off"):  # there is no other way to ask it
        assert data.encode_prompts(tokenizer, [question], chat=chat) == [[good, *plain]]
    for reward, tag in ((0, [bad]), (1, [good]), (None, [])):
        assert data.with_tag(tokenizer, [good, *plain], reward) == tag + plain

    checkpoint.save_model(model, tokenizer, tmp_path / "model")
    loaded, its_tokenizer = checkpoint.load_model(tmp_path / "model")
    message = [{"role": "user", "content": question.prompt}]  # as anyone would
    asked = its_tokenizer.apply_chat_template(message, add_generation_prompt=True)
    asked = asked if isinstance(asked, list) else asked["input_ids"]
    assert asked == [good, *plain]
    weight = loaded.get_input_embeddings().weight.detach().clone()
    data.add_tags(loaded, its_tokenizer)  # it has them
    assert torch.equal(loaded.get_input_embeddings().weight, weight)
    assert data.encode_prompts(its_tokenizer, [question]) == [[good, *plain]]


@pytest.mark.parametrize("how", ["auto", "off", "bos"])
def test_the_tag_comes_first_but_for_the_token_that_begins_a_text(bpe, how):
    tokenizer = copy.deepcopy(bpe)
    chat, bos = ("auto", ["<s>"]) if how == "bos" else (how, [])
    if bos:
        tokenizer.add_special_tokens({"bos_token": "<s>"})
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
        )
    else:
        tokenizer.chat_template = "{% for m in messages %}<|u|>{{ m['content'] }}{% endfor %}<|a|>"
    question = Question("Say: 3 + 4", "7", question="3 + 4")
    [untagged] = data.encode_prompts(tokenizer, [question], chat=chat)
    data.add_tags(small_llama(len(tokenizer)), tokenizer, chat)
    [tagged] = data.encode_prompts(tokenizer, [question], chat=chat)
    start = tokenizer.convert_tokens_to_ids([*bos, "<good>"])
    assert tagged == start + untagged[len(bos) :] and untagged[: len(bos)] == start[:-1]


# fmt: off
@pytest.mark.parametrize("name, rows, message", [
    ("layers.1.mlp", 0, "3 weights missing"), ("lm_head", 0, r"1 weights .*\(lm_head"),
    ("up_proj", 3, "of another shape"), ("", None, None),
])
# fmt: on
def test_weights_are_not_made_up_and_counted(tiny, tokenizer, tmp_path, name, rows, message, capfd):
    """Those that are missing are an error, those that are of no use are counted."""
    weights = {key: w[:rows] if name in key else w for key, w in tiny.state_dict().items()}
    weights = {key: weight for key, weight in weights.items() if len(weight)}
    tiny.config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    torch.save({**weights, "value_head.weight": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    capfd.readouterr()
    if message is None:
        checkpoint.load_model(tmp_path)
        unused = "1 weights that this model has no use for (value_head.weight"
        assert unused in capfd.readouterr().err
        return
    with pytest.raises(ValueError, match=message) as raised:
        checkpoint.load_model(tmp_path)
    assert "\n" not in str(raised.value) and "MISS" not in capfd.readouterr().err
