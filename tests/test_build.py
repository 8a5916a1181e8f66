"""What `make` does when things change or go wrong, on a copy of the project with two small lessons."""

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from bs4 import BeautifulSoup

ROOT = Path(__file__).parent.parent
LESSON = '''"""
{title}
=======

Some prose.
"""

import os

with open(os.environ["RUNS"], "a") as runs:
    runs.write("{title} ")
print("{output}")
'''


class Project:
    def __init__(self, folder):
        self.folder = folder
        self.site = folder / "_build/html"
        self.runs = folder / "runs"
        for name in ("conf.py", "requirements.txt", "Makefile"):
            shutil.copy(ROOT / name, folder)
        for name in ("_ext", "_static", "_templates"):
            shutil.copytree(ROOT / "docs" / name, folder / "docs" / name)
        (folder / "docs/index.md").write_text(
            "# Home\n\n```{toctree}\ntutorials/index\n```\n"
        )
        (folder / "tutorials").mkdir()
        (folder / "tutorials/GALLERY_HEADER.rst").write_text("Lessons\n=======\n")
        self.write("first", "one")
        self.write("second", "two")

    def write(self, title, output, then=""):
        path = self.folder / f"tutorials/{title}.py"
        path.write_text(LESSON.format(title=title, output=output) + then)

    def start(self, **settings):
        self.runs.write_text("")
        return subprocess.Popen(
            ["make", "html", "VENV=", f"PYTHON={sys.executable}"],
            cwd=self.folder,
            env={**os.environ, "RUNS": str(self.runs), **settings},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def build(self, **settings):
        process = self.start(**settings)
        output, _ = process.communicate()
        return process.returncode, output

    def ran(self):
        """Build, and return the lessons that were run."""
        status, output = self.build()
        assert status == 0, output
        return self.runs.read_text().split()

    def page(self, title):
        return (self.site / f"tutorials/{title}.html").read_text()


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


def test_only_what_changed_is_run_again(project):
    assert project.ran() == ["first", "second"]
    assert project.ran() == []
    project.write("second", "three")
    assert project.ran() == ["second"]
    assert "three" in project.page("second")

    with (project.folder / "conf.py").open("a") as conf:
        conf.write('\nproject = "Another name"\n')
    assert project.ran() == ["first", "second"]

    record = project.folder / "docs/tutorials/made_with.json"
    for change in ({"gpu": "another GPU"}, {"versions": {"triton": "0"}}):
        record.write_text(json.dumps(json.loads(record.read_text()) | change))
        assert project.ran() == ["first", "second"]
    assert project.ran() == []


def test_a_lesson_that_is_removed_leaves_nothing(project):
    assert project.ran() == ["first", "second"]
    (project.folder / "tutorials/second.py").unlink()
    assert project.ran() == []
    assert (project.site / "tutorials/first.html").exists()
    assert not (project.site / "tutorials/second.html").exists()


def test_a_lesson_that_fails_stops_the_build_and_leaves_the_site(project):
    assert project.ran() == ["first", "second"]
    before = project.page("first"), project.page("second")

    project.write("first", "changed", then='raise RuntimeError("no luck")\n')
    project.write("second", "changed")
    status, output = project.build()
    assert status != 0
    assert "Lessons that failed: first.py (RuntimeError: no luck)" in output
    assert 'first.py", line 13' in output and "RuntimeError: no luck" in output
    assert project.runs.read_text().split() == ["first", "second"]
    assert (project.page("first"), project.page("second")) == before

    # Back to the script that once passed: its outputs are gone, so it is run again.
    project.write("first", "one")
    assert project.ran() == ["first"]
    assert "changed" in project.page("second")


def test_an_interrupted_build_is_repaired_by_the_next(project):
    assert project.ran() == ["first", "second"]
    project.write("first", "changed")
    project.write("second", "changed", then="import time\ntime.sleep(600)\n")
    process = project.start()
    deadline = time.monotonic() + 60
    while "second" not in project.runs.read_text() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert "changed" not in project.page("first")

    project.write("second", "two")
    assert set(project.ran()) >= {"first", "second"}
    assert "changed" in project.page("first") and "changed" not in project.page("second")


def test_a_site_with_an_address_and_a_repository_says_so(project):
    status, output = project.build(
        SITE_URL="https://example.org/kernels/",
        REPOSITORY="https://github.com/someone/kernels",
    )
    assert status == 0, output
    page = project.page("first")
    assert "https://github.com/someone/kernels/edit/main/tutorials/first.py" in page
    (notebook,) = (project.site / "_downloads").glob("*/first.ipynb")
    where = "https://colab.research.google.com/github/someone/kernels/blob/gh-pages/"
    assert f'href="{where}{notebook.relative_to(project.site)}"' in page
    address = "https://example.org/kernels/tutorials/first.html"
    assert f'<link rel="canonical" href="{address}" />' in page
    assert f'property="og:url" content="{address}"' in page
    (card,) = re.findall(
        'property="og:image" content="https://example.org/kernels/(.*?)"', page
    )
    assert (project.site / card).exists()
    assert address in (project.site / "sitemap.xml").read_text()
    assert 'href="/kernels/index.html"' in (project.site / "404.html").read_text()
    assert "edit/main/docs/index.md" in (project.site / "index.html").read_text()


def test_a_broken_link_fails_the_build(project):
    (project.folder / "docs/index.md").write_text(
        "# Home\n\n[](nowhere.md) [](other.md#no-anchor)\n\n"
        "```{toctree}\ntutorials/index\nother\n```\n"
    )
    (project.folder / "docs/other.md").write_text("# Other\n")
    project.write("first", "one", then="# %%\n# See :ref:`no label`.\n")
    status, output = project.build()
    assert status != 0
    for target in ("nowhere.md", "no-anchor", "no label"):
        assert target in output
    assert not project.site.exists()


PLOT = """
import matplotlib.pyplot as plt
plt.plot([1, 2, 4], [3.0, 4.0, 5.25], label="ours")
plt.plot([1, 2, 4], [1.0, 2.0, 3.5], label="torch")
plt.xlabel("rows\\nmachine")
plt.ylabel("GB/s")
"""


def test_a_figure_has_an_alternative_that_tells_what_it_shows(project):
    project.write("first", "one", then=PLOT)
    assert project.build()[0] == 0
    assert 'alt="GB/s over rows; at 4: ours 5.25, torch 3.5"' in project.page("first")


FIGURE = """
import matplotlib.pyplot as plt
MACHINE = "no GPU, 2026-01-02"
print(type(plt.subplots()[1].set_xlabel(f"elements\\n{MACHINE}")).__name__)
"""


def test_pages_and_figures_say_what_made_them(project, monkeypatch):
    project.write("first", "one", then=FIGURE)
    status, output = project.build(COMMIT="c0ffee")
    assert status == 0, output
    assert "by the script as it stands, on 20" in project.page("first")
    assert f"Python {platform.python_version()}, at commit c0ffee." in project.page(
        "first"
    )
    (picture,) = (project.site / "_images").glob("sphx_glr_first_001.svg")
    words = re.findall(r"<text[^>]*>([^<]*)<", picture.read_text())
    assert "elements" in words and "no GPU, 2026-01-02, commit c0ffee" in words


def test_a_lesson_that_takes_too_long_fails_and_the_others_are_run(project):
    project.write("first", "one", then="import time\ntime.sleep(600)\n")
    status, output = project.build(SPHINXOPTS="-D lesson_limit=2")
    assert status != 0 and not project.site.exists()
    assert (
        "Lessons that failed: first.py (TimeoutError: it took longer than lesson_limit, "
        "2 seconds)"
    ) in output
    assert project.runs.read_text().split() == ["first", "second"]


SLEEP = """
import signal, time
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
time.sleep(600)
"""
WAIT_FOR_THE_GPU = """
import torch
import triton
import triton.language as tl

@triton.jit
def wait_for_ever(flag_ptr):
    while tl.load(flag_ptr, volatile=True) == 0:
        pass

wait_for_ever[(1,)](torch.zeros(1, dtype=torch.int32, device="cuda"))
torch.cuda.synchronize()
"""


@pytest.mark.parametrize(
    "hang", [SLEEP, pytest.param(WAIT_FOR_THE_GPU, marks=pytest.mark.gpu)]
)
def test_a_lesson_that_cannot_be_interrupted_fails_and_the_others_are_run(project, hang):
    project.write("first", "one", then=hang)
    status, output = project.build(SPHINXOPTS="-D lesson_limit=10")
    assert status != 0 and not project.site.exists()
    assert 'first.py", line ' in output
    assert "Lessons that failed: first.py (it could not be interrupted" in output
    assert project.runs.read_text().split() == ["first", "second"]
    project.write("first", "one")
    assert project.ran() == ["first"]


def test_a_lesson_that_stops_python_ends_the_build_with_its_name(project):
    hang = SLEEP.replace("time.sleep", "__import__('ctypes').PyDLL(None).sleep")
    project.write("second", "two", then=hang)
    status, output = project.build(SPHINXOPTS="-D lesson_limit=2")
    assert status != 0 and not project.site.exists()
    assert 'second.py", line 16 in <module>' in output
    project.write("second", "two")
    assert project.ran() == ["first", "second"]


def test_outputs_of_another_version_of_a_script_are_refused(project):
    without_running = {"SPHINXOPTS": "-D plot_gallery=0"}
    assert project.build(**without_running)[0] != 0
    assert project.ran() == ["first", "second"]
    assert project.build(**without_running)[0] == 0
    assert project.runs.read_text() == ""

    project.write("second", "three")
    status, output = project.build(**without_running)
    assert status != 0 and "two" in project.page("second")
    assert "Outputs are not of the script as it stands: second.py" in output
    project.write("second", "two")
    assert project.ran() == ["second"]


def put_on_record(project, gpu):
    folder = project.folder / "docs/results" / gpu.lower()
    folder.mkdir(parents=True)
    benchmark = {
        "xlabel": "elements",
        "unit": "GB/s",
        "x_log": True,
        "y_log": False,
        "lines": {
            "ours": ["#d55e00", "-"],
            "x * y": ["#0072b2", "-"],
            "copy": ["#555555", "--"],
        },
        "commit": "abc",
        "date": "2026-01-02",
    }
    facts = dict.fromkeys(["driver", "cuda", "torch", "triton", "python"], "1.0")
    facts |= {"gpu": gpu, "copy_limit": "3000 GB/s", "runs": 2, "date": "2026-01-02"}
    facts |= {"commit": "abc", "benchmarks": {"first.speed": benchmark}}
    (folder / "machine.json").write_text(json.dumps(facts))
    names = ["ours", "x * y", "copy"]
    rows = [
        ["n", *(f"{name} (GB/s)" for name in names)],
        [512, 300, 1000, 1000, 60, 0, 0],  # much noise
        [1024, 500, 1000, 2000],
        [4096, 2900, 1234, 3000],
    ]
    rows[0] += [f"{name}, spread (GB/s)" for name in names]
    rows[2] += [5, 10, 20]
    rows[3] += [29, 12, 30]
    text = "\n".join(",".join(map(json.dumps, row)) for row in rows)
    (folder / "first.speed.csv").write_text(text)


def test_a_lesson_ends_with_what_is_on_record_for_it(project):
    shutil.copy(ROOT / "docs/benchmarks.md", project.folder / "docs")
    (project.folder / "docs/index.md").write_text(
        "# Home\n\n{recorded}`first.speed; x * y; 4096`\n\n"
        "```{eval-rst}\n.. recorded-figure:: first.speed\n\n   A caption.\n```\n\n"
        "```{toctree}\ntutorials/index\nbenchmarks\n```\n"
    )
    assert project.ran() == ["first", "second"]
    assert "Recorded" not in project.page("first")
    home = project.site / "index.html"
    assert "not recorded yet" in home.read_text() and "A caption" not in home.read_text()

    put_on_record(project, "H100")
    put_on_record(project, "H200")
    assert project.ran() == []
    assert "Recorded benchmarks" not in project.page("second")
    page = BeautifulSoup(project.page("first"), "html.parser")
    section = page.find(id="recorded-benchmarks")
    assert [tab.text.strip() for tab in section.select(".sd-tab-label")] == [
        "H100",
        "H200",
    ]
    for gpu, tab in zip(("H100", "H200"), section.select(".sd-tab-content"), strict=True):
        assert f"Recorded on an {gpu}: driver 1.0" in tab.text
        assert "recorded on 2026-01-02 at commit abc; the runs differ by 1.0%" in tab.text
        alt = f"GB/s over elements, recorded on an {gpu}. At 4096: ours 2900, x * y 1234, copy 3000."
        assert tab.img["alt"] == alt
        picture = project.site / "tutorials" / tab.img["src"]
        assert (
            f"{gpu}, torch 1.0, triton 1.0, 2026-01-02, commit abc" in picture.read_text()
        )
        assert [cell.text for cell in tab.select("th, td")][:4] == [
            "n",
            "ours",
            "x * y",
            "copy",
        ]
        csv = project.site / "tutorials" / tab.find("a", class_="download")["href"]
        assert csv.read_text().startswith('"n","ours (GB/s)"')
    timing = page.select_one(".sphx-glr-timing")
    assert timing in section.find_all_next(class_="sphx-glr-timing")

    page = BeautifulSoup((project.site / "benchmarks.html").read_text(), "html.parser")
    worst = ["first.speed", "ours", "25%", "copy, at 1024", "0.30*", "x * y, at 512"]
    table = page.select_one("#where-we-lose table")
    assert [cell.text for cell in table.select("td")] == worst
    text = " ".join(page.text.split())
    assert "elements: 3000 GB/s (H100)" in text and "Recorded on an H200" in text
    assert "1234 GB/s" in home.read_text() and "A caption" in home.read_text()


def make(*arguments, **environment):
    process = subprocess.run(
        ["make", "-C", ROOT, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    return process.returncode, process.stdout + process.stderr


def test_make_alone_lists_the_targets():
    status, output = make()
    assert status == 0
    for target in ("html", "test", "record", "lint", "serve", "clean"):
        assert f"make {target}" in output


def test_no_python_gets_a_sentence(tmp_path):
    status, output = make("html", f"VENV={tmp_path}/venv", "PYTHON=python-of-dreams")
    assert status != 0 and "python-of-dreams was not found. Install Python 3.11" in output


def test_an_old_python_gets_a_sentence(tmp_path):
    old = tmp_path / "old-python"
    old.write_text(
        '#!/bin/sh\ncase "$1" in --version) echo Python 3.8.10;; *) exit 1;; esac\n'
    )
    old.chmod(0o755)
    status, output = make("html", f"VENV={tmp_path}/venv", f"PYTHON={old}")
    assert (
        status != 0
        and "Python 3.8.10 is too old. Name a Python of 3.11 or later" in output
    )


@pytest.mark.parametrize(
    ("module", "text", "sentence"),
    [
        (
            "sitecustomize",
            "import platform\nplatform.system = lambda: 'Darwin'\n",
            "Triton is published for Linux on x86-64 and 64-bit Arm only.",
        ),
        ("ensurepip", "raise ImportError\n", "apt install python3-venv"),
    ],
)
def test_a_machine_that_cannot_serve_gets_a_sentence(tmp_path, module, text, sentence):
    (tmp_path / f"{module}.py").write_text(text)
    status, output = make(
        "html",
        f"VENV={tmp_path}/venv",
        f"PYTHON={sys.executable}",
        PYTHONPATH=str(tmp_path),
    )
    assert status != 0 and sentence in output


def test_triton_imported_too_early_gets_a_sentence():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT / "tutorials")}
    process = subprocess.run(
        [sys.executable, "-c", "import triton, fused_softmax"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (
        "restart Python: Triton was imported before TRITON_INTERPRET=1" in process.stderr
    )
