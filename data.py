"""What a question is, where questions come from, and how text becomes tokens and back.

A QUESTION is a prompt and a gold answer. The response reasons in steps, one a line, then commits to
an answer behind ####, as in GSM8K. One of those that are made here, all numbers mod 97:

    prompt      37+26-12\\n
    response    37+26=63\\n63-12=51\\n#### 51

DATA SETS are made here (arithmetic, parity), have a name (`DATASETS`: from the hub, or from local
files), or are the path of a file or of a folder with a file for each split. A row needs a question
and an answer; a solution, where there is one, is what supervised fine-tuning learns from:

    {"question": "Tom has 3 apples and buys 4. How many now?", "answer": "3 + 4 = 7\\n#### 7"}

TOKENS. Prompt and response are tokenized apart and joined as ids, because that is how generation
meets them: a response continues the prompt's tokens and never merges with them. A model with a chat
template is prompted through it, any other by PLAIN_PROMPT.
"""

import argparse
import json
import logging
import os
import random
import re
import shutil
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch

PLAIN_PROMPT = "[MATH_TASK] Problem:\n{question}\n\nSolution:"  # the papers': VinePPO, SFL
CHAT_INSTRUCTION = "Reason step by step and end with the final answer in \\boxed{}."


@dataclass
class Question:
    prompt: str  # what a base model reads, plain template applied
    answer: str  # the gold final answer
    solution: str | None = None  # a demonstration, as it follows the prompt
    kind: str = "number"  # how its answer is graded: 'number' or 'math' (LaTeX)
    level: int | str | None = None  # difficulty, where the data set knows it
    question: str = ""  # the bare text: what a chat template wraps


# --------------------------------------------------------------------------- arithmetic, made here

MODULUS = 97  # a guess is right 1 time in 97; and few enough to learn all results by heart:
TERMS = ("+7", "+16", "+26", "+38", "+45", "-5", "-12", "-23", "-33", "-41")
# The pool is what one scrapes together: most of it is always solved (one step), much of it never
# (longer than what the model was shown), and little lies between. The test is what one wants.
LEARNABLE_SHARE = 0.08
STEPS_WANTED = range(2, 9)
STEPS_TOO_MANY = range(12, 15)
POOL_SIZES = {"train": 1280, "test": 280}


def levels_of(split):
    """{steps: share} of the questions of a split."""
    levels = dict.fromkeys(STEPS_WANTED, 1 / len(STEPS_WANTED))
    if split == "train":
        levels = {level: LEARNABLE_SHARE * share for level, share in levels.items()}
        levels[1] = (1 - LEARNABLE_SHARE) * 0.6
        levels |= dict.fromkeys(STEPS_TOO_MANY, (1 - LEARNABLE_SHARE) * 0.4 / len(STEPS_TOO_MANY))
    return levels


def arithmetic(count, seed, levels, split="train"):
    """About `count` distinct chains of + and - mod 97: 37+26-12 has level 2. levels: {steps:
    share}. Train and test are disjoint whatever their seeds: a hash of the chain says where it
    belongs. ValueError: a level has fewer questions than asked for."""
    rng = random.Random(seed)
    questions = {}
    for level, share in levels.items():
        wanted = len(questions) + round(count * share / sum(levels.values()))
        tries = 0
        while len(questions) < wanted and tries < 100 * count:
            chain = draw_chain(rng, level)
            if in_split("".join(map(str, chain)), split, ONE_IN):
                questions.setdefault(chain, worked(chain))
            tries += 1
        if len(questions) < wanted:
            raise ValueError(
                f"arithmetic has no {wanted} {split} questions of level {level}: ask for fewer"
            )
    questions = list(questions.values())
    rng.shuffle(questions)
    return questions


def draw_chain(rng, steps):
    """(start, term, ...): no term twice, as long as there are enough of them."""
    enough = steps <= len(TERMS)
    terms = rng.sample(TERMS, steps) if enough else rng.choices(TERMS, k=steps)
    return (rng.randrange(MODULUS), *terms)


def worked(chain):
    """The question of a chain, with its right solution. The prompt ends in a newline, so that the
    response's first line is a step."""
    text = "".join(map(str, chain))
    answer = (chain[0] + sum(map(int, chain[1:]))) % MODULUS
    bare = f"Compute {text} modulo {MODULUS}."
    return Question(f"{text}\n", str(answer), solve(chain), "number", len(chain) - 1, bare)


def solve(chain, hurry=None, rng=None):
    """A response to a chain, a line a step. hurry: {how many terms a line takes: how often}. It
    takes one, by default; of several, hurried people count the last one only, so 37+26-12=25 is
    wrong. Operands are restated: small models learn that faster."""
    value, terms = chain[0], list(chain[1:])
    lines = []
    while terms:
        count = rng.choices(list(hurry), hurry.values())[0] if hurry else 1
        line, terms = terms[:count], terms[count:]
        before, value = value, (value + int(line[-1])) % MODULUS
        lines.append(f"{before}{''.join(line)}={value}")
    return "\n".join([*lines, f"#### {value}"])


# --------------------------------------------------------------------------- data sets by name

MADE_HERE = ("arithmetic", "parity")
ORZ_FILE = "orz_math_57k_collected.json"
# name: hub id, configuration, split (or file) to train on and to test on, how answers are graded
DATASETS = {
    "gsm8k": ("openai/gsm8k", "main", "train", "test", "number"),
    "math": ("nlile/hendrycks-MATH-benchmark", None, "train", "test", "math"),  # 12,000; MATH-500
    "orz": ("Open-Reasoner-Zero/orz_math_57k_collection", None, ORZ_FILE, ORZ_FILE, "math"),
    "math500": ("HuggingFaceH4/MATH-500", None, None, "test", "math"),
    "college_math": ("di-zhang-fdu/College_Math_Test", None, None, "test", "math"),
    "olympiadbench": ("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", None, "train", "math"),
    "minerva_math": ("math-ai/minervamath", None, None, "test", "math"),
    "svamp": ("ChilleD/SVAMP", None, "train", "test", "number"),
    "asdiv": ("MU-NLPC/Calc-asdiv_a", None, None, "test", "number"),
}
QUESTION_FIELDS = ("question_concat", "question", "problem", "prompt")
ANSWER_FIELDS = ("answer", "final_answer", "result")
# Of a data set in one piece every tenth question, by a hash, is for testing.
ONE_IN = 10


def load_questions(
    dataset, split, *, data_dir=None, limit=None, seed=0, fields=None, bits=None
):  # fmt: skip
    """The questions of a data set: arithmetic, parity (of so many bits), one of DATASETS, a path,
    or OWNER/NAME on the hub (splits train and test); several, by commas.

    split: 'train', 'test' or 'all'. A named data set comes from the hub, or from data_dir:
    NAME/train and NAME/test, or train and test, or one file NAME. A path is a folder with train and
    test files, or one file (.jsonl, .json, .parquet). One file is split by a hash of the question,
    unless split is 'all'. limit: a random subset of that many, drawn with `seed`, in the data set's
    order. fields: `question`, `answer`, `solution` -> the row's names for them, where these are
    unusual. What is made here does not depend on `seed`: runs with other seeds share one test set.
    ValueError, one line, for whatever is unknown, missing, malformed or out of reach."""
    names = dataset.split(",")
    check_names(names, split, data_dir)
    questions = []
    for name in names:
        evaluation_only = name in DATASETS and DATASETS[name][2] is None
        parts = ["train", "test"] if split == "all" and not evaluation_only else [split]
        for part in parts:
            if name == "arithmetic":
                questions += arithmetic(POOL_SIZES[part], part, levels_of(part), part)
                continue
            if name == "parity":
                questions += parity(PARITY_SIZES[part], part, bits or BITS, part)
                continue
            rows, one_piece = rows_of(name, part, data_dir, alone=len(names) == 1)
            kind = DATASETS[name][-1] if name in DATASETS else None
            found = to_questions(rows, kind, fields or {})
            if one_piece:
                questions += [q for q in found if in_split(q.question, split, ONE_IN)]
                break  # `all` has them now
            questions += found
    if limit is None and questions:
        return questions
    limit = 1 if limit is None else limit
    if not 1 <= limit <= len(questions):
        raise ValueError(
            f"cannot take {limit} questions: the {split} split of {dataset} has {len(questions)}"
        )
    return [questions[i] for i in sorted(random.Random(seed).sample(range(len(questions)), limit))]


def in_split(text, split, one_in):
    """Is this question of the split? crc32 decides: Python's own hash differs in each process."""
    return split == "all" or (zlib.crc32(text.encode()) % one_in == 0) == (split == "test")


# --------------------------------------------------------------------------- text and tokens


def encode_prompts(tokenizer, questions, *, chat="auto"):
    """The token ids that the policy reads, one list a question. chat: 'on' wraps the bare question
    in the tokenizer's chat template, 'off' takes the plain prompt, 'auto' wraps if there is a
    template (base models may have one: off)."""
    if chat not in ("auto", "on", "off"):
        raise ValueError(f"unknown chat {chat!r}: give auto, on or off")
    if chat == "on" and not tokenizer.chat_template:
        raise ValueError("--chat on, but the tokenizer has no chat template: give --chat off")
    template = tokenizer.chat_template or ""
    plain = PLAIN_TEMPLATE in template  # see `add_tags`
    if not template or (chat == "off" and not plain):
        prompts = [tokenizer(q.prompt).input_ids for q in questions]  # with BOS where one is added
        return [ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids for ids in prompts]
    prompts = []
    for q in questions:
        text = q.prompt if plain else f"{q.question or q.prompt}\n\n{CHAT_INSTRUCTION}"
        message = {"role": "user", "content": text}
        text = tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
        prompts.append(tokenizer(text, add_special_tokens=False).input_ids)  # it wrote its own BOS
    return prompts


def encode_response(tokenizer, text):
    """The token ids of a text that continues a prompt: no special tokens, and not the word-start
    mark that a SentencePiece tokenizer puts before its input (so the text is encoded behind a
    newline, which is then cut off)."""
    start = tokenizer("\n", add_special_tokens=False).input_ids
    ids = tokenizer("\n" + text, add_special_tokens=False).input_ids
    if ids[: len(start)] == start:
        return ids[len(start) :]
    return tokenizer(text, add_special_tokens=False).input_ids


def decode_response(tokenizer, rollout):
    """The text of a response, without its stop token and other special tokens."""
    ids = rollout.written()
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def stop_ids(model, tokenizer):
    """The ids that end a response: those of the generation config (a chat model's end of turn) and
    the tokenizer's EOS."""
    config = model.generation_config
    configured = config.eos_token_id if config is not None else None
    if not isinstance(configured, (list, tuple)):
        configured = [configured]
    ids = {tokenizer.eos_token_id, *configured} - {None}
    if not ids:
        raise ValueError(
            "no stop token: neither the tokenizer nor the model's generation_config has an EOS "
            "token; set tokenizer.eos_token and save the model again"
        )
    return sorted(ids)


# ==================================================================================================
# That is the method. Below: parity, tags, reading rows, models on disk, command lines.
# ==================================================================================================


# --------------------------------------------------------------------------- parity, made here

BITS = 24  # the paper's headline has 50; the tiny model learns to work out 24 in half a minute
PARITY_SIZES = {"train": 4096, "test": 256}


def parity(count, seed, bits=BITS, split="train"):
    """About `count` distinct strings of bits. Is the number of ones odd? No short circuit computes
    that (arXiv 2510.11495): said at once, the answer is a guess; with the running parities written
    down first, each step is easy. Train and test are disjoint whatever their seeds."""
    rng = random.Random(seed)
    texts = set()
    share = 1 / ONE_IN if split == "test" else 1 - 1 / ONE_IN
    wanted = min(count, int(2**bits * share / 2))  # of few bits there are not so many
    while len(texts) < wanted:
        text = f"{rng.getrandbits(bits):0{bits}b}"
        if in_split(text, split, ONE_IN):
            texts.add(text)
    return [bit_question(text) for text in sorted(texts)]


def bit_question(text):
    """The question of a string of bits, with its long solution."""
    bare = f"Is the number of ones in {text} odd (1) or even (0)?"
    running = "".join(str(text[:end].count("1") % 2) for end in range(1, len(text) + 1))
    solution = f"{running}#### {running[-1]}"
    return Question(f"{text}\n", running[-1], solution, "number", len(text), bare)


def short_solution(question):
    """The answer at once."""
    return f"#### {question.answer}"


# --------------------------------------------------------------------------- tags

# A chat template that is the plain prompt, for a model that learned to read a tag before it.
PLAIN_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
TAGS = ("<bad>", "<good>")  # what a response is worth, 0 or 1: return-conditioned RL


def add_tags(model, tokenizer, chat="auto"):
    """Teach tokenizer and model the TAGS, two new tokens (their weights are the mean of the
    others'), and let every prompt begin with the good one: the chat template says so, and whoever
    loads the saved model asks for it. Nothing is done to a model that has them. (At a prompt's end
    a tag would come between question and response, and move them apart.)"""
    if TAGS[0] in tokenizer.get_vocab():
        return
    tokenizer.add_tokens(list(TAGS), special_tokens=True)
    tags = tag_ids(tokenizer)
    if len(tokenizer) > len(model.get_input_embeddings().weight):
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for table in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        table.data[tags] = table.data[: min(tags)].mean(0)
    if tokenizer.chat_template and chat != "off":
        tokenizer.chat_template = TAGS[1] + tokenizer.get_chat_template()
    else:
        adds_bos = tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
        bos = tokenizer.bos_token if adds_bos else ""
        tokenizer.chat_template = bos + TAGS[1] + PLAIN_TEMPLATE


def with_tag(tokenizer, prompt, reward):
    """A prompt that has the good tag, with the tag of this reward instead; None: with no tag."""
    ids = tag_ids(tokenizer)
    tag = [] if reward is None else [ids[reward]]
    at = prompt.index(ids[1])
    return prompt[:at] + tag + prompt[at + 1 :]


def tag_ids(tokenizer):
    return tokenizer.convert_tokens_to_ids(list(TAGS))


# --------------------------------------------------------------------------- reading rows


def to_questions(rows, kind, fields):
    """rows: [(where, row)]. kind None: 'number' if all of the answers are numbers, else 'math'."""
    questions = [to_question(where, row, fields) for where, row in rows]
    odd = [i for i, q in enumerate(questions) if not NUMBER.fullmatch(q.answer)]
    if odd and kind == "number":
        where, answer = rows[odd[0]][0], questions[odd[0]].answer
        raise ValueError(f"{where}: the answer {answer[:40]!r} is not a number")
    for question in questions:
        question.kind = kind or ("math" if odd else "number")
    return questions


def to_question(where, row, fields):
    """A row, checked, as a Question whose kind is still open."""
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
    text = text.strip()
    demonstration = solution and as_response(solution.strip(), answer)
    return Question(PLAIN_PROMPT.format(question=text), answer, demonstration, "", level, text)


def as_response(solution, answer):
    """A solution as it follows the prompt. A space joins it to "Solution:", not a newline: a BPE
    word token carries its leading space, and a newline would make the first step of every response
    an empty line. It must say its answer where the grader looks."""
    if "####" not in solution and "\\boxed" not in solution:
        solution += f"\n#### {answer}"
    return " " + solution


SUFFIXES = (".jsonl", ".json", ".parquet")
NUMBER = re.compile(r"[-+]?[$€£]?\s?(\d[\d,]*)?\.?\d+(\s?/\s?\d+)?\s?%?")


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


def last_boxed(text):
    """What stands in the last \\boxed{} of a text, or None."""
    start = text.rfind("\\boxed{") + len("\\boxed{")
    return braced(text[start:]) if "\\boxed{" in text else None


def braced(text):
    """What stands before the } that closes a { opened just before `text`; '' if none does."""
    depth = 1
    for brace in re.finditer(r"\\.|[{}]", text):  # \{ and \} are no braces
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[: brace.start()]
    return ""


def rows_of(name, split, data_dir, alone):
    """([(where, row), ...], does it still have to be split?) of a data set. alone: no other is
    asked for, so that data_dir/train.jsonl can only be its own."""
    path = Path(name)
    if path.is_dir():
        return first_file(path, [split]), False
    if name not in DATASETS and not is_hub_id(name):
        return read_rows(path), True
    hub_id, configuration, train, test, _ = DATASETS.get(name, (name, None, "train", "test", None))
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


# --------------------------------------------------------------------------- models


def load_model(path, *, device="cpu", dtype="float32"):
    """(model, tokenizer) of a folder, of a run's folder (its model/) or of a hub id. device: auto,
    cpu, cuda, mps. dtype: float32, bfloat16, float16, or auto (bfloat16 on CUDA). Runs no code from
    the hub; weights are safetensors, else .bin files, of which only tensors are read."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"unknown dtype {dtype!r}: give auto, float32, bfloat16 or float16")
    device = pick_device(device)
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    if Path(path, "model", "config.json").exists():
        path = Path(path, "model")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, dtype), weights_only=True
        )
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # offline, no such folder, half a folder, an unknown architecture
        raise ValueError(
            f"cannot load a model from {str(path)!r} ({type(error).__name__}: "
            f"{first_line(error)}): give --model a folder with config.json, *.safetensors (or "
            "*.bin) and a tokenizer, or a hub id"
        ) from error
    return model.to(device).eval(), tokenizer


def save_model(model, tokenizer, folder, weights=None):
    """Model and tokenizer as `from_pretrained` loads them; weights: others than the model's own, by
    name. Each file is written elsewhere and
    renamed over the old one: an interruption leaves whole files."""
    folder = Path(folder)
    beside = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        model.save_pretrained(beside, state_dict=weights)
        tokenizer.save_pretrained(beside)
    except Exception as error:  # a full disk has many names
        raise OSError(f"cannot save a model in {folder} ({first_line(error)})") from error
    files = [file for file in beside.rglob("*") if file.is_file()]  # templates may have a folder
    # config.json last: whoever looks for it finds all
    for file in sorted(files, key=lambda file: file.name == "config.json"):
        target = folder / file.relative_to(beside)
        target.parent.mkdir(parents=True, exist_ok=True)
        put_in_place(file, target)
    shutil.rmtree(beside)


def put_in_place(written, target):
    """Rename a file that was written beside over its target, once the disk has it."""
    with open(written, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(written, target)


def save_state(state, path):
    """torch.save: the file is the old one or the new one, whatever interrupts this, a full disk
    too (OSError)."""
    beside = path.with_name(f"{path.name}.tmp")
    try:
        torch.save(state, beside)
        put_in_place(beside, path)
    except (OSError, RuntimeError) as error:  # a full disk is either
        reason = f"cannot save in {path.parent} ({first_line(error)})"
        raise OSError(f"{reason}: its last checkpoint is whole") from error


def pick_device(name):
    """'auto' becomes the first there is of cuda, mps and cpu. ValueError: one that is not there."""
    there = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
    there += ["cpu"]
    if name != "auto" and name.partition(":")[0] not in there:
        raise ValueError(f"no device {name!r} here: give auto or {' or '.join(there)}")
    return there[0] if name == "auto" else name


# --------------------------------------------------------------------------- command lines
# A script's settings are a table with one a line: name, default (and, behind a comma, the default
# for other data sets), what it may be, help. `off` makes a flag that takes no value; `-` is none.
# What it may be: a|b|c one of these; 1.. at least 1; 0..1 between; + several; - anything.


def read_settings(table):
    """{name: (default, default for other data sets, what it may be, help)} of a table."""
    settings = {}
    for line in filter(str.strip, table.splitlines()):
        name, default, allowed, text = line.split(None, 3)
        small, _, large = default.partition(",")
        settings[name] = value(small), value(large or small), allowed, text
    return settings


def value(text):
    """'60' -> 60, '1e-4' -> 0.0001, 'off' -> False, '-' -> None, other text as it is."""
    if text in ("-", "off"):
        return {"-": None, "off": False}[text]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def parse_flags(table, description, argv=None):
    """The flags that were given: {name: value}. --data-dir is --data_dir; a bad flag is a
    ValueError of one line."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)

    def fail(message):
        raise ValueError(f"{message} (see --help)")

    parser.error = fail
    for name, (small, large, allowed, text) in read_settings(table).items():
        help = text if small in (None, False) else f"{text} (default {small}"
        if help != text:
            help += ")" if large in (small, None) else f"; other data sets {large})"
        help = help.replace("%", "%%")
        kind = str if small is None else type(small)
        if small is False:
            parser.add_argument(f"--{name}", action="store_true", default=None, help=help)
        else:
            metavar = allowed if "|" in allowed else kind.__name__
            several = {"nargs": "+"} if allowed == "+" else {}
            parser.add_argument(f"--{name}", type=kind, metavar=metavar, help=help, **several)
    args = []
    for arg in sys.argv[1:] if argv is None else argv:
        flag, equals, rest = arg.partition("=")
        if flag.startswith("--"):
            flag = "--" + flag[2:].replace("-", "_")
        args.append(flag + equals + rest)
    given = vars(parser.parse_args(args))
    return {name: value for name, value in given.items() if value is not None}


def check_settings(table, args):
    """ValueError names the first setting that is not what it may be, and its limits."""
    for name, (_, _, allowed, _) in read_settings(table).items():
        given = getattr(args, name)
        if "|" in allowed and given not in allowed.split("|"):
            raise ValueError(f"--{name} {given}: choose from {allowed.replace('|', ', ')}")
        low, dots, high = allowed.partition("..")
        if dots and high and not float(low) <= given <= float(high):
            raise ValueError(f"--{name} {given} must be in [{low}, {high}]")
        if dots and not high and not given >= float(low):
            raise ValueError(f"--{name} {given} must be at least {low}")


def command_line(main):
    """Run main() as a program: bad input, a full disk or a loss gone NaN is one line on stderr and
    exit code 2; Ctrl-C is 130."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # "Loading weights" between the bars that matter
    name = Path(sys.argv[0]).name
    try:
        main()
    except (ValueError, FloatingPointError, OSError) as error:
        print(f"{name}: {first_line(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        sys.exit(130)


def first_line(error):
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def is_hub_id(name):
    """OWNER/NAME, and no path that is there or looks like a file."""
    path = Path(name)
    owner_and_name = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name)
    return bool(owner_and_name) and not path.exists() and path.suffix not in SUFFIXES


def check_names(names, split, data_dir):
    if split not in ("train", "test", "all"):
        raise ValueError(f"unknown split {split!r}: give train, test or all")
    for name in names:
        known = name in MADE_HERE or name in DATASETS or is_hub_id(name)
        path = Path(name)
        if not known and not (path.exists() or path.suffix in SUFFIXES or len(path.parts) > 1):
            raise ValueError(
                f"unknown data set {name!r}: give {', '.join([*MADE_HERE, *DATASETS])}, OWNER/NAME "
                "on the hub, or the path of a .jsonl, .json or .parquet file or of a folder with "
                "train and test files"
            )
        if name in DATASETS and split == "train" and DATASETS[name][2] is None:
            raise ValueError(f"{name} has no questions to train on: it is for evaluation")
    if data_dir is not None and not any(name in DATASETS for name in names):
        raise ValueError(
            f"--data-dir {data_dir} is for data sets with a name ({', '.join(DATASETS)}): leave it "
            f"out with {','.join(names)!r}"
        )
