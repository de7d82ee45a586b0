"""Renders what steps left as one page of tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.gpu_day.day import Record, Step, Table, shown


def page(steps: Sequence[Step], records: Iterable[Record | None]) -> str:
    """Return the page; `records` in the order of the steps, None for a step that has not begun."""
    found = list(zip(steps, records, strict=True))
    rehearsed = any(record is not None and record.rehearsal for _, record in found)
    title = "# Rehearsed: no figure here means anything" if rehearsed else "# Measured on GPUs"
    lines = [title, "", "Made by `make gpu-day`; [what it runs](README.md).", ""]
    lines += ["| step | result | minutes | expected |", "|---|---|---|---|"]
    for step, record in found:
        result: str = "not begun" if record is None else record.status
        if record is not None and record.reason:
            result += f": {record.reason.splitlines()[0]}"
        minutes = "" if record is None or record.status == "skipped" else shown(record.seconds / 60)
        lines.append(f"| {step.name} | {_cell(result)} | {minutes} | {shown(step.minutes)} |")
    for step, record in found:
        if record is not None and (record.tables or record.figures or record.notes):
            lines += ["", *_section(step, record)]
    return "\n".join(lines) + "\n"


def _section(step: Step, record: Record) -> list[str]:
    about = step.about[0].upper() + step.about[1:]
    lines = [f"## {step.name}", "", f"{about}. {_machine(record)}."]
    if record.status == "unfinished" or record.status == "failed":
        lines += ["", f"**{record.status}**: what follows is what it had measured."]
    for table in record.tables:
        lines += ["", *_table(table)]
    if record.figures:
        lines += ["", "| figure | value |", "|---|---|"]
        lines += [f"| {_cell(name)} | {shown(value)} |" for name, value in record.figures.items()]
    if record.notes:
        lines += ["", *(f"- {note}" for note in record.notes)]
    return lines


def _machine(record: Record) -> str:
    about = {key: value for key, value in record.machine.items() if key not in ("device", "memory")}
    versions = ", ".join(f"{key} {value}" for key, value in about.items())
    device = ", ".join(record.machine[key] for key in ("device", "memory") if key in record.machine)
    return f"{'Rehearsed on' if record.rehearsal else 'On'} {device}; {versions}"


def _table(table: Table) -> list[str]:
    lines = [f"{table.title}:", "", f"| {' | '.join(map(_cell, table.columns))} |", "|---" * len(table.columns) + "|"]
    return lines + [f"| {' | '.join(_cell(shown(cell)) for cell in row)} |" for row in table.rows]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
