"""Bytes and seconds as people read them. Plain Python."""


def gibibytes(nbytes: float) -> str:
    """Bytes as people read them.

    >>> gibibytes(3 << 30), gibibytes(3 << 20)
    ('3.0 GiB', '3.0 MiB')
    """
    power, unit = next((pair for pair in ((30, "GiB"), (20, "MiB")) if abs(nbytes) >= 2 ** pair[0]), (10, "KiB"))
    return f"{nbytes / 2**power:,.1f} {unit}"


def milliseconds(seconds: float) -> str:
    """Seconds as people read them.

    >>> milliseconds(0.5), milliseconds(2e-6), milliseconds(12)
    ('500 ms', '0.002 ms', '12.0 s')
    """
    if abs(seconds) >= 1:
        return f"{seconds:,.3g} s" if abs(seconds) < 10 else f"{seconds:,.1f} s"
    return f"{seconds * 1e3:.3g} ms" if abs(seconds) >= 1e-4 else f"{seconds * 1e3:.3f} ms"
