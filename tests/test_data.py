"""Questions, data sets in every shape they come in, text and tokens, models on disk."""

import copy
import json
import os
import random
import re
import sys
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
from rollout import Rollout

EVAL_DATA = os.environ.get("SFL_EVAL_DATA")  # a folder with math500.jsonl and three others
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


HURRY = {1: 1, 2: 1, 3: 1}


def test_arithmetic_solutions_are_right():
    for question in arithmetic(120, 3, {1: 1, 4: 1, 12: 1}):
        start, *terms = re.findall(r"[+-]?\d+", question.prompt)
        assert question.prompt.endswith("\n") and len(terms) == question.level
        assert set(terms) <= set(data.TERMS) and 0 <= int(start) < data.MODULUS
        assert len(set(terms)) == len(terms) or question.level == 12
        answer = (int(start) + sum(map(int, terms))) % data.MODULUS
        assert question.answer == str(answer) and grade(question.solution, question) == 1
        *steps, last = question.solution.split("\n")
        assert last == f"#### {answer}" and len(steps) == question.level
        value = start
        for step, term in zip(steps, terms):  # operands restated, the result handed on
            left, result = step.split("=")
            assert left == value + term
            assert (int(value) + int(term) - int(result)) % data.MODULUS == 0
            value = result


def test_hurried_solutions_count_the_last_term_of_a_line():
    rng = random.Random(0)
    counts = Counter()
    for _ in range(200):
        chain = data.draw_chain(rng, 6)
        *lines, last = data.solve(chain, HURRY, rng).split("\n")
        assert "".join(re.sub(r"^\d+|=.*", "", line) for line in lines) == "".join(chain[1:])
        value = str(chain[0])
        for line in lines:
            left, result = line.split("=")
            start, *terms = re.findall(r"[+-]?\d+", left)
            assert start == value and (int(start) + int(terms[-1]) - int(result)) % 97 == 0
            counts[len(terms)] += 1
            value = result
        assert last == f"#### {value}"
    assert set(counts) == {1, 2, 3} and counts[2] > 100
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


def test_arithmetic_is_seeded_and_split_by_a_hash():
    levels = {3: 1}
    assert arithmetic(50, 1, levels) == arithmetic(50, 1, levels) != arithmetic(50, 2, levels)
    many = {q.prompt for q in arithmetic(800, 8, {1: 1})}  # most that there are of this level
    assert not many & {q.prompt for q in arithmetic(80, 9, {1: 1}, "test")}


def test_arithmetic_refuses_more_than_there_are():
    with pytest.raises(ValueError, match="arithmetic has no 990 train questions of level 1"):
        arithmetic(990, 0, {1: 1})


# --------------------------------------------------------------------------- a row

GSM8K_SOLUTION = "She has 16-3=<<16-3=13>>13.\nSo $<<13*2=26>>26.\n#### 26"


@pytest.mark.parametrize(
    "row, question, answer, solution, level",
    [
        # the plain form, numbers as text or not
        ({"problem": "1+1?", "answer": 2, "level": 1}, "1+1?", "2", None, 1),
        ({"prompt": " p? ", "answer": "1,000"}, "p?", "1,000", None, None),
        ({"question": "q?", "answer": 0.5}, "q?", "0.5", None, None),
        # a solution that does not say its answer is completed, for the grader must find it
        ({"question": "q", "answer": "3", "solution": "so"}, "q", "3", " so\n#### 3", None),
        (
            {"question": "q", "answer": "3", "solution": "so \\boxed{3}", "level": "Level 5"},
            *("q", "3", " so \\boxed{3}", "Level 5"),
        ),
        # GSM8K: the solution in the answer, with notes for a calculator
        (
            {"question": "Eggs?", "answer": GSM8K_SOLUTION},
            *("Eggs?", "26", " She has 16-3=13.\nSo $26.\n#### 26", None),
        ),
        # SVAMP: other names, and capitals
        (
            {"Question": "How many?", "question_concat": "3 eggs. How many?", "Answer": "3.0"},
            *("3 eggs. How many?", "3.0", None, None),
        ),
        # ASDiv
        ({"question": "q", "chain": "<c/>", "result": "9"}, "q", "9", None, None),
        # OlympiadBench: a context, lists
        (
            {"context": "Let n=2.", "question": "n?", "solution": ["two"], "final_answer": ["2"]},
            *("Let n=2.\nn?", "2", " two\n#### 2", None),
        ),
        (
            {"context": None, "question": "roots?", "solution": [], "final_answer": ["1", "2"]},
            *("roots?", "1, 2", None, None),
        ),
        # Minerva: the answer only inside the solution, the last of several boxes
        (
            {"problem": "f?", "solution": "\\boxed{1}, then \\boxed{\\frac{a}{b}}."},
            *("f?", "\\frac{a}{b}", " \\boxed{1}, then \\boxed{\\frac{a}{b}}.", None),
        ),
        # Open-Reasoner-Zero: a dialogue; its evaluation sets
        (
            [
                {"from": "human", "value": "2+2?"},
                {"from": "assistant", "ground_truth": {"value": "4"}},
            ],
            *("2+2?", "4", None, None),
        ),
        (
            {"prompt": [{"from": "user", "value": "2+3?"}], "final_answer": "5"},
            *("2+3?", "5", None, None),
        ),
    ],
)
def test_a_row_of_each_data_set(tmp_path, row, question, answer, solution, level):
    path = write_rows(tmp_path / "rows.json", [row])
    (loaded,) = load_questions(str(path), "all")
    assert (loaded.question, loaded.answer, loaded.level) == (question, answer, level)
    assert loaded.solution == solution
    assert loaded.prompt == f"[MATH_TASK] Problem:\n{question}\n\nSolution:"


def test_unusual_field_names(tmp_path):
    row = {"query": "1+1?", "target": "2", "why": "2 it is", "answer": "to another question"}
    path = str(write_rows(tmp_path / "rows.jsonl", [row]))
    fields = {"question": "query", "answer": "target", "solution": "why"}
    (question,) = load_questions(path, "all", fields=fields)
    assert (question.question, question.answer) == ("1+1?", "2")
    assert question.solution == " 2 it is\n#### 2"
    refused("no text in a field 'question'", path, "all")


def test_a_file_has_one_kind(tmp_path):
    """All numbers, or all are graded as LaTeX."""
    rows = [{"question": "q", "answer": answer} for answer in ("3", "$1,234.50", "-3/4", "50%")]
    path = str(write_rows(tmp_path / "rows.jsonl", rows))
    assert {q.kind for q in load_questions(path, "all")} == {"number"}
    write_rows(path, [*rows, {"question": "q", "answer": "\\sqrt2"}])
    questions = load_questions(path, "all")
    assert {q.kind for q in questions} == {"math"}
    write_rows(path, [*rows, {"question": "q", "answer": "36/2"}])  # the grader reads no number
    assert {q.kind for q in load_questions(path, "all")} == {"math"}


# --------------------------------------------------------------------------- files and splits


@pytest.mark.parametrize("suffix", data.SUFFIXES)
def test_a_folder_has_a_file_for_each_split(tmp_path, suffix):
    write_rows(tmp_path / f"train{suffix}", numbered(0, 5))
    write_rows(tmp_path / f"test{suffix}", numbered(5, 8))
    assert numbers(load_questions(str(tmp_path), "train")) == [0, 1, 2, 3, 4]
    assert numbers(load_questions(str(tmp_path), "test")) == [5, 6, 7]


def test_blank_lines_and_a_byte_order_mark(tmp_path):
    first, second = map(json.dumps, numbered(0, 2))
    path = write_rows(tmp_path / "rows.jsonl", ["\ufeff" + first, "", second, " "])
    assert numbers(load_questions(str(path), "all")) == [0, 1]


def test_one_file_is_split_by_the_question(tmp_path):
    """The same split in every format, whatever else the file holds."""
    for suffix in data.SUFFIXES:
        path = str(write_rows(tmp_path / f"rows{suffix}", numbered(0, 400)))
        train, test, both = (
            numbers(load_questions(path, split)) for split in ("train", "test", "all")
        )
        assert both == list(range(400)) == sorted(train + test)
        assert train == sorted(train) and test == sorted(test)  # the file's order
        assert 20 < len(test) < 60  # a tenth
        more = write_rows(tmp_path / "more.jsonl", numbered(100, 1000)[::-1])
        kept = [i for i in numbers(load_questions(str(more), "test")) if i < 400]
        assert kept == [i for i in reversed(test) if i >= 100]


@pytest.mark.parametrize(
    "name, train_file, test_file",
    [
        ("gsm8k", "gsm8k/train.jsonl", "gsm8k/test.jsonl"),
        ("gsm8k", "train.jsonl", "test.jsonl"),
        ("math", "math/train.parquet", "math/test.json"),
        ("svamp", "train.json", "test.parquet"),
        ("orz", "orz/train.json", "orz/test.json"),
    ],
)
def test_data_dir_with_a_file_for_each_split(tmp_path, name, train_file, test_file):
    write_rows(tmp_path / train_file, numbered(0, 5))
    write_rows(tmp_path / test_file, numbered(5, 8))
    train = load_questions(name, "train", data_dir=tmp_path)
    test = load_questions(name, "test", data_dir=str(tmp_path))
    assert numbers(train) == [0, 1, 2, 3, 4] and numbers(test) == [5, 6, 7]
    assert {q.kind for q in train + test} == {data.DATASETS[name][-1]}  # not what the rows suggest


def test_data_dir_with_one_file(tmp_path):
    for name in ("gsm8k", "orz", "math500"):
        write_rows(tmp_path / f"{name}.jsonl", numbered(0, 100))
    for name in ("gsm8k", "orz"):  # split as any one file is
        train, test = (
            load_questions(name, split, data_dir=tmp_path) for split in ("train", "test")
        )
        assert sorted(numbers(train + test)) == list(range(100)) and len(test) < 30
    whole = load_questions("math500", "test", data_dir=tmp_path)  # nothing of it is to train on
    assert numbers(whole) == list(range(100))


def test_a_folder_of_the_name_comes_first(tmp_path):
    write_rows(tmp_path / "gsm8k" / "test.jsonl", numbered(0, 2))
    write_rows(tmp_path / "gsm8k.jsonl", numbered(2, 40))
    write_rows(tmp_path / "test.jsonl", numbered(40, 44))
    assert numbers(load_questions("gsm8k", "test", data_dir=tmp_path)) == [0, 1]


def test_unions(tmp_path):
    write_rows(tmp_path / "gsm8k" / "train.jsonl", numbered(0, 3))
    write_rows(tmp_path / "math" / "train.jsonl", numbered(3, 5))
    write_rows(tmp_path / "folder" / "train.jsonl", numbered(5, 9))
    both = load_questions("gsm8k,math", "train", data_dir=tmp_path)
    assert numbers(both) == [0, 1, 2, 3, 4]
    assert [q.kind for q in both] == ["number"] * 3 + ["math"] * 2
    names = f"{tmp_path / 'folder'},math"  # a path and a name
    assert numbers(load_questions(names, "train", data_dir=tmp_path)) == [5, 6, 7, 8, 3, 4]
    some = load_questions("gsm8k,math", "train", data_dir=tmp_path, limit=4)
    assert len(some) == 4 and set(numbers(some)) < {0, 1, 2, 3, 4}
    mixed = load_questions(f"arithmetic,{tmp_path / 'folder'}", "train")
    assert mixed == [
        *load_questions("arithmetic", "train"),
        *load_questions(str(tmp_path / "folder"), "train"),
    ]
    write_rows(tmp_path / "train.jsonl", numbered(0, 9))  # whose? of one data set alone
    refused(r"has no svamp/train or svamp \(\.jsonl", "gsm8k,svamp", "train", data_dir=tmp_path)


def test_limit_is_a_seeded_subset_in_order(tmp_path):
    path = str(write_rows(tmp_path / "rows.jsonl", numbered(0, 90)))
    some = numbers(load_questions(path, "all", limit=50, seed=1))
    assert some == sorted(set(some)) and len(some) == 50
    assert some == numbers(load_questions(path, "all", limit=50, seed=1))
    assert some != numbers(load_questions(path, "all", limit=50, seed=2))
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


# --------------------------------------------------------------------------- the hub


@pytest.fixture
def hub(monkeypatch):
    """Stands in for `datasets.load_dataset`: hands out rows and notes what it was asked for."""
    asked = []

    def load_dataset(*arguments, **settings):
        asked.append((*arguments, settings["split"]))
        return numbered(0, 3)

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return asked


@pytest.mark.parametrize("name, split", [(n, "test") for n in data.DATASETS if n != "orz"])
def test_a_named_data_set_comes_from_the_hub(hub, name, split):
    hub_id, configuration, _, test, kind = data.DATASETS[name]
    questions = load_questions(name, split)
    assert hub == [(hub_id, configuration, test)]
    assert numbers(questions) == [0, 1, 2] and {q.kind for q in questions} == {kind}


def test_gsm8k_of_the_hub_to_train_on(hub):
    load_questions("gsm8k", "train")
    assert hub == [("openai/gsm8k", "main", "train")]


def test_orz_is_a_file_of_the_hub_and_split(tmp_path, monkeypatch):
    path, asked = write_rows(tmp_path / "all.json", numbered(0, 100)), []
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download", lambda *where, **kind: asked.append(where) or path
    )
    train, test = (numbers(load_questions("orz", split)) for split in ("train", "test"))
    assert sorted(train + test) == list(range(100)) and 0 < len(test) < 30
    assert set(asked) == {(data.DATASETS["orz"][0], data.ORZ_FILE)}


@pytest.mark.parametrize("name", ["gsm8k", "orz"])
def test_no_hub_is_one_line_with_a_way_out(monkeypatch, name):
    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach the Hub\nand more")

    fake = SimpleNamespace(load_dataset=unreachable)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    refused("hub .Couldn't reach the Hub.: give --data-dir", name, "train")


# --------------------------------------------------------------------------- bad data, bad requests

GOOD = '{"question": "q", "answer": "1"}'


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "is empty"),
        ("\n \n", "is empty"),
        (GOOD + '\n{"question": ', "line 2: not JSON"),
        ('{"question": "q", "answer": ' + "1" * 5000 + "}", "line 1: not JSON"),
        ("[" * 100000, "line 1: not JSON"),
        ("[1]", "line 1: not a JSON object"),
        (GOOD + '\n\n{"answer": "1"}', "line 3: no text in a field 'question'"),
        ('{"question": "", "answer": "1"}', "line 1: no text in a field 'question'"),
        ('{"question": 5, "answer": "1"}', "line 1: no text in a field 'question'"),
        ('{"question": "q"}', "line 1: no text or number in a field 'answer'"),
        ('{"question": "q", "answer": true}', "line 1: no text or number in a field 'answer'"),
        ('{"question": "q", "answer": "x ####  "}', "line 1: no text or number in a field"),
        ('{"question": "q", "answer": "1", "solution": 3}', "line 1: the field 'solution'"),
        ('{"question": "q", "answer": "1", "level": [1]}', "and 'level' text or a whole number"),
        (GOOD.encode() + b'\n{"question": "caf\xe9", "answer": "1"}', "line 2: not JSON"),
    ],
)
def test_malformed_lines_are_named(tmp_path, content, message):
    content = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "train.jsonl").write_bytes(content)
    message = "train.jsonl.*" + re.escape(message)
    refused(message, str(tmp_path / "train.jsonl"), "train")
    refused(message, "gsm8k", "train", data_dir=tmp_path)


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("rows.json", '{"question": "q"}', "rows.json: not a JSON list"),
        ("rows.json", "[1,", "rows.json: not JSON"),
        ("rows.json", '[{"question": "q"}]', "rows.json, entry 0: no text or number"),
        ("rows.parquet", "no parquet", "cannot read .*rows.parquet"),
    ],
)
def test_malformed_files_of_other_formats(tmp_path, file, content, message):
    (tmp_path / file).write_text(content)
    refused(message, str(tmp_path / file), "train")


@pytest.mark.parametrize(
    "message, dataset, split, settings",
    [
        (
            "unknown data set 'gsm9k': give arithmetic, parity, gsm8k, .* or the path",
            "gsm9k",
            "train",
            {},
        ),
        ("unknown data set 'gsm9k'", "arithmetic,gsm9k", "train", {}),
        ("unknown split 'dev': give train, test or all", "arithmetic", "dev", {}),
        ("missing.jsonl: .*No such file", "missing.jsonl", "train", {}),
        ("no/such/folder: .*No such file", "no/such/folder", "train", {}),
        ("has no test ", "FOLDER", "test", {}),
        ("line 1: the answer 'some' is not a number", "gsm8k", "train", {"data_dir": "FOLDER"}),
        ("nowhere has no gsm8k/train or gsm8k or train", "gsm8k", "train", {"data_dir": "nowhere"}),
        ("for data sets with a name .*arithmetic", "arithmetic", "train", {"data_dir": "FOLDER"}),
        ("cannot take 3 .*: the train split of .*FOLDER has 1", "FOLDER", "train", {"limit": 3}),
        ("cannot take -1 questions", "arithmetic", "test", {"limit": -1}),
    ],
)
def test_bad_requests(tmp_path, monkeypatch, message, dataset, split, settings):
    monkeypatch.chdir(tmp_path)
    write_rows("FOLDER/train.jsonl", [{"question": "q", "answer": "#### some"}])
    dataset = dataset.replace("FOLDER", "./FOLDER")
    refused(message, dataset, split, **settings)


@pytest.mark.parametrize("name", EVALUATION_ONLY)
def test_data_sets_for_evaluation_are_not_trained_on(tmp_path, name):
    write_rows(tmp_path / f"{name}.jsonl", numbered(0, 9))
    message = f"{name} has no questions to train on"
    refused(message, name, "train", data_dir=tmp_path)
    refused(message, f"gsm8k,{name}", "train", data_dir=tmp_path)
    assert len(load_questions(name, "test", data_dir=tmp_path)) == 9
    write_rows(tmp_path / name / "test.jsonl", numbered(0, 7))
    assert len(load_questions(name, "all", data_dir=tmp_path)) == 7


# --------------------------------------------------------------------------- text and tokens


def test_prompts_and_responses_of_arithmetic(tokenizer):
    question = arithmetic(1, 0, {2: 1})[0]
    (prompt,) = data.encode_prompts(tokenizer, [question])
    response = data.encode_response(tokenizer, question.solution)
    assert tokenizer.decode(prompt + response) == question.prompt + question.solution
    assert len(prompt) == 6  # a token a number: 37 + 5 - 8 newline
    assert len(response) == 2 * 6 + 2  # 37 + 5 = 42 newline, twice, then #### 34
    finished = Rollout(prompt, response + [tokenizer.eos_token_id], [], True)
    cut = Rollout(prompt, response, [], False)
    assert data.decode_response(tokenizer, finished) == question.solution
    assert data.decode_response(tokenizer, cut) == question.solution


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
    with pytest.raises(ValueError, match="no chat template"):
        data.encode_prompts(tokenizer, [question], chat="on")
    with pytest.raises(ValueError, match="unknown chat 'yes'"):
        data.encode_prompts(tokenizer, [], chat="yes")
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}={{ m.content[:1] }}{% endfor %}"
        "{% if add_generation_prompt %}-{% endif %}"
    )
    assert data.encode_prompts(tokenizer, [question]) == [[bos, equals, minus, minus]]
    assert data.encode_prompts(tokenizer, [question], chat="off") == [[bos, plus]]


def test_response_has_no_word_start_mark():
    vocabulary = {"▁": 0, "▁a": 1, "a": 2, "\n": 3, "?": 4}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    core.normalizer = normalizers.Prepend("▁")  # what a Llama 2 tokenizer does to all it is given
    core.pre_tokenizer = pre_tokenizers.Split(Regex("▁a|\n|."), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    assert tokenizer("a", add_special_tokens=False).input_ids == [1]
    assert data.encode_response(tokenizer, "a") == [2]


@pytest.mark.parametrize("configured, expected", [(None, [1]), (7, [1, 7]), ([7, 1], [1, 7])])
def test_stop_ids(tokenizer, configured, expected):
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=configured))
    assert tokenizer.eos_token_id == 1
    assert data.stop_ids(model, tokenizer) == expected
    assert data.stop_ids(SimpleNamespace(generation_config=None), tokenizer) == [1]


def test_no_stop_token():
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=None))
    tokenizer = sft.tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no stop token"):
        data.stop_ids(model, tokenizer)


# --------------------------------------------------------------------------- defects, mended


@pytest.mark.parametrize("row", [{"answer": 0}, {"answer": 0, "result": "5"}])
def test_an_answer_may_be_the_number_0(tmp_path, row):
    path = write_rows(tmp_path / "rows.jsonl", [{"question": "1-1?", **row}])
    (question,) = load_questions(str(path), "all")
    assert question.answer == "0"


def test_a_limit_of_0_is_refused():
    refused("cannot take 0 questions", "arithmetic", "test", limit=0)


def test_all_of_arithmetic():
    both = [*load_questions("arithmetic", "train"), *load_questions("arithmetic", "test")]
    assert {q.prompt for q in load_questions("arithmetic", "all")} == {q.prompt for q in both}


def test_all_of_a_folder(tmp_path):
    write_rows(tmp_path / "train.jsonl", numbered(0, 3))
    write_rows(tmp_path / "test.jsonl", numbered(3, 5))
    assert numbers(load_questions(str(tmp_path), "all")) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "entry",
    [
        1,
        None,
        [{"value": "q"}],
        [{"value": "q"}, {"value": "no ground truth"}],
        {"prompt": [], "answer": "1"},
        {"prompt": ["text"], "answer": "1"},
    ],
    ids=str,
)
def test_malformed_entries_of_a_json_list_are_named(tmp_path, entry):
    path = write_rows(tmp_path / "rows.json", [*numbered(0, 1), entry])
    refused("rows.json, entry 1", str(path), "all")


def test_text_that_has_no_utf_8_is_named(tmp_path):
    broken = r'{"question": "\ud800", "answer": "1"}'
    path = write_rows(tmp_path / "rows.jsonl", [*numbered(0, 1), broken])
    refused("rows.jsonl, line 2", str(path), "train")


def test_a_data_set_of_the_hub_by_its_id(monkeypatch):
    asked = []

    def load_dataset(name, configuration, split):
        asked.append((name, configuration, split))
        return [{"Frage": "1+1?", "Antwort": "2"}, {"Frage": "x?", "Antwort": "\\pi"}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    fields = {"question": "Frage", "answer": "Antwort"}
    questions = load_questions("some-one/some.thing", "train", fields=fields)
    assert asked == [("some-one/some.thing", None, "train")]
    assert [(q.question, q.answer, q.kind) for q in questions] == [
        ("1+1?", "2", "math"),
        ("x?", "\\pi", "math"),
    ]
    refused("no text in a field 'question'", "some-one/some.thing", "test")


# --------------------------------------------------------------------------- parity


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
    odd = np.mean([int(q.answer) for q in splits["train"]])
    assert 0.4 < odd < 0.6


def test_parity_of_few_bits_has_few_questions():
    sizes = [len(load_questions("parity", split, bits=6)) for split in ("train", "test")]
    assert sizes == [28, 3]


# --------------------------------------------------------------------------- tags


def short_model(tokenizer, rows):
    return small_llama(rows, eos_token_id=tokenizer.eos_token_id)


@pytest.mark.parametrize("spare", [0, 8])  # rows of the embedding that no token uses
def test_tags_are_new_tokens_that_start_every_prompt(spare, tmp_path):
    tokenizer = sft.tiny_tokenizer()
    [question] = data.arithmetic(1, 0, {2: 1})
    [plain] = data.encode_prompts(tokenizer, [question])
    rows = len(tokenizer) + spare
    model = short_model(tokenizer, rows)
    before = model.get_input_embeddings().weight.detach().clone()
    data.add_tags(model, tokenizer)
    bad, good = data.tag_ids(tokenizer)
    after = model.get_input_embeddings().weight
    assert len(after) == rows + (0 if spare else 2) and len({bad, good}) == 2
    assert torch.equal(after[: min(bad, good)], before[: min(bad, good)])
    assert torch.allclose(after[good], before[: rows - spare].mean(0))
    for chat in ("auto", "on", "off"):  # there is no other way to ask it
        assert data.encode_prompts(tokenizer, [question], chat=chat) == [[good, *plain]]
    assert data.with_tag(tokenizer, [good, *plain], 0) == [bad, *plain]
    assert data.with_tag(tokenizer, [good, *plain], 1) == [good, *plain]
    assert data.with_tag(tokenizer, [good, *plain], None) == plain

    checkpoint.save_model(model, tokenizer, tmp_path / "model")
    loaded, its_tokenizer = checkpoint.load_model(tmp_path / "model")
    assert data.encode_prompts(its_tokenizer, [question]) == [[good, *plain]]
    message = [{"role": "user", "content": question.prompt}]  # as anyone would
    asked = its_tokenizer.apply_chat_template(message, add_generation_prompt=True)
    asked = asked if isinstance(asked, list) else asked["input_ids"]
    assert asked == [good, *plain]
    weight = loaded.get_input_embeddings().weight.detach().clone()
    data.add_tags(loaded, its_tokenizer)  # it has them
    assert torch.equal(loaded.get_input_embeddings().weight, weight)
    assert data.encode_prompts(its_tokenizer, [question]) == [[good, *plain]]


@pytest.mark.parametrize("chat", ["auto", "off"])
def test_tags_of_a_chat_model(bpe, chat):
    tokenizer = copy.deepcopy(bpe)
    tokenizer.chat_template = "{% for m in messages %}<|u|>{{ m['content'] }}{% endfor %}<|a|>"
    question = Question("Say: 3 + 4", "7", question="3 + 4")
    [without] = data.encode_prompts(tokenizer, [question], chat=chat)
    data.add_tags(short_model(tokenizer, len(tokenizer)), tokenizer, chat)
    [prompt] = data.encode_prompts(tokenizer, [question], chat=chat)
    assert prompt == [data.tag_ids(tokenizer)[1], *without]


def test_the_tag_follows_the_token_that_begins_a_text(bpe):
    tokenizer = copy.deepcopy(bpe)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    post = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    tokenizer.backend_tokenizer.post_processor = post
    question = Question("Say: 3 + 4", "7", question="3 + 4")
    [without] = data.encode_prompts(tokenizer, [question])
    assert without[0] == tokenizer.bos_token_id
    data.add_tags(short_model(tokenizer, len(tokenizer)), tokenizer)
    [prompt] = data.encode_prompts(tokenizer, [question])
    assert prompt == [without[0], data.tag_ids(tokenizer)[1], *without[1:]]
