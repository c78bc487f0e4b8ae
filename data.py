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

import random
import zlib
from dataclasses import dataclass
from pathlib import Path

from plumbing.rows import SUFFIXES, is_hub_id, parse_rows, rows_of

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
        wanted = round(count * share / sum(levels.values()))
        goal = len(questions) + wanted
        tries = 0
        while len(questions) < goal and tries < 100 * count:
            chain = draw_chain(rng, level)
            if in_split("".join(map(str, chain)), split):
                questions.setdefault(chain, worked(chain))
            tries += 1
        if len(questions) < goal:
            what = f"{wanted} {split} questions of level {level}"
            raise ValueError(f"arithmetic has no {what}: ask for fewer")
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
    "math": ("nlile/hendrycks-MATH-benchmark", None, "train", "test", "math"),  # test: MATH-500
    "orz": ("Open-Reasoner-Zero/orz_math_57k_collection", None, ORZ_FILE, ORZ_FILE, "math"),
    "math500": ("HuggingFaceH4/MATH-500", None, None, "test", "math"),
    "college_math": ("di-zhang-fdu/College_Math_Test", None, None, "test", "math"),
    "olympiadbench": ("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", None, "train", "math"),
    "minerva_math": ("math-ai/minervamath", None, None, "test", "math"),
    "svamp": ("ChilleD/SVAMP", None, "train", "test", "number"),
    "asdiv": ("MU-NLPC/Calc-asdiv_a", None, None, "test", "number"),
}
# Of a data set in one piece every tenth question, by a hash, is for testing.
ONE_IN = 10


def load_questions(dataset, split, *, data_dir=None, limit=None, seed=0, fields=None, bits=None):
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
        parts = ["train", "test"] if split == "all" else [split]
        if name in DATASETS and DATASETS[name][2] is None:  # for evaluation only
            parts = ["test"]
        for part in parts:
            if name == "arithmetic":
                questions += arithmetic(POOL_SIZES[part], part, levels_of(part), split=part)
                continue
            if name == "parity":
                questions += parity(PARITY_SIZES[part], part, bits or BITS, part)
                continue
            known = DATASETS.get(name)
            rows, one_piece = rows_of(name, known, part, data_dir, alone=len(names) == 1)
            found = [
                Question(PLAIN_PROMPT.format(question=row["question"]), **row)
                for row in parse_rows(rows, known and known[-1], fields or {})
            ]
            if one_piece:
                questions += [q for q in found if in_split(q.question, split)]
                break  # `all` has them now
            questions += found
    if not questions:
        raise ValueError(f"{dataset} has no {split} questions")
    if limit is None:
        return questions
    if not 1 <= limit <= len(questions):
        there = f"the {split} split of {dataset} has {len(questions)}"
        raise ValueError(f"cannot take {limit} questions: {there}")
    return [questions[i] for i in sorted(random.Random(seed).sample(range(len(questions)), limit))]


def in_split(text, split):
    """Is this question of the split? crc32 decides: Python's own hash differs in each process."""
    return split == "all" or (zlib.crc32(text.encode()) % ONE_IN == 0) == (split == "test")


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
        where = "neither the tokenizer nor the model's generation_config has an EOS token"
        raise ValueError(
            f"no stop token: {where}; set tokenizer.eos_token and save the model again"
        )
    return sorted(ids)


# ==================================================================================================
# That is the method. Below: parity, tags, checks. How rows are read: rows.py.
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
        if in_split(text, split):
            texts.add(text)
    return [bit_question(text) for text in sorted(texts)]


def bit_question(text):
    """The question of a string of bits, with its long solution."""
    bare = f"Is the number of ones in {text} odd (1) or even (0)?"
    running = "".join(str(text[:end].count("1") % 2) for end in range(1, len(text) + 1))
    solution = f"{running}#### {running[-1]}"
    return Question(f"{text}\n", running[-1], solution, "number", len(text), bare)


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


# --------------------------------------------------------------------------- checks


def check_names(names, split, data_dir):
    if split not in ("train", "test", "all"):
        raise ValueError(f"unknown split {split!r}: give train, test or all")
    for name in names:
        known = name in MADE_HERE or name in DATASETS or is_hub_id(name)
        path = Path(name)
        if not known and not (path.exists() or path.suffix in SUFFIXES or len(path.parts) > 1):
            known = ", ".join([*MADE_HERE, *DATASETS])
            file = "a .jsonl, .json or .parquet file or of a folder with train and test files"
            way_out = f"give {known}, OWNER/NAME on the hub, or the path of {file}"
            raise ValueError(f"unknown data set {name!r}: {way_out}")
        if name in DATASETS and split == "train" and DATASETS[name][2] is None:
            raise ValueError(f"{name} has no questions to train on: it is for evaluation")
    if data_dir is not None and not any(name in DATASETS for name in names):
        named = f"is for data sets with a name ({', '.join(DATASETS)})"
        raise ValueError(f"--data-dir {data_dir} {named}: leave it out with {','.join(names)!r}")
