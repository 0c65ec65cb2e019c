"""Finds the models of a recipe that are asked over a wire, wherever they stand in it, and tells them where to keep accounts."""

import dataclasses
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from rpo.accounting.ledger import ANSWERS, LEDGER, Account, Spent

Config = TypeVar("Config")
EVALUATE = "evaluate"
"""Purpose of what an evaluation asks; all else is asked to make pairs."""


@runtime_checkable
class Meterable(Protocol):
    """A model configuration whose model is asked over a wire."""

    def models(self) -> tuple[str, ...]: ...

    def build_metered(self, account: Account | None) -> Any: ...

    def close_metered(self, account: Account | None) -> None:
        """Closes the connections of models that were built with this account."""
        ...

    def at(self, *, base_url: str | None, model: str | None) -> "Meterable":
        """The same, served elsewhere or by another model."""
        ...

    def check_account(self, account: Account) -> None:
        """Raises `ValueError` or `RpoError` where a cap or the key cannot be held. Asks nothing and takes no time."""
        ...

    def unreachable(self) -> str | None:
        """Why no connection to its server can be made; `None` if one can. Takes seconds at most and asks nothing."""
        ...


@dataclass(frozen=True, kw_only=True)
class Metered:
    """A model that writes into the accounts of a run."""

    of: Meterable
    account: Account = field(metadata={"changes_results": False})

    def models(self) -> tuple[str, ...]:
        return self.of.models()

    def build(self) -> Any:
        return self.of.build_metered(self.account)


def _changed(value: Any, change: Callable[[Any], object], kind: type = Meterable) -> Any:
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, tuple):
        return tuple(_changed(item, change, kind) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        new = {
            f.name: _changed(old, change, kind) for f in dataclasses.fields(value) if f.init and (old := getattr(value, f.name)) is not None
        }
        return dataclasses.replace(value, **{name: item for name, item in new.items() if item is not getattr(value, name)})
    return value


def _found(config: object, kind: type) -> list[Any]:
    found: list[Any] = []

    def note(model: Any) -> Any:
        found.append(model)
        return model

    _changed(config, note, kind)
    return found


def served_models(config: object) -> list[Meterable]:
    """The models in a configuration that are asked over a wire."""
    return _found(config, Meterable)


def local_models(config: object) -> list[str]:
    """Folders and hub ids of the models in a configuration that run in this process."""
    if isinstance(config, Meterable | Metered):
        return []
    if isinstance(config, tuple):
        return [name for item in config for name in local_models(item)]
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        return []
    inner = [name for f in dataclasses.fields(config) for name in local_models(getattr(config, f.name))]
    own: Callable[[], tuple[str, ...]] | None = getattr(config, "models", None)
    served = {name for model in [*served_models(config), *_found(config, Metered)] for name in model.models()}
    return inner + [name for name in (own() if own else ()) if name not in served]


def served_by(config: Config, *, base_url: str | None, model: str | None) -> Config:
    """The configuration with every model over a wire at another address or of another name. `ValueError` if it has none."""
    if not served_models(config):
        raise ValueError("--vlm-url and --vlm-model are for recipes that ask a model over a wire, and this one asks none")
    return _changed(config, lambda served: served.at(base_url=base_url, model=model))


def metered(config: Config, account: Account) -> Config:
    """The configuration with every model over a wire keeping this account.

    Raises `ValueError` or `RpoError` before anything is made where a model has no price for a cap on cost, or an unusable key.
    """
    for model in served_models(config):
        model.check_account(account)
    return _changed(config, lambda served: Metered(of=served, account=account))


@contextmanager
def connections_closed(config: object) -> Generator[None, None, None]:
    """When the block ends, the connections are closed that the metered models of a configuration have opened."""
    try:
        yield
    finally:
        for model in _found(config, Metered):
            model.of.close_metered(model.account)


def account_in(folder: Path, answers: Path | None, max_cost: float | None, max_calls: int | None) -> Account:
    """A run folder's account."""
    for name, cap in (("max_cost", max_cost), ("max_calls", max_calls)):
        if cap is not None and cap < 0:
            raise ValueError(f"{name} must be at least 0, got {cap}")
    return Account(ledger=folder / LEDGER, answers=answers or folder / ANSWERS, max_cost=max_cost, max_calls=max_calls)


def spent_lines(stages: list[Spent], pairs: int) -> list[str]:
    """One printable line per stage that asked a model over a wire, and what a kept pair cost."""
    lines = [
        f"{line.purpose:>12}  {line.calls} calls to {line.model}, {line.answered} answered, "
        f"{line.input_tokens:,} tokens read, {line.output_tokens:,} written, ${line.cost:.4f}"
        + (f"; {line.maybe_billed} without an answer that the server may bill as well" if line.maybe_billed else "")
        for line in stages
    ]
    if stages and pairs:
        tokens, cost = sum(line.input_tokens + line.output_tokens for line in stages), sum(line.cost for line in stages)
        lines.append(f"{'a kept pair':>12}  {tokens / pairs:,.0f} tokens, ${cost / pairs:.5f}")
    return lines
