"""The built site, as a visitor gets it. `make test` builds it first."""

import json
import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbclient
import nbformat
import pytest
from bs4 import BeautifulSoup
from fused_softmax import INTERPRET

ROOT = Path(__file__).parent.parent
SITE = ROOT / "_build/html"
LESSONS = sorted(path.stem for path in (ROOT / "tutorials").glob("*.py"))

if not SITE.exists():
    pytest.skip("needs the built site: make html", allow_module_level=True)

PAGES = {
    path: BeautifulSoup(path.read_text(), "html.parser") for path in SITE.rglob("*.html")
}


def lesson(name):
    return PAGES[SITE / f"tutorials/{name}.html"]


def notebook(name):
    (path,) = (SITE / "_downloads").glob(f"*/{name}.ipynb")
    return nbformat.read(path, as_version=4)


def test_links_inside_the_site_lead_somewhere():
    broken = []
    for path, page in PAGES.items():
        for link in page.find_all("a", href=True):
            url = urlsplit(link["href"])
            if url.scheme or url.netloc:
                continue
            folder = SITE if url.path.startswith("/") else path.parent
            target = folder / unquote(url.path).lstrip("/") if url.path else path
            target = target.resolve()
            found = target.exists()
            if found and url.fragment and target in PAGES:
                found = PAGES[target].find(id=unquote(url.fragment)) is not None
            if not found:
                broken.append(f"{path.relative_to(SITE)}: {link['href']}")
    assert not broken


def test_nothing_is_loaded_from_elsewhere():
    loaded = []
    for path, page in PAGES.items():
        tags = page.find_all(["script", "img", "iframe", "source", "video", "audio"])
        urls = [tag.get("src") for tag in tags]
        urls += [tag["href"] for tag in page.find_all("link", href=True)]
        urls += re.findall(
            r"url\((.*?)\)", " ".join(tag.text for tag in page.find_all("style"))
        )
        loaded += [
            (path.name, url) for url in urls if url and re.match(r"(https?:)?//", url)
        ]
    for path in SITE.rglob("*.css"):
        urls = re.findall(
            r"(?:url\(|@import )[\"']?((?:https?:)?//[^\"')]+)", path.read_text()
        )
        loaded += [(path.name, url) for url in urls]
    assert not loaded


def test_images_have_a_text_alternative():
    for path, page in PAGES.items():
        for image in page.select("article img"):
            decorative = image.find_parent(
                class_="sphx-glr-thumbcontainer"
            )  # beside its title
            assert image.get("alt") or decorative, f"{path.name}: {image.get('src')}"


@pytest.mark.parametrize("name", LESSONS)
def test_a_lesson_shows_code_output_time_and_downloads(name):
    page = lesson(name)
    assert page.select(".highlight-Python") and page.select(".sphx-glr-script-out")
    assert "Total running time of the script" in page.text
    downloads = [link["href"] for link in page.select("article a.download")]
    assert {Path(link).suffix for link in downloads[-3:]} == {".py", ".ipynb", ".zip"}


@pytest.mark.parametrize("name", LESSONS)
def test_outputs_are_free_of_warnings_and_machine_paths(name):
    outputs = " ".join(
        block.text for block in lesson(name).select(".sphx-glr-script-out")
    )
    assert "Warning" not in outputs and "site-packages" not in outputs


@pytest.mark.parametrize("name", LESSONS)
def test_outputs_fit_the_page(name):
    for block in lesson(name).select(".sphx-glr-script-out pre"):
        assert max(map(len, block.text.splitlines())) <= 95, block.text


@pytest.mark.parametrize("name", LESSONS)
def test_a_lesson_says_at_its_top_what_ran_it(name):
    note = lesson(name).select_one("h1 + .note").text
    assert ("built without a GPU" in note) == INTERPRET
    assert ("run on an" in note) != INTERPRET


@pytest.mark.parametrize("name", LESSONS)
def test_speed_is_shown_only_where_a_gpu_measured_it(name):
    outputs = " ".join(
        block.text for block in lesson(name).select(".sphx-glr-script-out")
    )
    assert ("speed is measured on a GPU only" in outputs) == INTERPRET
    units = r"GB/s|\bps\b|\bms:|microseconds|MiB:|times as long"
    assert bool(re.search(units, outputs)) != INTERPRET
    if not INTERPRET:
        assert lesson(name).select("img.sphx-glr-single-img, img.sphx-glr-multi-img")


@pytest.mark.parametrize("name", LESSONS)
def test_a_lesson_says_when_and_at_which_commit(name):
    note = lesson(name).select_one("h1 + .note").text
    assert re.search(r"script as it stands, on \d{4}-\d\d-\d\d, .* at commit \w+", note)


@pytest.mark.parametrize("name", LESSONS)
def test_a_lesson_ends_with_its_recorded_benchmarks(name):
    shown = [
        Path(link["href"]).name for link in lesson(name).select(".recorded a.download")
    ]
    recorded = (ROOT / "docs/results").glob(f"*/{name}.*.csv")
    assert sorted(shown) == sorted(path.name for path in recorded)
    for tab in lesson(name).select(".recorded .sd-tab-content"):
        assert "Recorded on an " in tab.text


def test_all_recorded_benchmarks_are_on_one_page_and_one_on_the_first():
    page = PAGES[SITE / "benchmarks.html"]
    shown = {Path(link["href"]).name for link in page.select(".recorded a.download")}
    recorded = {path.name for path in (ROOT / "docs/results").glob("*/*.csv")}
    assert shown == recorded
    lessons = [
        Path(link["href"]).stem for link in page.select("#what-the-lessons-take a")
    ]
    assert set(LESSONS) <= set(lessons)
    pictures = [image["src"] for image in PAGES[SITE / "index.html"].select("figure img")]
    assert bool(pictures) == bool(recorded)


# A rate, a duration, a size, or a comparison of speeds.
MEASURED = re.compile(
    r"\d\s?(?:[KMGT]i?B|bytes)/s|\d\s?T?FLOPS?\b|\d\s?(?:[mnpuµμ]s|s|min)\b"
    r"|\d\s?(?:(?:milli|micro|nano|pico)?seconds?|minutes?)\b|\d\s?[KMGT]i?B\b"
    r"|\d(?:\s?[x×%]| times| per cent) (?:as )?(?:fast|slow|long|quick|more mem|less mem|of (?:a|the) copy)"
)
# Sizes that follow from a shape and a dtype, or from the design of a GPU.
COUNTED = ["256 KiB", "64 KiB", "16 MiB", "8.6 GB"]


def measured(sentence):
    for size in COUNTED:
        sentence = sentence.replace(size, "")
    return MEASURED.search(sentence)


@pytest.mark.parametrize(
    "sentence",
    [
        "It reaches 2.9 TB/s.",
        "A launch takes 17.6 µs.",
        "It needs 3 seconds.",
        "It is 1.5x faster and 3 times as fast.",
        "It reaches 99% of the copy.",
        "Training holds 300 MiB.",
    ],
)
def test_a_measured_number_is_noticed(sentence):
    assert measured(sentence)


def test_no_speed_or_memory_is_typed_into_prose():
    """It is printed by the run, or comes from the record: a table, a figure, or the role."""
    typed = []
    for path, page in PAGES.items():
        for article in page.select("article"):
            article = BeautifulSoup(str(article), "html.parser")
            made = "h1 + .note, pre, table, .recorded, .sphx-glr-timing, .formula, math, code"
            for element in article.select(made):
                element.decompose()
            for block in article.select("p, li, dd, h1, h2, h3"):
                text = " ".join(block.text.split())
                if measured(text) and not text.startswith("Peak memory on the GPU:"):
                    typed.append(f"{path.relative_to(SITE)}: {text}")
    assert not typed


def test_every_lesson_is_listed_in_reading_order():
    order = [
        link["href"]
        for link in PAGES[SITE / "tutorials/index.html"].select(".toctree-l1 a")
    ]
    lessons = [Path(link).stem for link in order if Path(link).stem in LESSONS]
    lessons = list(dict.fromkeys(lessons))
    assert sorted(lessons) == LESSONS
    settings = (ROOT / "conf.py").read_text()
    named = [name for name in re.findall(r'"(\w+)\.py"', settings) if name in LESSONS]
    assert lessons[: len(named)] == named


@pytest.mark.parametrize("name", LESSONS)
def test_solutions_are_folded(name):
    fold = lesson(name).select_one("#exercises details")
    assert fold.summary.text == "Try it first."
    exercises = lesson(name).select("#exercises > ol > li")
    assert len(fold.select(":scope > ol > li")) == len(exercises) > 0


def test_solutions_in_a_notebook_are_markdown_with_code():
    prose = "\n".join(cell.source for cell in notebook("matrix_dropout").cells)
    answers = prose[prose.index("Try it first.") :]
    assert "```python\ndef column_dropout(x, p, seeds):\n    return" in answers
    assert "```diff\n@@ in matrix_dropout_kernel\n     x_row_stride,\n+ " in answers


@pytest.mark.parametrize(
    ("word", "title"),
    [("softmax", "Fused softmax"), ("philox", "Random numbers in Triton")],
)
def test_search_finds(word, title):
    index = (SITE / "searchindex.js").read_text()
    index = json.loads(index.removeprefix("Search.setIndex(").removesuffix(")"))
    found = []
    for terms in (index["terms"], index["titleterms"]):
        pages = terms.get(word, [])
        found += pages if isinstance(pages, list) else [pages]
    assert title in [index["titles"][page] for page in found]


@pytest.mark.parametrize("name", LESSONS)
def test_notebook_prose_is_markdown(name):
    prose = "\n".join(
        cell.source for cell in notebook(name).cells if cell.cell_type == "markdown"
    )
    prose = re.sub(r"data:image/[^\"]*", "", prose)
    raw = re.findall(
        r":\w+:`|^\.\. |``?_|^[=\-~]{4,}$|^ *:\w+:", prose, flags=re.MULTILINE
    )
    assert not raw


@pytest.mark.parametrize("name", LESSONS)
def test_notebook_starts_by_installing_the_pinned_packages(name):
    first = notebook(name).cells[0]
    pinned = (ROOT / "requirements.txt").read_text().splitlines()
    assert first.source.startswith("%pip install ")
    packages = first.source.split()[3:]
    assert {package.split("==")[0] for package in packages} >= {
        "torch",
        "triton",
        "tabulate",
    }
    assert set(packages) <= set(pinned)


@pytest.mark.parametrize("name", LESSONS)
def test_notebook_runs_alone_in_an_empty_folder(name, tmp_path, monkeypatch):
    monkeypatch.setenv(
        "PIP_NO_INDEX", "1"
    )  # the packages are there; change no version of them
    nb = notebook(name)
    nbclient.NotebookClient(nb, kernel_name="python3", timeout=600).execute(cwd=tmp_path)
    outputs = [
        output for cell in nb.cells if cell.cell_type == "code" for output in cell.outputs
    ]
    assert any(output.output_type == "stream" for output in outputs)


def test_the_glossary_is_linked_at_the_first_use_of_a_word():
    links = lesson("seeded_dropout").select("article a.term")
    assert [link["href"] for link in links].count("../glossary.html#term-Philox") == 1
    for link in links:
        entry = PAGES[SITE / "glossary.html"].find(id=link["href"].partition("#")[2])
        assert link.text.lower().rstrip("s") in entry.text.lower()


def test_names_in_code_lead_to_their_documentation():
    (link, *_) = [
        link
        for link in lesson("seeded_dropout").select("pre a")
        if link.text == "tl.rand"
    ]
    assert link["href"] == "../reference/random.html#triton.language.rand"


def test_the_bibliography_lists_each_reference_once():
    listed = [
        item.a["href"]
        for item in PAGES[SITE / "bibliography.html"].select(".bibliography li")
    ]
    for name in LESSONS:
        for item in lesson(name).select("#references > ul > li"):
            assert listed.count(item.a["href"]) == 1


def test_previous_and_next_follow_the_reading_order():
    page = lesson("baseline_dropout")
    assert page.select_one(".prev-next-footer .left-prev")["href"] == "fused_softmax.html"
    assert (
        page.select_one(".prev-next-footer .right-next")["href"] == "seeded_dropout.html"
    )


def test_nothing_shows_of_a_repository_or_an_address_that_is_not_set():
    if os.environ.get("SITE_URL") or os.environ.get("REPOSITORY"):
        pytest.skip("they are set")
    for page in PAGES.values():
        assert not page.select(
            "meta[property^='og:'], link[rel=canonical], .editthispage"
        )
        assert not page.select("a[href*='colab.research']")
    assert not (SITE / "sitemap.xml").exists()


def test_related_lessons_stand_at_the_end():
    related = [link["href"] for link in lesson("matrix_dropout").select(".seealso a")]
    assert related == ["fused_softmax.html", "seeded_dropout.html"]
