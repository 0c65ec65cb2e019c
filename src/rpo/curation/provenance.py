"""What made a column: class, version and weights of a model, as they go into every pair's provenance."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from rpo import __version__
from rpo.core.hashing import digest, model_identity


def weights_of(model: str) -> str:
    """What the weights of `model` (a folder, or a hub id with or without `@revision`) are, once they have been loaded.

    A folder is the sha256 of its names and bytes; a hub model its commit and the sha256 of its files' names and content hashes, which the
    local store keeps as their names. A model that lies nowhere here, on a server perhaps, is its name.
    """
    if Path(model).exists():
        return model_identity(model)
    name, _, revision = model.partition("@")
    try:
        snapshot = Path(snapshot_download(name, revision=revision or None, local_files_only=True))
    except (LocalEntryNotFoundError, ValueError):
        return model
    files = sorted(path for path in snapshot.rglob("*") if path.is_file())
    content = digest([[path.relative_to(snapshot).as_posix(), path.resolve().name] for path in files])
    return f"commit:{snapshot.name} sha256:{content}"


def made_by(config: object, models: tuple[str, ...]) -> dict[str, object]:
    """Class, version of this package and weights of a model that a configuration built."""
    return {"model": type(config).__name__, "rpo": __version__, "weights": {Path(model).name: weights_of(model) for model in models}}
