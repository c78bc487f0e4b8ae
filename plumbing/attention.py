"""How a Hugging Face model reads a table of slots: the cache, the attention over it, the probe.

No model is rewritten. A model calls the attention function that its configuration names, with the
keys and values that its cache returns. Both are ours here: `serving` puts them in place and takes
them out again. `check_servable` tries a model on a few tokens, so that one whose attention does
something else is refused instead of sampled from wrongly.
"""

import contextlib
import copy
import functools
import inspect
import math

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.cache_utils import Cache

from plumbing.commands import require
from plumbing.fast import faster
from plumbing.memory import is_out_of_memory
from plumbing.processes import whole

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # PyTorch before 2.10
    varlen_attn = None

# --------------------------------------------------------------------------- the cache


class SlotCache(Cache):
    """Keys and values of every slot, each slot at its own length: a pair of tensors (slots,
    kv_heads, columns, head_dim) a layer, allocated once. Unlike the usual cache, `update` does not
    append: it writes slot i at column position[i]. In a prefill it only collects what a forward
    over whole prompts produced."""

    def __init__(self, slots, columns):
        super().__init__(layers=[])  # unused, and so its length is 0: positions are passed
        self.slots = slots
        self.columns = columns
        self.tables = {}  # layer -> (keys, values)
        self.prefilled = {}  # layer -> the same of the prefill: (prompts, kv_heads, time, head_dim)
        # Made once a forward: sliding window (or None) -> additive mask, and "own" -> `extents`.
        self.biases = {}

    def begin(self, position, used, prefill=False):
        """Start a forward. position: of each query, (rows,) in a decode step, one query a row;
        (time,) in a prefill. used: the columns that attention reads, at least max(position) + 1."""
        self.position = position
        self.used = used
        self.prefill = prefill
        self.rows = torch.arange(len(position), device=position.device)
        self.biases.clear()

    def update(self, key, value, layer_idx, *args, **kwargs):
        """Called by each layer with its new keys and values, (rows, kv_heads, time, head_dim) each;
        returns those to attend to."""
        if layer_idx not in self.tables:
            self.tables[layer_idx] = [self.new_table(x) for x in (key, value)]
        if self.prefill:
            self.prefilled[layer_idx] = key, value
            return key, value
        tables = self.tables[layer_idx]
        for table, new in zip(tables, (key, value)):
            table[self.rows, :, self.position] = new[:, :, 0]
        return [table[: len(self.rows)] for table in tables]

    def new_table(self, like):
        sizes = self.slots, like.shape[1], self.columns, like.shape[3]
        # In memory the heads of a column lie together on a card: `own_columns` needs it.
        order = (0, 2, 1, 3) if like.is_cuda else (0, 1, 2, 3)
        table = torch.empty_permuted(sizes, order, dtype=like.dtype, device=like.device)
        return table.zero_()  # a stale NaN times an attention weight of 0 is NaN

    def fill(self, slots, origin, sources, time):
        """Copy the first `time` columns of the rows `sources` of `origin`, which is `prefilled` or
        `tables`, into `slots`. Both are index tensors: a list would be uploaded anew for every
        table. What is shorter than `time` gets columns too many: they are masked, and overwritten
        one by one."""
        for layer, pair in origin.items():
            for table, new in zip(self.tables[layer], pair):
                table[slots, :, :time] = new[sources, :, :time]

    def bias(self, window, dtype):
        """0 where a query may look, (position - window, position], -inf elsewhere; made once a
        forward for all layers. (rows, 1, 1, used) in a decode step, (time, time) in a prefill."""
        if window not in self.biases:
            column = torch.arange(self.used, device=self.position.device)
            position = self.position[:, None]
            hidden = column > position
            if window is not None:
                hidden = hidden | (column <= position - window)
            bias = hidden.to(dtype).masked_fill(hidden, float("-inf"))
            self.biases[window] = bias if self.prefill else bias[:, None, None]
        return self.biases[window]

    def extents(self):
        """For `own_columns`: where each row's query starts, and its columns in the table, (rows +
        1,) each; and how many of these are filled, (rows,)."""
        if "own" not in self.biases:
            rows, device = len(self.rows), self.position.device
            starts = torch.arange(rows + 1, dtype=torch.int32, device=device)
            self.biases["own"] = starts, starts * self.columns, (self.position + 1).int()
        return self.biases["own"]


# --------------------------------------------------------------------------- attention over it


def attention(
    module, query, key, value, attention_mask, scaling=None, sliding_window=None, softcap=None,
    **kwargs,
):  # fmt: skip
    """Registered with transformers as "slots". query (batch, heads, time, head_dim); key and value
    (batch, kv_heads, columns, head_dim) -> (batch, time, heads, head_dim). Causal in a prefill; by
    each slot's length in a decode step. What else a model passes (attention sinks, a position bias)
    is ignored: the probe sees the difference."""
    cache = module.config.slot_cache  # models hand it to `update`, but not to this function
    batch, heads, time, dim = query.shape
    group = heads // key.shape[1]  # query heads that share a key head
    scale = dim**-0.5 if scaling is None else scaling
    if not cache.prefill and softcap is None and reads_own_columns(query):
        return own_columns(cache, query, key, value, scale, sliding_window), None
    key = key[:, :, : cache.used]
    value = value[:, :, : cache.used]
    if cache.prefill:  # prompts are padded on the right, where causal attention never looks
        # Each key head, `group` times: as a view at first, then one copy.
        key, value = (x[:, :, None].expand(-1, -1, group, -1, -1) for x in (key, value))
        key, value = (x.flatten(1, 2) for x in (key, value))  # (batch, heads, time, head_dim)
    else:  # one query a slot: the heads that share a key head become its "time"
        query = query.reshape(batch, -1, group, dim)
    windowed = sliding_window is not None and sliding_window < time
    causal = cache.prefill and softcap is None and not windowed
    bias = None if causal else cache.bias(sliding_window, query.dtype)
    if softcap is None and (query.is_cuda or cache.prefill):
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=bias, is_causal=causal, scale=scale
        )
    else:  # written out: Gemma 2's soft cap, and on a CPU no slower than the fused kernel
        scores = (query * scale) @ key.transpose(2, 3)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        weights = (scores + bias).softmax(-1, dtype=torch.float32)
        out = weights.to(value.dtype) @ value
    out = out.reshape(batch, heads, time, -1)
    return out.transpose(1, 2), None


def reads_own_columns(query):
    """Only in a compiled step, which is compared with a plain one first (`fast.faster`)."""
    there = varlen_attn is not None and query.is_cuda and query.dtype == torch.bfloat16
    return there and torch.compiler.is_compiling()


def own_columns(cache, query, key, value, scale, window=None):
    """The same for a decode step, by a kernel that reads no columns but a slot's own, and each once
    for all the query heads that share it. query (slots, heads, 1, dim); key and value (slots,
    kv_heads, columns, dim) -> (slots, 1, heads, dim)."""
    key, value = (x.transpose(1, 2).flatten(0, 1) for x in (key, value))  # (slots * columns, ...)
    # How many columns before the query's own and after it: all of the slot's, or a window.
    how = {"window_size": (-1, -1) if window is None else (window - 1, 0)}
    starts, first_columns, filled = cache.extents()
    how |= {"scale": scale, "enable_gqa": True, "seqused_k": filled}
    sizes = starts, first_columns, 1, cache.columns
    return varlen_attn(query[:, :, 0], key, value, *sizes, **how)[:, None]


# No mask function has that name, so models build no mask of their own.
AttentionInterface.register("slots", attention)


@contextlib.contextmanager
def serving(model, cache=None):
    """Inside: eval mode, no autograd, the model's GPU, and, given a cache, our attention over it.
    Then all is put back as it was."""
    config = model.config.get_text_config()  # the one that attention layers know
    implementation = model.config._attn_implementation
    modes = [(module, module.training) for module in model.modules()]
    # A graph is captured on the current device. (Does nothing for a model on a CPU.)
    on_device = torch.cuda.device_of(next(model.parameters()))
    try:
        model.eval()
        if cache is not None:
            config.slot_cache = cache
            model.set_attn_implementation("slots")
        with torch.inference_mode(), on_device:
            yield
    finally:
        vars(config).pop("slot_cache", None)
        model.set_attn_implementation(implementation)
        for module, training in modes:
            module.training = training


def prefill(model, cache, prompts):
    """One forward over right-padded prompts; keys and values are left in `cache.prefilled`."""
    time = max(len(p) for p in prompts)
    padded = [p + [0] * (time - len(p)) for p in prompts]
    tokens = torch.tensor(padded, device=model.device)  # (prompts, time)
    cache.begin(torch.arange(time, device=model.device), time, prefill=True)
    # the backbone alone: nobody reads the logits of a prompt
    forward(model.base_model, cache, tokens, cache.position[None])


@faster()
def decode(model, cache, tokens):
    """A decode step's forward at `cache.position`. tokens: (rows, 1) -> logits (rows, vocab)."""
    return forward(model, cache, tokens, cache.position[:, None]).logits[:, 0]


def forward(module, cache, tokens, positions):
    kept = {cache_keyword(module.__class__): cache}
    return module(input_ids=tokens, position_ids=positions, use_cache=True, **kept)


@functools.cache
def cache_keyword(model_class):
    """What this class' forward calls the cache. transformers renames `past_key_values` to `cache`,
    and drops the old name in 5.40; code written for an older one may know only that."""
    names = inspect.signature(model_class.forward).parameters
    return "past_key_values" if "past_key_values" in names else "cache"


# --------------------------------------------------------------------------- can it be served?


def check_servable(model):
    """ValueError, naming the architecture, unless the slots compute what the model computes."""
    config = model.config.get_text_config()
    strange = set(getattr(config, "layer_types", None) or ())
    strange -= {"full_attention", "sliding_attention"}
    try:
        if strange:  # the probe is too short to show it
            raise ValueError(f"layers of {' and '.join(sorted(strange))}")
        probe(model, config.vocab_size)
    except Exception as error:  # whatever a model that does not fit may raise
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:200]
        name = f"{model.__class__.__name__} cannot be served ({reason})"
        served = "decoders with full or sliding-window attention are, such as"
        families = "Llama, Qwen, Mistral, Gemma, Phi-3, OLMo 2, GPT-2 and GPT-NeoX"
        raise ValueError(f"{name}: {served} {families}") from error


def probe(model, vocab_size):
    """Two rows of 8 tokens: 2 and 5 of them are prefilled, then 3 decoded through the cache. Each
    step's logits must be those of a plain forward."""
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab_size, (2, 8), generator=random).to(model.device)
    with serving(model):
        plain = model(input_ids=tokens, use_cache=False).logits.float()  # (2, 8, vocab)
    rounding = 1e-3 if model.dtype == torch.float32 else 0.1
    cache = SlotCache(2, 8)
    both = torch.arange(2, device=model.device)
    position = torch.tensor([2, 5], device=model.device)
    with serving(model, cache):
        first, second = tokens.tolist()
        prefill(model, cache, [first[:2], second[:5]])
        cache.fill(both, cache.prefilled, both, 5)
        for _ in range(3):
            cache.begin(position, 8)
            got = decode(model, cache, tokens[both, position, None])  # (2, vocab)
            expected = plain[both, position]
            error = (got.float() - expected).abs().max().item()
            scale = expected.abs().max().item()
            if not error <= scale * rounding:  # so written, a NaN is an error, too
                raise ValueError(f"its logits differ by {error:.2g} of {scale:.2g}")
            position = position + 1


def check_prompts(model, prompts, n, budget):
    """n and budget (max_new_tokens), an int or one a prompt, as lists: (prompts,) each. ValueError:
    a prompt that the model cannot read, or not go on from for so long."""
    n = [n] * len(prompts) if np.ndim(n) == 0 else n
    budget = [budget] * len(prompts) if np.ndim(budget) == 0 else budget
    sizes = f"{len(prompts)} prompts, {len(n)} n, {len(budget)} max_new_tokens"
    require(len(prompts) == len(n) == len(budget), f"{sizes}: give one, or one a prompt")
    vocab = model.get_input_embeddings().num_embeddings
    limit = longest_context(model.config.get_text_config()) or math.inf
    for i, (prompt, count, most) in enumerate(zip(prompts, n, budget)):
        require(len(prompt) > 0, f"prompt {i} is empty: give it at least a BOS token")
        low, high = min(prompt), max(prompt)
        ids = f"token ids from {low} to {high}, the model only 0 to {vocab - 1}"
        own = "encode it with the model's own tokenizer"
        require(0 <= low <= high < vocab, f"prompt {i} has {ids}: {own}")
        wrong = f"max_new_tokens={most} must be at least 1 and n={count} at least 0"
        require(most >= 1 and count >= 0, f"prompt {i}: {wrong}")
        long = f"prompt {i} is {len(prompt)} tokens: with max_new_tokens={most} it passes the"
        fits = len(prompt) + most <= limit
        require(fits, f"{long} model's {limit} positions; shorten one of them")
    return n, budget


def longest_context(config):
    """The tokens of prompt and response together that the model was made for; None: any number."""
    rope = getattr(config, "rope_parameters", None) or {}
    limit = getattr(config, "max_position_embeddings", None)
    if rope.get("rope_type") == "longrope":  # beyond, the longest row changes all frequencies
        limit = rope.get("original_max_position_embeddings", limit)
    return limit


# --------------------------------------------------------------------------- a copy to decode with


def copy_of(model, dtype):
    """A copy of the model, its weights in `dtype`."""
    twin = copy.deepcopy(model).requires_grad_(False)
    for p in twin.parameters():  # not twin.to(dtype): rotary frequencies must stay float32
        p.data = p.data.to(dtype)
    return twin


@torch.inference_mode()
def bring_up_to_date(twin, model):
    """Copy today's weights. With FSDP every process puts the parts together."""
    for old, new in zip(twin.parameters(), model.parameters()):
        old.copy_(whole(new))
