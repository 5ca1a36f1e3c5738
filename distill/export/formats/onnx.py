"""ONNX: one file, for ONNX Runtime and all that reads its format."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from itertools import starmap
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.export import ExportedProgram

from distill.export import program
from distill.export.program import INPUT, OUTPUT, Logits, Precision, Student, Takes

if TYPE_CHECKING:
    from onnx import ModelProto

OPSET = 20
PACKAGES: tuple[str, ...] = ("onnx", "onnxscript", "onnxruntime")
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8")
TAKES: Takes = "pictures"
MOST_BYTES = 2**31 - 2**20  # of one protocol-buffer file, with room for the graph itself
_SDPA = torch.ops.aten.scaled_dot_product_attention.default
_PIXELS = "pixels"  # between preprocessing and network


def file(precision: Precision) -> str:
    """The file's name."""
    return "model.onnx" if precision == "fp32" else f"model.{precision}.onnx"


def refusal(student: Student) -> str:
    """Why this student cannot be written; empty if it may."""
    size = sum(tensor.nbytes for tensor in student.network.state_dict().values())
    return f"{size / 1e9:.1f} GB of weights, the file holds 2 GB" if size > MOST_BYTES else ""


def write(student: Student, path: Path, precision: Precision) -> None:
    """Write the student as an ONNX file that takes any number of images.

    In float16 or int8 the preprocessing and the logits stay in float32.

    Raises:
        IncompatibleError: If the exporter knows no way.
    """
    name = student.network.model
    network = _translated(program.classifier(student, precision), name, student.outputs)
    if precision == "int8":
        batches = [student.squares(pixels) for pixels in student.calibration]
        network = _quantised(network, batches, whole=student.network.is_convolutional)
    if student.inside:
        network = _joined(_translated(program.resize(student), name, [_PIXELS]), network)
    said = {
        "model": name,
        "classes": json.dumps(student.classes),
        "preprocessing": json.dumps({} if student.inside else student.preprocessing.to_json()),
    }
    if student.stages:
        said["stages"] = json.dumps([stage.to_json() for stage in student.stages])
    for key, value in said.items():
        network.metadata_props.add(key=key, value=value)
    path.write_bytes(network.SerializeToString(deterministic=True))


def answers(student: Student, path: Path, batches: Sequence[np.ndarray]) -> list[Logits]:
    """What ONNX Runtime says of each batch."""
    return [logits for (logits,) in told(path, batches, [OUTPUT])]


def told(
    path: Path, batches: Sequence[np.ndarray], outputs: Sequence[str]
) -> list[list[np.ndarray]]:
    """What ONNX Runtime gives of each batch by these names."""
    session = opened(path)
    return [session.run(list(outputs), {INPUT: batch}) for batch in batches]


def opened(path: Path, *, threads: int = 0) -> Any:
    """An ONNX Runtime session on the CPU.

    Args:
        path: The file.
        threads: Cores that it uses; 0: all.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors; what it folds or leaves is no concern of a user
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _translated(exported: ExportedProgram, model: str, outputs: Sequence[str]) -> ModelProto:
    """The program in ONNX's operators, without notes on where they came from."""
    failed, hint = f"{model}: the ONNX exporter knows no way", "--format torch-export,safetensors"
    with program.attempt(failed, hint=hint):
        calls = [node for node in exported.graph.nodes if node.target is _SDPA]
        if any(call.args[0].meta["val"].ndim != 4 for call in calls):
            exported = exported.run_decompositions({_SDPA: _attention})
        found = torch.onnx.export(
            exported,
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=list(outputs),
            optimize=True,
            verbose=False,
        )
    assert found is not None
    network: ModelProto = found.model_proto
    for part in (network, network.graph):
        del part.metadata_props[:]
    for node in network.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*network.graph.input, *network.graph.output):
        del value.metadata_props[:]
    for tensor in network.graph.initializer:
        del tensor.metadata_props[:]
    del network.graph.value_info[:]  # shapes under the exporter's names of dimensions
    _name_dimensions(network)
    return network


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(Q Kᵀ · scale + mask) V, where the exporter cannot write it: over windows, in 5-D."""
    if query.ndim == 4 or is_causal or enable_gqa:
        return cast("Tensor", NotImplemented)  # left as it is
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.mT
    if mask is not None:
        blocked = mask.dtype == torch.bool
        scores = scores.masked_fill(~mask, -torch.inf) if blocked else scores + mask
    attended: Tensor = scores.softmax(dim=-1) @ value
    return attended


def _name_dimensions(network: ModelProto) -> None:
    """Free dimensions get the names that people know."""
    for value in (*network.graph.input, *network.graph.output):
        for dimension, name in zip(
            value.type.tensor_type.shape.dim, ("batch", "height", "width"), strict=False
        ):
            if dimension.dim_param:
                dimension.dim_param = name


def _joined(first: ModelProto, then: ModelProto) -> ModelProto:
    """One graph after the other."""
    import onnx

    first = onnx.compose.add_prefix(first, "preprocessing/", rename_inputs=False)
    first.ir_version = then.ir_version = min(first.ir_version, then.ir_version)
    joined: ModelProto = onnx.compose.merge_models(
        first, then, io_map=[(f"preprocessing/{_PIXELS}", INPUT)]
    )
    versions = {entry.domain: entry.version for entry in joined.opset_import}  # twice each by now
    del joined.opset_import[:]
    joined.opset_import.extend(starmap(onnx.helper.make_opsetid, versions.items()))
    return joined


def _quantised(
    network: ModelProto,
    calibration: Sequence[Float[np.ndarray, "b 3 S S"]],
    *,
    whole: bool,
) -> ModelProto:
    """The network in int8, static, with pairs of quantise and dequantise nodes (QDQ).

    Activations are unsigned and weights signed, by channel: what x86 with VNNI and ARM compute
    fastest.

    Args:
        network: In float32.
        calibration: Batches that it takes; each tensor's range is that of its values on them.
        whole: Quantise every operator that can be. Of a transformer only the products should be:
            normalisation, softmax and residual sums have outliers that eight bits cannot hold.
    """
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Batches(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._batches: Iterator[np.ndarray] = iter(calibration)

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self._batches, None)
            return None if batch is None else {INPUT: batch}

    with tempfile.TemporaryDirectory() as folder:
        source, prepared, out = (
            str(Path(folder) / name) for name in ("a.onnx", "b.onnx", "c.onnx")
        )
        onnx.save(network, source)
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        quantization.quantize_static(
            prepared,
            out,
            Batches(),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            op_types_to_quantize=None if whole else ["Conv", "Gemm", "MatMul"],
            # What a product gives is summed in 32 bits. Left at that, the logits are not cut off at
            # the largest of calibration, and attention has its outliers; it is also quicker.
            extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"]},
        )
        return onnx.load(out)
