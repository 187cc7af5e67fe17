"""Requests that no honest client sends: by hand, and honest ones with something random done to them."""

import base64
import json
import random
import zlib
from io import BytesIO

from PIL import Image

QUESTION = {"role": "user", "content": "where is the red 7 ?"}
VALUES = [
    None,
    True,
    False,
    0,
    -1,
    1,
    5,
    0.5,
    -0.0,
    1e308,
    2**63,
    -(2**64),
    10**400,
    float("nan"),
    float("inf"),
    "",
    " ",
    "a",
    "tiny",
    "\0",
]
VALUES += ["<image>", "<ima\u200bge>", "\ud800", "\u202eegami", "A" * 9000, "../../etc/passwd", "file:///etc/passwd", "//host/share/a.png"]
VALUES += ["http://127.0.0.1:9/a.png", "{{ 7 * 7 }}", "%s%n", "data:image/png;base64,AAAA", "data:,", [], {}, [[]], [{}], {"": None}]
VALUES += [["a"] * 500, json.loads("[" * 60 + "]" * 60), {"role": "system", "content": "a"}, {"type": "text", "text": "<image>"}]


def encoded(picture, form="PNG", **settings):
    file = BytesIO()
    picture.save(file, form, **settings)
    return file.getvalue()


def data_url(content, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


HOSTS = """localhost.evil.example evil.example:8000 127.0.0.1.evil.example [::1 [::1].evil.example localhost@evil.example
    evil.example#localhost localhost:8000:9 evil.example:99999999 0.0.0.0 2130706433"""
PATHS = """/../../etc/passwd /..%2f..%2fetc%2fpasswd /%2e%2e/%2e%2e/etc/passwd //etc/passwd /%00 /v1/models/%2e%2e /%ff%fe /docs
    /static/../../etc/passwd /v1\\models /%ed%a0%80 /openapi.json /v1/models%0d%0aX:%20y"""
URLS = """http://127.0.0.1:9/a.png HTTPS://example.org/a.png ftp://example.org/a file:///etc/passwd file://host/a /etc/passwd C:\\a.png
    //example.org/a.png \\\\host\\share\\a.png data:text/html;base64,AAAA data:image/png,AAAA data: data:image/png;base64 blob:a
    data:image/png;base64,%41 data:image/png;base64,A data:image/png;base64,==== javascript:alert(1) gopher://a
    data:image/png;charset=x;base64,AAAA data:image/png;base64,\u0661\u0662 data:image/png;base64;charset=utf-8,AAAA"""
PLAIN = Image.new("RGB", (24, 18), "red")
PNG = encoded(PLAIN)
HONEST = {
    "model": "tiny",
    "messages": [
        {"role": "system", "content": "look well ."},
        QUESTION,
        {"role": "assistant", "content": "left ."},
        {"role": "user", "content": [{"type": "text", "text": "and ?"}, {"type": "image_url", "image_url": {"url": data_url(PNG)}}]},
    ],
    "temperature": 0,
    "max_tokens": 4,
    "seed": 1,
    "stop": ["."],
    "logprobs": True,
    "top_logprobs": 2,
}


def head(length, path="/v1/chat/completions", method="POST", extra=""):
    told = f"Content-Length: {length}\r\n" if length is not None else ""
    return f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{told}{extra}\r\n".encode()


def post(body):
    """As bytes, which json.dumps makes of anything but bytes."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    return head(len(body)) + body


def ask(**change):
    return post({"model": "tiny", "messages": [QUESTION], "max_tokens": 2, "temperature": 0} | change)


def show(url):
    return ask(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}])


def claimed(width, height):
    """A small PNG that claims to be so large; the sums are right."""
    start = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + PNG[24:29]
    return PNG[:12] + start + zlib.crc32(start).to_bytes(4, "big") + PNG[33:]


def many_scans(number):
    """A JPEG of a few kilobytes that is decoded so many times over."""
    content = encoded(Image.effect_noise((64, 64), 9).convert("RGB"), "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:-2] + content[last:-2] * number + content[-2:]


def text_bomb():
    """A PNG with a text that unfolds to 200 MB."""
    chunk = b"zTXt" + b"a\0\0" + zlib.compress(b"\0" * 200_000_000)
    return PNG[:33] + (len(chunk) - 4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big") + PNG[33:]


def flat(width, height):
    """A PNG of few bytes, whatever its size."""
    return encoded(Image.new("1", (width, height)))


def by_hand():
    """name -> (bytes of a request, statuses that may answer it)"""
    wrong, chunked = {400}, "Transfer-Encoding: chunked\r\n"
    animated = encoded(PLAIN, "GIF", save_all=True, append_images=[Image.new("RGB", (24, 18), "blue")] * 20)
    wide = flat(5000, 5000)
    wide_part = {"type": "image_url", "image_url": {"url": data_url(wide)}}
    cases = {
        "nested": (post(b"[" * 100_000), wrong),
        "many lists": (post(b'{"model":"tiny","messages":[' + b"[]," * 3_000_000 + b"0]}"), wrong),
        "many numbers": (post(b'{"model":"tiny","messages":[' + b"0," * 100_000 + b"0]}"), wrong),
        "many names": (post(b"{" + b",".join(b'"%d":0' % number for number in range(100_000)) + b"}"), wrong),
        "a name twice": (post(b'{"model":"tiny","model":"other","messages":[{"role":"user","content":"a"}]}'), {400, 404}),
        "long number": (post(b'{"seed":' + b"9" * 100_000 + b"}"), wrong),
        "half a character": (ask(messages=[{"role": "user", "content": "\ud800"}]), wrong),
        "UTF-16": (post(json.dumps(HONEST).encode("utf-16")), wrong),
        "UTF-8 with a mark": (post(b"\xef\xbb\xbf" + json.dumps(HONEST).encode()), {200, 400}),
        "a template": (ask(chat_template="{% for a in range(10**9) %}{% endfor %}"), wrong),
        "settings of generate": (ask(generation_config={"max_new_tokens": 9}), wrong),
        "many system prompts": (ask(messages=[{"role": "system", "content": "a"}] * 50 + [QUESTION]), wrong),
        "another role": (ask(messages=[{"role": "developer", "content": "a"}, QUESTION]), wrong),
        "logprobs of all": (ask(logprobs=True, top_logprobs=10**6), wrong),
        "logprobs of twenty": (ask(logprobs=True, top_logprobs=20), {200}),
        "stops": (ask(stop=["a" * 200] * 4), {200}),
        "a long stop": (ask(stop="a" * 10**6), wrong),
        "a stop that is half a character": (ask(stop="\udc00"), wrong),
        "placeholders": (ask(messages=[{"role": "user", "content": "<image>" * 20}]), {200, 400}),
        "full-width placeholder": (
            ask(messages=[{"role": "user", "content": "\uff1cimage\uff1e <im\u0430ge> <\u0131mage> <IMAGE>"}]),
            {200},
        ),
        "special tokens": (ask(messages=[{"role": "user", "content": "<s></s><pad><unk> USER: ASSISTANT:"}]), {200}),
        "zero": (ask(messages=[{"role": "user", "content": "\0\x1b[2J\r\n"}]), {200}),
        "huge text": (ask(messages=[{"role": "user", "content": "a" * 20_000_000}]), wrong),
        "huge body": (post(b" " * 33 * 2**20), {413}),
        "endless body, announced": (head(10**15) + b" " * 66 * 2**20, {413}),
        "a body in pieces that is too large": (head(None, extra=chunked) + b"100000\r\n" + (b" " * 2**20 + b"\r\n100000\r\n") * 66, {413}),
        "pieces without end": (head(None, extra=chunked) + b"1\r\n \r\n" * 1000, {408}),
        "a piece of no size": (head(None, extra=chunked) + b"zz\r\n", wrong),
        "a piece of great size": (head(None, extra=chunked) + b"f" * 30 + b"\r\n", wrong),
        "both lengths": (head(5, extra=chunked) + b"0\r\n\r\nGET /health HTTP/1.1\r\n\r\n", wrong),
        "both lengths elsewhere": (head(5, "/health", extra=chunked) + b"0\r\n\r\n", wrong),
        "two lengths": (head(5, extra="Content-Length: 6\r\n") + b"hello!", wrong),
        "a negative length": (head(-1), wrong),
        "a length with a sign": (head("+5") + b"hello", wrong),
        "a length of another base": (head("0x5") + b"hello", wrong),
        "an encoding with a space": (head(5, extra="Transfer-Encoding : chunked\r\n") + b"hello", wrong),
        "an encoding that is none": (head(None, extra="Transfer-Encoding: \x0bchunked\r\n") + b"0\r\n\r\n", wrong),
        "a piece with much to say": (head(None, extra=chunked) + b"1;" + b"a" * 100_000 + b"\r\n", {400, 408}),
        "lines that end otherwise": (post(HONEST).replace(b"\r\n", b"\n"), {200, 400}),
        "a question before the body": (head(2, extra="Expect: 100-continue\r\n") + b"{}", wrong),
        "an encoding twice": (head(None, extra="Transfer-Encoding: chunked, chunked\r\n") + b"0\r\n\r\n", wrong),
        "compressed": (head(2, extra="Content-Encoding: gzip\r\n") + b"{}", wrong),
        "a body that does not come": (head(100) + b"{", {408}),
        "a head that does not end": (b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nX-A: ", {408}),
        "many headers": (head(0, extra="X-A: b\r\n" * 50_000), wrong),
        "a long header": (head(0, extra=f"X-A: {'b' * 10**6}\r\n"), wrong),
        "a folded header": (head(0, extra="X-A: b\r\n c\r\n"), {400}),
        "a header with a zero": (head(0, extra="X-A: \0\r\n"), wrong),
        "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 200, wrong),
        "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", {400, 403, 404, 405}),
        "HTTP/9": (b"GET /v1/models HTTP/9.9\r\nHost: localhost\r\nConnection: close\r\n\r\n", {200, 400}),
        "no host": (b"GET /v1/models HTTP/1.0\r\n\r\n", {403}),
        "two hosts": (b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nHost: other\r\n\r\n", wrong),
        "a web socket": (head(None, "/v1/models", "GET", "Upgrade: websocket\r\nConnection: Upgrade, close\r\n"), {200, 400}),
        "a tunnel": (b"CONNECT other:443 HTTP/1.1\r\nHost: localhost\r\n\r\n", {404, 405}),
        "a whole URL": (head(None, "http://other/v1/models", "GET"), {404}),
        "a star": (head(None, "*", "OPTIONS"), {404, 405}),
        "a long method": (head(None, "/health", "A" * 30_000), {404, 405}),
        "a long path": (head(None, "/" + "a" * 60_000, "GET"), {404}),
        "a kind of body": (
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\n{}",
            {415},
        ),
        "an animation": (show(data_url(animated, "image/gif")), {200}),
        "another name for a kind": (show(data_url(animated)), {200}),
        "a text that unfolds": (show(data_url(text_bomb())), wrong),
        "scans": (show(data_url(many_scans(2000), "image/jpeg")), wrong),
        "two wide images": (ask(messages=[{"role": "user", "content": [wide_part] * 2}]), {200, 400}),
        "three wide images": (ask(messages=[{"role": "user", "content": [wide_part] * 3}]), wrong),
        "a vector image": (show("data:image/svg+xml;base64,PHN2ZyB4bWxucz0iaHR0cDovL3d3dy53My5vcmcvMjAwMC9zdmciLz4="), wrong),
        "a disguise": (show(data_url(b"RIFF\0\0\0\0WEBP\nImage type: L\nImage size (x*y): 9999*9999\n" + b"\0" * 600)), wrong),
    }
    for size in ((10_000, 1), (1, 30_000), (60_000, 1), (1, 1_000_000), (2_000, 1), (25_000_000, 1)):
        cases[f"thin {size}"] = (show(data_url(flat(*size))), wrong)
    for size in ((200, 1), (70_000, 355), (355, 70_000)):
        cases[f"as thin as may be {size}"] = (show(data_url(flat(*size))), {200})
    for name in ("", *HOSTS.split()):
        cases[f"host {name}"] = (f"GET /v1/models HTTP/1.1\r\nHost: {name}\r\n\r\n".encode(), {400, 403})
    for path in PATHS.split():
        cases[f"path {path}"] = (head(None, path, "GET"), {404})
    for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE", "BREW"):
        cases[f"method {method}"] = (head(None, method=method), {405})
    for url in ("", " " + data_url(PNG), *URLS.split()):
        cases[f"URL {url[:40]}"] = (show(url), wrong)
    for form, settings in (("PNG", {}), ("JPEG", {}), ("GIF", {}), ("WEBP", {}), ("JPEG", {"progressive": True})):
        content = encoded(PLAIN, form, **settings)
        for part in (1, 3, 8, 20, 40, len(content) // 2):
            cases[f"{part} bytes of {form} {settings}"] = (show(data_url(content[:part])), {200, 400})
        cases[f"whole {form} {settings}"] = (show(data_url(content)), {200})
    for form in ("BMP", "TIFF", "ICO", "PPM", "TGA", "PDF", "EPS", "PCX", "DDS"):
        cases[f"another format {form}"] = (show(data_url(encoded(PLAIN, form))), wrong)
    for size in ((2**31 - 1, 2**31 - 1), (20_000, 20_000), (50_000_001, 1), (0, 0), (2**32 - 1, 1), (9_000, 9_000)):
        cases[f"claims {size}"] = (show(data_url(claimed(*size))), wrong)
    for field in ("max_tokens", "temperature", "top_p", "seed", "n", "top_logprobs"):
        for value in (10**30, -(10**30), float("nan"), float("inf"), "1", [1], True, {}):
            cases[f"{field} {value!r}"[:60]] = (ask(**{field: value}), wrong)
    for field in (
        "tools",
        "functions",
        "audio",
        "store",
        "chat_template_kwargs",
        "guided_json",
        "best_of",
        "__proto__",
        "a\0b",
    ):
        cases[f"field {field}"] = (ask(**{field: {}}), wrong)
    return cases


def changed_tree(draw):
    """An honest body of which one to three values are another, or missing, or too many."""
    body = json.loads(json.dumps(HONEST))
    for _ in range(draw.randint(1, 3)):
        places = list(_places(body))
        holder, key = draw.choice(places)
        match draw.randrange(4):
            case 0 if isinstance(holder, dict):
                del holder[key]
            case 1 if isinstance(holder, list):
                holder.insert(key, draw.choice(VALUES))
            case 2 if isinstance(holder, dict):
                holder[draw.choice(["chat_template", "x", "type", "url", "role", "\0"])] = draw.choice(VALUES)
            case _:
                holder[key] = draw.choice(VALUES)
        if not body:
            break
    return post(body)


def _places(value):
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, key
        yield from _places(inner)


def changed_bytes(draw):
    """The bytes of an honest body with a run of them changed, missing, or twice; sometimes those of its head."""
    body = json.dumps(HONEST).encode()
    start, length = head(len(body)), len(body)
    spoils_head = draw.random() < 0.15
    text = bytearray(start if spoils_head else body)
    at, run = draw.randrange(len(text)), draw.choice([1, 1, 1, 2, 8, 60])
    text[at : at + run] = draw.choice([b"", bytes([draw.randrange(256)]), bytes(text[at : at + run]) * 2, draw.randbytes(run), b"\0", b'"'])
    return bytes(text) + body[:length] if spoils_head else head(len(text)) + bytes(text)


def random_requests(number, seed=0):
    draw = random.Random(seed)
    return [changed_tree(draw) if draw.random() < 0.65 else changed_bytes(draw) for _ in range(number)]
