"""CuPy arrays in glmx.ops: no copy, no torch in sight, on CuPy's current stream.

    pip install 'glmx[cupy]'
    python examples/cupy_arrays.py

Each function of glmx.ops takes arrays that speak DLPack wherever it takes tensors, and returns arrays of the same
library. Without CuPy, or without a card for it, the same lines run on NumPy's arrays and the CPU.
"""

import math

from glmx import ops

# T tokens, H hidden, E experts, I expert width, K experts per token
T, H, E, I, K = 33, 256, 16, 128, 4


def library():
    """cupy where it has a card, else numpy."""
    try:
        import cupy

        cupy.cuda.runtime.getDeviceCount()
        return cupy
    except ImportError:
        print("skipped: CuPy is not installed; the same on NumPy's arrays and the CPU:")
    except Exception as error:  # CuPy's own errors need CuPy to be named
        print(f"skipped: CuPy finds no card ({error}); the same on NumPy's arrays and the CPU:")
    import numpy

    return numpy


def main() -> None:
    xp = library()
    draw = xp.random.RandomState(0)
    normal = lambda *shape: draw.standard_normal(shape).astype(xp.float32)
    x_TH, norm_H = normal(T, H), xp.ones(H, xp.float32)
    router_EH, bias_E = normal(E, H) / math.sqrt(H), xp.zeros(E, xp.float32)
    gate_up_E2IH, down_EHI = normal(E, 2 * I, H) / math.sqrt(H), normal(E, H, I) / math.sqrt(I)

    def block(x_TH):
        y_TH = ops.rms_norm(x_TH, norm_H, 1e-5)
        weights_TK, ids_TK, _ = ops.route_topk(ops.linear(y_TH, router_EH), bias_E, K)
        return ops.moe_mlp(y_TH, weights_TK, ids_TK, gate_up_E2IH, down_EHI)

    out_TH = block(x_TH)
    assert isinstance(out_TH, xp.ndarray) and out_TH.shape == (T, H)

    # The same by hand.
    y_TH = x_TH / xp.sqrt((x_TH**2).mean(1, keepdims=True) + 1e-5)
    scores_TE = 1 / (1 + xp.exp(-(y_TH @ router_EH.T)))
    ids_TK = xp.argsort(-scores_TE, axis=1)[:, :K]
    weights_TK = xp.take_along_axis(scores_TE, ids_TK, 1)
    weights_TK /= weights_TK.sum(1, keepdims=True)
    want_TH = xp.zeros_like(x_TH)
    for k in range(K):
        gate_up = xp.einsum("th,tnh->tn", y_TH, gate_up_E2IH[ids_TK[:, k]])
        h_TI = gate_up[:, :I] / (1 + xp.exp(-gate_up[:, :I])) * gate_up[:, I:]
        want_TH += weights_TK[:, k, None] * xp.einsum("ti,thi->th", h_TI, down_EHI[ids_TK[:, k]])
    away = float(xp.linalg.norm(out_TH - want_TH) / xp.linalg.norm(want_TH))
    name = xp.__name__
    print(f"{name}: {type(out_TH).__name__} {out_TH.shape}, {away:.0e} of the norm away from {name}'s own")
    assert away < 1e-5

    if name == "cupy":
        with xp.cuda.Stream(non_blocking=True) as stream:  # the ops run on it, in order with CuPy's kernels
            again_TH = block(x_TH + 0)
            stream.synchronize()
        print("the same bits on another stream:", bool((again_TH == out_TH).all()))


if __name__ == "__main__":
    main()
