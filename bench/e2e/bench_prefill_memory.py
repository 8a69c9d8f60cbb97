"""Peak memory of a long prefill against the plan printed before it.

    pytest bench/e2e/bench_prefill_memory.py -s

A small GLM-5 (random weights) reads 131,072 tokens in pieces of 4,096 through the engine, in a process of its own. Its
peak resident memory, less what the process held before the model was made, must stay below glmx.models.plan's total.
"""

from __future__ import annotations

import json
import subprocess
import sys

MODEL = {
    "model_type": "glm_moe_dsa",
    "vocab_size": 4096, "hidden_size": 256, "num_hidden_layers": 2, "first_k_dense_replace": 1,
    "num_attention_heads": 8, "num_key_value_heads": 8, "q_lora_rank": 128, "kv_lora_rank": 128,
    "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32, "index_n_heads": 8, "index_head_dim": 32,
    "index_topk": 512, "intermediate_size": 512, "moe_intermediate_size": 128, "n_routed_experts": 16,
    "num_experts_per_tok": 4, "max_position_embeddings": 2**20, "num_nextn_predict_layers": 0, "dtype": "bfloat16",
}  # fmt: skip
SCRIPT = """
import dataclasses, json, resource, sys, time
import torch
from glmx.models.config import ModelConfig
from glmx.models.decoder import Decoder
from glmx.models.plan import memory_plan
from glmx.serve.engine import Engine, Request
from glmx.serve.sampling import SamplingParams
from glmx.serve.text import TextStream

def resident(field):
    line = next(line for line in open("/proc/self/status") if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024

config, tokens, chunk = ModelConfig.from_dict(json.loads(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3])
plan = memory_plan(config, torch.bfloat16, tokens + 1, chunk=chunk)
print(json.dumps({"total": plan.total, **dataclasses.asdict(plan)}), flush=True)
torch.zeros(64, 64).square()  # torch's own start-up
before = resident("VmRSS")
model = Decoder(config, torch.bfloat16)
model.init_weights(0)
engine = Engine(model, 1, tokens + 1, chunk)
params = SamplingParams(max_tokens=1, temperature=0)
ids = torch.randint(config.vocab_size, (tokens,), generator=torch.Generator().manual_seed(0)).tolist()
begun = time.monotonic()
engine.add(Request("0", ids, params, 0, frozenset(), TextStream(None, params)))
(done,) = engine.step()
assert done.error is None and done.finish_reason == "length", done.error
print(json.dumps({"peak": resident("VmHWM") - before, "seconds": time.monotonic() - begun}))
"""


def test_peak_is_below_the_plan(benchmark, capsys) -> None:
    tokens, chunk = (2048, 512) if benchmark.disabled else (131072, 4096)

    def prefill() -> list[str]:
        command = [sys.executable, "-c", SCRIPT, json.dumps(MODEL), str(tokens), str(chunk)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    plan, measured = map(json.loads, benchmark.pedantic(prefill, rounds=1))
    parts = ", ".join(f"{name} {plan[name] / 2**20:.0f}" for name in ("weights", "cache", "activations"))
    with capsys.disabled():
        print(
            f"\n{tokens:,} tokens in pieces of {chunk:,}: plan {plan['total'] / 2**20:.0f} MiB ({parts}), "
            f"measured peak {measured['peak'] / 2**20:.0f} MiB, {measured['seconds']:.1f} s"
        )
    assert measured["peak"] <= plan["total"]
    benchmark.extra_info.update(plan=plan["total"], peak=measured["peak"])
