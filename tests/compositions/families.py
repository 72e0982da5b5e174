"""What the reference knows of each tiny pipeline, written down apart from the bindings."""

from __future__ import annotations

from dataclasses import dataclass, replace

from diffaccel import TokenLayout


@dataclass(frozen=True)
class Family:
    """Facts about one of `tests/support/tiny_pipelines.py`.

    Args:
        layers: (path of each attended layer, whether text is in its sequence), in order of index.
        pixels: Of one unit of a drawn size; a token of a transformer, two latents of a U-Net.
        sizes: Smallest and largest number of such units.
        frames: Pixel frames for a latent one, 0 for images.
        text_first: Whether text precedes the visual tokens where they are joined.
        native: (frames, height, width) in tokens on which the model claims to be trained.
        calls_apart: Whether the prompts of classifier-free guidance get calls of their own.
        scale: Name of the argument that switches it, and its value.
        schedulers: Which schedulers it takes.
        encoder_first: Whether blocks return the text before the visual tokens; None where they
            return one tensor.
        models: Its denoisers.
    """

    layers: tuple[tuple[str, bool], ...]
    pixels: int
    sizes: tuple[int, int]
    frames: int
    text_first: bool
    native: tuple[int, int, int]
    calls_apart: bool
    scale: tuple[str, float]
    schedulers: str
    encoder_first: bool | None
    models: tuple[str, ...] = ("transformer",)

    @property
    def least_layers(self) -> int:
        """Layers in each denoiser."""
        return len(self.layers)


def _blocks(pattern: str, count: int, joint: bool) -> tuple[tuple[str, bool], ...]:
    return tuple((pattern.format(number), joint) for number in range(count))


_DOUBLE, _SINGLE = "transformer_blocks.{}.attn", "single_transformer_blocks.{}.attn"
_WAN = Family(
    _blocks("blocks.{}.attn1", 2, False), 16, (2, 7), 4, False, (21, 30, 52), True,
    ("guidance_scale", 3.0), "flow", None,
)  # fmt: skip
_IN_UNET = "{}.attentions.{}.transformer_blocks.{}.attn1"


def _unet(*places: tuple[str, int, int]) -> Family:
    layers = tuple((_IN_UNET.format(*place), False) for place in places)
    return Family(
        layers, 8, (4, 9), 0, False, (1, 16, 16), False, ("guidance_scale", 4.0), "unet", None,
        ("unet",),
    )  # fmt: skip


FAMILIES = {
    "flux": Family(
        (*_blocks(_DOUBLE, 2, True), *_blocks(_SINGLE, 2, True)), 8, (3, 12), 0, True, (1, 64, 64),
        True, ("true_cfg_scale", 2.0), "flow", True,
    ),
    "sd3": Family(
        (
            ("transformer_blocks.0.attn", True),
            ("transformer_blocks.0.attn2", False),
            ("transformer_blocks.1.attn", True),
        ),
        8, (3, 12), 0, False, (1, 16, 16), False, ("guidance_scale", 4.0), "flow", True,
    ),
    "qwen": Family(
        _blocks(_DOUBLE, 2, True), 16, (3, 12), 0, True, (1, 83, 83), True,
        ("true_cfg_scale", 2.0), "flow", True,
    ),
    "wan2.1": _WAN,
    "wan2.2": replace(_WAN, models=("transformer", "transformer_2")),
    "wan2.2-ti2v": replace(_WAN, native=(31, 22, 40)),
    "hunyuan": Family(
        (*_blocks(_DOUBLE, 2, True), *_blocks(_SINGLE, 1, True)), 16, (2, 7), 4, False,
        (33, 45, 80), True, ("true_cfg_scale", 2.0), "flow", False,
    ),
    "cogvideox": Family(
        _blocks("transformer_blocks.{}.attn1", 2, True), 16, (2, 7), 4, True, (3, 4, 6), False,
        ("guidance_scale", 4.0), "cogvideox", False,
    ),
    "ltx": Family(
        _blocks("transformer_blocks.{}.attn1", 2, False), 32, (2, 7), 8, False, (21, 16, 22),
        False, ("guidance_scale", 3.0), "flow", None,
    ),
    "sd15": _unet(
        ("down_blocks.0", 0, 0), ("down_blocks.1", 0, 0), ("mid_block", 0, 0),
        ("up_blocks.0", 0, 0), ("up_blocks.0", 1, 0), ("up_blocks.1", 0, 0),
        ("up_blocks.1", 1, 0),
    ),
    "sdxl": _unet(
        ("down_blocks.1", 0, 0), ("down_blocks.2", 0, 0), ("down_blocks.2", 0, 1),
        ("mid_block", 0, 0), ("mid_block", 0, 1),
        ("up_blocks.0", 0, 0), ("up_blocks.0", 0, 1), ("up_blocks.0", 1, 0), ("up_blocks.0", 1, 1),
        ("up_blocks.1", 0, 0), ("up_blocks.1", 1, 0),
    ),
}  # fmt: skip


def levels(family: str, layer: str) -> int:
    """How often the resolution was halved before a layer."""
    if family not in ("sd15", "sdxl"):
        return 0
    deepest = 1 if family == "sd15" else 2
    place = layer.split(".")
    if place[0] == "mid_block":
        return deepest
    return int(place[1]) if place[0] == "down_blocks" else deepest - int(place[1])


def layout_of(
    family: str, index: int, rows: int, columns: int, frames: int, text: int
) -> TokenLayout:
    """The tokens of a layer.

    Args:
        family: Name in `FAMILIES`.
        index: Of the layer.
        rows: Height of the picture in units of `Family.pixels`, as `columns`.
        columns: Its width.
        frames: Latent frames.
        text: Text tokens of the call.
    """
    facts = FAMILIES[family]
    name, joint = facts.layers[index]
    native = facts.native
    if family in ("sd15", "sdxl"):
        rows, columns = 2 * rows, 2 * columns
        for _ in range(levels(family, name)):
            rows, columns = -(-rows // 2), -(-columns // 2)
            native = (1, native[1] // 2, native[2] // 2)
    sides = {"text_before" if facts.text_first else "text_after": text if joint else 0}
    layout = TokenLayout.video(frames if facts.frames else 1, rows, columns, **sides)
    return replace(layout, native=native)
