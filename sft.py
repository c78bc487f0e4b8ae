"""Learning by next-token prediction: where a policy comes from before RL can improve it.

    python sft.py                                           # the tiny model that sfl.py starts from
    python sft.py --dataset gsm8k --model HUB_ID_OR_DIR --out DIR     # a data set's own solutions
    python sfl.py --algo expert                             # imitating one's own right responses

Supervised fine-tuning (SFT) makes the solutions it is shown more likely. The model reads the prompt
and learns the tokens of the solution, with a stop token at the end:

    loss = - (sum over these tokens of log pi(token | what is before it)) / (number of them)

TWO LEARNERS IMITATE THEMSELVES, in the loop of sfl.py and with any of its curricula. A policy
samples responses. Their grades say which of them it goes on to imitate:

    expert   expert iteration (arXiv 2403.04642): the right responses of all rounds, each once. Each
             round starts anew from the initial model. (ReST-EM, 2312.06585, keeps only those of the
             last round; STaR, 2203.14465, takes one greedy response a question.)
    rcrl     return-conditioned RL: all responses, each behind a tag that says its return. When the
             model has learned that, the good tag asks for a right response:

                 <good> 37+26-12     37+26=63 63-12=51 #### 51
                 <bad>  37+26-12     37+26-12=25 #### 25

There is no baseline, no ratio and no clip. No term of the loss makes a wrong response less likely.

THE TINY BASE MODEL is made so that RL has something to find. Real base models can reason step by
step and mostly do not, because the texts they learned from skip steps. So this one learns from
demonstrations whose lines take one term or several, and a line that takes several is wrong:

    37+26-12+7      37+26=63            37+26-12=25
                    63-12=51            25+7=32
                    51+7=58             #### 32
                    #### 58

The model knows all single steps by heart, but with every line there is a chance that it skips one.
It solves half of the two-step chains and hardly any of the eight-step chains. That is a frontier,
and it moves: what is learned on two steps makes three steps learnable.
"""

import hashlib
import json
import os
import random
import shutil
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import data
import ppo
from plumbing import checkpoint
from plumbing.batches import microbatches
from plumbing.commands import check_limits, command_line, parse, progress_bar, require
from plumbing.logprobs import no_dropout
from plumbing.memory import precision
from plumbing.processes import all_sum, rank
from plumbing.tiny import TINY_MODEL, tiny_model, word_tokenizer
from rollout import Rollout


@dataclass
class Settings:
    """Supervised fine-tuning on a data set's solutions."""

    dataset: str = "arithmetic"  # names, joined by commas, or a file's or folder's path
    bits: int = 24  # parity: bits of a question
    p_cot: float = 0.25  # parity: share of the demonstrations that are long
    data_dir: str | None = None  # a folder with the named data set's files, not the hub
    notes: bool = False  # gsm8k: its calculator notes alone as solutions, 16-3=13
    model: str = "tiny"  # tiny (of arithmetic, parity), a hub id or a model's folder
    out: str | None = None  # folder of the trained model; by default runs/sft-DATASET
    epochs: float = 3.0  # passes over the data
    batch: int = 64  # demonstrations an optimizer step
    lr: float = 1e-5  # learning rate, after a warm-up and before it falls to 0
    limit: int = 0  # a random subset of that many questions; 0: all
    tokens_per_microbatch: int = 8192  # padded tokens in a forward and backward
    chat: Literal["auto", "on", "off"] = "auto"  # prompt through the chat template; auto: if any
    seed: int = 0  # of the subset, and of the order of the demonstrations
    device: str = "auto"  # auto, cpu, cuda or mps
    cache: str = "runs/cache"  # where the tiny model is kept

    # Without a type these are no flags, but `train` reads them. (sfl.py passes its own settings.)
    temperature = 1.0  # log pi is of softmax(logits / temperature)
    max_grad_norm = 1.0  # a longer gradient is scaled down to this norm
    dtype = "float32"  # 'bfloat16': of the matrix products; weights stay in float32


# --------------------------------------------------------------------------- next-token prediction


def train(model, batches, *, lr, config=None, warmup=0.03, progress=False):
    """One optimizer step (AdamW) for each batch. A batch is a list of `Rollout`s to imitate; its
    loss is the mean of -log pi over all their response tokens. warmup: share of the steps in which
    the learning rate rises. progress: show a bar. Returns the losses, one a step. ValueError: a
    loss or gradient that is not finite."""
    config = config or Settings()
    # Adam divides by the size of recent gradients. With 0.95 "recent" means some 20 steps; the
    # usual 0.999 means 1000, and the large gradients of the beginning would count to the end.
    how = {"betas": (0.9, 0.95), "fused": model.device.type == "cuda"}
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, **how)
    no_dropout(model)  # as in RL, where what samples and what learns must be the same policy
    model.base_model.shares_prompts = False  # hardly a prompt comes twice in a batch
    steps = len(batches)
    rising = max(1, int(warmup * steps))  # steps of the warm-up
    losses = []
    with progress_bar("SFT", steps, "step", progress) as bar:
        for step, batch in enumerate(batches):
            # The learning rate rises linearly to lr, then falls linearly: to 0 one step after the
            # last. On either side of the peak the smaller factor holds.
            rise = (step + 1) / rising
            fall = (steps - step) / max(1, steps - rising)
            optimizer.param_groups[0]["lr"] = lr * min(rise, fall)

            tokens = sum(len(rollout.response) for rollout in batch)  # no prompt: it is only read
            loss = torch.zeros((), device=model.device)
            for some in microbatches(batch, model, config.tokens_per_microbatch):  # indices
                part = [batch[i] for i in some]
                logprobs = ppo.response_logprobs(model, part, config)  # (tokens of this part,)
                # Divided by the tokens of the whole batch: so the parts' gradients add up to its.
                part_loss = -logprobs.sum() / tokens
                part_loss.backward()
                loss += part_loss.detach()
            losses.append(float(all_sum(loss)))  # each process had its share of the batch

            norm = ppo.optimizer_step(model, optimizer, config.max_grad_norm)
            # In RL a bad batch is skipped. Demonstrations are sane, so lr is to blame for a NaN.
            if not np.isfinite(norm):
                raise ValueError(f"the loss is {losses[-1]} at SFT step {step}: lower --lr {lr}")
            recent = np.mean(losses[-50:])  # a single batch's is noisy
            bar.set_postfix(loss=f"{recent:.3f}", refresh=False)
            bar.update()
    model.eval()  # `no_dropout` left layers under gradient checkpointing in train mode
    return losses


def demonstrations(tokenizer, questions, texts, chat="auto"):
    """What SFT learns: a `Rollout` for each question. Its response is the text and a stop token."""
    # Without a stop token in what it imitates, a model never learns to end its response.
    stop = tokenizer.eos_token_id
    require(stop is not None, "the tokenizer has no stop token: set tokenizer.eos_token")
    prompts = data.encode_prompts(tokenizer, questions, chat=chat)  # a list of ids each
    shown = []
    for prompt, text in zip(prompts, texts, strict=True):
        response = [*data.encode_response(tokenizer, text), stop]
        shown.append(Rollout(prompt, response, [], True))  # nobody sampled it: no log-probs
    return shown


def epochs_of(examples, epochs, batch, rng):
    """Batches for `epochs` passes over the examples (2.5, say). In each pass every example comes
    once, in a new order. All batches are full: one may reach from a pass into the next, and the
    last pass is cut."""
    steps = max(1, round(epochs * len(examples) / batch))
    order = []  # indices, one pass after the other
    while len(order) < steps * batch:
        order.extend(rng.permutation(len(examples)))
    batches = []
    for start in range(0, steps * batch, batch):
        batches.append([examples[i] for i in order[start : start + batch]])
    return batches


# --------------------------------------------------------------------------- imitating oneself

IMITATORS = ("expert", "rcrl")  # of sfl.py's --algo


def keep(kept, algo, questions, groups, rewards):
    """Add to `kept` what this round's samples teach: [question, reward, response ids] each.
    'expert': the right responses, no two alike; 'rcrl': all.

    questions: (Q,) indices; groups: Q lists of n rollouts; rewards: (Q, n), 0 or 1."""
    # A set: `example in known` must not search through all earlier rounds.
    known = {(question, tuple(ids)) for question, _, ids in kept}
    for question, group, grades in zip(questions, groups, rewards):
        for rollout, reward in zip(group, grades):
            example = (int(question), tuple(rollout.response))
            # No copies: the data would fill with what the policy says most often anyway.
            if algo == "expert" and (reward == 0 or example in known):
                continue
            known.add(example)
            kept.append([int(question), int(reward), rollout.response])


def imitate(policy, start, examples, lr, config, rng):
    """A round: config.epochs passes of next-token prediction over the examples (Rollouts). First
    the policy takes over the weights of the model `start`. None: it goes on with its own, and
    drifts further from the initial model each round. Returns metrics."""
    if start is not None:
        policy.load_state_dict(start.state_dict())
    if not examples:  # nothing was right yet
        return {"kept": 0}
    batches = epochs_of(examples, config.epochs, config.minibatch, rng)
    # `train` makes a new optimizer each round: the old one's moments belong to other weights.
    losses = train(policy, batches, lr=lr, config=config)
    fifth = max(1, len(losses) // 5)
    loss = float(np.mean(losses[-fifth:]))  # of the last fifth: a single batch's is noisy
    return {"kept": len(examples), "sft_steps": len(losses), "sft_loss": loss}


# --------------------------------------------------------------------------- the tiny base model
# A hash of these numbers is in the name of the model's folder: change one, and a new one is made.

TINY = {
    # A stage: [optimizer steps, learning rate, {terms that a line takes: share of the lines}].
    # The first teaches single steps. The second teaches to hurry: most lines take several terms.
    "stages": [
        [500, 8e-3, {1: 0.75, 2: 0.13, 3: 0.07, 4: 0.05}],
        [100, 1e-3, {1: 0.40, 2: 0.35, 3: 0.15, 4: 0.10}],
    ],
    "one_step": 0.5,  # share of the demonstrations that have one step: results to learn by heart
    "questions": 16000,  # demonstrations to draw from
    "batch": 96,  # demonstrations an optimizer step
    "warmup": 0.15,  # share of a stage's steps in which the learning rate rises
    "seed": 0,
}
# Parity, in one stage. A share --p_cot of its demonstrations is long.
TINY_PARITY = {"stages": [[350, 4e-3]], "questions": 16000, "batch": 96, "warmup": 0.15, "seed": 0}


def tiny_tokenizer(dataset="arithmetic"):
    """One token a number: sequences are short, and a sum is looked up, with no digits to carry. Of
    parity: one token a bit, and one for each answer, so that a short answer is one coin flip."""
    if dataset == "parity":
        # The pattern tries from left to right: "#### 0" comes before the 0 in it.
        return word_tokenizer(["\n", "0", "1", "#### 0", "#### 1"], r"#### \d|\d|\n|.")
    numbers = map(str, range(data.MODULUS))
    return word_tokenizer(["\n", "#### ", "+", "-", "=", *numbers], r"\d+|#### |\n|.")


def demonstrated_chains(rng):
    """Chains of the training split: half of them have one step, the others STEPS_WANTED."""
    chains = []
    while len(chains) < TINY["questions"]:
        steps = 1  # this chain's sum is to be learned by heart
        if rng.random() >= TINY["one_step"]:
            steps = rng.choice(data.STEPS_WANTED)
        chain = data.draw_chain(rng, steps)
        # The model is never shown what it will be tested on.
        if data.in_split("".join(map(str, chain)), "train"):
            chains.append(chain)
    return chains


def long_or_short(questions, p_cot):
    """Parity's demonstrations: the long solution with probability p_cot, else the answer alone."""
    rng = random.Random(TINY_PARITY["seed"])
    texts = []
    for question in questions:
        long = rng.random() < p_cot  # long: with a chain of thought
        texts.append(question.solution if long else f"#### {question.answer}")
    return texts


def tiny_base(cache, dataset="arithmetic", *, bits=data.BITS, p_cot=0.25, progress=True):
    """Returns the folder of a tiny base model under `cache`. Trains the model first (a minute) if
    it is not there yet. bits, p_cot: parity's."""
    is_parity = dataset == "parity"
    recipe = TINY_PARITY if is_parity else TINY
    task = [bits, p_cot] if is_parity else [data.TERMS, data.MODULUS, *data.STEPS_WANTED]
    key = json.dumps([recipe, TINY_MODEL, data.ONE_IN, task])  # all that the weights depend on
    folder = Path(cache) / f"tiny-{dataset}-{hashlib.sha256(key.encode()).hexdigest()[:10]}"
    if (folder / "config.json").exists():  # made by an earlier run
        return folder

    if is_parity:
        questions = data.parity(recipe["questions"], recipe["seed"], bits)
    else:
        chains = demonstrated_chains(random.Random(recipe["seed"]))
        questions = [data.worked(chain) for chain in chains]
    torch.set_num_threads(min(2, torch.get_num_threads()))  # it is too small for more
    tokenizer = tiny_tokenizer(dataset)
    model = tiny_model(tokenizer, recipe["seed"])
    # Small micro-batches: rollouts of like length go together, so that there is less padding.
    config = Settings(tokens_per_microbatch=4096)
    rng = np.random.default_rng(recipe["seed"])
    for stage in recipe["stages"]:
        steps, lr = stage[:2]  # arithmetic's stages have a third entry
        if is_parity:
            texts = long_or_short(questions, p_cot)
        else:  # the same chains in each stage, solved in more or less of a hurry
            hurry_rng = random.Random(recipe["seed"])
            texts = [data.solve(chain, stage[2], hurry_rng) for chain in chains]
        examples = demonstrations(tokenizer, questions, texts)
        # (steps, batch) indices, with replacement
        drawn = rng.integers(0, len(examples), (steps, recipe["batch"]))
        batches = [[examples[i] for i in batch] for batch in drawn]
        how = {"config": config, "warmup": recipe["warmup"], "progress": progress}
        train(model, batches, lr=lr, **how)

    if rank() == 0:
        # Two runs that start together may both make it, each in a folder of its own.
        own = folder.with_name(f"{folder.name}.{os.getpid()}")
        checkpoint.save_model(model, tokenizer, own)
        try:
            own.rename(folder)
        except OSError:  # the other one was first, and its model is the same
            shutil.rmtree(own)
    all_sum(torch.zeros(1))  # the other processes wait until it is there
    return folder


# --------------------------------------------------------------------------- the command line


def main(argv=None):
    settings = parse(Settings, argv)
    check_limits(settings, lr=(0, inf), epochs=(0.001, inf), batch=(1, inf))
    check_limits(settings, seed=(0, inf), bits=(5, 60), p_cot=(0, 1))
    check_limits(settings, limit=(0, inf), tokens_per_microbatch=(1, inf))
    if settings.model == "tiny":
        check_tiny(settings)
        place = f"--out {settings.out}: the tiny model is kept in --cache: leave --out away"
        require(settings.out is None, place)
        parity = {"bits": settings.bits, "p_cot": settings.p_cot}
        folder = tiny_base(settings.cache, settings.dataset, **parity)
        return print(f"the tiny base model is in {folder}")

    # Whatever may be wrong is found before a model is loaded and trained.
    out = Path(settings.out or f"runs/sft-{Path(settings.dataset).stem}")
    require(not out.exists(), f"{out} exists already: give another folder with --out")
    checkpoint.check_writable("out", out)
    questions = data.load_questions(
        settings.dataset, "train", data_dir=settings.data_dir, limit=settings.limit or None,
        seed=settings.seed, bits=settings.bits, notes=settings.notes,
    )  # fmt: skip
    questions = [q for q in questions if q.solution]
    nothing = f"{settings.dataset} has no solutions to learn from: its rows need a field solution"
    require(questions, nothing)
    texts = [q.solution for q in questions]
    if settings.dataset == "parity":
        texts = long_or_short(questions, settings.p_cot)

    model, tokenizer = checkpoint.load_model(settings.model, device=settings.device)
    # Of the matrix products alone: the weights stay in float32.
    settings.dtype = precision("auto", model.device.type, model)
    examples = demonstrations(tokenizer, questions, texts, settings.chat)
    rng = np.random.default_rng(settings.seed)
    batches = epochs_of(examples, settings.epochs, settings.batch, rng)
    train(model, batches, lr=settings.lr, config=settings, progress=True)
    data.remember_chat(tokenizer, settings.chat)  # whoever loads the model needs no --chat
    checkpoint.save_model(model, tokenizer, out)
    print(f"wrote {out}")


def check_tiny(settings):
    if settings.dataset not in data.MADE_HERE:
        limit = f"knows only arithmetic and parity, not {settings.dataset!r}"
        raise ValueError(f"--model tiny {limit}: give --model a hub id or a folder")


if __name__ == "__main__":
    command_line(main)
