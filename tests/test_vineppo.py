"""Steps, values, advantages: against tables, brute force, and a Markov chain with known values."""

import random
import zlib
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import experiments
import numpy as np
import pytest
import torch
from conftest import write_rows
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import eval as evaluation
import ppo
import rollout
import vineppo
from data import Question
from plumbing import checkpoint
from rollout import Rollout
from vineppo import mc_advantages, mc_values, split_steps, step_advantages, step_starts


def steps(text, style):
    starts = split_steps(text, style=style)
    return [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)])]


# --------------------------------------------------------------------------- text into steps


# fmt: off
@pytest.mark.parametrize("expected", [
    [""], ["  "], ["a"], ["a\n", "b"], ["a\n\n", " b\n \n"], ["\n\na\n", "b"], ["a\r\n", "b"],
    ["9+8=17\n", "17-5=12\n#### 12"], ["a\n\n#### 5"], ["#### 5\n", "more"], ["\n#### 5"],
    ["a. B\n", "$x\n", "y$"],
], ids=repr)
def test_lines(expected):
    assert steps("".join(expected), "lines") == expected


@pytest.mark.parametrize("expected", [
    ["We add. ", "Then $x. Y$ is 3.5. ", "So $z=5.$ ", "Good?  ", "(Yes!) ", "He said \"no.\" ",
     "1 is left.\n\n", " End\n#### 5"],
    ["Let \\[ a. B \\] and \\( c. D \\) be\n", "$$ e. F\nG $$ so. ", "OK"],
    ["In \\begin{align} a. B \\\\[2pt] c\n\\begin{align} d. E\\end{align} f. G\\end{align} we. ",
     "OK"],
    ["It is \\$5. ", "She has \\$6. ", "OK"],
    ["No partner: $5. ", "Then \\[ x. Y \\] and \\( or \\begin{x}. ", "OK"],
    ["Nor has $$. ", "But $a. B$ has. ", "OK"],
    ["Two formulas $a$$b. C$ d. ", "OK"],
    ["Draw [asy]\ndot((0,0)); // a. B\ndraw(x);\n[/asy]\n", "OK"],
    ["The set, i.e. A, has e.g. $x$ vs. Y etc. and 5! ways ... OK"],
    ["1. First add. ", "Second\n", "12. Third\n", "so $x$ is 7. ", "OK"],
    ["It is $7$. #### 7"],
], ids=lambda expected: expected[0])
def test_math(expected):
    assert steps("".join(expected), "math") == expected
# fmt: on


def test_unknown_style():
    with pytest.raises(ValueError, match="'lines'.*or 'math'"):
        split_steps("a", style="words")


ATOMS = ["\n", "\n\n", " ", ". ", "A", "b", "####", "$", "$$", "\\[", "\\]", "\\(", "\\)"]
ATOMS += ["\\begin{a}", "\\end{a}", "\\", "é", "!", "\t", "3.5"]


@pytest.mark.parametrize("style", ["lines", "math"])
def test_steps_make_up_the_text_and_none_is_blank(style):
    rng = random.Random(0)
    for _ in range(2000):
        text = "".join(rng.choices(ATOMS, k=rng.randrange(20)))
        starts = split_steps(text, style=style)
        assert starts[0] == 0 and starts == sorted(set(starts)) and starts[-1] <= len(text)
        assert len(starts) == 1 or all(step.strip() for step in steps(text, style))


def test_never_inside_a_formula():
    rng, inside = random.Random(1), "a. B\n! C\n\nd? E. "
    nested = f"\\begin{{x}}{inside}\\begin{{x}}{inside}\\end{{x}}{inside}\\end{{x}}"
    formulas = [f"${inside}$", f"$${inside}$$", f"\\[{inside}\\]", f"\\({inside}\\)", nested]
    formulas += [f"\\begin{{x*}}{inside}\\end{{x*}}"]
    formulas += [f"\\[\\text{{{inside}$a. B$}}{inside}\\]"]
    for _ in range(500):
        text, spans = "", []
        for _ in range(rng.randrange(1, 6)):
            text += rng.choice(["so. ", "Thus\n", "and ", "\\$3. ", "\\\\ "])
            formula = rng.choice(formulas)
            spans.append((len(text), len(text) + len(formula)))
            text += formula + rng.choice(["\n", " ", ". "])
        cuts = split_steps(text, style="math")
        assert not [cut for cut in cuts for start, end in spans if start < cut < end], text


LONG = "\n|\n |$|\\[|\\(|\\begin{a}|.|.'|. A|\\|\n####|\n1. A|$\\[.\n|i.e. A ".split("|")


@pytest.mark.parametrize("unit", [*LONG, "." + " " * 200_000, "\\begin{" + "a" * 200_000])
def test_linear_time(unit):
    """Half a second; in quadratic time this would not end."""
    text = unit * max(1, 200_000 // len(unit))
    for style in ("lines", "math"):
        starts = split_steps(text, style=style)
        assert starts[0] == 0 and starts[-1] < len(text)


# --------------------------------------------------------------------------- steps into tokens

WORDS = ["<eos>", "<unk>", "good\n", "bad\n", "#### 1", "#### 0"]


def wrap(tokenizer):
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def vocabulary(words):
    return {word: i for i, word in enumerate(words)}


@pytest.fixture(scope="module")
def words():
    """A token a line: what the Markov chain below writes."""
    tokenizer = Tokenizer(models.WordLevel(vocabulary(WORDS), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.Fuse()
    return wrap(tokenizer)


@pytest.fixture(scope="module")
def sentencepiece():
    """Llama 2's way: a leading space is dropped, bytes of unknown characters are tokens <0x..>."""
    pieces = ["<unk>", "<eos>", *(f"<0x{i:02X}>" for i in range(256))]
    pieces += ["▁", "▁a", "▁B", "b", ".", "####", "▁5"]
    model = models.BPE(vocabulary(pieces), [], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    spaces, strip = decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse(), strip])
    return wrap(tokenizer)


def text_of(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def brute_force_starts(tokenizer, ids, style):
    """The last cut of the ids before which no character at or after the boundary has begun."""
    text = text_of(tokenizer, ids)
    prefixes = [text_of(tokenizer, ids[:i]) for i in range(len(ids))]
    starts = {0}
    for cut in split_steps(text, style=style)[1:]:
        fits = [i for i, p in enumerate(prefixes) if len(p) <= cut and text.startswith(p)]
        starts.add(max(fits))
    return sorted(starts)


@pytest.mark.parametrize(
    "expected, merged",
    [
        (
            ["She adds 3 and 4.\n\n", "Then 7 + 5 = 12.\n", "So\n\n\n", "it is 12.\n#### 12"],
            {".\n\n", ".\n", "\n\n\n"},
        ),
        (["π\n", "😀漢 a.\n", "😀"], {"\ufffd"}),  # characters spread over tokens
    ],
)
def test_tokens_across_characters_and_boundaries(bpe, expected, merged):
    ids = bpe("".join(expected)).input_ids
    assert merged <= {bpe.decode([i]) for i in ids}  # else this tests nothing
    starts = step_starts(bpe, ids)
    assert [bpe.decode(ids[a:b]) for a, b in zip(starts, [*starts[1:], len(ids)])] == expected


@pytest.mark.parametrize(
    "ids, starts",
    [
        ([0, 1, 0, 2], [0, 1, 3]),  # the token that holds the boundary opens the later step
        ([0, 3, 1], [0, 1, 2]),  # two boundaries in one token: the step between vanishes
        ([3], [0]),
        ([0, 4, 0, 4], [0, 2]),
        ([], [0]),
    ],
)
def test_boundary_inside_a_token(ids, starts):
    pieces = ["a", "\n b", "\nc", "x\ny\nz", ".\n\n", "<eos>"]
    tokenizer = Tokenizer(models.WordLevel(vocabulary(pieces), unk_token="<eos>"))
    tokenizer.decoder = decoders.Fuse()
    assert step_starts(wrap(tokenizer), ids) == starts


def test_tokens_are_those_that_were_written(bpe):
    canonical = bpe("it is 12.\nSo").input_ids
    spelled = bpe.convert_tokens_to_ids("i t Ġ is Ġ 1 2 . Ċ S o".split())
    assert bpe.decode(spelled) == bpe.decode(canonical) and spelled != canonical
    assert step_starts(bpe, spelled) == [0, 9]


def random_ids(tokenizer, rng):
    """Mostly no valid UTF-8."""
    return [rng.randrange(len(tokenizer)) for _ in range(rng.randrange(25))]


def random_text(name, tokenizer, rng):
    """The ids of a text some of whose characters lose a byte."""
    text = "".join(rng.choices("😀 π\n\n“Ab. C”é漢\n. Ok\n#### 5", k=25))
    if name == "bpe":
        ids = tokenizer(text).input_ids
    else:
        ids = [2 + byte for byte in text.encode()]
    ids = [i for i in ids if rng.random() > 0.05][: rng.randrange(60)]
    if name == "sentencepiece":  # words between the bytes: each run of bytes is read on its own
        ids = [rng.randrange(258, len(tokenizer)) if rng.random() < 0.2 else i for i in ids]
    return ids


@pytest.mark.parametrize("style", ["lines", "math"])
@pytest.mark.parametrize("name", ["bpe", "sentencepiece", "words"])
def test_step_starts_against_brute_force(name, style, request):
    tokenizer, rng = request.getfixturevalue(name), random.Random(0)
    for trial in range(400):
        if trial % 2 or name == "words":
            ids = random_ids(tokenizer, rng)
        else:
            ids = random_text(name, tokenizer, rng)
        expected = brute_force_starts(tokenizer, ids, style)
        assert step_starts(tokenizer, ids, style=style) == expected, ids


# --------------------------------------------------------------------------- values
# A policy that is a Markov chain: what it writes next depends on its last token only.

CHAIN = np.array(
    [
        [1, 0, 0, 0, 0, 0],  # <eos>
        [0, 0, 0.5, 0.5, 0, 0],  # the prompt
        [0, 0, 0.4, 0.2, 0.3, 0.1],  # good\n
        [0, 0, 0.1, 0.4, 0.1, 0.4],  # bad\n
        [1, 0, 0, 0, 0, 0],  # #### 1
        [1, 0, 0, 0, 0, 0],  # #### 0
    ]
)
CUMULATIVE = CHAIN.cumsum(1).tolist()
LIMIT = 7  # max_new_tokens


def true_value(token, budget):
    """V(s) = sum over next tokens of P(next | s) V(next), with `budget` tokens left; right is
    '#### 1'."""
    right = np.zeros((budget + 1, 6))  # chance to get the reward from each token
    for left in range(1, budget + 1):
        right[left] = CHAIN @ right[left - 1]
        right[left, 4] = 1.0  # the stop token is still to be written
    return right[budget, token]


class Chain:
    """An engine that samples from the chain; remembers its calls."""

    def __init__(self, seed=0):
        self.rng, self.calls = random.Random(seed), []

    def generate(self, prompts, *, n, max_new_tokens, seed=None, stats=None, **settings):
        call = {"prompts": prompts, "n": n, "max_new_tokens": max_new_tokens, "seed": seed}
        self.calls.append(call | settings)
        return [[self.write(p, b) for _ in range(n)] for p, b in zip(prompts, max_new_tokens)]

    def write(self, prompt, budget):
        response = []
        while len(response) < budget and response[-1:] != [0]:
            last = (prompt + response)[-1]
            response += self.rng.choices(range(6), cum_weights=CUMULATIVE[last])
        return Rollout(prompt, response, [], response[-1] == 0)


def question(answer="1"):
    return Question("Q", answer)


def written(response, prompt=(1,)):
    return Rollout(list(prompt), list(response), [0.0] * len(response), response[-1] == 0)


@pytest.fixture
def values_of(words):
    """`mc_values` with the usual arguments: the chain, the grader."""

    def call(groups, rewards, questions=None, engine=None, **settings):
        questions = questions or [question()] * len(groups)
        settings = {"score": evaluation.rewards, "max_new_tokens": LIMIT} | settings
        return mc_values(engine or Chain(), words, questions, groups, rewards, **settings)

    return call


@pytest.mark.parametrize("k", [2, 8])
def test_estimates_are_unbiased_and_their_variance_falls_as_1_over_k(values_of, k):
    many = 600  # equal questions, kept apart by their prompts
    groups = [[written([2, 2, 3, 4, 0], prompt=[10 + i, 1])] for i in range(many)]
    values = np.array(values_of(groups, [[1.0]] * many, mc_rollouts=k)[1])  # (many, states)
    truth = [true_value(1, LIMIT), true_value(2, LIMIT - 1), true_value(2, LIMIT - 2)]
    variance = np.array([v * (1 - v) for v in truth])
    assert (np.abs(values.mean(0) - truth) < 4 * (variance / k / many) ** 0.5).all()
    assert np.allclose(values.var(0) * k, variance, rtol=0.2)


def markov_llama():
    """CHAIN as a model: attention and MLP add nothing, embeddings are unit vectors, the head holds
    log P."""
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "max_position_embeddings": 512, "vocab_size": 6}
    ids = {"eos_token_id": 0, "bos_token_id": None, "pad_token_id": None}
    model = LlamaForCausalLM(LlamaConfig(**shape, **ids)).eval()
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(6, 8))
        logits = np.log(CHAIN + 1e-30).T / 8**0.5  # RMSNorm scales by sqrt(8)
        model.lm_head.weight[:, :6] = torch.from_numpy(logits)
    return model


def test_real_engine_on_a_model_whose_values_and_advantages_are_known(words):
    """Each value against the sum over all continuations, each token's advantage against A_i =
    V(s_{i+1}) - V(s_i) of these."""
    model, k = markov_llama(), 1500
    engine = SimpleNamespace(generate=partial(rollout.generate, model))
    groups = engine.generate([[1]], n=6, max_new_tokens=LIMIT, seed=3)
    rewards = evaluation.rewards(words, [question()], groups)
    stats, arguments = {}, (engine, words, [question()], groups, rewards)
    settings = {"mc_rollouts": k, "max_new_tokens": LIMIT, "seed": 3, "score": evaluation.rewards}
    starts, values = mc_values(*arguments, stats=stats, **settings)
    assert stats["mc_rollouts"] == k * stats["mc_states"]
    assert max(map(len, starts)) > 2
    advantages = mc_advantages(*arguments, **settings)
    for r, reward, cuts, estimates, advantage in zip(
        groups[0], rewards[0].tolist(), starts, values, advantages, strict=True
    ):
        truth = [true_value((r.prompt + r.response)[cut], LIMIT - cut) for cut in cuts]
        error = np.array([4.5 * (v * (1 - v) / k) ** 0.5 + 1e-9 for v in truth])
        assert (np.abs(np.array(estimates) - truth) < error).all()
        for start, end, true, its_error in zip(
            cuts, [*cuts[1:], len(r.response)], np.diff([*truth, reward]), error + [*error[1:], 0]
        ):
            assert (np.abs(advantage[start:end].numpy() - true) < its_error + 1e-6).all()


def test_one_call_distinct_states_and_budgets(values_of):
    first = [written(response) for response in ([2, 2, 3, 4, 0], [2, 2, 4, 0], [2, 3, 2, 5, 0])]
    groups = [first, [written([2, 2, 5, 0], prompt=[7, 1])]]
    stats, chain = {}, Chain()
    starts, values = values_of(
        groups, [[1, 1, 0], [0]], engine=chain, mc_rollouts=3, seed=5, temperature=0.7, stats=stats
    )
    (call,) = chain.calls
    assert starts == [[0, 1, 2], [0, 1], [0, 1, 2], [0, 1]]
    assert call["prompts"] == [[1], [1, 2], [1, 2, 2], [1, 2, 3], [7, 1], [7, 1, 2]]
    assert call["max_new_tokens"] == [7, 6, 5, 5, 7, 6]
    assert call["n"] == 3 and call["temperature"] == 0.7
    assert call["seed"] not in (None, 5)  # not the random numbers of the responses again
    assert values[0][:2] == values[1] == values[2][:2]
    assert stats == {"mc_steps": 10, "mc_filled": 0, "mc_states": 6, "mc_rollouts": 18}


def test_the_same_question_twice_and_another_answer(values_of):
    chain, questions = Chain(), [question("1"), question("1"), question("0")]
    values_of([[written([2, 2, 4, 0])]] * 3, [[1]] * 3, questions, chain)
    assert chain.calls[0]["prompts"] == [[1], [1, 2]] * 2


@pytest.mark.parametrize("style, seen", [("auto", ["lines", "math"]), ("math", ["math"] * 2)])
def test_steps_follow_each_question_of_a_mixture(values_of, monkeypatch, style, seen):
    styles = []

    def watched(tokenizer, ids, *, style):
        styles.append(style)
        return [0]

    monkeypatch.setattr(vineppo, "step_starts", watched)
    questions = [question(), replace(question(), kind="math")]
    groups = [[written([2, 4, 0])], [written([2, 5, 0])]]
    values_of(groups, [[1], [0]], questions, style=style)
    assert styles == seen


@pytest.mark.parametrize("reward, answer", [(1.0, 4), (0.0, 5)])
def test_values_past_max_steps_are_filled_from_the_reward(values_of, reward, answer):
    group, stats = [written([2, 2, 2, 2, answer, 0])], {}
    _, (values,) = values_of([group], [[reward]], max_steps=2, stats=stats)
    assert values[3:] == [reward] and stats["mc_filled"] == 1 and stats["mc_states"] == 3
    assert step_advantages(values, reward)[2:] == [reward - values[2], 0]


@pytest.mark.parametrize(
    "truth, estimated",
    [
        ([0, 0, 0, 0, 0, 0, 0, 0], [0, 7]),  # nothing changes: nothing is spent between
        ([0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.75], [0, 7]),  # one rollout is no difference
        ([0, 0, 0, 0, 0, 1, 1, 1], [0, 3, 4, 5, 7]),  # a jump is found
        ([0, 0, 1, 1, 1, 0, 0, 0], [0, 7]),  # one that comes and goes is missed
    ],
)
def test_bisection_spends_where_values_change(monkeypatch, values_of, truth, estimated):
    calls = []

    def fresh(engine, tokenizer, states, *, n, call, **settings):
        calls.append([start for _, _, start in states])
        assert call == len(calls) - 1 and n == 4  # random numbers of its own
        right = [int(4 * truth[start]) for start in calls[-1]]
        return [[1.0] * count + [0.0] * (4 - count) for count in right]

    monkeypatch.setattr(vineppo, "state_rewards", fresh)
    group, stats = [written([2] * 8 + [4, 0])], {}
    starts, (values,) = values_of(
        [group], [[1.0]], mc_rollouts=4, spend="bisect", stats=stats, max_new_tokens=20
    )
    assert starts == [list(range(8))] and sorted(sum(calls, [])) == estimated
    assert [values[i] for i in estimated] == [truth[i] for i in estimated]
    assert values == np.interp(range(8), estimated, [truth[i] for i in estimated]).tolist()
    assert stats["mc_states"] == len(estimated) and stats["mc_filled"] == 8 - len(estimated)
    assert stats["mc_rollouts"] == 4 * len(estimated)


def test_an_unfinished_rollout_is_worth_nothing(values_of):
    fresh = [Rollout([1], [2, 4], [], False), written([4, 0])]
    engine = SimpleNamespace(generate=lambda prompts, **_: [fresh])
    _, values = values_of([[written([4, 0])]], [[1]], engine=engine, mc_rollouts=2)
    assert values == [[0.5]]


def test_the_answer_may_stand_in_the_state(values_of):
    """A response that goes on after its answer: graded is all of it, not what a rollout adds."""
    stop = SimpleNamespace(generate=lambda prompts, **_: [[written([0])] for _ in prompts])

    def score(tokenizer, questions, groups):
        return np.array([[float(4 in r.response) for r in group] for group in groups])

    group = [written([2, 4, 2, 3, 0])]
    _, values = values_of([group], [[1]], engine=stop, mc_rollouts=1, score=score)
    assert values == [[0.0, 1.0]]


@pytest.mark.parametrize(
    "rewards, settings, message",
    [
        ([[1]], {"mc_rollouts": 0}, "at least 1"),
        ([[1], [0]], {}, r"zip\(\) argument 3 is longer"),  # for one question
        ([[1, 0]], {}, r"zip\(\) argument 2 is longer"),  # for one response
        ([[1]], {"style": "words"}, "step style 'words'"),
    ],
)
def test_bad_settings(values_of, rewards, settings, message):
    with pytest.raises(ValueError, match=message):
        values_of([[written([2, 2, 4, 0])]], rewards, **settings)


@pytest.mark.parametrize("spend", ["all", "bisect"])
def test_no_questions(values_of, spend):
    assert values_of([], [], spend=spend) == ([], [])


# --------------------------------------------------------------------------- advantages


def test_advantages_telescope():
    rng = np.random.default_rng(0)
    for _ in range(200):
        values, reward = rng.random(rng.integers(1, 9)).tolist(), float(rng.integers(2))
        assert np.isclose(sum(step_advantages(values, reward)), reward - values[0])
    assert step_advantages([0.5, 0.75, 0.0], 0.0) == [0.25, -0.75, 0.0]  # the docstring's example


def test_the_stop_token_is_no_step(words):
    group, chain = [Rollout([1], [2, 2, 3], [], True)], Chain()  # its stop token has a text
    settings = {"max_new_tokens": LIMIT, "score": evaluation.rewards}
    (advantages,) = mc_advantages(chain, words, [question()], [group], [[0]], **settings)
    assert chain.calls[0]["prompts"] == [[1], [1, 2]]
    assert len(advantages) == 3 and advantages[1] == advantages[2]


@pytest.mark.parametrize("trial", range(20))
def test_advantages_against_brute_force(words, trial):
    """Every state of every response estimated anew, from a policy that is a function of (state,
    number of the rollout)."""

    def fresh(prompt, j, budget):
        return Chain(zlib.crc32(repr((prompt, j)).encode())).write(prompt, budget)

    def generate(prompts, *, n, max_new_tokens, **_):
        requests = zip(prompts, max_new_tokens)
        return [[fresh(p, j, budget) for j in range(n)] for p, budget in requests]

    rng, chain = random.Random(trial), Chain(trial)
    k, limit = rng.randrange(1, 5), rng.randrange(2, 9)
    groups = [[chain.write([10 + i, 1], limit) for _ in range(4)] for i in range(3)]
    rewards = evaluation.rewards(words, [question()] * 3, groups)
    engine, stats = SimpleNamespace(generate=generate), {}
    advantages = mc_advantages(
        engine, words, [question()] * 3, groups, rewards, score=evaluation.rewards,
        mc_rollouts=k, max_new_tokens=limit, stats=stats,
    )  # fmt: skip
    assert stats["mc_rollouts"] == k * stats["mc_states"]

    def value(r, start):
        group = [fresh(r.prompt + r.response[:start], j, limit - start) for j in range(k)]
        return np.mean([g.finished and (r.response[:start] + g.response)[-2] == 4 for g in group])

    for r, reward, got in zip(sum(groups, []), rewards.flatten(), advantages, strict=True):
        # a step ends where a line does, unless the answer or the stop token alone follows
        lines = [t in (2, 3) for t in r.response]
        ends = [t for t in range(1, len(lines)) if lines[t - 1] and lines[t]]
        expected, start = [], 0
        for end in [*ends, len(r.response)]:
            after = value(r, end) if end < len(r.response) else reward
            expected += [after - value(r, start)] * (end - start)
            start = end
        assert got.dtype == torch.float32 and got.shape == (len(r.response),)
        assert np.allclose(got, expected, atol=1e-6)


# --------------------------------------------------------------------------- experiments.py values


@pytest.mark.parametrize(
    "estimate, families, expected",
    [
        ([0.1, 0.9, 0.5, 0.51], [range(4)], (1.0, 5)),  # 0.50 and 0.51 are not told apart
        ([-0.1, -0.9, -0.5, -0.51], [range(4)], (0.0, 5)),
        ([0, 0, 0, 0], [range(2), range(2, 4)], (0.5, 1)),
        ([0, 0, 0, 0], [], (None, 0)),
    ],
)
def test_share_of_right_rankings(estimate, families, expected):
    truth, error = np.array([0.1, 0.9, 0.5, 0.51]), np.full(4, 0.01)
    share, pairs = experiments.right_rankings(truth, error, np.array(estimate), families)
    assert (None if np.isnan(share) else share, pairs) == expected


def test_estimate_and_truth_share_no_rollout(monkeypatch, words):
    states, families = [None] * 4, [range(4, 4)] * 4
    monkeypatch.setattr(experiments, "sample_states", lambda *_, **__: (states, families))
    monkeypatch.setattr(vineppo, "state_rewards", lambda *_, **__: [[0.0] * 9 + [1.0] * 3] * 4)
    truth, table = experiments.compare_values(markov_llama(), words, [], [], truth=9, mc_rollouts=3)
    assert (truth == 0).all() and (table["MC, K=3"]["values"] == 1).all()
    assert table["MC, K=3"]["error"] == 1


def test_no_intermediate_state(monkeypatch, words):
    def generate(model, prompts, *, n, max_new_tokens, **settings):
        return Chain().generate(prompts, n=n, max_new_tokens=[max_new_tokens])

    monkeypatch.setattr(rollout, "generate", generate)
    # the prompt [4] is followed by the stop token
    with pytest.raises(ValueError, match="--attempts 1"):
        experiments.compare_values(markov_llama(), words, [question()], [[4]], attempts=2)


def test_values_of_a_run_beside_a_critic_that_knows_them(tmp_path, words, capsys):
    """On the chain, with the true values as the critic's: it is found, read at the right token, and
    wins."""
    pytest.importorskip("matplotlib")
    model = markov_llama()
    checkpoint.save_model(model, words, tmp_path / "model")
    critic = ppo.ValueModel(model)
    with torch.no_grad():
        true_values = torch.tensor([true_value(token, 40) for token in range(6)])
        critic.head.weight[0, :6] = true_values / 8**0.5
    (tmp_path / "state").mkdir()
    torch.save({"critic": critic.state_dict()}, tmp_path / "state" / "training.pt")
    questions = [{"question": f"Q{i}", "answer": "1"} for i in range(50)]
    path = write_rows(tmp_path / "questions" / "test.jsonl", questions)
    config = {"dataset": str(path.parent), "max_new_tokens": 40, "steps": "auto"}
    write_rows(tmp_path / "config.json", config)
    out = tmp_path / "values.png"
    flags = f"values --model {tmp_path} --states 16 --truth 300 --alternatives 6 --device cpu"
    experiments.main([*flags.split(), "--out", str(out)])
    printed = capsys.readouterr().out.splitlines()
    lines = [line for line in printed if line.startswith(("MC", "critic"))]
    rows = {}
    for line in lines:
        name, *measured = line.rsplit(None, 4)
        rows[name] = [float(x) for x in measured]
    assert list(rows) == ["MC, K=1", "MC, K=3", "MC, K=9", "critic"]
    assert out.read_bytes()[:4] == b"\x89PNG"
    correlation, error, right, pairs = rows["critic"]
    assert correlation > 0.95 and error < 0.04 and right == 1 and pairs >= 3
    errors = [rows[f"MC, K={k}"][1] for k in (9, 3, 1)]
    assert rows["MC, K=9"][0] > 0.5 and errors == sorted(set(errors))


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--states 0", "at least 1"),
        ("--out no/such/folder/a.png", "folder that exists"),
        ("--out a.pdf", "end in .png"),
        ("--dataset nonsense", "unknown data set"),
        ("", "cannot load a model"),
    ],
)
def test_values_refuse(flags, message, tmp_path):
    with pytest.raises(ValueError, match=message) as raised:
        experiments.main(["values", "--model", str(tmp_path / "absent"), *flags.split()])
    assert "\n" not in str(raised.value)


# ------------------------------------------------------------------------ experiments.py gradients


@pytest.mark.parametrize(
    "how, expected",
    [
        ("tree", [[1 / 6, 1 / 3], [1 / 6, -2 / 3], [1 / 6, 1 / 3], [-1 / 2, 0]]),
        ("tree, shrunk", [[1 / 8, 3 / 8], [1 / 8, -5 / 8], [1 / 8, 3 / 8], [-1 / 4, -1 / 4]]),
        ("tree, baseline", [[2 / 3, 1 / 2], [-2 / 3, -1], [2 / 3, 1 / 2], [-2 / 3, -2 / 3]]),
    ],
)
def test_credit_from_responses_that_begin_alike(how, expected):
    group = [Rollout([9], tokens, [], True) for tokens in ([1, 2], [1, 3], [1, 3], [4, 5])]
    rewards = np.array([[1, 0, 1, 0]], np.float32)
    got = experiments.tree_advantages(None, [group], rewards, how=how, starts_of=lambda r: [0, 1])
    assert np.allclose(torch.stack(got), expected)


def test_only_one_walk_is_right():
    for seed in range(20):
        edges, path = experiments.graph(random.Random(seed))
        walks = [path[:1]]
        for _ in range(experiments.DEPTH):
            walks = [[*walk, node] for walk in walks for node in edges[walk[-1]]]
        assert [walk for walk in walks if walk[-1] == path[-1]] == [path]
        row = experiments.walk_question(random.Random(seed))
        asked = Question("", row["answer"])
        lines = row["solution"].split("\n")[:-1]
        assert evaluation.grade(row["solution"], asked) == (lines == list(map(str, path)))


def test_gradients_of_all_methods(words):
    """On the chain, where 400 responses point nearly where the truth does."""
    model = markov_llama()
    critic = ppo.ValueModel(model)
    table, success, length, explained = experiments.compare_gradients(
        model, words, critic, [question()], n=400, repeats=2, truth=2000, more=2, max_new_tokens=40
    )
    assert 0 < success < 1 and length > 1 and explained < 0.01
    for name in ("grpo", "rloo", "tree, baseline", "grpo, 2 x the responses", "vineppo"):
        assert table[name]["cosine"] > 0.9, name
    assert table["vineppo"]["spent"] > table["grpo"]["spent"] == 400
