"""Context parallelism: the parts of several ranks, put together, are what one rank has."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from diffaccel.attach.context_parallel import token_shards
from diffaccel.layout import Segment, TokenLayout


def test_text_is_split_apart_from_the_visual_tokens_with_their_references():
    layout = TokenLayout(
        (
            Segment("text", 7),
            Segment("visual", 12, (1, 3, 4)),
            Segment("condition", 6, (1, 2, 3)),
        )
    )
    assert token_shards(layout, 2) == ((4, 9), (3, 9))
    assert token_shards(TokenLayout.video(2, 3, 4, text_after=7), 3) == ((8, 3), (8, 2), (8, 2))
    assert token_shards(TokenLayout.image(4, 4), 4) == ((4,),) * 4


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path):
    """One launch for all families: processes take longer to start than tiny models to run."""
    script = Path(__file__).parent / "parallel_ranks.py"
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), "2", str(tmp_path / "meeting")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    for rank in ranks:
        output, _ = rank.communicate(timeout=600)
        assert rank.returncode == 0, output
