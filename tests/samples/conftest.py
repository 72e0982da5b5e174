"""Makes the package samples/embedded importable, as its scripts do."""

import sys
from pathlib import Path

import pytest

SAMPLES = Path(__file__).parents[2] / "samples"


@pytest.fixture(scope="session")
def embedded():
    """Puts the folder of the package on the path, behind everything else."""
    pytest.importorskip("resvg_py", reason="drawings need resvg-py, of the extra [test]")
    sys.path.append(str(SAMPLES))
    yield SAMPLES / "embedded"
    sys.path.remove(str(SAMPLES))


@pytest.fixture(scope="session")
def cast(embedded):
    """Two objects with simple drawings: a red triangle that points left, a blue disc."""
    from embedded.video.clips import Actor
    from embedded.vocabulary import Thing

    rocket = '<path d="M8 64 L120 24 L120 104 Z" fill="#c00"/>'
    ball = '<circle cx="64" cy="64" r="52" fill="#02c"/><path d="M64 12 h40 v40 z" fill="#fff"/>'
    return (
        Actor(Thing(("rocket", "spaceship"), (), rocket), "flies", "left"),
        Actor(Thing(("red apple",), (), ball), "moves", ""),
    )


@pytest.fixture(autouse=True)
def on_one_thread(one_thread):
    """All tests of this folder run so."""
