"""kt-kernel's routed experts as a peer: `start` a layer, `output` for some tokens, `run` again and again.

In a process of its own: it never frees the weights that it packed, and a CPU or a shape that it does not know ends the
process. Its threads are as many as torch's. They turn idly for 50 ms after a call (`REST`), and so does their caller
while it waits, on a core that they may need. A pipe starts each call, which adds some 50 us to its times.

int4, fp8 and fp8_blocks are glmx's values and scales (bench/stored.py); int8, and int4 by rows, are what kt-kernel
makes of bf16 weights itself. With int8 and both int4 it rounds activations to 8 bits too.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from stored import GROUP, rounded

from glmx.ops import Matrix

REST = 0.06  # seconds after which its threads sleep
PROJECTIONS = ("gate", "up", "down")
# The first that the build has and the CPU runs. The names with AMX are what every CPU with AVX-512 runs. For int4
# kt-kernel itself would choose AMXInt4_KGroup_MOE, which returns NaN with groups of 128.
CLASSES = {
    "bf16": ("AMXBF16_MOE", "AVX2BF16_MOE"),
    "int8": ("AMXInt8_MOE",),
    "int4": ("AVXVNNI256RawInt4_MOE", "AVX2RawInt4_MOE"),
    "int4 by rows": ("AMXInt4_MOE",),
    "fp8": ("AMXFP8PerChannel_MOE",),
    "fp8_blocks": ("AMXFP8_MOE", "AVX2FP8_MOE"),
}


def serve(conn: Connection, shape: str, format: str, threads: int) -> None:
    """The process: answers a number of tokens by the output's bytes, and a zero after the same call again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # it greets on standard output
    import kt_kernel
    import moe_layers

    ext, layer = kt_kernel.kt_kernel_ext, moe_layers.make(shape)
    pool = ext.WorkerPoolConfig()
    pool.subpool_count, pool.subpool_numa_map, pool.subpool_thread_count = 1, [0], [threads]
    cpu = ext.CPUInfer(pool)
    E, K, I = layer.E, layer.K, layer.I
    on_gpu, order = torch.zeros(E, dtype=torch.bool), torch.arange(E)
    config = ext.moe.MOEConfig(E, K, layer.H, I, on_gpu.data_ptr())
    config.layer_idx, config.pool, config.max_len = 0, cpu.backend_, 4096
    config.physical_to_logical_map = order.data_ptr()
    gate_up, down = moe_layers.stacks(layer)
    weights = give(config, format, dict(zip(PROJECTIONS, (gate_up[:, :I], gate_up[:, I:], down), strict=True)))
    moe = next(getattr(ext.moe, name) for name in CLASSES[format] if hasattr(ext.moe, name) and runs(name))(config)
    moe.load_weights()
    tokens, run = 1, lambda: None
    del gate_up, down, weights, layer.moe, layer.ours
    conn.send_bytes(b"ready")
    while True:
        if tokens := conn.recv():
            x, topk_weights, ids = moe_layers.routed(layer, tokens)
            out, count, ids = torch.empty_like(x), torch.tensor([tokens], dtype=torch.int32), ids.long()
            tensors = [ids.data_ptr(), topk_weights.data_ptr(), x.data_ptr(), out.data_ptr()]
            run = lambda tensors=tensors, count=count: moe.forward(count.data_ptr(), K, *tensors, False)
        run()
        conn.send_bytes(out.view(torch.uint8).flatten().numpy() if tokens else b"done")


def runs(name: str) -> bool:
    return "VNNI" not in name or "avx_vnni" in Path("/proc/cpuinfo").read_text()


def give(config: Any, format: str, weights: dict[str, torch.Tensor]) -> list[Any]:
    """Tells it where the weights are -> what must be kept until they are loaded."""
    kept: list[Any] = []
    for name, stack in weights.items():
        if format in ("int8", "int4 by rows"):
            kept.append(stack.contiguous())
            setattr(config, f"{name}_proj", kept[-1].data_ptr())
            continue
        matrices = [Matrix(w, None) if format == "bf16" else rounded(format, w) for w in stack]
        kept.append(matrices)
        setattr(config, f"{name}_projs", [[m.values.data_ptr() for m in matrices]])
        setattr(config, f"{name}_scales", [[0 if m.scale is None else m.scale.data_ptr() for m in matrices]])
    if format == "bf16":
        return kept
    quant = config.quant_config
    quant.bits, quant.group_size, quant.zero_point = (4 if format == "int4" else 8), GROUP, False
    quant.per_channel = format == "fp8"
    return kept


class KtKernel:
    """The layer of a shape in kt-kernel, its weights in one of CLASSES."""

    def __init__(self, shape: str, format: str, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.conn, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, shape, format, threads), daemon=True)
        self.process.start()
        theirs.close()
        self.conn.recv_bytes()

    def output(self, tokens: int, hidden: int) -> torch.Tensor:
        """The output for moe_layers.routed(layer, tokens), which `run` computes from now on."""
        self.conn.send(tokens)
        return torch.frombuffer(bytearray(self.conn.recv_bytes()), dtype=torch.bfloat16).view(tokens, hidden)

    def run(self) -> None:
        self.conn.send(0)
        self.conn.recv_bytes()

    def close(self) -> None:
        self.process.kill()
        self.process.join()


def start(shape: str, format: str = "bf16") -> KtKernel | None:
    """None without kt-kernel, and where it has no such experts that run on this CPU."""
    if importlib.util.find_spec("kt_kernel") is None:
        return None
    try:
        return KtKernel(shape, format, torch.get_num_threads())
    except EOFError:
        return None
