"""Checks in the first seconds of a run: the models of its stages are there, their servers take connections."""

import re
from pathlib import Path

from rpo.accounting.metering import local_models, served_models
from rpo.errors import RpoError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_S = 10.0


def check_models(config: object, *, servers: bool = True) -> None:
    """Raises `RpoError` that names every model of a configuration that is missing, before hours of work end at one of them.

    A hub model counts as there if it is in the hub cache or the hub knows it. `servers=False` leaves out remote models.
    """
    missing = [why for name in dict.fromkeys(local_models(config)) if (why := _missing(name))]
    if servers:
        missing += [why for model in served_models(config) if (why := model.unreachable())]
    if missing:
        raise RpoError("not everything that the run needs is there: " + "; ".join(dict.fromkeys(missing)) + ". Nothing was made yet.")


def _missing(name: str) -> str | None:
    place, _, revision = name.partition("@")
    if "/" not in place or Path(place).exists():  # a bare name is whatever an own configuration calls its model
        return None
    if not _HUB_ID.fullmatch(place) or place.startswith("."):
        return f"there is no model folder {place}"
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        snapshot_download(place, revision=revision or None, local_files_only=True)
        return None
    except (LocalEntryNotFoundError, OSError):
        pass
    except HFValidationError:
        return f"there is no model folder {place}"
    try:
        HfApi().model_info(place, revision=revision or None, timeout=_HUB_S)
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "?")
        return f"{name} is neither a folder here nor a model that the hub gives (HTTP {status})"
    except Exception as error:  # whatever the transport of huggingface_hub raises without a network
        return f"{name} is no folder here, not in the hub cache, and the hub cannot be reached ({type(error).__name__})"
    return None
