"""Does the project run with the packages that are installed? A minute, for a range's oldest ones.

    python tests/smoke.py

Every file imports, `generate` writes what `model.generate` writes, and the default run makes one
iteration without a library's warning that something goes away.
"""

import importlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402
import transformers  # noqa: E402


def same_as_the_model():
    from rollout import generate

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 61}
    config = transformers.LlamaConfig(**shape, **heads)
    model = transformers.LlamaForCausalLM(config).eval()
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12], [13]]
    ours = generate(model, prompts, max_new_tokens=20, temperature=0, stop_ids=[2])
    for prompt, [rollout] in zip(prompts, ours):
        tokens = torch.tensor([prompt])
        how = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": 2, "pad_token_id": 0}
        theirs = model.generate(tokens, attention_mask=torch.ones_like(tokens), **how)
        assert rollout.response == theirs[0, len(prompt) :].tolist(), prompt


def one_iteration():
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / "sfl.py", "--iterations", "1", "--eval_limit", "20"]
        command += ["--out", f"{folder}/run", "--cache", f"{folder}/cache"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout + done.stderr)
    assert done.returncode == 0
    assert "deprecated" not in done.stderr, "a library says that something goes away"


if __name__ == "__main__":
    for file in sorted(ROOT.glob("*.py")):
        importlib.import_module(file.stem)
    same_as_the_model()
    one_iteration()
    print(f"runs with torch {torch.__version__}, transformers {transformers.__version__}")
