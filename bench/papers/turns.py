"""The worker process of time_to_accuracy.py: one training run, which waits for its turn before each epoch.

Reads a JSON request from standard input, {"script": "sparseprop", "name": "GMP-0.9", "model": "resnet20", "seed": 0,
"threads": 2, "recipe": {...}}. Whenever it is ready to begin an epoch it answers {} and waits for an empty line; at the
end, or where the run diverged, it answers {"record": what common.fit returns}. The script "torch" is PyTorch with dense
weights and the same batches, initial weights, optimiser and schedule.
"""

import copy
import importlib.metadata
import importlib.util
import itertools
import json
import os
import statistics
import sys
import time

import common

import sparsetrain as st
from sparsetrain.train import Callback, Progress

TRIALS = 5  # steps in each memory layout of PyTorch, the first not counted


class Turns:
    """Our end of the pipe."""

    def __init__(self):
        # Libraries print; only answers may reach the real standard output.
        self.answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def read(self):
        line = sys.stdin.readline()
        if not line:
            raise SystemExit("time_to_accuracy.py has ended")
        return line

    def answer(self, **values):
        print(json.dumps(common.rounded(values)), file=self.answers)

    def wait(self):
        """Until the next epoch may begin."""
        self.answer()
        self.read()


class TakeTurns(Callback):
    """Has a Trainer wait before each epoch."""

    def __init__(self, turns):
        self.turns = turns

    def on_epoch_begin(self, trainer, batches):
        self.turns.wait()


def methods(request):
    """(method of backprop, method of sparsity as common.trainer() takes it) of a configuration of another script."""
    found = importlib.import_module(request["script"]).METHODS[request["name"]]
    return (None, found) if request["script"] == "sparseprop" else (found(request["seed"], request["model"]), None)


def settings(request):
    """What the result depends on; of the other scripts' configurations that which they have."""
    model, seed, how = request["model"], request["seed"], common.Recipe(**request["recipe"])
    if request["script"] == "torch":
        version = importlib.metadata.version("torch") if importlib.util.find_spec("torch") else None
        return {"model": model, **request["recipe"], "seed": seed, "torch": version}
    return common.settings(model, how, seed, *methods(request))


def sparsetrain_run(request, how, turns):
    """The record of a configuration of another script, without what its own callbacks measure."""
    method, weights = methods(request)
    callbacks = [Progress(label=f"{request['model']}/{request['name']}"), TakeTurns(turns)]
    made, train, test = common.trainer(request["model"], how, request["seed"], method, callbacks, weights)
    return common.fit(made, train, how.epochs, test)


def torch_run(request, how, turns):
    """The record of PyTorch with dense weights, in the faster of its two memory layouts."""
    # What sparsetrain sets for its own threads is not for PyTorch's, which read it when they are loaded.
    os.environ.pop("GOMP_SPINCOUNT", None)
    sys.path.append(str(common.ROOT / "bench"))
    import torch
    import torch_peers

    torch.set_num_threads(request["threads"])
    made, train, test = common.trainer(request["model"], how, request["seed"])
    net = torch_peers.NETS[request["model"]](common.IMAGE[request["model"]][0])
    start = {name: torch.from_numpy(value) for name, value in made.model.state_dict().items()}
    missing = net.load_state_dict(start, strict=False)
    if missing.unexpected_keys or any("num_batches" not in key for key in missing.missing_keys):
        raise SystemExit(f"torch_peers.py has another {request['model']}: {missing}")

    def optimizer(net):
        options = {"lr": how.lr, "momentum": common.MOMENTUM, "weight_decay": common.WEIGHT_DECAY}
        return torch.optim.SGD(net.parameters(), **options, fused=True)

    def outputs(net, layout, x):
        return net(torch.from_numpy(x).to(memory_format=layout))

    def step(net, layout, sgd, x, y):
        sgd.zero_grad()
        loss = torch.nn.functional.cross_entropy(outputs(net, layout, x), torch.from_numpy(y))
        loss.backward()
        sgd.step()
        return loss.item() * len(y)

    def trial(layout):
        tried = copy.deepcopy(net).to(memory_format=layout)
        sgd, times = optimizer(tried), []
        for _ in range(TRIALS):
            before = time.perf_counter()
            step(tried, layout, sgd, x, y)
            times.append(time.perf_counter() - before)
        return statistics.median(times[1:])

    @torch.no_grad()
    def accuracy():
        net.eval()
        correct = [int((outputs(net, layout, x).argmax(1).numpy() == y).sum()) for x, y in test]
        net.train()
        return sum(correct) / len(test.labels)

    turns.wait()
    x, y = next(iter(train))
    layout = min((torch.contiguous_format, torch.channels_last), key=trial)
    net = net.to(memory_format=layout)
    sgd, steps = optimizer(net), 0
    columns = {"loss": [], "val_accuracy": [], "time_s": []}
    for epoch in range(how.epochs):
        if epoch:
            turns.wait()
        train.epoch, loss, before = epoch, 0.0, time.perf_counter()
        for x, y in train:
            sgd.param_groups[0]["lr"] = made.schedule(steps)
            loss += step(net, layout, sgd, x, y)
            steps += 1
        columns["time_s"].append(time.perf_counter() - before)
        columns["loss"].append(loss / len(train.labels))
        columns["val_accuracy"].append(accuracy())
    columns["time_s"] = list(itertools.accumulate(columns["time_s"]))
    return {"accuracy": columns["val_accuracy"][-1], "diverged": None, "layout": str(layout), **columns}


def main():
    turns = Turns()
    request = json.loads(turns.read())
    st.set_num_threads(request["threads"])
    run = torch_run if request["script"] == "torch" else sparsetrain_run
    turns.answer(record=run(request, common.Recipe(**request["recipe"]), turns))


if __name__ == "__main__":
    main()
