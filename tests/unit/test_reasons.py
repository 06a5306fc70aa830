"""The catalogue of reasons and its page."""

from __future__ import annotations

import re

from posttrain.api.reasons import REASONS, advice_for
from posttrain.reference import render_reasons


def test_a_reason_is_named_once_and_says_a_whole_sentence() -> None:
    for name, reason in REASONS.items():
        assert re.fullmatch(r"[A-Z][A-Za-z]{2,63}", name)
        assert reason.name == name
        assert reason.message.endswith(".")
        assert reason.advice == "" or reason.advice.endswith(".")


def test_every_failure_says_what_to_do_or_needs_nothing() -> None:
    nothing_to_do = {
        "Pending", "InProgress", "Accepted", "Preparing", "Prepared", "PrepareDisabled", "DryRun", "PodsStarting",
        "AllPodsRunning", "Restarting", "Completed", "Terminated", "PodDeleted", "NodeLost", "Evicted", "JobDeleted",
        "DatasetEmpty", "StrategyMismatch", "NoQueue", "QuotaReserved", "NoServers", "ServersWanted", "Loading",
        "ServersReady", "SandboxStarting", "SignalHealthy",
    }  # fmt: skip
    without = {name for name, reason in REASONS.items() if not reason.advice}

    assert without <= nothing_to_do


def test_advice_is_looked_up_by_name() -> None:
    assert advice_for("DiskFull") == REASONS["DiskFull"].advice
    assert advice_for("NoSuchReason") == ""


def test_every_reason_has_its_anchor_on_the_page() -> None:
    page = render_reasons()

    for reason in REASONS.values():
        assert f'<a id="{reason.anchor}"></a>\n\n## {reason.name}\n\n{reason.message}\n' in page
        assert reason.advice in page
    assert page.count("<a id=") == len(REASONS)


def test_fields_that_an_advice_names_exist() -> None:
    from posttrain.api.explain import explain

    for reason in REASONS.values():
        for path in re.findall(r"\bspec(?:\.\w+)+", f"{reason.message} {reason.advice}"):
            assert explain(path).path == path, reason.name
