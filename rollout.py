"""Sampling many responses fast: batched generation with a KV cache, in pure PyTorch.

    engine = Engine(model)                            # keeps its cache between calls
    groups = engine.generate(prompts, n=8, max_new_tokens=256)
    groups[i][j].response                             # the tokens of the j-th response to prompt i

Reinforcement learning spends most of its time here, and it knows what a server does not: every
request is there from the start, each prompt is sampled many times, and lengths differ tenfold.
Three ideas follow.

1. SLOTS. The cache is a table with a row for each of `slots` responses. A slot whose response has
   ended is handed to the next request at once, so little of a step is wasted. Every slot is at its
   own length, which is all that makes this unlike the textbook's cache: slot i's new key is written
   at column length[i], and slot i attends to the columns <= length[i] (plumbing/attention.py).

       slot 0   Q Q Q a a a . .         Q: keys of prompt[:-1], computed before and copied here
       slot 1   Q Q a . . . . .         a: each decode step writes one, the last prompt token first
       slot 2   Q Q Q Q a a a a         .: stale numbers of an earlier response, masked

2. A PROMPT IS COMPUTED ONCE. One forward (the prefill) computes the keys (and the values) of
   prompt[:-1]. They are copied to the n slots that need them, and a slot's first decode step reads
   the last prompt token. A prompt that is a prefix of another (VinePPO's states along one response)
   needs no forward: attention is causal, so its keys are the first columns of the longer one's. A
   prompt that has a forward, and all that are served by it, is called a trunk.

3. RANDOM NUMBERS BELONG TO THE REQUEST, not to the slot: request r draws its uniforms from
   Philox(seed, r). What is sampled depends neither on the number of slots nor on what else is in
   the batch (but for float rounding); and they are there before the decode step, so a CUDA graph
   can replay it.

No model is rewritten. One that the slots do not fit is refused, by name, when its Engine is made.
"""

import itertools
import math
import warnings
from collections import deque
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from plumbing import attention, fast, memory
from plumbing.attention import decode, prefill, serving
from plumbing.commands import progress_bar, require
from plumbing.graphs import round_up
from plumbing.nucleus import least_of_nucleus
from plumbing.processes import gather, share
from plumbing.slots import Slots
from plumbing.stops import StopText, stops_of

PREFILL_TOKENS = 4096  # prompt tokens in one prefill, padding included: it bounds the memory
# On a CPU: then what a layer computes stays in its cache, and prompts of like length go together.
PREFILL_TOKENS_CPU = 512
SEEDS = 1 << 62  # `generate` takes a seed modulo this

# --------------------------------------------------------------------------- what is asked and got


@dataclass
class Rollout:
    prompt: list[int]  # token ids the model read
    response: list[int]  # token ids it wrote, its stop token included when `finished`
    # log pi(token | prefix) of softmax(logits / temperature), before top-p or top-k truncation;
    # at temperature 0 of softmax(logits)
    logprobs: list[float]
    finished: bool  # ended by a stop (False: ran into max_new_tokens)
    stop: int = 1  # of a finished one: how many last tokens are the stop (a text may have several)

    def written(self):
        """The response without its stop."""
        return self.response[: -self.stop] if self.finished else self.response


@dataclass
class Request:
    """One response to be sampled."""

    seed: int  # of the call of `generate`
    number: int  # its place in that call, counted over all processes
    prompt: list[int]
    budget: int  # max_new_tokens
    rollout: Rollout | None = None  # None until it is done

    def uniforms(self, count):
        """Its first `count` random numbers in [0, 1): one for each response token."""
        # A stream of its own: numbers of another key have nothing to do with it.
        philox = np.random.Philox(key=[self.seed, self.number])
        return np.random.Generator(philox).random(count, np.float32)


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn, and which end a response. Frozen, to be part of a CUDA graph's key."""

    temperature: float  # 0: greedy
    top_p: float  # 1: off
    top_k: int  # 0: off
    stop_ids: frozenset[int]
    # Not compared: the host looks for the text, so a graph does not depend on it.
    stop_text: StopText | None = field(default=None, compare=False)


def seed_of(*numbers):
    """A seed for `generate` that depends on all of these numbers and on nothing else."""
    sequence = np.random.SeedSequence(numbers)
    # 62 of the 64 bits, so it is below SEEDS: `generate` leaves it as it is.
    return int(sequence.generate_state(1, np.uint64)[0]) >> 2


# --------------------------------------------------------------------------- the engine


def generate(model, prompts, *, slots=None, dtype=None, **how):
    """`Engine.generate` for a single call. Whoever samples again and again makes an Engine."""
    return Engine(model, slots=slots, dtype=dtype).generate(prompts, **how)


class Engine:
    """Samples from a Hugging Face causal LM that is being trained: a call reads today's weights.
    Between calls it keeps the cache, the CUDA graphs and the copy of the weights. ValueError: a
    model that cannot be served."""

    def __init__(self, model, *, slots=None, dtype=None, own_copy=False):
        too_few = f"slots={slots} must be at least 1: leave it out to go by free memory"
        require(slots is None or slots >= 1, too_few)
        attention.check_servable(model)
        self.model = model  # being trained by others; here it is only read
        self.slots = slots  # responses decoded at once; None: as many as memory allows
        self.table = None  # `Slots`; made when a call needs it, or needs a larger one
        self.promised = lambda: 0  # free bytes that others will need (sfl.py: Adam's moments)
        self.decoder = model  # what decodes: the model itself, or a copy of it
        dtype = dtype or model.dtype  # in bfloat16 a decode step reads half the bytes
        # own_copy: copy it even if the dtype is the same, for a model that FSDP will take apart.
        if own_copy or dtype != model.dtype:
            self.decoder = attention.copy_of(model, dtype)

    def generate(
        self,
        prompts,  # lists of token ids, of any mix of lengths
        *,
        n=1,  # responses to each prompt: a number, or a list with one for each
        max_new_tokens=256,  # of a response, stop included; likewise a number or a list
        temperature=1.0,  # 0: greedy
        top_p=1.0,  # in (0, 1]; truncates what is sampled, not the log-probs reported
        top_k=0,  # likewise; 0: off
        stop_ids=None,  # tokens that end a response, or a `StopText`; None: the model's eos
        seed=None,  # same seed, same machine, same arguments: same output
        progress=False,  # show a bar
        stats=None,  # a dict: the counters below are added to it, and `slots` is set
    ):
        """Sample responses. Returns a list of n `Rollout`s for each prompt, in order. The model is
        left in the mode it came in. ValueError: an empty prompt, one that does not fit the model's
        context with its response, bad settings, no stop token, logits that are not finite."""
        n, budgets = attention.check_prompts(self.model, prompts, n, max_new_tokens)
        given = f"temperature={temperature}, top_p={top_p}, top_k={top_k}"
        possible = temperature >= 0 and 0 < top_p <= 1 and top_k >= 0
        require(possible, f"{given}: need temperature >= 0, 0 < top_p <= 1 and top_k >= 0")
        if seed is None:  # torch's generator decides: torch.manual_seed reproduces the call
            seed = int(torch.randint(SEEDS, ()))
        seed = seed % SEEDS  # Philox wants no negative key
        sampling = Sampling(temperature, top_p, top_k, *stops_of(self.model, stop_ids))
        stats = {} if stats is None else stats
        # steps: decode steps; slot_steps: the slots that each of them computed, summed
        for name in ("tokens_generated", "tokens_prefilled", "steps", "slot_steps"):
            stats.setdefault(name, 0)

        # A request for each response. Its number does not depend on who will serve it.
        requests = []
        for prompt, count, budget in zip(prompts, n, budgets):
            for _ in range(count):
                requests.append(Request(seed, len(requests), prompt, budget))
        mine = share(requests)  # all of them, unless several processes share the work
        if self.decoder is not self.model:
            attention.bring_up_to_date(self.decoder, self.model)
        with progress_bar("rollouts", len(mine), "rollout", progress, leave=False) as bar:
            self.serve(mine, sampling, stats, bar)

        # The rollouts of all processes, in the order of the requests
        rollouts = gather([request.rollout for request in mine])
        stats["tokens_generated"] += sum(len(r.response) for r in rollouts)
        # Cut into groups: the first n[0] are of prompt 0, the next n[1] of prompt 1.
        remaining = iter(rollouts)
        return [list(itertools.islice(remaining, count)) for count in n]

    def serve(self, requests, sampling, stats, bar):
        """Give each request its rollout. When memory runs out: go on with half the slots."""
        if not requests:
            return
        columns = max(len(r.prompt) + r.budget for r in requests)  # of a slot: tokens it can hold
        columns = 64 * math.ceil(columns / 64)  # rounded up, the table often fits the next call
        reusable = (self.table.reusable() if self.table else 0) - self.promised()  # bytes
        slots = self.slots or memory.choose_slots(self.decoder, columns, len(requests), reusable)
        while True:
            try:
                if self.table is None or not self.table.fits(self.decoder, slots, columns):
                    self.table = None  # the old one's memory goes before the new one's comes
                    self.table = Slots(self.decoder, slots, columns)
                with serving(self.decoder, self.table.cache):
                    left = [r for r in requests if r.rollout is None]  # in a retry: not all
                    self.decode_all(plan(left), slots, sampling, stats, bar)
                stats["slots"] = slots
                return
            except BaseException as error:  # Ctrl-C, too
                self.table = None  # half-written: the next call must not read it
                if slots == 1 or not memory.is_out_of_memory(error):
                    raise
            # Behind the handler: inside it the traceback still holds the table, and frees nothing.
            self.free()
            slots //= 2
            advice = f"(pass slots={slots} to start there)"
            warnings.warn(f"out of memory: going on with {slots} slots {advice}", stacklevel=3)

    def free(self):
        """Give back the memory of cache and graphs; the next call makes new ones."""
        self.table = None
        torch.cuda.empty_cache()  # (does nothing without a GPU)

    # ---- the decode loop

    def decode_all(self, work, slots, sampling, stats, bar):
        """Serve `work`, which `plan` has ordered, in the first `slots` slots."""
        table = self.table
        stop_ids = torch.tensor(sorted(sampling.stop_ids), device=table.device)  # (stops,)
        work = deque(work)
        ready = deque()  # prefilled and waiting: (index of its trunk in the prefill, Request)
        while True:
            # --- 1. free slots go to waiting requests
            free = deque(slot for slot in range(slots) if table.owner[slot] is None)
            while free and (ready or work):
                if not ready:  # not before: a prefill overwrites the keys of the one before it
                    ready = self.prefill_next(work, stats)
                table.occupy(free, ready)  # takes from both
            busy = [slot for slot in range(slots) if table.owner[slot] is not None]
            if not busy:
                table.cache.prefilled = {}  # frees memory: all have copied from it
                return

            # --- 2. decode: a step for all slots up to the last busy one (on CUDA: a few steps)
            busy, width = table.close_up(busy)  # width: slots to compute
            longest = table.filled[busy].max() + table.look_every  # columns, after these steps
            used = round_up(longest, table.depths)  # columns that attention reads, of few sizes
            step = partial(self.decode_step, width, used, stop_ids, sampling)
            if table.graphs:  # a graph is of one shape, and has the settings built in
                key = (width, used, sampling)
                step = table.graphs.replay_of(key, step, table.state, stop_ids)
            for _ in range(table.look_every):
                step()
            table.filled[busy] += table.look_every  # at most: some may have ended in between
            stats["steps"] += table.look_every
            stats["slot_steps"] += width * table.look_every

            # --- 3. see who is done: what they wrote becomes rollouts, and their slots are free
            if sampling.stop_text:
                table.end_at_text(busy, sampling.stop_text)
            live = table.live.tolist()  # (slots,); here the host waits for the device
            done = [slot for slot in busy if not live[slot]]
            if done:
                harvest(table.release(done), sampling.stop_text)
                bar.update(len(done))

    def decode_step(self, width, used, stop_ids, sampling):
        """Decode one token in the first `width` slots, which read the first `used` columns of the
        cache. No line waits for the device or branches on a number there: a graph can replay it."""
        table = self.table
        # (width,) each. They are views: whoever changes them in place changes the table.
        token, length, written, budget, live, stopped = table.numbers[:width].T
        column = written[:, None]  # (width, 1): where this token goes
        table.cache.begin(length, used)  # slot i's new key goes to column length[i]
        logits = decode(self.decoder, table.cache, token[:, None])  # (width, vocab)
        uniform = table.uniforms[:width].gather(1, column)  # (width, 1)
        new, logprob = draw_tokens(logits, uniform, sampling)  # (width, 1) each
        # A slot that is done writes here, too, behind its response, where nobody reads.
        table.tokens[:width].scatter_(1, column, new)
        table.logprobs[:width].scatter_(1, column, logprob)
        # Only live slots move on: where `live` is 0, these three keep their numbers.
        token.copy_(torch.where(live == 1, new[:, 0], token))
        written.add_(live)
        length.add_(live)  # the token that was read has its key in the cache now
        stop = (new == stop_ids).any(1)  # (width,)
        stopped.logical_or_(live & stop)  # before `live` changes
        live.logical_and_(~stop & (written < budget))

    def prefill_next(self, work, stats):
        """Prefill the next trunks of `work` (see `plan`). Returns (index of its trunk in the
        prefill, Request) of each request that they serve."""
        prompts = []
        ready = deque()
        on_cpu = self.table.device.type == "cpu"
        most = PREFILL_TOKENS_CPU if on_cpu else PREFILL_TOKENS
        while work and len(ready) < self.table.slots:  # until every slot could be filled
            # The first trunk is the longest: all are padded to it.
            if prompts and (len(prompts) + 1) * len(prompts[0]) > most:
                break
            trunk, requests = work.popleft()
            ready += [(len(prompts), request) for request in requests]
            prompts.append(trunk[:-1])  # without the last token, which is decoded
        if any(prompts):  # else all were of one token, and nothing is left to compute
            prefill(self.decoder, self.table.cache, prompts)
        stats["tokens_prefilled"] += sum(len(prompt) for prompt in prompts)
        return ready


def harvest(released, stop_text):
    """What slots wrote becomes their requests' rollouts. ValueError: the weights have gone bad."""
    for request, end, stopped, tokens, logprobs in released:
        response = tokens[:end]
        # From NaN logits some token is drawn all the same, but its log-prob is NaN.
        finite = not np.isnan(logprobs[:end]).any()
        require(finite, "the model's logits are not finite: go back to an earlier checkpoint")
        found = stop_text and stop_text.locate(response)  # (first, end) of the text, or None
        stop = end - found[0] if found else 1  # tokens of the stop
        request.rollout = Rollout(request.prompt, response, logprobs[:end], stopped == 1, stop)


# --------------------------------------------------------------------------- the draw


@fast.faster(fast.suits, fast.draw)
def draw_tokens(logits, uniform, sampling):
    """logits (slots, vocab), uniform (slots, 1) in [0, 1) -> tokens and their log-probs before
    truncation, (slots, 1) each."""
    probs = logits  # this name alone, again and again: each would keep (slots, vocab) numbers
    if sampling.temperature not in (0, 1):  # greedy: as they are
        probs = probs.float() / sampling.temperature
    probs = probs.softmax(-1, dtype=torch.float32)  # (slots, vocab)
    if sampling.temperature == 0:
        token = logits.argmax(-1, keepdim=True)  # (slots, 1)
    else:
        kept = top_k_top_p(probs, sampling.top_k, sampling.top_p)
        cdf = kept.cumsum(-1)  # (slots, vocab); the last entry is the total, the share kept
        # Take the first token whose cdf exceeds u * total. right=True steps over tokens of
        # probability 0. The factor keeps u * total below the total even when it is rounded: else
        # the last token of the vocabulary could be drawn, whatever its probability.
        threshold = uniform * (1 - 1e-6) * cdf[:, -1:]  # (slots, 1)
        token = torch.searchsorted(cdf, threshold, right=True)
        token.clamp_(max=probs.shape[1] - 1)  # NaNs lead past the end; `harvest` says so
    return token, probs.gather(1, token).log()


def top_k_top_p(probs, top_k, top_p):
    """Zero the probabilities outside the top-k tokens, then outside the nucleus: the fewest most
    likely tokens whose share reaches top_p. probs: (slots, vocab) -> same, not normalized."""
    if 0 < top_k < probs.shape[-1]:
        likeliest = probs.topk(top_k, dim=-1).values  # (slots, top_k), descending
        probs = probs * (probs >= likeliest[:, -1:])  # ties with the last one stay
    if top_p < 1:
        least = least_of_nucleus(probs, top_p)  # (slots, 1)
        probs = probs * (probs >= least)
    return probs


# --------------------------------------------------------------------------- the order of the work


def plan(requests):
    """Order the work: [(trunk, [Request, ...]), ...]. A trunk is a prompt that extends all prompts
    of its requests, so that one forward over it serves them all.

    In lexicographic order everything that extends p follows p directly, so p is a prefix of another
    prompt exactly when it is a prefix of its successor. Long trunks go first: a long prompt tends
    to a long response, so the long work is under way early, and slots of like length share the
    cache. Within a trunk the shortest prompt goes first: it has the longest way to go."""
    work = []
    trunk = []  # of the last entry of work
    backwards = sorted(requests, key=lambda r: (r.prompt, r.number), reverse=True)
    for request in backwards:  # what extends p now comes just before p
        prompt = request.prompt
        if trunk[: len(prompt)] != prompt:  # no prefix of the trunk: it starts one of its own
            trunk = prompt
            work.append((trunk, deque()))
        work[-1][1].appendleft(request)  # so the last to come, the shortest, is first
    return sorted(work, key=lambda family: -len(family[0]))  # stable: equals stay in this order
