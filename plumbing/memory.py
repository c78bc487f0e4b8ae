"""What fits: devices, free memory, passes made again in halves, and what a run will take."""

import contextlib
import math
import warnings

import torch
import torch.distributed as dist

from plumbing.processes import many_processes


def pick_device(name):
    """'auto' becomes the first there is of cuda, mps and cpu. ValueError: one that is not there."""
    there = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
    there += ["cpu"]
    if name != "auto" and name.partition(":")[0] not in there:
        raise ValueError(f"no device {name!r} here: give auto or {' or '.join(there)}")
    return there[0] if name == "auto" else name


def free_memory(device):
    """Bytes that are free on a device; infinity where nobody says."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError, StopIteration), open("/proc/meminfo") as lines:
        available = next(line for line in lines if line.startswith("MemAvailable"))
        return 1024 * int(available.split()[1])
    return math.inf


def until_it_fits(settings, clear=None):
    """`with` blocks to do the same thing in until memory suffices: a next one has half the
    tokens_per_microbatch, which changes no gradient. clear: called between them, to forget the
    gradient so far."""
    fitted = []
    while not fitted:
        yield halve_when_full(settings, clear, fitted)


@contextlib.contextmanager
def halve_when_full(settings, clear, fitted):
    try:
        yield
        fitted.append(True)
    except torch.OutOfMemoryError:
        if settings.tokens_per_microbatch < 2 or settings.fsdp:  # others wait for this very pass
            raise
        settings.tokens_per_microbatch //= 2
        if clear is not None:
            clear()
        tokens = settings.tokens_per_microbatch
        warnings.warn(
            f"out of memory: going on with --tokens_per_microbatch {tokens}", stacklevel=2
        )
        torch.cuda.empty_cache()


def move_state(optimizer, device):
    """Adam's moments, to where they are needed or to where they wait."""
    for state in optimizer.state.values():
        for name, tensor in state.items():
            if tensor.dim() > 0:  # not the step's number, which Adam wants on the CPU
                state[name] = tensor.to(device)


def kv_numbers(config):
    """Numbers in the keys and values of one token, in all layers."""
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * kv_heads * head_dim


PROMPT = 256  # tokens of a question, taken to be the longest


def forecast(args, model, bfloat16, reference):
    """{owner: bytes} in a process at the peak, which is in the update. model: may lie on the meta
    device; bfloat16: are matrix products in bfloat16? reference: its dtype, None if there is none.
    Activations are those of a Llama-like layer."""
    config = model.config.get_text_config()
    layers, hidden = config.num_hidden_layers, config.hidden_size
    column = kv_numbers(config)
    kv = column / 2 / layers  # width of a layer's keys
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    policy = 4 * sum(p.numel() for p in model.parameters())
    critic = 4 * sum(p.numel() for p in model.base_model.parameters()) * (args.algo == "ppo")
    columns = -(-min(args.context, PROMPT + args.max_new_tokens) // 64) * 64
    width = 2 if bfloat16 else 4
    slots = args.slots or min(512 if bfloat16 else 256, args.questions * args.rollouts)
    # what a layer keeps for the backward pass, a token
    kept = 4 * (9 * hidden + 4 * inner + 1.5 * kv) * (0.6 if bfloat16 else 1)
    tokens = args.tokens_per_microbatch
    activations = tokens * layers * kept
    if args.gradient_checkpointing:
        activations = tokens * (layers * 4 * hidden + kept)
    cache = slots * (columns * column * width + 16 * config.vocab_size)
    logits = 8 * min(tokens * config.vocab_size, 2**25)  # a chunk and its softmax
    decoder = policy / 2 if bfloat16 else policy * args.fsdp  # a copy of the weights
    parts = dist.get_world_size() if args.fsdp and many_processes() else 1
    # --fsdp: embedding and head stay gathered for a pass, weights and gradient; and two layers
    tables = 4 * 2 * config.vocab_size * hidden
    gathered = (2 * tables + 2 * (policy - tables) / layers) * args.fsdp
    owners = {
        "policy": policy / parts + decoder,
        "critic": critic / parts,
        "reference": {None: 0, "bfloat16": policy / 2, "float32": policy}[reference],
        "optimizer": 2 * (policy + critic) / parts,
        "gradients": max(policy, critic) / parts + gathered,
        "cache": 0 if args.offload_optimizer else cache,  # then it is freed before the update
        "activations": activations + logits,
    }
    if args.offload_optimizer:  # then these are never on the device together
        owners[min("optimizer", "activations", key=owners.get)] = 0
    return owners


def choose_slots(model, columns, requests, kept=None):
    """As many slots as half the free memory holds, up to where more stop paying (measured by
    `tests/benchmark.py generation`). kept: a cache whose memory is ours to use again."""
    config = model.config.get_text_config()
    # bytes of cache, and of logits
    row = columns * kv_numbers(config) * model.dtype.itemsize + 16 * config.vocab_size
    most, free = 256, free_memory(model.device)
    if model.device.type == "cuda":
        most = 512
        free += torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
    if kept is not None:  # a Cache of no layers of its own is false
        free += sum(table.nbytes for tables in kept.tables.values() for table in tables)
    return max(1, int(min(most, requests, free / 2 / row)))


def longest_context(config):
    rope = getattr(config, "rope_parameters", None) or {}
    limit = getattr(config, "max_position_embeddings", None)
    if rope.get("rope_type") == "longrope":  # beyond, the longest row changes all frequencies
        limit = rope.get("original_max_position_embeddings", limit)
    return limit
