"""The tensors that a bundle's weights file has to hold, and the check that it holds them.

    plan = check_tensors(bundle)     # every backend does it first

A bundle's manifest says three times what its weights are: the model's configuration, the formats of its quantized matrices
and the table of tensors with their places. From the first two follows the third, entry by entry: names, types, shapes, in
order, each place where the one before ends. What is missing, unknown, or elsewhere is refused by name, so that no backend
can leave out a bias or a zero point and give other tokens. The first manifests did not tell the formats, which
are then those that the table shows.
"""

from collections.abc import Iterator
from itertools import islice

from .bundle import DTYPE_BITS, MANIFEST, Bundle
from .errors import UserError
from .layout import layout

FLOATS = ("float32", "float16", "bfloat16")
VECTOR, PAGE, LARGE = 64, 4096, 1 << 20                    # bytes that a tensor is aligned to: any, and one over LARGE
DEFAULT_CONTEXT = 8192            # positions of RoPE's tables, unless export.onnx is told otherwise


def check_tensors(bundle: Bundle) -> dict:
    """What is quantized, and how (a plan: `capabilities.py`). Raises UserError where the table of tensors is not the one that the
    configuration and the formats describe."""
    where, weights = bundle.folder / MANIFEST, bundle.manifest["weights"]
    table = {tensor["name"]: tensor for tensor in weights["tensors"]}
    try:
        told = "formats" in weights or "kv_cache" in bundle.model
        formats, cache = (weights["formats"], bundle.model["kv_cache"]) if told else _shown_by(table)
        most = len(weights["tensors"]) + 10_000            # of what may be asked for: a manifest may claim a billion experts
        expected = list(islice(_expected(bundle.model, formats, cache, table), most))
    except (UserError, KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"{where}: model.config or weights.formats cannot be read ({error!r}); export the bundle again") from None
    names = [name for name, _, _ in expected]
    if missing := [name for name in names if name not in table]:
        raise UserError(f"{where}: the weights lack {_some(missing)}, which the model has; export the bundle again")
    if unknown := [name for name in (*table, *formats) if name not in names and f"{name}.codes" not in names]:
        raise UserError(f"{where}: the weights hold {_some(unknown)}, for which the model has no place; export the bundle again")
    if len(table) != len(weights["tensors"]):
        raise UserError(f"{where}: a tensor is listed twice; export the bundle again")
    end, dense = 0, None
    for (name, dtypes, shape), tensor in zip(expected, weights["tensors"]):
        if dtypes is FLOATS:                               # what is not quantized has one type
            dense = dense or tensor["dtype"]
            dtypes = (dense,) if dense in FLOATS else FLOATS
        end += -end % (PAGE if tensor["bytes"] > LARGE else VECTOR)
        found = tensor["name"], tensor["dtype"], tuple(tensor["shape"]), tensor["offset"]
        if found != (name, tensor["dtype"] if tensor["dtype"] in dtypes else dtypes[0], shape, end):
            raise UserError(f"{where}: {found[0]} is {found[1]} {list(found[2])} at {found[3]}, where {name}, {' or '.join(dtypes)} "
                            f"{list(shape)} at {end}, should be; export the bundle again")
        end += tensor["bytes"]
    if end != weights["bytes"]:
        raise UserError(f"{where}: the tensors end at {end}, but the weights file at {weights['bytes']}; export the bundle again")
    return {"tensors": formats, "activations": bundle.model.get("activations") or {}, "kv_cache": cache}


def _expected(model: dict, formats: dict, cache: dict | None, table: dict) -> Iterator[tuple[str, tuple[str, ...], tuple[int, ...]]]:
    """(name, types it may have, shape) of every tensor, in order."""
    activations = model.get("activations") or {}

    def matrix(name: str, outputs: int, inputs: int, bias: bool = False, turned: bool = True):
        if name not in formats:
            yield f"{name}.weight", FLOATS, (inputs, outputs) if turned else (outputs, inputs)
        else:
            yield from _quantized(name, outputs, inputs, turned, **formats[name])
            excepted = [part.removesuffix("_proj") for part in activations.get("except", ())]
            if activations.get("per") == "tensor" and name.startswith("layers.") and name.rsplit(".", 1)[1] not in excepted:
                yield f"{name}.input_scale", ("float32",), ()
        if bias:
            yield f"{name}.bias", FLOATS, (outputs,)

    for item in layout(model, cache):
        if item.kind == "table":
            yield from matrix(item.name, *item.shape, turned=False)
        elif item.kind == "linear":                        # one matrix, but for parts that are stored differently
            apart = {f"{item.name.rpartition('.')[0]}.{part}".lstrip("."): outputs for part, outputs in item.parts.items()}
            if len(apart) > 1 and formats.get(item.name, {}).get("kind") == "levels":
                raise ValueError(f"{item.name}: matrices of levels are stored one by one")
            whole = item.name in formats or not any(part in formats or f"{part}.weight" in table for part in apart)
            for name, outputs in ({item.name: sum(item.parts.values())} if whole else apart).items():
                yield from matrix(name, outputs, *item.shape, item.bias)
        else:
            yield item.name, FLOATS if item.kind == "dense" else ("float32",), item.shape


def _shown_by(table: dict) -> tuple[dict, dict | None]:
    """Formats, and the cache's, of a bundle from before manifests told them: as its table shows them."""
    formats = {}
    for name in (tensor.removesuffix(".codes") for tensor in table if tensor.endswith(".codes")):
        codes, scales = table[f"{name}.codes"], table[f"{name}.scales"]["shape"]
        bits, kind = DTYPE_BITS[codes["dtype"]], "e4m3" if codes["dtype"].startswith("float8") else "int"
        by_inputs = bits in (4, 8) and name != "embed"
        group = 0 if len(scales) == 1 else codes["shape"][not by_inputs] // scales[not by_inputs]
        formats[name] = {"bits": bits, "group": group, "symmetric": f"{name}.zeros" not in table, "kind": kind}
    scale = table.get("layers.0.k_scale")
    return formats, scale and {"per": "channel" if scale["shape"][0] > 1 else "layer"}


def _quantized(name: str, outputs: int, inputs: int, turned: bool, bits: int, group: int, symmetric: bool, kind: str = "int",
               scale_bits: int = 16):
    """Codes, scales, levels and zero points of a matrix; `turned`: stored by inputs, as linears of 4 and 8 bits are."""
    levels, small = kind == "levels", scale_bits == 8
    if [type(value) for value in (bits, group, symmetric, scale_bits)] != [int, int, bool, int] or f"uint{bits}" not in DTYPE_BITS \
            or kind not in ("int", "e4m3", "levels") or group < 0 or group and inputs % group or levels and (bits > 4 or not symmetric) \
            or scale_bits not in (8, 16) or small and (not group or kind == "e4m3"):
        raise ValueError(f"{name}: {bits} bits of kind {kind} in groups of {group} of {inputs} inputs, symmetric {symmetric}, "
                         f"scales of {scale_bits} bits")
    groups = inputs // group if group else 1
    if bits not in (4, 8) or levels or small:              # as ONNX lacks them, in the checkpoint's form
        codes, zeros, turned, scales = f"uint{bits}", "uint8", False, (outputs, groups)
    else:
        codes = zeros = "float8_e4m3fn" if kind == "e4m3" else f"int{bits}"
        scales = (outputs,) if not group else (groups, outputs) if turned else (outputs, groups)
    yield f"{name}.codes", (codes,), (inputs, outputs) if turned else (outputs, inputs)
    yield f"{name}.scales", ("int8" if small else "float16",), scales
    if small:
        yield f"{name}.row_scales", ("float16",), (outputs, 1)
    if levels:
        yield f"{name}.levels", ("int8",), (1, 2**bits)
    if not symmetric:
        yield f"{name}.zeros", (zeros,), scales


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
