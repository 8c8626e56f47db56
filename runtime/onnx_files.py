"""Which files an ONNX graph reads besides itself, found without the onnx package.

ONNX Runtime maps whatever file in its folder a tensor names. A bundle's graph may name only files that the manifest lists,
whose sizes were checked and whose hashes `verify` compares. This walks the few protobuf messages in which a tensor can lie
(onnx.proto3) and looks at nothing else in them.
"""

from collections.abc import Iterator
from pathlib import PurePosixPath

from .bundle import Bundle
from .errors import UserError

# Message -> field number -> the message there. "entry" is a StringStringEntryProto of a tensor's external_data.
_WAYS = {"model": {7: "graph", 20: "training", 25: "function"}, "training": {1: "graph", 2: "graph"},
         "graph": {1: "node", 5: "tensor", 15: "sparse"}, "function": {7: "node", 11: "attribute"}, "node": {5: "attribute"},
         "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
         "sparse": {1: "tensor", 2: "tensor"}, "tensor": {13: "entry"}}


def check_external_data(bundle: Bundle, name: str) -> None:
    """Raises UserError where the bundle's graph `name` reads a file that the manifest does not list, or is no ONNX model."""
    path, folder = bundle.path(name), PurePosixPath(name).parent
    try:
        found = set(_locations(memoryview(path.read_bytes()), "model"))
    except (OSError, ValueError, IndexError, RecursionError) as error:
        raise UserError(f"{path}: ONNX Runtime cannot load it: it is no ONNX model ({error}); export the bundle again") from None
    for location in sorted(found):
        if str(folder / location) not in bundle.manifest["files"]:
            raise UserError(f"{path}: reads the file {location!r}, which the manifest does not list; export the bundle again")


def _locations(message: memoryview, kind: str) -> Iterator[str]:
    """The values of every external_data entry "location" in a message. Raises ValueError or IndexError for what is none."""
    if b"location" not in message.tobytes():                  # most nodes: nothing to walk
        return
    if kind == "entry":
        fields = [(number, value) for number, value in _fields(message)]
        if any(number == 1 and bytes(value) == b"location" for number, value in fields):
            yield from (bytes(value).decode() for number, value in fields if number == 2)
        return
    for number, value in _fields(message):
        if number in _WAYS[kind]:
            yield from _locations(value, _WAYS[kind][number])


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Number and contents of the length-delimited fields of a message; others are passed over."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        wire = tag & 7
        if wire == 0:
            _, at = _varint(message, at)
        elif wire in (1, 5):
            at += 8 if wire == 1 else 4
        elif wire == 2:
            size, at = _varint(message, at)
            yield tag >> 3, message[at:at + size]
            at += size
        else:
            raise ValueError(f"a field of wire type {wire}")
        if at > len(message):
            raise ValueError("a field that is cut off")


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = message[at]
        value, at = value | (byte & 127) << shift, at + 1
        if byte < 128:
            return value, at
    raise ValueError("a number that does not end")
