"""Which instructions a kernel is for: without them it computes the right thing another way, and nobody would see."""

from __future__ import annotations

# Beginnings of opcodes, per file and function. HMMA.16816: mma.sync; LDGSTS: cp.async; LDSM: ldmatrix; HGMMA: wgmma;
# UTMALDG: a tensor map's copy (TMA); SYNCS: mbarrier; USETMAXREG: setmaxnreg.
PORTABLE_GEMM = ("HMMA.16816.F32.BF16", "LDGSTS.E.BYPASS.128", "LDSM.16")
HOPPER_GEMM = ("HGMMA.64x", "UTMALDG.2D", "SYNCS.PHASECHK", "USETMAXREG")
EXPECTED: dict[str, dict[str, tuple[str, ...]]] = {
    "grouped_gemm.cu": {
        "forward_mma": PORTABLE_GEMM,
        "dgrad_mma": (*PORTABLE_GEMM, "LDSM.16.MT88"),
        "wgrad_mma": (*PORTABLE_GEMM, "LDSM.16.MT88"),
    },
    "sm90/grouped_gemm.cu": {"forward_wgmma": HOPPER_GEMM},
}

# Of no kernel: sums whose order is the hardware's, and approximations where the contract is a polynomial in FMAs.
# MUFU.RCP and RSQ stay: an exact quotient or root begins with them.
FORBIDDEN = {
    r"(RED|ATOM|ATOMG|ATOMS)\..*\b(F32|F64|F16|BF16)": "a floating-point atomic: its order is the hardware's",
    r"MUFU\.(EX2|LG2|SIN|COS|TANH)": "an approximation of the hardware's: gx/math.h has the contract's polynomials",
}
