"""The checker behind `--jaxtyping-packages=rpo,typechecked.check`: beartype, with an int passing for a float as PEP 484 has it."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
