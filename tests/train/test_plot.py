from __future__ import annotations

import json
import struct

import numpy as np
import pytest

from glmx.errors import ConfigError
from glmx.train import plot

pytest.importorskip("matplotlib")


def write_log(path, steps=40, *, mtp=True, mtp_steps=1, layers=2, heldout=True, kl=False, tail=""):
    lines = []
    for s in range(1, steps + 1):
        load = [[10 + e for e in range(4)] for _ in range(layers)]
        lines.append(
            {
                "step": s, "tokens": s * 1000, "loss": 8 / s + 3, "mtp_loss": 9 / s + 3 if mtp else None,
                "mtp_step_losses": [9 / s + 3] * mtp_steps if mtp else None,
                "aux_loss": 1.0, "indexer_kl": 2 / s if kl else None,
                "lr": 1e-3, "grad_norm": 1.0, "tokens_per_s": 5000.0, "time_s": 0.2 * s,
                "max_vio": [max(x) / np.mean(x) - 1 for x in load], "expert_load": load,
            }
        )  # fmt: skip
        if heldout and s % 10 == 0:
            lines.append({"step": s, "tokens": s * 1000, "heldout_loss": 8 / s + 3.1, "heldout_bpb": 2 + 1 / s})
    path.write_text("".join(json.dumps(x) + "\n" for x in lines) + tail)
    return path


def png_size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mtp": False, "layers": 0, "heldout": False},
        {"steps": 1},
        {"steps": 700, "tail": '{"step": 701, "l'},
    ],
    ids=str,
)
def test_every_kind_of_run_has_its_picture(tmp_path, options):
    log = write_log(tmp_path / "log.jsonl", **options)
    out = plot.plot_run(log, tmp_path / "deep" / "run.png", title="a run", baselines={"gzip -9": 2.2, "xz -9": 2.19})
    assert png_size(out) == (1400, 900)
    assert [p.name for p in out.parent.iterdir()] == ["run.png"]


def figure_of(log, **options):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 9))
    FigureCanvasAgg(figure)
    accepted, decoding = options.pop("accepted", ()), options.pop("decoding", ())
    plot._draw(figure, *plot.read_log(log), "", options, accepted=accepted, decoding=decoding)
    return figure


def test_the_picture_shows_the_logs_numbers(tmp_path):
    figure = figure_of(write_log(tmp_path / "log.jsonl"), gzip=2.2)
    by_title = {a.get_title(loc="left"): a for a in figure.axes}
    loss = by_title["Loss, nats per token"]
    labels = [t.get_text() for t in loss.get_legend().get_texts()]
    assert len(labels) == 3 and labels[2] == "held out  3.300"
    raw = loss.lines[0]
    assert raw.get_xdata()[-1] == 40 and raw.get_ydata()[-1] == pytest.approx(3.2)
    bits = by_title["Held-out text, bits per byte"]
    assert bits.lines[0].get_ydata().tolist() == pytest.approx([2.1, 2.05, 2 + 1 / 30, 2.025])
    assert bits.get_title(loc="right") == "2.025" and "gzip  2.200" in [t.get_text() for t in bits.texts]
    experts = by_title["Expert load / mean load, per MoE layer"]
    picture = experts.images[0].get_array()
    assert picture.shape == (8, 40) and picture[:4, 0].tolist() == pytest.approx(np.arange(10, 14) / 11.5)
    assert [t.get_text() for t in experts.get_yticklabels()] == ["MoE 1", "MTP"]
    assert [t.get_text() for t in experts.texts][:2] == ["0.13", "0.13"]


@pytest.mark.parametrize("kl", [True, False])
def test_accepted_drafts_have_a_panel_that_leaves_the_others_their_place(tmp_path, kl):
    log = write_log(tmp_path / "log.jsonl", kl=kl, mtp_steps=3)
    figure = figure_of(log, accepted=(0.5, 0.25, 0.125))
    by_title = {a.get_title(loc="left"): a for a in figure.axes}
    drafts = by_title["Accepted drafts"]
    assert [bar.get_height() for bar in drafts.patches] == [0.5, 0.25, 0.125]
    assert [t.get_text() for t in drafts.texts] == ["50%", "25%", "12%", "1.88 tokens per forward"]
    labels = [t.get_text() for t in by_title["Loss, nats per token"].get_legend().get_texts()]
    assert labels[1].startswith("MTP (mean of 3 steps)")
    assert ("Indexer KL, nats" in by_title) == kl
    top = sorted((a.get_position() for a in figure.axes if a.get_position().y0 > 0.5), key=lambda box: box.x0)
    assert len(top) == 3 + kl and all(a.x1 < b.x0 for a, b in zip(top, top[1:], strict=False)) and top[-1].x1 < 1
    assert "Accepted drafts" not in {a.get_title(loc="left") for a in figure_of(log).axes}


def test_decoding_speed_stands_above_the_bars(tmp_path):
    log = write_log(tmp_path / "log.jsonl", kl=True)
    figure = figure_of(log, accepted=(1.0, 0.25), decoding=(1234.4, 600.0, 1230.0))
    drafts = next(a for a in figure.axes if a.get_title(loc="left") == "Accepted drafts")
    words = drafts.texts[-1]
    assert words.get_text().splitlines() == [
        "2.25 tokens per forward", "decoding, tokens/s", "1,234 without drafts", "600 with one", "1,230 adapted",
    ]  # fmt: skip
    figure.canvas.draw()
    box, panel = words.get_window_extent(), drafts.get_window_extent()
    assert box.x0 >= panel.x0 and box.y0 > drafts.texts[0].get_window_extent().y1


def test_smoothing_has_no_lag_and_keeps_gaps():
    line = np.arange(1000.0)
    assert plot._smooth(line)[:980] == pytest.approx(line[:980])
    gap = np.array([1.0, np.nan, 1.0])
    assert np.isnan(plot._smooth(gap)).tolist() == [False, True, False]


def test_broken_logs_are_named(tmp_path):
    log = tmp_path / "log.jsonl"
    with pytest.raises(ConfigError, match="cannot read the run's log"):
        plot.read_log(log)
    log.write_text('{"step": 1, "lo')
    with pytest.raises(ConfigError, match="no training step"):
        plot.read_log(log)
    log.write_text('{"step": 1, "lo\n{"step": 2, "loss": 1}\n')
    with pytest.raises(ConfigError, match="line 1 is not JSON"):
        plot.read_log(log)
