"""kt-kernel's routed experts in bf16, as a peer: `start` a layer, `output` for some tokens, `run` again and again.

In a process of its own: it never frees the weights that it packed, and a CPU or a shape that it does not know ends the
process. Its threads are as many as torch's. They turn idly for 50 ms after a call (`REST`), and so does their caller
while it waits, on a core that they may need. A pipe starts each call, which adds some 50 us to its times.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
from multiprocessing.connection import Connection

import torch

REST = 0.06  # seconds after which its threads sleep


def serve(conn: Connection, shape: str, threads: int) -> None:
    """The process: answers a number of tokens by the output's bytes, and a zero after the same call again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # it greets on standard output
    import kt_kernel
    import moe_layers

    ext, layer = kt_kernel.kt_kernel_ext, moe_layers.make(shape)
    pool = ext.WorkerPoolConfig()
    pool.subpool_count, pool.subpool_numa_map, pool.subpool_thread_count = 1, [0], [threads]
    cpu = ext.CPUInfer(pool)
    E, K, I = layer.E, layer.K, layer.I
    (gate_up, down), on_gpu, order = moe_layers.stacks(layer), torch.zeros(E, dtype=torch.bool), torch.arange(E)
    config = ext.moe.MOEConfig(E, K, layer.H, I, on_gpu.data_ptr())
    config.layer_idx, config.pool, config.max_len = 0, cpu.backend_, 4096
    config.gate_projs = [[w[:I].data_ptr() for w in gate_up]]
    config.up_projs = [[w[I:].data_ptr() for w in gate_up]]
    config.down_projs = [[w.data_ptr() for w in down]]
    config.gate_scales = config.up_scales = config.down_scales = [[0] * E]
    config.physical_to_logical_map = order.data_ptr()
    # AMXBF16_MOE, despite its name, is what every CPU with AVX-512 runs; the build for AVX2 lacks it.
    moe = getattr(ext.moe, "AMXBF16_MOE", ext.moe.AVX2BF16_MOE)(config)
    moe.load_weights()
    tokens, run = 1, lambda: None
    del gate_up, down, layer.moe, layer.ours
    conn.send_bytes(b"ready")
    while True:
        if tokens := conn.recv():
            x, weights, ids = moe_layers.routed(layer, tokens)
            out, count, ids = torch.empty_like(x), torch.tensor([tokens], dtype=torch.int32), ids.long()
            tensors = [ids.data_ptr(), weights.data_ptr(), x.data_ptr(), out.data_ptr()]
            run = lambda tensors=tensors, count=count: moe.forward(count.data_ptr(), K, *tensors, False)
        run()
        conn.send_bytes(out.view(torch.uint8).flatten().numpy() if tokens else b"done")


class KtKernel:
    """The layer of a shape in kt-kernel."""

    def __init__(self, shape: str, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.conn, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, shape, threads), daemon=True)
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


def start(shape: str) -> KtKernel | None:
    """None without kt-kernel, and where it has no bf16 experts that run on this CPU."""
    if importlib.util.find_spec("kt_kernel") is None:
        return None
    try:
        return KtKernel(shape, torch.get_num_threads())
    except EOFError:
        return None
