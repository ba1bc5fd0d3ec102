"""FreeTickets: an ensemble collected from one run whose weights come and go."""

import numpy as np

from sparsetrain import checks
from sparsetrain.train import checkpoint
from sparsetrain.train.callbacks import Callback


class FreeTickets(Callback):
    """Takes a ticket, a copy of the model's stored weights and statistics, after every so many epochs from `start` on;
    predict() averages the probabilities of all tickets.

    With a method of sparsity such as SET or RigL that changes weights between them, and a learning rate that ends low
    before each (optim.restarts), the tickets differ: an ensemble for the price of one run. Each ticket takes as much
    memory as the sparse model, and as much room in a checkpoint: Trainer.resume(path, callbacks=[FreeTickets(...)]) has
    them again.

    Source: Liu et al., Deep Ensembling with No Overhead for either Training or Testing: The All-Round Blessings of
    Dynamic Sparsity, ICLR 2022, arXiv 2106.14568; its EDST replaces a large share of the weights between tickets,
    here the method of sparsity says how many.
    """

    def __init__(self, every=1, start=1):
        self.every = checks.integer("every", every, low=1)
        self.start = checks.integer("start", start, low=1)
        self.tickets, self._trainer = [], None

    def on_epoch_end(self, trainer, row):
        if row["epoch"] >= self.start and (row["epoch"] - self.start) % self.every == 0:
            self.take(trainer)

    def take(self, trainer):
        """Take a ticket of the trainer's model now."""
        if self._trainer not in (None, trainer):
            raise ValueError("the tickets are another trainer's")
        self._trainer = trainer
        with trainer.effective_weights():
            parameters = [parameter.snapshot() for parameter in trainer.model.parameters()]
        self.tickets.append((parameters, [buffer.copy() for _, buffer in trainer.model.named_buffers()]))

    def predict(self, data, batch_size=256):
        """Mean probabilities (softmax of the outputs) of the tickets, (N, K), as of Trainer.predict."""
        if not self.tickets:
            raise ValueError("no ticket was taken yet")
        trainer, total = self._trainer, 0.0
        data = data if isinstance(data, np.ndarray) else list(data)
        now = self._present()
        try:
            for ticket in self.tickets:
                self._put(ticket)
                outputs = trainer.predict(data, batch_size)
                odds = np.exp(outputs - outputs.max(1, keepdims=True))
                total = total + odds / odds.sum(1, keepdims=True)
        finally:
            self._put(now)
        return total / len(self.tickets)

    def accuracy(self, batches):
        """Share of the labels of batches (x, y) that predict() gives the highest probability."""
        batches = list(batches)
        labels = np.concatenate([y for _, y in batches])
        return float((self.predict(batches).argmax(1) == labels).mean())

    def state_dict(self):
        state = {}
        for i, (parameters, buffers) in enumerate(self.tickets):
            model = self._trainer.model
            for (name, _), parameter in zip(model.named_parameters(), parameters, strict=True):
                arrays = checkpoint.parameter_arrays(name, parameter)
                state |= {f"{i}/{key}": array for key, array in arrays.items()}
            for (name, _), buffer in zip(model.named_buffers(), buffers, strict=True):
                state[f"{i}/buffer/{name}"] = buffer
        return state

    def load_state_dict(self, state, trainer):
        tickets, model = [], trainer.model
        for i in range(len({key.partition("/")[0] for key in state})):
            parameters = [
                checkpoint.read_parameter(state, name, p.shape, f"{i}/") for name, p in model.named_parameters()
            ]
            for (name, p), parameter in zip(model.named_parameters(), parameters, strict=True):
                if parameter.data.dtype != p.data.dtype:
                    raise ValueError(f"ticket {i}: {name} is {parameter.data.dtype}, the model's is {p.data.dtype}")
            buffers = [state[f"{i}/buffer/{name}"] for name, _ in model.named_buffers()]
            for (name, b), buffer in zip(model.named_buffers(), buffers, strict=True):
                if (buffer.dtype, buffer.shape) != (b.dtype, b.shape):
                    raise ValueError(
                        f"ticket {i}: {name} is {buffer.dtype} {buffer.shape}, the model's is {b.dtype} {b.shape}"
                    )
            tickets.append((parameters, buffers))
        self.tickets, self._trainer = tickets, trainer

    def _present(self):
        model = self._trainer.model
        return list(model.parameters()), [buffer.copy() for _, buffer in model.named_buffers()]

    def _put(self, ticket):
        parameters, buffers = ticket
        model = self._trainer.model
        for (name, _), parameter in zip(model.named_parameters(), parameters, strict=True):
            model.set_parameter(name, parameter)
        for (_, buffer), values in zip(model.named_buffers(), buffers, strict=True):
            buffer[...] = values
