from .tiny_bundle import VOCAB


def test():
    assert VOCAB == 16
