"""A server that notes each file it opens and each connection it makes, from the line `watch` on its standard input to the line `tell`.

python -m tests.serving.watched_server CHECKPOINT
"""

import json
import sys
import threading

from moe_llava.checkpoints.load import load_checkpoint
from moe_llava.serving.engine.engine import Engine
from moe_llava.serving.http.api import build_app
from moe_llava.serving.http.connections import http_server, serve_until_signal
from moe_llava.serving.http.listen import listener
from moe_llava.serving.http.protocol import Limits

LIMITS = Limits(head_seconds=2, body_seconds=4)
OUTWARD = ("open", "os.listdir", "os.scandir", "os.exec", "os.system", "subprocess.Popen", "urllib.Request")
OUTWARD += ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname")
watching = threading.Event()
seen = []


def note(event, arguments):
    if event in OUTWARD and watching.is_set():
        seen.append(f"{event} {arguments!r}"[:200])


def obey():
    for line in sys.stdin:
        if line == "watch\n":
            seen.clear()
            watching.set()
        elif line == "tell\n":
            watching.clear()
            print(json.dumps(seen), flush=True)
        elif line == "open\n":  # what must be seen
            open(__file__).close()


if __name__ == "__main__":
    model, processor = load_checkpoint(sys.argv[1])
    sys.addaudithook(note)
    threading.Thread(target=obey, daemon=True).start()
    engine = Engine(model, processor.tokenizer)
    with listener("127.0.0.1", 0) as socket:
        serve_until_signal(http_server(build_app(engine, processor, "tiny", LIMITS), engine, LIMITS), socket, str(socket.getsockname()[1]))
