"""Token layout: what each token of a self-attention sequence is, and where."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Literal

Grid = tuple[int, int, int]

KINDS = ("text", "visual", "condition")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _append(slices: list[slice], start: int, stop: int) -> None:
    """Adds a run of tokens to those before, joined where they touch."""
    if slices and slices[-1].stop == start:
        start = slices.pop().start
    if stop > start:
        slices.append(slice(start, stop))


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of consecutive tokens of one kind.

    Args:
        kind: "text", "visual" or "condition". Condition tokens (reference images, time tokens)
            are treated like text: every query sees them exactly, their own queries run dense.
        length: Number of tokens, at least 0 (a visual segment at least 1).
        grid: (frames, height, width) in tokens, raster order with width fastest. Required for a
            visual segment, optional for condition tokens, None for text.
    """

    kind: Literal["text", "visual", "condition"]
    length: int
    grid: Grid | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}, got kind={self.kind!r}")
        if not _is_count(self.length):
            raise ValueError(
                f"length must be an integer of at least 0, got length={self.length!r}; "
                "pass the number of tokens of the segment"
            )
        if self.grid is None:
            if self.kind == "visual":
                raise ValueError(
                    f"a visual segment needs its grid, got grid=None for length={self.length}; "
                    "pass grid=(frames, height, width) in tokens"
                )
            return
        if self.kind == "text":
            raise ValueError(f"a text segment has no grid, got grid={self.grid}; pass grid=None")
        if len(self.grid) != 3 or not all(_is_count(side) and side > 0 for side in self.grid):
            raise ValueError(
                f"grid must be three integers (frames, height, width) of at least 1, "
                f"got grid={self.grid}; an image has frames=1"
            )
        # A list would make the layout unhashable, and layouts are cache keys.
        object.__setattr__(self, "grid", tuple(self.grid))
        frames, height, width = self.grid
        if frames * height * width != self.length:
            raise ValueError(
                f"length must be frames * height * width, got length={self.length} for "
                f"grid={self.grid} ({frames * height * width} tokens)"
            )


@dataclass(frozen=True, slots=True)
class TokenLayout:
    """The ordered segments that make up one attention sequence.

    Frozen and hashable, so that a layout can key a cache. Use `TokenLayout.image` and
    `TokenLayout.video` for the common cases.

    Args:
        segments: In sequence order; at most one is visual.
        native: (frames, height, width) in tokens of the visual grid on which the model was
            trained; None where nobody said. Layouts that differ in this alone are equal.

    Attributes:
        length: Number of tokens in the sequence.
        text_length: Number of text tokens, condition tokens not counted.
        visual: The visual segment, or None where the sequence has none.
        grid: (frames, height, width) of the visual segment, or None.
        visual_slice: Where the visual tokens lie in the sequence; empty where there are none.
        exact_slices: Where text and condition tokens lie, in sequence order, neighbours joined:
            what methods attend exactly.
        own_slices: Where text and visual tokens lie, in sequence order, neighbours joined: all
            but the condition tokens.

    Example:
        >>> TokenLayout.image(64, 48, text_before=512).length
        3584
    """

    segments: tuple[Segment, ...]
    native: Grid | None = field(default=None, compare=False)
    length: int = field(init=False, compare=False, repr=False)
    text_length: int = field(init=False, compare=False, repr=False)
    visual: Segment | Any = field(init=False, compare=False, repr=False)
    grid: Grid | Any = field(init=False, compare=False, repr=False)
    visual_slice: slice = field(init=False, compare=False, repr=False)
    exact_slices: tuple[slice, ...] = field(init=False, compare=False, repr=False)
    own_slices: tuple[slice, ...] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "segments", tuple(self.segments))
        if self.native is not None:
            checked = Segment("visual", prod(self.native), self.native)  # as any grid is
            object.__setattr__(self, "native", checked.grid)
        for segment in self.segments:
            if not isinstance(segment, Segment):
                raise TypeError(
                    f"segments must be Segment objects, got {type(segment).__name__}; "
                    "use TokenLayout.image(...) or TokenLayout.video(...) for the common cases"
                )
        visual = sum(segment.kind == "visual" for segment in self.segments)
        if visual > 1:
            raise ValueError(
                f"a layout has at most one visual segment, got {visual}; "
                'describe reference images as kind="condition"'
            )
        self._set_facts()

    def _set_facts(self) -> None:
        """Derives what every attention call asks for, once."""
        visual, place, start = None, slice(0, 0), 0
        exact: list[slice] = []
        own: list[slice] = []
        for part in self.segments:
            stop = start + part.length
            if part.kind == "visual":
                visual, place = part, slice(start, stop)
            else:
                _append(exact, start, stop)
            if part.kind != "condition":
                _append(own, start, stop)
            start = stop
        text = sum(part.length for part in self.segments if part.kind == "text")
        facts = {
            "length": start,
            "text_length": text,
            "visual": visual,
            "grid": None if visual is None else visual.grid,
            "visual_slice": place,
            "exact_slices": tuple(exact),
            "own_slices": tuple(own),
        }
        for name, fact in facts.items():
            object.__setattr__(self, name, fact)

    def cut(self, length: int) -> TokenLayout:
        """Returns the layout of the first `length` tokens; cuts text alone, at the end."""
        *kept, last = self.segments
        left = last.length - (self.length - length)
        if last.kind != "text" or left < 0:
            return self
        parts = (*kept, Segment("text", left)) if left else tuple(kept)
        return replace(self, segments=parts)

    @classmethod
    def image(
        cls, height: int, width: int, text_before: int = 0, text_after: int = 0
    ) -> TokenLayout:
        """Lays out one image of height x width tokens with optional text around it."""
        return cls.video(1, height, width, text_before, text_after)

    @classmethod
    def video(
        cls, frames: int, height: int, width: int, text_before: int = 0, text_after: int = 0
    ) -> TokenLayout:
        """Lays out a video of frames x height x width tokens with optional text around it.

        Args:
            frames: Latent frames, at least 1.
            height: Rows of tokens per frame (after patching), at least 1.
            width: Tokens per row, at least 1.
            text_before: Text tokens before the visual ones (FLUX, CogVideoX).
            text_after: Text tokens after the visual ones (HunyuanVideo, SD3).
        """
        for name, side in (("frames", frames), ("height", height), ("width", width)):
            if not _is_count(side) or side < 1:
                raise ValueError(
                    f"{name} must be an integer of at least 1, got {name}={side!r}; "
                    "count tokens, not pixels"
                )
        visual = Segment("visual", frames * height * width, (frames, height, width))
        before, after = Segment("text", text_before), Segment("text", text_after)
        return cls(tuple(part for part in (before, visual, after) if part.length > 0))
