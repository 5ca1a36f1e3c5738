"""The runs that docs/results.md is made of: on a CPU with Fashion-MNIST, on a GPU with CIFAR-10.

Names are folders below `--out`; a teacher's is its recipe's, so that the recipes that name it find
it. All sides of a comparison are one recipe, and what differs stands in the overrides.
"""

from __future__ import annotations

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


def seeds(
    experiment: str, condition: str, command: str, count: int, *, needs: Iterable[str] = ()
) -> dict[str, Run]:
    """A condition over several seeds: other images, views, order and initial weights.

    What is needed may differ by seed: `{seed}` is replaced there and in the command.
    """
    found = {}
    for seed in range(count):
        words = command.replace("{seed}", str(seed))
        own = tuple(need.replace("{seed}", str(seed)) for need in needs)
        text = f"{words} --set train.seed={seed} --set data.seed={seed}"
        found[f"{condition}-{seed}"] = Run(experiment, text, own, condition, seed)
    return found


def taught(name: str) -> str:
    """The overrides that put another teacher in the place of a recipe's own."""
    return f"--set 'teachers=[{{weights: {{out}}/{name}}}]'"


FASHION, CIFAR = "recipes/fashion-mnist", "recipes/cifar10"
WEAK, STRONG = f"train {FASHION}/few-vit-weak.yaml", f"train {FASHION}/few-vit-strong.yaml"
FEATURES, FEW_CNN = f"train {FASHION}/few-vit-features.yaml", f"train {FASHION}/few-cnn.yaml"
TEACHER = f"train {FASHION}/teacher-cnn.yaml"
# The teachers' runs lie beside that of the training.
CACHE = "teacher-cache {} --views 16 --run {{out}}/strong-cached-{{seed}}".format

SEEDS = 3
CPU = (
    {
        "teacher-cnn": Run("E0", TEACHER),
    }
    | seeds("E1a", "weak-alone", f"{WEAK} {ALONE}", SEEDS)
    | seeds("E2a", "weak-kd", WEAK, SEEDS, needs=["teacher-cnn"])
    | seeds("E4", "cnn-alone", f"{FEW_CNN} {ALONE}", SEEDS)
    | seeds("E4", "cnn-kd", FEW_CNN, SEEDS, needs=["teacher-cnn"])
    | seeds("E1b", "strong-alone", f"{STRONG} {ALONE}", SEEDS)
    | seeds("E2b", "strong-kd", STRONG, SEEDS, needs=["teacher-cnn"])
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
    | {
        "omitted-alone": Run("E8", f"train {FASHION}/omitted.yaml {ALONE}"),
        "omitted-kd": Run("E8", f"train {FASHION}/omitted.yaml", ("teacher-cnn",)),
    }
    | seeds("E2c", "cache", CACHE(f"{FASHION}/few-vit-strong.yaml"), SEEDS, needs=["teacher-cnn"])
    | seeds(
        "E2c", "strong-cached",
        f"{STRONG} --cache {{out}}/cache-{{seed}} --set cache.views=16", SEEDS,
        needs=["teacher-cnn", "cache-{seed}"],
    )
    | seeds(
        "control", "weak-untrained", f"{WEAK} {taught('teacher-untrained')}", SEEDS,
        needs=["teacher-untrained"],
    )
    | seeds("E3", "weak-features", FEATURES, SEEDS, needs=["teacher-cnn"])
    | seeds(
        "control", "teacher-same",
        f"{TEACHER} --set data.fraction=0.037 --set train.epochs=30", SEEDS,
    )
    | seeds(
        "control", "weak-same", f"{WEAK} {taught('teacher-same-{seed}')}", SEEDS,
        needs=["teacher-same-{seed}"],
    )
    | {"teacher-vit": Run("E0", f"train {FASHION}/teacher-vit.yaml")}
    | seeds(
        "E4", "cnn-vit-guidance", f"train {FASHION}/few-cnn-guidance.yaml", SEEDS,
        needs=["teacher-vit"],
    )
    | {
        "temperatures": Run(
            "E5",
            f"temperature-sweep {FASHION}/few-vit-weak.yaml --temperatures 1,2,4,8,16 "
            "--seeds 0,1",
            ("teacher-cnn",),
        ),
        "efficiency": Run(
            "E6",
            f"sample-efficiency {FASHION}/few-cnn.yaml {FASHION}/few-vit-weak.yaml --baseline "
            "--sizes 500,2000,8000 --set data.fraction=1",
            ("teacher-cnn",),
        ),
        "evaluation": Run(
            "E7",
            "evaluate {out}/teacher-cnn {out}/weak-alone-0 {out}/weak-kd-0 {out}/cnn-alone-0 "
            "{out}/cnn-kd-0 --suite all",
            ("teacher-cnn", "weak-alone-0", "weak-kd-0", "cnn-alone-0", "cnn-kd-0"),
        ),
    }
)  # fmt: skip

VIT, RESNET = f"train {CIFAR}/cnn-to-vit.yaml", f"train {CIFAR}/cnn-to-resnet20.yaml"
GPU = (
    {"teacher-cnn": Run("E0", f"train {CIFAR}/teacher-cnn.yaml")}
    | seeds("E1b", "strong-alone", f"{VIT} {ALONE}", 1)
    | seeds("E2b", "strong-kd", VIT, 1, needs=["teacher-cnn"])
    | seeds("E4", "cnn-alone", f"{RESNET} {ALONE}", 3)
    | seeds("E4", "cnn-kd", RESNET, 3, needs=["teacher-cnn"])
    | seeds(
        "E2c", "cache", CACHE(f"{CIFAR}/cnn-to-vit.yaml"), 1, needs=["teacher-cnn"],
    )
    | seeds(
        "E2c", "strong-cached", f"{VIT} --cache {{out}}/cache-{{seed}} --set cache.views=16", 1,
        needs=["teacher-cnn", "cache-{seed}"],
    )
    | seeds(
        "E4", "cnn-vit-guidance",
        f"train {CIFAR}/vit-to-cnn-guidance.yaml {taught('strong-kd-0')}", 3,
        needs=["strong-kd-0"],
    )
    | seeds("E1a", "weak-alone", f"train {CIFAR}/cnn-to-vit-weak.yaml {ALONE}", 1)
    | seeds("E2a", "weak-kd", f"train {CIFAR}/cnn-to-vit-weak.yaml", 1, needs=["teacher-cnn"])
    | seeds(
        "E3", "strong-features", f"train {CIFAR}/cnn-to-vit-features.yaml", 1,
        needs=["teacher-cnn"],
    )
    | {
        "temperatures": Run(
            "E5",
            f"temperature-sweep {CIFAR}/cnn-to-resnet20.yaml --temperatures 1,2,4,8,16 "
            "--seeds 0,1 --set train.epochs=20",
            ("teacher-cnn",),
        ),
        "efficiency": Run(
            "E6",
            f"sample-efficiency {CIFAR}/cnn-to-resnet20.yaml {CIFAR}/cnn-to-vit.yaml --baseline "
            "--sizes 1000,4000,16000",
            ("teacher-cnn",),
        ),
        "omitted-alone": Run(
            "E8", f"{VIT} {ALONE} --set data.omit=[cat] --set train.epochs=20"
        ),
        "omitted-kd": Run(
            "E8", f"{VIT} --set data.omit=[cat] --set train.epochs=20", ("teacher-cnn",)
        ),
        "evaluation": Run(
            "E7",
            "evaluate {out}/teacher-cnn {out}/strong-alone-0 {out}/strong-kd-0 {out}/cnn-alone-0 "
            "{out}/cnn-kd-0 --suite all",
            ("teacher-cnn", "strong-alone-0", "strong-kd-0", "cnn-alone-0", "cnn-kd-0"),
        ),
    }
)  # fmt: skip
TIERS = {"cpu": CPU, "gpu": GPU}
