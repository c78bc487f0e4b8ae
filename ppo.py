"""From rewards to a policy update: advantages, PPO's clipped loss, the critic, the epochs.

State s_t: the prompt and the response so far. Action a_t: the next token. The reward is 0 until the
last token, which gets the grade. A policy gradient raises log pi(a_t | s_t) in proportion to the
advantage A_t: how much better a_t was than what the policy does on average in s_t. The algorithms
differ in what they compare the reward with:

    PPO          V(s_t), learned by a second network, the critic       gae, ValueModel
    GRPO, RLOO   the other responses to the same question              group_advantages
    VinePPO      fresh rollouts from s_t                               vineppo.py

Two responses to "What is 2 + 3 + 4?" and the advantage of each token ($ is the stop token):

    response                       5   +   4   =   9   $         5   +   4   =   8   $
    reward                                             1                             0
    V(s_t), say                   .5  .6  .6  .6  .6  .9        .5  .6  .6  .6  .6  .1
    PPO, gamma = lam = 1          .5  .4  .4  .4  .4  .1       -.5 -.6 -.6 -.6 -.6 -.1
    PPO, lam = 0                  .1   0   0   0  .3  .1        .1   0   0   0 -.5 -.1
    RLOO, of two responses         1   1   1   1   1   1        -1  -1  -1  -1  -1  -1

The loss is PPO's (arXiv 1707.06347, eq. 7), with r_t = pi(a_t | s_t) / pi_old(a_t | s_t):

    mean over response tokens of  -min(r_t A_t, clip(r_t, 1 - eps, 1 + eps) A_t)

A rollout has `.prompt` and `.response`, lists of token ids. Numbers for response tokens come as a
list: one 1-D float32 CPU tensor for each rollout. Where rollouts are joined, (tokens,) stands for
all their response tokens, one after the other. config: sfl.py's settings, or any object like them.
"""

import copy
import math
import statistics
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence, unpad_sequence

from plumbing.batches import in_microbatches, padded_batch, padded_lists
from plumbing.commands import require
from plumbing.logprobs import mixed_precision, no_dropout, token_logprobs
from plumbing.processes import all_sum, sum_gradients, whole

# --- Advantages: how much better was this token than expected? ------------------------------------


def group_advantages(rewards, *, how):
    """Compare with the other responses to the same question. (questions, n) -> (questions, n).

        'grpo'    A_i = (r_i - mean of r) / std of r         arXiv 2402.03300, section 4.1.2
        'rloo'    A_i = r_i - mean of the n - 1 other r      arXiv 2402.14740

    RLOO's is unbiased and keeps the reward's scale. A group of equal rewards gives exactly 0."""
    require(how in ("grpo", "rloo"), f"group baseline {how!r}: choose 'grpo' or 'rloo'")
    rewards = np.asarray(rewards, dtype=np.float32)
    n = rewards.shape[-1]
    require(rewards.ndim == 2 and n > 1, f"rewards {rewards.shape}: need (questions, at least 2)")
    # Sums of float32 numbers are exact in float64, so that equal rewards cancel to exactly 0.
    rewards = rewards.astype(np.float64)
    if how == "grpo":
        mean = rewards.mean(1, keepdims=True)  # (questions, 1)
        std = rewards.std(1, ddof=1, keepdims=True)  # (questions, 1), n - 1 in the denominator
        advantages = (rewards - mean) / (std + 1e-6)  # all equal: 0 / 1e-6
    else:
        others = rewards.sum(1, keepdims=True) - rewards  # (questions, n) sum of the n - 1 others
        advantages = rewards - others / (n - 1)
    return advantages.astype(np.float32)


def per_token(rollouts, numbers):
    """Repeat each rollout's number at every token of its response: a list, (response length,)
    each."""
    tensors = []
    for rollout, number in zip(rollouts, numbers, strict=True):
        length = len(rollout.response)
        tensors.append(torch.full((length,), float(number)))
    return tensors


def gae(rewards, values, mask, *, gamma, lam):
    """Generalized advantage estimation (arXiv 1506.02438, eq. 16, as a recursion). Tensors are
    (batch, time); here r_t is the reward, not the ratio.

        delta_t = r_t + gamma V(s_{t+1}) - V(s_t),    A_t = delta_t + gamma lam A_{t+1}

    mask: True at the response tokens, which stand side by side. The state after the last one is
    terminal, of value 0. Gives the advantages A_t and the returns A_t + V(s_t), which the critic
    learns to predict. Both are 0 outside the mask."""
    values = torch.where(mask, values, 0)  # a NaN in the padding must not reach a sum
    advantages = torch.zeros_like(values)
    advantage = torch.zeros_like(values[:, 0])  # (batch,) A_{t+1}
    next_value = torch.zeros_like(values[:, 0])  # (batch,) V(s_{t+1})
    # Backwards: A_t is made from A_{t+1}.
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]  # (batch,)
        advantage = delta + gamma * lam * advantage  # A_t
        # 0 outside the response, whatever stands there
        advantage = torch.where(mask[:, t], advantage, 0)
        advantages[:, t] = advantage
        next_value = values[:, t]
    return advantages, advantages + values  # (batch, time) each


def response_gae(values, rewards, config):
    """`gae` of responses. values: V(s_t) of each response token, from `rollout_values`. rewards:
    one for each rollout. Gives the advantages and the returns, two lists like values."""
    lengths = torch.tensor([len(value) for value in values])  # (rollouts,)
    values = pad_sequence(values, batch_first=True)  # (rollouts, time of the longest)
    time = torch.arange(values.shape[1])
    mask = time < lengths[:, None]  # (rollouts, time)
    last = time == lengths[:, None] - 1  # the reward comes with the last token
    rewards = torch.as_tensor(rewards, dtype=torch.float32)
    rewards = last * rewards[:, None]  # (rollouts, time)
    # (rollouts, time) each
    advantages, returns = gae(rewards, values, mask, gamma=config.gamma, lam=config.lam)
    advantages = unpad_sequence(advantages, lengths, batch_first=True)
    return advantages, unpad_sequence(returns, lengths, batch_first=True)


def whiten(advantages):
    """Advantages to mean 0 and standard deviation 1 over all response tokens of the iteration: the
    step no longer depends on the reward's scale. If all are equal they become exactly 0. (VinePPO's
    code whitens each minibatch: there an advantage depends on the rollouts it is trained with.)"""
    tokens = torch.cat(advantages).double()  # (tokens,) of all rollouts
    std = tokens.std(correction=0)
    white = (tokens - tokens.mean()) / (std + 1e-8)  # all equal: 0 / 1e-8
    lengths = [len(advantage) for advantage in advantages]  # one a rollout
    return list(white.float().split(lengths))


class ValueModel(nn.Module):
    """The critic, V(s): a copy of a causal model's backbone with a scalar head.

    (batch, time) ids -> (batch, time) float32. At t stands the value of the state s in which token
    t + 1 is chosen: it is tokens[:t + 1]."""

    def __init__(self, model):
        super().__init__()
        width = model.get_output_embeddings().in_features
        self.backbone = copy.deepcopy(model.base_model)
        self.head = nn.Linear(width, 1, device=model.device)
        # At first every value is 0: the first advantages come from the rewards alone.
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens, **sharing):  # of rows with several responses, see `padded_batch`
        output = self.backbone(input_ids=tokens, use_cache=False, **sharing)
        hidden = output.last_hidden_state  # (batch, time, width)
        # Not in bfloat16: there the next number below 1 is 0.996.
        with torch.autocast(tokens.device.type, enabled=False):
            hidden = hidden.to(self.head.weight.dtype)
            return self.head(hidden).squeeze(-1)  # (batch, time)


# --- Log-probs and values of response tokens ------------------------------------------------------


def response_logprobs(policy, rollouts, config):
    """log pi(a_t | s_t), (tokens,), where pi = softmax(logits / temperature). That is what was
    sampled from, before top_p cut it off. New, old and reference log-probs are all of this kind."""
    # Responses to one prompt share a row, with the prompt once, where the model can read such.
    tokens, mask, sharing = padded_batch(rollouts, policy)  # mask: is the next token a response's?
    how = {"temperature": config.temperature, "mask": mask, **sharing}
    with mixed_precision(policy, config.dtype):
        logprobs = token_logprobs(policy, tokens, **how)  # (batch, time - 1)
    return logprobs[mask]


def response_values(critic, rollouts, config):
    """V(s_t) of the states in which the response tokens were chosen, (tokens,)."""
    tokens, mask, sharing = padded_batch(rollouts, critic)
    with mixed_precision(critic, config.dtype):
        # (batch, time - 1): after the last token nothing is chosen
        values = critic(tokens[:, :-1], **sharing)
    return values[mask]


@torch.no_grad()
def rollout_outputs(output_of, model, rollouts, config, chosen=None, when_full=None):
    """Log-probs or values of rollouts, with no gradient: a list, (response length,) for each.
    output_of(model, some rollouts, config) -> (tokens,). chosen: indices; the others get zeros.
    when_full: called when memory runs out, before micro-batches of half as many tokens."""
    no_dropout(model)
    lengths = [len(r.response) for r in rollouts]
    outputs = per_token(rollouts, [0] * len(rollouts))

    def fill(some):
        joined = output_of(model, [rollouts[i] for i in some], config)  # (tokens,)
        joined = joined.float().cpu()
        pieces = joined.split([lengths[i] for i in some])  # one a rollout
        for i, piece in zip(some, pieces):
            outputs[i] = piece

    in_microbatches(fill, rollouts, model, config, chosen, when_full)
    # Each process filled its share and left zeros elsewhere: the sum has all.
    joined = torch.cat([torch.zeros(0), *outputs])  # zeros(0): cat of nothing fails
    joined = all_sum(joined)  # (tokens,) of all rollouts
    return list(joined.split(lengths))


rollout_logprobs = partial(rollout_outputs, response_logprobs)  # (policy, rollouts, config)
rollout_values = partial(rollout_outputs, response_values)  # (critic, rollouts, config)


# --- The losses of a micro-batch ------------------------------------------------------------------


@dataclass
class MicroBatch:
    """Rollouts for one forward and backward, and the numbers of their response tokens. An optimizer
    step learns from a minibatch. What fits into memory at once is a micro-batch. The loss of a
    minibatch is the sum of its micro-batches' losses."""

    rollouts: list
    minibatch_responses: int  # in the whole minibatch
    minibatch_tokens: int  # in all its responses
    lengths: torch.Tensor | None = None  # (tokens,) length of the response that holds the token
    advantages: torch.Tensor | None = None  # (tokens,) A_t
    old_logprobs: torch.Tensor | None = None  # (tokens,) of the policy that sampled
    ref_logprobs: torch.Tensor | None = None  # (tokens,) of the frozen reference
    values: torch.Tensor | None = None  # (tokens,) V(s_t) before the critic moved
    returns: torch.Tensor | None = None  # (tokens,) the critic's targets


def policy_loss(policy, batch, config):
    """PPO's clipped surrogate (arXiv 1707.06347, eq. 7, negated) plus kl_coef times the KL to the
    reference. Returns the loss, and metrics: {name: sum over tokens}."""
    new = response_logprobs(policy, batch.rollouts, config)  # (tokens,), like all that follows
    old = batch.old_logprobs
    if old is None:  # this very policy sampled: r_t is 1, but its gradient is not 0
        old = new.detach()
    ratio = (new - old).exp()  # r_t
    clipped = ratio.clamp(1 - config.clip, 1 + config.clip)
    # The minimum is pessimistic. Once r_t has left the interval the way its advantage pays, the
    # clipped term is the smaller one, and that has no gradient.
    gain = ratio * batch.advantages
    surrogate = -torch.min(gain, clipped * batch.advantages)
    if config.loss_average == "token":
        share = 1 / batch.minibatch_tokens  # all tokens count alike, as in the papers' PPO
    else:
        # All responses count alike, so a token of a long one counts less (GRPO as published,
        # arXiv 2402.03300, eq. 3).
        share = 1 / (batch.lengths * batch.minibatch_responses)
    loss = (surrogate * share).sum()
    sums = {
        "policy_loss": surrogate.sum(),
        "approx_kl": kl_k3(new, old).sum(),  # KL(pi_old || pi): old sampled the tokens
        "clip_fraction": (surrogate > -gain).sum(),  # of these tokens the surrogate has no gradient
        "ratio_mean": ratio.sum(),  # a sum, too: `step_means` divides
    }
    if batch.ref_logprobs is not None:
        sums["kl"] = kl_k3(batch.ref_logprobs, new).sum()
        # As in VinePPO's code, the KL is summed over a response and averaged over responses.
        of_response = sums["kl"] / batch.minibatch_responses
        loss = loss + config.kl_coef * of_response
    return loss, sums


def value_loss(critic, batch, config):
    """0.5 max((V - R)^2, (V_old + clip(V - V_old) - R)^2), averaged over tokens, as in PPO's public
    codes. A V that has come nearer to R by more than the clip has no gradient. One that has gone
    away from R still has it. Returns the loss, and metrics: {name: sum over tokens}."""
    new = response_values(critic, batch.rollouts, config)  # (tokens,) V(s_t)
    limit = config.value_clip
    moved = (new - batch.values).clamp(-limit, limit)  # (tokens,), like all that follows
    clipped = batch.values + moved
    error = (new - batch.returns) ** 2
    clipped_error = (clipped - batch.returns) ** 2
    worse = torch.max(error, clipped_error)  # pessimistic, like the policy's
    total = (0.5 * worse).sum()
    return total / batch.minibatch_tokens, {"value_loss": total}


def kl_k3(other, own):
    """KL(own || other) from log-probs of tokens that `own` sampled: exp(d) - d - 1 with d = other -
    own (k3; arXiv 2402.03300, eq. 4). Never negative; unbiased but for the clamps, as long as the
    tokens are `own`'s and top_p is 1. (tokens,) each. Its gradient as a loss is, on average, that
    of KL(other || own): the samples are held fixed."""
    # Past 20 k3 is above 10 anyway, and exp's infinity would turn the clamp's gradient into NaN.
    d = (other - own).clamp(-20, 20)
    return (torch.expm1(d) - d).clamp(0, 10)  # no single token may own the batch


# --- The update: epochs, minibatches, micro-batches, optimizer steps ------------------------------


def update(
    policy,
    optimizer,  # one for the parameters of policy and critic
    rollouts,
    advantages,  # like all lists here: (response length,) for each rollout
    config,
    *,
    old_logprobs=None,  # of the policy that sampled; None: computed here
    ref_logprobs=None,  # of the frozen reference, for kl_coef > 0
    critic=None,
    values=None,  # V(s_t), before the critic moves
    returns=None,  # the critic's targets
    rng=None,  # draws the minibatches
    when_full=None,  # as in `rollout_outputs`
):
    """PPO's epochs of minibatches over an iteration's rollouts (arXiv 1707.06347, algorithm 1).
    With no critic it is the update of GRPO, RLOO and VinePPO. Micro-batches do not change a
    gradient, nor do several processes (torchrun): each has all rollouts and does its share of every
    minibatch. Leaves the policy in eval mode. Returns the metrics that apply:

        policy_loss (without the KL), kl (k3 to the reference), approx_kl (k3 of old to new),
            clip_fraction, ratio_mean: means over the tokens of the policy's passes
        value_loss, explained_variance: over all response tokens
        grad_norm, critic_grad_norm: means over steps, before clipping
        optimizer_steps, tokens_trained: counts, of the policy's steps alone
        skipped_minibatches, nonfinite_steps: counts"""
    require(critic is None or (values and returns), "a critic needs values and returns")
    require(config.kl_coef == 0 or ref_logprobs, f"kl_coef {config.kl_coef} needs ref_logprobs")
    rng = rng or np.random.default_rng(0)
    lengths = np.array([len(r.response) for r in rollouts])  # (rollouts,)
    minibatches = math.ceil(len(rollouts) / config.minibatch)  # in an epoch, of like size
    # Without a KL, a rollout whose advantages are all 0 has no gradient. It stays out of the
    # policy's passes, but counts in the mean.
    has_gradient = np.array([bool(advantage.any()) for advantage in advantages])  # (rollouts,)
    if config.kl_coef > 0:
        has_gradient[:] = True
    no_dropout(policy)  # else the first ratio would not be 1
    # From the second optimizer step on, the policy is no longer the one that sampled. Rollouts have
    # log-probs, but the engine's, which round otherwise: the first ratio would not be exactly 1.
    if old_logprobs is None and config.epochs * minibatches > 1:
        active = np.flatnonzero(has_gradient)  # indices
        old_logprobs = rollout_logprobs(policy, rollouts, config, active, when_full)
    # What a micro-batch needs of each token, by the names of MicroBatch's fields.
    lists = {"advantages": advantages, "values": values, "returns": returns}
    lists |= {"old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs}
    lists |= {"lengths": per_token(rollouts, lengths)}
    padded = padded_lists(rollouts, lists)  # {name: (rollouts, longest)}
    in_response = padded["lengths"] > 0  # (rollouts, longest), False in the padding
    counts = {"skipped_minibatches": 0, "nonfinite_steps": 0}
    device = next(policy.parameters()).device

    def learn(model, loss_of, minibatch, chosen, steps):
        """An optimizer step of one model. Its metrics are appended to `steps` if it is made.
        loss_of: policy_loss or value_loss. minibatch: indices. chosen: those with a gradient."""
        minibatch_tokens = int(lengths[minibatch].sum())

        def backward(some):
            # Chosen on the CPU: on a GPU a mask would make the host wait. (tokens,) each
            mask = in_response[some]  # (batch, longest)
            joined = {}
            for name, entries in padded.items():
                joined[name] = entries[some][mask].to(device)
            in_batch = [rollouts[i] for i in some]
            batch = MicroBatch(in_batch, len(minibatch), minibatch_tokens, **joined)
            loss, sums = loss_of(model, batch, config)
            loss.backward()  # adds to the gradient so far
            return {name: total.detach() for name, total in sums.items()}

        # If memory runs out, the gradient so far goes, and all is done again in smaller parts.
        parts = in_microbatches(
            backward, rollouts, model, config, chosen, optimizer.zero_grad, when_full
        )
        tokens = int(lengths[chosen].sum())
        step = {"tokens": tokens}  # and, of each metric, the sum over them
        for name in parts[0]:
            total = sum(part[name] for part in parts)
            step[name] = float(all_sum(total))
        # Rollouts of a policy too far from this one teach nothing. (A critic has no ratio.)
        ratio_mean = step.get("ratio_mean", 0) / tokens
        if ratio_mean > config.max_ratio:
            counts["skipped_minibatches"] += 1
            optimizer.zero_grad()
            return
        step["grad_norm"] = optimizer_step(model, optimizer, config.max_grad_norm)
        if math.isfinite(step["grad_norm"]):
            steps.append(step)
        else:
            counts["nonfinite_steps"] += 1

    optimizer.zero_grad()
    policy_steps, critic_steps = [], []
    for _ in range(config.epochs):
        order = rng.permutation(len(rollouts))
        for minibatch in np.array_split(order, minibatches):
            # The critic first. It learns from every rollout.
            if critic is not None:
                learn(critic, value_loss, minibatch, minibatch, critic_steps)
            # The policy learns from those in which something was better or worse than expected.
            chosen = minibatch[has_gradient[minibatch]]
            if len(chosen) > 0:
                learn(policy, policy_loss, minibatch, chosen, policy_steps)

    metrics = {"optimizer_steps": len(policy_steps), "tokens_trained": 0, **counts}
    if policy_steps:
        metrics |= step_means(policy_steps)
        metrics["tokens_trained"] = sum(step["tokens"] for step in policy_steps)
    if critic_steps:
        means = step_means(critic_steps)
        metrics["value_loss"] = means["value_loss"]
        metrics["critic_grad_norm"] = means["grad_norm"]
        targets = torch.cat(returns)  # (tokens,) of all rollouts
        errors = targets - torch.cat(values)  # (tokens,) before the critic moved
        variance = targets.var(correction=0)
        if variance > 1e-8:  # else there is nothing to explain
            unexplained = errors.var(correction=0) / variance
            metrics["explained_variance"] = 1 - float(unexplained)
    return metrics


def optimizer_step(model, optimizer, max_grad_norm):
    """An optimizer step along the model's gradient, summed over all processes. Returns the norm of
    that before clipping. If it is NaN or infinite no step is made: the caller counts it, and
    `model.bad_steps` counts how many came in a row."""
    sum_gradients(model)
    # Clipping also measures the norm. Under FSDP the norm is in parts, too.
    norm = clip_grad_norm_(model.parameters(), max_grad_norm)
    norm = float(whole(norm))
    if math.isfinite(norm):
        model.bad_steps = 0
        optimizer.step()  # the other model has no gradients now, so it stays as it is
    else:
        model.bad_steps = getattr(model, "bad_steps", 0) + 1
    optimizer.zero_grad()  # frees memory for the other model and for generation
    return norm


def step_means(steps):
    """Sums over tokens, a dict for each step -> means over all tokens; of the gradient's norm, the
    mean over steps."""
    tokens = sum(step["tokens"] for step in steps)
    norms = [step["grad_norm"] for step in steps]
    means = {"grad_norm": statistics.mean(norms)}
    for name in steps[0]:
        if name not in ("tokens", "grad_norm"):
            total = sum(step[name] for step in steps)
            means[name] = total / tokens
    return means
