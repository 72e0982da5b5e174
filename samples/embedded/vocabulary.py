"""Defines the objects that the embedded image model can draw, with their drawings and names.

Drawings are the vector emoji of Noto (npm package @iconify-json/noto, Apache-2.0), names and
tags those of emojibase-data (MIT).
"""

import json
import subprocess
import tarfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGES = {
    "iconify-json-noto-1.2.9.tgz": "@iconify-json/noto@1.2.9",
    "emojibase-data-17.0.0.tgz": "emojibase-data@17.0.0",
}
CURATED = Path(__file__).with_name("vocabulary.json")
TAGS = 2  # at most so many per object
GROUPS_OF_OBJECTS = {0, 1, 3, 4, 5, 6, 7, 8}  # without skin tone components (2) and flags (9)


@dataclass(frozen=True, slots=True)
class Thing:
    """One object that a scene may contain.

    Attributes:
        names: How captions call it, the most usual first.
        tags: Search words that belong to no other object of the vocabulary.
        body: The inside of its SVG on a 128 x 128 canvas.
    """

    names: tuple[str, ...]
    tags: tuple[str, ...]
    body: str


def fetch_packages(folder: Path) -> None:
    """Downloads the two npm archives into a folder, unless they lie there already."""
    folder.mkdir(parents=True, exist_ok=True)
    for archive, package in PACKAGES.items():
        if not (folder / archive).exists():
            subprocess.run(["npm", "pack", package], cwd=folder, check=True)


def load_vocabulary(packages: Path, which: str = "curated") -> tuple[Thing, ...]:
    """Reads the drawings and names of the vocabulary.

    Args:
        packages: Folder with the npm archives, see `fetch_packages`.
        which: "curated" for the everyday objects of vocabulary.json, "all" for every emoji but
            flags, skin tones and keycaps.

    Returns:
        The objects, in a fixed order.
    """
    noto, emojibase = (packages / archive for archive in PACKAGES)
    drawings = _read_member(noto, "package/icons.json")["icons"]
    icon_of_character = _read_member(noto, "package/chars.json")
    curated: dict[str, list[str]] = json.loads(CURATED.read_text())

    chosen: list[tuple[tuple[str, ...], list[str], str]] = []
    for emoji in _read_member(emojibase, "package/en/data.json"):
        label = emoji["label"]
        if which == "curated":
            if label not in curated:
                continue
            names = tuple(curated[label])
        else:
            if emoji.get("group") not in GROUPS_OF_OBJECTS or label.startswith("keycap"):
                continue
            names = tuple(curated.get(label, [label.lower()]))
        character = emoji["hexcode"].lower()
        icon = icon_of_character.get(character) or icon_of_character.get(
            character.removesuffix("-fe0f")
        )
        if icon in drawings:
            chosen.append((names, emoji.get("tags", []), drawings[icon]["body"]))

    uses = Counter(tag for _, tags, _ in chosen for tag in tags)
    names_taken = {name for names, _, _ in chosen for name in names}
    return tuple(
        Thing(
            names=names,
            tags=tuple(t for t in tags if uses[t] == 1 and t not in names_taken)[:TAGS],
            body=body,
        )
        for names, tags, body in chosen
    )


def _read_member(archive: Path, member: str) -> Any:  # noqa: ANN401 - any JSON value
    """Returns the parsed JSON file inside an archive."""
    with tarfile.open(archive) as tar:
        file = tar.extractfile(member)
        if file is None:
            raise FileNotFoundError(f"{archive} must hold {member}; remove it to fetch it again")
        return json.load(file)
