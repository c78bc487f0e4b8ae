"""How a Hugging Face model reads a table of slots: cache, attention, graphs, copies."""

import contextlib
import copy
import functools
import inspect
import warnings
import weakref
from bisect import bisect_left

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.cache_utils import Cache

from plumbing.processes import in_parts, whole


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
