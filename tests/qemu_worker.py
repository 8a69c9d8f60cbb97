"""What tests/test_qemu.py runs twice, on an emulated CPU and on this one: prints one JSON object of facts and bits.

python -m tests.qemu_worker CHECKPOINT STEM [STEM ...]
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import sys

import torch

import glmx
from glmx import _native
from glmx.cli.main import main as cli
from tests.ops.test_golden_bits import current

PROMPT = [5, 17, 3, 60, 41, 2, 9]


def sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def facts(checkpoint: str, stems: list[str]) -> dict:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert cli(["env", "--json"]) == 0
    env = json.loads(printed.getvalue())
    logits = {}
    for dtype in ("fp32", "bf16"):
        model = glmx.load(checkpoint, dtype=dtype)
        with torch.no_grad():
            logits[dtype] = sha256(model(torch.tensor([PROMPT])).logits)
    llm = glmx.LLM(checkpoint)
    params = glmx.SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=1)
    out = llm.generate([PROMPT], params)[0].outputs[0]
    return {
        "isa": env["isa"]["active"],
        "kernels": env["kernels"],
        "cpu": _native.cpu_model(),
        "golden": {stem: current(stem) for stem in stems},
        "logits": logits,
        "tokens": out.token_ids,
        "logprob": out.cumulative_logprob.hex(),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(facts(sys.argv[1], sys.argv[2:])))
