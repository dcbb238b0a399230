"""Compiles ``native.cpp``, the operations on CPU tensors:  python -m fastunlearn_kernels.build [--output FILE]

The build backend calls it for wheels and editable installs; in a tree whose sources have changed it is called by hand.
It needs a C++17 compiler with OpenMP (``CXX``, or c++, g++, clang++ on the PATH) and nothing else: neither torch nor
its headers. Imports the standard library alone, so that a build can load this file by its path.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("native.cpp")
LIBRARY = Path(__file__).with_name("_native.so")
COMPILERS = ("c++", "g++", "clang++")
# without errno sqrt is one instruction; without contraction a product and a sum are rounded one by one, everywhere
FLAGS = (
    "-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti", "-fno-math-errno",
    "-ffp-contract=off", "-w",
)  # fmt: skip
#: What an instruction set is compiled with, in the order of FU_LEVEL.
LEVELS = (
    (),
    ("-mavx2", "-mf16c", "-mpopcnt"),
    ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mf16c", "-mpopcnt"),
)


class BuildError(RuntimeError):
    """Why there is no library, in one line."""


def source_digest() -> str:
    """Names the source that a library was made from."""
    return hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]


def find_compiler() -> list[str] | None:
    """The command that compiles C++, None if there is none."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    found = next(filter(None, map(shutil.which, COMPILERS)), None)
    return None if found is None else [found]


def build(target: Path = LIBRARY) -> Path:
    """Compiles and links into ``target``, whole or not at all; BuildError says in one line what was in the way."""
    compiler = find_compiler()
    if compiler is None:
        raise BuildError("there is no C++ compiler: install g++, or set CXX")
    levels = LEVELS if platform.machine() in ("x86_64", "AMD64") else LEVELS[:1]
    units = [["-DFU_MAIN", f'-DFU_SOURCE="{source_digest()}"']]
    units += [[f"-DFU_LEVEL={level}", *flags] for level, flags in enumerate(levels)]
    try:
        with tempfile.TemporaryDirectory(prefix=".build-", dir=target.parent) as folder:
            objects = [str(Path(folder) / f"{i}.o") for i in range(len(units))]
            _run([
                [*compiler, *FLAGS, *unit, "-c", str(SOURCE), "-o", out]
                for unit, out in zip(units, objects, strict=True)
            ])  # fmt: skip
            library = Path(folder) / "library.so"
            # libgomp is torch's own by the time this is loaded; of the C++ library nothing is used
            static = ["-static-libgcc", "-static-libstdc++", "-Wl,--as-needed"]
            _run([[*compiler, "-shared", "-fopenmp", *static, *objects, "-o", str(library)]])
            library.chmod(0o755)
            library.replace(target)
    except OSError as error:
        raise BuildError(f"cannot write {target}: {error.strerror or error}") from error
    return target


def _run(commands: list[list[str]]) -> None:
    """Runs them beside each other."""
    try:
        running = [subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for c in commands]
    except OSError as error:
        raise BuildError(f"the C++ compiler {commands[0][0]} does not start: {error.strerror or error}") from error
    printed = [process.communicate()[0] for process in running]
    for process, text in zip(running, printed, strict=True):
        if process.returncode:
            lines = [line.strip() for line in text.splitlines() if "error" in line.lower()] or text.splitlines()
            raise BuildError(f"the C++ compiler failed: {(lines or ['it said nothing'])[0]}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fastunlearn_kernels.build", description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=LIBRARY, help="the library to write (default: in the package)")
    try:
        print(build(parser.parse_args().output))
    except BuildError as error:
        print(f"fastunlearn_kernels.build: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
