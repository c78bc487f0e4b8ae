"""What would fail late, or train quietly on nonsense: one line each, before the work begins."""

import math
import sys
from importlib.util import find_spec

from plumbing.commands import check_limits, require
from plumbing.processes import many_processes, rank

AT_LEAST_ONE = """iterations questions rollouts refresh_every candidates buffer_size max_candidates
max_new_tokens epochs minibatch mc_rollouts tokens_per_microbatch eval_every save_every"""
AT_LEAST_ZERO = """seed top_p temperature lr critic_lr clip value_clip kl_coef kl_sample max_ratio
max_grad_norm mc_max_steps slots eval_limit judges"""
SHARES = "rho memory top_p warmup gamma lam p_cot"  # from 0 to 1


def check_settings(config):
    """Settings that make no sense by themselves or together."""
    limits = dict.fromkeys(AT_LEAST_ONE.split(), (1, math.inf))
    limits |= dict.fromkeys(AT_LEAST_ZERO.split(), (0, math.inf))
    limits |= dict.fromkeys(SHARES.split(), (0, 1))
    limits |= {"score_rollouts": (2, math.inf), "context": (2, math.inf), "bits": (5, 60)}
    check_limits(config, **limits)
    above = "--temperature and --top_p must be above 0: training samples differ"
    require(config.temperature > 0 and config.top_p > 0, above)
    choosers = ("lilo", "dapo", "greso", "posterior")
    compares = config.algo in ("grpo", "rloo") or config.curriculum in choosers
    what = f"{config.algo} with {config.curriculum} compares responses to one question"
    too_few = f"--rollouts {config.rollouts}: {what}: give at least 2"
    require(config.rollouts > 1 or not compares, too_few)
    imitates = config.algo in ("expert", "rcrl")
    other = "--offload_optimizer" if config.offload_optimizer else f"--algo {config.algo}"
    clash = f"--fsdp does not go with {other}: leave one of them out"
    require(not (config.fsdp and (config.offload_optimizer or imitates)), clash)
    alone = "--fsdp is for several processes: torchrun --nproc_per_node=2 sfl.py ..."
    require(not config.fsdp or many_processes() or config.dry_run, alone)
    for package in ("tensorboard", "wandb"):
        missing = getattr(config, package) and find_spec(package) is None
        require(not missing, f"--{package} needs a package: pip install {package}")


def check_sizes(config, size):
    """No more may be drawn than there is. size: of the training questions."""

    def need(name, count, limit, source):
        require(count <= limit, f"--{name} {count} is more than {source} {limit}: lower it")

    all_questions = f"the questions of {config.dataset},"
    need("questions", config.questions, size, all_questions)
    if config.curriculum == "sfl":
        chosen = round(config.rho * config.questions)
        need("candidates", config.candidates, size, all_questions)
        need("buffer_size", config.buffer_size, config.candidates, "--candidates")
        need("rho times --questions", chosen, config.buffer_size, "--buffer_size")
    if config.curriculum in ("lilo", "dapo", "greso", "mopps"):
        need("max_candidates", config.max_candidates, size, all_questions)
        need("questions", config.questions, config.max_candidates, "--max_candidates")


def check_start(config, policy, tokenizer, questions, prompts, grade):
    """A tokenizer of another model, a template that drops the question, golds no grader accepts."""
    embedded = len(policy.get_input_embeddings().weight)
    sizes = f"its tokenizer has {len(tokenizer)} tokens, its embedding {embedded} rows"
    other_model = f"--model {config.model}: {sizes}: they are not of one model"
    require(len(tokenizer) <= embedded, other_model)
    alike = all(prompt == prompts[0] for prompt in prompts)
    differ = any(question.prompt != questions[0].prompt for question in questions)
    dropped = "all prompts are alike: the chat template leaves the question out: give --chat off"
    require(not (alike and differ), dropped)
    some = questions[:: max(1, len(questions) // 16)]
    refused = [q for q in some if grade(f"\\boxed{{{q.answer}}}", q) == 0]
    if len(refused) == len(some):
        golds = f"the gold answers of {config.dataset} (such as {refused[0].answer[:40]!r})"
        way_out = "give --answer_field the field with the bare answer"
        raise ValueError(f"no grader accepts {golds}, not even themselves: {way_out}")
    if refused and rank() == 0:
        share = f"{len(refused)} of {len(some)} gold answers looked at"
        print(f"{share} are not accepted by their own grader", file=sys.stderr)
    if tokenizer.chat_template and config.chat == "off" and config.algo != "rcrl" and rank() == 0:
        print("--chat off: this model has a chat template, and is prompted raw", file=sys.stderr)
