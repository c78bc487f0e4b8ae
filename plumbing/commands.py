"""Command lines: flags, one-line errors, signals, progress bars."""

import contextlib
import dataclasses
import inspect
import math
import shlex
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm
from transformers import HfArgumentParser, logging

from plumbing.processes import all_sum, rank


class Stop(Exception):
    """Ends a run that is saved. Its args: why, and the exit code."""


@contextlib.contextmanager
def signals_wait():
    """SIGTERM and Ctrl-C fill `.came`. While `.wait` is set, the first one lets the iteration
    finish. A run that ends early says how to go on in `.folder`, which is set once it is saved."""
    signals = SimpleNamespace(came=[], wait=False, folder=None)

    def ask(number, frame):
        signals.came.append(number)
        if not signals.wait or len(signals.came) > 1:
            raise KeyboardInterrupt
        print("\nfinishing this iteration; Ctrl-C again: at once", file=sys.stderr)

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield signals
    except (KeyboardInterrupt, Stop) as end:
        why, code = end.args or ("interrupted", 130)
        folder = shlex.quote(f"{signals.folder}")
        way_out = f"go on from the last checkpoint with --resume {folder}"
        if rank() == 0:
            print(f"\n{why}: {way_out if signals.folder else 'nothing saved'}", file=sys.stderr)
        sys.exit(code)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def reason_to_stop(signals, policy, critic):
    """A Stop, or None: somebody asked, or three optimizer steps in a row were not finite."""
    if all_sum(torch.tensor(float(len(signals.came)))):  # all processes stop at the same iteration
        number = signals.came[0] if signals.came else signal.SIGTERM  # another process got it
        return Stop("interrupted", 128 + number)
    for model, which in ((policy, "the policy"), (critic, "the critic")):
        if getattr(model, "bad_steps", 0) >= 3:
            return Stop(f"three NaN or infinite steps of {which} in a row: lower --lr", 2)


def progress_bar(name, total, unit, shown=True, initial=0, leave=True):
    """A tqdm bar; where stderr is no terminal but a log file, a line in ten seconds at most."""
    terminal = sys.stderr.isatty()
    return tqdm(
        desc=name, total=total, unit=unit, disable=not shown, initial=initial,
        leave=leave and terminal, mininterval=0.1 if terminal else 10, maxinterval=10,
        bar_format=None if terminal else "{l_bar}{bar:20}{r_bar}\n",
    )  # fmt: skip


def parse(settings, argv=None, defaults=None):
    """An instance of the dataclass `settings`, filled from flags (--data-dir is --data_dir). A
    field's help is the comment behind it. defaults: {name: value} in place of the dataclass's.
    ValueError, one line: a bad flag."""
    lines = inspect.getsource(settings).splitlines()
    for field in dataclasses.fields(settings):
        [line] = [line for line in lines if line.strip().startswith(f"{field.name}:")]
        field.metadata = {"help": line.partition("  # ")[2].replace("%", "%%")}
    parser = HfArgumentParser(settings, description=settings.__doc__, allow_abbrev=False)

    def fail(message):
        raise ValueError(f"{message} (see --help)")

    parser.error = fail
    names = {field.name for field in dataclasses.fields(settings)}
    known = {name: value for name, value in (defaults or {}).items() if name in names}
    parser.set_defaults(**known)  # the others are of an older or newer version
    return settings(**vars(parser.parse_args(argv)))


def check_limits(settings, **limits):
    """ValueError names the first setting that is not within its (low, high)."""
    for name, (low, high) in limits.items():
        given = getattr(settings, name)
        if not (low <= given <= high and math.isfinite(given)):  # a NaN is in no interval
            allowed = f"at least {low}" if high == math.inf else f"in [{low}, {high}]"
            allowed += ", and finite" if math.isinf(given) else ""
            raise ValueError(f"--{name} {given} must be {allowed}")


def command_line(main):
    """Run main() as a program: bad input, a full disk or a loss gone NaN is one line on stderr and
    exit code 2; Ctrl-C is 130."""
    logging.disable_progress_bar()  # "Loading weights" between the bars that matter
    logging.set_verbosity_error()  # tables of weights: one line is ours to say
    name = Path(sys.argv[0]).name
    for stream in (sys.stdout, sys.stderr):  # of ASCII: a table's ± is no reason to fail
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        main()
    except (ValueError, FloatingPointError, OSError) as error:
        print(f"{name}: {first_line(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        sys.exit(130)


def first_line(error):
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def require(condition, message):
    if not condition:
        raise ValueError(message)
