"""What a person does at the page, and what the page then shows."""

import json


def open_page(browser, url, temperature=0, tokens=8):
    browser.open(url)
    browser.until("document.title !== 'Chat'")
    browser.run(f"document.querySelector('#temperature').value = {temperature}; document.querySelector('#tokens').value = {tokens}")


def ask(browser, question, *files, key="Enter"):
    if files:
        browser.choose("#files", *files)
        browser.until(f"document.querySelectorAll('.thumbnail').length === {len(files)} && !document.querySelector('#send').disabled")
    browser.write("#question", question)
    browser.press(key)


def answered(browser):
    """Waits for the end; the answers on the page."""
    browser.until("document.querySelector('#stop').hidden && document.querySelector('article') !== null")
    return answers(browser)


def answers(browser):
    return browser.run("[...document.querySelectorAll('.answer')].map(answer => answer.querySelector('p:not([class])')?.textContent ?? '')")


def text_of(browser, selector):
    return browser.run(f"document.querySelector({json.dumps(selector)}).innerText")


def press_button(browser, place, name):
    """A button of this name in the part of the page that `place` selects."""
    buttons = f"[...document.querySelector({json.dumps(place)}).querySelectorAll('button')]"
    browser.run(f"{buttons}.find(button => button.textContent === {json.dumps(name)}).click()")


def troubles(browser, url):
    """What the browser complained of, and whatever it asked for elsewhere."""
    return [error for error in browser.errors if not error.startswith(f"asked for {url}/")]


def patches(browser, style=None):
    value = f"getComputedStyle(cell).{style}" if style else "Number(cell.textContent)"
    return browser.run(f"[...document.querySelectorAll('.grid span')].map(cell => {value})")
