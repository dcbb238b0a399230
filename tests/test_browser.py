"""The pages in a real browser: at two widths, light and dark, by mouse and by keyboard, and on paper."""

import itertools
import os
import re
import shutil

import numpy as np
import pytest
from test_attacks import lucky, white
from test_report import evaluation, image
from toys import PROMPTS, SETTINGS, draw, shifted

import fastunlearn
from fastunlearn.evaluation.compare import compare_runs
from fastunlearn.evaluation.config import CompareConfig
from fastunlearn.reports.gallery import Gallery, GalleryRow
from fastunlearn.reports.html import HtmlReport, write_report

pytestmark = pytest.mark.slow
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is of the extra `test`")

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NAMES = ("report", "attack", "combined", "compare", "images")
WIDTHS = (1280, 390)


@pytest.fixture(scope="module")
def chromium():
    if BROWSER is None:
        pytest.skip("there is no Chromium: `apt-get install chromium`")
    with playwright.sync_playwright() as engine:
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = engine.chromium.launch(executable_path=BROWSER, args=options)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """name -> file of each kind of page, with long names, several models and large images."""
    folder = tmp_path_factory.mktemp("pages")
    long = "a-model-with-a-long-name-that-has-no-space-where-a-line-could-break"
    concepts = {
        name: {
            **{
                "forgotten": name == "star",
                "shown": 0.1,
                "shown_ci95": [0.0, 0.2],
                "shown_original": 1.0,
                "shown_original_ci95": [0.9, 1.0],
            },
            **{"n_images": 40, "valid": 0.9, "distance": 0.3, "distance_ci95": [0.2, 0.4]},
        }
        for name in ("star", "ring")
    }
    evaluations = [
        evaluation("ovw", integrity__retention=0.94, concepts=concepts),
        evaluation(long, "esd", integrity__retention=0.71, concepts=concepts),
        evaluation("placebo", "placebo", integrity__retention=0.99, concepts=concepts),
    ]
    models = [one.name for one in evaluations]
    rows = [
        GalleryRow(prompt, [image(n, 64), image(n + 1, 400), image(n + 2, 64), image(n + 3, 64)], ["", "a", "b", "c"])
        for n, prompt in enumerate(("a star", "a small red ring on a wide blue background"))
    ]
    gallery = Gallery("Before and after", "Same noise.", ["original", *models], rows)
    distances = {name: np.random.default_rng(0).random(60) for name in models}
    report = HtmlReport("Did it forget?", "star", evaluations, [gallery], ["A note."], distances=distances)
    write_report(folder / "report.html", report)
    (folder / "evaluated").mkdir()
    beside = evaluation("lucky", concept="white", erasure__concept="white")
    beside.write(folder / "evaluated" / "evaluation.json")
    settings = {"prompts": [f"prompt number {number}" for number in range(8)], "attacks": "seeds", "judge": white}
    settings |= {"noise_shape": (3, 8, 8), "budget": 6, "gold": lucky(1.2), "batch_size": 4}
    models = (lucky(0.0), lucky(0.6), "white")
    fastunlearn.attack(*models, output=folder / "attack", **settings)
    fastunlearn.attack(*models, output=folder / "combined", evaluation=folder / "evaluated", **settings)
    grouped = [(prompt, "near" if index < 6 else "far") for index, prompt in enumerate(PROMPTS)]
    toys = [shifted(4, "mild"), shifted(6, "twin"), shifted(12, "harsh")]
    fastunlearn.evaluate(draw, toys, grouped, output=folder / "toys", seeds_per_prompt=2, **SETTINGS)
    runs = tuple(str(folder / "toys" / name) for name in ("mild", "twin", "harsh"))
    compare_runs(CompareConfig(runs=runs, output=str(folder / "compare")))
    _write_images(folder)
    return {
        "report": folder / "report.html",
        "attack": folder / "attack" / "report.html",
        "combined": folder / "combined" / "report.html",
        "compare": folder / "compare" / "compare.html",
        "images": folder / "images" / "report.html",
    }


def _write_images(folder):
    from PIL import Image

    for side in (0, 1):
        (folder / f"side{side}").mkdir()
        for number in range(4):
            Image.fromarray(image(10 * side + number, 64)).save(folder / f"side{side}" / f"{number}.png")
    config = fastunlearn.EvaluateImagesConfig(
        original_images=str(folder / "side0"),
        unlearned_images=str(folder / "side1"),
        output=str(folder / "images"),
        metric="shapes",
    )
    fastunlearn.evaluate_images(config)


@pytest.fixture
def opened(chromium, pages):
    """``opened(name, width, scheme)`` opens a page; at its end nothing was fetched and nothing complained."""
    contexts, fetched, complaints = [], [], []

    def opener(name, width=1280, scheme="light"):
        context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: fetched.append(request.url))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(pages[name].as_uri())
        return page

    yield opener
    for context in contexts:
        context.close()
    assert [url[:60] for url in fetched if not url.startswith(("file://", "data:"))] == []
    assert len([url for url in fetched if url.startswith("file://")]) == len(contexts)
    assert complaints == []


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_overflows_and_nothing_is_fetched(opened, name, width, scheme):
    page = opened(name, width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    beyond = page.evaluate(
        """[...document.querySelectorAll("main *")].filter(one => {
             const box = one.getBoundingClientRect();
             return box.width && (box.right > innerWidth + 1 || box.left < -1) && !one.closest(".wide, .row");
           }).map(one => one.outerHTML.slice(0, 80))"""
    )
    assert beyond == []
    # Of what is cut off inside its own box only a row of images may be scrolled.
    cut = page.evaluate(
        """[...document.querySelectorAll("main *")].filter(one => one.scrollWidth > one.clientWidth + 1 &&
             one.clientWidth && getComputedStyle(one).overflowX !== "visible" && !one.closest(".wide, .row"))
           .map(one => one.outerHTML.slice(0, 80))"""
    )
    assert cut == []


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_the_contrast_that_people_need(opened, name, scheme):
    """WCAG's 4.5 to 1, of each text against the nearest background that is painted behind it."""
    page = opened(name, 1280, scheme)
    weak = page.evaluate(
        """() => {
          const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v =>
            v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
            .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
          const parts = color => color.match(/[\\d.]+/g).map(Number);
          const behind = one => {
            for (; one; one = one.parentElement) {
              const color = parts(getComputedStyle(one).backgroundColor);
              if (color.length === 3 || color[3] === 1) return color;
            }
          };
          const found = [];
          for (const one of document.querySelectorAll("main *")) {
            const said = [...one.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
            if (!said || !one.getClientRects().length || one.closest("svg")) continue;
            const [a, b] = [light(parts(getComputedStyle(one).color)), light(behind(one))].sort((x, y) => y - x);
            const ratio = (a + 0.05) / (b + 0.05);
            if (ratio < 4.5) found.push([ratio.toFixed(2), one.outerHTML.slice(0, 80)]);
          }
          return found;
        }"""
    )
    assert weak == []


@pytest.mark.parametrize("name", NAMES)
def test_the_order_for_a_screen_reader(opened, name):
    page = opened(name)
    headings = page.eval_on_selector_all("h1, h2, h3", "all => all.map(one => Number(one.tagName[1]))")
    assert headings[0] == 1
    assert headings.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(headings)), headings
    assert page.locator("main").count() == 1
    assert page.eval_on_selector_all("main img", "all => all.filter(one => !one.alt).length") == 0
    assert page.eval_on_selector_all("svg", "all => all.filter(one => !one.getAttribute('aria-label')).length") == 0
    assert page.eval_on_selector_all("thead th", "all => all.filter(one => one.scope !== 'col').length") == 0
    assert page.get_attribute("html", "lang") == "en"


def column(page, table, number):
    """The texts of a column, down the rows."""
    return [cell.inner_text().split("\n")[0] for cell in page.locator(f"{table} tbody tr > :nth-child({number})").all()]


@pytest.mark.parametrize("width", WIDTHS)
def test_a_table_is_sorted_by_its_headings(opened, width):
    page = opened("report", width)
    table = "section:has(h2:text-is('Side by side')) table"
    heading = page.get_by_role("columnheader", name=re.compile("retention R")).first
    names = column(page, table, 1)
    assert "Valid images" in page.locator(table).get_by_role("columnheader").all_text_contents()
    heading.get_by_role("button").click()
    assert heading.get_attribute("aria-sort") == "ascending"
    rising = column(page, table, 1)
    assert [name.split()[0] for name in rising] == [names[1].split()[0], "ovw", "placebo"]
    heading.get_by_role("button").press("Enter")
    assert heading.get_attribute("aria-sort") == "descending"
    assert column(page, table, 1) == rising[::-1]
    page.locator(table).get_by_role("columnheader", name="Model").get_by_role("button").click()
    assert heading.get_attribute("aria-sort") is None
    assert column(page, table, 1) == sorted(names)


def test_the_groups_of_a_comparison_stay_with_it(opened):
    page = opened("compare")
    table = page.locator("section:has(h2:text-is('In numbers')) table")
    before = [text.strip() for text in table.locator("tbody").all_inner_texts()]
    table.get_by_role("columnheader", name=re.compile("^Difference")).get_by_role("button").click()
    after = [text.strip() for text in table.locator("tbody").all_inner_texts()]
    assert sorted(after) == sorted(before)
    shown = [float(re.search(r"[+\u2212][\d.]+", text)[0].replace("\u2212", "-")) for text in after]
    assert shown == sorted(shown)
    assert all("near" in text and "far" in text for text in after)


@pytest.mark.parametrize("name", ["report", "attack"])
@pytest.mark.parametrize("width", WIDTHS)
def test_an_image_is_enlarged_by_click_and_by_keyboard(opened, name, width):
    page = opened(name, width)
    dialog = page.get_by_role("dialog")
    images = page.locator("figure img")
    first, second = images.nth(0), images.nth(1)
    small = first.bounding_box()["width"]
    first.click()
    large = dialog.locator("img")
    assert dialog.is_visible()
    assert large.bounding_box()["width"] > 1.5 * small
    box = dialog.bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width
    assert large.get_attribute("src") == first.get_attribute("src")
    page.keyboard.press("ArrowRight")
    assert large.get_attribute("src") == second.get_attribute("src")
    assert large.get_attribute("alt") == second.get_attribute("alt")
    page.keyboard.press("Escape")
    assert not dialog.is_visible()
    # Who closes it stands where it was left.
    page.wait_for_function(
        "alt => document.activeElement.querySelector('img')?.alt === alt", arg=second.get_attribute("alt")
    )
    page.keyboard.press("Enter")
    assert dialog.is_visible()
    dialog.get_by_role("button", name="close").click()
    assert not dialog.is_visible()


def test_what_has_the_focus_is_seen(opened):
    page = opened("report")
    page.keyboard.press("Tab")
    style = page.evaluate(
        "(({outlineStyle, outlineWidth}) => [outlineStyle, outlineWidth])(getComputedStyle(document.activeElement))"
    )
    assert page.evaluate("document.activeElement.tagName") == "BUTTON"
    assert style == ["solid", "3px"]


@pytest.mark.parametrize("name", NAMES)
def test_it_prints_on_a4(opened, name):
    page = opened(name, scheme="dark")
    pdf = page.pdf(prefer_css_page_size=True)
    sizes = {tuple(round(float(side)) for side in box.split()) for box in re.findall(rb"/MediaBox \[([^\]]*)\]", pdf)}
    assert {size[2:] for size in sizes} == {(595, 842)}
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 703, "height": 1031})  # of A4 without its margins, in CSS pixels
    assert page.evaluate("document.documentElement.scrollWidth") <= 703
    assert page.evaluate("getComputedStyle(document.querySelector('h1')).color") == "rgb(22, 32, 44)"
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not([open])").count() == 0


def test_without_its_script_a_page_is_whole(chromium, pages):
    context = chromium.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(pages["report"].as_uri())
    assert page.get_by_role("heading", name="Side by side").is_visible()
    assert page.locator("figure img").first.is_visible()
    assert page.locator("button").count() == 0
    context.close()
