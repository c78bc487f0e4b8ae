"""What the scripts ask of a Hugging Face model. None is rewritten for it.

decoding        models call the attention function registered under the configured name, with
                the `Cache` they are handed: both are ours, a table of slots, each row at its
                own length (rollout.py says why). A probe finds models that these do not fit
steps, graphs   how large a decode step is, CUDA graphs of it, how many slots there are
log-probs       of a batch in little memory: the backbone, then the head a chunk at a time,
                without the (batch, time, vocabulary) logits
copies, parts   a copy in low precision to decode with; weights in parts (--fsdp)
"""

import contextlib
import copy
import functools
import inspect
import warnings
import weakref
from bisect import bisect_left
from types import MethodType

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache

from machine import free_memory, in_parts, kv_numbers, require, whole

# --------------------------------------------------------------------------- decoding over slots


class SlotCache(Cache):
    """Keys and values of every slot, each row at its own length: a pair of tensors (slots,
    kv_heads, columns, head_dim) a layer, allocated once. Unlike the usual cache, `update` does not
    append: it writes row i at column position[i]. In a prefill it only collects what a forward over
    whole prompts produced."""

    def __init__(self, slots, columns):
        super().__init__(layers=[])  # the parent's layers stay unused
        self.slots, self.columns = slots, columns
        self.tables = {}  # layer -> keys, values
        self.prefilled = {}  # layer -> in the prefill: (prompts, kv_heads, time, head_dim)
        self.biases = {}  # sliding window (or None) -> additive mask of this forward

    def begin(self, position, used, prefill=False):
        """Start a forward. position: of each query, (rows,) in a decode step, one query a row;
        (time,) in a prefill. used: the columns that attention reads, at least max(position) + 1."""
        self.position, self.used, self.prefill = position, used, prefill
        self.rows = torch.arange(len(position), device=position.device)
        self.biases.clear()

    def update(self, key, value, layer_idx, *args, **kwargs):
        if self.prefill:
            self.prefilled[layer_idx] = key, value
            return key, value
        tables = self.table(layer_idx, key, value)
        for table, new in zip(tables, (key, value)):
            table[self.rows, :, self.position] = new[:, :, 0]
        return [table[: len(self.rows), :, : self.used] for table in tables]

    def table(self, layer, *like):
        if layer not in self.tables:  # zeros: a stale NaN times an attention weight of 0 is NaN
            shapes = [(self.slots, x.shape[1], self.columns, x.shape[3]) for x in like]
            self.tables[layer] = [x.new_zeros(shape) for x, shape in zip(like, shapes)]
        return self.tables[layer]

    def admit(self, rows, sources, time):
        """Copy the first `time` columns of the prefilled prompts `sources` into the slots `rows`. A
        row whose prompt is shorter gets columns too many: masked, overwritten one by one."""
        for layer, prompts in self.prefilled.items():
            for table, new in zip(self.table(layer, *prompts), prompts):
                table[rows, :, :time] = new[sources, :, :time]

    def bias(self, window, dtype):
        """0 where a query may look, (position - window, position], -inf elsewhere; made once a
        forward for all layers. (rows, 1, 1, used) in a decode step, (time, time) in a prefill."""
        if window not in self.biases:
            column = torch.arange(self.used, device=self.position.device)
            position = self.position[:, None]
            hidden = column > position
            if window is not None:
                hidden = hidden | (column <= position - window)
            bias = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
            bias.masked_fill_(hidden, float("-inf"))
            self.biases[window] = bias if self.prefill else bias[:, None, None]
        return self.biases[window]

    def get_seq_length(self, layer_idx=0):
        return 0  # positions are always passed explicitly


# The cache of the forward under way: models show it to `update`, not to the attention function.
ACTIVE: SlotCache | None = None


def attention(
    module, query, key, value, attention_mask, scaling=None, sliding_window=None, softcap=None,
    **kwargs,
):  # fmt: skip
    """Registered with transformers as "slots". query (batch, heads, time, head_dim); key and value
    (batch, kv_heads, columns, head_dim) -> (batch, time, heads, head_dim). Causal in a prefill; by
    each row's length in a decode step."""
    if kwargs.get("s_aux") is not None or kwargs.get("position_bias") is not None:
        raise ValueError("attention sinks or a position bias")
    batch, heads, time, dim = query.shape
    group = heads // key.shape[1]  # query heads that share a key head
    scale = dim**-0.5 if scaling is None else scaling
    if ACTIVE.prefill:  # rows are padded on the right, where causal attention never looks
        key = key.repeat_interleave(group, 1)
        value = value.repeat_interleave(group, 1)
    else:  # one query a row: the heads that share a key head become its "time"
        query = query.reshape(batch, -1, group, dim)
    windowed = sliding_window is not None and sliding_window < time
    causal = ACTIVE.prefill and softcap is None and not windowed
    bias = None if causal else ACTIVE.bias(sliding_window, query.dtype)
    if softcap is None and (query.is_cuda or ACTIVE.prefill):
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=bias, is_causal=causal, scale=scale
        )
    else:  # written out: Gemma 2's soft cap, and on a CPU no slower than the fused kernel
        scores = (query * scale) @ key.transpose(2, 3)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        out = (scores + bias).softmax(-1, dtype=torch.float32).to(value.dtype) @ value
    return out.reshape(batch, heads, time, -1).transpose(1, 2), None


# No mask function has that name, so models build no mask of their own.
AttentionInterface.register("slots", attention)


@contextlib.contextmanager
def serving(model, cache=None):
    """Inside: eval mode, no autograd, the model's GPU, and, given a cache, our attention over it.
    Then all is put back as it was."""
    global ACTIVE
    outer, implementation = ACTIVE, model.config._attn_implementation
    generation_config = model.generation_config
    modes = [(module, module.training) for module in model.modules()]
    layers = [module for module in model.modules() if cache is not None and is_large(module)]
    on_device = contextlib.nullcontext()
    if model.device.type == "cuda":
        on_device = torch.cuda.device(model.device)
    try:
        ACTIVE = cache
        model.eval()
        if cache is not None:
            model.set_attn_implementation("slots")
        for layer in layers:
            layer.forward = functools.partial(few_rows, layer)
        with torch.inference_mode(), on_device:
            yield
    finally:
        ACTIVE, model.generation_config = outer, generation_config
        model.set_attn_implementation(implementation)
        for module, training in modes:
            module.training = training
        for layer in layers:
            layer.__dict__.pop("forward", None)


def few_rows(layer, x):
    """A linear layer in a decode step on a CPU, (rows, 1, width) -> (rows, 1, out). For 5 to 47
    rows the weight goes on the left, where BLAS reads it as it lies: on the right it is packed
    first, which takes up to 2.6 times as long (matrices of 135 million weights in all)."""
    if x.shape[1] > 1 or not 5 <= x.shape[0] <= 47:
        return F.linear(x, layer.weight, layer.bias)
    out = (layer.weight @ x[:, 0].T).T[:, None]
    return out if layer.bias is None else out + layer.bias


def is_large(layer):
    """A linear layer that `few_rows` may stand in for: worth it, and not wrapped by anybody."""
    if type(layer) is not torch.nn.Linear or "forward" in vars(layer):
        return False
    weight = layer.weight
    return weight.is_cpu and weight.dtype == torch.float32 and weight.numel() >= 2**18


def prefill(model, cache, prompts):
    """One forward over right-padded prompts; keys and values are left in `cache.prefilled`."""
    time = max(len(p) for p in prompts)
    padded = [p + [0] * (time - len(p)) for p in prompts]
    tokens = torch.tensor(padded, device=model.device)  # (prompts, time)
    cache.begin(torch.arange(time, device=model.device), time, prefill=True)
    positions = cache.position[None]
    # the backbone alone: nobody reads the logits of a prompt
    backbone = model.base_model
    kept = {cache_keyword(backbone.__class__): cache}
    backbone(input_ids=tokens, position_ids=positions, use_cache=True, **kept)


@functools.cache
def cache_keyword(model_class):
    """What this class' forward calls the cache. transformers renames `past_key_values` to `cache`,
    and drops the old name in 5.40; code written for an older one may know only that."""
    names = inspect.signature(model_class.forward).parameters
    return "past_key_values" if "past_key_values" in names else "cache"


def decode(model, cache, tokens):
    """A decode step's forward at `cache.position`. tokens: (rows, 1) -> logits (rows, vocab)."""
    positions = cache.position[:, None]
    kept = {cache_keyword(model.__class__): cache}
    return model(input_ids=tokens, position_ids=positions, use_cache=True, **kept).logits[:, 0]


SERVABLE = weakref.WeakSet()  # models that passed `check_servable`


def check_servable(model):
    """ValueError, naming the architecture, unless the slot engine computes what the model computes:
    flags first, then a probe."""
    if model in SERVABLE:
        return
    config = model.config.get_text_config()
    stateful = config.is_encoder_decoder or getattr(model, "_is_stateful", False)
    strange = set(getattr(config, "layer_types", None) or ())
    strange -= {"full_attention", "sliding_attention"}
    try:
        if stateful or not model._supports_attention_backend:
            raise ValueError("no decoder-only attention with a KV cache")
        if strange:
            raise ValueError(f"layers of {' and '.join(sorted(strange))}")
        probe(model, config.vocab_size)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model that does not fit may raise
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{model.__class__.__name__} cannot be served by the slot engine ({reason}): "
            'pass engine="hf" (--engine hf) to generate through model.generate'
        ) from error
    SERVABLE.add(model)


def probe(model, vocab_size, time=8):
    """Two short rows of different lengths, decoded through the cache, beside a plain forward."""
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab_size, (2, time), generator=random).to(model.device)
    with serving(model):
        plain = model(input_ids=tokens, use_cache=False).logits.float()  # (2, time, vocab)
    cache, got = SlotCache(2, time), []
    with serving(model, cache):
        prefill(model, cache, [tokens[0, :2].tolist(), tokens[1, :5].tolist()])
        cache.admit([0, 1], [0, 1], 5)
        for position in torch.tensor([[2, 5], [3, 6], [4, 7]], device=model.device):
            cache.begin(position, time)
            got.append(decode(model, cache, tokens.gather(1, position[:, None])).float())
    expected = torch.stack([plain[0, 2:5], plain[1, 5:8]])  # (2, 3, vocab)
    error = (torch.stack(got, 1) - expected).abs().max().item()
    scale = expected.abs().max().item()
    if not error <= scale * (1e-3 if model.dtype == torch.float32 else 0.1):
        raise ValueError(f"its logits differ by {error:.2g} of {scale:.2g}")


# --------------------------------------------------------------------------- steps, graphs, slots


def step_sizes(device, slots, columns):
    """Rows and columns that a step may have, after how many steps the host looks which rows are
    done, and where graphs are kept. A CPU pays for every row and column, and looks each time. On
    CUDA one graph serves all sizes up to the next of a few."""
    if device.type != "cuda":
        return range(slots + 1), range(columns + 1), 1, None
    depths = [64, 128, 256, 384, 512, *range(768, columns, 256)]
    depths = [depth for depth in depths if depth < columns]
    return (slots // 8, slots // 4, slots // 2, slots), (*depths, columns), 8, {}


def at_least(size, sizes):
    """The least of the ascending `sizes` that is as large, or the largest there is."""
    return sizes[bisect_left(sizes, min(size, sizes[-1]))]


def decode_steps(engine, width, used, stop_ids, sampling):
    """A few decode steps. On CUDA they are replays of one graph: no launch overhead, and the host
    never waits."""
    step = functools.partial(engine.step, width, used, stop_ids, sampling)
    if engine.graphs is not None:
        truncation = sampling.temperature, sampling.top_p, sampling.top_k
        key = width, used, *sorted(sampling.stop_ids), *truncation
        if key not in engine.graphs:
            engine.graphs[key] = capture(engine, step), stop_ids  # the graph reads them in place
        graph = engine.graphs[key][0]
        step = graph.replay if graph else step
    for _ in range(engine.check_every):
        step()


def capture(engine, step):
    """The step as a CUDA graph; None, with a warning, for a model whose step cannot be captured
    (one that reads numbers back, as some rotary embeddings do) or for want of memory."""
    saved = [x.clone() for x in engine.state]
    step()  # warms up; a real step, so undo what it did to the rows (the keys it wrote are right)
    for x, old in zip(engine.state, saved):
        x.copy_(old)
    pools = [graph.pool() for graph, _ in engine.graphs.values() if graph]  # scratch is shared
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pools[0] if pools else None):
            step()
        return graph
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        reason = " ".join(str(error).split())[:100]
        warnings.warn(f"no CUDA graph, so decoding is slower: {reason}", stacklevel=2)
        return None


def choose_slots(model, columns, requests, kept=None):
    """As many slots as half the free memory holds, up to where more stop paying (measured by
    `tests/benchmark.py generation`). kept: a cache whose memory is ours to use again."""
    config = model.config.get_text_config()
    # bytes of cache, and of logits
    row = columns * kv_numbers(config) * model.dtype.itemsize + 16 * config.vocab_size
    most, free = 256, free_memory(model.device)
    if model.device.type == "cuda":
        most = 512
        free += torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
    if kept is not None:  # a Cache of no layers of its own is false
        free += sum(table.nbytes for tables in kept.tables.values() for table in tables)
    return max(1, int(min(most, requests, free / 2 / row)))


def longest_context(config):
    rope = getattr(config, "rope_parameters", None) or {}
    limit = getattr(config, "max_position_embeddings", None)
    if rope.get("rope_type") == "longrope":  # beyond, the longest row changes all frequencies
        limit = rope.get("original_max_position_embeddings", limit)
    return limit


# --------------------------------------------------------------------------- log-probs


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
    message = "use another model, or teach transformer.HeadLogprobs this one's formula"
    require(same, f"{name}: its logits are not its head times its backbone's output: {message}")
    CHECKED.add(model)


def check_tokens(tokens, temperature):
    message = f"temperature {temperature}: log-probs need one above 0 (greedy has no ratio)"
    require(temperature > 0, message)
    message = f"tokens of shape {tuple(tokens.shape)}: needs (batch, time) with time of at least 2"
    require(tokens.dim() == 2 and tokens.shape[1] > 1, message)


# --------------------------------------------------------------------------- precision, parts


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


COPIES = weakref.WeakKeyDictionary()  # model -> its copy in another dtype, which goes with it


@torch.inference_mode()
def low_precision_copy(model, dtype):
    """The model, or its one copy in `dtype` with weights brought up to date: the training weights
    stay float32. A model in parts decodes by the copy that was made before it was taken apart."""
    twin = COPIES.get(model)
    if in_parts(model):
        for old, new in zip(twin.parameters(), model.parameters()):
            old.copy_(whole(new))
        return twin
    if dtype in (None, model.dtype):
        return model
    if twin is None or (twin.dtype, twin.device) != (dtype, model.device):
        twin = keep_copy(model, dtype)
    torch._foreach_copy_(list(twin.parameters()), list(model.parameters()))
    return twin


def keep_copy(model, dtype):
    twin = COPIES[model] = copy.deepcopy(model).requires_grad_(False)
    for p in twin.parameters():  # not twin.to(dtype): rotary frequencies must stay float32
        p.data = p.data.to(dtype)
    return twin


def shard(model, decoder=None):
    """FSDP2: each process keeps a part of every weight, its gradient and its moments in Adam. A
    pass gathers a layer's weights when it comes to the layer, and forgets them behind it. model: a
    `ValueModel`, or a policy, of which a whole copy is kept to decode with, of the dtype `decoder`.
    Make the optimizer afterwards."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    device = next(model.parameters()).device.type
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    is_policy = hasattr(model, "get_output_embeddings")
    if is_policy:
        check_head(model)
        keep_copy(model, decoder)
    names = (model if is_policy else model.backbone)._no_split_modules or ()
    for layer in [module for module in model.modules() if type(module).__name__ in names]:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if is_policy:  # `token_logprobs` calls backbone and head, not the model
        model.logprobs_in_parts = MethodType(masked_logprobs, model)
        register_fsdp_forward_method(model, "logprobs_in_parts")
