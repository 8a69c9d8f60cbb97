"""What e2e.sh made, compared: completions with and without drafts and on the CPU, logits on both, how fast the run was.

    python bench/gpu/e2e_compare.py OUT DEVICE       rows of JSON, also behind those of OUT/e2e.jsonl

Fails where two of them must be the same bits and are not, or where the GPU is further from fp32 than rounding explains.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

import glmx
from glmx.data.packing import HeldoutRows
from glmx.data.shards import TokenShards
from glmx.models import likelihood
from glmx.models.decoder import Decoder

SEQ_LEN = 512


def main(out: Path, device: str) -> int:
    rows: list[dict[str, Any]] = []
    texts = {name: completion(out / f"{name}.log") for name in ("generate", "generate_drafts", "generate_cpu")}
    there, drafted, here = texts.values()
    agree = next((i for i, (a, b) in enumerate(zip(there, here, strict=False)) if a != b), len(there))
    rows.append({"name": "drafts give the same text", "ok": there == drafted, "tokens": len(there)})
    rows.append({"name": "tokens before GPU and CPU part", "value": agree, "of": len(there)})

    rows += speed(out / "demo" / "run" / "log.jsonl")
    path, batch = out / "demo" / "run", next(iter(heldout(out)))
    exact = logits(glmx.load(path, "cpu", "fp32"), batch)
    errors = {}
    for where in ("cpu", device):
        difference = (logits(glmx.load(path, where), batch) - exact).norm(dim=-1) / exact.norm(dim=-1)
        errors[where] = float(difference.median())
    rows.append({"name": "median error of logits", "ok": errors[device] < 1.25 * errors["cpu"], **errors})

    nats = {where: likelihood.measure(glmx.load(path, where), [batch], None).nats_per_token for where in errors}
    rows.append({"name": "held-out nats per token", "ok": abs(nats[device] - nats["cpu"]) < 0.01, **nats})
    with (out / "e2e.jsonl").open("a") as file:
        for row in rows:
            line = json.dumps({"stage": "e2e", **row})
            print(line)
            file.write(line + "\n")
    return sum(not row.get("ok", True) for row in rows)


def completion(log: Path) -> list[int]:
    """The token ids that `glmx generate --json` printed, behind what else is in the log."""
    line = next(line for line in log.read_text().splitlines() if line.startswith("{"))
    return json.loads(line)["outputs"][0]["token_ids"]


def heldout(out: Path) -> HeldoutRows:
    shards = TokenShards.open(out / "demo" / "data", "heldout")
    return HeldoutRows(shards, seq_len=SEQ_LEN, batch_tokens=2 * SEQ_LEN)


@torch.no_grad()
def logits(model: Decoder, batch: Any) -> torch.Tensor:
    from glmx.models.batch import Batch

    there = batch.to(model.device)
    hidden = model.forward_tokens(there.ids, there.positions, Batch(batch.cu_seqlens))
    return model.logits(hidden).cpu().double()


def speed(log: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in log.read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    rate = statistics.median(record["tokens_per_s"] for record in steps)
    finite = all(record["loss"] == record["loss"] and record["loss"] < 100 for record in steps)
    return [
        {
            "name": "training",
            "ok": finite and (len(steps) < 20 or steps[-1]["loss"] < steps[0]["loss"]),
            "steps": len(steps),
            "tokens_per_s": round(rate),
            "loss": [round(steps[0]["loss"], 3), round(steps[-1]["loss"], 3)],
        }
    ]


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
