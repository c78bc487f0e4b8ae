"""sfl.py: learnability, the curricula, and the whole job on a model small enough for a test."""

import itertools
import json
import math
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import eval as evaluation
import sfl
import sft

ROOT = Path(__file__).resolve().parent.parent


# ---------------------------------------------------------------- learnability


@pytest.mark.parametrize("attempts", [2, 3, 8])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.93, 1.0])
def test_learnability_is_unbiased_and_the_plug_in_is_not(attempts, p):
    chance = [math.comb(attempts, s) * p**s * (1 - p) ** (attempts - s) for s in range(attempts + 1)]
    expected = sum(c * sfl.learnability(s, attempts) for s, c in enumerate(chance))
    assert expected == pytest.approx(p * (1 - p), abs=1e-12)
    plug_in = sum(c * (s / attempts) * (1 - s / attempts) for s, c in enumerate(chance))
    assert plug_in == pytest.approx(p * (1 - p) * (attempts - 1) / attempts, abs=1e-12)  # as the docstring says


def test_learnability_takes_numbers_and_arrays_and_is_the_variance_of_rewards():
    rewards = np.random.default_rng(0).integers(0, 2, (50, 6))
    scores = sfl.learnability(rewards.sum(1), 6)
    assert scores.shape == (50,) and np.allclose(scores, sfl.variance(rewards))
    assert np.ndim(sfl.learnability(3, 6)) == 0 and sfl.learnability(3, 6) == pytest.approx(9 / 30)
    assert sfl.variance([[0.0, 0.5, 1.0]])[0] == pytest.approx(0.25)  # rewards need not be 0 or 1
    for successes, attempts in ((0, 1), (3, 2), (-1, 4)):
        with pytest.raises(ValueError, match="attempts"):
            sfl.learnability(successes, attempts)


def test_most_takes_the_largest_and_breaks_ties_at_random():
    rng, scores = np.random.default_rng(0), np.array([0.1, 0.3, 0.1, 0.3, 0.0, 0.1])
    picks = [frozenset(sfl.most(scores, 3, rng).tolist()) for _ in range(600)]
    assert {p - {1, 3} for p in picks} == {frozenset({0}), frozenset({2}), frozenset({5})}
    assert all(150 < picks.count(frozenset({1, 3, tied})) < 250 for tied in (0, 2, 5))


# ---------------------------------------------------------------- the curricula, on questions whose success rate is known


def settings(**changes):
    return Namespace(**dict(questions=8, rho=0.5, refresh_every=4, candidates=40, buffer_size=10, score_rollouts=8, rollouts=8,
                            max_candidates=40, memory=0.9, thompson=False) | changes)


def simulator(p, seed=0):
    """attempt(indices, n) of a policy that solves question i with chance p[i]; the calls are kept."""
    rng, calls = np.random.default_rng(seed), []

    def attempt(indices, n):
        calls.append((list(indices), n))
        rewards = (rng.random((len(indices), n)) < np.asarray(p)[np.asarray(indices)][:, None]).astype(np.float32)
        return [[f"{i}/{j}" for j in range(n)] for i in indices], rewards
    return attempt, calls


P = np.array([1.0] * 60 + [0.0] * 30 + [0.5] * 10)  # most always solved, many never, a frontier of 10


def test_sfl_refreshes_every_t_keeps_the_k_most_learnable_and_mixes_by_rho():
    args, state, rng = settings(candidates=100), {}, np.random.default_rng(1)
    attempt, calls = simulator(P)
    batches = []
    for iteration in range(8):
        chosen, at_hand, logged = sfl.sfl(args, state, iteration, len(P), rng, attempt)
        assert at_hand is None and len(chosen) == 8 == len(set(chosen.tolist()))
        assert (iteration % 4 == 0) == ("pool_learnable" in logged)
        assert set(chosen[:4].tolist()) <= set(state["buffer"])
        batches.append(chosen)
    assert [(len(indices), len(set(indices)), n) for indices, n in calls] == [(100, 100, 8)] * 2  # without replacement
    assert len(set(state["buffer"]) & set(range(90, 100))) >= 9  # all 8 attempts agree once in 128 times
    assert logged == {} and len({tuple(b[:4]) for b in batches[4:]}) > 1  # one buffer, drawn from again and again
    rest = np.concatenate([b[4:] for b in batches])
    assert (rest < 90).mean() > 0.6  # the other half is uniform


def test_sfl_logs_the_pool_it_scored():
    attempt, _ = simulator(P)
    logged = sfl.sfl(settings(candidates=100), {}, 0, len(P), np.random.default_rng(0), attempt)[2]
    assert logged["pool_solved_by_all"] == pytest.approx(0.6, abs=0.02) and logged["pool_solved_by_none"] == pytest.approx(0.3, abs=0.02)
    assert sum(logged["pool_histogram"]) == 100 and logged["pool_histogram"][8] >= 60


@pytest.mark.parametrize("rho, buffered", [(0.0, 0), (0.25, 2), (1.0, 8)])
def test_rho_is_the_share_from_the_buffer(rho, buffered):
    attempt, state = simulator(P)[0], {}
    chosen = sfl.sfl(settings(rho=rho), state, 0, len(P), np.random.default_rng(0), attempt)[0]
    assert len(chosen) == 8 and set(chosen[:buffered].tolist()) <= set(state["buffer"])


def test_uniform_draws_every_question_alike():
    rng = np.random.default_rng(0)
    counts = np.bincount(np.concatenate([sfl.uniform(settings(), {}, i, 20, rng, None)[0] for i in range(2000)]), minlength=20)
    assert counts.sum() == 16000 and abs(counts - 800).max() < 100


def test_lilo_trains_on_the_rollouts_that_showed_learnability_and_stops_when_full():
    attempt, calls = simulator(np.full(100, 0.5))
    chosen, (groups, rewards), logged = sfl.lilo(settings(), {}, 0, 100, np.random.default_rng(0), attempt)
    assert len(calls) <= 2 and logged["pool"] == 8 * len(calls)  # nearly all learnable: the first chunks fill the batch
    assert [g[0] for g in groups] == [f"{i}/0" for i in chosen] and rewards.shape == (8, 8)

    attempt, calls = simulator(P)
    chosen, (groups, rewards), logged = sfl.lilo(settings(max_candidates=100), {}, 0, 100, np.random.default_rng(0), attempt)
    assert logged["pool"] > 40 and (sfl.variance(rewards) > 0).sum() == 8  # rare: the pool grew until there were 8
    drawn = [i for indices, _ in calls for i in indices]
    assert len(drawn) == len(set(drawn))

    attempt, calls = simulator(np.zeros(100))
    chosen, _, logged = sfl.lilo(settings(), {}, 0, 100, np.random.default_rng(0), attempt)
    assert logged["pool"] == 40 and len(chosen) == 8  # none learnable: the budget ends it


@pytest.mark.parametrize("thompson", [False, True])
def test_posterior_finds_the_frontier_without_scoring(thompson):
    args, rng, hits = settings(rho=0.75, thompson=thompson), np.random.default_rng(0), []
    state = {"groups": ["easy"] * 60 + ["hard"] * 30 + ["between"] * 10}
    play = simulator(P)[0]
    for iteration in range(60):
        chosen, at_hand, _ = sfl.posterior(args, state, iteration, len(P), rng, None)  # attempt=None: it may not score
        assert at_hand is None and len(chosen) == 8 == len(set(chosen.tolist()))
        sfl.remember(args, state, chosen, play(chosen, 8)[1], 6)
        hits.append((chosen[:6] >= 90).mean())
    assert hits[0] < 0.5 < 0.8 < np.mean(hits[20:])
    json.dumps(state)  # goes into the checkpoint


def test_posterior_forgets_as_the_policy_moves():
    args, rng = settings(rho=0.75, memory=0.8), np.random.default_rng(0)
    state, hits = {"groups": ["None"] * 100}, []
    for iteration in range(160):
        p = P if iteration < 80 else np.roll(P, 50)  # the frontier moves
        chosen = sfl.posterior(args, state, iteration, 100, rng, None)[0]
        sfl.remember(args, state, chosen, simulator(p, iteration)[0](chosen, 8)[1], 6)
        hits.append((p[chosen[:6]] == 0.5).mean())
    assert np.mean(hits[60:80]) > 0.7 and np.mean(hits[140:]) > 0.7


# ---------------------------------------------------------------- the whole job


FAST = ["--iterations", "4", "--questions", "4", "--rollouts", "4", "--candidates", "8", "--buffer_size", "4", "--score_rollouts", "2",
        "--max_candidates", "8", "--refresh_every", "2", "--eval_limit", "12", "--eval_every", "2", "--save_every", "2", "--max_new_tokens", "24",
        "--minibatch", "8", "--mc_rollouts", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny arithmetic model that knows the format and guesses the answers."""
    torch.set_num_threads(1)
    tokenizer = sft.tiny_tokenizer()
    model, rng = sft.tiny_model(tokenizer, 0), np.random.default_rng(0)
    questions = evaluation.arithmetic(300, 1, {1: 1, 2: 1})
    batch = sft.demonstrations(tokenizer, questions, [f"#### {q.answer}" for q in questions])
    sft.train(model, lambda: [batch[i] for i in rng.choice(300, 64)], steps=60, lr=3e-3)
    folder = tmp_path_factory.mktemp("base") / "model"
    sft.save(model, tokenizer, folder)
    return str(folder)


def run(base, out, *flags):
    sfl.main(["--model", base, "--out", str(out), *FAST, *flags])
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("algo, curriculum", [("ppo", "sfl"), ("vineppo", "uniform"), ("grpo", "lilo"), ("rloo", "posterior")])
def test_the_whole_job(base, tmp_path, capsys, algo, curriculum):
    rows = run(base, tmp_path / "run", "--algo", algo, "--curriculum", curriculum)
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert {"reward_mean", "solved_by_all", "solved_by_none", "learnable", "response_length", "clip_fraction", "tokens_generated",
                "tokens_scored", "seconds_score", "seconds_rollout", "seconds_update"} <= set(row) | (
                    {"clip_fraction"} if row["optimizer_steps"] == 0 else set())
        assert row["solved_by_all"] + row["solved_by_none"] + row["learnable"] == pytest.approx(1)
        assert row["tokens_generated"] > 0
        assert ("value_loss" in row) == (algo == "ppo") and ("tokens_credit" in row) == (algo == "vineppo")
    assert ["eval_accuracy" in row for row in rows] == [False, True, False, True]
    scored = [row["tokens_scored"] > 0 for row in rows]
    assert scored == dict(sfl=[True, False, True, False], uniform=[False] * 4, posterior=[False] * 4).get(curriculum, scored)
    if curriculum == "lilo":
        assert all((row["tokens_scored"] > 0) == (row["pool"] > 4) for row in rows)
    printed = capsys.readouterr().out
    assert "held-out accuracy" in printed and "level 1" in printed and str(tmp_path / "run" / "model") in printed
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert evaluation.stop_ids(model, tokenizer) == [tokenizer.eos_token_id]
    moved = AutoModelForCausalLM.from_pretrained(base).state_dict()
    if any(row["optimizer_steps"] for row in rows):
        assert any(not torch.equal(w, moved[name]) for name, w in model.state_dict().items())
    assert (tmp_path / "run" / "state" / "critic.safetensors").exists() == (algo == "ppo")
    assert not list((tmp_path / "run").glob("*.tmp")) and not list((tmp_path / "run").glob("*.old"))


def test_epochs_kl_and_gradient_checkpointing(base, tmp_path):
    rows = run(base, tmp_path / "run", "--algo", "ppo", "--kl_coef", "0.1", "--epochs", "2", "--gradient_checkpointing")
    assert rows[0]["optimizer_steps"] == 4 and rows[0]["kl"] >= 0 and rows[-1]["kl"] > 0


def checkpoint(out):
    return json.loads(torch.load(out / "state" / "training.pt", weights_only=True)["loop"])["iteration"]


def without_clocks(rows):
    return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows]


@pytest.mark.parametrize("algo, curriculum", [("ppo", "sfl"), ("grpo", "posterior")])
def test_resume_is_exact(base, tmp_path, algo, curriculum):
    flags = ["--algo", algo, "--curriculum", curriculum, "--warmup", "0.5"]
    straight = run(base, tmp_path / "a", *flags)
    with pytest.MonkeyPatch.context() as patch:  # the run dies in iteration 4, after the checkpoint of iteration 2
        update, calls = sfl.ppo.update, itertools.count(1)
        patch.setattr(sfl.ppo, "update", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt) if next(calls) == 4 else update(*a, **k))
        with pytest.raises(SystemExit) as end:
            run(base, tmp_path / "b", *flags)
    assert end.value.code == 130
    assert len((tmp_path / "b" / "metrics.jsonl").read_text().splitlines()) == 3
    AutoModelForCausalLM.from_pretrained(tmp_path / "b" / "model")
    sfl.main(["--resume", str(tmp_path / "b")])
    resumed = [json.loads(line) for line in (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()]
    assert without_clocks(resumed) == without_clocks(straight)
    a, b = (AutoModelForCausalLM.from_pretrained(tmp_path / x / "model").state_dict() for x in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_an_interrupted_save_leaves_the_previous_checkpoint(base, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        save, calls = sfl.torch.save, itertools.count(1)
        patch.setattr(sfl.torch, "save", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt) if next(calls) == 3 else save(*a))
        with pytest.raises(SystemExit):
            run(base, tmp_path / "b")  # saves at iterations 0, 2 and 4: the last one breaks off
    assert checkpoint(tmp_path / "b") == 2
    sfl.main(["--resume", str(tmp_path / "b")])
    assert len((tmp_path / "b" / "metrics.jsonl").read_text().splitlines()) == 4


def test_report_draws_and_prints(base, tmp_path, capsys):
    run(base, tmp_path / "one", "--curriculum", "uniform")
    run(base, tmp_path / "two", "--curriculum", "posterior")
    sfl.main(["--report", str(tmp_path / "one"), str(tmp_path / "two"), "--out", str(tmp_path / "r.png")])
    assert (tmp_path / "r.png").read_bytes()[:4] == b"\x89PNG"
    assert "one" in (printed := capsys.readouterr().out) and "last tenth" in printed
    with pytest.raises(ValueError, match="metrics.jsonl"):
        sfl.main(["--report", str(tmp_path)])


# ---------------------------------------------------------------- a pretrained-style model, a BPE tokenizer, GSM8K's files


@pytest.fixture(scope="module")
def gsm8k_like(tmp_path_factory):
    """A folder of train.jsonl and test.jsonl in GSM8K's format, and a small model with a byte-level BPE trained on it."""
    folder = tmp_path_factory.mktemp("gsm8k")
    rows = [dict(question=f"Tom has {a} apples and buys {b} more. How many apples does he have?",
                 answer=f"Tom has {a} + {b} = <<{a}+{b}={a + b}>>{a + b} apples.\n#### {a + b}") for a in range(2, 14) for b in range(2, 7)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:40]))
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[40:]))
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.train_from_iterator([row["question"] + row["answer"] for row in rows],
                            trainers.BpeTrainer(vocab_size=400, special_tokens=["<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                         num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512, eos_token_id=0))
    sft.save(model, tokenizer, folder / "model")
    return folder


@pytest.mark.parametrize("template", [None, "{% for m in messages %}[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}>{% endif %}"])
def test_gsm8k_files_with_a_bpe_model(gsm8k_like, tmp_path, template):
    model = gsm8k_like / "model"
    if template:
        tokenizer = AutoTokenizer.from_pretrained(model)
        tokenizer.chat_template = template
        model = tmp_path / "chat"
        sft.save(AutoModelForCausalLM.from_pretrained(gsm8k_like / "model"), tokenizer, model)
    seen, generate = [], sfl.generate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sfl, "generate", lambda m, prompts, **k: seen.extend(prompts) or generate(m, prompts, **k))
        run(str(model), tmp_path / "run", "--dataset", "gsm8k", "--data-dir", str(gsm8k_like), "--context", "512", "--temperature", "0.6",
            "--top_p", "0.9", "--iterations", "2")
    text = AutoTokenizer.from_pretrained(tmp_path / "run" / "model").decode(seen[0])
    assert text.startswith("[Tom has") and text.endswith("]>") if template else text.startswith("[MATH_TASK] Problem:\nTom has")


# ---------------------------------------------------------------- bad input: one line, exit code 2, nothing touched


@pytest.mark.parametrize("flags, line", [
    (["--dataset", "gsm9k"], "gsm9k"),
    (["--algo", "dqn"], "dqn"),
    (["--no_such_flag"], "no_such_flag"),
    (["--rho", "1.5"], r"--rho 1.5 must be in \[0, 1\]"),
    (["--rho", "-0.1"], "--rho"),
    (["--rho", "nan"], "--rho"),
    (["--lr", "fast"], "fast"),
    (["--iterations", "0"], "--iterations 0 must be at least 1"),
    (["--questions", "5000", "--candidates", "9"], "--questions 5000 is more than the"),
    (["--candidates", "5000"], "--candidates 5000 is more than the"),
    (["--buffer_size", "9"], "--buffer_size 9 is more than --candidates 8"),
    (["--buffer_size", "1"], "more than --buffer_size 1"),
    (["--curriculum", "lilo", "--max_candidates", "3"], "--max_candidates 3"),
    (["--algo", "grpo", "--rollouts", "1"], "--rollouts 1"),
    (["--max_new_tokens", "255"], "passes the context of 256"),
    (["--temperature", "0"], "--temperature"),
    (["--data-dir", "x"], "gsm8k"),
    (["--eval_limit", "100000"], "100000"),
    (["--device", "cuda:99"], "cuda:99"),
])
def test_bad_flags(base, tmp_path, flags, line):
    with pytest.raises(ValueError, match=line) as error:
        sfl.main(["--model", base, "--out", str(tmp_path / "run"), *FAST, *flags])
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_bad_models_and_data(base, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="nobody/nothing.*--model"):
        sfl.main(["--model", "nobody/nothing", "--out", str(tmp_path / "run"), *FAST])
    with pytest.raises(ValueError, match="--model tiny knows only arithmetic"):
        sfl.main(["--dataset", "gsm8k", "--model", "tiny"])
    (tmp_path / "train.jsonl").write_text('{"question": "1+1?", "answer": "2"}\nnot json\n')
    with pytest.raises(ValueError, match=r"train.jsonl.*2"):
        sfl.main(["--dataset", str(tmp_path), "--model", base, "--out", str(tmp_path / "run"), *FAST])
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.eos_token = None
    model = AutoModelForCausalLM.from_pretrained(base)
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    sft.save(model, tokenizer, tmp_path / "endless")
    with pytest.raises(ValueError, match="stop token"):
        sfl.main(["--model", str(tmp_path / "endless"), "--out", str(tmp_path / "run"), *FAST])
    assert not (tmp_path / "run").exists()


def test_a_folder_with_a_run_is_refused_and_resume_keeps_its_settings(base, tmp_path):
    run(base, tmp_path / "run", "--iterations", "2")
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match="--resume.*--out"):
        run(base, tmp_path / "run")
    with pytest.raises(ValueError, match="--lr 0.5 cannot change on --resume"):
        sfl.main(["--resume", str(tmp_path / "run"), "--lr", "0.5"])
    with pytest.raises(ValueError, match="no run there"):
        sfl.main(["--resume", str(tmp_path / "nowhere")])
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    sfl.main(["--resume", str(tmp_path / "run"), "--iterations", "3"])
    assert (tmp_path / "run" / "metrics.jsonl").read_text().startswith(before)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3


def test_skip_long_leaves_long_questions_out(base, tmp_path, capsys):
    rows = [dict(question="1+1" * (60 if i == 3 else 1), answer="2") for i in range(12)]
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--dataset", str(tmp_path), "--context", "150", "--temperature", "1.0"]
    with pytest.raises(ValueError, match=r"training question 3 is .*--skip_long"):
        run(base, tmp_path / "run", *flags)
    run(base, tmp_path / "run", *flags, "--skip_long", "--eval_limit", "5", "--iterations", "1")
    assert "left out 1 of 12 training questions" in capsys.readouterr().err


def test_as_a_program(base, tmp_path):
    """The exit codes and the streams, which only a process has."""
    bad = subprocess.run([sys.executable, "sfl.py", "--rho", "7"], cwd=ROOT, capture_output=True, text=True)
    assert bad.returncode == 2 and bad.stderr == "sfl.py: --rho 7.0 must be in [0, 1]\n" and bad.stdout == ""
    flags = [*FAST, "--iterations", "100000", "--eval_every", "100000", "--save_every", "1", "--model", base, "--out", str(tmp_path / "run")]
    job = subprocess.Popen([sys.executable, "sfl.py", *flags], cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while job.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        pass
    job.send_signal(signal.SIGINT)
    errors = job.communicate()[1]
    assert job.returncode == 130 and "--resume" in errors and "Traceback" not in errors
    assert all(json.loads(line) for line in metrics.read_text().splitlines())
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert checkpoint(tmp_path / "run") >= 1
