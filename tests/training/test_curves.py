"""Pages and images of runs."""

from __future__ import annotations

import itertools
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from types import SimpleNamespace

import pytest

from mlxlm.errors import TrainingError, UsageError
from mlxlm.training.curves import plot_images, read_runs
from mlxlm.training.page import _ticks, page, write_page
from mlxlm.training.tracking import reporter


@pytest.fixture
def runs(tmp_path):
    for name, start in (("first", 4.0), ("second & <last>", 3.0)):
        rows = [
            {"step": s, "loss": start / s, "learning_rate": start / 40 / s, "tokens_per_second": 99 * start + s}
            for s in range(1, 50)
        ]
        rows[-1]["memory"] = 10**9
        rows.append({"step": 49, "valid_loss": start / 40, "perplexity": 1.1})
        rows.append({"step": 50, "loss": None})
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [tmp_path / "first", tmp_path / "second & <last>"]


def test_the_page_needs_nothing_from_outside_and_draws_every_point(runs, tmp_path):
    text = write_page(read_runs(runs), tmp_path / "out" / "runs.html").read_text()
    assert not re.search(r"https?://|<script|<link|<img|@import|url\(", text)
    assert "second &amp; &lt;last&gt;" in text
    charts = [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text)]
    assert len(charts) == 4  # loss, validation loss, learning rate, throughput
    for chart, points in zip(charts, (49, 1, 49, 49), strict=True):
        lines = chart.findall("polyline")
        assert len(lines) == (2 if points > 1 else 0)
        assert all(len(line.get("points").split()) == points for line in lines)
        assert len(chart.findall("circle")) == (2 if points == 1 else 0)


def test_a_curve_stands_where_its_numbers_are(runs):
    svg = ET.fromstring(re.search(r"<svg.*?</svg>", page(read_runs(runs[:1])))[0])
    points = [tuple(map(float, pair.split(","))) for pair in svg.find("polyline").get("points").split()]
    assert all(a[0] < b[0] and a[1] < b[1] for a, b in itertools.pairwise(points))  # falls to the right
    labels = {t.text: float(t.get("y")) - 4 for t in svg.findall("text") if t.get("text-anchor") == "end"}
    assert points[0][1] == pytest.approx(labels["4"], abs=0.1)
    assert points[3][1] == pytest.approx(labels["1"], abs=0.1)


@pytest.mark.parametrize("ends", [(0, 1), (0.02, 0.021), (-3, 100000), (5, 5), (0, 0)], ids=str)
def test_ticks_are_round_and_cover_the_range(ends):
    ticks = _ticks(*ends)
    assert 3 <= len(ticks) <= 8
    assert ticks[0] <= ends[0] + 1e-9
    assert ticks[-1] >= ends[1] - 1e-9


def test_images_show_every_run_in_its_colour(runs, tmp_path):
    matplotlib = pytest.importorskip("matplotlib", reason="PNG files need matplotlib: pip install matplotlib")
    from matplotlib.image import imread

    files = plot_images(read_runs(runs), tmp_path / "png")
    assert [file.name for file in files] == ["loss.png", "learning_rate.png", "throughput.png"]
    for file in files:
        pixels = imread(file)[..., :3]
        assert pixels.shape == (540, 960, 3)
        for colour in ("C0", "C1"):
            near = abs(pixels - matplotlib.colors.to_rgb(colour)).max(-1) < 0.02
            # More than a legend's line: the curve reaches over most of the image's width.
            assert near.any(0).sum() > 200, (file.name, colour)


def test_images_without_matplotlib_are_refused_with_what_to_install(runs, tmp_path, monkeypatch):
    import sys

    for module in ("matplotlib.backends.backend_agg", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=r"pip install .*plot"):
        plot_images(read_runs(runs), tmp_path)


def test_runs_of_one_name_are_told_apart_and_folders_without_metrics_refused(runs, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "first").mkdir()
    Path(tmp_path / "other" / "first" / "metrics.jsonl").write_text((runs[0] / "metrics.jsonl").read_text())
    names = [run.name for run in read_runs([runs[0], tmp_path / "other" / "first"])]
    assert names == [f"{tmp_path.name}/first", "other/first"]
    with pytest.raises(TrainingError, match="can't be read"):
        read_runs([tmp_path / "nothing"])
    with pytest.raises(UsageError, match="given twice"):
        read_runs([runs[0], runs[0]])


class Run:
    """What a trainer shows of itself to reporters."""

    config = {"model": "tiny"}  # noqa: RUF012

    def __init__(self, step=0):
        self.progress = SimpleNamespace(step=step)

    class settings:
        """Of the run."""

        @staticmethod
        def to_json():
            return {"steps": 2}


def told(made):
    """A reporter that has been told of a short run."""
    made.on_start(Run())
    for step in (1, 2):
        made.on_metrics({"step": step, "loss": 4.0 / step, "tokens": 10 * step})
    made.on_evaluation({"step": 2, "valid_loss": 2.5, "perplexity": 12.2})
    made.on_end(Run())


def test_tensorboard_files_hold_what_was_told(tmp_path):
    """Read with the format's own protocol buffers."""
    pytest.importorskip("tensorboardX", reason="the reporter 'tensorboard' needs tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    told(reporter("tensorboard", tmp_path))
    found = {}
    for content in records(tmp_path / "tensorboard"):
        event = Event.FromString(content)
        found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
    assert found == pytest.approx({
        ("train/loss", 1): 4.0, ("train/tokens", 1): 10, ("train/loss", 2): 2.0, ("train/tokens", 2): 20,
        ("valid/valid_loss", 2): 2.5, ("valid/perplexity", 2): 12.2,
    })  # fmt: skip


def test_a_resumed_run_tells_tensorboard_to_hide_what_came_after_its_checkpoint(tmp_path):
    pytest.importorskip("tensorboardX", reason="the reporter 'tensorboard' needs tensorboardX")
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    made = reporter("tensorboard", tmp_path)
    made.on_start(Run(7))
    made.on_metrics({"step": 8, "loss": 1.0})
    made.on_end(Run(8))
    events = [Event.FromString(content) for content in records(tmp_path / "tensorboard")]
    (start,) = [event for event in events if event.session_log.status == SessionLog.START]
    assert start.step == 8


def records(folder):
    """The records of the only file in a folder: length, checksum, event, checksum."""
    (file,) = folder.iterdir()
    content = file.read_bytes()
    while content:
        size = int.from_bytes(content[:8], "little")
        yield content[12 : 12 + size]
        content = content[16 + size :]


def test_wandb_is_told_the_same_offline(tmp_path, monkeypatch):
    """A real run in offline mode; what was logged last is its summary."""
    wandb = pytest.importorskip("wandb", reason="the reporter 'wandb' needs wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    made, kept = reporter("wandb", tmp_path), {}
    end = made.on_end

    def look(trainer):
        made.on_metrics({"step": 3, "tokens": 30})  # a step is closed by the next one
        kept.update(summary=dict(made._run.summary), config=dict(made._run.config), name=made._run.name)
        end(trainer)

    monkeypatch.setattr(made, "on_end", look)
    told(made)
    assert wandb.run is None
    assert kept["name"] == tmp_path.name
    assert kept["config"] == {"settings": {"steps": 2}, "model": "tiny"}
    logged = {name: value for name, value in kept["summary"].items() if "/" in name}
    assert logged == {"train/loss": 2.0, "train/tokens": 20, "valid/valid_loss": 2.5, "valid/perplexity": 12.2}
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_services_that_are_not_installed_are_named(name, tmp_path, monkeypatch):
    import sys

    for module in ("wandb", "tensorboardX", "torch", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match="pip install"):
        reporter(name, tmp_path)


def test_an_unknown_reporter_is_refused(tmp_path):
    with pytest.raises(UsageError, match="did you mean 'wandb'"):
        reporter("wandbb", tmp_path)
