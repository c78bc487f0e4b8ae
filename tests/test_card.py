"""The paths of a card, on one that is only pretended: what tests/gpu.py would check on a real one,
how often the host waits, and what takes how much of its memory."""

import copy
import json
from collections import Counter

import account
import benchmark
import gpu
import numpy as np
import pytest
import torch
from card import Card
from conftest import small_llama, update_config
from transformers import AutoModelForCausalLM

import ppo
import rollout
import sfl
from plumbing import memory
from rollout import StopText, generate

SMALL = "--curriculum lilo --max_candidates 32 --rollouts 4 --questions 8 --eval_limit 4"
SMALL += " --max_new_tokens 24 --minibatch 16 --iterations 1 --mc_rollouts 2 --slots 32"
SMALL = SMALL.split()
BATCH = ppo.MicroBatch
RHO = sfl.Settings.model  # the papers'


# --------------------------------------------------------------------------- sampling


def letters(ids):
    return "".join(chr(97 + i % 26) for i in ids)


@pytest.mark.parametrize("family", gpu.FAMILIES)
def test_generate_writes_what_a_cpu_does(family, monkeypatch):
    """Its graphs are recorded, and replayed over junk."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 512, length).tolist() for length in rng.integers(1, 30, 12)]
    how = {"n": 2, "max_new_tokens": [8, 40] * 6, "seed": 1, "slots": 16, "stop_ids": [2]}
    model = gpu.build(family, torch.float32, "cpu")
    for p in model.parameters():  # so large that what it writes is varied
        p.data.normal_(0, 0.2 if p.ndim > 1 else 0.02)
    hows = [{"temperature": 0}, {"top_p": 0.9, "temperature": 0.8}, {"top_k": 7, "top_p": 0.95}]
    hows += [{"stop_ids": StopText([2], "ee", letters)}]
    expected = [generate(model, prompts, **how | more) for more in hows]
    with Card(monkeypatch) as card:
        engine = rollout.Engine(model.to("cuda"), slots=how.pop("slots"))
        found = [engine.generate(prompts, **how | more) for more in hows]
    assert card.replays > 100
    for ours, theirs in zip(found, expected):
        for a, b in zip(sum(ours, []), sum(theirs, [])):
            assert a.response == b.response and a.finished == b.finished
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


def test_parity_of_gpu_py(monkeypatch):
    with Card(monkeypatch) as card:
        assert gpu.parity("qwen2", torch.float32)
    assert card.replays > 64  # nothing fell back to plain steps


def test_devices_do_not_mix(monkeypatch):
    with Card(monkeypatch) as card:
        there, here = torch.ones(3, device="cuda"), torch.ones(3)
        assert there.device == torch.device("cuda:0") and there.is_cuda and not there.cpu().is_cuda
        assert (there * 2 + torch.tensor(1.0)).tolist() == [3, 3, 3]  # a number may be anywhere
        for mixed in (lambda: there + here, lambda: torch.cat([there, here])):
            with pytest.raises(RuntimeError, match="same device"):
                mixed()
        with pytest.raises(TypeError, match="numpy"):
            np.asarray(there)
        there[here > 0] = 0.0
    assert {what for what, _ in card.waits} >= {"read by tolist", "size of a mask", "copy"}


def test_on_a_mac(base, monkeypatch):
    """mps has no float64, and no graphs."""
    with Card(monkeypatch, kind="mps") as card:
        with pytest.raises(TypeError, match="float64"):
            torch.zeros(3, device="mps").double().to("mps")
        rows, _, _ = gpu.run(base, "ppo", "mps", "float32", *SMALL)
    assert card.replays == 0 and rows[0]["optimizer_steps"] > 0


# --------------------------------------------------------------------------- training


@pytest.mark.parametrize("algo", gpu.ALGORITHMS)
def test_an_iteration_has_the_metrics_of_a_cpu(algo, base, monkeypatch):
    expected, _, _ = gpu.run(base, algo, "cpu", "float32", *SMALL)
    with Card(monkeypatch) as card:
        found, _, _ = gpu.run(base, algo, "cuda", "float32", *SMALL)
    assert card.replays > 0 and gpu.differences(found, expected) == []
    assert expected[0]["learnable"] > 0


@pytest.mark.parametrize("algo", gpu.ALGORITHMS)
def test_an_iteration_runs_in_bfloat16(algo, base, monkeypatch):
    """A copy of the weights decodes, and the update is under autocast."""
    with Card(monkeypatch) as card:
        [row], _, _ = gpu.run(base, algo, "cuda", "bfloat16", *SMALL)
    assert card.replays > 0
    if algo not in sfl.sft.IMITATORS:
        assert row["optimizer_steps"] > 0 and row["nonfinite_steps"] == 0
    assert 0 <= row["kl"] < 1e-2  # the sampler's log-probs are the scorer's, but for rounding


def test_the_host_waits_a_few_times_an_optimizer_step(monkeypatch):
    """For what a micro-batch uploads, the sizes of its masks, metrics that are read: not for each
    layer, rollout or weight."""
    # Pairs with a prompt in common
    rollouts = [rollout.Rollout([5, 5, 5, i // 2], [6] * (3 + i % 5), [], True) for i in range(24)]
    ones = [torch.ones(len(r.response)) for r in rollouts]
    config = update_config(minibatch=8, tokens_per_microbatch=48, kl_coef=0.1)
    lists = {"old_logprobs": ones, "ref_logprobs": ones, "values": ones, "returns": ones}
    microbatches = []
    monkeypatch.setattr(ppo, "MicroBatch", lambda *a, **k: microbatches.append(1) or BATCH(*a, **k))
    with Card(monkeypatch) as card:
        policy = small_llama(30, num_hidden_layers=5).to("cuda")
        policy.head_is_plain = True  # `check_head` looks at it once,
        policy.model.shares_prompts = True  # and so does `shares_prompts`
        critic = ppo.ValueModel(policy)
        optimizer = torch.optim.AdamW([*policy.parameters(), *critic.parameters()], fused=True)
        card.waits.clear()
        ppo.update(policy, optimizer, rollouts, ones, config, critic=critic, **lists)
    steps = 2 * 3  # of either model
    assert len(microbatches) == 2 * steps
    by_line = Counter()
    for (_, line), count in card.waits.items():
        by_line[line] += count
    [(_, most)] = by_line.most_common(1)
    assert most == 6 * len(microbatches)  # MicroBatch's fields
    uploads = [count for line, count in by_line.items() if line.startswith("plumbing/batches.py")]
    assert uploads == [len(microbatches)]  # tokens, mask, positions and parts in one
    assert card.waits.total() <= 10 * len(microbatches) + 8 * steps


def test_what_saves_memory_changes_nothing(base, monkeypatch):
    flags = [*SMALL, "--kl_coef", "0.1", "--epochs", "2"]
    saving = ["--gradient_checkpointing", "--offload_optimizer", "--tokens_per_microbatch", "256"]
    expected, _, _ = gpu.run(base, "ppo", "cpu", "float32", *flags)
    with Card(monkeypatch):
        found, _, _ = gpu.run(base, "ppo", "cuda", "float32", *flags, *saving)
    assert gpu.differences(found, expected) == []


def test_metrics_that_differ_are_named():
    row = {"grad_norm": 1.0, "seconds_update": 3.0}
    assert gpu.differences([row], [row | {"seconds_update": 4.0}]) == []
    assert gpu.differences([row], [row | {"grad_norm": 1.01}]) == ["grad_norm"]


def test_without_a_card_nothing_is_claimed(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    gpu.main()
    assert "nothing is claimed" in capsys.readouterr().out


# --------------------------------------------------------------------------- memory


def trained():
    """Policy and critic on the card, and an optimizer that offloads."""
    policy = small_llama(30).to("cuda")
    critic = ppo.ValueModel(policy)
    weights = [*policy.parameters(), *critic.parameters()]
    optimizer = torch.optim.AdamW(weights, fused=True)
    memory.offload(optimizer, "cuda")

    def places(model):
        """Where its moments lie."""
        found = {state[name].device.type for p, state in optimizer.state.items()
                 for name in ("exp_avg", "exp_avg_sq")
                 if any(p is q for q in model.parameters())}  # fmt: skip
        return found

    return policy, critic, optimizer, places


def test_offloaded_moments_come_for_a_step_one_model_s_at_a_time(monkeypatch):
    with Card(monkeypatch):
        policy, critic, optimizer, places = trained()
        seen = []
        optimizer.register_step_pre_hook(lambda *_: seen.append((places(policy), places(critic))))
        for model in (policy, critic, policy, critic):
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            optimizer.step()
            optimizer.zero_grad()
            assert places(policy) | places(critic) == {"cpu"}
        assert seen[2:] == [({"cuda"}, {"cpu"}), ({"cpu"}, {"cuda"})]
        saved = copy.deepcopy(optimizer.state_dict())
        policy, critic, optimizer, places = trained()
        optimizer.load_state_dict(saved)
        assert places(policy) | places(critic) == {"cpu"}  # as before the resume


def test_slots_leave_room_for_moments_that_are_still_to_come(monkeypatch):
    model = small_llama(30)
    optimizer = torch.optim.AdamW(model.parameters())
    size = 4 * sum(p.numel() for p in model.parameters())
    assert memory.moments_to_come(optimizer) == 2 * size
    sizes = []
    monkeypatch.setattr(memory, "choose_slots", lambda *given: sizes.append(given[-1]) or 2)
    engine = rollout.Engine(model)
    how = {"max_new_tokens": 3, "stop_ids": [2]}
    engine.generate([[3]], **how)
    engine.free()
    engine.promised = lambda: memory.moments_to_come(optimizer)
    engine.generate([[3]], **how)
    assert sizes == [0, -2 * size]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert memory.moments_to_come(optimizer) == 0


def test_attention_on_a_card_is_not_cudnn_s(monkeypatch):
    torch.backends.cuda.enable_cudnn_sdp(True)
    assert memory.pick_device("cpu") == "cpu" and torch.backends.cuda.cudnn_sdp_enabled()
    Card(monkeypatch)
    assert memory.pick_device("auto") == "cuda"
    assert not torch.backends.cuda.cudnn_sdp_enabled() and torch.backends.cuda.flash_sdp_enabled()


def test_a_run_goes_on_on_another_device(base, tmp_path, monkeypatch):
    """On the card AdamW is fused, and on the CPU the one that a CPU always had."""
    fused = []
    train = sfl.train

    def watched(config, policy, critic, reference, optimizer, *rest):
        fused.append({group["fused"] for group in optimizer.param_groups})
        return train(config, policy, critic, reference, optimizer, *rest)

    monkeypatch.setattr(sfl, "train", watched)
    flags = ["--model", base, "--out", str(tmp_path / "run"), "--dtype", "float32", *SMALL]
    with Card(monkeypatch):
        sfl.run(sfl.parse([*flags, "--device", "cuda", "--offload_optimizer"]))
    resumed = ["--resume", str(tmp_path / "run"), "--iterations", "2", "--device", "cpu"]
    sfl.run(sfl.parse(resumed))
    assert fused == [{True}, {False}]


def shallow(size, layers=2):
    config = benchmark.config_of(size)
    config.num_hidden_layers = layers
    return config


@pytest.mark.parametrize("flags", benchmark.UPDATES)
def test_the_forecast_is_what_an_update_takes(flags):
    """By an account of tensors that hold no numbers. A chunk of the head that met the one before
    would take 5 % more."""
    said, found = account.update_memory(shallow("1b"), flags)
    assert said == pytest.approx(found, rel=0.03)


@pytest.mark.parametrize("temperature, top_p", [(0.6, 0.9), (1.0, 1.0), (0.0, 1.0)])
def test_the_forecast_is_what_a_decode_step_takes(temperature, top_p):
    sampling = rollout.Sampling(temperature, top_p, 0, frozenset([2]))
    found, kinds = account.decode_step(shallow("1b"), 512, 64, sampling)
    most = memory.draw_bytes(2, truncated=top_p < 1)
    if temperature == 0:
        assert found < most
    else:
        assert most == pytest.approx(found, rel=0.1)
    # Each layer's attention is one kernel, and nothing reads the vocabulary forty times.
    assert kinds["attention"][0] == 2 and kinds["draw"][1] < 200 * 512 * 32000


def outline(size):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(benchmark.config_of(size))


@pytest.mark.parametrize(
    "gib, flags, size, said",
    [
        (140, "--dataset gsm8k", "1b", ""),
        (78, "--dataset gsm8k", "1b", "fits: --tokens_per_microbatch 8192 ("),
        (38, "--dataset gsm8k", "1b", "fits: --tokens_per_microbatch 4096 --gradient_check"),
        (22, f"--dataset gsm8k --model {RHO}", "1b", "not fit (try --preset home-gsm8k)"),
        (22, "--preset sfl-gsm8k", "1b", "not fit (try --preset home-gsm8k)"),
        (22, "--dataset gsm8k", "0.5b", "22.0 are free: going on as --preset home-gsm8k\n"),
        (22, "--dataset math --seed 3", "0.5b", "going on as --preset home-gsm8k\n"),
        (22, "--dataset gsm8k --algo vineppo", "1b", "fits: --tokens_per_microbatch 4096 --gra"),
        (22, "--dataset gsm8k --algo expert", "1b", "not fit (try --preset home-gsm8k)"),
        (22, "--preset home-gsm8k", "0.5b", ""),
    ],
)
def test_a_run_takes_what_fits_its_card(gib, flags, size, said, tmp_path, monkeypatch, capsys):
    """Settings; and where these do not suffice, a smaller model in place of one nobody named."""
    models = {name: outline(name) for name in ("1b", "0.5b")}
    monkeypatch.setattr(memory, "outline", lambda path: models["1b" if path == RHO else "0.5b"])
    Card(monkeypatch)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (gib * 2**30, gib * 2**30))
    config = sfl.parse(flags.split())
    assert config.model == (RHO if size == "1b" else "Qwen/Qwen2.5-0.5B-Instruct")
    assert (config.dataset, config.seed) == (("math", 3) if "seed" in flags else ("gsm8k", 0))
    (tmp_path / "config.json").write_text(json.dumps(vars(config)))
    again = {"resume": str(tmp_path), "out": str(tmp_path)}
    resumed = sfl.parse(["--resume", str(tmp_path)])  # says nothing
    memory.make_it_fit(config, models[size], "cuda")
    printed = capsys.readouterr().err
    assert vars(resumed) == json.loads((tmp_path / "config.json").read_text()) | again
    assert said in printed and bool(printed) == bool(said)
    assert ("not fit" in printed) != ("it fits" in memory.dry_run(config, models[size]))


def test_a_mac_s_gpu_is_for_large_models(monkeypatch, capsys):
    Card(monkeypatch, kind="mps")
    assert memory.pick_device("auto", 10**5) == "cpu" and capsys.readouterr().err == ""
    assert memory.pick_device("auto", 10**9) == "mps" and "never tried" in capsys.readouterr().err
    assert memory.pick_device("mps", 10**5) == "mps"
