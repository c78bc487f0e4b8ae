"""Sampling many responses fast: batched generation with a KV cache, in pure PyTorch.

    from rollout import generate
    groups = generate(model, prompts, n=8, max_new_tokens=256)     # groups[i][j]: the j-th response to prompt i
    python rollout.py                                              # tokens a second, beside model.generate

Reinforcement learning spends most of its time here, and it knows what a server does not: every request is there from
the start, each prompt is sampled many times, and lengths differ tenfold. Three ideas follow from that.

1. SLOTS. The cache is a table of `slots` rows. A row that stops is handed to the next request at once, so no step
   computes padding for rows that are done. Every row is at its *own* length, which is all that makes this unlike the
   textbook cache: the new key of row i is written at column length[i], and row i attends to columns <= length[i].

       slot 0   Q Q Q a a a .  .        Q: the prompt's keys, copied from the prefill
       slot 1   Q Q a .  .  .  .        a: written one a step
       slot 2   Q Q Q Q a a a a         .: stale numbers of an earlier row, masked

2. A PROMPT IS COMPUTED ONCE. The keys of prompt[:-1] are computed in one forward and copied to the n slots that need
   them; the last prompt token is then simply the first token each row decodes, so that no logits of the prefill are
   needed. A prompt that is a prefix of another one (VinePPO's states along one response) needs no forward at all: its
   keys are the first columns of the longer one's, because attention is causal.

3. RANDOM NUMBERS BELONG TO THE REQUEST, not to the slot: request r draws its uniforms from Philox(seed, r). What is
   sampled does not depend on the number of slots or on what else is in the batch (but for float rounding), and the
   decode step itself draws nothing, so a CUDA graph can replay it.

No model is rewritten. Hugging Face models call whatever attention function is registered under the configured name and
whatever `Cache` they are handed; both are ours (`attention`, `SlotCache`). A model they do not fit is found by a probe
before any work and refused by name; `engine="hf"` serves it through `model.generate`, slower, with the same result.
"""

import contextlib
import copy
import logging
import os
import warnings
import weakref
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import AttentionInterface
from transformers.cache_utils import Cache

log = logging.getLogger(__name__)


@dataclass
class Rollout:
    prompt: list[int]      # token ids the model read
    response: list[int]    # token ids it wrote, its stop token included when `finished`
    logprobs: list[float]  # log pi(token | prefix) of softmax(logits / temperature), before any top-p / top-k truncation
    finished: bool         # ended by a stop token (False: ran into max_new_tokens)


# ----------------------------------------------------------------------------------------------------------------------
# Sampling: one token a row from the logits


def top_k_top_p(probs, top_k, top_p):
    """Zero the probabilities outside the top-k tokens, then outside the nucleus (Holtzman et al. 2020, section 3.1): the
    fewest most likely tokens whose share reaches top_p. probs: (rows, vocab) -> same, unnormalized.

    Sorting a large vocabulary is the slow way to a nucleus. It is {probs >= t} for the largest t whose mass reaches
    top_p, and bisection finds t in 30 passes with no sort; tokens tied with the last one are all kept.
    """
    if 0 < top_k < probs.shape[-1]:
        probs = probs * (probs >= probs.topk(top_k, dim=-1).values[:, -1:])
    if top_p < 1:
        goal = top_p * probs.sum(-1, keepdim=True)
        low, high = torch.zeros_like(goal), probs.amax(-1, keepdim=True)  # mass(low) >= goal, always
        for _ in range(30):
            middle = (low + high) / 2
            enough = (probs * (probs >= middle)).sum(-1, keepdim=True) >= goal
            low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
        probs = probs * (probs >= low)
    return probs


def sample(logits, uniform, *, temperature, top_p, top_k):
    """logits: (rows, vocab), uniform: (rows,) in [0, 1) -> tokens (rows,), log-probs (rows,) before truncation."""
    logits = logits.float()
    if temperature == 0:
        token = logits.argmax(-1)
    else:
        logits = logits / temperature
        cdf = top_k_top_p(logits.softmax(-1), top_k, top_p).cumsum(-1)  # (rows, vocab)
        # Inverse of the cumulative distribution: the first token whose cdf exceeds u. `right=True` steps over tokens of
        # probability 0; the factor keeps u * total below total in float32, else the last token could be drawn at p = 0.
        token = torch.searchsorted(cdf, (uniform * (1 - 1e-6))[:, None] * cdf[:, -1:], right=True)[:, 0]
    logprob = logits.gather(1, token[:, None])[:, 0] - logits.logsumexp(-1)
    return token, logprob


# ----------------------------------------------------------------------------------------------------------------------
# The cache and the attention that reads it


class SlotCache(Cache):
    """Keys and values of every slot, each row at its own length; tensors of (slots, kv_heads, columns, head_dim), one a
    layer, allocated once. Unlike the usual cache `update` does not append: it writes row i at column length[i].
    While `prefill` is on it only collects what a forward over whole prompts produced."""

    def __init__(self, slots, columns):
        super().__init__(layers=[])  # the parent's layers stay unused
        self.slots, self.columns = slots, columns
        self.keys, self.values = {}, {}      # layer -> (slots, kv_heads, columns, head_dim)
        self.prefilled = {}                  # layer -> (keys, values) of the prefilled prompts, (prompts, kv_heads, time, head_dim)
        self.prefill = False
        self.biases = {}                     # sliding window (or None) -> additive mask of this forward

    def begin(self, length, used, device):
        """Start a decode step. length: (rows,) the column each row writes, and the last one it reads; used: how many
        columns the attention reads (at least max(length) + 1)."""
        self.length, self.used, self.rows = length, used, torch.arange(len(length), device=device)
        self.biases.clear()

    def update(self, key, value, layer_idx, *args, **kwargs):
        if self.prefill:
            self.prefilled[layer_idx] = (key, value)
            return key, value
        if layer_idx not in self.keys:
            self.allocate(key, value, layer_idx)
        keys, values, width = self.keys[layer_idx], self.values[layer_idx], len(self.rows)
        keys[self.rows, :, self.length] = key[:, :, 0]
        values[self.rows, :, self.length] = value[:, :, 0]
        return keys[:width, :, : self.used], values[:width, :, : self.used]

    def allocate(self, key, value, layer_idx):
        # Zeros, not empty: a stale NaN times an attention weight of 0 would be NaN.
        self.keys[layer_idx] = key.new_zeros(self.slots, key.shape[1], self.columns, key.shape[3])
        self.values[layer_idx] = value.new_zeros(self.slots, value.shape[1], self.columns, value.shape[3])

    def admit(self, rows, sources, time):
        """Copy the first `time` columns of the prefilled prompts `sources` into the slots `rows` (lists of equal length).
        A row whose prompt is shorter gets columns too many: stale, masked by its length, overwritten one by one."""
        for layer, (key, value) in self.prefilled.items():
            if layer not in self.keys:
                self.allocate(key, value, layer)
            self.keys[layer][rows, :, :time] = key[sources, :, :time]
            self.values[layer][rows, :, :time] = value[sources, :, :time]

    def move(self, sources, targets, used):
        for table in (*self.keys.values(), *self.values.values()):
            table[targets, :, :used] = table[sources, :, :used]

    def bias(self, window, dtype, device):
        """(rows, 1, 1, used): 0 where row i may look, -inf elsewhere; made once a step and shared by all layers."""
        if window not in self.biases:
            column = torch.arange(self.used, device=device)
            hidden = column > self.length[:, None]
            if window is not None:
                hidden = hidden | (column <= self.length[:, None] - window)
            bias = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))
            self.biases[window] = bias[:, None, None, :]
        return self.biases[window]

    def get_seq_length(self, layer_idx=0):
        return 0  # positions are always passed explicitly


ACTIVE: SlotCache | None = None  # the cache of the forward under way: Hugging Face hands it to `update`, not to attention


def attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, sliding_window=None, softcap=None, **kw):
    """Registered with transformers as "slots". query: (batch, heads, time, head_dim); key, value: (batch, kv_heads,
    columns, head_dim) -> (batch, time, heads, head_dim). Causal in a prefill; by each row's length in a decode step."""
    if kw.get("s_aux") is not None or kw.get("position_bias") is not None:
        raise ValueError("attention sinks or a position bias are not served by the slot engine")
    batch, heads, time, dim = query.shape
    kv_heads, scale = key.shape[1], dim**-0.5 if scaling is None else scaling
    if ACTIVE.prefill:
        # (prompts, heads, time, head_dim). Rows are padded on the right, where causal attention never looks.
        key, value = (x.repeat_interleave(heads // kv_heads, 1) if kv_heads < heads else x for x in (key, value))
        bias, windowed = None, sliding_window is not None and sliding_window < time
        if windowed or softcap is not None:
            gap = torch.arange(time, device=query.device)[:, None] - torch.arange(time, device=query.device)
            hidden = (gap < 0) | (gap >= sliding_window) if windowed else gap < 0
            bias = torch.zeros(time, time, dtype=query.dtype, device=query.device).masked_fill_(hidden, float("-inf"))
    else:
        # One query a row: the heads that share a key head become its "time", and no key is repeated.
        query = query.reshape(batch, kv_heads, heads // kv_heads, dim)
        bias = ACTIVE.bias(sliding_window, query.dtype, query.device)
    if softcap is None and (query.is_cuda or ACTIVE.prefill):
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, is_causal=bias is None, scale=scale)
    else:  # written out: needed for the soft cap of Gemma 2, and faster than the fused kernel for one query on a CPU
        scores = (query * scale) @ key.transpose(2, 3)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        out = (scores + bias).softmax(-1, dtype=torch.float32).to(value.dtype) @ value
    return out.reshape(batch, heads, time, -1).transpose(1, 2), None


AttentionInterface.register("slots", attention)  # with no mask function under that name, models build no mask of their own


@contextlib.contextmanager
def serving(model, cache):
    """Inside: the model is in eval mode, uses our attention, and `cache` is the active one."""
    global ACTIVE
    training, implementation, outer = model.training, model.config._attn_implementation, ACTIVE
    model.eval()
    model.set_attn_implementation("slots")
    ACTIVE = cache
    try:
        with torch.inference_mode():
            yield
    finally:
        ACTIVE = outer
        model.set_attn_implementation(implementation)
        model.train(training)


SERVABLE = weakref.WeakSet()  # models that passed the probe


def check_servable(model):
    """Raise ValueError, naming the architecture, unless the slot engine computes what the model computes. Flags first;
    then two short random rows of different lengths, decoded through the cache, against one plain forward."""
    if model in SERVABLE:
        return
    name, way_out = type(model).__name__, 'pass engine="hf" (--engine hf) to generate through model.generate'
    if model.config.is_encoder_decoder or getattr(model, "_is_stateful", False) or not model._supports_attention_backend:
        raise ValueError(f"{name} cannot be served by the slot engine (no decoder-only KV-cache attention): {way_out}")
    device, vocab, T = model.device, model.get_input_embeddings().num_embeddings, 8
    tokens = torch.randint(vocab, (2, T), generator=torch.Generator().manual_seed(0)).to(device)
    cache, training = SlotCache(2, T), model.training
    try:
        with torch.inference_mode():
            expected = model.eval()(input_ids=tokens, use_cache=False).logits.float()  # (2, T, vocab)
        with serving(model, cache):
            prefill(model, cache, [tokens[0, :2].tolist(), tokens[1, :5].tolist()])
            cache.admit([0, 1], [0, 1], 5)
            length, got = torch.tensor([2, 5], device=device), []
            for _ in range(3):
                cache.begin(length, T, device)
                got.append(forward(model, cache, tokens.gather(1, length[:, None]), length[:, None]))
                length = length + 1
        expected = torch.stack([expected[0, 2:5], expected[1, 5:8]])  # (2, 3, vocab)
        error = (torch.stack(got, 1).float() - expected).abs().max().item()
    except (TypeError, AttributeError, ValueError, RuntimeError, IndexError, KeyError) as e:
        if is_out_of_memory(e):
            raise
        raise ValueError(f"{name} cannot be served by the slot engine ({type(e).__name__}: {e}): {way_out}") from e
    finally:
        model.train(training)
    tolerance = (1e-3 if model.dtype == torch.float32 else 0.1) * max(1.0, expected.abs().max().item())
    if not error <= tolerance:
        raise ValueError(f"{name} cannot be served by the slot engine (its logits differ by {error:.2g}): {way_out}")
    SERVABLE.add(model)


def forward(model, cache, tokens, positions):
    """tokens, positions: (rows, 1) -> logits of the next token (rows, vocab)."""
    return model(input_ids=tokens, position_ids=positions, past_key_values=cache, use_cache=True).logits[:, -1]


def prefill(model, cache, prompts):
    """One forward over right-padded prompts; their keys and values are left in `cache.prefilled`."""
    time = max(len(p) for p in prompts)
    tokens = torch.zeros(len(prompts), time, dtype=torch.long)
    for row, prompt in zip(tokens, prompts):
        row[: len(prompt)] = torch.tensor(prompt)
    tokens = tokens.to(model.device)
    cache.prefill, cache.prefilled = True, {}
    try:  # the backbone alone: nobody reads the logits of a prompt
        positions = torch.arange(time, device=tokens.device).expand(len(prompts), -1)
        model.base_model(input_ids=tokens, position_ids=positions, past_key_values=cache, use_cache=True)
    finally:
        cache.prefill = False


# ----------------------------------------------------------------------------------------------------------------------
# The engine


def plan(prompts, n):
    """Order the work. Returns a list of (trunk, [prompt index, ...]): a trunk is a prompt that extends all the prompts
    listed with it, so that one forward over it serves them all.

    In lexicographic order everything that extends p follows p directly, so p is a prefix of some other prompt exactly
    when it is a prefix of its successor. Long trunks go first: a long prompt tends to a long response, so the long work
    is under way early and the tail is short, and rows of like length share the cache. Within a trunk the shortest prompt
    goes first: it has the longest way to go.
    """
    order = sorted((i for i in range(len(prompts)) if n[i] > 0), key=lambda i: prompts[i])
    families = []
    for i in reversed(order):
        if families and prompts[families[-1][0]][: len(prompts[i])] == prompts[i]:
            families[-1].append(i)
        else:
            families.append([i])
    families.sort(key=lambda family: -len(prompts[family[0]]))
    return [(prompts[family[0]], family[::-1]) for family in families]


def is_out_of_memory(error):
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def free_memory(device):
    """Bytes that can still be allocated on the device; None where nobody says."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    with contextlib.suppress(OSError, StopIteration):
        with open("/proc/meminfo") as f:
            return 1024 * int(next(line for line in f if line.startswith("MemAvailable")).split()[1])
    with contextlib.suppress(ValueError, OSError, AttributeError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def choose_slots(model, columns, requests):
    """As many slots as half the free memory holds, up to where more stop paying (measured, `python rollout.py`)."""
    config, size = model.config.get_text_config(), model.dtype.itemsize
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    row = 2 * config.num_hidden_layers * kv_heads * head_dim * columns * size + 16 * config.vocab_size  # cache + logits
    most = 512 if model.device.type == "cuda" else 256
    free = free_memory(model.device)
    slots = max(1, min(most, requests, int(free / 2 / row) if free else most))
    log.info("%d slots of %d columns (%.0f MiB each) for %d requests", slots, columns, row / 2**20, requests)
    return slots


class Engine:
    """The state of the decode loop: one row a slot, on the device, updated in place (a CUDA graph needs that)."""

    def __init__(self, model, slots, columns, max_new):
        self.model, self.device, self.columns, self.max_new = model, model.device, columns, max_new
        self.cache = SlotCache(slots, columns)
        integer = dict(dtype=torch.long, device=self.device)
        self.token = torch.zeros(slots, **integer)      # the last token of the row, not yet in the cache
        self.length = torch.zeros(slots, **integer)     # columns filled so far = position of `token`
        self.written = torch.zeros(slots, **integer)    # response tokens so far
        self.budget = torch.zeros(slots, **integer)     # response tokens allowed
        self.live = torch.zeros(slots, dtype=torch.bool, device=self.device)
        self.stopped = torch.zeros(slots, dtype=torch.bool, device=self.device)  # ended by a stop token
        # One column more than max_new: a row that is done goes on writing there until somebody looks.
        self.tokens = torch.zeros(slots, max_new + 1, **integer)
        self.logprobs = torch.zeros(slots, max_new + 1, device=self.device)
        self.uniforms = torch.zeros(slots, max_new + 1, device=self.device)
        self.state = (self.token, self.length, self.written, self.budget, self.live, self.stopped,
                      self.tokens, self.logprobs, self.uniforms)
        self.graphs = {}  # (rows, columns read, sampling settings) -> captured decode step

    def step(self, width, used, stop_ids, sampling):
        """Decode one token in the first `width` slots, reading the first `used` columns of the cache."""
        token, length, written, budget, live, stopped, tokens, logprobs, uniforms = (x[:width] for x in self.state)
        self.cache.begin(length, used, self.device)
        logits = forward(self.model, self.cache, token[:, None], length[:, None])
        column = written[:, None]
        new, logprob = sample(logits, uniforms.gather(1, column)[:, 0], **sampling)
        tokens.scatter_(1, column, new[:, None])
        logprobs.scatter_(1, column, logprob[:, None])
        token.copy_(torch.where(live, new, token))
        written.add_(live)
        length.add_(live)
        stop = (new[:, None] == stop_ids).any(1)
        stopped.logical_or_(live & stop)
        live.logical_and_(~stop & (written < budget))

    def steps(self, count, width, used, stop_ids, sampling):
        """`count` decode steps. On CUDA they are replays of one graph: no launch overhead, nothing read by the host."""
        if self.device.type != "cuda":
            for _ in range(count):
                self.step(width, used, stop_ids, sampling)
            return
        key = (width, used, tuple(stop_ids.tolist()), *sampling.values())
        if key not in self.graphs:
            saved = [x.clone() for x in self.state]  # the warm-up below is a real step: undo what it does to the rows
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self.step(width, used, stop_ids, sampling)
            torch.cuda.current_stream().wait_stream(side)
            for x, old in zip(self.state, saved):
                x.copy_(old)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool()):
                self.step(width, used, stop_ids, sampling)
            self.graphs[key] = graph, stop_ids  # the graph reads stop_ids: keep it alive
        for _ in range(count):
            self.graphs[key][0].replay()

    def pool(self):
        return next(iter(self.graphs.values()))[0].pool() if self.graphs else None  # all graphs share their scratch memory

    def bucket(self, width, used):
        """On CUDA a graph serves all sizes up to the next step of a coarse ladder; a CPU pays for every row and column."""
        slots = self.cache.slots
        if self.device.type == "cuda":
            width = next(w for w in (slots // 8, slots // 4, slots // 2, slots) if w >= width)
            used = next(u for u in (64, 128, 256, 384, 512, 768, 1024, *range(1536, 1 << 20, 512)) if u >= used)
        return width, min(used, self.columns)

    def run(self, work, finish, stop_ids, sampling, stats, bar):
        """work: list of (trunk, [(request, prompt, budget, uniforms), ...]); finish(request, tokens, logprobs, stopped)."""
        cache, slots = self.cache, self.cache.slots
        stop_ids = torch.tensor(sorted(stop_ids), dtype=torch.long, device=self.device)
        check_every = 8 if self.device.type == "cuda" else 1
        owner, length = [None] * slots, np.zeros(slots, dtype=np.int64)  # the host's view of `length`: an upper bound
        self.live.zero_()
        work, ready = list(work)[::-1], []  # ready: prefilled requests (source row, request, ...) to admit
        while True:
            free = [row for row in range(slots) if owner[row] is None]
            while free and (ready or work):
                if not ready:
                    ready = self.prefill_chunk(work, stats)
                batch = [ready.pop() for _ in range(min(len(free), len(ready)))]
                rows, free = free[: len(batch)], free[len(batch):]
                self.admit(rows, batch)
                for row, (_, request, prompt, *_) in zip(rows, batch):
                    owner[row], length[row] = request, len(prompt) - 1
            rows = [row for row in range(slots) if owner[row] is not None]
            if not rows:
                cache.prefilled = {}
                return
            # Nothing left to admit: move the last live rows into the holes, so that the step shrinks with its rows.
            width = rows[-1] + 1
            if len(rows) < self.bucket(width, 1)[0]:
                holes = [row for row in range(len(rows)) if owner[row] is None]
                movers = rows[len(rows) - len(holes):] if holes else []
                if movers:
                    cache.move(movers, holes, int(length[movers].max()) + 1)
                    for x in self.state:
                        x[holes] = x[movers]
                    for source, target in zip(movers, holes):
                        owner[target], owner[source], length[target] = owner[source], None, length[source]
                    self.live[movers] = False
                width = len(rows)
            width, used = self.bucket(width, int(length[:width].max()) + check_every)
            self.steps(check_every, width, used, stop_ids, sampling)
            length[:width] += check_every
            stats["slot_steps"] += width * check_every
            done = [row for row, live in enumerate(self.live[:width].tolist()) if not live and owner[row] is not None]
            if done:
                self.harvest(done, owner, finish, stats, bar)

    def prefill_chunk(self, work, stats, most_tokens=4096):
        """Prefill the next trunks, up to `most_tokens` padded tokens; returns their requests, last first."""
        trunks, ready, time = [], [], 1
        while work and len(ready) < self.cache.slots:
            trunk, requests = work[-1]
            time = max(time, len(trunk) - 1)
            if trunks and time * (len(trunks) + 1) > most_tokens:
                break
            ready += [(len(trunks), *request) for request in requests]
            trunks.append(trunk[:-1])
            work.pop()
        if max(map(len, trunks)) > 0:
            prefill(self.model, self.cache, trunks)
        stats["tokens_prefilled"] += sum(map(len, trunks))
        return ready[::-1]

    def admit(self, rows, batch):
        sources, _, prompts, budgets, uniforms = zip(*batch)
        time = max(len(p) for p in prompts) - 1
        if time > 0:
            self.cache.admit(rows, list(sources), time)
        put = lambda numbers: torch.tensor(numbers, device=self.device)
        self.token[rows] = put([p[-1] for p in prompts])
        self.length[rows] = put([len(p) - 1 for p in prompts])
        self.budget[rows] = put(budgets)
        self.written[rows] = 0
        self.stopped[rows] = False
        self.live[rows] = True
        self.uniforms[rows, : self.max_new] = torch.from_numpy(np.stack([u() for u in uniforms])).to(self.device)

    def harvest(self, done, owner, finish, stats, bar):
        """Read finished rows back and free their slots."""
        written, stopped = self.written[done].tolist(), self.stopped[done].tolist()
        tokens, logprobs = self.tokens[done].tolist(), self.logprobs[done].tolist()
        for i, row in enumerate(done):
            finish(owner[row], tokens[i][: written[i]], logprobs[i][: written[i]], stopped[i])
            owner[row] = None
        stats["tokens_generated"] += sum(written)
        stats["live_slot_steps"] += sum(written)
        bar.update(len(done))


# The engine of a model outlives a call, for the graphs captured with it and the copy of the weights it decodes with.
ENGINES = weakref.WeakKeyDictionary()


def low_precision_copy(model, dtype):
    """The model, or its one copy in `dtype` with weights brought up to date: the training weights stay float32."""
    if dtype is None or dtype == model.dtype:
        return model
    kept = ENGINES.setdefault(model, {})
    if "copy" not in kept or kept["copy"].dtype != dtype:
        kept["copy"] = copy.deepcopy(model).to(dtype).requires_grad_(False)
    with torch.no_grad():
        torch._foreach_copy_(list(kept["copy"].parameters()), list(model.parameters()))
    return kept["copy"]


def engine_for(model, slots, columns, max_new):
    kept = ENGINES.setdefault(model, {})
    engine = kept.get("engine")
    fits = engine and (engine.cache.slots, engine.device) == (slots, model.device)
    if not (fits and engine.columns >= columns and engine.max_new >= max_new):
        kept["engine"] = None  # let go of the old table before the new one is made
        # the weights keep their place, so a weak reference is enough, and lets the model be freed
        engine = kept["engine"] = Engine(weakref.proxy(model), slots, columns, max_new)
    return engine


def generate(model, prompts, *, n=1, max_new_tokens=256, temperature=1.0, top_p=1.0, top_k=0, stop_ids=None, slots=None,
             seed=None, progress=False, engine="slots", dtype=None, stats=None):
    """Sample responses. Same seed, same machine, same arguments: same output.

    model: a Hugging Face causal LM, left in the mode it came in. prompts: list of token-id lists of any mix of lengths;
    prompts that are prefixes of one another share one forward. n, max_new_tokens: an int, or one a prompt.
    temperature: 0 is greedy. top_p in (0, 1], top_k (0: off) truncate what is sampled, not the log-probs reported.
    stop_ids: token ids that end a response (default: the model's eos). slots: rows decoded at once (default: by free
    memory). dtype: decode with a copy of the weights in this dtype, kept and refreshed a call (bfloat16 on a GPU).
    engine: "slots", or "hf" for model.generate. stats: a dict whose counters are added to: tokens_generated,
    tokens_prefilled, tokens_prompted (a forward a request, unshared), slot_steps, live_slot_steps.

    Returns, for each prompt in order, its n `Rollout`s. Raises ValueError for an empty prompt, a prompt that does not
    fit the model's context with its response, bad settings, no stop token, or a model the engine cannot serve.
    """
    n = [n] * len(prompts) if isinstance(n, int) else list(n)
    budget = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    stop_ids = model.generation_config.eos_token_id if stop_ids is None else stop_ids
    stop_ids = {stop_ids} if isinstance(stop_ids, int) else set(stop_ids or ())
    check_arguments(model, prompts, n, budget, temperature, top_p, top_k, stop_ids, slots)
    stats = {} if stats is None else stats
    for key in ("tokens_generated", "tokens_prefilled", "tokens_prompted", "slot_steps", "live_slot_steps"):
        stats.setdefault(key, 0)
    stats["tokens_prompted"] += sum(len(p) * k for p, k in zip(prompts, n))
    results = [[None] * k for k in n]
    if not sum(n):
        return results
    seed = int(torch.randint(1 << 62, ())) if seed is None else seed
    sampling = dict(temperature=temperature, top_p=top_p, top_k=top_k)
    if engine == "hf":
        return generate_hf(model, prompts, n, budget, stop_ids, seed, sampling, stats, progress)
    if engine != "slots":
        raise ValueError(f'unknown engine {engine!r}: use "slots" or "hf"')

    check_servable(model)
    source, model = model, low_precision_copy(model, dtype)
    first = np.cumsum([0, *n])  # the number of a request is first[prompt] + j: its random numbers depend on nothing else
    longest = max(budget)
    columns = max(len(p) + b for p, b in zip(prompts, budget))
    slots = slots or choose_slots(model, columns, sum(n))

    def finish(request, tokens, logprobs, stopped):
        i, j = request
        results[i][j] = Rollout(prompts[i], tokens, logprobs, stopped)

    def work():  # all that has no result yet
        def uniforms(number):
            return lambda: np.random.Generator(np.random.Philox(key=[seed, number])).random(engine.max_new, np.float32)
        for trunk, family in plan(prompts, n):
            requests = [((i, j), prompts[i], budget[i], uniforms(first[i] + j))
                        for i in family for j in range(n[i]) if results[i][j] is None]
            if requests:
                yield trunk, requests

    with tqdm(total=sum(n), desc="rollouts", unit="rollout", disable=not progress, leave=False) as bar:
        while True:
            engine = None
            try:
                engine = engine_for(model, slots, columns, longest)
                with serving(model, engine.cache):
                    engine.run(work(), finish, stop_ids, sampling, stats, bar)
                break
            except (RuntimeError, MemoryError) as e:
                if not is_out_of_memory(e) or slots == 1:
                    raise
            ENGINES.pop(model, None)  # outside the handler: the traceback would keep the tables alive
            slots //= 2
            warnings.warn(f"out of memory: going on with {slots} slots (pass slots={slots} to start there)", stacklevel=2)
            if model.device.type == "cuda":
                torch.cuda.empty_cache()
    stats["slots"] = slots
    return results


def check_arguments(model, prompts, n, budget, temperature, top_p, top_k, stop_ids, slots):
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for i, (prompt, k, new) in enumerate(zip(prompts, n, budget)):
        if len(prompt) == 0:
            raise ValueError(f"prompt {i} is empty: give it at least one token (a BOS token, say)")
        if new < 1 or k < 0:
            raise ValueError(f"prompt {i}: max_new_tokens={new} must be at least 1 and n={k} at least 0")
        if limit and len(prompt) + new > limit:
            raise ValueError(f"prompt {i} is {len(prompt)} tokens: with max_new_tokens={new} it passes the model's "
                             f"{limit} positions; shorten one of them")
    if temperature < 0 or not 0 < top_p <= 1 or top_k < 0 or (slots is not None and slots < 1):
        raise ValueError(f"temperature={temperature}, top_p={top_p}, top_k={top_k}, slots={slots}: need temperature >= 0, "
                         "0 < top_p <= 1, top_k >= 0 and slots >= 1")
    if not stop_ids:
        raise ValueError("no stop token: pass stop_ids, or set eos_token_id in the model's generation_config")


@torch.no_grad()
def generate_hf(model, prompts, n, budget, stop_ids, seed, sampling, stats, progress, batch=32):
    """The same through model.generate: left-padded batches, for any architecture. Slow, and simple enough to trust."""
    requests = sorted(((i, j) for i in range(len(prompts)) for j in range(n[i])), key=lambda r: -len(prompts[r[0]]))
    results, training = [[None] * k for k in n], model.training
    settings = dict(do_sample=False) if sampling["temperature"] == 0 else dict(do_sample=True, **sampling)
    stops, pad = sorted(stop_ids), min(stop_ids)
    model.eval()
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []), \
            tqdm(total=len(requests), desc="rollouts", disable=not progress, leave=False) as bar:
        torch.manual_seed(seed % (1 << 62))
        for start in range(0, len(requests), batch):
            part = requests[start : start + batch]
            time = max(len(prompts[i]) for i, _ in part)
            tokens = torch.tensor([[pad] * (time - len(prompts[i])) + prompts[i] for i, _ in part], device=model.device)
            mask = torch.tensor([[0] * (time - len(prompts[i])) + [1] * len(prompts[i]) for i, _ in part], device=model.device)
            out = model.generate(input_ids=tokens, attention_mask=mask, max_new_tokens=max(budget[i] for i, _ in part),
                                 eos_token_id=stops, pad_token_id=pad, use_cache=True, **settings)[:, time:].tolist()
            for (i, j), row in zip(part, out):
                end = next((t + 1 for t, token in enumerate(row) if token in stop_ids), len(row))
                response = row[: min(end, budget[i])]
                # Scored in a pass of its own: the logits generate could return are (rows, time, vocabulary).
                logits = model(torch.tensor([prompts[i] + response], device=model.device)).logits[0, len(prompts[i]) - 1 : -1]
                logits = logits.float() / (sampling["temperature"] or 1.0)
                logprobs = logits.log_softmax(-1).gather(1, torch.tensor(response, device=model.device)[:, None])[:, 0]
                results[i][j] = Rollout(prompts[i], response, logprobs.tolist(), response[-1] in stop_ids)
                stats["tokens_generated"] += len(response)
                stats["tokens_prefilled"] += len(prompts[i])
            bar.update(len(part))
    model.train(training)
    return results
