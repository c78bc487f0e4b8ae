"""What fits: devices, free memory, passes made again in halves, and what a run will take."""

import contextlib
import copy
import gc
import math
import os
import sys
import warnings

import torch
import torch.distributed as dist

from plumbing.commands import first_line
from plumbing.logprobs import CHUNK
from plumbing.processes import is_part, many_processes, rank

SMALL = 10**6  # numbers of a model that a CPU serves as fast as a Mac's GPU
BFLOAT16_PAYS = 10**7  # numbers of a model that gains from bfloat16 on a CPU


def pick_device(name, numbers=None):
    """'auto' becomes the first there is of cuda, mps and cpu; not mps for a small model, if its
    `numbers` are given. ValueError: a device that is not there."""
    there = ["cuda"] * torch.cuda.is_available()
    there += ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    if name != "auto" and name.partition(":")[0] not in there:
        raise ValueError(f"no device {name!r} here: give auto or {' or '.join(there)}")
    device = there[0] if name == "auto" else name
    if name == "auto" and device == "mps" and numbers is not None:
        if numbers < SMALL:
            return "cpu"
        print("--device auto: mps, which was never tried (--device cpu was)", file=sys.stderr)
    if device.startswith("cuda"):
        # cuDNN's attention plans anew for every shape, and here every micro-batch has its own.
        # There remain flash attention, and the memory-efficient one where there is a mask.
        torch.backends.cuda.enable_cudnn_sdp(False)
    if device == "cuda" and many_processes():
        return f"cuda:{os.environ['LOCAL_RANK']}"  # torchrun: one card a process
    return device


def precision(dtype, device, model):
    """Of the matrix products: 'auto' is bfloat16 on a GPU, and on a CPU with instructions for it
    (AVX512-BF16, AMX), where they are twice as fast; float32 elsewhere. A tiny model spends its
    time on other things. model: on the meta device will do; only a CPU's answer depends on it."""
    if dtype != "auto":
        return dtype
    if device == "cpu" and sum(p.numel() for p in model.parameters()) > BFLOAT16_PAYS:
        return "bfloat16" if torch.cpu._is_avx512_bf16_supported() else "float32"
    return "bfloat16" if device.startswith("cuda") else "float32"


def free_memory(device):
    """Bytes that are free on a device; infinity where nobody says."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError, StopIteration), open("/proc/meminfo") as lines:
        available = next(line for line in lines if line.startswith("MemAvailable"))
        return 1024 * int(available.split()[1])
    return math.inf


def is_out_of_memory(error):
    """CUDA's libraries and the CPU's allocator say it in words of their own."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    texts = ("out of memory", "can't allocate memory", "ALLOC_FAILED", "ALLOCATION_FAILED")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)


def halve_until_it_fits(function, config, *clear):
    """function(), and again with half of config.tokens_per_microbatch whenever memory runs out,
    which changes no gradient. clear: functions (or None) called in between, to give memory back."""
    while True:
        try:
            return function()
        except Exception as error:
            # With --fsdp other processes wait in this very pass.
            if config.tokens_per_microbatch < 2 or config.fsdp or not is_out_of_memory(error):
                raise
        # Behind the handler: the exception holds the frames it came through, and their locals hold
        # the graph of the failed pass. Only now is that memory free.
        config.tokens_per_microbatch //= 2
        for forget in filter(None, clear):
            forget()
        gc.collect()  # what holds itself in a cycle
        torch.cuda.empty_cache()
        now = f"going on with --tokens_per_microbatch {config.tokens_per_microbatch}"
        warnings.warn(f"out of memory: {now}", stacklevel=2)


def offload(optimizer, device):
    """From now on Adam's moments wait in host memory. A step fetches those of the weights that have
    a gradient: of two models, one model's."""
    on_cuda = torch.device(device).type == "cuda"

    def fetch(*_):
        for parameter, state in optimizer.state.items():
            for name, tensor in state.items():
                if parameter.grad is not None and tensor.dim() > 0:  # 0: the step's number stays
                    state[name] = tensor.to(device, non_blocking=True)

    def put_away(*_):
        for state in optimizer.state.values():
            for name, tensor in state.items():
                if tensor.dim() > 0 and tensor.device.type != "cpu":
                    # From and to memory that is pinned, a card copies several times as fast.
                    home = torch.empty_like(tensor, device="cpu", pin_memory=on_cuda)
                    state[name] = home.copy_(tensor, non_blocking=True)
        if on_cuda:
            torch.cuda.synchronize()  # before somebody reads them here

    optimizer.register_step_pre_hook(fetch)
    optimizer.register_step_post_hook(put_away)
    optimizer.register_load_state_dict_post_hook(put_away)  # loading follows the weights


def moments_to_come(optimizer):
    """Bytes of Adam's moments that are not there yet: the first optimizer step makes them."""
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    new = [p.to_local() if is_part(p) else p for p in weights if p not in optimizer.state]
    return 2 * sum(p.nbytes for p in new)


def fitting(prompts, limit, settings, which):
    """Indices of the prompts that leave room for --max_new_tokens in a context of `limit` tokens.
    ValueError: one does not and there is no --skip_long, or none does."""
    room = limit - settings.max_new_tokens
    fits = [i for i in range(len(prompts)) if len(prompts[i]) <= room]
    long = [i for i in range(len(prompts)) if len(prompts[i]) > room]
    context = f"the context of {limit} with --max_new_tokens {settings.max_new_tokens}"
    if not fits:
        shortest = f"the shortest is {min(map(len, prompts))} tokens"
        raise ValueError(f"no {which} question fits {context} ({shortest}): lower --max_new_tokens")
    if long and not settings.skip_long:
        first = f"{which} question {long[0]} is {len(prompts[long[0]])} tokens: too long for"
        way_out = f"({len(long)} of {len(prompts)} are): lower that, or pass --skip_long"
        raise ValueError(f"{first} {context} {way_out}")
    if long and rank() == 0:
        count = f"{len(long)} of {len(prompts)} {which} questions"
        print(f"left out {count}, too long for {context}", file=sys.stderr)
    return fits


def kv_numbers(config):
    """Numbers in the keys and values of one token, in all layers."""
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 2 * config.num_hidden_layers * kv_heads * head_dim(config)


def head_dim(config):
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


PROMPT = 256  # tokens of a question, taken to be the longest
LESS = "--gradient_checkpointing, --offload_optimizer, --fsdp, --tokens_per_microbatch, --slots"


def outline(path):
    """A model of that configuration without weights, on the meta device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(path)
    except Exception as error:  # no such folder, offline, an unknown architecture
        reason = f"cannot read a configuration in {path!r} ({first_line(error)})"
        raise ValueError(
            f"{reason}: give --model a folder with config.json, or a hub id"
        ) from error
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def dry_run(config, model):
    """What a run would take, as a table. model: on the meta device will do."""
    numbers = sum(p.numel() for p in model.parameters())
    device = pick_device(config.device, numbers)
    make_it_fit(config, model, device)
    free = free_memory(device)
    owners = forecast(config, model, device, free)
    owners["together"] = sum(owners.values())
    million = f"{numbers / 1e6:,.1f} million parameters"
    lines = [f"{config.model}: {million}, {config.algo} on {device}"]
    for owner, size in owners.items():
        lines.append(f"{owner:<12}{size / 2**30:9.2f} GiB")
    if free < math.inf:
        fits = "it fits" if owners["together"] < free else f"it does not fit: try {LESS}"
        lines.append(f"{'free':<12}{free / 2**30:9.2f} GiB: {fits}")
    return "\n".join(lines)


HOME = "home-gsm8k"  # the preset of a run that fits 24 GB
# What makes a run smaller and changes no gradient, the cheapest first.
SMALLER = [("tokens_per_microbatch", 8192), ("tokens_per_microbatch", 4096)]
SMALLER += [("gradient_checkpointing", True), ("offload_optimizer", True)]


def make_it_fit(config, model, device):
    """On CUDA, change `config` until the forecast fits, and say so. model: the policy, on the
    device or on the meta device. Not with --fsdp: its processes must all take the same."""
    if not device.startswith("cuda") or config.fsdp:
        return
    free = free_memory(device) + sum(p.nbytes for p in model.parameters() if p.is_cuda)
    needed, changes = shrink(config, model, device, free)
    sizes = f"{needed / 2**30:.1f} GiB of {free / 2**30:.1f} that are free"
    hint = "" if config.preset == HOME else f" (try --preset {HOME})"
    said = "so that it fits:" if needed < free else f"it may not fit{hint}:"
    flags = " ".join(f"--{name} {value}" for name, value in changes.items())
    if rank() == 0 and (changes or needed >= free):
        print(f"{said} {flags} ({sizes})", file=sys.stderr)


def is_too_large(config):
    """Is a run larger than the card, by its forecast, even after `shrink`? If so, says that HOME is
    used. Reads the model's configuration alone."""
    device = pick_device(config.device) if torch.cuda.is_available() else "cpu"
    if not device.startswith("cuda") or config.fsdp:
        return False
    try:
        model = outline(config.model)
    except ValueError:  # offline, say: to load it will fail, and say why
        return False
    free = free_memory(device)
    needed, _ = shrink(copy.copy(config), model, device, free)
    if needed >= free:
        sizes = f"{needed / 2**30:.1f} GiB at least, and {free / 2**30:.1f} are free"
        print(f"{config.model} takes {sizes}: going on as --preset {HOME}", file=sys.stderr)
    return needed >= free


def shrink(config, model, device, free):
    """Change `config` until the forecast fits, or SMALLER is used up. Returns the bytes that
    it needs then, and {setting: value}."""
    needed = sum(forecast(config, model, device, free).values())
    changes = {}
    for name, value in SMALLER:
        if needed < free:
            break
        if name == "tokens_per_microbatch":
            value = min(value, config.tokens_per_microbatch)
        if getattr(config, name) != value:
            setattr(config, name, value)
            changes[name] = value
            needed = sum(forecast(config, model, device, free).values())
    return needed, changes


def forecast(config, model, device, free=math.inf):
    """{owner: bytes} in a process at the peak of a run on a device. config: the run's settings;
    free: bytes on the device; of what is left of these the cache takes half at most. The peak is in
    the update, when a second micro-batch of the policy's goes backward through the head. The layers
    are taken to be a Llama's. `tests/benchmark.py forecast` shows how near that is."""
    bfloat16 = precision(config.dtype, device, model) == "bfloat16"
    on_cuda = device.startswith("cuda")
    shape = model.config.get_text_config()
    layers, hidden, vocab = shape.num_hidden_layers, shape.hidden_size, shape.vocab_size
    inner = getattr(shape, "intermediate_size", None) or 4 * hidden
    column = kv_numbers(shape)  # numbers of a token in the cache
    heads = column / 2 / layers + shape.num_attention_heads * head_dim(shape)  # of keys, of queries
    tokens = config.tokens_per_microbatch

    # Bytes of weights in float32, and of a copy that is not trained.
    policy = 4 * sum(p.numel() for p in model.parameters())
    frozen = policy / 2 if bfloat16 else policy
    backbone = 4 * sum(p.numel() for p in model.base_model.parameters())
    critic = backbone if config.algo == "ppo" else 0
    decoder = frozen * (bfloat16 or config.fsdp)  # a copy for the engine
    reference = frozen * (config.kl_coef > 0 or config.kl_sample > 0)
    if config.algo in ("expert", "rcrl"):  # rounds start from its weights
        reference = policy
    head = 4 * vocab * hidden
    layer = (backbone - head) / layers
    cast = layer / 2 * (bfloat16 and not config.fsdp)  # autocast's copy of it

    # Bytes that a layer keeps of a token for the backward pass. In float32: of either norm its
    # input (the residual stream), the normalized one and what it returns; queries, keys, values and
    # what attention returns; gate, its SiLU, up, and their product.
    kept = 4 * (6 * hidden + 2 * heads + 4 * inner)
    if bfloat16:  # the norms stay in float32; each product keeps an input of its own in bfloat16
        kept = (4 * 4 + 2 * 5) * hidden + 2 * (2 * heads + 4 * inner)
    activations = layers * (tokens * kept + cast)
    of_layer = 0
    if config.gradient_checkpointing:  # the layers' inputs, and of one layer all, twice at times
        activations = layers * tokens * 4 * hidden
        of_layer = 1.2 * tokens * kept + cast
    # The last norm, what the head reads, and its gradient. The head: a chunk of logits and its
    # softmax or, backward, its bfloat16 gradient; the weight's gradient; and in bfloat16 the weight
    # and a chunk's part of its gradient.
    activations += 16 * hidden * tokens
    chunk = min(tokens * vocab, CHUNK["cuda" if on_cuda else "cpu"])  # numbers
    backward = (6 if bfloat16 else 4) * chunk + (2 if bfloat16 else 1) * head
    activations += max(8 * chunk + head / 2 * bfloat16, backward, of_layer)

    # The cache of keys and values. With --offload_optimizer it is freed before the update.
    columns = 64 * math.ceil(min(config.context, PROMPT + config.max_new_tokens) / 64)
    width = 2 if bfloat16 else 4  # bytes of a number
    slots = config.slots or min(512 if on_cuda else 256, config.questions * config.rollouts)
    draw = draw_bytes(width, config.top_p < 1)
    cache = slots * (columns * column * width + draw * vocab)

    # --fsdp: embedding and head stay gathered for a pass, weights and gradient; and two layers.
    parts = dist.get_world_size() if config.fsdp and many_processes() else 1
    gathered = (2 * 2 * head + 2 * layer) / 4 * width * config.fsdp
    optimizer = 2 * (policy + critic) / parts
    if config.offload_optimizer:  # one model's at a time, and never with the activations
        optimizer = max(0, 2 * max(policy, critic) - activations)
    owners = {
        "policy": policy / parts + decoder,
        "critic": critic / parts,
        "reference": reference,
        "optimizer": optimizer,
    }
    if not config.slots:  # `choose_slots`
        cache = max(0, min(cache, (free - sum(owners.values())) / 2))
    owners["gradients"] = max(policy, critic) / parts + gathered
    owners["cache"] = 0 if config.offload_optimizer else cache
    owners["activations"] = activations
    return owners


def draw_bytes(width, truncated=True):
    """Bytes a slot and entry of the vocabulary at the peak of a decode step: logits, of `width`
    bytes each, their probabilities, what top-p or top-k left of these, the cdf. (Greedy: less.)"""
    return width + 4 * (3 if truncated else 2)


def choose_slots(model, columns, requests, reusable=0):
    """As many slots as half the free memory holds, up to where more stop paying (measured by
    `tests/benchmark.py generation`). reusable: bytes beyond the free ones that are ours to use,
    such as an old cache's."""
    config = model.config.get_text_config()
    cache = columns * kv_numbers(config) * model.dtype.itemsize  # bytes a slot
    logits = draw_bytes(model.dtype.itemsize) * config.vocab_size  # and what is made from them
    most = 256
    free = free_memory(model.device) + reusable
    if model.device.type == "cuda":
        most = 512
        free += torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
    return max(1, int(min(most, requests, free / 2 / (cache + logits))))
