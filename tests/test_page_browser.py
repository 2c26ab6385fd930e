"""The page in a real browser: headless Chromium, driven by Selenium."""

from __future__ import annotations

import base64
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_leaderboard_board import even, fill, make_rows
from test_page import EVIL, LONG, curve_rows

from offrl_jax import page
from offrl_jax.leaderboard import text

selenium = pytest.importorskip("selenium", reason="selenium is not installed")
from selenium import webdriver  # noqa: E402
from selenium.common.exceptions import WebDriverException  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.remote.webelement import WebElement  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))

# The driver listens on a port of this machine; nothing else is reached.
pytestmark = [
    pytest.mark.allow_hosts(["127.0.0.1", "localhost", "::1"]),
    pytest.mark.enable_socket,
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER),
        reason="no Chromium: apt-get install chromium chromium-driver",
    ),
]

OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


@pytest.fixture(scope="module")
def driver() -> Iterator[webdriver.Chrome]:
    """A browser for all tests of this file: it takes seconds to start."""
    assert CHROMIUM
    assert DRIVER
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for option in OPTIONS:
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield found
    found.quit()


@pytest.fixture
def browser(driver: webdriver.Chrome) -> Iterator[webdriver.Chrome]:
    """The browser, of desktop size; the test fails if a page complained."""
    resize(driver, 1300, 900)
    yield driver
    assert [entry["message"] for entry in driver.get_log("browser")] == []
    driver.get("about:blank")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three agents on two tasks of one family, one on one of another."""
    rows = curve_rows()
    rows += make_rows("bc", {"other/maze-v0": 12.0}, family="other", run_id="other")
    return fill(tmp_path_factory.mktemp("page") / "r", rows)


@pytest.fixture(scope="module")
def path(folder: Path) -> Path:
    """The page of `folder`."""
    file = folder / "leaderboard.html"
    file.write_text(page.render(folder), encoding="utf-8")
    return file


def resize(driver: webdriver.Chrome, width: int, height: int) -> None:
    # A window of a headless browser is never narrower than 500.
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def one(within: webdriver.Chrome | WebElement, selector: str) -> WebElement:
    return within.find_element(By.CSS_SELECTOR, selector)


def every(within: webdriver.Chrome | WebElement, selector: str) -> list[WebElement]:
    return within.find_elements(By.CSS_SELECTOR, selector)


def shown(within: webdriver.Chrome | WebElement, selector: str) -> list[str]:
    # One script, so that a page that reloads is read before or after, never between.
    driver = within if isinstance(within, webdriver.Chrome) else within.parent
    root = None if driver is within else within
    return driver.execute_script(
        """return [...(arguments[0] ?? document).querySelectorAll(arguments[1])]
        .filter(e => e.checkVisibility({visibilityProperty: true}))
        .map(e => e.innerText.trim())""",
        root,
        selector,
    )


def until(driver: webdriver.Chrome, condition: Callable[[], object]) -> None:
    # A page that reloads takes its elements away; the driver has many words for it.
    WebDriverWait(driver, 60, 0.1, [WebDriverException]).until(lambda _: condition())


def section_of(driver: webdriver.Chrome, family: str) -> WebElement:
    return one(driver, f"section[data-family={family}]")


def test_sorting(browser: webdriver.Chrome, path: Path) -> None:
    browser.get(path.as_uri())
    table = one(section_of(browser, "classic"), ".ranking")

    def names() -> list[str]:
        return shown(table, "tbody th")

    assert names() == ["iql", "td3_bc", "bc"]
    agent, mean = every(table, "thead .sort")[1:4:2]
    agent.click()
    assert names() == ["bc", "iql", "td3_bc"]
    agent.click()
    assert names() == ["td3_bc", "iql", "bc"]
    mean.click()  # the highest first
    assert mean.find_element(By.XPATH, "..").get_attribute("aria-sort") == "descending"
    assert names() == ["iql", "td3_bc", "bc"]
    mean.send_keys(Keys.ENTER)
    assert names() == ["bc", "td3_bc", "iql"]
    assert len(every(table, "[aria-sort]")) == 1
    browser.refresh()  # as it does while a benchmark runs
    table = one(section_of(browser, "classic"), ".ranking")
    assert names() == ["bc", "td3_bc", "iql"]
    browser.execute_script("sessionStorage.clear()")


def test_filters(browser: webdriver.Chrome, path: Path) -> None:
    browser.get(path.as_uri())
    classic, other = (section_of(browser, name) for name in ("classic", "other"))
    agents, tasks = one(browser, "#agent"), one(browser, "#task")
    agents.send_keys("iql, td3")
    assert not other.is_displayed()
    assert shown(classic, ".ranking tbody th") == ["iql", "td3_bc"]
    assert shown(classic, ".tasks thead th .sort") == ["task", "iql", "td3_bc"]
    assert shown(browser, ".overview tbody th") == ["tiny · classic"]
    assert len(shown(classic, ".matrix tbody th")) == 2
    lines = every(classic, ".chart g[data-agent]")
    hidden = [e for e in lines if e.value_of_css_property("display") == "none"]
    assert len(lines) == 3 * len(hidden) > 0
    assert "2 lines of 1 tables" in one(browser, "#filtered").text
    tasks.send_keys("maze")
    assert shown(classic, ".tasks tbody th") == ["classic/point_maze-mixed-v0"]
    tasks.send_keys("nothing of that name")
    agents.clear()
    agents.send_keys("nobody")
    assert one(browser, "#nothing").is_displayed()
    one(browser, "button[type=reset]").click()
    until(browser, other.is_displayed)
    assert len(shown(classic, ".ranking tbody th")) == 3
    one(browser, "#family").send_keys("other")
    assert not classic.is_displayed()
    assert other.is_displayed()
    browser.execute_script("sessionStorage.clear()")


def test_a_cell_opens_curves_and_rows(
    browser: webdriver.Chrome, path: Path, folder: Path
) -> None:
    browser.get(path.as_uri())
    section = next(s for s in page_sections(folder) if s.family == "classic")
    button = one(section_of(browser, "classic"), ".cell[data-cell='1.0']")
    button.send_keys(Keys.ENTER)
    dialog = one(browser, "dialog")
    entry = section.entries[1]
    cell = entry.cells[0]
    assert one(dialog, "h2").text == f"{entry.label} on {cell.task}"
    assert f"{text.estimate(cell.mean)} {text.interval(cell.mean)}" in dialog.text
    lines = [
        [cell.text for cell in every(line, "td")]
        for line in every(dialog, ".runs tbody tr")
    ]
    assert [line[0] for line in lines] == [str(seed) for seed in cell.seeds]
    assert [line[1] for line in lines] == [text.number(v) for v in cell.values]

    # The curves: places of the marks, by the labels of the axis, are the scores.
    ticks = every(dialog, ".grid text[text-anchor=end]")
    heights = [float(str(t.get_attribute("y"))) - 4 for t in ticks]
    values = [float(t.text) for t in ticks]
    slope = (values[-1] - values[0]) / (heights[-1] - heights[0])
    for line, value in zip(every(dialog, ".line"), cell.values, strict=True):
        ends = [float(str(c.get_attribute("cy"))) for c in every(line, "circle")]
        found = [values[0] + (end - heights[0]) * slope for end in ends]
        assert found == pytest.approx([value / 2, value], abs=0.3)
        assert every(line, ".band")

    fold = every(dialog, "details")[3]
    one(fold, "summary").click()
    until(browser, lambda: one(fold, "pre").text)
    record = json.loads(one(fold, "pre").text)
    files = [p.read_text() for p in (folder / "rows").iterdir()]
    known = [json.loads(line) for file in files for line in file.splitlines()]
    assert record in known
    assert record["seed"] == 3
    assert record["agent"] == entry.label

    address = browser.current_url
    assert "#cell/tiny-classic/" in address
    # A click inside of the box does not close it, one on the button does.
    one(dialog, "h2").click()
    one(dialog, ".inside").click()
    assert dialog.is_displayed()
    dialog.send_keys(Keys.ESCAPE)
    assert not dialog.is_displayed()
    assert browser.switch_to.active_element == button
    browser.get("about:blank")
    browser.get(address)
    assert one(browser, "dialog h2").text == f"{entry.label} on {cell.task}"


def page_sections(folder: Path):
    from offrl_jax import leaderboard

    return leaderboard.build(folder).sections


@pytest.mark.parametrize("width", [360, 768, 1300])
def test_nothing_is_wider_than_the_screen(
    width: int, browser: webdriver.Chrome, tmp_path: Path
) -> None:
    rows = make_rows(LONG, even(50.0), run_id="long") + make_rows("a", even(3.0))
    rows += make_rows("b" * 80, {f"{LONG}/t-v0": 4.0, "x/y-v0": 1.0}, family=LONG)
    file = tmp_path / "long.html"
    file.write_text(page.render(fill(tmp_path / "r", rows)), encoding="utf-8")
    resize(browser, width, 800)
    browser.get(file.as_uri())
    wide = "return [document.documentElement.scrollWidth, innerWidth]"
    content, screen = browser.execute_script(wide)
    assert content <= screen == width
    one(browser, ".cell").send_keys(Keys.ENTER)
    content, screen = browser.execute_script(wide)
    assert content <= screen
    box = one(browser, "dialog").rect
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width


def test_names_run_nothing(browser: webdriver.Chrome, tmp_path: Path) -> None:
    rows = make_rows(EVIL, even(50.0), run_id="evil", setting=EVIL, device=EVIL)
    rows += make_rows("a", {EVIL: 3.0}, run_id="task", family=EVIL, commit=EVIL)
    file = tmp_path / "evil.html"
    file.write_text(page.render(fill(tmp_path / "r", rows)), encoding="utf-8")
    browser.get(file.as_uri())
    for button in every(browser, ".cell"):
        if button.text:
            button.send_keys(Keys.ENTER)
            one(browser, "dialog details summary").click()
            one(browser, "dialog").send_keys(Keys.ESCAPE)
    assert browser.execute_script("return window.hacked") is None
    assert EVIL in one(browser, "#main").text
    # A script that came in nevertheless would not run: the policy knows ours alone.
    browser.execute_script(
        "const s = document.createElement('script'); s.textContent = 'hacked = 2';"
        "document.body.append(s)"
    )
    assert browser.execute_script("return window.hacked") is None
    complaints = browser.get_log("browser")
    assert len(complaints) == 1
    assert "Content Security Policy" in complaints[0]["message"]


def luminance(colour: str) -> float:
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [
        p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts
    ]
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(scheme: str, browser: webdriver.Chrome, path: Path) -> None:
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    browser.get(path.as_uri())
    ground = luminance(one(browser, "body").value_of_css_property("background-color"))
    assert (ground < 0.1) == (scheme == "dark")
    checked = 0
    for selector, least in (
        ("body, .subtitle, span.between, caption, a, figcaption, .legend", 4.5),
        (".short", 4.5),
        (".stroke, .interval .point", 3.0),
    ):
        for element in every(browser, selector):
            drawn = element.tag_name == "path"
            name = "stroke" if drawn else "color"
            own = luminance(element.value_of_css_property(name))
            high, low = max(own, ground), min(own, ground)
            assert (high + 0.05) / (low + 0.05) >= least, (
                element.get_attribute("outerHTML"),
                element.value_of_css_property(name),
            )
            checked += 1
    assert checked > 40
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_print(browser: webdriver.Chrome, path: Path) -> None:
    browser.get(path.as_uri())
    content = base64.b64decode(browser.print_page())
    assert content.startswith(b"%PDF")
    assert len(content) > 20_000
    # What is folded on the screen is printed.
    folds = every(browser, "main details")
    assert folds
    assert all(fold.get_attribute("open") for fold in folds)


def test_screen_readers_find_their_way(browser: webdriver.Chrome, path: Path) -> None:
    browser.get(path.as_uri())
    tree = browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    named = [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in tree
        if "role" in node and not node.get("ignored")
    ]
    for role in ("button", "table", "image", "region", "searchbox"):
        names = [name for own, name in named if own == role]
        assert names, role
        assert all(names), role
    roles = [role for role, _ in named]
    assert {"main", "banner", "table", "columnheader", "rowheader"} <= set(roles)
    levels = [int(e.tag_name[1]) for e in every(browser, "h1, h2, h3")]
    assert levels[0] == 1
    assert levels.count(1) == 1


def test_it_follows_a_benchmark(browser: webdriver.Chrome, tmp_path: Path) -> None:
    folder = fill(tmp_path / "r", curve_rows())
    with page.server(folder, 0) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        host, port = serving.server_address[:2]
        browser.get(f"http://{host!s}:{port}/")
        one(browser, "#task").send_keys("maze")
        assert len(shown(browser, ".ranking tbody th")) == 3
        browser.execute_script("document.activeElement.blur()")
        until(browser, lambda: "Follows" in one(browser, "#live").text)
        # The page must have asked once before the change.
        browser.execute_async_script("setTimeout(arguments[0], 500)")
        fill(folder, make_rows("rebrac", even(70.0)))
        until(browser, lambda: "rebrac" in shown(browser, ".ranking tbody th"))
        until(browser, lambda: one(browser, "#task").get_attribute("value") == "maze")
        until(browser, lambda: len(shown(browser, ".tasks tbody th")) == 1)
        serving.shutdown()
    browser.execute_script("sessionStorage.clear()")


def test_the_whole_section_is_there_without_scripts(path: Path, folder: Path) -> None:
    """Tables, charts and words do not wait for the script."""
    content = re.sub(r"<script.*?</script>", "", path.read_text(), flags=re.DOTALL)
    for section in page_sections(folder):
        for entry in section.entries:
            assert f"{text.estimate(entry.iqm)} <span" in content
    assert content.count('class="chart"') == 4
    assert content.count('class="interval') == 4
