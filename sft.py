"""Learning by next-token prediction: where a policy comes from before RL can improve it.

    python sft.py                                                      # the tiny arithmetic model that sfl.py starts from
    python sft.py --dataset gsm8k --model HUB_ID_OR_DIR --out DIR      # a warm start on a data set's own solutions

Supervised fine-tuning (SFT) raises log pi(solution | prompt), summed over the solution's tokens and its stop token; the
prompt is read, not learned. Prompt and solution are tokenized apart and joined as ids, because that is how generation
will meet them: a response continues the prompt's tokens, it never merges with them.

THE TINY BASE MODEL is made so that there is something for RL to find. Real base models can reason step by step and mostly
don't, because much of what they read jumps to the conclusion. So it learns in two stages:

    1. worked solutions (`37+5=42`, `42-8=34`, `#### 34`) of chains of two steps or more (TINY_LEVELS), and mostly terse
       ones, `#### 42` alone, of single steps, until each step is nearly always right;
    2. a shorter stage in which most demonstrations of all lengths are terse, as hurried people write. Now its habit is to
       jump to the answer: right for one step, hopeless beyond, although working it out would succeed.

RL cannot teach it arithmetic; it can find out that the other form pays. (That RL after a mixture of long and short
demonstrations grows the responses and the accuracy is the subject of arXiv 2510.11495.)
"""

import argparse
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import eval as evaluation
import ppo
from rollout import Rollout

# The settings of the tiny base model; their hash names its cache, so changing one trains it anew.
TINY_LEVELS = {1: 1, 2: 1, 3: 1, 4: 1, 5: 1, 6: 1}  # steps of the worked solutions -> share
TINY = dict(worked_steps=2600, terse_steps=600, terse_share=0.85, one_step_share=0.35, batch=32, lr=3e-3, terse_lr=1e-3, seed=0)
TINY_MODEL = dict(hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4,
                  max_position_embeddings=256, initializer_range=0.05, tie_word_embeddings=False)


def tiny_tokenizer():
    """One token a number, so that sequences are short and no carry hides inside a token."""
    words = ["<pad>", "<eos>", "\n", "#### ", "+", "-", "=", *map(str, range(evaluation.MODULUS))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d+|#### |\n|."), "isolated")
    tokenizer.decoder = decoders.Fuse()  # join without spaces: decode(encode(text)) == text
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def tiny_model(tokenizer, seed):
    """A Llama of well under a million parameters, randomly initialised."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
                                        pad_token_id=tokenizer.pad_token_id, **TINY_MODEL))


def demonstrations(tokenizer, questions, texts, chat="auto"):
    """Prompt and text of each question as a `Rollout`, its stop token included: what SFT learns from."""
    prompts = evaluation.encode_prompts(tokenizer, questions, chat=chat)
    return [Rollout(p, evaluation.encode_response(tokenizer, t) + [tokenizer.eos_token_id], [], True) for p, t in zip(prompts, texts)]


def train(model, draw, *, steps, lr, warmup=0.03, tokens_per_microbatch=8192, max_grad_norm=1.0, autocast=None, bar=None):
    """`steps` of AdamW with linear warm-up and decay. draw() -> a batch of `Rollout`s to imitate. The loss is the mean of
    -log pi over the response tokens of the whole batch. Returns the losses, one a step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, betas=(0.9, 0.95))
    warm = max(1, int(warmup * steps))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / warm, (steps - i) / max(1, steps - warm)))
    losses = []
    model.train()
    for step in range(steps):
        batch, loss_sum = draw(), 0.0
        count = sum(len(r.response) for r in batch)
        for part in ppo.microbatches(batch, tokens_per_microbatch):
            with ppo.mixed_precision(model, autocast):
                loss = -ppo.response_logprobs(model, [batch[i] for i in part], 1.0).sum() / count
            loss.backward()
            loss_sum += loss.item()
        if not np.isfinite(loss_sum):
            raise ValueError(f"the loss is {loss_sum} at SFT step {step}: lower --lr {lr}")
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss_sum)
        if bar is not None:
            bar.update()
            bar.set_postfix(loss=f"{np.mean(losses[-50:]):.3f}")
    model.eval()
    return losses


def tiny_base(cache, progress=True):
    """The folder of the tiny base model under `cache`; trained if it is not there yet (a few minutes on two cores)."""
    key = json.dumps([TINY, TINY_LEVELS, TINY_MODEL], sort_keys=True)
    folder = Path(cache) / f"tiny-arithmetic-{hashlib.sha256(key.encode()).hexdigest()[:10]}"
    if (folder / "config.json").exists():
        return folder
    tokenizer, rng = tiny_tokenizer(), np.random.default_rng(TINY["seed"])
    model = tiny_model(tokenizer, TINY["seed"])
    # Chains of the training split: a test question never appears (eval.draw_chains).
    questions = evaluation.arithmetic(7000, TINY["seed"] + 2, TINY_LEVELS)
    worked = demonstrations(tokenizer, questions, [q.solution for q in questions])
    terse = demonstrations(tokenizer, questions, [f"#### {q.answer}" for q in questions])

    one_step = np.array([q.level == 1 for q in questions])
    everyday = np.where(one_step, TINY["one_step_share"] / one_step.sum(), (1 - TINY["one_step_share"]) / (~one_step).sum())

    def draw(stage):
        chosen = rng.choice(len(worked), TINY["batch"], replace=False, p=everyday)
        return [terse[i] if (stage == 2 or one_step[i]) and rng.random() < TINY["terse_share"] else worked[i] for i in chosen]

    with tqdm(total=TINY["worked_steps"] + TINY["terse_steps"], desc="SFT of the tiny model", unit="step",
              disable=not progress) as bar:
        train(model, lambda: draw(1), tokens_per_microbatch=1024, steps=TINY["worked_steps"], lr=TINY["lr"], bar=bar)
        train(model, lambda: draw(2), tokens_per_microbatch=1024, steps=TINY["terse_steps"], lr=TINY["terse_lr"], bar=bar)
    save(model, tokenizer, folder)
    return folder


def save(model, tokenizer, folder):
    """Model and tokenizer as `from_pretrained` loads them. Each file is written elsewhere and renamed over the old one: an
    interruption leaves whole files."""
    beside = Path(folder).with_name(Path(folder).name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    model.save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    Path(folder).mkdir(parents=True, exist_ok=True)
    for file in sorted(beside.iterdir(), key=lambda file: file.name == "config.json"):  # last: whoever looks for it finds all
        os.replace(file, Path(folder, file.name))
    beside.rmdir()


def main(argv=None):
    parser = argparse.ArgumentParser(description="Supervised fine-tuning on a data set's solutions.", allow_abbrev=False)
    parser.add_argument("--dataset", default="arithmetic", help="arithmetic, gsm8k, or the path of a .jsonl file or folder")
    parser.add_argument("--data_dir", help="gsm8k: a folder with train.jsonl and test.jsonl, instead of the hub")
    parser.add_argument("--model", default="tiny", help="tiny (arithmetic only), a hub id or a model's folder")
    parser.add_argument("--out", help="folder of the trained model (default: runs/sft-DATASET)")
    parser.add_argument("--epochs", type=float, default=3, help="passes over the data (default 3)")
    parser.add_argument("--batch", type=int, default=64, help="demonstrations an optimizer step (default 64)")
    parser.add_argument("--lr", type=float, default=1e-5, help="learning rate (default 1e-5)")
    parser.add_argument("--limit", type=int, help="a random subset of that many questions (default: all)")
    parser.add_argument("--tokens_per_microbatch", type=int, default=8192, help="padded tokens in one forward and backward")
    parser.add_argument("--chat", default="auto", help="prompt through the chat template: auto (if there is one), on, off")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--cache", default="runs/cache", help="where the tiny starting model is kept")
    args = evaluation.parse_args(parser, argv)
    if args.model == "tiny":
        if args.dataset != "arithmetic":
            raise ValueError(f"--model tiny knows only arithmetic, not {args.dataset!r}: give --model a hub id or a folder")
        print(f"the tiny base model is in {tiny_base(args.cache)}")
        return
    if args.epochs <= 0 or args.batch < 1 or args.lr <= 0:
        raise ValueError(f"--epochs {args.epochs}, --batch {args.batch} and --lr {args.lr} must be above 0")
    out = Path(args.out or f"runs/sft-{Path(args.dataset).stem}")
    if out.exists():
        raise ValueError(f"{out} exists already: give another folder with --out")
    questions = evaluation.load_questions(args.dataset, "train", data_dir=args.data_dir, limit=args.limit, seed=args.seed)
    questions = [q for q in questions if q.solution]
    if not questions:
        raise ValueError(f"{args.dataset} has no solutions to learn from: its lines need a field solution")
    model, tokenizer = evaluation.load_model(args.model, device=args.device)
    evaluation.stop_ids(model, tokenizer)
    batch = demonstrations(tokenizer, questions, [q.solution for q in questions], args.chat)
    rng, left = np.random.default_rng(args.seed), []

    def draw():  # without replacement: each demonstration once an epoch
        while len(left) < args.batch:
            left.extend(rng.permutation(len(batch)))
        return [batch[left.pop(0)] for _ in range(args.batch)]

    steps = max(1, round(args.epochs * len(batch) / args.batch))
    autocast = torch.bfloat16 if model.device.type == "cuda" else None
    with tqdm(total=steps, desc="SFT", unit="step") as bar:
        train(model, draw, steps=steps, lr=args.lr, tokens_per_microbatch=args.tokens_per_microbatch, autocast=autocast, bar=bar)
    save(model, tokenizer, out)
    print(f"wrote {out}")


if __name__ == "__main__":
    evaluation.command_line(main)
