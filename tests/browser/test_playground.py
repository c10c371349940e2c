"""The playground in a real browser, against a real server (``make test-browser``).

Needs Chromium, its driver and selenium.

With ``SCREENSHOTS=FOLDER`` in the environment, what the page looks like at each step is kept there.
"""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.running import RunningServer, wait_until

pytestmark = pytest.mark.browser

# Keys as WebDriver numbers them (W3C WebDriver, section "Keyboard actions").
TAB, ENTER, CONTROL, ALT, ESCAPE, ARROW_RIGHT = "\ue004", "\ue007", "\ue009", "\ue00a", "\ue00c", "\ue014"
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

    def keep(self, name: str) -> None:
        if folder := os.environ.get("SCREENSHOTS"):
            self.driver.save_screenshot(str(Path(folder) / f"{name}.png"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with RunningServer(tmp_path_factory.mktemp("server"), "--api-key", "sesame") as running:
        yield running


@pytest.fixture
def page(server: RunningServer) -> Iterator[Page]:
    yield from _open(server.base_url)


@pytest.fixture
def phone(server: RunningServer) -> Iterator[Page]:
    yield from _open(server.base_url, "--window-size=390,844", dark=True)


def _open(url: str, size: str = "--window-size=1280,900", *, dark: bool = False) -> Iterator[Page]:
    from selenium import webdriver  # here, since it is there for these tests alone

    with tempfile.TemporaryDirectory() as profile:
        options = webdriver.ChromeOptions()
        for flag in (*FLAGS, size, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        if dark:
            options.add_argument("--force-dark-mode")
            options.add_argument("--blink-settings=preferredColorScheme=0")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService("/usr/bin/chromedriver"))
        try:
            opened = Page(driver, url)
            # The page finds out by itself that a key is needed.
            wait_until(lambda: opened.find("keyrow").is_displayed())
            opened.find("key").send_keys("sesame", TAB)
            wait_until(lambda: opened.text_of("model") == "classics-11m")
            yield opened
            severe = [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
            assert all("responded with a status of 4" in entry["message"] for entry in severe), severe
        finally:
            driver.quit()


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


def test_what_a_model_writes_is_text(page: Page) -> None:
    page.driver.execute_script('addTokens(null, "<img src=x onerror=alert(1)>")')
    assert page.text == "<img src=x onerror=alert(1)>"


def test_on_a_phone_in_the_dark(phone: Page) -> None:
    write(phone, "The old man looked at the sea and", 40)
    width = phone.driver.execute_script("return document.documentElement.scrollWidth")
    assert width <= phone.driver.execute_script("return window.innerWidth"), "nothing sticks out"
    back = phone.driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert back == "rgb(22, 24, 27)"
    phone.keep("5-phone")
    phone.tokens[2].click()
    wait_until(lambda: phone.find("card").is_displayed())
    phone.keep("6-phone-alternatives")
