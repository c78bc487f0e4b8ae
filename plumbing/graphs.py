"""CUDA graphs of a decode step: a step is a thousand small kernels, and launching them one by one
takes longer than running them. A graph is launched once, and the host never waits.

A graph is of one shape, and reads and writes the very tensors it was captured with. So steps come
in a few sizes, and whoever captures keeps the tensors alive.
"""

import bisect
import contextlib
import warnings

import torch


def step_sizes(device, dtype, slots, columns):
    """Rows and columns that a decode step may have, ascending, and after how many steps the host
    looks which slots are done. A CPU pays for every row and column, and looks each time. On CUDA a
    look waits for the card, and one graph serves all sizes up to the next of a few."""
    where = torch.device(device).type
    if where == "cpu" and dtype == torch.bfloat16:
        # Its product of bfloat16 matrices copies a table of which some columns are left out: to
        # read them, too, is faster while they are less than half.
        return range(slots + 1), [*range(columns // 2 + 1), columns], 1
    if where != "cuda":
        return range(slots + 1), range(columns + 1), 1
    widths = [slots // 8, slots // 4, slots // 2, slots]
    depths = [64, 128, 256, 384, 512, *range(768, columns, 256)]
    return widths, [depth for depth in depths if depth < columns] + [columns], 8


def round_up(size, sizes):
    """The least of the ascending `sizes` that is as large, or the largest there is."""
    return sizes[bisect.bisect_left(sizes, min(size, sizes[-1]))]


class Graphs:
    """The graphs of one table of slots: key -> graph. They share their scratch memory."""

    def __init__(self):
        self.graphs = {}  # key -> the graph and what it reads in place
        self.pool = torch.cuda.graph_pool_handle()
        self.works = True

    def replay_of(self, key, function, state, *reads):
        """A function that does what `function` does: the replay of a graph, which is captured when
        the key is new. state: tensors that it changes. reads: others that it reads, kept alive.
        `function` itself, with a warning, for one that cannot be captured."""
        if key not in self.graphs and self.works:
            try:
                self.graphs[key] = self.capture(function, state), reads
            except RuntimeError as error:  # it reads numbers back, or memory is short
                self.works = False
                reason = " ".join(str(error).split())[:100]
                warnings.warn(f"no CUDA graph, so decoding is slower: {reason}", stacklevel=4)
        return self.graphs[key][0].replay if key in self.graphs else function

    def capture(self, function, state):
        saved = [x.clone() for x in state]
        before = torch.cuda.get_sync_debug_mode()
        try:
            function()  # as a capture asks; and here it is compiled, which waits for the card
            # Here a function that waits fails harmlessly: inside a capture it would invalidate
            # that, and leave the allocator in disorder.
            torch.cuda.set_sync_debug_mode("error")
            function()
        finally:
            torch.cuda.set_sync_debug_mode(before)
            for x, old in zip(state, saved):
                x.copy_(old)
        graph = torch.cuda.CUDAGraph()
        try:
            # The outer `with` comes back to today's stream even where the inner one fails to.
            # thread_local: other threads, such as NCCL's, may do what a capture may not.
            with torch.cuda.stream(torch.cuda.current_stream()):
                with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                    function()
        except RuntimeError:
            with contextlib.suppress(RuntimeError):  # it ended regularly
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self.pool)
            raise
        return graph
