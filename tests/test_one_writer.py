"""All that reaches a disk goes through `storage`, or into a folder that is gone in the end."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from tests.promises import Measured
from tests.test_architecture import FILES, NAMES, ROOT, TREES

# Methods of paths, and functions of os, shutil and savers of others, that write or remove.
METHODS = re.compile(
    r".*\.(write_text|write_bytes|unlink|rmdir|touch|mkdir|rename|symlink_to|hardlink_to|chmod"
    r"|extractall|extract|tofile|save|savez\w*|savetxt|save_file|save_for_hf|save_model"
    r"|save_pretrained|serialize_file)"
    r"|os\.(replace|rename|renames|remove|removedirs|link|symlink|makedirs|truncate|mkfifo|mknod)"
    r"|shutil\.(rmtree|move|copy\w*|make_archive|unpack_archive)"
    r"|tempfile\.(mkdtemp|mkstemp|mktemp|NamedTemporaryFile)"
)
# Those that give bytes, or write into memory, or are ours and go through `storage`.
NOT_TO_DISK = {"safetensors.torch.save", "checkpoint.save"}
SCRATCH = re.compile(r"(storage\.(staged|writing|passing)|tempfile\.TemporaryDirectory)\(")
# Functions that are given a path in a folder that their caller staged, by the names of it.
GIVEN = {
    "distill/export/formats/": {"path", "package"},  # savers of others need one
    "distill/data/download.py": {"path", "archive", "plain"},
}


def _writes(call: ast.Call) -> bool:
    name, said = ast.unparse(call.func), ast.unparse(call)
    if name in NOT_TO_DISK or "os.devnull" in said:
        return False
    if name == "os.open":
        return bool(re.search(r"O_(WRONLY|RDWR|CREAT|APPEND|TRUNC)", said))
    if name == "open" or name.endswith((".open", ".ZipFile", ".fdopen", ".TarFile", ".GzipFile")):
        words = [*call.args, *(each.value for each in call.keywords if each.arg == "mode")]
        modes = [each.value for each in words if isinstance(each, ast.Constant)]
        return any(
            isinstance(m, str) and re.fullmatch(r"[rbt]*[wax+][rwbatx+:gz]*", m) for m in modes
        )
    if name.endswith(".replace") and name != "os.replace":  # of a string it has two arguments
        return len(call.args) == 1
    return METHODS.fullmatch(name) is not None


def _names(node: ast.AST) -> set[str]:
    return {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}


def _bindings(function: ast.AST) -> Iterator[tuple[ast.expr, ast.expr]]:
    """What is bound to names within a function, and what it is made of."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            yield from ((target, node.value) for target in node.targets)
        elif isinstance(node, ast.For | ast.comprehension):
            yield node.target, node.iter
        elif isinstance(node, ast.withitem) and node.optional_vars is not None:
            yield node.optional_vars, node.context_expr


def _scratch(function: ast.FunctionDef, name: str) -> set[str]:
    """The names that stand for something in a folder that is gone in the end, or for memory."""
    arguments = {each.arg for each in function.args.args}
    given = {each for place, names in GIVEN.items() if name.startswith(place) for each in names}
    found = arguments & {"aside", *given}
    bound = list(_bindings(function))
    for target, value in bound:
        if SCRATCH.match(ast.unparse(value)) or "BytesIO()" in ast.unparse(value):
            found |= _names(target)
    for _ in bound:
        for target, value in bound:
            if _names(value) & found:
                found |= _names(target)
    return found


def strays(tree: ast.Module, name: str) -> Iterator[str]:
    """Every call that writes elsewhere."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    allowed = {
        id(call)
        for function in functions
        if (scratch := _scratch(function, name))
        for call in ast.walk(function)
        if isinstance(call, ast.Call) and _names(call) & scratch
    }
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and _writes(call) and id(call) not in allowed:
            yield f"{name}:{call.lineno}: {ast.unparse(call)}"


STRAY = """
def f(path, other, data):
    path.write_bytes(data)
    path.write_text("a")
    path.unlink()
    path.mkdir()
    path.touch()
    path.rename(other)
    path.replace(other)
    path.open("w")
    path.open("r+b")
    path.open(mode="ab")
    open(path, "wb")
    io.open(path, "xb")
    gzip.open(path, "wb")
    tarfile.open(path, "w:gz")
    zipfile.ZipFile(path, "w")
    os.open(path, os.O_RDWR | os.O_CREAT)
    os.replace(path, other)
    os.remove(path)
    os.makedirs(path)
    os.truncate(path, 3)
    shutil.rmtree(path)
    shutil.copyfile(path, other)
    tempfile.mkdtemp()
    np.save(path, data)
    np.savez(path, data)
    torch.save(data, path)
    torch.export.save(data, path)
    safetensors.torch.save_file(data, path)
    image.save(path, "PNG")
    archive.extractall(path)
"""
ALLOWED = """
def f(path, name, data):
    path.open()
    path.open("rb")
    gzip.open(path)
    os.open(path, os.O_RDONLY)
    name.replace("a", "b")
    safetensors.torch.save(data)
    stream = io.BytesIO()
    image.save(stream, "PNG")
    storage.write(path, data)
    with storage.staged(path) as aside:
        file = aside / name
        file.write_bytes(data)
        for each in aside.glob("*"):
            each.unlink()
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder) / name, data)
"""


@pytest.mark.promise("R2")
def test_only_storage_writes_to_disk(measured: Measured) -> None:
    others = [path for path in FILES if not NAMES[path].startswith("distill/storage/")]
    assert [stray for path in others for stray in strays(TREES[path], NAMES[path])] == []
    kinds = len(list(strays(ast.parse(STRAY), "distill/a.py")))
    assert kinds == len(STRAY.strip().splitlines()) - 1
    assert list(strays(ast.parse(ALLOWED), "distill/a.py")) == []
    measured(
        "writes to disk that do not go through the one writer",
        f"0 in {len(others)} files ({kinds} kinds are found by the rule)",
    )


def test_savers_of_others_write_where_export_staged_a_folder() -> None:
    """The exceptions of the rule above."""
    export, download = (
        (ROOT / "distill" / name).read_text() for name in ("export/__init__.py", "data/download.py")
    )
    assert re.findall(r"form\.write\(.*\)", export) == ["form.write(given, path, precision)"]
    assert "path = aside / form.file(precision)" in export
    assert "storage.staged(out) as aside" in export
    assert "storage.staged(folder) as aside" in download
    assert re.findall(r"(?<!def )_download\(.*\)", download) == ["_download(remote, path)"]
    assert re.findall(r"(?<!def )_unpacked\(\w+\)", download) == ["_unpacked(path)"]
    assert "path = aside / " in download
