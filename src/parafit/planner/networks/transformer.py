"""Transformers, written operation by operation: GPT, LLaMA and BERT by their shapes. Plain Python."""

from dataclasses import dataclass, field, replace

from parafit.planner.program import Operation, Program, Tensor


@dataclass(frozen=True, kw_only=True)
class Transformer:
    """A stack of equal transformer blocks between an embedding and a softmax, and how it is trained.

    Attributes:
        layers: blocks.
        hidden: width between blocks.
        heads: attention heads.
        sequence: tokens of one row.
        vocabulary: rows of the embedding.
        batch: rows of the global batch.
        kv_heads: heads of keys and values; 0: as many as `heads`.
        ffn: width inside the feed-forward part; 0: four times `hidden`.
        gated: whether that part multiplies two projections (LLaMA).
        rotary: rotary positions instead of a learned table.
        biases: whether projections have biases.
        tied: whether the softmax shares the embedding's table.
        predictions: tokens of a row that the softmax sees, chosen by a mask (BERT); 0: all.
        dropout: whether masks are drawn and kept.
        fused: attention that never stores its scores (FlashAttention).
        causal: whether fused attention leaves out the upper half of the scores.
        compiled: chains of elementwise operations are one (XLA); else each is its own kernel.
        loss_passes: how often the logits are read forward, and they and their gradient are read or written backward (1: fused).
        itemsize: bytes of parameters and activations.
        activation_itemsize: bytes of activations, where products alone run in half precision; 0: as `itemsize`.
        score_itemsize: bytes of stored attention scores and weights; 0: as activations.
        logit_itemsize: bytes of the logits and their gradient.
        gradient_itemsize: bytes of an accumulated gradient.
        spare_itemsize: bytes of a gradient before it is added to the accumulated one, where all of them wait for the end of the backward
            pass, and of a reducer's copies.
        slot_bytes: bytes of optimiser state per parameter (12: a float32 copy and Adam's two moments).
    """

    layers: int
    hidden: int
    heads: int
    sequence: int = 2048
    vocabulary: int = 51200
    batch: int = 1
    kv_heads: int = 0
    ffn: int = 0
    gated: bool = False
    rotary: bool = False
    biases: bool = True
    tied: bool = True
    predictions: int = 0
    dropout: bool = False
    fused: bool = True
    causal: bool = True
    compiled: bool = False
    loss_passes: tuple[float, float] = (1.0, 1.0)
    itemsize: int = 2
    activation_itemsize: int = 0
    score_itemsize: int = 0
    logit_itemsize: int = 4
    gradient_itemsize: int = 2
    spare_itemsize: int = 0
    slot_bytes: int = 12


def transformer_program(shape: Transformer, *, name: str = "transformer") -> Program:
    """One training step of a transformer, written operation by operation.

    Args:
        shape: the network and how it is trained.
        name: what the program is called.

    >>> program = transformer_program(Transformer(layers=24, hidden=1024, heads=16, sequence=1024, vocabulary=50304, batch=8))
    >>> tokens, parameters = 8 * 1024, program.bytes_of("parameter") / 2
    >>> 6 < program.flops / tokens / parameters < 7
    True
    """
    shape = replace(shape, kv_heads=shape.kv_heads or shape.heads, ffn=shape.ffn or 4 * shape.hidden)
    net = _Net(shape)
    _embedding(net)
    net.count = shape.layers
    _attention_part(net)
    _feed_forward_part(net)
    net.count = 1
    _head(net)
    operations = (*net.forward, *(operation for group in reversed(net.backward) for operation in group), *_update(net))
    return Program(name=name, operations=operations, tensors=net.tensors, sizes=net.sizes)


@dataclass
class _Net:
    """A program while it is written: `forward` in order, `backward` in groups to be run in reverse."""

    shape: Transformer
    forward: list[Operation] = field(default_factory=list)
    backward: list[list[Operation]] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    count: int = 1
    length: int = 0

    @property
    def sizes(self) -> dict[str, int]:
        shape = self.shape
        sizes = {"batch": shape.batch, "sequence": shape.sequence, "hidden": shape.hidden, "heads": shape.heads, "ffn": shape.ffn}
        return sizes | {"vocabulary": shape.vocabulary, "predictions": shape.predictions or 1}

    @property
    def tokens(self) -> tuple[tuple[int, int], str]:
        """Sizes and dims that an activation starts with."""
        return (self.shape.batch, self.length or self.shape.sequence), "batch predictions" if self.length else "batch sequence"

    def tensor(self, name: str, sizes: tuple[int, ...], dims: str, *, role: str = "activation", itemsize: int = 0) -> str:
        dims_ = tuple("" if dim == "-" else dim for dim in dims.split())
        self.tensors[name] = Tensor(
            name=name, shape=sizes, dims=dims_, role=role, itemsize=itemsize or self.shape.itemsize, count=self.count
        )
        return name

    def activation(self, name: str, dim: str, width: int, itemsize: int = 0) -> str:
        """An activation of (batch, sequence, width) and its gradient."""
        sizes, dims = self.tokens
        itemsize = itemsize or self.shape.activation_itemsize
        for label in (name, _d(name)):
            self.tensor(label, (*sizes, width), f"{dims} {dim}", itemsize=itemsize)
        return name

    def parameter(self, name: str, sizes: tuple[int, ...], dims: str) -> str:
        self.tensor(name, sizes, dims, role="parameter")
        self.tensor(_d(name), sizes, dims, role="gradient", itemsize=self.shape.gradient_itemsize)
        if self.shape.spare_itemsize:
            self.tensor(f"{_d(name)}/spare", sizes, dims, role="gradient", itemsize=self.shape.spare_itemsize)
        self.tensor(f"{name}/slots", (*sizes, self.shape.slot_bytes // 2), f"{dims} -", role="slot", itemsize=2)
        return name

    def bytes(self, *names: str) -> float:
        return float(sum(self.tensors[name].bytes for name in names))

    def operation(self, name: str, kind: str, phase: str, inputs, outputs, **more) -> Operation:
        more.setdefault("bytes", self.bytes(*inputs, *outputs))
        return Operation(name=name, kind=kind, phase=phase, inputs=tuple(inputs), outputs=tuple(outputs), count=self.count, **more)

    def project(self, name: str, x: str, out: str, *, rows_dim: str, columns_dim: str, sizes: tuple[int, int], kernel: str = "") -> None:
        """`out = x @ kernel (+ bias)`, and the two products of its backward pass."""
        inner, columns = sizes
        (batch, length), dims = self.tokens
        rows = batch * length
        kernel = kernel or self.parameter(f"{name}/kernel", sizes, f"{rows_dim} {columns_dim}")
        flops, product = 2.0 * rows * inner * columns, self.operation
        both = tuple(dims.split())
        self.forward.append(
            product(name, "matmul", "forward", (x, kernel), (out,), flops=flops, contracted=(rows_dim,), shape=(1, rows, inner, columns))
        )
        shapes = (1, rows, columns, inner), (1, inner, rows, columns)
        back = [
            product(name, "matmul", "backward", (_d(out), kernel), (_d(x),), flops=flops, contracted=(columns_dim,), shape=shapes[0]),
            product(name, "matmul", "backward", (x, _d(out)), (_d(kernel),), flops=flops, contracted=both, shape=shapes[1]),
            self.accumulate(name, kernel),
        ]
        if self.shape.biases and name != "head":
            bias = self.parameter(f"{name}/bias", (columns,), columns_dim)
            back.append(self.operation(name, "reduction", "backward", (_d(out),), (_d(bias),), contracted=both))
        self.backward.append(back)

    def accumulate(self, name: str, kernel: str) -> Operation:
        """The product is added to the gradient: read it, read and write the sum."""
        size = self.tensors[kernel].size
        nbytes = size * (self.shape.itemsize + 2 * self.shape.gradient_itemsize)
        return self.operation(name, "elementwise", "backward", (_d(kernel),), (_d(kernel),), bytes=float(nbytes))

    def elementwise(
        self, name: str, inputs, out: str, *, kept=None, mask: str = "", passes: float = 1.0, kind: str = "elementwise"
    ) -> None:
        """`out` from `inputs`, each read once; backward reads `kept` (default: the inputs) and the gradient of `out`.

        `passes` says how many kernels in a row read and write as much (1 where they are fused).
        """
        passes = 1.0 if self.shape.compiled else passes
        kept = inputs if kept is None else kept
        masks = (mask,) if mask else ()
        made = tuple(label for label in kept if label not in (*inputs, out) and self.tensors[label].role == "activation")
        moved = passes * self.bytes(*inputs, out, *masks)
        self.forward.append(self.operation(name, kind, "forward", inputs, (out, *masks, *made), bytes=moved))
        self.backward.append([self._chain(name, kind, "backward", (*kept, *masks, _d(out)), tuple(map(_d, inputs)), passes)])

    def _chain(self, name, kind, phase, inputs, outputs, passes) -> Operation:
        return self.operation(name, kind, phase, inputs, outputs, bytes=passes * self.bytes(*inputs, *outputs), flops=0.0)

    def norm(self, name: str, x: str, out: str) -> None:
        scale = self.parameter(f"{name}/scale", (self.shape.hidden,), "hidden")
        self.forward.append(self.operation(name, "normalisation", "forward", (x, scale), (out,)))
        back = self.operation(
            name, "normalisation", "backward", (x, scale, _d(out)), (_d(x), _d(scale)), contracted=tuple(self.tokens[1].split())
        )
        self.backward.append([back])


def _d(name: str) -> str:
    return f"{name}.gradient"


def _embedding(net: _Net) -> None:
    shape = net.shape
    net.tensor("tokens", (shape.batch, shape.sequence), "batch sequence", role="input", itemsize=4)
    table = net.parameter("embedding/table", (shape.vocabulary, shape.hidden), "vocabulary hidden")
    net.count = shape.layers
    x = net.activation("block/x", "hidden", shape.hidden)
    net.count = 1
    moved = 2 * net.bytes(x)
    net.forward.append(net.operation("embedding", "gather", "forward", ("tokens", table), (x,), bytes=moved, contracted=("vocabulary",)))
    net.backward.append(
        [
            net.operation(
                "embedding", "scatter", "backward", ("tokens", _d(x)), (_d(table),), bytes=2 * moved, contracted=("batch", "sequence")
            )
        ]
    )
    if not shape.rotary:
        positions = net.parameter("positions/table", (shape.sequence, shape.hidden), "sequence hidden")
        net.forward.append(net.operation("positions", "elementwise", "forward", (x, positions), (x,)))
        net.backward.append([net.operation("positions", "reduction", "backward", (_d(x),), (_d(positions),), contracted=("batch",))])


def _attention_part(net: _Net) -> None:
    shape = net.shape
    head = shape.hidden // shape.heads
    width = (shape.heads + 2 * shape.kv_heads) * head
    net.activation("block/normed", "hidden", shape.hidden)
    net.norm("block/norm", "block/x", "block/normed")
    net.activation("block/qkv", "heads", width)
    net.project("block/attention/qkv", "block/normed", "block/qkv", rows_dim="hidden", columns_dim="heads", sizes=(shape.hidden, width))
    qkv = "block/qkv"
    if shape.rotary:
        qkv = net.activation("block/rotated", "heads", width)
        net.elementwise("block/rotary", ("block/qkv",), qkv, kept=(), passes=2.0)
    net.activation("block/context", "heads", shape.hidden)
    (_fused if shape.fused else _unfused)(net, qkv, head)
    net.activation("block/projected", "hidden", shape.hidden)
    net.project(
        "block/attention/out",
        "block/context",
        "block/projected",
        rows_dim="heads",
        columns_dim="hidden",
        sizes=(shape.hidden, shape.hidden),
    )
    _residual(net, "block/add1", "block/x", "block/projected", "block/middle")


def _fused(net: _Net, qkv: str, head: int) -> None:
    shape = net.shape
    flops = 4.0 * shape.batch * shape.heads * shape.sequence**2 * head * (0.5 if shape.causal else 1.0)
    sizes = (shape.batch * shape.heads, shape.sequence, head, shape.sequence)
    net.forward.append(net.operation("block/attention", "attention", "forward", (qkv,), ("block/context",), flops=flops, shape=sizes))
    inputs = (qkv, "block/context", _d("block/context"))
    net.backward.append([net.operation("block/attention", "attention", "backward", inputs, (_d(qkv),), flops=2.5 * flops, shape=sizes)])


def _unfused(net: _Net, qkv: str, head: int) -> None:
    """softmax(QKᵀ)V with stored scores: two batched products and what lies between them."""
    shape = net.shape
    for name in ("block/scores", "block/weights", *(("block/dropped",) if shape.dropout else ())):
        _scores(net, name)
        _scores(net, _d(name))
    batches, flops = shape.batch * shape.heads, 2.0 * shape.batch * shape.heads * shape.sequence**2 * head
    short, long = (batches, shape.sequence, head, shape.sequence), (batches, shape.sequence, shape.sequence, head)

    def product(phase, inputs, outputs, sizes):
        return net.operation("block/attention", "matmul", phase, inputs, outputs, flops=flops, shape=sizes)

    net.forward.append(product("forward", (qkv,), ("block/scores",), short))
    net.backward.append([product("backward", (_d("block/scores"), qkv), (_d(qkv),), long) for _ in range(2)])
    net.elementwise("block/softmax", ("block/scores",), "block/weights", kept=("block/weights",), kind="reduction", passes=1.0)
    weights = "block/weights"
    if shape.dropout:
        weights = "block/dropped"
        net.elementwise("block/dropout", ("block/weights",), weights, kept=(), mask=_scores(net, "block/attention/mask", 1))
    net.forward.append(product("forward", (weights, qkv), ("block/context",), long))
    back = [product("backward", (_d("block/context"), qkv), (_d(weights),), short)]
    net.backward.append([*back, product("backward", (_d("block/context"), weights), (_d(qkv),), long)])


def _scores(net: _Net, name: str, itemsize: int = 0) -> str:
    shape = net.shape
    sizes = (shape.batch, shape.heads, shape.sequence, shape.sequence)
    return net.tensor(name, sizes, "batch heads sequence -", itemsize=itemsize or shape.score_itemsize or shape.activation_itemsize)


def _feed_forward_part(net: _Net) -> None:
    shape = net.shape
    net.activation("block/normed2", "hidden", shape.hidden)
    net.norm("block/norm2", "block/middle", "block/normed2")
    width = shape.ffn * (2 if shape.gated else 1)
    net.activation("block/up", "ffn", width)
    net.project("block/ffn/up", "block/normed2", "block/up", rows_dim="hidden", columns_dim="ffn", sizes=(shape.hidden, width))
    net.activation("block/active", "ffn", shape.ffn)
    kept = ("block/up", net.activation("block/gate", "ffn", shape.ffn)) if shape.gated and not shape.compiled else ("block/up",)
    net.elementwise("block/ffn/activation", ("block/up",), "block/active", kept=kept, passes=5 / 3 if shape.gated else 1.0)
    net.activation("block/down", "hidden", shape.hidden)
    net.project("block/ffn/down", "block/active", "block/down", rows_dim="ffn", columns_dim="hidden", sizes=(shape.ffn, shape.hidden))
    _residual(net, "block/add2", "block/middle", "block/down", "block/x")


def _residual(net: _Net, name: str, x: str, branch: str, out: str) -> None:
    """`out = x + dropout(branch)`; backward joins the gradients of both branches."""
    shape = net.shape
    if out not in net.tensors:
        net.activation(out, "hidden", shape.hidden)
    mask = ()
    if shape.dropout:
        mask = (net.tensor(f"{name}/mask", (shape.batch, shape.sequence, shape.hidden), "batch sequence hidden", itemsize=1),)
    net.forward.append(net.operation(name, "elementwise", "forward", (x, branch), (out, *mask)))
    joined = 3 * net.bytes(x) + (net.bytes(*mask, x, branch) if mask else 0.0)
    net.backward.append([net.operation(name, "elementwise", "backward", (_d(out), *mask), (_d(branch),), bytes=joined)])


def _head(net: _Net) -> None:
    shape = net.shape
    x = "block/x"
    if shape.predictions:
        net.length = shape.predictions
        x = net.activation("head/chosen", "hidden", shape.hidden)
        net.forward.append(net.operation("head/chosen", "gather", "forward", ("block/x",), (x,), bytes=2 * net.bytes(x)))
        net.backward.append([net.operation("head/chosen", "scatter", "backward", (_d(x),), (_d("block/x"),), bytes=2 * net.bytes(x))])
    net.activation("head/normed", "hidden", shape.hidden)
    net.norm("head/norm", x, "head/normed")
    net.activation("logits", "vocabulary", shape.vocabulary, shape.logit_itemsize)
    tied = "embedding/table" if shape.tied else ""
    sizes = (shape.hidden, shape.vocabulary)
    net.project("head", "head/normed", "logits", rows_dim="hidden", columns_dim="vocabulary", sizes=sizes, kernel=tied)
    net.tensor("losses", *net.tokens, itemsize=4)
    reads, writes = shape.loss_passes
    made = () if reads <= 2 else (net.activation("probabilities", "vocabulary", shape.vocabulary, 4),)
    more = {"bytes": reads * net.bytes("logits"), "contracted": ("vocabulary",)}
    net.forward.append(net.operation("loss", "reduction", "forward", ("logits", "tokens"), ("losses", *made), **more))
    write = (*made, "logits", "losses"), (_d("logits"),)
    net.backward.append([net.operation("loss", "elementwise", "backward", *write, bytes=writes * net.bytes("logits", _d("logits")))])


def _update(net: _Net) -> list[Operation]:
    """Adam: read the gradient, read and write its slots, write the parameter."""
    operations = []
    for tensor in [tensor for tensor in net.tensors.values() if tensor.role == "parameter"]:
        net.count = tensor.count
        names = (tensor.name, _d(tensor.name), f"{tensor.name}/slots")
        moved = net.bytes(names[0]) + net.bytes(names[1]) + 2 * net.bytes(names[2])
        spare = (f"{names[1]}/spare",) if net.shape.spare_itemsize else ()
        operations.append(
            net.operation(
                tensor.name, "elementwise", "update", (*names, *spare), (names[0], names[2]), bytes=moved, flops=12.0 * tensor.size
            )
        )
    return operations
