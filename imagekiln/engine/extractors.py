"""Feature networks by name, and features of a whole set kept on disk.

    randconv             fixed random convolutions, for every shape
    pixels               principal components of the reference's pixels
    inception[:FILE]     the Inception network of 2015; without FILE from the cache, or downloaded into it once;
                         inception-pytorch-fid and inception-clean-fid bring pictures to its size as those programs do
    dinov2:PATH_OR_ID    DINOv2 from a folder, or NAME@REVISION of the hub
    clip:PATH_OR_ID      CLIP, likewise

Features are kept under a key of what they depend on: the pictures, the network and the version of this file's code.

Shapes: B images, C channels, H rows, W columns, N pictures, D features.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from imagekiln import data as datasets
from imagekiln.core import Source
from imagekiln.data.builtin import Published, download
from imagekiln.engine.run import write_whole
from imagekiln.errors import DataError, UsageError, did_you_mean
from imagekiln.metrics.encoders import Clip, Dinov2
from imagekiln.metrics.features import RandomConv, extract, weights_hash
from imagekiln.metrics.inception import FILE, PROTOCOLS, SHA256, URL, Inception
from imagekiln.metrics.pixels import PixelPCA

WAYS = {"inception" if way == "tf" else f"inception-{way}": way for way in PROTOCOLS}
NAMES = ("randconv", "pixels", *WAYS, "dinov2", "clip")
VERSION = 1
"""Of everything that turns stored pictures into features here; a change of it forgets what is kept."""
BATCH = 96
"""Pictures given to a network at once, whatever the caller's batches: float32 sums depend on their number."""

Say = Callable[[str], None]


class InColour(nn.Module):
    """A network of three channels for pictures of one, three or four: grey is repeated, RGBA laid over white."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        self.name, self.hash, self.num_features = network.name, network.hash, network.num_features

    def features(self, images_BCHW: Tensor) -> Tensor:
        """features_BD float32 of images_BCHW float32 in [-1, 1]."""
        return self.network.features(in_colour(images_BCHW))

    forward = features


def in_colour(images_BCHW: Tensor) -> Tensor:
    """Pictures with three channels, in [-1, 1]. Raises DataError for other channels than 1, 3 and 4.

    >>> in_colour(torch.tensor([0.5, -1.0, 0.0, 0.0]).view(1, 4, 1, 1)).flatten().tolist()
    [0.75, 0.0, 0.5]
    """
    channels = images_BCHW.shape[1]
    if channels == 3:
        return images_BCHW
    if channels == 1:
        return images_BCHW.expand(-1, 3, -1, -1)
    if channels == 4:
        opacity = (images_BCHW[:, 3:] + 1) / 2
        return images_BCHW[:, :3] * opacity + (1 - opacity)
    raise DataError(f"Pictures with {channels} channels cannot be seen as RGB; give grey, RGB or RGBA.")


def open_extractor(
    name: str,
    image_shape: tuple[int, int, int],
    reference: Tensor | None = None,
    *,
    device: torch.device | None = None,
    say: Say | None = None,
) -> Any:
    """The feature network of a name: a module with `features`, `name`, `hash` and `num_features`.

    name: see the top of this file.
    image_shape: (channels, height, width) of the pictures it will see.
    reference: images_NCHW, uint8 or float32 in [-1, 1], that `pixels` is fitted on.

    Raises:
        UsageError: an unknown name, or one that needs more than was given.
        DataError: a weights file that is missing, damaged or another one.

    >>> open_extractor("randconv", (1, 8, 8)).name
    'randconv-v1'
    """
    kind, _, argument = name.partition(":")
    if kind not in NAMES:
        raise UsageError(f"There are no features {name!r}. {did_you_mean(kind, NAMES)}")
    if kind in ("dinov2", "clip") and not argument:
        raise UsageError(f"Features {kind!r} need a folder or NAME@REVISION of the hub: {kind}:FOLDER.")
    if kind in ("randconv", "pixels") and argument:
        raise UsageError(f"Features {kind!r} take nothing after a colon; {name!r} was given.")
    network: Any
    if kind == "randconv":
        network = RandomConv(image_shape)
    elif kind == "pixels":
        if reference is None:
            raise UsageError("Features 'pixels' are fitted on reference pictures, and none were given.")
        network = PixelPCA(datasets.to_float(reference) if reference.dtype == torch.uint8 else reference)
    elif kind in WAYS:
        network = InColour(Inception.load(_inception_file(argument, say), WAYS[kind]))
    else:
        network = InColour(Dinov2(argument) if kind == "dinov2" else Clip(argument))
    return network.to(device) if device is not None else network


def cached_features(
    network: Any, pictures: Source | Tensor | Iterable[Tensor], key: str, folder: Path, say: Say | None = None
) -> Tensor:
    """features_ND float32 of pictures, computed once and kept in a folder.

    network: a module with `features`; its `hash`, or that of its weights, is part of the key.
    pictures: a source, uint8 images_NCHW, or batches of either uint8 or float32 in [-1, 1]. They go through the network
        in batches of one fixed size, so the result does not depend on how they came.
    key: what names the content of the pictures, such as a source's fingerprint; `images_key` makes one of a tensor.

    A file that is damaged is said once, and computed again. Raises DataError without pictures, DiskError when the
    folder cannot be written.
    """
    network_hash = getattr(network, "hash", "") or weights_hash(network)
    path = folder / f"{hashlib.sha256(f'{VERSION}:{BATCH}:{key}:{network_hash}'.encode()).hexdigest()[:32]}.safetensors"
    kept = _kept(path, say or (lambda sentence: None))
    if kept is not None:
        return kept
    features_ND = extract(network, rebatched(_batches(pictures)))
    header = {"checksum": _checksum(features_ND), "network": network_hash, "pictures": key, "version": str(VERSION)}
    write_whole(path, save({"features": features_ND}, metadata=header))
    return features_ND


def images_key(images_NCHW: Tensor) -> str:
    """sha256 of pictures, shape and dtype included.

    >>> images_key(torch.zeros(1, 1, 2, 2)) == images_key(torch.zeros(1, 1, 1, 4))
    False
    """
    digest = hashlib.sha256(f"{tuple(images_NCHW.shape)}:{images_NCHW.dtype}:".encode())
    for part in images_NCHW.split(BATCH):
        digest.update(part.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def rebatched(batches: Iterable[Tensor], size: int = BATCH) -> Iterator[Tensor]:
    """The same pictures in the same order, float32 in [-1, 1], in batches of `size`; the last may be smaller.

    >>> [len(batch) for batch in rebatched([torch.zeros(n, 1, 2, 2) for n in (1, 3, 1)], 2)]
    [2, 2, 1]
    """
    waiting: list[Tensor] = []
    for batch in batches:
        waiting.append(datasets.to_float(batch) if batch.dtype == torch.uint8 else batch)
        if sum(map(len, waiting)) >= size:
            joined = torch.cat(waiting)
            whole = len(joined) - len(joined) % size
            yield from joined[:whole].split(size)
            waiting = [joined[whole:]]
    rest = torch.cat(waiting) if waiting else torch.empty(0)
    if len(rest):
        yield rest


def _batches(pictures: Source | Tensor | Iterable[Tensor]) -> Iterable[Tensor]:
    if isinstance(pictures, Tensor):
        return pictures.split(BATCH) if len(pictures) else []
    if isinstance(pictures, Source):
        source = pictures
        return (
            source.read(range(start, min(len(source), start + BATCH))).images for start in range(0, len(source), BATCH)
        )
    return pictures


def _kept(path: Path, say: Say) -> Tensor | None:
    """Features kept in a file, or None when there is none or it cannot be believed."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            header, features_ND = file.metadata() or {}, file.get_tensor("features")
        if header.get("checksum") == _checksum(features_ND):
            return features_ND
        reason = "its checksum differs"
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        reason = str(error)
    say(f"The kept features {path.name} are damaged ({reason}) and are computed again.")
    return None


def _checksum(features_ND: Tensor) -> str:
    head = f"{tuple(features_ND.shape)}:{features_ND.dtype}:".encode()
    return hashlib.sha256(head + features_ND.contiguous().numpy().tobytes()).hexdigest()


def _inception_file(given: str, say: Say | None) -> Path:
    """The weights file: the one named, else $IMAGEKILN_INCEPTION, else the cache's, downloaded when it is not there."""
    named = given or os.environ.get("IMAGEKILN_INCEPTION", "")
    if named:
        return Path(named).expanduser()
    folder = datasets.cache_folder() / "inception"
    if not (folder / FILE).is_file():
        if say:
            say(f"Downloading the Inception weights (96 MB, once) from {URL}{FILE}.")
        try:
            download(Published("Inception", URL, {FILE: f"sha256:{SHA256}"}), folder)
        except DataError as error:
            reason = str(error).partition("(")[2].partition(")")[0]
            raise DataError(
                f"The Inception weights could not be downloaded ({reason}). Get {URL}{FILE} by other means and put it "
                f"into {folder}, or name the file: --features inception:FILE."
            ) from None
    return folder / FILE
