"""What is shown while work goes on, and what is not."""

from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


def quiet() -> None:
    """Switches off the libraries' own bars and their advice to install torchvision, which this package does without."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()


def bars_of(console: Console) -> Progress:
    """Progress bars; none where nobody looks at a terminal."""
    columns = (TextColumn("{task.description:>20}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)


def reporter(bars: Progress) -> Callable[[str, int, int], None]:
    """Shows (what, images done, images in all) as bars, or as a line when all are done."""
    tasks: dict[str, TaskID] = {}

    def report(what: str, done: int, total: int) -> None:
        if what not in tasks:
            tasks[what] = bars.add_task(what, total=total)
        bars.update(tasks[what], completed=done)
        if done == total and not bars.console.is_terminal:
            bars.console.print(f"{what:>20}  {total} images done", highlight=False)

    return report
