"""Names that mean something to terminals, pages and programs are only names; secrets stay."""

from __future__ import annotations

import csv
import json
import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from markdown_it import MarkdownIt

from distill import console, yamlio
from distill.errors import DistillError, RecipeError
from distill.models import weights
from distill.recipe import Recipe
from tests.cli.conftest import ROOT, images
from tests.promises import Measured

CLASSES = (
    "[red]a[bold]",
    "<img src=x onerror=\"document.title='ran'\">",
    "a\nwarning: b",
    "\x1b[2J\x1b]52;c;aGk=\x07",
    "\x1b]8;;http:example.org\x1b\\link",
    "\u202egnp.exe",
    "=cmd|' C'!A0",
    "](javascript:alert(1))",
    "{{7*7}}{% raw %}",
    "- a: &b *c",
    "$\\frac{1}{0}$",
    "`tick`|pipe",
    "--help",
    " spaced ",
    "\"quoted' & twice",
    "é" * 127 + "x",
)
RUN = Path("run [", "x] \x1b[2J<b>{{7*7}}|=1\u202e")
RECIPE = "re [b] \x1b[31m<i>.yaml"
SECRETS = {
    "HF_TOKEN": "hf_plantedPLANTEDplanted00",
    "AWS_SECRET_ACCESS_KEY": "aws/planted+PLANTED/planted01",
    "AWS_ACCESS_KEY_ID": "AKIAPLANTEDPLANTED02",
    "WANDB_API_KEY": "wandbplantedplanted03",
    "GITHUB_TOKEN": "ghp_plantedplanted04",
}
# What a progress bar and colours need; nothing that was in a name.
ALLOWED = re.compile(rb"\x1b\[[0-9;]*m|\x1b\[\?25[lh]|\x1b\[[0-9]*[AK]")


class Made(NamedTuple):
    """A run of a set with such names, evaluated and exported, on a terminal."""

    folder: Path
    said: dict[str, bytes]

    @property
    def run(self) -> Path:
        return self.folder / RUN


class Tags(HTMLParser):
    """The tags of a page, and where they lead."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.attributes: set[str] = set()
        self.places: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.places |= {value or "" for name, value in attrs if name in ("href", "src")}


def on_a_terminal(*arguments: object, cwd: Path) -> tuple[int, bytes]:
    """Run `distill ARGUMENTS` with a terminal before it; what it writes there."""
    primary, secondary = pty.openpty()
    environment = {
        **os.environ,
        **SECRETS,
        "PYTHONPATH": str(ROOT),
        "TERM": "xterm-256color",
        "COLUMNS": "150",
        "DISTILL_DEBUG": "1",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "distill", *map(str, arguments)],
        cwd=cwd,
        env=environment,
        stdin=secondary,
        stdout=secondary,
        stderr=secondary,
    )
    os.close(secondary)
    said = b""
    try:
        while chunk := os.read(primary, 65_536):
            said += chunk
    except OSError:  # the other end is closed
        pass
    os.close(primary)
    return process.wait(), said


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("hostile")
    data = folder / "da [" / "ta] <u>\x1b[5m"
    for split, count in (("train", 3), ("test", 2)):
        images(data / split, *CLASSES, count=count, size=(8, 8))
    for i, path in enumerate(sorted(data.rglob("*.png"))):
        path.rename(path.with_name(f"=1+{i}[b]\x1b[1m<s>.png"))
    recipe: dict[str, Any] = {
        "data": {"name": "folder", "root": str(data), "image_size": 8},
        "student": {"model": "mlp", "width": 8},
        "objective": [{"term": "ce", "name": "[/x]\x1b[2J<b>"}],
        "optimizer": {"lr": 1e-3},
        "train": {"epochs": 1, "batch_size": 16},
    }
    (folder / RECIPE).write_text(yamlio.dump(recipe))
    said = {}
    for command in (
        ("check", RECIPE),
        ("train", RECIPE, "--out", RUN),
        ("evaluate", RUN, "--suite", "clean,cost", "--predictions", "said.csv"),
        ("export", RUN, "--format", "onnx,safetensors", "--no-latency"),
    ):
        status, text = on_a_terminal(*command, cwd=folder)
        assert status == 0, text.decode(errors="replace")
        said[command[0]] = text
    return Made(folder, said)


def written(made: Made) -> Iterator[Path]:
    yield from (path for path in made.folder.rglob("*") if path.is_file())


@pytest.mark.promise("R21")
def test_no_name_reaches_the_terminal_as_a_command(made: Made, measured: Measured) -> None:
    for command, said in made.said.items():
        assert b"Traceback" not in said
        left = ALLOWED.sub(b"", said)
        controls = {bytes([byte]) for byte in left if byte < 32 or byte == 127} - {b"\r", b"\n"}
        assert not controls, (command, controls)
        assert "\u202e".encode() not in left
    assert b"run [/x] \\x1b[2J<b>{{7*7}}" in made.said["train"]
    assert b"distill evaluate 'run [/x] " in made.said["train"]
    measured("hostile names on a terminal", f"{len(made.said)} commands, 0 control characters")


@pytest.mark.promise("R21")
def test_every_file_that_tells_names_tells_them_as_they_are(made: Made, measured: Measured) -> None:
    onnx = pytest.importorskip("onnx")
    classes = sorted(CLASSES, key=os.fsencode)
    found = json.loads((made.run / "evaluation.json").read_text())
    assert found["data"]["classes"] == len(classes)
    with (made.folder / "said.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * len(classes)
    assert {row["label"].removeprefix("'") for row in rows} == set(classes)
    cells = [value for row in rows for value in (row["name"], row["label"], row["predicted"])]
    assert not [cell for cell in cells if cell[:1] in "=+-@\t\r"]
    model = onnx.load(made.run / "export" / "model.onnx")
    assert json.loads({p.key: p.value for p in model.metadata_props}["classes"]) == classes
    measured("hostile names in JSON, CSV and ONNX", f"{len(classes)} of {len(classes)} classes")


@pytest.mark.promise("R21")
def test_a_model_card_shows_names_and_obeys_none(made: Made, measured: Measured) -> None:
    text = (made.run / "export" / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    assert isinstance(yamlio.load(front)[0], dict)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u202e]", text)
    tokens = [t for token in MarkdownIt("commonmark", {"html": True}).enable("table").parse(body)
              for t in (token, *(token.children or ()))]  # fmt: skip
    raw = {t.content.strip() for t in tokens if t.type in ("html_inline", "html_block")}
    assert not [one for one in raw if re.search(r"img|onerror|script|<[bisu]>", one)]
    links = [str(t.attrs["href"]) for t in tokens if t.type == "link_open"]
    assert all(re.match(r"https://|[\w.-]+$|#", link) for link in links)
    assert not [t for t in tokens if t.type == "image"]
    measured("hostile names in the model card", "0 become links, images or HTML")


@pytest.mark.promise("R21")
def test_a_browser_runs_nothing_of_a_report_and_asks_nobody(
    made: Made, tmp_path: Path, measured: Measured
) -> None:
    page = (made.run / "report.html").read_text()
    assert "<img src=x" not in page
    assert "&lt;img src=x" in page
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium here")
    shutil.copy(made.run / "report.html", tmp_path / "report.html")
    done = subprocess.run(
        [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--no-first-run", f"--user-data-dir={tmp_path / 'profile'}",
         f"--log-net-log={tmp_path / 'net.json'}", "--virtual-time-budget=2000", "--dump-dom",
         f"file://{tmp_path / 'report.html'}"],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr
    assert "<title>ran</title>" not in done.stdout
    tags = Tags(done.stdout)
    assert "script" not in tags.names
    assert not [one for one in tags.attributes if one.startswith("on") or one == "srcset"]
    assert all(re.match("data:|#|https://", place) for place in tags.places)
    asked = re.findall(r'"url":"(https?://[^"/]+)', (tmp_path / "net.json").read_text())
    assert {one for one in asked if not one.endswith(".google.com")} == set()  # the browser's own
    measured("hostile names in a report, in Chromium", "0 scripts run, 0 requests")


@pytest.mark.promise("R21")
def test_nothing_that_is_written_or_said_holds_a_secret_of_the_environment(
    made: Made, measured: Measured
) -> None:
    texts = {str(path): path.read_bytes() for path in written(made)} | made.said
    for name, text in texts.items():
        for secret in SECRETS.values():
            assert secret.encode() not in text, name
    measured("planted secrets", f"{len(SECRETS)} in {len(texts)} files and outputs: 0 found")


@pytest.mark.promise("R21")
@pytest.mark.parametrize("key", ["data.root", "cache.path", "data.transfer", "student.weights"])
@pytest.mark.parametrize(
    "address",
    [
        "https://ada:planted05@example.org/set",
        "s3://planted05@bucket/set",
        "https://example.org/set?sig=planted05&se=2030",
    ],
)
def test_an_address_with_a_secret_is_refused_and_not_repeated(
    key: str, address: str, tmp_path: Path, measured: Measured
) -> None:
    recipe = {
        "data": {"name": "digits"},
        "student": {"model": "mlp"},
        "objective": [{"term": "ce"}],
        "optimizer": {"lr": 1e-3},
        "train": {"epochs": 1, "batch_size": 16},
        "cache": {},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yamlio.dump(recipe))
    for given in ([f"{key}={address}"], []):
        if not given:
            section, _, name = key.partition(".")
            path.write_text(yamlio.dump({**recipe, section: {**recipe[section], name: address}}))  # type: ignore[dict-item]
        with pytest.raises(DistillError) as caught:
            Recipe.load(path, given)
        assert "a password or a signature" in str(caught.value)
        assert "~/.netrc" in caught.value.hint
        assert "planted05" not in console.plain(str(caught.value))
    measured("addresses with a secret in a recipe", "12 of 12 refused, and not repeated")


@pytest.mark.parametrize("name", [*CLASSES, str(RUN), RECIPE, "\ud800", "a\tb\x00", "\x9b31m"])
def test_a_line_for_the_user_is_text(name: str) -> None:
    from rich.text import Text

    shown = Text.from_markup(console.plain(name)).plain
    assert shown == console.visible(name)
    assert all(c.isprintable() or c == "\n" for c in shown)
    assert name in ("\ud800",) or not name.isprintable() or shown == name


@pytest.mark.parametrize(
    "name", ["a'; touch x; '.pth", "$(touch x).pt", "a b`touch x`.bin", "-x.pkl"]
)
def test_a_command_in_a_hint_is_one_that_may_be_copied(name: str) -> None:
    with pytest.raises(RecipeError, match="a pickle can run code") as caught:
        weights.load(name)
    words = shlex.split(caught.value.hint)
    assert words[-2:] == [name, str(Path(name).with_suffix(".safetensors"))]


def test_addresses_are_shown_without_what_they_tell() -> None:
    assert console.visible("https://a:b@c.org/d: not there") == "https://***@c.org/d: not there"
    assert console.visible("x s3://k@b/c y") == "x s3://***@b/c y"
    assert console.visible("https://c.org/d?sig=e&f=g h") == "https://c.org/d?*** h"
    assert console.visible("hf-hub:a/b@main ada@c.org?") == "hf-hub:a/b@main ada@c.org?"
