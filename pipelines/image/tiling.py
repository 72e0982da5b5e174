"""Runs an image autoencoder in tiles, and says how many there are."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

TILE = 512  # pixels; 0.6 GB of activations in the embedded decoder
OVERLAP = 0.125


@contextmanager
def tiled(vae: Any, on_tile: Callable[[str], None]) -> Iterator[None]:
    """Makes `vae` work in blended tiles of 512 pixels, and restores it afterwards.

    Approximates: group norms see one tile instead of the picture; the overlap hides the seam.

    Args:
        vae: An image autoencoder, or a video autoencoder that draws single frames.
        on_tile: Called with "encode" or "decode" whenever a tile is done.
    """
    settings: dict[str, Any] = {"use_tiling": True}
    if "block_out_channels" in vae.config:  # that of Qwen-Image has tiles of its own
        settings |= {
            "tile_sample_min_size": TILE,
            "tile_latent_min_size": TILE // 2 ** (len(vae.config.block_out_channels) - 1),
            "tile_overlap_factor": OVERLAP,
        }
    settings = {name: value for name, value in settings.items() if hasattr(vae, name)}
    before = {name: getattr(vae, name) for name in settings}
    hooks = [
        vae.encoder.register_forward_hook(lambda *_: on_tile("encode")),
        vae.decoder.register_forward_hook(lambda *_: on_tile("decode")),
    ]
    try:
        for name, value in settings.items():
            setattr(vae, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(vae, name, value)
        for hook in hooks:
            hook.remove()


def tiles(width: int, height: int) -> Counter[tuple[int, int]]:
    """Returns the sizes in pixels of the tiles that a picture is cut into, with their numbers."""
    if max(width, height) <= TILE:
        return Counter([(width, height)])
    stride = int(TILE * (1 - OVERLAP))
    across, down = (
        [min(TILE, side - start) for start in range(0, side, stride)] for side in (width, height)
    )
    return Counter(product(across, down))


def tile_count(width: int, height: int) -> int:
    """Returns how many tiles a picture of this size in pixels is cut into."""
    return sum(tiles(width, height).values())
