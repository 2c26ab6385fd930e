"""A picture of a page, such as README's of the leaderboard; needs Chromium.

offrl leaderboard results/onpolicy --format html --out /tmp/page.html
python tools/picture.py /tmp/page.html docs/figures/leaderboard.png
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from selenium import webdriver

WIDTH, HEIGHT = 1300, 1330


def main(page: Path, picture: Path) -> None:
    """Photographs the top of `page` as a desktop shows it.

    Raises:
      SystemExit: there is no Chromium.
    """
    browser, driver = (shutil.which(name) for name in ("chromium", "chromedriver"))
    if not browser or not driver:
        raise SystemExit("no Chromium: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for option in ("--headless=new", "--no-sandbox", "--hide-scrollbars"):
        options.add_argument(option)
    options.add_argument(f"--window-size={WIDTH},{HEIGHT}")
    window = webdriver.Chrome(options, webdriver.ChromeService(driver))
    try:
        size = {"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": 1}
        window.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride", {**size, "mobile": False}
        )
        window.get(page.resolve().as_uri())
        window.save_screenshot(str(picture))
    finally:
        window.quit()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
