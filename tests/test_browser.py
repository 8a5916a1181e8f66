"""The built site in a real browser. It takes Debian's package: sudo apt install chromium"""

import functools
import gzip
import http.server
import itertools
import re
import shutil
import subprocess
import threading
from types import SimpleNamespace

import pytest
from test_site import LESSONS, RECORD, SITE

CHROMIUM = shutil.which("chromium")
if not CHROMIUM:
    pytest.skip("needs a browser: sudo apt install chromium", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api")
axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()

PAGES = sorted(
    str(path.relative_to(SITE))
    for path in SITE.rglob("*.html")
    if "_static" not in path.parts  # the theme's own
)
LESSON_PAGES = [f"tutorials/{name}.html" for name in LESSONS]


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def url():
    handler = functools.partial(Handler, directory=SITE)
    with http.server.ThreadingHTTPServer(("localhost", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://localhost:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        # Root, as which CI may run, can't have the sandbox.
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, url):
    with browser.new_context(base_url=url, permissions=["clipboard-read"]) as context:
        yield context.new_page()


@pytest.fixture(scope="module")
def plain(browser, url):
    """A page of a browser without JavaScript."""
    with browser.new_context(base_url=url, java_script_enabled=False) as context:
        yield context.new_page()


@pytest.fixture(scope="module", params=PAGES)
def visit(request, browser, url):
    """A page, loaded once for all tests that look at it, and what happened meanwhile."""
    faults, requests = [], []
    with browser.new_context(base_url=url, reduced_motion="reduce") as context:
        page = context.new_page()
        page.on("console", lambda message: faults.append((message.type, message.text)))
        page.on("pageerror", lambda error: faults.append(("error", str(error))))
        page.on("request", lambda request: requests.append(request))
        page.goto(request.param)
        yield SimpleNamespace(
            name=request.param, page=page, faults=faults, requests=requests
        )


def on_the_wire(response):
    """Bytes of a response. A web server compresses text, as the one in Python does not."""
    body = response.body()
    text = re.match("text/|.*(javascript|json|svg)", response.headers["content-type"])
    return len(gzip.compress(body) if text else body)


def test_a_page_loads_by_itself_quietly_and_fast(visit, url):
    assert not [text for kind, text in visit.faults if kind == "error"]
    urls = [request.url for request in visit.requests]
    assert not [to for to in urls if not to.startswith((url, "data:", "blob:"))]
    assert not [request.url for request in visit.requests if not request.response().ok]
    assert sum(on_the_wire(request.response()) for request in visit.requests) < 1_000_000
    timing = "performance.getEntriesByType('navigation')[0].loadEventEnd"
    assert (
        visit.page.evaluate(timing) < 5000
    )  # milliseconds; 150 to 600 on an idle machine


def serious_faults(page, **options):
    context = {"exclude": [".highlight pre"]}  # thousands of words in a few colours
    found = axe.run(
        page, context, {"resultTypes": ["violations"], "preload": False, **options}
    )
    return [
        (fault["id"], node["target"], node["failureSummary"])
        for fault in found.response["violations"]
        for node in fault["nodes"]
        if fault["impact"] in ("moderate", "serious", "critical")
    ]


def test_axe_finds_nothing_serious(visit):
    assert not serious_faults(visit.page)
    visit.page.emulate_media(color_scheme="dark")
    visit.page.wait_for_function("document.documentElement.dataset.theme == 'dark'")
    assert not serious_faults(visit.page, runOnly=["color-contrast"])
    visit.page.emulate_media(color_scheme="light")
    visit.page.wait_for_function("document.documentElement.dataset.theme == 'light'")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_code_can_be_told_from_its_background(page, theme):
    page.emulate_media(color_scheme=theme)
    page.goto("tutorials/baseline_dropout.html")
    found = axe.run(page, ".highlight pre", {"runOnly": ["color-contrast"]})
    assert not found.response["violations"]


@pytest.mark.parametrize("width", [360, 1280])
def test_a_page_does_not_scroll_sideways(visit, width):
    visit.page.set_viewport_size({"width": width, "height": 800})
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
    # The theme cuts off what spills over: look for it.
    spilled = """width => [...document.querySelectorAll("article p, article p code")]
        .filter(e => !e.closest("table") && e.getBoundingClientRect().right > width)
        .map(e => e.textContent)"""
    assert visit.page.evaluate(spilled, width) == []


def test_a_page_reads_fully_without_javascript(visit, plain):
    plain.goto(visit.name)
    assert plain.locator("h1").first.is_visible()
    if visit.name != "search.html":
        article = "main article"
        assert plain.inner_text(article).split() == visit.page.inner_text(article).split()


@pytest.mark.parametrize(
    ("words", "target"),
    [
        ("philox", "reference/random.html#|glossary.html#"),
        ("softmax", "tutorials/fused_softmax.html"),
        ("fused softmax", "tutorials/fused_softmax.html"),
        ("tl.rand", "reference/random.html#"),
        ("row_softmax", "tutorials/fused_softmax.html#as-a-public-function"),
        ("50257", "tutorials/"),
        ("softmx", "tutorials/fused_softmax.html"),
        ("sedeed dropout", "tutorials/seeded_dropout.html"),
    ],
)
def test_search_leads_where_a_reader_wants(page, words, target):
    page.goto(f"search.html?q={words}")
    page.wait_for_selector("ul.search li a")
    page.wait_for_timeout(300)  # results come one by one
    first = page.locator("ul.search li a").first
    assert re.search(target, first.get_attribute("href").partition("?")[0] + "#")
    first.click()
    assert page.locator("main article h1").first.is_visible()


def test_a_search_says_which_word_it_took_for_one_that_no_page_has(page):
    page.goto("search.html?q=softmx")
    said = page.get_by_text("No page has “softmx”. These are the results for “softmax”.")
    said.wait_for()
    page.goto("search.html?q=softmax")
    page.wait_for_selector("ul.search li a")
    assert not page.get_by_text("No page has").count()


@pytest.mark.skipif(not RECORD, reason="nothing is on record")
def test_search_finds_a_benchmark_by_its_words(page):
    names = [b for m in RECORD for b in m.benchmarks.values() if b.lesson in LESSONS]
    benchmark = next(b for b in names if b.dtype)
    page.goto(f"search.html?q={benchmark.title} {benchmark.dtype}")
    first = page.locator("ul.search li a").first
    assert first.get_attribute("href").startswith("benchmarks.html")


def test_what_was_found_can_be_read_in_the_dark(page):
    page.emulate_media(color_scheme="dark")
    page.goto("search.html?q=warp")
    page.wait_for_selector("ul.search span.highlighted")
    assert not serious_faults(page, runOnly=["color-contrast"])


def test_the_theme_switch_switches_and_stays(page):
    page.goto("index.html")
    for theme in ("dark", "light"):
        page.locator(".theme-switch-button:visible").click()
        page.locator(f".theme-change-button[data-mode={theme}]:visible").click()
        for name in ("index.html", "install.html"):
            page.goto(name)
            assert page.get_attribute("html", "data-theme") == theme


def test_the_copy_button_copies(page):
    page.goto("install.html")
    block = page.locator("div.highlight", has_text="make serve").first
    block.hover()
    block.locator("button.copybtn").click()
    assert page.evaluate("navigator.clipboard.readText()") == "make html\nmake serve"


def test_tabs_show_what_they_name(visit):
    for tab in visit.page.locator(".sd-tab-set > label").all():
        # Where a GPU has drawn the figures of a page, those on record are folded.
        tab.evaluate(
            "tab => { for (let d; d = tab.closest('details:not([open])'); ) d.open = true }"
        )
        tab.click()
        assert tab.locator("xpath=following-sibling::div[1]").is_visible()


@pytest.mark.parametrize("visit", LESSON_PAGES, indirect=True)
def test_downloads_arrive(visit):
    page = visit.page
    links = page.locator("article a.download, article a[href$='.csv']").all()
    assert links
    for link in links:
        answer = page.request.get(link.evaluate("link => link.href"))
        assert answer.ok and answer.body()


def test_the_whole_site_is_small():
    assert sum(path.stat().st_size for path in SITE.rglob("*.*")) < 15e6


PDFTOTEXT = shutil.which("pdftotext")


@pytest.mark.skipif(
    not PDFTOTEXT, reason="needs pdftotext: sudo apt install poppler-utils"
)
def test_paper_holds_the_whole_page(visit, tmp_path):
    if visit.name in ("search.html", "genindex.html"):
        pytest.skip("nobody prints it")
    visit.page.pdf(path=tmp_path / "page.pdf", format="A4")
    printed = subprocess.check_output([PDFTOTEXT, tmp_path / "page.pdf", "-"], text=True)
    article = visit.page.locator("main article")
    lost = [word for word in article.inner_text().split()[-10:] if word not in printed]
    assert not lost
    for answers in article.locator("details ol").all():  # they are unfolded
        text = "e => { e.querySelectorAll('button').forEach(b => b.remove()); return e.textContent }"
        last = answers.evaluate(text).split()[-1]
        assert last in printed


def test_paper_shows_each_tab_below_its_name(page):
    page.goto("install.html")
    page.evaluate(
        """document.querySelector("main article").innerHTML += `<div class="sd-tab-set">
        <input type="radio" name="n" id="a" checked><label for="a">A</label>
        <div class="sd-tab-content">one</div>
        <input type="radio" name="n" id="b"><label for="b">B</label>
        <div class="sd-tab-content">two</div></div>`"""
    )
    page.emulate_media(media="print")
    tabs = page.locator(".sd-tab-set").last
    assert tabs.inner_text().split() == ["A", "one", "B", "two"]
    shown = tabs.locator("label, .sd-tab-content").all()
    heights = [part.bounding_box()["y"] for part in shown]
    assert heights == sorted(set(heights))


@pytest.mark.parametrize("visit", LESSON_PAGES, indirect=True)
def test_outputs_are_shown_whole(visit):
    cut = """[...document.querySelectorAll(".sphx-glr-script-out pre")]
        .filter(e => e.scrollHeight > e.clientHeight + 1).map(e => e.textContent)"""
    assert visit.page.evaluate(cut) == []


def test_prose_is_narrow_and_code_is_not(page):
    page.set_viewport_size({"width": 1440, "height": 900})
    page.goto("tutorials/fused_softmax.html")
    characters = """() => {
        const lengths = [];
        for (const p of document.querySelectorAll("article section > p:not([class])")) {
            const range = document.createRange();
            range.selectNodeContents(p);
            const lines = new Set([...range.getClientRects()].map(r => Math.round(r.bottom / 20)));
            if (p.textContent.length > 300) lengths.push(p.textContent.length / lines.size);
        }
        return lengths;
    }"""
    lengths = page.evaluate(characters)
    assert lengths and max(lengths) < 90
    assert sum(lengths) / len(lengths) < 80


def test_a_formula_scrolls_from_the_keyboard(page):
    page.goto("tutorials/softmax_tiles.html")
    for formula in page.locator(".formula").all():
        assert formula.get_attribute("tabindex") == "0"


def test_maths_has_its_font_and_pages_without_maths_do_not_load_it(page):
    font = """[...document.fonts].filter(f => f.family.includes("STIX Two Math"))
        .map(f => f.status)"""
    for name, status in ("tutorials/softmax_tiles", "loaded"), ("install", "unloaded"):
        page.goto(f"{name}.html")
        page.evaluate("document.fonts.ready.then(() => 0)")
        has_maths = page.locator("math").count() > 0
        assert page.evaluate(font) == [status] and has_maths == (status == "loaded")


def test_a_citation_leads_to_the_reference(page):
    page.goto("tutorials/very_sparse_projection.html")
    link = page.get_by_role("link", name="Li, Hastie and Church")
    link.first.click()
    entry = page.locator(":target")
    assert "Very sparse random projections" in entry.inner_text()


def test_the_header_is_one_line(page):
    for width in (1024, 1280):
        page.set_viewport_size({"width": width, "height": 800})
        page.goto("index.html")
        assert page.locator("header.bd-header").bounding_box()["height"] < 90
        links = page.locator(".bd-header .navbar-nav > li:visible").all()
        assert len({link.bounding_box()["y"] for link in links}) == 1


def test_a_dark_system_without_javascript_shows_a_light_page(browser, url):
    with browser.new_context(
        base_url=url, java_script_enabled=False, color_scheme="dark"
    ) as context:
        plain = context.new_page()
        plain.goto("tutorials/softmax_tiles.html")
        colours = "e => [getComputedStyle(e).colorScheme, getComputedStyle(e).color]"
        scheme, colour = plain.locator("html").evaluate(colours)
        assert "dark" not in scheme
        assert max(map(int, re.findall(r"\d+", colour)[:3])) < 100  # dark text


def test_the_first_screen_says_what_this_is_and_where_to_begin(page):
    page.set_viewport_size({"width": 1280, "height": 800})
    page.goto("index.html")
    (begin, look) = page.locator("article .sd-btn").all()
    assert begin.get_attribute("href").startswith("tutorials/fused_softmax.html")
    assert look.get_attribute("href") == "benchmarks.html"
    assert begin.bounding_box()["y"] == look.bounding_box()["y"] < 600
    figure = page.locator("article figure img")
    if figure.count():
        assert figure.first.bounding_box()["y"] < 600


@pytest.mark.parametrize("visit", LESSON_PAGES, indirect=True)
def test_a_screen_reader_meets_headings_in_order(visit):
    page = visit.page
    levels = page.locator("article :is(h1, h2, h3, h4)").evaluate_all(
        "found => found.map(e => Number(e.tagName[1]))"
    )
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    for image in page.locator("article img").all():
        assert len(image.get_attribute("alt")) > 20
