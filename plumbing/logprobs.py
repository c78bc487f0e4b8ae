"""Log-probs of tokens without a (batch, time, vocabulary) tensor."""

import torch
from torch import nn

from plumbing.commands import require

# Numbers in a chunk of the logits. Each chunk reads and writes the gradient of the whole head: a
# GPU wants few chunks (1 GiB each), a CPU small ones (128 MiB).
CHUNK = {"cuda": 2**28, "cpu": 2**25}


def token_logprobs(model, tokens, *, temperature=1.0, mask=None, **sharing):
    """log pi(tokens[t + 1] | tokens[:t + 1]) of the distribution softmax(logits / temperature).

    tokens: (batch, time) ids, rows padded on the RIGHT with any valid id: under causal attention no
    real token sees what stands after it. mask: (batch, time - 1) bool, the positions wanted: the
    head is computed there alone, the others return 0. sharing: what `batches.padded_batch` says of
    rows of several responses. Returns (batch, time - 1) float32 (float64 in a float64 model),
    differentiable once."""
    require(temperature > 0, f"temperature {temperature}: needs one above 0 (greedy has no ratio)")
    check_head(model)
    if mask is None:
        mask = torch.ones_like(tokens[:, 1:], dtype=torch.bool)
    # Under FSDP it is a method of the model's, which gathers the weights first.
    if hasattr(model, "logprobs_in_parts"):
        return model.logprobs_in_parts(tokens, temperature, mask, **sharing)
    return masked_logprobs(model, tokens, temperature, mask, **sharing)


def masked_logprobs(model, tokens, temperature, mask, **sharing):
    # The last column is only ever a target: the backbone need not read it.
    output = model.base_model(input_ids=tokens[:, :-1], use_cache=False, **sharing)
    hidden = output.last_hidden_state[mask]  # (rows, width)
    targets = tokens[:, 1:][mask]  # (rows,)
    head = model.get_output_embeddings()
    device = hidden.device.type
    dtype = head.weight.dtype  # of the products
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    numbers = CHUNK.get(device, CHUNK["cpu"])
    chunk = max(1, numbers // len(head.weight))  # rows at a time
    settings = (temperature, softcap_of(model), chunk, dtype)
    logprobs = HeadLogprobs.apply(hidden, head.weight, head.bias, targets, settings)
    zeros = logprobs.new_zeros(mask.shape)
    return zeros.masked_scatter(mask, logprobs)


def softcap_of(model):
    return getattr(model.config.get_text_config(), "final_logit_softcapping", None)  # Gemma has one


def head_logits(hidden, weight, bias, softcap):
    """(rows, width) -> (rows, vocab), at least float32: softcap * tanh(logits / softcap)."""
    hidden = hidden.to(weight.dtype)
    if weight.dtype.itemsize >= 4:
        logits = hidden @ weight.T
    else:
        try:  # A product of bfloat16 numbers makes float32 sums. So far some GPUs return them.
            logits = torch.mm(hidden, weight.T, out_dtype=torch.float32)
        except (TypeError, RuntimeError):
            logits = (hidden @ weight.T).float()  # rounded to bfloat16: off by up to 0.04 nat
    if bias is not None:
        logits += bias
    if softcap:
        logits.div_(softcap).tanh_().mul_(softcap)
    return logits


class HeadLogprobs(torch.autograd.Function):
    """log softmax(cap(hidden @ weight.T + bias) / temperature)[target] for each row, a chunk of
    rows at a time: the logits of a batch, (batch, time, vocab), would dwarf the model.

    Forward keeps one number a row, the logsumexp. Backward computes the chunk's logits again: with
    softmax p, d logp[target] / d logits = onehot(target) - p. One more matrix product, and never
    rows * vocab numbers at once."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, settings):
        # hidden (rows, width), weight (vocab, width), bias (vocab,) or None, targets (rows,)
        temperature, softcap, chunk, dtype = settings
        # Sums are float32; float64 in a float64 model, for gradient checks.
        sums = torch.promote_types(dtype, torch.float32)
        logprobs, logsumexp = hidden.new_empty(2, len(hidden), dtype=sums)  # (rows,) each
        cast = weight.to(dtype)  # once, not once a chunk; no copy where it is of that type
        for i in range(0, len(hidden), chunk):
            rows = slice(i, i + chunk)
            logits = head_logits(hidden[rows], cast, bias, softcap)  # (chunk, vocab)
            logits.div_(temperature)
            logsumexp[rows] = logits.logsumexp(-1)
            target = logits.gather(-1, targets[rows, None])  # (chunk, 1)
            logprobs[rows] = target.squeeze(-1) - logsumexp[rows]
        ctx.save_for_backward(hidden, weight, bias, targets, logsumexp)
        ctx.settings = settings
        return logprobs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        hidden, weight, bias, targets, logsumexp = ctx.saved_tensors
        temperature, softcap, chunk, dtype = ctx.settings
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=grad.dtype)
        d_bias = None if bias is None else torch.zeros_like(bias, dtype=grad.dtype)
        grad = (grad / temperature)[:, None]  # (rows, 1)
        cast = weight.to(dtype)
        for i in range(0, len(hidden), chunk):
            rows = slice(i, i + chunk)
            logits = head_logits(hidden[rows], cast, bias, softcap)  # (chunk, vocab)
            slope = 1 - (logits / softcap) ** 2 if softcap else None  # of the cap
            p = logits.div_(temperature).sub_(logsumexp[rows, None]).exp_()
            # grad * (onehot(target) - p), in the memory of the logits
            d_logits = p.mul_(-grad[rows])
            d_logits.scatter_add_(-1, targets[rows, None], grad[rows])
            if softcap:
                d_logits *= slope
            if bias is not None:
                d_bias += d_logits.sum(0)
            d_logits = d_logits.to(dtype)
            d_hidden[rows] = d_logits @ cast
            if dtype == d_weight.dtype:  # with no second tensor of that size
                d_weight.addmm_(d_logits.T, hidden[rows])
            else:  # bfloat16 products, added up in float32
                d_weight += d_logits.T @ hidden[rows].to(dtype)
            del logits, p, d_logits, slope  # gone before the next chunk comes
        return d_hidden, d_weight, d_bias, None, None  # autograd casts them


@torch.no_grad()
def check_head(model):
    """Once a model: ValueError unless its logits are its head times its backbone's output, softly
    capped where the configuration says so. Some families do more (Cohere and Granite scale them),
    and training on numbers that are slightly off looks fine and learns less."""
    if getattr(model, "head_is_plain", False):
        return
    name = type(model).__name__
    head = model.get_output_embeddings()
    found = type(head).__name__
    plain = "use a model without adapters or quantization on its head"
    # Subclasses (LoRA, int8) multiply by more than their weight.
    require(type(head) is nn.Linear, f"{name}: needs an nn.Linear as head, found {found}: {plain}")
    no_dropout(model)
    tokens = torch.arange(8, device=model.device) % len(head.weight)
    tokens = tokens[None]  # (1, 8)
    with torch.autocast(tokens.device.type, enabled=False):
        hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        ours = head_logits(hidden[0], head.weight, head.bias, softcap_of(model)).float()
        theirs = model(tokens, use_cache=False).logits[0].float()  # (8, vocab)
    tolerance = 1e-3 if head.weight.dtype.itemsize > 2 else 0.05  # as a share of the largest
    tolerance *= float(theirs.nan_to_num().abs().max())  # NaN weights are not the head's fault
    same = torch.allclose(ours, theirs, 0, tolerance, equal_nan=True)
    require(same, f"{name}: its logits are not its head times its backbone's output: use another")
    model.head_is_plain = True


def mixed_precision(model, dtype):
    """'bfloat16': such matrix products over float32 weights (float16 would need scaled losses)."""
    device = next(model.parameters()).device.type
    how = {"enabled": dtype == "bfloat16", "dtype": torch.bfloat16}
    # A pass uses each weight once. A cache would only keep the copies of all of them.
    return torch.autocast(device, cache_enabled=False, **how)


def no_dropout(model):
    """Eval mode, and it stays: with dropout, old and new log-probs would differ by noise and the
    first ratio would not be 1. A layer under gradient checkpointing keeps its own flag, not its
    children's, which do the dropping out: in eval mode transformers quietly stops checkpointing."""
    for module in model.modules():
        module.training = bool(getattr(module, "gradient_checkpointing", False))
