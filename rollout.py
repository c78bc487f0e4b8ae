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

2. A PROMPT IS COMPUTED ONCE. One forward computes the keys of prompt[:-1], and they are copied to the n slots that need
   them; the last prompt token is simply the first that each row decodes. A prompt that is a prefix of another one
   (VinePPO's states along one response) needs no forward at all: attention is causal, so its keys are the first columns
   of the longer one's.

3. RANDOM NUMBERS BELONG TO THE REQUEST, not to the slot: request r draws its uniforms from Philox(seed, r). What is
   sampled does not depend on the number of slots or on what else is in the batch (but for float rounding), and the
   decode step itself draws nothing, so a CUDA graph can replay it.

No model is rewritten. Hugging Face models call the attention function registered under the configured name and the
`Cache` they are handed; both are ours (`attention`, `SlotCache`). A model they do not fit is found by a probe before
any work and refused by name; `engine="hf"` serves it through `model.generate`, slower, with the same result.
"""

import argparse
import bisect
import contextlib
import copy
import functools
import itertools
import logging
import sys
import warnings
import weakref
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.benchmark import Timer
from tqdm import tqdm
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.cache_utils import Cache

log = logging.getLogger(__name__)


@dataclass
class Rollout:
    prompt: list[int]      # token ids the model read
    response: list[int]    # token ids it wrote, its stop token included when `finished`
    logprobs: list[float]  # log pi(token | prefix) of softmax(logits / temperature), before top-p or top-k truncation
    finished: bool         # ended by a stop token (False: ran into max_new_tokens)


# ---------------------------------------------------------------------------- sampling: one token a row from the logits


def top_k_top_p(probs, top_k, top_p):
    """Zero the probabilities outside the top-k tokens, then outside the nucleus (Holtzman et al. 2020, section 3.1),
    the fewest most likely tokens whose share reaches top_p. probs: (rows, vocab) -> same, unnormalized.

    Sorting a large vocabulary is the slow way to a nucleus. It is {probs >= t} for the largest t whose mass reaches
    top_p, and bisection finds t with no sort; tokens tied with the last one (to 1 part in 50,000) are all kept."""
    if 0 < top_k < probs.shape[-1]:
        probs = probs * (probs >= probs.topk(top_k, dim=-1).values[:, -1:])
    if top_p < 1:
        total = probs.sum(-1, keepdim=True)
        # Tokens below (1 - top_p) / vocab, all together, miss less than 1 - top_p. mass(low) >= top_p, always.
        low, high = total * ((1 - top_p) / 2 / probs.shape[-1]), probs.amax(-1, keepdim=True)
        for _ in range(20):
            middle = (low * high).sqrt()
            enough = (probs * (probs >= middle)).sum(-1, keepdim=True) >= top_p * total
            low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
        probs = probs * (probs >= low)
    return probs


def sample(logits, uniform, *, temperature, top_p, top_k):
    """logits: (rows, vocab), uniform: (rows,) in [0, 1) -> tokens (rows,), log-probs (rows,) before truncation."""
    if temperature not in (0, 1):
        logits = logits.float() / temperature
    probs = logits.softmax(-1, dtype=torch.float32)  # (rows, vocab)
    if temperature == 0:
        token = logits.argmax(-1, keepdim=True)
    else:
        cdf = top_k_top_p(probs, top_k, top_p).cumsum(-1)
        # Inverse of the cumulative distribution: the first token whose cdf exceeds u. `right=True` steps over tokens of
        # probability 0; the factor keeps u * total below total in float32, else the last token could be drawn at p = 0.
        token = torch.searchsorted(cdf, (uniform * (1 - 1e-6))[:, None] * cdf[:, -1:], right=True)
        token.clamp_(max=probs.shape[1] - 1)  # NaN ends up past the end; `harvest` names it, an index error would not
    return token[:, 0], probs.gather(1, token)[:, 0].log()


# ---------------------------------------------------------------------------- the cache and the attention that reads it


class SlotCache(Cache):
    """Keys and values of every slot, each row at its own length; tensors of (slots, kv_heads, columns, head_dim), one a
    layer, allocated once. Unlike the usual cache `update` does not append: it writes row i at column position[i].
    In a prefill it only collects what a forward over whole prompts produced."""

    def __init__(self, slots, columns):
        super().__init__(layers=[])  # the parent's layers stay unused
        self.slots, self.columns = slots, columns
        self.tables = {}     # layer -> keys, values: each (slots, kv_heads, columns, head_dim)
        self.prefilled = {}  # layer -> keys, values of the last prefill: each (prompts, kv_heads, time, head_dim)
        self.biases = {}     # sliding window (or None) -> additive mask of this forward

    def begin(self, position, used, prefill=False):
        """Start a forward. position: of each query, (rows,) in a decode step, one query a row; (time,) in a prefill.
        used: how many columns the attention reads, at least max(position) + 1."""
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
        if layer not in self.tables:  # zeros, not empty: a stale NaN times an attention weight of 0 would be NaN
            self.tables[layer] = [x.new_zeros(self.slots, x.shape[1], self.columns, x.shape[3]) for x in like]
        return self.tables[layer]

    def admit(self, rows, sources, time):
        """Copy the first `time` columns of the prefilled prompts `sources` into the slots `rows`. A row whose prompt is
        shorter gets columns too many: stale, masked by its length, overwritten one by one."""
        for layer, prompts in self.prefilled.items():
            for table, new in zip(self.table(layer, *prompts), prompts):
                table[rows, :, :time] = new[sources, :, :time]

    def bias(self, window, dtype):
        """0 where a query may look, (position - window, position], -inf elsewhere; made once a forward for all layers.
        (rows, 1, 1, used) in a decode step, (time, time) in a prefill."""
        if window not in self.biases:
            column, position = torch.arange(self.used, device=self.position.device), self.position[:, None]
            hidden = column > position if window is None else (column > position) | (column <= position - window)
            bias = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))
            self.biases[window] = bias if self.prefill else bias[:, None, None]
        return self.biases[window]

    def get_seq_length(self, layer_idx=0):
        return 0  # positions are always passed explicitly


ACTIVE: SlotCache | None = None  # the cache of the forward under way: models show it to `update`, not to attention


def attention(module, query, key, value, attention_mask, scaling=None, sliding_window=None, softcap=None, **kwargs):
    """Registered with transformers as "slots". query: (batch, heads, time, head_dim); key, value: (batch, kv_heads,
    columns, head_dim) -> (batch, time, heads, head_dim). Causal in a prefill; by each row's length in a decode step."""
    if kwargs.get("s_aux") is not None or kwargs.get("position_bias") is not None:
        raise ValueError("attention sinks or a position bias")
    batch, heads, time, dim = query.shape
    group, scale = heads // key.shape[1], dim**-0.5 if scaling is None else scaling
    if ACTIVE.prefill:  # rows are padded on the right, where causal attention never looks
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    else:  # one query a row: the heads that share a key head become its "time", and no key is repeated
        query = query.reshape(batch, -1, group, dim)
    causal = ACTIVE.prefill and softcap is None and (sliding_window is None or sliding_window >= time)
    bias = None if causal else ACTIVE.bias(sliding_window, query.dtype)
    if softcap is None and (query.is_cuda or ACTIVE.prefill):
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, is_causal=causal, scale=scale)
    else:  # written out: needed for the soft cap of Gemma 2, and no slower than the fused kernel for one query on a CPU
        scores = (query * scale) @ key.transpose(2, 3)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        out = (scores + bias).softmax(-1, dtype=torch.float32).to(value.dtype) @ value
    return out.reshape(batch, heads, time, -1).transpose(1, 2), None


AttentionInterface.register("slots", attention)  # no mask function has that name, so models build no mask of their own


@contextlib.contextmanager
def serving(model, cache=None):
    """Inside: eval mode, no autograd, and, given a cache, our attention over it. Then all is put back as it was."""
    global ACTIVE
    outer, implementation, generation_config = ACTIVE, model.config._attn_implementation, model.generation_config
    modes = [(module, module.training) for module in model.modules()]
    try:
        ACTIVE = cache
        model.eval()
        if cache is not None:
            model.set_attn_implementation("slots")
        with torch.inference_mode():
            yield
    finally:
        ACTIVE, model.generation_config = outer, generation_config
        model.set_attn_implementation(implementation)
        for module, training in modes:
            module.training = training


def prefill(model, cache, prompts):
    """One forward over right-padded prompts; their keys and values are left in `cache.prefilled`."""
    time = max(len(p) for p in prompts)
    tokens = torch.tensor([p + [0] * (time - len(p)) for p in prompts], device=model.device)  # (prompts, time)
    cache.begin(torch.arange(time, device=model.device), time, prefill=True)
    # The backbone alone: nobody reads the logits of a prompt.
    model.base_model(input_ids=tokens, position_ids=cache.position[None], past_key_values=cache, use_cache=True)


def decode(model, cache, tokens):
    """A decode step's forward, at the positions given to `cache.begin`. tokens: (rows, 1) -> logits (rows, vocab)."""
    positions = cache.position[:, None]
    return model(input_ids=tokens, position_ids=positions, past_key_values=cache, use_cache=True).logits[:, 0]


SERVABLE = weakref.WeakSet()  # models that passed `check_servable`


def check_servable(model, T=8):
    """Raise ValueError, naming the architecture, unless the slot engine computes what the model computes: flags first,
    then two short rows of different lengths, decoded through the cache, beside a plain forward."""
    if model in SERVABLE:
        return
    config, cache, got = model.config.get_text_config(), SlotCache(2, T), []
    tokens = torch.randint(config.vocab_size, (2, T), generator=torch.Generator().manual_seed(0)).to(model.device)
    try:
        if config.is_encoder_decoder or getattr(model, "_is_stateful", False) or not model._supports_attention_backend:
            raise ValueError("no decoder-only attention with a KV cache")
        if strange := set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}:
            raise ValueError(f"layers of {' and '.join(sorted(strange))}")
        with serving(model):
            expected = model(input_ids=tokens, use_cache=False).logits.float()  # (2, T, vocab)
        with serving(model, cache):
            prefill(model, cache, [tokens[0, :2].tolist(), tokens[1, :5].tolist()])
            cache.admit([0, 1], [0, 1], 5)
            for position in torch.tensor([[2, 5], [3, 6], [4, 7]], device=model.device):
                cache.begin(position, T)
                got.append(decode(model, cache, tokens.gather(1, position[:, None])).float())
        expected = torch.stack([expected[0, 2:5], expected[1, 5:8]])  # (2, 3, vocab)
        error, scale = (torch.stack(got, 1) - expected).abs().max().item(), expected.abs().max().item()
        if not error <= scale * (1e-3 if model.dtype == torch.float32 else 0.1):
            raise ValueError(f"its logits differ by {error:.2g} of {scale:.2g}")
    except torch.OutOfMemoryError:
        raise
    except Exception as e:  # whatever a model that does not fit may raise
        reason = " ".join(str(e).split())[:200]
        raise ValueError(f"{model.__class__.__name__} cannot be served by the slot engine ({reason}): "
                         'pass engine="hf" (--engine hf) to generate through model.generate') from e
    SERVABLE.add(model)


def plan(prompts, n):
    """Order the work. Returns a list of (trunk, [prompt index, ...]): a trunk is a prompt that extends all the prompts
    listed with it, so that one forward over it serves them all.

    In lexicographic order everything that extends p follows p directly, so p is a prefix of some other prompt exactly
    when it is a prefix of its successor. Long trunks go first: a long prompt tends to a long response, so the long work
    is under way early, and rows of like length share the cache. Within a trunk the shortest prompt goes first: it has
    the longest way to go."""
    families = []
    for i in sorted((i for i in range(len(prompts)) if n[i] > 0), key=lambda i: prompts[i], reverse=True):
        if families and prompts[families[-1][0]][: len(prompts[i])] == prompts[i]:
            families[-1].append(i)
        else:
            families.append([i])
    families.sort(key=lambda family: -len(prompts[family[0]]))
    return [(prompts[family[0]], family[::-1]) for family in families]


def choose_slots(model, columns, requests):
    """As many slots as half the free memory holds, up to where more stop paying (measured, `python rollout.py`)."""
    config, most, free = model.config.get_text_config(), 256, float("inf")
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    row = 2 * config.num_hidden_layers * kv_heads * head_dim * columns * model.dtype.itemsize  # bytes of the cache
    row += 16 * config.vocab_size  # and of the logits and what becomes of them
    if model.device.type == "cuda":
        most, free = 512, torch.cuda.mem_get_info(model.device)[0]
        free += torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
    else:
        with contextlib.suppress(OSError, StopIteration), open("/proc/meminfo") as f:  # elsewhere nobody says
            free = 1024 * int(next(line for line in f if line.startswith("MemAvailable")).split()[1])
    if kept := ENGINES.get(model):  # what the kept engine holds is ours to use again
        free += sum(table.nbytes for table in itertools.chain(*kept.cache.tables.values()))
    slots = max(1, int(min(most, requests, free / 2 / row)))
    log.info("%d slots of %d columns (%.1f MiB each) for %d requests", slots, columns, row / 2**20, requests)
    return slots


# ----------------------------------------------------------------------------------------------------------- the engine


class Engine:
    """The state of the decode loop: one row a slot, on the device, updated in place (a CUDA graph needs that)."""

    def __init__(self, model, place, slots, columns, max_new):
        self.model = weakref.proxy(model)  # else the model could never be freed: ENGINES is keyed by it
        self.place, self.device = place, model.device
        self.columns, self.max_new, self.cache = columns, max_new, SlotCache(slots, columns)
        zeros = functools.partial(torch.zeros, device=model.device)
        # The row's last token, not in the cache yet; its position (= columns filled; 0 in a free slot); response tokens
        # so far, and allowed. Then: still decoding; ended by a stop token.
        self.token, self.length, self.written, self.budget = zeros(4, slots, dtype=torch.long)
        self.live, self.stopped = zeros(2, slots, dtype=torch.bool)
        # One column more than max_new: a row that is done goes on writing there until somebody looks.
        self.tokens = zeros(slots, max_new + 1, dtype=torch.long)
        self.logprobs, self.uniforms = zeros(2, slots, max_new + 1)
        self.state = (self.token, self.length, self.written, self.budget, self.live, self.stopped,
                      self.tokens, self.logprobs, self.uniforms)
        # Sizes of a step. A CPU pays for every row and column; on CUDA one graph serves all up to the next of a few.
        self.widths, self.depths, self.check_every = range(slots + 1), range(columns + 1), 1
        if self.device.type == "cuda":
            self.widths, self.check_every = (slots // 8, slots // 4, slots // 2, slots), 8
            self.depths = (*(d for d in (64, 128, 256, 384, 512, *range(768, columns, 256)) if d < columns), columns)
            self.graphs, self.pool = {}, torch.cuda.graph_pool_handle()  # the graphs share their scratch memory

    def step(self, width, used, stop_ids, sampling):
        """Decode one token in the first `width` slots, reading the first `used` columns of the cache."""
        token, length, written, budget, live, stopped, tokens, logprobs, uniforms = (x[:width] for x in self.state)
        self.cache.begin(length, used)
        logits = decode(self.model, self.cache, token[:, None])
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

    def steps(self, width, used, stop_ids, sampling):
        """A few decode steps. On CUDA they are replays of one graph: no launch overhead, and the host never waits."""
        step = functools.partial(self.step, width, used, stop_ids, sampling)
        if self.device.type == "cuda":
            key = (width, used, *stop_ids.tolist(), *sampling.values())
            if key not in self.graphs:
                saved = [x.clone() for x in self.state]
                step()  # warms up; a real step, so undo what it did to the rows (the keys that it wrote are right)
                for x, old in zip(self.state, saved):
                    x.copy_(old)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=self.pool):
                    step()
                self.graphs[key] = graph, stop_ids  # which the graph reads where they lie
            step = self.graphs[key][0].replay
        for _ in range(self.check_every):
            step()

    def run(self, work, finish, slots, stop_ids, seed, sampling, stats):
        """Serve `work`, a list of (trunk, [(request, number, prompt, budget), ...]), in the first `slots` slots. A
        request draws the random numbers of its number; finish(request, tokens, logprobs, stopped) takes its result."""
        stop_ids = torch.tensor(sorted(stop_ids), device=self.device)
        self.owner, self.filled = [None] * slots, np.zeros(slots, dtype=int)  # filled: `length`, or more, on the host
        fit = lambda sizes, size: sizes[bisect.bisect_left(sizes, min(size, sizes[-1]))]
        work, ready, done = work[::-1], [], True  # ready: prefilled requests (source row, request, ...), last first
        while True:
            if done:
                free = [row for row in range(slots) if self.owner[row] is None]
                while free and (ready or work):
                    ready = ready or self.prefill_chunk(work, stats)
                    count = min(len(free), len(ready))
                    self.admit(free[:count], [ready.pop() for _ in range(count)], seed)
                    free = free[count:]
                busy = [row for row in range(slots) if self.owner[row] is not None]
                if not busy:
                    self.cache.prefilled = {}
                    return
                if fit(self.widths, len(busy)) < fit(self.widths, busy[-1] + 1):
                    busy = self.compact(busy)
                width = fit(self.widths, busy[-1] + 1)
            used = fit(self.depths, self.filled[busy].max() + self.check_every)
            self.steps(width, used, stop_ids, sampling)
            self.filled[busy] += self.check_every
            stats["steps"] += self.check_every
            stats["slot_steps"] += width * self.check_every
            live = self.live.tolist()
            if done := [row for row in busy if not live[row]]:
                self.harvest(done, finish)

    def prefill_chunk(self, work, stats, most_tokens=4096):
        """Prefill the next trunks, up to `most_tokens` padded tokens; returns their requests, last first."""
        trunks, ready = [], []
        while work and len(ready) < self.cache.slots:
            if trunks and (len(trunks) + 1) * max(len(trunks[0]), len(work[-1][0])) > most_tokens:  # longest come first
                break
            trunk, requests = work.pop()
            ready += [(len(trunks), *request) for request in requests]
            trunks.append(trunk[:-1])
        if any(trunks):
            prefill(self.model, self.cache, trunks)
        stats["tokens_prefilled"] += sum(map(len, trunks))
        return ready[::-1]

    def admit(self, rows, batch, seed):
        """Hand the free slots `rows` to as many prefilled requests."""
        sources, requests, numbers, prompts, budgets = zip(*batch)
        lengths = [len(p) - 1 for p in prompts]
        if max(lengths) > 0:
            self.cache.admit(rows, list(sources), max(lengths))
        put = functools.partial(torch.as_tensor, device=self.device)
        streams = (np.random.Generator(np.random.Philox(key=[seed, number])) for number in numbers)
        self.uniforms[rows, : self.max_new] = put(np.stack([s.random(self.max_new, np.float32) for s in streams]))
        self.token[rows], self.length[rows] = put([p[-1] for p in prompts]), put(lengths)
        self.budget[rows], self.written[rows] = put(budgets), 0
        self.stopped[rows], self.live[rows], self.filled[rows] = False, True, lengths
        for row, request in zip(rows, requests):
            self.owner[row] = request

    def compact(self, busy):
        """Nothing is left to admit: move the last busy rows into the holes, so that the step shrinks with its rows."""
        holes = [row for row in range(len(busy)) if self.owner[row] is None]
        movers = busy[len(busy) - len(holes) :]
        used = self.filled[movers].max()
        for table in itertools.chain(*self.cache.tables.values()):
            table[holes, :, :used] = table[movers, :, :used]
        for x in self.state:
            x[holes] = x[movers]
        for source, target in zip(movers, holes):
            self.owner[target], self.owner[source], self.filled[target] = self.owner[source], None, self.filled[source]
        self.live[movers], self.length[movers] = False, 0
        return list(range(len(busy)))

    def harvest(self, done, finish):
        """Read finished rows back and free their slots."""
        written, stopped = self.written[done].tolist(), self.stopped[done].tolist()
        tokens, logprobs = self.tokens[done, : max(written)].tolist(), self.logprobs[done, : max(written)].tolist()
        for i, row in enumerate(done):
            if np.isnan(logprobs[i][: written[i]]).any():
                raise ValueError("the model's logits are not finite: has training diverged? Go back to a checkpoint")
            finish(self.owner[row], tokens[i][: written[i]], logprobs[i][: written[i]], stopped[i])
            self.owner[row] = None
        # A free slot among busy ones decodes on. At length 0 it sees its own column; left behind a sliding window that
        # has passed `used` it would see none, and write NaN into the table.
        self.length[done] = 0


# An engine outlives a call, for the graphs captured with it; so does the copy of the weights in another dtype. Both go
# with their model. ENGINES.pop(model, None) gives the memory of the cache back earlier.
ENGINES, COPIES = weakref.WeakKeyDictionary(), weakref.WeakKeyDictionary()


@torch.inference_mode()
def low_precision_copy(model, dtype):
    """The model, or its one copy in `dtype` with weights brought up to date: the training weights stay float32."""
    if dtype in (None, model.dtype):
        return model
    twin = COPIES.get(model)
    if twin is None or (twin.dtype, twin.device) != (dtype, model.device):
        twin = COPIES[model] = copy.deepcopy(model).requires_grad_(False)
        for p in twin.parameters():  # not twin.to(dtype): the frequencies of rotary embeddings must stay float32
            p.data = p.data.to(dtype)
    torch._foreach_copy_(list(twin.parameters()), list(model.parameters()))
    return twin


def generate(model, prompts, *, n=1, max_new_tokens=256, temperature=1.0, top_p=1.0, top_k=0, stop_ids=None, slots=None,
             seed=None, progress=False, engine="slots", dtype=None, stats=None):
    """Sample responses. Same seed, same machine, same arguments: same output.

    model: a Hugging Face causal LM, left in the mode it came in. prompts: list of token-id lists of any mix of lengths;
    prompts that are prefixes of one another share one forward. n, max_new_tokens: an int, or one a prompt.
    temperature: 0 is greedy. top_p in (0, 1], top_k (0: off) truncate what is sampled, not the log-probs reported.
    stop_ids: token ids that end a response (default: the model's eos). slots: rows decoded at once (default: by free
    memory). dtype: decode with a copy of the weights in this dtype, kept and refreshed a call (bfloat16 on a GPU).
    engine: "slots", or "hf" for model.generate. stats: a dict whose counters are added to: tokens_generated,
    tokens_prefilled, tokens_prompted (a forward a request, unshared), steps, slot_steps, live_slot_steps; and slots.

    Returns, for each prompt in order, its n `Rollout`s. Raises ValueError for an empty prompt, a prompt that does not
    fit the model's context with its response, bad settings, no stop token, or a model the engine cannot serve.
    """
    n, budget = ([x] * len(prompts) if np.ndim(x) == 0 else list(x) for x in (n, max_new_tokens))
    stop_ids = model.generation_config.eos_token_id if stop_ids is None else stop_ids
    stop_ids = {stop_ids} if isinstance(stop_ids, int) else set(stop_ids or ())
    check_arguments(model, prompts, n, budget, temperature, top_p, top_k, stop_ids, slots, engine)
    seed = (int(torch.randint(1 << 62, ())) if seed is None else seed) % (1 << 62)
    sampling = dict(temperature=temperature, top_p=top_p, top_k=top_k)
    stats = {} if stats is None else stats
    for key in ("tokens_generated", "tokens_prefilled", "tokens_prompted", "steps", "slot_steps", "live_slot_steps"):
        stats.setdefault(key, 0)
    stats["tokens_prompted"] += sum(len(p) * k for p, k in zip(prompts, n))
    results = [[None] * k for k in n]
    if not sum(n):
        return results

    def finish(request, tokens, logprobs, stopped):
        i, j = request
        results[i][j] = Rollout(prompts[i], tokens, logprobs, stopped)
        stats["tokens_generated"] += len(tokens)
        stats["live_slot_steps"] += len(tokens)
        bar.update()

    if engine == "slots":
        check_servable(model)
    model = low_precision_copy(model, dtype)
    with tqdm(total=sum(n), desc="rollouts", unit="rollout", disable=not progress, leave=False) as bar:
        if engine == "slots":
            slots = generate_slots(model, prompts, n, budget, results, finish, slots, stop_ids, seed, sampling, stats)
        else:
            slots = generate_hf(model, prompts, n, budget, finish, stop_ids, seed, sampling, stats)
    stats["slots"] = slots
    return results


def check_arguments(model, prompts, n, budget, temperature, top_p, top_k, stop_ids, slots, engine):
    if not len(prompts) == len(n) == len(budget):
        raise ValueError(f"{len(prompts)} prompts, {len(n)} n, {len(budget)} max_new_tokens: give one, or one a prompt")
    config, vocab = model.config.get_text_config(), model.get_input_embeddings().num_embeddings
    limit, rope = getattr(config, "max_position_embeddings", None), getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":  # beyond this, the longest row would change the frequencies of all rows
        limit = rope.get("original_max_position_embeddings", limit)
    for i, (prompt, k, new) in enumerate(zip(prompts, n, budget)):
        if len(prompt) == 0:
            raise ValueError(f"prompt {i} is empty: give it at least one token (a BOS token, say)")
        if not 0 <= min(prompt) <= max(prompt) < vocab:
            raise ValueError(f"prompt {i} has token ids from {min(prompt)} to {max(prompt)}, the model only 0 to "
                             f"{vocab - 1}: encode it with the model's own tokenizer")
        if new < 1 or k < 0:
            raise ValueError(f"prompt {i}: max_new_tokens={new} must be at least 1 and n={k} at least 0")
        if limit and len(prompt) + new > limit:
            raise ValueError(f"prompt {i} is {len(prompt)} tokens: with max_new_tokens={new} it passes the model's "
                             f"{limit} positions; shorten one of them")
    if not (temperature >= 0 and 0 < top_p <= 1 and top_k >= 0 and (slots is None or slots >= 1)):
        raise ValueError(f"temperature={temperature}, top_p={top_p}, top_k={top_k}, slots={slots}: need temperature >= "
                         "0, 0 < top_p <= 1, top_k >= 0 and slots >= 1")
    if not stop_ids:
        raise ValueError("no stop token: pass stop_ids, or set eos_token_id in the model's generation_config")
    if engine not in ("slots", "hf"):
        raise ValueError(f'unknown engine {engine!r}: use "slots" or "hf"')


def generate_slots(model, prompts, n, budget, results, finish, slots, stop_ids, seed, sampling, stats):
    """Find or make the model's engine and run it, with half the slots when memory runs out. Returns the slots used."""
    first = np.cumsum([0, *n])  # request j of prompt i is number first[i] + j: its random numbers depend on that alone
    max_new, columns = max(budget), max(len(p) + b for p, b in zip(prompts, budget))
    columns = -(-columns // 64) * 64  # few sizes of table, so that the next call finds one that fits
    slots = slots or choose_slots(model, columns, sum(n))
    place = (model.device, model.dtype, *(p.data_ptr() for p in model.parameters()))  # where a graph reads the weights
    while True:
        missing = [sum(r is None for r in group) for group in results]
        work = [(trunk, [((i, j), first[i] + j, prompts[i], budget[i])
                         for i in family for j in range(n[i]) if results[i][j] is None])
                for trunk, family in plan(prompts, missing)]
        try:
            kept = ENGINES.get(model)
            if not (kept and kept.place == place and kept.cache.slots >= slots and kept.columns >= columns
                    and kept.max_new >= max_new):
                kept = ENGINES.pop(model, None) and None  # let go of the old table before the new one is made
                kept = ENGINES[model] = Engine(model, place, slots, columns, max_new)
            with serving(model, kept.cache):
                kept.run(work, finish, slots, stop_ids, seed, sampling, stats)
            return slots
        except BaseException as e:
            ENGINES.pop(model, None)  # whatever it was in the middle of
            full = isinstance(e, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(e)
            if not full or slots == 1:
                raise
        kept, slots = None, slots // 2  # outside the handler: the traceback would keep the tables alive
        warnings.warn(f"out of memory: going on with {slots} slots (pass slots={slots} to start there)", stacklevel=3)
        if model.device.type == "cuda":
            torch.cuda.empty_cache()


def generate_hf(model, prompts, n, budget, finish, stop_ids, seed, sampling, stats, batch=32):
    """The same through model.generate, for any architecture: slow, and simple enough to trust. Prompts of one length at
    a time, so that nothing is padded."""
    alike = lambda request: (-len(prompts[request[0]]), budget[request[0]])
    requests = sorted(((i, j) for i in range(len(prompts)) for j in range(n[i])), key=alike)
    with serving(model), torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        # A bare configuration: the model's own may hold a repetition penalty, say, and would not sample from the model.
        settings = sampling | dict(do_sample=True) if sampling["temperature"] else dict(do_sample=False)
        model.generation_config = GenerationConfig(eos_token_id=sorted(stop_ids), pad_token_id=0, **settings)
        for (_, new), group in itertools.groupby(requests, key=alike):
            for part in iter(lambda: list(itertools.islice(group, batch)), []):
                tokens = torch.tensor([prompts[i] for i, _ in part], device=model.device)
                out = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new)
                stats["tokens_prefilled"] += tokens.numel()
                for (i, j), row in zip(part, out.tolist()):
                    start = len(prompts[i])
                    end = next((t + 1 for t in range(start, len(row)) if row[t] in stop_ids), len(row))
                    # Scored in a pass of its own: the logits generate could return are (rows, time, vocabulary).
                    text = torch.tensor([row[:end]], device=model.device)
                    logits = model(text).logits[0, start - 1 : -1].float() / (sampling["temperature"] or 1.0)
                    logprobs = logits.log_softmax(-1).gather(1, text[0, start:, None])[:, 0].tolist()
                    finish((i, j), row[start:end], logprobs, row[end - 1] in stop_ids)
    return min(batch, len(requests))


# ------------------------------------------------------------------------------------- the benchmark: python rollout.py

SHAPE = "model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
SIZES = {"tiny": ("llama", 112, 128, 384, 4, 4, 4), "135m": ("llama", 49152, 576, 1536, 30, 9, 3),  # SmolLM-135M
         "0.5b": ("qwen2", 151936, 896, 4864, 24, 14, 2), "1b": ("llama", 32000, 2048, 5632, 22, 32, 4)}  # Qwen2.5, Rho


def by_generate(model, prompts, lengths, batch):
    """model.generate: a batch takes as many steps as its longest row. Returns slot-steps, and the tokens prefilled."""
    slot_steps = 0
    for start in range(0, len(prompts), batch):
        stop = torch.tensor(lengths[start : start + batch], device=model.device)
        rows = [torch.tensor(p, device=model.device) for p in prompts[start : start + batch]]
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")
        steps, time = stop.max().item(), tokens.shape[1]
        model.generate(tokens, attention_mask=(tokens > 0).long(), max_new_tokens=steps,
                       stopping_criteria=[lambda ids, scores, **_: ids.shape[1] - time >= stop])
        slot_steps += steps * len(rows)
    return slot_steps, sum(map(len, prompts))


def by_generate_batch(model, prompts, lengths):
    """transformers' continuous batching; through its manager, since generate_batch takes one length for all."""
    from transformers import ContinuousBatchingConfig  # young: not in every version, nor always in the same shape
    config = ContinuousBatchingConfig()
    if model.device.type != "cuda":  # left to itself it fills the memory, which takes longer than the work
        pages = sum((len(p) + k) // 32 + 1 for p, k in zip(prompts, lengths))
        config = ContinuousBatchingConfig(page_size=32, num_blocks=pages, max_batch_tokens=512)
    with model.continuous_batching_context_manager(continuous_batching_config=config) as manager:
        left = {manager.add_request(p, max_new_tokens=k, eos_token_id=-1) for p, k in zip(prompts, lengths)}
        while left and (result := manager.get_result(timeout=60)):
            left -= {result.request_id} if result.is_finished() else set()
    if left:
        raise RuntimeError("it stopped answering")
    return float("nan"), float("nan")  # it does not say


def peak_memory(device, reset=False):
    """Bytes since the last reset: allocated on the GPU, or resident in this process (where the system is Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats() if reset else None
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5") if reset else None
        return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    return float("nan")


def bandwidth(model, prompts, lengths, steps, seconds, size=1 << 30):
    """Bytes a second that the decode steps had to read: all weights a step, and of the cache each row's own columns.
    Beside it, what a copy in this card's memory reads and writes."""
    weights, cache = sum(p.nbytes for p in model.parameters()), ENGINES[model].cache
    if not model.config.tie_word_embeddings:
        weights -= model.get_input_embeddings().weight.nbytes  # looked up, not read
    column = sum(x.nbytes for x in itertools.chain(*cache.tables.values())) / cache.slots / cache.columns
    columns = sum(k * (len(p) + (k - 1) / 2) for p, k in zip(prompts, lengths))
    source, target = torch.empty(2, size, dtype=torch.uint8, device=model.device)
    copying = Timer("target.copy_(source)", globals=dict(target=target, source=source)).timeit(20).mean
    return (weights * steps + column * columns) / seconds, 2 * size / copying


def benchmark(args):
    """Print a table: the contenders take turns at the same prompts and lengths, on the same model."""
    if args.model in SIZES:  # random weights: speed does not depend on them
        shape = dict(zip(SHAPE.split(), SIZES[args.model]), tie_word_embeddings=args.model in ("135m", "0.5b"))
        config = AutoConfig.for_model(**shape, max_position_embeddings=4096)
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype))
    elif Path(args.model).is_dir():
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    else:
        raise ValueError(f"--model {args.model} is neither a folder nor a size: {', '.join(SIZES)}")
    model.to(args.device).eval()
    # Nobody may stop early: lengths are drawn beforehand.
    model.generation_config = GenerationConfig(do_sample=True, top_k=0, pad_token_id=0, eos_token_id=1 << 40)
    rng, new, rivals = np.random.default_rng(0), args.max_new_tokens, args.rivals.split(",")
    draw = lambda k: rng.integers(1, model.config.vocab_size, k).tolist()
    prompts, left = [draw(k) for k in rng.integers(8, 40, args.prompts)], [1]
    if args.prefixes:  # the later the state, the less there is left to write
        prompts, rivals = [p + r[: new * s // 8] for p in prompts for r in [draw(new)] for s in range(8)], []
        left = np.tile(np.repeat(1 - np.arange(8) / 8, args.n), args.prompts)
    prompts = [p for p in prompts for _ in range(args.n)]
    lengths = np.ceil(left * np.minimum(rng.geometric(min(1, 3 / new), len(prompts)), new)).astype(int).tolist()
    stats, total, shared = {}, sum(lengths), plan
    print(f"{args.model} {args.dtype} {args.device}: {len(prompts)} responses, mean {np.mean(lengths):.0f} tokens")

    def ours(plan=shared):
        globals()["plan"] = plan
        stats.clear()
        generate(model, prompts, max_new_tokens=lengths, stop_ids=[1 << 40], slots=args.slots, seed=0, stats=stats)
        return stats["slot_steps"], stats["tokens_prefilled"]

    def run(contender, *arguments):
        peak_memory(model.device, reset=True)
        start = perf_counter()
        slot_steps, prefilled = contender(*arguments)
        return perf_counter() - start, total / slot_steps, prefilled, peak_memory(model.device)

    contenders = {"ours": (ours,)}
    if args.prefixes:
        same = lambda prompts, n: [(p, list(i)) for p, i in itertools.groupby(range(len(prompts)), prompts.__getitem__)]
        alone = lambda prompts, n: [(p, [i]) for i, p in enumerate(prompts)]
        contenders |= {"ours, a forward a prompt": (ours, same), "ours, a forward a request": (ours, alone)}
    if "generate" in rivals:
        sizes = [size for size in (16, 32, 64, 128, 256, 512) if size < 2 * len(prompts)] or [len(prompts)]
        speed = {size: total / run(by_generate, model, prompts, lengths, size)[0] for size in sizes}
        best = max(speed, key=speed.get)
        print("model.generate, tokens a second by batch size:", {size: round(s) for size, s in speed.items()})
        contenders[f"model.generate, batch {best}"] = by_generate, model, prompts, lengths, best
    if "generate_batch" in rivals:
        contenders["model.generate_batch"] = by_generate_batch, model, prompts, lengths
    results = {name: [] for name in contenders}
    for name in (args.runs + 1) * list(reversed(contenders)):  # the rivals first: what we allocate stays
        try:
            results[name].append(run(*contenders[name]))
        except Exception as e:
            if name != "model.generate_batch":  # it is young, and has needs of its own
                raise
            print(f"{name} does not run here: {type(e).__name__}: {e}")
    print(f"{'tokens a second':28}     min   median      max  ours is    live  prefilled    MiB")
    for name, rows in results.items():
        if rows:
            seconds, live, prefilled, memory = np.array(rows).T
            slow, middle, fast = total / np.quantile(seconds[1:], (1, 0.5, 0))  # the first run: for the memory alone
            ratio = np.median(seconds[1:] / [row[0] for row in results["ours"][1:]])
            print(f"{name:28}{slow:8,.0f} {middle:8,.0f} {fast:8,.0f} {ratio:7.2f}x {live[0]:7.1%} "
                  f"{prefilled[0]:10,.0f} {memory[0] / 2**20:6,.0f}")
    if model.device.type == "cuda":
        seconds = np.median([row[0] for row in results["ours"][1:]])
        read, copied = bandwidth(model, prompts, lengths, stats["steps"], seconds)
        print(f"read at {read / 1e9:,.0f} GB/s, {read / copied:.0%} of the {copied / 1e9:,.0f} GB/s of a copy")


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Tokens a second of this engine and of transformers' own, in one "
                                     "process. Lengths are geometric, their mean a third of the longest.")
    add = parser.add_argument
    add("--model", default="tiny", help=f"a size with random weights ({', '.join(SIZES)}), or a folder")
    add("--prompts", type=int, default=32, help="of 8 to 39 tokens")
    add("--n", type=int, default=8, help="responses to each")
    add("--max_new_tokens", type=int, default=256)
    add("--slots", type=int, help="default: by free memory")
    add("--runs", type=int, default=5, help="of each contender")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", default="float32", choices=("float32", "bfloat16"))
    add("--rivals", default="generate,generate_batch", help="of generate, generate_batch, none")
    add("--prefixes", action="store_true", help="no rivals; n responses from each of 8 states along a response to each "
        "prompt, with prefixes shared, prompts shared, nothing shared")
    args = parser.parse_args(arguments)
    try:
        if min(args.prompts, args.n, args.max_new_tokens, args.runs, 1 if args.slots is None else args.slots) < 1:
            raise ValueError("--prompts, --n, --max_new_tokens, --runs and --slots must be at least 1")
        if not set(args.rivals.split(",")) <= {"generate", "generate_batch", "none"}:
            raise ValueError(f"--rivals {args.rivals}: name generate, generate_batch, both with a comma, or none")
        benchmark(args)
    except (ValueError, OSError) as e:
        print(f"{parser.prog}: error: {' '.join(str(e).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
