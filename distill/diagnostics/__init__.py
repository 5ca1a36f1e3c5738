"""What a trained network is like, beyond its accuracy. One question a module, pure functions.

They take a network that is in eval mode and images in [0, 1] on its device, and give plain values:
one an image where there is one, so that whoever asked can say how sure the mean is. Nothing of the
network is changed by the asking.
"""

from __future__ import annotations


class UndefinedError(Exception):
    """The question has no answer for this network; the message, a clause, says why."""
