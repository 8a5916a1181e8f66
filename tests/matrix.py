"""Run the lessons' tests with other versions of Triton: ``make matrix``.

Each version is installed into a folder of its own under ``_build/matrix``, in front of the
environment's, so that PyTorch is installed once. The kernels run in the interpreter. What came of it
is kept in ``docs/results/versions.json`` after each lesson, and shown on the page *Install and
build*. A run that was interrupted goes on where it stopped: a lesson is tried again when its
code has changed, when its tests have, or when one of them failed. ``make matrix TRITON="3.9.0"
LESSONS="fused_softmax"`` chooses among them.
"""

import ast
import hashlib
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from datetime import date
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent
RECORD = ROOT / "docs/results/versions.json"
# The interpreter of Triton 3.6 runs loops only with a NumPy before 2.4.
VERSIONS = {"3.6.0": ["numpy==2.3.5"], "3.7.1": [], "3.8.0": [], "3.9.0": []}
# The lessons, and the answers to their exercises.
LESSONS = [*sorted(path.stem for path in (ROOT / "tutorials").glob("*.py")), "solutions"]
ASK = """
import json, platform, numpy, torch, triton
versions = {"torch": torch.__version__.split("+")[0], "python": platform.python_version()}
print(json.dumps(versions | {"triton": triton.__version__, "numpy": numpy.__version__}))
"""


def install(triton, others):
    """The folder that goes in front of the environment's packages."""
    folder = ROOT / "_build/matrix" / triton
    packages = [f"triton=={triton}", *others] if triton != version("triton") else others
    for package in packages:
        name, number = package.split("==")
        if not (folder / f"{name}-{number}.dist-info").exists():
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
            subprocess.run(
                [*command, "--upgrade", "--target", folder, package], check=True
            )
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def environment(folder):
    options = {"PYTEST_ADDOPTS": "-n auto --dist worksteal"} | os.environ
    return options | {"PYTHONPATH": str(folder), "TRITON_INTERPRET": "1"}


def versions_in(folder):
    output = subprocess.check_output(
        [sys.executable, "-c", ASK], env=environment(folder), text=True
    )
    return json.loads(output)


def code(path):
    """What Python sees of a file: no comments, and not the text at its top."""
    module = ast.parse(path.read_text())
    return ast.unparse(module.body[ast.get_docstring(module) is not None :])


def state(lesson):
    """Changes when the lesson's code or its tests do; for the answers, when any lesson does."""
    if lesson == "solutions":
        content = [(ROOT / f"tutorials/{name}.py").read_text() for name in LESSONS[:-1]]
    else:
        content = [code(ROOT / f"tutorials/{lesson}.py")]
    content += [
        code(ROOT / f"tests/{name}.py") for name in ("conftest", f"test_{lesson}")
    ]
    return hashlib.sha256("".join(content).encode()).hexdigest()[:12]


def outcome(report):
    """How many tests passed and were skipped, and the names of those that failed."""
    if not report.exists():
        return {"passed": 0, "skipped": 0, "failed": ["pytest itself"]}
    suite = ElementTree.parse(report).find("testsuite")
    failed = [
        case.get("name")
        for case in suite
        if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped = sum(case.find("skipped") is not None for case in suite)
    passed = len(suite.findall("testcase")) - skipped - len(failed)
    if passed + skipped + len(failed) == 0:
        failed = ["no test was found"]
    return {"passed": passed, "skipped": skipped, "failed": failed}


def run_tests(folder, lesson, limit=1800):
    report = folder / f"{lesson}.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}"]
    try:
        subprocess.run(
            [*command, f"tests/test_{lesson}.py"],
            cwd=ROOT,
            env=environment(folder),
            timeout=limit,
        )
    except subprocess.TimeoutExpired:
        return {"passed": 0, "skipped": 0, "failed": [f"not done in {limit} s"]}
    return outcome(report)


def main():
    tritons = [name for name in sys.argv[1:] if name[0].isdigit()] or list(VERSIONS)
    lessons = [name for name in sys.argv[1:] if not name[0].isdigit()] or LESSONS
    if unknown := set(lessons) - set(LESSONS):
        sys.exit(f"there is no lesson {', '.join(unknown)}, only {', '.join(LESSONS)}")
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    for triton in tritons:
        folder = install(triton, VERSIONS.get(triton, []))
        found = versions_in(folder)
        if found.pop("triton") != triton:
            sys.exit(
                f"Triton {triton} was installed into {folder}, and is not found there"
            )
        old = record.get(triton, {}).pop("lessons", {})
        if record.get(triton) != found:  # with other versions beside it, all is run again
            old = {}
        tests = {name: old[name] for name in LESSONS if name in old}
        record[triton] = found | {"lessons": tests}
        for lesson in lessons:
            known = tests.get(lesson, {})
            if known.get("state") == state(lesson) and not known["failed"]:
                continue
            print(f"Triton {triton}: {lesson}", flush=True)
            row = {"state": state(lesson), "date": str(date.today())}
            tests[lesson] = run_tests(folder, lesson) | row
            RECORD.write_text(json.dumps(record, indent=1) + "\n")
    failed = False
    for triton, row in record.items():
        for lesson, tests in row["lessons"].items():
            for test in tests["failed"]:
                failed = True
                print(f"Triton {triton}: {lesson}: {test} failed")
    sys.exit(failed)


if __name__ == "__main__":
    main()
