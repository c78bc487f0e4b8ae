"""What fits: devices, free memory, passes made again in halves, and what a run will take."""

import contextlib
import gc
import math
import os
import sys
import warnings

import torch
import torch.distributed as dist

from plumbing.commands import first_line
from plumbing.processes import many_processes, rank


def pick_device(name):
    """'auto' becomes the first there is of cuda, mps and cpu. ValueError: one that is not there."""
    there = ["cuda"] * torch.cuda.is_available()
    there += ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    if name != "auto" and name.partition(":")[0] not in there:
        raise ValueError(f"no device {name!r} here: give auto or {' or '.join(there)}")
    device = there[0] if name == "auto" else name
    if device == "cuda" and many_processes():
        return f"cuda:{os.environ['LOCAL_RANK']}"  # torchrun: one card a process
    return device


def precision(dtype, device, model):
    """Of the matrix products: 'auto' is bfloat16 on a GPU, and on a CPU with instructions for it
    (AVX512-BF16, AMX), where they are twice as fast; float32 elsewhere. A tiny model spends its
    time on other things. model: on the meta device will do."""
    if dtype != "auto":
        return dtype
    if device == "cpu" and sum(p.numel() for p in model.parameters()) > 10e6:
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
    which changes no gradient. clear: functions called in between, to forget the gradient so far."""
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
        for forget in clear:
            forget()
        gc.collect()  # what holds itself in a cycle
        torch.cuda.empty_cache()
        now = f"going on with --tokens_per_microbatch {config.tokens_per_microbatch}"
        warnings.warn(f"out of memory: {now}", stacklevel=2)


def offload(optimizer, device):
    """From now on Adam's moments wait in host memory between optimizer steps."""

    def move_to(where):
        for state in optimizer.state.values():
            for name, tensor in state.items():
                if tensor.dim() > 0:  # not the step's number, which Adam wants on the CPU
                    state[name] = tensor.to(where)

    optimizer.register_step_pre_hook(lambda *_: move_to(device))
    optimizer.register_step_post_hook(lambda *_: move_to("cpu"))


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
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * kv_heads * head_dim


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
    device = pick_device(config.device)
    owners = forecast(config, model, precision(config.dtype, device, model) == "bfloat16")
    owners["together"] = sum(owners.values())
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    lines = [f"{config.model}: {millions:,.1f} million parameters, {config.algo} on {device}"]
    for owner, size in owners.items():
        lines.append(f"{owner:<12}{size / 2**30:9.2f} GiB")
    free = free_memory(device)
    if free < math.inf:
        fits = "it fits" if owners["together"] < free else f"it does not fit: try {LESS}"
        lines.append(f"{'free':<12}{free / 2**30:9.2f} GiB: {fits}")
    return "\n".join(lines)


def forecast(config, model, bfloat16):
    """{owner: bytes} in a process at the peak, which is in the update. config: a run's settings;
    bfloat16: are matrix products in bfloat16? Activations are those of a Llama-like layer."""
    shape = model.config.get_text_config()
    layers, hidden = shape.num_hidden_layers, shape.hidden_size
    inner = getattr(shape, "intermediate_size", None) or 4 * hidden
    column = kv_numbers(shape)  # numbers of a token in the cache
    kv = column / 2 / layers  # width of a layer's keys

    # Bytes of weights in float32, and of a copy that is not trained.
    policy = 4 * sum(p.numel() for p in model.parameters())
    frozen = policy / 2 if bfloat16 else policy
    critic = 4 * sum(p.numel() for p in model.base_model.parameters())
    if config.algo != "ppo":
        critic = 0
    decoder = frozen * (bfloat16 or config.fsdp)  # a copy for the engine
    reference = frozen * (config.kl_coef > 0 or config.kl_sample > 0)
    if config.algo in ("expert", "rcrl"):  # rounds start from its weights
        reference = policy

    # A micro-batch: what a layer keeps for the backward pass, a token; a chunk of logits.
    kept = 4 * (9 * hidden + 4 * inner + 1.5 * kv) * (0.6 if bfloat16 else 1)
    tokens = config.tokens_per_microbatch
    activations = tokens * layers * kept
    if config.gradient_checkpointing:  # a layer's input, and all of one layer
        activations = tokens * (layers * 4 * hidden + kept)
    logits = 8 * min(tokens * shape.vocab_size, 2**25)  # and their softmax

    # The cache of keys and values. With --offload_optimizer it is freed before the update.
    columns = 64 * math.ceil(min(config.context, PROMPT + config.max_new_tokens) / 64)
    width = 2 if bfloat16 else 4  # bytes of a number
    slots = config.slots or min(512 if bfloat16 else 256, config.questions * config.rollouts)
    cache = slots * (columns * column * width + 16 * shape.vocab_size)

    # --fsdp: embedding and head stay gathered for a pass, weights and gradient; and two layers.
    parts = dist.get_world_size() if config.fsdp and many_processes() else 1
    tables = 4 * 2 * shape.vocab_size * hidden
    gathered = (2 * tables + 2 * (policy - tables) / layers) * config.fsdp
    owners = {
        "policy": policy / parts + decoder,
        "critic": critic / parts,
        "reference": reference,
        "optimizer": 2 * (policy + critic) / parts,
        "gradients": max(policy, critic) / parts + gathered,
        "cache": 0 if config.offload_optimizer else cache,
        "activations": activations + logits,
    }
    if config.offload_optimizer:  # then these are never on the device together
        owners[min("optimizer", "activations", key=owners.get)] = 0
    return owners


def choose_slots(model, columns, requests, reusable=0):
    """As many slots as half the free memory holds, up to where more stop paying (measured by
    `tests/benchmark.py generation`). reusable: bytes beyond the free ones that are ours to use,
    such as an old cache's."""
    config = model.config.get_text_config()
    cache = columns * kv_numbers(config) * model.dtype.itemsize  # bytes a slot
    logits = 16 * config.vocab_size  # and what is computed from them
    most = 256
    free = free_memory(model.device) + reusable
    if model.device.type == "cuda":
        most = 512
        free += torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
    return max(1, int(min(most, requests, free / 2 / (cache + logits))))
