"""The playground in a real browser, against a real server (``make test-browser``).

Needs Chromium, its driver and selenium.

With ``SCREENSHOTS=FOLDER`` in the environment, what the page looks like at each step is kept there.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.running import RunningServer
from tests.waiting import wait_until

pytestmark = pytest.mark.browser

# Keys as WebDriver numbers them (W3C WebDriver, section "Keyboard actions").
TAB, ENTER, CONTROL, ALT, ESCAPE = "\ue004", "\ue007", "\ue009", "\ue00a", "\ue00c"
ARROW_UP, ARROW_RIGHT, ARROW_DOWN = "\ue013", "\ue014", "\ue015"
FLAGS = (
    *(
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-component-update",
    ),
    *("--disable-background-networking", "--disable-sync", "--disable-dev-shm-usage"),
)


@dataclass(frozen=True)
class Screen:
    width: int
    height: int
    dark: bool = False
    mobile: bool = False


DESKTOP = Screen(1280, 900)
PHONE = Screen(390, 844, dark=True, mobile=True)


class Page:
    """The playground as a person uses it."""

    def __init__(self, driver: Any, url: str) -> None:
        self.driver = driver
        driver.get(url)
        wait_until(lambda: self.text_of("status") == "ready")

    def find(self, name: str) -> Any:
        return self.driver.find_element("id", name)

    def text_of(self, name: str) -> str:
        return str(self.find(name).text)

    @property
    def text(self) -> str:
        """What is written, as the page sends it."""
        return str(self.driver.execute_script("return plainText()"))

    @property
    def tokens(self) -> list[Any]:
        return list(self.driver.find_elements("class name", "token"))

    def set(self, name: str, value: str) -> None:
        field = self.driver.find_element("name", name)
        field.clear()
        field.send_keys(value)

    def finish(self) -> None:
        """Wait until nothing is being written."""
        wait_until(lambda: self.find("go").is_enabled())

    def type(self, *keys: str) -> None:
        """Into what has the focus."""
        from selenium.webdriver import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()

    def save(self, name: str = "") -> None:
        """Save the state of what is written."""
        self.find("name").send_keys(name, ENTER)
        wait_until(lambda: self.text_of("note").startswith("Saved"))

    def node(self, label: str) -> Any:
        """The button that goes on from a saved state."""
        return self.driver.find_element("xpath", f"//ul[@id='tree']//button[.='{label}']")

    def press(self, label: str) -> None:
        """A button by what it says to those who cannot see it."""
        self.driver.find_element("css selector", f"button[aria-label='{label}']").click()

    def outline(self) -> list[Any]:
        """The tree: of every node its name, or its text, and its children."""
        script = (
            "const of = (list) => [...list.children].map((item) => [item.querySelector('.go').textContent, "
            "of(item.querySelector(':scope > ul') ?? document.createElement('ul'))]);"
            "return of(document.getElementById('tree'))"
        )
        return list(self.driver.execute_script(script))

    def keep(self, name: str) -> None:
        if folder := os.environ.get("SCREENSHOTS"):
            self.driver.save_screenshot(str(Path(folder) / f"{name}.png"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with RunningServer(tmp_path_factory.mktemp("server"), "--api-key", "sesame") as running:
        yield running


@pytest.fixture
def page(server: RunningServer) -> Iterator[Page]:
    with opened(server.base_url, DESKTOP) as page:
        yield page


@pytest.fixture
def phone(server: RunningServer) -> Iterator[Page]:
    with opened(server.base_url, PHONE) as page:
        yield page


@contextmanager
def opened(url: str, screen: Screen) -> Iterator[Page]:
    """The page of a server that wants a key, with the key."""
    with browsing(url, screen) as page:
        # It finds out by itself that a key is needed.
        wait_until(lambda: page.find("keyrow").is_displayed())
        page.find("key").send_keys("sesame", TAB)
        wait_until(lambda: page.text_of("model") == "classics-11m")
        wait_until(lambda: page.find("states").is_displayed())
        yield page


@contextmanager
def browsing(url: str, screen: Screen) -> Iterator[Page]:
    from selenium import webdriver  # here, since it is there for these tests alone

    with tempfile.TemporaryDirectory() as profile:
        options = webdriver.ChromeOptions()
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService("/usr/bin/chromedriver"))
        try:
            show_on(driver, screen)
            yield Page(driver, url)
            severe = [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
            assert all("responded with a status of 4" in entry["message"] for entry in severe), severe
        finally:
            driver.quit()


def show_on(driver: Any, screen: Screen) -> None:
    """Have the page believe that it is shown on this screen. Windows alone cannot be as narrow as a phone."""
    size = {"width": screen.width, "height": screen.height, "deviceScaleFactor": 1, "mobile": screen.mobile}
    scheme = {"name": "prefers-color-scheme", "value": "dark" if screen.dark else "light"}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})


@pytest.fixture
def states(server: RunningServer) -> Iterator[httpx.Client]:
    """A client for the server's states; those that a test leaves are deleted."""
    with httpx.Client(base_url=f"{server.base_url}/v1/", headers={"Authorization": "Bearer sesame"}) as client:
        yield client
        for state in client.get("states").json()["data"]:
            client.delete(f"states/{state['id']}")


def write(page: Page, text: str, tokens: int) -> str:
    """Write a beginning and let the model continue it greedily; the whole text."""
    page.set("max_tokens", str(tokens))
    page.set("temperature", "0")
    page.find("text").send_keys(text)
    page.find("text").send_keys(CONTROL, ENTER)
    page.finish()
    return page.text


def test_writing_branching_and_taking_back(page: Page, server: RunningServer) -> None:
    page.keep("1-empty")
    written = write(page, "The old man looked at the sea and", 24)
    assert written.startswith("The old man looked at the sea and") and len(page.tokens) > 10
    assert page.text_of("tokens").endswith("+ 24")
    assert page.text_of("ttft").endswith("ms") and page.text_of("rate").endswith("tokens/s")
    wait_until(lambda: page.text_of("slots").endswith("of 256"))
    page.keep("2-written")
    # What else was likely, by keyboard; the most likely one is what was taken, since the temperature is 0.
    page.find("text").send_keys(ALT, ARROW_RIGHT)
    wait_until(lambda: page.find("card").is_displayed())
    choices = page.find("card").find_elements("tag name", "button")
    assert len(choices) >= 5 and choices[0].get_attribute("class") == "own"
    assert all(choice.text.endswith("%") for choice in choices)
    page.keep("3-alternatives")
    # Another word, and the text goes on from there.
    other = choices[1].find_element("tag name", "code").text.replace("·", " ")
    choices[1].click()
    page.finish()
    assert page.text.startswith("The old man looked at the sea and" + other)
    assert page.text != written
    page.keep("4-branched")
    page.find("undo").click()
    assert page.text == written
    page.find("undo").click()
    assert page.text == "The old man looked at the sea and"


def test_stop_keeps_what_has_come(page: Page, server: RunningServer) -> None:
    page.set("max_tokens", "5000")
    page.find("text").send_keys("Once upon a time")
    page.find("go").click()
    wait_until(lambda: len(page.tokens) > 3)
    page.find("text").send_keys(ESCAPE)
    page.finish()
    shown = page.text
    assert len(shown) > len("Once upon a time")
    wait_until(lambda: server.metric("gale_requests_running") == 0)
    assert page.text == shown and not page.find("error").is_displayed()


def test_errors_are_shown(page: Page) -> None:
    page.set("top_k", "-7")
    page.find("text").send_keys("It was")
    page.find("go").click()
    wait_until(lambda: page.find("error").is_displayed())
    assert "top_k" in page.text_of("error")


def test_the_key_is_asked_for_only_where_one_is_needed(tmp_path: Path) -> None:
    with RunningServer(tmp_path) as running, browsing(running.base_url, DESKTOP) as page:
        wait_until(lambda: page.find("states").is_displayed())
        assert not page.find("keyrow").is_displayed() and page.text_of("model") == "classics-11m"


def test_what_a_model_writes_is_text(page: Page) -> None:
    page.driver.execute_script('addTokens(null, "<img src=x onerror=alert(1)>")')
    assert page.text == "<img src=x onerror=alert(1)>"


BEGINNING = "The old man looked at the sea and"


def test_a_tree_of_states(page: Page, states: httpx.Client) -> None:
    first = write(page, BEGINNING, 8)
    page.save("sea")
    assert page.outline() == [["sea", []]]
    assert page.node("sea").get_attribute("aria-current") == "true"
    # The text goes on behind the state, and reads nothing of what is in it.
    page.node("sea").click()
    assert page.text_of("past") == first and page.text == ""
    page.find("go").click()
    page.finish()
    whole = {"prompt": BEGINNING, "temperature": 0, "max_tokens": 16}
    assert first + page.text == BEGINNING + states.post("completions", json=whole).json()["choices"][0]["text"]
    read, cached = int(page.text_of("tokens").split(" + ")[0]), int(page.text_of("cached"))
    assert 0 <= read - cached <= 1
    page.find("text").send_keys(CONTROL, "s")
    wait_until(lambda: page.text_of("note").startswith("Saved"))
    [[_, [[label, _]]]] = page.outline()
    assert page.text.strip().startswith(label.strip()[:20])
    # Another way from there, one from this one, and one that has nothing to do with them.
    page.node("sea").click()
    page.find("text").send_keys(" saw a ship")
    page.save("ship")
    page.find("text").send_keys(" with red sails")
    page.save("red")
    page.find("detach").click()
    page.find("text").clear()
    page.find("text").send_keys("Once upon a time")
    page.save("other story")
    assert page.outline() == [["sea", [[label, []], ["ship", [["red", []]]]]], ["other-story", []]]
    page.keep("7-tree")
    # What the page knows outlives it.
    page.driver.refresh()
    wait_until(lambda: len(page.outline()) == 2)
    assert page.outline()[0] == ["sea", [[label, []], ["ship", [["red", []]]]]]
    page.node("red").click()
    assert page.text_of("past") == first + " saw a ship with red sails"
    page.find("undo").click()
    assert page.text == "" and not page.find("base").is_displayed()


def test_states_are_renamed_and_deleted(page: Page, states: httpx.Client) -> None:
    write(page, BEGINNING, 4)
    page.save("a")
    page.find("text").send_keys(" more")
    page.save("b")
    page.press("Rename a")
    page.type("b", ENTER)
    wait_until(lambda: page.text_of("error") == "There is a state named b already.")
    page.press("Rename a")
    page.type("beginning", ENTER)
    wait_until(lambda: page.outline() == [["beginning", [["b", []]]]])
    assert sorted(state["name"] for state in states.get("states").json()["data"]) == ["b", "beginning"]
    page.node("b").click()
    page.press("Delete beginning")
    wait_until(lambda: page.outline() == [["b", []]])
    # Deleting the one that the text goes on from leaves the text.
    page.press("Delete b")
    wait_until(lambda: page.outline() == [])
    assert page.text.startswith(BEGINNING) and page.text.endswith(" more")
    assert not page.find("base").is_displayed()


def test_states_of_other_clients_and_states_that_are_gone(page: Page, states: httpx.Client) -> None:
    states.post("states/prefill", json={"prompt": "Call me Ishmael.", "name": "book"}).raise_for_status()
    page.driver.refresh()
    wait_until(lambda: page.outline() == [["book", []]])
    page.node("book").click()
    assert "not written on this page" in page.text_of("past")
    page.find("text").send_keys(" I went")
    page.save("went")
    assert page.outline() == [["book", [["went", []]]]]
    page.find("text").clear()
    page.find("detach").click()
    page.find("text").send_keys(BEGINNING)
    page.save("sea")
    states.delete("states/sea")
    page.driver.refresh()
    wait_until(lambda: page.outline() == [["book", [["went", []]]], ["sea", []]])
    assert "gone" in page.driver.find_element("class name", "gone").text
    page.node("sea").click()
    assert page.text == BEGINNING and not page.find("base").is_displayed()
    page.keep("8-gone")


def test_everything_is_within_reach_of_the_keyboard(page: Page, states: httpx.Client) -> None:
    write(page, BEGINNING, 4)
    for name in ("a", "b"):
        page.find("text").send_keys(f" {name}")
        page.save(name)
    page.driver.execute_script("arguments[0].focus()", page.node("a"))
    page.node("a").send_keys(ARROW_DOWN)
    assert page.driver.switch_to.active_element.text == "b"
    page.type(ARROW_UP)
    page.type(ENTER)
    assert page.text_of("basename") == "a"
    reached = []
    page.driver.execute_script("arguments[0].focus()", page.find("model"))
    script = (
        "const e = document.activeElement, s = getComputedStyle(e), b = getComputedStyle(e.parentElement);"
        "return e === document.body ? ['', true] : [e.id || e.getAttribute('aria-label') || e.name || e.textContent, "
        "s.outlineStyle !== 'none' || b.boxShadow !== 'none']"
    )
    for _ in range(40):
        name, visible = page.driver.execute_script(script)
        if not name:
            break  # the last one was the last
        assert visible, f"the focus on {name} cannot be seen"
        reached.append(name)
        page.type(TAB)
    wanted = {"model", "detach", "text", "go", "undo", "again", "name", "Go on from a", "Rename a", "Delete b", "key"}
    assert wanted <= set(reached) and {"max_tokens", "stop", "colour"} <= set(reached)


CONTRASTS = """
const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
const over = ([r, g, b, a = 1], under) => [r, g, b].map((value, i) => value * a + under[i] * (1 - a));
const light = (colour) => colour.map((value) => value / 255)
  .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4))
  .reduce((sum, value, i) => sum + value * [0.2126, 0.7152, 0.0722][i], 0);
const behind = (element) => element
  ? over(channels(getComputedStyle(element).backgroundColor), behind(element.parentElement)) : [255, 255, 255];
const found = [];
for (const element of document.querySelectorAll("body *")) {
  const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
  if (!own || !element.checkVisibility() || element.closest(":disabled, script")) continue;
  const back = behind(element);
  const style = getComputedStyle(element);
  let front = over(channels(style.color), back);
  for (let e = element; e; e = e.parentElement) front = over([...front, Number(getComputedStyle(e).opacity)], back);
  const [low, high] = [light(front), light(back)].sort((a, b) => a - b);
  found.push([(high + 0.05) / (low + 0.05), element.textContent.trim().slice(0, 30), style.color]);
}
return found.sort((a, b) => a[0] - b[0]);
"""
"""Contrast ratios by the formula of WCAG 2.2 (relative luminance, section 1.4.3), the lowest first."""


@pytest.mark.parametrize("dark", [False, True])
def test_everything_can_be_read(page: Page, states: httpx.Client, dark: bool) -> None:
    show_on(page.driver, replace(DESKTOP, dark=dark))
    write(page, BEGINNING, 12)
    page.save("sea")
    page.find("text").send_keys(" more")
    page.save()
    page.node("sea").click()
    page.find("go").click()
    page.finish()
    page.find("name").send_keys("sea", ENTER)
    wait_until(lambda: page.find("error").is_displayed())
    page.find("text").send_keys(ALT, ARROW_RIGHT)
    wait_until(lambda: page.find("card").is_displayed())
    page.keep(f"9-{'dark' if dark else 'light'}")
    contrasts = page.driver.execute_script(CONTRASTS)
    assert len(contrasts) > 50
    assert contrasts[0][0] >= 4.5, [row for row in contrasts if row[0] < 4.5]


def test_on_a_phone_in_the_dark(phone: Page, states: httpx.Client) -> None:
    write(phone, BEGINNING, 40)
    phone.save("by the sea")
    phone.node("by-the-sea").click()
    phone.find("text").send_keys(" saw nothing at all of what the others had told him about it")
    phone.save()
    assert len(phone.outline()[0][1]) == 1
    width = phone.driver.execute_script("return document.documentElement.scrollWidth")
    assert width <= phone.driver.execute_script("return window.innerWidth") == 390, "nothing sticks out"
    small = phone.driver.execute_script(
        "return [...document.querySelectorAll('button')].filter((e) => e.checkVisibility() && e.offsetHeight < 44)"
        ".map((e) => e.textContent)"
    )
    assert small == [], "fingers find every button"
    back = phone.driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert back == "rgb(22, 24, 27)"
    phone.keep("5-phone")
    phone.find("undo").click()
    next(token for token in phone.tokens if token.text.strip()).click()
    wait_until(lambda: phone.find("card").is_displayed())
    phone.keep("6-phone-alternatives")
