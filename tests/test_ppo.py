"""ppo.py against plain PyTorch, double loops and hand computation, on tiny random models."""

import copy
import gc
import itertools
import math
import warnings
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SHAPE, small_llama, update_config
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
from plumbing import batches, logprobs, memory

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
    return update_config(**{"minibatch": 1000, "max_grad_norm": math.inf} | changes)


def moved(model, rollouts, advantages, settings=None, **lists):
    """The gradient that `update` steps along, and its metrics; the model stays as it is."""
    policy = copy.deepcopy(model)
    settings = settings or one_step()
    metrics = ppo.update(policy, sgd(policy), rollouts, advantages, settings, **lists)
    return difference(model, policy), metrics


def checkpointed(model):
    enable = getattr(model, "activation_checkpointing_enable", None)  # its new name
    (enable or model.gradient_checkpointing_enable)()
    return model


def close(ours, theirs, rtol=1e-3, atol=1e-5):
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


# --------------------------------------------------------------------------- log-probs


@pytest.mark.parametrize("temperature, chunk", [(1.0, 2**25 // VOCAB), (0.6, 7)])
@pytest.mark.parametrize("name", CONFIGS)
def test_token_logprobs_and_gradient_equal_the_naive_ones(monkeypatch, name, temperature, chunk):
    monkeypatch.setitem(logprobs.CHUNK, "cpu", chunk * VOCAB)
    model, tokens = build(name), torch.randint(VOCAB, (3, 17))
    ours = logprobs.token_logprobs(model, tokens, temperature=temperature)
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
        return logprobs.HeadLogprobs.apply(h, w, b, targets, (0.7, softcap, 2, torch.float64))

    assert torch.autograd.gradcheck(run, (hidden, weight, bias))
    assert torch.autograd.gradcheck(run, (hidden, weight))
    assert torch.autograd.gradcheck(run, (hidden, weight.detach()))  # a frozen head


def test_the_head_is_computed_where_the_mask_says():
    model, rollouts = build("gpt2"), some_rollouts()
    tokens, mask, sharing = batches.padded_batch(rollouts, model)
    assert sharing == {}  # no two have the same prompt
    assert mask.sum() == sum(len(r.response) for r in rollouts)
    ours = logprobs.token_logprobs(model, tokens, mask=mask)
    assert (ours[~mask] == 0).all()
    close(ours[mask], logprobs.token_logprobs(model, tokens)[mask], 1e-5, 1e-6)
    nothing = logprobs.token_logprobs(model, tokens, mask=torch.zeros_like(mask))
    assert (nothing == 0).all()


def test_frozen_models():
    model, tokens = build("qwen2 tied"), torch.randint(VOCAB, (2, 9))
    model.requires_grad_(False)
    assert not logprobs.token_logprobs(model, tokens).requires_grad
    layer = model.model.layers[0].requires_grad_(True)  # under a frozen, tied head
    logprobs.token_logprobs(model, tokens).sum().backward()
    assert model.lm_head.weight.grad is None and layer.mlp.up_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_bfloat16_products_float32_sums(monkeypatch, how):
    monkeypatch.setitem(logprobs.CHUNK, "cpu", 16 * VOCAB)
    model, tokens = build(), torch.randint(VOCAB, (4, 33))
    exact, weights = logprobs.token_logprobs(model, tokens), torch.randn(4, 32)
    gradient = flat_gradient((weights * exact).sum(), model)
    model = model if how == "autocast" else model.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        rough = logprobs.token_logprobs(model, tokens)
    assert rough.dtype == torch.float32
    close(rough, exact, 0, 0.15)
    rough_gradient = flat_gradient((weights * rough).sum(), model).float()
    assert torch.cosine_similarity(rough_gradient, gradient, dim=0) > 0.99
    assert float(rough_gradient.norm() / gradient.norm()) == pytest.approx(1, abs=0.03)


def test_logits_of_a_bfloat16_product_keep_its_float32_sums_where_torch_can(monkeypatch):
    """So far on CUDA: here a CPU that can, too."""
    hidden, weight = torch.randn(5, 64).bfloat16(), torch.randn(7, 64).bfloat16()
    exact = hidden.float() @ weight.float().T
    rounded = logprobs.head_logits(hidden, weight, None, None)
    assert rounded.dtype == torch.float32
    close(rounded, exact, 0.01, 0.1)
    wide = lambda a, b, out_dtype: a.to(out_dtype) @ b.to(out_dtype)  # noqa: E731
    monkeypatch.setattr(torch, "mm", wide)
    close(logprobs.head_logits(hidden, weight, None, None), exact, 1e-5, 1e-5)
    close(logprobs.head_logits(hidden, weight, torch.ones(7).bfloat16(), None), exact + 1, 1e-5)


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


def test_no_tensor_of_vocabulary_size_times_positions(monkeypatch):
    vocab, width = 997, SHAPE["hidden_size"]
    monkeypatch.setitem(logprobs.CHUNK, "cpu", 8 * vocab)
    model = small_llama(vocab)
    tokens = torch.randint(vocab, (3, 41))
    logprobs.check_head(model)
    with Sizes() as sizes:
        logprobs.token_logprobs(model, tokens).sum().backward()
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
def test_scaled_logits_are_refused(config):
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=f"{type(model).__name__}.*not its head times"):
        logprobs.token_logprobs(model, torch.randint(VOCAB, (2, 8)))


def test_other_heads_and_temperature_0_are_refused():
    model, tokens = build(), torch.randint(VOCAB, (2, 8))
    with pytest.raises(ValueError, match="temperature 0"):
        logprobs.token_logprobs(model, tokens, temperature=0)
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match="LlamaForCausalLM.*Sequential"):
        logprobs.token_logprobs(model, tokens)


# --------------------------------------------------------------------------- advantages


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (0.9, 0.8), (1.0, 0.0), (0.95, 1.0)])
def test_gae_equals_the_double_sum(gamma, lam):
    torch.manual_seed(0)
    rewards, values, lengths = torch.randn(4, 9), torch.randn(4, 9), [9, 1, 4, 6]
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    values[~mask] = rewards[~mask] = float("nan")  # whatever stands in the padding
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
    "rewards, how, message", [([[1], [0]], "grpo", "at least 2"), ([[1, 0]], "ppo", "or 'rloo'")]
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


def test_the_reward_comes_with_the_last_token():
    rollouts, rewards, config = some_rollouts(4), [1.0, 0.0, 0.5, 1.0], update_config(gamma=0.9)
    values = ppo.rollout_values(ppo.ValueModel(build()), rollouts, config)
    assert all((v == 0).all() for v in values)  # a fresh critic
    advantages, returns = ppo.response_gae(values, rewards, config)
    for r, reward, a, target in zip(rollouts, rewards, advantages, returns, strict=True):
        expected = reward * 0.9 ** torch.arange(len(r.response) - 1, -1, -1.0)
        torch.testing.assert_close(a, expected)
        torch.testing.assert_close(target, expected)


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
    critic = ppo.ValueModel(model)
    torch.nn.init.normal_(critic.head.weight)
    settings = update_config(temperature=0.7, tokens_per_microbatch=budget)
    ours = ppo.rollout_logprobs(model, rollouts, settings)
    ours += ppo.rollout_values(critic, rollouts, settings)
    theirs = one_by_one(model, rollouts, 0.7) + values_one_by_one(critic, rollouts)
    for one, other in zip(ours, theirs, strict=True):
        assert not one.requires_grad
        close(one, other.detach(), 1e-5, 1e-5)
    assert ppo.rollout_logprobs(model, [], settings) == []


def test_microbatches_keep_to_the_budget_and_lose_nothing():
    model, rollouts = build(), some_rollouts(40)
    groups = batches.microbatches(rollouts, model, 50)
    assert sorted(i for group in groups for i in group) == list(range(40))
    padded = [batches.padded_batch([rollouts[i] for i in group], model)[0] for group in groups]
    sizes = [tokens.numel() for tokens in padded]
    lengths = [len(r.prompt) + len(r.response) for r in rollouts]
    assert max(sizes) <= 50 and sum(sizes) < 1.2 * sum(lengths)  # little of it is padding
    # each is longer than the budget: alone
    assert all(len(group) == 1 for group in batches.microbatches(rollouts, model, 1))
    chosen = batches.microbatches(rollouts, model, 50, [3, 5, 7])
    assert sorted(i for group in chosen for i in group) == [3, 5, 7]


def with_shared_prompts(groups=6, n=4, seed=0):
    """Groups of n rollouts to one prompt, in no order."""
    rollouts = some_rollouts(groups * n, seed)
    for i, r in enumerate(rollouts):
        r.prompt = rollouts[i % groups].prompt
    return rollouts


@pytest.mark.parametrize("name", CONFIGS)
def test_responses_that_share_a_prompt_have_their_own_logprobs_values_and_gradient(name):
    model, rollouts = build(name), with_shared_prompts()
    critic = ppo.ValueModel(model)
    torch.nn.init.normal_(critic.head.weight)
    config = update_config(tokens_per_microbatch=120)

    def outputs():
        """Log-probs, values, and the gradient of a sum that tells the tokens apart."""
        scored = [ppo.rollout_logprobs(model, rollouts, config)]
        scored.append(ppo.rollout_values(critic, rollouts, config))
        for network, score in ((model, ppo.response_logprobs), (critic, ppo.response_values)):
            network.zero_grad()
            for some in batches.microbatches(rollouts, network, 120):
                weights = torch.cat([noise(rollouts)[i] for i in some])
                (score(network, [rollouts[i] for i in some], config) * weights).sum().backward()
            scored.append([p.grad.clone() for p in network.parameters() if p.grad is not None])
        return scored

    shares = batches.shares_prompts(model)
    # Gemma's and Mistral's windows count columns: nothing is shared there.
    assert shares == (getattr(model.config.get_text_config(), "sliding_window", None) is None)
    together = outputs()
    if shares:  # fewer tokens are read
        read = [batches.padded_batch([rollouts[i] for i in some], model)
                for some in batches.microbatches(rollouts, model, 120)]  # fmt: skip
        each = sum(len(r.prompt) + len(r.response) for r in rollouts)
        assert sum(tokens.numel() for tokens, _, _ in read) < 0.9 * each
    model.base_model.shares_prompts = critic.backbone.shares_prompts = False
    apart = outputs()
    for one, other in zip(together, apart):
        for mine, theirs in zip(one, other, strict=True):
            close(mine, theirs, 1e-3, 2e-4)


@pytest.mark.parametrize("budget", [512, 2048, 4096])
def test_padding_of_shared_rows_keeps_to_the_budget(budget):
    """Rows of one prompt that meet in a micro-batch become one, which must not outgrow the rest."""
    model, rng = build(), np.random.default_rng(0)
    prompts = [[int(x)] * 10 for x in rng.integers(3, VOCAB, 6)]
    rollouts = [SimpleNamespace(prompt=p, response=[4] * int(rng.integers(20, 480)))
                for p in prompts for _ in range(8)]  # fmt: skip
    for some in batches.microbatches(rollouts, model, budget):
        tokens, mask, _ = batches.padded_batch([rollouts[i] for i in some], model)
        assert tokens.numel() <= budget
        assert mask.sum() == sum(len(rollouts[i].response) for i in some)


def test_rows_of_several_responses_keep_to_their_limit():
    model = build()
    rollouts = [SimpleNamespace(prompt=[3] * 9, response=[4] * 10) for _ in range(50)]
    # 8 tokens of the prompt, then 11 for each response
    assert [len(row) for row in batches.shared_rows(rollouts, model, 8 + 3 * 11)] == [3] * 16 + [2]
    assert [len(row) for row in batches.shared_rows(rollouts, model, 1)] == [1] * 50
    tokens, mask, sharing = batches.padded_batch(rollouts[:2], model)
    assert tokens.shape == (1, 8 + 2 * 11) and mask.sum() == 20
    positions = [*range(19), *range(8, 18)]
    assert sharing["position_ids"].tolist() == [positions]


def test_a_model_that_cannot_read_such_rows_reads_them_one_by_one(monkeypatch):
    """It takes the mask, and does something else with it."""
    model = build()
    model.set_attn_implementation("eager")  # adds the mask to the scores
    assert not batches.shares_prompts(model)
    assert batches.padded_batch(with_shared_prompts(1, 2), model)[2] == {}


# --------------------------------------------------------------------------- losses


def given(monkeypatch, new, **lists):
    """A micro-batch of one response whose log-probs or values are `new`."""
    for name in ("response_logprobs", "response_values"):
        monkeypatch.setattr(ppo, name, lambda *_: new)
    return ppo.MicroBatch([None], minibatch_responses=1, minibatch_tokens=1, **lists)


def test_the_clip_cuts_the_gradient_only_where_it_would_pay_to_go_on(monkeypatch):
    # inside; past the clip in the paying direction; past it in the costly one; the same for A < 0
    ratio = torch.tensor([1.1, 1.5, 0.5, 0.9, 0.5, 1.5])
    advantages = torch.tensor([2.0, 2.0, 2.0, -2.0, -2.0, -2.0])
    new = ratio.log().requires_grad_(True)
    batch = given(monkeypatch, new, advantages=advantages, old_logprobs=torch.zeros(6))
    loss, sums = ppo.policy_loss(None, batch, update_config())
    close(loss, torch.tensor([-2.2, -2.4, -1.0, 1.8, 1.6, 3.0]).sum())
    loss.backward()
    close(new.grad, torch.tensor([-2.2, 0.0, -1.0, 1.8, 0.0, 3.0]))
    expected = {"policy_loss": loss.detach(), "clip_fraction": 2, "ratio_mean": ratio.sum()}
    expected["approx_kl"] = (ratio - 1 - ratio.log()).sum()
    assert sums.keys() == expected.keys()
    for name, value in expected.items():
        assert float(sums[name].detach()) == pytest.approx(float(value))


@pytest.mark.parametrize("average, kl_coef", [("token", 0.0), ("response", 0.3)])
def test_the_policys_loss_by_finite_differences(monkeypatch, average, kl_coef):
    """Of log-probs in float64 of two responses, some past the clip, with a KL."""
    torch.manual_seed(0)
    old, ref, advantages, shift = torch.randn(4, 7, dtype=torch.float64)
    lists = {"advantages": advantages, "old_logprobs": old, "ref_logprobs": ref}
    lists["lengths"] = torch.tensor([5.0] * 5 + [2.0] * 2)
    config = update_config(kl_coef=kl_coef, loss_average=average)

    def loss(new):
        batch = given(monkeypatch, new, **lists)
        batch.minibatch_responses, batch.minibatch_tokens = 2, 7
        return ppo.policy_loss(None, batch, config)[0]

    assert torch.autograd.gradcheck(loss, (old + 0.3 * shift).requires_grad_(True))
    share = [1 / 7] * 7 if average == "token" else [1 / 10] * 5 + [1 / 4] * 2
    expected = -(torch.tensor(share) * advantages).sum() + kl_coef * ppo.kl_k3(ref, old).sum() / 2
    close(loss(old), expected)


@pytest.mark.parametrize(
    "value_clip, losses, slopes",
    [
        # inside; past the clip toward R = 1; past it away from R
        (0.2, [0.81, 0.64, 2.25], [-0.9, 0.0, -1.5]),
        (math.inf, [0.81, 0.25, 2.25], [-0.9, -0.5, -1.5]),
    ],
)
def test_value_clipping(monkeypatch, value_clip, losses, slopes):
    new = torch.tensor([0.1, 0.5, -0.5], requires_grad=True)
    batch = given(monkeypatch, new, values=torch.zeros(3), returns=torch.ones(3))
    loss, sums = ppo.value_loss(None, batch, update_config(value_clip=value_clip))
    close(loss, 0.5 * torch.tensor(losses).sum())
    close(sums["value_loss"], loss)
    loss.backward()
    close(new.grad, torch.tensor(slopes))


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
    by_hand = torch.cat(one_by_one(model, rollouts, 0.8))
    expected = flat_gradient(-(torch.cat(advantages) * by_hand).mean(), model)
    settings = one_step(temperature=0.8, tokens_per_microbatch=40)
    old = ppo.rollout_logprobs(model, rollouts, settings) if given else None
    policy = copy.deepcopy(model).train()
    metrics = ppo.update(policy, sgd(policy), rollouts, advantages, settings, old_logprobs=old)
    close(difference(model, policy), expected)
    assert metrics["ratio_mean"] == pytest.approx(1, abs=1e-6)
    assert metrics["clip_fraction"] == 0
    assert metrics["approx_kl"] == pytest.approx(0, abs=1e-6)
    assert not any(module.training for module in policy.modules())


@pytest.mark.parametrize("budget", [1, 40, 10**6])
@pytest.mark.parametrize("kl_coef", [0.0, 0.5])
def test_gradient_and_metrics_equal_the_formulas_whatever_the_microbatches(kl_coef, budget):
    """Of another policy's rollouts, some of which have nothing to teach: they are left out if there
    is no KL, and count in the mean."""
    model, rollouts = build(), some_rollouts()
    active = ppo.per_token(rollouts, [0, 1, 1, 0, 0, 1, 1, 1, 1, 1])
    advantages = [a * b for a, b in zip(noise(rollouts, 1), active)]
    now = ppo.rollout_logprobs(model, rollouts, update_config())
    old = [a + b for a, b in zip(now, noise(rollouts, 2, 0.15))]
    ref = [a + b for a, b in zip(now, noise(rollouts, 3, 0.3))]
    new, a = torch.cat(one_by_one(model, rollouts)), torch.cat(advantages)
    ratio, d = (new - torch.cat(old)).exp(), torch.cat(ref) - new
    surrogate = torch.maximum(-a * ratio, -a * ratio.clamp(0.8, 1.2))
    k3 = d.exp() - d - 1
    # the surrogate's mean over tokens; k3 summed over a response and averaged over responses
    expected = flat_gradient(surrogate.mean() + kl_coef * k3.sum() / len(rollouts), model)

    settings = one_step(kl_coef=kl_coef, tokens_per_microbatch=budget)
    lists = {"old_logprobs": old, "ref_logprobs": ref}
    gradient, metrics = moved(model, rollouts, advantages, settings, **lists)
    close(gradient, expected)
    passed = (torch.cat(active) > 0) | (kl_coef > 0)
    assert metrics["tokens_trained"] == passed.sum()
    assert metrics["grad_norm"] == pytest.approx(float(expected.norm()), rel=1e-3)
    columns = {"policy_loss": surrogate, "kl": k3, "ratio_mean": ratio}
    columns |= {"approx_kl": ratio - 1 - ratio.log(), "clip_fraction": surrogate > -a * ratio}
    for name, column in columns.items():
        mean = float(column[passed].detach().float().mean())
        assert metrics[name] == pytest.approx(mean, rel=1e-3, abs=1e-5) and mean != 0, name


@pytest.mark.parametrize("budget", [1, 50, 10**6])
def test_gradient_of_the_critic_and_its_metrics(budget):
    model, rollouts = build(), some_rollouts()
    critic = ppo.ValueModel(model)
    torch.nn.init.normal_(critic.head.weight, std=0.1)
    new = torch.cat(values_one_by_one(critic, rollouts))
    now = ppo.rollout_values(critic, rollouts, update_config())
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


def with_critic(rollouts, critic):
    """What `update` must know to train a critic."""
    zeros = [torch.zeros(len(r.response)) for r in rollouts]
    return {"critic": critic, "values": zeros, "returns": noise(rollouts, 5)}


def test_gradient_norms_are_clipped_each_by_itself():
    model, rollouts, settings = build(), some_rollouts(), one_step(max_grad_norm=0.01)
    policy, critic = copy.deepcopy(model), ppo.ValueModel(model)
    before, lists = copy.deepcopy(critic), with_critic(rollouts, critic)
    optimizer = sgd(policy, critic)
    metrics = ppo.update(policy, optimizer, rollouts, noise(rollouts), settings, **lists)
    assert min(metrics["grad_norm"], metrics["critic_grad_norm"]) > 0.02
    for old, new in ((model, policy), (before, critic)):
        assert float(difference(old, new).norm()) == pytest.approx(0.01, rel=1e-3)


def test_epochs_minibatches_and_seeds():
    model, rollouts = build(), some_rollouts(10)
    settings = update_config(epochs=2, minibatch=4)
    policies = []
    for seed in (0, 0, 1):
        policy, critic = copy.deepcopy(model), ppo.ValueModel(model)
        values = ppo.rollout_values(critic, rollouts, settings)
        advantages, returns = ppo.response_gae(values, np.arange(10) % 2, settings)
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
    settings = update_config(epochs=2, minibatch=4)
    nothing = [torch.zeros(len(r.response)) for r in rollouts]

    def train(advantages, both=True):
        policy, critic = copy.deepcopy(model), ppo.ValueModel(model)
        lists = with_critic(rollouts, critic) if both else {}
        ppo.update(policy, adamw(policy, critic), rollouts, advantages, settings, **lists)
        return policy, critic

    policy, critic = train(noise(rollouts))
    policy_alone, _ = train(noise(rollouts), both=False)
    same_policy, critic_alone = train(nothing)
    assert (difference(policy, policy_alone) == 0).all()
    assert (difference(critic, critic_alone) == 0).all()
    assert (difference(model, same_policy) == 0).all() and difference(model, policy).any()


# which of two minibatches, each one rollout; e^200 is infinite in float32
@pytest.mark.parametrize("bad, shift", [(0, 5.0), (1, 200.0)])
def test_an_exploding_ratio_skips_the_step_as_if_the_other_were_alone(bad, shift):
    model, rollouts = build(), some_rollouts(2)
    old = ppo.rollout_logprobs(model, rollouts, update_config())
    old[bad] = old[bad] - shift
    advantages = [-a.abs() for a in noise(rollouts)]  # no clip stops these
    gradient, metrics = moved(model, rollouts, advantages, one_step(minibatch=1), old_logprobs=old)
    expected, _ = moved(model, [rollouts[1 - bad]], [advantages[1 - bad]])
    close(gradient, expected)
    assert metrics["skipped_minibatches"] == metrics["optimizer_steps"] == 1


def test_nothing_to_learn_moves_nothing():
    policy, rollouts = build(), some_rollouts()
    optimizer = adamw(policy, lr=0.1)
    ppo.update(policy, optimizer, rollouts, noise(rollouts), update_config())
    before = copy.deepcopy(policy)  # AdamW's momentum alone would move it
    nothing = [torch.zeros(len(r.response)) for r in rollouts]
    metrics = ppo.update(policy, optimizer, rollouts, nothing, update_config())
    assert (difference(before, policy) == 0).all()
    assert metrics["optimizer_steps"] == metrics["tokens_trained"] == 0


@pytest.mark.parametrize("which", ["policy", "critic"])
def test_a_nan_makes_no_step_and_is_counted(which):
    policy, rollouts = build(), some_rollouts()
    critic = ppo.ValueModel(policy)
    broken, sane = (policy, critic) if which == "policy" else (critic, policy)
    weight = next(broken.parameters())
    with torch.no_grad():
        weight[rollouts[0].prompt[0]] = float("nan")
    before, lists = copy.deepcopy(broken), with_critic(rollouts, critic)
    optimizer, config = sgd(policy, critic), update_config()
    for in_a_row in (1, 2):
        metrics = ppo.update(policy, optimizer, rollouts, noise(rollouts), config, **lists)
        assert metrics["nonfinite_steps"] == 1
        assert broken.bad_steps == in_a_row and sane.bad_steps == 0
        assert all(math.isfinite(value) for value in metrics.values())
        assert metrics["optimizer_steps"] == (0 if which == "policy" else 1)
    assert (difference(before, broken).nan_to_num() == 0).all()


# --------------------------------------------------------------------------- memory and precision


@pytest.mark.parametrize("fails", [1, 5])
def test_out_of_memory_halves_the_microbatches_and_changes_no_gradient(monkeypatch, fails):
    """In the pass of the old log-probs, and in the update."""
    model, rollouts, calls = build(), some_rollouts(), itertools.count(1)
    padded_batch = ppo.padded_batch

    def run():
        policy, critic = copy.deepcopy(model), ppo.ValueModel(model)
        settings = update_config(tokens_per_microbatch=64, minibatch=len(rollouts) // 2)
        lists, optimizer = with_critic(rollouts, critic), sgd(policy, critic)
        metrics = ppo.update(policy, optimizer, rollouts, noise(rollouts), settings, **lists)
        return policy, critic, metrics, settings.tokens_per_microbatch

    def full(*arguments):
        if next(calls) in range(fails, fails + 2):
            raise torch.OutOfMemoryError("full")
        return padded_batch(*arguments)

    *expected, metrics, budget = run()
    assert budget == 64
    monkeypatch.setattr(ppo, "padded_batch", full)
    with pytest.warns(UserWarning, match="--tokens_per_microbatch (32|16)"):
        *models, again, budget = run()
    assert budget == 16
    for one, other in zip(expected, models):
        assert float(difference(one, other).abs().max()) < 1e-5
    assert again == pytest.approx(metrics, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_of_a_failed_try_is_alive_in_the_next(monkeypatch, checkpointing):
    policy, rollouts = build(), some_rollouts()
    logprobs.check_head(policy)
    if checkpointing:
        checkpointed(policy)
    made, alive, failures = [], [], [torch.OutOfMemoryError("full")]
    response_logprobs = ppo.response_logprobs

    def watched(*arguments):
        alive.append(sum(activation() is not None for activation in made))
        return response_logprobs(*arguments)

    class Full(torch.autograd.Function):
        """In the middle of the graph, so that half of it is gone through."""

        @staticmethod
        def forward(ctx, hidden):
            return hidden.clone()

        @staticmethod
        def backward(ctx, grad):
            if failures:
                raise failures.pop()
            return grad

    layer = policy.model.layers[0]
    norm = layer.post_attention_layernorm
    norm.register_forward_hook(lambda module, args, out: made.append(weakref.ref(args[0])))
    layer.mlp.register_forward_hook(lambda module, args, out: Full.apply(out))
    monkeypatch.setattr(ppo, "response_logprobs", watched)
    config = update_config(tokens_per_microbatch=256)
    gc.collect()
    gc.disable()  # it must not depend on luck
    try:
        with pytest.warns(UserWarning, match="--tokens_per_microbatch 128"):
            ppo.update(policy, sgd(policy), rollouts, noise(rollouts), config)
    finally:
        gc.enable()
    assert len(alive) > 1 and not any(alive) and made


FULL = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    torch.AcceleratorError("CUDA error: out of memory", 2),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
    RuntimeError("CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you"),
    MemoryError(),
]
OTHER = [
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    ValueError("temperature 0: out of memory is not the reason"),
]


@pytest.mark.parametrize("error", FULL + OTHER, ids=lambda value: str(value)[:40])
def test_kinds_of_out_of_memory(error):
    config, errors = update_config(tokens_per_microbatch=64), [error]

    def function():
        if errors:
            raise errors.pop()
        return config.tokens_per_microbatch

    if error in FULL:
        with pytest.warns(UserWarning, match="--tokens_per_microbatch 32"):
            assert memory.halve_until_it_fits(function, config) == 32
    else:
        with pytest.raises(type(error)):
            memory.halve_until_it_fits(function, config)


@pytest.mark.parametrize("budget, fsdp", [(8, False), (64, True)])
def test_memory_that_never_suffices_is_an_error(budget, fsdp):
    """With --fsdp at once: the other processes wait in the pass that failed."""

    def full():
        raise torch.OutOfMemoryError("full")

    config = update_config(tokens_per_microbatch=budget, fsdp=fsdp)
    with warnings.catch_warnings(record=True) as caught, pytest.raises(torch.OutOfMemoryError):
        warnings.simplefilter("always")
        memory.halve_until_it_fits(full, config)
    assert len(caught) == (0 if fsdp else 3)


def test_gradient_checkpointing_stays_on_and_changes_nothing():
    model, rollouts = build("gpt2"), some_rollouts()
    expected, _ = moved(model, rollouts, noise(rollouts))
    policy, calls = checkpointed(copy.deepcopy(model)), []
    logprobs.check_head(policy)
    batches.shares_prompts(policy)  # both try the model once
    policy.transformer.h[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    ppo.update(policy, sgd(policy), rollouts, noise(rollouts), one_step())
    assert len(calls) == 2  # forward, and again in backward
    close(difference(model, policy), expected)


def test_autocast_update_agrees_with_float32():
    model, rollouts = build(), some_rollouts()
    expected, _ = moved(model, rollouts, noise(rollouts))
    settings = one_step(dtype="bfloat16")
    old = ppo.rollout_logprobs(model, rollouts, settings)
    gradient, metrics = moved(model, rollouts, noise(rollouts), settings, old_logprobs=old)
    assert metrics["ratio_mean"] == pytest.approx(1, abs=1e-2)
    assert torch.cosine_similarity(gradient, expected, dim=0) > 0.99


NUMBERS, ONE = noise(some_rollouts(3)), torch.ones(1)
NO_PROMPT = [SimpleNamespace(prompt=[], response=[1])]


@pytest.mark.parametrize(
    "lists, message",
    [
        ({"advantages": NUMBERS[:2]}, "advantages: needs a tensor a rollout"),
        ({"old_logprobs": [x[:0] for x in NUMBERS]}, "old_logprobs: needs"),
        ({"advantages": [NUMBERS[0], NUMBERS[1] / 0, NUMBERS[2]]}, "advantages: .* finite"),
        ({"config": update_config(kl_coef=0.1)}, "needs ref_logprobs"),
        ({"critic": "one"}, "needs values and returns"),
        ({"rollouts": NO_PROMPT, "advantages": [ONE]}, "empty prompt"),
    ],
)
def test_bad_arguments_of_update(lists, message):
    model = build()
    usual = {"rollouts": some_rollouts(3), "advantages": NUMBERS, "config": update_config()}
    with pytest.raises(ValueError, match=message) as raised:
        ppo.update(model, sgd(model), **usual | lists)
    assert "\n" not in str(raised.value)


# --------------------------------------------------------------------------- does it learn?


def test_bandit():
    """One state, one token, reward 1 for token 7: its probability must rise a lot."""
    model = small_llama(12)
    critic = ppo.ValueModel(model)
    optimizer = adamw(model, critic, lr=3e-3)
    settings = update_config(epochs=2, minibatch=32)

    def chances():
        with torch.no_grad():
            return model(torch.tensor([[3, 4]])).logits[0, -1].softmax(0)

    before = chances()[7]
    for _ in range(15):
        drawn = chances().multinomial(64, replacement=True).tolist()
        rollouts = [SimpleNamespace(prompt=[3, 4], response=[token]) for token in drawn]
        rewards = [float(token == 7) for token in drawn]
        values = ppo.rollout_values(critic, rollouts, settings)
        advantages, returns = ppo.response_gae(values, rewards, settings)
        lists = {"critic": critic, "values": values, "returns": returns}
        ppo.update(model, optimizer, rollouts, ppo.whiten(advantages), settings, **lists)
    assert before < 0.15 and chances()[7] > 0.6
