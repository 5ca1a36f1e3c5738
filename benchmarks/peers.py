"""Put the toolkits that we are compared with into a folder, at the commits that were compared.

    python benchmarks/peers.py DIR

Clones them from GitHub and installs torchdistill and what they import besides PyTorch into
DIR/site, which nothing but their own processes sees. Nothing of theirs becomes a part of ours.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

REPOSITORIES = {
    "huggingface/pytorch-image-models": "aa4b5850c1543fa488abf260f18390eda46cf85d",
    "yoshitomo-matsubara/torchdistill": "3e4373c45214c5c56eebac481d5bfe8b8735aa05",
    "megvii-research/mdistiller": "a08d46f10d6102bd6e3f258ca5ac880b020ea259",
    "HobbitLong/RepDistiller": "b84f547c5db6a35318d4671d7d5c4de74c822403",
}
PACKAGES = (
    "torchdistill==1.1.5",
    "yacs==0.1.8",
    "tensorboardX==2.6.5",
    "tensorboard_logger==0.1.0",
    "protobuf",
    "tqdm",
    "scipy",
)


def main() -> None:
    """Clone and install what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--source", default="https://github.com/", help="where repositories are")
    options = parser.parse_args()
    for name, commit in REPOSITORIES.items():
        place = options.folder / name.partition("/")[2]
        if not place.exists():
            subprocess.run(["git", "clone", "--quiet", options.source + name, place], check=True)
        subprocess.run(["git", "-C", place, "checkout", "--quiet", commit], check=True)
        print(f"{place}: {commit[:12]}")
    site = options.folder / "site"
    # Without what they depend on: PyTorch is there already, and must stay the same for all.
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
    subprocess.run([*command, "--target", site, *PACKAGES], check=True)
    print(f"{site}: {', '.join(PACKAGES)}")


if __name__ == "__main__":
    main()
