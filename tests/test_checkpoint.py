"""Models on disk."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import sft
from plumbing import checkpoint, memory


def test_load_model(tiny, tiny_folder):
    for path in (tiny_folder, str(tiny_folder / "model")):  # a run's folder, or its model's
        model, tokenizer = checkpoint.load_model(path)
        assert not model.training and model.dtype == torch.float32 and tokenizer.eos_token_id == 1
        assert torch.equal(model.lm_head.weight, tiny.lm_head.weight)
    model, _ = checkpoint.load_model(tiny_folder, device="auto", dtype="bfloat16")
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "path, settings, message",
    [
        ("empty", {}, "cannot load a model from .*: give --model a folder"),
        ("./no/such/model", {}, "cannot load a model from './no/such/model'"),
        ("model", {"device": "tpu"}, "no device 'tpu' here: give auto or"),
    ],
)
def test_load_model_refuses(tiny_folder, path, settings, message):
    (tiny_folder / "empty").mkdir(exist_ok=True)
    path = path if path.startswith(".") else tiny_folder / path
    with pytest.raises(ValueError, match=message) as raised:
        checkpoint.load_model(path, **settings)
    assert "\n" not in str(raised.value)


def same_weights(folder, model):
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    return all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters()))


def test_save_replaces_whole_files(tokenizer, tmp_path, monkeypatch):
    old, new = sft.tiny_model(tokenizer, 0), sft.tiny_model(tokenizer, 1)
    checkpoint.save_model(old, tokenizer, tmp_path / "model")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # as the new files are to take the old ones' place
        patch.setattr(checkpoint.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save_model(new, tokenizer, tmp_path / "model")
    assert same_weights(tmp_path / "model", old)
    checkpoint.save_model(new, tokenizer, tmp_path / "model")
    assert same_weights(tmp_path / "model", new)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("native, expected", [(True, "bfloat16"), (False, "float32")])
def test_auto_takes_bfloat16_where_it_is_fast(native, expected, tiny, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    with torch.device("meta"):
        large = torch.nn.Linear(4000, 4000)
    assert memory.precision("auto", "cpu", large) == expected
    assert memory.precision("auto", "cpu", tiny) == "float32"  # too small to gain
    assert memory.precision("auto", "cuda:1", tiny) == "bfloat16"
    assert memory.precision("auto", "mps", large) == "float32"
    assert memory.precision("float32", "cuda", large) == "float32"  # what was asked for
