"""A real headless Chromium opens /docs of the real service, authorises, sends a job, and sees its answer.

Run as a program in .venv, with what is pinned in browser-requirements.txt. Where there is no Chromium it says so, and
fails only where CI=true.
"""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from selenium import webdriver  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

from tests.service import Service  # noqa: E402
from tests.upstream import Fault, FaultKind, Upstream  # noqa: E402

CHROMIUMS = ("chromium", "chromium-browser", "google-chrome")
DRIVER = "chromedriver"
HOST = "gpt-worker.test"  # no localhost, on which Swagger UI leaves out what it does with other hosts
ANSWER = "Bonjour, says the model."
PATIENCE_S = 30
OWN_SCHEMES = ("data", "blob", "chrome")  # they reach no host
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1400,2000",
    f"--host-resolver-rules=MAP {HOST} 127.0.0.1, MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)


class Browser:
    """Chromium, and what a person does with it."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def find(self, selector: str, text: str = "") -> Any:
        """The first visible element of this selector that has the text; waits for it."""

        def look(_driver: object) -> Any:
            found = self.driver.find_elements(By.CSS_SELECTOR, selector)
            return next((it for it in found if it.is_displayed() and text in it.text), None)

        return WebDriverWait(self.driver, PATIENCE_S).until(look, f"no {selector} {text!r}")

    def click(self, selector: str, text: str = "") -> None:
        element = self.find(selector, text)
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def fill(self, selector: str, text: str) -> None:
        """By the browser's own setter, as typing would be slow and would have brackets completed."""
        self.driver.execute_script(
            "const [it, text] = arguments;"
            "Object.getOwnPropertyDescriptor(Object.getPrototypeOf(it), 'value').set.call(it, text);"
            "it.dispatchEvent(new Event('input', {bubbles: true}));",
            self.find(selector),
            text,
        )

    def requested(self) -> list[str]:
        """Every address that the pages of this session asked for."""
        records: list[dict[str, Any]] = self.driver.get_log("performance")
        messages = [json.loads(record["message"])["message"] for record in records]
        return [
            message["params"]["request"]["url"]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        ]

    def complaints(self) -> list[str]:
        """What the console shows as an error, a breach of the page's own policy among it."""
        records: list[dict[str, Any]] = self.driver.get_log("browser")
        return [record["message"] for record in records if record["level"] == "SEVERE"]


@contextmanager
def open_browser(chromium: str, driver: str) -> Iterator[Browser]:
    with tempfile.TemporaryDirectory() as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = chromium
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
        chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
        try:
            yield Browser(chrome)
        finally:
            chrome.quit()


def try_docs(browser: Browser, service: Service) -> None:
    """Authorise, send a job, and look for its answer."""
    browser.driver.get(f"http://{HOST}:{service.port}/docs")
    browser.click("button.authorize", "Authorize")
    browser.fill(".auth-container input", service.admin)
    browser.click(".auth-container button.authorize", "Authorize")
    browser.click(".auth-container button.btn-done")

    browser.click("#operations-jobs-submit .opblock-summary-control")
    browser.fill(
        "#operations-jobs-submit textarea.body-param__text",
        json.dumps({"data": {"greet": "Translate to French: hello"}}),
    )
    browser.click("#operations-jobs-submit button.execute")

    reply = browser.find("#operations-jobs-submit .live-responses-table", ANSWER).text
    assert "succeeded" in reply, reply


def main() -> int:
    chromium = next(filter(None, map(shutil.which, CHROMIUMS)), None)
    driver = shutil.which(DRIVER)
    if chromium is None or driver is None:
        print(
            "browser: NOT tested, because there is no Chromium with its driver here (Debian: apt install chromium "
            "chromium-driver)"
        )
        return 1 if os.environ.get("CI") == "true" else 0
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        upstream = stack.enter_context(Upstream())
        upstream.add_fault(Fault(kind=FaultKind.ANSWER, content=ANSWER, times=None))
        service = stack.enter_context(Service(folder, upstream=upstream))
        browser = stack.enter_context(open_browser(chromium, driver))
        try_docs(browser, service)
        requested = [url for url in map(urlsplit, browser.requested()) if url.scheme not in OWN_SCHEMES]
        complaints = browser.complaints()
    elsewhere = [url.geturl() for url in requested if url.netloc != f"{HOST}:{service.port}"]
    assert "/jobs" in {url.path for url in requested}, requested
    assert elsewhere == [], elsewhere
    assert complaints == [], complaints
    print(f"browser: the docs page answered a job; {len(requested)} requests, all to the service itself")
    return 0


if __name__ == "__main__":
    sys.exit(main())
