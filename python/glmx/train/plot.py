"""One picture of a run, from its log.jsonl.

    plot_run(out / "log.jsonl", out / "run.png", baselines={"gzip -9 per file": 2.14, "token 5-gram": 1.58})

Panels: losses, held-out bits per byte beside the baselines, the indexers' KL where there is one, load of every
expert, learning rate and gradient norm, throughput; all over the tokens trained on. Beside them, where it was measured,
the share of the MTP layer's drafts that decoding accepts. Fields of the log: see train/loop.py. Needs matplotlib
(`glmx[train]`).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from glmx.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT, DPI = 1400, 900, 100
# Columns of the expert-load picture: each a mean over steps, and a few pixels wide.
HEAT_COLUMNS = 150
MAIN, MTP, HELDOUT, MUTED, INK = "#1f5fa8", "#d98324", "#b3202c", "#8a8f98", "#22262b"
# Left, bottom, width, height of each panel, as shares of the picture: its size is fixed, so is its layout.
PANELS = {
    "loss": (0.045, 0.545, 0.50, 0.355),
    "heldout": (0.60, 0.545, 0.385, 0.355),
    "experts": (0.055, 0.07, 0.37, 0.365),
    "experts_bar": (0.470, 0.07, 0.008, 0.365),
    "rate": (0.545, 0.07, 0.175, 0.365),
    "speed": (0.805, 0.07, 0.18, 0.365),
}
# Where indexers are trained, their panel takes its place from the two above.
INDEXER_PANELS = {
    "loss": (0.045, 0.545, 0.40, 0.355),
    "heldout": (0.49, 0.545, 0.265, 0.355),
    "indexer": (0.80, 0.545, 0.185, 0.355),
}
# Where drafts were measured, theirs is the last above: without indexers and with them.
DRAFT_PANELS = {
    "loss": (0.045, 0.545, 0.39, 0.355),
    "heldout": (0.485, 0.545, 0.29, 0.355),
    "drafts": (0.835, 0.545, 0.15, 0.355),
}
INDEXER_DRAFT_PANELS = {
    "loss": (0.045, 0.545, 0.305, 0.355),
    "heldout": (0.395, 0.545, 0.235, 0.355),
    "indexer": (0.68, 0.545, 0.145, 0.355),
    "drafts": (0.87, 0.545, 0.115, 0.355),
}
BASELINE_STYLES = ((0, (1, 1.5)), (0, (4, 2)), (0, (6, 2, 1, 2)), "-")


def require_matplotlib() -> None:
    """Raises UnsupportedError without matplotlib: for a command to call before its work, at whose end it plots."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as e:
        raise UnsupportedError("plots need matplotlib: pip install 'glmx[train]'") from e


def plot_run(
    log: str | os.PathLike[str],
    png: str | os.PathLike[str],
    *,
    title: str = "",
    baselines: Mapping[str, float] | None = None,
    dense_tokens: int = 0,
    accepted: Sequence[float] = (),
    decoding: Sequence[float] = (),
) -> Path:
    """Draw `log` into `png` (1400 x 900). `baselines`: name -> bits per byte. `dense_tokens`: where sparse attention
    began. `accepted`: shares of places at which drafts 1 .. j of the MTP layer are accepted. `decoding`, with them:
    tokens per second without drafts, with one, with an adapted number. Returns the path.

    Raises ConfigError when the log is missing or has no step yet, UnsupportedError without matplotlib.
    """
    steps, heldout = read_log(log)
    require_matplotlib()
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # The picture must not depend on the user's matplotlibrc.
    style: Any = {
        "font.family": "DejaVu Sans", "font.size": 10, "axes.titlesize": 11, "axes.titleweight": "bold",
         "axes.edgecolor": MUTED, "axes.labelcolor": INK, "text.color": INK,
        "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False,
        "axes.grid": True, "grid.color": "#e4e6ea", "grid.linewidth": 0.8, "axes.axisbelow": True,
        "legend.frameon": False, "legend.fontsize": 9.5,
    }  # fmt: skip
    with rc_context(style):
        figure = Figure(figsize=(WIDTH / DPI, HEIGHT / DPI), dpi=DPI, facecolor="white")
        FigureCanvasAgg(figure)
        _draw(figure, steps, heldout, title, dict(baselines or {}), dense_tokens, accepted, decoding)
        path = Path(png)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".tmp-{path.name}")
        figure.savefig(temporary, format="png", dpi=DPI)
        os.replace(temporary, path)
    return path


def read_log(log: str | os.PathLike[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Step records and held-out records of a log.jsonl. A last line cut short by a kill is left out."""
    path = Path(log)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as e:
        raise ConfigError(f"{path}: cannot read the run's log: {e.strerror}") from e
    steps, heldout = [], []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError as e:
            if number == len(lines):
                break
            raise ConfigError(f"{path}: line {number} is not JSON: {line[:60]!r}") from e
        if "heldout_loss" in record:
            heldout.append(record)
        elif "loss" in record:
            steps.append(record)
    if not steps:
        raise ConfigError(f"{path}: no training step in the run's log")
    return steps, heldout


def _draw(
    figure: Figure,
    steps: list[dict[str, Any]],
    heldout: list[dict[str, Any]],
    title: str,
    baselines: dict[str, float],
    dense_tokens: int = 0,
    accepted: Sequence[float] = (),
    decoding: Sequence[float] = (),
) -> None:
    tokens = _column(steps, "tokens")
    unit, name = (1e9, "billion") if tokens[-1] >= 1e9 else (1e6, "million") if tokens[-1] >= 1e5 else (1e3, "thousand")
    x = tokens / unit
    has_kl = bool(np.isfinite(_column(steps, "indexer_kl")).any())
    if accepted:
        places = PANELS | (INDEXER_DRAFT_PANELS if has_kl else DRAFT_PANELS)
    else:
        places = PANELS | (INDEXER_PANELS if has_kl else {})
    panels = {key: figure.add_axes(place) for key, place in places.items()}
    bar = panels.pop("experts_bar")
    if accepted:
        _drafts(panels.pop("drafts"), accepted, decoding)
    _losses(panels["loss"], x, steps, heldout, unit)
    _bits_per_byte(panels["heldout"], heldout, unit, baselines)
    if has_kl:
        _indexer(panels["indexer"], x, steps, dense_tokens / unit)
    _experts(panels["experts"], bar, x, steps)
    _rate(panels["rate"], x, steps)
    _speed(panels["speed"], x, steps)
    for key, axes in panels.items():
        if key != "experts":
            axes.set_xlim(0, x[-1] * 1.02)
        axes.set_xlabel(f"{name} tokens")
    seconds = steps[-1].get("time_s")
    facts = [f"{len(steps):,} steps", f"{int(tokens[-1]):,} tokens"]
    if seconds:
        facts.append(f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h")
    figure.suptitle(
        f"{title}   " * bool(title) + " · ".join(facts), x=0.045, y=0.975, ha="left", fontsize=13, fontweight="bold"
    )


def _losses(axes: Axes, x: np.ndarray, steps: list[dict], heldout: list[dict], unit: float) -> None:
    axes.set_title("Loss, nats per token", loc="left")
    mtp_steps = len(steps[-1].get("mtp_step_losses") or [0])
    mtp_label = "MTP (token after next)" if mtp_steps == 1 else f"MTP (mean of {mtp_steps} steps)"
    series = [("loss", "main (next token)", MAIN), ("mtp_loss", mtp_label, MTP)]
    tops = []
    for key, label, color in series:
        y = _column(steps, key)
        if np.isfinite(y).any():
            smooth = _smooth(y)
            axes.plot(x, y, color=color, alpha=0.25, linewidth=0.8)
            axes.plot(x, smooth, color=color, linewidth=1.8, label=f"{label}  {smooth[-1]:.3f}")
            tops.append(y)
    if heldout:
        y = _column(heldout, "heldout_loss")
        axes.plot(
            _column(heldout, "tokens") / unit, y, "o", color=HELDOUT, markersize=5, markeredgecolor="white",
            label=f"held out  {y[-1]:.3f}", zorder=5,
        )  # fmt: skip
        tops.append(y)
    # The first steps fall from log(vocabulary); the rest of the run deserves the height.
    values = np.concatenate([t[np.isfinite(t)] for t in tops])
    low, high = float(values.min()), float(values.max())
    settled = float(np.quantile(values, 0.98))
    if high - settled > 0.35 * (settled - low) > 0:
        high = settled + 0.35 * (settled - low)
    axes.set_ylim(low - 0.05 * (high - low or 1), high + 0.03 * (high - low or 1))
    axes.legend(loc="upper right")


def _bits_per_byte(axes: Axes, heldout: list[dict], unit: float, baselines: dict[str, float]) -> None:
    axes.set_title("Held-out text, bits per byte", loc="left")
    y = _column(heldout, "heldout_bpb")
    good = np.isfinite(y)
    shown = list(baselines.values())
    if good.any():
        x = _column(heldout, "tokens")[good] / unit
        y = y[good]
        axes.plot(x, y, "o-", color=HELDOUT, markersize=5, markeredgecolor="white", linewidth=1.6, zorder=5)
        axes.set_title(f"{y[-1]:.3f}", loc="right", color=HELDOUT)
        # The untrained model's figure says nothing; keep the window around the baselines and the trained model.
        top = max([*shown, float(y[-1])]) * 1.6
        shown += [float(v) for v in y if v <= top] or [float(y[-1])]
    elif not shown:
        axes.text(0.5, 0.5, "not measured in this run", transform=axes.transAxes, ha="center", color=MUTED)
    if shown:
        low, high = min(shown), max(shown)
        pad = 0.1 * (high - low) or 0.1
        axes.set_ylim(low - pad, high + pad)
        _baseline_lines(axes, baselines, float(y[-1]) if good.any() else math.inf)


def _baseline_lines(axes: Axes, baselines: dict[str, float], reached: float) -> None:
    """Lines with their names, which move up when they would overlap.

    A name stands where the falling curve is not: at the right above the last figure, at the left below it.
    """
    low, high = axes.get_ylim()
    line_height = (high - low) / 22  # of the panel's height at this font size
    taken = low - line_height
    for i, (name, value) in enumerate(sorted(baselines.items(), key=lambda item: item[1])):
        axes.axhline(value, color=INK, linewidth=1, linestyle=BASELINE_STYLES[i % len(BASELINE_STYLES)], alpha=0.7)
        place = max(value + 0.2 * line_height, taken + line_height)
        taken = place
        axes.text(
            0.985 if value > reached else 0.015, place, f"{name}  {value:.3f}", va="bottom",
            ha="right" if value > reached else "left", transform=axes.get_yaxis_transform(), fontsize=9,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.75}, zorder=4,
        )  # fmt: skip


def _indexer(axes: Axes, x: np.ndarray, steps: list[dict], sparse_from: float) -> None:
    """Two quantities where attention was dense at first: over all keys, then over the selected ones."""
    axes.set_title("Indexer KL, nats", loc="left")
    kl = _column(steps, "indexer_kl")
    # The mean of a window must not reach over the switch from one to the other.
    smooth = np.concatenate([_smooth(part) for part in (kl[x <= sparse_from], kl[x > sparse_from])])
    axes.plot(x, kl, color=MAIN, alpha=0.25, linewidth=0.8)
    axes.plot(x, smooth, color=MAIN, linewidth=1.8)
    axes.set_title(f"{smooth[-1]:.3f}", loc="right", color=MAIN)
    axes.set_ylim(0, float(np.nanquantile(kl, 0.99)) * 1.1 or 1)
    if 0 < sparse_from < x[-1]:
        axes.axvline(sparse_from, color=INK, linewidth=1, linestyle=(0, (1, 1.5)), alpha=0.7)
        axes.text(
            sparse_from + 0.02 * x[-1], 0.96, "over the selected keys", transform=axes.get_xaxis_transform(),
            va="top", fontsize=9,
        )  # fmt: skip


def _experts(axes: Axes, bar: Axes, x: np.ndarray, steps: list[dict]) -> None:
    """Every expert of every MoE layer as a row: its load over the mean load of its layer."""
    axes.set_title("Expert load / mean load, per MoE layer", loc="left")
    axes.grid(False)
    loads = [s.get("expert_load") or [] for s in steps]
    if not loads[-1]:
        axes.text(0.5, 0.5, "no MoE layers in the log", transform=axes.transAxes, ha="center", color=MUTED)
        bar.set_visible(False)
        return
    table = np.array([[e for layer in step for e in layer] for step in loads], np.float64)
    sizes = [len(layer) for layer in loads[-1]]
    starts = np.cumsum([0, *sizes])
    for a, b in zip(starts, starts[1:], strict=False):
        table[:, a:b] /= np.maximum(table[:, a:b].mean(axis=1, keepdims=True), 1e-9)
    # Columns are equal steps in tokens; a short run has one per step.
    columns = min(HEAT_COLUMNS, len(steps))
    edges = np.linspace(0, len(steps), columns + 1).astype(int)
    picture = np.stack([table[a:b].mean(axis=0) for a, b in zip(edges, edges[1:], strict=False)], axis=1)
    image = axes.imshow(
        picture, aspect="auto", interpolation="nearest", cmap="RdBu_r", vmin=0, vmax=2,
        extent=(0, float(x[-1]), float(starts[-1]), 0),
    )  # fmt: skip
    for border in starts[1:-1]:
        axes.axhline(border, color="white", linewidth=3)
    has_mtp = steps[-1].get("mtp_loss") is not None
    names = [f"MoE {i + 1}" for i in range(len(sizes))]
    if has_mtp:
        names[-1] = "MTP"
    axes.set_yticks((starts[:-1] + starts[1:]) / 2, names)
    axes.tick_params(axis="y", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    late = steps[-max(1, len(steps) // 5) :]
    violations = np.array([s["max_vio"] for s in late], np.float64).mean(axis=0) if late[0].get("max_vio") else []
    for i, value in enumerate(violations):
        axes.text(
            1.01, (starts[i] + starts[i + 1]) / 2, f"{value:.2f}", transform=axes.get_yaxis_transform(), va="center",
            fontsize=9,
        )  # fmt: skip
    if len(violations):
        axes.text(
            1.0, 1.02, "MaxVio, last 20 %", transform=axes.transAxes, fontsize=8.5, color=MUTED, ha="right", va="bottom"
        )
    bar.imshow(np.linspace(2, 0, 200)[:, None], aspect="auto", cmap=image.get_cmap(), extent=(0, 1, 0, 2))
    bar.set_xticks([])
    bar.set_yticks([0, 0.5, 1, 1.5, 2], ["0", "0.5", "1", "1.5", "≥ 2"], fontsize=9)
    bar.yaxis.tick_right()
    bar.grid(False)
    for spine in bar.spines.values():
        spine.set_visible(False)


def _rate(axes: Axes, x: np.ndarray, steps: list[dict]) -> None:
    axes.set_title("Learning rate", loc="left", color=MAIN)
    rate = _column(steps, "lr")
    axes.plot(x, rate, color=MAIN, linewidth=1.8)
    axes.set_ylim(0, float(np.nanmax(rate)) * 1.08 or 1)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    norms = _column(steps, "grad_norm")
    if np.isfinite(norms).any():
        other = axes.twinx()
        other.plot(x, norms, color=MUTED, linewidth=0.8, alpha=0.8)
        other.set_ylim(0, float(np.nanquantile(norms, 0.99)) * 1.6 or 1)
        other.set_title("gradient norm", loc="right", color=MUTED, fontweight="normal", fontsize=10)
        other.grid(False)
        other.tick_params(axis="y", colors=MUTED)
        axes.set_zorder(other.get_zorder() + 1)
        axes.patch.set_visible(False)


def _speed(axes: Axes, x: np.ndarray, steps: list[dict]) -> None:
    axes.set_title("Throughput, tokens/s", loc="left")
    speed = _column(steps, "tokens_per_s")
    axes.plot(x, speed, color=MAIN, alpha=0.3, linewidth=0.8)
    axes.plot(x, _smooth(speed), color=MAIN, linewidth=1.8)
    if np.isfinite(speed).any():
        middle = float(np.nanmedian(speed))
        axes.axhline(middle, color=MUTED, linestyle=(0, (4, 2)), linewidth=1)
        axes.set_ylim(0, max(float(np.nanquantile(speed, 0.99)), middle) * 1.25 or 1)
        axes.text(0.98, 0.04, f"median {middle:,.0f}", transform=axes.transAxes, ha="right", fontsize=9.5)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def _drafts(axes: Axes, accepted: Sequence[float], decoding: Sequence[float]) -> None:
    """A bar per draft position; above them what that makes of the decoding speed."""
    axes.set_title("Accepted drafts", loc="left", color=MTP)
    places = range(1, len(accepted) + 1)
    axes.bar(places, accepted, color=MTP, width=0.62)
    for place, share in zip(places, accepted, strict=True):
        axes.text(place, share + 0.015, f"{share:.0%}", ha="center", va="bottom", fontsize=9.5)
    lines = [f"{1 + sum(accepted):.2f} tokens per forward"]
    if decoding:
        plain, one, auto = decoding
        lines += ["decoding, tokens/s", f"{plain:,.0f} without drafts", f"{one:,.0f} with one", f"{auto:,.0f} adapted"]
    axes.text(
        0.98, 0.985, "\n".join(lines), transform=axes.transAxes, ha="right", va="top", fontsize=9, linespacing=1.15
    )
    axes.set_ylim(0, 1.5 if decoding else 1.3)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
    axes.set_xticks(places, [str(place) for place in places])
    axes.set_xlabel("draft (held-out text)")
    axes.grid(axis="x", visible=False)


def _column(records: Sequence[dict[str, Any]], key: str) -> np.ndarray:
    """One field as float64, NaN where it is missing or null."""
    return np.array([np.nan if r.get(key) is None else r[key] for r in records], np.float64)


def _smooth(y: np.ndarray) -> np.ndarray:
    """Mean over a window of about 2 % of the run, narrower at its start where the curve is steep; no lag."""
    good = np.isfinite(y)
    sums = np.concatenate([[0.0], np.cumsum(np.where(good, y, 0.0))])
    counts = np.concatenate([[0], np.cumsum(good)])
    place = np.arange(len(y))
    half = np.minimum(0.01 * len(y), 0.1 * place).astype(int)
    a, b = place - half, np.minimum(place + half + 1, len(y))
    return np.where(good, (sums[b] - sums[a]) / np.maximum(counts[b] - counts[a], 1), np.nan)
