"""An iteration of the default task beside the obvious rival, TRL's GRPOTrainer, in one process: `pip install trl`, then

    python tests/benchmark.py

Same questions, same untrained tiny model (which stops by chance, after about 48 tokens on average), 32 questions x 8
rollouts at temperature 1, a reward that anything can earn (an even number of tokens), one optimizer step, no KL term. Runs
alternate, ratios are taken pair by pair. Generation and the log-prob pass have benchmarks of their own: `python rollout.py`
and `python ppo.py`. `--rival none` times ours alone.
"""

import argparse
import copy
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import eval as evaluation  # noqa: E402
import ppo  # noqa: E402
import sft  # noqa: E402
from rollout import generate  # noqa: E402

QUESTIONS, N, MAX_NEW = 32, 8, 64


def ours(model, tokenizer, prompts, algo):
    """An iteration of sfl.py: rollouts, grades, credit, update. Returns a function that runs one and gives its seconds."""
    policy, stops = copy.deepcopy(model), [tokenizer.eos_token_id]
    critic = ppo.ValueModel(policy) if algo == "ppo" else None
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-6) for m in (policy, critic) if m is not None]
    passes, calls = dict(tokens_per_microbatch=2048), iter(range(10**9))

    def iteration():
        start, seed = time.perf_counter(), next(calls)
        chosen = np.random.default_rng(seed).choice(len(prompts), QUESTIONS, replace=False)
        groups = generate(policy, [prompts[i] for i in chosen], n=N, max_new_tokens=MAX_NEW, stop_ids=stops, seed=seed)
        rollouts = [r for group in groups for r in group]
        rewards = np.array([[len(r.response) % 2 == 0 for r in group] for group in groups], np.float32)
        values = returns = None
        if critic is None:
            advantages = ppo.per_token(rollouts, ppo.group_advantages(rewards, how="grpo").reshape(-1))
        else:
            advantages, values, returns = ppo.critic_advantages(critic, rollouts, rewards.reshape(-1), **passes)
            advantages = ppo.whiten(advantages)
        ppo.update(policy, optimizers[0], rollouts, advantages, critic=critic, critic_optimizer=optimizers[-1] if critic else None,
                   values=values, returns=returns, minibatch=QUESTIONS * N, **passes)
        return time.perf_counter() - start, np.mean([len(r.response) for r in rollouts])
    return iteration


def trl_iterations(model, tokenizer, questions, steps):
    """Seconds of each GRPOTrainer step but the first two."""
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
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(output_dir=folder, use_cpu=not torch.cuda.is_available(), per_device_train_batch_size=QUESTIONS * N,
                            num_generations=N, max_completion_length=MAX_NEW, max_steps=steps + 2, learning_rate=1e-6, beta=0.0,
                            temperature=1.0, report_to=[], save_strategy="no", logging_steps=10**6, disable_tqdm=True, bf16=False,
                            gradient_checkpointing=False, seed=0)
        trainer = GRPOTrainer(copy.deepcopy(model), reward_funcs=reward, args=config, processing_class=tokenizer,
                              train_dataset=Dataset.from_list([{"prompt": q.prompt} for q in questions]), callbacks=[Clock()])
        trainer.train()
    return np.diff(clock)[1:], np.mean(lengths)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rival", choices=("trl", "none"), default="trl")
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    tokenizer = sft.tiny_tokenizer()
    model = sft.tiny_model(tokenizer, 0)
    questions = evaluation.load_questions("arithmetic", "train")
    prompts = evaluation.encode_prompts(tokenizer, questions)
    contenders = {f"sfl, {algo}": ours(model, tokenizer, prompts, algo) for algo in ("grpo", "ppo")}
    for iteration in contenders.values():
        iteration()
    seconds, length = {name: [] for name in contenders}, {}
    for _ in range(args.runs):
        for name, iteration in contenders.items():
            took, length[name] = iteration()
            seconds[name].append(took)
        if args.rival == "trl":
            took, length["TRL GRPOTrainer"] = trl_iterations(model, tokenizer, questions, 2)
            seconds.setdefault("TRL GRPOTrainer", []).append(took.mean())
    print(f"{'':<18} {'mean length':>12} {'seconds an iteration: min / median / max':>42}   ratio of TRL's to it")
    for name, took in seconds.items():
        ratios = np.array(seconds.get("TRL GRPOTrainer", took)) / took
        print(f"{name:<18} {length[name]:12.1f} {min(took):22.2f} / {np.median(took):6.2f} / {max(took):6.2f}   "
              f"{ratios.min():9.2f} / {np.median(ratios):.2f} / {ratios.max():.2f}")


if __name__ == "__main__":
    main()
