"""Runs an image autoencoder in tiles, and says how many there are."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

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
    encodes_clips = type(vae).__name__ == "AutoencoderKLHunyuanImage"  # when it tiles, alone
    if encodes_clips:
        vae.tiled_encode = partial(_tiled_encode, vae)
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
        if encodes_clips:
            del vae.tiled_encode


def _tiled_encode(vae: Any, pixels: Tensor) -> Tensor:
    """Moments (B, 2 C, h, w) of pixels (B, 3, H, W), tile by tile."""
    step = int(vae.tile_sample_min_size * (1 - vae.tile_overlap_factor))
    blend = int(vae.tile_latent_min_size * vae.tile_overlap_factor)
    kept, side = vae.tile_latent_min_size - blend, vae.tile_sample_min_size
    above: list[Tensor] = []
    rows = []
    for top in range(0, pixels.shape[2], step):
        row: list[Tensor] = []
        for left in range(0, pixels.shape[3], step):
            tile = vae.encoder(pixels[:, :, top : top + side, left : left + side])
            if above:
                tile = vae.blend_v(above[len(row)], tile, blend)
            if row:
                tile = vae.blend_h(row[-1], tile, blend)
            row.append(tile)
        above = row
        rows.append(torch.cat([tile[:, :, :kept, :kept] for tile in row], 3))
    return torch.cat(rows, 2)


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
