"""A table of slots: what a decode step reads and writes, and what the host knows of it.

Whatever goes from the host to a card or back makes the host wait for all steps it has launched. So
transfers are few and come packed: numbers for all slots together, and an index as one tensor (a
list would be uploaded at each use, and so would the 0 of `x[slots] = 0`).
"""

from functools import partial

import numpy as np
import torch

from plumbing.attention import SlotCache
from plumbing.graphs import Graphs, round_up, step_sizes


class Slots:
    """Number i of each tensor is slot i's. All lie on the model's device and are changed in place,
    as a CUDA graph needs it."""

    def __init__(self, model, slots, columns):
        self.device = device = model.device
        self.weights = weights_of(model)
        self.slots = slots
        self.columns = columns
        self.cache = SlotCache(slots, columns)
        zeros = partial(torch.zeros, device=device)
        # Six numbers a slot, all 0 in a free one:
        #   0 token    the last one, not in the cache yet
        #   1 length   its position: columns filled
        #   2 written  response tokens so far
        #   3 budget   and allowed
        #   4 live     1: still decoding
        #   5 stopped  1: ended by a stop
        self.numbers = zeros(slots, 6, dtype=torch.long)
        self.written = self.numbers[:, 2]  # views
        self.live = self.numbers[:, 4]
        self.stopped = self.numbers[:, 5]
        # Of the responses. They have fewer tokens than columns, as there is a prompt before them.
        # So a slot that is done can write on, behind its response, until somebody looks.
        self.tokens = zeros(slots, columns, dtype=torch.long)
        self.logprobs = zeros(slots, columns)
        self.uniforms = zeros(slots, columns)
        self.state = [self.numbers, self.tokens, self.logprobs, self.uniforms]
        # on the host
        self.owner = np.full(slots, None)  # the request in each slot
        self.filled = np.zeros(slots, dtype=int)  # `length`, or more
        sizes = step_sizes(device, model.dtype, slots, columns)
        self.widths, self.depths, self.look_every = sizes
        self.graphs = Graphs() if device.type == "cuda" else None

    def fits(self, model, slots, columns):
        """Can it serve so much? Not once the weights have moved: a graph reads the old ones."""
        large = self.slots >= slots and self.columns >= columns
        return large and self.weights == weights_of(model)

    def reusable(self):
        """Bytes that a new table may take besides the free ones: the cache's."""
        pairs = self.cache.tables.values()
        return sum(keys.nbytes + values.nbytes for keys, values in pairs)

    def occupy(self, free, ready):
        """Hand free slots to prefilled requests, as many as there are of both, and take them from
        these queues. ready: (place in the prefill, request) each."""
        starts = []
        uniforms = []
        longest = 0  # columns of a prompt
        while free and ready:
            slot = free.popleft()
            source, request = ready.popleft()
            *before, token = request.prompt  # their keys are there; the last token's are not
            length = len(before)
            numbers = [token, length, 0, request.budget, 1, 0]
            starts.append([slot, source, *numbers])
            uniforms.append(request.uniforms(self.columns))
            self.owner[slot] = request
            self.filled[slot] = length
            longest = max(longest, length)
        starts = torch.tensor(starts, device=self.device)  # (responses, 8): one upload
        slot = starts[:, 0]
        source = starts[:, 1]
        self.numbers[slot] = starts[:, 2:]
        if longest > 0:
            self.cache.fill(slot, self.cache.prefilled, source, longest)
        uniforms = np.stack(uniforms)  # (responses, columns)
        self.uniforms[slot] = torch.tensor(uniforms, device=self.device)

    def end_at_text(self, busy, stop):
        """End the responses whose last steps completed the stop text."""
        # Every token has a character: what completes the text, and the text, are in this many.
        reach = len(stop.text) + self.look_every
        ends = self.written.tolist()
        tokens = self.tokens[:, : max(ends)].tolist()
        for slot in busy:
            response = tokens[slot][: ends[slot]]
            if stop.text in stop.decode(response[-reach:]):
                self.written[slot] = stop.locate(response)[1]
                self.stopped[slot] = 1
                self.live[slot] = 0

    def release(self, done):
        """Free these slots. Returns of each (request, its `written` and `stopped`, tokens,
        log-probs); the last two may be longer than the response."""
        slot = torch.tensor(done, device=self.device)
        ends = self.written[slot].tolist()
        stopped = self.stopped[slot].tolist()
        longest = max(ends)
        tokens = self.tokens[slot, :longest].tolist()  # (done, time)
        logprobs = self.logprobs[slot, :longest].tolist()
        rows = list(zip(self.owner[done], ends, stopped, tokens, logprobs))
        self.owner[done] = None
        # A free slot among busy ones decodes on. At length 0 it sees its own column; left behind a
        # sliding window that has passed `used` it would see none, and write NaN into the table.
        self.numbers.index_fill_(0, slot, 0)
        return rows

    def close_up(self, busy):
        """The busy slots, and how many slots a step must compute: up to the last busy one. Where it
        makes them fewer, the last busy slots first move into the holes before them."""
        width = round_up(busy[-1] + 1, self.widths)
        narrow = round_up(len(busy), self.widths)
        if narrow == width:
            return busy, width
        holes = [slot for slot in range(len(busy)) if self.owner[slot] is None]
        movers = busy[len(busy) - len(holes) :]
        source, target = torch.tensor([movers, holes], device=self.device)
        longest = self.filled[movers].max()
        self.cache.fill(target, self.cache.tables, source, longest)
        for x in self.state:
            x[target] = x[source]
        self.numbers.index_fill_(0, source, 0)
        for x in (self.owner, self.filled):
            x[holes] = x[movers]
        self.owner[movers] = None
        return list(range(len(busy))), narrow


def weights_of(model):
    """Where a model's weights lie, and as what."""
    places = [p.data_ptr() for p in model.parameters()]
    return [model.device, model.dtype, *places]
