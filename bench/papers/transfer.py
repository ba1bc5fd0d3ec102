"""Fine-tuning: a pretrained ResNet-20 is pruned while it trains on, and its zeros are kept under a new head.

The second use of SparseProp, arXiv 2302.04852, section 4. prune-<sparsity>: GMP, every 100 steps of the first half of
the run, ERK, the first layer dense, lr 0.05. zeros-<sparsity>: from what that left the last layer drawn anew, and only
the stored weights trained, in a quarter of the epochs at lr 0.02. The weights are those of
github.com/akamaster/pytorch_resnet_cifar10 (resnet20-12fca82f.th, 91.73 %); the states that end a run of prune are
written to --states, for bench/train.py --weights.
"""

from dataclasses import asdict, replace
from pathlib import Path

import common
import numpy as np

from sparsetrain import Trainer, data, interchange, manual_seed, named, optim, sparsity
from sparsetrain.train import Progress

FILE = Path("weights", "resnet20-12fca82f.th")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the images that the weights were trained on
SPARSITIES = (0.9, 0.95)
EPOCHS, SHARE = 20, 4  # zeros- has a SHARE-th of the epochs
LR = {"prune": 0.05, "zeros": 0.02}
RECIPE = replace(common.RECIPES["resnet20"], epochs=EPOCHS)


def main():
    folder = next((p.folder for p in data.where("cifar10") if (p.folder / FILE).is_file()), Path())
    options = common.parse(
        __doc__,
        seeds=[0, 1, 2],
        epochs=f"{EPOCHS}; zeros- a quarter of it",
        quick_only=["*/0"],
        more={
            "--weights": {"type": Path, "default": folder / FILE, "help": f"default {FILE} in the data folder"},
            "--states": {"type": Path, "default": Path("runs"), "help": "folder of the pruned states; default runs"},
        },
    )
    runs, found = common.Runs(options), {}
    for share in SPARSITIES:
        for kind in LR:
            for seed in options.seeds:
                record = one_run(runs, options, kind, share, seed)
                if record is not None:
                    found.setdefault(f"{kind}-{share:g}", []).append(record)
    print_table(found)
    common.draw(options, "transfer", "Pruned while fine-tuned", (1, 1), lambda axes: plot(axes[0][0], found))


def one_run(runs, options, kind, share, seed):
    """The record of a run, None if it is not finished and may not be started."""
    model, recipe = ("small-cnn", common.recipe(options, "small-cnn")) if options.quick else ("resnet20-a", RECIPE)
    epochs = options.epochs or recipe.epochs
    recipe = replace(recipe, epochs=epochs if kind == "prune" else -(-epochs // SHARE), lr=LR[kind])
    name, pruned = f"{model}/{kind}-{share:g}/{seed}", options.states / f"{model}-pruned-{share:g}-{seed}.safetensors"
    weights = pruned if kind == "zeros" else options.weights
    settings = {"model": model, **asdict(recipe), "seed": seed, "sparsity": share, "weights": weights.name}

    def work():
        images = common.load(recipe.data, recipe.images)
        scale = {"mean": images.mean, "std": images.std} if options.quick else {"mean": MEAN, "std": STD}
        augment = {"crop": recipe.crop, "flip": recipe.flip}
        train = data.Batches(*images.train, recipe.batch, shuffle=True, seed=seed, **augment, **scale)
        test = data.Batches(*images.test, 256, **scale)
        manual_seed(seed)
        net = named.model(model, images.train[0].shape[1:], len(images.classes))
        if kind == "zeros" or not options.quick:
            interchange.load_state(net, interchange.read_state(weights), head="new" if kind == "zeros" else "keep")
        method, steps = None, recipe.epochs * len(train)
        if kind == "zeros":
            interchange.zeros_to_structure(net)
        else:
            times = {"stop": steps // 2, "every": min(100, max(1, steps // 4))}
            method = sparsity.GMP(share, distribution="erk", exclude=named.layers(["first"], net), **times)
        rates = {"lr": recipe.lr, "momentum": common.MOMENTUM, "weight_decay": common.WEIGHT_DECAY}
        optimizer = optim.SGD(net.named_parameters(), **rates)
        schedule = optim.warmup(optim.cosine(recipe.lr, steps), len(train))
        trainer = Trainer(net, optimizer, schedule=schedule, sparsity=method, callbacks=[Progress(label=name)])
        before = trainer.evaluate(test)["accuracy"]
        result = common.fit(trainer, train, recipe.epochs, test)
        if kind == "prune":
            options.states.mkdir(parents=True, exist_ok=True)
            interchange.write_state(pruned, net)
        return {"before": before, "sparsity_at_end": result["weight_sparsity"][-1], **result}

    return runs.get(name, settings, work)


def print_table(found):
    """Accuracy before and after, and what is stored."""
    rows = []
    for name, records in found.items():
        mean, error = common.mean_and_error(common.accuracies(records))
        before, stored = (100 * np.mean([r[key] for r in records]) for key in ("before", "sparsity_at_end"))
        rows.append([name, str(len(records)), f"{before:.2f}", f"{mean:.2f}", f"{error:.2f}", f"{stored:.2f}"])
    if rows:
        print("\n" + common.bench.table(["", "runs", "before %", "accuracy %", "s.e.", "sparsity %"], rows))


def plot(ax, found):
    """Accuracy over the epochs."""
    for i, (name, records) in enumerate(found.items()):
        correct = 100 * np.mean([r["val_accuracy"] for r in records], axis=0)
        ax.plot(range(1, len(correct) + 1), correct, color=f"C{i}", marker=".", label=name)
    ax.set_xlabel("epoch")
    ax.set_ylabel("test accuracy, %")
    if found:
        ax.legend(fontsize=7)


if __name__ == "__main__":
    main()
