"""The networks of a build: which are asked for, each loaded once, and what is stored of one forward of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...cache_specs.derived import DERIVED, network_spec, read_method
from ...cache_specs.errors import UsageError
from ...cache_specs.fingerprint import canonical_json
from ...cache_specs.layout import layer_array
from ...cache_specs.schema import FEATURES, ComponentSpec, stored_layers
from ..deriving.choose import transform_of
from ..deriving.method import Derivation, Inputs
from ..models.autoencoders import load_autoencoder
from ..models.encoders import Encoder, load_encoder, network_of
from ..store.quantize import stored_tokens
from .request import ModelRequest

Encode = Callable[[torch.Tensor], dict[str, torch.Tensor]]  # one view's stored arrays, by name


@dataclass(frozen=True, kw_only=True)
class Network:
    """A model on a device, and the components that one forward of it gives: several stages, or what is made of one.

    `encode` returns, of images [b, 3, H, W] uint8 and some of the components, one view's stored arrays by path.
    """

    components: tuple[ComponentSpec, ...]
    encode: Callable[[torch.Tensor, Sequence[ComponentSpec]], dict[str, dict[str, torch.Tensor]]]


def load_networks(requests: Sequence[ModelRequest], device: str) -> list[Network]:
    """Load the models of `requests`, each once, in their order.

    Stages of one network share it and its forward, and so do tokens and what is derived of them.
    """
    alike: dict[str, list[ModelRequest]] = {}
    for request in requests:
        spec = network_spec(request.spec)
        own = network_of(spec) if spec.get("stage") is not None else spec
        key = canonical_json([request.kind, dict(own), request.precision, str(request.weights_file)])
        alike.setdefault(key, []).append(request)
    return [_load_network(group, device) for group in alike.values()]


def _load_network(requests: Sequence[ModelRequest], device: str) -> Network:
    if requests[0].kind != FEATURES:
        (request,) = requests
        autoencoder = load_autoencoder(request.spec, **_options(request, device))
        latents = request.component(autoencoder.weights)

        def moments(images: torch.Tensor) -> torch.Tensor:
            stored = images if latents.dtype == "uint8" else autoencoder.encode(images).half()
            return stored.contiguous()  # on a GPU moments may come with their channels last

        return Network(components=(latents,), encode=lambda images, asked: {latents.path: {"moments": moments(images)}})
    encoder = load_source(requests[0], device)
    staged = network_spec(requests[0].spec).get("stage") is not None
    if len(requests) > 1 and staged:
        encoder.check([network_spec(request.spec) for request in requests])
    made = {request.path: _made_of_layers(request, encoder) for request in requests}
    components = tuple(request.component(made[request.path][1]) for request in requests)

    def encode(images: torch.Tensor, asked: Sequence[ComponentSpec]) -> dict[str, dict[str, torch.Tensor]]:
        layers: list[Layers]
        if staged:
            stages = encoder.stages(images, [network_spec(component.spec) for component in asked])
            layers = [[(tokens, None)] for tokens in stages]
        else:
            layers = [encoder.by_layer(images)] * len(asked)
        return {component.path: made[component.path][0](of) for component, of in zip(asked, layers, strict=True)}

    return Network(components=components, encode=encode)


Layers = Sequence[tuple[torch.Tensor, torch.Tensor | None]]  # tokens [b, T, E] and class token of each, float32


def _made_of_layers(request: ModelRequest, encoder: Encoder) -> tuple[Callable[[Layers], dict[str, torch.Tensor]], str]:
    """Return the function from an encoder's layers to what is stored of them, and what is to be said of its weights."""
    if DERIVED not in request.spec:
        return lambda layers: _stored_layers(request, layers), encoder.weights
    assert request.fit is not None, request.name
    fit, derived = request.fit, request.spec[DERIVED]
    before = fit.sources[derived["from"][0]]["weights"]
    if before != encoder.weights:
        raise UsageError(
            f"the weights of {request.spec['entry']} ({encoder.weights}) are not those that fits/{fit.name} was made "
            f"with ({before}); give the same file with --weights {request.spec['entry']}=FILE"
        )
    derivation = Derivation(transform_of(read_method(derived["method"])), fit, encoder.device)
    return lambda layers: stored_tokens(derivation(source_inputs(layers)), request.dtype), fit.weights


def _stored_layers(request: ModelRequest, layers: Layers) -> dict[str, torch.Tensor]:
    stored: dict[str, torch.Tensor] = {}
    for layer, (tokens, cls_token) in zip(stored_layers(request.spec), layers, strict=True):
        arrays = stored_tokens(tokens, request.dtype)
        if cls_token is not None:
            arrays["cls_token"] = cls_token.half()
        stored |= {layer_array(name, layer): values for name, values in arrays.items()}
    return stored


def source_inputs(layers: Layers) -> Inputs:
    """Return an encoder's layers as they would be read from a component of them, in float16."""
    return Inputs(tokens=torch.cat([tokens.half().float() for tokens, _ in layers], dim=2))


def load_model(request: ModelRequest, device: str) -> tuple[Encode, str]:
    """Load a model; return its function from images [b, 3, H, W] uint8 to one view's stored arrays, and its weights."""
    network = _load_network([request], device)
    (component,) = network.components
    return lambda images: network.encode(images, [component])[component.path], component.weights


def load_source(request: ModelRequest, device: str) -> Encoder:
    """Load the encoder behind a request."""
    return load_encoder(network_spec(request.spec), **_options(request, device))


def _options(request: ModelRequest, device: str) -> dict[str, Any]:
    return {
        "weights": request.weights_file,
        "precision": request.precision,
        "device": device,
        "code": request.code,
    }
