"""Files that survive a kill: each is the old one or the new one, never half of one. A run's folder:

config.json          all settings
metrics.jsonl        a line an iteration
evaluation.json      held-out, before and after
model/               what from_pretrained loads
state/training.pt    what an exact resume needs besides: the weights that belong to it, Adam's
                     moments, the random numbers, the curriculum's state
lock                 held by the process that writes the folder, as long as it lives
"""

import contextlib
import itertools
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from plumbing.commands import first_line, require
from plumbing.memory import outline, pick_device, precision
from plumbing.processes import from_first_process, many_processes, put_together, rank, take_apart

try:
    import fcntl
except ImportError:  # Windows: there two processes are not kept apart
    fcntl = None

# --------------------------------------------------------------------------- a run's folder


def new_folder(config):
    """--out, or the first free one of runs/DATASET-ALGO-CURRICULUM-1, -2, ..., made."""
    if config.out:
        check_folder(config.out)
        Path(config.out).mkdir(parents=True, exist_ok=True)
        return Path(config.out)
    name = f"runs/{Path(config.dataset).stem}-{config.algo}-{config.curriculum}"
    for number in itertools.count(1):
        out = Path(f"{name}-{number}")
        # mkdir either makes a folder or fails: of two runs that start at once each gets its own.
        with contextlib.suppress(FileExistsError):
            out.mkdir(parents=True)
            return out


@contextlib.contextmanager
def claim(config):
    """Inside, the run's folder (made, if the run is new) is this run's alone. ValueError: another
    process has it."""
    folder = None
    with contextlib.ExitStack() as held:
        if rank() == 0:
            folder = Path(config.resume) if config.resume else new_folder(config)
            # As long as this file is open. A process that dies lets go of it.
            file = held.enter_context(open(folder / "lock", "w"))
            try:
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                way_out = "wait for it to end, or give another --out"
                raise ValueError(f"{folder} is in use by a run in progress: {way_out}") from error
        yield Path(from_first_process([str(folder)])[0])


def check_folder(out):
    """ValueError: a file, or a folder that holds something, which a new run would write over."""
    taken = Path(out).is_file()
    if Path(out).is_dir():
        taken = any(path.name != "lock" for path in Path(out).iterdir())
    way_out = f"go on with that run by --resume {out}, or give another --out"
    require(not taken, f"--out {out} holds something already: {way_out}")


def saved_settings(folder):
    """The settings of the run in a folder. ValueError: there is none."""
    try:
        saved = json.loads(Path(folder, "config.json").read_text())
        saved["fsdp"] = saved["fsdp"] and many_processes()  # one process needs no parts
    except (OSError, ValueError, KeyError, TypeError) as error:
        way_out = "give the folder that sfl.py --out wrote"
        reason = f"no run there ({first_line(error)})"
        raise ValueError(f"--resume {folder}: {reason}: {way_out}") from error
    return saved | {"out": folder, "resume": folder}


def check_changes(config, saved, changeable):
    """ValueError: a flag beside --resume changes what the learning depends on."""
    if config.iterations != saved["iterations"] and config.lr_schedule == "linear":
        lengths = f"{config.iterations} iterations instead of {saved['iterations']}"
        jump = "the learning rate jumps to where it is in a run of that length"
        print(f"--lr_schedule linear: {lengths}: {jump}", file=sys.stderr)
    for name, was in saved.items():
        if getattr(config, name, was) != was and name not in changeable:
            limit = f"cannot change on --resume (the run has {was})"
            way_out = f"start a new run with --out; these can: {', '.join(changeable)}"
            raise ValueError(f"--{name} {getattr(config, name)} {limit}: {way_out}")


def save(out, tokenizer, models, iteration, rng, state):
    """One file, renamed over the old one, holds everything that a resume needs, weights included:
    an interrupted save leaves the previous checkpoint. models: policy, critic or None, optimizer.
    state: the curriculum's, plain numbers and lists."""
    loop = {"iteration": iteration, "rng": rng.bit_generator.state, "curriculum": state}
    whole = {name: model and put_together(model.state_dict()) for name, model in models.items()}
    if rank() > 0:
        return
    path = Path(out, "state", "training.pt")
    path.parent.mkdir(exist_ok=True)
    beside = path.with_name(f"{path.name}.tmp")
    try:
        torch.save({"loop": json.dumps(loop), **whole}, beside)
        put_in_place(beside, path)
    except (OSError, RuntimeError) as error:  # a full disk is either
        reason = f"cannot save in {path.parent} ({first_line(error)})"
        raise OSError(f"{reason}: its last checkpoint is whole") from error
    save_model(models["policy"], tokenizer, Path(out, "model"), whole["policy"])


def load(out, models, rng, state):
    """The inverse of `save`: fills models, rng and state, and forgets the metrics logged after it.
    Returns the iteration to go on with; 0 where nothing was saved. ValueError: what was saved is of
    other questions (their `fingerprint` in the state), or no checkpoint."""
    path = Path(out, "state", "training.pt")
    if not path.exists():
        metrics = Path(out, "metrics.jsonl")
        gone = f"--resume {out}: it has metrics but no {path}: start anew with --out"
        require(not metrics.exists() or not metrics.read_text(), gone)
        return 0
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        loop = json.loads(saved["loop"])
        for name in ("policy", "critic"):
            if models[name] is not None:
                take_apart(saved[name], dict(models[name].named_parameters()))
                models[name].load_state_dict(saved[name])
        groups = models["optimizer"].param_groups
        parameters = [parameter for group in groups for parameter in group["params"]]
        for number, moments in saved["optimizer"]["state"].items():
            take_apart(moments, dict.fromkeys(moments, parameters[number]))
        for group, mine in zip(saved["optimizer"]["param_groups"], groups):
            group["fused"] = mine["fused"]  # the device's, which may be another one now
        models["optimizer"].load_state_dict(saved["optimizer"])
    except Exception as error:  # cut off, another program's, another model's
        reason = f"no usable {path} ({first_line(error)})"
        raise ValueError(f"--resume {out}: {reason}: start anew with --out") from error
    way_out = "give it the files it was started with (--data_dir), or start anew with --out"
    same = loop["curriculum"]["fingerprint"] == state["fingerprint"]
    require(same, f"--resume {out}: it was trained on other questions: {way_out}")
    rng.bit_generator.state = loop["rng"]
    state.update(loop["curriculum"])
    metrics = Path(out, "metrics.jsonl")
    if metrics.exists():
        lines = metrics.read_text().splitlines(keepends=True)
        write(metrics, "".join(lines[: loop["iteration"]]))
    return loop["iteration"]


# --------------------------------------------------------------------------- models and files


def load_model(path, *, device="cpu", dtype="float32"):
    """(model, tokenizer) of a folder, of a run's folder (its model/) or of a hub id. device: auto,
    cpu, cuda, mps. dtype: float32, bfloat16, float16, or auto (`memory.precision`). Runs no code
    from the hub; weights are safetensors, else .bin files, of which only tensors are read."""
    asked, device = device, pick_device(device)
    if Path(path, "model", "config.json").exists():
        path = Path(path, "model")
    how = {"weights_only": True}
    how |= {"ignore_mismatched_sizes": True, "output_loading_info": True}  # said below, in a line
    try:
        if dtype == "auto":  # only a CPU's answer depends on the model's size
            dtype = precision(dtype, device, outline(path) if device == "cpu" else None)
        how["dtype"] = getattr(torch, dtype)
        model, info = AutoModelForCausalLM.from_pretrained(path, **how)
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # offline, no such folder, half a folder, an unknown architecture
        reason = f"{type(error).__name__}: {first_line(error)}"
        way_out = "give --model a folder with config.json, weights and a tokenizer, or a hub id"
        raise ValueError(f"cannot load a model from {str(path)!r} ({reason}): {way_out}") from error
    # transformers makes up what is not in the files, at random, and goes on.
    made_up = sorted(info["missing_keys"]) + sorted(key[0] for key in info["mismatched_keys"])
    if made_up:
        which = f"{len(made_up)} weights missing or of another shape ({made_up[0]}, ...)"
        raise ValueError(f"{str(path)!r} has {which}: get its files again, all of one model")
    unused = sorted(info["unexpected_keys"])
    if unused and rank() == 0:
        which = f"{len(unused)} weights that this model has no use for ({unused[0]}, ...)"
        print(f"{str(path)!r} has {which}: they are left out", file=sys.stderr)
    return model.to(pick_device(asked, model.num_parameters())).eval(), tokenizer


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
    files.sort(key=lambda file: file.name == "config.json")  # it comes last: who finds it finds all
    for file in files:
        target = folder / file.relative_to(beside)
        target.parent.mkdir(parents=True, exist_ok=True)
        put_in_place(file, target)
    shutil.rmtree(beside)


def put_in_place(written, target):
    """Rename a file that was written beside over its target, once the disk has it."""
    with open(written, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(written, target)


def check_writable(flag, path):
    """ValueError before the work, not after it: the file or new folder `path` cannot be written."""
    require(not path.is_dir(), f"--{flag} {path}: a folder is there: give another name")
    # The nearest folder that is there: a refusal leaves no new ones behind.
    there = next(folder for folder in path.parents if folder.exists())
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        reason = f"cannot write in {there} ({first_line(error)})"
        raise ValueError(f"--{flag} {path}: {reason}: give another one") from error


def write(path, text):
    """The file is the old one or the new one, whatever interrupts this."""
    if rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f"{path.name}.tmp")  # not with_suffix: x.jsonl must spare x.tmp
        beside.write_text(text)
        put_in_place(beside, path)
