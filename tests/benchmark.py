"""Speed and memory, each beside its rival in one process, in turns: read the ratios.

    python tests/benchmark.py generation   # tokens a second, beside transformers' own generation
    python tests/benchmark.py nucleus      # sampling with top-p, beside sorting the vocabulary
    python tests/benchmark.py logprobs     # peak memory and time, beside the plain log-softmax
    python tests/benchmark.py iteration    # one of the default task, beside TRL's GRPOTrainer
    python tests/benchmark.py processes    # an iteration under torchrun, beside one process
    python tests/benchmark.py memory       # the peak of an iteration, beside sfl.py --dry_run's
    python tests/benchmark.py forecast     # a card's, by account (nothing is run), beside the same
    python tests/benchmark.py decode_cost  # of a decode step: kernels, bytes and time, by account

Weights are random: speed does not depend on them. `COMMAND --help` lists the sizes.
"""

import argparse
import copy
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # what is slow to import is imported where it is used


def low_middle_high(values, digits=2):
    ordered = sorted(values)
    picks = ordered[0], ordered[len(ordered) // 2], ordered[-1]
    return " / ".join(f"{value:,.{digits}f}" for value in picks)


def peak_memory(device, reset=False):
    """Bytes since the last reset: allocated on the GPU, or resident here (where that is known)."""
    import torch

    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
    except OSError:
        return float("nan")
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


# --------------------------------------------------------------------------- generation

SHAPE = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
SHAPE += ("num_attention_heads", "num_key_value_heads")
SIZES = {
    "tiny": ("llama", 112, 128, 384, 4, 4, 4),
    "135m": ("llama", 49152, 576, 1536, 30, 9, 3),  # SmolLM-135M
    "0.5b": ("qwen2", 151936, 896, 4864, 24, 14, 2),  # Qwen2.5-0.5B
    "1b": ("llama", 32000, 2048, 5632, 22, 32, 4),  # Rho-1B
}


def generation(args):
    """Contenders take turns at the same prompts and lengths. Lengths are geometric, their mean a
    third of the longest: nobody may stop early, so they are drawn beforehand."""
    import numpy as np
    import torch
    from transformers import GenerationConfig

    import rollout

    never = 1 << 40  # a stop token that no model can write
    model = load(args.model, args.dtype).to(args.device).eval()
    config = GenerationConfig(do_sample=True, top_k=0, pad_token_id=0, eos_token_id=never)
    model.generation_config = config
    rng, longest = np.random.default_rng(0), args.max_new_tokens
    vocab = model.config.vocab_size
    prompts = [rng.integers(1, vocab, k).tolist() for k in rng.integers(8, 40, args.prompts)]
    left = np.ones(args.prompts * args.n)
    if args.prefixes:  # VinePPO's batch: 8 states of a response; the later, the less is left
        texts = [rng.integers(1, vocab, longest).tolist() for _ in prompts]
        prompts = [p + t[: longest * s // 8] for p, t in zip(prompts, texts) for s in range(8)]
        left = np.tile(np.repeat(1 - np.arange(8) / 8, args.n), args.prompts)
    prompts = [p for p in prompts for _ in range(args.n)]
    drawn = np.minimum(rng.geometric(min(1, 3 / longest), len(prompts)), longest)
    lengths = np.ceil(left * drawn).astype(int).tolist()
    engine = rollout.Engine(model, slots=args.slots)
    whole = rollout.plan

    def ours(plan=whole, engine=engine):
        rollout.plan = plan
        stats = {}
        how = {"seed": 0, "stats": stats, "stop_ids": [never]}
        engine.generate(prompts, max_new_tokens=lengths, **how)
        return stats["slot_steps"]

    def one_by_one(requests):  # no forward is shared
        return [(request.prompt, [request]) for request in requests]

    contenders = {"ours": ours}
    if args.bf16:
        rounded = rollout.Engine(model, slots=args.slots, dtype=torch.bfloat16)
        contenders["ours, bfloat16"] = lambda: ours(engine=rounded)
    if args.prefixes:
        contenders["ours, a forward a request"] = lambda: ours(one_by_one)
    else:
        sizes = [size for size in (16, 32, 64, 128, 256) if size < 2 * len(prompts)]
        seconds = {}
        for size in sizes or [len(prompts)]:
            start = time.perf_counter()
            by_generate(model, prompts, lengths, size)
            seconds[size] = time.perf_counter() - start
        size = min(seconds, key=seconds.get)  # the rival's best
        name = f"model.generate, batch {size}"
        contenders[name] = lambda: by_generate(model, prompts, lengths, size)
    results = {name: [] for name in contenders}
    for run, name in itertools.product(range(args.runs + 1), reversed(contenders)):
        peak_memory(model.device, reset=True)
        start = time.perf_counter()
        rows = contenders[name]()
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        took = time.perf_counter() - start
        if run:  # the first warms up
            results[name].append((took, rows, peak_memory(model.device)))
    total = sum(lengths)
    print(f"{args.model} {args.dtype} {args.device}: {len(prompts)} responses, {total:,} tokens")
    print(f"{'':28} {'tokens a second: min / median / max':>38} {'live':>7} {'MiB':>8}  ours is")
    for name, rows in results.items():
        seconds, computed, memory = np.array(rows).T
        ratios = seconds / np.array(results["ours"])[:, 0]
        speeds = low_middle_high(total / seconds, 0)
        live = f"{total / computed[0]:7.1%} {memory[0] / 2**20:8,.0f}"
        print(f"{name:28} {speeds:>38} {live}  {low_middle_high(ratios)} times as fast")


def load(name, dtype):
    import torch
    from transformers import AutoModelForCausalLM

    if name not in SIZES and not Path(name).is_dir():
        raise ValueError(f"--model {name} is neither a folder nor a size: {', '.join(SIZES)}")
    if name not in SIZES:
        return AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype))
    return AutoModelForCausalLM.from_config(config_of(name), dtype=getattr(torch, dtype))


def config_of(name):
    from transformers import AutoConfig

    family, *numbers = SIZES[name]
    shape = dict(zip(SHAPE, numbers), tie_word_embeddings=name in ("135m", "0.5b"))
    return AutoConfig.for_model(family, **shape, max_position_embeddings=4096)


def by_generate(model, prompts, lengths, batch):
    """model.generate: a batch takes as many steps as its longest row. Returns rows times steps."""
    import torch

    computed = 0
    for start in range(0, len(prompts), batch):
        rows = [torch.tensor(p, device=model.device) for p in prompts[start : start + batch]]
        stop = torch.tensor(lengths[start : start + batch], device=model.device)
        pad = torch.nn.utils.rnn.pad_sequence
        tokens = pad(rows, batch_first=True, padding_side="left")
        steps, width = stop.max().item(), tokens.shape[1]

        def done(ids, scores, stop=stop, width=width, **_):
            return ids.shape[1] - width >= stop

        mask = (tokens > 0).long()
        how = {"max_new_tokens": steps, "stopping_criteria": [done]}
        model.generate(tokens, attention_mask=mask, **how)
        computed += steps * len(rows)
    return computed


# --------------------------------------------------------------------------- nucleus


def nucleus(args):
    """One token a row at top-p 0.9, from logits as peaked as a trained model's (a nucleus of a few
    tokens) and from flat ones, beside transformers' filter, which sorts."""
    import numpy as np
    import torch
    from transformers import TopPLogitsWarper

    import rollout

    def ours(logits, how):
        uniform = torch.full((len(logits), 1), 0.5, device=logits.device)
        rollout.draw_tokens(logits, uniform, how)

    def by_sorting(logits, how):
        filtered = TopPLogitsWarper(how.top_p)(None, logits)
        filtered.softmax(-1).multinomial(1)

    plain, truncated = (rollout.Sampling(1.0, top_p, 0, {0}) for top_p in (1.0, 0.9))
    contenders = {"ours": (ours, truncated), "ours, top-p 1": (ours, plain)}
    contenders["sorting"] = by_sorting, truncated
    for vocab, (name, scale) in itertools.product((4096, 151936), (("peaked", 8), ("flat", 1))):
        torch.manual_seed(0)
        logits = scale * torch.randn(args.rows, vocab, device=args.device)
        seconds = {name: [] for name in contenders}
        for run, (who, (function, how)) in itertools.product(
            range(args.runs + 1), contenders.items()
        ):
            start = time.perf_counter()
            with torch.inference_mode():
                function(logits, how)
            if args.device == "cuda":
                torch.cuda.synchronize()
            seconds[who] += [time.perf_counter() - start] * (run > 0)  # the first warms up
        ours_took = np.array(seconds.pop("ours"))
        ratios = [f"{low_middle_high(np.array(x) / ours_took)} {who}" for who, x in seconds.items()]
        print(f"vocabulary {vocab:,}, {name}: in times of ours, {'; '.join(ratios)}")


# --------------------------------------------------------------------------- log-probs


def logprobs(args):
    """Peak memory each in a fresh process, then the seconds of both in one, in turns."""
    if args.measure:
        return print(json.dumps(measure(args)))

    def child(what):
        command = [sys.executable, *sys.argv, "--measure", what]
        return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)

    size = f"{args.batch} x {args.time} tokens, vocabulary {args.vocab}"
    print(f"{size}, forward and backward: peak of a fresh process")
    peaks = {name: child(name) for name in ("backbone", "plain", "ours")}
    for name, peak in peaks.items():
        added = peak - peaks["backbone"]
        share = added / (peaks["plain"] - peaks["backbone"])
        print(f"{name:10} {peak / 1e6:8,.0f} MB, {share:.2f} of what plain adds to the backbone")
    ratios = [ours / plain for plain, ours in child("speed")]
    print(f"time, ours to plain: {low_middle_high(ratios)}")


def measure(args):
    """In a process of its own: the peak bytes of a forward and backward, or seconds of both."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    from plumbing import logprobs

    heads = {"num_attention_heads": max(1, args.width // 64)}
    heads["num_key_value_heads"] = max(1, args.width // 448)
    config = Qwen2Config(
        vocab_size=args.vocab, hidden_size=args.width, intermediate_size=args.width * 38 // 7,
        num_hidden_layers=args.layers, tie_word_embeddings=True, **heads,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(args.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        tokens = torch.randint(args.vocab, (args.batch, args.time))

    def plain():
        logits = model(tokens, use_cache=False).logits[:, :-1]
        return logits.float().log_softmax(-1).gather(-1, tokens[:, 1:, None])

    def backbone():
        return model.base_model(tokens[:, :-1], use_cache=False).last_hidden_state.float()

    passes = {"plain": plain, "backbone": backbone}
    passes["ours"] = lambda: logprobs.token_logprobs(model, tokens)

    def run(name):
        start = time.perf_counter()
        with logprobs.mixed_precision(model, "bfloat16" if args.bf16 else "float32"):
            loss = passes[name]().mean()
        loss.backward()
        model.zero_grad()
        if args.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    if args.measure == "speed":  # the first warms up
        return [[run("plain"), run("ours")] for _ in range(args.runs + 1)][1:]
    run(args.measure)
    return peak_memory(torch.device(args.device))


# --------------------------------------------------------------------------- an iteration

N, MAX_NEW = 8, 64


def iteration(args):
    """GRPO and PPO: same questions, same model, 8 rollouts a question at temperature 1, a reward
    that anything can earn (an even number of tokens), one optimizer step, no KL term. Ratios are
    taken pair by pair. Tiny: untrained, so it stops by chance, after some 48 tokens. Unshared:
    GRPO with the prompt in each response's row."""
    import numpy as np

    import data
    import sft
    from plumbing import batches, checkpoint, memory

    if args.rival == "trl" and find_spec("trl") is None:
        raise ValueError("--rival trl is not installed: pip install trl, or give --rival none")
    if args.model == "tiny":
        tokenizer = sft.tiny_tokenizer()
        model = sft.tiny_model(tokenizer, 0)
    else:
        model, tokenizer = checkpoint.load_model(args.model, device="cpu")
    args.dtype = memory.precision("auto", "cpu", model)
    questions = data.load_questions(args.dataset, "train")
    prompts = data.encode_prompts(tokenizer, questions)
    contenders = {}
    for name in args.ours:
        learner = copy.deepcopy(model)
        shares = name != "unshared" and batches.shares_prompts(learner)
        learner.base_model.shares_prompts = shares
        contenders[f"sfl, {name}"] = ours(learner, prompts, name, args)
    rival = "TRL GRPOTrainer"
    seconds, length = {name: [] for name in contenders}, {}
    for run in range(args.runs + 1):
        for name, iterate in contenders.items():
            took, length[name] = iterate(run)
            seconds[name] += [took] * (run > 0)  # the first warms up
        if args.rival == "trl" and run:
            took, length[rival] = trl_iterations(model, tokenizer, questions, 2, args)
            seconds.setdefault(rival, []).append(took.mean())
    last = seconds.get(rival, seconds[f"sfl, {args.ours[0]}"])
    print(f"{'':16} tokens a response   seconds: min / median / max   the last one's time to it")
    for name, took in seconds.items():
        ratios = low_middle_high(np.array(last) / took)
        print(f"{name:16} {length[name]:19.1f}   {low_middle_high(took):>27}   {ratios:>25}")


def ours(policy, prompts, algo, args):
    """A function that runs an iteration of sfl.py: rollouts, credit, update; returns its seconds
    and the mean length."""
    import numpy as np
    import torch

    import ppo
    from rollout import Engine

    engine = Engine(policy, dtype=getattr(torch, args.dtype))
    critic = ppo.ValueModel(policy) if algo == "ppo" else None
    models = [policy] if critic is None else [policy, critic]
    optimizer = torch.optim.AdamW([p for m in models for p in m.parameters()], lr=1e-6)
    settings = SimpleNamespace(
        temperature=1.0, gamma=1.0, lam=1.0, clip=0.2, value_clip=0.2, kl_coef=0.0, epochs=1,
        loss_average="token", minibatch=args.questions * N, tokens_per_microbatch=2048, fsdp=False,
        max_grad_norm=1.0, max_ratio=10.0, dtype=args.dtype,
    )  # fmt: skip

    def run(seed):
        start = time.perf_counter()
        rng = np.random.default_rng(seed)
        chosen = rng.choice(len(prompts), args.questions, replace=False)
        groups = engine.generate(
            [prompts[i] for i in chosen], n=N, max_new_tokens=MAX_NEW, seed=seed
        )
        rollouts = [r for group in groups for r in group]
        even = [[len(r.response) % 2 == 0 for r in group] for group in groups]
        rewards = np.array(even, np.float32)
        values = returns = None
        if critic is None:
            scores = ppo.group_advantages(rewards, how="grpo")
            advantages = ppo.per_token(rollouts, scores.flatten())
        else:
            values = ppo.rollout_values(critic, rollouts, settings)
            advantages, returns = ppo.response_gae(values, rewards.flatten(), settings)
            advantages = ppo.whiten(advantages)
        critics = {"critic": critic, "values": values, "returns": returns}
        ppo.update(policy, optimizer, rollouts, advantages, settings, **critics)
        return time.perf_counter() - start, np.mean([len(r.response) for r in rollouts])

    return run


def trl_iterations(model, tokenizer, questions, steps, args):
    """Seconds of each GRPOTrainer step but the first two, and the mean length."""
    import numpy as np
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    clock, lengths = [], []

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            clock.append(time.perf_counter())

    def reward(completion_ids, **kwargs):
        lengths.extend(len(ids) for ids in completion_ids)
        return [float(len(ids) % 2 == 0) for ids in completion_ids]

    # 64 x 64 tokens of a vocabulary of 49,152 would not fit into 24 GB beside our models.
    parts = 1 if args.model == "tiny" else math.gcd(args.questions, 4)  # micro-batches of a step
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder, use_cpu=not torch.cuda.is_available(), num_generations=N,
            per_device_train_batch_size=args.questions * N // parts,
            gradient_accumulation_steps=parts, max_completion_length=MAX_NEW,
            max_steps=steps + 2, learning_rate=1e-6, beta=0.0, temperature=1.0, report_to=[],
            save_strategy="no", logging_steps=10**6, disable_tqdm=True,
            bf16=args.dtype == "bfloat16", gradient_checkpointing=False, seed=0,
        )  # fmt: skip
        rows = Dataset.from_list([{"prompt": q.prompt} for q in questions])
        trainer = GRPOTrainer(
            copy.deepcopy(model), reward_funcs=reward, args=config, processing_class=tokenizer,
            train_dataset=rows, callbacks=[Clock()],
        )  # fmt: skip
        trainer.train()
    return np.diff(clock)[1:], np.mean(lengths)


# --------------------------------------------------------------------------- processes


def processes(args):
    """Iterations of PPO on the tiny model by one process and by two, with a thread each; then with
    models in parts. Medians of the seconds in metrics.jsonl, but for the first iteration."""
    import numpy as np

    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", str(args.count)]
    torchrun += ["--master_port", "29650"]
    contenders = {"one process": [], f"{args.count} processes": torchrun}
    contenders[f"{args.count} processes, --fsdp"] = torchrun
    names = ("seconds_rollout", "seconds_credit", "seconds_update")
    seconds = {name: [] for name in contenders}
    for _, (name, start) in itertools.product(range(args.runs), contenders.items()):
        with tempfile.TemporaryDirectory() as folder:
            out = str(Path(folder, "run"))
            command = [sys.executable, *start, str(ROOT / "sfl.py"), "--out", out]
            command += "--device cpu --curriculum uniform --iterations 8 --eval_limit 8".split()
            command += ["--fsdp"] * ("fsdp" in name) + ["--questions", str(args.questions)]
            command += ["--minibatch", str(8 * args.questions)]
            threads = os.environ | {"OMP_NUM_THREADS": "1"}
            subprocess.run(command, check=True, env=threads, capture_output=True)
            lines = Path(out, "metrics.jsonl").read_text().splitlines()[1:]
        seconds[name] += [[json.loads(line)[phase] for phase in names] for line in lines]
    first = np.median(seconds["one process"], 0)
    print(f"{'seconds':24} rollouts   credit   update   together")
    for name, rows in seconds.items():
        phases = np.median(rows, 0)
        cells = " ".join(f"{phase:8.3f}" for phase in [*phases, phases.sum()])
        print(f"{name:24} {cells}, {first.sum() / phases.sum():.2f} times as fast")


# --------------------------------------------------------------------------- memory

RUNS = {
    "grpo": "--algo grpo",
    "ppo": "--algo ppo",
    "ppo, checkpointing": "--algo ppo --gradient_checkpointing",
}


def memory(args):
    """An iteration of sfl.py with a random model on a CPU, each in a fresh process."""
    if args.measure:
        return print(json.dumps(measure_run(args)))
    print(f"{'':20} {'said':>8} {'measured':>9}  ratio")
    for name, flags in RUNS.items():
        command = [sys.executable, *sys.argv, "--measure", flags]
        quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        # what is freed goes back to the system at once, so that resident is what is in use
        allocator = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
        done = subprocess.run(command, check=True, env=os.environ | allocator, **quiet)
        said, peak = json.loads(done.stdout.splitlines()[-1])
        sizes = f"{said / 2**20:8,.0f} {peak / 2**20:9,.0f}"
        print(f"{name:20} {sizes} MiB {said / peak:.2f}", flush=True)


def measure_run(args):
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import sfl
    import sft
    from plumbing import checkpoint, commands, memory

    with tempfile.TemporaryDirectory() as folder:
        tokenizer = sft.tiny_tokenizer()
        config = LlamaConfig(
            vocab_size=32000, hidden_size=args.width, intermediate_size=args.width * 11 // 4,
            num_hidden_layers=args.layers, num_attention_heads=8, num_key_value_heads=2,
            max_position_embeddings=1024, eos_token_id=1, pad_token_id=0,
        )  # fmt: skip
        checkpoint.save_model(LlamaForCausalLM(config), tokenizer, Path(folder, "model"))
        flags = ["--model", str(Path(folder, "model")), *args.measure.split()]
        flags += "--curriculum uniform --iterations 2 --questions 4 --rollouts 4".split()
        flags += ["--out", f"{folder}/run", "--device", "cpu", "--eval_limit", "1"]
        flags += "--max_new_tokens 256 --context 512 --tokens_per_microbatch 4096".split()
        flags += ["--dtype", "float32"]
        settings = sfl.parse(flags)
        outline = memory.outline(settings.model)
        said = memory.forecast(settings, outline, "cpu")
        torch.zeros(1)
        status = Path("/proc/self/status").read_text()
        before = 1024 * int(status.split("VmRSS:")[1].split()[0])
        peak_memory(torch.device("cpu"), reset=True)
        checkpoint.save = lambda *_: None  # a checkpoint on its way is no part of it
        rng = np.random.default_rng(0)  # an untrained model is never right, and nothing to learn
        sfl.evaluation.rewards = lambda tokenizer, questions, groups, **_: rng.integers(
            0, 2, (len(groups), len(groups[0]))
        ).astype(np.float32)
        with commands.signals_wait() as signals:
            sfl.run(settings, signals)
        return sum(said.values()), peak_memory(torch.device("cpu")) - before


# --------------------------------------------------------------------------- by account

UPDATES = ["--algo grpo", "--algo ppo", "--algo ppo --gradient_checkpointing"]
UPDATES += ["--algo grpo --gradient_checkpointing", "--algo grpo --dtype float32"]


def forecast(args):
    """Of an update on a card: the peak of trained weights, gradients, moments and activations, by
    an account of tensors that hold no numbers, beside the forecast. Nothing is measured."""
    import account

    config = config_of(args.model)
    print(f"{'':42} {'said':>8} {'account':>8}  ratio")
    for flags in UPDATES:
        tokens = f" --tokens_per_microbatch {args.tokens}"
        said, found = account.update_memory(config, flags + tokens)
        sizes = f"{said / 2**30:8.2f} {found / 2**30:8.2f}"
        print(f"{args.model:5}{flags:37} {sizes} GiB {said / found:.2f}", flush=True)


def decode_cost(args):
    """Of a decode step on an H100, in bfloat16: kernels, bytes and the time that they need at
    least, by an account of its operations; and of a compiled one, in which a row reads the columns
    that it holds (it may read up to a block of these more). Nothing is measured."""
    import account

    from rollout import Sampling

    sizes = config_of(args.model), args.rows, args.columns
    for temperature, top_p in ((0.6, 0.9), (1.0, 1.0), (0.0, 1.0)):
        sampling = Sampling(temperature, top_p, 0, frozenset([2]))
        print(account.decode_report(*sizes, sampling))
        if temperature > 0:
            print(account.decode_report(*sizes, sampling, args.filled * args.columns))


# --------------------------------------------------------------------------- the command line


def parse(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    accounts = forecast, decode_cost
    for command in (generation, nucleus, logprobs, iteration, processes, memory, *accounts):
        add = commands.add_parser(command.__name__, description=command.__doc__)
        add.set_defaults(run=command)
        add.add_argument("--runs", type=positive, default=5, help="of each contender (5)")
        if command in (generation, nucleus, logprobs):
            add.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
        if command is generation:
            add.add_argument("--model", default="tiny", help=f"{', '.join(SIZES)}, or a folder")
            add.add_argument("--prompts", type=positive, default=32, help="of 8 to 39 tokens (32)")
            add.add_argument("--n", type=positive, default=8, help="responses to each (8)")
            add.add_argument("--max_new_tokens", type=positive, default=256)
            add.add_argument("--slots", type=positive, help="by default: by free memory")
            add.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
            add.add_argument("--bf16", action="store_true", help="a bfloat16 copy, too")
            add.add_argument("--prefixes", action="store_true", help="no rival: n responses from 8 "
                             "states of a response, prefixes shared and not")  # fmt: skip
        if command is nucleus:
            add.add_argument("--rows", type=positive, default=64, help="decoded at once (64)")
        if command is logprobs:
            sizes = {"batch": 4, "time": 512, "vocab": 151936, "width": 896, "layers": 2}
            for name, default in sizes.items():
                add.add_argument(f"--{name}", type=positive, default=default, help=f"({default})")
            add.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
            add.add_argument("--measure", help=argparse.SUPPRESS)  # what the children are told
        if command is processes:
            add.add_argument("--count", type=positive, default=2, help="processes (2)")
            add.add_argument("--questions", type=positive, default=64, help="x 8 responses (64)")
        if command is memory:
            add.add_argument("--width", type=positive, default=512, help="of the model (512)")
            add.add_argument("--layers", type=positive, default=8, help="of the model (8)")
            add.add_argument("--measure", help=argparse.SUPPRESS)
        if command in accounts:
            add.add_argument("--model", default="0.5b", choices=SIZES)
        if command is forecast:
            add.add_argument("--tokens", type=positive, default=16384, help="a micro-batch (16384)")
        if command is decode_cost:
            add.add_argument("--rows", type=positive, default=512, help="decoded at once (512)")
            add.add_argument("--columns", type=positive, default=1280, help="of the cache (1280)")
            add.add_argument("--filled", type=float, default=0.5, help="share of the columns that "
                             "a row holds: half of them (0.5), if lengths are even")  # fmt: skip
        if command is iteration:
            add.add_argument("--rival", choices=("trl", "none"), default="trl")
            add.add_argument("--model", default="tiny", help="tiny, or a model's folder")
            add.add_argument("--dataset", default="arithmetic", help="as of sfl.py (arithmetic)")
            add.add_argument("--questions", type=positive, default=32, help="x 8 rollouts (32)")
            names = ("grpo", "unshared", "ppo")
            add.add_argument("--ours", nargs="+", choices=names, default=names, help="(all three)")
    return parser.parse_args(argv)


def positive(text):
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return int(text)


def main(argv=None):
    args = parse(argv)
    args.run(args)


if __name__ == "__main__":
    args = parse()  # first: --help need not wait for the imports
    from plumbing import commands

    commands.command_line(lambda: args.run(args))
