"""`distill init`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from distill import console
from distill.cli._report import print_json, reporting

LISTED = 10  # bad files that are named


def init(
    folder: Annotated[Path, Argument(metavar="FOLDER", help="Images, one folder a class.")],
    teacher: Annotated[
        str | None,
        Option(
            metavar="MODEL", help="The teacher, such as timm/resnet50.a1_in1k; default by size."
        ),
    ] = None,
    student: Annotated[
        str | None,
        Option(metavar="MODEL", help="The student, such as vit or timm/NAME; default by size."),
    ] = None,
    out: Annotated[
        Path, Option(metavar="FILE", help="The recipe to write; nothing is overwritten.")
    ] = Path("recipe.yaml"),
    as_json: Annotated[
        bool, Option("--json", help="Print what was found as one line of JSON on stdout.")
    ] = False,
) -> None:
    """Write a commented recipe for your own images, and the recipe of its teacher.

    FOLDER has train/CLASS/ and test/CLASS/ (or val/CLASS/), or just CLASS/; then a file that
    splits the images into train and test is written too.

    Example: distill init photos --student timm/mobilenetv3_small_100.lamb_in1k
    """
    with reporting():
        from distill import advise

        found = advise.survey(folder)
        files = advise.propose(found, out, teacher=teacher, student=student)
        advise.write(files)
    bad = [*found.bad_train, *found.bad_test]
    for what in bad[:LISTED]:
        console.warn(what)
    if len(bad) > LISTED:
        console.warn(f"and {len(bad) - LISTED:,} more images that cannot be used")
    if found.bad_test:
        console.warn("test images are never skipped: mend or remove them before you train")
    console.say(
        f"{len(found.classes):,} classes, {len(found.train):,} training and {len(found.test):,} "
        f"test images, {found.side} px"
    )
    for path in files:
        console.say(f"wrote {path}")
    console.say(f"next: distill check {console.typed(out)}")
    if as_json:
        print_json(
            {
                "files": [str(path) for path in files],
                "classes": list(found.classes),
                "train": len(found.train),
                "test": len(found.test),
                "side": found.side,
                "bad": bad,
            }
        )
