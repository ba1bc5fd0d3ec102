"""What `sparsetrain train` does for the sparse net, in Python: the same run, bit for bit."""

import sparsetrain as st
from sparsetrain import data, nn, optim
from sparsetrain.train import EpochLines

images = data.load("fashion-mini")
scale = {"mean": images.mean, "std": images.std}
train = data.Batches(*images.train, 64, shuffle=True, **scale)
test = data.Batches(*images.test, 256, **scale)

st.manual_seed(0)
model = st.sparsify(nn.models.small_cnn(), sparsity=0.9, exclude=["0"])
optimizer = optim.SGD(model.named_parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
schedule = optim.warmup(optim.cosine(0.1, 8 * len(train)), len(train))
trainer = st.Trainer(model, optimizer, schedule=schedule, callbacks=[EpochLines()])
history = trainer.fit(train, epochs=8, validation=test)
print(model.summary(images.train[0].shape[1:]))
print(f"test accuracy {history[-1]['val_accuracy']:.3f}")
