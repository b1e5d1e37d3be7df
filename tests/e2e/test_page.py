"""The page in a real browser: it answers, colours what was drafted, and needs nothing from elsewhere."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_serve import Served

import draftwing

BROWSER = Path("/usr/bin/chromium")
playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
pytestmark = pytest.mark.skipif(not BROWSER.exists(), reason=f"no browser at {BROWSER}")


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    served = Served(draftwing.load("tiny", draft="tiny", dtype="float32"))
    yield served
    served.close()


@pytest.fixture
def page() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=str(BROWSER), args=["--no-sandbox"])
        yield browser.new_page(viewport={"width": 1000, "height": 800}, color_scheme="light")
        browser.close()


def test_a_chat_by_keyboard(served: Served, page: Any, tmp_path: Path) -> None:
    """DRAFTWING_SCREENSHOT=docs/page.png keeps what it looks like."""
    urls, problems = list[str](), list[str]()
    page.on("request", lambda request: urls.append(request.url))
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(served.url)
    playwright.expect(page.locator("#about")).to_have_text("tiny, 512 tokens of context")
    page.locator("summary").click()
    page.locator("#seed").fill("4")
    page.locator("#max_tokens").fill("96")
    page.locator("summary").click()
    page.locator("#prompt").fill("Write the Python function clamp.")
    page.locator("#prompt").press("Enter")
    playwright.expect(page.locator("#status")).to_have_text("done", timeout=60_000)
    footer = page.locator("article.answer footer")
    playwright.expect(footer).to_contain_text("tokens per cycle")
    playwright.expect(footer).to_contain_text("seed 4")
    assert page.locator(".answer .drafted").count() > 0
    assert page.locator(".answer .own").count() > 0
    page.evaluate("() => window.scrollTo(0, 0)")
    page.screenshot(path=os.environ.get("DRAFTWING_SCREENSHOT", str(tmp_path / "page.png")))
    assert all(url.startswith(served.url) for url in urls)
    assert problems == []


def test_beside_plain_decoding(served: Served, page: Any) -> None:
    """The same text twice, of which one side has no drafted token, and how much faster the other one was."""
    page.goto(served.url)
    page.locator("#compare").check()
    page.locator("summary").click()
    page.locator("#max_tokens").fill("48")
    page.locator("#prompt").fill("Write the Python function clamp.")
    page.locator("#prompt").press("Enter")
    playwright.expect(page.locator("#status")).to_have_text("done", timeout=60_000)
    drafted, plain = page.locator(".answer .sides > div").all()
    assert drafted.locator("pre").text_content() == plain.locator("pre").text_content() != ""
    assert drafted.locator(".drafted").count() > 0
    assert plain.locator(".drafted").count() == 0
    playwright.expect(plain.locator("footer")).to_contain_text("tokens per cycle 1.00")
    verdict = re.compile(r"^the same text, \d+\.\d\d times as fast with drafts$")
    playwright.expect(page.locator(".answer .verdict")).to_have_text(verdict)


def test_plain_decoding_that_was_none_is_no_comparison(served: Served, page: Any) -> None:
    """Where requests beside it were drafted for."""
    page.goto(served.url)
    usage = """{"completion_tokens_details": {"accepted_prediction_tokens": 1, "rejected_prediction_tokens": 2}}"""
    page.evaluate(f"answer = async () => ({{ usage: {usage}, rate: 1, seed: 4 }})")
    verdict = page.evaluate("compare(at('chat'), { rate: 2, seed: 4 }, '', {})")
    assert verdict.startswith("no comparison")


def test_what_is_said_is_no_markup(served: Served, page: Any) -> None:
    page.goto(served.url)
    page.locator("#prompt").fill("<img src=x onerror=alert(1)><b>bold</b>")
    page.locator("#prompt").press("Enter")
    playwright.expect(page.locator("article.user pre")).to_have_text("<img src=x onerror=alert(1)><b>bold</b>")
    assert page.locator("article img, article pre b").count() == 0
    page.keyboard.press("Escape")
    playwright.expect(page.locator("#status")).to_have_text(re.compile("stopped|done"))  # a short answer may be there
    playwright.expect(page.locator("#send")).to_be_enabled()


@pytest.mark.parametrize("width", [320, 1200])
def test_nothing_is_wider_than_the_screen(served: Served, page: Any, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 700})
    page.goto(served.url)
    page.locator("summary").click()
    page.locator("#theme").click()
    assert page.evaluate("() => document.documentElement.dataset.theme") == "dark"
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width


def test_errors_are_shown(served: Served, page: Any) -> None:
    page.goto(served.url)
    page.locator("summary").click()
    page.locator("#max_tokens").fill("9999")
    page.locator("#prompt").fill("Hello")
    page.locator("#prompt").press("Enter")
    playwright.expect(page.locator(".error")).to_contain_text("context has 512 tokens")
