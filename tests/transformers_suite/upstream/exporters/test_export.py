"""Stand-in: upstream's tests of `torch.export` and ONNX are not in the source distribution."""


class ExportTesterMixin:
    """A base that `ModelTesterMixin` wants; it adds no tests."""
