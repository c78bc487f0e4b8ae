"""Rows of data sets, wherever they lie, as questions: files, folders, the hub; fields; dialogues.

    {"question": "Tom has 3 apples and buys 4. How many now?", "answer": "3 + 4 = 7\\n#### 7"}

becomes question, answer 7, and a solution in the form in which a response should be. A row that is
not understood is a ValueError that names file and line: none is left out quietly.
"""

import json
import logging
import re
from pathlib import Path

from plumbing.answers import last_boxed, parse_number
from plumbing.commands import first_line

# What rows call their parts, the likelier name first
QUESTION_FIELDS = ("question_concat", "question", "problem", "prompt")
ANSWER_FIELDS = ("answer", "final_answer", "result")
SUFFIXES = (".jsonl", ".json", ".parquet")
NUMBER = re.compile(r"[-+]?[$€£]?\s?(\d[\d,]*)?\.?\d+(\s?/\s?\d+)?\s?%?")


def parse_rows(rows, kind, fields):
    """rows: [(where, row)] -> a dict of `data.Question`'s fields each, but the prompt. kind None:
    'number' if all of the answers are numbers, else 'math'."""
    parsed = [parse_row(where, row, fields) for where, row in rows]
    odd = [i for i, row in enumerate(parsed) if not is_number(row["answer"])]
    if odd and kind == "number":
        where, answer = rows[odd[0]][0], parsed[odd[0]]["answer"]
        raise ValueError(f"{where}: the answer {answer[:40]!r} is not a number")
    kind = kind or ("math" if odd else "number")
    return [{**row, "kind": kind} for row in parsed]


def is_number(answer):
    """Looks like one, and the grader reads it as one: not 36/2."""
    return bool(NUMBER.fullmatch(answer)) and parse_number(answer) is not None


def parse_row(where, row, fields):
    """A row, checked: {question, answer, solution, level}."""
    row = undialogue(row)
    if not isinstance(row, dict):
        raise ValueError(f"{where}: neither a JSON object nor a dialogue but {str(row)[:40]!r}")
    text = find(row, [fields.get("question"), *QUESTION_FIELDS])
    answer = find(row, [fields.get("answer"), *ANSWER_FIELDS])
    solution = find(row, [fields.get("solution"), "solution"])
    if isinstance(answer, list):
        answer = ", ".join(map(str, answer))
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        answer = str(answer)
    if isinstance(solution, list) and solution:
        solution = solution[0]
    if answer is None and isinstance(solution, str):
        answer = last_boxed(solution)
    if not is_text(text):
        raise ValueError(f"{where}: no text in a field 'question' (or 'problem', 'prompt')")
    if not is_text(answer) or not answer.rpartition("####")[2].strip():
        raise ValueError(f"{where}: no text or number in a field 'answer'")
    level = row.get("level")
    if not (is_text(solution or "-") and isinstance(level, (str, int, type(None)))):
        raise ValueError(
            f"{where}: the field 'solution' must be text, and 'level' text or a whole number"
        )
    if "####" in answer:  # GSM8K has the solution there, too
        solution = re.sub(r"<<[^<>\n]*>>", "", answer)  # no calculator notes: 16-3=$<<16-3=13>>13
    answer = answer.rpartition("####")[2].strip()
    if isinstance(row.get("context"), str):  # OlympiadBench
        text = f"{row['context']}\n{text}"
    solution = solution and as_response(solution.strip(), answer)
    return {"question": text.strip(), "answer": answer, "solution": solution, "level": level}


def as_response(solution, answer):
    """A solution as it follows the prompt. A space joins it to "Solution:", not a newline: a BPE
    word token carries its leading space, and a newline would make the first step of every response
    an empty line. It must say its answer where the grader looks."""
    if "####" not in solution and "\\boxed" not in solution:
        solution += f"\n#### {answer}"
    return " " + solution


def find(row, names):
    """The first of these fields that the row has, whatever its case."""
    row = {key.lower(): value for key, value in row.items()}
    there = [row[name.lower()] for name in names if name and name.lower() in row]
    return next((value for value in there if value not in (None, "", [])), None)


def is_text(value):
    """A string with something in it, and no half of a character."""
    if not isinstance(value, str) or not value.strip():
        return False
    return not any("\ud800" <= char <= "\udfff" for char in value)


def undialogue(row):
    """Open-Reasoner-Zero's rows: a dialogue [human, assistant], or one as the field `prompt`."""
    try:
        if isinstance(row, list):
            human, assistant = row
            return {"question": human["value"], "answer": assistant["ground_truth"]["value"]}
        if isinstance(row["prompt"], list):
            return {**row, "prompt": row["prompt"][-1]["value"]}
    except (KeyError, IndexError, TypeError, ValueError):
        return row if isinstance(row, dict) and not isinstance(row.get("prompt"), list) else None
    return row


def rows_of(name, known, split, data_dir, alone):
    """([(where, row), ...], does it still have to be split?) of a data set. known: its entry in
    `data.DATASETS`, or None. alone: no other is asked for, so that data_dir/train.jsonl can only be
    its own."""
    path = Path(name)
    if path.is_dir():
        return first_file(path, [split]), False
    if not known and not is_hub_id(name):
        return read_rows(path), True
    hub_id, configuration, train, test, _ = known or (name, None, "train", "test", None)
    if data_dir is not None:
        one_piece = not any(Path(data_dir, f"{name}/{split}{end}").exists() for end in SUFFIXES)
        one_piece = one_piece and any(Path(data_dir, name + end).exists() for end in SUFFIXES)
        stems = [f"{name}/{split}", name] + [split] * alone
        return first_file(Path(data_dir), stems), one_piece and train is not None
    source = train if split == "train" else test
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it would bury our one line
    try:
        if source.endswith(".json"):  # a file that `datasets` cannot read
            from huggingface_hub import hf_hub_download

            return read_rows(Path(hf_hub_download(hub_id, source, repo_type="dataset"))), True
        from datasets import load_dataset  # here: slow to import

        rows = load_dataset(hub_id, configuration, split=source)
    except Exception as error:  # offline, a proxy, a full disk: one way out for all
        raise ValueError(
            f"cannot get {hub_id} from the hub ({first_line(error)}): give --data-dir a folder "
            f"with {name}/train.jsonl and {name}/test.jsonl, and --model a local folder"
        ) from error
    return [(f"{hub_id} {source}, row {i}", row) for i, row in enumerate(rows)], train == test


def first_file(folder, stems):
    """The rows of the first of these files that is in the folder."""
    paths = [folder / (stem + suffix) for stem in stems for suffix in SUFFIXES]
    for path in paths:
        if path.exists():
            return read_rows(path)
    names = " or ".join(stems)
    raise ValueError(f"{folder} has no {names} ({', '.join(SUFFIXES)}): put one there")


def is_hub_id(name):
    """OWNER/NAME, and no path that is there or looks like a file."""
    path = Path(name)
    owner_and_name = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name)
    return bool(owner_and_name) and not path.exists() and path.suffix not in SUFFIXES


def read_rows(path):
    """[('FILE, line 3', row), ...] of a .jsonl, .json or .parquet file. ValueError names file and
    line."""
    try:
        if path.suffix == ".parquet":
            from pyarrow import parquet

            rows = parquet.read_table(path).to_pylist()
            return [(f"{path}, row {i}", row) for i, row in enumerate(rows)]
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {first_line(error)}") from error
    if path.suffix == ".json":
        rows = parse_json(f"{path}", content)
        if not isinstance(rows, list):
            raise ValueError(f"{path}: not a JSON list but {str(rows)[:40]!r}")
        return [(f"{path}, entry {i}", row) for i, row in enumerate(rows)]
    rows = []
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            rows.append((where, parse_json(where, line)))
            if not isinstance(rows[-1][1], dict):
                raise ValueError(f"{where}: not a JSON object but {str(rows[-1][1])[:40]!r}")
    if not rows:
        raise ValueError(f"{path} is empty: it needs one JSON object a line")
    return rows


def parse_json(where, content):
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, a number of 10,000 digits
        raise ValueError(f"{where}: not JSON ({first_line(error)})") from error
