"""The worker process of the benchmarks: builds one peer's layer or net and times it when asked.

Reads a JSON request a line from standard input and answers each with one line:

    {"peer": "torch", "case": {...}, "repeats": 3}
    {"seconds": [{"forward": 0.017, "backward": 0.049}, ...], "about": {...}, "versions": {...}}

With "sample" the answer has numbers by which peers are compared with each other, with "memory" the
bytes that training steps need. What a peer cannot run, or fails to, is answered with
{"skipped": why}.
Threads come from OMP_NUM_THREADS. PEERS maps each peer to the file that builds it, and only that
one is imported: no peer shares its process with another's threads.
"""

import importlib
import json
import os
import sys
import traceback

import numpy as np
from subject import Unsupported

PEERS = {
    "sparsetrain": "sparsetrain_peer",
    "dithered": "sparsetrain_peer",
    "dithered-8-bit": "sparsetrain_peer",
    "resprop": "sparsetrain_peer",
    "mem-aop": "sparsetrain_peer",
    "top-k": "sparsetrain_peer",
    "torch": "torch_peers",
    "torch-channels-last": "torch_peers",
    "sparseprop": "torch_peers",
    "sparseprop-batch": "torch_peers",
    "sparseprop-on": "torch_peers",
    "sparselab": "torch_peers",
    "torch-csr": "torch_peers",
}


class Server:
    """Answers requests, and keeps what it built until one for something else comes."""

    def __init__(self):
        self.key = self.subject = None

    def answer(self, request):
        peer, case = request["peer"], request["case"]
        module = importlib.import_module(PEERS[peer])
        if self.key != (peer, case):
            self.key = self.subject = None  # never two nets in memory
            build = module.layer if "kind" in case else module.net
            self.subject, self.key = build(peer, case), (peer, case)
        reply = {"about": self.subject.about}
        reply["versions"] = {"numpy": np.__version__, **module.versions(peer)}
        if request.get("memory"):
            reply["memory"] = self.subject.peak_memory()
        if request.get("sample"):
            reply["sample"] = self.subject.sample()
        reply["seconds"] = [self.subject.repetition() for _ in range(request["repeats"])]
        return reply


def main():
    # SparseProp prints from its Python code; only answers may reach the real standard output.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    server = Server()
    for line in sys.stdin:
        try:
            reply = server.answer(json.loads(line))
        except (Unsupported, ModuleNotFoundError) as reason:
            reply = {"skipped": str(reason)}
        except Exception as error:
            traceback.print_exc()
            reply = {"skipped": f"failed with {type(error).__name__}: {error}"}
        print(json.dumps(reply), file=answers)


if __name__ == "__main__":
    main()
