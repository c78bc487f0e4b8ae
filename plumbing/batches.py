"""Rollouts to batches that a model reads: of like length, padded, with a mask of the response."""

import torch
from torch.nn.utils.rnn import pad_sequence

from plumbing.commands import require
from plumbing.memory import halve_until_it_fits
from plumbing.processes import all_shares, rank


def microbatches(rollouts, tokens_per_microbatch, chosen=None):
    """Indices of the chosen rollouts (None: all) in micro-batches of like length. A micro-batch has
    at most so many tokens, padding included; a longer rollout is alone in its own. Longest first:
    if memory runs out, it does so at once.

    Each process takes its share of the rollouts. All get the same number of micro-batches, so the
    last ones may be empty: under FSDP every pass needs all processes."""
    lengths = [len(r.prompt) + len(r.response) for r in rollouts]
    chosen = range(len(rollouts)) if chosen is None else chosen
    shares = []  # the micro-batches of each process
    for share in all_shares(chosen):
        batches, room = [], 0
        for i in sorted(share, key=lengths.__getitem__, reverse=True):
            if room == 0:
                # The first of a micro-batch is its longest: all are padded to that.
                batches.append([])
                room = max(1, tokens_per_microbatch // lengths[i])  # rollouts
            batches[-1].append(i)
            room -= 1
        shares.append(batches)
    most = max(map(len, shares))
    mine = shares[rank()]
    return mine + [[]] * (most - len(mine))


def in_microbatches(function, rollouts, config, chosen=None, *clear):
    """A list with function(indices) of each micro-batch. If memory runs out, from the start again
    with half the tokens in each; first the functions `clear` (None: no function) give memory back:
    what these ones left, and what is idle."""

    def all_of_them():
        batches = microbatches(rollouts, config.tokens_per_microbatch, chosen)
        return [function(some) for some in batches]

    return halve_until_it_fits(all_of_them, config, *clear)


def padded_batch(rollouts, model):
    """tokens (batch, time), padded on the right, where causal attention does not see it; and mask
    (batch, time - 1), True where the NEXT token belongs to the response."""
    complete = all(r.prompt and r.response for r in rollouts)
    require(complete, "a rollout with an empty prompt or response: leave it out")
    # Of a process whose share is empty: a prompt with no response.
    sequences = [(r.prompt, r.response) for r in rollouts] or [([0, 0], [])]
    tokens, mask = [], []
    for prompt, response in sequences:
        tokens.append(torch.tensor(prompt + response))
        mask.append(torch.tensor([False] * len(prompt) + [True] * len(response)))
    tokens = pad_sequence(tokens, batch_first=True)
    mask = pad_sequence(mask, batch_first=True)[:, 1:]
    device = next(model.parameters()).device
    return tokens.to(device), mask.to(device)


def padded_lists(rollouts, lists):
    """Lists with a tensor a rollout, of a number for each response token -> (rollouts, longest), on
    the CPU. {name: list} -> {name: padded}; None is left out."""
    lengths = [len(r.response) for r in rollouts]
    padded = {}
    for name, entries in lists.items():
        if entries is not None:
            padded[name] = pad_sequence(entries, batch_first=True)
            fits = [len(entry) for entry in entries] == lengths
            need = "needs a tensor a rollout, with a finite number for each response token"
            require(fits and padded[name].isfinite().all(), f"{name}: {need}")
    return padded
