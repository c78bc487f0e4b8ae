"""ppo.py against plain PyTorch, double loops and hand computation, on tiny random models."""

import copy
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SHAPE, small_llama
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPTJConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
)

import ppo
from plumbing import logprobs
from rollout import generate

VOCAB = 61
SMALL = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **SHAPE}
GPT = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2}
GPT |= {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
GEMMA = {"head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 0.5}
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "qwen2 tied": Qwen2Config(**SMALL, tie_word_embeddings=True),
    "gpt2": GPT2Config(**GPT),
    "gpt-j bias": GPTJConfig(**GPT, rotary_dim=4),
    "mistral window": MistralConfig(**SMALL, sliding_window=4),
    "gemma2 soft cap": Gemma2Config(**SMALL, **GEMMA),
}


def build(name="llama", dtype=torch.float32):
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[name])
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    head = model.get_output_embeddings()
    with torch.no_grad():  # fresh weights give nearly uniform predictions: spread them out
        head.weight.mul_(3 if name == "gemma2 soft cap" else 10)
        if head.bias is not None:
            head.bias.normal_()
    return model


def some_rollouts(count=10, seed=0):
    rng = np.random.default_rng(seed)

    def draw(longest):
        return rng.integers(3, VOCAB, rng.integers(1, longest + 1)).tolist()

    return [SimpleNamespace(prompt=draw(6), response=draw(14)) for _ in range(count)]


def noise(rollouts, seed=0, scale=1.0):
    """A random number for each response token."""
    rng = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(len(r.response), generator=rng) for r in rollouts]


def naive(model, tokens, temperature=1.0):
    logits = model(tokens).logits[:, :-1] / temperature
    return logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)


def one_by_one(model, rollouts, temperature=1.0):
    """Response log-probs, no batching, no padding."""
    logprobs = []
    for r in rollouts:
        tokens = torch.tensor([r.prompt + r.response])
        logprobs.append(naive(model, tokens, temperature)[0, len(r.prompt) - 1 :])
    return logprobs


def values_one_by_one(critic, rollouts):
    values = []
    for r in rollouts:
        tokens = torch.tensor([r.prompt + r.response])
        values.append(critic(tokens)[0, len(r.prompt) - 1 : -1])
    return values


def objective(new, old, ref, advantages, kl_coef=0.0):
    """The policy's loss for one minibatch, written down anew. All: lists, a tensor a rollout. The
    one place in this file that says how tokens are averaged: the surrogate over all of them, k3
    summed over a response and averaged over responses."""
    responses = len(new)
    new, old, ref, advantages = (torch.cat(list(x)) for x in (new, old, ref, advantages))
    ratio = (new - old).exp()
    surrogate = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))
    k3 = (ref - new).exp() - (ref - new) - 1
    return surrogate.mean() + kl_coef * k3.sum() / responses


def flat_gradient(loss, model):
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([gradient.flatten() for gradient in gradients])


def difference(before, after):
    """How far each weight has moved, one flat vector: with SGD of lr 1 the gradient."""
    pairs = zip(before.parameters(), after.parameters())
    return torch.cat([(a - b).flatten() for a, b in pairs]).detach()


def sgd(*models):
    return torch.optim.SGD([p for model in models for p in model.parameters()], lr=1.0)


def adamw(*models, lr=1e-3):
    return torch.optim.AdamW([p for model in models for p in model.parameters()], lr=lr)


def one_step(**changes):
    """Settings for a single minibatch whose gradient arrives as it is."""
    return ppo.Settings(**{"minibatch": 1000, "max_grad_norm": None} | changes)


def moved(model, rollouts, advantages, settings=None, **lists):
    """The gradient that `update` steps along, and its metrics; the model stays as it is."""
    policy = copy.deepcopy(model)
    settings = settings or one_step()
    metrics = ppo.update(policy, sgd(policy), rollouts, advantages, settings, **lists)
    return difference(model, policy), metrics


def close(ours, theirs, rtol=1e-3, atol=1e-5):
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


# --------------------------------------------------------------------------- log-probs


@pytest.mark.parametrize("temperature, chunk", [(1.0, None), (0.6, 7)])
@pytest.mark.parametrize("name", CONFIGS)
def test_token_logprobs_and_gradient_equal_the_naive_ones(name, temperature, chunk):
    model, tokens = build(name), torch.randint(VOCAB, (3, 17))
    ours = ppo.token_logprobs(model, tokens, temperature=temperature, chunk=chunk)
    theirs = naive(model, tokens, temperature)
    assert ours.shape == (3, 16) and ours.dtype == torch.float32
    close(ours, theirs, 1e-5, 1e-5)
    weights = torch.randn(3, 16)
    gradients = [flat_gradient((weights * x).sum(), model) for x in (ours, theirs)]
    close(*gradients, 1e-4, 1e-4)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_head_gradcheck(softcap):
    torch.manual_seed(0)
    double = {"dtype": torch.float64, "requires_grad": True}
    hidden, weight, bias = (torch.randn(*shape, **double) for shape in ((5, 4), (7, 4), (7,)))
    targets = torch.tensor([0, 6, 3, 3, 1])

    def run(h, w, b=None):
        return logprobs.HeadLogprobs.apply(h, w, b, targets, 0.7, softcap, 2, torch.float64)

    assert torch.autograd.gradcheck(run, (hidden, weight, bias))
    assert torch.autograd.gradcheck(run, (hidden, weight))
    assert torch.autograd.gradcheck(run, (hidden, weight.detach()))  # a frozen head


def test_mask_and_right_padding_do_not_matter():
    model, rollouts = build("gpt2"), some_rollouts()
    tokens, mask = ppo.pad(rollouts, model)
    assert mask.sum() == sum(len(r.response) for r in rollouts)
    logprobs = ppo.token_logprobs(model, tokens, mask=mask)
    assert (logprobs[~mask] == 0).all()
    close(logprobs[mask], torch.cat(one_by_one(model, rollouts)), 1e-5, 1e-5)
    close(logprobs[mask], ppo.token_logprobs(model, tokens)[mask], 1e-5, 1e-6)
    nothing = ppo.token_logprobs(model, tokens, mask=torch.zeros_like(mask))
    assert (nothing == 0).all()


def test_a_model_used_twice_and_a_retained_graph():
    model, tokens = build("qwen2 tied"), torch.randint(VOCAB, (2, 9))
    here, there = (ppo.token_logprobs(model, x).sum() for x in (tokens, tokens.flip(0)))
    once = flat_gradient(2 * ppo.token_logprobs(model, tokens).sum(), model)
    close(flat_gradient(here + there, model), once, 1e-4, 1e-4)
    loss = ppo.token_logprobs(model, tokens).sum()
    first, second = (
        torch.autograd.grad(loss, model.lm_head.weight, retain_graph=True)[0] for _ in range(2)
    )
    torch.testing.assert_close(first, second)


def test_frozen_models():
    model, tokens = build("qwen2 tied"), torch.randint(VOCAB, (2, 9))
    model.requires_grad_(False)
    assert not ppo.token_logprobs(model, tokens).requires_grad
    layer = model.model.layers[0].requires_grad_(True)  # under a frozen, tied head
    ppo.token_logprobs(model, tokens).sum().backward()
    assert model.lm_head.weight.grad is None and layer.mlp.up_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_bfloat16_products_float32_sums(how):
    model, tokens = build(), torch.randint(VOCAB, (4, 33))
    exact, weights = ppo.token_logprobs(model, tokens), torch.randn(4, 32)
    gradient = flat_gradient((weights * exact).sum(), model)
    model = model if how == "autocast" else model.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        rough = ppo.token_logprobs(model, tokens, chunk=16)
    assert rough.dtype == torch.float32
    close(rough, exact, 0, 0.15)
    rough_gradient = flat_gradient((weights * rough).sum(), model).float()
    assert torch.cosine_similarity(rough_gradient, gradient, dim=0) > 0.99
    assert float(rough_gradient.norm() / gradient.norm()) == pytest.approx(1, abs=0.03)


def test_bfloat16_products_are_added_in_slabs():
    a, b = torch.randn(3, 7).bfloat16(), torch.randn(3, 5).bfloat16()
    total = torch.ones(7, 5)
    logprobs.add_product(total, a, b, slab_numbers=10)  # 2 rows at a time, the last one alone
    close(total, 1 + a.float().T @ b.float(), 0.02, 0.02)


class Sizes(TorchDispatchMode):
    """Records the shape of every fresh tensor that an operation returns: no view, not in place."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not any(returned.alias_info is not None for returned in func._schema.returns):
            tensors = out if isinstance(out, (tuple, list)) else [out]
            self.shapes += [tuple(t.shape) for t in tensors if isinstance(t, torch.Tensor)]
        return out


def test_no_tensor_of_vocabulary_size_times_positions():
    vocab, width = 997, SHAPE["hidden_size"]
    model = small_llama(vocab)
    tokens = torch.randint(vocab, (3, 41))
    logprobs.check_head(model)
    with Sizes() as sizes:
        ppo.token_logprobs(model, tokens, chunk=8).sum().backward()
    logits = [math.prod(shape) for shape in sizes.shapes if shape[-1:] == (vocab,)]
    assert max(logits) == 8 * vocab  # 15 chunks of 8 of the 120 positions
    # as large as the head's weight: the buffer of its gradient, the input embedding's gradient
    assert sum(math.prod(shape) == vocab * width for shape in sizes.shapes) == 2
    with Sizes() as sizes:
        naive(model, tokens).sum().backward()
    assert max(map(math.prod, sizes.shapes)) >= 3 * 40 * vocab  # the measure sees what it should


@pytest.mark.parametrize(
    "config", [CohereConfig(**SMALL, logit_scale=0.8), GraniteConfig(**SMALL, logits_scaling=1.2)]
)
@pytest.mark.parametrize("seed", range(5))
def test_scaled_logits_are_refused(config, seed):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=type(model).__name__):
        ppo.token_logprobs(model, torch.randint(VOCAB, (2, 8)))


def test_a_head_that_is_no_linear_layer_is_refused():
    model = build()
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match="LlamaForCausalLM.*Sequential"):
        ppo.token_logprobs(model, torch.randint(VOCAB, (2, 8)))


@pytest.mark.parametrize(
    "shape, temperature, message",
    [((1, 4), 0, "temperature 0"), ((1, 1), 1, "time of at least 2"), ((4,), 1, "time")],
)
def test_bad_arguments_of_token_logprobs(shape, temperature, message):
    tokens = torch.zeros(shape, dtype=torch.long)
    with pytest.raises(ValueError, match=message):
        ppo.token_logprobs(build(), tokens, temperature=temperature)


# --------------------------------------------------------------------------- advantages


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (0.9, 0.8), (1.0, 0.0), (0.95, 1.0)])
def test_gae_equals_the_double_sum(gamma, lam):
    torch.manual_seed(0)
    rewards, values, lengths = torch.randn(4, 9), torch.randn(4, 9), [9, 1, 4, 6]
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    values[~mask] = float("nan")  # whatever stands in the padding
    advantages, returns = ppo.gae(rewards, values, mask, gamma=gamma, lam=lam)
    assert (advantages[~mask] == 0).all() and (returns[~mask] == 0).all()
    for row, length in enumerate(lengths):
        reward = rewards[row, :length].tolist()
        value = values[row, :length].tolist() + [0.0]
        delta = [reward[t] + gamma * value[t + 1] - value[t] for t in range(length)]
        for t in range(length):
            expected = sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, length))
            assert float(advantages[row, t]) == pytest.approx(expected, abs=1e-5)
            assert float(returns[row, t]) == pytest.approx(expected + value[t], abs=1e-5)
            if lam == 1:  # the discounted rewards to come, whatever the critic says
                to_come = sum(gamma ** (k - t) * reward[k] for k in range(t, length))
                assert float(returns[row, t]) == pytest.approx(to_come, abs=1e-5)


def test_the_docstrings_table():
    """Two responses, the critic's values, what PPO at either end of lambda makes of them."""
    values = torch.tensor([[0.5, 0.6, 0.6, 0.6, 0.6, 0.9], [0.5, 0.6, 0.6, 0.6, 0.6, 0.1]])
    rewards = torch.zeros(2, 6)
    rewards[0, -1] = 1
    mask = torch.ones(2, 6, dtype=torch.bool)
    far, _ = ppo.gae(rewards, values, mask, gamma=1, lam=1)
    near, _ = ppo.gae(rewards, values, mask, gamma=1, lam=0)
    close(far, torch.tensor([[0.5, 0.4, 0.4, 0.4, 0.4, 0.1], [-0.5, -0.6, -0.6, -0.6, -0.6, -0.1]]))
    close(near, torch.tensor([[0.1, 0, 0, 0, 0.3, 0.1], [0.1, 0, 0, 0, -0.5, -0.1]]))
    assert ppo.group_advantages([[1, 0]], how="rloo").tolist() == [[1, -1]]


def test_group_advantages_by_hand():
    rewards = [[1, 0, 0, 0], [1, 1, 1, 1], [0.1, 0.1, 0.1, 0.1], [1, 1, 0, 0]]
    rloo = ppo.group_advantages(rewards, how="rloo")
    np.testing.assert_allclose(rloo[0], [1, -1 / 3, -1 / 3, -1 / 3], rtol=1e-6)
    np.testing.assert_allclose(rloo[3], [2 / 3, 2 / 3, -2 / 3, -2 / 3], rtol=1e-6)
    grpo = ppo.group_advantages(rewards, how="grpo")
    # mean 1/4, sample std 1/2
    np.testing.assert_allclose(grpo[0], [1.5, -0.5, -0.5, -0.5], rtol=1e-5)
    assert (rloo[1:3] == 0).all() and (grpo[1:3] == 0).all() and grpo.dtype == np.float32


@pytest.mark.parametrize(
    "rewards, how, message",
    [
        ([[1.0], [0.0]], "grpo", "at least 2"),
        ([1.0, 0.0], "rloo", "at least 2"),
        ([[1.0, 0.0]], "ppo", "'grpo' or 'rloo'"),
    ],
)
def test_group_advantages_refuse(rewards, how, message):
    with pytest.raises(ValueError, match=message):
        ppo.group_advantages(rewards, how=how)


def test_whitening_over_tokens_not_rollouts():
    # token mean 3.25, rollout mean 2.5
    white = ppo.whiten([torch.tensor([1.0]), torch.tensor([4.0, 4.0, 4.0])])
    assert [len(w) for w in white] == [1, 3]
    tokens = torch.cat(white)
    assert float(tokens.mean()) == pytest.approx(0, abs=1e-6)
    assert float(tokens.std(correction=0)) == pytest.approx(1, abs=1e-5)
    assert float(white[0][0]) == pytest.approx((1 - 3.25) / math.sqrt(27 / 16), abs=1e-5)
    alike = ppo.whiten([torch.full((3,), 0.1), torch.full((5,), 0.1)])
    assert (torch.cat(alike) == 0).all()


def test_critic_advantages_put_the_reward_on_the_last_token():
    rollouts, rewards = some_rollouts(4), [1.0, 0.0, 0.5, 1.0]
    critic = ppo.ValueModel(build())
    advantages, values, returns = ppo.critic_advantages(
        critic, rollouts, rewards, ppo.Settings(gamma=0.9, lam=1.0)
    )
    for r, reward, a, v, target in zip(rollouts, rewards, advantages, values, returns, strict=True):
        expected = reward * 0.9 ** torch.arange(len(r.response) - 1, -1, -1.0)
        torch.testing.assert_close(a, expected)
        torch.testing.assert_close(target, expected)
        assert (v == 0).all()  # a fresh critic


# --------------------------------------------------------------------------- batches and the critic


def test_value_model_is_a_copy_that_starts_at_0():
    model = build()
    model(torch.ones(1, 4, dtype=torch.long)).logits.sum().backward()
    critic, tokens = ppo.ValueModel(model), torch.randint(VOCAB, (3, 8))
    assert critic(tokens).shape == (3, 8) and (critic(tokens) == 0).all()
    assert all(p.grad is None and p.requires_grad for p in critic.parameters())
    before = copy.deepcopy(model)
    with torch.no_grad():
        for p in critic.parameters():
            p.add_(0.1 * torch.randn_like(p))
    assert (difference(before, model) == 0).all()  # the critic's backbone is its own
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert critic(tokens).dtype == torch.float32
    assert ppo.ValueModel(model.bfloat16())(tokens).dtype == torch.float32


@pytest.mark.parametrize("budget", [1, 30, 10**6])
def test_passes_without_gradient_do_not_depend_on_the_batching(budget):
    model, rollouts = build("mistral window"), some_rollouts()
    settings = ppo.Settings(temperature=0.7, tokens_per_microbatch=budget)
    logprobs = ppo.rollout_logprobs(model, rollouts, settings)
    for ours, theirs in zip(logprobs, one_by_one(model, rollouts, 0.7), strict=True):
        assert not ours.requires_grad
        close(ours, theirs.detach(), 1e-5, 1e-5)
    critic = ppo.ValueModel(model)
    torch.nn.init.normal_(critic.head.weight)
    values = ppo.rollout_values(critic, rollouts, settings)
    for ours, theirs in zip(values, values_one_by_one(critic, rollouts), strict=True):
        close(ours, theirs.detach(), 1e-5, 1e-5)
    only = [i % 3 == 0 for i in range(10)]
    some = ppo.rollout_logprobs(model, rollouts, settings, only=only)
    assert [x is not None for x in some] == only
    close(some[3], logprobs[3], 1e-5, 1e-5)


def test_microbatches_keep_to_the_budget_and_lose_nothing():
    rollouts = some_rollouts(40)
    lengths = [len(r.prompt) + len(r.response) for r in rollouts]
    groups = ppo.microbatches(rollouts, 50)
    assert sorted(i for group in groups for i in group) == list(range(40))
    sizes = [len(group) * max(lengths[i] for i in group) for group in groups]
    assert max(sizes) <= 50 and sum(sizes) < 1.2 * sum(lengths)  # little of it is padding
    # each is longer than the budget: alone
    assert all(len(group) == 1 for group in ppo.microbatches(rollouts, 1))
    chosen = ppo.microbatches(rollouts, 50, [3, 5, 7])
    assert sorted(i for group in chosen for i in group) == [3, 5, 7]


# --------------------------------------------------------------------------- losses


def test_the_clip_cuts_the_gradient_only_where_it_would_pay_to_go_on():
    # inside; past the clip in the paying direction; past it in the costly one; the same for A < 0
    ratio = torch.tensor([1.1, 1.5, 0.5, 0.9, 0.5, 1.5])
    advantages = torch.tensor([2.0, 2.0, 2.0, -2.0, -2.0, -2.0])
    logratio = ratio.log().requires_grad_(True)
    losses = ppo.clipped_surrogate(logratio.exp(), advantages, 0.2)
    close(losses, torch.tensor([-2.2, -2.4, -1.0, 1.8, 1.6, 3.0]))
    losses.sum().backward()
    close(logratio.grad, torch.tensor([-2.2, 0.0, -1.0, 1.8, 0.0, 3.0]))


def test_value_clipping():
    # inside; past the clip toward R = 1; past it away from R
    new = torch.tensor([0.1, 0.5, -0.5], requires_grad=True)
    losses = ppo.value_loss(new, torch.zeros(3), torch.ones(3), 0.2)
    close(losses, torch.tensor([0.5 * 0.81, 0.5 * 0.64, 0.5 * 2.25]))
    losses.sum().backward()
    close(new.grad, torch.tensor([-0.9, 0.0, -1.5]))
    unclipped = ppo.value_loss(new, torch.zeros(3), torch.ones(3), None)
    close(unclipped, 0.5 * (new - 1) ** 2)


def test_k3_is_an_unbiased_estimate_of_the_kl():
    torch.manual_seed(0)
    new, ref = (0.5 * torch.randn(2, 50)).log_softmax(-1)  # alike: none reaches the clamp
    estimates = ppo.kl_k3(ref, new)
    assert (estimates >= 0).all() and estimates.max() < 10
    exact = (new.exp() * (new - ref)).sum()
    close((new.exp() * estimates).sum(), exact, 1e-4)
    far = torch.tensor([-200.0, 3.0, 0.0], requires_grad=True)
    k3 = ppo.kl_k3(torch.zeros(3), far)
    k3.sum().backward()
    assert k3[0] == 10 and far.grad[0] == 0 and far.grad[2] == 0
    assert far.grad.isfinite().all()


# --------------------------------------------------------------------------- update


@pytest.mark.parametrize("given", [False, True])  # the log-probs of the policy that sampled
@pytest.mark.parametrize("name", ["llama", "gpt2"])  # GPT-2 has dropout
def test_first_ratio_is_one_and_the_gradient_is_the_policy_gradient(name, given):
    model, rollouts = build(name), some_rollouts()
    advantages = noise(rollouts)
    logprobs = torch.cat(one_by_one(model, rollouts, 0.8))
    expected = flat_gradient(-(torch.cat(advantages) * logprobs).mean(), model)
    settings = one_step(temperature=0.8, tokens_per_microbatch=40)
    old = ppo.rollout_logprobs(model, rollouts, settings) if given else None
    policy = copy.deepcopy(model).train()
    metrics = ppo.update(policy, sgd(policy), rollouts, advantages, settings, old_logprobs=old)
    close(difference(model, policy), expected)
    assert metrics["ratio_mean"] == pytest.approx(1, abs=1e-6)
    assert metrics["clip_fraction"] == 0
    assert metrics["approx_kl"] == pytest.approx(0, abs=1e-6)
    assert not any(module.training for module in policy.modules())


WITHOUT = (0, 3, 4)  # rollouts that have nothing to teach


def off_policy(model, rollouts):
    """Everything on: another policy that sampled, a reference, advantages of which some are 0.
    Returns old, ref, advantages."""
    advantages = noise(rollouts, 1)
    for i in WITHOUT:
        advantages[i] = torch.zeros_like(advantages[i])
    now = ppo.rollout_logprobs(model, rollouts, ppo.Settings())
    old = [a + b for a, b in zip(now, noise(rollouts, 2, 0.15))]
    ref = [a + b for a, b in zip(now, noise(rollouts, 3, 0.3))]
    return old, ref, advantages


@pytest.mark.parametrize("budget", [1, 40, 10**6])
@pytest.mark.parametrize("kl_coef", [0.0, 0.5])
def test_gradient_equals_the_formula_whatever_the_microbatches(kl_coef, budget):
    """At kl_coef 0 the rollouts without advantages are left out: the same gradient."""
    model, rollouts = build(), some_rollouts()
    old, ref, advantages = off_policy(model, rollouts)
    loss = objective(one_by_one(model, rollouts), old, ref, advantages, kl_coef)
    expected = flat_gradient(loss, model)
    settings = one_step(kl_coef=kl_coef, tokens_per_microbatch=budget)
    lists = {"old_logprobs": old, "ref_logprobs": ref}
    gradient, metrics = moved(model, rollouts, advantages, settings, **lists)
    close(gradient, expected)
    assert metrics["grad_norm"] == pytest.approx(float(expected.norm()), rel=1e-3)


@pytest.mark.parametrize("kl_coef", [0.0, 0.5])
def test_metrics_are_means_over_the_tokens_that_were_trained_on(kl_coef):
    model, rollouts = build(), some_rollouts()
    old, ref, advantages = off_policy(model, rollouts)
    lists = {"old_logprobs": old, "ref_logprobs": ref}
    settings = one_step(kl_coef=kl_coef, tokens_per_microbatch=40)
    _, metrics = moved(model, rollouts, advantages, settings, **lists)
    passed = [i for i in range(10) if kl_coef > 0 or i not in WITHOUT]
    columns = (one_by_one(model, rollouts), old, ref, advantages)
    new, old, ref, a = (torch.cat([column[i] for i in passed]).detach() for column in columns)
    ratio, d = (new - old).exp(), ref - new
    cut = torch.maximum(-a * ratio, -a * ratio.clamp(0.8, 1.2)) > -a * ratio
    assert metrics["tokens_trained"] == len(a)
    expected = {
        "kl": (d.exp() - d - 1).mean(),
        "ratio_mean": ratio.mean(),
        "approx_kl": (ratio - 1 - ratio.log()).mean(),
        "clip_fraction": cut.float().mean(),
    }
    for name, value in expected.items():
        assert 0 < metrics[name] == pytest.approx(float(value), rel=1e-3), name


def test_finite_differences_of_the_whole_loss():
    # float64, which Llama's norms are not whatever we ask
    model, rollouts = build("gpt2", dtype=torch.float64), some_rollouts(5)
    old, ref, advantages = off_policy(model, rollouts)
    lists = {"old_logprobs": old, "ref_logprobs": ref}
    settings = one_step(kl_coef=0.3, tokens_per_microbatch=40)
    policy = copy.deepcopy(model)
    ppo.update(policy, sgd(policy), rollouts, advantages, settings, **lists)

    @torch.no_grad()
    def loss_at(weight, where, shift):
        weight.flatten()[where] += shift
        loss = objective(one_by_one(model, rollouts), old, ref, advantages, 0.3)
        weight.flatten()[where] -= shift
        return float(loss)

    names = ("wte.weight", "wpe.weight", "h.0.attn.c_attn.weight", "h.1.mlp.c_fc.bias")
    for name in (*names, "ln_f.weight"):
        weight, after = (m.transformer.get_parameter(name) for m in (model, policy))
        gradient = (weight - after).detach().flatten()
        where = gradient.abs().argmax()
        slope = (loss_at(weight, where, 1e-6) - loss_at(weight, where, -1e-6)) / 2e-6
        assert slope == pytest.approx(float(gradient[where]), rel=1e-4)


@pytest.mark.parametrize("budget", [1, 50, 10**6])
def test_gradient_of_the_critic_and_its_metrics(budget):
    model, rollouts = build(), some_rollouts()
    critic = ppo.ValueModel(model)
    torch.nn.init.normal_(critic.head.weight, std=0.1)
    new = torch.cat(values_one_by_one(critic, rollouts))
    now = ppo.rollout_values(critic, rollouts, ppo.Settings())
    values = [v + e for v, e in zip(now, noise(rollouts, 1, 0.3))]
    returns = noise(rollouts, 2)
    old, target = torch.cat(values), torch.cat(returns)
    clipped = torch.minimum(torch.maximum(new, old - 0.2), old + 0.2)
    loss = 0.5 * torch.maximum((new - target) ** 2, (clipped - target) ** 2).mean()
    expected = flat_gradient(loss, critic)
    policy, trained = copy.deepcopy(model), copy.deepcopy(critic)
    metrics = ppo.update(
        policy, sgd(policy, trained), rollouts, noise(rollouts),
        one_step(tokens_per_microbatch=budget), critic=trained, values=values, returns=returns,
    )  # fmt: skip
    close(difference(critic, trained), expected)
    assert metrics["value_loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert metrics["critic_grad_norm"] == pytest.approx(float(expected.norm()), rel=1e-3)
    explained = 1 - float((target - old).var() / target.var())
    assert metrics["explained_variance"] == pytest.approx(explained, abs=1e-4)


@pytest.mark.parametrize("lam", [1.0, 0.9])
def test_a_critic_that_learns_as_it_is_read_takes_the_same_step(lam):
    """One pass for values and gradient, in several micro-batches, beside two passes."""
    model, rollouts = build(), some_rollouts()
    fresh = ppo.ValueModel(model)
    torch.nn.init.normal_(fresh.head.weight, std=0.1)
    rewards = np.arange(len(rollouts)) % 2
    settings = one_step(lam=lam, gamma=0.95, tokens_per_microbatch=20)
    trained, found = [], []
    for learn in (False, True):
        policy, critic = copy.deepcopy(model), copy.deepcopy(fresh)
        lists = ppo.critic_advantages(critic, rollouts, rewards, settings, learn=learn)
        assert any(p.grad is not None for p in critic.parameters()) == learn
        advantages, values, returns = lists
        metrics = ppo.update(
            policy, sgd(policy, critic), rollouts, advantages, settings,
            critic=critic, values=values, returns=returns, learned=learn,
        )  # fmt: skip
        trained.append([difference(fresh, critic), difference(model, policy)])
        found.append([torch.cat(x) for x in lists] + [torch.tensor(list(metrics.values()))])
    for two, one in zip([*trained[0], *found[0]], [*trained[1], *found[1]], strict=True):
        close(one, two)
    assert trained[0][0].any() and trained[0][1].any()


def test_a_critic_can_only_have_learned_for_a_single_step():
    rollouts = some_rollouts(4)
    numbers = noise(rollouts)
    policy = build()
    critic = ppo.ValueModel(policy)
    for settings in (ppo.Settings(epochs=2), ppo.Settings(minibatch=2)):
        with pytest.raises(ValueError, match="4 rollouts, .* only an update of one step"):
            ppo.update(
                policy, sgd(policy, critic), rollouts, numbers, settings,
                critic=critic, values=numbers, returns=numbers, learned=True,
            )  # fmt: skip


def test_old_logprobs_are_those_of_generation_where_it_computed_in_float32():
    model = build()
    settings = ppo.Settings(temperature=0.7)
    groups = generate(
        model, [[3, 4], [5, 6, 7]], n=3, max_new_tokens=6, temperature=0.7, seed=0, stop_ids=[1]
    )
    rollouts = [rollout for group in groups for rollout in group]
    sampled = ppo.sampled_logprobs(model, rollouts, settings)
    assert [x.tolist() for x in sampled] == [pytest.approx(r.logprobs) for r in rollouts]
    computed = ppo.rollout_logprobs(model, rollouts, settings)
    torch.testing.assert_close(torch.cat(sampled), torch.cat(computed), atol=1e-5, rtol=0)
    settings.autocast = torch.bfloat16  # then generation's are of rounded weights
    again = ppo.sampled_logprobs(model, rollouts, settings)
    assert torch.equal(torch.cat(again), torch.cat(ppo.rollout_logprobs(model, rollouts, settings)))
    bare = [SimpleNamespace(prompt=r.prompt, response=r.response, logprobs=[]) for r in rollouts]
    settings.autocast = None
    assert torch.equal(torch.cat(ppo.sampled_logprobs(model, bare, settings)), torch.cat(computed))


def test_gradient_norms_are_clipped_each_by_itself():
    model, rollouts = build(), some_rollouts()
    policy, critic = copy.deepcopy(model), ppo.ValueModel(model)
    before, ones = copy.deepcopy(critic), [torch.ones(len(r.response)) for r in rollouts]
    metrics = ppo.update(
        policy, sgd(policy, critic), rollouts, noise(rollouts), one_step(max_grad_norm=0.01),
        critic=critic, values=[0 * x for x in ones], returns=ones,
    )  # fmt: skip
    assert min(metrics["grad_norm"], metrics["critic_grad_norm"]) > 0.02
    for old, new in ((model, policy), (before, critic)):
        assert float(difference(old, new).norm()) == pytest.approx(0.01, rel=1e-3)


def test_epochs_minibatches_and_seeds():
    model, rollouts = build(), some_rollouts(10)
    settings = ppo.Settings(epochs=2, minibatch=4)
    policies = []
    for seed in (0, 0, 1):
        policy, critic = copy.deepcopy(model), ppo.ValueModel(model)
        advantages, values, returns = ppo.critic_advantages(
            critic, rollouts, np.arange(10) % 2, settings
        )
        metrics = ppo.update(
            policy, adamw(policy, critic), rollouts, ppo.whiten(advantages), settings,
            critic=critic, values=values, returns=returns, rng=np.random.default_rng(seed),
        )  # fmt: skip
        assert metrics["optimizer_steps"] == 6 and metrics["skipped_minibatches"] == 0
        assert metrics["tokens_trained"] == 2 * sum(len(r.response) for r in rollouts)
        assert metrics["ratio_mean"] != 1  # from the second step on the policy is another
        assert all(isinstance(v, (int, float)) and math.isfinite(v) for v in metrics.values())
        policies.append(policy.lm_head.weight)
    assert torch.equal(policies[0], policies[1]) and not torch.equal(policies[0], policies[2])


def test_one_optimizer_trains_policy_and_critic_as_two_would():
    """Adam must not let the momentum of one move it in the other's step."""
    model, rollouts = build(), some_rollouts(10)
    settings = ppo.Settings(epochs=2, minibatch=4)
    nothing = [torch.zeros(len(r.response)) for r in rollouts]

    def train(advantages, with_critic):
        policy, critic = copy.deepcopy(model), ppo.ValueModel(model)
        lists = {"critic": critic, "values": nothing, "returns": noise(rollouts, 5)}
        lists = lists if with_critic else {}
        optimizer = adamw(policy, critic)
        ppo.update(policy, optimizer, rollouts, advantages, settings, **lists)
        return policy, critic

    policy, critic = train(noise(rollouts), with_critic=True)
    policy_alone, _ = train(noise(rollouts), with_critic=False)
    same_policy, critic_alone = train(nothing, with_critic=True)
    assert (difference(policy, policy_alone) == 0).all()
    assert (difference(critic, critic_alone) == 0).all()
    assert (difference(model, same_policy) == 0).all() and difference(model, policy).any()


def test_minibatches_are_separate_steps():
    model, rollouts = build(), some_rollouts(2)
    old = ppo.rollout_logprobs(model, rollouts, ppo.Settings())
    advantages = noise(rollouts, scale=0.01)
    gradient, _ = moved(model, rollouts, advantages, one_step(minibatch=1))
    policy = copy.deepcopy(model)
    for i in np.random.default_rng(0).permutation(2):
        lists = [rollouts[i]], [advantages[i]]
        ppo.update(policy, sgd(policy), *lists, one_step(), old_logprobs=[old[i]])
    close(gradient, difference(model, policy))


@pytest.mark.parametrize("shift", [5.0, 200.0])  # e^200 is infinite in float32
def test_an_exploding_ratio_skips_the_step(shift):
    model, rollouts = build(), some_rollouts()
    old = [x - shift for x in ppo.rollout_logprobs(model, rollouts, ppo.Settings())]
    gradient, metrics = moved(model, rollouts, noise(rollouts), old_logprobs=old)
    assert (gradient == 0).all() and "ratio_mean" not in metrics
    assert metrics["skipped_minibatches"] == 1 and metrics["optimizer_steps"] == 0


@pytest.mark.parametrize("bad", [0, 1])  # of two minibatches, each one rollout
def test_a_skipped_step_leaves_the_other_as_if_it_were_alone(bad):
    model, rollouts = build(), some_rollouts(2)
    old = ppo.rollout_logprobs(model, rollouts, ppo.Settings())
    old[bad] = old[bad] - 50
    advantages = [-a.abs() for a in noise(rollouts)]  # no clip stops these
    gradient, metrics = moved(model, rollouts, advantages, one_step(minibatch=1), old_logprobs=old)
    expected, _ = moved(model, [rollouts[1 - bad]], [advantages[1 - bad]])
    close(gradient, expected)
    assert metrics["skipped_minibatches"] == metrics["optimizer_steps"] == 1


def test_nothing_to_learn_moves_nothing():
    policy, rollouts = build(), some_rollouts()
    optimizer = adamw(policy, lr=0.1)
    ppo.update(policy, optimizer, rollouts, noise(rollouts), ppo.Settings())
    before = copy.deepcopy(policy)  # AdamW's momentum alone would move it
    nothing = [torch.zeros(len(r.response)) for r in rollouts]
    metrics = ppo.update(policy, optimizer, rollouts, nothing, ppo.Settings())
    assert (difference(before, policy) == 0).all()
    assert metrics["optimizer_steps"] == metrics["tokens_trained"] == 0


@pytest.mark.parametrize("broken", ["policy", "critic"])
def test_a_nan_makes_no_step_and_is_counted(broken):
    policy, rollouts = build(), some_rollouts()
    critic = ppo.ValueModel(policy)
    before = copy.deepcopy(policy if broken == "policy" else critic)
    norm = policy.model.norm if broken == "policy" else critic.backbone.norm
    kept = norm.weight[0].item()
    with torch.no_grad():
        norm.weight[0] = float("nan")
    zeros = [torch.zeros(len(r.response)) for r in rollouts]
    critics = {"critic": critic, "values": zeros, "returns": noise(rollouts)}
    optimizer = sgd(policy, critic)
    for in_a_row in (1, 2):
        metrics = ppo.update(
            policy, optimizer, rollouts, noise(rollouts), ppo.Settings(), **critics
        )
        assert metrics["nonfinite_steps"] == 1
        counts = [model.bad_steps for model in (policy, critic)]
        assert counts == ([in_a_row, 0] if broken == "policy" else [0, in_a_row])
        assert all(math.isfinite(value) for value in metrics.values())
        assert metrics["optimizer_steps"] == (0 if broken == "policy" else 1)
    with torch.no_grad():
        norm.weight[0] = kept
    assert (difference(before, policy if broken == "policy" else critic) == 0).all()


@pytest.mark.parametrize("fails", [1, 2, 5])
def test_out_of_memory_halves_the_microbatches_and_changes_no_gradient(monkeypatch, fails):
    """In forward passes of the policy, of the critic, and in the second minibatch."""

    def run(policy):
        critic = ppo.ValueModel(policy)
        zeros = [torch.zeros(len(r.response)) for r in rollouts]
        settings = ppo.Settings(tokens_per_microbatch=64, minibatch=len(rollouts) // 2)
        critics = {"critic": critic, "values": zeros, "returns": noise(rollouts)}
        metrics = ppo.update(
            policy, sgd(policy, critic), rollouts, noise(rollouts), settings, **critics
        )
        return policy, critic, metrics, settings.tokens_per_microbatch

    rollouts, calls = some_rollouts(), itertools.count(1)
    *expected, metrics, budget = run(build())
    assert budget == 64
    pad = ppo.pad

    def full(*arguments):
        if next(calls) in range(fails, fails + 2):
            raise torch.OutOfMemoryError("full")
        return pad(*arguments)

    monkeypatch.setattr(ppo, "pad", full)
    with pytest.warns(UserWarning, match="--tokens_per_microbatch 32"):
        *models, again, budget = run(build())
    assert budget == 16
    for model, other in zip(expected, models):
        assert float(difference(model, other).abs().max()) < 1e-5
    assert again == pytest.approx(metrics, rel=1e-3, abs=1e-5)


def test_memory_that_never_suffices_is_an_error(monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(ppo, "pad", full)
    with pytest.warns(UserWarning), pytest.raises(torch.OutOfMemoryError):
        ppo.rollout_logprobs(build(), some_rollouts(), ppo.Settings(tokens_per_microbatch=8))


def test_gradient_checkpointing_stays_on_and_changes_nothing():
    model, rollouts = build("gpt2"), some_rollouts()
    expected, _ = moved(model, rollouts, noise(rollouts))
    policy, calls = copy.deepcopy(model), []
    enable = getattr(policy, "activation_checkpointing_enable", None)  # its new name
    (enable or policy.gradient_checkpointing_enable)()
    logprobs.check_head(policy)
    policy.transformer.h[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    ppo.update(policy, sgd(policy), rollouts, noise(rollouts), one_step())
    assert len(calls) == 2  # forward, and again in backward
    close(difference(model, policy), expected)


def test_autocast_update_agrees_with_float32():
    model, rollouts = build(), some_rollouts()
    expected, _ = moved(model, rollouts, noise(rollouts))
    settings = one_step(autocast=torch.bfloat16)
    old = ppo.rollout_logprobs(model, rollouts, settings)
    gradient, metrics = moved(model, rollouts, noise(rollouts), settings, old_logprobs=old)
    assert metrics["ratio_mean"] == pytest.approx(1, abs=1e-2)
    assert torch.cosine_similarity(gradient, expected, dim=0) > 0.99


NUMBERS = noise(some_rollouts(3))


@pytest.mark.parametrize(
    "changes, lists, message",
    [
        ({}, {"advantages": NUMBERS[:2]}, "advantages: needs 3"),
        ({}, {"old_logprobs": [x[:0] for x in NUMBERS]}, "old_logprobs: needs 3"),
        ({}, {"advantages": [NUMBERS[0], NUMBERS[1] / 0, NUMBERS[2]]}, "infinity in rollout 1"),
        ({"kl_coef": 0.1}, {}, "needs ref_logprobs"),
        ({}, {"critic": "one"}, "needs values and returns"),
        ({}, {"rollouts": [], "advantages": []}, "0 rollouts"),
        ({"minibatch": 0}, {}, "minibatch 0"),
        ({"epochs": 0}, {}, "epochs 0"),
        ({"autocast": torch.float16}, {}, "float16"),
        ({}, {"rollouts": [SimpleNamespace(prompt=[], response=[1])]}, "rollout 0: 0 prompt"),
    ],
)
def test_bad_arguments_of_update(changes, lists, message):
    model = build()
    lists = {"rollouts": some_rollouts(3), "advantages": NUMBERS} | lists
    with pytest.raises(ValueError, match=message) as raised:
        ppo.update(model, sgd(model), settings=ppo.Settings(**changes), **lists)
    assert "\n" not in str(raised.value)


# --------------------------------------------------------------------------- does it learn?


@pytest.mark.parametrize("algorithm", ["ppo", "grpo", "rloo"])
def test_bandit(algorithm):
    """One state, one token, reward 1 for token 7: its probability must rise a lot."""
    model = small_llama(12)
    critic = ppo.ValueModel(model) if algorithm == "ppo" else None
    optimizer = adamw(*(m for m in (model, critic) if m is not None), lr=3e-3)
    settings = ppo.Settings(epochs=2, minibatch=32)
    rng = np.random.default_rng(0)

    def chances():
        with torch.no_grad():
            return model(torch.tensor([[3, 4]])).logits[0, -1].softmax(0)

    before = chances()[7]
    for _ in range(15):
        drawn = chances().multinomial(64, replacement=True).tolist()
        rollouts = [SimpleNamespace(prompt=[3, 4], response=[token]) for token in drawn]
        rewards = np.array([float(token == 7) for token in drawn])
        lists = {"critic": critic, "rng": rng}
        if algorithm == "ppo":
            advantages, values, returns = ppo.critic_advantages(critic, rollouts, rewards, settings)
            advantages = ppo.whiten(advantages)
            lists |= {"values": values, "returns": returns}
        else:
            scores = ppo.group_advantages(rewards.reshape(4, 16), how=algorithm)
            advantages = ppo.per_token(rollouts, scores.flatten())
        ppo.update(model, optimizer, rollouts, advantages, settings, **lists)
    assert before < 0.15 and chances()[7] > 0.6
