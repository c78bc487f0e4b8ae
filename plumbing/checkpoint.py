"""Files that survive a kill: models, states, text; each is the old one or the new one."""

import logging
import os
import shutil
from pathlib import Path

import torch

from plumbing.commands import first_line
from plumbing.memory import pick_device
from plumbing.processes import rank


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
