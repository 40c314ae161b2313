"""Break the package on purpose, one line at a time, and see that a fast test fails each time.

    python tests/mutants.py                      all of tests/mutants.yaml
    python tests/mutants.py decay "clip order"   those whose name or file contains one of the texts
    python tests/mutants.py --processes 4        several at a time

Each mutation goes into a copy of the source in a temporary folder; the work tree is not touched. The named tests run on
an unchanged copy first, because a test that fails anyway catches nothing. The exit status is 1 if a mutation survives,
and also if one does not apply or cannot be judged.
"""

import argparse
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import NoReturn

import pytest
import yaml

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src"
TABLE = Path(__file__).with_suffix(".yaml")
OPTIONS = [
    "-x",
    "--assert=plain",
    "-rfE",
    "--tb=no",
    "-p",
    "no:cacheprovider",
    "-m",
    "not gpu and not slow and not system",
]
LONGEST = 600
"""Seconds after which a test counts as failed."""
PRELOADED = ["torch", "transformers.models.llama.modeling_llama", "peft", "safetensors.torch", "pytest"]
"""Other packages are imported once; each mutation is judged in a process forked from there."""


@dataclass(frozen=True)
class Mutant:
    """One line of the package, and another that must make a test fail."""

    name: str
    file: str
    """Below src/dovetail."""
    old: str
    new: str
    tests: tuple[str, ...]
    """The test files, or single tests, that are to catch it."""

    def text(self) -> str:
        """Return the file with the mutation. Raises ValueError unless the old text stands in it exactly once."""
        text = (SOURCE / "dovetail" / self.file).read_text(encoding="utf-8")
        if (found := text.count(self.old)) != 1:
            raise ValueError(
                f"{TABLE.name}: {self.name!r} replaces {self.old!r}, which stands {found} times in {self.file}; "
                "give it the text that now does what this text did, or take the mutation out with the feature"
            )
        return text.replace(self.old, self.new)


def read_table() -> list[Mutant]:
    """Read the mutations, which the table groups by file."""
    table = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    return [
        Mutant(row["name"], file, row["old"], row["new"], tuple(row["tests"].split()))
        for file, rows in table.items()
        for row in rows
    ]


def give_up(*_: object) -> NoReturn:
    """Fail the test that is running."""
    raise TimeoutError(f"no result after {LONGEST} s")


def run_tests(tests: Sequence[str], mutant: Mutant | None) -> tuple[int, str]:
    """Run the tests up to the first failure on a copy of the source, with the mutation if there is one.

    Returns pytest's exit status and its output. To be called once in a process, which imports the copy.
    """
    with tempfile.TemporaryDirectory(prefix="dovetail-mutant-") as folder:
        shutil.copytree(SOURCE, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.egg-info"))
        if mutant is not None:
            (Path(folder) / "dovetail" / mutant.file).write_text(mutant.text(), encoding="utf-8")
        os.environ["PYTHONPATH"] = folder  # for processes that tests start
        sys.path.insert(0, folder)
        os.chdir(ROOT)
        signal.signal(signal.SIGALRM, give_up)
        signal.alarm(LONGEST)
        log = Path(folder) / "log"
        with log.open("w") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            status = pytest.main([*OPTIONS, *tests])
        imported = str(sys.modules["dovetail"].__file__)
        if not imported.startswith(folder):
            raise RuntimeError(f"the tests ran on {imported}, and not on the copy in {folder}")
        return int(status), log.read_text()


def judge(mutant: Mutant) -> tuple[bool, str]:
    """Return whether a test caught the mutation, and which one, or what happened instead."""
    try:
        status, output = run_tests(mutant.tests, mutant)
    except ValueError:
        return False, "DOES NOT APPLY"
    failed = [line.split()[1] for line in output.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    if status == pytest.ExitCode.TESTS_FAILED and failed:
        return True, failed[0]
    return False, "SURVIVED" if status == pytest.ExitCode.OK else f"NO RESULT: {output[-600:]}"


def main() -> int:
    """Judge the chosen mutations, print a line for each, and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="parts of the names or files of mutations; default: all")
    parser.add_argument("--processes", type=int, default=1, help="mutations judged at a time")
    options = parser.parse_args()
    wanted = options.names or [""]
    mutants = [m for m in read_table() if any(part in m.name or part in m.file for part in wanted)]
    tests = sorted({test for mutant in mutants for test in mutant.tests})
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with context.Pool(options.processes, maxtasksperchild=1) as pool:
        status, output = pool.apply(run_tests, (tests, None))
        if not mutants or status != pytest.ExitCode.OK:
            print(f"{len(mutants)} mutations are chosen; without any of them their tests say:\n{output}")
            return 1
        verdicts = []
        widths = [max(len(getattr(mutant, column)) for mutant in mutants) for column in ("file", "name")]
        for mutant, (is_caught, verdict) in zip(mutants, pool.imap(judge, mutants), strict=True):
            place = f"{mutant.file:{widths[0]}}  {mutant.name:{widths[1]}}"
            print(f"{'caught' if is_caught else 'FAILS':6}  {place}  {verdict}", flush=True)
            verdicts.append(is_caught)
    print(f"{sum(verdicts)} of {len(mutants)} mutations were caught")
    return 0 if all(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
