"""The training loop."""

import itertools
import math
import time
from contextlib import nullcontext

import numpy as np
from threadpoolctl import threadpool_limits

from sparsetrain import checks, nn
from sparsetrain import sparsity as weights
from sparsetrain.arrays import unpack
from sparsetrain.backprop import Method
from sparsetrain.nn.module import evaluating
from sparsetrain.train import checkpoint
from sparsetrain.train.callbacks import Callback
from sparsetrain.train.history import History


class TrainingDiverged(RuntimeError):
    """A loss or a weight became NaN or infinite."""


class Trainer:
    """Trains a model with an optimiser, and measures it.

    loss: a function (outputs, y) -> (loss, gradient); label_smoothing needs cross_entropy.
    schedule: a function of the step that sets optimizer.lr before each step, or None.
    backprop: a method of `backprop` that says which values of the output gradients are used; None: all, but for
    layers that a method was attached to by hand. sparsity: a method of `sparsity` that says which weights exist, and
    when that changes; None: those that exist now. callbacks: `Callback` objects, called in this order, but those that
    save last.

    Data are batches (x, y) from anything that can be iterated over once an epoch, such as
    `data.Batches`; where it has an `epoch` attribute, that is set before each pass. Accuracy is
    measured where outputs are (N, K) and y is (N,) integers, else it is None.

    `step` and `epoch` count what is done, `batch` what is done of the present epoch; `history` holds a row for each
    epoch.
    """

    def __init__(
        self,
        model,
        optimizer,
        *,
        loss=nn.cross_entropy,
        label_smoothing=0.0,
        schedule=None,
        backprop=None,
        sparsity=None,
        callbacks=(),
    ):
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is a {type(model).__name__}, must be a nn.Module")
        if not isinstance(backprop, (Method, type(None))):
            raise TypeError(f"backprop is a {type(backprop).__name__}, must be a backprop.Method or None")
        if not isinstance(sparsity, (weights.Method, type(None))):
            raise TypeError(f"sparsity is a {type(sparsity).__name__}, must be a method of sparsity or None")
        for callback in callbacks:
            if not isinstance(callback, Callback):
                raise TypeError(f"callbacks holds {callback!r}, which is not a Callback")
        self.model = model
        self.optimizer = optimizer
        self.loss = loss
        self.label_smoothing = checks.number("label_smoothing", label_smoothing, low=0.0, high=1.0)
        if self.label_smoothing and loss is not nn.cross_entropy:
            raise ValueError("label_smoothing is for nn.cross_entropy, loss is another function")
        self.schedule = schedule
        self.backprop = backprop if backprop is None else backprop.attach(model, optimizer)
        try:
            self.sparsity = sparsity if sparsity is None else sparsity.attach(model)
        except ValueError:
            if backprop is not None:
                backprop.detach()
            raise
        self.callbacks = list(callbacks)
        self.history = History()
        self.step = 0
        self.epoch = 0
        self.batch = 0
        self.paused = None  # the state of the Means of an epoch that was left in the middle
        self.stop = False

    def fit(self, train, epochs, validation=None):
        """Train for so many more epochs and return the history of the whole run.

        An epoch that was left in the middle, by Ctrl-C or in a checkpoint, is gone on with, and counts as one.
        validation: batches on which to `evaluate` after each epoch. Ctrl-C ends the run and
        returns the history so far with `interrupted` True. TrainingDiverged, naming the step and
        the layer, when the loss or a weight is not finite; files already written stay. Meanwhile
        the BLAS of NumPy and SciPy has one thread: its pool and ours would starve each other.
        """
        epochs = checks.integer("epochs", epochs, low=1)
        self.history.interrupted = self.stop = False
        try:
            self._call("on_fit_begin", epochs)
            # What is not finite becomes an error below; NumPy's warnings would only come before it.
            with np.errstate(over="ignore", invalid="ignore"), threadpool_limits(1, user_api="blas"):
                for _ in range(epochs):
                    self._epoch(train, validation)
                    if self.stop:
                        break
        except KeyboardInterrupt:
            self.history.interrupted = True
        finally:
            self._call("on_fit_end")
        return self.history

    def train_step(self, x, y):
        """One step on one batch, in the model's present mode; returns the loss and the outputs."""
        if self.schedule is not None:
            self.optimizer.lr = self.schedule(self.step)
        changed = {}
        if self.sparsity is None:
            loss, outputs = self._gradients(x, y)
        else:
            try:
                self.sparsity.begin_step()
                loss, outputs = self._gradients(x, y)
                changed = self.sparsity.end_step()
            except BaseException:
                self.sparsity.cancel_step()
                raise
        self.optimizer.step()
        self.step += 1
        if changed:
            self._call("on_weights_changed", changed)
        return loss, outputs

    def _gradients(self, x, y):
        """Loss and outputs of a batch; leaves the gradients in the parameters."""
        self.optimizer.zero_grad()
        outputs = self.model(x)
        if self.label_smoothing:
            loss, gradient = self.loss(outputs, y, label_smoothing=self.label_smoothing)
        else:
            loss, gradient = self.loss(outputs, y)
        if not math.isfinite(loss):
            raise self._diverged(f"loss is {loss} at step {self.step + 1}", x)
        self.model.backward(gradient, input_gradient=False)
        return loss, outputs

    def evaluate(self, batches):
        """Mean loss (without label smoothing) and accuracy over batches, in evaluation mode.

        Returns {"loss", "accuracy"}. TrainingDiverged if the loss is not finite.
        """
        means = Means()
        with self.effective_weights(), evaluating(self.model):
            for x, y in batches:
                outputs = self.model(x)
                loss, _ = self.loss(outputs, y)
                if not math.isfinite(loss):
                    raise self._diverged(f"evaluation loss is {loss} after step {self.step}", x)
                means.add(loss, outputs, y)
        return means.result("batches")

    def predict(self, data, batch_size=256):
        """Outputs of the model in evaluation mode, (N, K), in the order of the data.

        data: an array of inputs, cut into batches of batch_size, or batches (x, y) or x.
        """
        if isinstance(data, np.ndarray):
            size = checks.integer("batch_size", batch_size, low=1)
            data = [data[i : i + size] for i in range(0, len(data), size)]
        with self.effective_weights(), evaluating(self.model):
            outputs = [self.model(b[0] if isinstance(b, tuple) else b) for b in data]
        if not outputs:
            raise ValueError("data is empty, must hold at least one input")
        return np.concatenate(outputs)

    def effective_weights(self):
        """Within this context, layers have the weights that the method of sparsity means them to have, which NM's are
        not while it trains."""
        return nullcontext() if self.sparsity is None else self.sparsity.applied()

    def save(self, path):
        """Write a checkpoint, replacing path as a whole. See `resume`."""
        checkpoint.save(self, path)

    @classmethod
    def resume(cls, path, model=None, optimizer=None, **settings):
        """The Trainer that was saved at path, ready to go on.

        Going on gives bit for bit what the uninterrupted run gives, in the middle of an epoch too if the data give the
        same batches in each pass of a number, as `data.Batches` do.
        model and optimizer are rebuilt unless given; a given optimizer must hold the given
        model's parameters, and keeps its settings. settings are Trainer's own: label_smoothing
        is restored unless given; a loss of your own and a schedule are functions, which a file
        cannot hold, so give them again. ValueError names the first thing that does not fit, and
        then model and optimizer are untouched.
        """
        return checkpoint.resume(cls, path, model, optimizer, settings)

    def _epoch(self, train, validation):
        if hasattr(train, "epoch"):
            train.epoch = self.epoch
        steps = len(train) if hasattr(train, "__len__") else None
        self._call("on_epoch_begin", steps)
        self.model.train()
        for method in (self.sparsity, self.backprop):
            if method is not None:
                method.begin_epoch(self.epoch, steps, self.batch)
        means = Means(**self.paused) if self.batch else Means()
        for x, y in itertools.islice(train, self.batch, None):
            loss, outputs = self.train_step(x, y)
            means.add(loss, outputs, y)
            self.batch, self.paused = self.batch + 1, means.state()
            self._call("on_batch_end", means.result("train") | means.speed())
        row = {"epoch": self.epoch + 1, "step": self.step} | means.result("train")
        row |= {"val_loss": None, "val_accuracy": None, "lr": self.optimizer.lr}
        row |= means.speed() | {"time_s": means.time_s()}
        self._check_weights()
        if validation is not None:
            row |= {f"val_{name}": value for name, value in self.evaluate(validation).items()}
        row |= self._sparsities()  # last: the reports begin anew, and an epoch whose validation is interrupted goes on
        self.epoch, self.batch = self.epoch + 1, 0
        self.history.append(row)
        self._call("on_epoch_end", row)

    def _sparsities(self):
        """What the methods did in the epoch: for all layers, and for each."""
        sizes = [(p.nnz, math.prod(p.shape)) for p in self.model.parameters() if len(p.shape) > 1]
        row = {"sparsity": 1 - sum(n for n, _ in sizes) / sum(s for _, s in sizes) if sizes else None}
        row["weights"] = {} if self.sparsity is None else self.sparsity.report()
        if self.backprop is None:
            return row | {"gradient_sparsity": None, "layers": {}}
        layers = self.backprop.report()
        values = sum(layer["values"] for layer in layers.values())
        unused = sum(layer["values"] * layer["gradient_sparsity"] for layer in layers.values())
        return row | {"gradient_sparsity": unused / values if values else None, "layers": layers}

    def _call(self, point, *arguments):
        for callback in sorted(self.callbacks, key=lambda callback: callback.saves):
            getattr(callback, point)(self, *arguments)

    def _check_weights(self):
        for name, parameter in self.model.named_parameters():
            if not np.isfinite(parameter.data).all():
                raise TrainingDiverged(f"{name} is no longer finite after step {self.step}")

    def _diverged(self, what, x):
        """The error for a loss that is not finite, with the first place where that shows."""
        where = "the loss, every layer's output is finite"
        if not np.isfinite(x).all():
            where = "the input batch"
        else:
            found = []

            def look(name, module, phase, seconds, y):
                if not found and not np.isfinite(unpack(y)).all():
                    whole = all(np.isfinite(p.data).all() for p in module.parameters())
                    why = "" if whole else ", whose parameters are no longer finite"
                    found.append(f"the output of layer {name} ({type(module).__name__}){why}")

            with nn.no_grad(), nn.observe(self.model, look):
                self.model(x)
            where = found[0] if found else where
        return TrainingDiverged(f"{what} (epoch {self.epoch + 1}); first not finite: {where}")


class Means:
    """Running means of loss and accuracy over the images of an epoch, and their speed."""

    def __init__(self, images=0, loss=0.0, correct=0, time_s=0.0):
        self.images, self.loss, self.correct = images, loss, correct
        self.start = time.perf_counter() - time_s

    def state(self):
        """Arguments for one that goes on from here."""
        return {"images": self.images, "loss": self.loss, "correct": self.correct, "time_s": self.time_s()}

    def add(self, loss, outputs, y):
        self.images += len(outputs)
        self.loss += float(loss) * len(outputs)
        if self.correct is not None and outputs.ndim == 2 and y.ndim == 1 and y.dtype.kind in "iu":
            self.correct += int((outputs.argmax(axis=1) == y).sum())
        else:
            self.correct = None

    def result(self, argument):
        if self.images == 0:
            raise ValueError(f"{argument} gave no batches, must give at least one")
        accuracy = None if self.correct is None else self.correct / self.images
        return {"loss": self.loss / self.images, "accuracy": accuracy}

    def time_s(self):
        return time.perf_counter() - self.start

    def speed(self):
        return {"images_per_s": self.images / self.time_s()}
