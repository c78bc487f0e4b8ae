"""Next-token prediction learns what it is shown; the tiny base model is what it says it is."""

import copy
import re

import numpy as np
import pytest
import torch
from conftest import update_config, write_rows
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
    config = sft.Settings(tokens_per_microbatch=budget)
    losses = sft.train(model, [batch] * 1, lr=0.0, config=config)
    assert losses == [pytest.approx(total / count, rel=1e-5)]


def test_training_learns(tokenizer):
    questions, batch = demonstrated(tokenizer, 24, {1: 1})
    model = sft.tiny_model(tokenizer, 0)
    losses = sft.train(model, [batch] * 120, lr=5e-3)
    assert losses[-1] < 0.2 * losses[0] and not model.training
    accuracy = evaluate(model, tokenizer, questions, max_new_tokens=16)["accuracy"]
    assert accuracy > 0.9  # learned by heart


def test_a_nan_is_one_clear_line(tokenizer):
    _, batch = demonstrated(tokenizer, 2, {1: 1})
    model = sft.tiny_model(tokenizer, 0)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="loss is nan.*--lr"):
        sft.train(model, [batch] * 1, lr=1e-3)


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


def test_two_runs_may_make_the_tiny_base_at_once(tmp_path, monkeypatch):
    """The other one, which started later, ends while this one trains."""
    monkeypatch.setitem(sft.TINY_PARITY, "stages", [[1, 1e-3]])
    monkeypatch.setitem(sft.TINY_PARITY, "questions", 20)
    train, getpid = sft.train, sft.os.getpid

    def meanwhile(*arguments, **settings):
        with monkeypatch.context() as patch:
            patch.setattr(sft, "train", train)
            patch.setattr(sft.os, "getpid", lambda: getpid() + 1)
            sft.tiny_base(tmp_path, "parity", progress=False)
        train(*arguments, **settings)

    monkeypatch.setattr(sft, "train", meanwhile)
    folder = sft.tiny_base(tmp_path, "parity", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    checkpoint.load_model(folder)


def test_stages_of_the_tiny_base(tmp_path, monkeypatch):
    """Half of the demonstrations have one step; each stage hurries as announced; the held-out
    chains never appear."""
    stages = []

    def watch(model, batches, **_):
        stages.append([r for batch in batches[:40] for r in batch])

    monkeypatch.setattr(sft, "train", watch)
    monkeypatch.setattr(sft, "TINY", sft.TINY | {"questions": 4000})
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
        ({"--batch": 0}, "--batch 0 must be at least 1"),
        ({"--chat": "maybe"}, "--chat: invalid choice: 'maybe'"),
        ({"--out": "FILE"}, "--out .*: cannot write in .*file"),
        ({"--epochs": 0}, "--epochs 0.0"),
        ({"--lr": -1}, "--lr -1.0"),
        ({"--dataset": "BARE"}, "no solutions"),
    ],
)
def test_the_command_refuses(flags, tmp_path, changes, message):
    bare = write_rows(tmp_path / "bare" / "train.jsonl", [{"question": "1+1", "answer": "2"}])
    if changes.get("--dataset") == "BARE":
        changes = {"--dataset": bare.parent}
    if changes.get("--out") == "FILE":
        (tmp_path / "file").touch()
        changes = {"--out": tmp_path / "file" / "out", "--model": "./no/such/model"}
    with pytest.raises(ValueError, match=message):
        run(flags | changes)
    assert not flags["--out"].exists()


def test_an_interrupted_training_leaves_nothing_behind(flags, tmp_path, monkeypatch):
    """It starts anew; the folder that it would have written does not get into the way."""

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sft.ppo, "response_logprobs", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(flags)
    assert [path.name for path in tmp_path.iterdir()] == ["solved"]
    run(flags)


@pytest.mark.parametrize("chat", ["auto", "off"])
def test_a_folder_remembers_how_it_was_prompted(flags, tmp_path, chat):
    """Whoever loads it needs no flag: sfl.py, eval.py, other programs."""
    model, tokenizer = checkpoint.load_model(flags["--model"])
    template = "{% for message in messages %}{{ message['content'] }}={% endfor %}"
    tokenizer.chat_template = template
    checkpoint.save_model(model, tokenizer, tmp_path / "chat")
    run(flags | {"--model": tmp_path / "chat", "--chat": chat})
    _, loaded = checkpoint.load_model(flags["--out"])
    question = data.arithmetic(1, 0, {1: 1})
    learned = data.encode_prompts(tokenizer, question, chat=chat)
    assert data.encode_prompts(loaded, question) == learned
    assert learned != data.encode_prompts(
        tokenizer, question, chat="on" if chat == "off" else "off"
    )


def test_plain_prompts_do_not_take_the_tag_away(tiny, tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    data.add_tags(copy.deepcopy(tiny), tokenizer)
    template = tokenizer.chat_template
    data.remember_chat(tokenizer, "off")  # 'off' prompts such a model with its tag, too
    assert tokenizer.chat_template == template


def test_no_dropout_in_a_later_round_either():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=1))
    shown = [Rollout([1, 2], [3, 4], [], True)]
    first = sft.train(model, [shown] * 2, lr=0.0)
    assert sft.train(model, [shown] * 2, lr=0.0) == first


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
    batches = sft.epochs_of("abcdef", 4, 4, np.random.default_rng(0))
    assert [len(batch) for batch in batches] == [4] * 6
    flat = sum(batches, [])
    for epoch in range(4):
        assert sorted(flat[6 * epoch : 6 * epoch + 6]) == list("abcdef")


def likelihood(model, rollout):
    return float(ppo.rollout_logprobs(model, [rollout], update_config())[0].sum())


def test_a_round_raises_what_was_kept_from_the_weights_it_starts_with(tokenizer):
    start, policy, elsewhere = (sft.tiny_model(tokenizer, seed) for seed in (0, 1, 2))
    [_], [right] = demonstrated(tokenizer, 1, {2: 1})
    wrong = Rollout(right.prompt, right.response[:-2] + [30, 1], [], True)
    how = {"lr": 1e-3, "config": update_config(epochs=6, minibatch=2)}
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
    monkeypatch.setattr(sft, "train", lambda model, batches, **_: shown.extend(batches[0]))
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
