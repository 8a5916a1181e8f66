"""The built site, as a visitor gets it. `make test` builds it first."""

import copy
import json
import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

import forked
import nbclient
import nbformat
import pytest
from benchmarks import schema
from bs4 import BeautifulSoup
from cells import run_cells
from conftest import INTERPRET

ROOT = Path(__file__).parent.parent
SITE = ROOT / "_build/html"
CONF = (ROOT / "conf.py").read_text()
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
    ids = {
        path: {tag["id"] for tag in page.find_all(id=True)}
        for path, page in PAGES.items()
    }
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
                found = unquote(url.fragment) in ids[target]
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
            # A card is a link that its title names. Its picture has nothing to add, and an
            # alternative that is empty, not missing, is what a screen reader passes over.
            decorative = image.find_parent(class_="sd-card") and image.get("alt") == ""
            assert image.get("alt") or decorative, f"{path.name}: {image.get('src')}"


def test_a_card_is_a_link_with_a_name():
    for page in ("index.html", "tutorials/index.html"):
        cards = PAGES[SITE / page].select(".sd-card")
        assert len(cards) == len(LESSONS)
        for card in cards:
            assert re.match(r"\d+\. \w", card.select_one(".sd-card-title").text.strip())
            assert card.select_one("a.sd-stretched-link").text.strip()


@pytest.mark.parametrize("name", LESSONS)
def test_a_lesson_shows_code_output_time_and_downloads(name):
    page = lesson(name)
    assert page.select(".highlight-Python") and page.select(".sphx-glr-script-out")
    assert "Total running time of the script" in page.text
    downloads = [link["href"] for link in page.select("article a.download")]
    kinds = [Path(link).suffix for link in downloads[-5:]]
    assert sorted(kinds) == [".ipynb", ".ipynb", ".md", ".py", ".zip"]


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
    note = lesson(name).select_one("h1 ~ :is(.note, .made), .made").text
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
    note = lesson(name).select_one("h1 ~ :is(.note, .made), .made").text
    made = r"script as it stands, on \d{4}-\d\d-\d\d, .* at commit \w+(-dirty)?\."
    assert re.search(made, note)


RECORD = schema.machines(ROOT / "docs/results")


def csv_files(page):
    links = [link["href"] for link in page.select(".recorded a.download")]
    return [Path(link).name for link in links]


@pytest.mark.parametrize("name", LESSONS)
def test_recorded_benchmarks_stand_behind_the_cells_that_run_them(name):
    page = lesson(name)
    runs = [b for b in page.select(".highlight-Python") if ".run(" in b.text]
    for recorded in page.select(".recorded"):
        before = recorded.find_previous(class_="highlight-Python")
        assert before in runs, "it stands behind another cell"
    shown = set(csv_files(page))
    for machine in RECORD:
        for benchmark in machine.benchmarks.values():
            here = benchmark.lesson == name and benchmark.function
            if here and any(
                re.search(rf"\b{benchmark.function}\b", b.text) for b in runs
            ):
                assert f"{benchmark.name}.csv" in shown
    for tab in page.select(".recorded .sd-tab-content"):
        assert "Recorded on " in tab.text


def test_all_recorded_benchmarks_are_on_one_page_and_one_on_the_first():
    page = PAGES[SITE / "benchmarks.html"]
    recorded = {path.name for path in (ROOT / "docs/results").glob("*/*.csv")}
    assert set(csv_files(page)) == {
        path.name
        for machine in RECORD
        for path in machine.folder.glob("*.csv")
        if path.name.partition(".")[0] in LESSONS
    }
    lessons = [
        Path(link["href"]).stem for link in page.select("#what-the-lessons-take a")
    ]
    assert set(LESSONS) <= set(lessons)
    headline = re.search(r'^recorded_headline = ".+", "(.+)"$', CONF, re.MULTILINE)[1]
    pictures = [image["src"] for image in PAGES[SITE / "index.html"].select("figure img")]
    assert bool(pictures) == (f"{headline}.csv" in recorded)


@pytest.mark.skipif(not RECORD, reason="nothing is on record")
def test_the_first_table_of_the_benchmarks_answers_how_fast():
    tables = PAGES[SITE / "benchmarks.html"].select("#results table")
    assert tables
    for table in tables:
        heads = [cell.text for cell in table.select("th")]
        assert heads[:4] == ["operation", "dtype", "size", "share of the limit"]
        for row in table.select("tbody tr"):
            assert re.fullmatch(r"\d+%|–", row.select("td")[3].text)
            assert row.a["href"].startswith("#benchmark-")


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
            article = copy.copy(article)
            made = "h1 ~ .note, p.made, p.course, .sd-card-footer, pre, table, .recorded, .sphx-glr-timing, .formula, math, code"
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
    order = re.search(r"^course = \{.*?^\}", CONF, re.MULTILINE | re.DOTALL)[0]
    named = [name for name in re.findall(r'"(\w+)"', order) if name in LESSONS]
    assert lessons[: len(named)] == named


@pytest.mark.parametrize("name", LESSONS)
def test_solutions_are_folded(name):
    fold = lesson(name).select_one("#exercises details")
    assert fold.summary.text == "Try it first. The answers are in here."
    exercises = lesson(name).select("#exercises > ol > li")
    assert len(fold.select(":scope > ol > li")) == len(exercises) > 0


def test_solutions_in_a_notebook_are_markdown_with_code():
    prose = "\n".join(cell.source for cell in notebook("matrix_dropout").cells)
    answers = prose[prose.index("Try it first.") :]
    assert "```python\ndef column_dropout(x, p, seeds):\n    return" in answers
    assert "```diff\n@@ in matrix_dropout_kernel\n" in answers


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


def test_a_notebook_runs_in_jupyter(tmp_path, monkeypatch):
    """One that takes little: the others run in IPython, which Jupyter calls."""
    # The packages are there; change no version of them.
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    nb = notebook("block_dropout")
    nbclient.NotebookClient(nb, kernel_name="python3", timeout=600).execute(cwd=tmp_path)
    outputs = [
        output for cell in nb.cells if cell.cell_type == "code" for output in cell.outputs
    ]
    assert any(output.output_type == "stream" for output in outputs)


@pytest.mark.parametrize("name", LESSONS)
def test_notebook_runs_alone_in_an_empty_folder(name, tmp_path, monkeypatch):
    """In a process that has the packages imported. That they can be installed is seen above."""
    monkeypatch.setenv("MPLBACKEND", "agg")
    install, *cells = [
        cell.source for cell in notebook(name).cells if cell.cell_type == "code"
    ]
    assert install == notebook("block_dropout").cells[0].source
    (tmp_path / "empty").mkdir()
    process = forked.start(tmp_path / "log", run_cells, cells, str(tmp_path / "empty"))
    process.join(600)
    output = (tmp_path / "log").read_text()
    assert process.exitcode == 0, output
    assert output


def test_the_glossary_is_linked_at_the_first_use_of_a_word():
    links = lesson("seeded_dropout").select("article a.term")
    assert [link["href"] for link in links].count("../glossary.html#term-Philox") == 1
    for link in links:
        entry = PAGES[SITE / "glossary.html"].find(id=link["href"].partition("#")[2])
        words = " ".join(link.text.lower().split())  # a line may break between them
        assert words.rstrip("s") in entry.text.lower()


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("tl.rand", "../reference/random.html"),
        ("tl.load", "https://triton-lang.org/main/python-api/generated/triton.language.load.html"),
        ("torch.empty", "https://docs.pytorch.org/docs/stable/generated/torch.empty.html"),
        ("plt.show", "https://matplotlib.org/stable/api/_as_gen/matplotlib.pyplot.show.html"),
    ],
)  # fmt: skip
def test_names_in_code_lead_to_their_documentation(name, target):
    pages = [lesson(other) for other in ("seeded_dropout", "block_dropout")]
    links = [a for page in pages for a in page.select("pre a") if a.text == name]
    assert links and {a["href"].partition("#")[0] for a in links} == {target}


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


@pytest.mark.parametrize("name", LESSONS)
def test_see_also_names_one_or_two_lessons_that_are_not_beside(name):
    page = lesson(name)
    beside = [link["href"] for link in page.select(".prev-next-footer a")]
    related = [link["href"] for link in page.select(".seealso li a")]
    assert len(related) <= 2 and not {*related} & {*beside}
    assert {Path(link).stem for link in related} <= {*LESSONS} - {name}


@pytest.mark.parametrize("name", LESSONS)
def test_a_notebook_names_lessons_by_their_titles_and_folds_the_answers(name):
    cells = notebook(name).cells
    prose = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    labels = re.findall(r"^\.\. _(.+):$", "\n".join(SOURCES.values()), re.MULTILINE)
    raw = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose)
    assert not set(raw) & set(labels)
    for label in re.findall(r":ref:`([^`<>]+)`", SOURCES[name]):
        if label in labels:
            assert TITLES[label] in prose
    assert (
        prose.count("<details><summary>Try it first.") == prose.count("</details>") == 1
    )
    assert ">Note<" not in prose.partition("<details>")[2].partition("</details>")[0]


SOURCES = {name: (ROOT / f"tutorials/{name}.py").read_text() for name in LESSONS}
TITLES = {
    label: title
    for text in SOURCES.values()
    for label, title in re.findall(r'^"""\n\.\. _(.+):\n\n(.+)\n=+$', text, re.MULTILINE)
}


@pytest.mark.parametrize("name", LESSONS)
def test_a_notebook_with_outputs_and_a_text_stand_beside_the_page(name):
    run = notebook(f"{name}_with_outputs")
    nbformat.validate(run)
    printed = [
        output["text"] for cell in run.cells if cell.cell_type == "code"
        for output in cell.outputs if output.output_type == "stream"
    ]  # fmt: skip
    shown = [block.text for block in lesson(name).select(".sphx-glr-script-out pre")]
    assert [text.split() for text in printed] == [text.split() for text in shown]
    text = (SITE / f"tutorials/{name}.md").read_text()
    assert text.startswith(f"# {lesson(name).h1.text.rstrip('#')}\n")
    assert "```python\n" in text and all(p.rstrip() in text for p in printed)
    assert "data:image" not in text
    (link,) = lesson(name).select("link[type='text/markdown']")
    assert link["href"] == f"{name}.md"


def test_the_texts_are_listed():
    listed = re.findall(
        r"^- \[.+\]\((\S+)\): \w", (SITE / "llms.txt").read_text(), re.MULTILINE
    )
    assert sorted(Path(link).stem for link in listed) == LESSONS


def test_each_page_has_a_title_of_its_own_and_a_description():
    titles = []
    for path, page in PAGES.items():
        if "_static" in path.parts:
            continue
        titles.append(page.title.text)
        assert not re.search(r"(.{8,}).*\1", page.title.text), page.title.text
        if path.name not in ("genindex.html", "search.html"):
            (description,) = page.select("meta[name=description]")
            assert 30 <= len(description["content"]) <= 320, f"{path.name}: {description}"
            assert "`" not in description["content"]
    assert len(set(titles)) == len(titles)


@pytest.mark.parametrize("name", LESSONS)
def test_a_picture_is_a_link_to_itself(name):
    for image in lesson(name).select("article img"):
        assert image.find_parent("a")["href"] == image["src"]
