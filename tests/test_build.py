"""What a build does when things change or go wrong, on a copy of the project with two small lessons."""

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

import address
import build
import packages
import pytest
import yaml
from bs4 import BeautifulSoup
from builds import LESSON, ROOT, Project
from sphinx.errors import ConfigError


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path / "project")


def test_only_what_changed_is_run_again(project):
    assert project.ran() == ["first", "second"]
    assert project.ran() == []
    project.write("second", "three")
    assert project.ran() == ["second"]
    assert "three" in project.page("second")

    with (project.folder / "conf.py").open("a") as conf:
        conf.write('\nproject = "Another name"\ncourse = {"Start": ["second"]}\n')
    assert project.ran() == []
    with (project.folder / "conf.py").open("a") as conf:
        conf.write('\nsphinx_gallery_conf["min_reported_time"] = 1\n')
    assert project.ran() == ["first", "second"]

    path = project.folder / "docs/tutorials/first.made.json"
    paper = project.paper("first")
    other = {"made_with": paper["made_with"] | {"gpu": "another GPU"}}
    path.write_text(json.dumps(paper | other))
    (project.folder / "docs/tutorials/second.ipynb").unlink()
    assert project.ran() == ["first", "second"]


def test_lessons_stand_in_the_reading_order_and_the_rest_last(project):
    with (project.folder / "conf.py").open("a") as conf:
        conf.write('\ncourse = {"Start": ["not_written_yet", "second"]}\n')
    assert project.ran() == ["first", "second"]
    index = BeautifulSoup(
        (project.site / "tutorials/index.html").read_text(), "html.parser"
    )
    cards = [
        " ".join(card.text.split()) for card in index.select("article .sd-card-title")
    ]
    assert cards == ["1. The second lesson", "2. The first lesson"]
    place = (
        BeautifulSoup(project.page("first"), "html.parser").select_one("p.course").text
    )
    assert place.startswith("More · lesson 2 of 2 · ")


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
    assert output.endswith("Lessons that failed:\nfirst.py (RuntimeError: no luck)\n")
    assert 'first.py", line 23' in output
    assert sorted(project.runs.read_text().split()) == ["first", "second"]
    assert (project.page("first"), project.page("second")) == before

    # Back to the script that once passed: its outputs are gone, so it is run again.
    project.write("first", "one")
    assert project.ran() == ["first"]
    assert "changed" in project.page("second")


def test_whatever_a_lesson_does_it_is_named_and_the_others_are_run(project):
    assert project.ran() == ["first", "second"]
    before = {path: path.stat().st_mtime_ns for path in project.site.rglob("*.html")}
    ways = {
        "a_status": ("import sys; sys.exit()", "SystemExit"),
        "b_status": ("raise SystemExit(0)", "SystemExit: 0"),
        "c_status": ("import os; os._exit(0)", "it ended Python, with status 0"),
        "d_status": ("import os; os._exit(3)", "it ended Python, with status 3"),
        "e_abort": ("import os; os.abort()", "Python was ended by SIGABRT"),
        "f_interrupt": ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        "g_lines": (
            'raise ValueError("x is bad\\n  File it\\nas said")',
            "ValueError: x is bad\n  File it\nas said",
        ),
        "h_syntax": ("def f(:", "SyntaxError: invalid syntax (h_syntax.py, line 23)"),
        "i_long": ('print("x" * 2_000_000)', "it prints a line of 2000004 characters"),
    }
    for name, (code, _) in ways.items():
        project.write(name, "output", then=f"{code}\n")
    latin = project.folder / "tutorials/j_latin.py"
    latin.write_bytes(b'"""\n.. _caf\xe9:\n\nTitle\n=====\n\nText.\n"""\n')
    (project.folder / "tutorials/k_title.py").write_text('"""No title here."""\n')
    (project.folder / "tutorials/l-name.py").write_text(
        LESSON.format(name="l", output="")
    )
    project.write("second", "changed")
    project.write("z_last", "output")

    why = project.failed()
    for name, (_, reason) in ways.items():
        assert f"{name}.py ({reason})\n" in why
    assert "j_latin.py (it is not UTF-8: 'utf-8' codec can't decode byte 0xe9" in why
    assert "k_title.py (its docstring must begin with a label" in why
    assert "l-name.py (its name is none that Python can import)" in why
    assert why.count(".py (") == len(ways) + 3
    ran = project.runs.read_text().split()
    assert sorted(ran) == sorted(["second", "z_last", *ways.keys() - {"h_syntax"}])
    after = {path: path.stat().st_mtime_ns for path in project.site.rglob("*.html")}
    assert after == before


def ends(pid):
    """Whether a process that was sent a signal is gone, at once or soon."""
    state = Path(f"/proc/{pid}/stat")
    for _ in range(50):
        if not state.exists() or state.read_text().rpartition(") ")[2][0] == "Z":
            return True
        time.sleep(0.1)
    return False


LEAVES_BEHIND = """
import subprocess, threading, time
threading.Thread(target=time.sleep, args=[600]).start()
process = subprocess.Popen(["sleep", "600"])
with open(os.environ["RUNS"] + ".pid", "w") as file:
    file.write(str(process.pid))
"""


def test_a_lesson_leaves_nothing_running(project):
    project.write("first", "one", then=LEAVES_BEHIND)
    assert project.ran() == ["first", "second"]
    assert ends(Path(f"{project.runs}.pid").read_text())


SETTINGS = """
import random
import torch
os.environ["LEFT"] = "behind"
torch.set_default_dtype(torch.float64)
torch.set_grad_enabled(False)
random.seed(1)
"""
SEEN = """
import torch
print(os.environ.get("LEFT"), torch.get_default_dtype(), torch.is_grad_enabled())
"""


def test_what_a_lesson_sets_does_not_reach_the_next(project):
    project.write("first", "one", then=SETTINGS)
    project.write("second", "two", then=SEEN)
    assert project.ran() == ["first", "second"]
    assert "None torch.float32 True" in project.page("second")


def test_a_path_with_a_space_and_other_characters(tmp_path):
    project = Project(tmp_path / "my project (ü)")
    assert project.ran() == ["first", "second"]
    page = BeautifulSoup(project.page("first"), "html.parser")
    for link in page.select("article a.download"):
        assert (project.site / "tutorials" / link["href"]).exists()


def test_a_site_that_is_not_whole_is_not_put_in_place(project):
    assert project.ran() == ["first", "second"]
    with (project.folder / "conf.py").open("a") as conf:
        conf.write(
            "\ndef setup(app):\n"
            '    page = "tutorials/second.html"\n'
            '    app.connect("build-finished", lambda app, _: (app.outdir / page).unlink())\n'
        )
    status, output = project.build()
    assert status != 0
    assert "The new site is not whole" in output and "tutorials/second.html" in output
    assert project.page("second")


def test_a_second_build_waits_for_the_first(project):
    assert project.ran() == ["first", "second"]
    wait = 'import time\nwhile not os.path.exists(os.environ["RUNS"] + ".go"): time.sleep(.1)\n'
    project.write("second", "changed", then=wait)
    first = project.begin(log="log of the first")
    project.wait_until_running("second")
    second = project.begin(log="log of the second")
    log = project.folder / "log of the second"
    deadline = time.monotonic() + 60
    while not (log.exists() and "Another build is running" in log.read_text()):
        assert time.monotonic() < deadline and second.is_alive()
        time.sleep(0.1)
    assert "changed" not in project.page("second")
    Path(f"{project.runs}.go").touch()
    for process in (first, second):
        process.join(60)
        assert process.exitcode == 0
    assert "changed" in project.page("second")
    assert project.runs.read_text().split() == []  # the second has run nothing


@pytest.mark.parametrize("renameat2", [True, False])
def test_folders_change_places(tmp_path, monkeypatch, renameat2):
    monkeypatch.setattr(build, "BETWEEN", tmp_path / "between")
    if not renameat2:
        monkeypatch.setattr(build.ctypes, "CDLL", lambda name: object())
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    build.exchange(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old/new").exists() and (tmp_path / "new/old").exists()
    assert len(list(tmp_path.iterdir())) == 2


def test_a_site_that_a_killed_build_put_aside_comes_back(project):
    assert project.ran() == ["first", "second"]
    project.site.rename(project.site.with_name("between"))
    project.write("first", "one", then="raise RuntimeError\n")
    project.failed()
    assert project.page("second")


def test_an_interrupted_build_is_repaired_by_the_next(project):
    project.write("first", "one", then="import time\ntime.sleep(600)\n")
    process = project.start("SPHINXOPTS=-D lesson_limit=30")
    project.wait_until_running("first")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not project.site.exists()

    project.write("first", "changed")
    process = project.start()
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert "The site is in _build/html" in output
    assert set(project.runs.read_text().split()) >= {"first"}
    assert "changed" in project.page("first")


def test_an_interrupt_ends_the_lessons_too(project):
    wait = f"import time\nopen('{project.runs}.pid', 'w').write(str(os.getpid()))\n"
    project.write("first", "one", then=f"{wait}time.sleep(600)\n")
    process = project.begin()
    while not (pid := Path(f"{project.runs}.pid")).exists() or not pid.read_text():
        assert process.is_alive()
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode
    assert ends(pid.read_text())


def test_a_site_with_an_address_and_a_repository_says_so(project):
    ran = project.ran(
        SITE_URL="https://example.org/kernels/",
        REPOSITORY="git@github.com:someone/kernels.git",
    )
    assert ran == ["first", "second"]
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
    promise = re.findall('(?:name|property)="(?:og:)?description" content="(.*?)"', page)
    assert len(promise) == 2 and len(set(promise)) == 1 and "lesson" not in promise[0]
    assert address in (project.site / "sitemap.xml").read_text()
    assert 'href="/kernels/index.html"' in (project.site / "404.html").read_text()
    assert "edit/main/docs/index.md" in (project.site / "index.html").read_text()
    assert (
        "edit/main/tutorials/index.rst"
        in (project.site / "tutorials/index.html").read_text()
    )


@pytest.mark.parametrize(
    "text",
    [
        "https://github.com/someone/kernels",
        "https://github.com/someone/kernels/",
        "https://github.com/someone/kernels.git",
        "https://user:token@github.com/someone/kernels.git",
        "git@github.com:someone/kernels.git",
        "ssh://git@github.com/someone/kernels",
        "ssh://git@github.com:22/someone/kernels.git",
        "github.com/someone/kernels",
    ],
)
def test_a_repository_may_be_named_in_any_form(text):
    assert address.page(text) == "https://github.com/someone/kernels"


@pytest.mark.parametrize(
    "text", ["kernels", "someone/kernels", "https://x.org/a/b?c", 'https://x.org/a/"><b>']
)
def test_what_is_no_address_gets_a_sentence(text):
    with pytest.raises(ConfigError, match=r"REPOSITORY is .*It is an address such as"):
        address.page(text)
    if "//" not in text or ">" in text or "?" in text:
        with pytest.raises(ConfigError, match=r"SITE_URL is .*It is an address such as"):
            address.site(text)


def test_a_broken_link_fails_the_build_whatever_else_is_set(project):
    (project.folder / "docs/index.md").write_text(
        "# Home\n\n[](nowhere.md) [](other.md#no-anchor)\n\n"
        "```{toctree}\ntutorials/index\nother\n```\n"
    )
    (project.folder / "docs/other.md").write_text("# Other\n")
    project.write("first", "one", then="# %%\n# See :ref:`no label`.\n")
    status, output = project.build("-D", "lesson_limit=1200")
    assert status != 0
    for target in ("nowhere.md", "no-anchor", "no label"):
        assert target in output
    assert not project.site.exists()


def test_one_lesson_alone(project):
    project.write(
        "first", "one", then="# %%\n# See :ref:`second lesson`, :term:`Philox`.\n"
    )
    status, output = project.build("--lesson=first")
    assert status == 0 and "WARNING" not in output, output
    assert "_build/page/tutorials/first.html" in output
    assert project.runs.read_text().split() == ["first"]
    assert (project.folder / "_build/page/tutorials/first.html").exists()
    project.write(
        "second", "two", then="raise RuntimeError\n"
    )  # which doesn't matter here
    assert project.build("--lesson=first")[0] == 0
    status, output = project.build("--lesson=third")
    assert status != 0 and "No such lesson: third. There are: first, second" in output
    project.write("first", "one")
    project.write("second", "two")
    assert project.ran() == ["first", "second"]


def test_the_skeleton_of_a_lesson_builds_as_it_stands(tmp_path):
    project = Project(tmp_path / "project", lessons=[])
    shutil.copy(ROOT / "tests/skeleton/squares.py", project.folder / "tutorials")
    # Its links to lessons that are not here are left out of this build.
    status, output = project.build("--lesson=squares")
    assert status == 0 and "WARNING" not in output, output
    site = project.folder / "_build/page"
    page = BeautifulSoup((site / "tutorials/squares.html").read_text(), "html.parser")
    outputs = " ".join(block.text for block in page.select(".sphx-glr-script-out"))
    assert "squares agree with PyTorch's" in outputs and "Warning" not in outputs
    assert len(page.select("#exercises details > ol > li")) == 1
    assert page.select("#as-a-public-function details .highlight-Python")
    (reference,) = page.select("#references > ul > li")
    assert reference.a["href"].startswith("https://triton-lang.org")
    assert any(site.glob("_downloads/*/squares.ipynb"))


PLOT = """
import matplotlib.pyplot as plt
plt.plot([1, 2, 4], [3.0, 4.0, 5.25], label="ours")
plt.plot([1, 2, 4], [1.0, 2.0, 3.5], label='"torch" < 2 & more')
plt.xlabel("rows\\nmachine")
plt.ylabel("GB/s")
"""


def test_a_figure_has_an_alternative_that_tells_what_it_shows(project):
    project.write("first", "one", then=PLOT)
    project.ran()
    image = BeautifulSoup(project.page("first"), "html.parser").select_one("article img")
    assert image["alt"] == 'GB/s over rows; at 4: ours 5.25, "torch" < 2 & more 3.5'
    assert "sphx-glr-single-img" in image["class"]


PICTURES = """
import matplotlib.pyplot as plt
figure, axes = plt.subplots(1, 2)
for axis, title in zip(axes, ("kept", "again")):
    axis.imshow([[0, 1], [0, 0]])
    axis.set_title(title)
"""


def test_a_picture_s_alternative_tells_how_many_cells_are_filled(project):
    project.write("first", "one", then=PICTURES)
    project.ran()
    image = BeautifulSoup(project.page("first"), "html.parser").select_one("article img")
    first = "kept: picture 1, 2 by 2 cells, 25% of them not 0"
    assert image["alt"] == f"{first}. again: picture 2, the same as picture 1"


FIGURE = """
import matplotlib.pyplot as plt
MACHINE = "no GPU, 2026-01-02"
print(type(plt.subplots()[1].set_xlabel(f"elements\\n{MACHINE}")).__name__)
"""


def test_pages_and_figures_say_what_made_them(project):
    project.write("first", "one", then=FIGURE)
    project.ran(COMMIT="c0ffee")
    page = project.page("first")
    assert "by the script as it stands, on 20" in page
    assert f"Python {platform.python_version()}, at commit c0ffee." in page
    (picture,) = (project.site / "_images").glob("sphx_glr_first_001.svg")
    words = re.findall(r"<text[^>]*>([^<]*)<", picture.read_text())
    assert "elements" in words and "no GPU, 2026-01-02, commit c0ffee" in words


SLEEP = """
import signal, time
signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals))
time.sleep(600)
"""
STOP_PYTHON = SLEEP.replace("time.sleep", "__import__('ctypes').PyDLL(None).sleep")
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
    "hang",
    [SLEEP, STOP_PYTHON, pytest.param(WAIT_FOR_THE_GPU, marks=pytest.mark.gpu)],
    ids=["sleep", "stop Python", "wait for the GPU"],
)
def test_a_lesson_that_takes_too_long_fails_and_the_others_are_run(project, hang):
    project.write("first", "one", then=hang)
    limit = 10 if hang == WAIT_FOR_THE_GPU else 5  # enough for the other lesson
    status, output = project.build("-D", f"lesson_limit={limit}")
    assert status != 0 and not project.site.exists()
    assert 'first.py", line ' in output
    reason = f"it took longer than lesson_limit, {limit} seconds: see above where it was"
    assert output.endswith(f"Lessons that failed:\nfirst.py ({reason})\n")
    assert sorted(project.runs.read_text().split()) == ["first", "second"]
    project.write("first", "one")
    assert project.ran() == ["first"]


def test_outputs_of_another_version_of_a_script_are_refused(project):
    without_running = ("-D", "plot_gallery=0")
    assert project.build(*without_running)[0] != 0
    assert project.ran() == ["first", "second"]
    assert project.ran(*without_running) == []

    project.write("second", "three")
    why = project.failed(*without_running)
    assert why == "second.py (its outputs are not of the script as it stands)\n"
    assert "second output" in project.page("second")
    project.write("second", "two")
    assert project.ran() == ["second"]


def put_on_record(project, gpu):
    folder = project.folder / "docs/results" / gpu.lower()
    folder.mkdir(parents=True)
    benchmark = {
        "function": "speed",
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


RUNS_A_BENCHMARK = """
# %%
# Speed
# -----
class speed:
    def run():
        print("measured")

speed.run()

# %%
# The end
# -------
# Here it ends.
"""


def test_a_lesson_shows_what_is_on_record_behind_the_cell_that_runs_it(project):
    page = (ROOT / "docs/benchmarks.md").read_text()
    page = re.sub("## On two GPUs\n.*?(?=## )", "", page, flags=re.DOTALL)
    (project.folder / "docs/benchmarks.md").write_text(page)
    (project.folder / "docs/index.md").write_text(
        "# Home\n\n{recorded}`first.speed; x * y; 4096`\n\n"
        "```{eval-rst}\n.. recorded-figure:: first.speed\n\n   A caption.\n```\n\n"
        "```{toctree}\ntutorials/index\nbenchmarks\n```\n"
    )
    project.write("first", "one", then=RUNS_A_BENCHMARK)
    assert project.ran() == ["first", "second"]
    assert "Recorded" not in project.page("first")
    home = project.site / "index.html"
    assert "not recorded yet" in home.read_text() and "A caption" not in home.read_text()

    put_on_record(project, "H100")
    put_on_record(project, "H200")
    assert project.ran() == []
    assert "Recorded" not in project.page("second")
    page = BeautifulSoup(project.page("first"), "html.parser")
    section = page.find(id="speed")
    assert not page.find(id="the-end").select(".recorded")
    assert [tab.text.strip() for tab in section.select(".sd-tab-label")] == [
        "H100",
        "H200",
    ]
    for gpu, tab in zip(("H100", "H200"), section.select(".sd-tab-content"), strict=True):
        text = " ".join(tab.text.split())
        assert f"Recorded on 2026-01-02 on an {gpu} (driver 1.0, torch 1.0" in text
        assert "commit abc): medians of 2 runs, which differ by 1.0%" in text
        alt = f"GB/s over elements, recorded on an {gpu}. At 4096: ours 2900, x * y 1234, copy 3000."
        assert tab.img["alt"].endswith(alt)
        picture = project.site / "tutorials" / tab.img["src"]
        assert (
            f"{gpu}, torch 1.0, triton 1.0, 2026-01-02, commit abc" in picture.read_text()
        )
        cells = [cell.text for cell in tab.select("th, td")]
        assert cells[1:4] == ["ours", "x * y", "copy"]
        csv = project.site / "tutorials" / tab.find("a", class_="download")["href"]
        assert csv.read_text().startswith('"n","ours (GB/s)"')

    page = BeautifulSoup((project.site / "benchmarks.html").read_text(), "html.parser")
    assert "25%" in page.select_one("#where-we-lose table").text
    text = " ".join(page.text.split())
    assert "elements: 3000 GB/s (H100)" in text and "on an H200" in text
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
    for target in (
        "html",
        "page",
        "test",
        "matrix",
        "targets",
        "record",
        "lint",
        "linkcheck",
        "serve",
    ):
        assert f"make {target}" in output


def test_options_are_added_to_those_of_the_build():
    _, output = make("-n", "html", "VENV=", "SPHINXOPTS=-D lesson_limit=1200")
    assert "docs/_ext/build.py -D lesson_limit=1200" in output


@pytest.mark.parametrize("marker", [None, "pyvenv.cfg", "ready"])
def test_a_folder_that_make_did_not_fill_is_not_emptied(tmp_path, marker):
    folder = tmp_path / "precious"
    folder.mkdir()
    file = folder / (marker or "thesis.tex")
    file.write_text("years of work")
    os.utime(file, (0, 0))
    status, output = make("html", f"VENV={folder}", f"PYTHON={sys.executable}")
    assert status != 0 and "has files that make did not put there" in output
    assert [path.read_text() for path in folder.iterdir()] == ["years of work"]


def test_an_environment_that_make_made_is_made_anew(tmp_path):
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\ncase "$*" in "-m venv "*) touch {tmp_path}/venv/new; exit 1;; esac\n'
        f'exec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    (tmp_path / "venv/lib").mkdir(parents=True)
    for name in ("ready", "pyvenv.cfg", "lib/old"):
        (tmp_path / "venv" / name).touch()
    os.utime(tmp_path / "venv/ready", (0, 0))
    for _ in range(2):  # it fails after the old is removed, and can be tried again
        status, output = make("html", f"VENV={tmp_path}/venv", f"PYTHON={python}")
        assert status != 0 and "did not put there" not in output
        names = sorted(path.name for path in (tmp_path / "venv").iterdir())
        assert names == ["new", "pyvenv.cfg", "ready"]


def test_a_folder_with_a_space_for_the_environment_gets_a_sentence(tmp_path):
    status, output = make("html", f"VENV={tmp_path}/my venv")
    assert status != 0 and "It is a folder whose name has no space" in output


def test_packages_that_an_active_environment_lacks_get_a_sentence(tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    python.chmod(0o755)
    status, output = make("html", "VENV=", f"PYTHON={python}")
    assert status != 0 and "lacks packages. Any recent versions do: " in output
    assert "torch==" in output and "sphinx-gallery==" in output and "keras" not in output
    assert list(packages.missing(["pytest==1", "no-such-package"])) == ["no-such-package"]


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


def git(folder, *arguments):
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    return subprocess.check_output(command, cwd=folder, text=True)


def test_the_workflow_builds_and_publishes(tmp_path):
    workflow = yaml.safe_load((ROOT / ".github/workflows/publish.yml").read_text())
    (job,) = workflow["jobs"].values()
    assert "self-hosted" in job["runs-on"] and "gpu" in job["runs-on"]
    steps = [step["run"] for step in job["steps"] if "run" in step]
    assert steps == ["make html", ".ci/publish"]
    assert workflow[True]["push"] == {"branches": ["main"]}  # YAML reads "on" as true

    git(tmp_path, "init", "-q", "--bare", "host")
    work = tmp_path / "work"
    git(tmp_path, "clone", "-q", "host", "work")
    (work / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/publish", work / ".ci")
    (work / ".gitignore").write_text("/_build/\n*.ipynb\n")
    git(work, "add", "--all")
    git(work, "commit", "-q", "-m", "Something")
    for old, new in ((None, "first"), ("first", "second")):
        page = work / f"_build/html/_static/{new}.ipynb"
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(new)
        if old:
            page.with_name(f"{old}.ipynb").unlink()
        subprocess.run([work / ".ci/publish"], check=True, capture_output=True)
        assert git(work, "status", "--porcelain") == ""
        published = git(tmp_path / "host", "ls-tree", "-r", "--name-only", "gh-pages")
        assert published.split() == [".nojekyll", f"_static/{new}.ipynb"]
    assert git(tmp_path / "host", "log", "--format=%s", "gh-pages").count("\n") == 1
