"""One worker: the models of a build on one device, and the encoding of one sample range into shards.

A range is the unit of work. Exactly one worker encodes it, whole, in the same sub-batches from its first row, and
appends rows to partial files; one decode feeds every component. A thread checks and writes what was encoded while the
device goes on, so that memory is two sub-batches: the one being encoded and the one being written.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...cache_specs.entries import OwnCode
from ...cache_specs.fingerprint import canonical_json
from ...cache_specs.layout import CacheLayout, layer_array
from ...cache_specs.schema import FEATURES, ComponentSpec, stored_layers
from ...cache_specs.storage import Location
from ..images.decode import DecodedBatch
from ..models.autoencoders import load_autoencoder
from ..models.encoders import Encoder, check_loadable, load_encoder, network_of
from ..models.weights import check_weights
from ..store.component_writer import ComponentWriter
from ..store.quantize import stored_tokens
from ..store.store import CacheStore


@dataclass(frozen=True, kw_only=True)
class ModelRequest:
    """A component asked for: a `ComponentSpec` whose weights are not loaded yet, and where to find them.

    `code` is that of a network of the user's own; it travels with the request.
    """

    kind: str
    name: str
    spec: Mapping[str, Any]
    dtype: str
    precision: str
    compressor: str
    weights_file: Path | None = None
    code: OwnCode | None = None

    def component(self, weights: str) -> ComponentSpec:
        """Return the component's spec, given what identifies its weights."""
        return ComponentSpec(
            kind=self.kind,  # type: ignore[arg-type]  # checked in ComponentSpec.__post_init__, as the next two
            name=self.name,
            spec=self.spec,
            dtype=self.dtype,  # type: ignore[arg-type]
            precision=self.precision,  # type: ignore[arg-type]
            compressor=self.compressor,  # type: ignore[arg-type]
            weights=weights,
        )


@dataclass(kw_only=True)
class RangeResult:
    """What became of one range.

    `written` are component paths; `bad` gives the reason by sample row where the image could not be used, and
    `not_finite` by component path and row where what a model made of it could not; `passing` are the rows of `bad`
    that another try may well read.
    """

    index: int
    num_samples: int
    written: list[str] = field(default_factory=list)
    bad: dict[int, str] = field(default_factory=dict)
    passing: set[int] = field(default_factory=set)
    not_finite: dict[str, dict[int, str]] = field(default_factory=dict)


class Worker:
    """The models of a build on one device.

    `threads` sets torch's intra-op threads explicitly: the same number gives the same bits in-process and under Ray,
    which would otherwise set it to 1. Another number may change the last bits of convolutions on a CPU (the SD VAE's
    moments by 3e-6), so that builds which must agree byte for byte name the same one.
    """

    def __init__(
        self, cache: Location, layout: CacheLayout, requests: Sequence[ModelRequest], *, device: str, threads: int
    ) -> None:
        torch.set_num_threads(threads)
        self._store = CacheStore(cache, layout)
        self._disk = ThreadPoolExecutor(max_workers=1, thread_name_prefix="write")
        self._networks = load_networks(requests, device)
        by_path = {component.path: component for network in self._networks for component in network.components}
        self.components = [by_path[request.component("").path] for request in requests]

    def encode_range(
        self, index: int, paths: Sequence[str], batches: Iterable[DecodedBatch], *, skip_bad: bool
    ) -> Future[RangeResult]:
        """Encode one range into the components at `paths`; return the future of its commit, which another thread does.

        A range with a bad image is not written, unless `skip_bad`: then its row is zero and `valid` false. The same
        holds, for one component alone, of a sample whose stored values are not finite. An image that could not be read
        for a reason that passes keeps its range from being written in either case. Every sub-batch is looked at, so
        that every bad file is listed. Raises `CacheError`, here or from the future, where the disk refuses.
        """
        start, stop = self._store.layout.sample_range(index)
        result = RangeResult(index=index, num_samples=stop - start)
        writers = {
            component.path: ComponentWriter(self._store, component, index)
            for component in self.components
            if component.path in paths
        }
        written: Future[None] | None = None
        try:
            row = start
            for batch in batches:
                result.bad.update({row + offset: reason for offset, reason in batch.bad.items()})
                result.passing.update(row + offset for offset in batch.passing)
                if not result.passing and (skip_bad or not result.bad):
                    for network in self._networks:
                        asked = [component for component in network.components if component.path in writers]
                        for path, arrays in (self._views(batch, network, asked) if asked else {}).items():
                            if written is not None:
                                written.result()
                            written = self._disk.submit(
                                _append, writers[path], arrays, batch.bad, batch.source_bytes, row, result
                            )
                row += len(batch.images)
            assert row == stop, (row, stop)
        except BaseException:
            self._disk.submit(_abandon, list(writers.values())).result()
            raise
        return self._disk.submit(_commit, list(writers.values()), written, result, skip_bad)

    def close(self) -> None:
        """Wait until what was encoded is written."""
        self._disk.shutdown(wait=True)

    def _views(
        self, batch: DecodedBatch, network: "Network", components: Sequence[ComponentSpec]
    ) -> dict[str, dict[str, torch.Tensor]]:
        """Return the arrays [b, V, ...] of a sub-batch by component path, on the device."""
        images = torch.tensor(batch.images).permute(0, 3, 1, 2)
        pictures = [images, *(images.flip(-1) for _ in range(self._store.layout.num_views - 1))]
        views = [network.encode(pixels, components) for pixels in pictures]
        return {
            path: {name: torch.stack([view[path][name] for view in views], dim=1) for name in arrays}
            for path, arrays in views[0].items()
        }


# What the writing thread does, in the order in which it was asked.


def _append(
    writer: ComponentWriter,
    arrays: Mapping[str, torch.Tensor],
    bad: Mapping[int, str],
    source_bytes: np.ndarray,
    row: int,
    result: RangeResult,
) -> None:
    """Append the sub-batch whose first sample is `row`, and list its rows that are not finite."""
    on_host = {name: values.cpu().numpy() for name, values in arrays.items()}  # on a GPU, waits for the forward
    for offset, reason in writer.append(on_host, bad=bad, source_bytes=source_bytes).items():
        result.not_finite.setdefault(writer.component.path, {})[row + offset] = reason


def _commit(
    writers: Sequence[ComponentWriter], written: Future[None] | None, result: RangeResult, skip_bad: bool
) -> RangeResult:
    """Commit what the range's images and values allow."""
    try:
        if written is not None:
            written.result()
        for writer in writers:
            path = writer.component.path
            if not result.passing and (skip_bad or not (result.bad or path in result.not_finite)):
                writer.commit()
                result.written.append(path)
    finally:
        _abandon(writers)
    return result


def _abandon(writers: Sequence[ComponentWriter]) -> None:
    for writer in writers:
        writer.abandon()


# A component's function from images to what is stored of them.

Encode = Callable[[torch.Tensor], dict[str, torch.Tensor]]


@dataclass(frozen=True, kw_only=True)
class Network:
    """A model on a device, and the components that one forward of it gives: several stages, or the one.

    `encode` returns, of images [b, 3, H, W] uint8 and some of the components, one view's stored arrays by path.
    """

    components: tuple[ComponentSpec, ...]
    encode: Callable[[torch.Tensor, Sequence[ComponentSpec]], dict[str, dict[str, torch.Tensor]]]


def load_networks(requests: Sequence[ModelRequest], device: str) -> list[Network]:
    """Load the models of `requests`, each once, in their order: stages of one network share it and its forward."""
    alike: dict[str, list[ModelRequest]] = {}
    for request in requests:
        staged = request.spec.get("stage") is not None
        key = canonical_json([network_of(request.spec), request.precision]) if staged else request.component("").path
        alike.setdefault(key + str(request.weights_file), []).append(request)
    return [_load_stages(group, device) if len(group) > 1 else _load_one(group[0], device) for group in alike.values()]


def _load_one(request: ModelRequest, device: str) -> Network:
    encode, weights = load_model(request, device)
    component = request.component(weights)
    return Network(components=(component,), encode=lambda images, asked: {component.path: encode(images)})


def _load_stages(requests: Sequence[ModelRequest], device: str) -> Network:
    encoder = _load_encoder(requests[0], device)
    encoder.check([request.spec for request in requests])

    def encode(images: torch.Tensor, asked: Sequence[ComponentSpec]) -> dict[str, dict[str, torch.Tensor]]:
        stages = encoder.stages(images, [component.spec for component in asked])
        return {
            component.path: stored_tokens(tokens, component.dtype)
            for component, tokens in zip(asked, stages, strict=True)
        }

    return Network(components=tuple(request.component(encoder.weights) for request in requests), encode=encode)


def check_request(request: ModelRequest) -> None:
    """Raise `UsageError` for what keeps a model from being loaded and is known without loading it."""
    check = check_loadable if request.kind == FEATURES else check_weights
    check(request.spec, request.weights_file)


def load_model(request: ModelRequest, device: str) -> tuple[Encode, str]:
    """Load a model; return its function from images [b, 3, H, W] uint8 to one view's stored arrays, and its weights."""
    if request.kind == FEATURES:
        encoder = _load_encoder(request, device)

        def encode_features(images: torch.Tensor) -> dict[str, torch.Tensor]:
            stored: dict[str, torch.Tensor] = {}
            for layer, (tokens, cls_token) in zip(stored_layers(request.spec), encoder.by_layer(images), strict=True):
                arrays = stored_tokens(tokens, request.dtype)
                if cls_token is not None:
                    arrays["cls_token"] = cls_token.half()
                stored |= {layer_array(name, layer): values for name, values in arrays.items()}
            return stored

        return encode_features, encoder.weights
    autoencoder = load_autoencoder(request.spec, **_options(request, device))
    return lambda images: {"moments": autoencoder.encode(images).half()}, autoencoder.weights


def _load_encoder(request: ModelRequest, device: str) -> Encoder:
    return load_encoder(request.spec, **_options(request, device))


def _options(request: ModelRequest, device: str) -> dict[str, Any]:
    return {
        "weights": request.weights_file,
        "precision": request.precision,
        "device": device,
        "code": request.code,
    }
