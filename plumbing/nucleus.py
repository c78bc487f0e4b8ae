"""The nucleus of a distribution: the fewest most likely tokens that hold a share top_p of it
(Holtzman et al. 2020, section 3.1), without sorting the vocabulary.

It is {probs >= least} for one number a row, and that number can be looked for.
"""

import torch

BINS = 2**16  # of a histogram
LARGE = 2**14  # a vocabulary for which histograms are less to read than bisections
ROWS = 64  # whose histograms are made together: it bounds the memory


def least_of_nucleus(probs, top_p):
    """The largest number for which the probabilities from it on sum to top_p of all. probs: (rows,
    vocab), not normalized, at most 1 each -> (rows, 1).

    A trained model's nucleus is mostly a few tokens. Rows in which it is not among the first 64 are
    bisected. On CUDA a graph cannot ask which; and as 20 bisections of all rows read a vocabulary
    60 times, those of a large one get histograms."""
    total = probs.sum(-1, keepdim=True)  # (rows, 1)
    if probs.is_cuda and probs.shape[-1] > LARGE:
        spare = (1 - top_p) * total
        parts = zip(probs.split(ROWS), spare.split(ROWS))
        return torch.cat([nucleus_by_histogram(*part) for part in parts])
    needed = top_p * total
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
        enough = (probs * (probs >= middle)).sum(-1, keepdim=True) >= needed
        low = torch.where(enough, middle, low)
        high = torch.where(enough, high, middle)
    return low


def nucleus_by_histogram(probs, spare):
    """The same in two passes; spare: (rows, 1), how much is to be left out. The bits of positive
    floats, read as integers, have the order of the floats. So the mass in the bins of the upper 16
    bits shows the least number to 1 %, and in that bin the lower 16 bits show the rest. (On CUDA
    sums into bins have no fixed order: a token on the very edge may fall to either side.)"""
    bits = probs.view(torch.int32)
    upper = ((bits >> 16) & 0xFFFF).long()  # & for a NaN's sign: it must not be an index
    first, below = bin_of_edge(upper, probs, spare)
    inside = probs * (upper == first)
    second, _ = bin_of_edge((bits & 0xFFFF).long(), inside, spare - below)
    return (first << 16 | second).int().view(torch.float32)


def bin_of_edge(bins, mass, spare):
    """The first of the BINS with which those up to it hold more than `spare`, and what those
    below it hold: (rows, 1) each. bins, mass: (rows, vocab)."""
    histogram = mass.new_zeros(len(mass), BINS).scatter_add_(1, bins, mass)
    up_to = histogram.cumsum(1)  # (rows, bins)
    place = (up_to <= spare).sum(1, keepdim=True).clamp_(max=BINS - 1)
    return place, up_to.gather(1, place) - histogram.gather(1, place)
