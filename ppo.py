"""From rewards to a policy update: log-probs, GAE, group baselines, a value model and PPO's clipped losses.

Writing is a decision process. State s_t: the prompt and the response so far. Action a_t: the next token. Reward: zero
until the last token, which gets the grade. The policy gradient moves log pi(a_t | s_t) by A_t, how much better a_t was
than what the policy does on average in s_t. The ways to A_t differ in the baseline they compare the reward with:

    PPO           a learned value V(s_t), the critic; GAE turns rewards and values into A_t         ValueModel, gae
    GRPO, RLOO    the mean reward of the other responses to the same question; no critic            group_advantages
    VinePPO       the mean reward of fresh rollouts from s_t; no critic                             vineppo.py

What follows is the same for all. Samples are used more than once, so each token's gradient is weighted by the ratio
r_t = pi(a_t | s_t) / pi_old(a_t | s_t), and clipping takes the gain out of moving r_t further than eps from 1:

    loss = mean over the response tokens of   -min(r_t A_t, clip(r_t, 1 - eps, 1 + eps) A_t) + kl_coef * k3_t

with k3 an estimate of the KL divergence to a frozen reference. Two things that textbooks leave out decide the cost.
Memory: the logits of a batch, (batch, time, vocab), dwarf the model; `token_logprobs` never holds them. Time: padding,
and tokens that carry no gradient; sequences are sorted by length and micro-batched under a budget of tokens.

A rollout is anything with `.prompt` and `.response`, lists of token ids. What belongs to response tokens (log-probs,
advantages, values) travels as a list with one 1-D float32 CPU tensor a rollout, one number a response token.

    python ppo.py                                       # memory and speed against the plain log-softmax; takes minutes
    python ppo.py --vocab 32768 --width 64 --layers 1   # smaller
"""
import argparse
import contextlib
import copy
import json
import math
import statistics
import subprocess
import sys
import time
import weakref
from functools import partial

import numpy as np
import safetensors.torch
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence

# ------------------------- what the update needs: log-probs without the (batch, time, vocab) tensor, advantages, values


class HeadLogprobs(torch.autograd.Function):
    """log softmax(cap(hidden @ weight.T + bias) / temperature)[target] for each row, a chunk of rows at a time.

    Forward keeps one number a row, the logsumexp. Backward computes the chunk's logits again: with softmax p,
    d logp[target] / d logits = onehot(target) - p. One more matrix product, and never rows * vocab numbers at once."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, softcap, chunk, dtype):
        # hidden (rows, width), weight (vocab, width), bias (vocab) or None, targets (rows) -> (rows)
        # dtype: of the matrix products. Sums are float32 (float64 in a float64 model, which gradient checks need).
        ctx.temperature, ctx.softcap, ctx.chunk, ctx.dtype = temperature, softcap, chunk, dtype
        ctx.sums = torch.float64 if dtype == torch.float64 else torch.float32
        logprobs, lse = hidden.new_empty(2, len(hidden), dtype=ctx.sums)
        with torch.autocast(hidden.device.type, enabled=False):
            cast = weight.to(dtype)  # once, not once a chunk; no copy where it is of that type
            for i in range(0, len(hidden), chunk):
                rows = slice(i, i + chunk)
                z = HeadLogprobs.logits(ctx, hidden[rows], cast, bias)
                lse[rows] = z.logsumexp(-1)
                logprobs[rows] = z.gather(-1, targets[rows, None]).squeeze(-1) - lse[rows]
        ctx.save_for_backward(hidden, weight, bias, targets, lse)
        return logprobs

    @staticmethod
    def logits(ctx, rows, weight, bias):
        z = rows.to(ctx.dtype) @ weight.T  # (chunk, vocab)
        z = (z if bias is None else z.add_(bias)).to(ctx.sums)
        if ctx.softcap:
            z = z.div_(ctx.softcap).tanh_().mul_(ctx.softcap)
        return z.div_(ctx.temperature)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        hidden, weight, bias, targets, lse = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=ctx.sums) if ctx.needs_input_grad[1] else None  # the only such buffer
        d_bias = None if bias is None else torch.zeros_like(bias, dtype=ctx.sums)
        grad = (grad / ctx.temperature)[:, None]  # (rows, 1)
        with torch.autocast(hidden.device.type, enabled=False):
            cast = weight.to(ctx.dtype)
            for i in range(0, len(hidden), ctx.chunk):
                rows = slice(i, i + ctx.chunk)
                z = HeadLogprobs.logits(ctx, hidden[rows], cast, bias)
                slope = 1 - (z * (ctx.temperature / ctx.softcap)) ** 2 if ctx.softcap else None  # cap's
                z.sub_(lse[rows, None]).exp_()  # p
                z.mul_(-grad[rows]).scatter_add_(-1, targets[rows, None], grad[rows])  # grad (onehot - p) / temperature
                z = z if slope is None else z.mul_(slope)
                if bias is not None:
                    d_bias += z.sum(0)
                z = z.to(ctx.dtype)
                d_hidden[rows] = z @ cast
                if d_weight is not None:
                    add_product(d_weight, z, hidden[rows].to(ctx.dtype))
        d_weight = None if d_weight is None else d_weight.to(weight.dtype)
        return d_hidden, d_weight, None if bias is None else d_bias.to(bias.dtype), None, None, None, None, None


def add_product(total, a, b, slab_numbers=2**24):
    """total += a.T @ b. bfloat16 products add up in float32, a slab at a time: no second (vocab, width) tensor."""
    if total.dtype == a.dtype:
        return total.addmm_(a.T, b)
    rows = max(1, slab_numbers // total.shape[1])
    for i in range(0, len(total), rows):
        total[i:i + rows] += a.T[i:i + rows] @ b


def token_logprobs(model, tokens, *, temperature=1.0, mask=None, chunk=None):
    """log pi(tokens[t + 1] | tokens[:t + 1]) of the distribution softmax(logits / temperature).

    tokens: (batch, time) ids, rows padded on the RIGHT with any valid id. No attention mask is needed: under causal
    attention no real token sees what stands after it, and positions count from 0 in every row.
    mask: (batch, time - 1) bool, the positions wanted; the head is computed there alone, the others return 0.
    chunk: rows of the head computed at a time; None: as many as keep a chunk of logits near 128 MB.
    Returns (batch, time - 1) float32 (float64 in a float64 model), differentiable once. Under torch.autocast the
    products are of its type. ValueError: a temperature of 0, or a head whose logits this would get wrong."""
    if temperature <= 0:
        raise ValueError(f"temperature {temperature}: log-probs need one above 0 (a greedy choice has no ratio)")
    if tokens.dim() != 2 or tokens.shape[1] < 2:
        raise ValueError(f"tokens of shape {tuple(tokens.shape)}: needs (batch, time) with time of at least 2")
    check_head(model)
    mask = torch.ones_like(tokens[:, 1:], dtype=torch.bool) if mask is None else mask
    # the last column is only ever a target: the backbone need not read it
    hidden = model.base_model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state  # (batch, time - 1, width)
    logprobs = head_logprobs(model, hidden[mask], tokens[:, 1:][mask], temperature, chunk)  # (positions wanted)
    return torch.zeros(mask.shape, dtype=logprobs.dtype, device=mask.device).masked_scatter(mask, logprobs)


def head_logprobs(model, hidden, targets, temperature, chunk=None):
    """hidden (rows, width), targets (rows) -> (rows): the output embedding, and Gemma's soft cap where there is one."""
    head, kind = model.get_output_embeddings(), hidden.device.type
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.weight.dtype
    chunk = chunk or max(1, 2**25 // len(head.weight))
    return HeadLogprobs.apply(hidden, head.weight, head.bias, targets, temperature, softcap, chunk, dtype)


CHECKED = weakref.WeakSet()  # models whose head was found to be one that head_logprobs gets right


@torch.no_grad()
def check_head(model):
    """Once a model: our log-probs in a few states against the model's own; ValueError where they differ.

    Some families do more than a matrix product after the backbone (Cohere and Granite scale the logits), and training
    on numbers that are slightly off looks fine and learns less. The head's input is blown up until the largest logit
    is 50, else a soft cap that we do not know would hide in a fresh model's small logits; and each state's least likely
    token is compared, for a sure one's log-prob is near 0 at any scale."""
    if model in CHECKED:
        return
    name, head = type(model).__name__, getattr(model, "get_output_embeddings", lambda: None)()
    if type(head) is not nn.Linear or model.base_model is model:  # subclasses may add to the product: LoRA, int8
        raise ValueError(f"{name}: log-probs need a backbone (.base_model) and a plain nn.Linear head, found "
                         f"{type(head).__name__}: use a model without adapters or quantization on its head")
    device = head.weight.device
    tokens = torch.arange(8, device=device)[None] % len(head.weight)  # (1, 8)
    with no_dropout(model), torch.autocast(device.type, enabled=False):
        hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state[0]  # (8, width)
        scale = 50 / head(hidden).abs().max().clamp(min=1e-9)
        hook = head.register_forward_pre_hook(lambda module, inputs: (inputs[0] * scale,))
        try:
            theirs = model(tokens, use_cache=False).logits[0]  # (8, vocab)
        finally:
            hook.remove()
        theirs, unlikely = theirs.float().log_softmax(-1).min(-1)  # (8,) each
        ours = head_logprobs(model, hidden * scale, unlikely, 1.0).float()
    tolerance = 0.1 if head.weight.dtype.itemsize > 2 else 1.0
    if not torch.allclose(ours, theirs, rtol=0, atol=tolerance, equal_nan=True):  # NaN weights are not the head's fault
        raise ValueError(f"{name}: its logits are not its head times its backbone's output (scaled? capped?): "
                         "use another model, or teach ppo.HeadLogprobs this one's formula")
    CHECKED.add(model)


@contextlib.contextmanager
def no_dropout(*models):
    """Every module in eval mode, restored afterwards: with dropout, old and new log-probs would differ by noise and the
    first ratio would not be 1. A layer under gradient checkpointing keeps its own flag, not its children's, which do
    the dropping out: in eval mode transformers quietly stops checkpointing."""
    modes = [(module, module.training) for model in models if model is not None for module in model.modules()]
    for module, _ in modes:
        module.training = torch.is_grad_enabled() and bool(getattr(module, "gradient_checkpointing", False))
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def gae(rewards, values, mask, *, gamma, lam):
    """Generalized advantage estimation, Schulman et al. 2015 (arXiv 1506.02438), eq. 16. All (batch, time).

    delta_t = r_t + gamma V(s_{t+1}) - V(s_t);   A_t = sum_l (gamma lam)^l delta_{t+l}, summed from the end backward.
    mask: True at the response tokens, one unbroken run a row. What follows the last one is terminal: its value is 0.
    Returns advantages and returns A_t + V(s_t), the critic's targets; 0 outside the mask."""
    rewards, values = torch.where(mask, rewards, 0), torch.where(mask, values, 0)
    advantages = torch.zeros_like(values)
    advantage = next_value = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = advantage = (delta + gamma * lam * advantage) * mask[:, t]
        next_value = values[:, t]
    return advantages, advantages + values


def group_advantages(rewards, *, how):
    """The baseline is the other responses to the same question. rewards: (questions, n) -> (questions, n) float32.

    how='grpo': (r_i - mean) / std (DeepSeekMath, arXiv 2402.03300, section 4.1.2; sample std, as public codes have it).
    how='rloo': r_i - mean of the n - 1 others (arXiv 2402.14740): unbiased, and keeps the reward's scale.
    A group that agrees gives exactly 0. ValueError: n = 1, which leaves nothing to compare with."""
    rewards = np.asarray(rewards, dtype=np.float32).astype(np.float64)  # so that equal rewards cancel exactly
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards {rewards.shape}: a group baseline needs (questions, n), n at least 2 rollouts")
    if how == "grpo":
        advantages = (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, ddof=1, keepdims=True) + 1e-6)
    elif how == "rloo":
        advantages = rewards - (rewards.sum(1, keepdims=True) - rewards) / (rewards.shape[1] - 1)
    else:
        raise ValueError(f"group baseline {how!r}: choose 'grpo' or 'rloo'")
    return advantages.astype(np.float32)


def per_token(rollouts, scores):
    """One number a rollout -> that number at each of its response tokens."""
    return [torch.full((len(r.response),), float(s)) for r, s in zip(rollouts, scores, strict=True)]


def whiten(advantages):
    """Per-token advantages to mean 0 and standard deviation 1 over all response tokens, so that the step does not
    depend on the reward's scale or on how often the policy succeeds. All equal: exactly 0, not noise blown up."""
    tokens = torch.cat(list(advantages)).double()
    mean, std = tokens.mean(), tokens.std(correction=0)
    return [((a.double() - mean) / (std + 1e-8)).float() for a in advantages]


def kl_k3(ref, new):
    """KL(pi || pi_ref) from log-probs of tokens sampled from pi: exp(d) - d - 1 with d = ref - new (k3; GRPO's eq. 4).
    Unbiased, never negative, of less variance than -d. Clamped to [0, 10]: no one token may own the batch."""
    d = (ref - new).clamp(-20, 20)  # k3 is past 10 there anyway, and exp's inf would turn the clamp's zero into NaN
    return (torch.expm1(d) - d).clamp(0, 10)


class ValueModel(nn.Module):
    """V(s): a copy of a causal model's backbone with a scalar head. (batch, time) ids -> (batch, time) float32, at t
    the value of the state after tokens[:t + 1], in which token t + 1 is chosen.

    The head starts at zero, so V = 0 and the first advantages are the plain rewards. A random one would add noise of
    the hidden state's size to them, and send that noise's gradient into the backbone before the head means anything."""

    def __init__(self, model):
        super().__init__()
        self.backbone = copy.deepcopy(model.base_model).requires_grad_(True)
        weight = model.get_output_embeddings().weight
        self.head = nn.Linear(weight.shape[1], 1, device=weight.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens):
        hidden = self.backbone(input_ids=tokens, use_cache=False).last_hidden_state  # (batch, time, width)
        with torch.autocast(tokens.device.type, enabled=False):  # bfloat16 has nothing between 0.996 and 1
            return self.head(hidden.to(self.head.weight.dtype)).squeeze(-1)

    def save(self, path):
        safetensors.torch.save_model(self, str(path))  # all weights, to a .safetensors file

    def load(self, path):
        """Weights from `save`. ValueError: no such file, or a critic of another shape."""
        try:
            safetensors.torch.load_model(self, str(path), device=str(self.head.weight.device))
        except (OSError, RuntimeError, safetensors.SafetensorError) as error:
            raise ValueError(f"critic {path}: {' '.join(str(error).split())[:300]}") from None
        return self


def microbatches(rollouts, tokens_per_microbatch):
    """Indices of rollouts in groups of like length, count times longest within tokens_per_microbatch (padded tokens; a
    rollout longer than that goes alone). Longest first: if memory runs out, it does so at once."""
    groups, lengths = [], [len(r.prompt) + len(r.response) for r in rollouts]
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= tokens_per_microbatch:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def pad(rollouts, device):
    """tokens (batch, time), and mask (batch, time - 1): True where the NEXT token belongs to the response."""
    tokens = pad_sequence([torch.tensor(r.prompt + r.response) for r in rollouts], batch_first=True)
    prompt = torch.tensor([len(r.prompt) for r in rollouts])[:, None]
    response = torch.tensor([len(r.response) for r in rollouts])[:, None]
    target = torch.arange(1, tokens.shape[1])
    return tokens.to(device), ((target >= prompt) & (target < prompt + response)).to(device)


def response_logprobs(policy, rollouts, temperature):
    """(response tokens,), rollout after rollout: the one path to new, old and reference log-probs."""
    tokens, mask = pad(rollouts, next(policy.parameters()).device)
    return token_logprobs(policy, tokens, temperature=temperature, mask=mask)[mask]


def response_values(critic, rollouts):
    """(response tokens,), rollout after rollout: the value of the state in which each was chosen."""
    tokens, mask = pad(rollouts, next(critic.parameters()).device)
    return critic(tokens[:, :-1])[mask]


def mixed_precision(model, dtype):
    if dtype not in (None, torch.bfloat16):
        raise ValueError(f"autocast {dtype}: None or torch.bfloat16 (float16 would need its losses scaled)")
    return torch.autocast(next(model.parameters()).device.type, dtype=dtype) if dtype else contextlib.nullcontext()


@torch.no_grad()
def without_gradient(model, rollouts, function, tokens_per_microbatch, autocast):
    """function(some rollouts) -> (their response tokens,), over all rollouts; one tensor for each, in their order."""
    check_rollouts(rollouts)
    scores = [None] * len(rollouts)
    with no_dropout(model), mixed_precision(model, autocast):
        for group in microbatches(rollouts, tokens_per_microbatch):
            flat = function([rollouts[i] for i in group]).float().cpu()
            for i, piece in zip(group, flat.split([len(rollouts[i].response) for i in group])):
                scores[i] = piece
    return scores


def rollout_logprobs(model, rollouts, *, temperature=1.0, tokens_per_microbatch=8192, autocast=None):
    """log pi of each response token at the sampling temperature: a list of 1-D tensors, no gradient.
    autocast: None or torch.bfloat16 (the matrix products): as in `update`, else the first ratio is not 1."""
    score = partial(response_logprobs, model, temperature=temperature)
    return without_gradient(model, rollouts, score, tokens_per_microbatch, autocast)


def rollout_values(critic, rollouts, *, tokens_per_microbatch=8192, autocast=None):
    """The critic's value of the state in which each response token was chosen: a list of 1-D tensors, no gradient."""
    return without_gradient(critic, rollouts, partial(response_values, critic), tokens_per_microbatch, autocast)


def critic_advantages(critic, rollouts, rewards, *, gamma=1.0, lam=1.0, tokens_per_microbatch=8192, autocast=None):
    """PPO's advantages: the critic's values, the reward (one a rollout) on the last token, GAE.
    Returns advantages (not whitened), values and returns, each a list of 1-D tensors."""
    values = rollout_values(critic, rollouts, tokens_per_microbatch=tokens_per_microbatch, autocast=autocast)
    lengths = torch.tensor([len(v) for v in values])
    padded = pad_sequence(values, batch_first=True)  # (batch, time of the longest response)
    token_rewards = torch.zeros_like(padded)
    token_rewards[torch.arange(len(lengths)), lengths - 1] = torch.as_tensor(rewards, dtype=torch.float32)
    mask = torch.arange(padded.shape[1]) < lengths[:, None]
    advantages, returns = gae(token_rewards, padded, mask, gamma=gamma, lam=lam)
    return [a[:n] for a, n in zip(advantages, lengths)], values, [r[:n] for r, n in zip(returns, lengths)]


def check_rollouts(rollouts, **lists):
    """ValueError unless every rollout can be scored and every list holds one finite number a response token."""
    for i, r in enumerate(rollouts):
        if not r.prompt or not r.response:
            raise ValueError(f"rollout {i}: {len(r.prompt)} prompt and {len(r.response)} response tokens: give it both")
    for name, entries in lists.items():
        if entries is not None and [len(e) for e in entries] != [len(r.response) for r in rollouts]:
            raise ValueError(f"{name}: needs {len(rollouts)} tensors, as many numbers in each as response tokens")
        if entries and not torch.cat(list(entries)).isfinite().all():
            bad = next(i for i, entry in enumerate(entries) if not entry.isfinite().all())
            raise ValueError(f"{name}: a NaN or an infinity in rollout {bad}: look where it was computed")


# ------------------------- the update

SUMS = ("policy_loss", "kl", "approx_kl", "clip_fraction", "ratio_mean", "tokens", "loss")


def policy_loss(new, old, advantages, clip):
    """PPO's clipped surrogate, negated (arXiv 1707.06347, eq. 7). (tokens,) each -> losses and ratios."""
    ratio = (new - old).exp()
    return -torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages), ratio


def value_loss(new, old, returns, value_clip):
    """0.5 max((v - R)^2, (v_old + clip(v - v_old) - R)^2), as PPO's public codes have it: outside the trust region
    getting closer to R no longer pays, while coming back always does. value_clip None: plain squares."""
    loss = (new - returns) ** 2
    if value_clip is not None:
        loss = torch.max(loss, (old + (new - old).clamp(-value_clip, value_clip) - returns) ** 2)
    return 0.5 * loss


def gathered(rollouts, chosen, tokens_per_microbatch, device, *lists):
    """The chosen rollouts in micro-batches, and each list's numbers at their response tokens: (tokens,) or None."""
    for group in microbatches([rollouts[i] for i in chosen], tokens_per_microbatch):
        pick = [chosen[i] for i in group]
        columns = [None if entries is None else torch.cat([entries[i] for i in pick]).to(device) for entries in lists]
        yield [rollouts[i] for i in pick], *columns


def policy_gradient(policy, rollouts, chosen, advantages, old_logprobs, ref_logprobs, *, tokens, temperature, clip,
                    kl_coef, tokens_per_microbatch, autocast):
    """Adds the gradient of the loss summed over the chosen rollouts / `tokens`; returns SUMS over their tokens."""
    sums, device = 0, next(policy.parameters()).device
    for batch, advantage, old, ref in gathered(rollouts, chosen, tokens_per_microbatch, device,
                                               advantages, old_logprobs, ref_logprobs):
        with mixed_precision(policy, autocast):
            new = response_logprobs(policy, batch, temperature)  # (tokens of the micro-batch,)
        old = new.detach() if old is None else old
        surrogate, ratio = policy_loss(new, old, advantage, clip)
        kl = torch.zeros_like(new) if ref is None else kl_k3(ref, new)
        loss = surrogate + kl_coef * kl
        (loss.sum() / tokens).backward()
        with torch.no_grad():
            cut = (surrogate > -ratio * advantage).to(new)  # the clip decided: no gradient
            sums += torch.stack([surrogate, kl, kl_k3(new, old), cut, ratio, torch.ones_like(new), loss]).sum(1)
    return dict(zip(SUMS, sums.tolist()))  # the minibatch's one wait for the device


def critic_gradient(critic, rollouts, chosen, values, returns, *, tokens, value_clip, tokens_per_microbatch, autocast):
    """Adds the gradient of a minibatch's value loss, divided by `tokens`; returns its sum over the response tokens."""
    total, device = 0, next(critic.parameters()).device
    for batch, old, target in gathered(rollouts, chosen, tokens_per_microbatch, device, values, returns):
        with mixed_precision(critic, autocast):
            new = response_values(critic, batch)
        loss = value_loss(new, old, target, value_clip).sum()
        (loss / tokens).backward()
        total += loss.detach()
    return float(total)


def step(model, optimizer, loss, max_grad_norm, name):
    """An optimizer step on the gradient at hand; the gradient's norm before clipping."""
    norm = float(clip_grad_norm_(model.parameters(), math.inf if max_grad_norm is None else max_grad_norm))
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise FloatingPointError(f"{name}: loss {loss:.4g}, gradient norm {norm:.4g}, so no step was made: lower the "
                                 "learning rate, or look for a NaN in the weights")
    optimizer.step()
    optimizer.zero_grad()  # now: generation can use the memory
    return norm


def update(policy, optimizer, rollouts, advantages, *, old_logprobs=None, ref_logprobs=None, critic=None,
           critic_optimizer=None, values=None, returns=None, temperature=1.0, clip=0.2, value_clip=0.2, kl_coef=0.0,
           epochs=1, minibatch=64, max_grad_norm=1.0, max_ratio=10.0, tokens_per_microbatch=8192, rng=None,
           scheduler=None, critic_scheduler=None, autocast=None):
    """PPO's epochs of minibatches over an iteration's rollouts; with no critic, the update of GRPO, RLOO and VinePPO.

    A minibatch (`minibatch` rollouts, or a few less so that all are of one size; drawn with `rng`, a numpy Generator;
    None: one seeded with 0) is one optimizer step of the policy and one of the critic. Its gradient is summed over
    micro-batches of at most tokens_per_microbatch padded tokens and divided by its response tokens, so how it is cut
    does not change it. Without a KL term, rollouts whose advantages are all 0 are left out of the policy's pass: they
    have no gradient, and still count in that division. A minibatch of nothing else makes no policy step.

    advantages, a list; so are: old_logprobs, of the policy that sampled (None: computed here before the first step; a
    single minibatch needs no pass for them, its ratio is 1); ref_logprobs, of the frozen reference, needed for
    kl_coef > 0; values and returns (see critic_advantages), needed with a critic. temperature: that of the sampling.
    max_ratio: a minibatch of larger mean ratio makes no policy step. max_grad_norm: for policy and critic each; None:
    no clipping. autocast: None or torch.bfloat16. scheduler, critic_scheduler: stepped once a minibatch, skipped ones
    too, so that a schedule's length is known beforehand.

    Returns metrics. Means over the tokens of the policy's pass, skipped minibatches left out: policy_loss, kl (k3 to
    the reference), approx_kl (k3 of old to new), clip_fraction, ratio_mean. Over all response tokens: value_loss,
    explained_variance (of the returns by `values`). Means over steps, before clipping: grad_norm, critic_grad_norm.
    Counts: optimizer_steps, skipped_minibatches, tokens_trained (in policy steps). What does not apply is left out.
    ValueError: arguments that do not fit together. FloatingPointError: a NaN or infinity, before the step it spoils."""
    check_rollouts(rollouts, advantages=advantages, old_logprobs=old_logprobs, ref_logprobs=ref_logprobs,
                   values=values, returns=returns)
    if not rollouts or epochs < 1 or minibatch < 1:
        raise ValueError(f"{len(rollouts)} rollouts, epochs {epochs}, minibatch {minibatch}: each needs at least 1")
    if kl_coef > 0 and ref_logprobs is None:
        raise ValueError(f"kl_coef {kl_coef}: a KL loss needs ref_logprobs, or set it to 0")
    if critic is not None and (critic_optimizer is None or values is None or returns is None):
        raise ValueError("a critic needs critic_optimizer, values and returns: see ppo.critic_advantages")
    passes = dict(tokens_per_microbatch=tokens_per_microbatch, autocast=autocast)
    active = [kl_coef > 0 or bool(a.any()) for a in advantages]  # has this rollout a gradient?
    parts, rng = math.ceil(len(rollouts) / minibatch), rng or np.random.default_rng(0)
    if old_logprobs is None and epochs * parts > 1:
        needed = [i for i, has_gradient in enumerate(active) if has_gradient]
        scores = rollout_logprobs(policy, [rollouts[i] for i in needed], temperature=temperature, **passes)
        old_logprobs = dict(zip(needed, scores))
    totals, norms, value_sum, value_tokens, critic_norms, skipped = dict.fromkeys(SUMS, 0.0), [], 0.0, 0, [], 0
    optimizer.zero_grad()
    if critic is not None:
        critic_optimizer.zero_grad()
    with no_dropout(policy, critic):
        for chosen in (part for _ in range(epochs) for part in np.array_split(rng.permutation(len(rollouts)), parts)):
            tokens = sum(len(rollouts[i].response) for i in chosen)
            some = [i for i in chosen if active[i]]
            if some:
                sums = policy_gradient(policy, rollouts, some, advantages, old_logprobs, ref_logprobs, tokens=tokens,
                                       temperature=temperature, clip=clip, kl_coef=kl_coef, **passes)
                if sums["ratio_mean"] > max_ratio * sums["tokens"]:  # infinite ratios end here too, not as a NaN
                    skipped += 1
                    optimizer.zero_grad()
                else:
                    norms.append(step(policy, optimizer, sums["loss"], max_grad_norm, "policy"))
                    totals = {name: totals[name] + sums[name] for name in SUMS}
            if critic is not None:
                loss = critic_gradient(critic, rollouts, chosen, values, returns, tokens=tokens, value_clip=value_clip,
                                       **passes)
                critic_norms.append(step(critic, critic_optimizer, loss, max_grad_norm, "critic"))
                value_sum, value_tokens = value_sum + loss, value_tokens + tokens
            for schedule in filter(None, (scheduler, critic_scheduler)):
                schedule.step()

    metrics = dict(optimizer_steps=len(norms), skipped_minibatches=skipped, tokens_trained=int(totals["tokens"]))
    if norms:
        metrics |= {name: totals[name] / totals["tokens"] for name in SUMS[:5]} | dict(grad_norm=statistics.mean(norms))
    if ref_logprobs is None:
        metrics.pop("kl", None)
    if critic is not None:
        metrics |= dict(value_loss=value_sum / value_tokens, critic_grad_norm=statistics.mean(critic_norms))
        target, value = torch.cat(list(returns)), torch.cat(list(values))
        if target.var(correction=0) > 1e-8:  # else there is nothing to explain
            metrics["explained_variance"] = 1 - float((target - value).var(correction=0) / target.var(correction=0))
    return metrics


def plain_logprobs(model, tokens):
    """Benchmark: the obvious way, as lean as it gets: (batch, time, vocab) logits, log_softmax, gather."""
    logits = model(tokens, use_cache=False).logits[:, :-1]
    return logits.float().log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)


def backbone_only(model, tokens):
    return model.base_model(tokens[:, :-1], use_cache=False).last_hidden_state.float().mean(-1)


PASSES = {"backbone": backbone_only, "plain": plain_logprobs, "token_logprobs": token_logprobs}


def measure(args):
    """In a process of its own: the peak bytes of one forward and backward, or the seconds of both, side by side."""
    from transformers import AutoModelForCausalLM, Qwen2Config
    heads = dict(num_attention_heads=max(1, args.width // 64), num_key_value_heads=max(1, args.width // 448))
    config = Qwen2Config(vocab_size=args.vocab, hidden_size=args.width, intermediate_size=args.width * 38 // 7, **heads,
                         num_hidden_layers=args.layers, tie_word_embeddings=not args.untied)
    torch.manual_seed(0)
    with torch.device(args.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        tokens = torch.randint(args.vocab, (args.batch, args.time))

    def run(name):
        start = time.perf_counter()
        with mixed_precision(model, torch.bfloat16 if args.bf16 else None):
            loss = PASSES[name](model, tokens).sum()
        loss.backward()
        model.zero_grad()
        if args.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start
    if args.measure == "speed":
        return [[run("plain"), run("token_logprobs")] for _ in range(args.repeats + 1)][1:]  # the first warms up
    run(args.measure)
    if args.device == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource  # Unix alone has it
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main():
    parser = argparse.ArgumentParser(description="Memory and speed of token_logprobs against the plain log-softmax.")
    for name, default in dict(batch=4, time=512, vocab=151936, width=896, layers=2, repeats=3).items():
        parser.add_argument(f"--{name}", type=int, default=default, help="default %(default)s")
    parser.add_argument("--untied", action="store_true", help="an output embedding of its own")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--measure", choices=(*PASSES, "speed"), help=argparse.SUPPRESS)  # what the children are told
    args = parser.parse_args()
    if args.measure:
        return print(json.dumps(measure(args)))

    def child(what):
        command = [sys.executable, *sys.argv, "--measure", what]
        return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    print(f"{args.batch} x {args.time} tokens, vocabulary {args.vocab}, forward and backward: peak of a fresh process")
    peaks = {name: child(name) for name in PASSES}
    added = {name: peak - peaks["backbone"] for name, peak in peaks.items()}
    for name in PASSES:
        print(f"{name:15}{peaks[name] / 1e6:8,.0f} MB, {added[name] / 1e6:6,.0f} MB more than the backbone alone: "
              f"{added[name] / added['plain']:4.2f} of plain")
    seconds = child("speed")
    ratios = sorted(ours / plain for plain, ours in seconds)
    plain, ours = (statistics.median(column) for column in zip(*seconds))
    print(f"seconds: plain {plain:.2f}, token_logprobs {ours:.2f}; ratio of neighbouring runs: "
          f"{ratios[0]:.2f} to {ratios[-1]:.2f}, median {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
