"""What a question is, where questions come from, and how text becomes tokens and back.

A QUESTION is a prompt and a gold answer. The response reasons in steps, a line for each, and then
commits to an answer behind ####, as in GSM8K. This question is made here; sums are modulo 97:

    prompt      37+26-12\\n
    response    37+26=63\\n63-12=51\\n#### 51

A DATA SET is made here (arithmetic, parity), or has a name (`DATASETS`: on the hub, or in local
files), or is the path of a file or folder. A row needs a question and an answer. It may have a
solution, which supervised fine-tuning learns from. Here, as in GSM8K, one field holds the two:

    {"question": "Tom has 3 apples and buys 4. How many now?", "answer": "3 + 4 = 7\\n#### 7"}
"""

import random
import zlib
from dataclasses import dataclass

from plumbing import files
from plumbing.commands import first_line
from plumbing.rows import parse_rows

# The prompt of the VinePPO and SFL papers
PLAIN_PROMPT = "[MATH_TASK] Problem:\n{question}\n\nSolution:"
CHAT_INSTRUCTION = "Reason step by step and end with the final answer in \\boxed{}."


@dataclass
class Question:
    prompt: str  # what a base model reads: the question in PLAIN_PROMPT, or as it is made here
    answer: str  # the gold final answer
    solution: str | None = None  # a right response, to be joined to the prompt with nothing between
    kind: str = "number"  # how its answer is graded: 'number' or 'math' (LaTeX)
    level: int | str | None = None  # difficulty, where the data set knows it
    question: str = ""  # the bare text: what a chat template wraps


ONE_IN = 10  # where we split a data set ourselves, one question in ten is for testing


def in_split(text, split):
    """Is this question of the split? A hash of its text decides, so train and test stay disjoint,
    whatever is drawn and in whatever order."""
    is_test = zlib.crc32(text.encode()) % ONE_IN == 0  # Python's own hash differs in each process
    return split == "all" or is_test == (split == "test")


# --------------------------------------------------------------------------- arithmetic, made here

MODULUS = 97  # a guess is right 1 time in 97
TERMS = ("+7", "+16", "+26", "+38", "+45", "-5", "-12", "-23", "-33", "-41")
# 97 numbers and 10 terms make 970 sums: so few that a tiny model learns all of them by heart.

# The training pool is what one scrapes together: most of it is always solved (one step), much of it
# never (longer than what the model was shown). Little lies between, and that alone is tested.
LEARNABLE_SHARE = 0.08
STEPS_WANTED = range(2, 9)  # the tiny base model solves some of them sometimes
STEPS_TOO_MANY = range(12, 15)  # and none of these
POOL_SIZES = {"train": 1280, "test": 280}


def levels_of(split):
    """{steps: share of the questions} of a split. `arithmetic` divides the shares by their sum."""
    levels = dict.fromkeys(STEPS_WANTED, LEARNABLE_SHARE / len(STEPS_WANTED))
    if split == "train":
        rest = 1 - LEARNABLE_SHARE  # of no use: 60 % too easy, 40 % too hard
        levels[1] = rest * 0.6
        levels |= dict.fromkeys(STEPS_TOO_MANY, rest * 0.4 / len(STEPS_TOO_MANY))
    return levels


def arithmetic(count, seed, levels, split="train"):
    """About `count` distinct chains of + and - modulo 97. levels: {steps: share}; 37+26-12 has two
    steps. ValueError: a level has fewer questions than asked for."""
    rng = random.Random(seed)
    questions = {}  # chain -> question; a chain that is drawn again replaces itself
    for level, share in levels.items():
        wanted = round(count * share / sum(levels.values()))
        goal = len(questions) + wanted  # so many with this level's
        # Many tries: a short chain is often drawn twice, and some are of the other split.
        for _ in range(100 * count):
            if len(questions) == goal:
                break
            chain = draw_chain(rng, level)
            if in_split("".join(map(str, chain)), split):
                questions[chain] = worked(chain)
        if len(questions) < goal:
            few = f"arithmetic has no {wanted} {split} questions of level {level}"
            raise ValueError(f"{few}: ask for fewer")
    questions = list(questions.values())
    rng.shuffle(questions)  # they were made level by level
    return questions


def draw_chain(rng, steps):
    """A chain of so many steps, (start, term, ...): (37, "+26", "-12") has two."""
    draw = rng.sample if steps <= len(TERMS) else rng.choices  # no term twice, while they last
    terms = draw(TERMS, k=steps)
    return (rng.randrange(MODULUS), *terms)


def worked(chain):
    """The question of a chain, with its right solution."""
    text = "".join(map(str, chain))
    answer = str(sum(map(int, chain)) % MODULUS)
    bare = f"Compute {text} modulo {MODULUS}."  # for a chat model
    # The prompt ends the line, so that the response's first line is a step.
    return Question(f"{text}\n", answer, solve(chain), level=len(chain) - 1, question=bare)


def solve(chain, hurry=None, rng=None):
    """A response to a chain. Without `hurry` each line takes one term, and all are right. hurry:
    {terms that a line takes: share of the lines}. A line that takes several adds only the last one:
    37+26-12=25, which is 37-12. The tiny base model is shown some of these, and so it errs."""
    value, terms = chain[0], list(chain[1:])
    lines = []
    while terms:
        count = rng.choices(list(hurry), hurry.values())[0] if hurry else 1
        line, terms = terms[:count], terms[count:]  # this line's, and what is left
        # The operands are restated: small models learn that faster.
        left = f"{value}{''.join(line)}"
        value = (value + int(line[-1])) % MODULUS
        lines.append(f"{left}={value}")
    return "\n".join([*lines, f"#### {value}"])


# --------------------------------------------------------------------------- parity, made here

BITS = 24  # the paper's headline has 50; the tiny model learns to work out 24 in half a minute
PARITY_SIZES = {"train": 4096, "test": 256}


def parity(count, seed, bits=BITS, split="train"):
    """About `count` distinct strings of bits. Is the number of ones odd? Said at once, the answer
    stays a guess, whatever a model has seen. With the running parities written down first, each
    step is easy (arXiv 2510.11495)."""
    rng = random.Random(seed)
    share = 1 / ONE_IN if split == "test" else 1 - 1 / ONE_IN  # of all strings
    # At most half of those there are: the last ones would take long to draw.
    count = min(count, int(2**bits * share / 2))
    texts = set()
    while len(texts) < count:
        text = f"{rng.getrandbits(bits):0{bits}b}"  # with bits=4, say 0110
        if in_split(text, split):
            texts.add(text)
    questions = []
    for text in sorted(texts):  # a set has another order in each process
        running = "".join(str(text[:end].count("1") % 2) for end in range(1, bits + 1))
        answer = running[-1]  # 0110: the running parities are 0100, the answer is 0
        bare = f"Is the number of ones in {text} odd (1) or even (0)?"
        solution = f"{running}#### {answer}"
        questions.append(Question(f"{text}\n", answer, solution, level=bits, question=bare))
    return questions


# --------------------------------------------------------------------------- data sets by name

ORZ_FILE = "orz_math_57k_collected.json"
# name: hub id, configuration, split (or file) to train on and to test on, how answers are graded
DATASETS = {
    "gsm8k": ("openai/gsm8k", "main", "train", "test", "number"),
    "math": ("nlile/hendrycks-MATH-benchmark", None, "train", "test", "math"),  # test: MATH-500
    "orz": ("Open-Reasoner-Zero/orz_math_57k_collection", None, ORZ_FILE, ORZ_FILE, "math"),
    "svamp": ("ChilleD/SVAMP", None, "train", "test", "number"),
    "mawps": ("MU-NLPC/Calc-mawps", None, "train", "test", "number"),
    # For evaluation only: no split to train on.
    "math500": ("HuggingFaceH4/MATH-500", None, None, "test", "math"),
    "college_math": ("di-zhang-fdu/College_Math_Test", None, None, "test", "math"),
    "olympiadbench": ("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", None, "train", "math"),
    "minerva_math": ("math-ai/minervamath", None, None, "test", "math"),
    "asdiv": ("MU-NLPC/Calc-asdiv_a", None, None, "test", "number"),
}
MADE_HERE = ("arithmetic", "parity")


def check_names(names, split, data_dir):
    """ValueError for what can be told before anything is read."""
    files.check_request(names, split, data_dir, MADE_HERE, DATASETS)


def load_questions(
    dataset, split, *, data_dir=None, limit=None, seed=0, fields=None, bits=BITS, notes=False
):
    """The questions of a data set: arithmetic, parity (of so many bits), one of DATASETS, a path,
    or OWNER/NAME on the hub; several, by commas. split: 'train', 'test' or 'all'.

    A named data set comes from the hub, or from data_dir: NAME/train and NAME/test, or train and
    test, or one file NAME. A path is a folder with train and test files (plumbing/files.py says
    which), or one file, which is split by a hash of the question. limit: a random subset of that
    many, drawn with `seed`, in the data set's order. fields: `question`, `answer`, `solution` ->
    what the rows call them; a.b is b inside a. notes: GSM8K's calculator notes alone, 16-3=13, are
    the solutions. ValueError, one line, for what is missing, malformed or out of reach."""
    names = dataset.split(",")
    check_names(names, split, data_dir)
    questions = []
    for name in names:
        known = DATASETS.get(name)
        parts = ["train", "test"] if split == "all" else [split]
        if name == "arithmetic":
            for part in parts:  # the part's name is the seed: all runs share the same questions
                questions += arithmetic(POOL_SIZES[part], part, levels_of(part), part)
        elif name == "parity":
            for part in parts:
                questions += parity(PARITY_SIZES[part], part, bits, part)
        else:
            alone = len(names) == 1
            rows, in_one_piece = files.rows_of(name, known, parts, data_dir, alone)
            kind = known[-1] if known else None  # None: by what the answers look like
            for row in parse_rows(rows, kind, fields or {}, notes):
                # A file in one piece has both splits: take those questions that are of this one.
                if not in_one_piece or in_split(row["question"], split):
                    prompt = PLAIN_PROMPT.format(question=row["question"])
                    questions.append(Question(prompt, **row))
    if not questions:
        raise ValueError(f"{dataset} has no {split} questions")
    if limit is None:
        return questions
    if not 1 <= limit <= len(questions):
        raise ValueError(f"cannot take {limit} questions: {dataset} has {len(questions)} ({split})")
    chosen = random.Random(seed).sample(range(len(questions)), limit)
    return [questions[i] for i in sorted(chosen)]  # in the data set's order


# --------------------------------------------------------------------------- prompts and tokens

# Prompt and response are tokenized apart and joined as ids, as in generation: there a response
# continues the prompt's tokens, and no token reaches from one into the other.


def encode_prompts(tokenizer, questions, *, chat="auto"):
    """The token ids that the policy reads, one list a question. chat: 'on' wraps the bare question
    in the tokenizer's chat template, 'off' takes the plain prompt, 'auto' wraps if there is a
    template (base models may have one: off). The template that `add_tags` made always wraps."""
    if chat not in ("auto", "on", "off"):
        raise ValueError(f"unknown chat {chat!r}: give auto, on or off")
    template = tokenizer.chat_template or ""
    if chat == "on" and not template:
        raise ValueError("--chat on, but the tokenizer has no chat template: give --chat off")
    is_plain = PLAIN_TEMPLATE in template  # `add_tags` made it: its tag is never left out
    prompts = []
    for q in questions:
        if template and (is_plain or chat != "off"):
            text = q.prompt if is_plain else f"{q.question or q.prompt}\n\n{CHAT_INSTRUCTION}"
            turns = [{"role": "user", "content": text}]
            try:
                text = tokenizer.apply_chat_template(
                    turns, add_generation_prompt=True, tokenize=False
                )
            except Exception as error:  # a template is a program, and raises what it likes
                fails = f"the chat template fails ({first_line(error)})"
                raise ValueError(f"{fails}: give --chat off") from error
            ids = tokenizer(text, add_special_tokens=False).input_ids  # the template wrote its BOS
        else:
            ids = tokenizer(q.prompt).input_ids  # with BOS, if this tokenizer adds it
            if ids[-1:] == [tokenizer.eos_token_id]:  # some add EOS: no response would follow it
                ids = ids[:-1]
        prompts.append(ids)
    return prompts


def encode_response(tokenizer, text):
    """The token ids of a text that continues a prompt, without special tokens."""
    # A SentencePiece tokenizer puts a word-start mark before its input. So the text is encoded
    # behind a newline, which is then cut off.
    start = tokenizer("\n", add_special_tokens=False).input_ids
    ids = tokenizer("\n" + text, add_special_tokens=False).input_ids
    if ids[: len(start)] == start:
        return ids[len(start) :]
    return tokenizer(text, add_special_tokens=False).input_ids  # newline and text became one token


def decode_response(tokenizer, rollout):
    """The text of a response, without its stop token and other special tokens."""
    ids = rollout.written()
    # No clean-up: it would make "a." of "a .", and grade what nobody wrote.
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def stop_ids(model, tokenizer):
    """The ids that end a response: the tokenizer's EOS, and those of the generation config."""
    # None, one id or a list: a chat model may end its turn with another token than EOS.
    ids = getattr(model.generation_config, "eos_token_id", None)
    ids = ids if isinstance(ids, (list, tuple)) else [ids]
    ids = {tokenizer.eos_token_id, *ids} - {None}
    if not ids:
        raise ValueError("no stop token: set tokenizer.eos_token and save the model again")
    return sorted(ids)


# --------------------------------------------------------------------------- tags

# Return-conditioned RL (arXiv 2403.04642): a response is learned behind a tag that says what it was
# worth, and at test time the model is asked for a good one.
TAGS = ("<bad>", "<good>")  # a reward, 0 or 1, is the index of its tag
# A chat template that is the plain prompt, for a model that learned to read a tag before it.
PLAIN_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def add_tags(model, tokenizer, chat="auto"):
    """Add the TAGS, two new tokens, to tokenizer and model, and let every prompt begin with the
    good one. The chat template writes it, so whoever loads the saved model asks for the good."""
    if TAGS[0] in tokenizer.get_vocab():
        return  # it has them
    tokenizer.add_tokens(list(TAGS), special_tokens=True)
    tags = tag_ids(tokenizer)
    # Many models have more embeddings than tokens: then these two take free ones.
    if len(tokenizer) > len(model.get_input_embeddings().weight):
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for table in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        # Start at the mean of all other tokens: a random vector may be far from all of them.
        table.data[tags] = table.data[: min(tags)].mean(0)  # (width,), into (2, width)
    # The tag comes first: at the prompt's end it would stand between question and response.
    if tokenizer.chat_template and chat != "off":
        tokenizer.chat_template = TAGS[1] + tokenizer.get_chat_template()
    else:
        adds_bos = tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
        bos = tokenizer.bos_token if adds_bos else ""
        tokenizer.chat_template = bos + TAGS[1] + PLAIN_TEMPLATE


def remember_chat(tokenizer, chat):
    """Call it before a trained model is saved: then chat='auto' prompts it as it was trained. One
    that was trained on plain prompts (chat='off') loses its chat template; whoever loads it, any
    other program too, sees that there is none."""
    if chat == "off" and PLAIN_TEMPLATE not in (tokenizer.chat_template or ""):
        tokenizer.chat_template = None


def with_tag(tokenizer, prompt, reward):
    """A prompt (ids with the good tag) with the tag of `reward` instead, or with none for None."""
    ids = tag_ids(tokenizer)
    tag = [] if reward is None else [ids[reward]]  # none: for a model that knows no tags
    at = prompt.index(ids[1])  # 0, or 1 behind a BOS
    return prompt[:at] + tag + prompt[at + 1 :]


def tag_ids(tokenizer):
    return tokenizer.convert_tokens_to_ids(list(TAGS))
