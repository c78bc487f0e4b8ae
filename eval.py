"""When an answer is right, and how good a model is.

    python eval.py --model runs/sfl                              # greedy accuracy, by difficulty
    python eval.py --model HUB_ID_OR_DIR --dataset gsm8k --samples 16    # + mean, pass@k, maj@16
    python eval.py --plot runs/uniform runs/sfl --out curves.png         # a colour a run

THE REWARD is 1 for the right final answer and 0 for anything else: no partial credit, no learned
judge. It reads the last answer that a response commits to. It is the part of the system that the
policy is paid to fool, so it is strict where leniency could be farmed:

    question 37+26-12 (mod 97), gold answer 51
    37+26=63\\n63-12=51\\n#### 51     1
    #### 51 or 52                   0   however right one of them is
    #### 63-12                      0   the question, said again
    37+26=63\\n63-12=5               0   cut off by the length limit

Whatever text comes in, it is never executed and cannot hang the run.

THREE MEASURES, for c right among n samples of a question, averaged over questions, each with its
standard error:

    mean accuracy   c / n                         how often one sample is right
    pass@k          1 - C(n - c, k) / C(n, k)     is one of k samples right? Unbiased (Chen et al.
                                                  2021, arXiv 2107.03374, eq. 1)
    maj@n           is the most frequent answer right? (Wang et al. 2022, arXiv 2203.11171)
"""

import json
import math
import re
import zlib
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import data
from data import decode_response
from plumbing import checkpoint, commands
from plumbing.answers import ANSWER_CHARS, braced, judges, parse_number, same_math, set_judges, vote
from plumbing.processes import all_sum, share
from plumbing.report import earlier_results, plot, table
from rollout import StopText, generate

# --------------------------------------------------------------------------- when is it right?

# What announces an answer. Of several the LAST is the commitment, as in VinePPO and verl for ####
# and in Minerva for \boxed: a model that corrects itself means its last word, and a list of guesses
# counts as one guess. On GSM8K this is the strict match of lm-evaluation-harness but for two
# things: the harness takes the first ####, and tells 18.0 from 18.
MARKER = re.compile(
    r"(?:####|\\(?:boxed|fbox)\s{0,3}\{|\banswer\s{0,3}(?:is\b(?!\s{0,3}not\b)|[:=])\s{0,3}:?)"
    r"\s{0,9}",
    re.I,
)
SENTENCE_END = re.compile(r"(?<!\\)[.!?](?=\s|$)|\n")  # not the \! of 1,\! 234
MARKERS_READ = 20  # with these bounds the time is linear in the length of the response


def final_answer(response, kind="number", last_number=False):
    """The text of the answer that a response commits to last, or None. A marker with no number
    behind it (for 'math': nothing) commits to nothing. last_number: where no marker does, take the
    last number; lenient, for other formats."""
    for marker in reversed(deque(MARKER.finditer(response), maxlen=MARKERS_READ)):
        window = response[marker.end() : marker.end() + ANSWER_CHARS]
        text = braced(window) if "{" in marker[0] else SENTENCE_END.split(window, maxsplit=1)[0]
        cut = len(text) >= ANSWER_CHARS - 1  # 18 of 1800 must not be read as 18
        if not cut and text.strip() and (kind == "math" or re.search("[0-9]", text)):
            return text.strip()
    if not last_number:
        return None
    end = 1 + max(response.rfind(digit) for digit in "0123456789")
    tail = response[max(0, end - 60) : end]
    number = re.search(r"(?:(?<![\w)])-)?[0-9.,]*[0-9](?:\s?/\s?[0-9.,]*[0-9])?$", tail)
    return number[0] if number and (number.start() > 0 or end <= 60) else None


def grade(response, question, *, last_number=False):
    """1.0 if the response's final answer equals the question's, else 0.0. No response makes it
    raise or hang. ValueError: a question that cannot be graded. last_number: see `final_answer`."""
    if question.kind not in ("number", "math"):
        raise ValueError(f"cannot grade kind {question.kind!r}: give 'number' or 'math'")
    answer, gold = final_answer(response, question.kind, last_number), question.answer
    if question.kind == "math":
        return float(answer is not None and same_math(gold, answer, question.question))
    if parse_number(gold) is None:
        raise ValueError(f"the gold answer {gold[:40]!r} is not a number: give kind='math'")
    return float(answer is not None and parse_number(answer) == parse_number(gold))


# --------------------------------------------------------------------------- how good is it?


def rewards(tokenizer, questions, rollouts, *, last_number=False):
    """One list of n `Rollout`s a question -> (questions, n) float32: 1 for a finished, right
    response, else 0. Graded in threads, as many as there are judges; several processes share."""
    graded = np.zeros((len(questions), max(map(len, rollouts), default=0)), np.float32)
    finished = []
    for i, (question, group) in enumerate(zip(questions, rollouts, strict=True)):
        for j, rollout in enumerate(group):
            if rollout.finished:
                finished.append((i, j, decode_response(tokenizer, rollout), question))

    def grade_one(entry):
        i, j, text, question = entry
        graded[i, j] = grade(text, question, last_number=last_number)

    if any(question.kind == "math" for question in questions):
        with ThreadPoolExecutor(judges.qsize()) as pool:
            list(pool.map(grade_one, share(finished)))
    else:
        for entry in share(finished):
            grade_one(entry)
    all_sum(torch.from_numpy(graded))  # in place
    return graded


def pass_at_k(right, n, k):
    """P(one of k samples is right) from `right` of n: 1 - C(n - c, k) / C(n, k) (Chen et al. 2021,
    eq. 1), in whole numbers of any size. The plug-in 1 - (1 - c/n)^k is biased low."""
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def majority(answers, graded):
    """Is the most frequent answer right? answers: hashable, None where a response gave none, which
    is no vote; graded: their rewards. A tie counts as the expectation of a random choice among the
    tied: the measure draws no numbers."""
    votes = Counter(answer for answer in answers if answer is not None)
    tied = [answer for answer, count in votes.items() if count == max(votes.values())]
    return sum(graded[answers.index(answer)] for answer in tied) / len(tied) if tied else 0.0


def evaluate(
    model, tokenizer, questions, *, samples=1, temperature=0.0, chat="auto", last_number=False,
    **generation,
):  # fmt: skip
    """Sample `samples` responses a question (by default one, greedy) and measure them. generation:
    what else `rollout.generate` takes. Returns a dict:

    n (questions), samples, accuracy and accuracy_se (each question's share of right samples,
    averaged: the error is clustered by question), by_level {level: {n, accuracy, se}},
    response_length (mean, tokens), finished (share), success (each question's share of right
    samples), fingerprint (of the questions), responses (a dict each); with several samples also
    mean_accuracy (= accuracy), pass@1, pass@2, pass@4 ... and maj@samples, each with its _se.
    ValueError: no questions, several greedy samples (all alike), what `generate` refuses."""
    check_evaluate(questions, samples, temperature)
    generation = {"stop_ids": data.stop_ids(model, tokenizer), "seed": 0, **generation}
    prompts = data.encode_prompts(tokenizer, questions, chat=chat)
    groups = generate(model, prompts, n=samples, temperature=temperature, **generation)
    graded = rewards(tokenizer, questions, groups, last_number=last_number)  # (questions, samples)
    success = graded.mean(1)
    responses = []
    majorities = []
    for i, (question, group) in enumerate(zip(questions, groups)):
        texts = [decode_response(tokenizer, rollout) for rollout in group]
        votes = [
            vote(final_answer(text, question.kind, last_number)) if rollout.finished else None
            for text, rollout in zip(texts, group)
        ]
        majorities.append(majority(votes, graded[i].tolist()))
        for text, rollout, reward in zip(texts, group, graded[i].tolist()):
            row = {"question": question.question or question.prompt, "answer": question.answer}
            row |= {"response": text, "finished": rollout.finished, "reward": reward}
            responses.append({**row, "tokens": len(rollout.response)})

    measures = {"accuracy": success}
    if samples > 1:
        measures["mean_accuracy"] = success
        for k in (2**i for i in range(samples.bit_length())):
            measures[f"pass@{k}"] = [pass_at_k(int(c), samples, k) for c in graded.sum(1)]
        measures[f"maj@{samples}"] = majorities
    result = {"n": len(questions), "samples": samples}
    for name, values in measures.items():
        result[name], result[name + "_se"] = mean_and_se(values)
    levels = {question.level for question in questions} - {None}
    result["by_level"] = {}
    for level in sorted(levels, key=lambda level: (isinstance(level, str), level)):
        of_level = success[[q.level == level for q in questions]]
        mean, se = mean_and_se(of_level)
        result["by_level"][level] = {"n": len(of_level), "accuracy": mean, "se": se}
    result["response_length"] = float(np.mean([row["tokens"] for row in responses]))
    result["finished"] = float(np.mean([row["finished"] for row in responses]))
    result["fingerprint"] = zlib.crc32("".join(q.prompt + q.answer for q in questions).encode())
    return {**result, "success": success.tolist(), "responses": responses}


def compare(first, second, draws=10_000):
    """Is `first` better than `second` on the same questions? Both: what `evaluate` returned.
    Returns (mean difference, its 95 % interval, p). The interval is a paired bootstrap over
    questions; p is the share of random flips of the differences' signs whose mean is as far from 0
    (for one response a question that is McNemar's test). ValueError: other questions."""
    if first["fingerprint"] != second["fingerprint"]:
        raise ValueError("--against: those were other questions: same --dataset, --split, --limit")
    rng = np.random.default_rng(0)
    difference = np.array(first["success"]) - np.array(second["success"])
    size = len(difference)
    means = np.array([difference[rng.integers(0, size, size)].mean() for _ in range(draws)])
    flips = np.array([difference @ rng.choice((-1, 1), size) / size for _ in range(draws)])
    extreme = (np.abs(flips) >= abs(difference.mean()) - 1e-12).sum()
    return float(difference.mean()), np.quantile(means, (0.025, 0.975)), (extreme + 1) / (draws + 1)


# ==================================================================================================
# That is the method. Below: the command line. When two answers are equal: answers.py; tables and
# the picture of a run: report.py.
# ==================================================================================================


def stops(model, tokenizer, text=None):
    """What ends a response: the model's stop tokens, and `text`, in which \\n is a newline."""
    ids = data.stop_ids(model, tokenizer)
    if not text:
        return ids
    return StopText(ids, text.replace("\\n", "\n"), tokenizer.decode)


def mean_and_se(values):
    """(mean, its standard error over questions: std / sqrt(n)). One question tells nothing of the
    error: None."""
    values = np.asarray(values, np.float64)
    if len(values) < 2:
        return float(values.mean()), None
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))


def check_evaluate(questions, samples, temperature):
    if not questions:
        raise ValueError("no questions to evaluate on")
    if samples < 1 or (samples > 1 and temperature == 0):
        given = f"samples={samples} at temperature={temperature}"
        raise ValueError(f"{given}: need 1 or more, and for more a temperature")


# --------------------------------------------------------------------------- the command line


# See commands.read_settings. A * means: of a run's folder, what the run used.
SETTINGS = """
model            -              -     a model's folder, a run's folder, or a hub id
plot             -              +     draw these training runs instead
dataset          arithmetic     -     data sets' names, by commas, or a file's or folder's path *
bits             24             5..60 parity: bits of a question *
data_dir         -              -     a folder with the named data sets' files, not the hub *
question_field   -              -     the rows' name for the question; usual ones are found *
answer_field     -              -     and for the answer *
split            test           train|test|all  all: the default of a file in one piece
limit            0              0..   a random subset of that many questions of each; 0: all
protocol         greedy         greedy|vineppo  vineppo: 16 samples at temperature 0.35, top-p 0.9
samples          1              1..   samples a question, besides the greedy one
temperature      0.35           0..   of the samples
top_p            0.9            0..1  nucleus of the samples
max_new_tokens   256            1..   the longest response, in tokens *
stop             -              -     a text that ends a response; \\n is a newline *
last_number      off            -     a response with no marked answer: its last number *
chat             auto           auto|on|off  prompt through the chat template; auto: if any *
engine           slots          slots|hf  hf: generate through model.generate
judges           0              0..   processes that compare LaTeX; 0: one a core
device           auto           -     auto, cpu, cuda or mps
dtype            auto           auto|float32|bfloat16|float16  auto: bfloat16 on CUDA
seed             0              0..   of the subset and of the samples
against          -              -     an evaluated run's folder, or its JSON: is this one better?
save_samples     -              -     a file for every response and its grade, a JSON a line
out              -              -     JSON, or PNG of --plot; default: in the (first) run's folder
"""
OF_THE_RUN = ("dataset", "data_dir", "question_field", "answer_field", "max_new_tokens", "stop")
OF_THE_RUN += ("last_number", "chat", "bits")


def settings_for(flags):
    """All settings; where a run's folder is given, it is evaluated as it was trained."""
    settings = {name: row[0] for name, row in commands.read_settings(SETTINGS).items()}
    if flags.get("protocol") == "vineppo":
        settings["samples"] = 16
    run = Path(flags["model"])
    trained_on = None
    if (run / "model" / "config.json").exists() and (run / "config.json").exists():
        used = json.loads((run / "config.json").read_text())
        trained_on = used["dataset"]
        if flags.get("dataset", trained_on) != trained_on:
            for another in ("data_dir", "question_field", "answer_field"):
                used.pop(another, None)
        settings |= {name: used[name] for name in OF_THE_RUN if name in used}
    settings |= flags
    if Path(settings["dataset"]).is_file() and settings["dataset"] != trained_on:
        settings["split"] = flags.get("split", "all")
    args = SimpleNamespace(**settings)
    commands.check_settings(SETTINGS, args)
    if args.samples == 1 and {"temperature", "top_p"} & flags.keys():
        raise ValueError("--temperature and --top_p are for several samples: give --samples too")
    return args


def evaluate_dataset(args, name, model, tokenizer):
    """{'greedy': ..., 'mean of 16': ...}: what `evaluate` returns, printed as it comes."""
    fields = {"question": args.question_field, "answer": args.answer_field}
    questions = data.load_questions(
        name, args.split, data_dir=args.data_dir, limit=args.limit or None, seed=args.seed,
        fields=fields, bits=args.bits,
    )  # fmt: skip
    names = ("max_new_tokens", "chat", "seed", "engine", "last_number")
    settings = {"progress": True, **{name: getattr(args, name) for name in names}}
    settings["stop_ids"] = stops(model, tokenizer, args.stop)
    results = {"greedy": evaluate(model, tokenizer, questions, **settings)}
    if args.samples > 1:
        settings |= {name: getattr(args, name) for name in ("samples", "temperature", "top_p")}
        results[f"mean of {args.samples}"] = evaluate(model, tokenizer, questions, **settings)
    print(f"{args.model} on {name}, {args.split} split", table(results), sep="\n")
    cut_off = f"{1 - results['greedy']['finished']:.1%} of the greedy responses"
    print(f"{cut_off} ran into --max_new_tokens {args.max_new_tokens}, which counts as wrong")
    return results


def print_comparison(earlier, name, results):
    for measure, result in results.items():
        before = earlier.get(name, {}).get(measure)
        if before is None:
            raise ValueError(f"--against holds no {measure} of {name}: evaluate that model on it")
        difference, (low, high), p = compare(result, before)
        interval = f"{difference:+.3f}, 95% interval {low:+.3f} to {high:+.3f}, p = {p:.4f}"
        print(f"{measure} against {before['accuracy']:.3f}: {interval}")


def main(argv=None):
    flags = commands.parse_flags(SETTINGS, "Evaluate a checkpoint, or draw training runs.", argv)
    if "plot" in flags:
        out = Path(flags.get("out") or Path(flags["plot"][0], "curves.png"))
        if out.suffix != ".png":
            raise ValueError(f"--out {out} is not the name of a .png file")
        plot(flags["plot"], out)
        return print(f"wrote {out}")
    if "model" not in flags:
        raise ValueError("nothing to do: give --model DIR to evaluate, or --plot RUN to draw")
    args = settings_for(flags)
    data.check_names(args.dataset.split(","), args.split, args.data_dir)  # before the model
    datasets = "+".join(Path(name).stem for name in args.dataset.split(","))
    file = f"eval_{datasets}_{args.split}.json"
    earlier = earlier_results(args.against, file) if args.against else {}
    set_judges(args.judges)
    model, tokenizer = checkpoint.load_model(args.model, device=args.device, dtype=args.dtype)
    evaluations = {}
    samples = []
    for name in args.dataset.split(","):
        evaluations[name] = evaluate_dataset(args, name, model, tokenizer)
        for measure, result in evaluations[name].items():
            rows = result.pop("responses")
            samples += [{"dataset": name, "measure": measure, **row} for row in rows]
        if args.against:
            print_comparison(earlier, name, evaluations[name])
    if args.save_samples:
        lines = [json.dumps(row) + "\n" for row in samples]
        Path(args.save_samples).write_text("".join(lines))
    folder = Path(args.model) if Path(args.model).is_dir() else Path()
    out = Path(args.out or folder / file)
    out.parent.mkdir(parents=True, exist_ok=True)
    content = {"settings": vars(args), "results": evaluations}
    out.write_text(json.dumps(content, indent=1) + "\n")
    print(f"wrote {out}")


if __name__ == "__main__":
    commands.command_line(main)
