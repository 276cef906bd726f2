"""The page at /, in a real browser."""

from __future__ import annotations

import shutil

import pytest
from small_server import idle, served

from mlxlm.generation import generate

selenium = pytest.importorskip("selenium", reason="selenium isn't installed: pip install selenium")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.skipif(
        not (shutil.which("chromedriver") and (shutil.which("chromium") or shutil.which("google-chrome"))),
        reason="Chromium and chromedriver aren't installed",
    ),
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome")
    profile = tmp_path_factory.mktemp("profile")
    for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", f"user-data-dir={profile}"):
        options.add_argument(f"--{flag}")
    options.add_argument("--window-size=900,700")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def until(check, seconds=20):
    """What `check` gives once it is true."""
    import time

    end = time.monotonic() + seconds
    while not (value := check()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)
    return value


def find(browser, selector):
    return browser.find_elements("css selector", selector)


def opened(browser, service):
    browser.get(service.url)
    until(lambda: find(browser, "#model")[0].text == "small")


def setting(browser, name, value):
    browser.execute_script("document.getElementById(arguments[0]).value = arguments[1]", name, value)


def texts(browser, role):
    return [one.get_property("textContent") for one in find(browser, f"article.{role} .text")]


def done(browser):
    return find(browser, "#send")[0].is_displayed()


def test_a_conversation(browser, service, small):
    from selenium.webdriver.common.keys import Keys

    model, tokenizer = small
    opened(browser, service)
    setting(browser, "temperature", "0")
    setting(browser, "tokens", "20")
    box = find(browser, "#prompt")[0]
    assert browser.switch_to.active_element == box
    messages = []
    for said in ("hello", "and more"):
        box.send_keys(said, Keys.ENTER)
        messages.append({"role": "user", "content": said})
        wanted = generate(model, tokenizer, tokenizer.encode_chat(messages), max_tokens=20)
        messages.append({"role": "assistant", "content": wanted})
        until(lambda: len(texts(browser, "assistant")) == len(messages) // 2 and done(browser))
        assert texts(browser, "assistant")[-1] == wanted
    assert texts(browser, "user") == ["hello", "and more"]
    find(browser, "#fresh")[0].click()
    assert not find(browser, "article")
    assert [line for line in browser.get_log("browser") if line["level"] == "SEVERE"] == []


def test_stop_ends_the_answer_and_frees_its_row(browser, service):
    from selenium.webdriver.common.keys import Keys

    opened(browser, service)
    setting(browser, "tokens", "3500")
    setting(browser, "temperature", "0")  # an answer of 952 tokens
    before = idle(service).cancelled
    find(browser, "#prompt")[0].send_keys("hello", Keys.ENTER)
    until(lambda: len((texts(browser, "assistant") or [""])[0]) > 5)
    find(browser, "#stop")[0].click()
    until(lambda: done(browser))
    assert find(browser, ".note")[0].text == "Stopped."
    assert idle(service).cancelled == before + 1


def test_markup_is_shown_and_never_run(browser, service):
    from selenium.webdriver.common.keys import Keys

    opened(browser, service)
    setting(browser, "tokens", "3")
    evil = "<img src=x onerror=\"document.title='broken'\"> <script>document.title='broken'</script> & <b>b</b>"
    find(browser, "#prompt")[0].send_keys(evil, Keys.ENTER)
    until(lambda: len(texts(browser, "assistant")) == 1 and done(browser))
    assert texts(browser, "user") == [evil]
    assert find(browser, "main img, main script, main b") == []
    # Answers go the same way, code blocks too.
    shown = "const box = document.createElement('div'); show(box, arguments[0]); return box.innerHTML"
    html = browser.execute_script(shown, "<i>x</i>\n```html\n<script>1</script>\n```\nend")
    assert html == '&lt;i&gt;x&lt;/i&gt;\n<pre tabindex="0">&lt;script&gt;1&lt;/script&gt;</pre>end'
    assert browser.title == "mlxlm"


def test_a_key_is_asked_for_and_used(browser, small):
    from selenium.webdriver.common.keys import Keys

    with served(*small, api_key="a-secret-key") as service:
        browser.get(service.url)
        until(lambda: "API key" in find(browser, "#model")[0].text)
        assert not find(browser, "#send")[0].is_enabled()
        key = find(browser, "#key")[0]
        until(key.is_displayed)
        key.send_keys("a-secret-key", Keys.TAB)
        until(lambda: find(browser, "#model")[0].text == "small")
        assert find(browser, "#send")[0].is_enabled()


def test_everything_has_a_name_and_nothing_comes_from_elsewhere(browser, service):
    opened(browser, service)
    find(browser, "#options")[0].click()
    for control in find(browser, "button, input, textarea"):
        if control.is_displayed():
            assert control.accessible_name, control.get_attribute("outerHTML")
    asked = browser.execute_script("return performance.getEntriesByType('resource').map(one => one.name)")
    assert all(name.startswith(service.url) for name in asked)
    assert find(browser, "html")[0].get_attribute("lang") == "en"
