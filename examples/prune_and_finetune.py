"""Train a dense net, remove 90 % of its weights, the smallest ones, and train what is left."""

import sparsetrain as st
from sparsetrain import data, nn, optim
from sparsetrain.train import EpochLines

images = data.load("fashion-mini")
scale = {"mean": images.mean, "std": images.std}
train = data.Batches(*images.train, 64, shuffle=True, **scale)
test = data.Batches(*images.test, 256, **scale)

st.manual_seed(0)
model = nn.models.small_cnn()
# The optimiser's momentum goes along: sparsify() removes the same entries from it.
optimizer = optim.SGD(model.named_parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
trainer = st.Trainer(model, optimizer, callbacks=[EpochLines()])

trainer.fit(train, epochs=2, validation=test)
dense = trainer.evaluate(test)["accuracy"]

st.sparsify(model, sparsity=0.9, method="magnitude", distribution="erk", exclude=["0"])
pruned = trainer.evaluate(test)["accuracy"]

trainer.schedule = optim.cosine(0.05, trainer.step + 2 * len(train))
trainer.fit(train, epochs=2, validation=test)
finetuned = trainer.evaluate(test)["accuracy"]
print(f"accuracy dense {dense:.3f}, pruned {pruned:.3f}, trained on {finetuned:.3f}")
