"""The engine against model.generate, fresh forwards, exact distributions and counted work."""

import contextlib
import copy
import gc
import io
import random
import weakref
from collections import Counter
from unittest import mock

import numpy as np
import pytest
import torch
import transformers as hf
from card import Card
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

import rollout
from plumbing import attention, graphs, memory, nucleus, slots
from rollout import Engine, Request, Sampling, StopText, generate, top_k_top_p

VOCAB, NEVER = 97, [1 << 40]  # NEVER: stop ids that no model can write
COMMON = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
COMMON |= dict(num_attention_heads=4, max_position_embeddings=512)
COMMON |= dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
GROUPED = COMMON | {"num_key_value_heads": 2}
SMALL = dict(vocab_size=VOCAB, n_layer=2, n_head=4, eos_token_id=2)
GEMMA = GROUPED | dict(head_dim=8, sliding_window=5, query_pre_attn_scalar=8)
# windows of 5 tokens are shorter than the texts; the Gemmas have a full layer beside a sliding one
LAYERS = ["sliding_attention", "full_attention"]
MODELS = {
    "llama": lambda: hf.LlamaConfig(**GROUPED),
    "qwen2": lambda: hf.Qwen2Config(**GROUPED),
    "qwen3": lambda: hf.Qwen3Config(**GROUPED, head_dim=8),
    "mistral": lambda: hf.MistralConfig(**GROUPED, sliding_window=5),
    "gemma2": lambda: hf.Gemma2Config(**GEMMA, attn_logit_softcapping=2.0),
    "gemma3": lambda: hf.Gemma3TextConfig(**GEMMA, layer_types=LAYERS),
    "phi3": lambda: hf.Phi3Config(**GROUPED, sliding_window=None),
    "gpt2": lambda: hf.GPT2Config(**SMALL, n_embd=32, n_positions=512, bos_token_id=1),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**COMMON),
    "olmo2": lambda: hf.Olmo2Config(**GROUPED),
    "smollm3": lambda: hf.SmolLM3Config(**GROUPED),
}


def make(kind="llama", **changes):
    """A random model whose weights are large enough that what it writes is varied."""
    torch.manual_seed(1)
    config = MODELS[kind]()
    config.tie_word_embeddings = kind == "qwen2"  # tied ones tend to repeat the last token
    for name, value in changes.items():
        setattr(config, name, value)
    # older transformers forget the soft cap elsewhere
    how = {"attn_implementation": "eager"} if kind == "gemma2" else {}
    model = hf.AutoModelForCausalLM.from_config(config, **how).float().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(0, 0.2)
    return model


@pytest.fixture(scope="module")
def llama():
    return make()


def make_prompts(count=7, longest=20, seed=0):
    rng = random.Random(seed)
    lengths = [rng.randint(1, longest) for _ in range(count)]
    return [[rng.randrange(3, VOCAB) for _ in range(length)] for length in lengths]


def geometric(count, mean, longest):
    return np.minimum(np.random.default_rng(0).geometric(1 / mean, count), longest).tolist()


def reference_greedy(model, prompt, new, stop_ids):
    tokens = torch.tensor([prompt])
    how = {"do_sample": False, "eos_token_id": stop_ids, "pad_token_id": 0}
    mask = torch.ones_like(tokens)
    out = model.generate(tokens, attention_mask=mask, max_new_tokens=new, **how)
    return out[0, len(prompt) :].tolist()


@torch.no_grad()
def reference_logprobs(model, r, temperature=1.0):
    """Of a fresh forward over the whole text."""
    logits = model(torch.tensor([r.prompt + r.response])).logits[0, len(r.prompt) - 1 : -1]
    logprobs = (logits / temperature).log_softmax(-1)
    return logprobs.gather(1, torch.tensor(r.response)[:, None])[:, 0].tolist()


def flat(groups):
    return [r for group in groups for r in group]


def responses(groups):
    return [[r.response for r in group] for group in groups]


def consistent(groups, prompts, n, budget, stop_ids):
    """What every list of Rollouts must satisfy."""
    assert [len(group) for group in groups] == n
    for prompt, group, new in zip(prompts, groups, budget):
        for r in group:
            assert r.prompt == prompt and 1 <= len(r.response) <= new
            assert len(r.logprobs) == len(r.response) and max(r.logprobs) <= 1e-6
            assert all(isinstance(t, int) for t in r.response)
            assert not any(t in stop_ids for t in r.response[:-1])
            assert r.finished == (r.response[-1] in stop_ids)
            assert r.finished or len(r.response) == new


# --------------------------------------------------------------------------- the same as the model


@pytest.mark.parametrize("kind", MODELS)
def test_same_as_the_model(kind):
    model, prompts, stops = make(kind), make_prompts(), [2, 5, 7]
    greedy = generate(model, prompts, max_new_tokens=24, temperature=0, slots=3, stop_ids=stops)
    expected = [reference_greedy(model, p, 24, stops) for p in prompts]
    assert [g[0].response for g in greedy] == expected
    assert len({t for row in expected for t in row}) > 15, "the test is too easy"
    how = {"n": 2, "max_new_tokens": 24, "temperature": 0.7, "seed": 3, "stop_ids": [2]}
    sampled = generate(model, prompts, slots=4, **how)
    consistent(sampled, prompts, [2] * 7, [24] * 7, {2})
    for groups, temperature in ((greedy, 1.0), (sampled, 0.7)):
        for r in flat(groups):
            assert r.logprobs == pytest.approx(reference_logprobs(model, r, temperature), abs=1e-4)


MAMBA = hf.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2)


class Loner(hf.LlamaForCausalLM):
    """Counts the tokens it is handed: the fewer, the shier. No cache can know."""

    def forward(self, input_ids=None, **kwargs):
        out = super().forward(input_ids=input_ids, **kwargs)
        out.logits = out.logits * (1 + 0.1 * input_ids.shape[1])
        return out


def chunked():
    config = hf.LlamaConfig(**COMMON)
    config.layer_types = ["full_attention", "chunked_attention"]
    return hf.LlamaForCausalLM(config)


@pytest.mark.parametrize(
    "model, reason",
    [
        (lambda: hf.BloomForCausalLM(hf.BloomConfig(**SMALL)), "BloomForCausalLM cannot be served"),
        (lambda: hf.MambaForCausalLM(MAMBA), "MambaForCausalLM cannot be served"),
        (chunked, "LlamaForCausalLM cannot be served .layers of chunked_attention"),
        (lambda: Loner(hf.LlamaConfig(**COMMON)), "Loner cannot be served .its logits differ by"),
    ],
    ids=["bloom", "mamba", "chunked", "loner"],
)
def test_refused_by_name(model, reason):
    with pytest.raises(ValueError, match=f"^{reason}.*such as Llama, Qwen") as info:
        generate(model(), [[3]])
    assert "\n" not in str(info.value)


def test_out_of_memory_says_nothing_of_the_model(llama, monkeypatch):
    full = torch.OutOfMemoryError("full")
    monkeypatch.setattr(attention, "probe", lambda *a: (_ for _ in ()).throw(full))
    with pytest.raises(torch.OutOfMemoryError):
        Engine(llama)


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


def as_on_cuda(probs, top_p):
    """The nucleus that a graph can compute."""
    return nucleus.nucleus_by_histogram(probs, (1 - top_p) * probs.sum(-1, keepdim=True))


@pytest.mark.parametrize("nucleus_of", [rollout.least_of_nucleus, as_on_cuda])
def test_top_k_top_p(nucleus_of, monkeypatch):
    monkeypatch.setattr(rollout, "least_of_nucleus", nucleus_of)
    rng = np.random.default_rng(0)
    for case in range(200):
        vocab = int(rng.integers(2, 60) if case % 2 else rng.integers(60, 200))
        # wide and narrow ones in a batch: their nuclei are found in different ways
        alphas = rng.choice([0.05, 0.3, 1.0, 20.0], 3)
        probs = np.stack([rng.dirichlet(np.full(vocab, alpha)) for alpha in alphas])
        if case % 3 == 0:  # ties
            probs = rng.integers(1, 5, (3, vocab)) / 8.0
        probs /= probs.sum(-1, keepdims=True)
        top_k = int(rng.choice([0, 1, 3, 100]))
        top_p = float(rng.choice([1.0, 0.999, 0.9, 0.5, 0.013]))
        got = top_k_top_p(torch.tensor(probs, dtype=torch.float32), top_k, top_p)
        got = (got / got.sum(-1, keepdim=True)).numpy()
        expected = np.stack([truncated(row, top_k, top_p) for row in probs])
        assert got == pytest.approx(expected, abs=1e-5), (top_k, top_p)
    one = torch.tensor([[0.0, 1.0, 0.0]])
    assert torch.equal(top_k_top_p(one, 0, 0.5), one)


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
    how = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "slots": 250, "seed": 5}
    groups = generate(model, [prompt], n=3000, max_new_tokens=2, stop_ids=NEVER, **how)
    with torch.no_grad():
        logits = model(torch.tensor([prompt + [t] for t in range(11)])).logits.double()
    full = (logits / temperature).softmax(-1).numpy()  # (first token, time, vocabulary)
    first = truncated(full[0, 2], top_k, top_p)
    exact = {}
    for a in range(11):
        second = truncated(full[a, 3], top_k, top_p)
        exact |= {(a, b): first[a] * second[b] for b in range(11) if first[a] * second[b]}
    chi_square(Counter(tuple(r.response) for r in groups[0]), exact)
    for r in groups[0][:50]:  # log-probs are those before the truncation
        a, b = r.response
        assert r.logprobs == pytest.approx([np.log(full[0, 2, a]), np.log(full[a, 3, b])], abs=1e-4)


def test_edges_of_the_uniform():
    """The smallest and the largest random number must not draw a token of probability 0."""
    logits = torch.tensor([[0.0, 5.0, 5.0, 0.0]]).expand(2, -1)
    edges = torch.tensor([[0.0], [1 - 2**-24]])
    token, logprob = rollout.draw_tokens(logits, edges, Sampling(1, 1, 2, set()))
    assert token.tolist() == [[1], [2]]
    assert torch.allclose(logprob, logits.log_softmax(-1)[0, 1])
    token, _ = rollout.draw_tokens(logits, edges, Sampling(1, 0.9, 0, set()))
    assert token.tolist() == [[1], [2]]


def test_seeds_belong_to_requests(llama):
    prompts = make_prompts(6)
    settings = dict(n=3, max_new_tokens=16, stop_ids=[2])
    groups = responses(generate(llama, prompts, seed=3, slots=3, **settings))
    assert groups == responses(generate(llama, prompts, seed=3, slots=18, **settings))
    assert groups == responses(generate(llama, prompts, seed=3, **settings))
    # whatever else is there
    assert groups[:2] == responses(generate(llama, prompts[:2], seed=3, slots=2, **settings))
    assert groups != responses(generate(llama, prompts, seed=4, **settings))
    assert len({tuple(r) for r in groups[0]}) == 3  # the rollouts of one prompt differ
    torch.manual_seed(7)  # no seed: torch's own generator decides
    first = responses(generate(llama, prompts, **settings))
    assert first != responses(generate(llama, prompts, **settings))
    torch.manual_seed(7)
    assert first == responses(generate(llama, prompts, **settings))
    for seed in (-1, 2**70):
        assert generate(llama, prompts, seed=seed, **settings)
    assert rollout.seed_of(1, 2) != rollout.seed_of(2, 1) and rollout.seed_of(0) < 1 << 62


# --------------------------------------------------------------------------- shared prompts


def by_prompt(requests):
    """A forward a prompt: nothing is shared between prompts."""
    families = {}
    for request in requests:
        families.setdefault(tuple(request.prompt), []).append(request)
    return [(list(prompt), family) for prompt, family in families.items()]


@pytest.mark.parametrize("kind", ["llama", "gemma2", "mistral"])  # windows too
def test_shared_prefixes(kind, monkeypatch):
    text = make_prompts(1, 40, seed=8)[0] * 2
    assert text[6] != 4 and text[0] != 8
    prompts = [text[:k] for k in (9, 3, 9, len(text), 1)] + [text[:6] + [4], [8], text[:3] + [5]]
    n = [2, 1, 3, 2, 1, 2, 1, 0]
    model, shared, plain = make(kind), {}, {}
    settings = dict(n=n, max_new_tokens=12, seed=1, slots=4, stop_ids=[2])
    together = generate(model, prompts, stats=shared, **settings)
    monkeypatch.setattr(rollout, "plan", by_prompt)
    apart = generate(model, prompts, stats=plain, **settings)
    assert responses(together) == responses(apart)
    for r, s in zip(flat(together), flat(apart)):
        assert r.logprobs == pytest.approx(s.logprobs, abs=1e-5)
    asked = {tuple(p) for p, k in zip(prompts, n) if k}
    assert plain["tokens_prefilled"] == sum(len(p) - 1 for p in asked)
    assert shared["tokens_prefilled"] == (len(text) - 1) + 6 + 0  # the text, its branch, and [8]


def test_plan():
    rng = random.Random(0)
    for _ in range(50):
        prompts = [[rng.randrange(2) for _ in range(rng.randint(1, 6))] for _ in range(12)]
        requests = [Request(0, number, prompt, 1) for number, prompt in enumerate(prompts)]
        trunks = rollout.plan(requests)
        assert sorted(r.number for _, family in trunks for r in family) == list(range(12))
        for trunk, family in trunks:
            assert all(trunk[: len(r.prompt)] == r.prompt for r in family)
            order = [(len(r.prompt), r.number) for r in family]
            assert order == sorted(order)
        shorter = [(p, q) for p in prompts for q in prompts if q[: len(p)] == p and q != p]
        leaves = {tuple(p) for p in prompts} - {tuple(p) for p, _ in shorter}
        assert len(trunks) == len(leaves)  # no forward that could be spared
        lengths = [len(trunk) for trunk, _ in trunks]
        assert lengths == sorted(lengths, reverse=True)


# --------------------------------------------------------------------------- budgets and ends


def test_n_and_budget_per_prompt(llama):
    prompts, n, budget = make_prompts(5), [2, 0, 1, 4, 3], [7, 5, 1, 12, 3]
    groups = generate(llama, prompts, n=n, max_new_tokens=budget, stop_ids=[2, 5], slots=3)
    consistent(groups, prompts, n, budget, {2, 5})
    groups = generate(llama, prompts, n=np.array(n), max_new_tokens=np.int64(6), stop_ids=NEVER)
    assert [[len(r.response) for r in g] for g in groups] == [[6] * k for k in n]
    assert not any(r.finished for r in flat(groups))
    assert generate(llama, [], n=3) == [] and generate(llama, prompts, n=0) == [[]] * 5


def test_small_cases(llama):
    """Prompts of one token, budgets of one token, the same prompt again and again."""
    prompts, budget = [[5], [5], [9], [5, 6], [5]], [3, 1, 1, 4, 3]
    how = {"temperature": 0, "stop_ids": NEVER}
    groups = generate(llama, prompts, n=2, max_new_tokens=budget, slots=2, **how)
    expected = [reference_greedy(llama, p, new, NEVER) for p, new in zip(prompts, budget)]
    assert responses(groups) == [[response] * 2 for response in expected]
    stats = {}
    groups = generate(llama, [[5]] * 3, n=4, max_new_tokens=5, seed=0, stop_ids=[2], stats=stats)
    assert stats["tokens_prefilled"] == 0
    assert len({tuple(r.response) for r in flat(groups)}) > 8


def test_what_ends_a_response(llama):
    first = reference_greedy(llama, [5, 6], 1, NEVER)
    for most in (9, 1):  # at once; and with the last token allowed
        [[r]] = generate(llama, [[5, 6]], max_new_tokens=most, temperature=0, stop_ids=first)
        assert r.response == first and r.finished
    model = make()
    for end in ([first[0], 3], first[0]):  # the model's own, where none is given
        model.generation_config.eos_token_id = end
        assert generate(model, [[5, 6]], max_new_tokens=9, temperature=0) == [[r]]


def test_counters(llama):
    prompts, budget, stats = make_prompts(40), geometric(40, 15, 45), {"mine": 3}
    stats["tokens_generated"] = 1000
    generate(llama, prompts, max_new_tokens=budget, stop_ids=NEVER, slots=8, stats=stats)
    assert stats["tokens_generated"] == 1000 + sum(budget)
    assert stats["mine"] == 3 and stats["slots"] == 8
    assert stats["slot_steps"] == sum(budget)  # on a CPU no slot is computed in vain
    assert stats["steps"] >= sum(budget) / 8


# --------------------------------------------------------------------------- as on a GPU


@pytest.fixture
def coarse(monkeypatch):
    """The steps of a GPU, on this CPU: a few sizes, and a look at who is done every 8 steps."""

    def sizes(device, dtype, slots, columns):
        return [slots // 8, slots // 4, slots // 2, slots], [32, columns], 8

    monkeypatch.setattr(slots, "step_sizes", sizes)


def letters(ids):
    """A tokenizer's decode: 3 is a, 4 is b, ... and 90 is 'ab.\\n', 91 '\\nQ'."""
    pieces = {90: "ab.\n", 91: "\nQ"}
    return "".join(pieces.get(i, chr(94 + i) if 3 <= i <= 28 else "_") for i in ids)


@pytest.mark.parametrize(
    "kind, captured", [*((kind, True) for kind in MODELS), ("mistral", False), ("gpt2", False)]
)
def test_coarse_steps_and_graphs(kind, captured, coarse, monkeypatch):
    """Whatever the sizes of the steps, and whether they are replayed: the same responses."""
    prompts, budget, stats = make_prompts(14, 25), geometric(14, 15, 40), {}
    how = dict(n=2, max_new_tokens=budget, seed=1, slots=16, stop_ids=[2], top_p=0.9)
    with monkeypatch.context() as patch:
        patch.setattr(slots, "step_sizes", graphs.step_sizes)
        expected = generate(make(kind), prompts, **how)
    few = {"max_new_tokens": 9, "temperature": 0, "stop_ids": [2]}  # free slots decode on
    greedy = [[reference_greedy(make(kind), p, 9, [2])] for p in prompts[:3]]
    card = Card(monkeypatch)
    with card if captured else contextlib.nullcontext():
        engine = Engine(make(kind).to("cuda" if captured else "cpu"), slots=16)
        how.pop("slots")
        assert responses(engine.generate(prompts, stats=stats, **how)) == responses(expected)
        assert stats["tokens_generated"] == sum(len(r.response) for r in flat(expected))
        assert responses(engine.generate(prompts[:3], **few)) == greedy
        gc.collect()  # a graph keeps what it reads
        assert responses(engine.generate(prompts, **how)) == responses(expected)
    assert card.replays > stats["steps"] or not captured


@pytest.mark.parametrize("error", [RuntimeError("Cannot copy"), torch.OutOfMemoryError("full")])
def test_a_failed_capture_leaves_no_trace(monkeypatch, error):
    """Neither its stream nor an allocator in capture mode: the engine goes on without graphs."""
    model = make()
    settings = {"max_new_tokens": 9, "seed": 1, "slots": 4, "stop_ids": [2]}
    expected = generate(model, make_prompts(), **settings)
    warned = pytest.warns(UserWarning, match="no CUDA graph, so decoding is slower")
    with warned as record, Card(monkeypatch, error) as card:
        got = generate(model.to("cuda"), make_prompts(), **settings)
    assert responses(got) == responses(expected)
    assert card.current == "default" and card.ended == [(0, 1)] and card.replays == 0
    assert len([w for w in record if "no CUDA graph" in str(w.message)]) == 1


def test_a_step_that_waits_for_the_card_is_found_before_a_capture(monkeypatch):
    captured = []

    def step():
        state[0] += 1
        return state[0].tolist()

    with Card(monkeypatch) as card:
        monkeypatch.setattr(torch.cuda, "graph", lambda *a, **k: captured.append(a))
        state = [torch.zeros(3, device="cuda")]
        with pytest.warns(UserWarning, match="no CUDA graph.*synchronizing"):
            again = graphs.Graphs().replay_of("key", step, state)
        assert again is step and not captured and card.mode == 0
        assert state[0].tolist() == [0, 0, 0]  # the trial is undone


@pytest.mark.parametrize("stop", [False, True])
def test_the_host_rarely_waits(stop, coarse, monkeypatch):
    """At most twice a decode step, however many layers there are; for any line, once."""
    stop_ids, stats = StopText(NEVER, "cd", letters) if stop else NEVER, {}
    budget = geometric(40, 25, 60)
    with Card(monkeypatch) as card:
        engine = Engine(make(num_hidden_layers=6).to("cuda"), slots=16)
        card.waits.clear()
        engine.generate(make_prompts(40), max_new_tokens=budget, stop_ids=stop_ids, stats=stats)
    assert 0 < card.waits.total() <= 2 * stats["steps"]
    assert max(card.waits.values()) <= stats["steps"]


def test_free_slots_stay_sane(coarse):
    """A free slot left behind `used` by its sliding window would attend to nothing: NaN."""
    done_early = [[5]] * 15 + [[4] * 60], [24] * 15 + [1]
    # into the holes, the others' slots left at length 48
    moved = [[4] * 3] * 8 + [[5]] * 8, [48] * 8 + [90] * 8
    engine = Engine(make("mistral"), slots=16)
    for prompts, budget in (done_early, moved):
        engine.generate(prompts, max_new_tokens=budget, stop_ids=NEVER)
        engine.generate([[5]] * 9, max_new_tokens=4, stop_ids=NEVER)
        for tables in engine.table.cache.tables.values():
            assert not any(table.isnan().any() for table in tables)
        assert not engine.table.numbers.any()


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("temperature", [0, 0.7])
def test_a_step_reads_nothing_back(kind, temperature, monkeypatch):
    """What a CUDA graph demands. Fake tensors hold no numbers: looking at one would raise."""
    monkeypatch.setattr(rollout, "least_of_nucleus", as_on_cuda)
    monkeypatch.setattr(attention, "check_servable", lambda model: None)
    monkeypatch.setattr(slots, "weights_of", lambda model: None)  # fake ones lie nowhere
    sampling = Sampling(temperature, 0.9, 5, set())
    with FakeTensorMode(allow_non_fake_inputs=True):
        engine = Engine(hf.AutoModelForCausalLM.from_config(MODELS[kind]()))
        engine.table = slots.Slots(engine.model, 8, 128)
        with attention.serving(engine.model, engine.table.cache):
            for width, used in ((8, 64), (2, 128)):
                engine.decode_step(width, used, torch.tensor([2, 5]), sampling)


def test_live_share_with_coarse_steps(coarse):
    """Skewed lengths: 90 % of slot-steps hold a live row, though the host rarely looks."""
    model, budget, stats = make(num_hidden_layers=1), geometric(160, 200 / 3, 200), {}
    how = {"stop_ids": NEVER, "slots": 16, "stats": stats}
    generate(model, [[5]] * 160, max_new_tokens=budget, **how)
    assert stats["tokens_generated"] >= 0.9 * stats["slot_steps"]


def test_the_model_s_card_is_the_current_one_while_it_serves(monkeypatch, llama):
    """A graph is captured on the current device, and `--device cuda:1` is not the first."""
    device_of = mock.MagicMock()
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    with attention.serving(llama):
        assert device_of.call_args.args[0] is next(llama.parameters())
        device_of.return_value.__enter__.assert_called_once()


# --------------------------------------------------------------------------- memory and failures


def test_memory_does_not_grow_with_requests(monkeypatch):
    engine, sizes, shapes, prefill = Engine(make(), slots=4), [], [], rollout.prefill

    def watched(model, cache, prompts):
        prefill(model, cache, prompts)
        numbers = sum(x.numel() for pair in cache.prefilled.values() for x in pair)
        sizes.append((len(prompts) * max(map(len, prompts)), numbers))

    monkeypatch.setattr(rollout, "prefill", watched)
    for count in (6, 100):
        prompts = [[3 + i % 90] * 20 + [3 + i // 90] for i in range(count)]
        engine.generate(prompts, max_new_tokens=2)
        cache = engine.table.cache
        shapes.append([x.shape for x in tree_leaves([cache.tables, engine.table.state])])
        assert cache.prefilled == {}
    assert shapes[0] == shapes[1] and all(shape[0] == 4 for shape in shapes[0])
    # four prompts at a time: layers, K and V, and so on
    assert max(sizes) <= (4 * 20, 2 * 2 * 4 * 20 * 2 * 8)
    sizes.clear()
    prompts = [[3 + i] * 200 + [3] for i in range(60)]
    generate(engine.model, prompts, max_new_tokens=1, slots=60)
    assert max(sizes)[0] <= 4096


def test_the_table_is_kept_and_freed():
    model = make()
    engine = Engine(model)

    def again(engine, **how):
        before = engine.table
        engine.generate(make_prompts(2), n=2, **how)
        return engine.table is before

    engine.generate(make_prompts(4), n=4, max_new_tokens=20)
    assert again(engine, max_new_tokens=7)  # a smaller job runs in the table that is there
    assert not again(engine, max_new_tokens=100) and again(engine, max_new_tokens=100)
    head = model.lm_head.weight
    head.data = head.data.clone()  # weights that moved: a graph would read the old ones
    assert not again(engine, max_new_tokens=100)
    model.bfloat16()
    assert not again(engine, max_new_tokens=5)
    engine.free()
    assert engine.table is None and not again(engine, max_new_tokens=5)
    table, gone = weakref.ref(engine.table), weakref.ref(model)
    engine.free()
    assert table() is None  # at once: no cycle waits for the garbage collector
    del model, head, engine
    gc.collect()
    assert gone() is None


def test_choose_slots(llama, monkeypatch):
    assert memory.choose_slots(llama, 128, 10) == 10
    assert memory.choose_slots(llama, 128, 10**6) == 256

    def meminfo(text):
        monkeypatch.setattr(memory, "open", lambda path: io.StringIO(text), raising=False)

    meminfo("MemTotal: 4096 kB\nMemAvailable: 1024 kB\n")
    row = 2 * 2 * 2 * 8 * 128 * 4 + 16 * VOCAB
    assert memory.choose_slots(llama, 128, 10**6) == (1 << 19) // row
    assert memory.choose_slots(llama, 128, 10**6, 2**20) == (1 << 20) // row
    engine, stats, again = Engine(llama), {}, {}
    settings = dict(n=4, max_new_tokens=[100] + [3] * 29)
    engine.generate(make_prompts(30), stats=stats, **settings)
    engine.generate(make_prompts(30), stats=again, **settings)
    assert 1 < stats["slots"] <= again["slots"] < 100  # what the engine holds counts as free
    meminfo("MemAvailable: 0 kB\n")
    assert memory.choose_slots(llama, 128, 10) == 1
    meminfo("")  # nobody says
    assert memory.choose_slots(llama, 128, 10**6) == 256


def fail(monkeypatch, when, error):
    """Let the decode step raise `error` wherever `when(rows, steps so far)`."""
    plain, steps = rollout.decode, []

    def decode(model, cache, tokens):
        steps.append(len(tokens))
        if when(len(tokens), len(steps)):
            raise type(error)(*error.args)  # a new one: an old one's traceback keeps tables alive
        return plain(model, cache, tokens)

    monkeypatch.setattr(rollout, "decode", decode)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no"), RuntimeError("CPUAllocator: can't allocate memory")]
)
def test_out_of_memory_halves_the_slots(monkeypatch, llama, error):
    """At once, and in the middle. The old table is gone before the new one comes."""
    prompts, stats, tables = make_prompts(8), {}, []
    settings = dict(n=3, max_new_tokens=[2, 20, 3, 20, 20, 1, 20, 20], seed=1, stop_ids=[2])
    expected = generate(llama, prompts, slots=24, **settings)
    plain = slots.Slots.__init__

    def watched(table, *size):
        assert all(old() is None for old in tables)
        tables.append(weakref.ref(table))
        plain(table, *size)

    monkeypatch.setattr(slots.Slots, "__init__", watched)
    monkeypatch.setattr(attention, "check_servable", lambda model: None)
    fail(monkeypatch, lambda rows, steps: rows > 6 and steps > 10 or rows > 12, error)
    with pytest.warns(UserWarning, match="out of memory: going on with (12|6) slots") as record:
        got = generate(llama, prompts, slots=24, stats=stats, **settings)
    ours = [w for w in record if "out of memory" in str(w.message)]
    assert len(ours) == 2 and stats["slots"] == 6 and len(tables) == 3
    assert responses(got) == responses(expected)
    assert stats["tokens_generated"] == sum(len(r.response) for r in flat(got))


def test_not_even_one_slot_fits(monkeypatch, llama):
    engine = Engine(llama, slots=2)
    again = lambda: engine.generate(make_prompts(), seed=1, max_new_tokens=9)  # noqa: E731
    expected = again()
    with monkeypatch.context() as patch:
        fail(patch, lambda rows, steps: True, torch.OutOfMemoryError("none at all"))
        with pytest.warns(UserWarning), pytest.raises(torch.OutOfMemoryError):
            again()
    assert engine.table is None and again() == expected


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()], ids=repr)
def test_everything_is_put_back(monkeypatch, error):
    model = make()
    model.train()
    model.model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    before = copy.deepcopy(vars(model.config)), model.config._attn_implementation

    def unchanged():
        assert modes == [m.training for m in model.modules()]
        assert before == (vars(model.config), model.config._attn_implementation)
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()

    engine, how = Engine(model, slots=3), {"max_new_tokens": 6, "seed": 0}
    expected = engine.generate(make_prompts(), **how)
    unchanged()
    for name in ("decode", "prefill"):
        with monkeypatch.context() as patch:
            patch.setattr(rollout, name, lambda *a: (_ for _ in ()).throw(error))
            with pytest.raises(type(error)):
                engine.generate(make_prompts(), **how)
        unchanged()
    assert engine.generate(make_prompts(), **how) == expected
    loss = model(torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 5]])).loss
    loss.backward()  # its weights are no inference tensors, and train on


def test_inside_inference_mode():
    """A call under inference_mode leaves nothing that a later call could not use."""
    model, settings = make(), dict(max_new_tokens=5, temperature=0)
    engines = [Engine(model), Engine(model, dtype=torch.bfloat16), Engine(model, own_copy=True)]
    with torch.inference_mode():
        inner = [engine.generate(make_prompts(), **settings) for engine in engines]
    assert inner == [engine.generate(make_prompts(), **settings) for engine in engines]


@torch.no_grad()
def training_step(model):
    for p in model.parameters():
        p.add_(0.1 * torch.randn_like(p))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_copy_that_decodes(dtype):
    """In low precision, or (what FSDP needs) in the model's own: brought up to date each call."""
    model, prompts = make(), make_prompts()
    engine = Engine(model, dtype=dtype, own_copy=True)
    settings = dict(max_new_tokens=10, temperature=0, stop_ids=NEVER)
    before, twin = engine.generate(prompts, **settings), engine.decoder
    assert twin is not model and {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.dtype for p in twin.parameters()} == {dtype}
    # in bfloat16 positions past 256 would be mush
    assert twin.model.rotary_emb.inv_freq.dtype == torch.float32
    assert not any(p.requires_grad for p in twin.parameters())
    assert before == generate(copy.deepcopy(twin), prompts, **settings)
    for r in flat(before):
        error = 1e-4 if dtype == torch.float32 else 0.5
        assert r.logprobs == pytest.approx(reference_logprobs(model, r), abs=error)
    training_step(model)
    after = engine.generate(prompts, **settings)
    assert engine.decoder is twin and after != before
    assert after == generate(model, prompts, dtype=dtype, **settings)
    assert Engine(model, dtype=torch.float32).decoder is model


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
        ([[3], [3] * 500], dict(max_new_tokens=13), "prompt 1 is 500 .*=13 .* the model's 512"),
        ([[3]], dict(n=[1, 2]), "1 prompts, 2 n, 1 max_new_tokens"),
        ([[3]], dict(max_new_tokens=[4, 5]), "1 prompts, 1 n, 2 max_new_tokens"),
        ([[3]], dict(temperature=-0.1), "temperature=-0.1"),
        ([[3]], dict(temperature=float("nan")), "temperature=nan"),
        ([[3]], dict(top_p=0), "top_p=0, .*need"),
        ([[3]], dict(top_p=1.1), "top_p=1.1"),
        ([[3]], dict(top_k=-1), "top_k=-1"),
        ([[3]], dict(slots=0), "slots=0"),
        ([[3]], dict(stop_ids=[]), "no stop token: pass stop_ids"),
    ],
)
def test_bad_arguments(llama, prompts, changes, message):
    with pytest.raises(ValueError, match=message) as info:
        generate(llama, prompts, **changes)
    assert "\n" not in str(info.value)


def test_limits_of_the_model():
    generate(make(), [[3] * 500], max_new_tokens=12)  # to the last position
    scaling = dict(type="longrope", short_factor=[1.0] * 4, long_factor=[2.0] * 4)
    config = hf.Phi3Config(**GROUPED, original_max_position_embeddings=64, rope_scaling=scaling)
    with pytest.raises(ValueError, match="passes the model's 64 positions"):
        generate(hf.AutoModelForCausalLM.from_config(config), [[3] * 40], max_new_tokens=30)
    model = make()
    model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="no stop token"):
        generate(model, [[3]])


@pytest.mark.parametrize("temperature", [0, 1])
def test_weights_gone_bad(temperature):
    engine = Engine(make())
    weight, how = engine.model.model.layers[0].mlp.up_proj.weight, {"max_new_tokens": 5}
    expected = engine.generate(make_prompts(), temperature=0, **how)
    good = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="logits are not finite"):
        engine.generate(make_prompts(), temperature=temperature, **how)
    with torch.no_grad():
        weight.copy_(good)  # and no NaN is left in the table
    assert engine.generate(make_prompts(), temperature=0, **how) == expected


# --------------------------------------------------------------------------- stop texts


@pytest.mark.parametrize(
    "tokens, text, found",
    [
        ([3, 4, 5], "cd", None),
        ([3, 4, 5, 6, 7], "cd", (2, 4)),  # ab|cd|e
        ([5, 6], "cd", (0, 2)),
        ([3, 4, 5, 6, 5, 6], "cd", (2, 4)),  # the first time counts
        ([3, 90, 91, 5], "\n\nQ", (1, 3)),  # a|ab.\n|\nQ|c: the token in which it starts goes
    ],
)
def test_stop_text_is_found(tokens, text, found):
    assert StopText([2], text, letters).locate(tokens) == found


@pytest.mark.parametrize("steps", ["fine", "coarse"])
def test_stop_text_ends_responses(steps, request):
    """What is written up to the stop is what is written without one."""
    if steps == "coarse":
        request.getfixturevalue("coarse")
    engine, prompts = Engine(make(), slots=8), make_prompts(12)
    settings = {"n": 3, "max_new_tokens": 40, "temperature": 0.8, "seed": 2}
    plain = engine.generate(prompts, stop_ids=[2], **settings)
    texts = [letters(r.response) for r in flat(plain)]
    pairs = Counter(text[i : i + 2] for text in texts for i in range(len(text) - 1))
    pair = max((p for p in pairs if "_" not in p), key=pairs.get)
    got = engine.generate(prompts, stop_ids=StopText([2], pair, letters), **settings)
    stopped = 0
    for r, s in zip(flat(plain), flat(got)):
        assert r.response[: len(s.response)] == s.response and len(s.response) == len(s.logprobs)
        before, there, _ = letters(r.response).partition(pair)
        if there:
            stopped += 1
            assert s.finished and letters(s.written()) == before
            assert pair in letters(s.response) and pair not in letters(s.response[:-1])
        else:
            assert (s.response, s.finished) == (r.response, r.finished)
    assert stopped > 5
