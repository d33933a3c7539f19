"""A headless Chromium, for what pages and notebooks look like. The recorder of the documentation's pictures has it too.

Imports selenium when a browser is opened: nothing else needs it.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any

CHROMIUM, DRIVER = "/usr/bin/chromium", "/usr/bin/chromedriver"
"""Debian's. Named, so that selenium does not look for others, and downloads nothing."""
_OPTIONS = (
    "--headless", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--force-color-profile=srgb",
    "--hide-scrollbars",
)  # fmt: skip
_PAGE_S = 60
"""Seconds that a page has to load. Chosen, not measured: on two busy cores the first one takes a few."""


def why_not() -> str | None:
    """Return why there is no browser here, in words for a skipped test; None: there is one."""
    missing = [path for path in (CHROMIUM, DRIVER) if shutil.which(path) is None]
    if missing:
        return f"needs {' and '.join(missing)}: apt-get install chromium chromium-driver fonts-dejavu-core"
    if importlib.util.find_spec("selenium") is None:
        return "needs selenium: pip install 'skyward[test]'"
    return None


class Browser:
    """A browser with a profile of its own in `folder`, which has to be empty. Close it.

    `width` and `height` are those of what it shows of a page, in pixels.
    """

    def __init__(self, folder: Path, *, width: int = 1280, height: int = 900) -> None:
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for option in (*_OPTIONS, f"--user-data-dir={folder}", f"--window-size={width},{height}"):
            options.add_argument(option)
        if os.geteuid() == 0:
            options.add_argument("--no-sandbox")  # it has none for root
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self._driver: Any = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
        self._driver.set_page_load_timeout(_PAGE_S)
        shown = self.run("return [innerWidth, innerHeight]")
        self._driver.set_window_size(2 * width - shown[0], 2 * height - shown[1])  # with what is around the page

    def open(self, url: str) -> None:
        self._driver.get(url)

    def run(self, script: str, *arguments: Any) -> Any:
        """Return what the body of a JavaScript function returns, called with `arguments` in the page."""
        return self._driver.execute_script(script, *arguments)

    @property
    def text(self) -> str:
        """What the page shows as text; Bokeh's plots are canvases, and have none."""
        text: str = self._driver.find_element("css selector", "body").text
        return text

    def links(self) -> dict[str, str]:
        """Return where the page's links lead to, by their texts."""
        links = self._driver.find_elements("css selector", "a[href]")
        return {link.text: link.get_attribute("href") for link in links}

    def complaints(self) -> list[str]:
        """Return what the console has heard of errors since it was asked last: exceptions, and what did not load."""
        return [entry["message"] for entry in self._driver.get_log("browser") if entry["level"] == "SEVERE"]

    def data(self, column: str) -> list[dict[str, list[Any]]]:
        """Return those of Bokeh's tables of data in the page that have the column, as the browser has them."""
        found: list[dict[str, list[Any]]] = self.run(_DATA, column)
        return found

    def plots(self) -> list[str]:
        """Return the titles of Bokeh's plots that are to be seen in the page."""
        found: list[str] = self.run(_PLOTS)
        return found

    def shown_when_pointing_at(self, plot: str, name: str) -> str:
        """Return what is shown when the mouse comes to the longest bar of this name in a plot of Dask's."""
        from selenium.webdriver.common.actions.action_builder import ActionBuilder

        place = self.run(_BAR, plot, name)
        if place is None:  # not drawn yet
            return ""
        mouse = ActionBuilder(self._driver)
        for off in (3, 0):  # it has to move
            mouse.pointer_action.move_to_location(round(place[0]) + off, round(place[1]))
        mouse.perform()
        text: str = self.run(_TOOLTIPS)
        return text

    def picture(self, path: Path) -> None:
        """Save what the window shows, as PNG."""
        self._driver.save_screenshot(str(path))

    def close(self) -> None:
        self._driver.quit()


# Bokeh's models are there a moment after the page; what it shows of them are views, each in a shadow of its own.
_WALK = """
const models = (Bokeh.documents || []).flatMap((document) => Array.from(document._all_models.values()));
const views = [];
const walk = (view) => { views.push(view); for (const child of view.children ? view.children() : []) walk(child); };
for (const root of Bokeh.index.roots || []) walk(root);
"""
_DATA = f"""{_WALK}
return models
    .filter((model) => model.type === "ColumnDataSource" && arguments[0] in model.data)
    .map((model) => Object.fromEntries(Object.entries(model.data).map(([name, values]) => [name, Array.from(values)])));
"""
_PLOTS = f"""{_WALK}
return views
    .filter((view) => view.model.type === "Figure" && view.model.visible && view.model.title)
    .map((view) => view.model.title.text);
"""
_BAR = _WALK + """
const plot = views.find((view) => view.model.type === "Figure" && view.model.name === arguments[0]);
if (!plot) return null;
const data = plot.model.renderers[0].data_source.data;
const bars = Array.from(data.name.keys()).filter((i) => data.name[i] === arguments[1]);
if (!bars.length) return null;
const bar = bars.reduce((a, b) => (data.duration[a] > data.duration[b] ? a : b));
const box = plot.el.getBoundingClientRect();
return [box.left + plot.frame.x_scale.compute(data.start[bar]), box.top + plot.frame.y_scale.compute(data.y[bar])];
"""
_TOOLTIPS = """
const texts = [];
const walk = (node) => {
    if (node.classList && node.classList.contains("bk-Tooltip")) texts.push((node.shadowRoot || node).textContent);
    for (const child of [...node.children, ...(node.shadowRoot ? node.shadowRoot.children : [])]) walk(child);
};
walk(document.body);
return texts.join(" ");
"""
