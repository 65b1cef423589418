"""fit, evaluate and predict: read this first."""

from parafit.plan import Plan


def fit(
    model,
    x=None,
    y=None,
    *,
    batch_size=None,
    epochs=1,
    verbose="auto",
    callbacks=None,
    validation_split=0.0,
    validation_data=None,
    shuffle=True,
    class_weight=None,
    sample_weight=None,
    initial_epoch=0,
    steps_per_epoch=None,
    validation_steps=None,
    validation_batch_size=None,
    validation_freq=1,
    plan: "Plan | str" = "auto",
):
    arguments = dict(locals())
    for name in ("model", "plan"):
        arguments.pop(name)
    return model.fit(**arguments)


def evaluate(
    model, x=None, y=None, *, batch_size=None, verbose="auto", sample_weight=None, steps=None, callbacks=None, return_dict=False, plan="auto"
):
    return model.evaluate(x, y, batch_size, verbose, sample_weight, steps, callbacks, return_dict)


def predict(model, x, *, batch_size=None, verbose="auto", steps=None, callbacks=None, plan="auto"):
    return model.predict(x, batch_size, verbose, steps, callbacks)
