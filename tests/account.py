"""What a card would hold and move, by account: tensors that hold no numbers, on a card that is only
pretended (card.py). Nothing here is measured.

    update_memory   the peak of an update's bytes, beside the forecast of sfl.py --dry_run
    decode_step     a decode step: the peak of its bytes; kernels, bytes moved, and the time that
                    these would take if a card did nothing else
"""

import contextlib
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
from plumbing import attention, memory
from plumbing.slots import Slots

FAKE_DEVICE = FakeTensor.device.fget
# An H100 SXM: bytes a second (of 3.35e12), bfloat16 products a second (of 989e12), seconds that a
# kernel of a graph takes at least.
BANDWIDTH, FLOPS, LAUNCH = 2.8e12, 600e12, 2e-6


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


def decode_step(model_config, rows, used, sampling):
    """A decode step of `rows` slots that read `used` columns, in bfloat16. Returns its peak, bytes
    a row and entry of the vocabulary, and {kind: [kernels, bytes, seconds]}."""
    mode, account, [model] = fake_models(model_config, torch.bfloat16)
    vocab = model_config.vocab_size
    kinds = defaultdict(lambda: [0, 0, 0.0])

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
        times = moved / BANDWIDTH, flops / FLOPS, LAUNCH
        for i, amount in enumerate((1, moved, max(times))):
            kinds[kind][i] += amount

    with on_card(model), pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "check_servable", lambda model: None)
        engine = rollout.Engine(model, slots=rows)
        with mode, account:
            engine.table = table = Slots(model, rows, used)
            stop_ids = torch.zeros(2, dtype=torch.long, device="cuda")
            with attention.serving(model, table.cache):
                engine.decode_step(rows, used, stop_ids, sampling)  # makes the cache
                account.peak = before = account.now
                account.watch = watch
                engine.decode_step(rows, used, stop_ids, sampling)
    return (account.peak - before) / rows / vocab, dict(kinds)


def decode_report(model_config, rows, used, sampling):
    """The account of a decode step, as text."""
    peak, kinds = decode_step(model_config, rows, used, sampling)
    kernels, moved, seconds = map(sum, zip(*kinds.values()))
    settings = f"temperature {sampling.temperature}, top-p {sampling.top_p}"
    lines = [
        f"{rows} rows, {used} columns, {settings}: {kernels} kernels, {moved / 1e9:.1f} GB, "
        f"{1e3 * seconds:.1f} ms a step at least; {peak:.0f} bytes a row and entry"
    ]
    for kind, (kernels, moved, seconds) in sorted(kinds.items(), key=lambda item: -item[1][2]):
        lines.append(f"    {kind:17}{kernels:6} {moved / 1e9:7.2f} GB {1e3 * seconds:6.2f} ms")
    return "\n".join(lines)
