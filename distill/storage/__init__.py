"""Files that are either whole or not there, whatever kills the process.

Everything that reaches a disk goes through here, or into a folder that `staged` made.
"""

from distill.storage._files import (
    append,
    create,
    make_folder,
    move,
    passing,
    publish,
    remove,
    remove_folder,
    require_writable,
    staged,
    sweep,
    sync,
    write,
    writing,
)
from distill.storage._folders import MANIFEST, check_folder, read_folder, write_folder
from distill.storage._locks import alone, lock
from distill.storage._room import free_bytes, require_room, scratch, size

__all__ = [
    "MANIFEST",
    "alone",
    "append",
    "check_folder",
    "create",
    "free_bytes",
    "lock",
    "make_folder",
    "move",
    "passing",
    "publish",
    "read_folder",
    "remove",
    "remove_folder",
    "require_room",
    "require_writable",
    "scratch",
    "size",
    "staged",
    "sweep",
    "sync",
    "write",
    "write_folder",
    "writing",
]
