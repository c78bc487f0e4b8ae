"""Steps, values and advantages: against tables, brute force, and a Markov chain with values in closed form."""
import itertools
import json
import random
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import eval as evaluation
import vineppo
from eval import Question
from rollout import Rollout
from vineppo import mc_advantages, mc_values, split_steps, step_advantages, step_starts


def steps(text, style):
    starts = split_steps(text, style=style)
    return [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)])]


# ----------------------------------------------------------------------------------------------------------------------
# split_steps


@pytest.mark.parametrize("expected", [
    [""], ["  "], ["a"], ["a\n", "b"], ["a\n\n", " b\n \n"], ["\n\na\n", "b"], ["a\r\n", "b"],
    ["9+8=17\n", "17-5=12\n#### 12"], ["a\n\n#### 5"], ["#### 5\n", "more"], ["\n#### 5"], ["a. B\n", "$x\n", "y$"],
], ids=repr)
def test_lines(expected):
    assert steps("".join(expected), "lines") == expected


@pytest.mark.parametrize("expected", [
    ["We add. ", "Then $x. Y$ is 3.5. ", "So $z=5.$ ", "Good?  ", "(Yes!) ", "He said \"no.\" ", "1 is left.\n\n",
     " End\n#### 5"],
    ["Let \\[ a. B \\] and \\( c. D \\) be\n", "$$ e. F\nG $$ so. ", "OK"],
    ["In \\begin{align} a. B \\\\[2pt] c\n\\begin{align} d. E\\end{align} f. G\\end{align} we see. ", "OK"],
    ["It is \\$5. ", "She has \\$6. ", "OK"],
    ["No partner: $5. ", "Then \\[ x. Y \\] and \\( or \\begin{x}. ", "OK"],
    ["Nor has $$. ", "But $a. B$ has. ", "OK"],
    ["Two formulas $a$$b. C$ d. ", "OK"],
    ["Draw [asy]\ndot((0,0)); // a. B\ndraw(x);\n[/asy]\n", "OK"],
    ["The set, i.e. A, has e.g. $x$ vs. Y etc. and 5! ways ... OK"],
    ["1. First add. ", "Second\n", "12. Third\n", "so $x$ is 7. ", "OK"],
    ["It is $7$. #### 7"],
], ids=lambda e: e[0])
def test_math(expected):
    assert steps("".join(expected), "math") == expected


def test_unknown_style():
    with pytest.raises(ValueError, match="'lines'.*or 'math'"):
        split_steps("a", style="words")


def test_split_properties():
    rng = random.Random(0)
    atoms = ["\n", "\n\n", " ", ". ", "A", "b", "####", "$", "$$", "\\[", "\\]", "\\(", "\\)", "\\begin{a}", "\\end{a}",
             "\\", "é", "!", "\t", "3.5"]
    for _ in range(3000):
        text = "".join(rng.choices(atoms, k=rng.randrange(20)))
        for style in "lines", "math":
            starts = split_steps(text, style=style)
            assert starts[0] == 0 and starts == sorted(set(starts)) and starts[-1] <= len(text)
            assert "".join(steps(text, style)) == text
            assert len(starts) == 1 or all(step.strip() for step in steps(text, style))


def test_never_inside_a_formula():
    rng, inside = random.Random(1), "a. B\n! C\n\nd? E. "
    formulas = [f"${inside}$", f"$${inside}$$", f"\\[{inside}\\]", f"\\({inside}\\)",
                f"\\begin{{x*}}{inside}\\end{{x*}}",
                f"\\begin{{x}}{inside}\\begin{{x}}{inside}\\end{{x}}{inside}\\end{{x}}",
                f"\\[\\text{{{inside}$a. B$}}{inside}\\]"]
    for _ in range(500):
        text, spans = "", []
        for _ in range(rng.randrange(1, 6)):
            text += rng.choice(["so. ", "Thus\n", "and ", "\\$3. ", "\\\\ "])
            formula = rng.choice(formulas)
            spans.append((len(text), len(text) + len(formula)))
            text += formula + rng.choice(["\n", " ", ". "])
        assert not [(c, s) for c in split_steps(text, style="math") for s in spans if s[0] < c < s[1]], text


@pytest.mark.parametrize("unit", ["\n", "\n ", "$", "\\[", "\\(", "\\begin{a}", ".", ".'", ". A", "\\", "\n####",
                                  "\n1. A", "$\\[.\n", "i.e. A "])
def test_linear_time(unit):
    begin = time.perf_counter()
    for text in (unit * (300_000 // len(unit)), "." + " " * 300_000, "\\begin{" + "a" * 300_000):
        split_steps(text, style="math")
        split_steps(text, style="lines")
    assert time.perf_counter() - begin < 10  # half a second, where quadratic time would be hours


# ----------------------------------------------------------------------------------------------------------------------
# step_starts


def wrap(tokenizer):
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


@pytest.fixture(scope="module")
def bpe():
    """Byte-level BPE in the way of the tokenizers of today: punctuation takes the newlines that follow it along."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r" ?[^\s\w]+\n*|\s*\n+| ?\w+|\s+"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    text = ["She adds 3 and 4.\n\nThen 7 + 5 = 12.\nSo\n\n\nit is 12.\n#### 12"] * 50
    tokenizer.train_from_iterator(text, trainers.BpeTrainer(vocab_size=330, special_tokens=["<eos>"],
                                                            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return wrap(tokenizer)


@pytest.fixture(scope="module")
def sentencepiece():
    """Llama 2's way: a leading space is dropped, bytes of unknown characters are tokens <0x..>."""
    pieces = ["<unk>", "<eos>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "▁a", "▁B", "b", ".", "####", "▁5"]
    tokenizer = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
    return wrap(tokenizer)


WORDS = ["<eos>", "<unk>", "good\n", "bad\n", "#### 1", "#### 0"]


@pytest.fixture(scope="module")
def words():
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Whitespace(), decoders.Fuse()
    return wrap(tokenizer)


def text_of(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def brute_force_starts(tokenizer, ids, style):
    """The last cut of the ids before which no character at or after the boundary has begun."""
    text, prefixes = text_of(tokenizer, ids), [text_of(tokenizer, ids[:i]) for i in range(len(ids))]
    return sorted({0, *(max(i for i, p in enumerate(prefixes) if len(p) <= cut and text.startswith(p))
                        for cut in split_steps(text, style=style)[1:])})


def test_merged_newlines(bpe):
    ids = bpe("She adds 3 and 4.\n\nThen 7 + 5 = 12.\nSo\n\n\nit is 12.\n#### 12").input_ids
    pieces = [bpe.decode([i]) for i in ids]
    assert ".\n\n" in pieces and ".\n" in pieces and "\n\n\n" in pieces  # else this tests nothing
    starts = step_starts(bpe, ids)
    assert [bpe.decode(ids[a:b]) for a, b in zip(starts, [*starts[1:], len(ids)])] == [
        "She adds 3 and 4.\n\n", "Then 7 + 5 = 12.\n", "So\n\n\n", "it is 12.\n#### 12"]


def test_boundary_inside_a_token():
    vocabulary = {"a": 0, "\n b": 1, "\nc": 2, "x\ny\nz": 3, ".\n\n": 4, "<eos>": 5}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer = wrap(tokenizer)
    assert step_starts(tokenizer, [0, 1, 0, 2]) == [0, 1, 3]  # the token that holds the boundary opens the later step
    assert step_starts(tokenizer, [0, 3, 1]) == [0, 1, 2]     # two boundaries in one token: the step between vanishes
    assert step_starts(tokenizer, [3]) == [0]
    assert step_starts(tokenizer, [0, 4, 0, 4]) == [0, 2]
    assert step_starts(tokenizer, []) == [0]


def test_tokens_are_those_that_were_written(bpe):
    canonical = bpe("it is 12.\nSo").input_ids
    spelled = [bpe.convert_tokens_to_ids(t) for t in ["i", "t", "Ġ", "is", "Ġ", "1", "2", ".", "Ċ", "S", "o"]]
    assert bpe.decode(spelled) == bpe.decode(canonical) and spelled != canonical
    assert step_starts(bpe, spelled) == [0, 9]


def test_characters_spread_over_tokens(bpe):
    ids = bpe("π\n😀漢 a.\n😀").input_ids
    starts = step_starts(bpe, ids)
    assert [bpe.decode(ids[a:b]) for a, b in zip(starts, [*starts[1:], len(ids)])] == ["π\n", "😀漢 a.\n", "😀"]


@pytest.mark.parametrize("name", ["bpe", "sentencepiece", "words"])
def test_step_starts_against_brute_force(name, request):
    tokenizer, rng = request.getfixturevalue(name), random.Random(0)
    sample = "😀 π\n\n“Ab. C”é漢\n. Ok\n#### 5"
    for trial in range(1500):
        ids = [rng.randrange(len(tokenizer)) for _ in range(rng.randrange(25))]  # mostly no valid UTF-8
        if trial % 2 and name != "words":
            text = "".join(rng.choice(sample) for _ in range(25))
            ids = [2 + b for b in text.encode()] if name == "sentencepiece" else tokenizer(text).input_ids
            ids = [i for i in ids if rng.random() > 0.05][: rng.randrange(60)]  # some characters lose a byte
            if name == "sentencepiece":  # words between the bytes: each run of bytes is read on its own
                ids = [rng.randrange(258, len(tokenizer)) if rng.random() < 0.2 else i for i in ids]
        style = rng.choice(["lines", "math"])
        assert step_starts(tokenizer, ids, style=style) == brute_force_starts(tokenizer, ids, style), ids


# ----------------------------------------------------------------------------------------------------------------------
# A policy that is a Markov chain: what it writes next depends on its last token only

CHAIN = np.array([[1, 0, 0, 0, 0, 0],       # <eos>
                  [0, 0, .5, .5, 0, 0],     # the prompt
                  [0, 0, .4, .2, .3, .1],   # good\n
                  [0, 0, .1, .4, .1, .4],   # bad\n
                  [1, 0, 0, 0, 0, 0],       # #### 1
                  [1, 0, 0, 0, 0, 0.]])     # #### 0
LIMIT = 7  # max_new_tokens


def true_value(token, budget):
    """V(s) = sum over next tokens of P(next | s) V(next), in closed form: budget tokens left, right is '#### 1'."""
    right = np.zeros((budget + 1, 6))  # chance to get the reward from each token
    for left in range(1, budget + 1):
        right[left] = CHAIN @ right[left - 1]
        right[left, 4] = 1.0  # the stop token is still to be written
    return right[budget, token]


class Simulator:
    """rollout.generate for the chain; remembers its calls."""

    def __init__(self, seed=0):
        self.rng, self.calls, self.cumulative = np.random.default_rng(seed), [], CHAIN.cumsum(1)

    def __call__(self, model, prompts, *, n=1, max_new_tokens=256, seed=None, stats=None, **settings):
        self.calls.append(dict(prompts=prompts, n=n, max_new_tokens=max_new_tokens, seed=seed, **settings))
        n = [n] * len(prompts) if isinstance(n, int) else n
        budgets = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
        return [[self.write(p, budget) for _ in range(k)] for p, k, budget in zip(prompts, n, budgets)]

    def write(self, prompt, budget):
        response = []
        while len(response) < budget and response[-1:] != [0]:
            last = (prompt + response)[-1]
            response.append(int(np.searchsorted(self.cumulative[last], self.rng.random(), side="right")))
        return Rollout(prompt, response, [], response[-1] == 0)


@pytest.fixture
def simulator(monkeypatch):
    simulator = Simulator()
    monkeypatch.setattr(vineppo.rollout, "generate", simulator)
    return simulator


def question(answer="1"):
    return Question("Q", answer)


def written(response, prompt=(1,)):
    return Rollout(list(prompt), list(response), [0.0] * len(response), response[-1] == 0)


def test_estimates_are_unbiased_and_their_variance_falls_as_1_over_k(simulator, words):
    many = 800
    groups = [[written([2, 2, 3, 4, 0], prompt=[10 + i, 1])] for i in range(many)]  # as many equal, separate questions
    for k in (2, 8, 32):
        _, values = mc_values(None, words, [question()] * many, groups, [[1.0]] * many, mc_rollouts=k,
                              max_new_tokens=LIMIT)
        values = np.array(values)  # (many, states)
        truth = [true_value(1, LIMIT), true_value(2, LIMIT - 1), true_value(2, LIMIT - 2)]
        noise = np.array([v * (1 - v) / k / many for v in truth]) ** 0.5
        assert (np.abs(values.mean(0) - truth) < 4 * noise).all()
        assert np.allclose(values.var(0) * k, [v * (1 - v) for v in truth], rtol=0.2)


def test_real_engine_on_a_model_that_is_the_chain(words):
    torch.manual_seed(0)
    responses = vineppo.rollout.generate(markov_llama(), [[1]], n=6, max_new_tokens=LIMIT, seed=3)
    rewards = evaluation.rewards(words, [question()], responses)
    stats = {}
    starts, values = mc_values(markov_llama(), words, [question()], responses, rewards, mc_rollouts=1500,
                               max_new_tokens=LIMIT, seed=3, stats=stats)
    assert stats["mc_rollouts"] == 1500 * stats["mc_states"]
    assert 8 * stats["tokens_prefilled"] <= stats["tokens_prompted"]
    assert max(map(len, starts)) > 2
    for r, cut, value in zip(responses[0], starts, values):
        for start, v in zip(cut, value):
            truth = true_value((r.prompt + r.response[:start])[-1], LIMIT - start)
            assert abs(v - truth) < 4.5 * (truth * (1 - truth) / 1500) ** 0.5 + 1e-9


def markov_llama():
    """CHAIN as a LlamaForCausalLM: attention and MLP add nothing, embeddings are unit vectors, the head holds log P."""
    config = LlamaConfig(vocab_size=6, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
                         max_position_embeddings=512, eos_token_id=0, bos_token_id=None, pad_token_id=None)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(6, 8))
        model.lm_head.weight[:, :6] = torch.from_numpy(np.log(CHAIN + 1e-30).T / 8**0.5)  # RMSNorm scales by sqrt(8)
    return model


def test_leave_one_out_is_exactly_unbiased(monkeypatch, words):
    """All outcomes of 3 responses and the K - 2 fresh rollouts, each with its probability: E[V_j | own reward] = p."""
    p, k, expected, weight = 0.3, 4, np.zeros((3, 2)), np.zeros((3, 2))
    answers = {1: [4, 0], 0: [5, 0]}
    for outcome in itertools.product([0, 1], repeat=3 + k - 2):
        probability = np.prod([p if x else 1 - p for x in outcome])
        fresh = [written(answers[x]) for x in outcome[3:]]
        calls = []
        monkeypatch.setattr(vineppo.rollout, "generate", lambda *args, n, **settings: calls.append(n) or [fresh])
        group = [written(answers[x]) for x in outcome[:3]]
        _, values = mc_values(None, words, [question()], [group], [outcome[:3]], mc_rollouts=k, reuse=True)
        assert calls == [[k - 2]]
        for j in range(3):
            assert np.isclose(values[j][0], np.mean([x for i, x in enumerate(outcome) if i != j]))
            expected[j, outcome[j]] += probability * values[j][0]
            weight[j, outcome[j]] += probability
    assert np.allclose(expected / weight, p)


def test_reuse_with_more_siblings_than_k(simulator, words):
    group = [written(r) for r in ([4, 0], [5, 0], [2, 4, 0], [4, 0])]
    _, values = mc_values(None, words, [question()], [group], [[1, 0, 1, 1]], mc_rollouts=2, reuse=True,
                          max_new_tokens=LIMIT)
    assert [v[0] for v in values] == [2 / 3, 1, 2 / 3, 2 / 3]
    assert simulator.calls[0]["n"] == [0]  # "good\n#### 1" is one step


def test_one_call_distinct_states_and_budgets(simulator, words):
    groups = [[written([2, 2, 3, 4, 0]), written([2, 2, 4, 0]), written([2, 3, 2, 5, 0])],
              [written([2, 2, 5, 0], prompt=[7, 1])]]
    stats = {}
    starts, values = mc_values(None, words, [question(), question()], groups, [[1, 1, 0], [0]], mc_rollouts=3,
                               max_new_tokens=LIMIT, seed=5, temperature=0.7, stats=stats)
    (call,) = simulator.calls
    assert starts == [[0, 1, 2], [0, 1], [0, 1, 2], [0, 1]]
    assert call["prompts"] == [[1], [1, 2], [1, 2, 2], [1, 2, 3], [7, 1], [7, 1, 2]]
    assert call["max_new_tokens"] == [7, 6, 5, 5, 7, 6] and call["n"] == [3] * 6 and call["temperature"] == 0.7
    assert call["seed"] not in (None, 5)  # the training rollouts' random numbers are not used again
    assert values[0][:2] == values[1] == values[2][:2]
    assert stats == dict(mc_steps=10, mc_filled=0, mc_states=6, mc_rollouts=18)


def test_the_same_question_twice_and_another_answer(simulator, words):
    groups = [[written([2, 2, 4, 0])]] * 3
    mc_values(None, words, [question("1"), question("1"), question("0")], groups, [[1]] * 3, max_new_tokens=LIMIT)
    assert simulator.calls[0]["prompts"] == [[1], [1, 2]] * 2


def test_values_past_max_steps_are_filled_from_the_reward(simulator, words):
    for reward, last in ((1.0, 4), (0.0, 5)):
        stats = {}
        _, (values,) = mc_values(None, words, [question()], [[written([2, 2, 2, 2, last, 0])]], [[reward]], max_steps=2,
                                 max_new_tokens=LIMIT, stats=stats)
        assert values[2:] == [reward] * 2 and stats["mc_filled"] == 2 and stats["mc_states"] == 2
        assert step_advantages(values, reward)[1:] == [reward - values[1], 0, 0]


def test_the_stop_token_is_no_step(simulator, words):
    group = [Rollout([1], [2, 2, 3], [], True)]  # stopped by a token with a text of its own, "bad\n"
    (advantages,), _ = mc_advantages(None, words, [question()], [group], [[0]], max_new_tokens=LIMIT)
    assert simulator.calls[0]["prompts"] == [[1], [1, 2]]
    assert len(advantages) == 3 and advantages[1] == advantages[2]


def test_an_unfinished_rollout_is_worth_nothing(monkeypatch, words):
    fresh = [Rollout([1], [2, 4], [], False), written([4, 0])]
    monkeypatch.setattr(vineppo.rollout, "generate", lambda *args, **settings: [fresh])
    _, values = mc_values(None, words, [question()], [[written([4, 0])]], [[1]], mc_rollouts=2)
    assert values == [[0.5]]


def test_the_answer_may_stand_in_the_state(monkeypatch, words):
    """A response that goes on after its answer: graded is all of it, not only what a rollout adds."""
    monkeypatch.setattr(vineppo.rollout, "generate", lambda m, prompts, **settings: [[written([0])] for _ in prompts])
    _, values = mc_values(None, words, [question()], [[written([2, 4, 2, 3, 0])]], [[1]], mc_rollouts=1)
    assert values == [[0.0, 1.0]]


def test_bad_settings(simulator, words):
    group = [[written([2, 2, 4, 0])]]
    for match, rewards, settings in [("at least 1", [[1]], dict(mc_rollouts=0)),
                                     ("at least 1", [[1]], dict(max_steps=0)), ("2 of rewards", [[1], [0]], {}),
                                     ("a reward for each", [[1, 0]], {}),
                                     ("max_new_tokens=1 must", [[1]], dict(max_new_tokens=1))]:
        with pytest.raises(ValueError, match=match):
            mc_values(None, words, [question()], group, rewards, **settings)
    assert mc_values(None, words, [], [], []) == ([], [])


def test_advantages_telescope():
    rng = np.random.default_rng(0)
    for _ in range(200):
        values, reward = rng.random(rng.integers(1, 9)).tolist(), float(rng.integers(2))
        assert np.isclose(sum(step_advantages(values, reward)), reward - values[0])
    assert step_advantages([0.5, 0.75, 0.0], 0.0) == [0.25, -0.75, 0.0]  # the docstring's example


def test_advantages_against_brute_force(monkeypatch, words):
    """Every state of every response estimated anew and naively, from a policy that is a function of (state, j)."""
    def fresh(prompt, j, budget):
        simulator = Simulator(zlib.crc32(repr((prompt, j)).encode()))
        return simulator.write(prompt, budget)

    monkeypatch.setattr(vineppo.rollout, "generate", lambda model, prompts, *, n, max_new_tokens, **settings: [
        [fresh(p, j, budget) for j in range(k)] for p, k, budget in zip(prompts, n, max_new_tokens)])
    rng = random.Random(0)
    for trial in range(40):
        k, limit, simulator = rng.randrange(1, 5), rng.randrange(2, 9), Simulator(trial)
        prompts = [[10 + i, 1] for i in range(3)]
        groups = [[simulator.write(p, limit) for _ in range(4)] for p in prompts]
        rewards = evaluation.rewards(words, [question()] * 3, groups)
        advantages, stats = mc_advantages(None, words, [question()] * 3, groups, rewards, mc_rollouts=k,
                                          max_new_tokens=limit)
        assert len(advantages) == 12 and stats["mc_rollouts"] == k * stats["mc_states"]
        for r, reward, got in zip(sum(groups, []), rewards.reshape(-1), advantages):
            def value(start):
                group = [fresh(r.prompt + r.response[:start], j, limit - start) for j in range(k)]
                return np.mean([g.finished and (r.response[:start] + g.response)[-2] == 4 for g in group])
            # a step ends where a line does, unless the answer or nothing but the stop token follows
            ends = [t + 1 for t, token in enumerate(r.response[:-1]) if token in (2, 3) and r.response[t + 1] in (2, 3)]
            expected, start = [], 0
            for end in [*ends, len(r.response)]:
                after = value(end) if end < len(r.response) else reward
                expected += [after - value(start)] * (end - start)
                start = end
            assert got.dtype == torch.float32 and got.shape == (len(r.response),)
            assert np.allclose(got, expected, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# The analysis


def test_rank():
    truth, error = np.array([0.1, 0.9, 0.5, 0.51]), np.full(4, 0.01)
    assert vineppo.rank(truth, error, truth, [range(4)]) == (1.0, 5)  # 0.50 and 0.51 are not told apart
    assert vineppo.rank(truth, error, -truth, [range(4)]) == (0.0, 5)
    assert vineppo.rank(truth, error, np.zeros(4), [range(2), range(2, 4)]) == (0.5, 1)
    assert np.isnan(vineppo.rank(truth, error, truth, [])[0])


def test_estimate_and_truth_share_no_rollout(monkeypatch, words):
    monkeypatch.setattr(vineppo, "state_rewards", lambda m, t, states, **settings: [[0.0] * 9 + [1.0] * 3] * 4)
    monkeypatch.setattr(vineppo, "sample_states", lambda *args, **settings: ([None] * 4, [range(4, 4)] * 4))
    true, table = vineppo.analyse(None, words, [], [], truth=9, mc_rollouts=3)
    assert (true == 0).all() and (table["MC, K=3"]["values"] == 1).all() and table["MC, K=3"]["error"] == 1


def test_no_intermediate_state(simulator, words):
    with pytest.raises(ValueError, match="--attempts 1"):
        vineppo.analyse(None, words, [question()], [[4]], attempts=2)  # the prompt is followed by the stop token


def test_command(tmp_path, words, capsys):
    """On the chain, beside a critic that was handed the true values: it is found, read at the right token, and wins."""
    pytest.importorskip("matplotlib")
    import ppo
    (tmp_path / "state").mkdir()
    model = markov_llama()
    model.save_pretrained(tmp_path / "model")
    words.save_pretrained(tmp_path / "model")
    critic = ppo.ValueModel(model)
    with torch.no_grad():
        critic.head.weight[0, :6] = torch.tensor([true_value(t, 40) for t in range(6)]) / 8**0.5
    critic.save(tmp_path / "state" / "critic.safetensors")
    data = tmp_path / "test.jsonl"
    data.write_text("".join(json.dumps(dict(question=f"Q{i}", answer="1")) + "\n" for i in range(50)))
    (tmp_path / "config.json").write_text(json.dumps(dict(dataset=str(data), max_new_tokens=40)))
    out = tmp_path / "values.png"
    command = f"--model {tmp_path} --states 16 --truth 300 --alternatives 6 --device cpu --out {out}".split()
    vineppo.main(command)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("MC", "critic"))]
    rows = {line.rsplit(None, 4)[0]: [float(x) for x in line.split()[-4:]] for line in lines}
    assert list(rows) == ["MC, K=1", "MC, K=3", "MC, K=9", "critic"] and out.read_bytes()[:4] == b"\x89PNG"
    assert rows["critic"][0] > 0.95 and rows["critic"][1] < 0.04 and rows["critic"][2] == 1 and rows["critic"][3] >= 3
    assert rows["MC, K=9"][0] > 0.5 and rows["MC, K=9"][1] < rows["MC, K=3"][1] < rows["MC, K=1"][1]


@pytest.mark.parametrize("flags, match", [
    ("--states 0", "at least 1"), ("--out no/such/folder/a.png", "folder that exists"), ("--out a.pdf", "end in .png"),
    ("--states many", "invalid int value"), ("--dataset nonsense", "unknown data set"), ("", "cannot load a model")])
def test_command_refuses(flags, match, tmp_path):
    with pytest.raises(ValueError, match=match) as error:
        vineppo.main(["--model", str(tmp_path / "absent"), *flags.split()])
    assert "\n" not in str(error.value)
