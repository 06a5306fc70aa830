"""What a comparison of two runs names as different, and what its page shows."""

from __future__ import annotations

import json
import re
from pathlib import Path

from posttrain.api.training_run import TrainingRun
from posttrain.local.compare import Difference, Side, differences, outcomes, read_side, write_comparison
from tests.support.recorded_run import build_recorded_run, write_recorded_storage


def _sides(tmp_path: Path) -> tuple[Side, Side]:
    write_recorded_storage(tmp_path / "first")
    write_recorded_storage(tmp_path / "second", learning_rate=1e-4, seed=3, floor=0.5)
    return (
        read_side(build_recorded_run(), storage=tmp_path / "first"),
        read_side(build_recorded_run("stratos-hot", learning_rate=1e-4), storage=tmp_path / "second"),
    )


def test_a_changed_argument_is_named_once(tmp_path: Path) -> None:
    first, second = _sides(tmp_path)
    assert differences(first, second=second) == [
        Difference(section="Spec", name="spec.sft.args.learning_rate", first="4e-05", second="0.0001")
    ]


def test_equal_runs_differ_in_nothing(tmp_path: Path) -> None:
    first, _ = _sides(tmp_path)
    assert differences(first, second=first) == []


def test_a_value_that_only_one_run_has_is_a_difference(tmp_path: Path) -> None:
    first, second = _sides(tmp_path)
    data = second.run.to_data()
    data["spec"]["peft"] = {"rank": 8}
    data["spec"]["datasets"].append({"source": "open-r1/OpenR1-Math-220k"})
    changed = Side(run=TrainingRun.model_validate_json(json.dumps(data)), records=second.records)
    found = {d.name: (d.first, d.second) for d in differences(first, second=changed)}
    assert found["spec.peft.rank"] == ("-", "8")
    assert found["spec.datasets[1].source"] == ("-", "open-r1/OpenR1-Math-220k")


def test_outcomes_stand_side_by_side_even_where_they_are_equal(tmp_path: Path) -> None:
    first, second = _sides(tmp_path)
    shown = {d.name: (d.first, d.second) for d in outcomes(first, second=second)}
    assert shown["Stage"] == ("Succeeded", "Succeeded")
    assert shown["Loss"] == ("0.6012", "0.5082")
    assert shown["Restarts"] == ("1", "1")


def test_the_page_lays_both_curves_over_each_other_and_asks_the_network_for_nothing(tmp_path: Path) -> None:
    first, second = _sides(tmp_path)
    write_comparison(first, second=second, out=tmp_path / "compare.html")
    html = (tmp_path / "compare.html").read_text()
    charts = [json.loads(text) for text in re.findall(r'<script type="application/json">(.*?)</script>', html)]
    assert [name for name, _ in charts[0]["lines"]] == [
        "stratos-demo",
        "stratos-demo, held out",
        "stratos-hot",
        "stratos-hot, held out",
    ]
    assert charts[0]["lines"][0][1][-1] == [400, 0.6012]
    assert charts[0]["lines"][2][1][-1] == [400, 0.5082]
    assert "spec.sft.args.learning_rate" in html
    assert "http" not in html
