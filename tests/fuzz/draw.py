"""Draws networks, plans and batch sizes: a `Case` is a script that can be run, and made smaller, statement by statement."""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import parafit  # noqa: F401  # isort: skip  (chooses Keras' backend, so it comes first)

import keras

_HEADER = """\
import parafit
import jax
import jax.numpy as jnp
import keras
import numpy as np
from keras import layers, ops
{imports}
from tests.fuzz.compare import compare

rng = np.random.default_rng(0)
"""

_NNX = """\
import optax
from flax import nnx
from optax import softmax_cross_entropy_with_integer_labels as entropy
from parafit.nnx import Trainable"""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A network, its data, and how to run it.

    Attributes:
        kind: "keras" or "nnx".
        inputs: statements that make the inputs; all of them are needed.
        hidden: statements, each of which makes a variable from others and may be left out.
        heads: the rest of the network's statements.
        data: expressions of x and y.
        plan, batch_size: as in `parafit.fit`.
        single: whether part of the network computes in float32.
    """

    kind: str
    inputs: tuple[str, ...]
    hidden: tuple[tuple[str, str, str], ...]
    heads: tuple[str, ...]
    data: tuple[str, str]
    plan: str
    batch_size: int
    single: bool = False

    @property
    def definition(self) -> str:
        """The statements that define `make`, `x` and `y`."""
        hidden = [f"{target} = {expression}" for target, expression, _ in self.hidden]
        body = [*self.inputs, *hidden, *self.heads]
        imports = _NNX if self.kind == "nnx" else ""
        lines = "\n".join(f"    {line}" for line in body)
        return f"{_HEADER.format(imports=imports)}x = {self.data[0]}\ny = {self.data[1]}\n\n\ndef make():\n{lines}\n    return model\n"

    @property
    def script(self) -> str:
        """A script that shows the case."""
        start = "import jax\n\njax.config.update('jax_num_cpu_devices', 8)\njax.config.update('jax_enable_x64', True)\n"
        call = f"compare(make, x, y, plan={self.plan!r}, batch_size={self.batch_size}, single={self.single})"
        return f"{start}{self.definition}\n\nkeras.config.set_floatx('float64')\nprint({call})\n"

    def smaller(self) -> Iterator["Case"]:
        """The same with one thing less, the largest things first."""
        for index, (target, _, source) in enumerate(self.hidden):
            renamed = tuple(
                (name, _renamed(text, target, source), _renamed(of, target, source)) for name, text, of in self.hidden[index + 1 :]
            )
            heads = tuple(_renamed(text, target, source) for text in self.heads)
            yield replace(self, hidden=(*self.hidden[:index], *renamed), heads=heads)
        words = self.plan.split(",")
        for index in range(len(words) if len(words) > 1 else 0):
            yield replace(self, plan=",".join(words[:index] + words[index + 1 :]))
        for size in (1, 2, 3, 5, 6, 7):
            if size < self.batch_size:
                yield replace(self, batch_size=size)


def draw(seed: int) -> Case:
    """The case of a seed: the same every time."""
    chance = random.Random(seed)
    return (_nnx if chance.random() < 0.25 else _keras)(chance)


def _renamed(text: str, old: str, new: str) -> str:
    return re.sub(rf"\b{old}\b", new, text)


# Plans --------------------------------------------------------------------------------------------------------------------------------


def _plan(chance: random.Random) -> str:
    data, tensor = chance.choice([(2, 1), (3, 1), (4, 1), (8, 1), (1, 2), (1, 4), (2, 2), (2, 2), (2, 4), (4, 2), (3, 2), (2, 3), (5, 1)])
    words = [f"data={data}"] if data > 1 else []
    words += [f"tensor={tensor}"] if tensor > 1 else []
    if data > 1 and chance.random() < 0.4:
        words.append(f"zero={chance.randint(1, 3)}")
        if data in (4, 8) and chance.random() < 0.3:
            words.append("store_group=2")
    if chance.random() < 0.25:
        words.append(f"microbatches={chance.randint(2, 4)}")
        if chance.random() < 0.4:
            words.append("statistics=microbatch")
    if chance.random() < 0.15:
        words.append("recompute=blocks")
    return ",".join(words)


# Keras --------------------------------------------------------------------------------------------------------------------------------

_ROWS = 23

_INPUTS = {
    "vector": ["(12,)", "(8,)", "(15,)"],
    "sequence": ["(6, 4)", "(9, 3)", "(8, 8)"],
    "image": ["(8, 8, 3)", "(7, 9, 2)", "(6, 6, 4)"],
    "volume": ["(4, 4, 5, 2)"],
    "tokens": ["(6,)", "(5,)", "(8,)"],
}

_ACTIVATIONS = ("relu", "tanh", "gelu", "sigmoid", "softmax", "elu", "swish", "linear", "softplus")
_REGULARISED = (
    "",
    "",
    ", kernel_regularizer='l2'",
    ", bias_regularizer='l1'",
    ", activity_regularizer=keras.regularizers.L2(1e-3)",
    ", kernel_constraint=keras.constraints.MaxNorm(1.0)",
    ", kernel_constraint='non_neg'",
    ", kernel_regularizer=keras.regularizers.OrthogonalRegularizer(1e-3)",
    ", kernel_constraint=keras.constraints.UnitNorm()",
    ", use_bias=False",
)

_ANY = (
    "layers.BatchNormalization()({0})",
    "layers.LayerNormalization()({0})",
    "layers.UnitNormalization()({0})",
    "layers.Dropout(0.3)({0})",
    "layers.GaussianNoise(0.1)({0})",
    "layers.GaussianDropout(0.2)({0})",
    "layers.AlphaDropout(0.2)({0})",
    "layers.LeakyReLU()({0})",
    "layers.PReLU()({0})",
    "layers.ReLU(max_value=1.0)({0})",
    "layers.Softmax()({0})",
    "layers.ActivityRegularization(l2=1e-3)({0})",
    "layers.Rescaling(0.5, 0.1)({0})",
    "layers.Dense({units}, '{activation}'{regularised})({0})",
    "layers.Dense({units}, '{activation}')({0})",
    "layers.EinsumDense('...a,ab->...b', output_shape=({units},), activation='{activation}')({0})",
    "layers.Lambda(lambda t: ops.sort(t, axis=-1))({0})",
    "layers.Lambda(lambda t: ops.cumsum(t, axis=-1))({0})",
    "layers.Lambda(lambda t: ops.flip(t, axis=-1))({0})",
    "layers.Lambda(lambda t: ops.roll(t, 1, axis=-1))({0})",
    "layers.Lambda(lambda t: t - ops.median(t, axis=-1, keepdims=True))({0})",
    "layers.Lambda(lambda t: t[..., 1:])({0})",
    "layers.Lambda(lambda t: t[..., ::2])({0})",
    "layers.Lambda(lambda t: ops.concatenate([t, t[..., :1]], axis=-1))({0})",
    "layers.Lambda(lambda t: ops.top_k(t, 3)[0])({0})",
    "layers.Lambda(lambda t: ops.take_along_axis(t, ops.argsort(t, axis=-1), axis=-1))({0})",
    "layers.Lambda(lambda t: t - ops.mean(t, axis=0, keepdims=True))({0})",
    "layers.Lambda(lambda t: t * ops.cast(ops.arange(ops.shape(t)[-1]), t.dtype))({0})",
    "layers.Lambda(lambda t: ops.logsumexp(t, axis=-1, keepdims=True) - t)({0})",
)

_LAYERS = {
    "vector": (
        "layers.Dense({units}, '{activation}'{regularised})({0})",
        "layers.Dense({units}, '{activation}'{regularised})({0})",
        "layers.SpectralNormalization(layers.Dense({units}))({0})",
        "layers.RepeatVector(3)({0})",
        "layers.Reshape((-1, 2))({0})",
        "layers.Reshape((2, -1))({0})",
        "layers.Reshape((2, 2, -1))({0})",
        "layers.GroupNormalization(2)({0})",
        "layers.Lambda(lambda t: ops.segment_sum(ops.transpose(t), ops.arange(ops.shape(t)[1]) % 3, 3).T)({0})",
    ),
    "sequence": (
        "layers.LSTM({units}, return_sequences=True)({0})",
        "layers.LSTM({units})({0})",
        "layers.GRU({units}, recurrent_dropout=0.0)({0})",
        "layers.GRU({units}, return_sequences=True, go_backwards=True)({0})",
        "layers.SimpleRNN({units})({0})",
        "layers.Bidirectional(layers.LSTM({units}, return_sequences=True))({0})",
        "layers.Bidirectional(layers.GRU({units}), merge_mode='sum')({0})",
        "layers.Conv1D({units}, 3, padding='causal', activation='{activation}')({0})",
        "layers.Conv1D({units}, 2, strides=2, padding='same')({0})",
        "layers.Conv1D({units}, 2, dilation_rate=2)({0})",
        "layers.SeparableConv1D({units}, 3, padding='same')({0})",
        "layers.DepthwiseConv1D(2, depth_multiplier=2)({0})",
        "layers.Conv1DTranspose({units}, 2, strides=2)({0})",
        "layers.MaxPooling1D(2)({0})",
        "layers.AveragePooling1D(2, padding='same')({0})",
        "layers.GlobalMaxPooling1D()({0})",
        "layers.GlobalAveragePooling1D()({0})",
        "layers.UpSampling1D(2)({0})",
        "layers.ZeroPadding1D(1)({0})",
        "layers.Cropping1D(1)({0})",
        "layers.MultiHeadAttention(2, 3, dropout=0.1)({0}, {0})",
        "layers.MultiHeadAttention(4, 2)({0}, {0})",
        "layers.MultiHeadAttention(2, 4)({0}, {0}, use_causal_mask=True)",
        "layers.GroupQueryAttention(2, 4, 2, dropout=0.1)({0}, {0})",
        "layers.Attention()([{0}, {0}])",
        "layers.AdditiveAttention()([{0}, {0}])",
        "layers.TimeDistributed(layers.Dense({units}, '{activation}'))({0})",
        "layers.SpatialDropout1D(0.3)({0})",
        "layers.Permute((2, 1))({0})",
        "layers.Flatten()({0})",
        "layers.Masking(0.1)({0})",
        "layers.EinsumDense('abc,cd->abd', output_shape=(None, {units}), bias_axes='d')({0})",
        "layers.Lambda(lambda t: ops.cumsum(t, axis=1))({0})",
        "layers.Lambda(lambda t: ops.sort(t, axis=1))({0})",
        "layers.Lambda(lambda t: ops.max(t, axis=1) - ops.min(t, axis=1))({0})",
    ),
    "image": (
        "layers.Conv2D({units}, 3, padding='same', activation='{activation}'{regularised})({0})",
        "layers.Conv2D({units}, 2, strides=2)({0})",
        "layers.Conv2D({units}, 3, dilation_rate=2, padding='same')({0})",
        "layers.Conv2D({units}, 1)({0})",
        "layers.DepthwiseConv2D(3, padding='same', depth_multiplier=2)({0})",
        "layers.SeparableConv2D({units}, 2)({0})",
        "layers.Conv2DTranspose({units}, 3, strides=2, padding='same')({0})",
        "layers.MaxPooling2D(2)({0})",
        "layers.AveragePooling2D(2, padding='same')({0})",
        "layers.MaxPooling2D(3, strides=1)({0})",
        "layers.UpSampling2D(2, interpolation='bilinear')({0})",
        "layers.UpSampling2D(2)({0})",
        "layers.ZeroPadding2D(1)({0})",
        "layers.Cropping2D(1)({0})",
        "layers.GlobalAveragePooling2D()({0})",
        "layers.GlobalMaxPooling2D()({0})",
        "layers.SpatialDropout2D(0.3)({0})",
        "layers.GroupNormalization(1)({0})",
        "layers.Flatten()({0})",
        "layers.Reshape((-1, 2))({0})",
        "layers.RandomFlip()({0})",
        "layers.RandomContrast(0.2)({0})",
        "layers.CenterCrop(4, 4)({0})",
        "layers.Resizing(5, 5)({0})",
    ),
    "volume": (
        "layers.Conv3D({units}, 2, activation='{activation}')({0})",
        "layers.MaxPooling3D(2)({0})",
        "layers.AveragePooling3D(2)({0})",
        "layers.GlobalAveragePooling3D()({0})",
        "layers.ConvLSTM2D({units}, 2, padding='same')({0})",
        "layers.Flatten()({0})",
        "layers.UpSampling3D(2)({0})",
        "layers.Conv3DTranspose({units}, 2)({0})",
    ),
    "tokens": (
        "layers.Embedding(11, {units})({0})",
        "layers.Embedding(11, {units}, mask_zero=True)({0})",
        "layers.CategoryEncoding(11)({0})",
    ),
}

_MERGES = ("Add", "Multiply", "Average", "Maximum", "Minimum", "Subtract", "Concatenate")

_OPTIMIZERS = (
    "SGD(0.05)",
    "SGD(0.05, momentum=0.9, nesterov=True)",
    "SGD(0.05, clipnorm=0.5)",
    "Adam(0.01)",
    "Adam(0.01, amsgrad=True, global_clipnorm=1.0)",
    "AdamW(0.01, weight_decay=0.01)",
    "RMSprop(0.01, centered=True, momentum=0.5)",
    "Adagrad(0.05)",
    "Adadelta(0.5)",
    "Adamax(0.01)",
    "Nadam(0.01)",
    "Ftrl(0.05)",
    "Lion(0.001)",
    "Lamb(0.01)",
    "Adafactor(0.01)",
    "Muon(0.01)",
    "SGD(0.05, use_ema=True, ema_overwrite_frequency=2)",
    "Adam(0.01, gradient_accumulation_steps=2)",
    "SGD(keras.optimizers.schedules.CosineDecay(0.1, 5))",
)

_HEADS = {
    "classes": (
        "layers.Dense(3, 'softmax')",
        ("'sparse_categorical_crossentropy'", "keras.losses.SparseCategoricalCrossentropy()"),
        ("'accuracy'", "keras.metrics.SparseTopKCategoricalAccuracy(2)", "keras.metrics.MeanIoU(3, sparse_y_pred=False)"),
        "rng.integers(0, 3, {rows})",
    ),
    "one_hot": (
        "layers.Dense(4, 'softmax')",
        ("'categorical_crossentropy'", "keras.losses.CategoricalFocalCrossentropy()", "'kl_divergence'", "'categorical_hinge'"),
        ("keras.metrics.OneHotMeanIoU(4)", "keras.metrics.F1Score()", "keras.metrics.AUC(20)", "keras.metrics.Precision(top_k=2)"),
        "np.eye(4)[rng.integers(0, 4, {rows})]",
    ),
    "binary": (
        "layers.Dense(1, 'sigmoid')",
        ("'binary_crossentropy'", "keras.losses.BinaryFocalCrossentropy()", "'hinge'"),
        ("keras.metrics.AUC()", "keras.metrics.BinaryIoU()", "keras.metrics.PrecisionAtRecall(0.5)", "keras.metrics.Recall()"),
        "rng.integers(0, 2, ({rows}, 1))",
    ),
    "labels": (
        "layers.Dense(5, 'sigmoid')",
        ("'binary_crossentropy'", "keras.losses.Dice()", "keras.losses.Tversky()"),
        ("keras.metrics.AUC(multi_label=True)", "keras.metrics.F1Score(average='micro')", "keras.metrics.BinaryIoU()", "'binary_accuracy'"),
        "rng.integers(0, 2, ({rows}, 5))",
    ),
    "number": (
        "layers.Dense(2)",
        ("'mse'", "'mae'", "keras.losses.Huber(0.5)", "'log_cosh'", "'cosine_similarity'"),
        ("'mae'", "keras.metrics.R2Score()", "keras.metrics.RootMeanSquaredError()", "keras.metrics.CosineSimilarity()"),
        "rng.normal(size=({rows}, 2))",
    ),
}


def _keras(chance: random.Random) -> Case:
    """A graph grown statement by statement; a statement that Keras refuses is thrown away."""
    names = ["a", "b"][: chance.choice([1, 1, 2])]
    kinds = {name: chance.choice(list(_INPUTS)) for name in names}
    inputs, data = [], []
    for name, kind in kinds.items():
        shape = chance.choice(_INPUTS[kind])
        inputs.append(f"{name} = keras.Input({shape}, name={name!r}" + (", dtype='int32')" if kind == "tokens" else ")"))
        size = f"({_ROWS}, *{shape})"
        data.append(f"{name!r}: rng.integers(0, 11, {size})" if kind == "tokens" else f"{name!r}: rng.normal(size={size})")
    grown = _Graph(chance, inputs, names)
    for _ in range(chance.randint(2, 6)):
        grown.grow()
    ends = grown.vectors(2 if chance.random() < 0.25 else 1)
    heads, losses, metrics, targets = [], [], [], []
    for index, end in enumerate(ends):
        layer, some, measured, labels = _HEADS[chance.choice(list(_HEADS))]
        heads.append(f"out{index} = {layer[:-1]}, name='out{index}')({end})")
        losses.append(f"'out{index}': {chance.choice(some)}")
        metrics.append(f"'out{index}': [{', '.join(chance.sample(measured, 2))}]")
        targets.append(f"'out{index}': {labels.format(rows=_ROWS)}")
    outputs = ", ".join(f"'out{index}': out{index}" for index in range(len(ends)))
    optimizer = f"keras.optimizers.{chance.choice(_OPTIMIZERS)}"
    heads.append(f"model = keras.Model({{{', '.join(f'{name!r}: {name}' for name in names)}}}, {{{outputs}}})")
    heads.append(f"model.compile({optimizer}, {{{', '.join(losses)}}}, metrics={{{', '.join(metrics)}}})")
    return Case(
        kind="keras",
        inputs=tuple(inputs),
        hidden=tuple(grown.hidden),
        heads=tuple(heads),
        data=(f"{{{', '.join(data)}}}", f"{{{', '.join(targets)}}}"),
        plan=_plan(chance),
        batch_size=chance.choice([4, 8, 8, 5, 7, 6, 16, 11, 23, 1]),
        single=any("Attention" in text for _, text, _ in grown.hidden),
    )


class _Graph:
    """Statements over Keras' symbolic tensors, with the tensors that they make."""

    def __init__(self, chance: random.Random, inputs: list[str], names: list[str]):
        self._chance, self._count = chance, 0
        self.hidden: list[tuple[str, str, str]] = []
        self._space: dict = {}
        exec("import keras\nfrom keras import layers, ops\n" + "\n".join(inputs), self._space)
        self._open = list(names)
        self._shared: list[tuple[str, tuple]] = []

    def grow(self) -> None:
        """One more layer, on what no layer reads yet rather than on what one does; at times two are joined, or a layer is used again."""
        source = self._chance.choice(self._open)
        kind = self._kind(source)
        if kind != "tokens" and len(self._open) > 1 and self._chance.random() < 0.3:
            other = self._chance.choice([name for name in self._open if name != source])
            if self._try(f"layers.{self._chance.choice(_MERGES)}()([{source}, {other}])", source, uses=(source, other)):
                return
        templates = _LAYERS[kind] if kind == "tokens" or self._chance.random() < 0.65 else _ANY
        options = {
            "units": self._chance.choice([4, 5, 6, 8, 12, 16]),
            "activation": self._chance.choice(_ACTIVATIONS),
            "regularised": self._chance.choice(_REGULARISED),
        }
        text = self._chance.choice(templates).format(source, **options)
        if self._chance.random() < 0.15 and text.startswith("layers.Dense"):
            # The same layer twice: on its input, and on its own output where that has the width.
            width = self._space[source].shape[-1]
            text = f"(lambda layer: layer(layer({source})))(layers.Dense({width}, 'tanh'))"
        keep = self._chance.random() < 0.25
        self._try(text, source, uses=() if keep else (source,))

    def vectors(self, count: int) -> list[str]:
        """Variables of shape (batch, features) to put heads on."""
        ends = []
        for name in (self._open * 2)[-count:]:
            while self._kind(name) != "vector":
                first = {"tokens": "layers.Embedding(11, 8)({0})", "sequence": "layers.GlobalAveragePooling1D()({0})"}
                text = first.get(self._kind(name), "layers.Flatten()({0})").format(name)
                assert self._try(text, name, uses=(name,)), text
                name = self.hidden[-1][0]
            ends.append(name)
        return ends

    def _try(self, text: str, source: str, *, uses) -> bool:
        target = f"h{self._count}"
        try:
            with keras.StatelessScope():  # variables without values: nothing is computed
                made = eval(text, self._space)
            if not (1 < len(made.shape) < 6 and all(made.shape[1:]) and _size(made.shape) <= 4096):
                return False
        except Exception:
            return False
        self._count += 1
        self._space[target] = made
        self._open = [name for name in self._open if name not in uses] + [target]
        self.hidden.append((target, text, source))
        return True

    def _kind(self, name: str) -> str:
        tensor = self._space[name]
        if tensor.dtype == "int32":
            return "tokens"
        return {2: "vector", 3: "sequence", 4: "image", 5: "volume"}[len(tensor.shape)]


def _size(shape) -> int:
    size = 1
    for each in shape[1:]:
        size *= each or 1
    return size


# Flax ---------------------------------------------------------------------------------------------------------------------------------

_MODULES = {
    "vector": (
        ("nnx.Linear({features}, {units}, param_dtype=float, rngs=rngs)", "jax.nn.relu(self.{name}(h))"),
        ("nnx.Linear({features}, {units}, param_dtype=float, rngs=rngs)", "jnp.tanh(self.{name}(h))"),
        ("nnx.BatchNorm({features}, param_dtype=float, rngs=rngs)", "self.{name}(h)"),
        ("nnx.LayerNorm({features}, param_dtype=float, rngs=rngs)", "self.{name}(h)"),
        ("nnx.RMSNorm({features}, param_dtype=float, rngs=rngs)", "self.{name}(h)"),
        ("nnx.Dropout(0.2, rngs=rngs)", "self.{name}(h)"),
        ("None", "jnp.sort(h, axis=-1)"),
        ("None", "h - jnp.median(h, axis=-1, keepdims=True)"),
        ("None", "jnp.cumsum(h, axis=-1)"),
        ("None", "jax.lax.top_k(h, 4)[0]"),
        ("None", "h[:, 1:]"),
        ("None", "jnp.concatenate([h, h[:, :3]], axis=-1)"),
        ("None", "h - h.mean(0)"),
        ("None", "jnp.take_along_axis(h, jnp.argsort(h, axis=-1), axis=-1)"),
        ("None", "jax.ops.segment_sum(h.T, jnp.arange(h.shape[1]) % 3, 3).T"),
        ("None", "jax.lax.associative_scan(jnp.add, h, axis=1)"),
    ),
}
_TOKENS = ("int32", "uint8", "int16", "int64", "uint32")
_TRANSFORMS = ("optax.adam(1e-2)", "optax.sgd(0.05, momentum=0.9)", "optax.adamw(1e-2)", "optax.rmsprop(1e-2)", "optax.lion(1e-3)")


def _nnx(chance: random.Random) -> Case:
    tokens = chance.random() < 0.5
    width = chance.choice([8, 12, 16])
    init, hidden = [], []
    if tokens:
        init.append(f"self.table = nnx.Embed(11, {width}, param_dtype=float, rngs=rngs)")
        read = chance.choice(["self.table(h)", "jnp.take(self.table.embedding[...], h, axis=0)"])
        hidden.append(("h", f"{read}.{chance.choice(['mean', 'max', 'sum'])}(1)", "h"))
    features = width
    for index in range(chance.randint(1, 4)):
        module, call = chance.choice(_MODULES["vector"])
        name, units = f"layer{index}", chance.choice([4, 6, 8, 12, 16])
        if module != "None":
            init.append(f"self.{name} = {module.format(features=features, units=units)}")
        hidden.append(("h", call.format(name=name), "h"))
        features = _features(module, call, features, units)
    init.append(f"self.out = nnx.Linear({features}, 3, param_dtype=float, rngs=rngs)")
    body = [f"    def __init__(self, rngs):\n            {chr(10).join(['            ' + line for line in init]).strip()}"]
    statements = "\n            ".join(f"{target} = {text}" for target, text, _ in hidden)
    body.append(f"    def __call__(self, h):\n            {statements}\n            return self.out(h)")
    inputs = (
        "class Net(nnx.Module):\n    " + "\n\n    ".join(body),
        "def loss(module, batch):\n        x, y = batch\n        return entropy(module(x), y).mean()",
    )
    size = f"({_ROWS}, 5)" if tokens else f"({_ROWS}, {width})"
    x = f"rng.integers(0, 11, {size}).astype('{chance.choice(_TOKENS)}')" if tokens else f"rng.normal(size={size})"
    return Case(
        kind="nnx",
        inputs=inputs,
        hidden=(),
        heads=(f"model = Trainable(Net(nnx.Rngs(0)), loss=loss, optimizer={chance.choice(_TRANSFORMS)})",),
        data=(x, f"rng.integers(0, 3, {_ROWS})"),
        plan=_plan(chance),
        batch_size=chance.choice([4, 8, 8, 5, 7, 6, 16, 11, 23]),
    )


def _features(module: str, call: str, features: int, units: int) -> int:
    if "Linear" in module:
        return units
    changed = {"top_k": 4, "h[:, 1:]": features - 1, "h[:, :3]": features + 3, "segment_sum": 3}
    return next((size for word, size in changed.items() if word in call), features)
