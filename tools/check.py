"""All gates in one command: `python tools/check.py [fix|lint|types|imports|size|test|all] ...`.

Several gates may be named and run in that order; what follows `--` goes to pytest. Every gate runs,
even if an earlier one failed. The exit code is 0 only if all passed. A table sums up; if tests ran,
their own closing line comes last.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("appliance", "tools", "tests")
MAX_LINES = 500

Gate = Callable[[Sequence[str]], tuple[bool, str]]
"""Takes the arguments meant for pytest; returns (passed, words for the table)."""


def _run(*command: str) -> bool:
    print(f"$ {' '.join(command)}", flush=True)
    return subprocess.run([sys.executable, "-m", *command], cwd=ROOT, check=False).returncode == 0


def fix(_: Sequence[str]) -> tuple[bool, str]:
    """Repair and format what can be repaired without a person."""
    checked = _run("ruff", "check", "--fix", ".")
    return _run("ruff", "format", ".") and checked, "ruff check --fix, ruff format"


def lint(_: Sequence[str]) -> tuple[bool, str]:
    """Rules and formatting."""
    checked = _run("ruff", "check", ".")
    return _run("ruff", "format", "--check", ".") and checked, "ruff check, ruff format"


def types(_: Sequence[str]) -> tuple[bool, str]:
    """Strict types of appliance and tools."""
    return _run("mypy"), "mypy --strict appliance tools"


def imports(_: Sequence[str]) -> tuple[bool, str]:
    """The import contracts of docs/architecture.md."""
    script = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    print("$ lint-imports", flush=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script, "--no-logo", "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, env=environment, check=False)
    return done.returncode == 0, "lint-imports"


def size(_: Sequence[str]) -> tuple[bool, str]:
    """No source file is longer than `MAX_LINES`."""
    lengths = {
        path.relative_to(ROOT): path.read_bytes().count(b"\n")
        for source in SOURCES
        for path in (ROOT / source).rglob("*.py")
    }
    long = {path: count for path, count in lengths.items() if count > MAX_LINES}
    for path, count in sorted(long.items()):
        print(f"{path}: {count} lines, the limit is {MAX_LINES}: split it by idea")
    return not long, f"{len(lengths)} files, the longest has {max(lengths.values())} lines"


def test(arguments: Sequence[str]) -> tuple[bool, str]:
    """The test suite; its output is passed through and its closing line kept."""
    print("$ pytest", *arguments, flush=True)
    command = [sys.executable, "-u", "-m", "pytest", *arguments]
    closing = ""
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            closing = line.strip() or closing
    return process.returncode == 0, closing


GATES: Mapping[str, Gate] = {
    "fix": fix,
    "lint": lint,
    "types": types,
    "imports": imports,
    "size": size,
    "test": test,
}
ALL = ("lint", "types", "imports", "size", "test")


def main(arguments: Sequence[str]) -> int:
    """Run the named gates; 0 if all passed, 1 if one failed, 2 for an unknown name."""
    words = list(arguments)
    extra: list[str] = []
    if "--" in words:
        position = words.index("--")
        words, extra = words[:position], words[position + 1 :]
    names = [name for word in words or ["all"] for name in (ALL if word == "all" else (word,))]
    unknown = [name for name in names if name not in GATES]
    if unknown:
        print(f"unknown gate {unknown[0]!r}; use: {' '.join(GATES)} all", file=sys.stderr)
        return 2
    rows: list[tuple[str, bool, float, str]] = []
    for name in names:
        begin = time.monotonic()
        passed, words_for_table = GATES[name](extra)
        rows.append((name, passed, time.monotonic() - begin, words_for_table))
    print()
    for name, passed, seconds, note in rows:
        shown = "" if name == "test" else note
        print(f"{name:8} {'ok' if passed else 'FAILED':7} {seconds:7.1f} s  {shown}")
    closing = [note for name, _, _, note in rows if name == "test"]
    if closing:
        print(closing[-1])
    return 0 if all(passed for _, passed, _, _ in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
