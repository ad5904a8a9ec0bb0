"""The benchmark suite as one table: `python -m benchmarks.report [FILE.json ...]`.

Without files the suite runs first (`pytest benchmarks`, one thread, CPU time); a file is what its
`--benchmark-json` wrote, or what --save kept. Of several files or turns each entry's best time counts: a run
does one benchmark after another, so that on a restless machine --turns 3 gives each of them three chances.
The ratio is to the entry "fasttower" of the same group.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
Results = dict[str, Any]


def run_suite(turns: int, expression: str | None, *, slow: bool) -> list[Results]:
    """The suite's results, a turn each; ends the program where a benchmark fails."""
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-quiet"]
    command += ["-k", expression] if expression else []
    command += ["-m", ""] if slow else []
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(turns):
            file = Path(folder) / f"{turn}.json"
            code = subprocess.run([*command, f"--benchmark-json={file}"], cwd=ROOT, check=False).returncode
            if code:
                sys.exit(f"the benchmarks ended with code {code}: no table")
            results.append(json.loads(file.read_text()))
    return results


def merged(results: list[Results]) -> Results:
    """The first results with the best time of each benchmark, without what the table does not need."""
    best: dict[str, Results] = {}
    for result in results:
        for benchmark in result["benchmarks"]:
            before = best.setdefault(benchmark["fullname"], benchmark)
            if benchmark["stats"]["min"] < before["stats"]["min"]:
                best[benchmark["fullname"]] = benchmark
    machine = results[0]["machine_info"]
    return {
        "datetime": results[0]["datetime"],
        "machine_info": {
            "cpu": {name: machine["cpu"].get(name) for name in ("brand_raw", "count")},
            "versions": machine["versions"],
        },
        "benchmarks": [
            {
                **{name: benchmark[name] for name in ("group", "fullname", "params", "extra_info")},
                "options": {"timer": benchmark["options"]["timer"]},
                "stats": {name: benchmark["stats"][name] for name in ("min", "median", "rounds")},
            }
            for benchmark in best.values()
        ],
    }


def table(results: Results) -> str:
    """Group, name, best time and ratio to fasttower's, groups in the suite's order and the fastest first."""
    groups: dict[str, dict[str, float]] = {}
    for benchmark in results["benchmarks"]:
        groups.setdefault(benchmark["group"], {})[benchmark["params"]["way"]] = benchmark["stats"]["min"]
    rows = [("group", "name", "best, ms", "ratio")]
    for group, times in groups.items():
        ours = times.get("fasttower")
        for name, seconds in sorted(times.items(), key=lambda entry: entry[1]):
            ratio = f"{seconds / ours:.2f}" if ours else "-"
            rows.append((group, name, f"{seconds * 1e3:.3f}", ratio))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        f"{group:{widths[0]}}  {name:{widths[1]}}  {best:>{widths[2]}}  {ratio:>{widths[3]}}"
        for group, name, best, ratio in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def heading(results: Results) -> str:
    """The machine, the versions, and how time was taken."""
    machine, benchmarks = results["machine_info"], results["benchmarks"]
    timers = sorted({benchmark["options"]["timer"] for benchmark in benchmarks})
    threads = sorted({benchmark["extra_info"]["threads"] for benchmark in benchmarks})
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"{machine['cpu']['brand_raw']}, {machine['cpu']['count']} cores; {versions}\n"
        f"threads: {', '.join(map(str, threads))}; timer: {', '.join(timers)}; best of the rounds\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE.json", help="results, instead of a run")
    parser.add_argument("--save", type=Path, help="keep the results here, without every round's time")
    parser.add_argument(
        "--turns", type=int, default=1, help="runs of the suite, of which the best times count"
    )
    parser.add_argument("--slow", action="store_true", help="torch.compile too: half a minute more")
    parser.add_argument("-k", dest="expression", help="only some benchmarks, as pytest's -k")
    arguments = parser.parse_args()
    if arguments.turns < 1:
        parser.error(f"--turns is {arguments.turns}; expected 1 or more")
    try:
        read = [json.loads(file.read_text()) for file in arguments.files]
        results = merged(read or run_suite(arguments.turns, arguments.expression, slow=arguments.slow))
        text = f"{heading(results)}\n{table(results)}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"not results of this suite: {error}")
    if arguments.save:
        arguments.save.write_text(json.dumps(results, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
