"""Methods by name."""

from torch import nn

from selfsupervised.interface import METHODS, Method, MethodOptions


def build_method(name: str, encoder: nn.Module, options: MethodOptions) -> Method:
    """A method around an encoder, which it trains in place.

    Raises:
        ValueError: an unknown name, or options that the method cannot work with.
    """
    raise ValueError(f"--method {name!r} is unknown; expected one of {', '.join(METHODS)}")
