"""Does a run survive what happens to runs? Commands, not tests: they take minutes.

    python tests/faults.py kill                             # 20 kills of a PPO run
    python tests/faults.py kill --algo grpo --curriculum posterior --kills 8
    python tests/faults.py full                             # a disk that is full

`kill` runs sfl.py to its end, and again with SIGKILL at random moments, a resume after each; then
metrics.jsonl (all but the clocks) and the final weights must be the same, bit for bit. `full` lets
files grow to a limit and no further, lower and lower, and looks that the last checkpoint loads.
"""

import argparse
import json
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SMALL = """--iterations 12 --questions 8 --rollouts 4 --candidates 24 --buffer_size 8
--max_candidates 16 --refresh_every 4 --eval_every 3 --eval_limit 24 --save_every 2
--minibatch 16 --mc_rollouts 2 --max_new_tokens 64 --device cpu""".split()


def start(out, args, *flags):
    """sfl.py on the tiny model, going on where `out` is, if anything is there."""
    import sft

    base = str(sft.tiny_base("runs/cache"))
    how = ["--resume", str(out)]
    if not (out / "config.json").exists():
        shutil.rmtree(out, ignore_errors=True)
        how = ["--model", base, "--algo", args.algo, "--curriculum", args.curriculum]
        how += ["--out", str(out), *SMALL, *flags]
    log = open(f"{out}.log", "a")  # noqa: SIM115 (the process writes to it)
    return subprocess.Popen([sys.executable, ROOT / "sfl.py", *how], stdout=log, stderr=log)


def outcome(out):
    """Metrics without clocks, and the weights, of a run that has ended."""
    from transformers import AutoModelForCausalLM

    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        for name in [name for name in row if name.startswith("seconds")]:
            del row[name]
    return rows, AutoModelForCausalLM.from_pretrained(out / "model").state_dict()


def kill(args):
    """SIGKILL at random moments."""
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        straight, killed = Path(folder, "straight"), Path(folder, "killed")
        clock = time.time()
        if start(straight, args).wait():
            sys.exit(Path(f"{straight}.log").read_text()[-2000:])
        length = time.time() - clock
        expected = outcome(straight)
        for number in range(args.kills):
            job = start(killed, args)
            # at any moment: of the imports, the first save, an iteration, the last evaluation
            time.sleep(rng.uniform(0.1, 0.7) * length)
            job.kill()
            job.wait()
            finished = killed / "evaluation.json"
            done = finished.exists() and "after" in json.loads(finished.read_text())
            rows = killed / "metrics.jsonl"
            count = len(rows.read_text().splitlines()) if rows.exists() else 0
            print(f"kill {number + 1}: {count} iterations logged", flush=True)
            if done:  # once more from the start
                compare(outcome(killed), expected)
                shutil.rmtree(killed)
        if start(killed, args).wait():
            sys.exit(Path(f"{killed}.log").read_text()[-2000:])
        compare(outcome(killed), expected)
    print(f"{args.kills} kills of {args.algo} with {args.curriculum}: identical")


def compare(found, expected):
    import torch

    if found[0] != expected[0]:
        sys.exit("the metrics differ")
    if not all(torch.equal(found[1][name], weight) for name, weight in expected[1].items()):
        sys.exit("the weights differ")


def full(args):
    """Files may grow to a limit only."""
    from plumbing import checkpoint

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "run")
        if start(out, args).wait():
            sys.exit(Path(f"{out}.log").read_text()[-2000:])
        size = (out / "state" / "training.pt").stat().st_size
        for share in (0.9, 0.5, 0.2, 0.01):
            config = json.loads((out / "config.json").read_text())
            config["iterations"] += 4
            limit = int(share * size)
            command = [sys.executable, str(ROOT / "sfl.py"), "--resume", str(out)]
            command += ["--iterations", str(config["iterations"])]
            job = subprocess.run(
                command, capture_output=True, text=True,
                preexec_fn=lambda limit=limit: resource.setrlimit(
                    resource.RLIMIT_FSIZE, (limit, limit)
                ),
            )  # fmt: skip
            last = job.stderr.strip().splitlines()[-1]
            if job.returncode != 2 or "Traceback" in job.stderr:
                sys.exit(f"exit code {job.returncode}: {job.stderr[-2000:]}")
            checkpoint.load_model(out)
            print(f"files up to {limit:,} bytes: {last}")
        if start(out, args).wait():
            sys.exit("it does not go on afterwards")
    print("the last checkpoint was whole each time, and went on")


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("command", choices=["kill", "full"])
    parser.add_argument("--algo", default="ppo")
    parser.add_argument("--curriculum", default="sfl")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    {"kill": kill, "full": full}[args.command](args)


if __name__ == "__main__":
    main()
