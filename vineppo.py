"""VinePPO (arXiv 2410.01679): credit where a step changed the odds.

PPO needs V(s), the chance to end up right from a half-written response. A critic guesses it with a
second network. But text has a gift that few environments have: any state can be returned to,
exactly, by feeding its tokens again. So ask the policy itself: V(s) is estimated by the mean reward
of K fresh rollouts from s, and there is no critic to train.

States are taken where a reasoning step starts. One response of three steps to "What is 9 + 8 - 5
+ 1?", with K = 4; $ is its stop token:

    state, and the step that is taken there     4 rollouts   V(s)   advantage of the step
    s0  the question          9+8=17            1 0 0 1      0.50   V(s1) - V(s0)  = +0.25
    s1  s0 and 9+8=17         17-5=11           1 1 0 1      0.75   V(s2) - V(s1)  = -0.75
    s2  s1 and 17-5=11        11+1=12           0 0 0 0      0.00   reward - V(s2) =  0.00
                              #### 12$          reward 0

"9+8=17" was a good step, though the answer is wrong. The blame falls on "17-5=11", and on nothing
after it. A group baseline (GRPO, RLOO) would blame all three alike. The advantages of a response
sum to reward - V(s0), since the values between cancel. Every token of a step gets the step's
advantage, and `ppo.update` does the rest. In the paper's symbols A_i = r_i + V(s_{i+1}) - V(s_i):
gamma is 1, only the last step has a reward r_i, and the value after it is 0.

Two things to get right. A state is a prefix of the very token ids that were sampled: a text that is
cut and tokenized again often has other ids, which the policy never wrote. And the price is high:
K = 9 rollouts from each state. So all states go to the engine in one call, which reads the states
along one response in one forward, and equal states are estimated once.
"""

import itertools
import re
from bisect import bisect_right
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from plumbing.commands import require
from plumbing.steps import hide_formulas, sentence_starts
from rollout import seed_of

# What gets an estimate: the question, and the states behind so many steps of a response, at most
# (the authors' numbers, by style).
MAX_STEPS = {"lines": 25, "math": 20}
SALT = 2410_01679  # any number: it keeps our seeds apart from that of the responses


def mc_advantages(engine, tokenizer, questions, rollouts, rewards, **settings):
    """VinePPO's advantages, ready for `ppo.update`: for each rollout, question by question, a 1-D
    float32 tensor with a number for each response token. Arguments: those of `mc_values`."""
    starts, values = mc_values(engine, tokenizer, questions, rollouts, rewards, **settings)
    # One after the other, no longer in groups: like starts and values
    rollouts = itertools.chain(*rollouts)
    rewards = itertools.chain(*rewards)
    advantages = []
    for rollout, reward, its_starts, its_values in zip(rollouts, rewards, starts, values):
        of_step = step_advantages(its_values, float(reward))  # (steps,)
        # The stop token belongs to the last step: that step decided to end here.
        lengths = np.diff([*its_starts, len(rollout.response)])  # (steps,) in tokens
        of_token = np.repeat(of_step, lengths)  # (response tokens,)
        advantages.append(torch.tensor(of_token, dtype=torch.float32))
    return advantages


def step_advantages(values, reward):
    """A_i = V(s_{i+1}) - V(s_i), one a step. Their sum is reward - V(s_0)."""
    # Behind the last step the response is over: there the reward stands in for V.
    return np.diff([*values, reward]).tolist()


# --------------------------------------------------------------------------- values


def mc_values(
    engine,  # a `rollout.Engine`
    tokenizer,
    questions,
    rollouts,  # for each question its n responses
    rewards,  # their grades, (questions, n)
    *,
    score,  # grades the fresh rollouts, as `eval.rewards` does
    max_new_tokens,  # the limit under which the responses were sampled
    mc_rollouts=9,  # K, fresh rollouts from each state
    max_steps=None,  # steps of a response behind which V is estimated; None or 0: MAX_STEPS
    style="auto",  # "lines" or "math", see `split_steps`; "auto": by each question's kind
    spend="all",  # estimate all states, as the paper does; or "bisect", see `middles`
    seed=None,  # at least 0; may be that of the responses: SALT is mixed in
    stats=None,  # a dict for counts: the engine's, and mc_steps and so on
    **generation,  # temperature and so on, for the engine
):
    """V at the start of each reasoning step of each response: the mean reward of K fresh rollouts.

    Two things differ from the authors' code. A state at token t leaves its rollouts max_new_tokens
    - t tokens instead of max_new_tokens: V is the value in the policy's own process, in which
    running out of tokens is worth 0. And a state ends behind the newline, not before it.

    Returns starts, values: for each rollout, question by question, a list of token indices and a
    list of floats, one a step. ValueError: arguments that do not fit together."""
    require(mc_rollouts >= 1, f"mc_rollouts {mc_rollouts}: needs at least 1")
    require(spend in ("all", "bisect"), f"spend {spend!r}: choose 'all' or 'bisect'")

    # --- 1. all states of all responses, each once
    states = {}  # key, the same for equal states -> (question, rollout, start)
    responses = []  # of each: token indices where steps start, its states' keys, its reward
    for question, group, grades in zip(questions, rollouts, rewards, strict=True):
        its_style = style
        if style == "auto":
            its_style = "math" if question.kind == "math" else "lines"
        for rollout, reward in zip(group, grades, strict=True):
            its_starts = step_starts(tokenizer, rollout.written(), style=its_style)
            path = []  # keys of its states
            # + 1: a state before the first step, and one behind each of the first max_steps.
            for start in its_starts[: (max_steps or MAX_STEPS[its_style]) + 1]:
                before = tuple(rollout.prompt), tuple(rollout.response[:start])
                # Answer and kind belong to it: equal tokens may be graded in another way.
                key = question.answer, question.kind, *before
                states.setdefault(key, (question, rollout, start))
                path.append(key)
            responses.append((its_starts, path, float(reward)))

    # --- 2. values: of all states in one call of the engine, or by bisection in several
    values_of = {}  # key -> V
    paths = [path for _, path, _ in responses]
    wanted = set(states)
    if spend == "bisect":
        wanted = set()
        for path in paths:
            wanted |= {path[0], path[-1]}  # later what lies between, if they differ
    call = 0
    # Until each wanted state has a value: for "all" that is one pass.
    while missing := [key for key in states if key in wanted and key not in values_of]:
        fresh = state_rewards(
            engine, tokenizer, [states[key] for key in missing], n=mc_rollouts, score=score,
            max_new_tokens=max_new_tokens, seed=seed, call=call, stats=stats, **generation,
        )  # (missing, K)  # fmt: skip
        for key, its_rewards in zip(missing, fresh):
            values_of[key] = sum(its_rewards) / mc_rollouts  # V, the mean
        if spend == "bisect":
            # 1 / K is one rollout more or less: so small a change proves nothing.
            wanted |= middles(paths, values_of, 1 / mc_rollouts)
        call += 1

    # --- 3. back to the responses
    starts = []
    values = []
    filled = 0  # steps without an estimate
    for its_starts, path, reward in responses:
        known = [i for i, key in enumerate(path) if key in values_of]  # steps
        estimates = [values_of[path[i]] for i in known]
        # Values of states that bisection left out are interpolated. Past max_steps V is the reward,
        # as in the authors' code: the last step with an estimate answers for all steps behind it.
        its_values = np.interp(range(len(its_starts)), known, estimates, right=reward)  # (steps,)
        starts.append(its_starts)
        values.append(its_values.tolist())
        filled += len(its_starts) - len(known)
    if stats is not None:
        stats |= {"mc_steps": sum(map(len, starts)), "mc_filled": filled}
        stats |= {"mc_states": len(values_of), "mc_rollouts": mc_rollouts * len(values_of)}
    return starts, values


def middles(paths, values_of, resolution):
    """Bisection: the states to estimate next (arXiv 2406.06592 labels steps so). Each lies in the
    middle between two states of a path that have values, with none between them, and whose values
    differ by more than `resolution`. What rises and falls again between equal values is missed."""
    states = set()  # keys, like all states here
    for path in paths:
        known = [i for i, state in enumerate(path) if state in values_of]
        for left, right in itertools.pairwise(known):
            change = abs(values_of[path[left]] - values_of[path[right]])
            if change > resolution + 1e-9:  # in floats 1 - 2/3 exceeds 1/3
                # Of two neighbours this is the left one. It has a value: nothing more to do.
                states.add(path[(left + right) // 2])
    return states


def state_rewards(
    engine, tokenizer, states, *, n, score, max_new_tokens, seed=None, call=0, **generation
):
    """Rewards of n fresh rollouts from each state, in one call of the engine: lists of n floats.

    states: (question, rollout, start) each, which is rollout.prompt + rollout.response[:start].
    call: a number of its own for each call with this seed. The rest: as `mc_values`."""
    prefixes = [r.prompt + r.response[:start] for _, r, start in states]
    left = [max_new_tokens - start for _, _, start in states]  # tokens that a rollout may have
    # Another seed than the responses had: with theirs, the engine would draw the same random
    # numbers, and the rollouts from a bare question would be its responses again.
    if seed is not None:
        seed = seed_of(seed, SALT, call)
    groups = engine.generate(prefixes, n=n, max_new_tokens=left, seed=seed, **generation)
    # The whole response is graded, state and rollout: the answer may stand in the state.
    whole = []  # (states, n)
    for (_, r, start), group in zip(states, groups):
        before = r.response[:start]
        whole.append([replace(g, prompt=r.prompt, response=before + g.response) for g in group])
    questions = [question for question, _, _ in states]
    return score(tokenizer, questions, whole).tolist()


# --------------------------------------------------------------------------- steps

# The newline before a line that is neither blank nor the answer. [^\S\n] is a space or a tab.
STEP_NEWLINE = re.compile(r"\n(?=[^\S\n]*(?!####)\S)")


def split_steps(response, *, style="lines"):
    """Where the reasoning steps of a response start: character offsets, 0 first. Each step reaches
    to the start of the next one.

    "lines" (GSM8K): each line is a step. The `####` line belongs to the step before it, and so do
    blank lines. "math" (MATH): a step may also end with a sentence, and nothing splits inside
    $...$, $$...$$, \\[...\\], \\(...\\) or an environment. Where a sentence ends is a guess; in
    doubt it goes on."""
    if style not in ("lines", "math"):
        raise ValueError(f"unknown step style {style!r}: use 'lines' (GSM8K, arithmetic) or 'math'")
    text = hide_formulas(response) if style == "math" else response  # as long as the response
    offsets = {match.end() for match in STEP_NEWLINE.finditer(text)}
    if style == "math":
        offsets |= sentence_starts(text)
    # Blank lines at the head are no step: the first step starts at 0 and takes them in.
    blank = len(response) - len(response.lstrip())  # characters
    return [0] + sorted(offset for offset in offsets if offset > blank)


def step_starts(tokenizer, ids, *, style="lines"):
    """Token index at which each step of `split_steps` starts, 0 first, ascending: ids[:index] are
    the very tokens that were written before the step. ids: a response without its stop token."""
    decode = partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    text = decode(ids)

    def characters(end):
        # The complete characters of ids[:end]. The bytes of one may be spread over tokens; as long
        # as some are missing, it is decoded as \ufffd.
        return len(decode(ids[:end]).rstrip("\ufffd"))

    starts = {0}  # a set: two steps that start inside one token become one
    for offset in split_steps(text, style=style)[1:]:
        # The last index at or before the offset: a token across it belongs to the later step.
        index = bisect_right(range(len(ids)), offset, key=characters) - 1
        # A character may be half written at that index. Then go back to where none is.
        before = decode(ids[:index])
        while len(before) > offset or not text.startswith(before):
            index -= 1
            before = decode(ids[:index])
        starts.add(index)
    return sorted(starts)
