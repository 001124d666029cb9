"""Each family of the table at two blocks and a width of 64: the same wiring, in milliseconds."""

from typing import Any

from repa.cache_specs.tables import encoder_table, resolve_encoder

SMALL: dict[str, dict[str, Any]] = {
    "sam": {"depth": 2, "embed_dim": 48, "num_heads": 2, "global_attn_indexes": (1,), "img_size": 128},
    "sam2": {"stages": (1, 1, 2, 1), "embed_dim": 16, "global_att_blocks": (3,)},
    "vgg": {"mlp_ratio": 0.01},
}
SMALL_VIT = {"depth": 2, "embed_dim": 64, "num_heads": 2}

# The first model of each family, and of each family's variant.
FAMILIES = {
    entry.family + entry.name[entry.name.find("@") :] * ("@" in entry.name): entry.name
    for entry in reversed(encoder_table().values())
    if entry.loader != "builtin"
}


def small_spec(name: str, *, grid: int = 3, random_weights: bool = True) -> dict[str, Any]:
    """Return the spec of encoder `name` made small, for images of any size, on `grid` x `grid` tokens."""
    spec = resolve_encoder(f"{name}:grid={grid}", resolution=64, random_weights=random_weights).spec
    family = encoder_table()[name].family
    if family == "webssl":
        return {**spec, "width": 64, "depth": 2, "options": {"num_attention_heads": 2}}
    spec["options"] |= SMALL.get(family, SMALL_VIT)
    if spec["output"] == "tokens":
        spec |= {"width": 64, "depth": 2}
    if family == "sam":
        spec["input_size"] = [128, 128]
    if family == "sam2":
        spec["width"] = 128
    return spec
