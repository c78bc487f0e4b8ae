"""What a card compiles, beside the plain functions, on a CPU: eagerly, or compiled for that. Of the
kernel that reads a slot's own columns only the arguments are tested."""

import shutil
import warnings
from types import SimpleNamespace

import account
import benchmark
import gpu
import pytest
import torch

import rollout
from plumbing import attention, fast

compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
# PyTorch 2.6 cannot compile a model of today's transformers: there the plain step goes on.
recent = pytest.mark.skipif(attention.varlen_attn is None, reason="needs PyTorch 2.10 or later")


@pytest.fixture
def compiled(monkeypatch):
    """What a card would compile is compiled here; a warning that it was not is an error."""
    monkeypatch.setattr(fast, "compiles", lambda tensor: True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="decoding is not compiled")
        yield


def draws(function, logits, temperature, top_p):
    uniform = torch.rand(len(logits), 1, generator=torch.Generator().manual_seed(0))
    sampling = rollout.Sampling(temperature, top_p, 0, frozenset([2]))
    return function(logits, uniform, sampling)


def random_logits(rows, vocab, scale):
    random = torch.Generator().manual_seed(1)
    return (scale * torch.randn(rows, vocab, generator=random) - 5).bfloat16()


@pytest.mark.parametrize("temperature, top_p", [(0.6, 0.9), (1.0, 1.0), (1.0, 0.5), (0.8, 0.999)])
@pytest.mark.parametrize("vocab, scale", [(50257, 3), (1000, 8), (257, 0.01), (513, 0)])
def test_the_draw_is_the_plain_one(vocab, scale, temperature, top_p):
    """Also of numbers around 0, which have both signs, and where all are tied."""
    for logits in (random_logits(64, vocab, scale), random_logits(64, vocab, scale) + 5):
        logits[:, 1] = -torch.inf
        token, logprob = draws(fast.draw, logits, temperature, top_p)
        expected = draws(rollout.draw_tokens, logits, temperature, top_p)
        same = token == expected[0]
        assert same.float().mean() > 0.98
        torch.testing.assert_close(logprob[same], expected[1][same], atol=1e-4, rtol=1e-4)


def test_bfloat16_numbers_have_an_order():
    places = torch.arange(fast.LOWEST, fast.HIGHEST + 1, dtype=torch.int32)
    numbers = fast.number_at(places)
    assert numbers[0] == -torch.inf and numbers[-1] == torch.inf
    assert (numbers.diff() >= 0).all() and torch.equal(numbers, numbers.bfloat16().float())


def test_logits_that_are_not_finite_show():
    logits = random_logits(2, 300, 1)
    logits[0, 5] = torch.nan
    token, logprob = draws(fast.draw, logits, 1.0, 0.9)
    assert logprob[0].isnan() and not logprob[1].isnan() and 0 <= token[0] < 300


@compiler
def test_the_draw_compiles(compiled):
    logits = random_logits(8, 700, 3)
    expected, found = (draws(rollout.draw_tokens, logits, 0.6, 0.9) for _ in range(2))
    assert torch.equal(found[0], expected[0]) and not torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[1], expected[1])


@compiler
@recent
def test_a_forward_compiles(compiled, monkeypatch):
    monkeypatch.setitem(gpu.SIZE, "num_hidden_layers", 2)
    model = gpu.build("qwen2", torch.float32, "cpu")
    cache = attention.SlotCache(4, 16)
    tokens = torch.tensor([[5], [6], [7]])
    with attention.serving(model, cache):
        logits = []
        for _ in range(2):  # the first is a plain one
            cache.begin(torch.tensor([2, 9, 0]), 16)
            logits.append(attention.decode(model, cache, tokens).clone())
    assert not torch.equal(*logits)  # rounded in another order
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-4)


def varlen(query, key, value, starts, first, longest, columns, *, scale, enable_gqa, seqused_k,
           window_size):  # fmt: skip
    """What `varlen_attn` is documented to compute of one query a sequence."""
    assert starts.tolist() == list(range(len(query) + 1)) and longest == 1 and enable_gqa
    out = []
    for i, (start, used) in enumerate(zip(first.tolist(), seqused_k.tolist())):
        begin = start if window_size == (-1, -1) else max(start, start + used - 1 - window_size[0])
        keys, values = (x[begin : start + used].transpose(0, 1) for x in (key, value))
        group = query[i].unflatten(0, (len(keys), -1))  # (kv_heads, group, dim)
        weights = (scale * group @ keys.transpose(1, 2)).softmax(-1)
        out.append((weights @ values).flatten(0, 1))
    return torch.stack(out)


@pytest.mark.parametrize("window", [None, 3])
def test_own_columns_are_those_that_the_mask_leaves(window, monkeypatch):
    monkeypatch.setattr(attention, "varlen_attn", varlen)
    cache = attention.SlotCache(5, 12)
    module = SimpleNamespace(config=SimpleNamespace(slot_cache=cache))
    key, value = torch.randn(2, 5, 12, 2, 8).transpose(2, 3)  # (5, 2, 12, 8) each
    query = torch.randn(3, 4, 1, 8)
    cache.begin(torch.tensor([0, 6, 9]), 10)
    found = []
    for own in (False, True):
        monkeypatch.setattr(attention, "reads_own_columns", lambda query, own=own: own)
        out, _ = attention.attention(module, query, key[:3], value[:3], None, sliding_window=window)
        found.append(out)
    torch.testing.assert_close(*found)


def test_no_token_outside_the_nucleus_is_drawn_at_the_edge_of_a_block():
    """There a rounded remainder may be negative: then the block's first token would be drawn."""
    rng = torch.Generator().manual_seed(0)
    logits = torch.full((2000, 512), -30.0)
    logits[:, 5] = -2 - 4 * torch.rand(2000, generator=rng)
    logits[:, 300] = 0
    logits = logits.bfloat16()
    mass = (logits.float() - logits.amax(-1, keepdim=True).float()).exp()
    uniform = mass[:, :256].sum(-1, keepdim=True) / mass.sum(-1, keepdim=True) / (1 - 1e-6)
    sampling = rollout.Sampling(1.0, 0.99, 0, frozenset([2]))
    token, _ = fast.draw(logits, uniform, sampling)
    assert set(token.flatten().tolist()) <= {5, 300}


def test_infinities_do_not_hide_a_difference():
    x = torch.tensor([1.0, 2.0, -torch.inf, torch.nan])
    assert fast.agrees(lambda x: x.clone(), (x,), x)
    with pytest.warns(UserWarning, match="something else"):
        assert not fast.agrees(lambda x: 5 * x + 7, (x,), x)


def test_what_fails_or_differs_is_not_used(monkeypatch):
    monkeypatch.setattr(fast, "compiles", lambda tensor: True)
    monkeypatch.setattr(torch, "compile", lambda function: function)

    def broken(x):
        raise RuntimeError("no such kernel")

    for other, said in ((broken, "no such kernel"), (lambda x: 2 * x, "something else")):
        double = fast.faster(lambda x: x[0] != 5, other)(lambda x: 3 * x)
        with pytest.warns(UserWarning, match=said):
            assert double(torch.tensor([1.0])) == 3
        assert double(torch.tensor([2.0])) == 6  # no second warning
    good = fast.faster(lambda x: x[0] != 5, lambda x: 2.99 * x)(lambda x: 3 * x)
    found = [good(torch.tensor([number])).item() for number in (1.0, 1.0, 5.0)]
    assert found == pytest.approx([3, 2.99, 15])  # checked, compiled, and what does not suit

    def full(x):
        raise MemoryError

    with pytest.raises(MemoryError):  # the engine goes on with fewer slots
        fast.faster(other=full)(lambda x: x)(torch.ones(1))


def test_it_must_be_asked_for(monkeypatch):
    tensor = SimpleNamespace(is_cuda=True)
    monkeypatch.setattr(fast, "find_spec", lambda name: name == "triton")
    assert not fast.compiles(tensor)
    monkeypatch.setenv("SFL_COMPILE", "1")
    assert fast.compiles(tensor) and not fast.compiles(torch.ones(1))
    monkeypatch.setattr(fast, "find_spec", lambda name: None)
    assert not fast.compiles(tensor)


@recent
def test_a_compiled_step_is_few_kernels():
    """By the account: of a layer 7 products, attention and ten others; of the draw's a dozen."""
    config = benchmark.config_of("0.5b")
    config.num_hidden_layers = 1
    sampling = rollout.Sampling(0.6, 0.9, 0, frozenset([2]))
    _, plain = account.decode_step(config, 512, 1280, sampling)
    _, kinds = account.decode_step(config, 512, 1280, sampling, filled=640)
    assert kinds["layers' products"] == pytest.approx(plain["layers' products"], rel=0.01)
    assert kinds["head"] == pytest.approx(plain["head"], rel=0.01)
    assert kinds["attention"][1] == pytest.approx(plain["attention"][1] / 2, rel=0.02)
    assert kinds["draw"][0] < 20 and kinds["draw"][2] < plain["draw"][2] / 5
    assert kinds["small kernels"][0] < 40
