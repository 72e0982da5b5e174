"""Says and records which attention calls of a sample ran dense, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffaccel.attach.report import Report

OVERRULE = "--always runs the method all the same"


def recorded(reports: dict[str, Report]) -> dict[str, dict[str, Any]]:
    """Returns for each stage the attention calls, and the reasons of those that ran dense."""
    return {
        stage: {"calls": report.calls, "dense": report.dense_calls}
        for stage, report in reports.items()
    }


def described(stage: str, report: Report) -> str:
    """Returns one line about the calls of a stage that ran dense, "" where there were none."""
    from diffaccel.attach.forecast import EXPECTED_SLOWER

    reasons, calls = report.dense_calls, report.calls
    if not reasons:
        return ""
    dense = sum(reasons.values())
    share = f"all {calls}" if dense == calls else f"{dense} of {calls}"
    told = "; ".join(
        reason if len(reasons) == 1 else f"{count}: {reason}" for reason, count in reasons.items()
    )
    if any(reason.startswith(EXPECTED_SLOWER) for reason in reasons):
        told += f"; {OVERRULE}"
    return f"  {stage}: {share} attention calls ran dense ({told})"
