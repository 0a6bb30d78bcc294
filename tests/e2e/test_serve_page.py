"""The web page in headless Chromium, with and without API keys. SCREENSHOTS=FOLDER keeps what it looks like."""
import os

import pytest

from browser import CHROMIUM, Browser
from serving import Server

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no chromium here")
PARIS = "The capital of France is Paris."
KEY = "secret-key-of-team-a"


@pytest.fixture
def browser():
    b = Browser()
    yield b
    b.close()


def keep(browser, name):
    if folder := os.environ.get("SCREENSHOTS"):
        os.makedirs(folder, exist_ok=True)
        browser.screenshot(os.path.join(folder, name + ".png"))


def ask(browser, text):
    browser.type("#text", text)
    browser.press()


def last_answer(browser, text):
    return browser.until(f"""!running && [...document.querySelectorAll('.assistant .body')].at(-1)?.innerText.includes({text!r})""")


def test_chat_without_keys(browser):
    s = Server()
    try:
        browser.open(s.url)
        browser.until("$('model').textContent === 'tandem-tiny'")
        ask(browser, "What is the capital of France?")
        last_answer(browser, PARIS)
        assert browser.run("document.querySelector('.assistant details summary').textContent") == "Thinking"
        assert "running" in browser.until("$('live').textContent.includes('tokens/s') && $('live').textContent")
        keep(browser, "chat")
        browser.run("[...document.querySelectorAll('.assistant .bar button')].find(b => b.textContent === 'regenerate').click()")
        last_answer(browser, PARIS)
        browser.run("[...document.querySelectorAll('.user .bar button')].find(b => b.textContent === 'edit').click()")
        assert browser.run("$('text').value") == "What is the capital of France?" and browser.run("current.turns.length") == 0
        browser.run("$('text').value = ''")
        ask(browser, "What is the capital of France?")
        last_answer(browser, PARIS)
        browser.open(s.url)  # the history stays in the browser
        assert browser.run("chats.length") == 1 and browser.run("chats[0].turns.length") == 2
        assert not browser.run("$('dialog').open")
        # A long answer is stopped, and the server stops with it.
        browser.run("settings = {max_tokens: '1900', temperature: '2', top_p: '1', top_k: '0', think: 'off'}")
        ask(browser, "Go on and on.")
        browser.until("running && $('send').textContent === 'Stop'")
        browser.click("#send")
        browser.until("!running && $('send').textContent === 'Send'")
        assert s.idle()
        browser.phone()
        browser.run("current = chats.at(-1), show()")
        assert browser.run("document.documentElement.scrollWidth <= innerWidth")
        keep(browser, "phone")
        assert not browser.faults
    finally:
        assert s.stop() == 0


def test_markup_in_an_answer_stays_text(browser):
    s = Server()
    try:
        browser.open(s.url)
        browser.run("""current = {turns: [{role: 'user', content: '<img src=x onerror=alert(1)>'},
            {role: 'assistant', content: '# T\\n<script>alert(1)</script> **b** `c` [x](javascript:alert(1)) [y](https://a.b)\\n```js\\n<b>\\n```'}]}, show()""")
        assert browser.run("document.querySelectorAll('#log img, #log script, #log b').length") == 0
        assert browser.run("[...document.querySelectorAll('#log a')].map(a => a.href).join()") == "https://a.b/"
        assert browser.run("document.querySelector('#log pre code').textContent") == "<b>"
        keep(browser, "markup")
    finally:
        assert s.stop() == 0


def test_a_server_with_keys(browser, tmp_path):
    (tmp_path / "keys").write_text(KEY + "\n")
    s = Server("--api-key-file", str(tmp_path / "keys"))
    try:
        browser.open(s.url)  # the page comes without a key, and asks for one
        browser.until("$('dialog').open && $('options').innerText.includes('asks for an API key')")
        keep(browser, "key-asked")
        rejected = browser.run("fetch('metrics').then(r => r.status)")
        assert rejected == 401
        browser.type("#key", "a-wrong-key")
        browser.click("#options button.main")
        browser.until("$('dialog').open && $('options').innerText.includes('does not know this API key')")
        keep(browser, "key-wrong")
        browser.run("$('key').value = ''")
        browser.type("#key", KEY)
        browser.click("#options button.main")
        browser.until("$('model').textContent === 'tandem-tiny' && $('live').textContent.includes('tokens/s')")
        assert not browser.run("$('dialog').open")
        ask(browser, "What is the capital of France?")
        last_answer(browser, PARIS)
        keep(browser, "key-chat")
        # In this tab only.
        assert browser.run("sessionStorage.getItem('tandem.key')") == KEY and browser.run("localStorage.getItem('tandem.key')") is None
        # The key is withdrawn while somebody writes: the message is not lost.
        browser.run("keepKey('an-old-key', false)")
        browser.until("$('dialog').open")
        browser.run("$('dialog').close()")
        ask(browser, "What is the capital of France?")
        browser.until("$('dialog').open && !running")
        browser.run("$('key').value = ''")
        browser.type("#key", KEY)
        browser.click("#remember")
        browser.click("#options button.main")
        browser.until("current.turns.length === 4")
        last_answer(browser, PARIS)
        assert browser.run("JSON.parse(localStorage.getItem('tandem.key'))") == KEY
        # Forgetting it in the settings.
        browser.click("#settings")
        keep(browser, "settings")
        browser.run("$('key').value = ''")
        browser.click("#options button.main")
        assert browser.until("!$('dialog').open || $('options').innerText.includes('asks for an API key')")
        assert browser.run("localStorage.getItem('tandem.key')") is None and browser.run("sessionStorage.getItem('tandem.key')") is None
        assert all("401" in fault for fault in browser.faults), browser.faults
    finally:
        assert s.stop() == 0
