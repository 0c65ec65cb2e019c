"""The fake recipe's critic as a vision-language model behind a server, to be killed: `fake_vlm.py PORT` (0 = any free one)."""

import sys
import time

from fake_recipe import Onlooker
from rpo.shapes.serving import embedded_responder
from rpo.testing.server import FakeServer

LATENCY_S = 0.1

if __name__ == "__main__":
    with FakeServer(embedded_responder(Onlooker()), port=int(sys.argv[1]), latency_s=LATENCY_S) as server:
        print(server.url, flush=True)
        while True:
            time.sleep(3600)
