"""What a run measured, one row an epoch."""

import csv
from pathlib import Path

from sparsetrain import checks
from sparsetrain.files import replacing

COLUMNS = (
    "epoch",
    "step",
    "loss",
    "accuracy",
    "val_loss",
    "val_accuracy",
    "lr",
    "images_per_s",
    "time_s",
    "sparsity",
    "gradient_sparsity",
)
# Of what a row has for each layer: where it is in the row, and its columns
BY_LAYER = {
    "layers": ("epoch", "layer", "gradient_sparsity", "ms", "angle", "clipped"),
    "weights": ("epoch", "layer", "weights", "nnz", "sparsity", "dropped", "grown", "explored"),
}


class History(list):
    """A list of dicts, one an epoch, with the keys COLUMNS; None where nothing was measured.

    epoch counts from 1; step is the number of steps so far; loss and accuracy are means over the
    epoch's training batches as they went by; lr is the last step's; time_s and images_per_s
    count the training alone. gradient_sparsity is the share of all layers' output gradients that was not used, where
    a method of backprop left some out; a row's "layers" then has {layer: what its report() says}. sparsity is the share
    of the weights of convolutions and linear layers that is not stored; a row's "weights" has what a method of sparsity
    reports. `interrupted` is True after Ctrl-C.
    """

    interrupted = False

    def column(self, name):
        """The values of one column, a list."""
        checks.one_of("column", name, COLUMNS)
        return [row[name] for row in self]

    def best(self, monitor):
        """Index of the best row: highest where monitor is an accuracy, else lowest; first wins."""
        values = self.column(monitor)
        if not values or None in values:
            raise ValueError(f"{monitor} was not measured: give fit() a validation set")
        return values.index((max if monitor.endswith("accuracy") else min)(values))

    def write_csv(self, path):
        """Write all rows as CSV, replacing path as a whole; what methods say of each layer, if there are any, beside it
        as <name>-layers.csv (backprop) and <name>-weights.csv (sparsity)."""
        _write(path, COLUMNS, self)
        for part, columns in BY_LAYER.items():
            rows = [
                {"epoch": row["epoch"], "layer": name, **values}
                for row in self
                for name, values in row.get(part, {}).items()
            ]
            if rows:
                _write(Path(path).with_stem(f"{Path(path).stem}-{part}"), columns, rows)


def _write(path, columns, rows):
    with replacing(path) as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
