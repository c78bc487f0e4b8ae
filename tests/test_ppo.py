"""ppo.py against plain PyTorch, double loops and hand computation, on tiny random models."""
import copy
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (AutoModelForCausalLM, CohereConfig, Gemma2Config, GPT2Config, GPTJConfig, GraniteConfig,
                          LlamaConfig, MistralConfig, Qwen2Config)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ppo

VOCAB = 61
SHAPE = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0)
GPT = dict(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
CONFIGS = {
    "llama": LlamaConfig(**SHAPE), "qwen2 tied": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "gpt2": GPT2Config(**GPT), "gpt-j bias": GPTJConfig(**GPT, rotary_dim=4),
    "mistral window": MistralConfig(**SHAPE, sliding_window=4),
    "gemma2 soft cap": Gemma2Config(**SHAPE, head_dim=8, sliding_window=4, final_logit_softcapping=0.5)}


@pytest.fixture(autouse=True, scope="module")
def one_thread():  # on models this small a second one costs more than it brings
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(name="llama", seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=dtype).eval()
    with torch.no_grad():  # fresh weights give nearly uniform predictions: spread them out
        model.get_output_embeddings().weight.mul_(10 if name != "gemma2 soft cap" else 3)
        if model.get_output_embeddings().bias is not None:
            model.get_output_embeddings().bias.normal_()
    return model


def some_rollouts(count=10, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda low, high: rng.integers(3, VOCAB, rng.integers(low, high)).tolist()
    return [SimpleNamespace(prompt=draw(1, 7), response=draw(1, 15)) for _ in range(count)]


def noise(rollouts, seed=0, scale=1.0):
    rng = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(len(r.response), generator=rng) for r in rollouts]


def naive(model, tokens, temperature=1.0):
    logits = model(tokens).logits[:, :-1] / temperature
    return logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)


def one_by_one(model, rollouts, temperature=1.0):
    """Response log-probs, no batching, no padding."""
    return [naive(model, torch.tensor([r.prompt + r.response]), temperature)[0, len(r.prompt) - 1:] for r in rollouts]


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=1.0)


def moved(model, rollouts, advantages, **kwargs):
    """The gradient that `update` steps along: how far SGD with lr 1 moves each weight, one flat vector."""
    policy = copy.deepcopy(model)
    kwargs = {"minibatch": 1000, "max_grad_norm": None} | kwargs
    metrics = ppo.update(policy, sgd(policy), rollouts, advantages, **kwargs)
    return torch.cat([(a - b).flatten() for a, b in zip(model.parameters(), policy.parameters())]).detach(), metrics


def flat_gradient(loss, model):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


# --------------------------------------------------------------------------- log-probs


@pytest.mark.parametrize("name", CONFIGS)
def test_token_logprobs_and_gradient_equal_the_naive_ones(name):
    model, tokens = build(name), torch.randint(VOCAB, (3, 17))
    for temperature, chunk in ((1.0, None), (0.6, 7)):
        ours = ppo.token_logprobs(model, tokens, temperature=temperature, chunk=chunk)
        theirs = naive(model, tokens, temperature)
        assert ours.shape == (3, 16) and ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        weights = torch.randn(3, 16)
        gradients = [flat_gradient((weights * logprobs).sum(), model) for logprobs in (ours, theirs)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_head_gradcheck(softcap):
    torch.manual_seed(0)
    shapes = (5, 4), (7, 4), (7,)
    hidden, weight, bias = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    run = lambda h, w, b: ppo.HeadLogprobs.apply(h, w, b, torch.tensor([0, 6, 3, 3, 1]), 0.7, softcap, 2, torch.float64)
    assert torch.autograd.gradcheck(run, (hidden, weight, bias))
    assert torch.autograd.gradcheck(lambda h, w: run(h, w, None), (hidden, weight))
    assert torch.autograd.gradcheck(lambda h: run(h, weight.detach(), None), (hidden,))  # a frozen head


def test_mask_and_right_padding_do_not_matter():
    model, rollouts = build("gpt2"), some_rollouts()
    tokens, mask = ppo.pad(rollouts, "cpu")
    assert mask.sum() == sum(len(r.response) for r in rollouts)
    logprobs = ppo.token_logprobs(model, tokens, mask=mask)
    assert (logprobs[~mask] == 0).all()
    torch.testing.assert_close(logprobs[mask], torch.cat(one_by_one(model, rollouts)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logprobs[mask], ppo.token_logprobs(model, tokens)[mask])
    nothing = ppo.token_logprobs(model, tokens, mask=torch.zeros_like(mask))
    assert (nothing == 0).all()


def test_frozen_model_used_twice_and_retained_graph():
    model, tokens = build("qwen2 tied"), torch.randint(VOCAB, (2, 9))
    twice = ppo.token_logprobs(model, tokens).sum() + ppo.token_logprobs(model, tokens.flip(0)).sum()
    once = flat_gradient(2 * ppo.token_logprobs(model, tokens).sum(), model)
    torch.testing.assert_close(flat_gradient(twice, model), once, rtol=1e-4, atol=1e-4)
    loss = ppo.token_logprobs(model, tokens).sum()
    first, second = (torch.autograd.grad(loss, model.lm_head.weight, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(first, second)
    model.requires_grad_(False)
    assert not ppo.token_logprobs(model, tokens).requires_grad
    model.model.layers[0].requires_grad_(True)  # a trained backbone under a frozen, tied head
    ppo.token_logprobs(model, tokens).sum().backward()
    assert model.lm_head.weight.grad is None and model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_bfloat16_products_float32_sums(how):
    model, tokens = build(), torch.randint(VOCAB, (4, 33))
    exact, weights = ppo.token_logprobs(model, tokens), torch.randn(4, 32)
    gradient = flat_gradient((weights * exact).sum(), model)
    model = model if how == "autocast" else model.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        rough = ppo.token_logprobs(model, tokens, chunk=16)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0, atol=0.15)
    rough_gradient = flat_gradient((weights * rough).sum(), model).float()
    assert torch.cosine_similarity(rough_gradient, gradient, dim=0) > 0.99
    assert float(rough_gradient.norm() / gradient.norm()) == pytest.approx(1, abs=0.03)


def test_bfloat16_products_are_added_in_slabs():
    a, b, total = torch.randn(3, 7).bfloat16(), torch.randn(3, 5).bfloat16(), torch.ones(7, 5)
    ppo.add_product(total, a, b, slab_numbers=10)  # 2 rows at a time, the last one alone
    torch.testing.assert_close(total, 1 + a.float().T @ b.float(), rtol=0.02, atol=0.02)


class Sizes(TorchDispatchMode):
    """Records the shape of every tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        fresh = not any(argument.alias_info is not None for argument in func._schema.returns)  # no view, not in place
        self.shapes += [tuple(t.shape) for t in (out if isinstance(out, (tuple, list)) else [out])
                        if fresh and isinstance(t, torch.Tensor)]
        return out


def test_no_tensor_of_vocabulary_size_times_positions():
    model = AutoModelForCausalLM.from_config(Qwen2Config(**SHAPE | {"vocab_size": 997}, tie_word_embeddings=False))
    tokens = torch.randint(997, (3, 41))
    ppo.check_head(model)
    with Sizes() as sizes:
        ppo.token_logprobs(model, tokens, chunk=8).sum().backward()
    assert max(math.prod(s) for s in sizes.shapes if s[-1:] == (997,)) == 8 * 997  # 15 chunks of 8 of the 120 positions
    # as large as the head's weight: its own gradient's buffer, and the input embedding's gradient
    assert sum(math.prod(s) == 997 * 32 for s in sizes.shapes) == 2
    with Sizes() as sizes:
        naive(model, tokens).sum().backward()
    assert max(math.prod(s) for s in sizes.shapes) >= 3 * 40 * 997  # the measure sees what it should


def test_heads_that_are_more_than_a_product_are_refused():
    tokens = torch.randint(VOCAB, (2, 8))
    for config in (CohereConfig(**SHAPE, logit_scale=0.8), GraniteConfig(**SHAPE, logits_scaling=1.2)) * 10:
        model = AutoModelForCausalLM.from_config(config)
        with pytest.raises(ValueError, match=type(model).__name__):
            ppo.token_logprobs(model, tokens)
    hidden_cap = build("gemma2 soft cap")
    hidden_cap.config.final_logit_softcapping, cap = None, hidden_cap.config.final_logit_softcapping
    forward = hidden_cap.forward  # a cap that the configuration does not name, far above a fresh model's logits
    hidden_cap.forward = lambda *a, **k: SimpleNamespace(logits=30 * (forward(*a, **k).logits / 30).tanh())
    with pytest.raises(ValueError, match="Gemma2ForCausalLM"):
        ppo.token_logprobs(hidden_cap, tokens)
    model = build()
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match="LlamaForCausalLM.*Sequential"):
        ppo.token_logprobs(model, tokens)


def test_bad_arguments_of_token_logprobs():
    with pytest.raises(ValueError, match="temperature 0"):
        ppo.token_logprobs(build(), torch.zeros(1, 4, dtype=torch.long), temperature=0)
    with pytest.raises(ValueError, match="time of at least 2"):
        ppo.token_logprobs(build(), torch.zeros(1, 1, dtype=torch.long))


# --------------------------------------------------------------------------- advantages


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (0.9, 0.8), (1.0, 0.0), (0.95, 1.0)])
def test_gae_equals_the_double_sum(gamma, lam):
    torch.manual_seed(0)
    rewards, values, lengths = torch.randn(4, 9), torch.randn(4, 9), [9, 1, 4, 6]
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    values[~mask] = float("nan")  # whatever stands in the padding
    advantages, returns = ppo.gae(rewards, values, mask, gamma=gamma, lam=lam)
    for row, length in enumerate(lengths):
        value = [float(v) for v in values[row, :length]] + [0.0]
        delta = [float(rewards[row, t]) + gamma * value[t + 1] - value[t] for t in range(length)]
        for t in range(length):
            expected = sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, length))
            assert float(advantages[row, t]) == pytest.approx(expected, abs=1e-5)
            assert float(returns[row, t]) == pytest.approx(expected + value[t], abs=1e-5)
            if lam == 1:  # then the returns are the discounted rewards to come, whatever the critic says
                to_come = sum(gamma ** (k - t) * float(rewards[row, k]) for k in range(t, length))
                assert float(returns[row, t]) == pytest.approx(to_come, abs=1e-5)
    assert (advantages[~mask] == 0).all() and (returns[~mask] == 0).all()


def test_group_advantages_by_hand():
    rewards = [[1, 0, 0, 0], [1, 1, 1, 1], [0.1, 0.1, 0.1, 0.1], [1, 1, 0, 0]]
    rloo = ppo.group_advantages(rewards, how="rloo")
    np.testing.assert_allclose(rloo[0], [1, -1 / 3, -1 / 3, -1 / 3], rtol=1e-6)
    np.testing.assert_allclose(rloo[3], [2 / 3, 2 / 3, -2 / 3, -2 / 3], rtol=1e-6)
    grpo = ppo.group_advantages(rewards, how="grpo")
    np.testing.assert_allclose(grpo[0], [1.5, -0.5, -0.5, -0.5], rtol=1e-5)  # mean 1/4, sample std 1/2
    assert (rloo[1:3] == 0).all() and (grpo[1:3] == 0).all() and grpo.dtype == np.float32
    for bad in ([[1.0], [0.0]], [1.0, 0.0]):
        with pytest.raises(ValueError, match="at least 2"):
            ppo.group_advantages(bad, how="grpo")
    with pytest.raises(ValueError, match="'grpo' or 'rloo'"):
        ppo.group_advantages(rewards, how="ppo")


def test_whitening_over_tokens_not_rollouts():
    advantages = [torch.tensor([1.0]), torch.tensor([4.0, 4.0, 4.0])]  # token mean 3.25, rollout mean 2.5
    white = ppo.whiten(advantages)
    assert [len(w) for w in white] == [1, 3]
    tokens = torch.cat(white)
    assert float(tokens.mean()) == pytest.approx(0, abs=1e-6)
    assert float(tokens.std(correction=0)) == pytest.approx(1, abs=1e-5)
    assert float(white[0][0]) == pytest.approx((1 - 3.25) / math.sqrt(27 / 16), abs=1e-5)
    assert (torch.cat(ppo.whiten([torch.full((3,), 0.1), torch.full((5,), 0.1)])) == 0).all()


def test_k3_is_an_unbiased_estimate_of_the_kl():
    torch.manual_seed(0)
    new, ref = (0.5 * torch.randn(2, 50)).log_softmax(-1)  # like enough that none reaches the clamp
    estimates = ppo.kl_k3(ref, new)
    assert (estimates >= 0).all() and estimates.max() < 10
    assert float((new.exp() * estimates).sum()) == pytest.approx(float((new.exp() * (new - ref)).sum()), rel=1e-4)
    far = torch.tensor([-200.0, 3.0, 0.0], requires_grad=True)
    k3 = ppo.kl_k3(torch.zeros(3), far)
    k3.sum().backward()
    assert k3.tolist()[0] == 10 and (far.grad[0], far.grad[2]) == (0, 0) and far.grad.isfinite().all()


# --------------------------------------------------------------------------- the critic and the passes without gradient


def test_value_model_copies_saves_and_loads(tmp_path):
    model = build()
    model(torch.ones(1, 4, dtype=torch.long)).logits.sum().backward()
    critic, tokens = ppo.ValueModel(model), torch.randint(VOCAB, (3, 8))
    assert critic(tokens).shape == (3, 8) and critic(tokens).dtype == torch.float32 and (critic(tokens) == 0).all()
    assert all(p.grad is None and p.requires_grad for p in critic.parameters())
    before = model.model.layers[0].mlp.up_proj.weight.clone()
    with torch.no_grad():
        [p.add_(0.1 * torch.randn_like(p)) for p in critic.parameters()]
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, before)  # the critic's backbone is its own
    critic.save(tmp_path / "critic.safetensors")
    again = ppo.ValueModel(model).load(tmp_path / "critic.safetensors")
    assert torch.equal(again(tokens), critic(tokens))
    with pytest.raises(ValueError, match="nowhere"):
        again.load(tmp_path / "nowhere.safetensors")
    with pytest.raises(ValueError, match="critic"):
        ppo.ValueModel(build("gpt2")).load(tmp_path / "critic.safetensors")


@pytest.mark.parametrize("budget", [1, 30, 10**6])
def test_rollout_passes_do_not_depend_on_the_batching(budget):
    model, rollouts = build("mistral window"), some_rollouts()
    logprobs = ppo.rollout_logprobs(model, rollouts, temperature=0.7, tokens_per_microbatch=budget)
    for ours, theirs in zip(logprobs, one_by_one(model, rollouts, 0.7), strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-5)
    critic = ppo.ValueModel(model)
    torch.nn.init.normal_(critic.head.weight)
    for r, ours in zip(rollouts, ppo.rollout_values(critic, rollouts, tokens_per_microbatch=budget), strict=True):
        theirs = critic(torch.tensor([r.prompt + r.response]))[0, len(r.prompt) - 1:-1]
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-5)


def test_microbatches_keep_to_the_budget_and_lose_nothing():
    rollouts = some_rollouts(40)
    length = lambda i: len(rollouts[i].prompt) + len(rollouts[i].response)
    groups = ppo.microbatches(rollouts, 50)
    assert sorted(i for group in groups for i in group) == list(range(40))
    assert all(len(group) * max(map(length, group)) <= 50 for group in groups)
    assert sum(len(group) * max(map(length, group)) for group in groups) < 1.2 * sum(map(length, range(40)))
    assert all(len(group) == 1 for group in ppo.microbatches(rollouts, 1))  # each longer than the budget: alone


def test_critic_advantages_put_the_reward_on_the_last_token():
    model, rollouts = build(), some_rollouts(4)
    rewards = [1.0, 0.0, 0.5, 1.0]
    advantages, values, returns = ppo.critic_advantages(ppo.ValueModel(model), rollouts, rewards, gamma=0.9, lam=1.0)
    for r, reward, a, v, target in zip(rollouts, rewards, advantages, values, returns, strict=True):
        expected = reward * 0.9 ** torch.arange(len(r.response) - 1, -1, -1.0)
        torch.testing.assert_close(a, expected)
        torch.testing.assert_close(target, expected)
        assert (v == 0).all()


# --------------------------------------------------------------------------- losses


def test_the_clip_cuts_the_gradient_only_where_it_would_pay_to_go_on():
    #              inside, past the clip in the paying direction, past it in the costly one, and the same for A < 0
    ratio = torch.tensor([1.1, 1.5, 0.5, 0.9, 0.5, 1.5])
    advantages = torch.tensor([2.0, 2.0, 2.0, -2.0, -2.0, -2.0])
    new = ratio.log().requires_grad_(True)
    losses, measured = ppo.policy_loss(new, torch.zeros(6), advantages, 0.2)
    torch.testing.assert_close(measured, ratio)
    torch.testing.assert_close(losses, torch.tensor([-2.2, -2.4, -1.0, 1.8, 1.6, 3.0]))
    losses.sum().backward()
    torch.testing.assert_close(new.grad, torch.tensor([-2.2, 0.0, -1.0, 1.8, 0.0, 3.0]))


def test_value_clipping():
    new = torch.tensor([0.1, 0.5, -0.5], requires_grad=True)  # inside; past the clip toward R = 1; past it away from R
    losses = ppo.value_loss(new, torch.zeros(3), torch.ones(3), 0.2)
    torch.testing.assert_close(losses, torch.tensor([0.5 * 0.81, 0.5 * 0.64, 0.5 * 2.25]))
    losses.sum().backward()
    torch.testing.assert_close(new.grad, torch.tensor([-0.9, 0.0, -1.5]))
    torch.testing.assert_close(ppo.value_loss(new, torch.zeros(3), torch.ones(3), None)[1], torch.tensor(0.125))


# --------------------------------------------------------------------------- update


@pytest.mark.parametrize("name", ["llama", "gpt2"])  # GPT-2 has dropout, and here it is on
def test_first_ratio_is_one_and_the_gradient_is_the_policy_gradient(name):
    model, rollouts = build(name), some_rollouts()
    advantages = noise(rollouts)
    tokens = sum(len(r.response) for r in rollouts)
    loss = -sum((a * logprobs).sum() for a, logprobs in zip(advantages, one_by_one(model, rollouts, 0.8))) / tokens
    expected = flat_gradient(loss, model)
    model.train()
    for old in (None, ppo.rollout_logprobs(model, rollouts, temperature=0.8, tokens_per_microbatch=40)):
        gradient, metrics = moved(model, rollouts, advantages, old_logprobs=old, temperature=0.8)
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)
        assert metrics["ratio_mean"] == pytest.approx(1, abs=1e-6) and metrics["clip_fraction"] == 0
        assert metrics["approx_kl"] == pytest.approx(0, abs=1e-6)
    assert all(module.training for module in model.modules())  # put back


def all_inputs(model, rollouts):
    """Everything on: off-policy, a reference, mixed advantages of which some rollouts have none."""
    advantages = noise(rollouts, 1)
    for i in (0, 3, 4):
        advantages[i] = torch.zeros_like(advantages[i])
    old = [a + b for a, b in zip(ppo.rollout_logprobs(model, rollouts), noise(rollouts, 2, 0.15))]
    ref = [a + b for a, b in zip(ppo.rollout_logprobs(model, rollouts), noise(rollouts, 3, 0.3))]
    return advantages, dict(old_logprobs=old, ref_logprobs=ref)


@pytest.mark.parametrize("kl_coef", [0.0, 0.5])
def test_gradient_equals_the_formula_whatever_the_microbatches(kl_coef):
    model, rollouts = build(), some_rollouts()
    advantages, others = all_inputs(model, rollouts)
    new = torch.cat(one_by_one(model, rollouts))
    old, ref = torch.cat(others["old_logprobs"]), torch.cat(others["ref_logprobs"])
    a, ratio, d = torch.cat(advantages), (new - old).exp(), ref - new
    loss = (torch.maximum(-a * ratio, -a * ratio.clamp(0.8, 1.2)) + kl_coef * (d.exp() - d - 1)).mean()
    expected = flat_gradient(loss, model)
    for budget in (1, 40, 10**6):  # at kl_coef 0 the zero rollouts are left out: same gradient, same denominator
        gradient, metrics = moved(model, rollouts, advantages, **others, kl_coef=kl_coef, tokens_per_microbatch=budget)
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)
        passed = torch.cat(ppo.per_token(rollouts, [kl_coef > 0 or i not in (0, 3, 4) for i in range(10)])).bool()
        assert metrics["tokens_trained"] == passed.sum()
        assert metrics["kl"] == pytest.approx((d.exp() - d - 1)[passed].mean().item(), rel=1e-3)
        assert metrics["ratio_mean"] == pytest.approx(ratio[passed].mean().item(), rel=1e-4)
        assert metrics["approx_kl"] == pytest.approx((ratio - 1 - ratio.log())[passed].mean().item(), rel=1e-3)
        assert metrics["grad_norm"] == pytest.approx(float(expected.norm()), rel=1e-3)
        cut = torch.maximum(-a * ratio, -a * ratio.clamp(0.8, 1.2)) > -a * ratio
        assert 0 < metrics["clip_fraction"] == pytest.approx(float(cut[passed].float().mean()))


def test_finite_differences_of_the_whole_loss():
    model, rollouts = build("gpt2", dtype=torch.float64), some_rollouts(5)  # Llama's norms are float32 whatever we ask
    advantages, others = all_inputs(model, rollouts)

    def loss(shifted):
        new = torch.cat(one_by_one(shifted, rollouts))
        per_token, _ = ppo.policy_loss(new, torch.cat(others["old_logprobs"]), torch.cat(advantages), 0.2)
        return float((per_token + 0.3 * ppo.kl_k3(torch.cat(others["ref_logprobs"]), new)).mean())

    policy = copy.deepcopy(model)
    ppo.update(policy, sgd(policy), rollouts, advantages, **others, kl_coef=0.3, max_grad_norm=None,
               tokens_per_microbatch=40)
    for name in ("wte.weight", "wpe.weight", "h.0.attn.c_attn.weight", "h.1.mlp.c_fc.bias", "ln_f.weight"):
        weight, after = (m.transformer.get_parameter(name) for m in (model, policy))
        gradient = (weight - after).detach().flatten()
        where = gradient.abs().argmax()
        with torch.no_grad():
            weight.flatten()[where] += 1e-6
            up = loss(model)
            weight.flatten()[where] -= 2e-6
            down = loss(model)
            weight.flatten()[where] += 1e-6
        assert (up - down) / 2e-6 == pytest.approx(float(gradient[where]), rel=1e-4)


def test_gradient_of_the_critic_and_its_metrics():
    model, rollouts = build(), some_rollouts()
    critic = ppo.ValueModel(model)
    torch.nn.init.normal_(critic.head.weight, std=0.1)
    values = [v + e for v, e in zip(ppo.rollout_values(critic, rollouts), noise(rollouts, 1, 0.3))]
    returns = noise(rollouts, 2)
    new = torch.cat([critic(torch.tensor([r.prompt + r.response]))[0, len(r.prompt) - 1:-1] for r in rollouts])
    old, target = torch.cat(values), torch.cat(returns)
    clipped = torch.minimum(torch.maximum(new, old - 0.2), old + 0.2)
    loss = 0.5 * torch.maximum((new - target) ** 2, (clipped - target) ** 2).mean()
    expected = flat_gradient(loss, critic)
    for budget in (1, 50, 10**6):
        trained = copy.deepcopy(critic)
        metrics = ppo.update(copy.deepcopy(model), sgd(model), rollouts, noise(rollouts), critic=trained,
                             critic_optimizer=sgd(trained), values=values, returns=returns, max_grad_norm=None,
                             tokens_per_microbatch=budget)
        gradient = torch.cat([(a - b).flatten() for a, b in zip(critic.parameters(), trained.parameters())]).detach()
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)
        assert metrics["value_loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert metrics["critic_grad_norm"] == pytest.approx(float(expected.norm()), rel=1e-3)
        assert metrics["explained_variance"] == pytest.approx(1 - float((target - old).var() / target.var()), abs=1e-4)


def test_gradient_norms_are_clipped_apart():
    model, rollouts = build(), some_rollouts()
    gradient, metrics = moved(model, rollouts, noise(rollouts), max_grad_norm=0.01)
    assert metrics["grad_norm"] > 0.02 and float(gradient.norm()) == pytest.approx(0.01, rel=1e-3)


def test_epochs_minibatches_schedulers_and_seeds():
    model, rollouts = build(), some_rollouts(10)
    runs = []
    for seed in (0, 0, 1):
        policy, critic = copy.deepcopy(model), ppo.ValueModel(model)
        optimizer, critic_optimizer = (torch.optim.AdamW(m.parameters(), lr=1e-3) for m in (policy, critic))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        advantages, values, returns = ppo.critic_advantages(critic, rollouts, np.arange(10) % 2)
        metrics = ppo.update(policy, optimizer, rollouts, ppo.whiten(advantages), critic=critic, scheduler=scheduler,
                             critic_optimizer=critic_optimizer, values=values, returns=returns, epochs=2, minibatch=4,
                             rng=np.random.default_rng(seed))
        assert metrics["optimizer_steps"] == scheduler.last_epoch == 6 and metrics["skipped_minibatches"] == 0
        assert metrics["tokens_trained"] == 2 * sum(len(r.response) for r in rollouts)
        assert metrics["ratio_mean"] != 1  # from the second step on the policy has left the one that sampled
        assert all(isinstance(v, (int, float)) and math.isfinite(v) for v in metrics.values())
        runs.append(policy.lm_head.weight)
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_minibatches_are_separate_steps():
    model, rollouts = build(), some_rollouts(2)
    old, advantages = ppo.rollout_logprobs(model, rollouts), noise(rollouts, scale=0.01)
    gradient, _ = moved(model, rollouts, advantages, minibatch=1)
    policy = copy.deepcopy(model)
    for i in np.random.default_rng(0).permutation(2):
        ppo.update(policy, sgd(policy), [rollouts[i]], [advantages[i]], old_logprobs=[old[i]], max_grad_norm=None)
    expected = torch.cat([(a - b).flatten() for a, b in zip(model.parameters(), policy.parameters())]).detach()
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)


def test_an_exploding_ratio_skips_the_step():
    model, rollouts = build(), some_rollouts()
    for shift in (5.0, 200.0):  # e^200 is infinite in float32
        old = [logprobs - shift for logprobs in ppo.rollout_logprobs(model, rollouts)]
        gradient, metrics = moved(model, rollouts, noise(rollouts), old_logprobs=old)
        assert (gradient == 0).all() and metrics["skipped_minibatches"] == 1 and metrics["optimizer_steps"] == 0
        assert "ratio_mean" not in metrics
    for bad in (0, 1):  # first or second of two minibatches: the other's step is as if it were alone
        old = ppo.rollout_logprobs(model, rollouts[:2])
        old[bad] = old[bad] - 50
        advantages = [-a.abs() for a in noise(rollouts[:2])]  # no clip stops these
        gradient, metrics = moved(model, rollouts[:2], advantages, old_logprobs=old, minibatch=1)
        expected, _ = moved(model, [rollouts[1 - bad]], [advantages[1 - bad]])
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)
        assert metrics["skipped_minibatches"] == metrics["optimizer_steps"] == 1


def test_nothing_to_learn_moves_nothing():
    model, rollouts = build(), some_rollouts()
    policy = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.1)
    ppo.update(policy, optimizer, rollouts, noise(rollouts))
    before = policy.lm_head.weight.clone()  # AdamW's momentum alone would move it
    metrics = ppo.update(policy, optimizer, rollouts, [torch.zeros(len(r.response)) for r in rollouts])
    assert torch.equal(policy.lm_head.weight, before) and metrics["optimizer_steps"] == metrics["tokens_trained"] == 0


def test_a_nan_stops_before_the_step():
    model, rollouts = build(), some_rollouts()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    before = model.lm_head.weight.clone()
    with pytest.raises(FloatingPointError, match="policy.*no step"):
        ppo.update(model, sgd(model), rollouts, noise(rollouts))
    assert torch.equal(model.lm_head.weight, before)


def test_gradient_checkpointing_stays_on_and_changes_nothing():
    model, rollouts = build("gpt2"), some_rollouts()
    expected, _ = moved(model, rollouts, noise(rollouts))
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()  # its new name
    calls, policy = [], copy.deepcopy(model)
    ppo.check_head(policy)
    policy.transformer.h[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    ppo.update(policy, sgd(policy), rollouts, noise(rollouts), max_grad_norm=None)
    assert len(calls) == 2  # forward, and again in backward
    gradient = torch.cat([(a - b).flatten() for a, b in zip(model.parameters(), policy.parameters())]).detach()
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)


def test_autocast_update_agrees_with_float32():
    model, rollouts = build(), some_rollouts()
    expected, _ = moved(model, rollouts, noise(rollouts))
    old = ppo.rollout_logprobs(model, rollouts, autocast=torch.bfloat16)
    gradient, metrics = moved(model, rollouts, noise(rollouts), old_logprobs=old, autocast=torch.bfloat16)
    assert metrics["ratio_mean"] == pytest.approx(1, abs=1e-2)
    assert torch.cosine_similarity(gradient, expected, dim=0) > 0.99
    with pytest.raises(ValueError, match="float16"):
        ppo.update(model, sgd(model), rollouts, noise(rollouts), autocast=torch.float16)


def test_bad_arguments_of_update():
    model, rollouts = build(), some_rollouts(3)
    good, call = noise(rollouts), lambda *a, **k: ppo.update(model, sgd(model), *a, **k)
    for message, run in {
            "advantages: needs 3": lambda: call(rollouts, good[:2]),
            "old_logprobs: needs 3": lambda: call(rollouts, good, old_logprobs=[g[:0] for g in good]),
            "NaN or an infinity in rollout 1": lambda: call(rollouts, [good[0], good[1] / 0, good[2]]),
            "needs ref_logprobs": lambda: call(rollouts, good, kl_coef=0.1),
            "critic_optimizer, values": lambda: call(rollouts, good, critic=ppo.ValueModel(model)),
            "0 rollouts": lambda: call([], []),
            "minibatch 0": lambda: call(rollouts, good, minibatch=0),
            "rollout 0: 0 prompt": lambda: call([SimpleNamespace(prompt=[], response=[1])], [torch.ones(1)])}.items():
        with pytest.raises(ValueError, match=message) as caught:
            run()
        assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------- does it learn?


@pytest.mark.parametrize("algorithm", ["ppo", "grpo", "rloo"])
def test_bandit(algorithm):
    """One state, one token, reward 1 for token 7: its probability must rise a lot."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE | {"vocab_size": 12}))
    critic = ppo.ValueModel(model)
    optimizer, critic_optimizer = (torch.optim.Adam(m.parameters(), lr=3e-3) for m in (model, critic))
    prompt, chance = torch.tensor([[3, 4]]), lambda: model(prompt).logits[0, -1].softmax(0)[7].item()
    before, rng = chance(), np.random.default_rng(0)
    for _ in range(15):
        with torch.no_grad():
            drawn = model(prompt).logits[0, -1].softmax(0).multinomial(64, replacement=True).tolist()
        rollouts = [SimpleNamespace(prompt=[3, 4], response=[token]) for token in drawn]
        rewards = np.array([float(token == 7) for token in drawn])
        if algorithm == "ppo":
            advantages, values, returns = ppo.critic_advantages(critic, rollouts, rewards)
            ppo.update(model, optimizer, rollouts, ppo.whiten(advantages), epochs=2, minibatch=32, rng=rng,
                       critic=critic, critic_optimizer=critic_optimizer, values=values, returns=returns)
        else:
            advantages = ppo.group_advantages(rewards.reshape(4, 16), how=algorithm).reshape(-1)
            advantages = ppo.per_token(rollouts, advantages)
            ppo.update(model, optimizer, rollouts, advantages, epochs=2, minibatch=32, rng=rng)
    assert before < 0.15 and chance() > 0.6
