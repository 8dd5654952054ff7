"""The explorable in a browser: what a hand at the mouse and at the keys does with it, on a page as in a notebook."""

import statistics

from playwright.sync_api import Page

WATCH = """slider => {
    window.steps = [];
    slider.addEventListener('keydown', () => {
        const begun = performance.now();
        requestAnimationFrame(() => requestAnimationFrame(() => window.steps.push(performance.now() - begun)));
    });
}"""
MAPS = "() => [...document.querySelectorAll('.eora-explorable canvas')].map(one => one.toDataURL()).join()"


class Explorable:
    """The only one of a page that is open."""

    def __init__(self, page: Page):
        self.page = page
        self.slider = page.get_by_role("slider", name="Rank")
        self.slider.wait_for()
        self.shown("At rank")

    def shown(self, words: str) -> str:
        """Wait for words in the headline. Returns it."""
        headline = self.page.locator(".eora-explorable .headline", has_text=words)
        headline.wait_for()
        return headline.inner_text()

    @property
    def maps(self) -> str:
        """What both maps show."""
        return self.page.evaluate(MAPS)

    @property
    def texts(self) -> list[str]:
        """What SVD, EoRA and the original write."""
        return self.page.locator(".eora-explorable .written").all_inner_texts()

    def written(self) -> None:
        """Wait until all texts are there."""
        self.page.wait_for_function("!document.querySelector('.eora-explorable .written.missing')")

    def drive(self, ranks: list[int]) -> None:
        """Press keys, point at the chart; everything must follow. ranks: its stops."""
        self.slider.focus()
        self.page.keyboard.press("Home")
        headline, maps = self.shown("At rank 0 "), self.maps
        assert "SVD leaves 100 % of this layer's output error, EoRA 100 %" in headline
        self.page.keyboard.press("ArrowRight")
        self.shown(f"At rank {ranks[1]} ")
        assert self.maps != maps and self.slider.get_attribute("aria-valuetext") == f"rank {ranks[1]}"
        self.page.keyboard.press("End")
        self.shown(f"At rank {ranks[-1]} ")
        chart = self.page.locator(".eora-explorable .losses")
        chart.scroll_into_view_if_needed()
        place = chart.bounding_box()
        self.page.mouse.click(place["x"] + place["width"] / 2, place["y"] + place["height"] / 2)
        self.shown(f"At rank {ranks[round((place['width'] / 2 - 42) / (place['width'] - 56) * (len(ranks) - 1))]} ")
        labels = self.page.locator(".eora-explorable canvas, .eora-explorable svg[role='img']")
        assert all(f"rank {self.rank}" in one.get_attribute("aria-label") for one in labels.all())

    @property
    def rank(self) -> str:
        """Where the slider stands."""
        return self.slider.get_attribute("aria-valuetext").removeprefix("rank ")

    def step(self, presses: int = 12) -> str:
        """How long it takes from a key to the screen, in words."""
        self.slider.focus()
        self.page.keyboard.press("Home")
        self.slider.evaluate(WATCH)
        for i in range(presses):
            self.page.keyboard.press("ArrowRight")
            self.page.wait_for_function("count => window.steps.length > count", arg=i)
        took = self.page.evaluate("window.steps")
        return f"a step of the rank to the screen: median {statistics.median(took):.0f} ms, at most {max(took):.0f} ms"
