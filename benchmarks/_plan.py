"""The runs of proof.py: Fashion-MNIST on a CPU, an hour and longer; CIFAR-10 on a GPU; inductive
biases on digits.

Names are folders below `--out`; a teacher's is its recipe's, so that the recipes that name it find
it. All sides of a comparison are one recipe, and what differs stands in the overrides.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from typing import NamedTuple

ALONE = "--set teachers=[] --set 'objective=[{term: ce}]'"
SMOOTH = "--set teachers=[] --set 'objective=[{term: ce, smoothing: 0.1}]'"


class Run(NamedTuple):
    """One command of ours; `{out}` in it is where the runs are."""

    experiment: str
    command: str
    needs: tuple[str, ...] = ()
    condition: str = ""  # what the seeds of one side of a comparison have in common
    seed: int = 0
    against: str = ""  # the condition that this one is compared with


def seeds(
    experiment: str,
    condition: str,
    command: str,
    count: int,
    *,
    needs: Iterable[str] = (),
    against: str = "",
) -> dict[str, Run]:
    """A condition over several seeds: other images, views, order and initial weights.

    What is needed may differ by seed: `{seed}` is replaced there and in the command. Left out,
    `against` is the student alone: `weak-alone` for `weak-kd`.
    """
    against = against or f"{condition.partition('-')[0]}-alone"
    found = {}
    for seed in range(count):
        words = command.replace("{seed}", str(seed))
        own = tuple(need.replace("{seed}", str(seed)) for need in needs)
        text = f"{words} --set train.seed={seed} --set data.seed={seed}"
        found[f"{condition}-{seed}"] = Run(experiment, text, own, condition, seed, against)
    return found


def taught(name: str) -> str:
    """The overrides that put another teacher in the place of a recipe's own."""
    return f"--set 'teachers=[{{weights: {{out}}/{name}}}]'"


def evaluated(experiment: str, suite: str, *names: str) -> Run:
    """What `distill evaluate` finds of finished runs and of their teachers."""
    runs = " ".join(f"{{out}}/{name}" for name in names)
    return Run(experiment, f"evaluate {runs} --suite {suite}", names)


FASHION, CIFAR = "recipes/fashion-mnist", "recipes/cifar10"
WEAK, STRONG = f"train {FASHION}/few-vit-weak.yaml", f"train {FASHION}/few-vit-strong.yaml"
OMITTED = f"train {FASHION}/omitted.yaml"
FEATURES, FEW_CNN = f"train {FASHION}/few-vit-features.yaml", f"train {FASHION}/few-cnn.yaml"
TEACHER = f"train {FASHION}/teacher-cnn.yaml"
# The teachers' runs lie beside that of the training.
CACHE = "teacher-cache {} --views {} --run {{out}}/{}-{{seed}}".format
CACHED = "--cache {{out}}/{}-{{seed}} --set cache.views={}".format

SEEDS = 3
LONG = "--set train.epochs=200"
FIRST = "--set train.epochs=1 --set optimizer.warmup_epochs=0.1 --set data.augment=[]"
CPU = (
    {
        "teacher-cnn": Run("E0", TEACHER),
        "teacher-vit-small": Run("E0", f"train {FASHION}/teacher-vit-small.yaml"),
        # The longest: it begins as soon as its teacher is there.
        "efficiency": Run(
            "E6",
            f"sample-efficiency {FASHION}/few-vit-weak.yaml {FASHION}/few-cnn-alone.yaml "
            "--baseline --sizes 500,2000,8000 --set data.fraction=1 --set train.epochs=2 "
            "--set optimizer.warmup_epochs=0.1",
            ("teacher-cnn",),
        ),
    }
    | seeds("E1a", "weak-alone", f"{WEAK} {ALONE}", SEEDS)
    | seeds("E2a", "weak-kd", WEAK, SEEDS, needs=["teacher-cnn"])
    | seeds("E1b", "strong-alone", f"{STRONG} {ALONE}", SEEDS)
    | seeds("E2b", "strong-kd", STRONG, SEEDS, needs=["teacher-cnn"])
    | seeds(
        "E2c", "cache", CACHE(f"{FASHION}/few-vit-strong.yaml", 16, "strong-cached"), SEEDS,
        needs=["teacher-cnn"],
    )
    | seeds(
        "E2c", "strong-cached",
        f"{STRONG} {CACHED('cache', 16)}", SEEDS,
        needs=["teacher-cnn", "cache-{seed}"],
    )
    | seeds("E3", "weak-features", FEATURES, SEEDS, needs=["teacher-cnn"])
    | seeds("E4", "cnn-alone", f"{FEW_CNN} {ALONE}", SEEDS)
    | seeds("E4", "cnn-kd", FEW_CNN, SEEDS, needs=["teacher-cnn"])
    | seeds(
        "E4", "cnn-vit-guidance", f"train {FASHION}/few-cnn-guidance.yaml", SEEDS,
        needs=["teacher-vit-small"],
    )
    | {
        "evaluation": evaluated(
            "E7", "all", "weak-alone-0", "weak-kd-0", "weak-features-0", "strong-alone-0",
            "strong-kd-0", "cnn-alone-0", "cnn-kd-0", "cnn-vit-guidance-0",
        ),
    }
    | seeds("control", "weak-smoothing", f"{WEAK} {SMOOTH}", SEEDS)
    | {
        "teacher-untrained": Run(
            "control",
            f"{TEACHER} --set optimizer.lr=1e-9 --set optimizer.warmup_epochs=0 "
            "--set train.epochs=1 --set data.fraction=0.01",
        ),
        "teacher-poor": Run(
            "control",
            f"{TEACHER} --set student.model=mlp --set data.fraction=0.005 "
            "--set optimizer.lr=0.01 --set train.epochs=5 --set train.batch_size=50",
        ),
    }
    | seeds(
        "control", "weak-poor", f"{WEAK} {taught('teacher-poor')}", SEEDS, needs=["teacher-poor"],
    )
    | seeds(
        "control", "weak-untrained", f"{WEAK} {taught('teacher-untrained')}", 1,
        needs=["teacher-untrained"],
    )
    | {
        "temperatures": Run(
            "E5",
            f"temperature-sweep {FASHION}/few-vit-weak.yaml --temperatures 1,2,4,8,16 "
            "--seeds 0,1 --set train.epochs=40",
            ("teacher-cnn",),
        ),
        "boot-alone": Run("E8", f"{OMITTED} {ALONE}"),
        "boot-kd": Run("E8", OMITTED, ("teacher-cnn",)),
        "dress-alone": Run("E8", f"{OMITTED} --set data.omit=[Dress] {ALONE}"),
        "dress-kd": Run("E8", f"{OMITTED} --set data.omit=[Dress]", ("teacher-cnn",)),
        "omitted": evaluated("E8", "clean", "boot-alone", "boot-kd", "dress-alone", "dress-kd"),
        "first-cnn": Run("first epoch", f"train {FASHION}/cnn-to-cnn.yaml {ALONE} {FIRST}"),
        "first-vit": Run(
            "first epoch",
            f"train {FASHION}/cnn-to-vit.yaml {ALONE} {FIRST} --set train.batch_size=64 "
            "--set optimizer.lr=2e-3",
        ),
    }
    # What was missed is pursued: a quarter of an hour on top of the hour.
    | seeds("E1a", "long-alone", f"{WEAK} {ALONE} {LONG}", 1)
    | seeds("E2a", "long-kd", f"{WEAK} {LONG}", 1, needs=["teacher-cnn"])
    | {
        # Does the student lose its robustness to a teacher that has never seen such views?
        "teacher-strong": Run("E7", f"{TEACHER} --set 'data.augment=[crop, flip, randaugment]'"),
    }
    | seeds(
        "E7", "strong-known", f"{STRONG} {taught('teacher-strong')}", 1, needs=["teacher-strong"],
    )
    | {
        "robust": evaluated(
            "E7", "corruptions", "strong-alone-0", "strong-kd-0", "strong-known-0",
        ),
    }
    | {
        "efficiency-cnn": Run(
            "E6",
            f"sample-efficiency {FASHION}/few-cnn.yaml --baseline --teacher all "
            "--sizes 500,2000,8000 --set data.fraction=1 --set train.epochs=2 "
            "--set optimizer.warmup_epochs=0.1",
            ("teacher-cnn",),
        ),
    }
)  # fmt: skip

FAR = "--set train.epochs=800"
EXTENDED = (
    # What the hour has no room for: the student's 2,000 images eight times as long, by a teacher
    # that has seen all images and by one that has seen these.
    {"teacher-cnn": Run("E0", TEACHER)}
    | seeds("E1a", "far-alone", f"{WEAK} {ALONE} {FAR}", SEEDS)
    | seeds(
        "E2a", "cache",
        CACHE(f"{FASHION}/few-vit-weak.yaml", 64, "far-kd"), SEEDS, needs=["teacher-cnn"],
    )
    | seeds(
        "E2a", "far-kd", f"{WEAK} {CACHED('cache', 64)} {FAR}", SEEDS,
        needs=["teacher-cnn", "cache-{seed}"],
    )
    | {
        "teacher-few": Run(
            "E6", f"{TEACHER} --set data.fraction=0.037 --set train.epochs=100 "
            "--set optimizer.warmup_epochs=5",
        ),
    }
    | seeds(
        "E6", "cache-few",
        CACHE(f"{FASHION}/few-vit-weak.yaml {taught('teacher-few')}", 64, "far-same"), 1,
        needs=["teacher-few"],
    )
    | seeds(
        "E6", "far-same",
        f"{WEAK} {taught('teacher-few')} {CACHED('cache-few', 64)} {FAR}", 1,
        needs=["teacher-few", "cache-few-{seed}"], against="far-alone",
    )
    # All images, every direction.
    | {
        "teacher-vit": Run("E0", f"train {FASHION}/teacher-vit.yaml"),
        **{
            f"{teacher}-to-{student}": Run(
                "E4", f"train {FASHION}/{teacher}-to-{student}.yaml --baseline",
                (f"teacher-{teacher}",),
            )
            for student in ("cnn", "vit") for teacher in ("cnn", "vit")
        },
    }
)  # fmt: skip

VIT, RESNET = f"train {CIFAR}/cnn-to-vit.yaml", f"train {CIFAR}/cnn-to-resnet20.yaml"
SHORT = "--set train.epochs=40"
CAT = "--set data.omit=[cat] --set train.epochs=20"
GPU = (
    # Three calls of eight minutes on one H200, by the speeds of earlier runs: what matters
    # most comes first.
    {"teacher-cnn": Run("E0", f"train {CIFAR}/teacher-cnn.yaml")}
    | seeds("E1b", "strong-alone", f"{VIT} {ALONE}", 1)
    | seeds("E2b", "strong-kd", VIT, 1, needs=["teacher-cnn"])
    | seeds("E4", "cnn-alone", f"{RESNET} {ALONE}", 3)
    | seeds("E4", "cnn-kd", RESNET, 3, needs=["teacher-cnn"])
    | seeds(
        "E2c", "cache", CACHE(f"{CIFAR}/cnn-to-vit.yaml", 16, "strong-cached"), 1,
        needs=["teacher-cnn"],
    )
    | seeds(
        "E2c", "strong-cached", f"{VIT} {CACHED('cache', 16)}", 1,
        needs=["teacher-cnn", "cache-{seed}"],
    )
    | seeds(
        "E4", "cnn-vit-guidance",
        f"train {CIFAR}/vit-to-cnn-guidance.yaml {taught('strong-kd-0')}", 3,
        needs=["strong-kd-0"],
    )
    | {
        "temperatures": Run(
            "E5",
            f"temperature-sweep {CIFAR}/cnn-to-resnet20.yaml --temperatures 1,2,4,8,16 "
            "--seeds 0,1 --set train.epochs=10",
            ("teacher-cnn",),
        ),
        "efficiency": Run(
            "E6",
            f"sample-efficiency {CIFAR}/cnn-to-vit-weak.yaml {CIFAR}/resnet20-alone.yaml "
            "--baseline --sizes 1000,4000 --set train.epochs=8 "
            "--set optimizer.warmup_epochs=1",
            ("teacher-cnn",),
        ),
        "cat-alone": Run("E8", f"{VIT} {ALONE} {CAT}"),
        "cat-kd": Run("E8", f"{VIT} {CAT}", ("teacher-cnn",)),
        "omitted": evaluated("E8", "clean", "cat-alone", "cat-kd"),
        "evaluation": evaluated(
            "E7", "all", "strong-alone-0", "strong-kd-0", "cnn-alone-0", "cnn-kd-0",
        ),
    }
    | seeds("E1a", "weak-alone", f"train {CIFAR}/cnn-to-vit-weak.yaml {ALONE} {SHORT}", 1)
    | seeds(
        "E2a", "weak-kd", f"train {CIFAR}/cnn-to-vit-weak.yaml {SHORT}", 1, needs=["teacher-cnn"],
    )
    | seeds(
        "E3", "strong-features",
        f"{VIT} --set 'objective=[{{term: ce, weight: 0.1}}, {{term: kd, weight: 0.6, "
        "temperature: 1}, {term: features, weight: 0.3, stages: lg}]'", 1, needs=["teacher-cnn"],
    )
)  # fmt: skip
DIGITS = (
    f"train recipes/quickstart.yaml {ALONE} --set data.fraction=1 --set train.epochs=60 "
    "--set train.batch_size=50"
)
PIXELS = f"{DIGITS} --set student.patch_size=1"
STILL, PERMUTED = "--set data.augment=[]", "--set data.control=permuted-pixels"


def changed(command: str, *keys: str) -> str:
    """The command with other keys of its recipe."""
    return " ".join([command, *(f"--set {shlex.quote(key)}" for key in keys)])


def biased(
    question: str, name: str, *keys: str, base: str = DIGITS, than: str = ""
) -> dict[str, Run]:
    """The quickstart's ViT, or another network in its place, with other biases."""
    return seeds(question, name, changed(base, *keys), 5, against=than or "plain")


BIAS = (
    biased("", "plain")
    | biased("network", "cnn", "student={model: resnet8}")
    | biased("network", "mlp", "student={model: mlp}")
    | biased("network", "rows-gru", "student={model: row_gru}")
    | biased("patches", "patch-4", "student.patch_size=4")
    | biased("patches", "patch-1", base=PIXELS)
    | biased("attention", "windows", "student.attention=window", "student.window=2", base=PIXELS,
             than="patch-1")
    | biased("attention", "heads-4", "student.heads=4")
    | biased("attention", "gated", "student.heads=4", "student.attention=gated", than="heads-4")
    | biased("attention", "dynamic-conv", "student.mixer=dynamic_conv")
    | biased("position", "position-none", "student.position=none")
    | biased("position", "position-sincos", "student.position=sincos")
    | biased("position", "position-conv", "student.position=conv")
    | biased("stem", "stem-conv", "student.stem=conv")
    | biased("soft bias", "locality-penalty",
             "objective=[{term: ce}, {term: locality_penalty, weight: 1}]")
    | biased("soft bias", "shift-consistency-3",
             "objective=[{term: ce}, {term: shift_consistency, weight: 3}]")
    | biased("soft bias", "shift-consistency-30",
             "objective=[{term: ce}, {term: shift_consistency, weight: 30}]")
    | biased("matrices", "btt", "student.linear=btt", "student.width=108")
    | biased("matrices", "monarch", "student.linear=monarch", "student.width=72")
    | biased("matrices", "kron", "student.linear=kron", "student.width=108")
    | biased("matrices", "low-rank", "student.linear=low_rank", "student.width=123")
    | {
        name: run
        for network, base in (
            ("cnn", f"{DIGITS} --set 'student={{model: resnet8}}'"),
            ("mlp", f"{DIGITS} --set 'student={{model: mlp}}'"),
            ("pixels", PIXELS),
        )
        for still in [f"{network}-still"]
        for side in (
            seeds("order of pixels", still, f"{base} {STILL}", 5, against="none"),
            seeds("order of pixels", f"{network}-permuted", f"{base} {STILL} {PERMUTED}", 5,
                  against=still),
        )
        for name, run in side.items()
    }
    | {
        "evaluation": evaluated(
            "what they have learned", "bias", "plain-0", "patch-4-0", "patch-1-0", "windows-0",
            "gated-0", "dynamic-conv-0", "position-conv-0", "locality-penalty-0",
            "shift-consistency-3-0", "shift-consistency-30-0", "cnn-0", "mlp-0", "rows-gru-0",
        ),
    }
)  # fmt: skip


def varied(row: str, name: str, *keys: str, base: str = DIGITS) -> dict[str, Run]:
    """The quickstart's ViT from labels alone with other keys, for a row of coverage.md."""
    return {name: Run(row, changed(base, *keys))}


def larger(row: str, name: str, size: int) -> dict[str, Run]:
    """A trained ViT as the teacher at another size, which is measured before the first step."""
    at = f"'teachers=[{{weights: {{out}}/{name}, input_size: {size}}}]'"
    command = f"train recipes/quickstart.yaml --set {at} --set train.epochs=1"
    words = f"{command} --set optimizer.warmup_epochs=0"
    return {f"{name}-{size}px": Run(row, words, (name,))}


def drawn_anew(seed: int) -> Run:
    """The quickstart with other images, views, order and weights, of its teacher too."""
    keys = " ".join(
        f"--set {place}{key}={seed}"
        for place in ("", "teachers.0.recipe.") for key in ("train.seed", "data.seed")
    )  # fmt: skip
    command = (
        f"train recipes/quickstart.yaml --baseline {keys} --set teachers.0.name=teacher-{seed}"
    )
    return Run("32", command, (), "quickstart", seed)


COVERAGE = (
    {
        "quickstart-teacher": Run("32", "train recipes/quickstart-teacher.yaml"),
        "quickstart": Run(
            "32", "train recipes/quickstart.yaml --baseline", ("quickstart-teacher",)
        ),
        **{f"quickstart-{seed}": drawn_anew(seed) for seed in range(1, 5)},
        "evaluation": evaluated("1", "all", "quickstart"),
        "label-free": Run(
            "36", "train recipes/quickstart.yaml --set 'objective=[{term: kd, temperature: 4}]'",
            ("quickstart-teacher",),
        ),
        "generations": Run(
            "35", "train recipes/quickstart-teacher.yaml --set generations=3 "
            "--set 'objective=[{term: ce, weight: 0.5}, {term: kd, weight: 0.5, temperature: 1}]'",
        ),
        "teachers": Run(
            "49", "rank-teachers recipes/quickstart.yaml --teacher {out}/quickstart-teacher "
            "--teacher {out}/quickstart --set data.val=0.2 --set data.fraction=1 "
            "--set train.batch_size=50 --ensembles 2 --goal mobile",
            ("quickstart-teacher", "quickstart"),
        ),
    }
    | varied("15", "learned")
    | varied("18", "sincos", "student.position=sincos")
    | varied("27", "conv", "student.position=conv")
    | {
        name: run
        for position in ("learned", "sincos", "conv") for size in (12, 16)
        for name, run in larger("28", position, size).items()
    }
    | varied("2", "random-labels", "data.control=permuted-labels")
    | varied("15", "cnn", "student={model: resnet8}")
    | varied("15", "mlp", "student={model: mlp}")
    | varied("11", "rows-gru", "student={model: row_gru}")
    | {"networks": evaluated("12", "bias,cost", "learned", "cnn", "mlp", "rows-gru")}
    | varied("20", "class-token", "student.pool=cls")
    | varied("20", "distill-token", "student.pool=distill")
    | varied("25", "pixels", base=PIXELS)
    | varied("25", "windows-4", "student.attention=window", "student.window=4", base=PIXELS)
    | varied("26", "stages", "student.depth=[2, 2]", "student.attention=window",
             "student.window=2", "student.position=none")
    | varied("72", "convnext", "student={model: convnext_atto}", "train.epochs=10")
    | varied("77", "alternet", "student={model: alternet_18}", "train.epochs=3",
             "optimizer.warmup_epochs=1")
    | varied("84", "crate", "student.mixer=crate")
)  # fmt: skip
TIERS = {"cpu": CPU, "long": EXTENDED, "gpu": GPU, "bias": BIAS, "coverage": COVERAGE}
