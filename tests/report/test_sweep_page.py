"""The page of a sweep: hostile names, missing values, order, links, and plots."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from llavactl.report import sweep_page as module
from llavactl.report.plots import LIGHT, CostPoint, draw_costs
from llavactl.report.sweep_page import comparison_table, sweep_page, variant_table

HOSTILE = "</td><script>alert(1)</script><img src=x onerror=alert(1)>"


def run(seed: int, state: str = "finished", error: str = "", run_dir: str = "/nowhere/run") -> dict[str, Any]:
    return {
        "seed": seed, "run_dir": run_dir, "state": state, "error": error, "scores": {}, "intervals": {},
        "val_loss": 1.5, "image_tokens": 4, "trainable_parameters": {}, "tokens": {},
        "seconds": {"stage1": 65.0, "extract": None}, "feature_bytes": None,
        "shared": {"stage1": "other"} if seed else {},
    }  # fmt: skip


def variant(name: str, mean: float | None, **more: Any) -> dict[str, Any]:
    spread = {"mean": mean, "sd": None, "n": 1, "interval": (mean - 5, mean + 5)} if mean is not None else None
    costs = {
        "image_tokens": 64.0,
        "trainable_parameters": 2.5e6,
        "tokens": 1200.0,
        "seconds": 95.0,
        "feature_bytes": 3e7,
    }
    scores = {"scenes": {"accuracy": spread, "unparsed": {**spread, "interval": None}}} if spread else {}
    return {
        "name": f"connector={name}",
        "axes": {"connector.name": name},
        "runs": [run(0)],
        "scores": scores,
        **costs,
        **more,
    }


def pair(a: str, b: str, difference: float, p: float) -> dict[str, Any]:
    return {
        "a": a, "b": b, "difference": difference, "interval": (difference - 1, difference + 2), "only_a": 1,
        "only_b": 2, "p": p, "task": "scenes", "seeds": (0,), "p_holm": min(1.0, 3 * p),
    }  # fmt: skip


def report(*variants: dict[str, Any], comparisons: tuple[dict[str, Any], ...] = (), **more: Any) -> dict[str, Any]:
    return {
        "name": "toy", "folder": "/nowhere", "axes": {"connector.name": ("linear",)},
        "names": {"connector.name": "connector"}, "seeds": (0,), "variants": variants,
        "comparisons": comparisons, "main_scores": {"scenes": "accuracy"},
        "computed": {"extract": 1, "stage1": 2}, "seconds": {"computed": 100.0, "without_sharing": 300.0},
        "failed": 0, "report": "/nowhere/report.html", "dry_run": False, **more,
    }  # fmt: skip


class Tags(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.sources: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "srcset")]
        self.links += [value or "" for name, value in attrs if name == "href"]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_hostile_text_is_escaped() -> None:
    failed = variant(HOSTILE, None, runs=[run(0, "failed", HOSTILE)])
    page = Tags(sweep_page(report(variant("linear", 50.0), failed, comparisons=(pair(HOSTILE, "b", 1.0, 0.5),))))
    assert "script" not in page.names
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert HOSTILE in page.text


def test_the_best_variant_is_first_and_one_without_score_last() -> None:
    columns, rows = variant_table(report(variant("a", 50.0), variant("b", None), variant("c", 70.0)))
    assert [row[0] for row in rows] == ["c", "a", "b"]
    assert all(len(row) == len(columns) for row in rows)
    assert rows[0][1:4] == ("70.0", "65.0 to 75.0", "64")
    assert rows[0][4:] == ("2.5 M", "1.2 k", "1 min 35 s", "30.0 MB")


def test_the_standard_deviation_is_a_column_with_several_seeds() -> None:
    columns, rows = variant_table(report(variant("a", 50.0), seeds=(0, 1)))
    assert rows[0][columns.index("sd")] == "–"


def test_a_difference_is_positive_with_the_better_variant_first() -> None:
    table = comparison_table(report(comparisons=(pair("a", "b", -3.0, 0.2), pair("a", "c", 2.0, 1e-6))), "scenes")
    assert table is not None
    assert [row.name for row in table.rows] == ["c – a", "a – b"]
    assert table.rows[0].cells == ("2.0", "1.0 to 4.0", "1.0e-06", "3.0e-06")
    assert table.rows[1].cells == ("3.0", "1.0 to 4.0", "0.200", "0.600")
    assert comparison_table(report(), "scenes") is None


def test_runs_link_to_their_pages(tmp_path: Path) -> None:
    folder = tmp_path / "connector=a b,seed=0"
    folder.mkdir()
    (folder / "report.html").write_text("")
    page = Tags(sweep_page(report(variant("a", 1.0, runs=[run(0, run_dir=str(folder)), run(1, "pending")]))))
    assert page.links == ["connector%3Da%20b%2Cseed%3D0/report.html"]
    assert "pending" in page.text


@pytest.mark.parametrize("variants", [(), (variant("a", None),), (variant("a", 1.0),)])
def test_pages_of_unfinished_sweeps(variants: tuple[dict[str, Any], ...]) -> None:
    scores = {} if not variants or not variants[0]["scores"] else {"scenes": "accuracy"}
    assert "Variants" in Tags(sweep_page(report(*variants, main_scores=scores))).text


def test_only_costs_that_differ_are_plotted(monkeypatch: pytest.MonkeyPatch) -> None:
    variants = (variant("a", 50.0), variant("b", 60.0, seconds=50.0, image_tokens=16.0))
    page = Tags(sweep_page(report(*variants)))
    assert len(page.sources) == 2 * 2  # seconds and tokens per image, light and dark
    monkeypatch.setattr(module, "plots_available", lambda: False)
    page = Tags(sweep_page(report(*variants)))
    assert page.sources == []
    assert "matplotlib" in page.text


def test_points_have_the_colors_of_the_first_axis() -> None:
    import io

    import numpy as np
    from PIL import Image

    def colors(*points: CostPoint) -> set[tuple[int, ...]]:
        png = draw_costs(points, "cost", "score", LIGHT)
        return set(map(tuple, np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).reshape(-1, 3).tolist()))

    first, second = (tuple(bytes.fromhex(color[1:])) for color in LIGHT.series[:2])
    one, other = CostPoint(1, 50, (40, 60), "a", "x"), CostPoint(2, 60, None, "b", "x")
    assert {first, second} <= colors(one, other)
    assert second not in colors(one)
    many = [CostPoint(at, at, None, str(at), str(at)) for at in range(20)]  # more than there are colors and markers
    assert colors(*many)
