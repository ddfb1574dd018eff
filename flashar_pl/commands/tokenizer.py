"""`flashar tokenizer train`: a small VQ tokenizer of one's own pictures."""

from __future__ import annotations

from typing import Any

from flashar_pl.data.jobs import PictureOptions, SmallVQOptions
from flashar_pl.options import PlaceOptions


def tokenizer_train(
    pictures: PictureOptions,
    /,
    sizes: SmallVQOptions = SmallVQOptions(),
    place: PlaceOptions = PlaceOptions(),
    *,
    out: str,
) -> dict[str, Any]:
    """Train a small VQ tokenizer on a folder of pictures, in minutes on one CPU core for 64 pixels.

    VQ-16's architecture with fewer channels, trained on the splits that `flashar tokenize images` makes. Writes
    tokenizer.safetensors in the layout of LlamaGen's files, so that every option that takes vq16:FILE reads it,
    tokenizer.json with the PSNR of held-out pictures, and reconstructions.png. `flashar tokenize images` does the same
    by itself where it is given no tokenizer.

    Example:
        flashar tokenizer train photos --out data/photos_vq --downsample 4 --codes 1024 --steps 2000
        flashar tokenize images photos --out data/photos --weights data/photos_vq/tokenizer.safetensors

    Args:
        out: directory to make; it must not exist.
    """
    from flashar_pl.data.own_pictures import TRAINED_SIDE, train_tokenizer
    from flashar_pl.data.pictures import split_pictures
    from flashar_pl.devices import find_device
    from flashar_pl.files import require_new

    require_new(out, "tokenizer")
    sources, how = split_pictures(pictures.folder, pictures.one_class)
    print(f"{pictures.folder}: {how}", flush=True)
    side = pictures.image_size or TRAINED_SIDE
    return train_tokenizer(sources, side, sizes, out, find_device(place.device))
