"""The engine against model.generate, fresh forwards, exact distributions and counted work."""

import copy
import functools
import gc
import io
import random
import sys
import weakref
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import rollout  # noqa: E402
from plumbing import attention, memory
from rollout import Request, Sampling, generate, top_k_top_p  # noqa: E402

VOCAB, NEVER = 97, [1 << 40]  # NEVER: stop ids that no model can write
COMMON = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
# windows of 5 tokens are shorter than the texts; the Gemmas have a full layer beside a sliding one
MODELS = {
    "llama": lambda: LlamaConfig(**COMMON),
    "qwen2": lambda: Qwen2Config(**COMMON),
    "qwen3": lambda: Qwen3Config(**COMMON, head_dim=8),
    "mistral": lambda: MistralConfig(**COMMON, sliding_window=5),
    "gemma2": lambda: Gemma2Config(
        **COMMON, head_dim=8, sliding_window=5, query_pre_attn_scalar=8, attn_logit_softcapping=2.0
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **COMMON,
        head_dim=8,
        sliding_window=5,
        query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "phi3": lambda: Phi3Config(**COMMON, sliding_window=None),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=512, eos_token_id=2
    ),
    "gpt_neox": lambda: GPTNeoXConfig(
        **{k: v for k, v in COMMON.items() if k != "num_key_value_heads"}
    ),
    "olmo2": lambda: Olmo2Config(**COMMON),
    "smollm3": lambda: SmolLM3Config(**COMMON),
    "bloom": lambda: BloomConfig(
        vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4, eos_token_id=2
    ),
    "mamba": lambda: MambaConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, eos_token_id=2
    ),
}
REFUSED = ("bloom", "mamba")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(kind="llama", **changes):
    """A random model whose weights are large enough that what it writes is varied."""
    torch.manual_seed(1)
    config = MODELS[kind]()
    config.tie_word_embeddings = kind == "qwen2"  # tied ones tend to repeat the last token
    for name, value in changes.items():
        setattr(config, name, value)
    attention = (
        "eager" if kind == "gemma2" else None
    )  # older transformers forget the soft cap elsewhere
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).float().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(0, 0.2)
    return model


@pytest.fixture(scope="module")
def llama():
    return make()


def make_prompts(count=7, longest=20, seed=0, vocab=VOCAB):
    rng = random.Random(seed)
    return [[rng.randrange(3, vocab) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def reference_greedy(model, prompt, new, stop_ids):
    tokens = torch.tensor([prompt])
    out = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        max_new_tokens=new,
        eos_token_id=stop_ids,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


@torch.no_grad()
def reference_logprobs(model, r, temperature=1.0):
    """Of a fresh forward over the whole text."""
    logits = (
        model(torch.tensor([r.prompt + r.response])).logits[0, len(r.prompt) - 1 : -1] / temperature
    )
    return logits.log_softmax(-1).gather(1, torch.tensor(r.response)[:, None])[:, 0].tolist()


def responses(groups):
    return [[r.response for r in group] for group in groups]


def consistent(groups, prompts, n, budget, stop_ids):
    """What every list of Rollouts must satisfy."""
    assert [len(group) for group in groups] == n
    for prompt, group, new in zip(prompts, groups, budget):
        for r in group:
            assert (
                r.prompt == prompt
                and 1 <= len(r.response) <= new
                and len(r.logprobs) == len(r.response)
            )
            assert all(isinstance(t, int) for t in r.response) and all(
                lp <= 1e-6 for lp in r.logprobs
            )
            assert not any(t in stop_ids for t in r.response[:-1])
            assert r.finished == (r.response[-1] in stop_ids) and (
                r.finished or len(r.response) == new
            )


# --------------------------------------------------------------------------- the same as the model


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind not in REFUSED])
def test_same_as_the_model(kind):
    model, prompts, stops = make(kind), make_prompts(), [2, 5, 7]
    greedy = generate(model, prompts, max_new_tokens=24, temperature=0, slots=3, stop_ids=stops)
    expected = [reference_greedy(model, p, 24, stops) for p in prompts]
    assert [g[0].response for g in greedy] == expected
    assert len({t for row in expected for t in row}) > 15, "the test is too easy"
    sampled = generate(
        model, prompts, n=2, max_new_tokens=24, temperature=0.7, slots=4, seed=3, stop_ids=[2]
    )
    consistent(sampled, prompts, [2] * 7, [24] * 7, {2})
    for group in [*greedy, *sampled]:
        for r in group:
            temperature = 1.0 if group in greedy else 0.7
            assert r.logprobs == pytest.approx(reference_logprobs(model, r, temperature), abs=1e-4)


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_by_name_and_served_by_hf(kind):
    model, prompts = make(kind), make_prompts(3, 6)
    prompts.append(prompts[0][:-1] + [9])  # two of one length: a batch
    with pytest.raises(ValueError, match=f'^{type(model).__name__} cannot be served.*engine="hf"'):
        generate(model, prompts)
    greedy = generate(model, prompts, max_new_tokens=8, temperature=0, stop_ids=[2, 5], engine="hf")
    assert [g[0].response for g in greedy] == [
        reference_greedy(model, p, 8, [2, 5]) for p in prompts
    ]
    stats, n, budget = {}, [1, 0, 3, 2], [8, 8, 3, 1]
    settings = dict(
        n=n, max_new_tokens=budget, temperature=0.7, engine="hf", stop_ids=[2, 5], seed=1
    )
    sampled = generate(model, prompts, stats=stats, **settings)
    consistent(sampled, prompts, n, budget, {2, 5})
    for group in sampled:
        for r in group:
            assert r.logprobs == pytest.approx(reference_logprobs(model, r, 0.7), abs=1e-4)
    assert stats["tokens_generated"] == sum(len(r.response) for g in sampled for r in g)
    assert generate(model, prompts, **settings) == sampled


def test_hf_samples_from_the_model_alone(llama):
    """Not from what its generation_config would make of it; greedy, it is the slots' text."""
    model, prompts = make(), make_prompts()
    model.generation_config.repetition_penalty = 3.0
    kept = model.generation_config
    settings = dict(n=2, max_new_tokens=9, temperature=0)
    slots, hf = (generate(model, prompts, engine=engine, **settings) for engine in ("slots", "hf"))
    assert responses(slots) == responses(hf) == responses(generate(llama, prompts, **settings))
    assert model.generation_config is kept and kept.repetition_penalty == 3.0
    for r, s in zip(sum(slots, []), sum(hf, [])):
        assert r.finished == s.finished and r.logprobs == pytest.approx(s.logprobs, abs=1e-4)


class Loner(LlamaForCausalLM):
    """Counts the tokens it is handed: the fewer, the shier. No cache can know."""

    def forward(self, input_ids=None, **kwargs):
        out = super().forward(input_ids=input_ids, **kwargs)
        out.logits = out.logits * (1 + 0.1 * input_ids.shape[1])
        return out


def test_probe(llama):
    with pytest.raises(
        ValueError, match="^Loner cannot be served by the slot engine \\(its logits differ by"
    ):
        generate(Loner(LlamaConfig(**COMMON)), [[3]])
    config = LlamaConfig(**COMMON)
    config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(ValueError, match="^LlamaForCausalLM cannot.*layers of chunked_attention"):
        generate(LlamaForCausalLM(config), [[3]])
    attention.check_servable(llama)
    assert llama in attention.SERVABLE


# --------------------------------------------------------------------------- sampling


def truncated(probs, top_k=0, top_p=1.0):
    """By sorting, as the paper has it; what is tied with the last one is kept."""
    order = sorted(range(len(probs)), key=lambda i: -probs[i])
    if top_k:
        order = [i for i in order if probs[i] >= probs[order[min(top_k, len(order)) - 1]]]
    total, mass, last = sum(probs[i] for i in order), 0.0, 0.0
    for i in order:
        if mass >= top_p * total:
            break
        mass, last = mass + probs[i], probs[i]
    kept = [p if i in order and p >= last else 0.0 for i, p in enumerate(probs)]
    return np.array(kept) / sum(kept)


def test_top_k_top_p():
    rng = np.random.default_rng(0)
    for case in range(200):
        vocab = int(rng.integers(2, 60) if case % 2 else rng.integers(60, 200))
        probs = rng.dirichlet(np.full(vocab, rng.choice([0.05, 0.3, 1.0, 20.0])), 3)
        if case % 3 == 0:  # ties
            probs = rng.integers(1, 5, (3, vocab)) / 8.0
        probs /= probs.sum(-1, keepdims=True)
        top_k, top_p = (
            int(rng.choice([0, 1, 3, 100])),
            float(rng.choice([1.0, 0.999, 0.9, 0.5, 0.013])),
        )
        got = top_k_top_p(torch.tensor(probs, dtype=torch.float32), top_k, top_p)
        got = (got / got.sum(-1, keepdim=True)).numpy()
        assert got == pytest.approx(
            np.stack([truncated(row, top_k, top_p) for row in probs]), abs=1e-5
        ), (top_k, top_p)
    one = torch.tensor([[0.0, 1.0, 0.0]])
    assert torch.equal(top_k_top_p(one, 0, 0.5), one)


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
def test_wide_and_narrow_nuclei_in_one_batch(top_p):
    """Rows whose nucleus is found among the likeliest tokens, and rows bisected: each as alone."""
    random = torch.Generator().manual_seed(0)
    scales = torch.tensor([0.1, 1, 2, 4, 8, 12])[:, None]
    probs = (scales * torch.randn(6, 1000, generator=random)).softmax(-1)
    together = top_k_top_p(probs, 0, top_p)
    alone = [top_k_top_p(probs[i : i + 1], 0, top_p)[0] for i in range(6)]
    assert torch.equal(together, torch.stack(alone))
    needed = top_p * probs.sum(-1, keepdim=True)
    bisected = probs * (probs >= rollout.bisect_nucleus(probs, needed, top_p))
    assert torch.equal(together > 0, bisected > 0)
    sizes = (together > 0).sum(-1)
    assert top_p < 0.9 or (sizes.min() < 64 < sizes.max())


def chi_square(counts, probs):
    """Beyond the 1e-4 quantile (Wilson and Hilferty 1931)? Small cells are merged."""
    cells, total = [[0.0, 0.0]], sum(counts.values())
    for outcome in sorted(probs, key=probs.get):
        if cells[-1][1] >= 5:
            cells.append([0.0, 0.0])
        cells[-1][0] += counts.get(outcome, 0)
        cells[-1][1] += total * probs[outcome]
    k = len(cells) - 1
    assert k >= 2 and sum(seen for seen, _ in cells) == total, "an impossible token was drawn"
    limit = k * (1 - 2 / (9 * k) + 3.72 * (2 / (9 * k)) ** 0.5) ** 3
    assert sum((seen - mean) ** 2 / mean for seen, mean in cells) < limit


@pytest.mark.parametrize(
    "temperature, top_p, top_k", [(1, 1, 0), (0.6, 1, 0), (0.9, 0.8, 0), (1.3, 1, 5), (1, 0.7, 6)]
)
def test_distribution(temperature, top_p, top_k):
    """The first two tokens of 3,000 responses, jointly."""
    model, prompt = make(vocab_size=11), [3, 4, 5]
    groups = generate(
        model,
        [prompt],
        n=3000,
        max_new_tokens=2,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=5,
        stop_ids=NEVER,
        slots=250,
    )
    with torch.no_grad():
        logits = (
            model(torch.tensor([prompt + [t] for t in range(11)])).logits.double() / temperature
        )
    full = logits.softmax(-1).numpy()  # (first token, time, vocabulary)
    first, second = (
        truncated(full[0, 2], top_k, top_p),
        [truncated(full[t, 3], top_k, top_p) for t in range(11)],
    )
    exact = {
        (a, b): first[a] * second[a][b]
        for a in range(11)
        for b in range(11)
        if first[a] * second[a][b]
    }
    chi_square(Counter(tuple(r.response) for r in groups[0]), exact)
    for r in groups[0][:50]:  # log-probs are those before the truncation
        a, b = r.response
        assert r.logprobs == pytest.approx([np.log(full[0, 2, a]), np.log(full[a, 3, b])], abs=1e-4)


def test_edges_of_the_uniform():
    """The smallest and the largest random number must not draw a token of probability 0."""
    logits = torch.tensor([[0.0, 5.0, 5.0, 0.0]]).expand(2, -1)
    edges = torch.tensor([0.0, 1 - 2**-24])
    token, logprob = rollout.sample(logits, edges, Sampling(1, 1, 2, 0, set()))
    assert token.tolist() == [1, 2] and logprob.tolist() == pytest.approx(
        logits.log_softmax(-1)[0, [1, 2]].tolist()
    )
    token, _ = rollout.sample(logits, edges, Sampling(1, 0.9, 0, 0, set()))
    assert token.tolist() == [1, 2]


def test_seeds_belong_to_requests(llama):
    prompts = make_prompts(6)
    settings = dict(n=3, max_new_tokens=16, stop_ids=[2])
    groups = responses(generate(llama, prompts, seed=3, slots=3, **settings))
    assert groups == responses(generate(llama, prompts, seed=3, slots=18, **settings))
    assert groups == responses(generate(llama, prompts, seed=3, **settings))
    assert groups[:2] == responses(
        generate(llama, prompts[:2], seed=3, slots=2, **settings)
    )  # whatever else is there
    assert groups != responses(generate(llama, prompts, seed=4, **settings))
    assert len({tuple(r) for r in groups[0]}) == 3  # the rollouts of one prompt differ
    torch.manual_seed(7)
    first = responses(generate(llama, prompts, **settings))
    assert first != responses(
        generate(llama, prompts, **settings)
    )  # no seed: torch's own generator decides
    torch.manual_seed(7)
    assert first == responses(generate(llama, prompts, **settings))
    assert generate(llama, prompts, seed=-1, **settings) and generate(
        llama, prompts, seed=2**70, **settings
    )


# --------------------------------------------------------------------------- shared prompts


def by_prompt(requests):
    """A forward a prompt: nothing is shared between prompts."""
    families = {}
    for request in requests:
        families.setdefault(tuple(request.prompt), []).append(request)
    return [(list(prompt), family) for prompt, family in families.items()]


def test_shared_prefixes(monkeypatch):
    text = make_prompts(1, 40, seed=8)[0] * 2
    assert text[6] != 4 and text[0] != 8
    prompts = [text[:k] for k in (9, 3, 9, len(text), 1)] + [text[:6] + [4], [8], text[:3] + [5]]
    n = [2, 1, 3, 2, 1, 2, 1, 0]
    for kind in ("llama", "gemma2", "mistral"):  # windows too
        model, shared, plain = make(kind), {}, {}
        settings = dict(n=n, max_new_tokens=12, seed=1, slots=4, stop_ids=[2])
        together = generate(model, prompts, stats=shared, **settings)
        with monkeypatch.context() as patch:
            patch.setattr(rollout, "plan", by_prompt)
            apart = generate(model, prompts, stats=plain, **settings)
        assert responses(together) == responses(apart)
        for r, s in zip(sum(together, []), sum(apart, [])):
            assert r.logprobs == pytest.approx(s.logprobs, abs=1e-5)
        asked = {tuple(p) for p, k in zip(prompts, n) if k}
        assert plain["tokens_prefilled"] == sum(len(p) - 1 for p in asked)
        assert (
            shared["tokens_prefilled"] == (len(text) - 1) + 6 + 0
        )  # the text, its branch, and [8]


def test_plan():
    rng = random.Random(0)
    for _ in range(50):
        prompts = [[rng.randrange(2) for _ in range(rng.randint(1, 6))] for _ in range(12)]
        requests = [Request(number, prompt, 1) for number, prompt in enumerate(prompts)]
        trunks = rollout.plan(requests)
        assert sorted(r.number for _, family in trunks for r in family) == list(range(12))
        assert all(trunk[: len(r.prompt)] == r.prompt for trunk, family in trunks for r in family)
        shorter = [(p, q) for p in prompts for q in prompts if q[: len(p)] == p and q != p]
        leaves = {tuple(p) for p in prompts} - {tuple(p) for p, _ in shorter}
        assert len(trunks) == len(leaves)  # no forward that could be spared
        lengths = [len(trunk) for trunk, _ in trunks]
        assert lengths == sorted(lengths, reverse=True)


def test_eight_states_of_a_response(llama):
    """VinePPO's batch: an eighth of the naive prefill at most."""
    prompts = [
        p + r[: 8 * s]
        for p, r in zip(make_prompts(3), make_prompts(3, 64, seed=1))
        for s in range(8)
    ]
    stats = {}
    generate(llama, prompts, n=9, max_new_tokens=2, stats=stats)
    assert stats["tokens_prefilled"] * 8 <= 9 * sum(map(len, prompts))


# --------------------------------------------------------------------------- budgets and ends


def test_n_and_budget_per_prompt(llama):
    prompts, n, budget = make_prompts(5), [2, 0, 1, 4, 3], [7, 5, 1, 12, 3]
    groups = generate(llama, prompts, n=n, max_new_tokens=budget, stop_ids=[2, 5], slots=3)
    consistent(groups, prompts, n, budget, {2, 5})
    groups = generate(llama, prompts, n=np.array(n), max_new_tokens=np.int64(6), stop_ids=NEVER)
    assert [[len(r.response) for r in g] for g in groups] == [[6] * k for k in n] and not groups[0][
        0
    ].finished
    assert generate(llama, [], n=3) == [] and generate(llama, prompts, n=0) == [[]] * 5


def test_small_cases(llama):
    """Prompts of one token, budgets of one token, the same prompt again and again."""
    prompts = [[5], [5], [9], [5, 6], [5]]
    groups = generate(
        llama, prompts, n=2, max_new_tokens=[3, 1, 1, 4, 3], temperature=0, slots=2, stop_ids=NEVER
    )
    for prompt, group, new in zip(prompts, groups, [3, 1, 1, 4, 3]):
        assert responses([group]) == [[reference_greedy(llama, prompt, new, NEVER)] * 2]
    stats = {}
    groups = generate(llama, [[5]] * 3, n=4, max_new_tokens=5, seed=0, stop_ids=[2], stats=stats)
    assert (
        stats["tokens_prefilled"] == 0 and len({tuple(r.response) for g in groups for r in g}) > 8
    )
    # A token that ends it at once, and the model's own end where none is given.
    first = reference_greedy(llama, [5, 6], 1, NEVER)
    ((r,),) = generate(llama, [[5, 6]], max_new_tokens=9, temperature=0, stop_ids=first)
    assert r.response == first and r.finished
    ((r,),) = generate(llama, [[5, 6]], max_new_tokens=1, temperature=0, stop_ids=first)
    assert r.finished  # with the last token allowed
    model = make()
    model.generation_config.eos_token_id = [first[0], 3]
    ((r,),) = generate(model, [[5, 6]], max_new_tokens=9, temperature=0)
    assert r.response == first and r.finished
    model.generation_config.eos_token_id = first[0]
    ((s,),) = generate(model, [[5, 6]], max_new_tokens=9, temperature=0)
    assert r == s


def test_counters(llama):
    prompts, budget = (
        make_prompts(40),
        np.minimum(np.random.default_rng(0).geometric(1 / 15, 40), 45).tolist(),
    )
    stats = dict(tokens_generated=1000, mine=3)
    generate(llama, prompts, max_new_tokens=budget, stop_ids=NEVER, slots=8, stats=stats)
    assert (
        stats["tokens_generated"] == 1000 + sum(budget)
        and stats["mine"] == 3
        and stats["slots"] == 8
    )
    assert stats["slot_steps"] == sum(budget)  # on a CPU no row is computed in vain
    assert stats["steps"] >= sum(budget) / 8


@pytest.fixture
def coarse(monkeypatch):
    """The steps of a GPU, on this CPU: a few sizes, and a look at who is done every 8 steps."""
    plain = rollout.Engine.__init__

    def init(self, model, place, slots, columns, max_new):
        plain(self, model, place, slots, columns, max_new)
        self.widths, self.depths, self.check_every = (
            (slots // 8, slots // 4, slots // 2, slots),
            (32, columns),
            8,
        )

    monkeypatch.setattr(rollout.Engine, "__init__", init)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2"])
def test_coarse_steps(kind, request):
    prompts, stats, n = make_prompts(30, 25), {}, 2
    budget = np.minimum(np.random.default_rng(0).geometric(1 / 40, 30), 120).tolist()
    settings = dict(n=n, max_new_tokens=budget, seed=1, slots=16, stop_ids=[2])
    expected = generate(make(kind), prompts, **settings)
    request.getfixturevalue("coarse")
    model = make(kind)
    got = generate(model, prompts, stats=stats, **settings)
    assert responses(got) == responses(expected)
    assert stats["tokens_generated"] == sum(len(r.response) for g in got for r in g)
    few = generate(
        model, prompts[:3], max_new_tokens=9, temperature=0, slots=13, stop_ids=[2]
    )  # free slots decode on
    assert [r.response for (r,) in few] == [reference_greedy(model, p, 9, [2]) for p in prompts[:3]]


def test_free_slots_stay_sane(coarse):
    """A free slot left behind `used` by its sliding window would attend to nothing: NaN."""
    model = make("mistral")
    done_early = [[5]] * 15 + [[4] * 60], [24] * 15 + [1]
    moved = (
        [[4] * 3] * 8 + [[5]] * 8,
        [48] * 8 + [90] * 8,
    )  # into the holes, the others' slots left at length 48
    for prompts, budget in (done_early, moved):
        generate(model, prompts, max_new_tokens=budget, slots=16, stop_ids=NEVER)
        generate(model, [[5]] * 9, max_new_tokens=4, slots=16, stop_ids=NEVER)
        engine = rollout.ENGINES[model]
        assert not any(
            table.isnan().any() for pair in engine.cache.tables.values() for table in pair
        )
        assert not engine.live.any() and not engine.length.any()


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind not in REFUSED])
@pytest.mark.parametrize("temperature", [0, 0.7])
def test_a_step_reads_nothing_back(kind, temperature, monkeypatch):
    """What a CUDA graph demands. Fake tensors hold no numbers: looking at one would raise."""
    monkeypatch.setattr(rollout, "least_of_nucleus", rollout.bisect_nucleus)  # as on CUDA
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = AutoModelForCausalLM.from_config(MODELS[kind]())
        engine = rollout.Engine(model, None, 8, 128, 64)
        with rollout.serving(model, engine.cache):
            for width, used in ((8, 64), (2, 128)):
                engine.step(
                    width, used, torch.tensor([2, 5]), Sampling(temperature, 0.9, 5, 0, set())
                )


def test_live_share_with_coarse_steps(coarse):
    """Skewed lengths: 90 % of slot-steps hold a live row, though the host rarely looks."""
    budget, stats = np.minimum(np.random.default_rng(0).geometric(3 / 200, 300), 200).tolist(), {}
    generate(
        make(num_hidden_layers=1),
        [[5]] * 300,
        max_new_tokens=budget,
        stop_ids=NEVER,
        slots=32,
        stats=stats,
    )
    assert stats["tokens_generated"] >= 0.9 * stats["slot_steps"]


# --------------------------------------------------------------------------- memory and failures


def test_memory_does_not_grow_with_requests(monkeypatch):
    model, sizes = make(), []
    prefill = rollout.prefill

    def watched(model, cache, prompts):
        prefill(model, cache, prompts)
        numbers = sum(x.numel() for pair in cache.prefilled.values() for x in pair)
        sizes.append((len(prompts) * max(map(len, prompts)), numbers))

    monkeypatch.setattr(rollout, "prefill", watched)
    tables = []
    for count in (6, 400):
        prompts = [[3 + i % 90] * 20 + [3 + i // 90] for i in range(count)]
        generate(model, prompts, max_new_tokens=2, slots=4)
        engine = rollout.ENGINES[model]
        tables.append(
            [x.shape for part in (*engine.cache.tables.values(), engine.state) for x in part]
        )
        assert engine.cache.prefilled == {}
    assert tables[0] == tables[1] and all(shape[0] == 4 for shape in tables[0])
    assert max(sizes) <= (
        4 * 20,
        2 * 2 * 4 * 20 * 2 * 8,
    )  # four prompts at a time: layers, K and V, and so on
    sizes.clear()
    generate(
        model, [[3 + i % 90] * 200 + [3 + i // 90] for i in range(200)], max_new_tokens=1, slots=200
    )
    assert max(sizes)[0] <= 4096


def test_engine_is_kept_and_freed():
    model = make()
    generate(model, make_prompts(4), n=4, max_new_tokens=20)
    engine = rollout.ENGINES[model]
    generate(
        model, make_prompts(2), n=2, max_new_tokens=7, slots=3
    )  # a smaller job runs in the table that is there
    assert rollout.ENGINES[model] is engine
    generate(model, make_prompts(2), n=2, max_new_tokens=100)
    assert rollout.ENGINES[model] is not engine
    engine = rollout.ENGINES[model]
    model.lm_head.weight.data = (
        model.lm_head.weight.data.clone()
    )  # weights that moved: a graph would read the old ones
    generate(model, make_prompts(2), n=2, max_new_tokens=100)
    assert rollout.ENGINES[model] is not engine
    model.bfloat16()
    generate(model, make_prompts(2), n=2, max_new_tokens=5)  # another dtype
    generate(model, make_prompts(2), n=2, max_new_tokens=5, dtype=torch.float32)
    gone, before = weakref.ref(model), len(rollout.ENGINES)
    del model, engine
    gc.collect()
    assert gone() is None and len(rollout.ENGINES) == before - 2  # the model's and its copy's


def test_stale_rows():
    """A table full of other texts' keys changes nothing."""
    prompts = make_prompts(9, 6, seed=2)
    settings = dict(max_new_tokens=8, temperature=0, slots=4, stop_ids=[2])
    fresh = generate(make(), prompts, **settings)
    model = make()
    generate(model, make_prompts(9, 60, seed=3), n=2, max_new_tokens=60, slots=4, stop_ids=NEVER)
    assert responses(generate(model, prompts, **settings)) == responses(fresh)


def test_choose_slots(llama, monkeypatch):
    assert memory.choose_slots(llama, 128, 10) == 10
    assert memory.choose_slots(llama, 128, 10**6) == 256
    model = make()

    def meminfo(text):
        monkeypatch.setattr(memory, "open", lambda path: io.StringIO(text), raising=False)

    meminfo("MemTotal: 4096 kB\nMemAvailable: 1024 kB\n")
    row = 2 * 2 * 2 * 8 * 128 * 4 + 16 * VOCAB
    assert memory.choose_slots(model, 128, 10**6) == (1 << 19) // row
    stats = {}
    generate(model, make_prompts(60), n=2, max_new_tokens=100, stats=stats)
    again = {}
    generate(model, make_prompts(60), n=2, max_new_tokens=100, stats=again)
    assert 1 < stats["slots"] <= again["slots"] < 100  # what the engine holds counts as free
    assert memory.choose_slots(model, 128, 10**6, rollout.ENGINES[model].cache) > (1 << 19) // row
    meminfo("MemAvailable: 0 kB\n")
    assert memory.choose_slots(make(), 128, 10) == 1
    meminfo("")  # nobody says
    assert memory.choose_slots(model, 128, 10**6) == 256


def fail(monkeypatch, when, error):
    """Let the decode step raise `error` wherever `when(rows, steps so far)`."""
    plain, steps = rollout.decode, []

    def decode(model, cache, tokens):
        steps.append(len(tokens))
        if when(len(tokens), len(steps)):
            raise error
        return plain(model, cache, tokens)

    monkeypatch.setattr(rollout, "decode", decode)


def test_out_of_memory_halves_the_slots(monkeypatch, llama):
    prompts = make_prompts(8)
    attention.check_servable(llama)
    settings = dict(n=3, max_new_tokens=[2, 20, 3, 20, 20, 1, 20, 20], seed=1, stop_ids=[2])
    expected = generate(llama, prompts, slots=24, **settings)
    for error in (
        torch.OutOfMemoryError("no"),
        MemoryError(),
        RuntimeError("CPUAllocator: can't allocate memory"),
    ):
        with monkeypatch.context() as patch:
            fail(
                patch, lambda rows, steps: rows > 6 and steps > 10 or rows > 12, error
            )  # at once, and in the middle
            stats = {}
            with pytest.warns(
                UserWarning, match="out of memory: going on with (12|6) slots"
            ) as record:
                got = generate(llama, prompts, slots=24, stats=stats, **settings)
            ours = [w for w in record if "out of memory" in str(w.message)]
            assert len(ours) == 2 and stats["slots"] == 6
            assert responses(got) == responses(expected)
            assert stats["tokens_generated"] == sum(len(r.response) for g in got for r in g)
    with monkeypatch.context() as patch:
        fail(patch, lambda rows, steps: True, torch.OutOfMemoryError("none at all"))
        with pytest.warns(UserWarning), pytest.raises(torch.OutOfMemoryError):
            generate(llama, prompts, slots=2, **settings)
    assert responses(generate(llama, prompts, slots=24, **settings)) == responses(expected)


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()], ids=repr)
def test_everything_is_put_back(monkeypatch, error):
    model = make()
    model.train()
    model.model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    kept, implementation = model.generation_config, model.config._attn_implementation

    def unchanged():
        return (
            modes == [m.training for m in model.modules()]
            and model.config._attn_implementation == implementation
            and model.generation_config is kept
            and attention.ACTIVE is None
            and torch.is_grad_enabled()
            and not torch.is_inference_mode_enabled()
        )

    expected = generate(model, make_prompts(), max_new_tokens=6, seed=0, slots=3)
    assert unchanged()
    generate(model, make_prompts(), max_new_tokens=2, engine="hf")
    assert unchanged()
    with monkeypatch.context() as patch:
        fail(patch, lambda rows, steps: steps > 3, error)
        with pytest.raises(type(error)):
            generate(model, make_prompts(), max_new_tokens=6, seed=0, slots=3)
    assert unchanged()
    with monkeypatch.context() as patch:
        patch.setattr(model, "generate", lambda *a, **k: (_ for _ in ()).throw(error))
        with pytest.raises(type(error)):
            generate(model, make_prompts(), engine="hf")
    assert unchanged()
    with monkeypatch.context() as patch:
        patch.setattr(rollout, "prefill", lambda *a: (_ for _ in ()).throw(ValueError("odd")))
        with pytest.raises(ValueError, match="odd"):
            generate(make().train(), make_prompts())
    assert generate(model, make_prompts(), max_new_tokens=6, seed=0, slots=3) == expected
    loss = model(torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 5]])).loss
    loss.backward()  # its weights are no inference tensors, and train on


def test_inside_inference_mode():
    """A call under inference_mode leaves nothing that a later call could not use."""
    model = make()
    settings = dict(max_new_tokens=5, temperature=0)
    with torch.inference_mode():
        inner = [
            generate(model, make_prompts(), dtype=d, **settings) for d in (None, torch.bfloat16)
        ]
    assert inner == [
        generate(model, make_prompts(), dtype=d, **settings) for d in (None, torch.bfloat16)
    ]


@pytest.mark.parametrize("rows", [1, 4, 5, 20, 47, 48])
@pytest.mark.parametrize("bias", [False, True])
def test_few_rows_times_a_large_matrix(rows, bias):
    torch.manual_seed(0)
    layer = torch.nn.Linear(512, 512, bias=bias)
    assert attention.is_large(layer) and not attention.is_large(torch.nn.Linear(64, 64))
    x = torch.randn(rows, 1, 512)
    torch.testing.assert_close(attention.few_rows(layer, x), layer(x), atol=1e-5, rtol=1e-5)
    prompt = torch.randn(2, 7, 512)
    assert torch.equal(attention.few_rows(layer, prompt), layer(prompt))


def test_large_layers_are_their_own_again_after_generation():
    wide = {"hidden_size": 512, "intermediate_size": 512, "num_key_value_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**COMMON | wide)).eval()
    large = [module for module in model.modules() if attention.is_large(module)]
    large[0].forward = wrapper = functools.partial(torch.nn.Linear.forward, large[0])
    assert len(large) > 4 and not attention.is_large(large[0])
    prompts = [[3, 4, 5 + i] for i in range(8)]  # 8 rows: of few enough
    settings = {"max_new_tokens": 6, "temperature": 0, "stop_ids": [1]}
    ours = generate(model, prompts, **settings)
    theirs = generate(model, prompts, engine="hf", **settings)
    assert [g[0].response for g in ours] == [g[0].response for g in theirs]
    assert large[0].forward is wrapper
    assert not any("forward" in vars(layer) for layer in large[1:])


def test_low_precision_copy():
    model = make()
    settings = dict(max_new_tokens=10, temperature=0, stop_ids=NEVER)
    prompts = make_prompts()
    before = generate(model, prompts, dtype=torch.bfloat16, **settings)
    twin = attention.COPIES[model]
    assert before == generate(copy.deepcopy(twin), prompts, **settings)
    assert {p.dtype for p in model.parameters()} == {torch.float32} and twin.dtype == torch.bfloat16
    assert (
        twin.model.rotary_emb.inv_freq.dtype == torch.float32
    )  # in bfloat16 positions past 256 would be mush
    assert not any(p.requires_grad for p in twin.parameters())
    for (r,) in before:
        assert r.logprobs == pytest.approx(reference_logprobs(model, r), abs=0.5)
    with torch.no_grad():
        for p in model.parameters():  # a training step
            p.add_(0.1 * torch.randn_like(p))
    after = generate(model, prompts, dtype=torch.bfloat16, **settings)
    assert attention.COPIES[model] is twin and after != before
    other = make()
    other.load_state_dict(model.state_dict())
    assert after == generate(other, prompts, dtype=torch.bfloat16, **settings)
    assert generate(model, prompts, dtype=torch.float32, **settings) == generate(
        model, prompts, **settings
    )
    hf = generate(model, prompts[:2], dtype=torch.bfloat16, engine="hf", **settings)
    assert len(hf) == 2 and attention.COPIES[model] is twin


def test_progress_bar(llama, capsys):
    generate(llama, make_prompts(), n=2, max_new_tokens=3, progress=True)
    assert "rollouts" in capsys.readouterr().err
    generate(llama, make_prompts(), n=2, max_new_tokens=3)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "prompts, changes, message",
    [
        ([[3], []], {}, "prompt 1 is empty"),
        ([[3, 97]], {}, "prompt 0 has token ids from 3 to 97, the model only 0 to 96"),
        ([[-1, 5]], {}, "prompt 0 has token ids from -1"),
        ([[3]], dict(max_new_tokens=0), "prompt 0: max_new_tokens=0 must be at least 1"),
        ([[3], [3]], dict(n=[1, -1]), "prompt 1: .*n=-1 at least 0"),
        (
            [[3], [3] * 500],
            dict(max_new_tokens=13),
            "prompt 1 is 500 tokens: with max_new_tokens=13 .* the model's 512",
        ),
        ([[3]], dict(n=[1, 2]), "1 prompts, 2 n, 1 max_new_tokens"),
        ([[3]], dict(max_new_tokens=[4, 5]), "1 prompts, 1 n, 2 max_new_tokens"),
        ([[3]], dict(temperature=-0.1), "temperature=-0.1"),
        ([[3]], dict(temperature=float("nan")), "temperature=nan"),
        ([[3]], dict(top_p=0), "top_p=0, .*need"),
        ([[3]], dict(top_p=1.1), "top_p=1.1"),
        ([[3]], dict(top_k=-1), "top_k=-1"),
        ([[3]], dict(slots=0), "slots=0"),
        ([[3]], dict(stop_ids=[]), "no stop token: pass stop_ids"),
        ([[3]], dict(engine="vllm"), "unknown engine 'vllm'"),
    ],
)
def test_bad_arguments(llama, prompts, changes, message):
    with pytest.raises(ValueError, match=message) as info:
        generate(llama, prompts, **changes)
    assert "\n" not in str(info.value)


def test_limits_of_the_model():
    generate(make(), [[3] * 500], max_new_tokens=12)  # to the last position
    config = Phi3Config(
        **COMMON,
        original_max_position_embeddings=64,
        rope_scaling=dict(type="longrope", short_factor=[1.0] * 4, long_factor=[2.0] * 4),
    )
    with pytest.raises(ValueError, match="passes the model's 64 positions"):
        generate(AutoModelForCausalLM.from_config(config), [[3] * 40], max_new_tokens=30)
    model = make()
    model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="no stop token"):
        generate(model, [[3]])


@pytest.mark.parametrize("temperature", [0, 1])
def test_weights_gone_bad(temperature):
    model = make()
    generate(model, make_prompts(), max_new_tokens=5)
    good = model.model.layers[0].mlp.up_proj.weight.clone()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="logits are not finite"):
        generate(model, make_prompts(), max_new_tokens=5, temperature=temperature)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.copy_(good)
    assert generate(model, make_prompts(), max_new_tokens=5, temperature=0) == generate(
        make(), make_prompts(), max_new_tokens=5, temperature=0
    )  # and no NaN is left in the table


# --------------------------------------------------------------------------- stop texts and graphs


def letters(ids):
    """A tokenizer's decode: 3 is a, 4 is b, ... and 90 is 'ab.\\n', 91 '\\nQ'."""
    pieces = {90: "ab.\n", 91: "\nQ"}
    return "".join(pieces.get(i, chr(94 + i) if 3 <= i <= 28 else "_") for i in ids)


@pytest.mark.parametrize(
    "tokens, found",
    [
        ([3, 4, 5], None),
        ([3, 4, 5, 6, 7], (2, 4)),  # ab|cd|e
        ([5, 6], (0, 2)),
        ([3, 4, 5, 6, 5, 6], (2, 4)),  # the first time counts
    ],
)
def test_stop_text_is_found(tokens, found):
    assert rollout.StopText([2], "cd", letters).find(tokens) == found


def test_stop_text_may_lie_across_tokens():
    stop = rollout.StopText([2], "\n\nQ", letters)
    assert stop.find([3, 90, 91, 5]) == (1, 3)  # a|ab.\n|\nQ|c: the token in which it starts goes


@pytest.mark.parametrize("engine", ["slots", "hf", "coarse"])
def test_stop_text_ends_responses(llama, engine, request):
    """What is written up to the stop is what is written without one."""
    if engine == "coarse":
        request.getfixturevalue("coarse")
    model, prompts = make(), make_prompts(12)
    settings = {"n": 3, "max_new_tokens": 40, "engine": "hf" if engine == "hf" else "slots"}
    settings |= {"temperature": 0.8, "slots": 8, "seed": 2}
    if engine == "hf":
        settings |= {"temperature": 0, "n": 1}
    plain = generate(model, prompts, stop_ids=[2], **settings)
    texts = [letters(r.response) for group in plain for r in group]
    pairs = Counter(text[i : i + 2] for text in texts for i in range(len(text) - 1))
    ((pair, _),) = Counter({p: c for p, c in pairs.items() if "_" not in p}).most_common(1)
    got = generate(model, prompts, stop_ids=rollout.StopText([2], pair, letters), **settings)
    stopped = 0
    for r, s in zip(sum(plain, []), sum(got, [])):
        assert r.response[: len(s.response)] == s.response and len(s.response) == len(s.logprobs)
        before, there, _ = letters(r.response).partition(pair)
        if there:
            stopped += 1
            assert s.finished and letters(s.written()) == before
            assert pair in letters(s.response) and pair not in letters(s.response[:-1])
        else:
            assert (s.response, s.finished) == (r.response, r.finished)
    assert stopped > (0 if engine == "hf" else 5)


@pytest.mark.parametrize("error", [RuntimeError("Cannot copy"), torch.OutOfMemoryError("full")])
def test_a_step_that_cannot_be_captured_runs_eagerly(monkeypatch, error):
    model = make()
    settings = {"max_new_tokens": 9, "seed": 1, "slots": 4, "stop_ids": [2]}
    expected = generate(model, make_prompts(), **settings)
    rollout.ENGINES.pop(model)
    sizes = attention.step_sizes

    def with_graphs(*given):
        return *sizes(*given)[:3], {}

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(attention, "step_sizes", with_graphs)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", fail)
    with pytest.warns(UserWarning, match="no CUDA graph, so decoding is slower"):
        assert generate(model, make_prompts(), **settings) == expected


def test_the_second_card_is_the_current_one_while_it_serves(monkeypatch, llama):
    """A graph is captured on the current device, and `--device cuda:1` is not the first."""
    entered = []

    class Device:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            entered.append(self.device)

        def __exit__(self, *args):
            entered.append("left")

    monkeypatch.setattr(torch.cuda, "device", Device)
    second = torch.device("cuda:1")
    monkeypatch.setattr(type(llama), "device", property(lambda self: second))
    with rollout.serving(llama):
        assert entered == [second]
    assert entered == [second, "left"]
