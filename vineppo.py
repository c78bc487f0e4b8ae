"""VinePPO (arXiv 2410.01679): credit where a step changed the odds.

PPO needs V(s), the chance to end up right from a half-written response. A critic guesses it with a
second network. But text has a gift that few environments have: any state can be returned to,
exactly, by feeding its tokens again. So ask the policy itself: V(s) is estimated by the mean reward
of K fresh rollouts from s, and there is no critic to train.

States are taken where a reasoning step starts. One response to "What is 9 + 8 - 5?", K = 4, its
stop token written $:

    state                 rewards of 4 rollouts   value   advantage of the step that follows
    s0  the question      1 0 0 1                  0.50   A0 = V(s1) - V(s0) = +0.25
    s1  9+8=17            1 1 0 1                  0.75   A1 = V(s2) - V(s1) = -0.75
    s2  17-5=11           0 0 0 0                  0.00   A2 = reward - V(s2) =  0.00
        #### 11$          reward = 0

"9+8=17" was a good step though the answer is wrong; the blame falls on "17-5=11", and on nothing
after it. A group baseline (GRPO, RLOO) would have blamed all three alike. The sum over steps is
reward - V(s0), whatever the middle. Every token of a step gets the step's advantage, and
`ppo.update` does the rest, with no critic. In the paper's symbols A_i = r_i + V(s_{i+1}) - V(s_i),
with gamma = 1, r_i = 0 but for the last step, and V(terminal) = 0.

Two things to get right. A state is a prefix of the very token ids that were sampled: text cut and
tokenized again is often a prefix the policy never wrote. And the price is rollouts, some 9 a state,
so all of them go to the engine in one call, which computes a prefix once; equal states are
estimated once; and the state after the last step is not estimated, for it is the reward.
"""

import itertools
import re
import weakref
from bisect import bisect_right
from dataclasses import replace
from functools import partial

import numpy as np
import torch

import eval as evaluation
import rollout
from plumbing.processes import seed_of


def mc_advantages(model, tokenizer, questions, rollouts, rewards, **settings):
    """VinePPO's advantages, ready for `ppo.update`: a list with one 1-D float32 tensor a rollout,
    question by question, one number a response token, its step's; the stop token gets the last
    step's. And the stats of `mc_values`, whose arguments these are."""
    stats, advantages = {}, []
    starts, values = mc_values(
        model, tokenizer, questions, rollouts, rewards, stats=stats, **settings
    )
    flat_rollouts = [r for group in rollouts for r in group]
    flat_rewards = [float(reward) for row in rewards for reward in row]
    for r, reward, cuts, value in zip(flat_rollouts, flat_rewards, starts, values):
        lengths = np.diff([*cuts, len(r.response)])  # in tokens, one a step
        per_token = np.repeat(step_advantages(value, reward), lengths)
        advantages.append(torch.from_numpy(per_token.astype(np.float32)))
    return advantages, stats


def step_advantages(values, reward):
    """A_i = V(s_{i+1}) - V(s_i), of the last step reward - V(s_last). Their sum is reward -
    V(question)."""
    return [after - before for before, after in zip(values, [*values[1:], reward])]


def mc_values(
    model, tokenizer, questions, rollouts, rewards, *, mc_rollouts=9, max_steps=None, spend="all",
    style="auto", max_new_tokens=256, seed=None, stats=None, **settings,
):  # fmt: skip
    """V at the start of each step of each response: the mean reward of `mc_rollouts` (the paper's
    K) fresh rollouts.

    rollouts: for each question its n responses; rewards: theirs, (questions, n). max_new_tokens:
    the limit they were sampled with. Two things differ from the authors' code: a state at token t
    has max_new_tokens - t left, not all of them anew, so that V is the value in the policy's own
    process, in which running out of tokens is worth 0; and it ends behind the newline, not before
    it. settings: `state_rewards`'s, temperature and so on.

    Equal states (same question, same token prefix) are estimated once: the question itself for all
    its responses. V is estimated at the question and at the ends of a response's first `max_steps`
    steps (None: 25, or 20 of "math"). The other values are filled from the end, as in the authors'
    code: with V(terminal) = 0 and no reward before the last step, V(s_i) = r_i + V(s_{i+1}) is the
    reward. So those steps get advantage 0, and the last one with an estimate answers for all that
    follows.

    spend: "all", the paper's, estimates each of these states. "bisect" saves rollouts where values
    do not change (divide and conquer, as arXiv 2406.06592 does to label steps): first the ends,
    then the middle between two states whose values differ by more than one rollout, and so on;
    where they agree, the values between are interpolated.

    Returns starts, values: lists, one entry a rollout, question by question: token indices and
    floats, one a step. stats: a dict added to: the engine's counts and mc_steps, mc_filled (steps
    without an estimate), mc_states, mc_rollouts."""
    check_mc(questions, rollouts, rewards, mc_rollouts, max_steps)
    # 1. the distinct states: starts of steps that differ in question or token prefix
    starts = []  # of each response: token indices
    paths = []  # of each response: which states its first steps start in
    states = []  # (question, rollout, start)
    number_of = {}  # key of a state -> its number
    for question, group in zip(questions, rollouts):
        lines_or_math = "math" if question.kind == "math" else "lines"
        its_style = lines_or_math if style == "auto" else style
        most = max_steps or (20 if its_style == "math" else 25)  # the authors'
        for r in group:
            starts.append(step_starts(tokenizer, r.written(), style=its_style))
            paths.append([])
            for start in starts[-1][: most + 1]:
                key = question.answer, question.kind, tuple(r.prompt), tuple(r.response[:start])
                if key not in number_of:
                    number_of[key] = len(states)
                    states.append((question, r, start))
                paths[-1].append(number_of[key])

    # 2. their values, {number: V}
    value_of = {}
    wanted = range(len(states))
    if spend == "bisect":
        wanted = {path[end] for path in paths for end in (0, -1)}
    for call in itertools.count():
        missing = sorted(set(wanted) - value_of.keys())
        if not missing:
            break
        fresh = state_rewards(
            model, tokenizer, [states[i] for i in missing], n=mc_rollouts, call=call, seed=seed,
            max_new_tokens=max_new_tokens, stats=stats, **settings,
        )  # fmt: skip
        value_of |= {i: sum(x) / mc_rollouts for i, x in zip(missing, fresh)}
        wanted = {i for path in paths for i in middles(path, value_of, 1 / mc_rollouts)}

    # 3. back to the responses
    values = []
    flat_rewards = [float(reward) for row in rewards for reward in row]
    for path, reward, cuts in zip(paths, flat_rewards, starts):
        known = [i for i, number in enumerate(path) if number in value_of]
        between = np.interp(range(len(path)), known, [value_of[path[i]] for i in known]).tolist()
        values.append(between + [reward] * (len(cuts) - len(path)))
    steps = sum(map(len, starts))
    estimated = sum(number in value_of for path in paths for number in path)
    rollout.add(
        {} if stats is None else stats, mc_steps=steps, mc_filled=steps - estimated,
        mc_states=len(value_of), mc_rollouts=mc_rollouts * len(value_of),
    )  # fmt: skip
    return starts, values


def middles(path, value_of, doubt):
    """The states halfway between two neighbours with estimates that differ by more than `doubt`."""
    known = [i for i, number in enumerate(path) if number in value_of]
    for left, right in itertools.pairwise(known):
        if abs(value_of[path[left]] - value_of[path[right]]) > doubt + 1e-9:
            yield path[(left + right) // 2]


def state_rewards(
    model, tokenizer, states, *, n, max_new_tokens, seed=None, call=0, stats=None,
    score=evaluation.rewards, **generation,
):  # fmt: skip
    """Rewards of fresh rollouts from each state, all in one call of the engine: a list of lists of
    floats.

    states: (question, rollout, start) each: the state is rollout.prompt + rollout.response[:start].
    n: how many from each. max_new_tokens: of the whole response; a rollout gets what the state
    leaves of it. seed: may be the one the responses were sampled with; call: a number of its own
    for each call with that seed. score: as `eval.rewards`. generation: temperature and so on, for
    `rollout.generate`. ValueError: a state that leaves nothing."""
    longest = max((start for _, _, start in states), default=0)
    if longest >= max_new_tokens:
        limit = f"max_new_tokens={max_new_tokens} must be the limit it was sampled with"
        state = f"a state {longest} tokens into its response"
        raise ValueError(f"no room for a rollout from {state}: {limit}")
    if seed is not None:  # random numbers belong to (seed, request): else the responses' own again
        seed = seed_of(seed, 2410_01679, call)
    prefixes = [r.prompt + r.response[:start] for _, r, start in states]
    left = [max_new_tokens - start for _, _, start in states]
    groups = rollout.generate(
        model, prefixes, n=n, max_new_tokens=left, seed=seed, stats=stats, **generation
    )
    whole = []  # graded is the whole response
    for (_, r, start), group in zip(states, groups):
        before = r.response[:start]
        whole.append([replace(g, prompt=r.prompt, response=before + g.response) for g in group])
    return score(tokenizer, [question for question, _, _ in states], whole).tolist()


# --------------------------------------------------------------------------- steps

STEP_NEWLINE = re.compile(r"\n(?=[^\S\n]*(?!####)\S)")  # before a line, not blank nor the answer
SENTENCE_END = re.compile(r"[.!?][\"')\]*”’]*[^\S\n]+(?=\S)")


def split_steps(response, *, style="lines"):
    """Character offsets at which the reasoning steps of a response start, 0 first; the steps joined
    are the response.

    "lines" (GSM8K): a step a line. The `####` line belongs to the step before it, blank lines to
    the step they follow. "math" (MATH): sentences end steps too, and nothing splits inside $...$,
    $$...$$, \\[...\\], \\(...\\) or an environment. A delimiter without its partner is plain text.
    Where a sentence ends is a guess, coarse where in doubt. Linear time."""
    if style not in ("lines", "math"):
        raise ValueError(f"unknown step style {style!r}: use 'lines' (GSM8K, arithmetic) or 'math'")
    if style == "math":
        response = hide_formulas(response)
    cuts = {m.end() for m in STEP_NEWLINE.finditer(response)}
    if style == "math":
        cuts |= {m.end() for m in SENTENCE_END.finditer(response) if ends_sentence(response, m)}
    first = len(response) - len(response.lstrip())  # leading blank lines are no step
    return [0] + sorted(cut for cut in cuts if cut > first)


def step_starts(tokenizer, response_ids, *, style="lines"):
    """Token index at which each step of `split_steps` starts, 0 first, ascending:
    response_ids[:index] are the very tokens that were written before the step. A boundary inside a
    token belongs to the later step, and a character that is spread over tokens starts in the first
    of them; so a step may vanish where one token spans all of it.

    response_ids: without the stop token, which is no step. Special tokens have no text."""
    ids = list(response_ids)
    decode = partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    text = decode(ids)
    cuts = split_steps(text, style=style)
    if len(cuts) == 1:
        return [0]
    indices, offsets = clean_prefixes(decode, ids, text, PIECES.setdefault(tokenizer, {}))
    return sorted({0, *(indices[bisect_right(offsets, cut) - 1] for cut in cuts[1:])})


# ==================================================================================================
# That is the method. Below: what is a sentence, what is a formula, which tokens make up which text.
# ==================================================================================================

NO_SENTENCE_END = re.compile(
    r"(?:\b[A-Za-z]\.[A-Za-z]"  # i.e.
    r"|\b(?:cf|vs|etc|Mr|Mrs|Ms|Dr|Fig|Eq|approx|resp)|\."  # vs. and ...
    r"|^[^\S\n]*\d{1,3})\.$",  # 12. of a list
    re.MULTILINE,
)
# what may open or close a formula; and any escaped character
TEX = re.compile(r"\\(?:begin|end)\{[A-Za-z]+\*?\}|\[/?asy\]|\\[^\n]|\$")
PARTNER = {r"\[": r"\]", r"\(": r"\)", "[asy]": "[/asy]"}  # the last: MATH's drawings


def ends_sentence(text, match):
    """Is this mark with white space behind it the end? Not in `5! ways`, `approx. five`, `Mr.
    Smith`, `1. First`."""
    opening, stop = text[match.end()], match.start() + 1
    if opening.islower() or opening in "#=+-*/<>^,;:":
        return False
    return text[stop - 1] != "." or not NO_SENTENCE_END.search(text, max(0, stop - 40), stop)


def hide_formulas(text):
    """The text with every formula overwritten by as many X, but for the full stop that may be its
    last character."""
    tokens = list(TEX.finditer(text))
    # start of a token that opens a formula -> (start, end) of the one that closes it
    partner = {}
    opened = {}  # closing token -> stack of its opening tokens, as environments nest
    for token in tokens:
        closing = PARTNER.get(token[0])
        if token[0].startswith(r"\begin{"):
            closing = r"\end" + token[0][len(r"\begin") :]
        if closing:
            opened.setdefault(closing, []).append(token.start())
        elif opened.get(token[0]):
            partner[opened[token[0]].pop()] = token.span()
    hidden = list(text)

    def hide(start, stop, end):  # formula text[start:end], its closing token text[stop:end]
        full_stop = text[start:stop].rstrip()[-1:]
        hidden[start:end] = "X" * (end - start - 1) + (full_stop if full_stop in ".!?" else "X")

    end = 0  # of the last formula
    dollar = None  # where a $ or $$ has opened
    last_pair = text.rfind("$$")
    for token in tokens:
        start = token.start()
        if start < end:
            continue
        if start in partner:
            stop, end = partner[start]
            hide(start, stop, end)
        elif token[0] == "$" and dollar is None:
            width = 2 if text.startswith("$$", start) and start + 1 < last_pair else 1
            dollar = start
            end = start + width
        elif token[0] == "$" and (width == 1 or text.startswith("$$", start)):
            end = start + width
            hide(dollar, start, end)
            dollar = None
    return "".join(hidden)


PIECES = weakref.WeakKeyDictionary()  # tokenizer -> {token id: the text it adds}


def clean_prefixes(decode, ids, text, pieces):
    """The i for which decode(ids[:i]) is text[:offset], i.e. no character is cut, and these
    offsets: two lists.

    Decoding every prefix would take quadratic time. Mostly a token adds the same text wherever it
    stands (except in first place, where some decoders drop a space), so its piece is looked up:
    what a second copy of it adds to a first. If the pieces do not make up the text (a character is
    spread over tokens), then token by token, decoding only those since the last clean prefix and,
    as context, the piece before it."""
    for token in set(ids) - pieces.keys():
        pieces[token] = decode([token, token])[len(decode([token])) :]
    parts = [decode(ids[:1]), *(pieces[token] for token in ids[1:])]
    if "".join(parts) == text:
        return range(len(ids) + 1), np.cumsum([0, *map(len, parts)]).tolist()
    indices, offsets = [0], [0]
    before, context = 0, ""
    for i in range(1, len(ids) + 1):
        window = decode(ids[before:i])  # the rest of a character still to come reads \ufffd here
        piece = window[len(context) :]
        if window.startswith(context) and text.startswith(piece, offsets[-1]):
            if piece and "\ufffd" not in piece:  # else a special token, or bytes: no context
                before = indices[-1]
            indices.append(i)
            offsets.append(offsets[-1] + len(piece))
            context = decode(ids[before:i])
    return indices, offsets


def check_mc(questions, rollouts, rewards, mc_rollouts, max_steps):
    if mc_rollouts < 1 or (max_steps is not None and max_steps < 1):
        raise ValueError(f"mc_rollouts={mc_rollouts} and max_steps={max_steps} must be at least 1")
    sizes = [len(group) for group in rollouts]
    if len(questions) != len(rollouts) or sizes != [len(row) for row in rewards]:
        groups = f"{len(rollouts)} groups of rollouts, {len(rewards)} of rewards"
        need = "need one of each for a question, and a reward for each rollout"
        raise ValueError(f"{len(questions)} questions, {groups}: {need}")
