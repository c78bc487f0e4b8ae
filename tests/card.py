"""A card to test with where there is none: its graphs, and what would make the host wait for it."""

import contextlib
import types

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from plumbing import graphs, slots


class Recorder(TorchDispatchMode):
    """Keeps the operations of a capture, with the very tensors that they read and wrote."""

    def __init__(self):
        super().__init__()
        self.operations, self.made, self.before = [], {}, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        for x in read if func._schema.is_mutable else []:
            place = x.untyped_storage().data_ptr()
            if place not in self.made and place not in self.before:
                storage = x.new_empty(0).set_(x.untyped_storage())
                self.before[place] = storage, storage.clone()
        out = func(*args, **kwargs or {})
        there = {x.untyped_storage().data_ptr() for x in read}
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in there:
                self.made[x.untyped_storage().data_ptr()] = x
        self.operations.append((func, args, kwargs or {}, out))
        return out


class Card:
    """What `Graphs` asks of torch.cuda, on a CPU. fails: what each capture ends with."""

    def __init__(self, monkeypatch, fails=None):
        self.current, self.mode, self.fails = "default", 0, fails
        self.pools, self.ended, self.replays = 0, [], 0
        for name in ("stream", "graph", "graph_pool_handle", "set_sync_debug_mode"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", types.SimpleNamespace)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.current)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: self.mode)
        end = "_cuda_endAllocateToPool"
        monkeypatch.setattr(torch._C, end, lambda *pool: self.ended.append(pool), raising=False)
        plain = slots.Slots.__init__

        def with_graphs(table, *given):
            plain(table, *given)
            table.graphs = graphs.Graphs()

        monkeypatch.setattr(slots.Slots, "__init__", with_graphs)

    def set_sync_debug_mode(self, mode):
        self.mode = mode

    def graph_pool_handle(self):
        self.pools += 1
        return self.pools

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def graph(self, graph, pool, capture_error_mode):
        """As torch's: when a capture fails, its end raises, and its stream stays the current one.
        A capture runs nothing: what it changed is put back."""
        assert capture_error_mode == "thread_local"
        self.current, recorder = "capture", Recorder()
        with recorder:
            yield
        with torch.inference_mode():
            for storage, old in recorder.before.values():
                storage.copy_(old)
        if self.fails:
            raise self.fails
        self.current = "default"
        graph.replay = lambda: self.replay(recorder)

    @torch.inference_mode()
    def replay(self, recorder):
        self.replays += 1
        for x in recorder.made.values():  # a graph's memory is anybody's between two replays
            x.fill_(float("nan") if x.is_floating_point() else 1)
        for func, args, kwargs, old in recorder.operations:
            for x, y in zip(tree_leaves(old), tree_leaves(func(*args, **kwargs))):
                if isinstance(x, torch.Tensor) and x.data_ptr() != y.data_ptr():
                    x.copy_(y)


class Waits(TorchFunctionMode):
    """Counts what would make the host wait for a card: reads, uploads, lists and masks as indices,
    numbers set through an index tensor."""

    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        waits = name in ("tolist", "item", "__bool__", "__int__", "__float__", "__index__")
        waits |= name in ("nonzero", "tensor", "as_tensor", "cpu", "cuda")
        if name in ("__getitem__", "__setitem__"):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            tensors = [i for i in index if isinstance(i, torch.Tensor)]
            waits = any(isinstance(i, (list, range, np.ndarray)) for i in index)
            waits |= any(i.dtype == torch.bool for i in tensors)
            waits |= bool(tensors and args[2:] and not isinstance(args[2], torch.Tensor))
        self.count += waits
        return func(*args, **kwargs or {})
