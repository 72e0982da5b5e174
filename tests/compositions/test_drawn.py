"""Drawn compositions of the product's parts, each against a reference made of stock parts."""

from __future__ import annotations

import pytest

from tests.compositions.judge import judged

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.drawn(30)
def test_a_drawn_composition_is_right_or_refused(seed):
    """One of them alone: `python -m tests.compositions.run --seed SEED`."""
    verdict = judged(seed)
    assert verdict.outcome in ("right", "refused"), f"{verdict.composition}\n{verdict.words}"
