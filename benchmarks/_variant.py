"""One variant of a training comparison, as a process that training.py starts and asks for turns."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from _setting import load
from _turns import Turns


def main() -> None:
    """Be the variant that the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kind", choices=("loop", "ours", "peer"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("keys", type=json.loads)
    options = parser.parse_args()
    setting = load(options.folder)
    if setting.device == "cpu":
        torch.set_num_threads(1)
    if options.kind == "peer":
        from _peers import run

        name, peers = options.keys.pop("name"), Path(options.keys.pop("peers"))
        run(name, setting, options.folder, peers, **options.keys)
        return
    turns = Turns(setting.turn, setting.device)
    if options.kind == "loop":
        from _loops import loop

        loop(setting, options.folder, turns, **options.keys)
    else:
        from _ours import train

        train(setting, options.folder, turns, **options.keys)


if __name__ == "__main__":
    main()
