"""The machine under the scripts: processes, devices and memory, files, signals, command lines.

A first reading can do without it; nothing here is about learning but `memory`'s estimate.

    several processes   torchrun starts them. All see the same questions, responses and rewards;
                        what is split is the work: requests, answers to grade, rows of a minibatch;
                        and, by --fsdp, the training weights
    memory              a pass that does not fit is made again in halves; what a run will take
    files               a kill or a full disk leaves the old file or the new one, never half a file
    command lines       a table of settings, a line each; bad input is one line and exit code 2
"""

import argparse
import contextlib
import logging
import math
import os
import shutil
import signal
import sys
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

# --------------------------------------------------------------------------- several processes


@contextlib.contextmanager
def several_processes():
    """Under torchrun, the process group; else nothing."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def from_first_process(objects):
    if many_processes():
        dist.broadcast_object_list(objects)
    return objects


def rank():
    return dist.get_rank() if many_processes() else 0


def many_processes():
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def share(items):
    """This process's part of a list, one in so many; alone, all of it."""
    return all_shares(items)[rank()]


def all_shares(items):
    """Every process's share, in the order of their ranks."""
    size = dist.get_world_size() if many_processes() else 1
    return [items[start::size] for start in range(size)]


def all_sum(tensor):
    """The sum over the processes, in place."""
    if many_processes():
        dist.all_reduce(tensor)
    return tensor


def gather(items):
    """The lists of all processes' shares, put together again in the order before `share`."""
    if not many_processes():
        return items
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, items)
    together = [None] * sum(map(len, parts))
    for start, part in enumerate(parts):
        together[start :: len(parts)] = part
    return together


def seed_of(*numbers):
    """A seed for `rollout.generate` that depends on all of these numbers and on nothing else."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 2)


def is_part(tensor):
    """Is it one process's part of a tensor (FSDP's)?"""
    return hasattr(tensor, "full_tensor")


def in_parts(model):
    return any(map(is_part, model.parameters()))


def whole(tensor):
    """All processes' parts, together; of any other tensor, itself."""
    return tensor.full_tensor() if is_part(tensor) else tensor


def put_together(state):
    """A state dict without parts: a collective where there are any (--fsdp)."""
    if isinstance(state, dict):
        return {name: put_together(value) for name, value in state.items()}
    return whole(state).cpu() if is_part(state) else state


def take_apart(state, like):
    """Replace the tensors in a state dict by this process's parts, where the parameters of the same
    names are parts."""
    from torch.distributed.tensor import distribute_tensor

    for name, value in state.items():
        parameter = like.get(name)
        if is_part(parameter) and value.shape == parameter.shape:
            where = parameter.device_mesh, parameter.placements
            state[name] = distribute_tensor(value.to(parameter.device), *where)


# --------------------------------------------------------------------------- devices and memory


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


def memory(args, model, bfloat16, reference):
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


# --------------------------------------------------------------------------- files


def load_model(path, *, device="cpu", dtype="float32"):
    """(model, tokenizer) of a folder, of a run's folder (its model/) or of a hub id. device: auto,
    cpu, cuda, mps. dtype: float32, bfloat16, float16, or auto (bfloat16 on CUDA). Runs no code from
    the hub; weights are safetensors, else .bin files, of which only tensors are read."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"unknown dtype {dtype!r}: give auto, float32, bfloat16 or float16")
    device = pick_device(device)
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    if Path(path, "model", "config.json").exists():
        path = Path(path, "model")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, dtype), weights_only=True
        )
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # offline, no such folder, half a folder, an unknown architecture
        raise ValueError(
            f"cannot load a model from {str(path)!r} ({type(error).__name__}: "
            f"{first_line(error)}): give --model a folder with config.json, *.safetensors (or "
            "*.bin) and a tokenizer, or a hub id"
        ) from error
    return model.to(device).eval(), tokenizer


def save_model(model, tokenizer, folder, weights=None):
    """Model and tokenizer as `from_pretrained` loads them; weights: others than the model's own, by
    name. Each file is written elsewhere and renamed over the old one: whole at any moment."""
    folder = Path(folder)
    beside = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        model.save_pretrained(beside, state_dict=weights)
        tokenizer.save_pretrained(beside)
    except Exception as error:  # a full disk has many names
        raise OSError(f"cannot save a model in {folder} ({first_line(error)})") from error
    files = [file for file in beside.rglob("*") if file.is_file()]  # templates may have a folder
    # config.json last: whoever looks for it finds all
    for file in sorted(files, key=lambda file: file.name == "config.json"):
        target = folder / file.relative_to(beside)
        target.parent.mkdir(parents=True, exist_ok=True)
        put_in_place(file, target)
    shutil.rmtree(beside)


def put_in_place(written, target):
    """Rename a file that was written beside over its target, once the disk has it."""
    with open(written, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(written, target)


def save_state(state, path):
    """torch.save: the file is the old one or the new one, whatever interrupts this, a full disk
    too (OSError)."""
    beside = path.with_name(f"{path.name}.tmp")
    try:
        torch.save(state, beside)
        put_in_place(beside, path)
    except (OSError, RuntimeError) as error:  # a full disk is either
        reason = f"cannot save in {path.parent} ({first_line(error)})"
        raise OSError(f"{reason}: its last checkpoint is whole") from error


def write(path, text):
    """The file is the old one or the new one, whatever interrupts this."""
    if rank() == 0:
        path.with_suffix(".tmp").write_text(text)
        put_in_place(path.with_suffix(".tmp"), path)


# --------------------------------------------------------------------------- signals, command lines


class Stop(Exception):
    """Ends a run that is saved. code: the exit code."""

    def __init__(self, text, code):
        super().__init__(text)
        self.code = code


@contextlib.contextmanager
def signals_wait():
    """SIGTERM and Ctrl-C fill `.came` and, where `.wait` says so, let the iteration finish; the
    second one interrupts at once."""
    signals = SimpleNamespace(came=[], wait=False)

    def ask(number, frame):
        signals.came.append(number)
        if not signals.wait or len(signals.came) > 1:
            raise KeyboardInterrupt
        print("\nfinishing this iteration; Ctrl-C again: at once", file=sys.stderr)

    if threading.current_thread() is not threading.main_thread():
        yield signals  # signals are not this thread's
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def progress_bar(name, total, unit, shown=True, initial=0, leave=True):
    """A tqdm bar; where stderr is no terminal but a log file, a line in ten seconds at most."""
    terminal = sys.stderr.isatty()
    return tqdm(
        desc=name, total=total, unit=unit, disable=not shown, initial=initial,
        leave=leave and terminal, mininterval=0.1 if terminal else 10, maxinterval=10,
        bar_format=None if terminal else "{l_bar}{bar:20}{r_bar}\n",
    )  # fmt: skip


# A script's settings are a table with one a line: name, default (and, behind a comma, the default
# for other data sets), what it may be, help. `off` makes a flag that takes no value; `-` is none.
# What it may be: a|b|c one of these; 1.. at least 1; 0..1 between; + several; - anything.


def read_settings(table):
    """{name: (default, default for other data sets, what it may be, help)} of a table."""
    settings = {}
    for line in filter(str.strip, table.splitlines()):
        name, default, allowed, text = line.split(None, 3)
        small, _, large = default.partition(",")
        settings[name] = value(small), value(large or small), allowed, text
    return settings


def value(text):
    """'60' -> 60, '1e-4' -> 0.0001, 'off' -> False, '-' -> None, other text as it is."""
    if text in ("-", "off"):
        return {"-": None, "off": False}[text]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def parse_flags(table, description, argv=None):
    """The flags that were given: {name: value}. --data-dir is --data_dir; a bad flag is a
    ValueError of one line."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)

    def fail(message):
        raise ValueError(f"{message} (see --help)")

    parser.error = fail
    for name, (small, large, allowed, text) in read_settings(table).items():
        help = text if small is None or small is False else f"{text} (default {small}"
        if help != text:
            help += ")" if large in (small, None) else f"; other data sets {large})"
        help = help.replace("%", "%%")
        kind = str if small is None else type(small)
        if small is False:
            parser.add_argument(f"--{name}", action="store_true", default=None, help=help)
        else:
            metavar = allowed if "|" in allowed else kind.__name__
            several = {"nargs": "+"} if allowed == "+" else {}
            parser.add_argument(f"--{name}", type=kind, metavar=metavar, help=help, **several)
    args = []
    for arg in sys.argv[1:] if argv is None else argv:
        flag, equals, rest = arg.partition("=")
        if flag.startswith("--"):
            flag = "--" + flag[2:].replace("-", "_")
        args.append(flag + equals + rest)
    given = vars(parser.parse_args(args))
    return {name: value for name, value in given.items() if value is not None}


def check_settings(table, args):
    """ValueError names the first setting that is not what it may be, and its limits."""
    for name, (_, _, allowed, _) in read_settings(table).items():
        given = getattr(args, name)
        if "|" in allowed and given not in allowed.split("|"):
            raise ValueError(f"--{name} {given}: choose from {allowed.replace('|', ', ')}")
        low, dots, high = allowed.partition("..")
        if dots and high and not float(low) <= given <= float(high):
            raise ValueError(f"--{name} {given} must be in [{low}, {high}]")
        if dots and not high and not given >= float(low):
            raise ValueError(f"--{name} {given} must be at least {low}")


def command_line(main):
    """Run main() as a program: bad input, a full disk or a loss gone NaN is one line on stderr and
    exit code 2; Ctrl-C is 130."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # "Loading weights" between the bars that matter
    name = Path(sys.argv[0]).name
    try:
        main()
    except (ValueError, FloatingPointError, OSError) as error:
        print(f"{name}: {first_line(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        sys.exit(130)


def first_line(error):
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def require(condition, message):
    if not condition:
        raise ValueError(message)
