"""Next-token prediction learns what it is shown; the tiny base model is what it says it is."""

import copy
import re

import numpy as np
import pytest
import torch
from conftest import write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import data
import ppo
import sft
from eval import evaluate
from plumbing import checkpoint
from rollout import Rollout


def demonstrated(tokenizer, count, levels):
    questions = data.arithmetic(count, 0, levels)
    batch = sft.demonstrations(tokenizer, questions, [q.solution for q in questions])
    return questions, batch


def test_tiny_tokenizer_is_lossless_with_one_token_a_number(tokenizer):
    text = "37+5-8\n37+5=42\n42-8=34\n#### 34"
    pieces = "37 + 5 - 8 \n 37 + 5 = 42 \n 42 - 8 = 34 \n #### 34".split(" ")
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text and len(ids) == len(pieces)
    numbers = {tuple(tokenizer(str(i)).input_ids) for i in range(data.MODULUS)}
    assert len(numbers) == data.MODULUS and {len(ids) for ids in numbers} == {1}


def test_tiny_model_is_small_and_seeded(tokenizer):
    a, b, c = (sft.tiny_model(tokenizer, seed) for seed in (0, 0, 1))
    assert sum(p.numel() for p in a.parameters()) < 1_000_000
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    assert not all(torch.equal(x, y) for x, y in zip(a.parameters(), c.parameters()))


def test_demonstrations_end_with_the_stop_token_and_join_as_ids(tokenizer):
    [question], [demonstration] = demonstrated(tokenizer, 1, {3: 1})
    assert demonstration.prompt == data.encode_prompts(tokenizer, [question])[0]
    assert demonstration.response[-1] == tokenizer.eos_token_id
    assert data.decode_response(tokenizer, demonstration) == question.solution


@pytest.mark.parametrize("budget", [8192, 40])  # one micro-batch, several
def test_the_loss_is_the_mean_over_response_tokens_however_it_is_cut(tokenizer, budget):
    """Against torch's own cross entropy, one demonstration at a time."""
    _, batch = demonstrated(tokenizer, 6, {1: 1, 4: 1})
    model, total, count = sft.tiny_model(tokenizer, 0), 0.0, 0
    for r in batch:
        logits = model(torch.tensor([r.prompt + r.response])).logits[0, len(r.prompt) - 1 : -1]
        target = torch.tensor(r.response)
        total += torch.nn.functional.cross_entropy(logits, target, reduction="sum").item()
        count += len(r.response)
    settings = ppo.Settings(tokens_per_microbatch=budget)
    losses = sft.train(model, lambda: batch, steps=1, lr=0.0, settings=settings)
    assert losses == [pytest.approx(total / count, rel=1e-5)]


def test_training_learns(tokenizer):
    questions, batch = demonstrated(tokenizer, 24, {1: 1})
    model = sft.tiny_model(tokenizer, 0)
    losses = sft.train(model, lambda: batch, steps=120, lr=5e-3)
    assert losses[-1] < 0.2 * losses[0] and not model.training
    accuracy = evaluate(model, tokenizer, questions, max_new_tokens=16)["accuracy"]
    assert accuracy > 0.9  # learned by heart


def test_a_nan_is_one_clear_line(tokenizer):
    _, batch = demonstrated(tokenizer, 2, {1: 1})
    model = sft.tiny_model(tokenizer, 0)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="loss is nan.*--lr"):
        sft.train(model, lambda: batch, steps=1, lr=1e-3)


# --------------------------------------------------------------------------- the tiny base model


def test_tiny_base_is_cached_by_its_settings(tmp_path, monkeypatch):
    short = {"stages": [[2, 1e-3, {1: 1}], [1, 1e-3, {2: 1}]], "questions": 100}
    monkeypatch.setattr(sft, "TINY", sft.TINY | short)
    folder = sft.tiny_base(tmp_path, progress=False)
    AutoModelForCausalLM.from_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder)("1+1").input_ids
    with monkeypatch.context() as patch:
        patch.setattr(sft, "train", None)  # a second call trains nothing
        assert sft.tiny_base(tmp_path) == folder
    monkeypatch.setattr(sft, "TINY", sft.TINY | {"seed": 7})
    assert sft.tiny_base(tmp_path, progress=False) != folder


def test_stages_of_the_tiny_base(tmp_path, monkeypatch):
    """Half of the demonstrations have one step; each stage hurries as announced; the held-out
    chains never appear."""
    stages = []

    def watch(model, draw, **_):
        stages.append([r for _ in range(40) for r in draw()])

    monkeypatch.setattr(sft, "train", watch)
    folder = sft.tiny_base(tmp_path, progress=False)
    _, tokenizer = checkpoint.load_model(folder)
    held_out = {q.prompt for q in data.load_questions("arithmetic", "test")}
    for rollouts, (_, _, hurry) in zip(stages, sft.TINY["stages"], strict=True):
        prompts = [tokenizer.decode(r.prompt) for r in rollouts]
        assert not held_out & set(prompts)
        assert np.mean([len(r.prompt) == 4 for r in rollouts]) == pytest.approx(0.5, abs=0.04)
        long = [r for r in rollouts if len(r.prompt) >= 12]  # so that no line is cut short
        first = [data.decode_response(tokenizer, r).split("=")[0] for r in long]
        taken = np.array([len(re.findall("[+-]", line)) for line in first])
        for terms, share in hurry.items():
            assert (taken == terms).mean() == pytest.approx(share, abs=0.05)


# --------------------------------------------------------------------------- the command line


@pytest.fixture
def flags(tiny_folder, tmp_path):
    """A small job on two solved questions, {flag: value}."""
    rows = [
        {"question": "1+1", "answer": "2", "solution": "1+1=2\n#### 2"},
        {"question": "2+2", "answer": "4", "solution": "#### 4"},
    ]
    write_rows(tmp_path / "solved" / "train.jsonl", rows)
    flags = {"--model": tiny_folder, "--out": tmp_path / "out", "--batch": 2, "--device": "cpu"}
    return flags | {"--dataset": tmp_path / "solved"}


def run(flags):
    sft.main([str(word) for flag in flags.items() for word in flag])


def test_the_command_trains_and_saves(flags, tiny, capsys):
    run(flags | {"--lr": 1e-3})
    model = AutoModelForCausalLM.from_pretrained(flags["--out"])
    assert not torch.equal(model.lm_head.weight, tiny.lm_head.weight)
    assert "wrote" in capsys.readouterr().out
    with pytest.raises(ValueError, match="exists already"):
        run(flags)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"--model": "tiny", "--dataset": "gsm8k"}, "--model tiny knows only arithmetic"),
        ({"--batch": 0}, "--batch 0"),
        ({"--epochs": 0}, "--epochs 0.0"),
        ({"--lr": -1}, "--lr -1.0"),
        ({"--dataset": "BARE"}, "no solutions"),
    ],
)
def test_the_command_refuses(flags, tmp_path, changes, message):
    bare = write_rows(tmp_path / "bare" / "train.jsonl", [{"question": "1+1", "answer": "2"}])
    if changes.get("--dataset") == "BARE":
        changes = {"--dataset": bare.parent}
    with pytest.raises(ValueError, match=message):
        run(flags | changes)
    assert not flags["--out"].exists()


def test_an_interrupted_training_goes_on(tokenizer, tmp_path):
    _, batch = demonstrated(tokenizer, 40, {1: 1, 2: 1})

    def train(keep, interrupt_at=None):
        model, rng = sft.tiny_model(tokenizer, 0), np.random.default_rng(0)
        drawn = 0

        def draw():
            nonlocal drawn
            drawn += 1
            if drawn == interrupt_at:
                raise KeyboardInterrupt
            return sft.draw_batch(batch, 4, rng)

        losses = sft.train(model, draw, steps=120, lr=1e-3, file=keep)
        return losses, model

    expected, straight = train(None)
    keep = tmp_path / "kept"
    with pytest.raises(KeyboardInterrupt):
        train(keep, interrupt_at=110)
    losses, model = train(keep)
    assert losses == expected and len(torch.load(keep, weights_only=True)["losses"]) == 120
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), model.parameters()))
    assert train(keep)[0] == expected  # nothing is left to do
    keep.write_bytes(keep.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot go on from .*kept.*delete it"):
        train(keep)


def test_no_dropout_in_a_later_round_either():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=1))
    shown = [Rollout([1, 2], [3, 4], [], True)]
    first = sft.train(model, lambda: shown, steps=2, lr=0.0)
    assert sft.train(model, lambda: shown, steps=2, lr=0.0) == first


def test_demonstrations_need_a_stop_token():
    tokenizer = copy.deepcopy(sft.tiny_tokenizer())
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no stop token: set tokenizer.eos_token"):
        sft.demonstrations(tokenizer, data.arithmetic(1, 0, {1: 1}), ["#### 1"])


# --------------------------------------------------------------------------- imitating oneself


def test_expert_iteration_keeps_what_is_right_and_no_two_alike():
    a, b, c = (Rollout([7], ids, [], True) for ids in ([3, 1], [4, 1], [5, 1]))
    kept = []
    sft.keep(kept, "expert", np.array([8, 9]), [[a, b, a], [a, c, c]], [[1, 0, 1], [1, 0, 0]])
    assert kept == [[8, 1, [3, 1]], [9, 1, [3, 1]]]
    sft.keep(kept, "expert", np.array([9]), [[a, b, b]], [[1, 1, 1]])  # a later round
    assert kept[2:] == [[9, 1, [4, 1]]]
    all_of_it = []
    sft.keep(all_of_it, "rcrl", np.array([8]), [[a, b, a]], [[1.0, 0.0, 1.0]])
    assert all_of_it == [[8, 1, [3, 1]], [8, 0, [4, 1]], [8, 1, [3, 1]]]


def test_an_epoch_has_each_example_once():
    draw = sft.epochs_of("abcdef", 4, np.random.default_rng(0))
    drawn = [draw() for _ in range(6)]  # four epochs
    assert all(len(batch) == 4 for batch in drawn)
    flat = sum(drawn, [])
    for epoch in range(4):
        assert sorted(flat[6 * epoch : 6 * epoch + 6]) == list("abcdef")


def likelihood(model, rollout):
    return float(ppo.rollout_logprobs(model, [rollout], ppo.Settings())[0].sum())


def test_a_round_raises_what_was_kept_from_the_weights_it_starts_with(tokenizer):
    start, policy, elsewhere = (sft.tiny_model(tokenizer, seed) for seed in (0, 1, 2))
    [_], [right] = demonstrated(tokenizer, 1, {2: 1})
    wrong = Rollout(right.prompt, right.response[:-2] + [30, 1], [], True)
    how = {"epochs": 6, "minibatch": 2, "lr": 1e-3, "settings": ppo.Settings()}
    gained = []
    for model in (policy, elsewhere):  # whatever they are
        rng = np.random.default_rng(0)
        logged = sft.imitate(model, start, [right] * 4, rng=rng, **how)
        assert logged["kept"] == 4 and logged["sft_steps"] == 12
        gained.append([likelihood(model, r) - likelihood(start, r) for r in (right, wrong)])
    assert gained[0] == gained[1]
    assert gained[0][0] > gained[0][1] + 3 > 3
    before = likelihood(policy, right)
    sft.imitate(policy, None, [right] * 4, rng=np.random.default_rng(0), **how)
    assert likelihood(policy, right) > before  # goes on from where it was
    assert sft.imitate(policy, start, [], rng=None, **how) == {"kept": 0}
    assert likelihood(policy, right) == likelihood(start, right)


# --------------------------------------------------------------------------- parity's base


def test_parity_tokens_are_bits_and_whole_answers():
    tokenizer = sft.tiny_tokenizer("parity")
    text = "0110\n0100#### 0"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    pieces = ["0", "1", "1", "0", "\n", "0", "1", "0", "0", "#### 0"]
    assert tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids) == pieces


def test_parity_demonstrations_are_long_as_often_as_asked():
    questions = data.parity(2000, 0, 16)
    texts = sft.long_or_short(questions, 0.3)
    long = [len(text) > len("#### 0") for text in texts]
    assert np.mean(long) == pytest.approx(0.3, abs=0.03)
    assert all(text.endswith(f"#### {q.answer}") for text, q in zip(texts, questions))


def test_parity_shown_to_another_model_follows_the_flags(tmp_path, monkeypatch):
    tokenizer = sft.tiny_tokenizer("parity")
    checkpoint.save_model(sft.tiny_model(tokenizer, 0), tokenizer, tmp_path / "model")
    shown = []
    monkeypatch.setattr(sft, "train", lambda model, draw, **settings: shown.extend(draw()))
    flags = "--dataset parity --bits 9 --p_cot 0 --batch 32".split()
    sft.main([*flags, "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out")])
    assert {len(r.prompt) for r in shown} == {10}  # nine bits and a newline
    assert {len(r.response) for r in shown} == {2}  # the answer at once, and the stop


def test_the_parity_base_is_cached_by_its_settings(tmp_path, monkeypatch):
    monkeypatch.setitem(sft.TINY_PARITY, "stages", [[2, 1e-3]])
    monkeypatch.setitem(sft.TINY_PARITY, "questions", 50)
    folders = {
        sft.tiny_base(tmp_path, "parity", bits=bits, p_cot=share, progress=False)
        for bits, share in ((8, 0.1), (8, 0.2), (9, 0.1), (8, 0.1))
    }
    assert len(folders) == 3
    model, tokenizer = checkpoint.load_model(folders.pop())
    assert len(tokenizer) == 7 and model.config.vocab_size == 7
