"""Log-probs of tokens without a (batch, time, vocabulary) tensor."""

import functools
import weakref

import torch
from torch import nn

from plumbing.commands import require


def token_logprobs(model, tokens, *, temperature=1.0, mask=None, chunk=None):
    """log pi(tokens[t + 1] | tokens[:t + 1]) of the distribution softmax(logits / temperature).

    tokens: (batch, time) ids, rows padded on the RIGHT with any valid id: under causal attention no
    real token sees what stands after it. mask: (batch, time - 1) bool, the positions wanted: the
    head is computed there alone, the others return 0. chunk: rows of the head at a time; None: as
    many as keep a chunk of logits near 128 MB. Returns (batch, time - 1) float32 (float64 in a
    float64 model), differentiable once; under torch.autocast the products are of its type.
    ValueError: a temperature of 0, or a head whose logits this would get wrong."""
    check_tokens(tokens, temperature)
    check_head(model)
    if mask is None:
        mask = torch.ones_like(tokens[:, 1:], dtype=torch.bool)
    logprobs_of = getattr(model, "logprobs_in_parts", functools.partial(masked_logprobs, model))
    return logprobs_of(tokens, temperature, mask, chunk)


def masked_logprobs(model, tokens, temperature, mask, chunk):
    # the last column is only ever a target: the backbone need not read it
    hidden = model.base_model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
    logprobs = head_logprobs(model, hidden[mask], tokens[:, 1:][mask], temperature, chunk)
    zeros = torch.zeros(mask.shape, dtype=logprobs.dtype, device=mask.device)
    return zeros.masked_scatter(mask, logprobs)


def head_logprobs(model, hidden, targets, temperature, chunk=None):
    """hidden (rows, width), targets (rows,) -> log-probs (rows,), by the output embedding."""
    head = model.get_output_embeddings()
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else head.weight.dtype
    chunk = chunk or max(1, 2**25 // len(head.weight))
    settings = temperature, softcap_of(model), chunk, dtype
    return HeadLogprobs.apply(hidden, head.weight, head.bias, targets, *settings)


def softcap_of(model):
    return getattr(model.config.get_text_config(), "final_logit_softcapping", None)  # Gemma has one


def head_logits(hidden, weight, bias, softcap):
    """(rows, width) -> (rows, vocab), at least float32: softcap * tanh(logits / softcap)."""
    logits = hidden.to(weight.dtype) @ weight.T
    logits = logits if bias is None else logits.add_(bias)
    logits = logits.float() if logits.dtype.itemsize < 4 else logits
    return logits.div_(softcap).tanh_().mul_(softcap) if softcap else logits


class HeadLogprobs(torch.autograd.Function):
    """log softmax(cap(hidden @ weight.T + bias) / temperature)[target] for each row, a chunk of
    rows at a time: the logits of a batch, (batch, time, vocab), would dwarf the model.

    Forward keeps one number a row, the logsumexp. Backward computes the chunk's logits again: with
    softmax p, d logp[target] / d logits = onehot(target) - p. One more matrix product, and never
    rows * vocab numbers at once."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, softcap, chunk, dtype):
        # hidden (rows, width), weight (vocab, width), bias (vocab,) or None, targets (rows,)
        # dtype: of the products; sums are float32 (float64 in a float64 model: gradient checks)
        ctx.temperature, ctx.softcap = temperature, softcap
        ctx.chunk, ctx.dtype = chunk, dtype
        sums = torch.float64 if dtype == torch.float64 else torch.float32
        logprobs, logsumexp = hidden.new_empty(2, len(hidden), dtype=sums)
        with torch.autocast(hidden.device.type, enabled=False):
            cast = weight.to(dtype)  # once, not once a chunk; no copy where it is of that type
            for i in range(0, len(hidden), chunk):
                rows = slice(i, i + chunk)
                logits = head_logits(hidden[rows], cast, bias, softcap).div_(temperature)
                logsumexp[rows] = logits.logsumexp(-1)
                chosen = logits.gather(-1, targets[rows, None]).squeeze(-1)
                logprobs[rows] = chosen - logsumexp[rows]
        ctx.save_for_backward(hidden, weight, bias, targets, logsumexp)
        return logprobs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        hidden, weight, bias, targets, logsumexp = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=grad.dtype)  # the only tensor of that size
        d_bias = None if bias is None else torch.zeros_like(bias, dtype=grad.dtype)
        grad = (grad / ctx.temperature)[:, None]  # (rows, 1)
        with torch.autocast(hidden.device.type, enabled=False):
            cast = weight.to(ctx.dtype)
            for i in range(0, len(hidden), ctx.chunk):
                rows = slice(i, i + ctx.chunk)
                logits = head_logits(hidden[rows], cast, bias, ctx.softcap)
                slope = 1 - (logits / ctx.softcap) ** 2 if ctx.softcap else None  # the cap's
                p = logits.div_(ctx.temperature).sub_(logsumexp[rows, None]).exp_()
                d_logits = p.mul_(-grad[rows]).scatter_add_(-1, targets[rows, None], grad[rows])
                d_logits = d_logits.mul_(slope) if ctx.softcap else d_logits
                if bias is not None:
                    d_bias += d_logits.sum(0)
                d_logits = d_logits.to(ctx.dtype)
                d_hidden[rows] = d_logits @ cast
                if ctx.needs_input_grad[1]:
                    add_product(d_weight, d_logits, hidden[rows].to(ctx.dtype))
        d_weight = d_weight.to(weight.dtype) if ctx.needs_input_grad[1] else None
        d_bias = None if bias is None else d_bias.to(bias.dtype)
        return d_hidden, d_weight, d_bias, None, None, None, None, None


def add_product(total, a, b, slab_numbers=2**24):
    """total += a.T @ b. bfloat16 products add up in float32, a slab at a time: no second tensor
    of (vocab, width)."""
    if total.dtype == a.dtype:
        return total.addmm_(a.T, b)
    rows = max(1, slab_numbers // total.shape[1])
    for i in range(0, len(total), rows):
        total[i : i + rows] += a.T[i : i + rows] @ b


CHECKED = weakref.WeakSet()  # models whose head was found to be one that head_logprobs gets right


@torch.no_grad()
def check_head(model):
    """Once a model: ValueError unless its logits are its head times its backbone's output, softly
    capped where the configuration says so. Some families do more (Cohere and Granite scale them),
    and training on numbers that are slightly off looks fine and learns less."""
    if model in CHECKED:
        return
    name = type(model).__name__
    head = getattr(model, "get_output_embeddings", lambda: None)()
    plain = type(head) is nn.Linear and model.base_model is not model  # subclasses: LoRA, int8
    found = f"found {type(head).__name__}: use a model without adapters or quantization on its head"
    require(plain, f"{name}: needs a backbone (.base_model) and a plain nn.Linear head, {found}")
    no_dropout(model)
    tokens = torch.arange(8, device=head.weight.device)[None] % len(head.weight)  # (1, 8)
    with torch.autocast(tokens.device.type, enabled=False):
        hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        ours = head_logits(hidden[0], head.weight, head.bias, softcap_of(model))
        theirs = model(tokens, use_cache=False).logits[0]  # (8, vocab)
    tolerance = 1e-3 if head.weight.dtype.itemsize > 2 else 0.05
    # NaN weights are not the head's fault
    tolerance *= float(theirs.nan_to_num().abs().max())
    same = torch.allclose(ours.float(), theirs.float(), 0, tolerance, equal_nan=True)
    message = "use another model, or teach logprobs.HeadLogprobs this one's formula"
    require(same, f"{name}: its logits are not its head times its backbone's output: {message}")
    CHECKED.add(model)


def check_tokens(tokens, temperature):
    message = f"temperature {temperature}: log-probs need one above 0 (greedy has no ratio)"
    require(temperature > 0, message)
    message = f"tokens of shape {tuple(tokens.shape)}: needs (batch, time) with time of at least 2"
    require(tokens.dim() == 2 and tokens.shape[1] > 1, message)


def mixed_precision(model, dtype):
    """bfloat16 matrix products over float32 weights (float16 would need its losses scaled)."""
    device = next(model.parameters()).device.type
    return torch.autocast(device, dtype=dtype, enabled=dtype is not None)


def no_dropout(model):
    """Eval mode, and it stays: with dropout, old and new log-probs would differ by noise and the
    first ratio would not be 1. A layer under gradient checkpointing keeps its own flag, not its
    children's, which do the dropping out: in eval mode transformers quietly stops checkpointing."""
    for module in model.modules():
        module.training = bool(getattr(module, "gradient_checkpointing", False))
