"""What ``bench_kernels.py`` measured: kept as one small JSON a device, printed as the README's table.

python benchmarks/report_kernels.py collect RAW.json    of --benchmark-json, to benchmarks/results/kernels-<device>.json
python benchmarks/report_kernels.py table [FILE.json]   one table a device; a GPU that was not measured is named as such
"""

import argparse
import json
import re
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def collect(raw, add=False, folder=RESULTS):
    """Writes the rows of a pytest-benchmark file to ``folder``, beside the device's other operations if ``add``."""
    rows = []
    for run in raw["benchmarks"]:
        info = dict(run["extra_info"])
        environment = info.pop("environment")
        info["wall_median_s"] = run["stats"]["median"]
        info["rounds"] = run["stats"]["rounds"]
        rows.append(info)
    if not rows:
        raise ValueError("the file holds no measurement")
    name = re.sub(r"[^a-z0-9]+", "-", environment["device"].lower()).strip("-")
    path = folder / f"kernels-{name}.json"
    folder.mkdir(exist_ok=True)
    if add and path.exists():
        measured = {row["operation"] for row in rows}
        rows = [row for row in json.loads(path.read_text())["rows"] if row["operation"] not in measured] + rows
    result = {"environment": environment, "measured_at": raw["datetime"], "rows": rows}
    path.with_suffix(".tmp").write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".tmp").replace(path)
    return path


def seconds(row):
    return row.get("device_median_s", row["wall_median_s"])


def table(result):
    """A markdown table: each provider beside the floor and beside the first, which is eager torch."""
    environment = result["environment"]
    lines = [
        f"**{environment['kind']}: {environment['device']}**, torch {environment['torch']}, "
        f"copy bandwidth {environment['copy_gb_per_s']:.0f} GB/s",
        "",
        "| operation | size | provider | ms | speed-up over the first | share of copy bandwidth |",
        "|---|---|---|---|---|---|",
    ]
    first = {}
    for row in result["rows"]:
        key = (row["operation"], row["size"])
        first.setdefault(key, seconds(row))
        share = ""
        if row.get("bytes"):
            share = f"{100 * row['bytes'] / seconds(row) / 1e9 / environment['copy_gb_per_s']:.0f} %"
        lines.append(
            f"| {row['operation']} | {row['size']} | {row['provider']} | {1e3 * seconds(row):.3g} "
            f"| {first[key] / seconds(row):.2f}x | {share} |"
        )
    return "\n".join(lines)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    collector = commands.add_parser("collect")
    collector.add_argument("file", type=Path)
    collector.add_argument("--add", action="store_true", help="keep what the device's result has of other operations")
    commands.add_parser("table").add_argument("file", type=Path, nargs="*")
    options = parser.parse_args(arguments)
    try:
        if options.command == "collect":
            print(collect(json.loads(options.file.read_text()), options.add))
            return 0
        results = [json.loads(path.read_text()) for path in options.file or sorted(RESULTS.glob("kernels-*.json"))]
    except (OSError, ValueError) as error:
        print(f"report_kernels: {error}", file=sys.stderr)
        return 2
    print("\n\n".join(table(result) for result in results))
    if not any(result["environment"]["kind"] == "GPU" for result in results):
        print("\n**GPU: not measured yet** (`benchmarks/gpu_check.sh` measures on a machine that has one)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
