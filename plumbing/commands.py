"""Command lines: flags, one-line errors, signals, progress bars."""

import argparse
import contextlib
import dataclasses
import inspect
import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

from tqdm import tqdm
from transformers import HfArgumentParser


class Stop(Exception):
    """Ends a run that is saved. code: the exit code."""

    def __init__(self, text, code):
        super().__init__(text)
        self.code = code


@contextlib.contextmanager
def signals_wait():
    """SIGTERM and Ctrl-C fill `.came` and, where `.wait` says so, let the iteration finish; the
    second one interrupts at once."""
    signals = SimpleNamespace(came=[], wait=False)

    def ask(number, frame):
        signals.came.append(number)
        if not signals.wait or len(signals.came) > 1:
            raise KeyboardInterrupt
        print("\nfinishing this iteration; Ctrl-C again: at once", file=sys.stderr)

    if threading.current_thread() is not threading.main_thread():
        yield signals  # signals are not this thread's
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def progress_bar(name, total, unit, shown=True, initial=0, leave=True):
    """A tqdm bar; where stderr is no terminal but a log file, a line in ten seconds at most."""
    terminal = sys.stderr.isatty()
    return tqdm(
        desc=name, total=total, unit=unit, disable=not shown, initial=initial,
        leave=leave and terminal, mininterval=0.1 if terminal else 10, maxinterval=10,
        bar_format=None if terminal else "{l_bar}{bar:20}{r_bar}\n",
    )  # fmt: skip


def parse(settings, argv=None, usual=None):
    """An instance of the dataclass `settings`, filled from flags (--data-dir is --data_dir). A
    field's help is the comment behind it. usual(seen) -> {name: default} of the flags that were not
    given, judged by those that were. ValueError, one line: a bad flag."""
    help_from_comments(settings)
    parser = HfArgumentParser(settings, description=settings.__doc__, allow_abbrev=False)

    def fail(message):
        raise ValueError(f"{message} (see --help)")

    parser.error = fail
    if usual is not None:
        parser.set_defaults(**usual(parser.parse_args(argv)))
    return settings(**vars(parser.parse_args(argv)))


def help_from_comments(settings):
    lines = inspect.getsource(settings).splitlines()
    for field in dataclasses.fields(settings):
        [line] = [line for line in lines if line.strip().startswith(f"{field.name}:")]
        field.metadata = {"help": line.partition("  # ")[2].replace("%", "%%")}


def read_settings(table):
    """{name: (default, default for other data sets, what it may be, help)} of a table."""
    settings = {}
    for line in filter(str.strip, table.splitlines()):
        name, default, allowed, text = line.split(None, 3)
        small, _, large = default.partition(",")
        settings[name] = value(small), value(large or small), allowed, text
    return settings


def value(text):
    """'60' -> 60, '1e-4' -> 0.0001, 'off' -> False, '-' -> None, other text as it is."""
    if text in ("-", "off"):
        return {"-": None, "off": False}[text]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def parse_flags(table, description, argv=None):
    """The flags that were given: {name: value}. --data-dir is --data_dir; a bad flag is a
    ValueError of one line."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)

    def fail(message):
        raise ValueError(f"{message} (see --help)")

    parser.error = fail
    for name, (small, large, allowed, text) in read_settings(table).items():
        help = text if small is None or small is False else f"{text} (default {small}"
        if help != text:
            help += ")" if large in (small, None) else f"; other data sets {large})"
        help = help.replace("%", "%%")
        kind = str if small is None else type(small)
        if small is False:
            parser.add_argument(f"--{name}", action="store_true", default=None, help=help)
        else:
            metavar = allowed if "|" in allowed else kind.__name__
            several = {"nargs": "+"} if allowed == "+" else {}
            parser.add_argument(f"--{name}", type=kind, metavar=metavar, help=help, **several)
    args = []
    for arg in sys.argv[1:] if argv is None else argv:
        flag, equals, rest = arg.partition("=")
        if flag.startswith("--"):
            flag = "--" + flag[2:].replace("-", "_")
        args.append(flag + equals + rest)
    given = vars(parser.parse_args(args))
    return {name: value for name, value in given.items() if value is not None}


def check_settings(table, args):
    """ValueError names the first setting that is not what it may be, and its limits."""
    for name, (_, _, allowed, _) in read_settings(table).items():
        given = getattr(args, name)
        if "|" in allowed and given not in allowed.split("|"):
            raise ValueError(f"--{name} {given}: choose from {allowed.replace('|', ', ')}")
        low, dots, high = allowed.partition("..")
        if dots and high and not float(low) <= given <= float(high):
            raise ValueError(f"--{name} {given} must be in [{low}, {high}]")
        if dots and not high and not given >= float(low):
            raise ValueError(f"--{name} {given} must be at least {low}")


def command_line(main):
    """Run main() as a program: bad input, a full disk or a loss gone NaN is one line on stderr and
    exit code 2; Ctrl-C is 130."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # "Loading weights" between the bars that matter
    name = Path(sys.argv[0]).name
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
