"""Pages and images of runs."""

from __future__ import annotations

import itertools
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from mlxlm.errors import TrainingError, UsageError
from mlxlm.training.curves import plot_images, read_runs
from mlxlm.training.page import _ticks, page, write_page
from mlxlm.training.tracking import reporter


@pytest.fixture
def runs(tmp_path):
    for name, start in (("first", 4.0), ("second & <last>", 3.0)):
        rows = [
            {"step": s, "loss": start / s, "learning_rate": 0.1 / s, "tokens_per_second": 100.0 + s, "memory": 10**9}
            for s in range(1, 50)
        ]
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


def test_images_or_a_clear_word_about_what_they_need(runs, tmp_path):
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        with pytest.raises(UsageError, match=r"pip install .*plot"):
            plot_images(read_runs(runs), tmp_path)
        return
    files = plot_images(read_runs(runs), tmp_path / "png")
    assert [file.name for file in files] == ["loss.png", "learning_rate.png", "throughput.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)


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
