"""Run the lessons' tests with other versions of Triton: ``make matrix``.

Each version is installed into a folder of its own under ``_build/matrix``, in front of the
environment's, so that PyTorch is installed once. The kernels run in the interpreter. What came of it
is kept in ``docs/results/versions.json`` and shown on the page *Install and build*.
"""

import json
import os
import platform
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from datetime import date
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent
# The interpreter of Triton 3.6 runs loops only with a NumPy before 2.4.
VERSIONS = {"3.6.0": ["numpy==2.3.5"], "3.7.1": [], "3.8.0": [], "3.9.0": []}


def install(triton, others):
    folder = ROOT / "_build/matrix" / triton
    if not (folder / "triton").exists():
        packages = [f"triton=={triton}", *others]
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        subprocess.run([*command, "--target", folder, *packages], check=True)
    return folder


def run_tests(folder):
    """The numbers of tests that passed, failed and were skipped, and the names of the failed."""
    lessons = sorted(path.stem for path in (ROOT / "tutorials").glob("*.py"))
    files = [f"tests/test_{name}.py" for name in (*lessons, "solutions")]
    report = folder / "report.xml"
    report.unlink(missing_ok=True)
    environment = {"PYTHONPATH": str(folder), "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-n", "auto", "--dist", "worksteal"]
    subprocess.run(
        [*command, f"--junitxml={report}", *files], cwd=ROOT, env=os.environ | environment
    )
    suite = ElementTree.parse(report).find("testsuite")
    failed = [case.get("name") for case in suite if case.find("failure") is not None]
    failed += [case.get("name") for case in suite if case.find("error") is not None]
    skipped = int(suite.get("skipped"))
    return {
        "passed": int(suite.get("tests")) - len(failed) - skipped,
        "failed": failed,
        "skipped": skipped,
    }


def main():
    path = ROOT / "docs/results/versions.json"
    rows = json.loads(path.read_text()) if path.exists() else {}
    for triton in sys.argv[1:] or VERSIONS:
        folder = install(triton, VERSIONS.get(triton, []))
        rows[triton] = run_tests(folder) | {
            "torch": version("torch"),
            "python": platform.python_version(),
            "date": str(date.today()),
        }
        path.write_text(json.dumps(rows, indent=2) + "\n")
    for triton, row in rows.items():
        print(f"triton {triton}: {row['passed']} passed, {len(row['failed'])} failed")
    sys.exit(any(row["failed"] for row in rows.values()))


if __name__ == "__main__":
    main()
