"""sft.py: next-token prediction learns what it is shown, and the tiny base model is what it says it is."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import eval as evaluation
import sft


@pytest.fixture(scope="module")
def tokenizer():
    torch.set_num_threads(1)
    return sft.tiny_tokenizer()


def test_tiny_tokenizer_is_lossless_with_one_token_a_number(tokenizer):
    text = "37+5-8\n37+5=42\n42-8=34\n#### 34"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text and len(ids) == len("37 + 5 - 8 \n 37 + 5 = 42 \n 42 - 8 = 34 \n #### 34".split(" "))
    assert len({tuple(tokenizer(str(i)).input_ids) for i in range(evaluation.MODULUS)}) == evaluation.MODULUS


def test_tiny_model_is_small_and_seeded(tokenizer):
    a, b, c = (sft.tiny_model(tokenizer, seed) for seed in (0, 0, 1))
    assert sum(p.numel() for p in a.parameters()) < 1_000_000
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    assert not all(torch.equal(x, y) for x, y in zip(a.parameters(), c.parameters()))


def test_demonstrations_end_with_the_stop_token_and_join_as_ids(tokenizer):
    question = evaluation.arithmetic(1, 0, {3: 1})[0]
    [demonstration] = sft.demonstrations(tokenizer, [question], [question.solution])
    assert demonstration.prompt == evaluation.encode_prompts(tokenizer, [question])[0]
    assert demonstration.response[-1] == tokenizer.eos_token_id
    assert evaluation.decode_response(tokenizer, demonstration) == question.solution
    assert evaluation.grade(question.solution, question) == 1.0


def test_the_loss_is_the_mean_over_response_tokens_however_it_is_cut(tokenizer):
    """Against torch's own cross entropy, one demonstration at a time, with and without micro-batches."""
    questions = evaluation.arithmetic(6, 0, {1: 1, 4: 1})
    batch = sft.demonstrations(tokenizer, questions, [q.solution for q in questions])
    reference, total, count = sft.tiny_model(tokenizer, 0), 0.0, 0
    for r in batch:
        logits = reference(torch.tensor([r.prompt + r.response])).logits[0, len(r.prompt) - 1 : -1]
        total = total + torch.nn.functional.cross_entropy(logits, torch.tensor(r.response), reduction="sum")
        count += len(r.response)
    for budget in (8192, 40):
        model = sft.tiny_model(tokenizer, 0)
        losses = sft.train(model, lambda: batch, steps=1, lr=0.0, tokens_per_microbatch=budget)
        assert losses[0] == pytest.approx((total / count).item(), rel=1e-5)


def test_training_learns_and_a_nan_is_one_clear_line(tokenizer):
    questions = evaluation.arithmetic(24, 0, {1: 1})
    batch = sft.demonstrations(tokenizer, questions, [q.solution for q in questions])
    model = sft.tiny_model(tokenizer, 0)
    losses = sft.train(model, lambda: batch, steps=120, lr=5e-3)
    assert losses[-1] < 0.2 * losses[0] and not model.training
    assert evaluation.evaluate(model, tokenizer, questions, max_new_tokens=16)["accuracy"] > 0.9  # learned by heart
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="loss is nan.*--lr"):
        sft.train(model, lambda: batch, steps=1, lr=1e-3)


def test_tiny_base_is_cached_by_its_settings(tmp_path, monkeypatch):
    monkeypatch.setattr(sft, "TINY", sft.TINY | dict(worked_steps=3, terse_steps=2))
    folder = sft.tiny_base(tmp_path, progress=False)
    assert AutoTokenizer.from_pretrained(folder)("1+1").input_ids and AutoModelForCausalLM.from_pretrained(folder)
    with monkeypatch.context() as patch:
        patch.setattr(sft, "train", None)  # a second call trains nothing
        assert sft.tiny_base(tmp_path) == folder
    monkeypatch.setattr(sft, "TINY", sft.TINY | dict(seed=7))
    assert sft.tiny_base(tmp_path, progress=False) != folder


def test_stages_of_the_tiny_base(tmp_path, monkeypatch):
    """Stage 1 works longer chains out and answers short ones at once; stage 2 mostly jumps to the answer."""
    seen = []
    monkeypatch.setattr(sft, "train", lambda model, draw, **k: seen.append([draw() for _ in range(40)]))
    sft.tiny_base(tmp_path, progress=False)
    for stage, draws in enumerate(seen, start=1):
        rollouts = [r for batch in draws for r in batch]
        short = np.array([len(r.prompt) == 4 for r in rollouts])  # '37', '+', '5', newline: one step
        terse = np.array([len(r.response) == 3 for r in rollouts])
        assert terse[short].mean() == pytest.approx(sft.TINY["terse_share"], abs=0.06)
        assert terse[~short].mean() == pytest.approx(0 if stage == 1 else sft.TINY["terse_share"], abs=0.06)


def test_save_replaces_whole_files(tokenizer, tmp_path):
    a, b = sft.tiny_model(tokenizer, 0), sft.tiny_model(tokenizer, 1)
    sft.save(a, tokenizer, tmp_path / "m")
    sft.save(b, tokenizer, tmp_path / "m")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert all(torch.equal(x, y) for x, y in zip(loaded.parameters(), b.parameters()))
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_command_line(tokenizer, tmp_path, capsys):
    sft.save(sft.tiny_model(tokenizer, 0), tokenizer, tmp_path / "base")
    rows = [dict(question="1+1", answer="2", solution="1+1=2\n#### 2"), dict(question="2+2", answer="4", solution="#### 4")]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--dataset", str(tmp_path / "train.jsonl"), "--model", str(tmp_path / "base"), "--out", str(tmp_path / "out"), "--batch", "2"]
    sft.main(flags)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match="exists already"):
        sft.main(flags)
    with pytest.raises(ValueError, match="--model tiny knows only arithmetic"):
        sft.main(["--dataset", "gsm8k"])
    with pytest.raises(ValueError, match="--batch 0"):
        sft.main([*flags[:-1], "0"])
    (tmp_path / "bare.jsonl").write_text('{"question": "1+1", "answer": "2"}\n')
    with pytest.raises(ValueError, match="no solutions"):
        sft.main(["--dataset", str(tmp_path / "bare.jsonl"), "--model", str(tmp_path / "base"), "--out", str(tmp_path / "x")])
