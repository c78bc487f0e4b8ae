"""The nucleus of a distribution: the fewest most likely tokens that hold a share top_p of it
(Holtzman et al. 2020, section 3.1), without sorting the vocabulary.

It is {probs >= least} for one number a row, and that number can be looked for.
"""

import torch


def least_of_nucleus(probs, top_p):
    """The largest number for which the probabilities from it on sum to top_p of all. probs: (rows,
    vocab), not normalized -> (rows, 1).

    A trained model's nucleus is mostly a few tokens. Rows in which it is not among the first 64 are
    bisected; so are all on CUDA, where a graph cannot ask which."""
    needed = top_p * probs.sum(-1, keepdim=True)  # (rows, 1)
    if probs.is_cuda:
        return bisect_nucleus(probs, needed, top_p)
    top = probs.topk(min(64, probs.shape[-1])).values  # (rows, 64), descending
    before = top.cumsum(-1) < needed  # (rows, 64): True up to the one before the last
    last = before.sum(-1, keepdim=True)  # (rows, 1): place of the nucleus' last token
    least = top.gather(-1, last.clamp(max=top.shape[-1] - 1))
    wide = before.all(-1)  # (rows,): the last one is not among them
    if wide.any():
        least[wide] = bisect_nucleus(probs[wide], needed[wide], top_p)
    return least


def bisect_nucleus(probs, needed, top_p):
    """The same in 20 halvings of the range; tokens tied with the last one (to 1 part in 50,000) are
    all kept."""
    # Tokens below (1 - top_p) / vocab hold less than 1 - top_p together, so the others suffice:
    # the mass from `low` on is always enough. (Half of that, for rounding.)
    low = needed * ((1 - top_p) / top_p / 2 / probs.shape[-1])
    high = probs.amax(-1, keepdim=True)
    for _ in range(20):
        middle = (low * high).sqrt()
        kept = probs * (probs >= middle)
        enough = kept.sum(-1, keepdim=True) >= needed
        low = torch.where(enough, middle, low)
        high = torch.where(enough, high, middle)
    return low
