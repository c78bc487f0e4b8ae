"""A card to test with where there is none.

    with Card(monkeypatch) as card:
        model = build().to("cuda")          # CPU numbers in tensors whose .device says cuda
        generate(model, prompts)            # graphs are recorded, and replayed over junk
    card.waits                              # {(what, line): how often the host waited for the card}

Every call on tensors passes `__torch_function__`. It tags what comes out, raises where tensors of
both devices meet, as PyTorch does, and counts what would make the host wait. Underneath all is CPU.
Not seen: what runs inside a backward pass, and how fast or large anything is.
"""

import contextlib
import sys
import types
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = str(Path(__file__).resolve().parent.parent)
CPU, META = torch.device("cpu"), torch.device("meta")
MOVES = {"to": None, "cuda": "cuda", "cpu": "cpu"}
READS = {"tolist", "item", "__bool__", "__int__", "__float__", "__index__", "__contains__"}
READS |= {"nonzero", "equal", "allclose", "masked_select", "unique"}
UPLOADS = {"tensor", "as_tensor", "asarray"}


def tensors_in(*values):
    """All tensors of nested lists, tuples and dicts."""
    for x in values:
        if isinstance(x, torch.Tensor):
            yield x
        elif isinstance(x, (list, tuple)):
            yield from tensors_in(*x)
        elif isinstance(x, dict):
            yield from tensors_in(*x.values())


class Recorder(TorchDispatchMode):
    """Keeps the operations of a capture, with the very tensors that they read and wrote."""

    def __init__(self):
        super().__init__()
        self.operations, self.made, self.before = [], {}, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        read = list(tensors_in(args, kwargs))
        for x in read if func._schema.is_mutable else []:
            place = x.untyped_storage().data_ptr()
            if place not in self.made and place not in self.before:
                storage = x.new_empty(0).set_(x.untyped_storage())
                self.before[place] = storage, storage.clone()
        out = func(*args, **kwargs or {})
        there = {x.untyped_storage().data_ptr() for x in read}
        for x in tensors_in(out):
            if x.untyped_storage().data_ptr() not in there:
                self.made[x.untyped_storage().data_ptr()] = x
        self.operations.append((func, args, kwargs or {}, out))
        return out


class Card(TorchFunctionMode):
    """fails: what each capture ends with. kind: 'cuda', or 'mps', which has no float64."""

    def __init__(self, monkeypatch, fails=None, kind="cuda"):
        super().__init__()
        self.device = torch.device(kind, 0)
        self.waits = Counter()
        self.current, self.mode, self.fails = "default", 0, fails
        self.pools, self.ended, self.replays = 0, [], 0
        self.patch = monkeypatch.setattr
        cuda = torch.cuda
        for name in ("stream", "graph", "graph_pool_handle", "set_sync_debug_mode"):
            self.patch(cuda, name, getattr(self, name))
        self.patch(cuda, "CUDAGraph", types.SimpleNamespace)
        self.patch(cuda, "current_stream", lambda: self.current)
        answers = {"current_device": 0, "synchronize": None, "get_device_capability": (9, 0)}
        answers |= {"mem_get_info": (2**36, 2**37), "memory_reserved": 0, "memory_allocated": 0}
        answers |= {"is_available": kind == "cuda", "is_bf16_supported": True, "empty_cache": None}
        answers |= {"reset_peak_memory_stats": None, "max_memory_allocated": 0}
        for name, answer in answers.items():
            self.patch(cuda, name, lambda *a, answer=answer, **k: answer)
        self.patch(cuda, "get_sync_debug_mode", lambda: self.mode)
        self.patch(torch.backends.mps, "is_available", lambda: kind == "mps")
        end = "_cuda_endAllocateToPool"
        self.patch(torch._C, end, lambda *pool: self.ended.append(pool), raising=False)
        self.patch_autocast()
        new = torch.nn.Parameter.__new__

        def parameter(kind, data=None, requires_grad=True):  # a new object, which has no tag yet
            made = new(kind, data, requires_grad)
            return made if data is None else self.tag(made, self.of(data))

        self.patch(torch.nn.Parameter, "__new__", parameter)

    def patch_autocast(self):
        """The card's autocast is the CPU's."""
        plain, enabled, dtype = torch.autocast, torch.is_autocast_enabled, torch.get_autocast_dtype

        class Autocast(plain):
            def __init__(self, device_type, *args, **how):
                super().__init__("cpu", *args, **how)

        self.patch(torch, "autocast", Autocast)
        self.patch(torch, "is_autocast_enabled", lambda *device: enabled("cpu"))
        self.patch(torch, "get_autocast_dtype", lambda device: dtype("cpu"))

    # ---- tensors

    @staticmethod
    def of(tensor):
        """The device that the tensor is said to be on."""
        return vars(tensor).get("pretended", tensor.device)

    @staticmethod
    def tag(out, device):
        for x in tensors_in(out):
            vars(x).pop("pretended", None)
            if device.type not in ("cpu", "meta"):
                vars(x)["pretended"] = device
        return out

    def where(self, device):
        """A device as it was asked for, 'cuda' say, with its number."""
        device = torch.device(device)
        return self.device if device.type == self.device.type else device

    def wait(self, what):
        """The host waits for the card, called from the innermost line of the project's own."""
        frame = sys._getframe(1)
        while (path := frame.f_code.co_filename) == __file__ or not path.startswith(ROOT):
            frame = frame.f_back
        line = f"{path[len(ROOT) + 1 :]}:{frame.f_lineno}"
        self.waits[what, line] += 1
        if self.mode == "error" or self.current == "capture":
            raise RuntimeError(f"called a synchronizing CUDA operation: {what} at {line}")

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__"):
            return self.attribute(func, args)
        if name == "__deepcopy__":
            return self.tag(func(*args), self.of(args[0]))
        tensors = list(tensors_in(args, kwargs))
        devices = {self.of(x) for x in tensors if x.dim() > 0}
        if META in devices:  # transformers makes a model without numbers first
            return func(*args, **kwargs)
        on_card = any(self.of(x) == self.device for x in tensors)
        here = self.device if on_card else CPU
        if name in MOVES and tensors:
            return self.move(name, *args, **kwargs)
        if kwargs.get("device") is not None or name in UPLOADS:
            return self.make(func, name, here, args, kwargs)
        if on_card and name in ("numpy", "__array__"):
            raise TypeError("can't convert a card's tensor to numpy: use Tensor.cpu() first")
        if on_card and name in READS:
            self.wait(f"read by {name}")
        elif on_card and name in ("__getitem__", "__setitem__"):
            self.look_at_index(*args)
        elif name == "copy_":
            here = self.of(args[0])
            if len(devices) > 1 and not kwargs.get("non_blocking"):
                self.wait("copy")
        elif len(devices) > 1 and name != "_has_compatible_shallow_copy_type":
            raise RuntimeError(f"Expected all tensors to be on the same device: {name}")
        out = func(*args, **kwargs)
        return self.tag(out, here) if on_card else out

    def attribute(self, func, args):
        """x.device and the like; x.data = y takes over y's device."""
        name = func.__self__.__name__
        if name == "device":
            return self.of(args[0])
        if name.startswith("is_") and name[3:] in ("cpu", "cuda", "mps"):
            return self.of(args[0]).type == name[3:]
        out = func(*args)
        if func.__name__ == "__set__" and name == "data":
            self.tag(args[0], self.of(args[1]))
        return self.tag(out, self.of(args[0])) if isinstance(out, torch.Tensor) else out

    def move(self, name, x, *args, non_blocking=False, **kwargs):
        """x.to(...), x.cpu(), x.cuda(): a wait where it goes from one device to the other."""
        places = [MOVES[name] or kwargs.pop("device", None)]
        rest = []
        for arg in args:
            if isinstance(arg, (str, torch.device)):
                places.append(arg)
            elif isinstance(arg, torch.Tensor):  # like that one
                places.append(self.of(arg))
                rest.append(arg.dtype)
            elif isinstance(arg, torch.dtype):
                rest.append(arg)
        target = next((self.where(place) for place in places if place is not None), self.of(x))
        out = x.to(*rest, **kwargs) if rest or kwargs else x
        if target == META:
            return out.to(target)
        if target != self.of(x):
            if not non_blocking:
                self.wait("copy")
            out = out.clone() if out is x else out
        self.check_float64(out, target)
        return self.tag(out, target) if out is not x else x

    def make(self, func, name, here, args, kwargs):
        """torch.zeros(..., device=...) and the like, torch.tensor of a list."""
        target = kwargs.pop("device", None)
        kwargs.pop("pin_memory", None)
        if target is None and name in ("as_tensor", "asarray"):
            target = here  # they leave a tensor where it is
        target = self.where(target or CPU)
        if target == META:
            return func(*args, **kwargs, device=META)
        if name in UPLOADS and target != here:
            self.wait("upload")
        out = func(*args, **kwargs)
        if args and out is args[0] and target != here:
            out = out.clone()
        self.check_float64(out, target)
        return self.tag(out, target)

    def check_float64(self, x, target):
        if target.type == "mps" and x.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

    def look_at_index(self, x, index, *value):
        index = index if isinstance(index, tuple) else (index,)
        tensors = [i for i in index if isinstance(i, torch.Tensor)]
        for i in index:
            if isinstance(i, (list, range, np.ndarray)):
                self.wait("upload of an index")
        for i in tensors:
            if i.dtype == torch.bool:
                self.wait("size of a mask")
            elif i.dim() > 0 and self.of(i) != self.of(x):
                self.wait("upload of an index")
        for new in value:
            if tensors and not isinstance(new, torch.Tensor):
                self.wait("upload of a number")
            elif isinstance(new, torch.Tensor) and new.dim() > 0 and self.of(new) != self.of(x):
                self.wait("copy")

    # ---- graphs

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
        with torch.inference_mode(), torch._C.DisableTorchFunction():
            for storage, old in recorder.before.values():
                storage.copy_(old)
        if self.fails:
            raise self.fails
        self.current = "default"
        graph.replay = lambda: self.replay(recorder)

    @torch.inference_mode()
    def replay(self, recorder):
        self.replays += 1
        with torch._C.DisableTorchFunction():  # its tensors have their tags
            for x in recorder.made.values():  # a graph's memory is anybody's between two replays
                x.fill_(float("nan") if x.is_floating_point() else 1)
            for func, args, kwargs, old in recorder.operations:
                for x, y in zip(tensors_in(old), tensors_in(func(*args, **kwargs))):
                    if x.data_ptr() != y.data_ptr():
                        x.copy_(y)
