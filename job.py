"""What a run is made of: questions, models and optimizer set up; checkpoints; the log; checks.

Machinery of sfl.py's `train`. A run's folder holds

    config.json          all settings
    metrics.jsonl        a row an iteration
    evaluation.json      held-out, before and after
    model/               what from_pretrained loads
    state/training.pt    what an exact resume needs besides: the weights that belong to it, Adam's
                         moments, the random numbers, the curriculum's state
"""

import copy
import itertools
import json
import math
import os
import signal
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

import data
import eval as evaluation
import ppo
import sft
from plumbing import answers, checkpoint, memory, processes
from plumbing.checkpoint import write
from plumbing.commands import Stop, first_line
from plumbing.processes import all_sum, many_processes, rank
from rollout import ENGINES

# --------------------------------------------------------------------------- setting up


def setup(args):
    """Everything that an iteration touches, made or loaded: questions, models, optimizer."""
    # the machine
    out = Path(args.out)
    answers.set_judges(args.judges)
    answers.timeouts.clear()  # the metrics count this run's
    device = memory.pick_device(args.device)
    if device == "cuda" and many_processes():
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    if args.model == "tiny":
        torch.set_num_threads(min(2, torch.get_num_threads()))  # too small for more
    autocast = torch.bfloat16 if uses_bfloat16(args, device) else None

    # questions
    fields = {name: getattr(args, f"{name}_field") for name in ("question", "answer", "solution")}
    load = partial(
        data.load_questions, args.dataset, data_dir=args.data_dir, fields=fields, bits=args.bits
    )
    questions, held_out = load("train"), load("test", limit=args.eval_limit or None)
    check(args, len(questions))  # before the work of making or loading a model

    # policy and reference
    base = args.model
    if args.model == "tiny":
        show = rank() == 0
        how = {"bits": args.bits, "p_cot": args.p_cot, "progress": show}
        base = sft.tiny_base(args.cache, args.dataset, **how)
    saved = out / "model"
    is_saved = (saved / "config.json").exists()  # which `save_model` writes last
    policy, tokenizer = checkpoint.load_model(saved if is_saved else base, device=device)
    reference = None
    dtype = reference_dtype(args, autocast)
    if dtype is not None:
        reference, its_tokenizer = checkpoint.load_model(base, device=device, dtype=dtype)
        reference.requires_grad_(False)
    untagged = tokenizer
    if args.algo == "rcrl":
        untagged = copy.deepcopy(its_tokenizer)
        data.add_tags(policy, tokenizer, args.chat)
        data.add_tags(reference, its_tokenizer, args.chat)

    # prompts
    stop_ids = evaluation.stops(policy, tokenizer, args.stop)
    questions, prompts = fitting(args, tokenizer, policy, questions, "training")
    held_out, _ = fitting(args, tokenizer, policy, held_out, "held-out")
    check(args, len(questions))  # some may have been left out
    check_start(args, policy, tokenizer, questions, prompts)
    demonstrations = []
    if args.solutions:
        shown = [q for q in questions if q.solution]
        if not shown:
            raise ValueError(f"--solutions: {args.dataset} has none; leave the flag out")
        texts = [q.solution for q in shown]
        demonstrations = sft.demonstrations(tokenizer, shown, texts, args.chat)

    # critic and optimizer
    if args.gradient_checkpointing:
        policy.gradient_checkpointing_enable()
    critic = ppo.ValueModel(policy) if args.algo == "ppo" else None
    if args.fsdp:
        processes.shard(policy, decoder=autocast or policy.dtype)
        if critic is not None:
            processes.shard(critic)
    parameters = [{"params": policy.parameters(), "lr": args.lr}]
    if critic is not None:
        parameters.append({"params": critic.parameters(), "lr": args.critic_lr})
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    if args.offload_optimizer:
        optimizer.register_step_pre_hook(lambda *_: memory.move_state(optimizer, device))
        optimizer.register_step_post_hook(lambda *_: memory.move_state(optimizer, "cpu"))

    # what each call of generate, update and evaluate is told
    sampling = {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "top_p")}
    serving = {"engine": args.engine, "slots": args.slots or None, "dtype": autocast}
    serving |= {"progress": sys.stderr.isatty() and rank() == 0, "stop_ids": stop_ids}
    names = ("temperature", "gamma", "lam", "clip", "value_clip", "kl_coef", "epochs", "minibatch")
    names += ("max_grad_norm", "max_ratio", "tokens_per_microbatch", "loss_average", "fsdp")
    settings = ppo.Settings(autocast=autocast, **{name: getattr(args, name) for name in names})

    def evaluate(samples=1, tokenizer=tokenizer):
        """Greedy on the held-out questions; with samples, at the training temperature."""
        how = sampling if samples > 1 else {"max_new_tokens": args.max_new_tokens}
        result = evaluation.evaluate(
            policy, tokenizer, held_out, samples=samples, chat=args.chat, seed=args.seed,
            last_number=args.last_number, **serving, **how,
        )  # fmt: skip
        return {**result, "responses": result["responses"][:3]}

    # an update of one step: the critic learns in the pass that reads its values; not with
    # --offload_optimizer, which frees the KV cache only behind that pass
    one_pass = args.epochs == 1 and args.questions * args.rollouts <= args.minibatch
    one_pass = one_pass and not args.offload_optimizer
    return SimpleNamespace(
        out=out,
        policy=policy,
        tokenizer=tokenizer,
        critic=critic,
        one_pass=one_pass,
        reference=reference,
        optimizer=optimizer,
        settings=settings,
        demonstrations=demonstrations,
        untagged=untagged,
        questions=questions,
        prompts=prompts,
        generation=sampling | serving,
        rewards=partial(evaluation.rewards, last_number=args.last_number),
        evaluate=evaluate,
        rng=np.random.default_rng(args.seed),
        state={"groups": [group_of(q, prompt) for q, prompt in zip(questions, prompts)]},
        size=len(questions),
        start=0,
    )


def group_of(question, prompt):
    """What stands for a question's difficulty: its level, else its prompt's length."""
    if question.level is not None:
        return str(question.level)
    return f"length {4 * math.log2(len(prompt)):.0f}"  # in quarters of an octave


def uses_bfloat16(args, device):
    """Are matrix products computed in bfloat16?"""
    return args.dtype == "bfloat16" or (args.dtype == "auto" and device.startswith("cuda"))


def reference_dtype(args, autocast):
    """The frozen reference's dtype; None: the run needs none. It is not trained, so bfloat16 will
    do, unless a round of imitation starts from it."""
    if args.algo in sft.IMITATORS:
        return "float32"
    if args.kl_coef == 0 and args.kl_sample == 0:
        return None
    return "bfloat16" if autocast else "float32"


def fitting(args, tokenizer, policy, questions, which):
    """(questions, prompts). One that does not fit the context: ValueError, or with --skip_long it
    is left out."""
    positions = memory.longest_context(policy.config.get_text_config())
    limit = min(args.context, positions or args.context)
    prompts = data.encode_prompts(tokenizer, questions, chat=args.chat)
    long = {i for i, prompt in enumerate(prompts) if len(prompt) + args.max_new_tokens > limit}
    if long and not args.skip_long:
        first = min(long)
        raise ValueError(
            f"{which} question {first} is {len(prompts[first])} tokens: with --max_new_tokens "
            f"{args.max_new_tokens} it passes the context of {limit} ({len(long)} of "
            f"{len(prompts)} do): lower --max_new_tokens, raise --context if the model allows it, "
            "or pass --skip_long"
        )
    keep = [i for i in range(len(prompts)) if i not in long]
    if not keep:
        room = f"the context of {limit} with --max_new_tokens {args.max_new_tokens}"
        raise ValueError(f"no {which} question fits {room}: lower it")
    if long and rank() == 0:
        left_out = f"left out {len(long)} of {len(prompts)} {which} questions"
        print(f"{left_out}, too long for {limit} tokens", file=sys.stderr)
    return [questions[i] for i in keep], [prompts[i] for i in keep]


# --------------------------------------------------------------------------- checkpoints


def start_or_resume(run, args):
    """Prepare the run's folder, or load its checkpoint; a run that was stopped before its first one
    starts anew. Returns the evaluation before training."""
    if rank() == 0:
        run.out.mkdir(parents=True, exist_ok=True)
    write(run.out / "config.json", json.dumps(vars(args), indent=1) + "\n")
    if (run.out / "state" / "training.pt").exists():
        load_state(run)
    if run.start == 0:
        how = {"tokenizer": run.untagged}  # rcrl: the tags are not learned yet
        before = {"greedy": run.evaluate(**how), "sampled": run.evaluate(samples=8, **how)}
        write(run.out / "evaluation.json", json.dumps({"before": before}))
        save(run, 0)
        return before
    return json.loads((run.out / "evaluation.json").read_text())["before"]


def save(run, iteration):
    """state/training.pt holds everything a resume needs, the weights that belong to it too: one
    file, renamed over the old one, so that an interrupted save leaves the previous checkpoint."""
    folder = run.out / "state"
    rng = run.rng.bit_generator.state
    loop = {"iteration": iteration, "rng": rng, "curriculum": run.state}
    state = {
        "loop": json.dumps(loop),
        "policy": processes.put_together(run.policy.state_dict()),
        "critic": run.critic and processes.put_together(run.critic.state_dict()),
        "optimizer": processes.put_together(run.optimizer.state_dict()),
    }
    if rank() == 0:
        folder.mkdir(exist_ok=True)
        checkpoint.save_state(state, folder / "training.pt")
        checkpoint.save_model(run.policy, run.tokenizer, run.out / "model", state["policy"])


def load_state(run):
    """The inverse of `save`; and it forgets the metrics logged after it."""
    path = run.out / "state" / "training.pt"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        loop = json.loads(state["loop"])
        processes.take_apart(state["policy"], dict(run.policy.named_parameters()))
        run.policy.load_state_dict(state["policy"])
        if run.critic is not None:
            processes.take_apart(state["critic"], dict(run.critic.named_parameters()))
            run.critic.load_state_dict(state["critic"])
        groups = run.optimizer.param_groups
        parameters = [parameter for group in groups for parameter in group["params"]]
        for number, moments in state["optimizer"]["state"].items():
            processes.take_apart(moments, dict.fromkeys(moments, parameters[number]))
        run.optimizer.load_state_dict(state["optimizer"])
    except Exception as error:  # cut off, another program's, another model's
        raise ValueError(
            f"--resume {run.out}: no usable {path} ({first_line(error)}): start anew with --out"
        ) from error
    run.rng.bit_generator.state = loop["rng"]
    run.state.update(loop["curriculum"])
    run.start = loop["iteration"]
    metrics = run.out / "metrics.jsonl"
    rows = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    write(metrics, "".join(rows[: run.start]))


# --------------------------------------------------------------------------- an iteration, measured


def shares(rewards):
    """Shares of the questions that all their responses solved, none, or some: the learnable ones.
    rewards: (questions, n), 0 or 1."""
    success = rewards.mean(1)
    by_all, by_none = float((success == 1).mean()), float((success == 0).mean())
    some = float(((success > 0) & (success < 1)).mean())
    return {"solved_by_all": by_all, "solved_by_none": by_none, "learnable": some}


def batch_metrics(run, iteration, batch, rollouts):
    tokens = batch.tokens()
    logprobs = np.concatenate([rollout.logprobs for rollout in rollouts])
    sampled = [
        [int(i), run.questions[i].level, int(sum(rewards)), len(rewards)]
        for sample in run.sample.batches
        for i, rewards in zip(sample.questions, sample.rewards)
    ]
    return {
        "iteration": iteration + 1,
        "reward_mean": float(batch.rewards.mean()),
        **shares(batch.rewards),
        "response_length": float(np.mean([len(r.response) for r in rollouts])),
        "grading_timeouts": len(answers.timeouts),  # since the start
        "truncated": float(np.mean([not r.finished for r in rollouts])),
        "entropy": float(-logprobs.mean()),  # unbiased, where top-p truncates nothing
        "lr": run.optimizer.param_groups[0]["lr"],
        "tokens_generated": tokens,
        # sampled to choose the questions and not trained on
        "tokens_scored": sum(sample.tokens() for sample in run.sample.batches) - tokens,
        # [question, its level, successes, attempts], and which were trained on
        "sampled": sampled,
        "trained": batch.questions.tolist(),
    }


def out_of_patience(args, state):
    """Is none of the last `patience` evaluations better than those before?"""
    accuracies = state.get("accuracies", [])
    earlier, latest = accuracies[: -args.patience], accuracies[-args.patience :]
    return bool(args.patience and earlier and max(latest) <= max(earlier))


EVALUATED = ("accuracy", "accuracy_se", "response_length")


def advance(bar, row, result):
    shown = {"reward": row["reward_mean"], "learnable": row["learnable"]}
    shown |= {"accuracy": result["accuracy"], "length": row["response_length"]}
    bar.set_postfix({name: f"{value:.3g}" for name, value in shown.items()}, refresh=False)
    bar.update()


class Log:
    """metrics.jsonl, a row an iteration; TensorBoard and Weights & Biases, where asked for; and
    what a row warns of, once each, on stderr."""

    def __init__(self, out, args):
        self.rows, self.warned = [], set()
        self.file = (out / "metrics.jsonl").open("a") if rank() == 0 else None
        self.tensorboard = self.wandb = None
        if args.tensorboard and rank() == 0:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(out / "tensorboard")
        if args.wandb and rank() == 0:
            import wandb

            self.wandb = wandb.init(project="sfl", name=out.name, config=vars(args))

    def __call__(self, row):
        self.rows = [*self.rows[-9:], row]
        if self.file is None:
            return
        print(json.dumps(row), file=self.file, flush=True)
        for name, text in alarms(self.rows):
            if name not in self.warned:
                self.warned.add(name)
                tqdm.write(f"iteration {row['iteration']}: {text}", file=sys.stderr)
        numbers = {name: x for name, x in row.items() if isinstance(x, (int, float))}
        if self.tensorboard:
            for name, number in numbers.items():
                self.tensorboard.add_scalar(name, number, row["iteration"])
        if self.wandb:
            self.wandb.log(numbers, step=row["iteration"])


def alarms(rows):
    """(name, what is wrong and what to try) of what the last ten rows show."""
    row = rows[-1]
    if row.get("nonfinite_steps"):
        yield "nan", "a NaN or an infinity, no step was made: lower --lr"
    if row.get("kl", 0) > 1:
        yield "kl", f"the KL to the start is {row['kl']:.2f} a token: lower --lr, raise --kl_coef"
    if row["truncated"] > 0.5:
        share = f"{row['truncated']:.0%} of the responses run into --max_new_tokens"
        yield "truncated", f"{share}, which is worth 0: raise it, or --stop TEXT"
    if len(rows) < 10:
        return
    if all(row["learnable"] == 0 for row in rows):
        what = "nothing to learn: in ten iterations no question was solved by some of its responses"
        yield "agree", f"{what}; try easier or harder questions, or --curriculum lilo"
    if len({row["reward_mean"] for row in rows}) == 1:
        what = f"the mean reward has been {row['reward_mean']:.3g} for ten iterations"
        yield "reward", f"{what}: look at the responses (eval.py --save_samples), or --last_number"
    if all(row["entropy"] < 0.01 and row["reward_mean"] < 0.95 for row in rows):
        yield "entropy", "the entropy has collapsed, all responses are alike: lower --lr"


def reason_to_stop(run):
    """A Stop, or None: somebody asked, or three steps in a row were not finite."""
    asked = all_sum(torch.tensor(float(len(run.signals.came))))  # all stop at the same iteration
    if asked:
        return Stop("interrupted", 128 + (run.signals.came or [signal.SIGTERM])[0])
    bad = [getattr(model, "bad_steps", 0) for model in (run.policy, run.critic)]
    if max(bad) >= 3:
        which = "the policy" if bad[0] >= 3 else "the critic"
        return Stop(f"three NaN or infinite steps of {which} in a row: lower --lr", 2)
    return None


def kl_to_start(args, run, rollouts):
    """k3 a token of a few of the rollouts, when the loss does not need it."""
    some = rollouts[:: -(-len(rollouts) // args.kl_sample)]
    ref = torch.cat(ppo.rollout_logprobs(run.reference, some, run.settings))
    sampled = torch.tensor([x for rollout in some for x in rollout.logprobs])
    return float(ppo.kl_k3(ref, sampled).mean())


def prepare_update(args, optimizer, iteration):
    """The learning rates: linear warm-up; then constant, or (linear) down to 0 behind the last
    iteration. With --offload_optimizer the KV cache goes."""
    if args.offload_optimizer:
        ENGINES.clear()  # memory is tight
    warm = args.warmup * args.iterations
    share = min(1.0, (iteration + 1) / max(1, warm))
    if args.lr_schedule == "linear":
        share = min(share, (args.iterations - iteration) / max(1, args.iterations - warm))
    for group, lr in zip(optimizer.param_groups, (args.lr, args.critic_lr)):
        group["lr"] = lr * share


# --------------------------------------------------------------------------- will it fit?


LESS = "--gradient_checkpointing, --offload_optimizer, --fsdp, --tokens_per_microbatch, --slots"


def dry_run(args):
    """What a run would take, from the model's configuration alone. A table as text."""
    from transformers import AutoConfig, AutoModelForCausalLM

    device = memory.pick_device(args.device)
    bfloat16 = uses_bfloat16(args, device)
    if args.model == "tiny":
        model = sft.tiny_model(sft.tiny_tokenizer(args.dataset), 0)
    else:
        try:
            config = AutoConfig.from_pretrained(args.model)
        except Exception as error:
            reason = first_line(error)
            raise ValueError(f"cannot read the config of {args.model!r}: {reason}") from error
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    owners = memory.forecast(args, model, bfloat16, reference_dtype(args, bfloat16))
    parameters = sum(p.numel() for p in model.parameters())
    lines = [f"{args.model}: {parameters / 1e6:,.1f} million parameters, {args.algo} on {device}"]
    for owner, size in [*owners.items(), ("together", sum(owners.values()))]:
        lines.append(f"{owner:<12}{size / 2**30:9.2f} GiB")
    free = memory.free_memory(device)
    if free < math.inf:
        fits = "it fits" if sum(owners.values()) < free else f"it does not fit: try {LESS}"
        lines.append(f"{'free':<12}{free / 2**30:9.2f} GiB: {fits}")
    if args.algo == "ppo":
        lines.append("--algo vineppo or grpo needs no critic")
    return "\n".join(lines)


# --------------------------------------------------------------------------- folders and checks

# What --resume may change.
CHANGEABLE = ("iterations", "device", "tokens_per_microbatch", "slots", "eval_every", "save_every")
CHANGEABLE += ("gradient_checkpointing", "offload_optimizer", "fsdp", "data_dir", "cache", "judges")


def resumed(flags):
    """The settings of the run in --resume, with what may change changed."""
    out = Path(flags["resume"])
    try:
        saved = json.loads((out / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"--resume {out}: no run there ({first_line(error)})") from error
    for name in flags.keys() - {"resume", *CHANGEABLE}:
        if saved.get(name) != flags[name]:
            limit = f"cannot change on --resume (the run has {saved.get(name)})"
            way_out = "leave it out, or start a new run with --out; these can: "
            way_out += ", ".join(sorted(CHANGEABLE))
            raise ValueError(f"--{name} {flags[name]} {limit}: {way_out}")
    saved["fsdp"] = saved.get("fsdp", False) and many_processes()  # one process needs no parts
    return SimpleNamespace(**saved | flags | {"out": str(out)})


def new_folder(args):
    """--out, or a new folder under runs/: nothing is overwritten."""
    name = f"runs/{Path(args.dataset).stem}-{args.algo}-{args.curriculum}"
    names = (f"{name}-{i}" for i in itertools.count(1))
    out = Path(args.out or next(name for name in names if not Path(name).exists()))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        way_out = f"go on with that run by --resume {out}, or give another --out"
        raise ValueError(f"--out {out} holds something already: {way_out}")
    return str(out)


def check(args, size=None):
    """ValueError: settings that do not make sense, by themselves, together, or (once the questions
    are loaded) with `size` questions."""
    if args.temperature == 0 or args.top_p == 0:
        raise ValueError("--temperature and --top_p must be above 0: training samples differ")
    compares = args.algo in ("grpo", "rloo") or args.curriculum in ("lilo", "dapo", "posterior")
    if compares and args.rollouts < 2:
        limit = f"{args.algo} with {args.curriculum} compares responses to one question"
        raise ValueError(f"--rollouts {args.rollouts}: {limit}: give at least 2")
    if args.model == "tiny":
        sft.check_tiny(args)
    if args.fsdp and (args.offload_optimizer or args.algo in sft.IMITATORS):
        other = "--offload_optimizer" if args.offload_optimizer else f"--algo {args.algo}"
        raise ValueError(f"--fsdp does not go with {other}: leave one of them out")
    if args.fsdp and not (many_processes() or args.dry_run):
        raise ValueError("--fsdp is for several processes: torchrun --nproc_per_node=2 sfl.py ...")
    for package in ("tensorboard", "wandb"):
        if getattr(args, package) and find_spec(package) is None:
            raise ValueError(f"--{package} needs a package: pip install {package}")
    sizes = {"questions": args.questions}
    chosen = round(args.rho * args.questions)
    at_most = []  # (flag, its value, what it may not pass, that one's value, which to change)
    if args.curriculum == "sfl":
        sizes["candidates"] = args.candidates
        at_most = [("buffer_size", args.buffer_size, "--candidates", args.candidates, "lower it")]
        raise_it = "raise --buffer_size"
        at_most += [("rho times --questions", chosen, "--buffer_size", args.buffer_size, raise_it)]
    if args.curriculum in ("lilo", "dapo"):
        sizes["max_candidates"] = args.max_candidates
        raise_it = "raise --max_candidates"
        at_most = [("questions", args.questions, "--max_candidates", args.max_candidates, raise_it)]
    if size is not None:
        what = f"the questions of {args.dataset},"
        at_most += [(name, value, what, size, "lower it") for name, value in sizes.items()]
    for name, value, what, limit, way_out in at_most:
        if value > limit:
            raise ValueError(f"--{name} {value} is more than {what} {limit}: {way_out}")


def check_start(args, policy, tokenizer, questions, prompts, count=16):
    """ValueError, or a line on stderr, for what would train quietly on nonsense."""
    rows = len(policy.get_input_embeddings().weight)
    if len(tokenizer) > rows:
        sizes = f"its tokenizer has {len(tokenizer)} tokens, its embedding {rows} rows"
        raise ValueError(f"--model {args.model}: {sizes}: they are not of one model")
    if len(set(map(tuple, prompts))) == 1 < len({question.prompt for question in questions}):
        reason = "all prompts are alike: the chat template leaves the question out"
        raise ValueError(f"{reason}: give --chat off")
    some = questions[:: max(1, len(questions) // count)]
    refused = [q for q in some if evaluation.grade(f"\\boxed{{{q.answer}}}", q) == 0]
    if len(refused) == len(some):
        golds = f"the gold answers of {args.dataset} (such as {refused[0].answer[:40]!r})"
        way_out = "give --answer_field the field with the bare answer"
        raise ValueError(f"no grader accepts {golds}, not even themselves: {way_out}")
    if rank() > 0:
        return
    if refused:
        share = f"{len(refused)} of {len(some)} gold answers looked at"
        print(f"{share} are not accepted by their own grader", file=sys.stderr)
    if tokenizer.chat_template and args.chat == "off" and args.algo != "rcrl":
        print("--chat off: this model has a chat template, and is prompted raw", file=sys.stderr)
