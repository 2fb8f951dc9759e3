"""Where the collection's model looks in a picture, as numbers or drawn over it."""

from __future__ import annotations

import asyncio
import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dino_index.heat import with_heat
from dino_index.images import decode
from dino_search.api.engine import Engine
from dino_search.api.pictures import Picture
from dino_search.api.threads import in_thread

OVERLAY_SIDE = 512
"""Pixels of the shorter side of a drawn picture, at most."""
_LONGEST_TO_SHORTEST = 4


@dataclass(frozen=True, kw_only=True, eq=False)
class Attention:
    """What a collection's model saw. maps_Hhw: of each head, a value for each patch. data: the picture file's bytes."""

    collection: str
    model: str
    maps_Hhw: NDArray[np.float32]
    data: bytes


async def attention_of(engine: Engine, picture: Picture, *, client: str, collection: str) -> Attention:
    """Raises ImageNotFound, RequestInvalid, ImageError, AttentionUnavailable, and as searches do."""
    with engine.admission.places(client):
        info, picture = await engine.with_bytes(picture, collection)
        side = info.model_config["input_size"]
        pixels_HWC = await in_thread(engine.decoders, engine.decode, picture, (side, side))
        passes = await engine.passes_of(info)
        maps_BHhw = await asyncio.wrap_future(passes.run(lambda: passes.backbone.attention(pixels_HWC[None])))
    assert picture.data is not None
    return Attention(collection=info.name, model=info.model_name, maps_Hhw=maps_BHhw[0], data=picture.data)


def overlay_of(engine: Engine, seen: Attention, head: int | None) -> bytes:
    """A PNG of the picture with one head's attention, or the mean of all, as heat over it. In any thread."""
    decoded = decode(seen.data, max_short_side=OVERLAY_SIDE, limits=engine.settings.limits)
    picture = Image.fromarray(decoded.pixels_HWC)
    longest = _LONGEST_TO_SHORTEST * OVERLAY_SIDE
    picture.thumbnail((longest, longest))
    map_hw = seen.maps_Hhw.mean(axis=0) if head is None else seen.maps_Hhw[head]
    buffer = io.BytesIO()
    Image.fromarray(with_heat(np.asarray(picture), map_hw)).save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()
