"""The page of a GPU check: Markdown tables of its JSON. Needs the standard library alone."""

from collections.abc import Mapping, Sequence
from typing import Any

STEPS = ("sd15_lora", "sd15_full", "sdxl_lora", "flux_lora", "qwen_lora", "compile")


def _number(value: Any, digits: int = 2) -> str:
    return "" if not isinstance(value, int | float) else f"{value:.{digits}f}"


def _percent(value: Any) -> str:
    return "" if not isinstance(value, int | float) else f"{100 * value:.0f} %"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(f"| {' | '.join(row)} |" for row in cells), ""]


def _machine(result: Mapping[str, Any]) -> list[str]:
    facts = {
        "card": result.get("card"),
        "memory": f"{result['memory_gib']} GiB" if "memory_gib" in result else None,
        "driver, CUDA": f"{result.get('driver')}, {result.get('cuda')}" if "driver" in result else None,
        "cores, host memory": f"{result.get('cores')}, {result.get('host_memory_gib')} GiB",
        "Python": result.get("python"),
        "packages": ", ".join(f"{name} {number}" for name, number in result.get("versions", {}).items() if number),
    }
    facts |= {
        f"{name} matrix product": f"{_number(result[f'{name}_tflops'], 1)} TFLOP/s"
        for name in ("bf16", "fp16", "fp32")
        if f"{name}_tflops" in result
    }
    for key, name in (("copy", "copy on the card, read and written"), ("host_to_card", "host to card"), ("card_to_host", "card to host")):
        if f"{key}_gb_per_s" in result:
            facts[name] = f"{_number(result[f'{key}_gb_per_s'], 0)} GB/s"
    return _table(("machine", ""), [(name, str(value)) for name, value in facts.items() if value])


def _tests(results: Sequence[Mapping[str, Any]]) -> list[str]:
    tests = [test for result in results for test in result.get("tests", [])]
    rows = []
    for test in tests:
        figures = "; ".join(f"{name} {value}" for name, value in test.get("figures", {}).items())
        rows.append((test["test"], test["outcome"], figures or test.get("why", "")))
    return _table(("check", "outcome", "figures"), rows) if rows else []


def _steps(parts: Mapping[str, Any]) -> list[str]:
    rows = []
    for name in STEPS:
        result = parts.get(name, {}).get("result", {})
        tuning = f"{result.get('tuning')}, {result.get('precision')}" + (", checkpointing" if result.get("gradient_checkpointing") else "")
        for way, row in result.get("ways", {}).items():
            rows.append(
                (
                    f"{result.get('model')}, {result.get('side')} px",
                    tuning,
                    str(result.get("micro_pairs")),
                    way,
                    _number(row.get("pairs_per_second")),
                    _number(row.get("ratio")),
                    _percent(row.get("matrix_share")),
                    _number(row.get("peak_gib"), 1),
                    _number(result.get("compile_seconds" if way == "compiled" else "cache_seconds_per_pair"), 2),
                )
            )
    if not rows:
        return []
    head = (
        "network",
        "tuning",
        "pairs a step",
        "way",
        "pairs/s",
        "ratio to the first way",
        "share of the bf16 peak",
        "peak GiB",
        "cache s/pair*",
    )
    note = "*Loading and 1 draw; for a compiled network the seconds of loading, cache and compilation together."
    return [*_table(head, rows), note, ""]


def _loop(result: Mapping[str, Any]) -> list[str]:
    if "figures" not in result:
        return []
    rows = []
    for side, run in (("this machine", result), ("two cores", result.get("cpu", {}))):
        figures = run.get("figures", {})
        interval = figures.get("ci95") or ("", "")
        spread = f"{_number(figures.get('difference'), 3)} ({_number(interval[0], 3)} to {_number(interval[1], 3)})"
        seconds = ", ".join(f"{name} {_number(value, 1)}" for name, value in run.get("seconds", {}).items())
        pairs = str(run.get("pairs_kept", ""))
        rows.append((side, _number(figures.get("base"), 3), _number(figures.get("tuned"), 3), spread, pairs, seconds))
    return _table((f"rpo run shapes: {result.get('headline')}", "base", "tuned", "difference (95 %)", "pairs", "seconds per stage"), rows)


def _curation(result: Mapping[str, Any]) -> list[str]:
    rows = []
    for name, row in result.get("rows", {}).items():
        if "fitted" in row:
            rows.append((name, f"{row['asked_at_once']} asked for, {row['fitted']} fit", "", "", ""))
        else:
            rows.append((name, str(row["batch"]), str(row["steps"]), _number(row["images_per_s"]), _number(row.get("peak_gib"), 1)))
    return _table(("curation", "batch", "denoising steps", "images/s", "peak GiB"), rows) if rows else []


def _profile(result: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    for name in ("LoRA", "full"):
        if name not in result:
            continue
        found = result[name]
        memory = found.get("memory", {})
        lines += [
            f"SD1.5, {name}, {found['micro_pairs']} pairs a step: {_number(found['step_ms'], 1)} ms a step, the card idle "
            f"{_percent(found['idle_share']) or 'not measured'}, {_number(found['kernels_per_step'], 0)} kernels and "
            f"{_number(found['copies_per_step'], 0)} copies launched per step; memory estimate "
            f"{_number(memory.get('estimate_gib'), 1)} GiB, peak {_number(memory.get('peak_gib'), 1) or 'not measured'}.",
            "",
            *_table(
                ("kernel", "share of the card's time", "launches per step"),
                [(f"`{row['name']}`", _percent(row["share"]), _number(row["per_step"], 0)) for row in found["largest"]],
            ),
        ]
    return lines


def page(state: Mapping[str, Any]) -> str:
    """All that is known so far."""
    parts: Mapping[str, Any] = state["parts"]
    result = {name: entry.get("result", {}) for name, entry in parts.items()}
    card = result.get("machine", {}).get("card", "card unknown")
    title = f"# GPU check: {card}, {state['date'][:10]}, commit {state['commit']}"
    lines = [title, "", "A try of the check itself on the CPU: no figure here means anything.\n" if state["smoke"] else ""]
    overview = []
    for name, entry in parts.items():
        problems = entry.get("result", {}).get("problems", [])
        counts = entry.get("result", {}).get("counts")
        told = [entry["why"]] if entry.get("why") else []
        told += [", ".join(f"{count} {outcome}" for outcome, count in counts.items())] if counts else []
        told += [f"PROBLEM: {problem}" for problem in problems]
        overview.append((name, entry["title"], entry["status"], f"{entry['seconds']:.0f}", "; ".join(told)))
    lines += _table(("part", "", "status", "seconds", "notes"), overview)
    lines += _machine(result["machine"]) if "machine" in result else []
    lines += _steps(parts)
    lines += _loop(result.get("loop", {}))
    lines += _curation(result.get("curation", {}))
    lines += _profile(result.get("profile", {}))
    lines += _tests([result.get("correctness", {}), result.get("compile", {})])
    return "\n".join(lines).rstrip() + "\n"
