"""From rewards to a policy update: advantages, PPO's clipped loss, the value model, log-probs.

State s_t: the prompt and the response so far. Action a_t: the next token. The reward is 0 until the
last token, which gets the grade. A policy gradient raises log pi(a_t | s_t) in proportion to the
advantage A_t: how much better a_t was than what the policy does on average in s_t. The algorithms
differ in what they compare the reward with:

    PPO          V(s_t), learned by a second network, the critic       gae, ValueModel
    GRPO, RLOO   the other responses to the same question              group_advantages
    VinePPO      fresh rollouts from s_t                               vineppo.py

Two responses to "What is 2 + 3 + 4?", where $ stops, and what each token is told:

    response                       5   +   4   =   9   $         5   +   4   =   8   $
    reward                                             1                             0
    V(s_t), say                   .5  .6  .6  .6  .6  .9        .5  .6  .6  .6  .6  .1
    PPO, gamma = lam = 1          .5  .4  .4  .4  .4  .1       -.5 -.6 -.6 -.6 -.6 -.1
    PPO, lam = 0                  .1   0   0   0  .3  .1        .1   0   0   0 -.5 -.1
    RLOO, of two responses         1   1   1   1   1   1        -1  -1  -1  -1  -1  -1

The loss is PPO's (arXiv 1707.06347, eq. 7), with r_t = pi(a_t | s_t) / pi_old(a_t | s_t):

    mean over response tokens of  -min(r_t A_t, clip(r_t, 1 - eps, 1 + eps) A_t)

A rollout has `.prompt` and `.response`, lists of token ids. What belongs to response tokens is a
list with a 1-D float32 CPU tensor a rollout; (tokens,) stands for those of a micro-batch, joined.
"""

import copy
import math
import statistics
from collections import defaultdict
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence

from plumbing import processes
from plumbing.commands import require
from plumbing.logprobs import mixed_precision, no_dropout, token_logprobs
from plumbing.memory import until_it_fits
from plumbing.processes import all_shares, all_sum, gather, many_processes, share

# --------------------------------------------------------------------------- advantages


def gae(rewards, values, mask, *, gamma, lam):
    """Generalized advantage estimation (arXiv 1506.02438, eq. 16). All arguments (batch, time).

        delta_t = r_t + gamma V(s_{t+1}) - V(s_t),    A_t = delta_t + gamma lam A_{t+1}

    mask: True at the response tokens, one unbroken run a row; what follows them is terminal, of
    value 0. Returns advantages, and returns A_t + V(s_t), the critic's targets; 0 outside it."""
    rewards = torch.where(mask, rewards, 0)
    values = torch.where(mask, values, 0)
    advantages = torch.zeros_like(values)
    advantage = torch.zeros_like(values[:, 0])
    next_value = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = (delta + gamma * lam * advantage) * mask[:, t]
        advantages[:, t] = advantage
        next_value = values[:, t]
    return advantages, advantages + values


def critic_advantages(critic, rollouts, rewards, settings, *, learn=False):
    """PPO's advantages: the critic's values, the reward (one a rollout) on the last token, GAE.
    Returns advantages (not whitened), values and returns, each a list of 1-D tensors.

    learn: leave the gradient of the critic's loss in the critic. An update of a single step, which
    is then told that the critic has `learned`, need not run it over the same rollouts again."""
    if learn:
        values = learning_values(critic, rollouts, rewards, settings)
    else:
        values = rollout_values(critic, rollouts, settings)
    advantages, returns = response_gae(values, rewards, settings)
    return advantages, values, returns


def group_advantages(rewards, *, how):
    """The baseline is the other responses to the same question. (questions, n) -> (questions, n).
    'grpo': (r_i - mean) / sample std (DeepSeekMath, arXiv 2402.03300, section 4.1.2). 'rloo': r_i -
    mean of the n - 1 others (arXiv 2402.14740), unbiased, and keeps the reward's scale. A group
    that agrees gives exactly 0. ValueError: n = 1, which leaves nothing to compare with."""
    check_groups(rewards, how)
    # float32 numbers add up exactly in float64: equal rewards cancel
    rewards = np.asarray(rewards, dtype=np.float32).astype(np.float64)
    if how == "grpo":
        deviation = rewards - rewards.mean(1, keepdims=True)
        advantages = deviation / (rewards.std(1, ddof=1, keepdims=True) + 1e-6)
    else:
        others = rewards.sum(1, keepdims=True) - rewards
        advantages = rewards - others / (rewards.shape[1] - 1)
    return advantages.astype(np.float32)


def whiten(advantages):
    """Advantages to mean 0 and standard deviation 1 over all response tokens of the iteration: the
    step no longer depends on the reward's scale. All equal: exactly 0. (The authors' code whitens
    each minibatch by itself: there an advantage depends on which rollouts it is trained with.)"""
    tokens = torch.cat(list(advantages)).double()
    mean, std = tokens.mean(), tokens.std(correction=0)
    return [((a.double() - mean) / (std + 1e-8)).float() for a in advantages]


# --------------------------------------------------------------------------- the update


def kl_k3(ref, new):
    """KL(pi || pi_ref) from log-probs of tokens sampled from pi: exp(d) - d - 1 with d = ref - new
    (k3; GRPO's eq. 4). Unbiased, never negative. Clamped to [0, 10]: no token may own the batch."""
    # k3 is past 10 there anyway, and exp's infinity would turn the clamp's gradient into NaN
    d = (ref - new).clamp(-20, 20)
    return (torch.expm1(d) - d).clamp(0, 10)


def clipped_surrogate(ratio, advantages, clip):
    """PPO's loss a token (eq. 7, negated). Where the ratio has left [1 - clip, 1 + clip] in the
    direction that pays, the minimum is the clipped term, which has no gradient. (tokens,) each."""
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return -torch.min(ratio * advantages, clipped * advantages)


def value_loss(new, old, returns, value_clip):
    """0.5 max((v - R)^2, (v_old + clip(v - v_old) - R)^2), as PPO's public codes have it: beyond
    the clip getting closer to R no longer pays, while coming back always does. (tokens,) each."""
    loss = (new - returns) ** 2
    if value_clip is not None:
        clipped = old + (new - old).clamp(-value_clip, value_clip)
        loss = torch.max(loss, (clipped - returns) ** 2)
    return 0.5 * loss


def update(
    policy, optimizer, rollouts, advantages, settings, *, old_logprobs=None, ref_logprobs=None,
    critic=None, values=None, returns=None, learned=False, rng=None,
):  # fmt: skip
    """PPO's epochs of minibatches over an iteration's rollouts (arXiv 1707.06347, algorithm 1);
    with no critic, the update of GRPO, RLOO and VinePPO. Returns metrics: see `update_metrics`.

    optimizer: one for the parameters of policy and critic. Lists, a tensor a rollout: advantages;
    old_logprobs, of the policy that sampled (None: `sampled_logprobs`, or if there is but one step
    the new ones, so the ratio is 1); ref_logprobs, of the frozen reference, for kl_coef > 0; values
    and returns. learned: see `critic_advantages`. rng: draws the minibatches. Leaves the models in
    eval mode.

    The KL is summed over a response and averaged over responses, as in the authors' code.
    Micro-batches do not change a gradient, nor do several processes (torch.distributed), each of
    which has all rollouts and does its share of a minibatch. Without a KL, rollouts whose
    advantages are all 0 stay out of the policy's pass: they have no gradient, but count in the
    mean. A NaN or an infinity makes no step: see `step`."""
    s = settings
    lists = {"old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs}
    lists |= {"advantages": advantages, "values": values, "returns": returns}
    check_update(s, rollouts, lists, critic, learned)
    no_dropout(policy)
    rng = rng or np.random.default_rng(0)
    parts = math.ceil(len(rollouts) / s.minibatch)  # minibatches an epoch, of like size
    has_gradient = [s.kl_coef > 0 or bool(a.any()) for a in advantages]
    if old_logprobs is None and s.epochs * parts > 1:
        old_logprobs = sampled_logprobs(policy, rollouts, s, only=has_gradient)
    log = defaultdict(list)
    device = next(policy.parameters()).device
    if not learned:
        optimizer.zero_grad()

    for _ in range(s.epochs):
        for minibatch in np.array_split(rng.permutation(len(rollouts)), parts):
            # the critic: squared error to the returns
            if critic is not None:
                tokens = sum(len(rollouts[i].response) for i in minibatch)
                if learned:  # `learning_values` left the gradient; only its loss is missing
                    old, target = torch.cat(values), torch.cat(returns)
                    error = value_loss(old, old, target, s.value_clip).sum()
                else:
                    for attempt in until_it_fits(s, optimizer.zero_grad):
                        with attempt:
                            error = torch.zeros((), device=device)
                            for batch in microbatches(rollouts, s.tokens_per_microbatch, minibatch):
                                new = response_values(critic, [rollouts[i] for i in batch], s)
                                old = pick(values, batch, new)  # (tokens,), as all of these
                                target = pick(returns, batch, new)
                                loss = value_loss(new, old, target, s.value_clip).sum()
                                (loss / tokens).backward()
                                error += loss.detach()
                    error = all_sum(error)
                error = float(error)
                norm = step(critic, optimizer, error, s.max_grad_norm)
                log["critic"].append({"error": error, "tokens": tokens, "grad_norm": norm})

            # the policy: the clipped surrogate, and the KL to the reference
            weights = token_weights(rollouts, minibatch, s.loss_average)
            active = [i for i in minibatch if has_gradient[i]]
            if not active:
                continue
            for attempt in until_it_fits(s, optimizer.zero_grad):
                with attempt:
                    sums = torch.zeros(len(TOKEN_SUMS), device=device)
                    for batch in microbatches(rollouts, s.tokens_per_microbatch, active):
                        new = response_logprobs(policy, [rollouts[i] for i in batch], s)
                        old = pick(old_logprobs, batch, new)  # (tokens,), as all of these; None:
                        ref = pick(ref_logprobs, batch, new)  # as `new`, so ratio 1 and KL 0
                        advantage = pick(advantages, batch, new)
                        ratio = (new - old).exp()
                        surrogate = clipped_surrogate(ratio, advantage, s.clip)
                        kl = kl_k3(ref, new)
                        loss = (surrogate * pick(weights, batch, new)).sum()
                        loss = loss + s.kl_coef * kl.sum() / len(minibatch)
                        loss.backward()
                        clipped = surrogate > -ratio * advantage  # there the token has no gradient
                        sums += token_sums(surrogate, kl, kl_k3(new, old), clipped, ratio)
            sums = dict(zip(TOKEN_SUMS, all_sum(sums).tolist()))  # over tokens, in one transfer
            if sums["ratio_mean"] / sums["tokens"] > s.max_ratio:
                log["skipped"].append(sums)
                optimizer.zero_grad()
            else:
                finite = sums["policy_loss"] + sums["kl"]  # or not: `step` asks no more
                norm = step(policy, optimizer, finite, s.max_grad_norm)
                log["policy"].append({**sums, "grad_norm": norm})

    return update_metrics(log, ref_logprobs, values, returns)


# --------------------------------------------------------------------------- policy and critic


class ValueModel(nn.Module):
    """V(s): a copy of a causal model's backbone with a scalar head. (batch, time) ids -> (batch,
    time) float32, at t the value of the state after tokens[:t + 1], in which token t + 1 is chosen.

    The head starts at 0, so the first advantages are the plain rewards, with no noise added."""

    def __init__(self, model):
        super().__init__()
        weight = model.get_output_embeddings().weight
        self.backbone = copy.deepcopy(model.base_model).requires_grad_(True)
        self.head = nn.Linear(weight.shape[1], 1, device=weight.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens):
        hidden = self.backbone(input_ids=tokens, use_cache=False).last_hidden_state
        with torch.autocast(tokens.device.type, enabled=False):  # bfloat16 has 0.996, then 1
            return self.head(hidden.to(self.head.weight.dtype)).squeeze(-1)


# ==================================================================================================
# That is the method. Below: settings, the optimizer's step, micro-batches, scores of rollouts,
# metrics, checks. Log-probs in little memory: transformer.py.
# ==================================================================================================


@dataclass
class Settings:
    """What an update must know. Any object with these attributes will do."""

    temperature: float = 1.0  # of the sampling: log-probs are of softmax(logits / temperature)
    gamma: float = 1.0  # discount
    lam: float = 1.0  # GAE's lambda: at 1 the reward alone speaks, at 0 the next value
    clip: float = 0.2  # eps of the ratio
    value_clip: float | None = 0.2  # how far a value may move and still gain; None: any
    kl_coef: float = 0.0  # weight of the KL to the frozen reference, summed over a response
    loss_average: str = "token"  # all tokens alike, or "response": all responses alike
    epochs: int = 1  # passes over the rollouts
    minibatch: int = 64  # rollouts an optimizer step
    max_grad_norm: float | None = 1.0  # of policy and critic each; None: no clipping
    max_ratio: float = 10.0  # a minibatch of larger mean ratio makes no policy step
    tokens_per_microbatch: int = 8192  # padded tokens in one forward and backward
    fsdp: bool = False  # are the models in parts (`processes.shard`)?
    autocast: torch.dtype | None = None  # None or torch.bfloat16: of the matrix products


def response_logprobs(policy, rollouts, settings):
    """log pi of the response tokens, (tokens,): new, old and reference log-probs alike."""
    with mixed_precision(policy, settings.autocast):
        tokens, mask = pad(rollouts, policy)
        logprobs = token_logprobs(policy, tokens, temperature=settings.temperature, mask=mask)
    return logprobs[mask]


def response_values(critic, rollouts, settings):
    """V of the states in which the response tokens were chosen, (tokens,)."""
    with mixed_precision(critic, settings.autocast):
        tokens, mask = pad(rollouts, critic)
        values = critic(tokens[:, :-1])
    return values[mask]


def step(model, optimizer, loss, max_grad_norm):
    """An optimizer step along the gradient at hand, of all processes together; the gradient's norm
    before clipping. With a NaN or an infinity in loss or gradient no step is made, and the norm is
    NaN: it is counted in the metrics, and `model.bad_steps` counts how many came in a row."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    for parameter in parameters if many_processes() else []:
        if processes.is_part(parameter):
            parameter.grad *= dist.get_world_size()  # FSDP's is the mean of the processes'
        else:
            all_sum(parameter.grad)
    limit = math.inf if max_grad_norm is None else max_grad_norm
    norm = float(processes.whole(clip_grad_norm_(parameters, limit)))
    if math.isfinite(loss) and math.isfinite(norm):
        model.bad_steps = 0
        optimizer.step()  # the other model has no gradients now, so stays as it is
    else:
        model.bad_steps = getattr(model, "bad_steps", 0) + 1
        norm = math.nan
    optimizer.zero_grad()  # now: generation can use the memory
    return norm


def token_weights(rollouts, minibatch, average):
    """{i: the weight of each token of rollout i in the minibatch's mean}, summing to 1. 'token':
    all tokens alike, as in the papers' PPO. 'response': each response alike, so 1/|o| for its
    tokens (GRPO as published: DeepSeekMath, eq. 3), which weighs tokens of long responses less."""
    lengths = {i: len(rollouts[i].response) for i in minibatch}
    tokens = sum(lengths.values())
    weights = {}
    for i, length in lengths.items():
        weight = 1 / tokens if average == "token" else 1 / (length * len(lengths))
        weights[i] = torch.full((length,), weight)
    return weights


def per_token(rollouts, scores):
    """One number a rollout -> that number at each of its response tokens."""
    pairs = zip(rollouts, scores, strict=True)
    return [torch.full((len(r.response),), float(score)) for r, score in pairs]


def microbatches(rollouts, tokens_per_microbatch, chosen=None):
    """Indices of the chosen rollouts (None: all) in groups of like length, whose count times their
    longest stays within the budget (padded tokens; a longer rollout goes alone). Longest first: if
    memory runs out, it does so at once.

    Of several processes each gets the groups of its share, and all get as many, the last ones maybe
    empty: models in parts (`processes.shard`) are gathered from all in every pass."""
    chosen = range(len(rollouts)) if chosen is None else chosen
    shares = [of_like_length(rollouts, tokens_per_microbatch, part) for part in all_shares(chosen)]
    groups = shares[processes.rank()]
    return groups + [[]] * (max(map(len, shares)) - len(groups))


def of_like_length(rollouts, tokens_per_microbatch, chosen):
    def length(i):
        return len(rollouts[i].prompt) + len(rollouts[i].response)

    groups = []
    for i in sorted(chosen, key=length, reverse=True):
        if groups and (len(groups[-1]) + 1) * length(groups[-1][0]) <= tokens_per_microbatch:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def pad(rollouts, model):
    """tokens (batch, time), padded on the right, and mask (batch, time - 1): True where the NEXT
    token belongs to the response. No rollouts: a row with no response."""
    device = next(model.parameters()).device
    rows = [(r.prompt, r.response) for r in rollouts] or [([0, 0], [])]
    tokens = pad_sequence([torch.tensor(p + r) for p, r in rows], batch_first=True)
    prompt, response = torch.tensor([[len(p), len(r)] for p, r in rows]).T[:, :, None]
    target = torch.arange(1, tokens.shape[1])
    mask = (target >= prompt) & (target < prompt + response)
    return tokens.to(device), mask.to(device)


def pick(entries, batch, like):
    """The numbers at the response tokens of a micro-batch, (tokens,), on the device of `like`; of
    no entries, `like` itself, as a constant."""
    if entries is None or not batch:
        return like.detach()
    return torch.cat([entries[i] for i in batch]).to(like.device)


@torch.no_grad()
def rollout_scores(score, model, rollouts, settings, only=None, clear=None):
    """score(model, some rollouts, settings) -> (tokens,), over all rollouts: a list of 1-D tensors,
    no gradient. only: a bool a rollout; the others' entries are None. clear: as `until_it_fits`."""
    check_rollouts(rollouts)
    no_dropout(model)
    scores = [None] * len(rollouts)
    chosen = [i for i in range(len(rollouts)) if only is None or only[i]]
    for attempt in until_it_fits(settings, clear):
        with attempt:
            for batch in microbatches(rollouts, settings.tokens_per_microbatch, chosen):
                flat = score(model, [rollouts[i] for i in batch], settings).float().cpu()
                pieces = flat.split([len(rollouts[i].response) for i in batch])
                for i, piece in zip(batch, pieces):
                    scores[i] = piece.numpy()  # other processes get it 50 times as fast
    for i, piece in zip(chosen, gather([scores[i] for i in share(chosen)])):
        scores[i] = torch.from_numpy(piece)
    return scores


def response_gae(values, rewards, settings):
    """`gae` of responses: values, a list of 1-D tensors, and one reward each, for the last token.
    Returns advantages and returns, like values."""
    if not values:
        return [], []
    lengths = torch.tensor([len(v) for v in values])
    padded = pad_sequence(values, batch_first=True)  # (rollouts, longest response)
    mask = torch.arange(padded.shape[1]) < lengths[:, None]
    token_rewards = torch.zeros_like(padded)
    rewards = torch.as_tensor(rewards, dtype=torch.float32)
    token_rewards[torch.arange(len(lengths)), lengths - 1] = rewards
    advantages, returns = gae(token_rewards, padded, mask, gamma=settings.gamma, lam=settings.lam)
    advantages = [a[:length] for a, length in zip(advantages, lengths)]
    returns = [r[:length] for r, length in zip(returns, lengths)]
    return advantages, returns


def learning_values(critic, rollouts, rewards, settings):
    """`rollout_values`, and in the same pass the gradient of the critic's loss over all of them: a
    response's returns depend on no values but its own."""
    tokens = sum(len(r.response) for r in rollouts)
    reward_of = {id(r): reward for r, reward in zip(rollouts, rewards)}

    @torch.enable_grad()
    def learn(critic, some, settings):
        new = response_values(critic, some, settings)
        old = new.detach()
        pieces = old.float().cpu().split([len(r.response) for r in some])
        _, returns = response_gae(pieces, [reward_of[id(r)] for r in some], settings)
        target = pick(returns, range(len(some)), new)
        loss = value_loss(new, old, target, settings.value_clip).sum()
        (loss / tokens).backward()
        return old

    return rollout_scores(learn, critic, rollouts, settings, clear=critic.zero_grad)


def sampled_logprobs(policy, rollouts, settings, only=None):
    """Of the policy that sampled. In float32 those of generation are the same; under autocast it
    decoded with rounded weights, and the first ratio would not be 1."""
    sampled = [torch.tensor(getattr(r, "logprobs", [])) for r in rollouts]
    whole = all(len(x) == len(r.response) for x, r in zip(sampled, rollouts))
    if settings.autocast is None and whole:
        return sampled
    return rollout_logprobs(policy, rollouts, settings, only)


rollout_logprobs = partial(rollout_scores, response_logprobs)  # (policy, rollouts, settings)
rollout_values = partial(rollout_scores, response_values)  # (critic, rollouts, settings)


# --------------------------------------------------------------------------- metrics and checks

TOKEN_SUMS = ("policy_loss", "kl", "approx_kl", "clip_fraction", "ratio_mean", "tokens")


@torch.no_grad()
def token_sums(*columns):
    """The sums of (tokens,) tensors over the tokens, and the number of tokens."""
    columns = [column.float() for column in columns]
    return torch.stack([*columns, torch.ones_like(columns[0])]).sum(1)


def update_metrics(log, ref_logprobs, values, returns):
    """What `update` returns; what does not apply is left out. Means over the tokens of the policy's
    pass: policy_loss, kl (k3 to the reference), approx_kl (k3 of old to new), clip_fraction,
    ratio_mean; over all response tokens: value_loss, explained_variance; over steps, before
    clipping: grad_norm, critic_grad_norm. Counts: optimizer_steps, skipped_minibatches,
    nonfinite_steps, tokens_trained."""
    made = [step for step in log["policy"] if math.isfinite(step["grad_norm"])]
    critic_made = [step for step in log["critic"] if math.isfinite(step["grad_norm"])]
    totals = {name: sum(step[name] for step in made) for name in TOKEN_SUMS}
    metrics = {"optimizer_steps": len(made), "skipped_minibatches": len(log["skipped"])}
    tried = len(log["policy"]) + len(log["critic"])
    metrics["nonfinite_steps"] = tried - len(made) - len(critic_made)
    metrics["tokens_trained"] = int(totals["tokens"])
    if made:
        metrics |= {name: totals[name] / totals["tokens"] for name in TOKEN_SUMS[:5]}
        metrics["grad_norm"] = statistics.mean(step["grad_norm"] for step in made)
    if ref_logprobs is None:
        metrics.pop("kl", None)
    if critic_made:
        tokens = sum(step["tokens"] for step in critic_made)
        metrics["value_loss"] = sum(step["error"] for step in critic_made) / tokens
        metrics["critic_grad_norm"] = statistics.mean(step["grad_norm"] for step in critic_made)
        target, value = torch.cat(list(returns)), torch.cat(list(values))
        if target.var(correction=0) > 1e-8:  # else there is nothing to explain
            unexplained = (target - value).var(correction=0) / target.var(correction=0)
            metrics["explained_variance"] = 1 - float(unexplained)
    return metrics


def check_groups(rewards, how):
    require(how in ("grpo", "rloo"), f"group baseline {how!r}: choose 'grpo' or 'rloo'")
    shape = np.shape(rewards)
    message = f"rewards {shape}: a group baseline needs (questions, n), n at least 2 rollouts"
    require(len(shape) == 2 and shape[1] > 1, message)


def check_rollouts(rollouts, **lists):
    """Every rollout can be scored, and every list holds one finite number a response token."""
    for i, r in enumerate(rollouts):
        sizes = f"{len(r.prompt)} prompt and {len(r.response)} response tokens"
        require(r.prompt and r.response, f"rollout {i}: {sizes}: give it both")
    lengths = [len(r.response) for r in rollouts]
    for name, entries in lists.items():
        need = f"{len(rollouts)} tensors, as many numbers in each as response tokens"
        message = f"{name}: needs {need}"
        require(entries is None or [len(entry) for entry in entries] == lengths, message)
        for i, entry in enumerate(entries or []):
            message = f"{name}: a NaN or an infinity in rollout {i}: look where it was computed"
            require(entry.isfinite().all(), message)


def check_update(s, rollouts, lists, critic, learned):
    check_rollouts(rollouts, **lists)
    sizes = f"{len(rollouts)} rollouts, epochs {s.epochs}, minibatch {s.minibatch}"
    require(rollouts and min(s.epochs, s.minibatch) > 0, f"{sizes}: each needs at least 1")
    message = f"kl_coef {s.kl_coef}: a KL loss needs ref_logprobs, or set it to 0"
    require(s.kl_coef == 0 or lists["ref_logprobs"] is not None, message)
    message = "a critic needs values and returns: see ppo.critic_advantages"
    complete = lists["values"] is not None and lists["returns"] is not None
    require(critic is None or complete, message)
    single = s.epochs == 1 and len(rollouts) <= s.minibatch
    message = f"{sizes}: only an update of one step can find that its critic has learned already"
    require(single or not learned, message)
    message = f"autocast {s.autocast}: None or torch.bfloat16 (float16 would need scaled losses)"
    require(s.autocast in (None, torch.bfloat16), message)
