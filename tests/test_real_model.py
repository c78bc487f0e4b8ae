"""On a real pretrained model, in the folder that SFL_REAL_MODEL names (SmolLM2-135M-Instruct, say):
what random weights cannot show. Three minutes on a core; skipped without it."""

import os
import shutil

import numpy as np
import pytest
import torch
import transformers
from conftest import read_rows, update_config, write_rows

import data
import ppo
import rollout
import sfl
from plumbing import attention, checkpoint, memory

FOLDER = os.environ.get("SFL_REAL_MODEL")
pytestmark = pytest.mark.skipif(
    not FOLDER, reason="SFL_REAL_MODEL: a pretrained chat model's folder"
)

QUESTIONS = [
    "Tom has 3 apples and buys 4. How many apples has he now?",
    "What is 2 + 2?",
    "A box holds 12 eggs. Ann uses 5 of them and gives 2 away. How many are left?",
]


@pytest.fixture(scope="module")
def model_and_tokenizer():
    return checkpoint.load_model(FOLDER)


@pytest.fixture(scope="module")
def prompts(model_and_tokenizer):
    questions = [data.Question(f"{text}\n", "7", question=text) for text in QUESTIONS]
    return data.encode_prompts(model_and_tokenizer[1], questions)


def test_greedy_is_generates(model_and_tokenizer, prompts):
    model, tokenizer = model_and_tokenizer
    stops = data.stop_ids(model, tokenizer)
    ours = rollout.generate(model, prompts, max_new_tokens=24, temperature=0, stop_ids=stops)
    for prompt, [r] in zip(prompts, ours):
        how = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": stops, "pad_token_id": 0}
        theirs = model.generate(torch.tensor([prompt]), **how)[0, len(prompt) :].tolist()
        assert r.response == theirs


def test_logprobs_are_a_plain_forwards(model_and_tokenizer, prompts):
    """Of the sampler, of the scorer, and of the logits that the model itself returns."""
    model, tokenizer = model_and_tokenizer
    stops = data.stop_ids(model, tokenizer)
    groups = rollout.generate(model, prompts, n=2, max_new_tokens=24, seed=0, stop_ids=stops)
    rollouts = [r for group in groups for r in group]
    scored = ppo.rollout_logprobs(model, rollouts, update_config())
    for r, logprobs in zip(rollouts, scored):
        with torch.no_grad():
            logits = model(torch.tensor([r.prompt + r.response])).logits[0]
        plain = logits[len(r.prompt) - 1 : -1].log_softmax(-1)  # position t predicts token t + 1
        plain = plain.gather(1, torch.tensor(r.response)[:, None])[:, 0]
        torch.testing.assert_close(logprobs, plain, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(torch.tensor(r.logprobs), plain, atol=1e-4, rtol=1e-4)


def test_bfloat16_is_the_same_but_for_rounding(model_and_tokenizer, prompts):
    model, tokenizer = model_and_tokenizer
    stops = data.stop_ids(model, tokenizer)
    engine = rollout.Engine(model, dtype=torch.bfloat16)
    groups = engine.generate(prompts, n=4, max_new_tokens=24, seed=0, stop_ids=stops)
    rollouts = [r for group in groups for r in group]
    exact = torch.cat(ppo.rollout_logprobs(model, rollouts, update_config()))
    sampled = torch.tensor([x for r in rollouts for x in r.logprobs])
    assert (sampled - exact).abs().mean() < 0.05
    rounded = torch.cat(ppo.rollout_logprobs(model, rollouts, update_config(dtype="bfloat16")))
    assert (rounded - exact).abs().mean() < 0.05
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_chat_prompt_has_one_bos_and_the_turns_end_stops(model_and_tokenizer, prompts):
    model, tokenizer = model_and_tokenizer
    for prompt in prompts:
        assert prompt[0] != prompt[1]
        assert tokenizer.decode(prompt).count(tokenizer.decode(prompt[:1])) <= 3  # a turn each
    turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    if turn == tokenizer.unk_token_id or turn is None:
        pytest.skip("another template")
    assert turn in data.stop_ids(model, tokenizer)
    # It answers this and ends its turn; were that no stop, it would go on.
    [[r]] = rollout.generate(
        model, prompts[1:2], max_new_tokens=256, temperature=0,
        stop_ids=data.stop_ids(model, tokenizer),
    )  # fmt: skip
    assert r.finished and r.response[-1] == turn and turn not in r.written()


def test_auto_is_bfloat16_where_the_cpu_multiplies_it(model_and_tokenizer):
    model, _ = model_and_tokenizer
    fast = torch.cpu._is_avx512_bf16_supported()
    assert memory.precision("auto", "cpu", model) == ("bfloat16" if fast else "float32")
    loaded, _ = checkpoint.load_model(FOLDER, dtype="auto")
    assert loaded.dtype == (torch.bfloat16 if fast else torch.float32)
    if fast:  # cast as it was loaded, as the engine's copy is
        twin = attention.copy_of(model, torch.bfloat16)
        for a, b in zip(loaded.parameters(), twin.parameters()):
            assert torch.equal(a, b)


def every_other_is_right(tokenizer, questions, rollouts, **_):
    """Whatever they say: so there is something to learn."""
    rewards = np.zeros((len(questions), max(map(len, rollouts))), np.float32)
    rewards[:, ::2] = 1
    return rewards


@pytest.mark.parametrize("algo", ["ppo", "vineppo", "grpo", "rloo", "expert", "rcrl"])
def test_an_iteration_moves_the_weights(algo, model_and_tokenizer, tmp_path, monkeypatch):
    rows = [{"question": text, "answer": str(i)} for i, text in enumerate(QUESTIONS * 2)]
    for i, row in enumerate(rows):
        row["question"] += " " * i  # no two alike
    folder = tmp_path / "questions"
    for split in ("train", "test"):
        write_rows(folder / f"{split}.jsonl", rows)
    flags = f"--algo {algo} --model {FOLDER} --dataset {folder} --out {tmp_path / 'run'} --lr 1e-3"
    flags += " --curriculum uniform --iterations 1 --questions 2 --rollouts 2 --minibatch 4"
    flags += " --max_new_tokens 12 --eval_limit 2 --mc_rollouts 2"
    config = sfl.parse(flags.split())
    monkeypatch.setattr(sfl.evaluation, "rewards", every_other_is_right)
    sfl.run(config)
    [row] = read_rows(tmp_path / "run" / "metrics.jsonl")
    model, _ = model_and_tokenizer
    trained, _ = checkpoint.load_model(tmp_path / "run")
    moved = [not torch.equal(a, b) for a, b in zip(model.parameters(), trained.parameters())]
    assert any(moved) and row["iteration"] == 1
    pipe = transformers.pipeline("text-generation", model=str(tmp_path / "run" / "model"))
    assert pipe("2 + 2 =", max_new_tokens=2)[0]["generated_text"]
    shutil.rmtree(tmp_path / "run")  # two gigabytes
