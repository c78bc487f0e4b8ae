"""A decode step in few, large kernels: compiled, on a card, where SFL_COMPILE=1 asks for it.

A plain step is a thousand kernels, and each reads from memory what the one before it wrote there.
`torch.compile` makes one of many. It takes its time when a step first has a new width, and none of
this has met a card: so it must be asked for, and what is compiled must first compute what the plain
function computes. Else that one goes on, with a warning.
"""

import functools
import os
import warnings
from importlib.util import find_spec

import torch
import torch.nn.functional as F

from plumbing.memory import is_out_of_memory

BLOCK = 256  # tokens of the vocabulary whose mass is added up, before one of them is looked for
LOWEST, HIGHEST = -32641, 32640  # places of -inf and of inf among the bfloat16 numbers


def compiles(tensor):
    """Was it asked for, and is there a compiler for where the tensor lies?"""
    asked = os.environ.get("SFL_COMPILE") == "1"
    return asked and tensor.is_cuda and find_spec("triton") is not None


def faster(suits=lambda *args: True, other=None):
    """A decorator: where there is a compiler and the arguments suit, call the function compiled, or
    `other`, which computes the same and is written to be compiled. The first call of each kind
    (shapes, depth of the cache, sampling) computes both."""

    def decorate(plain):
        works = {}  # kind -> did it compute the same?

        @functools.cache
        def compiled():  # not at once: to import the compiler takes a second
            return torch.compile(other or plain)

        @functools.wraps(plain)
        def call(*args):
            tensor = next(x for x in args if isinstance(x, torch.Tensor))
            if not (compiles(tensor) and suits(*args)):
                return plain(*args)
            kind = tuple(kind_of(x) for x in args)
            if kind not in works:
                works[kind] = agrees(compiled(), args, plain(*args))
                return plain(*args)  # again: its cache entries must stay, not the compiled ones
            return compiled()(*args) if works[kind] else plain(*args)

        return call

    return decorate


def kind_of(x):
    """Shape and type of a tensor, how deep a cache is read, which sampling."""
    if isinstance(x, torch.Tensor):
        return x.shape, x.dtype
    return type(x), *(getattr(x, name, None) for name in ("used", "temperature", "top_p"))


def agrees(function, args, expected):
    """Does it return this, but for rounding? A warning says what is wrong."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's
            found = function(*args)
        for new, old in zip(*[x if isinstance(x, tuple) else (x,) for x in (found, expected)]):
            # At the edge of a nucleus, or of a token's share, rounding may change the token.
            scale = old.abs().nan_to_num(0, 0).amax() * old.is_floating_point()
            near = ((new - old).abs() <= 0.1 * scale) | (new == old)  # ==: both may be infinite
            share = (near | (old.isnan() & new.isnan())).float().mean().item()
            if share < 0.9:
                raise ValueError(f"it computes something else in {1 - share:.0%} of the numbers")
    except Exception as error:  # whatever a compiler that does not work may raise
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:100]
        warnings.warn(f"decoding is not compiled, so it is slower: {reason}", stacklevel=4)
        return False
    return True


# --------------------------------------------------------------------------- the draw


def suits(logits, uniform, sampling):
    """Can `draw` do it?"""
    return logits.dtype == torch.bfloat16 and sampling.temperature > 0 and sampling.top_k == 0


def draw(logits, uniform, sampling):
    """`rollout.draw_tokens`, without top-k, of bfloat16 logits, which it reads six times and
    nothing else of that size; eagerly it would be slow. logits (rows, vocab), uniform (rows, 1)."""
    high = logits.amax(-1, keepdim=True).float()  # (rows, 1)

    def mass(logits):  # not normalized, at most 1 each
        return ((logits.float() - high) / sampling.temperature).exp()

    total = mass(logits).sum(-1, keepdim=True)
    least = torch.full_like(high, -torch.inf)
    if sampling.top_p < 1:
        least = least_logit(logits, mass(logits), sampling.top_p * total)
    # First the block of tokens in which the cdf passes u * total, as in `draw_tokens`; then, of its
    # few numbers, the token.
    rows, vocab = logits.shape
    whole = F.pad(logits, (0, -vocab % BLOCK), value=-torch.inf)  # the last block, too
    blocks = torch.where(whole >= least, mass(whole), 0).view(rows, -1, BLOCK).sum(-1)
    threshold = uniform * (1 - 1e-6) * blocks.sum(-1, keepdim=True)
    block, threshold = first_above(blocks, threshold)
    place = block * BLOCK + torch.arange(BLOCK, device=logits.device)  # (rows, BLOCK)
    inside = logits.gather(1, place.clamp(max=vocab - 1))
    kept = torch.where((inside >= least) & (place < vocab), mass(inside), 0)
    token, _ = first_above(kept, threshold)
    token = (block * BLOCK + token).clamp(max=vocab - 1)  # NaNs lead past the end
    return token, (logits.gather(1, token).float() - high) / sampling.temperature - total.log()


def first_above(mass, threshold):
    """The place in which the cdf passes the threshold, and how much of that is left where the place
    begins: (rows, 1) each. mass: (rows, places)."""
    cdf = mass.cumsum(-1)
    # Rounded, the threshold may be the whole mass: then the last place that has any.
    threshold = threshold.minimum((1 - 1e-6) * cdf[:, -1:])
    place = (cdf <= threshold).sum(-1, keepdim=True).clamp(max=mass.shape[1] - 1)
    left = threshold - (cdf - mass).gather(1, place)
    # Rounded, it may be below 0, and then the first token would do, whatever its mass.
    return place, left.clamp(min=0)


def least_logit(logits, mass, needed):
    """The largest number for which the logits from it on hold `needed` of the mass: (rows, 1). It
    is one of the 2**16 that bfloat16 has, so it is found in four passes, each of which tries 15 at
    once: 4 bits of its place among them."""
    low = torch.full_like(needed, LOWEST, dtype=torch.int32)
    for step in (4096, 256, 16, 1):
        sums = []
        for i in range(1, 16):
            sums.append(torch.where(logits >= number_at(low + i * step), mass, 0).sum(-1))
        low = low + step * (torch.stack(sums, 1) >= needed).sum(1, keepdim=True, dtype=torch.int32)
    return number_at(low)


def number_at(place):
    """The bfloat16 number, as a float32, at a place in the order of all. Bits of a positive number
    are its place; those of a negative one count down."""
    bits = place.clamp(max=HIGHEST)
    bits = bits ^ ((bits >> 15) & 0x7FFF)
    return (bits << 16).view(torch.float32)
