"""What happens around the training loop: progress, log, checkpoints, early stopping."""

import shutil
import sys
from pathlib import Path

from tqdm import tqdm

from sparsetrain import checks
from sparsetrain.files import replacing
from sparsetrain.train import checkpoint

MONITORS = ("loss", "accuracy", "val_loss", "val_accuracy")


class Callback:
    """Does nothing at each point of a run; subclass it and write the methods you need.

    row is the epoch's row of the history; mean holds loss, accuracy and images_per_s of the epoch
    up to this batch; layers is what a method of sparsity just did: {layer: {"weights", "nnz", "sparsity", "dropped",
    "grown"}}. Set `trainer.stop = True` to end the run after the epoch. What a callback must remember when a run
    is resumed it gives as {name: array} in state_dict(), and takes back, if it is given to Trainer.resume, in
    load_state_dict(), before the trainer has its counters: ValueError there if it does not fit. Callbacks that save are
    called after all others, so that what is saved has what these did.
    """

    saves = False

    def on_fit_begin(self, trainer, epochs): ...

    def on_epoch_begin(self, trainer, batches): ...

    def on_weights_changed(self, trainer, layers): ...

    def on_batch_end(self, trainer, mean): ...

    def on_epoch_end(self, trainer, row): ...

    def on_fit_end(self, trainer): ...

    def state_dict(self):
        return {}

    def load_state_dict(self, state, trainer): ...


class EpochLines(Callback):
    """Prints a line an epoch: loss, accuracy, images/s."""

    def __init__(self, label=""):
        self.label = label
        self.last = None  # the run's last epoch

    def on_fit_begin(self, trainer, epochs):
        self.last = trainer.epoch + epochs

    def on_epoch_end(self, trainer, row):
        print(f"{self.title(row['epoch'])}: {_measures(row)}", flush=True)

    def title(self, epoch):
        """The start of an epoch's line."""
        return f"{self.label} epoch {epoch}/{self.last}".strip()


class Progress(EpochLines):
    """On a terminal a bar during each epoch and a line after it; nothing anywhere else."""

    def __init__(self, verbose=True, label="", file=None):
        super().__init__(label)
        self.file = sys.stderr if file is None else file
        self.shown = verbose and self.file.isatty()
        self.bar = None

    def on_epoch_begin(self, trainer, batches):
        # tqdm shows nothing on a terminal that gives its size as 0
        columns, rows = shutil.get_terminal_size()
        self.bar = tqdm(
            total=batches,
            desc=self.title(trainer.epoch + 1),
            disable=not self.shown,
            file=self.file,
            leave=False,
            bar_format="{desc} |{bar:10}| {elapsed}{postfix}",
            ncols=columns,
            nrows=rows,
        )

    def on_batch_end(self, trainer, mean):
        self.bar.set_postfix_str(_measures(mean), refresh=False)
        self.bar.update()

    def on_epoch_end(self, trainer, row):
        self.bar.close()
        if self.shown:
            print(f"{self.bar.desc}: {_measures(row)}", file=self.file, flush=True)

    def on_fit_end(self, trainer):
        if self.bar is not None:
            self.bar.close()


class CSVLog(Callback):
    """Writes the history to a CSV file after every epoch, as a whole."""

    def __init__(self, path):
        self.path = path

    def on_epoch_end(self, trainer, row):
        trainer.history.write_csv(self.path)


class Checkpoint(Callback):
    """Saves the run: before the first epoch, unless path has just that, and after every so many, or after each best
    epoch.

    best: None, or the column whose best value so far an epoch must reach to be saved. steps: also save after every so
    many steps. keep: how many files, the one at path and those it replaced: <name>-1.<suffix> is the last but one.
    """

    saves = True

    def __init__(self, path, best=None, every=1, steps=None, keep=1):
        self.path = Path(path)
        self.best = best if best is None else checks.one_of("best", best, MONITORS)
        self.every = checks.integer("every", every, low=1)
        self.steps = steps if steps is None else checks.integer("steps", steps, low=1)
        self.keep = checks.integer("keep", keep, low=1)

    def on_fit_begin(self, trainer, epochs):
        if self.best is None and not self._is_saved(trainer):
            self._save(trainer)

    def on_batch_end(self, trainer, mean):
        if self.steps is not None and trainer.step % self.steps == 0:
            self._save(trainer)

    def on_epoch_end(self, trainer, row):
        if self.best is not None:
            due = trainer.history.best(self.best) == len(trainer.history) - 1
        else:
            due = row["epoch"] % self.every == 0
        if due:
            self._save(trainer)

    def _is_saved(self, trainer):
        """Whether path has this very state, as after Trainer.resume(path) or between two calls of fit()."""
        return self.path.exists() and self.path.read_bytes() == checkpoint.contents(trainer)

    def _save(self, trainer):
        if self.keep == 1 or not self.path.exists():
            trainer.save(self.path)
            return
        with replacing(self._older(1), "wb") as last:
            with open(self.path, "rb") as file:
                shutil.copyfileobj(file, last)  # path itself is there all the time
            trainer.save(self.path)
            for i in range(self.keep - 1, 1, -1):
                if self._older(i - 1).exists():
                    self._older(i - 1).replace(self._older(i))

    def _older(self, i):
        return self.path.with_stem(f"{self.path.stem}-{i}")


class EarlyStopping(Callback):
    """Ends the run when the monitored column had no new best value for so many epochs."""

    def __init__(self, patience, monitor="val_loss"):
        self.patience = checks.integer("patience", patience, low=1)
        self.monitor = checks.one_of("monitor", monitor, MONITORS)

    def on_epoch_end(self, trainer, row):
        since = len(trainer.history) - 1 - trainer.history.best(self.monitor)
        trainer.stop = trainer.stop or since >= self.patience


def _measures(row):
    formats = {
        "loss": "loss {:.3f}",
        "accuracy": "accuracy {:.3f}",
        "images_per_s": "{:,.0f} images/s",
        "val_loss": "validation loss {:.3f}",
        "val_accuracy": "accuracy {:.3f}",
    }
    return ", ".join(text.format(row[name]) for name, text in formats.items() if row.get(name) is not None)
