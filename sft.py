"""Learning by next-token prediction: where a policy comes from before RL can improve it.

    python sft.py                                           # the tiny model that sfl.py starts from
    python sft.py --dataset gsm8k --model HUB_ID_OR_DIR --out DIR     # a data set's own solutions

Supervised fine-tuning (SFT) raises log pi(solution | prompt), summed over the solution's tokens and
its stop token; the prompt is read, not learned:

    loss = - sum over solution tokens of log pi(token | what is before it) / number of them

THE TINY BASE MODEL is made so that there is something for RL to find. Real base models can reason
step by step and mostly don't, because people skip steps. So it learns from demonstrations in which
a line takes one term or several, and one that takes several is wrong (data.solve):

    37+26-12+7      37+26=63            37+26-12=25
                    63-12+7=70          25+7=32
                    #### 70             #### 32

Each line is a decision. It knows all single steps by heart, and the chance that it takes no other
falls with every line: two-step chains are solved half of the time, eight-step chains hardly ever.
There is a frontier, and it moves: what is learned on two steps makes three steps learnable.

    1. demonstrations that take mostly one term a line, until the steps are known;
    2. a shorter stage in hurry, which is where RL starts.
"""

import hashlib
import json
import random
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import data
import ppo
from rollout import Rollout, progress_bar


def train(model, draw, *, steps, lr, warmup=0.03, settings=None, max_grad_norm=1.0, bar=None):
    """`steps` of AdamW with linear warm-up and decay. draw() -> a batch of `Rollout`s to imitate.
    The loss is the mean of -log pi over the response tokens of the whole batch. settings: as
    `ppo.update`'s, for micro-batches and precision. Returns the losses, one a step."""
    settings = settings or ppo.Settings()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, betas=(0.9, 0.95))
    warm = max(1, int(warmup * steps))
    losses = []
    model.train()
    for step in range(steps):
        rise, fall = (step + 1) / warm, (steps - step) / max(1, steps - warm)
        optimizer.param_groups[0]["lr"] = lr * min(rise, fall)
        batch = draw()
        tokens = sum(len(r.response) for r in batch)
        losses.append(0.0)
        for part in ppo.microbatches(batch, settings.tokens_per_microbatch):
            logprobs = ppo.response_logprobs(model, [batch[i] for i in part], settings)
            loss = -logprobs.sum() / tokens
            loss.backward()
            losses[-1] += loss.item()
        if not np.isfinite(losses[-1]):
            raise ValueError(f"the loss is {losses[-1]} at SFT step {step}: lower --lr {lr}")
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        if bar is not None:
            bar.set_postfix(loss=f"{np.mean(losses[-50:]):.3f}", refresh=False)
            bar.update()
    model.eval()
    return losses


def demonstrations(tokenizer, questions, texts, chat="auto"):
    """Prompt and text of each question as a `Rollout`, its stop token included: what SFT learns."""
    prompts = data.encode_prompts(tokenizer, questions, chat=chat)
    responses = [data.encode_response(tokenizer, text) for text in texts]
    stop = [tokenizer.eos_token_id]
    return [Rollout(p, r + stop, [], True) for p, r in zip(prompts, responses)]


# --------------------------------------------------------------------------- the tiny base model

# The settings of the tiny base model; their hash names its cache, so changing one trains it anew.
TINY = {
    # steps, learning rate, and how many terms a line of the demonstrations takes: how often
    "stages": [
        [500, 8e-3, {1: 0.75, 2: 0.13, 3: 0.07, 4: 0.05}],
        [100, 1e-3, {1: 0.40, 2: 0.35, 3: 0.15, 4: 0.10}],
    ],
    "one_step": 0.5,  # share of the demonstrations of one step
    "questions": 16000,
    "batch": 96,
    "warmup": 0.15,
    "seed": 0,
}
TINY_MODEL = {
    "hidden_size": 64,
    "intermediate_size": 168,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.05,
    "tie_word_embeddings": False,
}


def tiny_tokenizer():
    """One token a number, so that sequences are short and no carry hides inside a token."""
    words = ["<pad>", "<eos>", "\n", "#### ", "+", "-", "=", *map(str, range(data.MODULUS))]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d+|#### |\n|."), "isolated")
    tokenizer.decoder = decoders.Fuse()  # join without spaces: decode(encode(text)) == text
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def tiny_model(tokenizer, seed):
    """A Llama of well under a million parameters, randomly initialised."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **TINY_MODEL,
    )
    return LlamaForCausalLM(config)


def demonstrated_chains(rng):
    """None that is held out; many of one step, the others as long as wanted."""
    chains = []
    while len(chains) < TINY["questions"]:
        one = rng.random() < TINY["one_step"]
        chain = data.draw_chain(rng, 1 if one else rng.choice(data.STEPS_WANTED))
        if data.in_split("".join(map(str, chain)), "train", data.ONE_IN):
            chains.append(chain)
    return chains


def draw_batch(examples, size, rng):
    return [examples[i] for i in rng.integers(0, len(examples), size)]


def tiny_base(cache, progress=True):
    """The folder of the tiny base model under `cache`; trained if it is not there yet (a minute on
    two cores)."""
    key = json.dumps([TINY, TINY_MODEL, data.TERMS])
    folder = Path(cache) / f"tiny-arithmetic-{hashlib.sha256(key.encode()).hexdigest()[:10]}"
    if (folder / "config.json").exists():
        return folder
    torch.set_num_threads(1)  # too small to share among cores
    tokenizer, rng = tiny_tokenizer(), np.random.default_rng(TINY["seed"])
    model = tiny_model(tokenizer, TINY["seed"])
    chains = demonstrated_chains(random.Random(TINY["seed"]))
    questions = [data.worked(chain) for chain in chains]
    total = sum(steps for steps, _, _ in TINY["stages"])
    with progress_bar("SFT of the tiny model", total, "step", progress) as bar:
        for steps, lr, hurry in TINY["stages"]:
            haste = random.Random(TINY["seed"])
            texts = [data.solve(chain, hurry, haste) for chain in chains]
            examples = demonstrations(tokenizer, questions, texts)
            draw = partial(draw_batch, examples, TINY["batch"], rng)
            train(model, draw, steps=steps, lr=lr, warmup=TINY["warmup"], bar=bar)
    data.save_model(model, tokenizer, folder)
    return folder


# ==================================================================================================
# That is the method. Below: the command line.
# ==================================================================================================


# See data.read_settings.
SETTINGS = """
dataset          arithmetic     -     a data set's names, or a file's or folder's path
data_dir         -              -     a folder with the named data set's files, not the hub
model            tiny           -     tiny (arithmetic only), a hub id or a model's folder
out              -              -     folder of the trained model; by default runs/sft-DATASET
epochs           3.0            0.001..  passes over the data
batch            64             1..   demonstrations an optimizer step
lr               1e-5           0..   learning rate
limit            0              0..   a random subset of that many questions; 0: all
tokens_per_microbatch  8192     1..   padded tokens in a forward and backward
chat             auto           auto|on|off  prompt through the chat template; auto: if any
seed             0              0..   of the order of the demonstrations
device           auto           -     auto, cpu, cuda or mps
cache            runs/cache     -     where the tiny model is kept
"""


def main(argv=None):
    settings = {name: row[0] for name, row in data.read_settings(SETTINGS).items()}
    flags = data.parse_flags(SETTINGS, "Supervised fine-tuning on a data set's solutions.", argv)
    args = SimpleNamespace(**settings | flags)
    data.check_settings(SETTINGS, args)
    if args.model == "tiny":
        check_tiny(args)
        return print(f"the tiny base model is in {tiny_base(args.cache)}")
    out = Path(args.out or f"runs/sft-{Path(args.dataset).stem}")
    if out.exists():
        raise ValueError(f"{out} exists already: give another folder with --out")
    questions = data.load_questions(
        args.dataset, "train", data_dir=args.data_dir, limit=args.limit or None, seed=args.seed
    )
    questions = [q for q in questions if q.solution]
    if not questions:
        raise ValueError(f"{args.dataset} has no solutions to learn from: no field solution")
    model, tokenizer = data.load_model(args.model, device=args.device)
    data.stop_ids(model, tokenizer)
    examples = demonstrations(tokenizer, questions, [q.solution for q in questions], args.chat)
    rng, left = np.random.default_rng(args.seed), []

    def draw():  # without replacement: each demonstration once an epoch
        while len(left) < args.batch:
            left.extend(rng.permutation(len(examples)))
        return [examples[left.pop(0)] for _ in range(args.batch)]

    steps = max(1, round(args.epochs * len(examples) / args.batch))
    half = torch.bfloat16 if model.device.type == "cuda" else None
    settings = ppo.Settings(tokens_per_microbatch=args.tokens_per_microbatch, autocast=half)
    with progress_bar("SFT", steps, "step") as bar:
        train(model, draw, steps=steps, lr=args.lr, settings=settings, bar=bar)
    data.save_model(model, tokenizer, out)
    print(f"wrote {out}")


def check_tiny(args):
    if args.dataset != "arithmetic":
        raise ValueError(
            f"--model tiny knows only arithmetic, not {args.dataset!r}: give --model a hub id or a "
            "folder"
        )


if __name__ == "__main__":
    data.command_line(main)
