"""The progress of a compiled Lanczos iteration, shown by tqdm on the host."""

from typing import Any


class _Meter:
    """A tqdm line that a compiled loop updates; the loop's last report closes it."""

    def __init__(self) -> None:
        self._line: Any = None

    def __call__(self, products, residual, last) -> None:
        if self._line is None:
            from tqdm import tqdm

            self._line = tqdm(desc="Hessian", unit=" products")
        self._line.set_postfix(residual=f"{float(residual):.1e}", refresh=False)
        self._line.update(int(products) - self._line.n)
        if last:
            self._line.close()
            self._line = None


# A single object, because the compiled program refers to it.
meter = _Meter()
