"""`python -m rpo`, which torchrun and accelerate can launch."""

from rpo.cli import entry

entry()
