"""Learning by next-token prediction: where a policy comes from before RL can improve it.

    python sft.py                                           # the tiny model that sfl.py starts from
    python sft.py --dataset gsm8k --model HUB_ID_OR_DIR --out DIR     # a data set's own solutions
    python sfl.py --algo expert                             # imitating one's own right responses

Supervised fine-tuning (SFT) raises log pi(solution | prompt), summed over the solution's tokens and
its stop token; the prompt is read, not learned:

    loss = - sum over solution tokens of log pi(token | what is before it) / number of them

TWO LEARNERS IMITATE THEMSELVES, in the loop of sfl.py and with any of its curricula. A policy
samples responses, and what is right about them says which it goes on to imitate:

    expert   expert iteration (arXiv 2403.04642): the right ones of all rounds, each once, and the
             initial model learns them anew each round. STaR (2203.14465) takes one greedy response
             a question, and a hint (the answer) where that was wrong; ReST-EM (2312.06585) is
             this, with the last round's samples alone and at most a few for a question.
    rcrl     return-conditioned RL: all of them, each with a tag that says its return before the
             prompt. The good tag then asks for a right one:

                 <good> 37+26-12     37+26=63 63-12=51 #### 51
                 <bad>  37+26-12     37+26-12=25 #### 25

There is no baseline, no ratio and no clip, and what is wrong is not unlearned, only not repeated.

THE TINY BASE MODEL is made so that there is something for RL to find. Real base models can reason
step by step and mostly don't, because people skip steps. So it learns from demonstrations in which
a line takes one term or several, and one that takes several is wrong (data.solve):

    37+26-12+7      37+26=63            37+26-12=25
                    63-12+7=70          25+7=32
                    #### 70             #### 32

Each line is a decision. It knows all single steps by heart, and the chance that it takes no other
falls with every line: two-step chains are solved half of the time, eight-step chains hardly ever.
There is a frontier, and it moves: what is learned on two steps makes three steps learnable.
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
from plumbing import checkpoint, commands
from plumbing.commands import progress_bar
from plumbing.processes import all_sum, rank
from rollout import Rollout


def train(
    model, draw, *, steps, lr, warmup=0.03, settings=None, max_grad_norm=1.0, bar=None, file=None
):  # fmt: skip
    """`steps` of AdamW with linear warm-up and decay. draw() -> a batch of `Rollout`s to imitate.
    The loss is the mean of -log pi over the response tokens of the whole batch. settings: as
    `ppo.update`'s, for micro-batches and precision. file: from it the same call goes on if this one
    is interrupted. Returns the losses, one a step."""
    settings = settings or ppo.Settings()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, betas=(0.9, 0.95))
    warm = max(1, int(warmup * steps))
    losses = load_progress(file, model, optimizer)
    done = len(losses)
    ppo.no_dropout(model)
    for step in range(steps):
        batch = draw()  # also what was learned already: the random numbers go on
        if bar is not None:
            bar.set_postfix(loss=f"{np.mean(losses[-50:] or [0]):.3f}", refresh=False)
            bar.update()
        if step < done:
            continue
        rise, fall = (step + 1) / warm, (steps - step) / max(1, steps - warm)
        optimizer.param_groups[0]["lr"] = lr * min(rise, fall)
        tokens = sum(len(r.response) for r in batch)
        loss = torch.zeros((), device=next(model.parameters()).device)
        for part in ppo.microbatches(batch, settings.tokens_per_microbatch):
            logprobs = ppo.response_logprobs(model, [batch[i] for i in part], settings)
            part_loss = -logprobs.sum() / tokens
            part_loss.backward()
            loss += part_loss.detach()
        losses.append(float(all_sum(loss)))
        norm = ppo.step(model, optimizer, losses[-1], max_grad_norm)
        if not np.isfinite(norm):
            raise ValueError(f"the loss is {losses[-1]} at SFT step {step}: lower --lr {lr}")
        if file and ((step + 1) % 100 == 0 or step + 1 == steps):
            save_progress(file, model, optimizer, losses)
    model.eval()
    return losses


def demonstrations(tokenizer, questions, texts, chat="auto"):
    """Prompt and text of each question as a `Rollout`, its stop token included: what SFT learns."""
    prompts = data.encode_prompts(tokenizer, questions, chat=chat)
    responses = [data.encode_response(tokenizer, text) for text in texts]
    has_stop = tokenizer.eos_token_id is not None
    commands.require(has_stop, "the tokenizer has no stop token: set tokenizer.eos_token")
    stop = [tokenizer.eos_token_id]
    return [Rollout(p, r + stop, [], True) for p, r in zip(prompts, responses)]


# --------------------------------------------------------------------------- imitating oneself

IMITATORS = ("expert", "rcrl")


def keep(kept, algo, questions, groups, rewards):
    """Add what this round's samples teach to `kept`: a list of [question, return, response ids].
    'expert': the right ones, no two alike; 'rcrl': all.

    questions: the group's numbers; groups, rewards: n responses to each, and their grades."""
    known = {(question, tuple(ids)) for question, _, ids in kept}
    for question, group, row in zip(questions, groups, rewards):
        for rollout, reward in zip(group, row):
            seen = (int(question), tuple(rollout.response))
            if algo == "expert" and (reward == 0 or seen in known):
                continue
            known.add(seen)
            kept.append([int(question), int(reward), rollout.response])


def imitate(policy, start, examples, *, epochs, minibatch, lr, settings, rng):
    """A round: `epochs` passes over the examples (Rollouts) by next-token prediction, from the
    weights of the model `start`; None: from the policy's own. Returns metrics."""
    if start is not None:
        policy.load_state_dict(start.state_dict())
    if not examples:
        return {"kept": 0}
    steps = max(1, round(epochs * len(examples) / minibatch))
    draw = epochs_of(examples, minibatch, rng)
    losses = train(policy, draw, steps=steps, lr=lr, settings=settings)
    last = losses[-max(1, steps // 5) :]
    return {"kept": len(examples), "sft_steps": steps, "sft_loss": float(np.mean(last))}


def epochs_of(examples, batch, rng):
    """A function that draws batches without replacement: each example comes once an epoch."""
    left = []

    def draw():
        while len(left) < batch:
            left.extend(rng.permutation(len(examples)))
        drawn, left[:] = left[:batch], left[batch:]
        return [examples[i] for i in drawn]

    return draw


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
SHORT = ppo.Settings(tokens_per_microbatch=4096)  # rows of like length together: less padding
# Parity: steps, learning rate. A share --p_cot of the demonstrations is long.
TINY_PARITY = {"stages": [[350, 4e-3]], "questions": 16000, "batch": 96, "warmup": 0.15, "seed": 0}


def demonstrated_chains(rng):
    """Chains of the training split: half of them of one step, the others of STEPS_WANTED."""
    chains = []
    while len(chains) < TINY["questions"]:
        one = rng.random() < TINY["one_step"]
        chain = data.draw_chain(rng, 1 if one else rng.choice(data.STEPS_WANTED))
        if data.in_split("".join(map(str, chain)), "train"):
            chains.append(chain)
    return chains


def hurried(chains, hurry):
    """A demonstration of each chain that takes so many terms a line."""
    rng = random.Random(TINY["seed"])
    return [data.solve(chain, hurry, rng) for chain in chains]


def long_or_short(questions, p_cot):
    """Parity's demonstrations: the long solution with probability p_cot, else the answer alone."""
    rng = random.Random(TINY_PARITY["seed"])
    return [q.solution if rng.random() < p_cot else f"#### {q.answer}" for q in questions]


def draw_batch(examples, size, rng):
    return [examples[i] for i in rng.integers(0, len(examples), size)]


def tiny_base(cache, dataset="arithmetic", *, bits=data.BITS, p_cot=0.25, progress=True):
    """The folder of a tiny base model under `cache`; trained if it is not there yet (a minute).
    bits, p_cot: parity's."""
    recipe = TINY if dataset == "arithmetic" else TINY_PARITY
    made_of = [data.TERMS, data.MODULUS, *data.STEPS_WANTED] if recipe is TINY else [bits, p_cot]
    key = json.dumps([recipe, TINY_MODEL, data.ONE_IN, made_of])
    folder = Path(cache) / f"tiny-{dataset}-{hashlib.sha256(key.encode()).hexdigest()[:10]}"
    if (folder / "config.json").exists():
        return folder
    if recipe is TINY:
        chains = demonstrated_chains(random.Random(recipe["seed"]))
        questions = [data.worked(chain) for chain in chains]
        stages = [(steps, lr, hurried(chains, hurry)) for steps, lr, hurry in recipe["stages"]]
    else:
        questions = data.parity(recipe["questions"], recipe["seed"], bits)
        texts = long_or_short(questions, p_cot)
        stages = [(steps, lr, texts) for steps, lr in recipe["stages"]]
    torch.set_num_threads(min(2, torch.get_num_threads()))  # too small for more
    tokenizer, rng = tiny_tokenizer(dataset), np.random.default_rng(recipe["seed"])
    model = tiny_model(tokenizer, recipe["seed"])
    total = sum(steps for steps, *_ in stages)
    with progress_bar("SFT of the tiny model", total, "step", progress) as bar:
        for number, (steps, lr, texts) in enumerate(stages):
            examples = demonstrations(tokenizer, questions, texts)
            draw = partial(draw_batch, examples, recipe["batch"], rng)
            file = folder.with_name(f"{folder.name}.stage{number}")
            file.parent.mkdir(parents=True, exist_ok=True)
            how = {"steps": steps, "lr": lr, "warmup": recipe["warmup"], "settings": SHORT}
            train(model, draw, bar=bar, file=file, **how)
    save_result(model, tokenizer, folder)
    return folder


def save_result(model, tokenizer, folder):
    """The trained model; what was kept of its training goes."""
    if rank() == 0:
        checkpoint.save_model(model, tokenizer, folder)
        for kept in folder.parent.glob(f"{folder.name}.stage*"):
            kept.unlink()
    all_sum(torch.zeros(1))  # the other processes wait for it


# ==================================================================================================
# That is the method. Below: the tiny model itself, an interrupted training, the command line.
# ==================================================================================================


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


def tiny_tokenizer(dataset="arithmetic"):
    """One token a number, so that sequences are short and no carry hides inside a token. Of parity:
    one a bit, and one for each way to answer: a short answer's first token is a coin flip."""
    words = ["<pad>", "<eos>", "\n", "#### ", "+", "-", "=", *map(str, range(data.MODULUS))]
    pattern = r"\d+|#### |\n|."
    if dataset == "parity":
        words = ["<pad>", "<eos>", "\n", "0", "1", "#### 0", "#### 1"]
        pattern = r"#### \d|\d|\n|."
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.decoder = decoders.Fuse()  # join without spaces: decode(encode(text)) == text
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def tiny_model(tokenizer, seed):
    """A Llama of well under a million parameters, randomly initialised."""
    torch.manual_seed(seed)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = LlamaConfig(vocab_size=len(tokenizer), bos_token_id=None, **ids, **TINY_MODEL)
    return LlamaForCausalLM(config)


def save_progress(file, model, optimizer, losses):
    if rank() == 0:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        checkpoint.save_state({**state, "losses": losses}, Path(file))


def load_progress(file, model, optimizer):
    """The losses so far, and model and optimizer as they were; [] where nothing was kept."""
    if file is None or not Path(file).exists():
        return []
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        return state["losses"]
    except Exception as error:  # cut off, or of another model
        reason = commands.first_line(error)
        raise ValueError(f"cannot go on from {file} ({reason}): delete it to start anew") from error


# See commands.read_settings.
SETTINGS = """
dataset          arithmetic     -     a data set's names, or a file's or folder's path
bits             24             5..60 parity: bits of a question
p_cot            0.25           0..1  parity: share of the demonstrations that are long
data_dir         -              -     a folder with the named data set's files, not the hub
model            tiny           -     tiny (of arithmetic, parity), a hub id or a model's folder
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
    settings = {name: row[0] for name, row in commands.read_settings(SETTINGS).items()}
    flags = commands.parse_flags(SETTINGS, "Supervised fine-tuning on solutions.", argv)
    args = SimpleNamespace(**settings | flags)
    commands.check_settings(SETTINGS, args)
    if args.model == "tiny":
        check_tiny(args)
        folder = tiny_base(args.cache, args.dataset, bits=args.bits, p_cot=args.p_cot)
        return print(f"the tiny base model is in {folder}")
    out = Path(args.out or f"runs/sft-{Path(args.dataset).stem}")
    if out.exists():
        raise ValueError(f"{out} exists already: give another folder with --out")
    some = {"limit": args.limit or None, "seed": args.seed, "bits": args.bits}
    questions = data.load_questions(args.dataset, "train", data_dir=args.data_dir, **some)
    questions = [q for q in questions if q.solution]
    if not questions:
        raise ValueError(f"{args.dataset} has no solutions to learn from: no field solution")
    model, tokenizer = checkpoint.load_model(args.model, device=args.device)
    texts = [q.solution for q in questions]
    if args.dataset == "parity":
        texts = long_or_short(questions, args.p_cot)
    examples = demonstrations(tokenizer, questions, texts, args.chat)
    draw = epochs_of(examples, args.batch, np.random.default_rng(args.seed))
    steps = max(1, round(args.epochs * len(examples) / args.batch))
    autocast = torch.bfloat16 if model.device.type == "cuda" else None
    settings = ppo.Settings(tokens_per_microbatch=args.tokens_per_microbatch, autocast=autocast)
    # of these settings: an SFT with others starts anew
    key = hashlib.sha256(json.dumps(vars(args)).encode()).hexdigest()[:10]
    file = out.with_name(f"{out.name}.stage-{key}")
    out.parent.mkdir(parents=True, exist_ok=True)
    with progress_bar("SFT", steps, "step") as bar:
        train(model, draw, steps=steps, lr=args.lr, settings=settings, bar=bar, file=file)
    save_result(model, tokenizer, out)
    print(f"wrote {out}")


def check_tiny(args):
    if args.dataset not in data.MADE_HERE:
        limit = f"knows only arithmetic and parity, not {args.dataset!r}"
        raise ValueError(f"--model tiny {limit}: give --model a hub id or a folder")


if __name__ == "__main__":
    commands.command_line(main)
