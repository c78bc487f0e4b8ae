"""Rows of data files as questions: what they call their parts, and what of it is wrong.

    {"question": "Tom has 3 apples and buys 4. How many now?", "answer": "3 + 4 = 7\\n#### 7"}

becomes question, answer 7, and a solution in the form in which a response should be. A row that is
not understood is a ValueError that names file and line: none is left out quietly.
"""

import math
import re
from decimal import Decimal

from plumbing.answers import last_boxed, parse_number, vote
from plumbing.files import warn

# What rows call their parts, the likelier name first. A dot reaches into a field.
USUAL = {
    "question": """question_concat question problem prompt query instruction input sQuestion
        messages conversations""".split(),
    "answer": """answer final_answer result ground_truth expected_answer target lSolutions
        reward_model.ground_truth""".split(),
    "solution": ["solution"],
}
WORKED = ("output", "response", "completion")  # a solution, if it comes to the answer
NUMBER = re.compile(r"[-+]?[$€£]?\s?(\d[\d,]*)?\.?\d+(\s?/\s?\d+)?\s?%?")
UNIT = re.compile(r"\s*\((?!mod)[A-Za-z][\w\s.,'/-]*\)$")  # ASDiv's: 9 (apples)
NOTE = re.compile(r"<<([^<>\n]*)>>")  # GSM8K's, for a calculator: 16-3=<<16-3=13>>13
FEW = 0.05  # if fewer of the answers are no numbers, these are likely mistakes


def parse_rows(rows, kind, fields, notes):
    """rows: [(where, row)] -> a dict of `data.Question`'s fields each, but the prompt. kind: of a
    data set that has a name. None: 'number' if all of the answers are numbers, else 'math'."""
    names = dict(USUAL)
    for part, name in fields.items():
        if name:  # it may be meant for another data set than one whose fields are known
            names[part] = [name, *USUAL[part]] if kind else [name]
    parsed, odd, conflicts = [], [], []
    seen = {}  # question -> its answer, and the text that says where it stands
    for where, row in rows:
        row = parse_row(where, row, names, notes)
        parsed.append(row)
        said = f"{where}: the answer {row['answer'][:40]!r}"
        if not is_number(row["answer"]):
            odd.append(said)
        answer, first = seen.setdefault(row["question"], (row["answer"], said))
        if vote(answer) != vote(row["answer"]):
            conflicts.append(f"{first}, {said}")

    if odd and kind == "number":
        way_out = "mend it, or give the file's path as --dataset, and all are graded as LaTeX"
        raise ValueError(f"{odd[0]} is not a number: {way_out}")
    if odd and kind is None and len(odd) < FEW * len(rows):
        few = f"{len(odd)} of {len(rows)} answers are no numbers ({odd[0]})"
        warn(f"{few}: all are graded as LaTeX")
    if conflicts:
        warn(f"{len(conflicts)} questions come twice, with different answers ({conflicts[0]})")
    without = sum(row["solution"] is None for row in parsed)
    if notes and without:
        warn(f"{without} of {len(rows)} questions have no calculator notes that end in the answer")
    kind = kind or ("math" if odd else "number")  # one for all
    return [{**row, "kind": kind} for row in parsed]


def parse_row(where, row, names, notes):
    """{question, answer, solution, level} of a row. names: {part: fields in which it may stand}."""
    if isinstance(row, list):  # Open-Reasoner-Zero's rows are a dialogue and nothing else
        row = {"messages": row}
    if not isinstance(row, dict):
        raise ValueError(f"{where}: neither a JSON object nor a dialogue but {str(row)[:40]!r}")

    # --- Find the parts.
    row = flat(row)
    question = find(row, names["question"])
    if isinstance(question, list):
        question, reply = in_dialogue(question)
        row = reply | row
    solution = find(row, names["solution"])
    if isinstance(solution, list):  # OlympiadBench's: several; the first will do
        solution = solution[0]
    worked = find(row, WORKED)
    answer = find(row, names["answer"])
    answer = result(solution) or result(worked) if answer is None else as_text(answer)
    if is_text(answer) and "####" in answer:  # GSM8K has the solution there, too
        solution = answer
        answer = result(answer)

    # --- Check them.
    for part, text in (("question", question), ("answer", answer)):
        if not is_text(text):
            there = ", ".join(row)[:200] or "none"
            missing = f"no usable {part} in a field {' or '.join(names[part])}"
            there_is = [row.get(name.lower()) for name in names[part]]
            unusable = [str(value)[:40] for value in there_is if value is not None]
            missing += f" (not {unusable[0]!r})" if unusable else ""
            way_out = f"the row's fields are {there}: name one with --{part}_field"
            raise ValueError(f"{where}: {missing}; {way_out}")
    if solution is not None and not is_text(solution):
        raise ValueError(f"{where}: the field 'solution' must be text, not {str(solution)[:40]!r}")
    level = find(row, ["level"])
    if isinstance(level, float) and level.is_integer():  # pandas writes 3.0 where some have none
        level = int(level)
    if not isinstance(level, (str, int, type(None))):
        raise ValueError(f"{where}: the level {level!r} is neither text nor a whole number")

    # --- Bring them into one form.
    more = row.get("input")
    if question == row.get("instruction") and is_text(more):  # Alpaca
        question += f"\n\n{more}"
    for name, join in (("context", "\n"), ("body", " ")):  # OlympiadBench; SVAMP, ASDiv
        before = row.get(name)
        if is_text(before) and before.strip() not in question:  # in question_concat it is
            question = before.strip() + join + question.strip()
    answer = answer.strip()
    if is_number(UNIT.sub("", answer)):
        answer = UNIT.sub("", answer)

    if solution is None and result(worked) and vote(result(worked)) == vote(answer):
        solution = worked
    if solution and notes:
        steps = NOTE.findall(solution)
        last = steps[-1].rpartition("=")[2] if steps else ""
        solution = "\n".join(steps) if vote(last) == vote(answer) else None
    elif solution and "####" in solution:
        solution = NOTE.sub("", solution)
    if solution:
        # A space joins it to "Solution:", not a newline: a BPE word token carries its leading
        # space, and a newline would make the first step of every response an empty line.
        solution = " " + solution.strip()
        if "####" not in solution and "\\boxed" not in solution:  # where the grader looks
            solution += f"\n#### {answer}"
    return {"question": question.strip(), "answer": answer, "solution": solution, "level": level}


def is_number(answer):
    """Looks like one, and the grader reads it as one: not 36/2."""
    return bool(NUMBER.fullmatch(answer)) and parse_number(answer) is not None


def flat(row, prefix=""):
    """{"A": {"b": 1}} -> {"a.b": 1}"""
    fields = {}
    for key, value in row.items() if isinstance(row, dict) else ():
        if isinstance(value, dict):
            fields |= flat(value, f"{prefix}{key}.")
        else:
            fields[f"{prefix}{key}".lower()] = value
    return fields


def find(row, names):
    """The first of these fields that the (flat) row has and that is not empty."""
    for name in names:
        value = row.get(name.lower())
        if value not in (None, "", []) and value == value:  # not NaN, pandas' word for nothing
            return value
    return None


def is_text(value):
    """A string with something in it, no half of a character, and not pandas' word for nothing."""
    empty = not isinstance(value, str) or value.strip().lower() in ("", "nan")
    return not empty and not re.search("[\ud800-\udfff]", value)


def as_text(answer):
    """A number, or a list of answers, as text; no text for anything else."""
    if isinstance(answer, list):
        parts = [as_text(part) for part in answer]
        return ", ".join(parts) if all(map(is_text, parts)) else None
    if type(answer) in (int, float, Decimal):  # no bool
        return str(answer) if math.isfinite(answer) else None
    return answer


def result(text):
    """What a worked text comes to; None if it does not say so."""
    if not is_text(text):
        return None
    if "####" in text:
        return text.rpartition("####")[2].strip()
    says = re.findall(r"answer is:?\s*(.+?)\.?\s*$", text, re.IGNORECASE | re.MULTILINE)
    bare = text.strip() if is_number(text.strip()) else None
    return last_boxed(text) or (says[-1] if says else bare)


def in_dialogue(turns):
    """(question, {field: reply}) of a dialogue of turns: role and content, or from and value. None
    for a question where there are several: each would need those before it."""
    questions, reply = [], {}
    for turn in map(flat, turns):
        content = find(turn, ["content", "value"])
        if isinstance(content, list):  # parts: all text, or nothing
            texts = [flat(part).get("text") for part in content]
            content = "".join(texts) if all(map(is_text, texts)) else None
        speaker = find(turn, ["role", "from"])
        if speaker in ("user", "human"):
            questions.append(content)
        if speaker in ("assistant", "gpt"):
            reply = {"output": content, "answer": turn.get("ground_truth.value")}
    return (questions[0] if len(questions) == 1 else None), reply
