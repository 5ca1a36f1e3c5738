"""A `.pt2` file: a program of `torch.export`, for any process that has PyTorch.

In int8 only where torchao is installed. Such a program needs no torchao to run, but its process has
to `import torch.ao.quantization.fx._decomposed` first, which makes the operators known.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.export import ExportedProgram

from distill.errors import VerificationError
from distill.export import program
from distill.export.program import OUTPUT, Logits, Precision, Resize, Student, Takes

QUANTISER = "torchao"
PACKAGES: tuple[str, ...] = ()
PRECISIONS: tuple[Precision, ...] = ("fp32", "int8") if find_spec(QUANTISER) else ("fp32",)
TAKES: Takes = "pictures"

# A process of its own, that neither sees the toolkit's packages nor imports them.
_OPERATORS = "import torch.ao.quantization.fx._decomposed"
_ANSWER = """
import sys
import numpy, torch
program, batches, answers, *outputs = sys.argv[1:]
student, found = torch.export.load(program).module(), {}
with numpy.load(batches, allow_pickle=False) as stored, torch.no_grad():
    for batch in stored.files:
        answer = student(torch.from_numpy(stored[batch]))
        answer = answer if isinstance(answer, dict) else {"logits": answer}
        found |= {f"{batch} {name}": answer[name].numpy() for name in outputs}
assert not any(name.partition(".")[0] in ("distill", "timm", "torchao") for name in sys.modules)
numpy.savez(answers, **found)
"""


def file(precision: Precision) -> str:
    """The file's name."""
    return "model.pt2" if precision == "fp32" else f"model.{precision}.pt2"


def refusal(student: Student) -> str:
    """Nothing is known beforehand."""
    return ""


def write(student: Student, path: Path, precision: Precision) -> None:
    """Write the student as a program that takes any number of images, class names beside it.

    In int8 the preprocessing and the logits stay in float32.

    Raises:
        IncompatibleError: If torch.export or torchao cannot follow the student.
    """
    exported = _quantised(student) if precision == "int8" else program.whole(student)
    names = {"classes.json": json.dumps(student.classes)}
    if student.stages:
        names["stages.json"] = json.dumps([stage.to_json() for stage in student.stages])
    stream = io.BytesIO()  # torch's own writer ends the process where the disk is full
    torch.export.save(exported, stream, extra_files=names)
    path.write_bytes(stream.getvalue())


def answers(student: Student, path: Path, batches: Sequence[np.ndarray]) -> list[Logits]:
    """What a fresh process says of each batch, in which nothing but PyTorch was imported.

    Raises:
        VerificationError: If that process cannot load or run the file.
    """
    return [logits for (logits,) in told(path, batches, [OUTPUT])]


def told(
    path: Path, batches: Sequence[np.ndarray], outputs: Sequence[str]
) -> list[list[np.ndarray]]:
    """What a fresh process gives of each batch by these names, as in `answers`."""
    with tempfile.TemporaryDirectory() as folder:
        stored, answers = Path(folder) / "batches.npz", Path(folder) / "answers.npz"
        names = [f"{i}" for i in range(len(batches))]
        script = f"{_OPERATORS if path.name == file('int8') else ''}\n{_ANSWER}"
        np.savez(stored, allow_pickle=False, **dict(zip(names, batches, strict=True)))
        done = subprocess.run(
            [sys.executable, "-I", "-c", script, path.resolve(), stored, answers, *outputs],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise VerificationError(f"{path.name}: a fresh process cannot run it: {last}")
        with np.load(answers, allow_pickle=False) as found:
            return [[found[f"{batch} {name}"] for name in outputs] for batch in names]


def _quantised(student: Student) -> ExportedProgram:
    """The student in int8, static, as x86 computes it: products, with what is around in float32."""
    model = student.network.model
    module: Any = program.classifier(student, notes=True).module()
    failed = f"{model}: torchao cannot quantise it"
    with program.attempt(failed, hint="--format onnx"), torch.no_grad():
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

        settings = x86.get_default_x86_inductor_quantization_config()
        module = prepare_pt2e(module, x86.X86InductorQuantizer().set_global(settings))
        for pixels in student.calibration:
            module(torch.from_numpy(student.squares(pixels)))
        module = convert_pt2e(module)
    _drop_unused(module)
    if student.inside:
        module = nn.Sequential(Resize(student.preprocessing), module)
    return program.traced(module, student.example, model, any_size=student.inside)


def _drop_unused(module: torch.fx.GraphModule) -> None:
    """Remove the tensors that no node reads: weights in float32, whose int8 copies are read."""
    read = {node.target for node in module.graph.nodes if node.op == "get_attr"}
    for name in [*dict(module.named_parameters()), *dict(module.named_buffers())]:
        if name not in read:
            owner, _, tensor = name.rpartition(".")
            delattr(module.get_submodule(owner), tensor)
