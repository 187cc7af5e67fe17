"""A person at the page, in a real browser, with a real server."""

import base64
import json
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import pytest
from PIL import Image

from moe_llava.serving.engine.engine import Engine
from moe_llava.serving.http.protocol import Limits
from tests.browser import open_browser
from tests.serving.conftest import server
from tests.serving.page import answered, ask, open_page, patches, press_button, text_of, troubles
from tests.serving.test_api import client_of, complete, eventually, image_part, metric, picture, post, text_part, user
from tests.serving.test_engine import slowed
from tests.serving.test_web import answer, routes
from tests.training.conftest import tiny_base  # noqa: F401

QUESTION = "where is the red 7 ?"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with open_browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture(scope="module")
def url(sparse):
    model, processor = sparse
    with server(Engine(model, processor.tokenizer), processor, examples=["how many digits are there ?", "is a red 7 there ?"]) as url:
        yield url


@pytest.fixture
def slow(sparse, monkeypatch):
    """(model, processor): an answer goes on until it is as long as it may be, slowly"""
    monkeypatch.setattr(sparse[0].generation_config, "eos_token_id", None)
    slowed(sparse[0], monkeypatch, 0.05)
    return sparse


@pytest.fixture
def files(served):
    return [question.images[0] for question in served[2][:5:4]]


def test_a_person_shows_pictures_and_asks(browser, url, files):
    """One of three pictures is taken back. The answers are the API's own, word by word; the routes are what /routes tells."""
    open_page(browser, url)
    browser.choose("#files", *files, files[0])
    browser.until("document.querySelectorAll('.thumbnail').length === 3")
    browser.click(".thumbnail:nth-child(2) button")
    browser.write("#question", "where is")
    browser.press("Enter", shift=True)
    browser.write("#question", "the red 7 ?")
    browser.press("Enter")
    question = user([image_part(picture(files[0]))] * 2 + [text_part("where is\nthe red 7 ?")])
    with client_of(url) as client:
        first = complete(client, [question]).choices[0].message.content
        assert answered(browser) == [first]
        assert text_of(browser, ".question p") == "where is\nthe red 7 ?"
        assert browser.run("document.querySelectorAll('.question img').length") == 2
        assert browser.run("document.querySelector('#question').value + document.querySelector('#thumbnails').innerHTML") == ""
        browser.until("!document.querySelector('#experts-view').hidden")
        ask(browser, "how many digits are there ?")
        messages = [question, answer(first), user("how many digits are there ?")]
        second = complete(client, messages).choices[0].message.content
        assert answered(browser) == [first, second]
    browser.until("!document.querySelector('#experts-view').hidden")
    check_routes(browser, routes(url, [*messages, answer(second)]))
    press_button(browser, "article:first-child .answer", "Experts")
    browser.until(f"document.querySelectorAll('#answer-tokens span').length === {len(first.split())}")
    check_routes(browser, routes(url, [question, answer(first)]))
    for expected in ("none", "block"):
        browser.click("#toggle")
        assert browser.run("getComputedStyle(document.querySelector('#experts')).display") == expected
    check_routes(browser, routes(url, [question, answer(first)]))
    assert browser.errors.count(f"asked for {url}/routes") == 2  # once for each answer
    assert troubles(browser, url) == []


def check_routes(browser, found):
    """Of both layers: numbers, colours, words, and what a patch that is pointed at tells."""
    seen = []
    for layer, number in enumerate(found["layers"]):
        browser.click(f"#layers label:nth-of-type({layer + 1})")
        assert patches(browser) == [experts[0] for image in found["images"] for experts in image["experts"][layer]]
        words = browser.run("[...document.querySelectorAll('#answer-tokens span')].map(cell => cell.textContent)")
        told = zip(found["answer"]["tokens"], found["answer"]["experts"][layer], strict=True)
        assert words == [f"{piece}{experts[0]}" for piece, experts in told]
        browser.click("#experts .grid span:nth-child(8)")
        image = found["images"][0]
        pairs = zip(image["experts"][layer][7], image["weights"][layer][7], strict=True)
        told = " + ".join(f"expert {expert} \u00d7 {weight:.2f}" for expert, weight in pairs)
        assert told in text_of(browser, "#detail")
        assert text_of(browser, "#detail").startswith("row 2, column 2")
        seen.append(patches(browser, "backgroundColor"))
        assert text_of(browser, "#layers").split()[2 + layer] == str(number)
    assert seen[0] != seen[1]
    assert len(set(seen[0])) == len({experts[0] for image in found["images"] for experts in image["experts"][0]})
    browser.press("ArrowRight")
    assert text_of(browser, "#detail").startswith("row 2, column 3")


def test_send_waits_for_something_to_send(browser, url, files):
    """A question or a picture; the box for the question speaks of a picture once there is one. Examples are questions like any other."""
    open_page(browser, url)
    state = "[document.querySelector('#send').disabled, document.querySelector('#question').placeholder]"
    assert browser.run(state) == [True, "Ask a question"]
    browser.write("#question", "  ")
    assert browser.run(state) == [True, "Ask a question"]
    browser.choose("#files", files[0])
    browser.until("document.querySelectorAll('.thumbnail').length === 1")
    assert browser.run(state) == [False, "Ask about the picture"]
    browser.choose("#files", files[1])
    browser.until("document.querySelectorAll('.thumbnail').length === 2")
    assert browser.run(state) == [False, "Ask about the pictures"]
    for _ in files:
        browser.click(".thumbnail button")
    assert browser.run(state) == [True, "Ask a question"]
    browser.click("#examples button:nth-child(2)")
    assert browser.run("document.querySelector('#question').value") == "is a red 7 there ?"
    assert browser.run(state) == [False, "Ask a question"]
    assert browser.run("document.activeElement.id") == "question"
    browser.click("#send")
    assert answered(browser)[0]
    assert text_of(browser, ".question") == "is a red 7 there ?"
    assert browser.run(f"[...{state}, document.querySelector('#examples').checkVisibility()]") == [True, "Ask a question", False]
    assert troubles(browser, url) == []


@pytest.mark.parametrize("way", ["drop", "paste"])
def test_pictures_come_by_drop_and_paste(browser, url, files, way):
    open_page(browser, url)
    content = base64.b64encode(files[0].read_bytes()).decode()
    event = {"drop": "new DragEvent('drop', {dataTransfer: held, ", "paste": "new ClipboardEvent('paste', {clipboardData: held, "}[way]
    browser.run(f"""
        const held = new DataTransfer(), bytes = Uint8Array.from(atob("{content}"), letter => letter.charCodeAt(0));
        held.items.add(new File([bytes], "a.png", {{type: "image/png"}}));
        held.items.add(new File(["hello"], "a.txt", {{type: "text/plain"}}));
        document.querySelector("#talk").dispatchEvent({event} bubbles: true, cancelable: true}}));
    """)
    browser.until("document.querySelector('#composer-problem').textContent && !document.querySelector('#send').disabled")
    assert text_of(browser, "#composer-problem") == "a.txt is not a picture that this browser can read."
    assert browser.run("document.querySelector('.thumbnail img').src") == f"data:image/png;base64,{content}"
    assert troubles(browser, url) == []


def test_stop_and_regenerate(browser, slow):
    model, processor = slow
    with server(Engine(model, processor.tokenizer), processor) as url:
        open_page(browser, url, temperature=1, tokens=60)
        ask(browser, QUESTION)
        browser.until("(document.querySelector('.answer p:not([class])')?.textContent.split(' ').length ?? 0) > 3")
        browser.write("#question", "not yet")
        browser.press("Enter")  # while an answer is being written, it stays where it is
        browser.click("#stop")
        (stopped,) = answered(browser)
        assert 3 < len(stopped.split(" ")) < 60
        eventually(lambda: metric(url, "requests_running") == 0)
        assert "stopped" in text_of(browser, ".answer")
        assert browser.run("document.querySelector('#question').value") == "not yet"
        browser.run("document.querySelector('#tokens').value = 8")
        press_button(browser, ".answer", "Regenerate")
        (other,) = answered(browser)
        assert other != " ".join(stopped.split(" ")[:8])
        assert "reached the maximum length" in text_of(browser, ".answer")
        browser.click("#new")
        assert browser.run("document.querySelectorAll('article').length") == 0
        assert troubles(browser, url) == []


def test_an_earlier_question_is_changed(browser, url, files):
    """What followed is gone; its picture stays with it."""
    open_page(browser, url)
    ask(browser, "how many digits are there ?", files[0])
    before = answered(browser)
    ask(browser, "which digit is leftmost ?")
    assert answered(browser)[0] == before[0]
    press_button(browser, "article:first-child", "Edit")
    browser.run("document.querySelector('.edit textarea').select()")
    browser.write(".edit textarea", "a draft")
    press_button(browser, ".edit", "Cancel")
    assert text_of(browser, ".question p") == "how many digits are there ?"
    press_button(browser, "article:first-child", "Edit")
    browser.run("document.querySelector('.edit textarea').select()")
    browser.write(".edit textarea", QUESTION)
    browser.press("Enter")
    with client_of(url) as client:
        expected = complete(client, [user([image_part(picture(files[0])), text_part(QUESTION)])]).choices[0].message.content
    assert answered(browser) == [expected]
    assert text_of(browser, ".question p") == QUESTION


def test_what_is_being_typed_outlives_an_answer(browser, slow):
    """The text, where it is typed, and the focus; so does the focus on the button of experts."""
    model, processor = slow
    with server(Engine(model, processor.tokenizer), processor) as url:
        open_page(browser, url, tokens=12)
        ask(browser, QUESTION)
        answered(browser)
        press_button(browser, "article:first-child", "Edit")
        ask(browser, "and here ?")
        browser.until("document.querySelectorAll('.answer')[1].textContent.split(' ').length > 3")
        browser.run("document.querySelector('.edit textarea').setSelectionRange(5, 5)")
        browser.write(".edit textarea", " not")
        assert browser.run("document.querySelector('.edit .strong').disabled")
        answered(browser)
        browser.write("article:first-child :focus", " at all")
        assert browser.run("document.querySelector('.edit textarea').value") == "where not at all is the red 7 ?"
        browser.until("!document.querySelector('#experts-view').hidden")
        buttons = "[...document.querySelectorAll('article [aria-pressed]')]"
        for pressed in (["true", "false"], ["false", "true"]):
            browser.run(f"{buttons}[{pressed.index('true')}].focus()")
            browser.press("Enter")
            assert browser.run(f"{buttons}.map(button => button.ariaPressed)") == pressed
            assert browser.run(f"{buttons}.indexOf(document.activeElement)") == pressed.index("true")
        assert troubles(browser, url) == []


def test_a_new_conversation_begins_with_nothing(browser, sparse, files):
    model, processor = sparse
    with server(Engine(model, processor.tokenizer), processor, limits=Limits(images=1)) as url:
        open_page(browser, url)
        ask(browser, QUESTION, files[0])
        answered(browser)
        ask(browser, QUESTION, files[1])
        assert "accepts 1 picture in a conversation, and this would be 2" in text_of(browser, "#composer-problem")
        browser.click("#new")
        assert browser.run("document.querySelectorAll('article, .thumbnail').length") == 0
        assert text_of(browser, "#composer-problem") == ""


def test_on_a_narrow_screen(browser, url):
    """Nothing is cut off; Escape closes the settings."""
    browser.open(url, width=320, height=600)
    browser.until("document.title !== 'Chat'")
    assert browser.run("(({scrollHeight, clientHeight}) => scrollHeight - clientHeight)(document.querySelector('#question'))") == 0
    ask(browser, QUESTION)
    answered(browser)
    press_button(browser, "article", "Edit")
    ask(browser, "and here ?")
    answered(browser)
    beyond = "[...document.querySelectorAll('header, footer, article *')].filter(part => part.getBoundingClientRect().right > 320).length"
    assert browser.run(beyond) == 0
    browser.click("#settings summary")
    browser.click("#tokens")
    browser.press("Escape")
    assert browser.run("[document.querySelector('#settings').open, document.activeElement.tagName]") == [False, "SUMMARY"]


def test_no_script_runs(browser, sparse):
    """Neither in a question, nor in an answer, nor in the model's name."""
    model, processor = sparse
    attack = "<script>window.caught = 1</script><img src=x onerror='window.caught = 1'>"
    with server(Engine(model, processor.tokenizer), processor, name=attack) as url:
        open_page(browser, url)
        ask(browser, attack)
        answered(browser)
        assert text_of(browser, "#model") == attack
        assert text_of(browser, ".question p") == attack
        written = f"**b** `c` {attack}\n\n- one\n- two **\n```js\n{attack}\n```\n# title\nlast"
        shown = browser.run(f"""import("/page/dom.js").then(dom => {{
            const place = document.querySelector(".answer");
            place.replaceChildren(dom.rendered({json.dumps(written)}));
            return place.innerHTML;
        }})""")
        told = attack.replace("<", "&lt;").replace(">", "&gt;")
        items = "<li>one</li><li>two **</li>"
        assert shown == f"<p><b>b</b> <code>c</code> {told}</p><ul>{items}</ul><pre>{told}</pre><p><b>title</b>\nlast</p>"
        assert browser.run("window.caught") is None
        assert troubles(browser, url) == []
        # Nor could the page's own scripts make elements of a text, by mistake.
        assert browser.run("try { document.body.innerHTML = '<p>'; 'taken' } catch (error) { error.name }") == "TypeError"


def test_a_wrong_key_is_told(browser, sparse):
    model, processor = sparse
    with server(Engine(model, processor.tokenizer), processor, api_keys=["first"]) as url:
        browser.open(url)
        browser.until("!document.querySelector('#key-form').hidden")
        assert text_of(browser, "#key-problem") == ""
        for wrong in ("second", "schlüssel"):
            browser.write("#key", wrong)
            browser.press("Enter")
            assert browser.until("document.querySelector('#key-problem').innerText") == "The server does not accept this API key."
            browser.run("document.querySelector('#key').value = document.querySelector('#key-problem').textContent = ''")
        browser.write("#key", "first")
        browser.press("Enter")
        browser.until("document.querySelector('#key-form').hidden && document.title === 'tiny'")
        ask(browser, QUESTION)
        assert answered(browser)[0]
        assert browser.run("[localStorage.length, document.cookie, location.href]") == [0, "", f"{url}/"]


def test_a_busy_server_and_one_that_is_gone(browser, slow):
    """Are told where the answer would be; the question stays, and can be asked again."""
    model, processor = slow
    with ThreadPoolExecutor() as pool:
        with server(Engine(model, processor.tokenizer, slots=1, max_waiting=0), processor) as url:
            open_page(browser, url)
            pool.submit(post, url, {"model": "tiny", "messages": [user()], "max_tokens": 20})
            eventually(lambda: metric(url, "requests_running") == 1)
            ask(browser, QUESTION)
            assert answered(browser) == [""]
            assert text_of(browser, ".answer .problem") == "The server is busy. Try again in 2 seconds."
            eventually(lambda: metric(url, "requests_running") == 0)
            press_button(browser, ".answer", "Try again")
            assert answered(browser)[0]
            browser.until("!document.querySelector('#experts-view').hidden")
        ask(browser, "and here ?")
        assert answered(browser)[1] == ""
        assert text_of(browser, "article:last-child .problem") == "The server cannot be reached. Is it still running?"
        assert text_of(browser, "article:last-child .question") == "and here ?"


def test_a_server_that_is_ending_says_so(browser, sparse):
    model, processor = sparse
    engine = Engine(model, processor.tokenizer)
    with server(engine, processor) as url:
        open_page(browser, url)
        engine.close()
        ask(browser, QUESTION)
        assert answered(browser) == [""]
        assert text_of(browser, ".answer .problem") == "The server is not available: the server is shutting down."


def test_large_pictures_become_smaller(browser, sparse, tmp_path):
    """And too many are told before they are sent."""
    model, processor = sparse
    Image.effect_noise((300, 200), 90).save(tmp_path / "large.png")
    Image.effect_noise((40, 20), 90).save(tmp_path / "other.bmp")  # of a kind that the server does not take
    limits = Limits(pixels=3000, image_bytes=2000, images=2)
    with server(Engine(model, processor.tokenizer), processor, limits=limits) as url:
        open_page(browser, url)
        files = [tmp_path / name for name in ("large.png", "other.bmp", "other.bmp")]
        ask(browser, QUESTION, *files)
        assert "accepts 2 pictures in a conversation, and this would be 3" in text_of(browser, "#composer-problem")
        assert browser.run("[...document.querySelectorAll('.thumbnail')].map(image => image.innerText.includes('scaled'))") == [
            True,
            False,
            False,
        ]
        browser.click(".thumbnail:nth-child(3) button")
        sent = browser.run("[...document.querySelectorAll('.thumbnail img')].map(image => image.src)")
        sizes = [Image.open(BytesIO(base64.b64decode(url.partition(",")[2]))).size for url in sent]
        assert sizes[0][0] * sizes[0][1] <= 3000
        assert sizes[0][0] / sizes[0][1] == pytest.approx(1.5, rel=0.1)
        assert sizes[1] == (40, 20)
        browser.run("document.querySelector('#question').focus()")
        browser.press("Enter")
        assert answered(browser)[0]
        assert troubles(browser, url) == []


def test_a_dense_model_has_no_experts(browser, served):
    model, processor, _ = served
    with server(Engine(model, processor.tokenizer), processor) as url:
        open_page(browser, url)
        ask(browser, QUESTION)
        answered(browser)
        assert browser.run("[...document.querySelectorAll('#experts, #toggle')].map(part => part.checkVisibility())") == [False, False]
        assert browser.run("document.querySelector('#talk').offsetWidth") == 1400
        assert "routes" not in "".join(browser.errors)
        assert troubles(browser, url) == []
