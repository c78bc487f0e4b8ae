"""What several test files share: where the scripts lie, data files, small models and tokenizers."""

# ruff: noqa: E402 (what is imported reads the environment that is set here)
import csv
import gzip
import io
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for the hub

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import data
import sft
from plumbing import checkpoint

# Of a random model: small, with grouped key-value heads.
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def write_rows(path, rows):
    """A data file, of the kind that the path's suffix says. A row that is text goes to a .jsonl
    file as it is."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = path.name.removesuffix(".gz").rpartition(".")[2]
    if suffix in ("parquet", "arrow"):
        arrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        table = arrow.Table.from_pylist(rows)
        if suffix == "parquet":
            parquet.write_table(table, path)
        else:
            with arrow.ipc.new_stream(path, table.schema) as stream:
                stream.write(table)
        return path
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    text = json.dumps(rows) if suffix == "json" else "\n".join(lines)
    if suffix == "csv":
        file = io.StringIO()
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
        text = file.getvalue()
    content = text.encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def read_rows(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def update_config(**changes):
    """What ppo.py's functions must know. Fields as in sfl.py's settings."""
    config = {
        "temperature": 1.0,
        "gamma": 1.0,
        "lam": 1.0,
        "clip": 0.2,
        "value_clip": 0.2,
        "kl_coef": 0.0,
        "loss_average": "token",
        "epochs": 1,
        "minibatch": 64,
        "max_grad_norm": 1.0,
        "max_ratio": 10.0,
        "tokens_per_microbatch": 8192,
        "fsdp": False,
        "dtype": "float32",
    }
    unknown = changes.keys() - config.keys()
    assert not unknown, unknown
    return SimpleNamespace(**config | changes)


def small_llama(vocab_size, **changes):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **SHAPE | changes)).eval()


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """On models this small a second thread costs more than it brings."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer():
    """Of the arithmetic task: a token a number. Shared: a test that changes it makes its own."""
    return sft.tiny_tokenizer()


@pytest.fixture(scope="session")
def tiny(tokenizer):
    """A random model that reads and writes these tokens. Shared, too."""
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return small_llama(len(tokenizer), max_position_embeddings=256, bos_token_id=None, **ids)


@pytest.fixture(scope="session")
def tiny_folder(tiny, tokenizer, tmp_path_factory):
    """A run's folder that holds just its model."""
    folder = tmp_path_factory.mktemp("tiny")
    checkpoint.save_model(tiny, tokenizer, folder / "model")
    return folder


@pytest.fixture(scope="session")
def base(tokenizer, tmp_path_factory):
    """The folder of a tiny arithmetic model that knows the format and guesses the answers."""
    model, rng = sft.tiny_model(tokenizer, 0), np.random.default_rng(0)
    questions = data.arithmetic(300, 1, {1: 1, 2: 1})
    batch = sft.demonstrations(tokenizer, questions, [f"#### {q.answer}" for q in questions])
    batches = [[batch[i] for i in rng.choice(300, 64)] for _ in range(60)]
    sft.train(model, batches, lr=3e-3)
    folder = tmp_path_factory.mktemp("base") / "model"
    checkpoint.save_model(model, tokenizer, folder)
    return str(folder)


@pytest.fixture(scope="session")
def bpe():
    """Byte-level BPE, as of today's models: punctuation takes the newlines behind it along."""
    tokenizer = Tokenizer(models.BPE())
    pieces = Regex(r" ?[^\s\w]+\n*|\s*\n+| ?\w+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pieces, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    text = "She adds 3 and 4.\n\nThen 7 + 5 = 12.\nSo\n\n\nit is 12.\n#### 12"
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text] * 50, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
