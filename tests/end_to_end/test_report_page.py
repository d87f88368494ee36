"""The report page in a real browser, from a file and without a network."""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from transect.report import write_report
from transect.results import Row, Table

webdriver = pytest.importorskip("selenium.webdriver")
WebDriverWait = pytest.importorskip("selenium.webdriver.support.wait").WebDriverWait
pytestmark = pytest.mark.browser

LAYERS = 7
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--window-size=1280,1500",
)  # fmt: skip


def rows() -> Iterator[Row]:
    for layer in range(LAYERS):
        turn = 0.1 + 0.02 * layer
        for variant in ("pre_norm/all", "post_norm/all"):
            error = {"low": turn - 0.01, "high": turn + 0.01, "stderr": 0.005}
            yield Row(probe="jump", metric="displacement", value=turn, unit="1", layer=layer, variant=variant, **error)
        for element in ("ffn", "attn", "layer"):
            yield Row(probe="nonlinearity", metric="r2_heldout", value=1 - turn, unit="1", layer=layer, element=element)
        for end in range(layer, LAYERS):
            alike = math.exp(layer - end)
            yield Row(probe="similarity", metric="cka", value=alike, unit="1", layer=layer, layer_to=end)
    yield from edited()
    yield Row(probe="jump", metric="jump_rate", value=None, reason="no layer before the first", unit="%", layer=0)


def edited() -> Iterator[Row]:
    """A row without a layer, edits, small multiples, and a probe that was followed over training."""
    share = {"low": 0.3, "high": 0.5, "stderr": 0.05}
    yield Row(probe="contribution", metric="share_mha", value=0.4, unit="1", variant="MI", **share)
    for j in (1, 2):
        swap = {"layer": 0, "layer_to": j, "variant": "pairs", "edit": f"swap 0,{j}"}
        yield Row(probe="commutativity", metric="loss_change", value=0.3 * j, unit="nats", **swap)
    for part in ("0,1", "0,2", "1,2"):
        yield Row(probe="routing", metric="co_selection", value=0.2, unit="1", layer=1, part=part)
    for step in (1, 2, 3):
        yield Row(probe="routing", metric="entropy", value=0.9 / step, unit="1", layer=1, step=step)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("run")
    Table(rows()).stamped(model="org/decoder", dtype="float32", documents=97).write(folder)
    (folder / "config.json").write_text(json.dumps({"seq_len": 127}))
    return write_report(folder, folder / "page.html")


@pytest.fixture(scope="module")
def browser(written, tmp_path_factory):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    window = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        window.get(written[0].as_uri())
        drawn = "return document.body.dataset.figures"
        WebDriverWait(window, 60).until(lambda page: page.execute_script(drawn) == "done")
        yield window
    finally:
        window.quit()


def column(browser, name: str) -> list[str]:
    script = """
    const heads = [...document.querySelectorAll('#row-table thead th')].map((head) => head.dataset.name);
    const at = heads.indexOf(arguments[0]);
    return [...document.querySelectorAll('#row-table tbody tr')].map((row) => row.cells[at].textContent);
    """
    return browser.execute_script(script, name)


def click(browser, selector: str) -> None:
    browser.execute_script("document.querySelector(arguments[0]).click()", selector)


def test_page_draws_every_figure_and_says_nothing_to_the_console(browser, written):
    assert browser.get_log("browser") == []
    places = browser.execute_script("return document.querySelectorAll('.plot').length")
    drawn = browser.execute_script("return document.querySelectorAll('.plot svg.marks').length")
    assert places == drawn == (len(written) - 1) // 2 == 13
    script = """
    const marks = '.mark-line path, .mark-rect path, .mark-symbol path';
    return [...document.querySelectorAll('.plot')].filter((plot) => !plot.querySelector(marks)).map((plot) => plot.id);
    """
    assert browser.execute_script(script) == []


def test_figures_of_a_followed_probe_show_the_last_step_and_all_of_them(browser):
    script = """
    const points = (id) => document.querySelectorAll(`#${id} .mark-symbol path[aria-roledescription=point]`).length;
    return [points('routing_entropy'), points('routing_training_entropy')];
    """
    assert browser.execute_script(script) == [1, 3]


def test_page_fits_its_window(browser):
    wide, inner = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert wide <= inner


def test_page_asks_for_nothing_else(browser):
    asked = browser.execute_script("return performance.getEntriesByType('resource').map((one) => one.name)")
    assert [name for name in asked if not name.startswith(("data:", "blob:"))] == []


def test_clicking_a_header_sorts_and_absent_values_stay_last(browser):
    for descending in (False, True):
        click(browser, "#row-table th[data-name=value] button")
        cells = column(browser, "value")
        numbers = [float(cell.split(" ")[0].replace("e+", "e")) for cell in cells[:-1]]
        assert numbers == sorted(numbers, reverse=descending) and len(set(numbers)) > 5
        assert cells[-1] == "missing: no layer before the first"


def test_filters_narrow_the_table(browser):
    script = """
    const select = document.querySelector('#row-controls select[aria-label="Filter by metric"]');
    select.value = arguments[0];
    select.dispatchEvent(new Event('change'));
    """
    browser.execute_script(script, "r2_heldout")
    assert set(column(browser, "metric")) == {"r2_heldout"} and len(column(browser, "metric")) == 3 * LAYERS
    browser.execute_script(script, "")
    assert "displacement" in column(browser, "metric")
