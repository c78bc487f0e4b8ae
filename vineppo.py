"""VinePPO (arXiv 2410.01679): credit where a step changed the odds.

PPO needs V(s), the chance to end up right from a half-written response. A critic guesses it with a second network. But
text has a gift that few environments have: any state can be returned to, exactly, by feeding its tokens again. So ask
the policy itself: V(s) is estimated by the mean reward of K fresh rollouts from s, and there is no critic to train.

States are taken where a reasoning step starts. One response to "What is 9 + 8 - 5?", K = 4, its stop token written $:

    state                              rewards of 4 fresh rollouts    value         advantage of the step that follows
    s0  the question                   1 0 0 1                        V(s0) = 0.50  A0 = V(s1) - V(s0) = +0.25
    s1  ... 9+8=17\\n                   1 1 0 1                        V(s1) = 0.75  A1 = V(s2) - V(s1) = -0.75
    s2  ... 17-5=11\\n                  0 0 0 0                        V(s2) = 0.00  A2 = reward - V(s2) =  0.00
        ... 11 is what is left.\\n#### 11$                             reward = 0

    "9+8=17" was a good step though the answer is wrong; the blame falls on "17-5=11", and on nothing after it. A group
    baseline (GRPO, RLOO) would have blamed all three alike. The sum over steps is reward - V(s0), whatever the middle.

Every token of a step gets the step's advantage and `ppo.update` does the rest, with no critic. In the paper's symbols:
A_i = r_i + V(s_{i+1}) - V(s_i) with gamma = 1, r_i = 0 but for the last step, V(terminal) = 0.

Two things to get right. A state is a prefix of the very token ids that were sampled: text cut and tokenized again is
often a prefix the policy never wrote. And the price is rollouts, some 9 a state, so all of them go to the engine in one
call, which computes a prefix once; equal states are estimated once; the state after the last step is not estimated at
all, for it is the reward. Nothing else may be left out: even where all siblings failed, V(s) need not be 0.

    python vineppo.py --model RUN      # are these values better than the critic's that PPO trained? a table, a plot
"""
import argparse
import json
import re
import weakref
from bisect import bisect_right
from functools import partial
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

import eval as evaluation
import rollout

# ----------------------------------------------------------------------------------------------------------------------
# Steps

STEP_NEWLINE = re.compile(r"\n(?=[^\S\n]*(?!####)\S)")  # before a line that is neither blank nor the answer
SENTENCE_END = re.compile(r"[.!?][\"')\]*”’]*[^\S\n]+(?=\S)")
NO_SENTENCE_END = re.compile(r"(?:\b[A-Za-z]\.[A-Za-z]"                                  # i.e.
                             r"|\b(?:cf|vs|etc|Mr|Mrs|Ms|Dr|Fig|Eq|approx|resp)|\."       # vs. and ...
                             r"|^[^\S\n]*\d{1,3})\.$", re.MULTILINE)                       # 12. of a list
TEX = re.compile(r"\\(?:begin|end)\{[A-Za-z]+\*?\}|\[/?asy\]|\\[^\n]|\$")  # may open or close a formula, or is escaped
PARTNER = {r"\[": r"\]", r"\(": r"\)", "[asy]": "[/asy]"}  # the last is MATH's way to enclose a drawing


def split_steps(response, *, style="lines"):
    """Character offsets at which the reasoning steps of a response start, 0 first; the steps joined are the response.

    "lines" (GSM8K): a step a line. The `####` line belongs to the step before it, blank lines to the step they follow.
    "math" (MATH): sentences end steps too, and nothing splits inside $...$, $$...$$, \\[...\\], \\(...\\) or an
    environment. A delimiter without its partner is plain text. Where a sentence ends is a guess, coarse where in doubt.
    Linear time. ValueError: another style."""
    if style not in ("lines", "math"):
        raise ValueError(f"unknown step style {style!r}: use 'lines' (GSM8K, arithmetic) or 'math'")
    if style == "math":
        response = hide_formulas(response)
    cuts = {m.end() for m in STEP_NEWLINE.finditer(response)}
    if style == "math":
        cuts.update(m.end() for m in SENTENCE_END.finditer(response) if ends_sentence(response, m))
    first = len(response) - len(response.lstrip())  # leading blank lines are no step
    return [0] + sorted(cut for cut in cuts if cut > first)


def ends_sentence(text, match):
    """Is this mark with white space behind it the end? Not in `5! ways`, `approx. five`, `Mr. Smith`, `1. First`."""
    opening, stop = text[match.end()], match.start() + 1
    return not (opening.islower() or opening in "#=+-*/<>^,;:"
                or text[stop - 1] == "." and NO_SENTENCE_END.search(text, max(0, stop - 40), stop))


def hide_formulas(text):
    """The text with every formula overwritten by as many X, but for the full stop that may be its last character."""
    tokens, opened, partner = list(TEX.finditer(text)), {}, {}
    for m in tokens:  # a stack for each kind of closing token, as environments nest
        t = m[0]
        closing = r"\end" + t[6:] if t.startswith(r"\begin{") else PARTNER.get(t)
        if closing:
            opened.setdefault(closing, []).append(m.start())
        elif opened.get(t):
            partner[opened[t].pop()] = m.span()
    out, end, dollar, last_pair = list(text), 0, None, text.rfind("$$")

    def hide(start, stop, end):  # formula text[start:end], its closing token text[stop:end]
        full_stop = text[start:stop].rstrip()[-1:]
        out[start:end] = "X" * (end - start - 1) + (full_stop if full_stop in ".!?" else "X")

    for m in tokens:
        at = m.start()
        if at < end:
            continue
        if at in partner:
            stop, end = partner[at]
            hide(at, stop, end)
        elif m[0] == "$" and dollar is None:
            width = 2 if text.startswith("$$", at) and at + 1 < last_pair else 1
            dollar, end = at, at + width
        elif m[0] == "$" and (width == 1 or text.startswith("$$", at)):
            end = at + width
            hide(dollar, at, end)
            dollar = None
    return "".join(out)


PIECES = weakref.WeakKeyDictionary()  # tokenizer -> {token id: the text it adds}


def step_starts(tokenizer, response_ids, *, style="lines"):
    """Token index at which each step of `split_steps` starts, 0 first, ascending: response_ids[:index] are the very
    tokens that were written before the step. A boundary inside a token belongs to the later step, and a character that
    is spread over tokens starts in the first of them; so a step may vanish where one token spans all of it.

    response_ids: without the stop token, which is no step. Special tokens among them have no text."""
    ids = list(response_ids)
    decode = partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    text = decode(ids)
    cuts = split_steps(text, style=style)
    if len(cuts) == 1:
        return [0]
    indices, offsets = clean_prefixes(decode, ids, text, PIECES.setdefault(tokenizer, {}))
    return sorted({0, *(indices[bisect_right(offsets, cut) - 1] for cut in cuts[1:])})


def clean_prefixes(decode, ids, text, pieces):
    """The i for which decode(ids[:i]) is text[:offset], i.e. no character is cut, and these offsets: two lists.

    Decoding every prefix would take quadratic time. Mostly a token adds the same text wherever it stands (except in
    first place, where some decoders drop a space), so its piece is looked up: what a second copy of it adds to a first.
    If the pieces do not make up the text (a character is spread over tokens), then token by token, decoding only those
    since the last clean prefix and, as context, the piece before it."""
    for token in set(ids) - pieces.keys():
        pieces[token] = decode([token, token])[len(decode([token])):]
    parts = [decode(ids[:1]), *(pieces[token] for token in ids[1:])]
    if "".join(parts) == text:
        return range(len(ids) + 1), np.cumsum([0, *map(len, parts)]).tolist()
    indices, offsets, before, context = [0], [0], 0, ""
    for i in range(1, len(ids) + 1):
        window = decode(ids[before:i])  # the rest of a character still to come reads \ufffd here
        piece = window[len(context):]
        if window.startswith(context) and text.startswith(piece, offsets[-1]):
            if piece and "\ufffd" not in piece:  # else no context: a special token, or bytes that are no text
                before = indices[-1]
            indices.append(i)
            offsets.append(offsets[-1] + len(piece))
            context = decode(ids[before:i])
    return indices, offsets


# ----------------------------------------------------------------------------------------------------------------------
# Values and advantages


def state_rewards(model, tokenizer, states, *, n, max_new_tokens, seed=None, stats=None, score=evaluation.rewards,
                  **generation):
    """Rewards of fresh rollouts from each state, all of them in one call of the engine: a list of lists of floats.

    states: (question, rollout, start) each: the state is rollout.prompt + rollout.response[:start]. n: how many from
    each, an int or one a state. max_new_tokens: of the whole response; a rollout gets what the state leaves of it.
    seed: may be the one the responses were sampled with. score: as `eval.rewards`. generation: temperature and so on,
    for `rollout.generate`. ValueError: a state that leaves nothing."""
    if (longest := max((start for _, _, start in states), default=0)) >= max_new_tokens:
        raise ValueError(f"no room for a rollout from a state {longest} tokens into its response: max_new_tokens="
                         f"{max_new_tokens} must be the limit that the response was sampled with")
    if seed is not None:  # the engine's random numbers are (seed, request)'s: the same seed would replay the responses
        seed = int(np.random.SeedSequence([seed, 2410_01679]).generate_state(1, np.uint64)[0] >> 2)
    groups = rollout.generate(model, [r.prompt + r.response[:start] for _, r, start in states], n=n,
                              max_new_tokens=[max_new_tokens - start for _, _, start in states], seed=seed, stats=stats,
                              **generation)
    distinct = {}  # (state, what was written, finished) -> row: graded is the whole response, and equal ones once
    keys = [[(i, tuple(g.response), g.finished) for g in group] for i, group in enumerate(groups)]
    for key in (key for group in keys for key in group):
        distinct.setdefault(key, len(distinct))
    whole = [[rollout.Rollout(states[i][1].prompt, states[i][1].response[: states[i][2]] + [*written], [], finished)]
             for i, written, finished in distinct]
    graded = score(tokenizer, [states[i][0] for i, _, _ in distinct], whole)
    return [[float(graded[distinct[key]][0]) for key in group] for group in keys]


def mc_values(model, tokenizer, questions, rollouts, rewards, *, mc_rollouts=9, max_steps=25, style="lines",
              max_new_tokens=256, reuse=False, stats=None, **settings):
    """V at the start of each step of each response: the mean reward of `mc_rollouts` (the paper's K) fresh rollouts.

    rollouts: for each question its n responses; rewards: theirs, (questions, n). max_new_tokens: the limit they were
    sampled with: a state at token t has max_new_tokens - t left, so that V is the value in the policy's own process, in
    which running out of tokens is worth 0. settings: `state_rewards`'s, temperature and so on.

    Equal states (same question, same token prefix) are estimated once: the question itself for all its responses. Only
    at the starts of a response's first `max_steps` steps is V estimated. The other values are filled from the end, as
    in the authors' code: V(s_i) = r_i + V(s_{i+1}), V(terminal) = 0, and as r_i = 0 before the last step, that is the
    reward. So those steps get advantage 0, and the last one with an estimate answers for all that follows.

    reuse: the responses at hand are rollouts from their question, too. Each one's V(question) is then the mean over its
    n - 1 siblings' rewards and fresh rollouts, of which K - (n - 1) are enough. Leave-one-out: a baseline that holds
    the response's own reward would be biased towards it (RLOO, arXiv 2402.14740). Only there: the siblings for which
    a deeper state is the start of a step are a selection, made by what they wrote after it.

    Returns starts, values: lists, one entry a rollout, question by question: token indices and floats, one a step.
    stats: a dict added to: the engine's counts and mc_steps, mc_filled (steps past max_steps), mc_states, mc_rollouts.
    ValueError: settings below 1, lists that do not match, a state with no tokens left."""
    if mc_rollouts < 1 or max_steps < 1:
        raise ValueError(f"mc_rollouts={mc_rollouts} and max_steps={max_steps} must be at least 1")
    if not len(questions) == len(rollouts) == len(rewards) or any(len(g) != len(x) for g, x in zip(rollouts, rewards)):
        raise ValueError(f"{len(questions)} questions, {len(rollouts)} groups of rollouts, {len(rewards)} of rewards: "
                         "need one of each for a question, and a reward for each rollout")
    starts, numbers, final = [], [], []  # one entry a rollout: where its steps start, which states these are, reward
    states, known, at_hand = [], {}, {}  # the distinct ones; key -> number; number of a question's -> rewards at hand
    for question, group, row in zip(questions, rollouts, rewards):
        for r, reward in zip(group, row):
            starts.append(step_starts(tokenizer, r.response[:-1] if r.finished else r.response, style=style))
            numbers.append([])
            for start in starts[-1][:max_steps]:
                key = question.answer, question.kind, tuple(r.prompt), tuple(r.response[:start])
                if key not in known:
                    known[key] = len(states)
                    states.append((question, r, start))
                numbers[-1].append(known[key])
            final.append(float(reward))
            at_hand.setdefault(numbers[-1][0], []).append(final[-1])
    n = [mc_rollouts] * len(states)
    if reuse:
        for i, siblings in at_hand.items():
            n[i] = max(0, mc_rollouts - (len(siblings) - 1))
    fresh = state_rewards(model, tokenizer, states, n=n, max_new_tokens=max_new_tokens, stats=stats, **settings)
    means = [sum(x) / max(1, len(x)) for x in fresh]
    values = [[means[i] for i in row] + [reward] * (len(cut) - len(row))
              for row, reward, cut in zip(numbers, final, starts)]
    if reuse:
        for value, (i, *_), reward in zip(values, numbers, final):
            value[0] = (sum(fresh[i]) + sum(at_hand[i]) - reward) / (n[i] + len(at_hand[i]) - 1)
    if stats is not None:
        steps, estimated = (sum(map(len, x)) for x in (starts, numbers))
        for name, count in dict(steps=steps, filled=steps - estimated, states=len(states), rollouts=sum(n)).items():
            stats[f"mc_{name}"] = stats.get(f"mc_{name}", 0) + count
    return starts, values


def step_advantages(values, reward):
    """A_i = V(s_{i+1}) - V(s_i), of the last step reward - V(s_last). Their sum is reward - V(question)."""
    return [after - before for before, after in zip(values, [*values[1:], reward])]


def mc_advantages(model, tokenizer, questions, rollouts, rewards, **settings):
    """VinePPO's advantages, ready for `ppo.update`: a list with one 1-D float32 tensor a rollout, question by question,
    one number a response token, its step's; the stop token gets the last step's. And the stats of `mc_values`, whose
    arguments these are."""
    stats, advantages = {}, []
    starts, values = mc_values(model, tokenizer, questions, rollouts, rewards, stats=stats, **settings)
    flat = [(r, float(reward)) for group, row in zip(rollouts, rewards) for r, reward in zip(group, row)]
    for (r, reward), cut, value in zip(flat, starts, values):
        lengths = np.diff([*cut, len(r.response)])  # in tokens, one a step
        advantages.append(torch.from_numpy(np.repeat(step_advantages(value, reward), lengths).astype(np.float32)))
    stats["mc_value"] = float(np.mean([v for value in values for v in value])) if values else 0.0
    return advantages, stats


# ----------------------------------------------------------------------------------------------------------------------
# The paper's analysis of value predictions: whose are right?


def sample_states(model, tokenizer, questions, prompts, *, attempts, states, alternatives, style, max_new_tokens, seed,
                  **generation):
    """Distinct intermediate states of the policy's responses, `attempts` a question, to questions that some of these
    solve and some do not: elsewhere most values are 0 or 1, and nothing is to be told. And for each the distinct states
    to which `alternatives` fresh next steps lead, if they do not end the response. Returns points (question, rollout,
    start), the former first, and families: for each of the former, the range of its alternatives among the points."""
    def starts(r):
        return step_starts(tokenizer, r.response[:-1] if r.finished else r.response, style=style)

    responses = rollout.generate(model, prompts, n=attempts, max_new_tokens=max_new_tokens, seed=seed, **generation)
    spread = evaluation.rewards(tokenizer, questions, responses).std(1)
    found = {(tuple(r.prompt), tuple(r.response[:start])): (question, r, start)
             for question, group, mixed in zip(questions, responses, spread) if mixed or attempts == 1
             for r in group for start in starts(r)[1:]}
    if not found:
        raise ValueError(f"{attempts} responses to each of {len(questions)} questions: no second step where some are "
                         "right and some wrong; try --attempts 1 (all questions), another --steps or --temperature")
    found = list(found.values())
    points = [found[i] for i in np.random.default_rng(seed).permutation(len(found))[:states]]
    groups = rollout.generate(model, [r.prompt + r.response[:start] for _, r, start in points], n=alternatives,
                              max_new_tokens=[max_new_tokens - start for _, _, start in points], seed=seed + 1,
                              **generation)
    families = []
    for (question, r, start), group in zip(tuple(points), groups):
        nexts = {}
        for g in group:
            whole = rollout.Rollout(r.prompt, r.response[:start] + g.response, [], g.finished)
            if end := next((s for s in starts(whole) if s > start), None):
                nexts[tuple(whole.response[:end])] = question, whole, end
        families.append(range(len(points), len(points) + len(nexts)))
        points += nexts.values()
    return points, families


def rank(truth, error, estimate, families):
    """Share of the pairs of alternatives that `estimate` ranks as `truth` does, a tie being half right, and how many
    pairs: those whose truths differ by more than 2 standard errors, `error`. The order of the others is not known."""
    right = []
    for i, j in (pair for family in families for pair in combinations(family, 2)):
        if abs(truth[i] - truth[j]) > 2 * np.hypot(error[i], error[j]):
            right.append(0.5 + 0.5 * np.sign((truth[i] - truth[j]) * (estimate[i] - estimate[j])))
    return float(np.mean(right)) if right else float("nan"), len(right)


def analyse(model, tokenizer, questions, prompts, *, critic=None, attempts=8, states=64, alternatives=5, truth=256,
            mc_rollouts=9, style="lines", max_new_tokens=256, seed=0, **generation):
    """Values by `truth` rollouts against those by K others, and the critic's. Returns the true values (states,), and a
    dict: estimator -> its values (states,), correlation, mean absolute error, share of right rankings, pairs."""
    points, families = sample_states(model, tokenizer, questions, prompts, attempts=attempts, states=states,
                                     alternatives=alternatives, style=style, max_new_tokens=max_new_tokens, seed=seed,
                                     **generation)
    rewards = np.array(state_rewards(model, tokenizer, points, n=truth + mc_rollouts, max_new_tokens=max_new_tokens,
                                     seed=seed, **generation))
    true, fresh = rewards[:, :truth].mean(1), rewards[:, truth:]  # (points,), (points, K): no rollout is in both
    estimates = {f"MC, K={k}": fresh[:, :k].mean(1) for k in sorted({1, 3, mc_rollouts}) if k <= mc_rollouts}
    if critic is not None:
        import ppo
        values = ppo.rollout_values(critic, [r for _, r, _ in points])  # one a token: of the state it was chosen in
        estimates["critic"] = np.array([float(v[start]) for v, (_, _, start) in zip(values, points)])
    table, s = {}, len(families)
    for name, estimate in estimates.items():
        varied = np.ptp(true[:s]) > 0 and np.ptp(estimate[:s]) > 0
        right, pairs = rank(true, rewards[:, :truth].std(1) / truth**0.5, estimate, families)
        table[name] = dict(values=estimate[:s], right=right, pairs=pairs, error=np.abs(true - estimate)[:s].mean(),
                           correlation=np.corrcoef(true[:s], estimate[:s])[0, 1] if varied else float("nan"))
    return true[:s], table


def draw(true, table, path):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    shown = list(table)[-2:] if "critic" in table else list(table)[-1:]
    figure, axes = plt.subplots(1, len(shown), figsize=(4.5 * len(shown), 4.5), sharey=True, squeeze=False)
    for axis, name in zip(axes[0], shown):
        axis.plot([0, 1], [0, 1], color="gray", linewidth=1)
        axis.scatter(true, table[name]["values"], s=18, alpha=0.6)
        axis.set(title=f"{name}: correlation {table[name]['correlation']:.2f}", xlabel="true value of the state")
    axes[0][0].set_ylabel("estimate")
    figure.savefig(path, dpi=120, bbox_inches="tight")


# Flags whose default is what the run used, for the values depend on them; and the default where there is no run.
SETTINGS = dict(dataset="arithmetic", data_dir=None, chat="auto", steps=None, temperature=1.0, top_p=1.0,
                max_new_tokens=256)


def main(argv=None):
    p = argparse.ArgumentParser(description="Monte Carlo values and the critic's against true ones.",
                                epilog="* for a run's folder: what the run used.", allow_abbrev=False)
    p.add_argument("--model", required=True, help="a run's folder (with its critic, if it trained one), or a model's")
    p.add_argument("--states", type=int, default=64, help="intermediate states to compare at (default 64)")
    p.add_argument("--attempts", type=int, default=8,
                   help="responses a question; states come from those that are right at times, not always; 1: from all "
                        "(default 8)")
    p.add_argument("--truth", type=int, default=256, help="rollouts a state that make its true value (default 256)")
    p.add_argument("--mc_rollouts", type=int, default=9, help="rollouts a state that make an estimate (default 9)")
    p.add_argument("--alternatives", type=int, default=5, help="next steps from each state, to be ranked (default 5)")
    p.add_argument("--steps", choices=["lines", "math"], help="how they are cut (default: math for LaTeX answers *)")
    p.add_argument("--dataset", help="arithmetic, gsm8k, or the path of a .jsonl file or folder (default arithmetic *)")
    p.add_argument("--data_dir", help="gsm8k: a folder with train.jsonl and test.jsonl, instead of the hub *")
    p.add_argument("--split", default="test", help="questions the states come from: train or test (default test)")
    p.add_argument("--chat", help="prompt through the chat template: auto (if there is one), on, off (default auto *)")
    p.add_argument("--temperature", type=float, help="of all sampling (default 1 *)")
    p.add_argument("--top_p", type=float, help="of all sampling (default 1 *)")
    p.add_argument("--max_new_tokens", type=int, help="longest response, in tokens (default 256 *)")
    p.add_argument("--engine", default="slots", help="slots, or hf: generate through model.generate")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", default="values.png", help="the scatter plot (default values.png)")
    args = evaluation.parse_args(p, argv)

    if min(args.states, args.attempts, args.truth, args.mc_rollouts, args.alternatives) < 1:
        raise ValueError("--states, --attempts, --truth, --mc_rollouts and --alternatives must be at least 1")
    if Path(args.out).suffix != ".png" or not Path(args.out).absolute().parent.is_dir():
        raise ValueError(f"--out {args.out} must end in .png and lie in a folder that exists")
    if not find_spec("matplotlib"):
        raise ValueError("the scatter plot needs matplotlib: pip install matplotlib")
    run = Path(args.model)
    config = json.loads((run / "config.json").read_text()) if (run / "model" / "config.json").is_file() else {}
    for name, default in SETTINGS.items():
        if getattr(args, name) is None and not (name == "data_dir" and args.dataset != config.get("dataset")):
            setattr(args, name, default if config.get(name) is None else config[name])
    questions = evaluation.load_questions(args.dataset, args.split, data_dir=args.data_dir)
    questions = [questions[i] for i in np.random.default_rng(args.seed).permutation(len(questions))[: 4 * args.states]]
    model, tokenizer = evaluation.load_model(args.model, device=args.device)
    critic = None
    if config and (run / "state" / "critic.safetensors").is_file():
        import ppo
        critic = ppo.ValueModel(model).load(run / "state" / "critic.safetensors").eval()
    settings = ("attempts", "states", "alternatives", "truth", "mc_rollouts", "max_new_tokens", "temperature", "top_p",
                "engine", "seed")
    true, table = analyse(model, tokenizer, questions, evaluation.encode_prompts(tokenizer, questions, chat=args.chat),
                          critic=critic, style=args.steps or ("math" if questions[0].kind == "math" else "lines"),
                          stop_ids=evaluation.stop_ids(model, tokenizer), progress=True,
                          **{name: getattr(args, name) for name in settings})
    print(f"{len(true)} states of {args.model} on {args.dataset}; true value ({args.truth} rollouts each): mean "
          f"{true.mean():.3f}, std {true.std():.3f}")
    print(f"{'estimator':<12}{'correlation':>12}{'mean abs error':>16}{'right rankings':>16}{'of pairs':>10}")
    for name, row in table.items():
        print(f"{name:<12}{row['correlation']:>12.3f}{row['error']:>16.3f}{row['right']:>16.3f}{row['pairs']:>10}")
    if critic is None:
        print(f"no critic: {run / 'state' / 'critic.safetensors'} is what a run with --algo ppo leaves")
    draw(true, table, args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    evaluation.command_line(main)
