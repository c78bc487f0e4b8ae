"""What a card would hold and move, by account: tensors that hold no numbers, on a card that is only
pretended (card.py). Nothing here is measured.

    update_memory   the peak of an update's bytes, beside the forecast of sfl.py --dry_run
    decode_step     a decode step, plain or compiled: the peak of its bytes; kernels, bytes moved,
                    and the time that these would take if a card did nothing else
"""

import contextlib
import itertools
import math
import warnings
import weakref
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from card import Card, tensors_in
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import ppo
import rollout
import sfl
from plumbing import attention, fast, memory
from plumbing.slots import Slots

FAKE_DEVICE = FakeTensor.device.fget
# An H100 SXM: bytes a second (of 3.35e12), bfloat16 products a second (of 989e12), other
# instructions (132 cores, 128 a clock), seconds that a kernel of a graph takes at least.
BANDWIDTH, FLOPS, PLAIN, LAUNCH = 2.8e12, 600e12, 2.9e13, 2e-6
LONG = 2**14  # numbers of a row that are too many for a core to keep


class Account(TorchDispatchMode):
    """Bytes of the fake tensors that are alive: `now`, and `peak`. A number that is read is made
    up; a mask that selects is a real one. watch: called with each operation that moves bytes."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.alive = set()
        self.watch = lambda func, read, made: None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        read = list(tensors_in(args, kwargs))
        fake = any(isinstance(x, FakeTensor) for x in read)
        if fake and func is torch.ops.aten._local_scalar_dense.default:
            return True if args[0].dtype == torch.bool else 0.5
        if fake and func is torch.ops.aten.index.Tensor and args[1][0].dtype == torch.bool:
            mask = args[1][0]
            out = args[0].new_empty(int(mask.sum()), *args[0].shape[mask.dim() :])
        else:
            out = func(*args, **kwargs or {})
        if func is torch.ops.aten.logsumexp.default:  # inside, it makes exp(x - max)
            self.peak = max(self.peak, self.now + args[0].nbytes)
        made = [x for x in tensors_in(out) if isinstance(x, FakeTensor)]
        for x in made:
            self.count(x.untyped_storage())
        there = {x.untyped_storage()._cdata for x in read}
        is_view = all(x.untyped_storage()._cdata in there for x in made)
        if func._schema.is_mutable or not is_view:
            self.watch(func, read, made)
        return out

    def count(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self.alive:
            self.alive.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, key, size)

    def forget(self, key, size):
        self.alive.discard(key)
        self.now -= size


def fake_models(config, dtype, critic=False):
    """(mode, account, [policy] or [policy, critic]): models without numbers, in the account."""
    from transformers import AutoModelForCausalLM

    mode, account = FakeTensorMode(allow_non_fake_inputs=True), Account()
    with mode, account, pytest.MonkeyPatch.context() as patch:
        made = [AutoModelForCausalLM.from_config(config, dtype=dtype).eval()]
        if critic:  # a policy of its own makes it: copies of fake tensors have crashed
            patch.setattr(ppo, "copy", SimpleNamespace(deepcopy=lambda backbone: backbone))
            twin = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
            made.append(ppo.ValueModel(twin))
    return mode, account, made


@contextlib.contextmanager
def on_card(*models):
    """The models lie on a pretended card."""

    def device(x):  # PyTorch's own code, which runs inside the card's, sees the CPU
        inside = torch._C._len_torch_function_stack() == 0
        return FAKE_DEVICE(x) if inside else vars(x).get("pretended", x.fake_device)

    with pytest.MonkeyPatch.context() as patch, Card(patch) as card:
        patch.setattr(FakeTensor, "device", property(device))
        for model in models:
            card.tag([*model.parameters(), *model.buffers()], card.device)
        yield


def update_memory(model_config, flags, length=1024, prompt=128):
    """(said, accounted) bytes at the peak of an update: trained weights, gradients, moments and
    activations. flags: sfl.py's. There are two micro-batches of rollouts of `length` tokens, of
    which `prompt` are the prompt's."""
    config = sfl.parse(["--dataset", "gsm8k", *flags.split()])
    is_ppo = config.algo == "ppo"
    _, account, models = fake_models(model_config, torch.float32, critic=is_ppo)
    models[0].head_is_plain = True  # `check_head` would compare numbers
    config.dtype = memory.precision(config.dtype, "cuda", models[0])
    for model in models:
        if config.gradient_checkpointing:
            getattr(model, "backbone", model).gradient_checkpointing_enable()
        ppo.no_dropout(model)  # with it, checkpointing works in eval mode
    config.minibatch = 2 * max(1, config.tokens_per_microbatch // length)
    config.epochs = 1
    rollouts = [rollout.Rollout([5] * prompt, [6] * (length - prompt), [], True)] * config.minibatch
    ones = [torch.ones(length - prompt)] * config.minibatch
    lists = {"old_logprobs": ones, "ref_logprobs": ones}
    if is_ppo:
        lists |= {"critic": models[1], "values": ones, "returns": ones}
    with on_card(*models), account:
        weights = [p for model in models for p in model.parameters()]
        optimizer = torch.optim.AdamW(weights, weight_decay=0.0, fused=True)
        for _ in range(2):  # the first makes Adam's moments
            account.peak = account.now
            ppo.update(models[0], optimizer, rollouts, ones, config, **lists)
    said = memory.forecast(config, models[0], "cuda")
    said["policy"] /= 1.5 if config.dtype == "bfloat16" else 1  # the engine's copy is not here
    owners = "policy", "critic", "optimizer", "gradients", "activations"
    return sum(said[name] for name in owners), account.peak


def decode_step(model_config, rows, used, sampling, filled=None):
    """A decode step of `rows` slots that read `used` columns, in bfloat16. Returns its peak, bytes
    a row and entry of the vocabulary, and {kind: [kernels, bytes, seconds]}. filled: columns that
    a row holds on average; given, the step is a compiled one, which reads no others."""
    mode, account, [model] = fake_models(model_config, torch.bfloat16)
    vocab = model_config.vocab_size
    kinds = defaultdict(lambda: [0, 0, 0.0])

    def add(kind, moved, flops=0, work=0):
        times = moved / BANDWIDTH, flops / FLOPS, work / PLAIN, LAUNCH
        for i, amount in enumerate((1, moved, max(times))):
            kinds[kind][i] += amount

    def watch(func, read, made):
        name = func._schema.name.removeprefix("aten::")
        sizes = [x.numel() * x.element_size() for x in (*read, *made)]
        flops = 0
        if name in ("linear", "mm", "addmm", "matmul"):
            kind = "head" if made[0].shape[-1] == vocab else "layers' products"
            flops = 2 * made[0].numel() * read[-1].shape[-1]
        elif "scaled_dot_product" in name:
            kind = "attention"
        elif any(x.dim() and x.shape[-1] == vocab for x in (*read, *made)):
            kind = "draw"
        else:
            kind = "small kernels"
        moved = sum(sizes)
        if name in ("embedding", "gather", "index_put_", "scatter_", "index"):
            moved = 3 * min(sizes)  # they touch as many numbers as the smaller of their tensors has
        add(kind, moved, flops)

    calls = []  # of what a card compiles

    def later(function, compiled):
        def call(*args):
            account.watch, before = lambda *_: None, account.watch
            calls.append((compiled, args))
            out = function(*args)
            account.watch = before
            return out

        return call

    with on_card(model), pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "check_servable", lambda model: None)
        if filled is not None:
            plain = attention.decode.__wrapped__
            patch.setattr(rollout, "decode", later(plain, plain))
            patch.setattr(rollout, "draw_tokens", later(rollout.draw_tokens.__wrapped__, fast.draw))
        engine = rollout.Engine(model, slots=rows)
        with mode, account:
            engine.table = table = Slots(model, rows, used)
            stop_ids = torch.zeros(2, dtype=torch.long, device="cuda")
            with attention.serving(model, table.cache):
                engine.decode_step(rows, used, stop_ids, sampling)  # makes the cache
                account.peak = before = account.now
                account.watch = watch
                engine.decode_step(rows, used, stop_ids, sampling)
    with mode, attention.serving(model, table.cache):
        for function, args in calls[2:]:
            table.cache.biases.clear()
            for name, node, moved, work in fused(function, *args):
                flops = 0
                kind = "draw" if function is fast.draw else "small kernels"
                if "mm" in name:
                    kind = "head" if node.get_size()[-1] == vocab else "layers' products"
                    flops = 2 * math.prod(node.get_size()) * node.inputs[-1].get_size()[0]
                elif "varlen" in name:
                    kind = "attention"
                    keys, values = table.cache.tables[0]
                    moved = (keys.nbytes + values.nbytes) * filled / used
                    add("small kernels", 0)  # it also zeroes the state of a dropout
                add(kind, moved, flops, work)
    return (account.peak - before) / rows / vocab, dict(kinds)


# --------------------------------------------------------------------------- compiled


class Fused(Exception):
    """Nothing is left to do: the compiler has said into which kernels it would fuse."""


def fused(function, *args):
    """The kernels of a function of fake tensors, compiled for a card: [(name, if a library has it,
    first node, bytes, instructions), ...]. PyTorch's own compiler is asked what it would fuse for
    Triton, and stopped before it writes any."""
    from torch._inductor import config, ir

    kernels = []

    def look(nodes):
        for node in nodes:
            inner = node.get_nodes()[0].node
            moved, work = traffic(node)
            if moved:
                name = str(getattr(inner, "op_overload", None) or "")
                kernels.append((name, inner, moved, work))
        raise Fused

    torch._dynamo.reset()
    settings = {"cpu_backend": "triton", "_post_fusion_custom_pass": look}
    with pytest.MonkeyPatch.context() as patch, config.patch(settings), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(ir, "is_cpu", lambda x: False)  # what a CPU would rather store, it computes
        patch.setattr(attention, "reads_own_columns", lambda query: True)
        with pytest.raises(Exception, match="Fused"):
            torch.compile(function, dynamic=False)(*args)
    return kernels


def traffic(node):
    """(bytes, instructions) of a kernel. It moves what others made or need; and a row that is too
    long to keep, again for each sum over it that waits for another one. (Of such a row an entry
    takes ten instructions, and two for each sum that it is part of; else bytes decide.)"""
    parts, moved, loops, work = node.get_nodes(), {}, {}, 0
    makers = {name: part for part in parts for name in part.get_buffer_names()}
    for part in parts:
        before = [makers[dep.name] for dep in part.read_writes.reads if dep.name in makers]
        loops[part] = max([loops[p] + long(p) for p in before if p is not part], default=0)
        for name, size in part.get_read_write_buffer_accesses(True, True).items():
            users = part.scheduler.name_to_buf[name].users if name in makers else []
            if name not in makers or any(user.node not in parts for user in users):
                key = name, loops[part]
                moved[key] = max(size, moved.get(key, 0))
        work += 2 * entries(part) * long(part)
    return sum(moved.values()), work + 10 * max(map(entries, parts)) * (work > 0)


def entries(part):
    """How often a kernel's loop runs."""
    return math.prod(map(int, itertools.chain(*part.get_ranges()))) if part.is_reduction() else 0


def long(part):
    return part.is_reduction() and math.prod(map(int, part.get_ranges()[1])) > LONG


def decode_report(model_config, rows, used, sampling, filled=None):
    """The account of a decode step, as text."""
    peak, kinds = decode_step(model_config, rows, used, sampling, filled)
    kernels, moved, seconds = map(sum, zip(*kinds.values()))
    settings = f"temperature {sampling.temperature}, top-p {sampling.top_p}"
    how = f"{peak:.0f} bytes a row and entry"
    if filled is not None:
        how = f"compiled, a row's own {filled:.0f} columns"
    lines = [
        f"{rows} rows, {used} columns, {settings}: {kernels} kernels, {moved / 1e9:.1f} GB, "
        f"{1e3 * seconds:.1f} ms a step at least; {how}"
    ]
    for kind, (kernels, moved, seconds) in sorted(kinds.items(), key=lambda item: -item[1][2]):
        lines.append(f"    {kind:17}{kernels:6} {moved / 1e9:7.2f} GB {1e3 * seconds:6.2f} ms")
    return "\n".join(lines)
