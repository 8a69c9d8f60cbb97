"""gx.h lists what a kernel may call: each implementation has every name of the list, used by a kernel or not."""

from __future__ import annotations

import re

import pytest

from tests.gates.kernels import GPU

GX = GPU / "gx"


def names(header: str) -> set[str]:
    """`gx::shuffle(T v, int source)`, and the names of fragments, which stand without it."""
    text = "\n".join(line for line in (GX / header).read_text().splitlines() if line.startswith("//"))
    return set(re.findall(r"gx::(\w+)", text)) | set(re.findall(r"\b(?:load_[ab]\w*|Frag[ABC]|mma)\b", text))


@pytest.mark.parametrize("backend", ["cuda", "hip", "simt"])
def test_every_backend_has_every_name(backend):
    code = "".join(
        path.read_text()
        for path in (GX / "gx.h", GX / "common.h", GX / "fragments.h", *sorted(GX.glob(f"{backend}*.h")))
    )
    code = re.sub(r"//[^\n]*", "", code)
    listed = names("gx.h")
    assert len(listed) > 25
    missing = sorted(name for name in listed if not re.search(rf"\b{name}\b", code))
    assert not missing, f"gx/{backend}.h lacks {', '.join(missing)}"


@pytest.mark.parametrize("path", sorted(GX.glob("hopper_*.h")), ids=lambda path: path.name)
def test_hoppers_half(path):
    """HIP has none: there the kernels that use it are empty."""
    code = re.sub(r"//[^\n]*", "", path.read_text())
    listed = names("hopper.h") - {"barrier"}
    assert len(listed) > 10
    missing = sorted(name for name in listed if not re.search(rf"\b{name}\b", code))
    assert not missing, f"gx/{path.name} lacks {', '.join(missing)}"
