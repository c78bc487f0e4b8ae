"""Sampling many responses fast: batched generation with a KV cache, in pure PyTorch.

    from rollout import generate
    groups = generate(model, prompts, n=8, max_new_tokens=256)
    groups[i][j].response                             # the tokens of the j-th response to prompt i

Reinforcement learning spends most of its time here, and it knows what a server does not: every
request is there from the start, each prompt is sampled many times, and lengths differ tenfold.
Three ideas follow.

1. SLOTS. The cache is a table of `slots` rows. A row that stops is handed to the next request at
   once, so no step computes padding for rows that are done. Every row is at its own length, which
   is all that makes this unlike the textbook's cache: row i's new key is written at column
   length[i], and row i attends to the columns <= length[i] (attention.SlotCache).

       slot 0   Q Q Q a a a .  .        Q: the prompt's keys, copied from the prefill
       slot 1   Q Q a .  .  .  .        a: written one a step
       slot 2   Q Q Q Q a a a a         .: stale numbers of an earlier row, masked

2. A PROMPT IS COMPUTED ONCE. One forward computes the keys of prompt[:-1], which are copied to the
   n slots that need them; the last prompt token is the first that each row decodes. A prompt that
   is a prefix of another (VinePPO's states along one response) needs no forward: attention is
   causal, so its keys are the first columns of the longer one's.

3. RANDOM NUMBERS BELONG TO THE REQUEST, not to the slot: request r draws its uniforms from
   Philox(seed, r). What is sampled depends neither on the number of slots nor on what else is in
   the batch (but for float rounding); and the decode step draws nothing, so a CUDA graph can
   replay it.

No model is rewritten (transformer.py says how). One that the engine does not fit is refused by name
before any work; engine="hf" serves it by `model.generate`.
"""

import bisect
import functools
import itertools
import warnings
import weakref
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from transformers import GenerationConfig

from plumbing import attention, memory
from plumbing.attention import SlotCache, at_least, decode, prefill, serving
from plumbing.commands import progress_bar
from plumbing.processes import gather, in_parts, share


@dataclass
class Rollout:
    prompt: list[int]  # token ids the model read
    response: list[int]  # token ids it wrote, its stop token included when `finished`
    # log pi(token | prefix) of softmax(logits / temperature), before top-p or top-k truncation
    logprobs: list[float]
    finished: bool  # ended by a stop (False: ran into max_new_tokens)
    stop: int = 1  # how many of its last tokens are the stop: more if it is a text

    def written(self):
        """The response without its stop."""
        return self.response[: -self.stop] if self.finished else self.response


@dataclass
class Request:
    number: int  # its random numbers are those of (seed, number)
    prompt: list[int]
    budget: int  # max_new_tokens
    rollout: Rollout | None = None


@dataclass
class Sampling:
    temperature: float
    top_p: float
    top_k: int
    seed: int
    stop_ids: set[int]
    stop_text: "StopText | None" = None


def generate(
    model, prompts, *, n=1, max_new_tokens=256, temperature=1.0, top_p=1.0, top_k=0, stop_ids=None,
    slots=None, seed=None, progress=False, engine="slots", dtype=None, stats=None,
):  # fmt: skip
    """Sample responses. Same seed, same machine, same arguments: same output.

    model: a Hugging Face causal LM, left in the mode it came in. prompts: list of token-id lists of
    any mix of lengths. n, max_new_tokens: an int, or one a prompt. temperature: 0 is greedy. top_p
    in (0, 1] and top_k (0: off) truncate what is sampled, not the log-probs reported. stop_ids:
    tokens that end a response (by default the model's eos), or a `StopText`. slots: rows decoded at
    once (by default: by free memory). dtype: decode with a copy of the weights in this dtype, kept,
    and brought up to date each call (bfloat16 on a GPU). engine: "slots", or "hf" for
    model.generate. stats: a dict whose counters are added to: tokens_generated, tokens_prefilled,
    steps, slot_steps (rows computed in them); and slots.

    Returns, for each prompt in order, its n `Rollout`s. ValueError: an empty prompt, one that does
    not fit the model's context with its response, bad settings, no stop token, a model the engine
    cannot serve."""
    n, budgets = one_a_prompt(n, prompts), one_a_prompt(max_new_tokens, prompts)
    seed = int(torch.randint(1 << 62, ())) if seed is None else seed % (1 << 62)
    sampling = Sampling(temperature, top_p, top_k, seed, *stops(model, stop_ids))
    check_arguments(model, prompts, n, budgets, sampling, slots, engine)
    numbers = itertools.count()
    groups = []
    for prompt, count, budget in zip(prompts, n, budgets):
        groups.append([Request(next(numbers), prompt, budget) for _ in range(count)])
    requests = [request for group in groups for request in group]
    stats = {} if stats is None else stats
    if requests:
        decoder = attention.low_precision_copy(model, dtype)
        if engine == "slots":  # of parts, only the copy can be probed
            attention.check_servable(decoder if in_parts(model) else model)
    mine = share(requests)  # all of them, unless several processes share the work
    if mine:
        serve = generate_slots if engine == "slots" else generate_hf
        with progress_bar("rollouts", len(mine), "rollout", progress, leave=False) as bar:
            serve(decoder, mine, slots, sampling, stats, bar)
    for request, rollout in zip(requests, gather([request.rollout for request in mine])):
        request.rollout = rollout
    add(stats, tokens_generated=sum(len(request.rollout.response) for request in requests))
    return [[request.rollout for request in group] for group in groups]


class Engine:
    """The decode loop and its state: one row a slot, on the device, changed in place (a CUDA graph
    needs that)."""

    def __init__(self, model, weights_at, slots, columns, max_new):
        self.model = weakref.proxy(model)  # else the model could never be freed: it keys ENGINES
        self.weights_at, self.device = weights_at, model.device
        self.columns, self.max_new = columns, max_new
        self.cache = SlotCache(slots, columns)
        zeros = functools.partial(torch.zeros, device=model.device)
        self.token = zeros(slots, dtype=torch.long)  # the row's last one, not in the cache yet
        self.length = zeros(slots, dtype=torch.long)  # its position: columns filled; 0 if free
        self.written = zeros(slots, dtype=torch.long)  # response tokens so far
        self.budget = zeros(slots, dtype=torch.long)  # and allowed
        self.live = zeros(slots, dtype=torch.bool)  # still decoding
        self.stopped = zeros(slots, dtype=torch.bool)  # ended by a stop token
        # One column more than max_new: a row that is done writes there until somebody looks.
        self.tokens = zeros(slots, max_new + 1, dtype=torch.long)
        self.logprobs = zeros(slots, max_new + 1)
        self.uniforms = zeros(slots, max_new + 1)
        self.rows = (self.token, self.length, self.written, self.budget, self.live, self.stopped)
        self.state = (*self.rows, self.tokens, self.logprobs, self.uniforms)
        self.owner = [None] * slots  # the Request in each slot
        self.filled = np.zeros(slots, dtype=int)  # `length`, or more, as far as the host knows
        sizes = attention.step_sizes(model.device, slots, columns)
        self.widths, self.depths, self.check_every, self.graphs = sizes

    def run(self, trunks, slots, sampling, stats, bar):
        """Serve `trunks`, [(trunk, [Request, ...]), ...] as `plan` orders them, in the first
        `slots` slots. Each request gets its `rollout`."""
        stop_ids = torch.tensor(sorted(sampling.stop_ids), device=self.device)
        trunks, ready = deque(trunks), deque()  # ready: prefilled, (row of the prefill, Request)
        admitting = True  # at first every slot is free
        while True:
            if admitting:
                free = [row for row in range(slots) if self.owner[row] is None]
                while free and (ready or trunks):
                    ready = ready or prefill_chunk(self, trunks, stats)
                    count = min(len(free), len(ready))
                    self.admit(free[:count], [ready.popleft() for _ in range(count)], sampling.seed)
                    free = free[count:]
                busy = [row for row in range(slots) if self.owner[row] is not None]
                if not busy:
                    self.cache.prefilled = {}
                    return
                if at_least(len(busy), self.widths) < at_least(busy[-1] + 1, self.widths):
                    busy = compact(self, busy)
                width = at_least(busy[-1] + 1, self.widths)
            used = at_least(self.filled[busy].max() + self.check_every, self.depths)
            attention.decode_steps(self, width, used, stop_ids, sampling)
            self.filled[busy] += self.check_every
            add(stats, steps=self.check_every, slot_steps=width * self.check_every)
            if sampling.stop_text:
                stop_at_text(self, busy, sampling.stop_text)
            live = self.live.tolist()
            done = [row for row in busy if not live[row]]
            admitting = bool(done)
            if done:
                harvest(self, done, sampling, bar)

    def admit(self, rows, prefilled, seed):
        """Hand the free slots `rows` to as many prefilled requests."""
        requests = [request for _, request in prefilled]
        lengths = [len(request.prompt) - 1 for request in requests]
        if max(lengths) > 0:
            self.cache.admit(rows, [source for source, _ in prefilled], max(lengths))
        put = functools.partial(torch.as_tensor, device=self.device)
        keys = [[seed, request.number] for request in requests]
        streams = [np.random.Generator(np.random.Philox(key=key)) for key in keys]
        uniforms = [stream.random(self.max_new, np.float32) for stream in streams]
        self.uniforms[rows, : self.max_new] = put(np.stack(uniforms))
        self.token[rows] = put([request.prompt[-1] for request in requests])
        self.length[rows] = put(lengths)
        self.budget[rows] = put([request.budget for request in requests])
        self.written[rows] = 0
        self.stopped[rows] = False
        self.live[rows] = True
        self.filled[rows] = lengths
        for row, request in zip(rows, requests):
            self.owner[row] = request

    def step(self, width, used, stop_ids, sampling):
        """Decode one token in the first `width` slots, which read the first `used` columns of the
        cache."""
        token, length, written, budget, live, stopped = (x[:width] for x in self.rows)
        column = written[:, None]
        self.cache.begin(length, used)
        logits = decode(self.model, self.cache, token[:, None])
        uniform = self.uniforms[:width].gather(1, column)[:, 0]
        new, logprob = sample(logits, uniform, sampling)
        self.tokens[:width].scatter_(1, column, new[:, None])
        self.logprobs[:width].scatter_(1, column, logprob[:, None])
        token.copy_(torch.where(live, new, token))
        written.add_(live)
        length.add_(live)
        stop = (new[:, None] == stop_ids).any(1)
        stopped.logical_or_(live & stop)
        live.logical_and_(~stop & (written < budget))


# --------------------------------------------------------------------------- one token a row


def sample(logits, uniform, sampling):
    """logits (rows, vocab), uniform (rows,) in [0, 1) -> tokens and their log-probs before
    truncation, (rows,) each."""
    if sampling.temperature not in (0, 1):
        logits = logits.float() / sampling.temperature
    probs = logits.softmax(-1, dtype=torch.float32)  # (rows, vocab)
    if sampling.temperature == 0:
        token = logits.argmax(-1, keepdim=True)
    else:
        cdf = top_k_top_p(probs, sampling.top_k, sampling.top_p).cumsum(-1)
        # The first token whose cdf exceeds u. right=True steps over tokens of probability 0, and
        # the factor keeps u * total below the total: else the last could be drawn at p = 0.
        threshold = (uniform * (1 - 1e-6))[:, None] * cdf[:, -1:]
        token = torch.searchsorted(cdf, threshold, right=True)
        token.clamp_(max=probs.shape[1] - 1)  # past the end: NaN. `harvest` names it
    return token[:, 0], probs.gather(1, token)[:, 0].log()


# ==================================================================================================
# That is the method. Below: the nucleus, the order of the work, memory, stop texts, model.generate,
# checks. How a model reads the cache: transformer.py.
# ==================================================================================================


def top_k_top_p(probs, top_k, top_p):
    """Zero the probabilities outside the top-k tokens, then outside the nucleus: the fewest most
    likely tokens whose share reaches top_p (Holtzman et al. 2020, section 3.1). probs: (rows,
    vocab) -> same, not normalized.

    Sorting a large vocabulary is the slow way to a nucleus: it is {probs >= least} for one number
    a row."""
    if 0 < top_k < probs.shape[-1]:
        probs = probs * (probs >= probs.topk(top_k, dim=-1).values[:, -1:])
    if top_p < 1:
        needed = top_p * probs.sum(-1, keepdim=True)  # of what top-k left, (rows, 1)
        probs = probs * (probs >= least_of_nucleus(probs, needed, top_p))
    return probs


def least_of_nucleus(probs, needed, top_p, first=64):
    """The largest number for which the probabilities from it on sum to `needed`: (rows, 1).

    A trained model's nucleus is mostly a few tokens. Rows in which it is not among the `first` are
    bisected; so are all on CUDA, where a graph cannot ask which."""
    if probs.is_cuda:
        return bisect_nucleus(probs, needed, top_p)
    top = probs.topk(min(first, probs.shape[-1]), dim=-1).values  # (rows, first), descending
    last = (top.cumsum(-1) < needed).sum(-1, keepdim=True)  # place of the nucleus' last token
    wide = last[:, 0] == top.shape[-1]
    least = top.gather(-1, last.clamp(max=top.shape[-1] - 1))
    if wide.any():
        least[wide] = bisect_nucleus(probs[wide], needed[wide], top_p)
    return least


def bisect_nucleus(probs, needed, top_p):
    """The same in 20 halvings of the range; tokens tied with the last one (to 1 part in 50,000) are
    all kept."""
    # tokens below (1 - top_p) / vocab hold less than 1 - top_p together: the others suffice
    low = needed * ((1 - top_p) / top_p / 2 / probs.shape[-1])  # mass(low) >= needed, always
    high = probs.amax(-1, keepdim=True)
    for _ in range(20):
        middle = (low * high).sqrt()
        enough = (probs * (probs >= middle)).sum(-1, keepdim=True) >= needed
        low = torch.where(enough, middle, low)
        high = torch.where(enough, high, middle)
    return low


# --------------------------------------------------------------------------- the order of the work


def plan(requests):
    """Order the work: [(trunk, [Request, ...]), ...]. A trunk is a prompt that extends all prompts
    of its requests, so that one forward over it serves them all.

    In lexicographic order everything that extends p follows p directly, so p is a prefix of another
    prompt exactly when it is a prefix of its successor. Long trunks go first: a long prompt tends
    to a long response, so the long work is under way early, and rows of like length share the
    cache. Within a trunk the shortest prompt goes first: it has the longest way to go."""
    families = []
    for request in sorted(requests, key=lambda r: (r.prompt, r.number), reverse=True):
        prompt = request.prompt
        if families and families[-1][0].prompt[: len(prompt)] == prompt:
            families[-1].append(request)
        else:
            families.append([request])
    families.sort(key=lambda family: -len(family[0].prompt))
    return [(family[0].prompt, family[::-1]) for family in families]


def prefill_chunk(engine, trunks, stats, most_tokens=4096):
    """Prefill the next trunks, up to `most_tokens` padded tokens. Returns (row of the prefill,
    Request) of each of their requests."""
    prompts = []
    ready = deque()
    while trunks and len(ready) < engine.cache.slots:
        if prompts and (len(prompts) + 1) * len(prompts[0]) > most_tokens:  # the first is longest
            break
        trunk, requests = trunks.popleft()
        ready += [(len(prompts), request) for request in requests]
        prompts.append(trunk[:-1])
    if any(prompts):
        prefill(engine.model, engine.cache, prompts)
    add(stats, tokens_prefilled=sum(map(len, prompts)))
    return ready


def harvest(engine, done, sampling, bar):
    """Read finished rows back and free their slots."""
    written = engine.written[done].tolist()
    stopped = engine.stopped[done].tolist()
    tokens = engine.tokens[done, : max(written)].tolist()
    logprobs = engine.logprobs[done, : max(written)].tolist()
    for i, row in enumerate(done):
        end = written[i]
        if np.isnan(logprobs[i][:end]).any():
            problem = "the model's logits are not finite: has training diverged?"
            raise ValueError(f"{problem} Go back to a checkpoint")
        request, engine.owner[row] = engine.owner[row], None
        request.rollout = to_rollout(
            request, tokens[i][:end], logprobs[i][:end], stopped[i], sampling
        )
    bar.update(len(done))
    # A free slot among busy ones decodes on. At length 0 it sees its own column; left behind a
    # sliding window that has passed `used` it would see none, and write NaN into the table.
    engine.length[done] = 0


def compact(engine, busy):
    """Nothing is left to admit: move the last busy rows into the holes, so that the step shrinks
    with its rows."""
    holes = [row for row in range(len(busy)) if engine.owner[row] is None]
    movers = busy[len(busy) - len(holes) :]
    used = engine.filled[movers].max()
    for table in itertools.chain(*engine.cache.tables.values()):
        table[holes, :, :used] = table[movers, :, :used]
    for x in engine.state:
        x[holes] = x[movers]
    for source, target in zip(movers, holes):
        engine.owner[target], engine.owner[source] = engine.owner[source], None
        engine.filled[target] = engine.filled[source]
    engine.live[movers] = False
    engine.length[movers] = 0
    return list(range(len(busy)))


# --------------------------------------------------------------------------- engines and memory

# An engine outlives a call, for the graphs captured with it, and goes with its model.
# ENGINES.pop(model, None) frees the cache earlier.
ENGINES = weakref.WeakKeyDictionary()


def generate_slots(model, requests, slots, sampling, stats, bar):
    """Find or make the model's engine and run it, with half the slots when memory runs out."""
    max_new = max(request.budget for request in requests)
    columns = max(len(request.prompt) + request.budget for request in requests)
    columns = -(-columns // 64) * 64  # few sizes, so that the next call finds a table that fits
    if slots is None:
        kept = ENGINES.get(model)
        slots = memory.choose_slots(model, columns, len(requests), kept and kept.cache)
    # a captured graph reads the weights where they lay: moved, they need a new engine
    weights_at = (model.device, model.dtype, *(p.data_ptr() for p in model.parameters()))
    while True:
        try:
            kept = ENGINES.get(model)
            fits = kept and kept.weights_at == weights_at and kept.cache.slots >= slots
            if not (fits and kept.columns >= columns and kept.max_new >= max_new):
                ENGINES.pop(model, None)
                kept = None  # both: the old table is freed before the new one is made
                kept = ENGINES[model] = Engine(model, weights_at, slots, columns, max_new)
            with serving(model, kept.cache):
                left = [request for request in requests if request.rollout is None]
                kept.run(plan(left), slots, sampling, stats, bar)
            stats["slots"] = slots
            return
        except BaseException as error:
            ENGINES.pop(model, None)  # whatever it was in the middle of
            full = isinstance(error, (torch.OutOfMemoryError, MemoryError))
            if slots == 1 or not (full or "can't allocate memory" in str(error)):
                raise
        # outside of the handler: the traceback would keep the tables alive
        kept, slots = None, slots // 2
        message = f"out of memory: going on with {slots} slots (pass slots={slots} to start there)"
        warnings.warn(message, stacklevel=3)
        if model.device.type == "cuda":
            torch.cuda.empty_cache()


# --------------------------------------------------------------------------- stops, model.generate


class StopText:
    """A text that ends a response, besides its stop tokens. ids: these; decode: ids -> text."""

    def __init__(self, ids, text, decode):
        self.ids, self.text, self.decode = ids, text, decode

    def find(self, tokens):
        """(first, end): tokens[:end] has the whole text, and none of it is in tokens[:first].
        None: it is not there."""
        if self.text not in self.decode(tokens):
            return None
        prefixes = range(len(tokens) + 1)
        end = bisect.bisect_left(prefixes, True, key=lambda i: self.text in self.decode(tokens[:i]))
        before = len(self.decode(tokens[:end]).partition(self.text)[0])
        first = bisect.bisect(range(end), before, key=lambda i: len(self.decode(tokens[:i]))) - 1
        return first, end


def stops(model, given):
    """(stop token ids, StopText or None) of `generate`'s argument."""
    if isinstance(given, StopText):
        return set(given.ids), given
    if given is None:
        given = model.generation_config.eos_token_id
    return ({given} if isinstance(given, int) else set(given or ())), None


def stop_at_text(engine, busy, stop):
    """End the rows whose last steps completed the stop text."""
    reach = len(stop.text) + engine.check_every
    written = engine.written[busy]
    column = written[:, None] - reach + torch.arange(reach, device=engine.device)
    tails = engine.tokens[busy].gather(1, column.clamp(min=0)).tolist()  # (busy, reach)
    for row, end, tail in zip(busy, written.tolist(), tails):
        if stop.text in stop.decode(tail[-end:]):
            found = stop.find(engine.tokens[row, :end].tolist())
            engine.written[row] = found[1]
            engine.stopped[row] = True
            engine.live[row] = False


def to_rollout(request, tokens, logprobs, stopped, sampling):
    found = sampling.stop_text and sampling.stop_text.find(tokens)
    stop = len(tokens) - found[0] if found else 1
    return Rollout(request.prompt, tokens, logprobs, stopped, stop)


def generate_hf(model, requests, slots, sampling, stats, bar, batch=32):
    """The same through model.generate, for any architecture: slow, and simple enough to trust.
    Prompts of one length at a time, so that nothing is padded."""
    settings = {"do_sample": sampling.temperature > 0}
    if sampling.temperature:
        settings |= {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
        }
    alike = {}
    for request in sorted(requests, key=lambda request: (-len(request.prompt), request.budget)):
        alike.setdefault((len(request.prompt), request.budget), []).append(request)
    with serving(model), torch.random.fork_rng([model.device] * (model.device.type == "cuda")):
        torch.manual_seed(sampling.seed)
        # bare: the model's own may hold a repetition penalty, and would not sample from the model
        bare = GenerationConfig(eos_token_id=sorted(sampling.stop_ids), pad_token_id=0, **settings)
        model.generation_config = bare
        for (length, budget), group in alike.items():
            for part in (group[i : i + batch] for i in range(0, len(group), batch)):
                tokens = torch.tensor([request.prompt for request in part], device=model.device)
                mask = torch.ones_like(tokens)
                out = model.generate(tokens, attention_mask=mask, max_new_tokens=budget)
                for request, row in zip(part, out.tolist()):
                    request.rollout = score_row(model, request, row[length:], sampling)
                add(stats, tokens_prefilled=tokens.numel())
                bar.update(len(part))
    stats["slots"] = min(batch, len(requests))


def score_row(model, request, tokens, sampling):
    """A `Rollout` of what model.generate wrote, cut at its stop. Its log-probs are a pass of their
    own: the logits that generate could return are (rows, time, vocab)."""
    ends = [t + 1 for t, token in enumerate(tokens) if token in sampling.stop_ids]
    found = sampling.stop_text and sampling.stop_text.find(tokens)
    ends += [found[1]] if found else []
    tokens = tokens[: min(ends, default=len(tokens))]
    text = torch.tensor([request.prompt + tokens], device=model.device)
    start = len(request.prompt)
    logits = model(text).logits[0, start - 1 : -1].float() / (sampling.temperature or 1.0)
    logprobs = logits.log_softmax(-1).gather(1, text[0, start:, None])[:, 0]
    return to_rollout(request, tokens, logprobs.tolist(), bool(ends), sampling)


def add(stats, **counts):
    for name, count in counts.items():
        stats[name] = stats.get(name, 0) + count


def one_a_prompt(value, prompts):
    return [value] * len(prompts) if np.ndim(value) == 0 else list(value)


def check_arguments(model, prompts, n, budgets, sampling, slots, engine):
    if not len(prompts) == len(n) == len(budgets):
        sizes = f"{len(prompts)} prompts, {len(n)} n, {len(budgets)} max_new_tokens"
        raise ValueError(f"{sizes}: give one, or one a prompt")
    vocab = model.get_input_embeddings().num_embeddings
    limit = memory.longest_context(model.config.get_text_config())
    for i, (prompt, count, budget) in enumerate(zip(prompts, n, budgets)):
        if len(prompt) == 0:
            raise ValueError(f"prompt {i} is empty: give it at least one token (a BOS token, say)")
        if not 0 <= min(prompt) <= max(prompt) < vocab:
            ids = f"token ids from {min(prompt)} to {max(prompt)}, the model only 0 to {vocab - 1}"
            raise ValueError(f"prompt {i} has {ids}: encode it with the model's own tokenizer")
        if budget < 1 or count < 0:
            wrong = f"max_new_tokens={budget} must be at least 1 and n={count} at least 0"
            raise ValueError(f"prompt {i}: {wrong}")
        if limit and len(prompt) + budget > limit:
            too_long = f"with max_new_tokens={budget} it passes the model's {limit} positions"
            raise ValueError(f"prompt {i} is {len(prompt)} tokens: {too_long}; shorten one of them")
    sensible = sampling.temperature >= 0 and 0 < sampling.top_p <= 1 and sampling.top_k >= 0
    if not (sensible and (slots is None or slots >= 1)):
        given = f"temperature={sampling.temperature}, top_p={sampling.top_p}"
        given += f", top_k={sampling.top_k}, slots={slots}"
        need = "temperature >= 0, 0 < top_p <= 1, top_k >= 0 and slots >= 1"
        raise ValueError(f"{given}: need {need}")
    if not sampling.stop_ids:
        way_out = "pass stop_ids, or set eos_token_id in the model's generation_config"
        raise ValueError(f"no stop token: {way_out}")
    if engine not in ("slots", "hf"):
        raise ValueError(f'unknown engine {engine!r}: use "slots" or "hf"')
