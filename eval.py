"""What a question is, when an answer is right, and how good a model is.

    python eval.py --model runs/sfl --dataset arithmetic                      # greedy accuracy, by difficulty
    python eval.py --model HUB_ID_OR_DIR --dataset gsm8k --samples 16         # + mean accuracy, pass@k, maj@16
    python eval.py --plot runs/uniform runs/sfl --out curves.png              # training curves, one colour a run

A QUESTION is a prompt and a gold answer. The policy's response reasons in steps, then commits to an answer. In the data
set made here, all numbers mod 97:

    prompt     37+5-8\\n
    response   37+5=42\\n42-8=34\\n#### 34     one step a line, then the answer, as in GSM8K
    reward     1.0                          for the right answer and nothing else: no partial credit, no learned judge

THE REWARD reads only the last answer a response commits to. It is the part of the system that the policy is paid to
fool, so it is strict where leniency could be farmed: "5 or 6" is no answer, however right one of them is, and a
response cut off by the length limit is worth 0. Whatever text comes in, it is never executed and cannot hang the run.

THREE MEASURES, for c right among n samples of a question, averaged over questions, each with its standard error:

    mean accuracy   c / n                          how often one sample is right
    pass@k          1 - C(n - c, k) / C(n, k)      P(one of k samples at least is right), unbiased: Chen et al. 2021,
                                                   arXiv 2107.03374, eq. 1; the plug-in 1 - (1 - c/n)^k is biased low
    maj@n           is the most frequent answer right? Wang et al. 2022, arXiv 2203.11171 (self-consistency)
"""

import argparse
import contextlib
import itertools
import json
import logging
import math
import random
import re
import subprocess
import sys
import threading
import zlib
from collections import Counter, deque
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from rollout import generate

PLAIN_PROMPT = "[MATH_TASK] Problem:\n{question}\n\nSolution:"  # the papers': VinePPO (arXiv 2410.01679), SFL
CHAT_INSTRUCTION = "Reason step by step and end with the final answer in \\boxed{}."  # a chat model is asked this too


@dataclass
class Question:
    prompt: str                     # what a base model reads, plain template applied
    answer: str                     # the gold final answer
    solution: str | None = None     # a demonstration, as it follows the prompt: SFT learns prompt + solution + eos
    kind: str = "number"            # how its answer is graded: 'number' or 'math' (LaTeX)
    level: int | str | None = None  # difficulty, where the data set knows it
    question: str = ""              # the bare text: what a chat template wraps


DATASETS = ("arithmetic", "gsm8k")
MODULUS = 97  # a guess is right 1 time in 97: success means that the reasoning was right
# The share of each number of steps. As the paper found in real data, there is much the model always solves, much it
# never will (10 to 14 steps: longer than it is ever shown) and a frontier between, where RL has something to learn.
ARITHMETIC_LEVELS = {1: 0.55, **{k: 0.20 / 5 for k in range(2, 7)}, **{k: 0.25 / 5 for k in range(10, 15)}}
# One step makes 97 x 18 = 1746 questions, of which 4 in 5 are for training: with 55 % of them, 2048 can be distinct.
ARITHMETIC_SIZES = {"train": 2048, "test": 512}


def arithmetic(count, seed, levels=ARITHMETIC_LEVELS, split="train"):
    """`count` distinct chains of + and - of one-digit numbers mod 97: 37+5-8 has level 2. levels: steps -> share.
    Train and test are disjoint whatever their seeds: a hash of the chain says where it belongs (crc32: Python's own
    hash of a string differs in each process). ValueError: a level has fewer distinct questions than asked for."""
    if count < 1 or not levels or min(levels) < 1 or min(levels.values()) < 0 or sum(levels.values()) <= 0:
        raise ValueError(f"arithmetic: cannot make {count} questions with shares {levels}: levels start at 1")
    rng, total = random.Random(seed), sum(levels.values())
    exact = {level: count * share / total for level, share in levels.items()}
    counts = {level: int(wanted) for level, wanted in exact.items()}
    for level in sorted(levels, key=lambda level: counts[level] - exact[level])[: count - sum(counts.values())]:
        counts[level] += 1  # to the largest remainders, so that the counts add up
    questions = [worked(chain) for level in counts for chain in draw_chains(rng, level, counts[level], split)]
    rng.shuffle(questions)
    return questions


def draw_chains(rng, level, wanted, split):
    """`wanted` distinct chains of `level` steps that belong to `split`, each as (start, '+5', '-8', ...)."""
    steps = [sign + str(digit) for sign in "+-" for digit in range(1, 10)]

    def belongs(chain):
        return (zlib.crc32("".join(map(str, chain)).encode()) % 5 == 0) == (split == "test")
    if MODULUS * len(steps) ** level < 20 * wanted:  # a small space: list it. A large one: draw until it is enough
        chains = [c for c in itertools.product(range(MODULUS), *[steps] * level) if belongs(c)]
        if len(chains) < wanted:
            raise ValueError(f"arithmetic has {len(chains)} distinct {split} questions of level {level}, not {wanted}: "
                             f"ask for fewer questions, or give that level a smaller share")
        return rng.sample(chains, wanted)
    chains = {}  # a dict keeps the order of drawing, which in a set would differ from process to process
    while len(chains) < wanted:
        chain = (rng.randrange(MODULUS), *rng.choices(steps, k=level))
        if belongs(chain):
            chains[chain] = None
    return list(chains)


def worked(chain):
    """The question of a chain. Its solution restates the operands at each step: small models learn that much faster."""
    value, lines, text = chain[0], [], "".join(map(str, chain))
    for step in chain[1:]:
        before, value = value, (value + int(step)) % MODULUS
        lines.append(f"{before}{step}={value}")
    # The prompt ends in a newline, so that the first line of the response is the first step.
    return Question(f"{text}\n", str(value), "\n".join([*lines, f"#### {value}"]), "number", len(lines),
                    f"Compute {text} modulo {MODULUS}.")


def load_questions(dataset, split, *, data_dir=None, limit=None, seed=0):
    """The questions of a data set: 'arithmetic', 'gsm8k' or a PATH; split: 'train' or 'test'.

    gsm8k comes from the hub, or from data_dir/{train,test}.jsonl. A PATH is a folder with those two files, or one
    .jsonl file, which serves as either split. A line holds `question` (or `problem`, `prompt`), `answer` and, if you
    like, `solution` and `level`. limit: a random subset of that many, drawn with `seed`, in the data set's order; None:
    all. arithmetic does not depend on `seed`: runs with different seeds share one test set. ValueError, one line, for
    whatever is unknown, missing, malformed or out of reach."""
    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split!r}: give train or test")
    if data_dir is not None and dataset != "gsm8k":
        raise ValueError(f"--data-dir {data_dir} is for --dataset gsm8k: leave it out with {dataset!r}")
    path = Path(dataset)
    if dataset == "arithmetic":
        questions = arithmetic(ARITHMETIC_SIZES[split], seed=("train", "test").index(split), split=split)
    elif dataset == "gsm8k":
        rows = gsm8k_from_hub(split) if data_dir is None else read_jsonl(Path(data_dir, f"{split}.jsonl"))
        questions = to_questions(rows, kind="number")
    elif path.exists() or path.suffix == ".jsonl" or len(path.parts) > 1:
        questions = to_questions(read_jsonl(path / f"{split}.jsonl" if path.is_dir() else path))
    else:
        raise ValueError(f"unknown data set {dataset!r}: give {', '.join(DATASETS)}, or the path of a .jsonl file or "
                         f"of a folder with train.jsonl and test.jsonl")
    if limit is None:
        return questions
    if not 1 <= limit <= len(questions):
        raise ValueError(f"cannot take {limit} questions: the {split} split of {dataset} has {len(questions)}")
    return [questions[i] for i in sorted(random.Random(seed).sample(range(len(questions)), limit))]


def gsm8k_from_hub(split):
    from datasets import load_dataset  # here: slow to import, and not needed where the files are local
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # offline, a dozen retries would bury our one line
    try:
        rows = load_dataset("openai/gsm8k", "main", split=split)
    except Exception as error:  # offline, a proxy, a full disk: each has a type of its own, all have one way out
        raise ValueError(f"cannot get openai/gsm8k from the hub ({first_line(error)}): give --data-dir a folder with "
                         f"train.jsonl and test.jsonl, and --model a local folder") from error
    return [(f"openai/gsm8k {split}, row {i}", row) for i, row in enumerate(rows)]


def read_jsonl(path):
    """[('FILE, line 3', {...}), ...], blank lines skipped. ValueError names the file and the line."""
    try:
        lines, rows = Path(path).read_bytes().split(b"\n"), []
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    for where, line in ((f"{path}, line {number}", line) for number, line in enumerate(lines, 1) if line.strip()):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, a number of 10,000 digits
            raise ValueError(f"{where}: not JSON ({first_line(error)})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where}: not a JSON object but {str(row)[:40]!r}")
        rows.append((where, row))
    if not rows:
        raise ValueError(f"{path} is empty: it needs one JSON object a line")
    return rows


def to_questions(rows, kind=None):
    """rows: [(where, {...})]. kind None: one for the whole file, 'number' if all answers are numbers, else 'math'."""
    questions = [to_question(where, row) for where, row in rows]
    odd = [i for i, q in enumerate(questions) if parse_number(q.answer) is None]
    if odd and kind == "number":
        raise ValueError(f"{rows[odd[0]][0]}: the answer {questions[odd[0]].answer[:40]!r} is not a number")
    for q in questions:
        q.kind = "math" if odd else "number"
        if q.solution is not None:
            # A space joins it to "Solution:", not a newline: a BPE word token carries its leading space, and a newline
            # would make the first step of every response an empty line.
            q.solution = " " + q.solution
            if final_answer(q.solution, q.kind) is None:  # a demonstration must say its answer where the grader looks
                q.solution += f"\n#### {q.answer}"
    return questions


def to_question(where, row):
    """A row, checked, as a Question whose kind is still open. GSM8K has the solution in `answer` too, before the ####."""
    text = next((row[name] for name in ("question", "problem", "prompt") if row.get(name)), None)
    answer, solution, level = (row.get(name) for name in ("answer", "solution", "level"))
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where}: no text in a field 'question' (or 'problem', 'prompt')")
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        answer = str(answer)
    if not isinstance(answer, str) or not answer.rpartition("####")[2].strip():
        raise ValueError(f"{where}: no text or number in a field 'answer'")
    if not isinstance(solution, (str, type(None))) or not isinstance(level, (str, int, type(None))):
        raise ValueError(f"{where}: the field 'solution' must be text, and 'level' text or a whole number")
    if "####" in answer:
        solution = re.sub(r"<<[^<>\n]*>>", "", answer)  # without the calculator notes: 16-3=$<<16-3=13>>13
    return Question(PLAIN_PROMPT.format(question=text.strip()), answer.rpartition("####")[2].strip(),
                    solution and solution.strip(), level=level, question=text.strip())


# ------------------------- grading: which text is the answer, which number is that text, is it the gold one

# What announces an answer. Of several the LAST is the commitment, as in VinePPO and verl for #### and in Minerva for
# \boxed (lm-evaluation-harness takes the first ####): a model that corrects itself means its last word, the headings of
# a chat model ('#### Step 1') come before its \boxed answer, and a list of guesses counts as one guess.
MARKER = re.compile(r"(?:####|\\(?:boxed|fbox)\s{0,3}\{|\banswer\s{0,3}(?:is\b(?!\s{0,3}not\b)|[:=])\s{0,3}:?)"
                    r"\s{0,9}", re.I)
SENTENCE_END = re.compile(r"(?<!\\)[.!?](?=\s|$)|\n")  # not the \! of 1,\! 234
MARKERS_READ, ANSWER_CHARS = 20, 300  # with these bounds the time is linear in the length of the response


def final_answer(response, kind="number", last_number=False):
    """The text of the answer that a response commits to last, or None. A marker with no number behind it (for 'math':
    nothing) commits to nothing. last_number: where no marker does, take the last number; lenient, for other formats."""
    for marker in reversed(deque(MARKER.finditer(response), maxlen=MARKERS_READ)):
        window = response[marker.end() : marker.end() + ANSWER_CHARS]
        text = braced(window) if "{" in marker[0] else SENTENCE_END.split(window, maxsplit=1)[0]
        # An answer as long as the window may have been cut: 18 of 1800 must not be read as 18.
        if len(text) < ANSWER_CHARS - 1 and text.strip() and (kind == "math" or re.search("[0-9]", text)):
            return text.strip()
    end = 1 + max(response.rfind(digit) for digit in "0123456789")
    tail = response[max(0, end - 60) : end]
    number = re.search(r"(?:(?<![\w)])-)?[0-9.,]*[0-9](?:\s?/\s?[0-9.,]*[0-9])?$", tail) if last_number else None
    return number[0] if number and (number.start() > 0 or end <= 60) else None


def braced(text):
    """What stands before the } that closes a { opened just before `text`; '' if none does."""
    depth = 1
    for i, char in enumerate(text):
        depth += (char == "{") - (char == "}")
        if depth == 0:
            return text[:i]
    return ""


WHOLE = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
REAL = rf"(?:{WHOLE}(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][+-]?[0-9]{{1,3}}(?![0-9]))?"  # 1e999999999 would fill the memory
NUMBER = re.compile(rf"""(?<![\w.,^/*+-])                        # not the tail of something longer
    (?P<sign>[-+]|\b(?:minus|negative)\b)?\s*
    (?:(?P<whole>[0-9]+)\s+(?=[0-9]+\s*/\s*[0-9]))?              # 18 1/2 is 37/2
    (?P<top>{REAL})(?:\s*/\s*(?P<bottom>{REAL}))?
    (?:\s*(?P<word>hundred|thousand|million|billion|trillion)\b|(?P<letter>[kKMB])\b)?""", re.VERBOSE)
SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12,
          "k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9}
EXPRESSION = re.compile(r"[0-9\\^_<>≤≥√π±+*×÷=!|]")  # beside a number: it is not the whole answer
REWRITES = [(re.compile(pattern), plain) for pattern, plain in (
    ("[−–]", "-"), (r"\{,\}", ","), (r"\\!", ""), (r"\\,(?=[0-9]{3}(?![0-9]))", ""),  # 1{,}234  1,\!234  1\,234
    (r"\\[dt]?frac\s*([0-9])\s*([0-9])(?![0-9])", r" \1/\2 "),
    (r"\\[dt]?frac\s*\{\s*(-?[0-9.,]+)\s*\}\s*\{\s*([0-9.,]+)\s*\}", r" \1/\2 "),
    (r"\\(?:text|mathrm|mathbf|textbf|mbox)\s*\{([^{}]*)\}", r" \1 "),
    (r"\^\s*\{?\s*\\circ\s*\}?|°", " "), (r"\\([$%])", r"\1"), (r"(?<=[-+])[$£€¥₹]", ""),
    (r"\\(?:left|right|displaystyle|quad|qquad)(?![A-Za-z])|\\[()\[\],;: ]|\*\*|[$£€¥₹{}~`]", " "),
    (r"(?<![A-Za-z])([cmk]?m|ft|in|yd|mi|feet|foot|inch(?:es)?|met(?:er|re)s?|miles?|yards?|units?)"
     r"(?:\s*\^\s*\{?[23]\}?|[²³23])(?!\w)", r"\1"),  # 18 cm^2
    (r"\A(?:[^=A-Za-z<>!≤≥≠]*=|[^=0-9<>!≤≥≠]*=)+", ""))]  # '9*2 = 18', 'the total cost = 18'


@lru_cache(1 << 16)
def parse_number(text):
    r"""The one number that a short text states, as an exact Fraction (never a float): '$1,234.50', '- 18', '18 1/2',
    '\frac{3}{4}', '75%' (75), '18 dollars', '2 million', '9*2 = 18'. None if there is no number, or more than one
    ('5 or 6', '5:30', '1.234,5'), or an expression ('2^3', '18x'). Units and percent signs are dropped, as is usual."""
    if len(text) > ANSWER_CHARS:
        return None
    for pattern, plain in REWRITES:
        text = pattern.sub(plain, text)
    number = NUMBER.search(text)
    if number is None:
        return None
    before, after = text[: number.start()], text[number.end() :]
    value, bottom = (Fraction((number[part] or "1").replace(",", "")) for part in ("top", "bottom"))
    if EXPRESSION.search(before + after) or re.search(r"/|\w\($", before) or re.match(r"[xyzni]\b", after):
        return None  # 5 or 6, 18^2, 2/x/3, sqrt(18), 18x
    if (bottom == 0 or any(map(str.isnumeric, before + after))
            or re.match(r"[-+]\s", number[0]) and re.search(r"\w", before)):
        return None  # 3/0, ½, ² and the digits of other scripts, x - 18
    value = (int(number["whole"] or 0) + value / bottom) * SCALES.get(number["word"] or number["letter"], 1)
    return -value if number["sign"] in ("-", "minus", "negative") else value


def grade(response, question, *, last_number=False):
    """1.0 if the response's final answer equals the question's, else 0.0. No response makes it raise or hang.
    ValueError: a question that cannot be graded. last_number: see `final_answer`."""
    if question.kind not in ("number", "math"):
        raise ValueError(f"cannot grade kind {question.kind!r}: give 'number' or 'math'")
    answer, gold = final_answer(response, question.kind, last_number), parse_number(question.answer)
    if question.kind == "math":
        return float(answer is not None and same_math(question.answer, answer))
    if gold is None:
        raise ValueError(f"the gold answer {question.answer[:40]!r} is not a number: give kind='math'")
    return float(answer is not None and parse_number(answer) == gold)


# math-verify compares LaTeX with sympy, which some expressions keep busy for ever. Its own time limit is a signal, and
# works in the main thread only and not while C code runs (9^{9^{9^9}}): so it lives in a process that can be killed.
JUDGE = r"""
import contextlib, json, os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, whose end is the end of stdin here
with contextlib.suppress(ImportError, ValueError, OSError):  # no such limit on this system
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
from math_verify import parse, verify
reply = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # whatever else prints must not look like a reply
print("ready", file=reply, flush=True)
for line in sys.stdin:
    try:
        gold, answer = (parse("\\boxed{%s}" % text, parsing_timeout=2) for text in json.loads(line))
        same = bool(gold and answer) and verify(gold, answer, timeout_seconds=2)
    except Exception:
        same = False
    print(int(same), file=reply, flush=True)
"""
JUDGE_SECONDS = 8
judge, judge_lock = None, threading.Lock()


@lru_cache(1 << 16)
def same_math(gold, answer):
    """Are two LaTeX expressions equal? False where that cannot be told in JUDGE_SECONDS. Needs math-verify."""
    global judge
    if re.sub(r"\s", "", gold.strip("$ ")) == re.sub(r"\s", "", answer.strip("$ ")):
        return True
    if find_spec("math_verify") is None:
        raise ValueError(f"the gold answer {gold[:40]!r} needs math-verify to grade: pip install math-verify")
    with judge_lock:
        if judge is None or judge.poll() is not None:
            judge = subprocess.Popen([sys.executable, "-c", JUDGE], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                     stderr=subprocess.DEVNULL, text=True)
            if ask_judge("", seconds=120) != "ready":
                raise ValueError(f"math-verify does not start: try {sys.executable} -c 'import math_verify'")
        return ask_judge(json.dumps([gold, answer]) + "\n", JUDGE_SECONDS) == "1"


def ask_judge(line, seconds):
    """Send a line and return the reply; '' if none comes in time, and then the process is killed."""
    timer, reply = threading.Timer(seconds, judge.kill), ""
    timer.start()
    try:
        with contextlib.suppress(OSError):  # killed before it read the line
            print(line, end="", file=judge.stdin, flush=True)
            reply = judge.stdout.readline().strip()
    finally:
        timer.cancel()
        if not reply:  # late, crashed, or we are interrupted: dead for sure, so that no later call reads this reply
            judge.kill()
            judge.wait()
    return reply


# ------------------------- models, text and tokens, measures


def load_model(path, *, device="cpu", dtype="float32"):
    """(model, tokenizer) of a folder, of a run's folder (its model/) or of a hub id. device: auto, cpu, cuda, mps.
    dtype: float32, bfloat16, float16, or auto (bfloat16 on CUDA). Runs no code from the hub and reads no pickle."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"unknown dtype {dtype!r}: give auto, float32, bfloat16 or float16")
    device = pick_device(device)
    dtype = dtype if dtype != "auto" else "bfloat16" if device.startswith("cuda") else "float32"
    path = Path(path, "model") if Path(path, "model", "config.json").exists() else path
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # as above
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # offline, no such folder, half a folder, an unknown architecture: one way out
        raise ValueError(f"cannot load a model from {str(path)!r} ({type(error).__name__}: {first_line(error)}): give "
                         f"--model a folder with config.json, *.safetensors and a tokenizer, or a hub id") from error
    return model.to(device).eval(), tokenizer


def pick_device(name):
    """'auto' becomes cuda, mps or cpu, the first there is. ValueError for a device that is not there."""
    there = [*["cuda"] * torch.cuda.is_available(), *["mps"] * torch.backends.mps.is_available(), "cpu"]
    if name != "auto" and name.partition(":")[0] not in there:
        raise ValueError(f"no device {name!r} here: give auto or {' or '.join(there)}")
    return there[0] if name == "auto" else name


def encode_prompts(tokenizer, questions, *, chat="auto"):
    """The token ids that the policy reads, one list a question. chat: 'on' wraps the bare question in the tokenizer's
    chat template, 'off' takes the plain prompt, 'auto' wraps if there is a template (base models may have one: off)."""
    if chat not in ("auto", "on", "off"):
        raise ValueError(f"unknown chat {chat!r}: give auto, on or off")
    if chat == "on" and not tokenizer.chat_template:
        raise ValueError("--chat on, but the tokenizer has no chat template: give --chat off")
    if chat == "off" or not tokenizer.chat_template:
        prompts = [tokenizer(q.prompt).input_ids for q in questions]  # with BOS where the tokenizer adds one
        return [ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids for ids in prompts]  # but without EOS
    messages = [[dict(role="user", content=f"{q.question or q.prompt}\n\n{CHAT_INSTRUCTION}")] for q in questions]
    texts = [tokenizer.apply_chat_template(m, add_generation_prompt=True, tokenize=False) for m in messages]
    return [tokenizer(text, add_special_tokens=False).input_ids for text in texts]  # the template wrote its own BOS


def encode_response(tokenizer, text):
    """The token ids of a text that continues a prompt: no special tokens, and not the word-start mark that a
    SentencePiece tokenizer puts before its input (so the text is encoded behind a newline, which is then cut off)."""
    start, ids = (tokenizer(part, add_special_tokens=False).input_ids for part in ("\n", "\n" + text))
    return ids[len(start) :] if ids[: len(start)] == start else tokenizer(text, add_special_tokens=False).input_ids


def decode_response(tokenizer, rollout):
    """The text of a response, without its stop token and other special tokens."""
    ids = rollout.response[:-1] if rollout.finished else rollout.response
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def stop_ids(model, tokenizer):
    """The ids that end a response: the generation config's (a chat model's end of turn) and the tokenizer's EOS."""
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = {tokenizer.eos_token_id, *(configured if isinstance(configured, (list, tuple)) else [configured])} - {None}
    if not ids:
        raise ValueError("no stop token: neither the tokenizer nor the model's generation_config has an EOS token; set "
                         "tokenizer.eos_token and save the model again")
    return sorted(ids)


def rewards(tokenizer, questions, rollouts, *, last_number=False):
    """One list of n `Rollout`s a question -> (questions, n) float32: 1 for a finished, right response, else 0."""
    return np.array([[grade(decode_response(tokenizer, r), question, last_number=last_number) if r.finished else 0.0
                      for r in group] for question, group in zip(questions, rollouts, strict=True)], np.float32)


def pass_at_k(right, n, k):
    """1 - C(n - c, k) / C(n, k) for c = right of n samples (Chen et al. 2021, arXiv 2107.03374, eq. 1)."""
    return 1 - math.comb(n - right, k) / math.comb(n, k)  # in whole numbers of any size: nothing overflows


def majority(answers, graded):
    """Is the most frequent answer right? answers: hashable, None where a response gave none, which is no vote; graded:
    their rewards. A tie counts as the expectation of a random choice among the tied: the measure draws no numbers."""
    votes = Counter(answer for answer in answers if answer is not None)
    tied = [answer for answer, count in votes.items() if count == max(votes.values())]
    return sum(graded[answers.index(answer)] for answer in tied) / len(tied) if tied else 0.0


def vote(text):
    """What a final answer counts as in a vote: 18, 18.0 and $18 are one; LaTeX loses its spaces. None: no vote."""
    number = parse_number(text or "")
    return number if number is not None else text and re.sub(r"\s", "", text)


def mean_and_se(values):
    """(mean, its standard error over questions: std / sqrt(n)). One question tells nothing of the error: None."""
    values = np.asarray(values, np.float64)
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def evaluate(model, tokenizer, questions, *, samples=1, temperature=0.0, top_p=1.0, max_new_tokens=256, chat="auto",
             seed=0, progress=False, engine="slots", slots=None, dtype=None, last_number=False):
    """Sample `samples` responses a question (by default one, greedy) and measure them. Returns a dict:

    n (questions), samples, accuracy and accuracy_se (each question's share of right samples, averaged), by_level
    {level: {n, accuracy, se}}, response_length (mean, tokens), finished (share), success (a list: each question's share
    of right samples), examples (of the first questions); with several samples also mean_accuracy (= accuracy), pass@1,
    pass@2, pass@4 ... and maj@samples, each with its _se.
    ValueError: no questions, several greedy samples (all alike), and what `rollout.generate` refuses."""
    if not questions:
        raise ValueError("no questions to evaluate on")
    if samples < 1 or (samples > 1 and temperature == 0):
        raise ValueError(f"samples={samples} at temperature={temperature}: need 1 or more, and for more a temperature")
    groups = generate(model, encode_prompts(tokenizer, questions, chat=chat), n=samples, max_new_tokens=max_new_tokens,
                      temperature=temperature, top_p=top_p, stop_ids=stop_ids(model, tokenizer), seed=seed,
                      progress=progress, engine=engine, slots=slots, dtype=dtype)
    graded = rewards(tokenizer, questions, groups, last_number=last_number)  # (questions, samples)
    success = graded.mean(1)
    measures = {"accuracy": success}
    if samples > 1:
        measures["mean_accuracy"] = success
        for k in (2**i for i in range(samples.bit_length())):
            measures[f"pass@{k}"] = [pass_at_k(int(right), samples, k) for right in graded.sum(1)]
        votes = [[vote(final_answer(decode_response(tokenizer, r), q.kind, last_number)) if r.finished else None
                  for r in group] for q, group in zip(questions, groups)]
        measures[f"maj@{samples}"] = [majority(*pair) for pair in zip(votes, graded.tolist())]
    result = dict(n=len(questions), samples=samples)
    for name, values in measures.items():
        result[name], result[name + "_se"] = mean_and_se(values)
    result["by_level"] = {}
    for level in sorted({q.level for q in questions} - {None}, key=lambda level: (isinstance(level, str), level)):
        rows = [i for i, q in enumerate(questions) if q.level == level]
        mean, se = mean_and_se(success[rows])
        result["by_level"][level] = dict(n=len(rows), accuracy=mean, se=se)
    result["response_length"] = float(np.mean([len(r.response) for group in groups for r in group]))
    result["finished"] = float(np.mean([r.finished for group in groups for r in group]))
    result["success"] = success.tolist()  # what the histograms of --report are drawn from
    result["examples"] = [dict(question=q.question or q.prompt, answer=q.answer, reward=float(graded[i, 0]),
                               response=decode_response(tokenizer, groups[i][0])) for i, q in enumerate(questions[:4])]
    return result


def table(greedy, sampled):
    """What the command prints: accuracy by difficulty, then what several samples tell (sampled: None without)."""
    def line(label, count, *measures):
        cells = (f"{mean:9.3f} ± " + ("?    " if se is None else f"{se:.3f}") for mean, se in measures)
        return f"{label!s:<10}{count:>10}" + " ".join(cells)
    columns = [greedy, sampled] if sampled else [greedy]
    samples = f"{'mean of %d' % sampled['samples']:>19}" if sampled else ""
    lines = [f"{'level':<10}{'questions':>10}{'greedy':>12}{samples}",
             line("all", greedy["n"], *((c["accuracy"], c["accuracy_se"]) for c in columns))]
    for level, row in greedy["by_level"].items():
        rows = (c["by_level"][level] for c in columns)
        lines.append(line(level, row["n"], *((r["accuracy"], r["se"]) for r in rows)))
    for name in (name for name in sampled or {} if "@" in name and not name.endswith("_se")):
        lines.append(line(name, "", (sampled[name], sampled[name + "_se"])))
    return "\n".join(lines)


COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe-Ito: safe for all eyes
ROWS = {"eval_accuracy": "held-out accuracy", "reward_mean": "mean reward", "learnable": "learnable",
        "solved_by_all": "solved by all", "solved_by_none": "solved by none"}
COLUMNS = {"iteration": "iteration", "tokens": "tokens generated, in all", "seconds": "seconds of training"}
SECONDS = ("seconds_score", "seconds_rollout", "seconds_credit", "seconds_update")
TOKENS = ("tokens_generated", "tokens_scored", "tokens_credit")


def read_run(folder):
    """The rows of a run's metrics.jsonl; to each is added what was spent until then: tokens, seconds."""
    path, rows, tokens, seconds = Path(folder, "metrics.jsonl"), [], 0, 0.0
    if not path.exists():
        raise ValueError(f"{folder} holds no metrics.jsonl: give a folder that sfl.py --out wrote")
    for where, row in read_jsonl(path):
        for key in ("iteration", *ROWS, *SECONDS, *TOKENS):
            if not isinstance(row.get(key, 0), (int, float)) and row[key] is not None or row.get("iteration") is None:
                raise ValueError(f"{where}: no number in the field {key!r}")
        tokens += sum(row.get(key) or 0 for key in TOKENS)
        seconds += sum(row.get(key) or 0 for key in SECONDS)
        rows.append({**row, "tokens": tokens, "seconds": seconds})
    return rows


def plot(runs, out):
    """Draw accuracy, reward and the shares of questions solved by all attempts, by none and by some (learnable) against
    iterations, tokens and seconds, and save a PNG. runs: folders, a colour each. Faint: iterations; bold: smoothed."""
    from matplotlib.figure import Figure  # not pyplot: it needs no screen
    from matplotlib.ticker import EngFormatter, PercentFormatter
    curves = [read_run(run) for run in runs]
    names = [Path(run).resolve().name for run in runs]
    names = [str(run) if names.count(name) > 1 else name for run, name in zip(runs, names)]
    figure = Figure(figsize=(10, 9))
    axes = figure.subplots(len(ROWS), len(COLUMNS), sharex="col", sharey="row")
    for (i, key), (j, x) in itertools.product(enumerate(ROWS), enumerate(COLUMNS)):
        ax = axes[i, j]
        for number, rows in enumerate(curves):
            points = np.array([(row[x], row[key]) for row in rows if row.get(key) is not None], float).reshape(-1, 2)
            color, line = COLORS[number % len(COLORS)], ("-", "--", ":")[number // len(COLORS) % 3]
            marker = "o" if key == "eval_accuracy" else None
            if not marker:  # measured at every iteration: noisy
                ax.plot(*points.T, color=color, alpha=0.2, linewidth=0.8)
                half = max(1, len(points) // 20)
                points[:, 1] = [points[max(0, t - half) : t + half + 1, 1].mean() for t in range(len(points))]
            ax.plot(*points.T, line, color=color, linewidth=1.8, marker=marker, markersize=3.5, label=names[number])
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        ax.tick_params(length=0, labelsize=9, colors="#444444")
        ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    for ax, label in zip(axes[-1], COLUMNS.values()):
        ax.set(xlabel=label)
    for ax, label in zip(axes[:, 0], ROWS.values()):
        ax.set(ylabel=label, ylim=(None if ax is axes[0, 0] else 0, None))  # once all is drawn: a row shares its limits
    figure.align_ylabels()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="upper center", ncols=min(4, len(runs)), frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.97 - 0.02 * ((len(runs) - 1) // 4)))
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)


def first_line(error):
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def parse_args(parser, argv=None):
    """argparse with this project's manners: --data-dir is --data_dir, and a bad flag is a ValueError of one line."""
    def fail(message):
        raise ValueError(f"{message} (see --help)")
    parser.error = fail
    parts = [arg.partition("=") for arg in (sys.argv[1:] if argv is None else argv)]
    return parser.parse_args([("--" + flag[2:].replace("-", "_") if flag.startswith("--") else flag) + equals + value
                              for flag, equals, value in parts])


def command_line(main):
    """Run main() as a program: bad input, or a loss gone NaN, is one line on stderr and exit code 2; Ctrl-C is 130."""
    from transformers.utils import logging
    logging.disable_progress_bar()  # "Loading weights" between the bars that matter
    try:
        main()
    except (ValueError, FloatingPointError, KeyboardInterrupt) as error:
        bad_input = not isinstance(error, KeyboardInterrupt)
        print(f"{Path(sys.argv[0]).name}: {first_line(error) if bad_input else 'interrupted'}", file=sys.stderr)
        sys.exit(2 if bad_input else 130)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Evaluate a checkpoint, or plot training runs.", allow_abbrev=False)
    add = parser.add_argument
    add("--model", help="a model's folder, a run's folder, or a hub id")
    add("--plot", nargs="+", metavar="RUN", help="draw the training curves of these runs instead")
    add("--dataset", default="arithmetic", help="arithmetic, gsm8k, or a .jsonl file's or folder's path (arithmetic)")
    add("--data_dir", help="for gsm8k: a folder with train.jsonl and test.jsonl, instead of the hub")
    add("--split", default="test", help="train or test (test)")
    add("--limit", type=int, help="a random subset of that many questions (all)")
    add("--samples", type=int, default=1, help="samples a question, besides the greedy response (1: greedy only)")
    add("--temperature", type=float, help="of the samples (0.35, the papers')")
    add("--top_p", type=float, help="of the samples (0.9, the papers')")
    add("--max_new_tokens", type=int, default=256, help="the longest response, in tokens (256)")
    add("--last_number", action="store_true", help="where no answer is marked, take the last number of the response")
    add("--chat", default="auto", help="prompt through the chat template: on, off, or auto: if there is one (auto)")
    add("--engine", default="slots", help="slots, or hf: generate through model.generate (slots)")
    add("--device", default="auto", help="auto, cpu, cuda or mps (auto)")
    add("--dtype", default="auto", help="float32, bfloat16, float16, or auto: bfloat16 on CUDA (auto)")
    add("--seed", type=int, default=0, help="of the subset and of the samples (0)")
    add("--out", help="the JSON to write (eval_DATASET_SPLIT.json in the model's folder; for a hub id, here); "
                      "with --plot the PNG (curves.png in the first run's folder)")
    args = parse_args(parser, argv)
    if args.plot:
        out = Path(args.out or Path(args.plot[0], "curves.png"))
        if out.suffix != ".png":
            raise ValueError(f"--out {out} is not the name of a .png file")
        plot(args.plot, out)
        return print(f"wrote {out}")
    if not args.model:
        raise ValueError("nothing to do: give --model DIR to evaluate, or --plot RUN to draw")
    if args.samples < 1 or args.max_new_tokens < 1:
        raise ValueError(f"--samples {args.samples} and --max_new_tokens {args.max_new_tokens} must be at least 1")
    if args.samples == 1 and (args.temperature, args.top_p) != (None, None):
        raise ValueError("--temperature and --top_p are for several samples: give --samples too, or leave them out")
    args.temperature = 0.35 if args.temperature is None else args.temperature
    args.top_p = 0.9 if args.top_p is None else args.top_p
    questions = load_questions(args.dataset, args.split, data_dir=args.data_dir, limit=args.limit, seed=args.seed)
    measured = partial(evaluate, *load_model(args.model, device=args.device, dtype=args.dtype), questions,
                       max_new_tokens=args.max_new_tokens, chat=args.chat, seed=args.seed, progress=True,
                       engine=args.engine, last_number=args.last_number)
    greedy, sampled = measured(), None
    if args.samples > 1:
        sampled = measured(samples=args.samples, temperature=args.temperature, top_p=args.top_p)
    print(f"{args.model} on {args.dataset}, {args.split} split", table(greedy, sampled), sep="\n")
    print(f"greedy responses: {greedy['response_length']:.1f} tokens on average; {1 - greedy['finished']:.1%} ran into "
          f"--max_new_tokens {args.max_new_tokens}, which counts as wrong")
    folder = Path(args.model) if Path(args.model).is_dir() else Path()
    out = Path(args.out or folder / f"eval_{Path(args.dataset).stem}_{args.split}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(dict(settings=vars(args), greedy=greedy, sampled=sampled), indent=1) + "\n")
    print(f"wrote {out}")


if __name__ == "__main__":
    command_line(main)
