"""What can only be seen on a GPU, in one command. Without one it says so and exits 0.

    python tests/gpu.py

Same tokens as model.generate in float32 (and how long they agree in bfloat16), CUDA graphs for
three architectures, the CPU's metrics in float32, an iteration of each algorithm and its peak
memory beside sfl.py --dry_run's, tokens a second beside model.generate and beside what the memory
could carry. `test_card.py` runs what it can of this on a card that is only pretended.
"""

import math
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

FAMILIES = {
    "llama": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2},
    "gpt_neox": {},
}
SIZE = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3}
SIZE |= {"num_attention_heads": 4, "max_position_embeddings": 512}
ALGORITHMS = ("ppo", "vineppo", "grpo", "rloo", "expert", "rcrl")


def build(family, dtype, device):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZE, **FAMILIES[family])
    return AutoModelForCausalLM.from_config(config, dtype=dtype).to(device).eval()


def parity(family, dtype, device="cuda"):
    """Greedy tokens beside model.generate, prompt by prompt: the share that agrees before the first
    difference. In float32 that must be all of them."""
    from rollout import generate

    model = build(family, dtype, device)
    rng = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 512, (4 + 3 * i,), generator=rng).tolist() for i in range(12)]
    with warnings.catch_warnings():
        # a graph that cannot be captured is a warning; those of libraries are not our business
        warnings.filterwarnings("error", message="no CUDA graph")
        ours = generate(model, prompts, max_new_tokens=64, temperature=0, stop_ids=[2], slots=5)
    agree = []
    for prompt, [rollout] in zip(prompts, ours):
        tokens = torch.tensor([prompt], device=device)
        theirs = model.generate(
            tokens, max_new_tokens=64, do_sample=False, eos_token_id=2, pad_token_id=0
        )
        theirs = theirs[0, len(prompt) :].tolist()
        same = [a == b for a, b in zip(rollout.response, theirs)]
        agree.append((same + [False]).index(False) / max(len(theirs), len(rollout.response)))
    share = sum(agree) / len(agree)
    print(f"{family:10} {str(dtype):16} {share:.1%} of the tokens as model.generate's")
    return dtype != torch.float32 or share == 1


def speed(size="0.5b", slots=512, new=256):
    """Tokens a second, beside model.generate and the bandwidth: a step reads all weights."""
    run = [sys.executable, "tests/benchmark.py", "generation", "--model", size, "--device", "cuda"]
    run += ["--dtype", "bfloat16", "--prompts", str(slots // 8), "--slots", str(slots)]
    subprocess.run([*run, "--max_new_tokens", str(new), "--runs", "3"], cwd=ROOT, check=True)
    block = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    other = torch.empty_like(block)
    other.copy_(block)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(20):
        other.copy_(block)
    torch.cuda.synchronize()
    bandwidth = 20 * 2 * block.nbytes / (time.perf_counter() - start)
    print(f"the card copies {bandwidth / 1e9:,.0f} GB/s")


def run(base, algo, device, dtype, *flags):
    """Two iterations: the rows of metrics.jsonl, and the bytes that were said and taken."""
    from benchmark import peak_memory

    import sfl
    from plumbing import checkpoint, commands, memory, report

    model, _ = checkpoint.load_model(base)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("error", message="no CUDA graph")
        given = ["--algo", algo, "--model", base, "--out", f"{folder}/run", "--device", device]
        given += "--iterations 2 --questions 16 --eval_limit 16 --eval_every 2".split()
        config = sfl.parse([*given, "--dtype", dtype, *flags])
        said = memory.forecast(config, model, device)
        torch.cuda.empty_cache()
        peak_memory(torch.device(device), reset=True)
        with commands.signals_wait() as signals:
            sfl.run(config, signals)
        taken = peak_memory(torch.device(device))
        return report.read_run(config.out), sum(said.values()), taken


def forecasts(base):
    """Each algorithm as a card runs it, and the peak beside the forecast."""
    for algo in ALGORITHMS:
        _, said, taken = run(base, algo, "cuda", "bfloat16")
        ratio = f"said {said / 2**20:,.0f} MiB, took {taken / 2**20:,.0f}"
        print(f"{algo:10} two iterations; {ratio}, ratio {said / taken:.2f}")


def differences(ours, theirs):
    """Names of the metrics in which two runs differ by more than rounding, clocks aside."""
    names = set()
    for row, other in zip(ours, theirs, strict=True):
        for name in row.keys() | other.keys():
            a, b = row.get(name), other.get(name)
            if "seconds" in name or a == b:
                continue
            numbers = isinstance(a, float) and isinstance(b, float)
            if not (numbers and math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-6)):
                names.add(name)
    return sorted(names)


def same_metrics(base, algo, device="cuda", *flags):
    """In float32 a card's rollouts, rewards and losses are the CPU's, up to rounding. In the first
    iteration: Adam's first step is of size lr however small a gradient is, whatever its sign."""
    rows = [run(base, algo, where, "float32", *flags)[0][:1] for where in ("cpu", device)]
    found = differences(*rows)
    print(f"{algo:10} float32: {f'not the metrics of the CPU: {found}' if found else 'as a CPU'}")
    return not found


def main():
    if not torch.cuda.is_available():
        return print("no GPU here: nothing was run, and nothing is claimed")
    print(torch.cuda.get_device_name())
    import sft

    exact = [
        parity(family, dtype) for dtype in (torch.float32, torch.bfloat16) for family in FAMILIES
    ]
    base = str(sft.tiny_base("runs/cache"))
    as_a_cpu = [same_metrics(base, algo) for algo in ("grpo", "ppo")]
    forecasts(base)
    speed()
    if not all(exact):
        sys.exit("float32 tokens differ from model.generate's")
    if not all(as_a_cpu):
        sys.exit("float32 metrics differ from the CPU's")


if __name__ == "__main__":
    main()
