"""TensorRT's messages as one sentence: the node, what it lacks, and the mend.

Its parser and builder speak in C++: conditions, functions, source files, a CUDA error for a missing driver behind each.
`sentence` keeps the words meant for people, finds the node they are about, and, where an input of the model decides what
TensorRT must know before it builds, offers `--fix`. The whole log is there with --verbose.
"""

import re

import onnx

from export.tensorrt.model import graphs, inputs, shape_of

BUILD_TIME = r"build-time constant|must be an initializer|only supports the .* as an initializer|is a shape tensor|is_weights"
SIMPLER = "replace the node, or export the model with fixed shapes"
# Part of a message: (problem, or None for TensorRT's own words; mend). The first that fits is taken.
KNOWN = (
    (r"ScopeType::kUNDEFINED", "TensorRT cannot analyse its branches", "export the model without the branch"),
    (r"no trip limit", None, "export the loop with a fixed trip count, or a recurrent layer as LSTM or GRU"),
    (r"has no runners|Could not find any implementation", "TensorRT has no kernel for it on these targets",
     "leave its step to the program around the model"),
    (r"[Pp]lugin", "TensorRT needs a plugin for it that is not here", "leave its step to the program around the model"),
    (BUILD_TIME, None, "export the model with that input constant"),
    (r"But type is|unsupported type|must have type|current input type|data type", None, "cast to float32 or int32 before the node"),
    (r"not consumed by|not produced by", None, "put DequantizeLinear behind such an input, QuantizeLinear before such an output"),
    (r"import initializer", "a constant cannot be read", "export the model again"),
    (r"out of memory|[Aa]llocat", "memory is short", "close other programs, or build on a larger machine"),
)


def sentence(message: str, model: onnx.ModelProto, name: str = "", operator: str = "") -> str:
    """TensorRT's message about the node `name` (where it says which) as "node (Operator): problem; mend"."""
    node = _node(message, model, name, operator)
    problem, mend = next(((problem, mend) for pattern, problem, mend in KNOWN if re.search(pattern, message)), (None, SIMPLER))
    deciding = _deciding(model, node) if re.search(f"{KNOWN[0][0]}|{BUILD_TIME}", message) else None
    if deciding:
        mend = f"fix the input that decides it: --fix {deciding}=VALUE"
    where = f"{node.name} ({node.op_type})" if node else f"{name} ({operator})" if name else operator or "the model"
    return f"{where}: {problem or _plain(message)}; {mend}"


def _plain(message: str) -> str:
    """The words in a message that are meant for people."""
    lines = [line for line in message.splitlines() if not re.match(r"Invalid Node|\[checkMacros", line)] or [message]
    coded = re.search(r"Error Code \d+: [\w ]+ \((.*)", lines[0])
    text = re.sub(r"\s*In \S+ at \S+:\d+\)?.*$", "", coded[1] if coded else lines[0])
    text = re.sub(r"^\[\S+ \S+\] ", "", text)                         # a source line and a function
    literals = re.findall(r'"([^"]*)"', text.split("&&")[-1]) if "&&" in text else []
    if literals:                                                      # condition && "words" "more words"
        text = "".join(literals)
    elif text.startswith("Assertion failed: "):                       # Assertion failed: condition: words
        text = re.sub(r"^Assertion failed: (.*?: (?=[A-Z`])|.*$)", "", text)
    elif text.startswith("Assertion "):                               # Assertion condition failed. words
        text = re.sub(r"^Assertion .*? failed\.?\s*", "", text)
    return text.strip(" .!:") or "TensorRT fails on it inside"


def _node(message: str, model: onnx.ModelProto, name: str, operator: str):
    nodes = {node.name: node for graph in graphs(model.graph) for node in graph.node}
    if name in nodes:
        return nodes[name]
    operator = "If" if "ScopeType" in message else operator
    if operator and not name:
        return next((node for node in nodes.values() if node.op_type == operator), None)
    named = [n for n in nodes if re.search(rf"(?<![\w/.]){re.escape(n)}(?![a-zA-Z/.])", message)]
    return nodes[max(named, key=len)] if named else None


def _deciding(model: onnx.ModelProto, node) -> str | None:
    """The small input of the model that a node's condition, axes or sizes come from, by value."""
    given, makers = inputs(model), {}
    for graph in graphs(model.graph):
        for maker in graph.node:
            makers |= {output: maker for output in maker.output}
    todo, seen = list(node.input if node.op_type == "If" else node.input[1:]) if node else [], set()
    while todo:
        name = todo.pop()
        if name in given and len(shape_of(given[name]) or ()) <= 1:
            return name
        if name in makers and name not in seen and makers[name].op_type not in ("Shape", "Size"):
            todo += makers[name].input
        seen.add(name)
    return None
