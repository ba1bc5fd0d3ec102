"""Times cases on all peers: a process each, one repetition in turn, so noise hits all alike."""

import contextlib
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

import common

from sparsetrain.bench.load import Load, too_busy

# After a turn we wait at least this long, then until the peer's threads sleep: libgomp's spin for
# some milliseconds after a parallel region, on a core that the next peer needs.
PAUSE_SECONDS = 0.02
SPIN_LIMIT_SECONDS = 1.0
# By how much a result may differ from PyTorch's (root of the squares' sum, as a share of its own).
# Gradients through whole nets cancel: PyTorch's two layouts differ by up to 1 % in ResNet-20.
LAYER_TOLERANCE, NET_TOLERANCE = 1e-4, 5e-2
# The parts that make up a pass; others are timed beside them.
MAIN_PARTS = ("forward", "backward", "step")


def run(cases, options, memory_peers=()):
    """Times every case at its own sparsity, or at every one of options; prints as it goes, writes options.out.

    Workers live for all sparsities of one case. Returns the results, each {"case", "load",
    "peers": {name: {"seconds": {part: median}, "total", ...} or {"skipped": why}}}, and with
    "memory", of memory_peers, where the case asks for it.
    """
    report = {
        "script": sys.argv[0],
        "machine": common.machine(),
        "threads": options.threads,
        "isa": options.isa or "best",
        "repeats": options.repeats,
        "load_before": common.check_load(options.force),
        "versions": {},
        "results": [],
    }
    for case in cases:
        sparsities = [case["sparsity"]] if "sparsity" in case else options.sparsity
        at_sparsity = [{**case, "sparsity": sparsity} for sparsity in sparsities]
        with contextlib.ExitStack() as stack:
            workers = [stack.enter_context(Worker(peer, options)) for peer in options.peers]
            results = [_race(c, workers, options.repeats, report["versions"]) for c in at_sparsity]
        if case.get("memory"):
            peers = [peer for peer in memory_peers if peer in options.peers]
            for result in results:
                result["memory"] = {p: _memory(p, result["case"], options) for p in peers}
        report["results"] += results
        common.write_json(options.out, report)
    print(f"\nwritten to {options.out}")
    return report["results"]


def fastest(result, names):
    """Of these peers, the one with the lowest total; None where none of them ran."""
    ran = [name for name in names if "total" in result["peers"].get(name, {})]
    return min(ran, key=lambda name: result["peers"][name]["total"], default=None)


def speedup(result, name, total="total"):
    """How many times sparsetrain's time the time of this peer is; None where one is missing."""
    ours = result["peers"].get("sparsetrain", {}).get(total)
    return result["peers"][name]["total"] / ours if ours and name else None


class Worker:
    """A process that runs one peer; peers.py says what can be asked."""

    def __init__(self, peer, options):
        self.peer = peer
        self.process = subprocess.Popen(
            [sys.executable, common.HERE / "peers.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=common.worker_environment(options),
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()

    def ask(self, **request):
        """The answer to a request, once the worker's threads sleep."""
        self.process.stdin.write(json.dumps({"peer": self.peer, **request}) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"the worker of {self.peer} ended with code {self.process.wait()}")
        self._wait_until_idle()
        return json.loads(answer)

    def _wait_until_idle(self):
        start = time.monotonic()
        time.sleep(PAUSE_SECONDS)
        while self._running():
            if time.monotonic() - start > SPIN_LIMIT_SECONDS:
                print(f"WARNING: threads of {self.peer} do not go to sleep", flush=True)
                return
            time.sleep(PAUSE_SECONDS / 4)

    def _running(self):
        """True while a thread is in state R (man 5 proc: the field after the name in brackets)."""
        stats = Path(f"/proc/{self.process.pid}/task").glob("*/stat")
        return any(stat.read_text().rpartition(")")[2].split()[0] == "R" for stat in stats)


def _race(case, workers, repeats, versions):
    print(f"\n{case['name']}, sparsity {case['sparsity']:g}", flush=True)
    load = Load([worker.process.pid for worker in workers])
    outcome, samples = {}, {}
    for worker in workers:
        answer = worker.ask(case=case, repeats=1, sample=True)
        if "skipped" in answer:
            outcome[worker.peer] = {"skipped": answer["skipped"]}
            print(f"  {worker.peer:20} skipped: {answer['skipped']}", flush=True)
        else:
            outcome[worker.peer] = {"about": answer["about"]}
            samples[worker.peer] = answer["sample"]
            versions[worker.peer] = answer["versions"]
    _check_same_net(outcome)
    turns = {worker.peer: [] for worker in workers if worker.peer in samples}
    order = [worker for worker in workers if worker.peer in samples]
    for _ in range(repeats):
        for worker in order:
            turns[worker.peer] += worker.ask(case=case, repeats=1)["seconds"]
        order.append(order.pop(0))
    for peer, repetitions in turns.items():
        outcome[peer] |= _medians(repetitions)
        outcome[peer]["differs"] = _difference(samples, peer)
        tolerance = NET_TOLERANCE if "net" in case else LAYER_TOLERANCE
        _print_peer(peer, outcome[peer], tolerance)
    taken = load.taken()
    if busy := too_busy(taken):
        print(f"  WARNING, not to be trusted: meanwhile {busy}", flush=True)
    return {"case": case, "load": taken, "peers": outcome}


def _medians(repetitions):
    parts = {part: [run[part] for run in repetitions] for part in repetitions[0]}
    mains = [sum(run.get(part, 0.0) for part in MAIN_PARTS) for run in repetitions]
    others = [sum(t for part, t in run.items() if part not in MAIN_PARTS) for run in repetitions]
    return {
        "seconds": {part: statistics.median(seconds) for part, seconds in parts.items()},
        "total": statistics.median(mains),
        "total_beside": statistics.median(others) or None,
        "repetitions": parts,
    }


def _difference(samples, peer):
    """Largest relative difference from PyTorch's sampled numbers, else the first peer's; 0 where there are none."""
    reference = samples.get("torch", next(iter(samples.values())))
    differences = (
        math.dist(numbers, reference[what]) / (math.hypot(*reference[what]) or 1.0)
        for what, numbers in samples[peer].items()
    )
    return max(differences, default=0.0)


def _check_same_net(outcome):
    """SystemExit if the peers' nets differ in a parameter's name or shape."""
    nets = {peer: o["about"].pop("parameters", None) for peer, o in outcome.items() if "about" in o}
    for peer, parameters in nets.items():
        first, reference = next(iter(nets.items()))
        if parameters != reference:
            odd = set(map(str, parameters.items())) ^ set(map(str, reference.items()))
            raise SystemExit(f"the nets of {first} and {peer} differ in {sorted(odd)}")


def _print_peer(peer, outcome, tolerance):
    parts = ", ".join(f"{part} {common.ms(s)}" for part, s in outcome["seconds"].items())
    wrong = not outcome["differs"] <= tolerance
    note = f"  WRONG RESULT: differs by {outcome['differs']:.1%}" if wrong else ""
    print(f"  {peer:20} {parts} ms{note}", flush=True)


def _memory(peer, case, options):
    """What steps add to a fresh process: {"base", "peak", "step"} in bytes; None if skipped.

    The median of three processes, as malloc's moods move one by some percent.
    """
    found = []
    for _ in range(3):
        with Worker(peer, options) as worker:
            found.append(worker.ask(case=case, repeats=0, memory=True).get("memory"))
    return sorted(found, key=lambda memory: memory["step"])[1] if all(found) else None
