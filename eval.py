r"""When an answer is right, and how good a model is.

    python eval.py --model runs/sfl                              # greedy accuracy, by difficulty
    python eval.py --model HUB_ID_OR_DIR --dataset gsm8k --samples 16    # + mean, pass@k, maj@16
    python eval.py --plot runs/uniform runs/sfl --out curves.png         # a colour a run

THE REWARD is 1 for the right final answer and 0 for anything else: no partial credit, no learned
judge. It reads the last answer that a response commits to. It is the part of the system that the
policy is paid to fool, so it is strict where leniency could be farmed:

    question 37+26-12 (mod 97), gold answer 51
    37+26=63\n63-12=51\n#### 51     1
    #### 51 or 52                   0   however right one of them is
    \boxed{51}. The answer is odd.  1   a remark commits to nothing
    #### 63-12                      0   not worked out
    37+26=63\n63-12=5               0   cut off by the length limit

Whatever text comes in, it is never executed and cannot hang the run.

THREE MEASURES, for c right among n samples of a question, averaged over questions, each with its
standard error:

    accuracy        c / n                         how often one sample is right
    pass@k          1 - C(n - c, k) / C(n, k)     is one of k samples right? Unbiased (Chen et al.
                                                  2021, arXiv 2107.03374, eq. 1)
    maj@n           is the most frequent answer right? (Wang et al. 2022, arXiv 2203.11171)
"""

import json
import re
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from math import comb, inf, sqrt
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import data
from data import decode_response
from plumbing import attention, checkpoint, commands, memory, report
from plumbing.answers import ANSWER_CHARS, Judges, braced, parse_number, same_math, vote
from plumbing.processes import all_sum, share
from rollout import Engine, StopText, generate

# --------------------------------------------------------------------------- when is it right?

# What announces an answer. Of several the LAST is the commitment, as in VinePPO and verl for ####
# and in Minerva for \boxed: a model that corrects itself means its last word, and a list of guesses
# counts as one guess. On GSM8K this is the strict match of lm-evaluation-harness but for two
# things: the harness takes the first ####, and tells 18.0 from 18.
MARKER = re.compile(
    r"(?:####|\\(?:boxed|fbox)(?![A-Za-z])\s{0,3}(?P<brace>\{)?|(?P<tag><answer>)"
    r"|\banswer\s{0,3}(?:is\b(?!\s{0,3}not\b)|[:=])\s{0,3}:?)\s{0,9}",
    re.I,
)
SENTENCE_END = re.compile(r"(?<!\\)[.!?](?=[\s*`]|$)|\n")  # not the \! of 1,\! 234
# \[ 7 \] on lines of its own; inline, so that "\[7\] or \[8\]" stays two guesses
DISPLAY = re.compile(r"[\s*:]*(?:\\\[|\$\$)\s*(.*?)\s*(?:\\\]|\$\$)", re.DOTALL)
# " -- as required", an emoji: said of the answer. With a digit or an "or" it is one guess more.
ASIDE = re.compile(
    r"\s+(?:[—–]|--)\s(?!.*\bor\b)[A-Za-z ,']*$|[\s\u25a0-\u27bf\U0001f000-\U0001faff]+$"
)
WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")  # no \command
MARKERS_READ = 20  # with these bounds the time is linear in the length of the response


def final_answer(response, kind="number", last_number=False):
    """The text of the answer that a response commits to last, or None. last_number: where no marker
    commits, take the last number; lenient, for other formats."""
    remark = None
    for marker in reversed(deque(MARKER.finditer(response), maxlen=MARKERS_READ)):
        # bounded, so that a million characters behind a marker cost nothing
        window = response[marker.end() : marker.end() + ANSWER_CHARS]
        if marker["brace"]:  # \boxed{7}; one that is left open or empty gives ""
            text = braced(window)
        elif marker[0].startswith("\\"):  # \boxed 7
            text = re.match(r"-?(?:[\w.,/]*\w)?", window)[0]
        elif marker["tag"]:  # <answer>7</answer>
            text = window.split("</", 1)[0]
        else:  # the rest of the sentence
            window = DISPLAY.sub(r" $\1$", window)
            text = SENTENCE_END.split(window, maxsplit=1)[0]
        # An answer that fills the window may go on: 18 of 1800 must not be read as 18.
        if len(text) >= ANSWER_CHARS - 1:
            continue
        text = ASIDE.sub("", text).strip()
        # Nothing there, or a heading where a number is due: the marker before may say more.
        if not re.search("[0-9０-９]" if kind == "number" else r"\S", text):
            continue
        # "The answer is in lowest terms": words without any mathematics, or more words than an
        # answer has, count only where no marker before says more.
        has_math = re.search(r"[0-9\\$(]|\b[A-Za-z]\b", text)
        says_math = has_math and len(WORD.findall(text)) <= 2
        if kind == "number" or marker["brace"] or says_math:
            return text
        remark = remark or text
    if remark or not last_number:
        return remark
    # no regular expression over the whole response: it could take quadratic time
    end = 1 + max(response.rfind(digit) for digit in "0123456789")
    tail = response[max(0, end - 60) : end]  # a longer number is refused
    number = re.search(r"(?:(?<![\w)])-)?[0-9.,]*[0-9](?:\s?/\s?[0-9.,]*[0-9])?$", tail)
    # one that fills the tail may have begun before it
    if number is None or (number.start() == 0 and end > 60):
        return None
    return number[0]


def grade(response, question, *, last_number=False, judges=None):
    """1.0 if the response's final answer equals the question's, else 0.0. No response makes it
    raise or hang. ValueError: a question that cannot be graded. judges: the `answers.Judges` that
    compare LaTeX."""
    if question.kind not in ("number", "math"):
        raise ValueError(f"cannot grade kind {question.kind!r}: give 'number' or 'math'")
    gold = question.answer
    # else an answer that cannot be read would equal a gold answer that cannot: None == None
    if question.kind == "number" and parse_number(gold) is None:
        raise ValueError(f"the gold answer {gold[:40]!r} is not a number: give kind='math'")
    answer = final_answer(response, question.kind, last_number)
    if answer is None:
        return 0.0
    # LaTeX: equal in value, and worked out as far as the gold answer
    if question.kind == "math":
        return float(same_math(gold, answer, question.question, judges))
    # exact: fractions, no tolerance that a guess could use
    return float(parse_number(answer) == parse_number(gold))


def rewards(tokenizer, questions, rollouts, *, last_number=False, judges=None):
    """One list of n `Rollout`s a question -> (questions, n) float32: 1 for a finished, right
    response, else 0. Several processes share the work."""
    width = max(map(len, rollouts), default=0)
    graded = np.zeros((len(questions), width), np.float32)  # (questions, n)
    places = []  # of what is finished; what is cut off is wrong, whatever it says
    for i, group in enumerate(rollouts):
        for j, rollout in enumerate(group):
            if rollout.finished:
                places.append((i, j))
    places = share(places)
    asked = [questions[i] for i, _ in places]
    texts = [decode_response(tokenizer, rollouts[i][j]) for i, j in places]
    grade_one = partial(grade, last_number=last_number, judges=judges)
    # LaTeX waits for other processes, so in threads. Numbers are Python's work: threads would only
    # take turns.
    if any(question.kind == "math" for question in questions):
        with ThreadPoolExecutor(judges.count if judges else None) as pool:
            marks = list(pool.map(grade_one, texts, asked))
    else:
        marks = map(grade_one, texts, asked)
    for place, mark in zip(places, marks):
        graded[place] = mark
    all_sum(torch.from_numpy(graded))  # in place: each process graded its share, the rest is 0
    return graded


# --------------------------------------------------------------------------- how good is it?


def pass_at_k(right, n, k):
    """P(one of k samples is right) from `right` of n: 1 - C(n - c, k) / C(n, k) (Chen et al. 2021,
    eq. 1), in whole numbers of any size. The plug-in 1 - (1 - c/n)^k is biased low."""
    return 1 - comb(n - right, k) / comb(n, k)


def majority(answers, graded):
    """Is the most frequent answer right? answers: one a response, None where it gave none, which is
    no vote; graded: their rewards. A tie counts as the expectation of a random choice among the
    tied, so that the measure draws no numbers."""
    votes = Counter(answer for answer in answers if answer is not None)
    most = max(votes.values(), default=0)
    tied = [answer for answer in votes if votes[answer] == most]
    # Equal answers have equal rewards, so the first response that gave it speaks for each.
    right = [graded[answers.index(answer)] for answer in tied]
    return sum(right) / max(1, len(tied))


def mean_and_se(values):
    """(mean, its standard error over questions: std / sqrt(n))."""
    values = np.asarray(values, np.float64)
    error = None  # of which one question says nothing
    if len(values) > 1:
        std = values.std(ddof=1)
        error = float(std / sqrt(len(values)))
    return float(values.mean()), error


def evaluate(
    model, tokenizer, questions, *, samples=1, temperature=0.0, chat="auto", last_number=False,
    judges=None, engine=None, **generation,
):  # fmt: skip
    """Sample `samples` responses a question (by default one, greedy) and measure them. engine: a
    `rollout.Engine` to sample with (None: one is made for this call); generation: what else its
    `generate` takes. Returns a dict:

    n (questions), samples, accuracy and accuracy_se (the error is clustered by question),
    accuracy_lenient (if a number may stand unmarked, as the last one), by_level {level: {n,
    accuracy, se}}, response_length (mean, tokens), finished (share), fingerprint (of the
    questions), success (each question's share of right samples), responses (a dict each); with
    several samples also pass@1, pass@2, pass@4 ... and maj@samples, each with its _se. ValueError:
    no questions, several greedy samples, which are all alike, or what `generate` refuses."""
    if not questions:
        raise ValueError("no questions to evaluate on")
    if samples < 1 or (samples > 1 and temperature == 0):
        given = f"samples={samples} at temperature={temperature}"
        raise ValueError(f"{given}: need 1 or more, and for more a temperature")
    sample = engine.generate if engine else partial(generate, model)
    generation = {"stop_ids": data.stop_ids(model, tokenizer), "seed": 0, **generation}
    prompts = data.encode_prompts(tokenizer, questions, chat=chat)  # token ids
    # (questions, samples) Rollouts. The seed is fixed: the same model measures the same twice.
    groups = sample(prompts, n=samples, temperature=temperature, **generation)
    grading = {"last_number": last_number, "judges": judges}
    graded = rewards(tokenizer, questions, groups, **grading)  # (questions, samples), 0 or 1
    success = graded.mean(1)  # (questions,)

    # A model that is right but does not say so where the grader looks has to learn the format, not
    # the subject. Not asked of LaTeX, which is slow to compare.
    lenient = success
    if not last_number and all(question.kind == "number" for question in questions):
        lenient = rewards(tokenizer, questions, groups, last_number=True).mean(1)

    responses = []  # a dict each, question after question
    majorities = []  # (questions,)
    for question, group, grades in zip(questions, groups, graded.tolist()):
        votes = []
        for rollout, reward in zip(group, grades):
            text = decode_response(tokenizer, rollout)
            answer = None
            if rollout.finished:
                answer = final_answer(text, question.kind, last_number)
            votes.append(vote(answer))  # 18 and 18.0 are the same vote
            responses.append(
                {
                    "question": question.question or question.prompt,
                    "answer": question.answer,
                    "response": text,
                    "finished": rollout.finished,
                    "reward": reward,
                    "tokens": len(rollout.response),  # the stop token counts
                }
            )
        majorities.append(majority(votes, grades))

    measures = {"accuracy": success, "accuracy_lenient": lenient}  # (questions,) each
    if samples > 1:
        right = graded.sum(1).astype(int)  # (questions,) c of n
        k = 1
        while k <= samples:  # 1, 2, 4 ...
            measures[f"pass@{k}"] = [pass_at_k(int(c), samples, k) for c in right]
            k *= 2
        measures[f"maj@{samples}"] = majorities
    result = {"n": len(questions), "samples": samples, "by_level": {}}
    for name, values in measures.items():
        mean, error = mean_and_se(values)
        result[name] = mean
        result[name + "_se"] = error
    levels = {question.level for question in questions} - {None}
    # Numbers come before texts: the two cannot be compared.
    for level in sorted(levels, key=lambda level: (isinstance(level, str), level)):
        has_level = [question.level == level for question in questions]  # (questions,)
        of_level = success[has_level]
        mean, error = mean_and_se(of_level)
        row = {"n": len(of_level), "accuracy": mean, "se": error}
        result["by_level"][level] = row
    lengths = [row["tokens"] for row in responses]
    result["response_length"] = float(np.mean(lengths))
    finished = [row["finished"] for row in responses]
    result["finished"] = float(np.mean(finished))
    result["fingerprint"] = report.fingerprint(questions)
    return {**result, "success": success.tolist(), "responses": responses}


# --------------------------------------------------------------------------- the command line


@dataclass
class Settings:
    """Evaluate a model, or draw training runs. A * says: for a run's folder the default is what the
    run used."""

    model: str | None = None  # a model's folder, a run's folder, or a hub id
    plot: list[str] = field(default_factory=list)  # draw these training runs instead
    dataset: str | None = None  # data sets by commas, or a file's or folder's path; arithmetic *
    bits: int = 24  # parity: bits of a question *
    data_dir: str | None = None  # a folder with the named data sets' files, not the hub *
    question_field: str | None = None  # the rows' name for the question; usual ones are found *
    answer_field: str | None = None  # and for the answer *
    split: Literal["train", "test", "all"] | None = None  # test; all: of a file in one piece
    limit: int = 0  # a random subset of that many questions of each; 0: all
    samples: int = 1  # responses sampled to each question, besides the greedy one; 1: that alone
    temperature: float = 0.35  # of the samples
    top_p: float = 0.9  # nucleus of the samples
    max_new_tokens: int = 256  # the longest response, in tokens *
    stop: str | None = None  # a text that ends a response; \n is a newline *
    last_number: bool = False  # a response with no marked answer is graded by its last number *
    skip_long: bool = False  # leave out questions that do not fit the model's context *
    chat: Literal["auto", "on", "off"] = "auto"  # through the chat template; auto: if any *
    judges: int = 0  # processes that compare LaTeX; 0: one a core
    device: str = "auto"  # auto, cpu, cuda or mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: bfloat16 if fast
    seed: int = 0  # of the subset and of the samples
    against: str | None = None  # an evaluated run's folder, or its JSON: is this one better?
    save_samples: str | None = None  # a file for every response and its grade, a JSON a line
    out: str | None = None  # JSON, or PNG of --plot; by default in the (first) run's folder


# What a run's config.json says of how to prompt, sample and grade; the second line, of its files.
OF_THE_RUN = ("dataset", "bits", "max_new_tokens", "stop", "last_number", "skip_long", "chat")
OF_ITS_DATA = ("data_dir", "question_field", "answer_field")


def usual(seen):
    """Defaults of the flags that were not given: a run's folder is evaluated as it was trained."""
    defaults = {"dataset": "arithmetic", "split": "test"}
    run = Path(seen.model or "")
    its_own = False  # is this the data that the run was trained on?
    # A model's own folder has a config.json too; only a run's has both.
    if (run / "model" / "config.json").exists() and (run / "config.json").exists():
        try:
            used = dict(json.loads((run / "config.json").read_text()))
        except (ValueError, TypeError) as error:
            unread = f"--model {run}: no settings in its config.json ({commands.first_line(error)})"
            raise ValueError(f"{unread}: give {run / 'model'} instead") from error
        its_own = seen.dataset in (None, used.get("dataset"))
        names = OF_THE_RUN + OF_ITS_DATA if its_own else OF_THE_RUN
        for name in names:
            if name in used:
                defaults[name] = used[name]
    # A run splits a file in two, by a hash. A file that it has not seen is taken whole.
    if not its_own and Path(seen.dataset or "").is_file():
        defaults["split"] = "all"
    return defaults


def stops(model, tokenizer, text=None):
    """What ends a response: the model's stop tokens, and `text`, in which \\n is a newline."""
    ids = data.stop_ids(model, tokenizer)
    if not text:
        return ids
    text = text.replace("\\n", "\n")
    return StopText(ids, text, tokenizer.decode)


def main(argv=None):
    seen = commands.parse(Settings, argv)
    config = commands.parse(Settings, argv, usual(seen))
    if config.plot:
        out = Path(config.out or Path(config.plot[0], "curves.png"))
        commands.require(out.suffix == ".png", f"--out {out} is not the name of a .png file")
        report.plot(config.plot, out)
        return print(f"wrote {out}")
    commands.require(config.model, "give --model DIR to evaluate, or --plot RUN to draw")
    commands.check_limits(
        config,
        bits=(5, 60),
        samples=(1, inf),
        max_new_tokens=(1, inf),
        limit=(0, inf),
        judges=(0, inf),
        seed=(0, inf),
        temperature=(0, inf),
        top_p=(0, 1),
    )
    measures = {"greedy": {}}  # name: what `evaluate` is told besides
    sampling = {"temperature": config.temperature, "top_p": config.top_p}
    if config.samples > 1:
        measures[f"mean of {config.samples}"] = {"samples": config.samples, **sampling}
    elif any(value != getattr(Settings, name) for name, value in sampling.items()):
        raise ValueError("--temperature and --top_p are for several samples: give --samples too")

    # --- Whatever may go wrong does so before anything is sampled: files first, then the data, the
    # model, the length of the prompts, and the questions of an earlier evaluation.
    names = config.dataset.split(",")
    data.check_names(names, config.split, config.data_dir)
    file = f"eval_{'+'.join(Path(name).stem for name in names)}_{config.split}.json"
    # Beside the model, so that --against can name a run; a hub id has no folder.
    folder = Path(config.model) if Path(config.model).is_dir() else Path()
    out = Path(config.out or folder / file)
    checkpoint.check_writable("out", out)
    if config.out and out.exists():  # only an evaluation may be written over
        is_ours = '"results"' in out.read_text(errors="replace")
        commands.require(is_ours, f"--out {out} is there, and no evaluation: give another name")
    if config.save_samples:
        samples_file = Path(config.save_samples)
        checkpoint.check_writable("save_samples", samples_file)
        used = f"--save_samples {samples_file}: it is there already, or --out: give another name"
        commands.require(not samples_file.exists() and samples_file != out, used)
    earlier = {}
    if config.against:
        earlier = report.earlier_results(config.against, file)
    source = {"split": config.split, "seed": config.seed, "bits": config.bits}
    source["limit"] = config.limit or None
    source["fields"] = {"question": config.question_field, "answer": config.answer_field}
    questions = {}
    for name in names:
        # A path, and what is made here, need no folder of named data sets and would refuse it.
        own = name in data.MADE_HERE or Path(name).exists()
        place = None if own else config.data_dir
        questions[name] = data.load_questions(name, data_dir=place, **source)
    where = {"device": config.device, "dtype": config.dtype}
    model, tokenizer = checkpoint.load_model(config.model, **where)
    context = attention.longest_context(model.config.get_text_config()) or inf  # in tokens
    for name in names:
        # A prompt that is too long would otherwise end the last data set after hours of the others.
        prompts = data.encode_prompts(tokenizer, questions[name], chat=config.chat)
        fitting = memory.fitting(prompts, context, config, name)  # indices
        questions[name] = [questions[name][i] for i in fitting]
        if config.against:
            report.check_earlier(earlier, name, measures, questions[name])

    # --- Sample, grade, print. All is written after each data set: the next one may fail.
    shared = ("seed", "max_new_tokens", "chat", "last_number")
    shared = {name: getattr(config, name) for name in shared}
    shared["stop_ids"] = stops(model, tokenizer, config.stop)
    shared |= {"judges": Judges(config.judges), "progress": True}
    shared["engine"] = Engine(model)  # one for all: it checks the model and fills its cache once
    evaluations = {}  # data set: measure: what `evaluate` returned, but for the responses
    samples = []  # these, a JSON line each
    for name in names:
        results = evaluations[name] = {}
        for measure, how in measures.items():
            result = evaluate(model, tokenizer, questions[name], **shared, **how)
            for row in result.pop("responses"):
                row = {"dataset": name, "measure": measure, **row}
                samples.append(json.dumps(row) + "\n")
            results[measure] = result
        content = {"settings": vars(config), "results": evaluations}
        checkpoint.write(out, json.dumps(content, indent=1) + "\n")
        if config.save_samples:
            checkpoint.write(Path(config.save_samples), "".join(samples))

        print(f"{config.model} on {name}, {config.split} split", report.table(results), sep="\n")
        cut_off = f"{1 - results['greedy']['finished']:.1%} of the greedy responses ran into"
        print(f"{cut_off} --max_new_tokens {config.max_new_tokens}, which counts as wrong")
        for measure in measures if config.against else ():
            print(f"{measure} {report.comparison(results[measure], earlier[name][measure])}")
    print(f"wrote {out}")


if __name__ == "__main__":
    commands.command_line(main)
