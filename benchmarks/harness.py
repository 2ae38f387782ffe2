"""Contenders side by side in one run: each in a process of its own, in turns, and what each run cost.

The figures are medians over the rounds. A figure that says how we stand to a peer carries the ratio and what we aim for.
"""

import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

POLL_S = 0.02  # between two looks at the memory of a contender
MIB = 2**20

Costs = dict[str, list["Cost"]]  # contender -> one cost per round


@dataclass(frozen=True)
class Cost:
    """What one run of one contender cost, and what its work returned."""

    wall_s: float  # of the work alone, without start and imports
    cpu_s: float  # user and system time of the work, all threads
    peak_mib: float  # most resident memory of the whole process, mapped files included
    anonymous_mib: float  # most memory with no file behind it
    others_s: float  # CPU time that the rest of the machine used meanwhile: a noisy run says so
    result: Any


@dataclass(frozen=True)
class Figure:
    """One measurement. `ratio` sets us beside `peer`; `target` is what it should reach, or stay under for memory."""

    name: str
    value: float
    unit: str
    peer: str | None
    ratio: float | None
    target: float | None
    machine: dict[str, Any]


def _status(process: int | Literal["self"], key: str) -> float:
    """A memory figure of a process in MiB; 0 where the process is gone."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{key}:")), 0.0)


def _busy_s() -> float:
    """CPU seconds that all processes of this machine have used since it started."""
    user, nice, system, _idle, _waiting, irq, softirq, *_ = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def _cpu_s(who: int) -> float:
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


def measure(work: Callable[[], Any]) -> None:
    """Run `work` in this process and print, as the last line, what it cost and returned. For `run` at the other end.

    The peak is VmHWM: ru_maxrss is inherited from the parent when a program starts.
    """
    started, used = time.perf_counter(), _cpu_s(resource.RUSAGE_SELF)
    result = work()
    wall, cpu = time.perf_counter() - started, _cpu_s(resource.RUSAGE_SELF) - used
    if isinstance(result, dict) and "cpu_s" in result:  # not all of the work counts
        (cpu,) = result.pop("cpu_s")
    print(json.dumps({"wall_s": wall, "cpu_s": cpu, "peak_mib": _status("self", "VmHWM"), "result": result}))


def run(command: Sequence[str], threads: int) -> Cost:
    """Run a command that ends in `measure`, with so many threads for its libraries.

    Raises subprocess.CalledProcessError when it fails.
    """
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "POLARS_MAX_THREADS")
    busy, used, anonymous = _busy_s(), _cpu_s(resource.RUSAGE_CHILDREN), 0.0
    environment = {**os.environ, **dict.fromkeys(names, str(threads))}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        while process.poll() is None:
            anonymous = max(anonymous, _status(process.pid, "RssAnon"))
            time.sleep(POLL_S)
        assert process.stdout is not None
        printed = process.stdout.read()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    others = _busy_s() - busy - (_cpu_s(resource.RUSAGE_CHILDREN) - used)
    return Cost(**json.loads(printed.splitlines()[-1]), anonymous_mib=anonymous, others_s=max(others, 0.0))


def alternate(
    commands: Mapping[str, Sequence[str]], repeats: int, check: Callable[[str, Cost], None], threads: int = 2
) -> Costs:
    """Run every contender once per round; each round begins with another one, so that none always runs first.

    `check` sees each run when it is over, and raises when its work is not what was asked for.
    """
    costs: Costs = {name: [] for name in commands}
    names = list(commands)
    for number in range(repeats):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            cost = run(commands[name], threads)
            check(name, cost)
            costs[name].append(cost)
            print(f"round {number + 1} of {repeats}: {name} {cost.wall_s:.2f} s", file=sys.stderr)
    return costs


def machine(*packages: str) -> dict[str, Any]:
    """What the figures were taken on: processor, cores, memory, versions, date."""
    cpu = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    return {
        "cpu": cpu.partition(":")[2].strip(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
        "date": datetime.now(UTC).date().isoformat(),
    }


MEASURES = {
    "wall": ("wall_s", "s"),
    "cpu": ("cpu_s", "s"),
    "peak": ("peak_mib", "MiB"),
    "anonymous": ("anonymous_mib", "MiB"),
}


def median(runs: Sequence[Cost], measure: str) -> float:
    return statistics.median(getattr(cost, MEASURES[measure][0]) for cost in runs)


def figures(name: str, costs: Costs, about: dict[str, Any]) -> list[Figure]:
    """The medians of every contender, set beside nothing."""
    return [
        Figure(f"{name}/{contender}/{measure}", median(runs, measure), unit, None, None, None, about)
        for contender, runs in costs.items()
        for measure, (_, unit) in MEASURES.items()
    ]


def compare(
    name: str, costs: Costs, measure: str, ours: str, peer: str, target: float, about: dict[str, Any]
) -> Figure:
    """One measure of `ours` beside that of `peer`.

    For time the ratio is peer / ours, to be at least `target`; for memory it is ours / peer, to be at most `target`.
    """
    mine, theirs = median(costs[ours], measure), median(costs[peer], measure)
    unit = MEASURES[measure][1]
    ratio = theirs / mine if unit == "s" else mine / theirs
    return Figure(f"{name}/{ours}/{measure}", mine, unit, peer, ratio, target, about)


def fastest(costs: Costs, among: Sequence[str]) -> str:
    return min(among, key=lambda name: median(costs[name], "wall"))


def print_figures(figures: Sequence[Figure]) -> None:
    """One JSON object per line on standard output."""
    for figure in figures:
        print(json.dumps(asdict(figure)), flush=True)


def print_table(title: str, costs: Costs, compared: Sequence[Figure]) -> None:
    """The same for people, on standard error: medians, the range of the wall times, and the ratios."""
    lines = [
        title,
        f"{'':12}{'wall s':>8}{'from':>8}{'to':>8}{'CPU s':>8}{'peak MiB':>10}{'anonymous':>11}{'others CPU s':>14}",
    ]
    for name, runs in costs.items():
        walls = [cost.wall_s for cost in runs]
        wall, cpu, peak, anonymous = (median(runs, measure) for measure in MEASURES)
        others = statistics.median(cost.others_s for cost in runs)
        lines.append(
            f"{name:12}{wall:8.2f}{min(walls):8.2f}{max(walls):8.2f}{cpu:8.2f}{peak:10.0f}{anonymous:11.0f}{others:14.2f}"
        )
    for figure in compared:
        if figure.ratio is None:
            lines.append(f"{figure.name}: {figure.value:.2f} {figure.unit} (target: under {figure.target})")
            continue
        sign = "at least" if figure.unit == "s" else "at most"
        lines.append(f"{figure.name}: {figure.ratio:.2f} against {figure.peer} (target: {sign} {figure.target})")
    print("\n".join(lines), file=sys.stderr)
